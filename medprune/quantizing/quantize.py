"""Quantize a LLaVA's language-model blocks by RTN, AWQ, bitsandbytes NF4 or HQQ: one call each, in place."""

import math
import random
import time
from collections.abc import Sequence

import psutil
import torch
from torch import Tensor, nn

from medprune.answers import prompts
from medprune.answers.timing import _peak_bytes, _reset_peak
from medprune.data.pictures import open_image
from medprune.data.questions import conversation
from medprune.models.families import parts
from medprune.models.loading import weight_bytes
from medprune.quantizing.packed import GROUP_SIZES, PackedLinear

METHODS = ("rtn", "awq", "bnb", "hqq")


BITS_CHOICES = {"rtn": (3, 4, 8, 16), "awq": (4,), "bnb": (4,), "hqq": (3, 4, 8, 16)}  # 16: the block is left alone


MIN_CALIBRATION_ROWS = 4


def quantize(
    model,
    method: str,
    bits: int | list[int] = 4,
    group_size: int = 64,
    calibration: dict[str, Tensor] | None = None,
    quantize_head: bool = False,
    quantize_vision: bool = False,
):
    """Quantize the Linear layers of the decoder blocks IN PLACE; return (the same model, info).

    Vision tower, projector, embeddings, norms and head stay as they are, but for `quantize_head` and `quantize_vision`
    (rtn and hqq; a tied head becomes a copy; of the tower its layers' linears). `bits` is one number or, for rtn and
    hqq, one for each block (16: left alone); head and tower take the fewest among them.
    `calibration` (awq only) is a processor batch of at least 4 equal, unpadded rows: with pixel_values image-text
    calibration, without them text-only.

    info: method, bits, group_size, quantize_head, quantize_vision, seconds, peak_bytes (the most that was held while
    quantizing: by the GPU's allocator, or the model's weights and what this process grew by; None where it cannot be
    measured), packed_bytes (by part, see `packed_bytes`), and for awq loss_curve and calibration.
    Raises ValueError, before any work, for whatever cannot be done.
    """
    targets = check_request(model, method, bits, group_size, calibration, quantize_head, quantize_vision)
    started, extra = time.perf_counter(), {}
    not_the_model = 0 if model.device.type == "cuda" else psutil.Process().memory_info().rss - weight_bytes(model)
    _reset_peak(model.device)
    if method == "awq":
        from medprune.quantizing.awq import quantize_awq

        batch = {k: v for k, v in calibration.items() if k != "attention_mask"}  # all ones, as checked
        extra["loss_curve"] = quantize_awq(model, batch, group_size)
        kind = "image-text" if "pixel_values" in batch else "text-only"
        extra["calibration"] = f"{kind}, {len(batch['input_ids'])} rows of {batch['input_ids'].shape[1]} tokens"
    else:
        for name, layer_bits in targets.items():
            linear = model.get_submodule(name)
            if method == "rtn":
                packed = PackedLinear.from_linear(linear, layer_bits, group_size)
            elif method == "bnb":
                packed = nf4(linear)
            else:
                packed = _hqq(linear, layer_bits, group_size)
            model.set_submodule(name, packed)
    if quantize_head:  # a quantized head has no weight to share with the embeddings
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if "lm_head" not in k}
    model.eval()
    seconds, peak = time.perf_counter() - started, _peak_bytes(model.device)
    info = {
        "method": method,
        "bits": bits,
        "group_size": group_size,
        "quantize_head": quantize_head,
        "quantize_vision": quantize_vision,
        "seconds": seconds,
        "peak_bytes": None if peak is None else peak - not_the_model,
        "packed_bytes": packed_bytes(model),
        **extra,
    }
    return model, info


def target_linears(
    model, bits: int | list[int], quantize_head: bool = False, quantize_vision: bool = False
) -> dict[str, int]:
    """Return {full name: bits} of the Linear layers that are quantized, blocks of 16 bits left out."""
    found = parts(model)
    block_bits = [bits] * len(found.blocks) if isinstance(bits, int) else list(bits)
    names = {id(module): name for name, module in model.named_modules()}
    targets = {
        names[id(layer)]: b
        for block, b in zip(found.blocks, block_bits, strict=True)
        if b != 16
        for layer in block.modules()
        if isinstance(layer, nn.Linear)
    }
    others = [found.head] if quantize_head else []
    others += [m for m in found.vision_tower.modules() if isinstance(m, nn.Linear)] if quantize_vision else []
    return targets | {names[id(layer)]: min(block_bits) for layer in others}


