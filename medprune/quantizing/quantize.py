"""Quantize a LLaVA's language-model blocks by RTN, AWQ, bitsandbytes NF4 or HQQ: one call each, in place."""

import math
import random
import time
from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import nn

from medprune.answers import prompts
from medprune.answers.timing import peak_memory
from medprune.data.pictures import open_image
from medprune.data.questions import conversation
from medprune.models.families import block_number, names, parts
from medprune.models.loading import weight_bytes
from medprune.models.sizes import NO_LINEARS, ODD_LINEARS, TABLES, TIED_TABLE, packable
from medprune.quantizing.packed import PackedLinear, PackedTable
from medprune.settings import BITS, GROUP_SIZES, METHODS, NF4_GROUP, WIDTHS

CHOICES = (*BITS, 16)  # 16: the block is left as it is
MIXING = tuple(m for m in METHODS if len(WIDTHS[m]) > 1)  # take bits for each block, and head and tower too
MIN_CALIBRATION_ROWS = 4
LEAST_TEXT = 32  # tokens of a calibration row behind its image


def quantize(
    model,
    method: str,
    bits=4,
    group_size=64,
    calibration=None,
    quantize_head=False,
    quantize_vision=False,
    quantize_embeddings=False,
    fetch=None,
):
    """Quantize the Linear layers of the decoder blocks IN PLACE; return (the same model, info).

    Vision tower, projector, embeddings, norms and head stay as they are, but for `quantize_head`, `quantize_vision`
    (not by bnb; by rtn where the method is awq; a tied head becomes a copy; of the tower its layers' linears) and
    `quantize_embeddings` (by rtn, awq: the embedding table, which a head tied to it goes on sharing). `bits` is one
    number or, but for bnb, one for each block (16: left alone); these three take the fewest among them, or as many bits
    as their option names.
    `calibration` (awq only) is a processor batch of at least 4 equal, unpadded rows: with pixel_values image-text
    calibration, without them text-only. `fetch` reads a block's weights when its turn comes (`load_blockwise`).

    info: method, bits, group_size, quantize_head, quantize_vision, quantize_embeddings, seconds, peak_bytes (the most
    that was held while quantizing, see `peak_memory`), packed_bytes (by part, see `packed_bytes`), and for awq
    loss_curve and calibration.
    Raises ValueError, before any work, for whatever cannot be done.
    """
    options = {"quantize_head": quantize_head, "quantize_vision": quantize_vision}
    options |= {"quantize_embeddings": quantize_embeddings}
    targets = check_request(model, method, bits, group_size, calibration, **options)
    blocks = parts(model).blocks

    def fetched(block) -> None:
        if fetch is not None:
            fetch(block)
            _check_finite(block)

    def pack(name: str, width: int) -> None:
        model.set_submodule(name, _packed(model.get_submodule(name), method, width, group_size))

    with peak_memory(model) as peak:
        started = time.perf_counter()
        found = {}
        if method == "awq":
            from medprune.quantizing.awq import quantize_awq

            found = quantize_awq(model, calibration, group_size, fetched, bits)
        else:
            for number, block in enumerate(blocks):
                fetched(block)
                for name in [name for name in targets if block_number(name) == number]:
                    pack(name, targets.pop(name))
        for name, width in targets.items():  # head and tower
            if block_number(name) is None:
                pack(name, width)
        if quantize_head:
            model.config.tie_word_embeddings = model.config.get_text_config(decoder=True).tie_word_embeddings = False
            _forget_ties(model)
        if quantize_embeddings:
            width = fewest(bits, quantize_embeddings)
            put_table(model, PackedTable.from_embedding(parts(model).table, width, group_size))
        model.eval()
        seconds = time.perf_counter() - started
    info = {"method": method, "bits": bits, "group_size": group_size, "seconds": seconds, "peak_bytes": peak["bytes"]}
    return model, info | options | {"packed_bytes": packed_bytes(model)} | found


def fewest(bits: int | Sequence[int], wanted: bool | int) -> int:
    """Return the bits of a part beside the blocks: as many as its option names, or the fewest of the blocks'."""
    return wanted if wanted is not True else bits if isinstance(bits, int) else min(bits)


