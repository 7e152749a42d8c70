"""AWQ (arXiv:2306.00978, section 3.2) of a LLaVA, block by block, calibrated on images and text.

What is searched, and by which arithmetic, is autoawq 0.2.9's, against which the tests hold scales and integers; what
comes out are `PackedLinear` layers. A block is searched on one device, in float32, or in float16 on a GPU.
"""

from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from medprune.answers.prompts import rows_of
from medprune.device import on_gpu
from medprune.models.families import BLOCK_PARTS, SCALED, UNCLIPPED, attention, names, parts
from medprune.progress import progress
from medprune.quantizing.packed import PackedLinear

N_GRID = 20  # ratios 0, 0.05 ... 0.95 that are tried: alpha of the paper's equation 5
CLIPS = 10  # clips tried, from the largest weight of a group down to 0.55 of it
CLIP_TOKENS = 512  # about as many tokens judge the clips
ENTRIES = 2**26  # of the widest tensor in one forward, so that a block's working memory stays small


@torch.no_grad()
def scale_groups(block) -> list[SimpleNamespace]:
    """Return what AWQ scales together in a block (arXiv:2306.00978, section 3.2), in the order of the computation.

    Of each group: `linears` {name in the block: Linear} that read the same input, `before`, the norm or Linear whose
    outputs are divided by the scales (None where it does not give that input channel by channel, as with grouped
    queries), `offset`, what such a norm adds to its weight, `inspected`, the module whose output is compared,
    `takes_kwargs`, whether it is called with the block's keyword arguments, and `clipped`, the names of linears whose
    weights are clipped. Raises ValueError for a block of another structure.
    """
    kind, modules = type(block).__name__, dict(block.named_modules())
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    known = [name for several, _, _ in SCALED for name in several]
    if sorted(linears) != sorted(known):
        raise ValueError(f"AWQ knows no {kind} with the linear layers {', '.join(linears)}, but {', '.join(known)}.")
    inside = {name for name, _ in block.named_children()}
    if inside not in BLOCK_PARTS:
        other = ", ".join(sorted(inside ^ BLOCK_PARTS[0]))
        raise ValueError(f"AWQ knows no {kind} with or without {other}; what is scaled is not known.")
    groups = []
    for linear_names, before_names, inspected in SCALED:
        before_name = next(name for name in before_names if name in modules)
        before, inputs, offset = modules[before_name], modules[linear_names[0]].in_features, 0
        if isinstance(before, nn.Linear):
            before = before if before.out_features == inputs else None
        elif (offset := _offset(before, inputs)) is None:
            norm = f"{before_name}, {type(before).__name__}"
            raise ValueError(
                f"AWQ knows no norm like {norm}, which is no product with its weight, or with 1 + its weight."
            )
        group = {
            "linears": {name: modules[name] for name in linear_names},
            "before": before,
            "inspected": modules[inspected],
        }
        clipped = [name for name in linear_names if name not in UNCLIPPED]
        own = {"takes_kwargs": modules[inspected] is attention(block), "clipped": clipped, "offset": offset}
        groups.append(SimpleNamespace(**group, **own))
    return groups


def _offset(norm, width: int) -> int | None:
    """Return what a norm adds to its weight before it multiplies by it: 0, or 1 where that is kept from 1, or None."""
    if getattr(norm, "weight", None) is None:
        return None
    x, kept = torch.linspace(1, 2, width, device=norm.weight.device)[None], norm.weight.data
    weight = kept.float()  # doubling is exact there, and in float16 not of the smallest numbers
    outputs = {}
    for offset in (0, 1):
        norm.weight.data = weight
        once = norm(x)
        norm.weight.data = 2 * (weight + offset) - offset
        outputs[offset] = torch.allclose(norm(x), once * 2, rtol=1e-5 * offset, atol=1e-5 * offset)
    norm.weight.data = kept
    return next((offset for offset, fits in outputs.items() if fits), None)


