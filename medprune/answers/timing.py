"""Milliseconds per token, peak memory, and one model's answers with both."""

import gc
import time
from contextlib import contextmanager
from threading import Event, Thread

import psutil
import torch

from medprune.answers.decoding import RoomyCache, answer_rows, forward
from medprune.answers.prompts import inputs_of, see
from medprune.device import cards, growth, start_peak, wait
from medprune.models.families import parts
from medprune.models.loading import weight_bytes

REPEATS = 4
LIMIT_S = 4.0  # after which no further repeat is begun, for models that are slow on this machine


@torch.inference_mode()
def measure_decoding(model, processor, row: dict, new_tokens: int = 8) -> dict:
    """Return ms_per_token, the fastest of REPEATS, at batch size 1, and peak_bytes while answering.

    Tokens are forced past the end of sequence, so that every model decodes the same number; the first, which comes
    out of the prefill, is not counted.
    """
    prompt = see(processor, row["path"], model.dtype, row["question"])
    ids, shown = prompt.ids[None], inputs_of([prompt])
    best, begun = float("inf"), time.perf_counter()
    with peak_memory(model) as peak:
        for number in range(REPEATS):
            if number and time.perf_counter() - begun > LIMIT_S:
                break
            cache = RoomyCache(len(parts(model).blocks), ids.shape[1] + new_tokens)  # as answers have it
            logits = forward(model, ids, cache, shown)
            wait()
            start = time.perf_counter()
            for _ in range(new_tokens):
                logits = forward(model, logits.argmax(-1)[:, None].cpu(), cache)
            wait()
            best = min(best, time.perf_counter() - start)
    return {"ms_per_token": best / new_tokens * 1e3, "peak_bytes": peak["bytes"]}


@contextmanager
def peak_memory(model):
    """Measure the most memory a model takes during a `with` block: yields a dict that holds "bytes" afterwards.

    The weights that the model came with plus what memory grows by: on GPUs by the allocator's high-water marks, on CPU
    by the process's resident set, sampled every 5 ms. Python, the libraries and other models are left out.
    """
    result, weights = {}, weight_bytes(model)
    gc.collect()
    if cards():
        before = start_peak()
        yield result
        result["bytes"] = weights + growth(before)
        return
    process, stop = psutil.Process(), Event()
    start = high = process.memory_info().rss

    def watch():
        nonlocal high
        while not stop.wait(0.005):
            high = max(high, process.memory_info().rss)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()
    result["bytes"] = weights + max(high, process.memory_info().rss) - start


def evaluate(llava, processor, label: str, questions: list[dict], units, config):
    """Answer the test questions and time one answer; return (rows, {"ms_per_token", "peak_bytes", "weight_bytes"})."""
    rows = answer_rows(llava, processor, questions, label, units, config)
    key = f"{label} speed"
    if key not in units:
        units.add(key, measure_decoding(llava, processor, questions[0]) | {"weight_bytes": weight_bytes(llava)})
    return rows, units[key]