def is_tied(model) -> bool:
    """Say whether the head has no weight of its own but the embedding table's."""
    found = parts(model)
    return found.head is found.table or getattr(found.head, "weight", 0) is getattr(found.table, "weight", 1)


def put_table(model, table: PackedTable) -> None:
    """Put a packed table in place of the embedding table, and of the head where that is tied to it."""
    called, tied = names(model), is_tied(model)
    for name in [called.table, called.head] if tied else [called.table]:
        model.set_submodule(name, table)
    _forget_ties(model)


def _forget_ties(model) -> None:
    """Leave none of transformers' ties between weights that are no longer there: a packed layer has no `weight`."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k in weights}


def second_names(model) -> set[str]:
    """Return the names in a model's state of what stands there by another name too: a packed table that is the head."""
    first = {name for name, _ in model.named_modules()}
    again = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if name not in first]
    return {f"{name}.{key}" for name, m in again if isinstance(m, PackedTable) for key in m.state_dict()}


def target_linears(
    model, bits: int | list[int], quantize_head=False, quantize_vision=False, group_size: int | None = None
) -> dict[str, int]:
    """Return {full name: bits} of the Linear layers that are quantized, blocks of 16 bits left out.

    Those of the vision tower that groups of `group_size` do not divide stay in 16 bits: some towers have odd widths.
    """
    found = parts(model)
    block_bits = [bits] * len(found.blocks) if isinstance(bits, int) else list(bits)
    groups = [(block, b) for block, b in zip(found.blocks, block_bits, strict=True) if b != 16]
    for part, option in ((found.head, quantize_head), (found.vision_tower, quantize_vision)):
        groups += [(part, fewest(block_bits, option))] if option else []
    linears = [(m, group, b) for group, b in groups for m in group.modules() if type(m) is nn.Linear]
    called = {module: name for name, module in model.named_modules()}
    odd = {
        m
        for m, group, _ in linears
        if group is found.vision_tower and group_size and not packable(m.in_features, m.out_features, group_size)
    }
    return {called[m]: b for m, _, b in linears if m not in odd}