@contextmanager
def _on_differences(module: nn.Module, first: dict):
    """Let the Linears of a module run on the difference to their first call, W x = W0 x0 + (W - W0) x0 + W (x - x0).

    The first call is in float32 and kept in `first`; the others multiply the differences alone, in bfloat16, whose
    rounding is then small beside what the search compares, and which takes a third of the time on CPU.
    """

    def forward(linear, x):
        if linear not in first:
            y = nn.functional.linear(x, linear.weight, linear.bias)
            first[linear] = x, x.bfloat16(), y, linear.weight.detach()
        x0, rounded, y, weight = first[linear]
        if not torch.equal(linear.weight, weight):
            y = y + rounded @ (linear.weight - weight).bfloat16().t()
        if not torch.equal(x, x0):
            y = y + (x - x0).bfloat16() @ linear.weight.bfloat16().t()
        return y

    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    for layer in linears:
        layer.forward = partial(forward, layer)
    yield
    for layer in linears:
        del layer.forward


def _placed(value, device, dtype):
    """Return a tensor, or those in a tuple or dict, on a device, and floats in a dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {key: _placed(v, device, dtype) for key, v in value.items()}
    return tuple(_placed(v, device, dtype) for v in value) if isinstance(value, tuple) else value


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _search_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return what a block is searched in: whole products in bfloat16 would choose an alpha of twice the loss."""
    return torch.float16 if on_gpu(device) and dtype == torch.float16 else torch.float32


