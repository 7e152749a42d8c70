"""Linear layers and embedding tables in 3, 4 or 8 bits: integer codes, fp16 scales, integer zero points, and kernels.

A weight is `w ~ (q - zero_point) * scale`, a scale and a zero point for each group of inputs of each output (AWQ,
arXiv:2306.00978, the quantizer under its equation 1). Nothing is rounded that stays stored in floats.
"""

import warnings
from functools import lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medprune.models.sizes import packable
from medprune.settings import BITS, GROUP_SIZES

MAX_KERNEL_ROWS = {4: 128, 8: 24}  # by bits: up to so many the int4 kernel beats unpacking, on one AVX512-BF16 core
MAX_GPU_ROWS = 16
SLICE_WEIGHTS = 2**22  # weights unpacked at once, so that a large layer needs no second copy of itself
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of 8 neighbouring outputs stands in nibble i of an AWQ word


def rtn_codes(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight (out, in) to nearest, asymmetric by group, with the scale already rounded to fp16.

    Returns codes (out, in) uint8, scale (groups, out) fp16, zero_point (groups, out) uint8. The range of each group
    is widened to hold 0, so that its zero point is one of the codes. Raises ValueError where a scale overflows fp16.
    """
    top = 2**bits - 1
    w = weight.detach().float().reshape(weight.shape[0], -1, group_size)  # (out, groups, group_size)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    scale = ((high - low) / top).clamp(min=2.0**-24).half()
    if not torch.isfinite(scale).all():
        raise ValueError(f"a weight of size {float(weight.abs().max()):.3g} is too large for an fp16 scale.")
    s = scale.float()
    zero_point = (-low / s).round().clamp(0, top)
    codes = ((w / s[..., None]).round() + zero_point[..., None]).clamp(0, top)
    return codes.view_as(weight).to(torch.uint8), scale.t().contiguous(), zero_point.t().contiguous().to(torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes (..., n) densely into uint8 (..., n * bits / 8); n must be a multiple of 8."""
    if bits == 8:
        return codes.contiguous()
    if bits == 4:
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    eight = codes.reshape(*codes.shape[:-1], -1, 8).int()  # eight 3-bit codes go into three bytes
    word = sum(eight[..., i] << (3 * i) for i in range(8))
    return torch.stack([(word >> shift) & 255 for shift in (0, 8, 16)], -1).flatten(-2).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack_codes`: uint8 (..., n * bits / 8) -> uint8 (..., n)."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    # In bytes throughout: a wider word takes 4 times as long.
    a, b, c = packed.reshape(*packed.shape[:-1], -1, 3).unbind(-1)
    first = [a & 7, (a >> 3) & 7, (a >> 6) | ((b & 1) << 2)]
    middle = [(b >> 1) & 7, (b >> 4) & 7, (b >> 7) | ((c & 3) << 1)]
    return torch.stack([*first, *middle, (c >> 2) & 7, c >> 5], -1).flatten(-2)


@lru_cache(maxsize=1)
def kernel_width() -> int | None:
    """Return how many rows the int4 CPU kernel interleaves here (64 AVX512, 32 AVX2), None where it cannot be used.

    Found by packing known codes and reading them back, so an unknown layout costs speed and never a wrong weight.
    """
    codes = (torch.arange(80 * 32).pow(2) // 37 % 16).view(80, 32)  # no two rows or columns alike
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    codes = codes.to(torch.uint8)
    return next((width for width in (64, 32) if torch.equal(_from_kernel(packed, 80, 32, width), codes)), None)


@lru_cache(maxsize=8)
def gpu_kernel(device: torch.device, dtype: torch.dtype):
    """Return `kernels.gemv` where a GPU runs it and gives what unpacking gives, else None."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from medprune.quantizing.kernels import gemv

    return gemv if kernel_agrees(gemv, device, dtype) else None


def kernel_agrees(gemv, device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether a kernel runs on a device and gives what unpacking gives; warn where it does not.

    Tried are a layer that it reads in one turn and one of two turns, with the most rows and the largest groups.
    """
    try:
        errors = [_kernel_error(gemv, *sizes, device, dtype) for sizes in ((3, 24, 3, 64), (16, 32, 11, 128))]
        if all(error <= 0.01 for error in errors):
            return True
        why = f"is off by {max(errors):.0%} on {device}."
    except Exception as problem:  # whatever a compiler or driver may raise: decoding is slower without, and not wrong
        why = f"cannot be compiled for {device}: {problem}"
    warnings.warn(f"Weights are unpacked for every token, as the 4-bit kernel {why}", stacklevel=2)
    return False


def _kernel_error(gemv, rows, outs, groups, group_size, device, dtype) -> float:
    """Return how far a kernel's product is from the unpacked weight's, as a share of the largest entry."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outs, groups * group_size, generator=generator)
    layer = PackedLinear.from_codes(*rtn_codes(weight, 4, group_size), 4).to(device)
    x = torch.randn(rows, groups * group_size, generator=generator).to(device, dtype)
    wanted = x.float() @ layer.fake_quantized_weight().t()
    found = gemv(x, layer.qweight, layer.scale, layer.zero_point, group_size).float()
    return float((found - wanted).abs().max() / wanted.abs().max())


def _from_kernel(packed: Tensor, out_features: int, in_features: int, width: int) -> Tensor:
    """Read codes (out, in) back from the kernel's layout: blocks of `width` outputs, then the rest in pairs."""
    flat = packed.reshape(-1)
    full = out_features // width * width
    blocks = flat[: full * in_features // 2].view(-1, in_features, width // 2)
    codes = torch.cat([blocks & 15, blocks >> 4], -1)  # (blocks, in, width)
    rest = flat[full * in_features // 2 :].view(in_features, (out_features - full) // 2)
    return torch.cat([codes.transpose(1, 2).reshape(full, in_features), unpack_codes(rest, 4).t()])


class PackedLinear(nn.Module):
    """A Linear whose weight is stored in `bits` bits; frozen, yet gradients pass through to its input.

    Stored form: `qweight` (out, in * bits / 8), `zero_point` (groups, out * bits / 8), both uint8, and `scale`
    (groups, out), always fp16: bits + (16 + bits) / group_size bits a weight. On CPU, the first forward in bfloat16 of
    a layer of 4 or 8 bits turns it into the running form of torch's int4 kernel: the same codes in the kernel's order,
    its bf16 tables, and 4 bits that lead back to the exact fp16 scale: 4 + 36 / group_size bits. Codes of 8 bits are
    two of 4, q = 16 * (high - 8) + (low - 8) + 136, multiplied one after the other; what is left of a group, (136 -
    zero_point) * scale in float32, times its inputs' sum: 8 + 68 / group_size bits. Only one form is ever held; saving
    and moving return to the stored one. On a GPU a Triton kernel (`kernels.gemv`) reads the stored form of 4 bits for
    up to 16 rows. Elsewhere the weight is unpacked for each call.
    """

    def __init__(self, in_features: int, out_features: int, bits=4, group_size=64, bias=None, device=None):
        super().__init__()
        if bits not in BITS or group_size not in GROUP_SIZES or not packable(in_features, out_features, group_size):
            shape = f"{in_features} inputs and {out_features} outputs"
            raise ValueError(f"{bits} bits in groups of {group_size} do not store a layer of {shape}.")
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        groups = in_features // group_size
        byte = {"dtype": torch.uint8, "device": device}
        self.register_buffer("qweight", torch.zeros(out_features, in_features * bits // 8, **byte))
        self.register_buffer("scale", torch.ones(groups, out_features, dtype=torch.float16, device=device))
        self.register_buffer("zero_point", torch.zeros(groups, out_features * bits // 8, **byte))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("tables", None, persistent=False)  # running form: (groups, out, 2) bf16
        self.register_buffer("residual", None, persistent=False)  # running form: (groups, out / 2) uint8
        self.register_buffer("offset", None, persistent=False)  # running form of 8 bits: (groups, out) float32

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, bias: Tensor | None = None):
        """Build from codes (out, in), scale (groups, out) fp16 and zero_point (groups, out), all integers uint8."""
        out_features, in_features = codes.shape
        layer = cls(in_features, out_features, bits, in_features // len(scale), bias, device="meta")
        layer.qweight, layer.zero_point = pack_codes(codes, bits), pack_codes(zero_point, bits)
        layer.scale = scale.contiguous()
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int = 4, group_size: int = 64):
        """Round a Linear to nearest (RTN) and pack it, a few outputs at a time: a head in float32 is large."""
        out_features, in_features = linear.weight.shape
        layer = cls(in_features, out_features, bits, group_size, linear.bias, linear.weight.device)
        layer._round(linear.weight)
        return layer

    def _round(self, weight: Tensor) -> None:
        bits = self.bits
        for i, j in self._slices():
            codes, scale, zero_point = rtn_codes(weight[i:j], bits, self.group_size)
            self.qweight[i:j], self.scale[:, i:j] = pack_codes(codes, bits), scale
            self.zero_point[:, i * bits // 8 : j * bits // 8] = pack_codes(zero_point, bits)

    def parts(self, first: int = 0, last: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes (out, in) uint8, scale (groups, out) fp16, zero_point (groups, out) uint8, from either form.

        `first` and `last` choose outputs first to last - 1; the first must be a multiple of 64.
        """
        last = self.out_features if last is None else last
        if self.tables is None:
            zeros = self.zero_point[:, first * self.bits // 8 : last * self.bits // 8]
            codes = unpack_codes(self.qweight[first:last], self.bits)
            return codes, self.scale[:, first:last], unpack_codes(zeros, self.bits)
        half = self.in_features // 2
        stored = [q.reshape(-1)[first * half : last * half] for q in self._fours()]  # whole blocks of outputs
        codes = _joined([_from_kernel(q, last - first, self.in_features, kernel_width()) for q in stored])
        return codes, *self._exact(slice(first, last), unpack_codes(self.residual[:, first // 2 : last // 2], 4))

    def _fours(self) -> Tensor:
        """Return the running form's codes of 4 bits: one tensor, or the high ones and the low ones of 8 bits."""
        return self.qweight if self.bits == 8 else self.qweight[None]

    def _exact(self, outs, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the fp16 scale and the zero point (groups, n) of outputs, from the running form."""
        near, left = self.tables[:, outs].unbind(-1)
        middle = 8
        if self.bits == 8:
            left, middle = self.offset[:, outs], 136
        zero_point = (middle - (left.float() / near.float()).round()).to(torch.uint8)
        bit_pattern = near.half().view(torch.int16) + residual.to(torch.int16) - 8
        return bit_pattern.view(torch.float16), zero_point

    @torch.no_grad()
    def fake_quantized_weight(self, dtype: torch.dtype = torch.float32, first: int = 0, last: int | None = None):
        """Return the weight (out, in) that the codes stand for, or `parts`' choice of rows; in float32 it is exact."""
        codes, scale, zero_point = self.parts(first, last)
        grouped = codes.view(len(codes), -1, self.group_size).to(dtype)  # (out, groups, group_size)
        grouped = grouped.sub_(zero_point.t()[..., None].to(dtype)).mul_(scale.t()[..., None].to(dtype))
        return grouped.view(len(codes), self.in_features)

    def _slices(self) -> list[tuple[int, int]]:
        """Return (first, last) of runs of outputs that unpack to about SLICE_WEIGHTS weights each."""
        step = max(64, SLICE_WEIGHTS // self.in_features // 64 * 64)
        return [(i, min(i + step, self.out_features)) for i in range(0, self.out_features, step)]

    def forward(self, x: Tensor) -> Tensor:
        y = self._product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _product(self, x: Tensor) -> Tensor:
        """Return x (rows, in) times the transposed weight, by a kernel that reads the codes where there is one."""
        packed = self.bits in MAX_KERNEL_ROWS and len(x) and not (torch.is_grad_enabled() and x.requires_grad)
        if packed and self.bits == 4 and len(x) <= MAX_GPU_ROWS and (gemv := gpu_kernel(x.device, x.dtype)):
            return gemv(x, self.qweight, self.scale, self.zero_point, self.group_size)
        fits = x.dtype == torch.bfloat16 and x.device.type == "cpu" and self.out_features % 16 == 0
        if packed and fits and len(x) <= MAX_KERNEL_ROWS[self.bits] and kernel_width() is not None:
            if self.tables is None:
                self._run()
            multiply, x = torch.ops.aten._weight_int4pack_mm_for_cpu, x.contiguous()
            if self.bits == 4:
                return multiply(x, self.qweight, self.group_size, self.tables)
            fours = zip((x * 16, x), self.qweight, strict=True)
            high, low = (multiply(y, q, self.group_size, self.tables) for y, q in fours)
            sums = x.float().view(len(x), -1, self.group_size).sum(-1)  # (rows, groups)
            return (high.float() + low.float() + sums @ self.offset).to(x.dtype)
        return torch.cat([F.linear(x, self.fake_quantized_weight(x.dtype, *outs)) for outs in self._slices()], -1)

    @torch.no_grad()
    def _run(self) -> None:
        """Turn the stored form into the running one; of 4 bits w = (q - 8) * scale + (8 - zero_point) * scale."""
        with torch.inference_mode(False):
            codes, scale, zero_point = self.parts()
            s = scale.float()
            left = torch.zeros_like(s) if self.bits == 8 else (8 - zero_point.float()) * s
            tables = torch.stack([s, left], -1).bfloat16()
            # bf16 drops 3 bits of an fp16 scale: the bit patterns are at most 4 apart, which 4 bits can hold.
            residual = scale.view(torch.int16) - tables[..., 0].half().view(torch.int16) + 8
            convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
            fours = [codes >> 4, codes & 15] if self.bits == 8 else [codes]
            # Integers take 8 times the codes' bytes, so a few outputs at a time; blocks of 64 stand by themselves.
            fours = [torch.cat([convert(four[i:j].int(), 1) for i, j in self._slices()]) for four in fours]
            self.qweight = torch.stack(fours) if self.bits == 8 else fours[0]
            if self.bits == 8:
                self.offset = (136 - zero_point.float()) * tables[..., 0].float()
            self.tables, self.residual = tables, pack_codes(residual.to(torch.uint8), 4)
            self.scale = self.zero_point = None

    @torch.no_grad()
    def compact(self) -> None:
        """Return to the stored form, with the very codes, scales and zero points that it had."""
        if self.tables is not None:
            codes, self.scale, zero_point = self.parts()
            self.qweight, self.zero_point = pack_codes(codes, self.bits), pack_codes(zero_point, self.bits)
            self.tables = self.residual = self.offset = None

    def _apply(self, fn, recurse=True):
        self.compact()
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float16:  # model.to(dtype) must not round the scales
            self.scale = scale.to(self.scale.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.compact()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args):
        self.compact()
        super()._load_from_state_dict(*args)


def _joined(fours: list[Tensor]) -> Tensor:
    """Return the codes of one tensor of 4 bits, or of the high and the low ones of 8."""
    return fours[0] if len(fours) == 1 else fours[0] << 4 | fours[1]


class PackedTable(PackedLinear):
    """An embedding table stored as `PackedLinear` stores a weight, of which a head tied to it is the very same module.

    Called with token ids it looks their rows up, called with hidden states it multiplies, as the head. `multiplier`
    (a scalar in the model's dtype) is what the family multiplies its rows by when they are looked up.
    """

    def __init__(self, vocab: int, hidden: int, bits=4, group_size=64, dtype=torch.bfloat16, device=None):
        super().__init__(hidden, vocab, bits, group_size, device=device)
        self.register_buffer("multiplier", torch.ones((), dtype=dtype, device=device))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, bits: int = 4, group_size: int = 64):
        """Round an embedding table to nearest (RTN) and pack it.

        Raises ValueError for one that does more than to look rows up and to multiply them by one number.
        """
        weight = embedding.weight.detach()
        table = cls(*weight.shape, bits, group_size, weight.dtype, weight.device)
        rows = weight[:64].float()
        found = embedding(torch.arange(len(rows), device=weight.device)).detach().float()
        factor = (found * rows).sum() / rows.square().sum()
        if not torch.allclose(found, factor * rows, rtol=2e-2, atol=1e-6):
            raise ValueError(f"{type(embedding).__name__} does more than look rows up: leave quantize_embeddings out.")
        table.multiplier = factor.to(weight.dtype)
        table._round(weight)
        return table

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return super().forward(x)
        return (self.rows(x.reshape(-1)) * self.multiplier).view(*x.shape, self.in_features)

    @torch.no_grad()
    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows (n, hidden) of ids (n,), in the model's dtype: codes of these alone are unpacked."""
        if self.tables is None:
            codes, zero_point = unpack_codes(self.qweight[ids], self.bits), _taken(self.zero_point, ids, self.bits)
            scale = self.scale[:, ids]
        else:
            size = (self.out_features, self.in_features, kernel_width())
            codes = _joined([_codes_in_kernel(q, ids, *size) for q in self._fours()])
            scale, zero_point = self._exact(ids, _taken(self.residual, ids, 4))
        grouped = codes.view(len(ids), -1, self.group_size).float()
        grouped = grouped.sub_(zero_point.t()[..., None].float()).mul_(scale.t()[..., None].float())
        return grouped.view(len(ids), self.in_features).to(self.multiplier.dtype)


def _taken(packed: Tensor, ids: Tensor, bits: int) -> Tensor:
    """Return columns ids (n,) of what `pack_codes` packed along its last axis: (m, n) uint8."""
    eight = packed.view(len(packed), -1, bits)[:, ids // 8]  # eight codes stand in `bits` bytes
    return unpack_codes(eight, bits).gather(-1, (ids % 8).expand(len(packed), -1)[..., None]).squeeze(-1)


def _codes_in_kernel(packed: Tensor, ids: Tensor, outs: int, ins: int, width: int) -> Tensor:
    """Return the codes (n, in) of outputs ids (n,) from the layout that `_from_kernel` reads whole."""
    flat, full, half = packed.reshape(-1), outs // width * width, width // 2
    blocks, rest = flat[: full * ins // 2].view(-1, ins, half), flat[full * ins // 2 :].view(ins, (outs - full) // 2)
    codes, inside = torch.empty(len(ids), ins, dtype=torch.uint8), ids < full
    row, beyond = ids[inside], ids[~inside] - full
    codes[inside] = _nibble(blocks[row // width, :, row % half], row % width // half)
    codes[~inside] = _nibble(rest[:, beyond // 2].t(), beyond % 2)
    return codes


def _nibble(packed: Tensor, second: Tensor) -> Tensor:
    """Return of each row of bytes (n, m) the low four bits, or where second (n,) is 1 the high ones."""
    return torch.where(second[:, None] == 1, packed >> 4, packed & 15)


def to_awq(layer: PackedLinear) -> dict[str, Tensor]:
    """Return a 4-bit layer in AWQ's GEMM layout: int32 qweight (in, out / 8) and qzeros (groups, out / 8), scales."""
    codes, scale, zero_point = layer.parts()
    return {"qweight": _pack_awq(codes.t()), "qzeros": _pack_awq(zero_point), "scales": scale.contiguous()}


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Return the stored form's buffers of a layer from AWQ's GEMM layout."""
    codes = _unpack_awq(qweight).t()
    return {"qweight": pack_codes(codes, 4), "zero_point": pack_codes(_unpack_awq(qzeros), 4), "scale": scales}


def _pack_awq(codes: Tensor) -> Tensor:
    eight = codes.contiguous().view(len(codes), -1, 8).int()  # (rows, words, 8)
    return sum(eight[..., column] << (4 * nibble) for nibble, column in enumerate(_AWQ_ORDER))


def _unpack_awq(words: Tensor) -> Tensor:
    columns = [((words >> (4 * _AWQ_ORDER.index(column))) & 15).to(torch.uint8) for column in range(8)]
    return torch.stack(columns, -1).flatten(-2)
