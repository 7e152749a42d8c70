"""Figures of notebooks 02 and 03 that hold several criteria side by side.

matplotlib Figures already closed to pyplot: a notebook shows one as a cell's last line.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from medprune.report import BLUE, GREY, RED, SCORE, label_points

CONTROLS = ("random", "reverse_order")
_UNITS = {"output_similarity": "1 - cosine", "magnitude": "sum |w|", "block_influence": "1 - cosine",
          "perplexity": "nats/token", "logit_divergence": "KL, nats/token", "reverse_order": "no unit",
          "random": "no unit"}  # fmt: skip


def figure_criteria(table: pd.DataFrame, protect=()) -> Figure:
    """Draw importance_score by block, one panel per criterion, with 95% intervals by image where there are any.

    table: criterion, block, importance_score, low, high, seed (`ranking.block_scores`); of a criterion with several
    seeds the first is drawn in full and the others faintly. Protected blocks are shaded grey.
    """
    _need(table, "criterion", "block", "importance_score", "low", "high", "seed")
    names = list(table["criterion"].unique())
    fig, axes = plt.subplots(len(names), 1, figsize=(8, 0.5 + 1.25 * len(names)), sharex=True, squeeze=False,
                             layout="constrained")  # fmt: skip
    plt.close(fig)
    for name, ax in zip(names, axes[:, 0], strict=True):
        draws = table[(table["criterion"] == name) & ~table["block"].isin(protect)].groupby("seed", sort=False)
        for k, (_, rows) in enumerate(draws):
            color = GREY if name in CONTROLS else BLUE
            middle = rows["importance_score"]
            if k:
                ax.plot(rows["block"], middle, ".", color=color, alpha=0.35)
                continue
            ax.vlines(rows["block"], rows["low"], rows["high"], color=color, linewidth=1.2)
            ax.plot(rows["block"], middle, "o", color=color, markersize=3.5)
        for block in protect:
            ax.axvspan(block - 0.5, block + 0.5, color=GREY, alpha=0.2, linewidth=0)
        ax.set_ylabel(_UNITS.get(name, "score"), fontsize="small")
        ax.set_title(name.replace("_", " "), loc="left", fontsize="small", fontweight="bold", pad=2)
        ax.margins(y=0.15)
        ax.tick_params(labelsize="small")
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    axes[-1, 0].set_xlabel("decoder block (0-based, in the original model); higher = keep, grey = protected")
    sns.despine(fig=fig)
    return fig


def figure_correlations(rho: pd.DataFrame) -> Figure:
    """Draw `ranking.rank_correlations` as a heat map."""
    fig, ax = plt.subplots(figsize=(1.8 + 0.75 * len(rho), 1.2 + 0.55 * len(rho)), layout="constrained")
    plt.close(fig)
    names = [n.replace("_", " ") for n in rho]
    sns.heatmap(rho, ax=ax, vmin=-1, vmax=1, cmap="vlag", annot=True, fmt=".2f", xticklabels=names, yticklabels=names,
                cbar_kws={"label": "Spearman's rho over blocks"})  # fmt: skip
    ax.set(xlabel="criterion", ylabel="criterion")
    ax.tick_params(axis="y", labelrotation=0)
    plt.setp(ax.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")
    return fig


def figure_stability(ranks: pd.DataFrame, overlaps: pd.DataFrame) -> Figure:
    """Draw `ranking.stability`: each block's rank with its central 95% of draws, and the removal sets' overlap."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(1.7, 1), layout="constrained")
    plt.close(fig)
    rows = ranks.sort_values("rank")
    left.vlines(rows["rank"], rows["low"], rows["high"], color=BLUE, linewidth=1.5)
    left.plot(rows["rank"], rows["rank"], "o", color=BLUE, markersize=4)
    left.set_xticks(rows["rank"], rows["block"], fontsize="x-small", rotation=90 if len(rows) > 20 else 0)
    left.grid(axis="x", visible=False)
    left.set(xlabel="decoder block, least important first", ylabel="rank (0 = first to go), 95% of resamples")
    for column, label, color, line in (("overlap", "resampled images against all", BLUE, "o-"),
                                       ("halves", "one half of the images against the other", RED, "s-"),
                                       ("chance", "random sets", GREY, ":")):  # fmt: skip
        right.plot(overlaps["n_removed"], overlaps[column], line, color=color, label=label, markersize=4)
    right.set(xlabel="blocks removed (count)", ylabel="overlap of removal sets (Jaccard, 0-1)", ylim=(0, 1.02))
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend(frameon=False, fontsize="small")
    sns.despine(fig=fig)
    return fig