def _calls_of_blocks(model, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[list[tuple]]]:
    """Run a model on a batch with blocks that do nothing; return what enters the first, and what each is called with.

    By some rows of the batch: hidden states (rows, tokens, width), and for each block (what the model adds to hidden
    states before it, or None; keyword arguments).
    """
    (rows, tokens), blocks = batch["input_ids"].shape, parts(model).blocks
    widest = max(max(m.in_features, m.out_features) for m in blocks[0].modules() if isinstance(m, nn.Linear))
    step = max(1, ENTRIES // (tokens * widest))
    entered, calls, left = [], [[] for _ in blocks], {}

    def catch(number, hidden, **kwargs):
        if number == 0:
            entered.append(hidden)
        added = hidden - left["hidden"] if number and hidden is not left["hidden"] else None
        calls[number].append((added, kwargs))
        left["hidden"] = hidden
        return hidden

    for number, block in enumerate(blocks):
        block.forward = partial(catch, number)
    try:
        for i in range(0, rows, step):
            some = _placed(rows_of(batch, i, i + step), model.device, model.dtype)
            model(**some, use_cache=False, logits_to_keep=1)
    finally:
        for block in blocks:
            del block.forward
    return entered, calls


def _inputs(block, groups, hidden: list[Tensor], calls: list[tuple]) -> list[list[Tensor]]:
    """Run a block on hidden states, which become the next block's; return each group's inputs, a tensor for a call."""
    inputs, hooks = [[] for _ in groups], []
    for group, kept in zip(groups, inputs, strict=True):
        reader = next(iter(group.linears.values()))
        hooks.append(reader.register_forward_pre_hook(lambda module, args, kept=kept: kept.append(args[0])))
    for i, (added, kwargs) in enumerate(calls):
        hidden[i] = _first(block(hidden[i] if added is None else hidden[i] + added, **kwargs))
    for hook in hooks:
        hook.remove()
    return inputs


def pseudo_quantize(w: Tensor, group_size: int, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return (w rounded to `bits`, scales (out, groups), zero points (out, groups)), by autoawq's arithmetic."""
    grouped, top = w.reshape(-1, group_size), 2**bits - 1
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)  # aminmax takes four times as long
    scales = (high - low).clamp_(min=1e-5) / top
    zeros = (low / scales).round_().neg_().clamp_(0, top)
    rounded = (grouped / scales).round_().add_(zeros).clamp_(0, top).sub_(zeros).mul_(scales)
    return rounded.view_as(w), scales.view(len(w), -1), zeros.view(len(w), -1)


def integers(linear: nn.Linear, group_size: int, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scale and zero_point as `PackedLinear` has them, by autoawq's arithmetic in fp16."""
    rounded, scale, zero_point = pseudo_quantize(linear.weight.detach().half(), group_size, bits)
    grouped = rounded.view(*scale.shape, -1)  # (out, groups, group_size)
    codes = ((grouped + (zero_point * scale)[..., None]) / scale[..., None]).round().view_as(rounded)
    return codes.to(torch.uint8), scale.t().contiguous(), zero_point.t().contiguous().to(torch.uint8)


def _loss_by_gram(linear: nn.Linear, inputs: list[Tensor]):
    """Return a function that gives the mean squared error of a Linear's output for the weight that it then has.

    ||D X||^2 = tr(D G D^T), with D the change of the weight and G = X^T X, takes no product with the tokens.
    """
    weight = linear.weight.detach().float()
    gram = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    for x in inputs:
        x = x.float()
        gram += x.T @ x
    gram /= sum(map(len, inputs))

    def loss() -> float:
        d = linear.weight.float() - weight
        return (((d @ gram) * d).sum() / len(d)).item()

    return loss


def _loss_by_outputs(module: nn.Module, inputs: list[Tensor], kwargs: list[dict], differences: bool):
    """Return a function that gives the mean squared error of a module's output for the weights that it then has."""
    firsts = [{} for _ in inputs]

    def outputs():
        for x, also, first in zip(inputs, kwargs, firsts, strict=True):
            with _on_differences(module, first) if differences else nullcontext():
                y = _first(module(x, **also))
            yield y.clamp(torch.finfo(y.dtype).min, torch.finfo(y.dtype).max)  # infinite ones have no difference

    wanted = list(outputs())

    def loss() -> float:
        errors = [(y0 - y).float().square().sum().item() for y0, y in zip(wanted, outputs(), strict=True)]
        return sum(errors) / sum(y.numel() for y in wanted)

    return loss


def _best_scales(group, inputs: list[Tensor], kwargs: list[dict], group_size: int, bits: int, differences: bool):
    """Return the scales (in,) in float32 of the least loss, and the loss of each ratio (equations 4 and 5).

    s = mean|x|^a / mean|w|^(1 - a), with |w| relative to its group's largest (autoawq's duo scaling), over
    sqrt(max s * min s). The linears are left with the weights that they had.
    """
    linears, flat = list(group.linears.values()), [x.flatten(0, -2) for x in inputs]  # (tokens, in)
    tokens, weights = sum(map(len, flat)), [layer.weight.data for layer in linears]
    if group.inspected is linears[0] and tokens > linears[0].in_features:
        loss = _loss_by_gram(linears[0], flat)
    else:
        kwargs = kwargs if group.takes_kwargs else [{} for _ in inputs]
        loss = _loss_by_outputs(group.inspected, inputs, kwargs, differences)
    x_mean = sum(x.abs().float().sum(0) for x in flat) / tokens
    w = torch.cat(weights).float().view(-1, group_size).abs()
    w_mean = (w / (w.amax(1, keepdim=True) + 1e-6)).view(-1, len(x_mean)).mean(0)
    del w
    best, least, losses = None, float("inf"), []
    for step in range(N_GRID):
        alpha = step / N_GRID
        scales = (x_mean.pow(alpha) / (w_mean.pow(1 - alpha) + 1e-4)).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        scales[~torch.isfinite(scales)] = 1
        for layer, weight in zip(linears, weights, strict=True):
            layer.weight.data = (pseudo_quantize(weight * scales, group_size, bits)[0] / scales).to(weight.dtype)
        losses.append(loss())
        if losses[-1] < least:
            best, least = scales, losses[-1]
    for layer, weight in zip(linears, weights, strict=True):
        layer.weight.data = weight
    if best is None:
        raise ValueError(f"AWQ found no finite error of {', '.join(group.linears)}: the calibration overflows.")
    return best, losses


def _fold(group, scales: Tensor) -> None:
    """Multiply a group's weights by the scales (in,) and divide what comes before by them: equation 3."""
    before = group.before
    before.weight.add_(group.offset).div_(scales[:, None] if isinstance(before, nn.Linear) else scales).sub_(
        group.offset
    )
    if getattr(before, "bias", None) is not None:
        before.bias.div_(scales)
    for layer in group.linears.values():
        layer.weight.mul_(scales)


def _sample(inputs: list[Tensor]) -> Tensor:
    """Return every n-th token (tokens, in) of a group's inputs, about CLIP_TOKENS of them."""
    seen, kept, step = 0, [], max(1, sum(x.shape[:-1].numel() for x in inputs) // CLIP_TOKENS)
    for x in inputs:
        x = x.flatten(0, -2)
        kept.append(x[-seen % step :: step])
        seen += len(x)
    return torch.cat(kept)


def best_clips(w: Tensor, x: Tensor, group_size: int, bits: int = 4) -> Tensor:
    """Return the clips (out, groups, 1) of the least squared error over inputs x (tokens, in): autoawq's objective.

    mean_t((q - w) x_t)^2 = (q - w) G (q - w)^T with G = X^T X / T, so no (out, tokens, in) tensor is made.
    """
    x = x.reshape(len(x), -1, group_size).float()  # (tokens, groups, group_size)
    gram = torch.einsum("tgk,tgl->gkl", x, x) / len(x)
    grouped = w.float().reshape(len(w), -1, group_size)
    largest = grouped.abs().amax(-1, keepdim=True)
    best, least = largest.clone(), torch.full_like(largest, float("inf"))
    for step in range(CLIPS):
        clip = largest * (1 - step / (2 * CLIPS))
        clipped = torch.clamp(grouped, -clip, clip).view_as(w)
        d = pseudo_quantize(clipped, group_size, bits)[0].view_as(grouped) - grouped
        error = (torch.einsum("cgk,gkl->cgl", d, gram) * d).sum(-1, keepdim=True)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, clip, best)
    return best


def _quantize_block(block, hidden, calls, group_size: int, bits: int, differences: bool) -> dict[str, list[float]]:
    """Search, fold, clip and pack a block in place, if not 16 bits; return the losses by each group's first linear."""
    groups, losses, samples = scale_groups(block), {}, []
    inputs = _inputs(block, groups, hidden, calls)
    if bits == 16:
        return losses
    kwargs = [also for _, also in calls]
    for group in groups:
        x = inputs.pop(0)
        samples.append(_sample(x))
        if group.before is not None:
            scales, losses[next(iter(group.linears))] = _best_scales(group, x, kwargs, group_size, bits, differences)
            _fold(group, scales)
            samples[-1] = samples[-1] / scales
    for group, x in zip(groups, samples, strict=True):
        for name, linear in group.linears.items():
            if name in group.clipped:
                clip = best_clips(linear.weight, x, group_size, bits)
                grouped = linear.weight.view(*clip.shape[:2], -1)
                linear.weight.data = torch.clamp(grouped, -clip, clip).view_as(linear.weight).to(linear.weight.dtype)
            block.set_submodule(name, PackedLinear.from_codes(*integers(linear, group_size, bits), bits, linear.bias))
    return losses


@torch.no_grad()
def quantize_awq(model, batch: dict[str, Tensor], group_size: int, fetch=lambda block: None, bits=4) -> dict:
    """Search, fold and pack every block of `model` in place; return {"loss_curve", "calibration": what it was, said}.

    `batch` is a processor batch of equal, unpadded rows: input_ids (rows, tokens) and, for image-text calibration,
    pixel_values. bits: one number or one for each block, 16 for one that is left as it is. fetch(block) is called when
    a block's turn comes, for its weights may be in files until then.
    The curve holds `ratios`, the alphas tried, and `losses`, a list for the first Linear of each group that shares a
    scale, by its full name: the mean squared error of the inspected output (equation 4; lower is better). Raises
    ValueError, before any change, for a block of a structure that `scale_groups` does not know.
    """
    batch = {k: v for k, v in batch.items() if k != "attention_mask"}
    kind, (rows, tokens) = "image-text" if "pixel_values" in batch else "text-only", batch["input_ids"].shape
    blocks, called, losses = parts(model).blocks, names(model).blocks, {}
    widths = [bits] * len(blocks) if isinstance(bits, int) else bits
    fetch(blocks[0])
    for block in (b for b in blocks if next(b.parameters()).device.type != "meta"):
        scale_groups(block)
    dtype, (hidden, calls) = next(blocks.parameters()).dtype, _calls_of_blocks(model, batch)
    with progress(len(blocks), "AWQ", "block") as shown:
        for number, (block, width) in enumerate(zip(blocks, widths, strict=True)):
            if block is not blocks[0]:
                fetch(block)
            here = next(block.parameters()).device
            searched = _search_dtype(here, dtype)
            block.to(searched)
            hidden, own = ([_placed(x, here, searched) for x in some] for some in (hidden, calls[number]))
            calls[number] = None
            found = _quantize_block(block, hidden, own, group_size, width, not on_gpu(here) and dtype != torch.float32)
            losses |= {f"{called}.{number}.{name}": curve for name, curve in found.items()}
            block.to(dtype)
            shown.update()
    curve = {"ratios": [i / N_GRID for i in range(N_GRID)], "losses": losses}
    return {"loss_curve": curve, "calibration": f"{kind}, {rows} rows of {tokens} tokens"}
