"""What a quantizer meets: outliers in the outputs of the q_proj layers, block by block."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from medprune.answers.prompts import rows_of
from medprune.models.families import attention, parts

OUTLIER_SD = 6  # standard deviations beyond which an entry is an outlier, as in figure_activations
ROWS_AT_ONCE = 8  # of the batch in one forward


@torch.no_grad()
def _visit(model, batch: dict, numbers: Sequence[int], look: Callable[[int, Tensor], None]) -> None:
    """Call look(block, q_proj outputs (rows x tokens, channels) in float32) for some rows of the batch after others."""
    blocks = parts(model).blocks

    def hook(number, layer, args, output):
        look(number, output.float().flatten(0, -2))

    with ExitStack() as hooks:
        for number in numbers:
            hooks.enter_context(attention(blocks[number]).q_proj.register_forward_hook(partial(hook, number)))
        for start in range(0, len(batch["input_ids"]), ROWS_AT_ONCE):
            rows = rows_of(batch, start, start + ROWS_AT_ONCE)
            model(**{k: v.to(model.device) for k, v in rows.items()}, use_cache=False, logits_to_keep=1)


def q_proj_activations(model, batch: dict, block: int) -> np.ndarray:
    """Return one block's q_proj outputs (rows x tokens, channels), float32, over a processor batch: figure 4.

    `block` numbers the blocks of the model at hand, packed or not. Raises ValueError where it has no such block.
    """
    n, found = len(parts(model).blocks), []
    if not 0 <= block < n:
        raise ValueError(f"block must be 0 to {n - 1}, as the model has {n}, not {block}.")
    _visit(model, batch, [block], lambda _, outputs: found.append(outputs.cpu().numpy()))
    return np.concatenate(found)


def outlier_table(model, batch: dict, block_numbers: Sequence[int] | None = None) -> pd.DataFrame:
    """Return one row for each block of what is extreme in its q_proj outputs over a processor batch.

    Columns: block, peak (largest |entry|), sd, outliers (entries beyond 6 standard deviations from 0), entries, and
    kurtosis (3 for a normal distribution, more with heavier tails). `block_numbers` are the blocks' numbers in the
    original model, for a pruned one. Two passes over the batch keep sums in float64 and no outputs.
    """
    n = len(parts(model).blocks)
    numbers = list(range(n)) if block_numbers is None else list(block_numbers)
    if len(numbers) != n:
        raise ValueError(f"block_numbers lists {len(numbers)} blocks, but the model has {n}.")
    entries, peak, sums, squares, outliers, fourth = np.zeros((6, n))

    def measure(block, outputs):
        values = outputs.double()
        entries[block] += values.numel()
        peak[block] = max(peak[block], float(values.abs().max()))
        sums[block] += float(values.sum())
        squares[block] += float(values.square().sum())

    _visit(model, batch, range(n), measure)
    mean = sums / entries
    sd = np.sqrt(squares / entries - mean**2)

    def count(block, outputs):
        values = outputs.double()
        outliers[block] += int((values.abs() > OUTLIER_SD * sd[block]).sum())
        fourth[block] += float((values - mean[block]).pow(4).sum())

    _visit(model, batch, range(n), count)
    columns = {"block": numbers, "peak": peak, "sd": sd, "outliers": outliers.astype(int)}
    return pd.DataFrame(columns | {"entries": entries.astype(int), "kurtosis": fourth / entries / sd**4})