def check_storage(
    method: str, bits, group_size: int, quantize_head=False, quantize_vision=False, quantize_embeddings=False
) -> None:
    """Raise ValueError with one sentence on what no model can be stored in; `bits` are one number or a block's each."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}.")
    block_bits = list(bits) if isinstance(bits, list | tuple) else [bits]
    choices = CHOICES if method in MIXING else WIDTHS[method]
    if wrong := [b for b in block_bits if isinstance(b, float) or b not in choices]:
        raise ValueError(f"bits for {method} must be one of {choices}, not {wrong[0]}.")
    options = {"quantize_head": quantize_head, "quantize_vision": quantize_vision}
    options |= {"quantize_embeddings": quantize_embeddings}
    if set(block_bits) == {16} and (True in options.values() or not any(options.values())):
        raise ValueError("bits is 16 for every block, which leaves nothing to quantize.")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}, not {group_size}.")
    if method == "bnb" and group_size != NF4_GROUP:
        raise ValueError(f"bnb has groups of {NF4_GROUP} weights only, not {group_size}.")
    for option, wanted in options.items():
        able = TABLES if option == "quantize_embeddings" else MIXING
        if wanted and method not in able:
            raise ValueError(f"{option} works with {' and '.join(able)}, not with {method}.")
        if not isinstance(wanted, bool) and wanted not in BITS:
            raise ValueError(f"{option} must be true, false or one of {BITS} bits, not {wanted}.")


def check_request(
    model, method, bits, group_size, calibration, quantize_head=False, quantize_vision=False, quantize_embeddings=False
) -> dict[str, int]:
    """Return `target_linears`, or raise ValueError with one sentence on what cannot be done."""
    if is_quantized(model):
        raise ValueError("the model is already quantized; load the 16-bit model again and quantize that.")
    n = len(parts(model).blocks)
    if isinstance(bits, list | tuple) and len(bits) != n:
        raise ValueError(f"bits lists {len(bits)} blocks, but the model has {n}.")
    check_storage(method, bits, group_size, quantize_head, quantize_vision, quantize_embeddings)
    if quantize_embeddings:
        _check_table(model, group_size, quantize_head)
    if quantize_vision and not any(isinstance(m, nn.Linear) for m in parts(model).vision_tower.modules()):
        raise ValueError(NO_LINEARS)
    targets = target_linears(model, bits, quantize_head, quantize_vision, group_size)
    if quantize_vision and not any(name.startswith(f"{names(model).vision_tower}.") for name in targets):
        raise ValueError(ODD_LINEARS.format(group_size))
    for name in targets:
        linear = model.get_submodule(name)
        if linear.in_features % group_size:
            raise ValueError(f"{name} has {linear.in_features} inputs, which groups of {group_size} do not divide.")
        if linear.out_features % 8:
            raise ValueError(f"{name} has {linear.out_features} outputs, which is not a multiple of 8.")
    if method == "awq":
        _check_calibration(model, calibration)
    _check_finite(model)
    return targets


def _check_table(model, group_size: int, quantize_head) -> None:
    vocab, hidden = parts(model).table.weight.shape
    if quantize_head and is_tied(model):
        raise ValueError(TIED_TABLE)
    if not packable(hidden, vocab, group_size):
        rows = f"{vocab} rows of {hidden} numbers"
        raise ValueError(f"the embedding table has {rows}: they must be multiples of 8 and of {group_size}.")


def _check_finite(module: nn.Module) -> None:
    for name, tensor in module.named_parameters():
        if tensor.device.type != "meta" and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite values; a model with such weights is not quantized.")


def _check_calibration(model, batch) -> None:
    if batch is None or "input_ids" not in batch:
        raise ValueError("awq needs calibration: a processor batch with input_ids and, for images, pixel_values.")
    rows = len(batch["input_ids"])
    if rows < MIN_CALIBRATION_ROWS:
        raise ValueError(f"awq needs at least {MIN_CALIBRATION_ROWS} calibration rows, not {rows}.")
    if not torch.as_tensor(batch.get("attention_mask", 1)).bool().all():
        raise ValueError("calibration rows must be of equal length without padding, but attention_mask holds zeros.")
    images = bool((batch["input_ids"] == model.config.image_token_id).any())
    if images != ("pixel_values" in batch):
        raise ValueError("calibration must have image tokens and pixel_values together, or neither (text-only).")


def is_quantized(model) -> bool:
    """Say whether any layer is packed already, by this package, bitsandbytes or hqq, or a config says so."""
    kinds = ("PackedLinear", "PackedTable", "Linear4bit", "Linear8bitLt", "HQQLinear")
    return any(type(m).__name__ in kinds for m in model.modules()) or getattr(model, "hf_quantizer", None) is not None


def packed_bytes(model) -> dict[str, int]:
    """Measure the bytes that a model's tensors occupy in memory now, by part; a tied head counts as embeddings.

    Parts: vision_tower, projector, embeddings, block_linears (codes with their scales and zero points, or dense
    weights), block_norms, final_norm (with the rotary table), head, total. Layers of 4 and 8 bits that ran on CPU in
    bfloat16 are in their running form: 4 + 36 / group_size bits a weight and 8 + 68 / group_size, where a saved folder
    has 4 + 20 / group_size and 8 + 24 / group_size.
    """
    found, seen = parts(model), set()
    linears = [m for block in found.blocks for name, m in block.named_modules() if name.endswith("_proj")]
    groups = {"vision_tower": [found.vision_tower], "projector": [found.projector]}
    groups |= {"embeddings": [found.table], "block_linears": linears, "block_norms": found.blocks}
    groups |= {"final_norm": [found.text_model], "head": [found.head]}  # each less what was counted before it
    sizes = {part: sum(weight_bytes(m, seen) for m in modules) for part, modules in groups.items()}
    return sizes | {"total": sum(sizes.values())}


def nf4(linear: nn.Linear) -> nn.Module:
    """Pack a Linear as bitsandbytes NF4, blocks of 64 weights with a float32 absmax each (arXiv:2305.14314)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight, kind = linear.weight.detach(), {"compress_statistics": False, "quant_type": "nf4"}
    sizes = (linear.in_features, linear.out_features, linear.bias is not None, weight.dtype)
    layer = Linear4bit(*sizes, **kind, device="meta")
    layer.weight = Params4bit(weight.contiguous(), False, **kind, blocksize=NF4_GROUP, module=layer).to(weight.device)
    layer.bias = linear.bias
    return layer.eval()


