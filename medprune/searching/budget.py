"""What a card can hold: the choices of each part of a LLaVA and their exact packed bytes, from its configuration alone.

A site is the vision tower, a block, the head or the embedding table, which a tied head is one with; a plan names a
choice for each site: the bits that it is stored in, or DROP for a block that is taken out. Projector and norms stay in
16 bits, as `quantize` leaves them.
What a plan takes is its weights with their scales, the KV cache of its blocks, and working memory. No torch here.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from medprune.models.sizes import OPTIONS, account, guarded, shape_of
from medprune.settings import BITS

DROP = 0  # the choice of a block that is taken out, with its part of the KV cache
FULL = 16
TOWER, HEAD, TABLE = OPTIONS
UNPACKED_WEIGHTS = 2**22  # of a packed layer at once: `packed.SLICE_WEIGHTS`, said again to do without torch
UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}

Plan = tuple[int, ...]  # a choice for each site of a Space


@dataclass(frozen=True)
class Space:
    """The sites of a model, the bytes of each site's choices {choice: bytes}, and what every plan takes besides."""

    sites: tuple[str, ...]
    prices: tuple[dict[int, int], ...]
    fixed_bytes: int

    def bytes_of(self, plan: Plan) -> int:
        """Return what a plan takes, in bytes."""
        return self.fixed_bytes + sum(price[choice] for price, choice in zip(self.prices, plan, strict=True))

    def uniform(self, bits: int) -> Plan:
        """Return the plan that stores every block in `bits`, tower, head and embedding table in 16."""
        return tuple(bits if site.startswith("block") else FULL for site in self.sites)

    def blocks_of(self, plan: Plan) -> tuple[int, ...]:
        """Return the choice of each block, in the original model's order."""
        return tuple(c for site, c in zip(self.sites, plan, strict=True) if site.startswith("block"))

    def choice(self, plan: Plan, site: str) -> int:
        """Return a plan's choice for a site; of one that the space does not vary, 16 bits."""
        return plan[self.sites.index(site)] if site in self.sites else FULL

    @property
    def head_site(self) -> str:
        """What decides the head's bits: a head that is no site of its own is the table's, or in 16 bits as that is."""
        return HEAD if HEAD in self.sites else TABLE

    def storage(self, plan: Plan) -> dict:
        """Return the plan as arguments of `sizes.account`: blocks_removed, bits, and the OPTIONS beside them."""
        blocks = self.blocks_of(plan)
        also = {option: self.choice(plan, site) for site, option in OPTIONS.items()}
        also = {option: bits if bits != FULL else False for option, bits in also.items()}
        return {"blocks_removed": blocks.count(DROP), "bits": [b for b in blocks if b != DROP], **also}


