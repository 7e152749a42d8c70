"""Predict how long each stage takes, from a few seconds' probe of the machine and the configuration's shapes.

The probe runs one decoder block of the base's width as the stages run it: a prompt, a step of a batch and of one row, a
training step with adapters. A stage is so many of each, plus the head, AWQ's and HQQ's searches by the bytes they move,
the vision tower's training in float32, and for every model its loading and saving.
"""

import json
import math
import sys
import time

from medprune.accounting import account
from medprune.config import TARGETS, judge_names
from medprune.preflight import QUESTION_TOKENS, chat_judge_params
from medprune.shapes import shape_of

START_S = 10  # a kernel and its imports
LOAD_BYTES_PER_S = 3e8  # of a model's weights: reading, checking and copying them
SEARCHES = 20  # AWQ's grid, and HQQ's iterations: each rounds every weight of the blocks once
SEARCH_BYTES = 60  # moved for a weight rounded and multiplied once, in float32
RECIPE_COST = {"lora": 1.0, "projector": 0.7, "last_blocks": 0.55, "distill": 1.25}  # of a step, in LoRA's
CONTROLS = 8  # other removal orders that notebook 03 answers for, besides output similarity's
JUDGE_TOKENS = 700  # rubric, question, reference, answer and reply
VISION_BATCH, VISION_REACHED = 32, 1 / 3  # images a step of the tower's own training; share of the plain product's rate
PREFIX = 64  # tokens before the probe's steps


