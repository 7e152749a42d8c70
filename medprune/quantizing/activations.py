"""What a quantizer meets: outliers in the outputs of the q_proj layers, and the losses of AWQ's scale search."""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import pandas as pd
import torch
from scipy.stats import kurtosis

from medprune.models.families import parts

OUTLIER_SD = 6  # standard deviations beyond which an entry is an outlier, as in figure_activations


@torch.no_grad()
def _q_proj_outputs(model, batch: dict, numbers: Sequence[int]) -> list[np.ndarray]:
    """Return the q_proj outputs (rows x tokens, channels), float32, of blocks of the model at hand, by one forward."""
    blocks, found = parts(model).blocks, {}
    for number in numbers:
        if not 0 <= number < len(blocks):
            raise ValueError(f"block must be 0 to {len(blocks) - 1}, as the model has {len(blocks)}, not {number}.")

    def keep(number):
        return lambda module, args, output: found.update({number: output.float().cpu().flatten(0, -2).numpy()})

    inputs = {k: v.to(model.device) for k, v in batch.items()}
    with ExitStack() as hooks:
        for number in numbers:
            handle = blocks[number].self_attn.q_proj.register_forward_hook(keep(number))
            hooks.callback(handle.remove)
        model(**inputs, use_cache=False, logits_to_keep=1)
    return [found[number] for number in numbers]


def q_proj_activations(model, batch: dict, block: int) -> np.ndarray:
    """Return one block's q_proj outputs (rows x tokens, channels), float32, over a processor batch: figure 4.

    `block` numbers the blocks of the model at hand, packed or not. Raises ValueError where it has no such block.
    """
    return _q_proj_outputs(model, batch, [block])[0]


def outlier_table(model, batch: dict, block_numbers: Sequence[int] | None = None) -> pd.DataFrame:
    """Return one row for each block of what is extreme in its q_proj outputs over a processor batch.

    Columns: block, peak (largest |entry|), sd, outliers (entries beyond 6 standard deviations from 0), entries, and
    kurtosis (3 for a normal distribution, more with heavier tails). `block_numbers` are the blocks' numbers in the
    original model, for a pruned one.
    """
    n = len(parts(model).blocks)
    numbers = list(range(n)) if block_numbers is None else list(block_numbers)
    if len(numbers) != n:
        raise ValueError(f"block_numbers lists {len(numbers)} blocks, but the model has {n}.")
    rows = []
    for number, values in zip(numbers, _q_proj_outputs(model, batch, range(n)), strict=True):
        sd, size = float(values.std()), np.abs(values)
        outliers, heavy = int((size > OUTLIER_SD * sd).sum()), float(kurtosis(values, axis=None, fisher=False))
        rows.append(
            {
                "block": number,
                "peak": float(size.max()),
                "sd": sd,
                "outliers": outliers,
                "entries": values.size,
                "kurtosis": heavy,
            }
        )
    return pd.DataFrame(rows)
