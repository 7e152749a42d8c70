"""Count a LLaVA's parameters and bytes from its configuration alone: no weights, no torch, milliseconds.

Everything here is arithmetic on the shapes that `transformers` gives the same configuration; the tests hold
it against the model built on torch's meta device. Blocks can be removed and stored in fewer bits, and each
storage method is counted as it packs. Behind `medprune plan`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from medprune.config import DATA
from medprune.shapes import Shape, named_config, shape_of

GIB = 1024**3
BITS_CHOICES = (3, 4, 8, 16)
GROUP_SIZE_CHOICES = (32, 64, 128)
METHODS = ("rtn", "awq", "bnb", "bnb-double", "hqq")
BNB_BLOCK_SIZE = 64  # what transformers' BitsAndBytesConfig always uses
PAPER_TABLES = DATA / "paper_tables.json"

def check_quantizable(config, group_size: int | None, bits: float) -> None:
    """Raise ValueError, naming the layer, where no block can be stored in `bits` by groups of `group_size`.

    `bits` is one of BITS_CHOICES; `group_size` one of GROUP_SIZE_CHOICES, or None for one group per row.
    """
    if bits not in BITS_CHOICES:
        raise ValueError(f"bits must be one of {BITS_CHOICES}, not {bits}.")
    _check_groups(shape_of(config).linears, group_size)


def _check_groups(linears, group_size: int | None, where: str = "model.language_model.layers.0") -> None:
    if group_size is None:
        return
    if group_size not in GROUP_SIZE_CHOICES:
        raise ValueError(f"group_size must be one of {GROUP_SIZE_CHOICES} or None, not {group_size}.")
    for name, n_in, _ in linears:
        if n_in % group_size:
            fits = [g for g in GROUP_SIZE_CHOICES if all(i % g == 0 for _, i, _ in linears)]
            raise ValueError(
                f"{where}.{name} has {n_in} inputs, not a multiple of group_size "
                f"{group_size}; of {GROUP_SIZE_CHOICES} these fit: {fits}."
            )


def linear_bytes(n_in: int, n_out: int, bits: float, group_size: int | None, method: str = "rtn",
                 scale_bits: int = 16,
                 zero_point_bits: int | None = None) -> tuple[int, int, int]:  # fmt: skip
    """Return one Linear's bytes as (codes, scales, zero points), as `method` stores it.

    rtn, awq: dense codes; a scale of `scale_bits` and a zero point of `zero_point_bits` (None: as many as a
    code) for each group of inputs of each output. bnb: NF4, a float32 absmax for 64 weights and the table
    of 16 levels; bnb-double: that absmax in 8 bits, a float32 for 256 of them, an offset, a table of 256.
    hqq: scale and zero point both of `scale_bits`; three-bit codes go ten to a 32-bit word. 16 bits: weights.
    """
    weights = n_in * n_out
    if bits == 16:
        return 2 * weights, 0, 0
    codes = math.ceil(weights * bits / 8)
    if method in ("bnb", "bnb-double"):
        absmax = math.ceil(weights / BNB_BLOCK_SIZE)
        scales = 4 * absmax if method == "bnb" else absmax + 4 * math.ceil(absmax / 256) + 4 + 4 * 256
        return codes, scales + 4 * 16, 0
    groups = n_out * (n_in // group_size if group_size else 1)
    if method == "hqq":
        codes = 4 * math.ceil(groups / 10) * (group_size or n_in) if bits == 3 else codes
        return codes, groups * scale_bits // 8, groups * scale_bits // 8
    zero_bits = math.ceil(bits) if zero_point_bits is None else zero_point_bits
    return codes, groups * scale_bits // 8, math.ceil(groups * zero_bits / 8)


@dataclass(frozen=True)
class Account:
    """Parameters and bytes of a LLaVA by part; `params` and `part_bytes` have the same parts but for scales.

    `decode_read_bytes` is what one decode step must read: blocks, final norm, head (the embedding table where
    it is tied) and the KV cache of every row; not the vision tower, the projector or an untied table.
    """

    params: dict[str, int]
    part_bytes: dict[str, int]
    kv_cache_bytes: int
    decode_read_bytes: int

    @property
    def total_params(self) -> int:
        return sum(self.params.values())

    @property
    def params_b(self) -> float:
        """Billions of parameters, tied ones once."""
        return self.total_params / 1e9

    @property
    def weights_bytes(self) -> int:
        return sum(self.part_bytes.values())

    @property
    def total_bytes(self) -> int:
        """Weights and KV cache; activations and the runtime's own memory come on top."""
        return self.weights_bytes + self.kv_cache_bytes

    def floor_ms_per_token(self, bandwidth_gb_s: float) -> float:
        """Least ms for a decode step (one token for every row) at `bandwidth_gb_s` = 1e9 bytes/s read."""
        if not bandwidth_gb_s > 0:
            raise ValueError(f"bandwidth must be above 0 GB/s, not {bandwidth_gb_s}.")
        return self.decode_read_bytes / (bandwidth_gb_s * 1e9) * 1e3