def _packed(linear: nn.Linear, method: str, bits: int, group_size: int) -> nn.Module:
    """Pack a Linear by rtn, bnb or hqq, whose zero points are not rounded (Badri and Shaji, 2023)."""
    if method in ("rtn", "awq"):  # awq: the head and the tower, which it has no search for
        return PackedLinear.from_linear(linear, bits, group_size)
    if method == "bnb":
        return nf4(linear)
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings, weight = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1), linear.weight
    return HQQLinear(linear, settings, compute_dtype=weight.dtype, device=str(weight.device))


def bits_by_importance(importance_scores: Sequence[float], target_mean_bits: float, choices=BITS) -> list[int]:
    """Return one bit width for each block, in the order of `importance_scores` (higher = keep), for `quantize`.

    The most important block takes the widest choice that leaves the narrowest for all others within the mean, then
    the next block does. Only the order of the scores counts, so any criterion will do; of equal ones the earlier block
    comes first, and a block with an infinite score (a protected one) before all. The mean, over blocks of equal size
    and of codes alone, is at most `target_mean_bits`. Raises ValueError for NaN scores and for a mean or choices that
    cannot be.
    """
    scores, widths = [float(s) for s in importance_scores], sorted({int(c) for c in choices}, reverse=True)
    if not widths or not set(widths) <= set(CHOICES):
        raise ValueError(f"choices must be among {CHOICES}, not {tuple(choices)}.")
    if unknown := [i for i, s in enumerate(scores) if math.isnan(s)]:
        raise ValueError(f"block {unknown[0]} has no importance_score (NaN); give a protected block infinity.")
    if not widths[-1] <= target_mean_bits <= widths[0]:
        raise ValueError(f"target_mean_bits must be {widths[-1]} to {widths[0]}, as choices, not {target_mean_bits}.")
    bits = [widths[-1]] * len(scores)
    spare = (target_mean_bits - widths[-1]) * len(scores)  # bits to give beyond the narrowest
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        bits[i] = next(w for w in widths if w - widths[-1] <= spare + 1e-9)
        spare -= bits[i] - widths[-1]
    return bits


def quantization_batch(processor, records, conditions, questions, dtype, seed: int, most: int = 1024) -> dict:
    """Return the inputs of one conversation per record, cut to one length, for AWQ's calibration.

    most: tokens per row, the image's among them, which are never cut: a larger image keeps LEAST_TEXT behind it.
    """
    rng = random.Random(seed)
    said = [conversation(record, conditions, questions, rng) for record in records]
    pictures = [open_image(record.path) for record in records]
    seen = [prompts.see(processor, picture, dtype) for picture in pictures]
    if len({s.shape for s in seen}) > 1:  # a row each of one length: all take the first one's form
        seen = [prompts.see(processor, picture.resize(pictures[0].size), dtype) for picture in pictures]
    rows = [prompts.encode_conversation(processor, turns, s) for turns, s in zip(said, seen, strict=True)]
    most = max(most, LEAST_TEXT + max(len(s.ids) for s in seen))
    shortest = min(most, *(len(row["input_ids"]) for row in rows))
    batch = {"input_ids": torch.stack([row["input_ids"][:shortest] for row in rows])}
    batch |= {name: torch.stack([row["kinds"][name][:shortest] for row in rows]) for name in seen[0].kinds}
    return batch | {name: torch.cat([s.inputs[name] for s in seen]) for name in seen[0].inputs}


def batch_hashes(batch: dict) -> dict[str, str]:
    """Return a hash of each tensor's bytes, by name: what depends on a calibration batch depends on these."""
    tensors = {name: tensor.contiguous().view(torch.uint8).numpy() for name, tensor in batch.items()}
    return {name: sha256(tensor).hexdigest() for name, tensor in tensors.items()}
