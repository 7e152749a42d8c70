"""A model's parts in every width that a plan may choose: each rounded once, by AWQ, and put together into plans.

A width's blocks are those of the whole model quantized to it (AWQ searches a block by what the 16-bit blocks before it
put out, so they do not depend on other blocks' widths); tower, head and embedding table are rounded to nearest.
"""

import shutil
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from medprune.device import choose_device, release
from medprune.models.families import attention, names, parts
from medprune.models.loading import load_blockwise, save
from medprune.models.sizes import OPTIONS
from medprune.pruning.plan import Plan as Kept
from medprune.pruning.plan import apply_plan
from medprune.quantizing import checkpoint, quantize
from medprune.quantizing.packed import PackedLinear, PackedTable
from medprune.searching.budget import DROP, FULL, HEAD, TABLE, TOWER, Plan, Space
from medprune.store import content, context, made

METHOD = "awq"


@dataclass
class Levels:
    """The parts of the model in `source` at every width, made when first asked for and kept in folders under `home`.

    calibration: of AWQ, as `quantize.quantization_batch` gives it. dtype: None takes the device's.
    """

    source: Path
    home: Path
    widths: tuple[int, ...]
    group_size: int
    calibration: dict
    dtype: torch.dtype | None = None

    def context(self) -> str:
        """Return what the parts depend on."""
        hashes = quantize.batch_hashes(self.calibration)
        return context(__name__, content(self.source), self.group_size, hashes, str(self.dtype))

    @cached_property
    def _whole(self) -> tuple:
        """Return (model, processor, fetch) as `load_blockwise` does: blocks in 16 bits stay in the files."""
        return load_blockwise(self.source, dtype=self.dtype)

    @property
    def model(self):
        return self._whole[0]

    @property
    def processor(self):
        return self._whole[1]

    @cached_property
    def _packed(self) -> dict[int, nn.ModuleList]:
        """Return {bits: the packed blocks}, on the CPU."""
        found, mark = {}, self.context()
        for bits in self.widths:
            folder = self.home / f"{METHOD}-{bits}"
            if not made(folder, mark):
                model, _, fetch = load_blockwise(self.source, dtype=self.dtype)
                how = (bits, self.group_size, self.calibration)
                model, info = quantize.quantize(model, METHOD, *how, fetch=fetch)
                checkpoint.save_quantized(model, folder, METHOD, info, record={"context": mark})
                model = None
                release()
            found[bits] = parts(checkpoint.load_quantized(folder)).blocks
        return found

    def block(self, number: int, bits: int) -> nn.Module:
        """Return a block as it computes at a width, its weights unpacked, on the model's device; to be let go again."""
        if bits == FULL:
            block = deepcopy(parts(self.model).blocks[number])
            self._fetch(number, block)
            return block
        return _unpacked(self._packed[bits][number], self.model.dtype).to(choose_device())

    def _fetch(self, number: int, block: nn.Module) -> None:
        """Read a block's 16-bit weights from the files into a copy of it; the model's own stays empty."""
        own = parts(self.model).blocks[number]
        self._whole[2](own)
        block.load_state_dict(own.state_dict(), assign=True)
        own.to("meta")

    def linears(self, site: str, bits: int) -> dict[str, nn.Module]:
        """Return {full name: packed layer} of the tower, the head or the embedding table; nothing for 16 bits.

        A head that is tied to the table is not named again: it is the table's module.
        """
        if bits == FULL:
            return {}
        model = self.model
        if site == TABLE:
            table = PackedTable.from_embedding(parts(model).table, bits, self.group_size)
            return {names(model).table: table}
        only = {TOWER: (False, bits), HEAD: (bits, False)}[site]
        found = quantize.target_linears(model, FULL, *only, self.group_size)
        return {n: PackedLinear.from_linear(model.get_submodule(n), bits, self.group_size) for n in found}

    def save(self, space: Space, plan: Plan, folder: Path, mark: str, **said) -> None:
        """Write the model of a plan with its card, unless the folder was made in the context `mark` already.

        `load_quantized` reads it, or `loading.load` one of 16 bits throughout. said: as `save_quantized` takes it.
        """
        if made(folder, mark):
            return
        model, processor, fetch = load_blockwise(self.source, dtype=self.dtype)
        choices, storage, kept = space.blocks_of(plan), space.storage(plan), kept_blocks(space, plan)
        apply_plan(model, kept)
        blocks = parts(model).blocks
        for place, b in enumerate(kept.kept):
            if choices[b] == FULL:
                fetch(blocks[place])
            else:
                blocks[place] = deepcopy(self._packed[choices[b]][b])
                attention(blocks[place]).layer_idx = place
        for site in (TOWER, HEAD):
            for name, linear in self.linears(site, space.choice(plan, site)).items():
                model.set_submodule(name, linear)
        for table in self.linears(TABLE, space.choice(plan, TABLE)).values():
            quantize.put_table(model, table)
        model.eval()
        if not quantize.is_quantized(model):
            save(model, processor, folder, context=mark)
            return
        info = {"method": METHOD, "group_size": self.group_size, "packed_bytes": quantize.packed_bytes(model)}
        info |= {k: storage[k] for k in ("bits", *OPTIONS.values())}
        said |= {"plan": f"found by the budget search; {removed_words(space, plan)}"}
        checkpoint.save_quantized(model, folder, METHOD, info, processor, {"context": mark}, **said)

    def rest(self) -> None:
        """Let memory go; the folders of the widths stay."""
        self.__dict__.pop("_packed", None)
        self.__dict__.pop("_whole", None)
        release()

    def forget(self) -> None:
        """Remove the folders of the widths: what is made of them stands by itself."""
        self.rest()
        shutil.rmtree(self.home, ignore_errors=True)


def kept_blocks(space: Space, plan: Plan) -> Kept:
    """Return the plan's blocks that stay, as `apply_plan` takes them."""
    choices = space.blocks_of(plan)
    return Kept("", len(choices), tuple(b for b, bits in enumerate(choices) if bits != DROP), "budget search")


def removed_words(space: Space, plan: Plan) -> str:
    """Return which blocks a plan removes, for a model card."""
    return f"blocks removed: {', '.join(map(str, kept_blocks(space, plan).removed)) or 'none'}"


def _unpacked(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a packed block with plain Linears of the very weights that its codes stand for."""
    copy = deepcopy(block)
    for name, layer in list(copy.named_modules()):
        if isinstance(layer, PackedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(layer.fake_quantized_weight(dtype), requires_grad=False)
            plain.bias = None if layer.bias is None else nn.Parameter(layer.bias, requires_grad=False)
            copy.set_submodule(name, plain)
    return copy