def account(config, blocks_removed: int = 0, bits: float | Sequence[float] = 16, group_size: int | None = 64,
            context: int = 840, batch: int = 1, scale_bits: int = 16, zero_point_bits: int | None = None,
            method: str = "rtn", quantize_head: bool = False, quantize_vision: bool = False) -> Account:  # fmt: skip
    """Count a LLaVA less `blocks_removed` blocks, with its block linears stored in `bits` by `method`.

    `bits`: one number (16, or 2 to 8; a fraction stands for an average) or one for each block that is kept.
    `quantize_head` and `quantize_vision` (rtn, hqq) store the head, of which a tied one becomes a copy, and the
    linears of the vision tower in the fewest of them. Everything else stays at 16 bits, the KV cache of
    `context` tokens x `batch` rows too: tokens x 2 x blocks x key-value heads x head size x 2 bytes. Raises
    ValueError for a value out of its range.
    """
    shape = shape_of(config)
    if not 0 <= blocks_removed < shape.blocks:
        raise ValueError(f"blocks_removed must be 0 to {shape.blocks - 1}, not {blocks_removed}.")
    if context < 0 or batch < 1:
        raise ValueError(f"context must be 0 or more and batch 1 or more, not {context} and {batch}.")
    kept = shape.blocks - blocks_removed
    block_bits = list(bits) if isinstance(bits, Sequence) else [bits] * kept
    if len(block_bits) != kept:
        raise ValueError(f"bits lists {len(block_bits)} blocks; {kept} are kept.")
    _check_storage(shape, set(block_bits), group_size, method)
    if quantize_head or quantize_vision:
        _check_others(shape, min(block_bits), group_size, method, quantize_vision)
    storage = (group_size, method, scale_bits, zero_point_bits)
    sizes = {b: _block_bytes(shape, b, *storage) for b in set(block_bits)}
    codes, scales, zeros = (sum(sizes[b][part] for b in block_bits) for part in range(3))
    table, head = shape.vocab * shape.hidden, 0 if shape.tied else shape.vocab * shape.hidden
    params = {
        "vision_tower": shape.vision_params, "projector": shape.projector_params, "embeddings": table,
        "block_weights": kept * sum(i * o for _, i, o in shape.linears),
        "block_norms": kept * shape.block_extras, "final_norm": shape.hidden, "head": head,
    }  # fmt: skip
    part_bytes = {part: 2 * n for part, n in params.items()}
    part_bytes |= {"block_weights": codes, "block_scales": scales, "block_zero_points": zeros}
    head_bytes = 2 * table
    if quantize_head:
        head_bytes = part_bytes["head"] = sum(linear_bytes(shape.hidden, shape.vocab, min(block_bits), *storage))
    if quantize_vision:
        packed = sum(sum(linear_bytes(i, o, min(block_bits), *storage)) for _, i, o in shape.vision_linears)
        dense = sum(2 * i * o for _, i, o in shape.vision_linears)
        part_bytes["vision_tower"] += shape.vision_layers * (packed - dense)
    kv_cache_bytes = context * batch * 2 * kept * shape.kv_width * 2
    blocks_bytes = codes + scales + zeros + part_bytes["block_norms"]
    read = blocks_bytes + part_bytes["final_norm"] + head_bytes + kv_cache_bytes
    return Account(params, part_bytes, kv_cache_bytes, read)


