"""Run one notebook's cells in this process on pretended cards, and write down what it took.

python -m medprune.rehearsing.stage JOB.json
"""

import gc
import itertools
import json
import math
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import psutil

from medprune import device, store
from medprune.models.families import block_number
from medprune.rehearsing import card
from medprune.settings import REPO
from medprune.store import read_json, write_json

EVERY_S = 0.05  # between two looks at the process's memory
UNPACKED_LAYERS = 32 * 7  # of packed models on the host, the first one's: later ones hold as many bytes
MERGED_BLOCKS = 8  # of those whose weights are really converted on the host, two files' worth


def main(path: str) -> None:
    """Do a job {stage, cards, card_bytes, parameters, root, out}; write what it took to `out`.

    `out` holds the peaks of each card by cell, that of the host's memory, the most bytes of files under `root` and
    in its `scratch`, seconds, rows that had to be halved, and the error that ended it, if one did.
    """
    job = read_json(Path(path))
    ledger = card.start(job["cards"], job["card_bytes"])
    device.KIND = card.NAME
    from transformers import training_args  # only now: it imports hqq, whose functions then run in the cards' no_grad

    training_args.is_torch_bf16_gpu_available = lambda: True  # as torch says of a T4, where it is emulated
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{card.NAME}:0"
    _write_holes(Path(job["root"]))
    store._digest = _named
    _cut_short()
    Host()
    gc.freeze()  # what was imported stays, and is not walked through each time that a model is let go
    taken = {"stage": job["stage"], "cells": [], "error": None}
    started = time.perf_counter()
    try:
        _run(job, ledger, taken["cells"])
    except Exception as error:  # whatever ends a stage is what its rehearsal is for
        traceback.print_exc()
        taken["error"] = f"{type(error).__name__}: {error}"
    Disk.look(Path(job["root"]))
    taken |= {"ram_bytes": Host.peak, "seconds": time.perf_counter() - started}
    taken |= {"card_bytes": [max(c["peak"][i] for c in taken["cells"]) for i in range(job["cards"])]}
    taken |= {"disk_bytes": Disk.peak, "scratch_bytes": Disk.scratch, "halved": device.HALVED}
    write_json(Path(job["out"]), taken)


def _run(job: dict, ledger, cells: list) -> None:
    """Run the code cells, the parameters put in after their own; note each cell's peaks."""
    notebook = json.loads((REPO / "notebooks" / f"{job['stage']}.ipynb").read_text(encoding="utf-8"))
    space = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        ledger.peak, begun = list(ledger.now), time.perf_counter()
        try:
            exec(compile("".join(cell["source"]), f"{job['stage']}[{number}]", "exec"), space)
        finally:
            cells.append({"cell": number, "peak": list(ledger.peak), "seconds": time.perf_counter() - begun})
        if "parameters" in cell["metadata"].get("tags", ()):
            space |= job["parameters"]


def _cut_short() -> None:
    """Cut loops whose rounds are all alike in memory, and host products and checks of numbers that are pretended."""
    import torch

    from medprune.answers import timing
    from medprune.pruning import criteria, leave_one_out
    from medprune.quantizing import awq, checkpoint
    from medprune.quantizing.packed import PackedLinear
    from medprune.tuning import merging

    awq.N_GRID, awq.CLIPS, timing.REPEATS = 2, 2, 2
    leave_one_out.ROUNDING_NATS = {2: math.inf}
    PackedLinear._product = card.remembered(PackedLinear._product, _packed_form)
    torch.addmm = lambda whole, left, right, alpha=1: whole  # of merging: what it holds is made before it is called
    whole = merging.read_tensor
    merging.read_tensor = lambda *where: whole(*where) if _early(where[1]) else whole(*where).to("meta")
    criteria.read_tensor = lambda *where: whole(*where) if _early(where[1]) else torch.zeros(1)
    checkpoint.from_awq = _repacked(checkpoint.from_awq)


def _early(name: str) -> bool:
    """Say whether a tensor is among those that host memory is measured on: as many as fill two files."""
    return (block_number(name) or 0) < MERGED_BLOCKS


def _packed_form(layer, x) -> tuple:
    return layer.in_features, layer.out_features, layer.bits, layer.group_size, x.shape, x.stride(), x.dtype, x.device


def _repacked(whole):
    """Return `packed.from_awq` that unpacks one model's layers, and of later ones gives buffers of the same bytes."""
    import torch

    layers = itertools.count()

    def repacked(qweight, qzeros, scales) -> dict:
        if next(layers) < UNPACKED_LAYERS:
            return whole(qweight, qzeros, scales)
        (inputs, words), groups = qweight.shape, len(qzeros)
        codes = torch.ones(words * 8, inputs // 2, dtype=torch.uint8)
        return {"qweight": codes, "zero_point": torch.ones(groups, words * 4, dtype=torch.uint8), "scale": scales}

    return repacked


def _named(path: Path, stamp: tuple) -> str:
    """Return a hash of names and sizes: to read files that are holes would take their whole size."""
    named = [(os.path.relpath(file, path), size) for file, size, *_ in stamp]
    return store.hashlib.sha256(repr(named).encode()).hexdigest()[:16]


class Host:
    """The most memory that this process held, looked at every EVERY_S."""

    peak = 0

    def __init__(self):
        self.process = psutil.Process()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while True:
            found = self.process.memory_info()
            Host.peak = max(Host.peak, found.rss - found.shared)
            time.sleep(EVERY_S)


class Disk:
    """The most bytes that files had under a folder but for the base's, holes or not, and in `scratch` there."""

    peak = scratch = 0

    @classmethod
    def look(cls, root: Path) -> None:
        sizes = {False: 0, True: 0}  # in scratch or not
        for f in root.rglob("*"):
            if f.is_file() and not f.is_symlink() and root / "base" not in f.parents:
                sizes[root / "scratch" in f.parents] += f.stat().st_size
        cls.peak, cls.scratch = max(cls.peak, sizes[False]), max(cls.scratch, sizes[True])


def _write_holes(root: Path) -> None:
    """Let safetensors write files of the true size that are holes, and count what lies under the root."""
    import peft.peft_model
    import safetensors.torch
    import transformers.modeling_utils

    whole = safetensors.torch.save_file

    def save_file(tensors, filename, metadata=None):
        if sum(t.numel() * t.element_size() for t in tensors.values()) < card.WRITTEN:
            whole({k: card.value(v) for k, v in tensors.items()}, filename, metadata)
        else:
            card.write_holes(tensors, filename, metadata)
        Disk.look(root)

    safetensors.torch.save_file = save_file
    transformers.modeling_utils.safe_save_file = peft.peft_model.safe_save_file = save_file


if __name__ == "__main__":
    main(sys.argv[1])
