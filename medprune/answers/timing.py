"""Milliseconds per token, peak memory, and one model's answers with both."""

import gc
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import psutil
import torch

from medprune.answers import decoding
from medprune.answers.decoding import _forward, roomy_cache
from medprune.answers.prompts import encode, prompt_text
from medprune.data.pictures import open_image
from medprune.models import loading
from medprune.models.families import parts
from medprune.models.loading import weight_bytes
from medprune.settings import Profile
from medprune.store import Units


@torch.inference_mode()
def measure_decoding(model, processor, row: dict, new_tokens: int = 8, repeats: int = 4, limit_s: float = 4.0) -> dict:
    """Return ms_per_token, the fastest of some repeats, at batch size 1, and peak_bytes while answering.

    limit_s: seconds after which no further repeat is begun, for models that are slow on this machine.

    Tokens are forced past the end of sequence, so that every model decodes the same number; the first, which comes
    out of the prefill, is not counted.
    """
    image = row["image"] if "image" in row else open_image(row["path"])
    batch = encode(processor, [prompt_text(processor, row["question"])], [image], model.dtype)
    with peak_memory(model) as peak:
        best, begun = float("inf"), time.perf_counter()
        for number in range(repeats):
            if number and time.perf_counter() - begun > limit_s:
                break
            cache = roomy_cache(len(parts(model).blocks), len(batch["input_ids"][0]) + new_tokens)  # as answers have it
            logits, cache = _forward(model, batch["input_ids"][0][None], cache, batch["pixel_values"])
            start = time.perf_counter()
            for _ in range(new_tokens):
                logits, cache = _forward(model, logits.argmax(-1)[:, None].cpu(), cache)
            best = min(best, time.perf_counter() - start)
    return {"ms_per_token": best / new_tokens * 1e3, "peak_bytes": peak["bytes"]}


@contextmanager
def peak_memory(model):
    """Measure the most memory a model takes during a `with` block: yields a dict that holds "bytes" afterwards.

    On CUDA the allocator's high-water mark. On CPU the model's weights plus what the process's resident set, sampled
    every 5 ms, grows by: Python and the libraries are left out.
    """
    result = {}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield result
        result["bytes"] = torch.cuda.max_memory_allocated()
        return
    process, stop = psutil.Process(), Event()
    start = process.memory_info().rss
    high = [start]

    def watch():
        while not stop.wait(0.005):
            high.append(max(high.pop(), process.memory_info().rss))

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()
    result["bytes"] = weight_bytes(model) + high[0] - start


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start VmHWM anew


def _peak_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def evaluate(llava, processor, label: str, questions: list[dict], units: Units, config: Profile):
    """Answer the test questions and time one answer; return (rows, {"ms_per_token", "peak_bytes", "weight_bytes"})."""
    rows = decoding.answer_rows(llava, processor, questions, label, units, config)
    key = f"{label} speed"
    if key not in units:
        measured = measure_decoding(llava, processor, questions[0])
        units.add(key, measured | {"weight_bytes": loading.weight_bytes(llava)})
    return rows, units[key]