def _block_bytes(shape: Shape, *storage) -> list[int]:
    """Return a block's codes, scales and zero points, in bytes over its seven linears."""
    columns = zip(*(linear_bytes(n_in, n_out, *storage) for _, n_in, n_out in shape.linears), strict=True)
    return [sum(column) for column in columns]


def _check_storage(shape: Shape, bits: set[float], group_size: int | None, method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, not {method!r}.")
    if wrong := [b for b in bits if b != 16 and not 2 <= b <= 8]:
        raise ValueError(f"bits must be 16 or from 2 to 8, not {wrong[0]}.")
    if bits == {16}:
        return
    if method in ("awq", "bnb", "bnb-double") and (wrong := sorted(bits - {4, 16})):
        raise ValueError(f"{method} stores 4 bits, not {wrong[0]}; rtn and hqq store other numbers.")
    if not method.startswith("bnb"):  # bitsandbytes cuts the flattened matrix, so any width will do
        _check_groups(shape.linears, group_size)
    elif group_size != BNB_BLOCK_SIZE:
        raise ValueError(f"{method} has groups of {BNB_BLOCK_SIZE} weights only, not {group_size}.")


def _check_others(shape: Shape, bits: float, group_size: int | None, method: str, vision: bool) -> None:
    if method not in ("rtn", "hqq") or bits == 16:
        raise ValueError(f"head and vision tower are quantized by rtn or hqq in fewer than 16 bits, not by {method} in {bits}.")
    if vision:
        _check_groups(shape.vision_linears, group_size, "model.vision_tower.encoder.layers.0")


def plan_table(name_or_path, removes: Sequence[int], bits: float | Sequence[float] = 16, group_size: int | None = 64,
               context: int = 840, batch: int = 1, bandwidth: float = 320,
               method: str = "rtn", **also) -> pd.DataFrame:  # fmt: skip
    """Return one row for each number of `removes`: parameters, bytes by part, and the floor in ms a token.

    `bits` is as in `account`; a list of one for each block fits the one count of `removes` that leaves as many.
    `bandwidth` is in GB/s (320: a T4). `paper_params_b` is the paper's table 1, NaN where it has no such row
    or `name_or_path` is another model. also: quantize_head and quantize_vision. Raises ValueError as `account` does.
    """
    if not removes:
        raise ValueError("removes is empty: give at least one number of blocks to remove, 0 for none.")
    config = named_config(name_or_path)
    paper = _paper_params_b(config)
    rows = []
    for removed in removes:
        a = account(config, removed, bits, group_size, context, batch, method=method, **also)
        row = {"blocks_removed": removed, "blocks_kept": shape_of(config).blocks - removed}
        row |= {"params": a.total_params, "params_b": a.params_b}
        row["paper_params_b"] = paper.get(removed, math.nan)
        row |= {f"{part}_bytes": n for part, n in a.part_bytes.items()}
        row |= {"kv_cache_bytes": a.kv_cache_bytes, "total_bytes": a.total_bytes}
        row |= {"total_gib": a.total_bytes / GIB, "floor_ms_per_token": a.floor_ms_per_token(bandwidth)}
        rows.append(row)
    return pd.DataFrame(rows)


def _paper_params_b(config) -> dict[int, float]:
    """Return the paper's billions of parameters by blocks removed; nothing if `config` is another model."""
    rows = json.loads(PAPER_TABLES.read_text(encoding="utf-8"))["table1_prune_sweep"]
    found = {row["blocks_removed"]: row["params_b"] for row in rows}
    return found if round(account(config).params_b, 3) == found[0] else {}


def plan_notes(name_or_path) -> list[str]:
    """Return what a reader of the plan should know: which model the paper's table 4 really prints."""
    config = named_config(name_or_path)
    if not _paper_params_b(config):
        return []
    tables = json.loads(PAPER_TABLES.read_text(encoding="utf-8"))
    printed = next(row["params_b"] for row in tables["table4_summary"] if row["method"] == "prune")
    left_b = [account(config, n).params_b for n in range(shape_of(config).blocks)]
    removed = next(n for n, b in enumerate(left_b) if round(b, 2) <= printed)
    # Table 2 calls the very model, with the same score, "5.6B": table 1's row of 20 %.
    claimed = next(r["blocks_removed"] for r in tables["table1_prune_sweep"] if r["compression_pct"] == 20)
    return [
        f"The paper's {printed}B model (table 4) has {removed} blocks removed, not {claimed}: "
        f"{removed} leave {left_b[removed]:.3f}B parameters, {claimed} leave {left_b[claimed]:.3f}B."
    ]


def plan_text(name_or_path, removes: Sequence[int], bits: float | Sequence[float] = 16, group_size: int | None = 64,
              context: int = 840, batch: int = 1, bandwidth: float = 320,
              method: str = "rtn", **also) -> str:  # fmt: skip
    """Return `plan_table` for reading: a column for each number of blocks removed, bytes in GiB."""
    table = plan_table(name_or_path, removes, bits, group_size, context, batch, bandwidth, method, **also)
    lines = {"parameters (B)": table["params_b"].map("{:.3f}".format)}
    if table["paper_params_b"].notna().any():
        printed = table["paper_params_b"].map("{:.3f}".format)
        lines["  the paper's table 1"] = printed.replace("nan", "")
    for column in [c for c in table if c.endswith("_bytes")]:
        label = column.removesuffix("_bytes").replace("_", " ")
        lines[f"{label} (GiB)"] = (table[column] / GIB).map("{:.3f}".format)
    lines["floor (ms/token)"] = table["floor_ms_per_token"].map("{:.1f}".format)
    shown = pd.DataFrame(lines).T.set_axis([f"{n} removed" for n in table["blocks_removed"]], axis=1)
    stored = "all 16 bits"
    if bits != 16:
        widths = f"{bits:g}" if not isinstance(bits, Sequence) else " + ".join(
            f"{list(bits).count(b)} x {b:g}" for b in sorted(set(bits), reverse=True))  # fmt: skip
        named = [name.removeprefix("quantize_") for name, wanted in also.items() if wanted]
        stored = f"{' and '.join(['blocks', *named])} {widths} bits ({method}, group size {group_size or 'a row'}), the rest 16 bits"
    head = f"{name_or_path}: {stored}; KV cache of {context} tokens x {batch}; floor at {bandwidth} GB/s"
    return "\n".join([head, "", shown.to_string(), "", *plan_notes(name_or_path)]).rstrip() + "\n"


def plan_json(name_or_path, removes: Sequence[int], bits: float | Sequence[float] = 16, group_size: int | None = 64,
              context: int = 840, batch: int = 1, bandwidth: float = 320,
              method: str = "rtn", **also) -> str:  # fmt: skip
    """Return `plan_table` as JSON: the settings, `rows` with the table's columns, and `notes`."""
    table = plan_table(name_or_path, removes, bits, group_size, context, batch, bandwidth, method, **also)
    settings = {"model": str(name_or_path), "bits": bits, "group_size": group_size, "method": method, **also}
    settings |= {"context": context, "batch": batch, "bandwidth_gb_s": bandwidth}
    rows = json.loads(table.to_json(orient="records", double_precision=15))
    return json.dumps({**settings, "rows": rows, "notes": plan_notes(name_or_path)}, indent=2)
