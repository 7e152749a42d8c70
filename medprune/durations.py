"""Predict how long each stage takes, from a second's probe of the machine and the configuration's shapes.

A stage's time is its floating-point operations over the measured rate of a 16-bit matrix product, or for decoding its
bytes over the measured bandwidth if that takes longer, divided by the share of those rates that runs reach.
"""

import json
import math
import sys
import time

from medprune.accounting import account
from medprune.config import judge_names
from medprune.preflight import QUESTION_TOKENS, judge_params
from medprune.shapes import shape_of

REACHED = 0.5  # share of the probe's rates; a run of `local` on two cores came to between 0.4 and 0.6 of them
START_S = 10  # a kernel and its imports
AWQ_PASSES = 21  # the grid of autoawq, and the pass that collects inputs
CONTROLS = 8  # other removal orders that notebook 03 answers for, besides output similarity's
JUDGE_TOKENS = 700  # rubric, question, reference, answer and reply


def probe(device: str, hidden: int = 2048, intermediate: int = 2048) -> dict[str, float]:
    """Measure {"flops_per_s", "bytes_per_s"}: a 16-bit matrix product and a copy, the best of a few, in about a second.

    The product is that of some hundred tokens (on a GPU some thousand) with a matrix of hidden x intermediate, a
    block's largest: a small model's reach a fraction of what a processor can do.
    """
    import torch

    tokens, size = (8192, 2**30) if device == "cuda" else (512, 2**28)
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((tokens, hidden), (hidden, intermediate)))
    held = torch.ones(size, dtype=torch.uint8, device=device)

    def best(work):
        work()
        times = []
        for _ in range(4):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    return {"flops_per_s": 2 * tokens * hidden * intermediate / best(lambda: a @ b), "bytes_per_s": 2 * size / best(held.clone)}


def predict_seconds(settings: dict, config, rates: dict[str, float], checkpointing: bool = False) -> dict[str, float]:
    """Return {stage: seconds}; NaN for a judge whose size cannot be told, and 0 for what a server does.

    settings: a profile's (`config.settings`). rates: as `probe` measures them. Blocks that are gone are not deducted.
    """
    shape, whole = shape_of(config), account(config)
    n, flops, bandwidth = whole.total_params, REACHED * rates["flops_per_s"], REACHED * rates["bytes_per_s"]
    prompt, removable = shape.vision_tokens + QUESTION_TOKENS, shape.blocks - len(settings["protected_blocks"])
    conversation = prompt + 2 * QUESTION_TOKENS + 3 * settings["max_new_tokens"]
    n_test, n_counts = settings["n_test"] or 39, len(settings["recover"])

    def answering(rows, length):
        batches = math.ceil(rows / settings["batch_rows"])
        size = rows / batches
        step = max(whole.weights_bytes / bandwidth, 2 * n * size / flops)
        return batches * (2 * n * size * prompt / 3 / flops + length * step)  # three questions share a prompt's image

    def training(steps):
        passes = 8 if checkpointing else 6
        return steps * passes * n * settings["batch_size"] * conversation / flops

    test = answering(3 * n_test, settings["max_new_tokens"])
    rows = 3 * settings["n_calibration"]
    teacher = 2 * n * rows * (prompt + settings["max_new_tokens"]) / flops * removable / 2  # one criterion, all blocks
    greedy = max(settings["recover"]) * teacher / 3
    recipes = len(settings["recipes"]) * (len(settings["data_fractions"]) + settings["equal_time"])
    n_models = (2 + n_counts) * len(settings["methods"]) + 4
    n_awq = 4 + n_counts
    awq = n_awq * AWQ_PASSES * 2 * n * settings["awq_rows"] * min(conversation, settings["awq_tokens"]) / flops
    answers = 3 * n_test * (len(settings["blocks_removed"]) + n_counts + 2 + n_models)
    judges = [judge_params(name) for name in judge_names(settings["judge"]) if name not in ("server", "reference", "cosine")]
    judge_s = 2 * sum(judges) * JUDGE_TOKENS * answers / flops
    seconds = {
        "01_finetune": training(settings["sft_steps"]) + test,
        "02_layer_importance": answering(rows * (removable + 1), settings["calibration_tokens"]) + 2 * teacher + greedy,
        "03_prune_sweep": (len(settings["blocks_removed"]) + CONTROLS * n_counts) * test,
        "04_sft_recovery": (n_counts + 1 + recipes) * (training(settings["recovery_steps"]) + test),
        "05_awq_vs_bnb": awq + n_models * test,
        "06_judge_eval": judge_s,
    }
    return {stage: START_S + s for stage, s in seconds.items()}


def in_words(seconds: float) -> str:
    """Return seconds as "40 s", "12 min" or "3.5 h"; "?" for NaN."""
    if math.isnan(seconds):
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main(hidden: str, intermediate: str) -> None:
    """Print this machine's rates for a model of these sizes as JSON."""
    from medprune.model import choose_device

    device = choose_device()
    print(json.dumps(probe(device, int(hidden), int(intermediate)) | {"device": device}))


if __name__ == "__main__":
    main(*sys.argv[1:])
