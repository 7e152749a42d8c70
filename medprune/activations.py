"""What a quantizer meets: outliers in the outputs of the q_proj layers, and the losses of AWQ's scale search."""

from collections.abc import Sequence
from contextlib import ExitStack

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from scipy.stats import kurtosis

from medprune.model import parts
from medprune.report import BLUE, RED, legend

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
        rows.append({"block": number, "peak": float(size.max()), "sd": sd, "outliers": outliers,
                     "entries": values.size, "kurtosis": heavy})  # fmt: skip
    return pd.DataFrame(rows)


def figure_loss_curve(info: dict, block: int | None = None) -> Figure:
    """Draw AWQ's search in one block (the middle one by default): loss against the ratio alpha of equation 5.

    Each curve is divided by its own first point, alpha = 0, where activations do not scale the weights; the chosen
    ratio, the least loss, is marked. `info` is what quantize(..., "awq") returned beside the model.
    """
    if "loss_curve" not in info:
        raise ValueError(f"info has no loss_curve, as {info.get('method')!r} searches no scales; only awq does.")
    ratios, losses = info["loss_curve"]["ratios"], info["loss_curve"]["losses"]
    numbered = {name: int(name.split(".layers.")[1].split(".")[0]) for name in losses}
    present = sorted(set(numbered.values()))
    block = present[len(present) // 2] if block is None else block
    if block not in present:
        raise ValueError(f"block {block} is not among the searched blocks {present}.")
    shared = {"q_proj": "q, k, v", "gate_proj": "gate, up", "o_proj": "o", "down_proj": "down"}
    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    plt.close(fig)
    for name, values in losses.items():
        if numbered[name] == block:
            relative = np.asarray(values) / values[0]
            best = int(relative.argmin())
            short = name.rsplit(".", 1)[1]
            (line,) = ax.plot(ratios, relative, label=f"{shared.get(short, short)}: alpha {ratios[best]:.2f}")
            ax.plot(ratios[best], relative[best], "o", color=line.get_color())
    ax.axhline(1, color="#8c8c8c", linewidth=0.8, linestyle=":")
    ax.set(xlabel="alpha (no unit; 0: weights not scaled by activations)", title=f"block {block}",
           ylabel="loss / loss at alpha = 0 (no unit, lower is better)")  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", title="linears that share a scale")
    return fig


def figure_activations(before: np.ndarray, after: np.ndarray, names=("before", "after")) -> Figure:
    """Draw the paper's figure 4: |activation| of (tokens, channels) as heat maps, histograms below.

    Outliers, marked in the histograms, exceed OUTLIER_SD standard deviations of `before` in both.
    """
    arrays = [np.abs(np.asarray(a, np.float32)) for a in (before, after)]
    if any(a.ndim != 2 or a.size == 0 for a in arrays):
        raise ValueError(f"activations of shapes {[a.shape for a in arrays]} must be (tokens, channels).")
    peak, limit = max(a.max() for a in arrays), OUTLIER_SD * float(np.std(before))
    fig, ((*maps,), (*counts,)) = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained", sharex="row")
    plt.close(fig)
    for name, values, heat, ax in zip(names, arrays, maps, counts, strict=True):
        tokens, channels = values.shape
        edges = (-0.5, channels - 0.5, tokens - 0.5, -0.5)
        norm = PowerNorm(0.5, 0, peak)  # a linear scale shows the outliers on black
        heat.grid(visible=False)
        drawn = heat.imshow(_pooled(values), cmap="magma", norm=norm, aspect="auto", extent=edges)
        heat.set(
            title=f"{name}: peak {values.max():.1f}", xlabel="channel (index)", ylabel="token (position)"
        )
        ax.hist(values.ravel(), bins=np.linspace(0, peak, 81), color=BLUE, log=True)
        outliers = values[values > limit]
        ax.plot(outliers, np.full(outliers.size, 0.7), "|", color=RED, label=f"{outliers.size:,} outliers")
        ax.axvline(limit, color=RED, linestyle=":", label=f"{OUTLIER_SD} sd of {names[0]} = {limit:.1f}")
        ax.set(xlabel="|activation| (no unit)", ylabel="entries (count, log scale)", ylim=(0.5, None))
        legend(ax)
    fig.colorbar(drawn, ax=maps, label="|activation| (no unit)")
    return fig


def _pooled(values: np.ndarray, most: int = 128) -> np.ndarray:
    """Return values with each side cut to `most` by maxima: averaging would hide the outliers."""
    for axis in (0, 1):
        size = values.shape[axis]
        starts = np.linspace(0, size, min(most, size), endpoint=False, dtype=int)
        values = np.maximum.reduceat(values, starts, axis=axis)
    return values