def space_of(config, context: int, protect: Sequence[int] = (0, 1, -1), group_size=64, batch=1, widths=BITS) -> Space:
    """Return the choices of a model and their bytes.

    config: as `sizes.account` takes it. context: tokens in the KV cache, for `batch` rows. protect: blocks that are
    never dropped. widths: the bits below 16 that are tried; a site has those that groups of group_size fit and that
    make it smaller, which a head tied to the embedding table is not made by. Raises ValueError as `account` does.
    """
    shape = shape_of(config)
    n, how = shape.blocks, {"group_size": group_size, "context": context, "batch": batch}
    kept = guarded(shape, protect)
    whole = account(config, 0, FULL, **how)
    packed = {bits: account(config, 0, bits, method="awq", **how) for bits in sorted(widths)}
    cache = whole.kv_cache_bytes // n
    block = {bits: cache + _block_bytes(found) // n for bits, found in [*packed.items(), (FULL, whole)]}
    sites = {f"block {b}": block if b in kept else {DROP: 0} | block for b in range(n)}
    for site, part in ((TOWER, "vision_tower"), (HEAD, "head"), (TABLE, "embeddings")):
        price = {FULL: whole.part_bytes[part]}
        for bits in sorted(widths, reverse=True):
            found = _fits(config, bits, how | {OPTIONS[site]: bits})
            if found and found.part_bytes[part] < whole.part_bytes[part]:
                price = {bits: found.part_bytes[part]} | price
        sites = {site: price} | sites if site == TOWER else sites | {site: price}
    free = {site: price for site, price in sites.items() if len(price) > 1}
    varied = sum(sites[site][FULL] for site in free)
    fixed = whole.total_bytes - varied + working_bytes(config, context, batch)
    return Space(tuple(free), tuple(free.values()), fixed)


def _block_bytes(found) -> int:
    return sum(size for part, size in found.part_bytes.items() if part.startswith("block_"))


def _fits(config, bits: int, how: dict):
    """Return the account of a model so stored, or None where the groups do not divide a layer."""
    try:
        return account(config, 0, bits, method="awq", **how)
    except ValueError:
        return None


def working_bytes(config, context: int, batch: int = 1) -> int:
    """Return what one block needs for `context` tokens of each row, beside the weights, in bytes; an upper estimate.

    Four hidden states and the three products of the MLP in 16 bits, the last token's logits in 16 and 32 bits, and of a
    packed layer the weights that are unpacked at once, as codes and in 16 bits. The runtime's own memory is none of it
    (CUDA's context takes about half a GiB).
    """
    shape = shape_of(config)
    states = context * batch * (4 * shape.hidden + 3 * shape.intermediate) * 2
    largest = max(shape.hidden * shape.vocab, *(n_in * n_out for _, n_in, n_out in shape.linears))
    return states + batch * shape.vocab * 6 + min(UNPACKED_WEIGHTS, largest) * 3


def parse_size(text: str) -> int:
    """Return bytes from a text such as "4GiB", "3.5 GiB" or "900MiB"; ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b)\s*", str(text).lower())
    if not found or not float(found[1]) > 0:
        raise ValueError(f"{text!r} is no size of memory: write it with its unit, such as 4GiB or 900MiB.")
    return int(float(found[1]) * UNITS[found[2]])


def check_budget(space: Space, budget: int) -> None:
    """Raise ValueError, naming the least that a plan takes, where none fits the budget."""
    least = space.fixed_bytes + sum(min(price.values()) for price in space.prices)
    if budget < least:
        mib = 2**20
        raise ValueError(f"a budget of {budget / mib:.1f} MiB holds no plan: the least takes {least / mib:.1f} MiB.")


def uniform_costs(space: Space) -> list[dict[int, float]]:
    """Return a cost for every choice that supposes all weights to matter alike, for want of measured ones.

    Rounding to b bits leaves an error of variance 4^-b of the weights' (relative; equation 1 of AWQ), and a dropped
    block all of it: each site's share of the 16-bit bytes times that. No unit; only the order of plans counts.
    """
    whole = sum(price[FULL] for price in space.prices)
    error = lambda bits: 1.0 if bits == DROP else math.ldexp(1.0, -2 * bits) if bits != FULL else 0.0  # noqa: E731
    return [{bits: price[FULL] / whole * error(bits) for bits in price} for price in space.prices]


def described(space: Space, plan: Plan) -> dict:
    """Return a plan in words: how many blocks are dropped or have 3, 4, 8, 16 bits, and the bits of what is beside."""
    blocks, beside = space.blocks_of(plan), {site: space.choice(plan, site) for site in OPTIONS}
    beside[HEAD] = space.choice(plan, space.head_site)
    counts = {f"{bits} bits": blocks.count(bits) for bits in (*BITS, FULL)}
    return {"dropped": blocks.count(DROP), **counts, **beside}


def plan_rows(space: Space, plans: dict[int, Plan | None]) -> pd.DataFrame:
    """Return a row for each budget in bytes and its plan (None: nothing fits): budget_bytes, bytes, what is chosen."""
    rows = []
    for budget, plan in plans.items():
        taken = {"total_bytes": space.bytes_of(plan), **described(space, plan)} if plan else {}
        choices = " ".join(map(str, space.blocks_of(plan))) if plan else "nothing fits"
        rows.append({"budget_bytes": budget, **taken, "blocks": choices})
    return pd.DataFrame(rows)
