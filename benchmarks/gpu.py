"""LLaVA-1.5-7B on a GPU: memory and time of answering, pruned and packed, of tuning, scoring and quantizing.

python benchmarks/gpu.py [--tiny] [--out FILE]

One command, no network, within eight minutes: the architecture with random weights takes the time and the memory of
real ones, and what it says means nothing. Every row stands beside what `medprune plan` predicts and the floor that the
measured read bandwidth sets.

- answers: 0, 4, 7 and 10 blocks removed, in 16 bits, NF4 and packed as AWQ's results are, at batch 1 and 8: a prompt of
  576 image tokens and 64 others, then 128 new tokens, with transformers' growing cache, its static one, and the static
  one in a CUDA graph;
- one QLoRA step at the settings of profile t4;
- the leave-one-out batch of notebook 02, in seconds an answer, against one block at a time and one question at a time;
- AWQ on four blocks, in seconds a block.

What does not fit is written down as such, and so is what a missing package keeps from being measured. --tiny builds a
model of megabytes, on a CPU too, to test the script.
"""

import argparse
import gc
import re
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn
from transformers import DynamicCache, StaticCache

sys.path.insert(0, str(Path(__file__).parent))
from seven_b import GROUP_SIZE, TEXT_TOKENS, build, read_bandwidth_gb_s, shape

from medprune.answers import decoding, timing
from medprune.models.assembled import prepare_base
from medprune.models.families import parts
from medprune.models.loading import choose_device, choose_dtype, load_processor
from medprune.models.sizes import GIB, account
from medprune.pruning import leave_one_out
from medprune.pruning.plan import apply_plan, make_plan
from medprune.quantizing.packed import gpu_kernel
from medprune.quantizing.quantize import nf4, packed_bytes, quantize
from medprune.settings import resolve
from medprune.store import Units, describe_machine, write_json
from medprune.tuning import finetune

RESULTS = Path(__file__).parent / "results"
REMOVED = (0, 4, 7, 10)
FORMS = {"16 bits": (16, "rtn"), "NF4": (4, "bnb"), "AWQ-packed": (4, "awq")}  # (bits, as `account` counts it)
MODES = ("growing cache", "static cache", "CUDA graph")
BATCHES = (1, 8)
NEW_TOKENS = 128
STEPS_S = 2.5  # of decoding that is timed, at most, for each case
AWQ_BLOCKS = 4
WARM_UP = 3


class Timer:
    """Seconds since it was made, with the GPU waited for."""

    def __init__(self):
        self.start = _now()

    def __call__(self) -> float:
        return _now() - self.start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def missing(package: str) -> str:
    """Return why a package's rows are not measured, or ''."""
    return "" if find_spec(package) else f"not measured: {package} is not installed"


def build_form(form: str, config: dict, dtype, device: str):
    """Build the model with its blocks stored as a form says."""
    return build(config, FORMS[form][0], dtype, device, nf4 if form == "NF4" else None)[0]


def remove(model, blocks: list[int]) -> None:
    """Remove blocks, numbered in the model as it is, in place."""
    apply_plan(model, make_plan(model.config, blocks, "random", ()))


def prompt(config: dict, batch: int, dtype, device: str) -> dict:
    """Return random words and pixels, one image a row."""
    ids = torch.randint(3, 900, (batch, config["image_seq_length"] + TEXT_TOKENS), device=device)
    ids[:, 8 : 8 + config["image_seq_length"]] = config["image_token_index"]
    side = config["vision_config"]["image_size"]
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, side, side, device=device).to(dtype)}


