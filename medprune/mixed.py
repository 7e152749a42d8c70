"""Bits for each block of a model: more for blocks that matter more, within a mean. A step past the paper.

The list that comes out is `bits` of `quantize.quantize` (rtn, hqq) and of `accounting.account`.
"""

import math
from collections.abc import Sequence

CHOICES = (3, 4, 8, 16)  # 16: the block is left as it is


def bits_by_importance(importance_scores: Sequence[float], target_mean_bits: float,
                       choices: Sequence[int] = (3, 4, 8)) -> list[int]:  # fmt: skip
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