def figure_sweeps(sweep: pd.DataFrame, knees: dict[str, int] | None = None, x: str = "blocks_removed") -> Figure:
    """Draw judge score against x for every criterion, with 95% intervals by image; controls are dashed and grey.

    sweep: criterion, blocks_removed, score, low, high, and x (such as parameters); several draws of `random` share
    the criterion's name and are averaged, their intervals too. knees: criterion -> blocks_removed, ringed.
    """
    _need(sweep, "criterion", "blocks_removed", "score", "low", "high", x)
    names = list(sweep["criterion"].unique())
    colors = iter(sns.color_palette("colorblind", len(names)))
    fig, ax = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    plt.close(fig)
    steps = np.diff(np.sort(sweep[x].unique()))
    gap = 0.05 * steps.min() if len(steps) else 0  # keeps error bars of one count apart
    for k, name in enumerate(names):
        columns = list(dict.fromkeys([x, "blocks_removed", "score", "low", "high"]))
        line = sweep.loc[sweep["criterion"] == name, columns].groupby("blocks_removed", as_index=False).mean()
        control, at = name in CONTROLS, line[x] + gap * (k - (len(names) - 1) / 2)
        color = next(colors)
        style = {"color": GREY, "linestyle": "--" if name == "random" else ":"} if control else {"color": color}
        arms = np.maximum(0, [line["score"] - line["low"], line["high"] - line["score"]])
        ax.errorbar(at, line["score"], arms, marker="s" if control else "o", markersize=4, capsize=2, elinewidth=0.8,
                    linewidth=1.3, label=name.replace("_", " "), **style)  # fmt: skip
        ring = line["blocks_removed"] == (knees or {}).get(name, -1)
        ax.plot(at[ring], line["score"][ring], "o", markersize=13, fillstyle="none", color=style["color"])
    ax.set(xlabel="decoder blocks removed (count)" if x == "blocks_removed" else x.replace("_", " "), ylabel=SCORE,
           ylim=(min(0, sweep["low"].min()), None))  # fmt: skip
    if x == "blocks_removed":
        ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, fontsize="small", title="ring: knee" if knees else None)
    sns.despine(fig=fig)
    return fig


def _need(table: pd.DataFrame, *columns: str) -> None:
    missing = [c for c in columns if c not in table]
    if missing or table.empty:
        raise ValueError(f"the table to draw has {len(table)} rows of {list(table)} and lacks the columns {missing}.")


def figure_recipes(table: pd.DataFrame) -> Figure:
    """Draw judge score after recovery against seconds of training: a colour per recipe, a size per share of images.

    table: recipe, fraction, budget, train_s, score, low, high, score_before. Points in the same time are squares.
    """
    _need(table, "recipe", "fraction", "budget", "train_s", "score", "low", "high", "score_before")
    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    plt.close(fig)
    for color, (name, rows) in zip(sns.color_palette("colorblind"), table.groupby("recipe", sort=False), strict=False):
        arms = np.maximum(0, [rows["score"] - rows["low"], rows["high"] - rows["score"]])
        ax.errorbar(rows["train_s"], rows["score"], arms, fmt="none", ecolor=color, elinewidth=0.8, capsize=2)
        for budget, marker in (("steps", "o"), ("time", "s")):
            part = rows[rows["budget"] == budget]
            label = f"{name.replace('_', ' ')}, same {budget}" if len(part) else None
            ax.scatter(part["train_s"], part["score"], s=20 + 60 * part["fraction"], color=color, marker=marker, label=label)
    ax.axhline(table["score_before"].iloc[0], color=GREY, linestyle="--", linewidth=1)
    ax.annotate("before", (0.01, table["score_before"].iloc[0]), xycoords=("axes fraction", "data"), fontsize="small",
                color=GREY, xytext=(0, 3), textcoords="offset points")  # fmt: skip
    ax.set(xlabel="training (seconds)", ylabel=SCORE, xlim=(0, None), ylim=(0, 100))
    ax.legend(frameon=False, fontsize="small", loc="lower left", ncols=2)
    sns.despine(fig=fig)
    if table["fraction"].nunique() > 1:
        label_points(ax, table["train_s"], table["score"], [f"{f:.0%}" for f in table["fraction"]], [False] * len(table))
    return fig