def probe(device: str, hidden: int = 576, intermediate: int = 1536, rows: int = 128) -> dict[str, float]:
    """Measure one Llama block of hidden x intermediate, the best of a few, in some seconds; return rates.

    flops_per_s of a prompt of rows x PREFIX tokens (2 a weight and token), train_flops_per_s of two such rows forward
    and backward with rank-16 adapters (4 a frozen weight and token), step_s and step_1_s of a step of `rows` rows and of
    one, float32_flops_per_s of a plain product, bytes_per_s of a copy.
    """
    from medprune.progress import quiet

    quiet()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import DynamicCache, LlamaConfig, LlamaModel

    from medprune.attention import GROUPED
    from medprune.model import choose_dtype

    dtype = choose_dtype(device)
    heads = next(n for n in range(max(1, hidden // 64), 0, -1) if hidden % (2 * n) == 0)
    config = LlamaConfig(num_hidden_layers=1, vocab_size=8, hidden_size=hidden, intermediate_size=intermediate,
                         num_attention_heads=heads, num_key_value_heads=heads)  # fmt: skip
    block = LlamaModel._from_config(config, dtype=dtype, attn_implementation=GROUPED).to(device).eval()
    weights = sum(p.numel() for p in block.layers.parameters())
    prompt = torch.randn(rows, PREFIX, hidden, dtype=dtype, device=device)

    def best(work, repeats=4):
        work()
        times = []
        for _ in range(repeats):
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            times.append(time.perf_counter() - start)
        return min(times)

    def step(n):
        cache = DynamicCache(config=config)
        block(inputs_embeds=prompt[:n], past_key_values=cache)
        return best(lambda: block(inputs_embeds=prompt[:n, :1], past_key_values=cache), 8)

    with torch.inference_mode():
        forward_s = best(lambda: block(inputs_embeds=prompt, past_key_values=DynamicCache(config=config)))
        step_s, step_1_s = step(rows), step(1)
        a, b = (torch.randn(size, device=device) for size in ((256, hidden), (hidden, intermediate)))
        float32_s = best(lambda: a @ b)
        held = torch.ones(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
        copy_s = best(held.clone)
    adapted = get_peft_model(block, LoraConfig(r=16, target_modules=list(TARGETS)), autocast_adapter_dtype=False)
    pair = torch.randn(2, 4 * PREFIX, hidden, dtype=dtype, device=device)
    train_s = best(lambda: adapted(inputs_embeds=pair.clone().requires_grad_()).last_hidden_state.float().sum().backward())
    return {
        "flops_per_s": 2 * weights * rows * PREFIX / forward_s, "train_flops_per_s": 4 * weights * 8 * PREFIX / train_s,
        "step_s": step_s, "step_1_s": step_1_s, "rows": rows, "bytes_per_s": 2 * held.nbytes / copy_s,
        "float32_flops_per_s": 2 * 256 * hidden * intermediate / float32_s,
    }  # fmt: skip


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def predict_seconds(settings: dict, config, rates: dict[str, float], checkpointing: bool = False) -> dict[str, float]:
    """Return {stage: seconds}; NaN for a judge whose size cannot be told, and 0 for what a server does.

    settings: a profile's (`config.settings`). rates: as `probe` measures them. Blocks that are gone are not deducted.
    """
    shape, whole, flops = shape_of(config), account(config), rates["flops_per_s"]
    block_params = sum(n_in * n_out for _, n_in, n_out in shape.linears)
    linears, head = shape.blocks * block_params, shape.hidden * shape.vocab
    prompt, removable = shape.vision_tokens + QUESTION_TOKENS, shape.blocks - len(settings["protected_blocks"])
    # three questions and answers; QUESTION_TOKENS and the answers' limit are ceilings
    conversation = shape.vision_tokens + 3 * (QUESTION_TOKENS / 2 + 0.75 * settings["max_new_tokens"])
    n_test, n_counts = settings["n_test"] or 39, len(settings["recover"])

    def step(size):
        more = (rates["step_s"] - rates["step_1_s"]) * (size - 1) / max(1, rates["rows"] - 1)
        head_s = max(2 * head * size / flops, 2 * head / rates["bytes_per_s"])
        return shape.blocks * (rates["step_1_s"] + max(0, more)) + head_s

    def answering(rows, length):
        batches = math.ceil(rows / settings["batch_rows"])
        size = rows / batches
        # three questions share a prompt's image; rows that end leave the batch, and most end before the limit
        return batches * (2 * linears * size * prompt / 3 / flops + length * step(0.8 * size))

    def training(steps):
        tokens = steps * settings["batch_size"] * conversation
        return tokens * (4 * (linears + head) * (1.5 if checkpointing else 1) / rates["train_flops_per_s"])

    def model():  # loaded, its answers timed, and saved
        return 2 * whole.weights_bytes / LOAD_BYTES_PER_S + min(4, 32 * step(1))

    test = answering(3 * n_test, settings["max_new_tokens"])
    rows = 3 * settings["n_calibration"]
    teacher = 2 * linears * rows * (prompt + settings["max_new_tokens"]) / flops * removable / 2  # one criterion, all blocks
    greedy = max(settings["recover"]) * teacher / 3
    repeats = len(settings["data_fractions"]) + settings["equal_time"]
    ways = n_counts + 1 + len(settings["recipes"]) * repeats
    trainings = n_counts + 1 + sum(RECIPE_COST[name] for name in settings["recipes"]) * repeats
    n_models = (2 + n_counts) * len(settings["methods"]) + 4
    n_searched = (4 + n_counts) + (2 + n_counts if "hqq" in settings["methods"] else 0)  # AWQ's models and HQQ's
    search = SEARCHES * linears * SEARCH_BYTES / rates["bytes_per_s"]
    answers = 3 * n_test * (len(settings["blocks_removed"]) + n_counts + 2 + n_models)
    judge_s = 2 * sum(chat_judge_params(judge_names(settings["judge"]))) * JUDGE_TOKENS * answers / flops
    images = settings["vision_steps"] * VISION_BATCH
    vision = 6 * images * shape.vision_tokens * shape.vision_params / (VISION_REACHED * rates["float32_flops_per_s"])
    seconds = {
        "01_finetune": vision + training(settings["sft_steps"]) + test + model(),
        "02_layer_importance": answering(rows * (removable + 1), settings["calibration_tokens"]) + 2 * teacher + greedy,
        "03_prune_sweep": (len(settings["blocks_removed"]) + CONTROLS * n_counts) * test,
        "04_sft_recovery": trainings * training(settings["recovery_steps"]) + ways * (test + model()),
        "05_awq_vs_bnb": n_searched * search + n_models * (test + model()),
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


def main(hidden: str, intermediate: str, rows: str) -> None:
    """Print this machine's rates for a model of these sizes, in batches of so many rows, as JSON."""
    from medprune.model import choose_device

    device = choose_device()
    print(json.dumps(probe(device, int(hidden), int(intermediate), int(rows)) | {"device": device}))


if __name__ == "__main__":
    main(*sys.argv[1:])
