"""Depth pruning: a plan names the blocks that are kept, applying it selects them, and a gate checks nothing else changed.

Block numbers are always the ORIGINAL model's, counted from 0. No weight is copied: kept blocks are the same modules.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from medprune.models.families import n_blocks, parts, protected
from medprune.store import read_json, write_json


@dataclass(frozen=True)
class Plan:
    """Which blocks of which base are kept. base: fingerprint of the model the numbers refer to."""

    base: str
    n_blocks: int
    kept: tuple[int, ...]
    criterion: str = ""

    @property
    def removed(self) -> tuple[int, ...]:
        return tuple(b for b in range(self.n_blocks) if b not in set(self.kept))

    def save(self, path: Path) -> None:
        write_json(
            path,
            {
                "base": self.base,
                "n_blocks": self.n_blocks,
                "kept": list(self.kept),
                "removed": list(self.removed),
                "criterion": self.criterion,
            },
        )


def load_plan(path: Path) -> Plan:
    raw = read_json(path)
    return Plan(raw["base"], raw["n_blocks"], tuple(raw["kept"]), raw["criterion"])


def make_plan(config, removed, base: str, protect=(0, 1, -1), criterion: str = "") -> Plan:
    """Return the plan without the blocks `removed`; refuses blocks that are protected, repeated or out of range."""
    n = n_blocks(config)
    guarded = protected(config, tuple(protect))
    for b in removed:
        if not 0 <= b < n:
            raise ValueError(f"block {b} is out of range: this model's blocks are 0 to {n - 1}.")
        if b in guarded:
            raise ValueError(f"block {b} is protected ({', '.join(map(str, guarded))} are): choose others to remove.")
    if len(set(removed)) < len(removed):
        raise ValueError(f"blocks {sorted(removed)} name one block twice.")
    return Plan(base, n, tuple(b for b in range(n) if b not in set(removed)), criterion)


def plans_from_order(config, order: list[int], counts, base: str, protect, criterion: str) -> list[Plan]:
    """Return one plan per count of blocks removed, least important first; ValueError if the order is too short."""
    for n in counts:
        if n > len(order):
            raise ValueError(f"blocks_removed has {n}, but only {len(order)} of the model's blocks may be removed.")
    return [make_plan(config, order[:n], base, protect, criterion) for n in counts]


def apply_plan(model, plan: Plan):
    """Remove blocks in place: select from the ModuleList, renumber cache indices, update the configuration.

    Returns the model. Raises ValueError where the plan is for another number of blocks, or the gate finds a tensor
    that is missing, new, or not bit for bit the one the model had.
    """
    inner = parts(model)
    if len(inner.blocks) != plan.n_blocks:
        raise ValueError(f"the plan is for {plan.n_blocks} blocks, the model has {len(inner.blocks)}.")
    source = dict(model.state_dict())
    text_config = inner.text_model.config
    blocks = torch.nn.ModuleList([inner.blocks[b] for b in plan.kept])
    for index, block in enumerate(blocks):
        block.self_attn.layer_idx = index
    inner.text_model.layers = blocks
    text_config.num_hidden_layers = len(blocks)
    model.config.text_config.num_hidden_layers = len(blocks)
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = [text_config.layer_types[b] for b in plan.kept]
    check_kept(model.state_dict(), source, plan)
    return model


def original_name(name: str, plan: Plan) -> str:
    """Return what a tensor of the pruned model was called in the original."""
    head, dot, tail = name.partition(".layers.")
    if not dot or not head.endswith("language_model"):
        return name
    index, _, rest = tail.partition(".")
    return f"{head}.layers.{plan.kept[int(index)]}.{rest}"


def check_kept(pruned: dict, source: dict, plan: Plan) -> None:
    """The integrity gate: raise ValueError naming a kept tensor that is missing, new or not bit-identical.

    pruned, source: state dicts of the pruned and of the original model.
    """
    gone = {f".layers.{b}." for b in plan.removed}
    expected = {n for n in source if not ("language_model" in n and any(g in n for g in gone))}
    found = {original_name(n, plan): n for n in pruned}
    for name in sorted(expected - set(found)):
        raise ValueError(f"the pruned model lacks {name}, which its plan keeps.")
    for name in sorted(set(found) - expected):
        raise ValueError(f"the pruned model has {found[name]}, which the original has not under {name}.")
    for name in sorted(expected):
        a, b = source[name], pruned[found[name]]
        same_storage = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
        if not same_storage and not (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)):
            raise ValueError(f"{found[name]} of the pruned model is not bit for bit {name} of the original.")


def load_pruned(folder: Path, plan: Plan, base_folder: Path, **load_options):
    """Load a saved pruned model and hold it against its base, tensor by tensor; returns (model, processor)."""
    from medprune.models.loading import load

    model, processor = load(folder, **load_options)
    if len(parts(model).blocks) != len(plan.kept):
        raise ValueError(f"{folder} has {len(parts(model).blocks)} blocks, but its plan keeps {len(plan.kept)}.")
    check_kept(dict(model.state_dict()), read_tensors(base_folder, model), plan)
    return model, processor


def read_tensors(folder: Path, model) -> dict:
    """Return a checkpoint's tensors by name, with the head where it is tied to the embeddings, in the model's dtype."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            tensors.update({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118
    if not tensors:
        raise ValueError(f"{folder} holds no safetensors file.")
    names = {_current_name(n): t for n, t in tensors.items()}
    if model.config.tie_word_embeddings:
        names.setdefault("lm_head.weight", names["model.language_model.embed_tokens.weight"])
    return {n: t.to(model.dtype) if t.is_floating_point() else t for n, t in names.items()}


def _current_name(name: str) -> str:
    """Return a tensor's name in transformers 5: the hub's LLaVA checkpoints carry the names of 4.x."""
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