@torch.inference_mode()
def decode(model, config: dict, batch: int, mode: str, dtype, new_tokens: int) -> dict:
    """Answer a batch of prompts; return prefill_s, ms_per_token (of a step, whatever the batch) and peak bytes."""
    device = str(model.device)
    inputs, text = prompt(config, batch, dtype, device), model.config.text_config
    room = inputs["input_ids"].shape[1] + new_tokens + WARM_UP + 2
    cache = DynamicCache(config=text) if mode == "growing cache" else StaticCache(config=text, max_cache_len=room)
    with timing.peak_memory(model) as prefill:
        timer = Timer()
        logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1)[:, None]
        prefill_s = timer()

    def step():
        logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token.copy_(logits[:, -1].argmax(-1)[:, None])
        return logits

    seconds = []
    with timing.peak_memory(model) as decoding:
        if mode == "CUDA graph":
            step = captured(step)
        whole = Timer()
        for _ in range(new_tokens):
            timer = Timer()
            logits = step()
            seconds.append(timer())
            if whole() > STEPS_S:
                break
    finite = bool(torch.isfinite(logits).all()) if logits is not None else None
    return {"prefill_s": prefill_s, "ms_per_token": median(seconds) * 1e3, "steps": len(seconds),
            "prefill_peak_bytes": prefill["bytes"], "decode_peak_bytes": decoding["bytes"], "finite": finite}  # fmt: skip


def captured(step):
    """Return a function that replays one step from a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def attempt(work, **row) -> dict:
    """Return the row with what `work` measures, or with the reason why it measured nothing."""
    try:
        return row | work()
    except torch.OutOfMemoryError:
        return row | {"note": "does not fit"}
    except (RuntimeError, NotImplementedError) as error:  # a capture that CUDA refuses, a kernel that is not there
        return row | {"note": f"failed: {' '.join(str(error).split())[:120]}"}
    finally:
        free()


def answer_rows(model, form: str, full: dict, removed: int, bandwidth: float, dtype, new_tokens: int, left_s) -> list[dict]:
    """Time one form with so many blocks removed, at every batch and mode, beside the plan's bytes and the floor."""
    bits, method = FORMS[form]
    rows = []
    for batch in BATCHES:
        context = full["image_seq_length"] + TEXT_TOKENS + new_tokens
        plan = account(full, removed, bits, GROUP_SIZE, context, batch, method=method)
        row = {"form": form, "removed": removed, "batch": batch, "held_bytes": packed_bytes(model)["total"],
               "plan_held_bytes": plan.weights_bytes, "plan_total_bytes": plan.total_bytes,
               "floor_ms_per_token": plan.floor_ms_per_token(bandwidth)}  # fmt: skip
        for mode in MODES:
            if mode == "CUDA graph" and model.device.type != "cuda":
                rows.append(row | {"mode": mode, "note": "not measured: no GPU"})
            elif left_s() < 0:
                rows.append(row | {"mode": mode, "note": "not measured: the time was up"})
            else:
                rows.append(attempt(partial(decode, model, full, batch, mode, dtype, new_tokens), **row, mode=mode))
    return rows


