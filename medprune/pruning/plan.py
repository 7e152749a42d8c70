"""Depth pruning: a plan names the blocks that are kept, applying it selects them, a gate checks nothing else changed.

Block numbers are always the ORIGINAL model's, counted from 0. No weight is copied: kept blocks are the same modules.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from medprune.models.families import block_number, deepstack, keep_layers, layered, n_blocks, parts, protected
from medprune.models.sizes import skeleton
from medprune.store import read_json, write_json


@dataclass(frozen=True)
class Plan:
    """Which blocks of which base are kept. base: fingerprint of the model the numbers refer to."""

    base: str
    n_blocks: int
    kept: Sequence[int]
    criterion: str = ""

    @property
    def removed(self) -> tuple[int, ...]:
        return tuple(b for b in range(self.n_blocks) if b not in set(self.kept))

    def save(self, path: Path) -> None:
        write_json(path, asdict(self) | {"removed": self.removed})


def load_plan(path: Path, base: str | None = None) -> Plan:
    """Read a plan; ValueError names a file that holds none, or, where a `base` is given, one made for another."""
    try:
        raw = read_json(path)
        plan = Plan(raw["base"], raw["n_blocks"], tuple(raw["kept"]), raw["criterion"])
    except (OSError, ValueError, KeyError, TypeError):
        plan = Plan("", 0, ())
    texts, numbers = (plan.base, plan.criterion), (-1, *plan.kept, plan.n_blocks)
    whole = all(type(t) is str for t in texts) and all(type(n) is int for n in numbers)
    if not (whole and plan.kept and all(a < b for a, b in pairwise(numbers))):
        form = "the texts base and criterion, the number n_blocks, and kept, the rising numbers of blocks that stay"
        raise ValueError(f"{path} is no plan: it must be JSON with {form}, as notebook 03 writes it.")
    if base is not None and plan.base != base:
        raise ValueError(f"{path} is for the model {plan.base!r}, not for this one, {base!r}: give a plan made for it.")
    return plan


def make_plan(config, removed, base: str, protect=(0, 1, -1), criterion: str = "") -> Plan:
    """Return the plan without the blocks `removed`; refuses blocks that are protected, repeated or out of range."""
    n = n_blocks(config)
    guarded = protected(config, tuple(protect))
    check_fixed(config, removed)
    for b in removed:
        if not 0 <= b < n:
            raise ValueError(f"block {b} is out of range: this model's blocks are 0 to {n - 1}.")
        if b in guarded:
            raise ValueError(f"block {b} is protected ({', '.join(map(str, guarded))} are): choose others to remove.")
    if len(set(removed)) < len(removed):
        raise ValueError(f"blocks {sorted(removed)} name one block twice.")
    return Plan(base, n, tuple(b for b in range(n) if b not in set(removed)), criterion)


def check_fixed(config, removed) -> None:
    """Raise ValueError naming a block that cannot go, for visual features are added behind it by its place."""
    for b in deepstack(config):
        if b in removed:
            why = "has visual features added behind it by its place (deepstack)"
            raise ValueError(f"block {b} {why}: choose others to remove.")


def plans_from_order(config, order: list[int], counts, base: str, protect, criterion: str) -> list[Plan]:
    """Return one plan per count of blocks removed, least important first; ValueError if the order is too short."""
    if max(counts) > len(order):
        raise ValueError(f"blocks_removed has {max(counts)}, but only {len(order)} of the model's blocks may go.")
    return [make_plan(config, order[:n], base, protect, criterion) for n in counts]


def apply_plan(model, plan: Plan):
    """Remove blocks in place: select from the ModuleList, renumber cache indices, update the configuration.

    Returns the model. Raises ValueError, and leaves the model whole, where the plan is for another number of blocks, or
    the gate finds a tensor that is missing, new, or not bit for bit the one the model had.
    """
    whole = blocks_of(model)
    if len(whole[0]) != plan.n_blocks:
        raise ValueError(f"the plan is for {plan.n_blocks} blocks, the model has {len(whole[0])}.")
    check_fixed(model.config, plan.removed)
    source = dict(model.state_dict())
    try:
        set_blocks(
            model, torch.nn.ModuleList([whole[0][b] for b in plan.kept]), *(_kept(c, plan.kept) for c in whole[1:])
        )
        check_kept(model.state_dict(), source, plan)
        check_rebuilt(model)
    except BaseException:
        set_blocks(model, *whole)
        raise
    return model


def _kept(config, kept):
    config = deepcopy(config)
    keep_layers(config, kept)
    return config


def check_prunable(config: dict) -> None:
    """Raise ValueError for a model, by its configuration, whose parts cannot be found or whose blocks cannot go."""
    model = skeleton(config)
    first = len(deepstack(model.config)) or 1
    apply_plan(model, make_plan(model.config, [first], "", protect=()))


@contextmanager
def without(model, removed):
    """Take blocks out of a model for a `with` block, through the integrity gate; no weight is copied.

    removed: numbers in the model as it stands. Its blocks, numbering and configuration are put back at the end.
    """
    whole = blocks_of(model)
    apply_plan(model, make_plan(model.config, removed, "", protect=()))
    try:
        yield model
    finally:
        set_blocks(model, *whole)


def blocks_of(model) -> tuple:
    """Return a model's blocks, and a copy of the configuration that describes them."""
    found = parts(model)
    return found.blocks, deepcopy(found.text_model.config)


