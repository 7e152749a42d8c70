"""LLaVA-1.5-7B in 4 GiB: its architecture with random weights, built block by block, packed, pruned and asked.

python benchmarks/seven_b.py [--tiny] [--out FILE]

Each configuration runs in a process of its own: 16-bit dense with every block, 4-bit RTN (groups of 64) with 0, 7, 8 and
10 blocks removed, and with 0 and 4 where the head and the vision tower are packed too. A Linear is made, packed and
freed before the next one is, and the 16-bit parts that stay come last, so that building holds hardly more than the
finished model. Random weights take the time and the memory of real ones; what they
answer means nothing. Memory is the process's resident set, and what it held before the model was
built (Python, torch, transformers) stands apart as overhead_bytes. On CUDA it is the allocator's, without overhead.
"""

import argparse
import copy
import ctypes
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import psutil
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from medprune.answers.decoding import RoomyCache
from medprune.answers.timing import peak_memory
from medprune.models.families import parts
from medprune.models.loading import choose_device, choose_dtype, ready, weight_bytes
from medprune.models.sizes import GIB, account, named_config, shape_of
from medprune.quantizing.packed import PackedLinear
from medprune.quantizing.quantize import packed_bytes, target_linears
from medprune.store import describe_machine, write_json

GROUP_SIZE = 64
CASES = ((0, 16), (0, 4), (7, 4), (8, 4), (10, 4), (0, 4, "whole"), (4, 4, "whole"))  # (blocks removed, bits, of which parts)
RESULTS = Path(__file__).parent / "results" / "seven_b.json"
TEXT_TOKENS = 64  # the question and its chat template
# While building, freed memory goes back at once, so that the resident set is what is held, and not what was; while
# answering it is kept for the next layer (`keep_freed_memory`), whose pages the system would clear again at every turn.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "2"}


def shape(tiny: bool) -> dict:
    """Return LLaVA-1.5-7B's configuration, or one of its kind that is built in a second."""
    config = copy.deepcopy(named_config("llava-1.5-7b"))
    if tiny:
        config["text_config"] |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12,
                                  "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1024}  # fmt: skip
        config["vision_config"] |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
                                    "num_attention_heads": 2, "image_size": 56, "projection_dim": 64}  # fmt: skip
        config |= {"image_token_index": 1000, "image_seq_length": 16}
    return config


def build(config: dict, bits: int, dtype: torch.dtype, device: str, pack=None, whole: bool = False):
    """Return (model in eval mode, bytes by which a folder is smaller), never holding more than the model itself.

    pack: what makes a packed layer of a Linear; the default rounds to nearest. whole: head and vision tower too. A folder
    is smaller where packed layers are held in the form that the int4 kernel runs.
    """
    pack = pack or (lambda linear: PackedLinear.from_linear(linear, bits, GROUP_SIZE))
    with init_empty_weights(include_buffers=False):
        model = LlavaForConditionalGeneration(LlavaConfig(**config))
    smaller = 0
    for name in target_linears(model, bits, whole, whole):
        linear = model.get_submodule(name)
        fill(linear, dtype, device)
        packed = pack(linear)
        stored = weight_bytes(packed)
        with torch.no_grad():  # one row turns it into its running form while the rest is not there yet
            packed(torch.zeros(1, linear.in_features, dtype=dtype, device=device))
        smaller += weight_bytes(packed) - stored
        model.set_submodule(name, packed)
        del linear
    for module in model.modules():
        fill(module, dtype, device)
    return ready(model, device), smaller


def fill(module: nn.Module, dtype: torch.dtype, device: str) -> None:
    """Give a module's own parameters, where they are on the meta device, memory and random values."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            if value.dim() > 1:
                value.normal_(0, 0.02)
            else:
                value.fill_(1.0 if name == "weight" else 0.0)  # norms and biases
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.device.type != torch.device(device).type:
            setattr(module, name, buffer.to(device))


@torch.inference_mode()
def ask(model, config: dict, dtype: torch.dtype, new_tokens: int) -> dict:
    """Answer one image question of random pixels and words; return seconds, ms a token and the KV cache's bytes."""
    device, image_tokens = model.device, config["image_seq_length"]
    side = config["vision_config"]["image_size"]
    ids = torch.randint(3, 900, (1, image_tokens + TEXT_TOKENS), device=device)
    ids[:, 8 : 8 + image_tokens] = config["image_token_index"]
    pixels = torch.randn(1, 3, side, side, device=device).to(dtype)
    cache = RoomyCache(len(parts(model).blocks), ids.shape[1] + new_tokens)
    seconds, extra = [], {"pixel_values": pixels}
    for _ in range(new_tokens + 1):  # the prefill gives the first token
        started = time.perf_counter()
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra).logits
        ids, extra = logits[:, -1].argmax(-1)[:, None], {}
        ids.cpu()  # waits for the GPU
        seconds.append(time.perf_counter() - started)
    kv_cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {"prompt_tokens": image_tokens + TEXT_TOKENS, "new_tokens": new_tokens, "prefill_s": seconds[0],
            "ms_per_token": median(seconds[1:]) * 1e3, "ms_per_token_fastest": min(seconds[1:]) * 1e3,
            "kv_cache_bytes": kv_cache_bytes, "finite": bool(torch.isfinite(logits).all())}  # fmt: skip