def tuning(config: dict, dtype, device: str, steps: int, tiny: bool) -> dict:
    """Take QLoRA steps (LoRA where bitsandbytes is missing) at profile t4's settings, fewer rows where those do not fit."""
    t4 = resolve("t4")
    form = "16 bits" if missing("bitsandbytes") else "NF4"
    answers = 24 if tiny else 3 * t4.max_new_tokens
    tokens = config["image_seq_length"] + 3 * TEXT_TOKENS + answers
    refused = []
    for rows in (t4.batch_size, t4.batch_size // 2, t4.batch_size // 4, 1):
        base = {"base": form, "rows": rows, "tokens": tokens, "refused_rows": list(refused)}
        found = attempt(lambda r=rows: _train_steps(form, config, dtype, device, t4, r, tokens, answers, steps), **base)
        if "note" not in found:
            return found
        refused.append(rows)
    return found


def _train_steps(form, config, dtype, device, t4, rows, tokens, answers, steps) -> dict:
    model = build_form(form, config, dtype, device)
    model.is_loaded_in_4bit = form == "NF4"
    model = finetune.add_lora(model, t4.lora_r, t4.lora_alpha)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=t4.learning_rate)
    batch = prompt(config, rows, dtype, device)
    ids = torch.randint(3, 900, (rows, tokens), device=device)
    ids[:, : batch["input_ids"].shape[1]] = batch["input_ids"]
    kept = torch.arange(tokens - answers - 1, tokens - 1, device=device)
    labels, seconds = ids[:, kept + 1], []
    with timing.peak_memory(model) as peak:
        for _ in range(steps):
            timer = Timer()
            with torch.autocast(model.device.type, dtype):
                out = model(input_ids=ids, pixel_values=batch["pixel_values"], logits_to_keep=kept, use_cache=False)
            loss = finetune.answer_loss(out, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(timer())
    return {"step_s": min(seconds), "peak_bytes": peak["bytes"], "loss": float(loss.detach())}


def scoring(model, full: dict, new_tokens: int, batch_rows: int, folder: Path) -> dict:
    """Time answers without a block: the leave-one-out batch, one block at a time, one question at a time."""
    processor = load_processor(prepare_base("tiny"))
    side, patch = full["vision_config"]["image_size"], full["vision_config"]["patch_size"]
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    processor.patch_size = patch
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    noise = np.random.default_rng(0).integers(0, 255, (2, side, side, 3), dtype=np.uint8)
    questions = ("What is the name of this disease?", "How is it treated?", "What are the signs?")
    rows = []
    for number, pixels in enumerate(noise):
        path = folder / f"noise-{number}.png"
        Image.fromarray(pixels).save(path)
        rows += [{"path": str(path), "question": q} for q in questions]
    blocks = list(range(2, 10))
    units = Units(folder / "units.jsonl", "gpu")
    units.add("original", [])
    ask = partial(decoding.answer, model, processor, max_new_tokens=new_tokens, batch_rows=batch_rows)
    ask(rows[:1])  # kernels are chosen and compiled
    timer = Timer()
    leave_one_out.leave_one_out(model, processor, rows, blocks, units, new_tokens, batch_rows)
    together = timer() / (len(rows) * len(blocks))
    timer = Timer()
    for b in blocks[:2]:
        ask(rows, skip=[b] * len(rows))
    by_block = timer() / (2 * len(rows))
    timer = Timer()
    for row in rows[:3]:
        ask([row], skip=[blocks[0]])
    one_by_one = timer() / 3
    model.config.image_token_id = full["image_token_index"]
    return {"new_tokens": new_tokens, "batch_rows": batch_rows, "leave_one_out_s_per_answer": together,
            "block_by_block_s_per_answer": by_block, "question_by_question_s_per_answer": one_by_one,
            "ratio": one_by_one / together}  # fmt: skip


def awq(model, full: dict, rows: int, tokens: int, dtype) -> dict:
    """Quantize the first few blocks by AWQ; return seconds a block, and the peak."""
    keep = min(AWQ_BLOCKS, full["text_config"]["num_hidden_layers"])
    remove(model, list(range(keep, len(parts(model).blocks))))
    batch = prompt(full, rows, dtype, str(model.device))
    ids = torch.randint(3, 900, (rows, tokens), device=model.device)
    ids[:, : batch["input_ids"].shape[1]] = batch["input_ids"]
    info = quantize(model, "awq", 4, GROUP_SIZE, {"input_ids": ids, "pixel_values": batch["pixel_values"]})[1]
    every = full["text_config"]["num_hidden_layers"]
    return {"blocks": keep, "rows": rows, "tokens": tokens, "s_per_block": info["seconds"] / keep,
            "all_blocks_s": info["seconds"] / keep * every, "peak_bytes": info["peak_bytes"]}  # fmt: skip


def measure(tiny: bool, limit_s: float, folder: Path) -> dict:
    """Run every part that fits into the time; return the result that is written."""
    device = choose_device()
    dtype, full, began = choose_dtype(device), shape(tiny), time.monotonic()
    bandwidth = read_bandwidth_gb_s(GIB // 64 if tiny else GIB)
    new_tokens, counts = (4, (0, 4)) if tiny else (NEW_TOKENS, REMOVED)

    def left_s():
        return limit_s - (time.monotonic() - began)

    result = {"machine": describe_machine(), "model": "tiny" if tiny else "llava-1.5-7b, random weights", "dtype": str(dtype),
              "bandwidth_gb_s": bandwidth, "kernel_of_packed": "Triton" if gpu_kernel(torch.device(device), dtype) else "none"}  # fmt: skip
    small_card = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 40 * GIB
    scored = "NF4" if small_card and not missing("bitsandbytes") else "16 bits"
    answers = []
    for form in FORMS:
        say(f"{form}: answers")
        note = missing("bitsandbytes") if form == "NF4" else ""
        if note:
            answers += [{"form": form, "removed": n, "note": note} for n in counts]
            continue
        made = {}

        def construct(form=form, made=made):
            with timing.peak_memory(nn.Module()) as peak:
                made["model"] = build_form(form, full, dtype, device)
            return {"load_peak_bytes": peak["bytes"]}

        loaded = attempt(construct, form=form, removed=0)
        if "note" in loaded:
            answers.append(loaded)
            continue
        model, gone = made.pop("model"), 0
        if form == scored:
            say("leave-one-out")
            size = (6, 4) if tiny else (64, 12 if small_card else 48)
            result["leave_one_out"] = attempt(partial(scoring, model, full, *size, folder), form=form)
        for n in counts:
            remove(model, list(range(2, 2 + n - gone)))
            gone = n
            rows = answer_rows(model, form, full, n, bandwidth, dtype, new_tokens, left_s)
            answers += [r | ({"load_peak_bytes": loaded["load_peak_bytes"]} if n == 0 else {}) for r in rows]
        if form == "16 bits":
            say(f"AWQ of {AWQ_BLOCKS} blocks")
            size = (4, full["image_seq_length"] + TEXT_TOKENS + 4) if tiny else (resolve("t4").awq_rows, 840)
            note = missing("awq")
            result["awq"] = {"note": note} if note else attempt(partial(awq, model, full, *size, dtype))
        del model
        free()
    say("tuning")
    result["tuning"] = tuning(full, dtype, device, 2 if tiny else 3, tiny)
    dense = next((a for a in answers if a["form"] == "16 bits" and a.get("mode") == MODES[0] and "ms_per_token" in a), None)
    for a in answers:
        if dense and "ms_per_token" in a:
            a["speedup"] = dense["ms_per_token"] / a["ms_per_token"] * a["batch"]  # in tokens a second
    return result | {"answers": answers, "seconds": time.monotonic() - began}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def report(result: dict) -> str:
    """Return the result as tables for reading."""
    table = pd.DataFrame(result["answers"])
    gib = [c for c in table if c.endswith("_bytes")]
    table[gib] = table[gib].astype(float) / GIB
    table = table.rename(columns={c: c.removesuffix("_bytes") + "_gib" for c in gib}).drop(columns="finite", errors="ignore")
    lines = [f"{result['machine']['gpu'] or result['machine']['cpu']}, {result['dtype']}, reads {result['bandwidth_gb_s']:.0f} GB/s; "
             f"{result['model']}; speedup: tokens a second against 16 bits, all blocks, growing cache, batch 1 (the paper: 4.2)",
             table.round(2).astype(object).fillna("").to_string(index=False)]  # fmt: skip
    for part in ("tuning", "leave_one_out", "awq"):
        said = {k: round(v / GIB, 3) if k.endswith("_bytes") else round(v, 4) if isinstance(v, float) else v
                for k, v in result.get(part, {}).items()}  # fmt: skip
        lines.append(f"{part}: " + ", ".join(f"{k.replace('_bytes', '_gib')} {v}" for k, v in said.items()))
    return "\n\n".join([*lines, f"{result['seconds']:.0f} s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a model of megabytes, on a CPU too, to test the script")
    parser.add_argument("--limit-s", type=float, default=330, help="seconds after which no further answers are timed")
    parser.add_argument("--out", type=Path, help="default: results/gpu-<name of the GPU>.json")
    args = parser.parse_args()
    if not (args.tiny or torch.cuda.is_available()):
        parser.error("no CUDA GPU is here: --tiny tests the script on a CPU")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.tiny, args.limit_s, Path(folder))
    name = re.sub(r"[^a-z0-9]+", "-", (result["machine"]["gpu"] or "cpu").lower()).strip("-")
    write_json(args.out or RESULTS / f"gpu-{name}.json", result)
    print(report(result))


if __name__ == "__main__":
    main()
