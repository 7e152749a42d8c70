"""A Triton kernel for decoding on a GPU: a few rows times a 4-bit `PackedLinear`, whose codes are read once, as stored.

Unpacking a weight to 16 bits for every token reads and writes many times its bytes; this reads 4 + 20 / group_size
bits a weight. Only `packed` uses it, and only where it has seen it give what unpacking gives.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

TILE = 8  # outputs of one program, and groups of inputs that it reads at once


@triton.jit
def _kernel(
    x, codes, scale, zero_point, y, inputs, outputs, rows: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr
):
    """Sum over groups of s * (sum of q x - z * sum of x), the exact value of sum of (q - z) s x, in float32."""
    o = tl.program_id(0) * TILE + tl.arange(0, TILE)
    g = tl.arange(0, TILE)
    pair = tl.arange(0, GROUP // 2)
    slot = tl.arange(0, rows)
    n_groups = inputs // GROUP
    total = tl.zeros((rows, TILE), tl.float32)
    for start in range(0, n_groups, TILE):
        group = start + g
        inside = group < n_groups
        byte = group[:, None] * (GROUP // 2) + pair[None, :]  # (groups, pairs)
        q = tl.load(codes + o[:, None, None] * (inputs // 2) + byte[None], mask=inside[None, :, None], other=0)
        low, high = (q & 15).to(tl.float32), (q >> 4).to(tl.float32)  # inputs 2 i and 2 i + 1 of a byte
        here = group[None, :] * outputs + o[:, None]  # (outs, groups)
        s = tl.load(scale + here, mask=inside[None, :], other=0).to(tl.float32)
        z = tl.load(zero_point + here // 2, mask=inside[None, :], other=0)
        z = ((z >> ((o[:, None] % 2) * 4).to(tl.uint8)) & 15).to(tl.float32)
        for r in tl.static_range(rows):
            at = x + r * inputs + 2 * byte
            even = tl.load(at, mask=inside[:, None], other=0).to(tl.float32)
            odd = tl.load(at + 1, mask=inside[:, None], other=0).to(tl.float32)
            dot = tl.sum(low * even[None] + high * odd[None], 2)  # (outs, groups)
            part = tl.sum(s * (dot - z * tl.sum(even + odd, 1)[None, :]), 1)
            total += tl.where(slot[:, None] == r, part[None, :], 0.0)
    tl.store(y + slot[:, None] * outputs + o[None, :], total.to(y.dtype.element_ty))


def gemv(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    """Return x (rows, in) times the transposed weight: (rows, out), in the type of x.

    codes (out, in / 2), scale (groups, out) and zero_point (groups, out / 2) as `PackedLinear` stores them at 4 bits.
    """
    (rows, inputs), outputs = x.shape, len(codes)
    slots = triton.next_power_of_2(rows)  # 1, 2, 4, 8 or 16: a kernel is compiled for each
    y = torch.empty(slots, outputs, dtype=x.dtype, device=x.device)
    x = pad(x, (0, 0, 0, slots - rows)).contiguous()
    _kernel[(outputs // TILE,)](x, codes, scale, zero_point, y, inputs, outputs, slots, group_size, TILE)
    return y[:rows]