def run_case(removed: int, bits: int, tiny: bool, new_tokens: int, whole: bool = False) -> dict:
    """Build one configuration and ask it; return everything measured and predicted. Runs in its own process."""
    device = choose_device()
    dtype = choose_dtype(device)
    config = shape(tiny)
    full = copy.deepcopy(config)
    config["text_config"]["num_hidden_layers"] -= removed
    small = shape(tiny=True)  # what torch loads with its first forward is overhead, and not the model's
    ask(build(small, bits, dtype, device)[0], small, dtype, 1)
    overhead = resident_bytes(device)
    started = time.perf_counter()
    with peak_memory(nn.Module()) as building:
        model, smaller = build(config, bits, dtype, device, whole=whole)
    build_s = time.perf_counter() - started
    keep_freed_memory()
    held_before = resident_bytes(device)
    with peak_memory(nn.Module()) as answering:
        said = ask(model, config, dtype, new_tokens)
    built_peak, answer_peak = overhead + building["bytes"], held_before + answering["bytes"]
    measured = packed_bytes(model)
    weights = measured["total"]
    context = said["prompt_tokens"] + new_tokens
    count = partial(account, full, removed, bits, GROUP_SIZE, context, quantize_head=whole, quantize_vision=whole)
    plan = count()
    # The int4 kernel's bf16 tables and the way back to the exact scales: 36 bits a group where a folder has 20.
    running = device == "cpu" and bits == 4
    held = count(scale_bits=32) if running else plan
    # A folder's bits that lead back to the exact scales are not read while decoding.
    read = count(scale_bits=32, zero_point_bits=0) if running else plan
    # what answering holds besides: the larger of the prompt's and the vision tower's working sets
    working = working_bytes(full, context, removed)
    peak = max(built_peak, answer_peak)
    return {
        "name": f"{'dense 16-bit' if bits == 16 else f'{bits}-bit RTN'}{', head and tower too' if whole else ''}, {removed} removed",
        "blocks_removed": removed, "bits": bits, "head_and_tower": whole, "params_b": plan.params_b, "build_s": build_s, **said,
        "peak_bytes": peak, "overhead_bytes": overhead, "peak_without_overhead_bytes": peak - overhead,
        "build_peak_without_overhead_bytes": built_peak - overhead,
        "held_bytes": measured, "stored_bytes": weights - smaller,
        "plan_bytes": plan.weights_bytes, "plan_held_bytes": held.weights_bytes, "plan_total_bytes": held.total_bytes,
        "plan_peak_bytes": held.total_bytes + working,
        "stored_against_plan_frac": (weights - smaller) / plan.weights_bytes - 1,
        "held_against_plan_frac": weights / held.weights_bytes - 1,
        "peak_against_plan_frac": (peak - overhead) / (held.total_bytes + working) - 1,
        "decode_read_bytes": read.decode_read_bytes,
    }  # fmt: skip


def working_bytes(config: dict, context: int, removed: int) -> int:
    """Return what one answer of `context` tokens holds beside weights and cache: sums over the configuration's shapes.

    One block's K and V (a growing cache is copied block by block) + the larger of two working sets in 16 bits (prefill,
    context x (3 x intermediate + 4 x hidden) and a mask; vision tower, all layers' states + 2 x its MLP) + the logits
    of one position in float32 and 16 bits.
    """
    sizes, vision = shape_of(config), config["vision_config"]
    prefill = 2 * context * (3 * sizes.intermediate + 4 * sizes.hidden + context)
    states = (sizes.vision_layers + 1) * vision["hidden_size"] + 2 * vision["intermediate_size"]
    block = account(config, removed, context=context).kv_cache_bytes // (sizes.blocks - removed)
    return block + max(prefill, 2 * sizes.vision_tokens * states) + 6 * sizes.vocab


