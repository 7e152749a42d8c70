"""Fold adapters into a 16-bit model's files, a few tensors at a time: the model is never in memory as a whole.

Adapters trained over an NF4 base belong into the 16-bit weights (QLoRA, Dettmers et al. 2023): folded into the 4-bit
ones they would be rounded away with them. W' = W + scaling B A (LoRA, Hu et al. 2021).
"""

import re
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig

from medprune.models import loading
from medprune.models.families import block_number, keep_layers
from medprune.models.loading import read_tensor, stored_tensors
from medprune.progress import progress
from medprune.pruning.plan import Plan
from medprune.store import write_folder, write_json

SHARD_BYTES = 2**31  # of a file that is written, and of what is in memory


def merge_folder(source: str | Path, adapters: Path, plan: Plan | None, folder: Path, **record) -> None:
    """Write the 16-bit model of `source`, less the blocks that `plan` removes, with peft's `adapters` folded in.

    adapters: a folder as PeftModel.save_pretrained writes it, its blocks numbered as in the pruned model. Raises
    ValueError for an adapter, or a module trained whole, that the model has no place for.
    """
    deltas, whole = _learned(adapters)
    places = {b: place for place, b in enumerate(plan.kept)} if plan else None
    stored, used = stored_tensors(source), set()
    with write_folder(folder, **record) as temporary:
        config, shards = AutoConfig.from_pretrained(source), _Shards(temporary)
        if plan:
            keep_layers(config.get_text_config(decoder=True), plan.kept)
        with progress(len(stored), "folding adapters into 16 bits", "tensor") as bar:
            for name, (file, key) in stored.items():
                bar.update()
                b = block_number(name) if places else None
                if b is not None and b not in places:
                    continue
                tensor = read_tensor(file, key)
                if b is not None:
                    name, key = (_renumbered(n, b, places[b]) for n in (name, key))
                if name in deltas:
                    right, left, scaling = deltas[name]
                    tensor = torch.addmm(tensor.float(), left.float(), right.float(), alpha=scaling).to(tensor.dtype)
                elif name in whole:
                    tensor = whole[name].to(tensor.dtype)
                used.add(name)
                shards.add(key, tensor)
        if lost := sorted((deltas.keys() | whole.keys()) - used):
            raise ValueError(f"the 16-bit model has no place for the adapter of {lost[0]}.")
        shards.close()
        config.save_pretrained(temporary)
        loading.save_processor(loading.load_processor(source), temporary)
        GenerationConfig.from_pretrained(source).save_pretrained(temporary)


def _learned(adapters: Path) -> tuple[dict, dict]:
    """Return ({weight: (A, B, scaling)}, {weight or bias trained whole: tensor}), by the names of transformers 5."""
    config = PeftConfig.from_pretrained(adapters)
    deltas, whole = {}, {}
    for key, tensor in load_file(adapters / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        if found := re.fullmatch(r"(.*)\.lora_([AB])\.weight", name):
            deltas.setdefault(f"{found[1]}.weight", {})[found[2]] = tensor
        else:
            whole[name] = tensor
    scaling = config.lora_alpha / config.r
    return {name: (pair["A"], pair["B"], scaling) for name, pair in deltas.items()}, whole


def _renumbered(name: str, block: int, place: int) -> str:
    return name.replace(f".{block}.", f".{place}.", 1)


class _Shards:
    """Files of about SHARD_BYTES each, and the index that transformers reads them by."""

    def __init__(self, folder: Path):
        self.folder, self.held, self.files, self.total = folder, {}, [], 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.held[name] = tensor.contiguous()
        self.total += tensor.numel() * tensor.element_size()
        if sum(t.numel() * t.element_size() for t in self.held.values()) >= SHARD_BYTES:
            self._write()

    def _write(self) -> None:
        from safetensors.torch import save_file

        path = self.folder / f"part-{len(self.files)}.safetensors"
        save_file(self.held, path, metadata={"format": "pt"})
        self.files.append((path, list(self.held)))
        self.held = {}

    def close(self) -> None:
        if self.held:
            self._write()
        if len(self.files) == 1:
            self.files[0][0].rename(self.folder / "model.safetensors")
            return
        where = {}
        for number, (path, names) in enumerate(self.files, 1):
            name = f"model-{number:05d}-of-{len(self.files):05d}.safetensors"
            path.rename(self.folder / name)
            where |= dict.fromkeys(names, name)
        write_json(
            self.folder / "model.safetensors.index.json", {"metadata": {"total_size": self.total}, "weight_map": where}
        )
