"""A Triton kernel for decoding on a GPU: a few rows times a 4-bit `PackedLinear`, whose codes are read once, as stored.

Unpacking a weight to 16 bits for every token reads and writes many times its bytes; this reads 4 + 20 / group_size
bits a weight. Only `packed` uses it, and only where `works` has seen it give what unpacking gives.
"""

import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

OUTS, GROUPS = 8, 8  # outputs of one program, and groups of inputs that it reads at once


@triton.jit
def _kernel(
    x,
    codes,
    scale,
    zero_point,
    y,
    in_features,
    out_features,
    rows: tl.constexpr,
    row_slots: tl.constexpr,
    GROUP: tl.constexpr,
    OUTS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Sum over groups of s * (sum of q x - z * sum of x), the exact value of sum of (q - z) s x, in float32."""
    o = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    g = tl.arange(0, GROUPS)
    pair = tl.arange(0, GROUP // 2)
    slot = tl.arange(0, row_slots)
    n_groups = in_features // GROUP
    total = tl.zeros((row_slots, OUTS), tl.float32)
    for start in range(0, n_groups, GROUPS):
        group = start + g
        inside = group < n_groups
        byte = group[:, None] * (GROUP // 2) + pair[None, :]  # (groups, pairs)
        q = tl.load(codes + o[:, None, None] * (in_features // 2) + byte[None], mask=inside[None, :, None], other=0)
        low, high = (q & 15).to(tl.float32), (q >> 4).to(tl.float32)  # inputs 2 i and 2 i + 1 of a byte
        here = group[None, :] * out_features + o[:, None]  # (outs, groups)
        s = tl.load(scale + here, mask=inside[None, :], other=0).to(tl.float32)
        z = tl.load(zero_point + here // 2, mask=inside[None, :], other=0)
        z = ((z >> ((o[:, None] % 2) * 4).to(tl.uint8)) & 15).to(tl.float32)
        for r in tl.static_range(rows):
            at = x + r * in_features + 2 * byte
            even = tl.load(at, mask=inside[:, None], other=0).to(tl.float32)
            odd = tl.load(at + 1, mask=inside[:, None], other=0).to(tl.float32)
            dot = tl.sum(low * even[None] + high * odd[None], 2)  # (outs, groups)
            part = tl.sum(s * (dot - z * tl.sum(even + odd, 1)[None, :]), 1)
            total += tl.where(slot[:, None] == r, part[None, :], 0.0)
    tl.store(y + slot[:, None] * out_features + o[None, :], total.to(y.dtype.element_ty), mask=slot[:, None] < rows)


def gemv(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    """Return x (rows, in) times the transposed weight: (rows, out), in the type of x.

    codes (out, in / 2), scale (groups, out) and zero_point (groups, out / 2) as `PackedLinear` stores them at 4 bits.
    """
    rows, in_features = x.shape
    out_features = len(codes)
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    _kernel[(out_features // OUTS,)](
        x.contiguous(),
        codes,
        scale,
        zero_point,
        y,
        in_features,
        out_features,
        rows,
        triton.next_power_of_2(rows),
        group_size,
        OUTS,
        GROUPS,
    )
    return y


def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether the kernel runs on a device and gives what unpacking gives; warn where it does not."""
    from medprune.quantizing.packed import PackedLinear, rtn_codes

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 192, generator=generator)
    layer = PackedLinear.from_codes(*rtn_codes(weight, 4, 64), 4).to(device)
    x = torch.randn(3, 192, generator=generator).to(device, dtype)
    wanted = x.float() @ layer.fake_quantized_weight().t()
    try:
        found = gemv(x, layer.qweight, layer.scale, layer.zero_point, 64).float()
    except Exception as error:  # whatever a compiler or driver may raise: decoding is slower without, and not wrong
        warnings.warn(
            f"The 4-bit kernel cannot be compiled for {device}, so weights are unpacked instead: {error}", stacklevel=2
        )
        return False
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if error > 0.01:
        warnings.warn(
            f"The 4-bit kernel is off by {error:.0%} on {device}, so weights are unpacked instead.", stacklevel=2
        )
    return error <= 0.01