def resident_bytes(device: str) -> int:
    """Return what this process holds, 0 where the model is on a GPU, whose allocator counts from nothing."""
    return psutil.Process().memory_info().rss if device == "cpu" else 0


def keep_freed_memory(size_bytes: int = 64 << 20) -> None:
    """Let glibc keep freed blocks of up to so many bytes from now on; elsewhere nothing is changed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option in (-3, -1) if mallopt else ():  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        mallopt(option, size_bytes)


def read_bandwidth_gb_s(size_bytes: int = GIB, repeats: int = 6) -> float:
    """Return the fastest GB/s at which all threads together read an array far larger than any cache."""
    array = torch.ones(size_bytes // 4, dtype=torch.float32, device=choose_device())
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        float(array.sum())
        best = min(best, time.perf_counter() - started)
    return array.nbytes / best / 1e9


def in_own_process(*words: str) -> dict:
    """Run this script again with `words` and return the JSON of its last line."""
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True,
                          env=os.environ | ALLOCATOR)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def report(result: dict) -> str:
    """Return the result as a table for reading."""
    head = (f"{'configuration':36s} {'peak GiB':>9s} {'weights':>8s} {'plan':>7s} {'differ':>7s} {'peak/plan':>9s}"
            f" {'prefill s':>9s} {'ms/token':>9s} {'floor':>7s} {'faster':>7s}")  # fmt: skip
    lines = [head]
    for case in result["cases"]:
        lines.append(
            f"{case['name']:36s} {case['peak_without_overhead_bytes'] / GIB:9.2f}"
            f" {case['held_bytes']['total'] / GIB:8.3f} {case['plan_held_bytes'] / GIB:7.3f}"
            f" {case['held_against_plan_frac']:+7.2%} {case['peak_against_plan_frac']:+9.2%}"
            f" {case['prefill_s']:9.1f} {case['ms_per_token']:9.1f} {case['floor_ms_per_token']:7.1f} {case['speedup']:6.2f}x"
        )
    lines += ["", f"read bandwidth {result['bandwidth_gb_s']:.1f} GB/s; process overhead, apart from the peaks, "
              f"{max(c['overhead_bytes'] for c in result['cases']) / GIB:.2f} GiB",
              f"16-bit dense to 4-bit with {result['ratio_blocks_removed']} blocks removed: "
              f"{result['speedup']:.2f} x in ms/token, {result['speedup_at_floor']:.2f} x by the bytes that both read (the paper: 4.2)"]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a model of megabytes, to test the script")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--case", nargs="+", metavar="WORD", help="one configuration, blocks removed and bits and perhaps whole, as JSON")
    parser.add_argument("--bandwidth", action="store_true", help="the read bandwidth alone, as JSON")
    args = parser.parse_args()
    if args.case:
        removed, bits, *whole = args.case
        print(json.dumps(run_case(int(removed), int(bits), args.tiny, args.new_tokens, bool(whole))))
        return
    if args.bandwidth:
        print(json.dumps(read_bandwidth_gb_s(GIB // 64 if args.tiny else GIB)))
        return
    passed = ["--new-tokens", str(args.new_tokens), *(["--tiny"] if args.tiny else [])]
    load_before = os.getloadavg()[0]
    bandwidth, cases = in_own_process("--bandwidth", *passed), []
    for words in CASES:
        case = in_own_process("--case", *map(str, words), *passed)
        case["floor_ms_per_token"] = case["decode_read_bytes"] / bandwidth / 1e6
        case["times_floor"] = case["ms_per_token"] / case["floor_ms_per_token"]
        print(f"{case['name']}: built in {case['build_s']:.0f} s", file=sys.stderr)
        cases.append(case)
    dense = next(c for c in cases if c["bits"] == 16)
    packed = next(c for c in cases if c["bits"] == 4 and c["blocks_removed"] == 7 and not c["head_and_tower"])
    for case in cases:
        case["speedup"] = dense["ms_per_token"] / case["ms_per_token"]
    result = {
        "machine": describe_machine() | {"memory_bytes": psutil.virtual_memory().total, "load_before": load_before},
        "model": "tiny" if args.tiny else "llava-1.5-7b, random weights", "group_size": GROUP_SIZE,
        "bandwidth_gb_s": bandwidth, "cases": cases, "ratio_blocks_removed": 7,
        "speedup": packed["speedup"], "speedup_at_floor": dense["decode_read_bytes"] / packed["decode_read_bytes"],
    }  # fmt: skip
    write_json(args.out, result)
    print(report(result))


if __name__ == "__main__":
    main()