def check_request(
    model, method, bits, group_size, calibration=None, quantize_head=False, quantize_vision=False
) -> dict[str, int]:
    """Return `target_linears`, or raise ValueError with one sentence on what cannot be done."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}.")
    if is_quantized(model):
        raise ValueError("the model is already quantized; load the 16-bit model again and quantize that.")
    n = len(parts(model).blocks)
    if isinstance(bits, bool) or not isinstance(bits, int | list | tuple):
        raise ValueError(f"bits must be a whole number or a list of one for each block, not {bits!r}.")
    if not isinstance(bits, int) and len(bits) != n:
        raise ValueError(f"bits lists {len(bits)} blocks, but the model has {n}.")
    block_bits = [bits] if isinstance(bits, int) else list(bits)
    if wrong := [b for b in block_bits if b not in BITS_CHOICES[method]]:
        raise ValueError(f"bits for {method} must be one of {BITS_CHOICES[method]}, not {wrong[0]}.")
    if set(block_bits) == {16}:
        raise ValueError("bits is 16 for every block, which leaves nothing to quantize.")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}, not {group_size}.")
    if method == "bnb" and group_size != 64:
        raise ValueError(f"bnb has groups of 64 weights only, not {group_size}.")
    for option, wanted in (("quantize_head", quantize_head), ("quantize_vision", quantize_vision)):
        if wanted and method not in ("rtn", "hqq"):
            raise ValueError(f"{option} works with rtn and hqq, not with {method}.")
    targets = target_linears(model, bits, quantize_head, quantize_vision)
    for name in targets:
        linear = model.get_submodule(name)
        if linear.in_features % group_size:
            raise ValueError(f"{name} has {linear.in_features} inputs, which groups of {group_size} do not divide.")
        if linear.out_features % 8:
            raise ValueError(f"{name} has {linear.out_features} outputs, which is not a multiple of 8.")
    if method == "awq":
        _check_calibration(model, calibration)
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite values; a model with such weights is not quantized.")
    return targets


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
    kinds = ("PackedLinear", "Linear4bit", "Linear8bitLt", "HQQLinear")
    return any(type(m).__name__ in kinds for m in model.modules()) or getattr(model, "hf_quantizer", None) is not None


def packed_bytes(model) -> dict[str, int]:
    """Measure the bytes that a model's tensors occupy in memory now, by part; a tied head counts as embeddings.

    Parts: vision_tower, projector, embeddings, block_linears (codes with their scales and zero points, or dense
    weights), block_norms, final_norm (with the rotary table), head, total. 4-bit layers that ran on CPU in bfloat16
    are in their running form: 4 + 36 / group_size bits a weight, where a saved folder has 4 + 20 / group_size.
    """
    found, seen = parts(model), set()
    linears = [m for block in found.blocks for name, m in block.named_modules() if name.endswith("_proj")]
    groups = {
        "vision_tower": [found.vision_tower],
        "projector": [found.projector],
        "embeddings": [found.text_model.embed_tokens],
        "block_linears": linears,
        "block_norms": list(found.blocks),
        "final_norm": [found.text_model],
        "head": [found.head],
    }
    sizes = {part: sum(weight_bytes(m, seen) for m in modules) for part, modules in groups.items()}
    return sizes | {"total": sum(sizes.values())}


def nf4(linear: nn.Linear) -> nn.Module:
    """Pack a Linear as bitsandbytes NF4, blocks of 64 weights with a float32 absmax each (arXiv:2305.14314)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = linear.weight.detach()
    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = Params4bit(
        weight.contiguous(),
        requires_grad=False,
        compress_statistics=False,
        quant_type="nf4",
        blocksize=64,
        module=layer,
    ).to(weight.device)
    layer.bias = linear.bias
    return layer.eval()


def _hqq(linear: nn.Linear, bits: int, group_size: int) -> nn.Module:
    """Pack a Linear by HQQ, whose zero points are not rounded (Badri and Shaji, 2023)."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    weight = linear.weight
    return HQQLinear(linear, settings, compute_dtype=weight.dtype, device=str(weight.device))


CHOICES = (3, 4, 8, 16)  # 16: the block is left as it is


def bits_by_importance(
    importance_scores: Sequence[float], target_mean_bits: float, choices: Sequence[int] = (3, 4, 8)
) -> list[int]:
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
    if not scores:
        raise ValueError("importance_scores is empty: give one score for each block.")
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


def quantization_batch(
    processor, records, conditions: dict, questions: dict, dtype, seed: int, most: int = 1024
) -> dict:
    """Return input_ids and pixel_values of one conversation per record, cut to one length, for AWQ's calibration.

    most: tokens per row, the image's among them.
    """
    rng = random.Random(seed)
    ids = [
        prompts.encode_conversation(processor, conversation(r, conditions, questions, rng))["input_ids"]
        for r in records
    ]
    images = [open_image(r.path) for r in records]
    pixels = prompts.encode(processor, [prompts.prompt_text(processor, "")] * len(images), images, dtype)
    shortest = min(most, *map(len, ids))
    return {"input_ids": torch.stack([x[:shortest] for x in ids]), "pixel_values": pixels["pixel_values"]}