def set_blocks(model, blocks: torch.nn.ModuleList, described) -> None:
    """Give a model these blocks, as `blocks_of` returned them, numbered from 0; its configuration follows."""
    text_model = parts(model).text_model
    text_model.layers = blocks
    for index, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index
    follows = [*layered(described), "num_hidden_layers", "max_window_layers"]
    for config in (text_model.config, model.config.get_text_config(decoder=True)):
        for name in follows:
            if hasattr(config, name):
                setattr(config, name, getattr(described, name))


def check_rebuilt(model) -> None:
    """Raise ValueError where a text model built anew of the pruned configuration has other tensors or other blocks.

    So are models refused whose blocks depend on their places in a way that no list of the configuration says.
    """
    text_model = parts(model).text_model
    with torch.device("meta"):
        anew = type(text_model)(deepcopy(text_model.config))
    kind = type(model).__name__
    ours, theirs = ({n: x.shape for n, x in m.named_parameters() if x.is_floating_point()} for m in (text_model, anew))
    packed = {n for n, x in text_model.named_parameters() if not x.is_floating_point()}  # NF4's
    packed |= {f"{name}.weight" for name, module in text_model.named_modules() if hasattr(module, "qweight")}
    if wrong := sorted(n for n in ours.keys() | theirs.keys() - packed if ours.get(n) != theirs.get(n)):
        raise ValueError(
            f"{kind} cannot be pruned: of {wrong[0]} its configuration without these blocks says otherwise."
        )
    for index, (block, other) in enumerate(zip(text_model.layers, anew.layers, strict=True)):
        for (name, module), built in zip(block.named_modules(), other.modules(), strict=True):
            shared = vars(module).keys() & vars(built).keys() - {"training", "gradient_checkpointing"}
            for key in (k for k in shared if not k.startswith("_") and type(module) is type(built)):
                a, b = vars(module)[key], vars(built)[key]
                if isinstance(a, int | float | str | None) and isinstance(b, int | float | str | None) and a != b:
                    where = f"{key} of block {index}'s {name or 'own'} is {a!r}"
                    raise ValueError(f"{kind} cannot be pruned: {where}, built of its configuration it is {b!r}.")


def check_kept(pruned: dict, source: dict, plan: Plan) -> None:
    """The integrity gate: raise ValueError naming a kept tensor that is missing, new or not bit-identical.

    pruned, source: state dicts of the pruned and of the original model.
    """
    places = {b: place for place, b in enumerate(plan.kept)} | {None: None}  # None: outside the blocks
    expected = {}  # by the name in the pruned model, that in the original
    for name in source:
        b = block_number(name)
        if b in places:
            expected[name.replace(f".{b}.", f".{places[b]}.", 1)] = name
    for name in sorted(expected.keys() - pruned.keys()):
        raise ValueError(f"the pruned model lacks {expected[name]}, which its plan keeps.")
    for name in sorted(pruned.keys() - expected.keys()):
        raise ValueError(f"the pruned model has {name}, which the original has not.")
    for name, original in expected.items():
        a, b = source[original], pruned[name]
        alike = a.shape == b.shape and a.dtype == b.dtype
        if not alike or not (a.data_ptr() == b.data_ptr() or torch.equal(a, b)):
            raise ValueError(f"{name} of the pruned model is not bit for bit {original} of the original.")
