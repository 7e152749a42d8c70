"""The series' figures. matplotlib Figures already closed to pyplot: a notebook shows one once, as a cell's last line."""

from collections import defaultdict
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from medprune.data.pictures import open_image
from medprune.quantizing.activations import OUTLIER_SD
from medprune.results.page import byte_unit, with_interval
from medprune.results.tables import pareto_front


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
    ax.set(
        xlabel="alpha (no unit; 0: weights not scaled by activations)",
        title=f"block {block}",
        ylabel="loss / loss at alpha = 0 (no unit, lower is better)",
    )
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
        heat.set(title=f"{name}: peak {values.max():.1f}", xlabel="channel (index)", ylabel="token (position)")
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


BLUE, RED, GREY = "#0072b2", "#c0392b", "#8c8c8c"


SCORE = "judge score (%)"


_LABELS = {
    "blocks_removed": "decoder blocks removed (count)",
    "params_b": "parameters (billions)",
    "compression_pct": "parameters removed (%)",
    "importance_score": "importance score (no unit, higher = keep)",
    "mean_cosine": "mean cosine to the full model's answers (-1 to 1)",
}


def figure_importance(df: pd.DataFrame) -> Figure:
    """Draw the paper's figure 3: importance_score (or mean_cosine) by block; protected (bool) is optional."""
    value = "importance_score" if "importance_score" in df else "mean_cosine"
    _need(df, "block", value)
    fig, ax = _axes("decoder block (0-based, in the original model)", _LABELS[value], (8, 3.8))
    protected = df["protected"].astype(bool) if "protected" in df else pd.Series(False, index=df.index)
    for name, rows, color in (("scored", df[~protected], BLUE), ("protected", df[protected], GREY)):
        if len(rows):
            ax.bar(rows["block"], rows[value], color=color, label=name)
    for block in df.loc[protected, "block"]:  # a protected block may have no score to draw
        ax.axvspan(block - 0.5, block + 0.5, color=GREY, alpha=0.2, linewidth=0)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlim(df["block"].min() - 0.7, df["block"].max() + 0.7)
    if protected.any():
        _legend_above(fig)
    return fig


def figure_sweep(df: pd.DataFrame, x: str = "blocks_removed") -> Figure:
    """Draw score, low and high against x; one line per criterion, and a paper_score, if there."""
    _need(df, x, "score", "low", "high")
    fig, ax = _axes(_LABELS.get(x, x.replace("_", " ")), SCORE)
    lines = df.groupby("criterion", sort=False) if "criterion" in df else [("ours", df)]
    for color, (name, line) in zip(sns.color_palette("colorblind", len(lines)), lines, strict=True):
        line = line.dropna(subset="score").sort_values(x)
        ax.errorbar(line[x], line["score"], _arms(line, "score"), color=color, marker="o", capsize=3, label=name)
    if "paper_score" in df:
        paper = df.dropna(subset="paper_score").drop_duplicates(x).sort_values(x)
        ax.plot(paper[x], paper["paper_score"], "s--", color=GREY, label="paper (LLaVA-1.5-7B)")
    if x == "blocks_removed":
        ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_ylim(min(0, df["low"].min()), max(100, df["high"].max()))
    legend(ax)
    return fig


def figure_forest(differences: pd.DataFrame, what: str | None = None) -> Figure:
    """Draw `stats.compare`'s differences with their intervals; filled where p_holm is below 0.05.

    A method that is in every row on the same side is named once, on the axis. what: the difference that every row
    shows ("a - b"), where the rows are groups, named by column a.
    """
    _need(differences, "a", "b", "diff", "low", "high", "p_holm")
    rows = differences.reset_index(drop=True)
    names, sides = rows["a"] + "  -  " + rows["b"], "methods, a - b"
    if what:
        names, sides = rows["a"], "group"
    elif len(rows) > 1 and rows["b"].nunique() == 1:
        names, sides, what = rows["a"], "method", f"method - {rows['b'][0]}"
    elif len(rows) > 1 and rows["a"].nunique() == 1:
        names, sides, what = rows["b"], "method", f"{rows['a'][0]} - method"
    fig, ax = _axes(f"judge score, {what or 'a - b'} (percentage points)", "", (8, 1.5 + 0.4 * len(rows)))
    ax.axvline(0, color=GREY, linewidth=1)
    for found, name in ((True, "p (Holm) < 0.05"), (False, "not told from nothing")):
        part = rows[(rows["p_holm"] < 0.05) == found]
        if len(part):
            color, fill = (BLUE, BLUE) if found else (GREY, "white")
            ax.errorbar(
                part["diff"],
                part.index,
                xerr=_arms(part, "diff"),
                fmt="o",
                capsize=3,
                label=name,
                color=color,
                markerfacecolor=fill,
            )
    for i, row in rows.iterrows():
        text = with_interval(row["diff"], row["low"], row["high"])
        ax.annotate(text, (1.02, i), xycoords=ax.get_yaxis_transform(), va="center", fontsize="small")
    ax.set_yticks(rows.index, names)
    ax.set(ylabel=sides, ylim=(len(rows) - 0.5, -0.5))
    _legend_above(fig)
    return fig


def figure_breakdown(df: pd.DataFrame, by: str = "condition", value: str = "score_percent") -> Figure:
    """Draw each method's mean score (rows) in each group of `by` (columns), such as condition or kind."""
    _need(df, "method", by, value)
    means = df.pivot_table(index="method", columns=by, values=value, sort=False, dropna=False)
    fig, ax = _axes("", "", (3.2 + 0.85 * means.shape[1], 1.9 + 0.5 * len(means)))
    sns.heatmap(means, ax=ax, vmin=0, vmax=100, annot=True, fmt=".0f", cmap="viridis", cbar_kws={"label": SCORE})
    ax.set(xlabel=by.replace("_", " "), ylabel="method")
    _slant(ax)
    return fig


def figure_confusion(before: np.ndarray, after: np.ndarray, labels: list[str], names=("before", "after")) -> Figure:
    """Draw counts (true, named) before and after compression, shaded by share of the true condition.

    before, after: (len(labels), len(labels)), or one column more for answers that name none of them.
    """
    matrices, k = [np.asarray(m) for m in (before, after)], len(labels)
    if any(m.shape not in {(k, k), (k, k + 1)} for m in matrices) or matrices[0].shape != matrices[1].shape:
        raise ValueError(f"matrices of shapes {[m.shape for m in matrices]} must both be ({k}, {k}) or ({k}, {k + 1}).")
    named = [*labels, "none named"][: matrices[0].shape[1]]
    fig, axes = plt.subplots(1, 2, figsize=(4.4 + 0.95 * k, 2.4 + 0.4 * k), layout="constrained", sharey=True)
    plt.close(fig)
    for name, counts, ax in zip(names, matrices, axes, strict=True):
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        sns.heatmap(
            share * 100,
            ax=ax,
            vmin=0,
            vmax=100,
            annot=counts,
            fmt="g",
            cmap="Blues",
            linewidths=0.5,
            xticklabels=named,
            yticklabels=labels,
            cbar=ax is axes[1],
            cbar_kws={"label": "share of true condition (%)"},
        )
        ax.set(xlabel="condition named (answers)", ylabel="true condition" if ax is axes[0] else "", title=name)
        _slant(ax)
    return fig


def figure_pareto(df: pd.DataFrame) -> Figure:
    """Draw score against size from label, bytes, score, low, high, family; the Pareto front joined."""
    _need(df, "label", "bytes", "score", "low", "high", "family")
    unit, size = byte_unit(df["bytes"])
    fig, ax = _axes(f"model size ({unit})", SCORE, (8, 5))
    families = df.groupby("family", sort=False)
    # beyond the palette's ten colours other markers tell families apart
    for i, (color, (family, part)) in enumerate(
        zip(sns.color_palette("colorblind", len(families)), families, strict=True)
    ):
        ax.errorbar(
            part["bytes"] / size,
            part["score"],
            _arms(part, "score"),
            color=color,
            label=family,
            fmt="os^D"[i // 10 % 4],
            capsize=2,
            elinewidth=0.8,
        )
    front = df[pareto_front(df["bytes"], df["score"])].sort_values("bytes")
    ax.plot(front["bytes"] / size, front["score"], color=GREY, linestyle="--", zorder=0, label="Pareto front")
    ax.margins(x=0.15)
    legend(ax)
    shown = df.dropna(subset=["bytes", "score"])
    label_points(ax, shown["bytes"] / size, shown["score"], shown["label"], shown.index.isin(front.index))
    return fig


def _axes(xlabel: str, ylabel: str, size=(7, 4.2)):
    fig, ax = plt.subplots(figsize=size, layout="constrained")
    plt.close(fig)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    sns.despine(ax=ax)
    return fig, ax


def _arms(rows: pd.DataFrame, middle: str) -> np.ndarray:
    """Return the lengths (2, n) of an error bar's arms; NaN bounds draw none."""
    return np.maximum(0, [rows[middle] - rows["low"], rows["high"] - rows[middle]])


def legend(ax) -> None:
    ax.legend(frameon=False, fontsize="small")


def _legend_above(fig) -> None:
    fig.legend(loc="outside upper right", ncols=2, frameon=False, fontsize="small")


def label_points(ax, x, y, labels, bold) -> None:
    """Write each point's label where it covers neither a point nor an earlier label, or nearly so."""
    texts = [
        ax.annotate(
            name,
            at,
            (0, 0),
            textcoords="offset points",
            fontsize="x-small",
            fontweight="bold" if b else "normal",
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )
        for name, at, b in zip(labels, zip(x, y, strict=True), bold, strict=True)
    ]
    ax.figure.draw_without_rendering()  # settles the layout, without which extents are not final
    taken = [Bbox.from_bounds(px - 4, py - 4, 8, 8) for px, py in ax.transData.transform(np.column_stack([x, y]))]
    for text in texts:
        for dy, (dx, side) in product((5, -11, 16, -22, 27, -33), ((7, "left"), (-7, "right"))):
            text.set(position=(dx, dy), horizontalalignment=side)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def _slant(ax) -> None:
    if max(len(t.get_text()) for t in ax.get_xticklabels()) > 9:
        ax.tick_params(axis="x", labelrotation=40)
        plt.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor")
    ax.tick_params(axis="y", labelrotation=0)


CONTROLS = ("random", "reverse_order")


_UNITS = {
    "output_similarity": "1 - cosine",
    "magnitude": "sum |w|",
    "block_influence": "1 - cosine",
    "perplexity": "nats/token",
    "logit_divergence": "KL, nats/token",
    "reverse_order": "no unit",
    "random": "no unit",
}


def figure_criteria(table: pd.DataFrame, protect=()) -> Figure:
    """Draw importance_score by block, one panel per criterion, with 95% intervals by image where there are any.

    table: criterion, block, importance_score, low, high, seed (`ranking.block_scores`); of a criterion with several
    seeds the first is drawn in full and the others faintly. Protected blocks are shaded grey.
    """
    _need(table, "criterion", "block", "importance_score", "low", "high", "seed")
    names = list(table["criterion"].unique())
    fig, axes = plt.subplots(
        len(names), 1, figsize=(8, 0.5 + 1.25 * len(names)), sharex=True, squeeze=False, layout="constrained"
    )
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
    sns.heatmap(
        rho,
        ax=ax,
        vmin=-1,
        vmax=1,
        cmap="vlag",
        annot=True,
        fmt=".2f",
        xticklabels=names,
        yticklabels=names,
        cbar_kws={"label": "Spearman's rho over blocks"},
    )
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
    for column, label, color, line in (
        ("overlap", "resampled images against all", BLUE, "o-"),
        ("halves", "one half of the images against the other", RED, "s-"),
        ("chance", "random sets", GREY, ":"),
    ):
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
        ax.errorbar(
            at,
            line["score"],
            arms,
            marker="s" if control else "o",
            markersize=4,
            capsize=2,
            elinewidth=0.8,
            linewidth=1.3,
            label=name.replace("_", " "),
            **style,
        )
        ring = line["blocks_removed"] == (knees or {}).get(name, -1)
        ax.plot(at[ring], line["score"][ring], "o", markersize=13, fillstyle="none", color=style["color"])
    ax.set(
        xlabel="decoder blocks removed (count)" if x == "blocks_removed" else x.replace("_", " "),
        ylabel=SCORE,
        ylim=(min(0, sweep["low"].min()), None),
    )
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
            ax.scatter(
                part["train_s"], part["score"], s=20 + 60 * part["fraction"], color=color, marker=marker, label=label
            )
    ax.axhline(table["score_before"].iloc[0], color=GREY, linestyle="--", linewidth=1)
    ax.annotate(
        "before",
        (0.01, table["score_before"].iloc[0]),
        xycoords=("axes fraction", "data"),
        fontsize="small",
        color=GREY,
        xytext=(0, 3),
        textcoords="offset points",
    )
    ax.set(xlabel="training (seconds)", ylabel=SCORE, xlim=(0, None), ylim=(0, 100))
    ax.legend(frameon=False, fontsize="small", loc="lower left", ncols=2)
    sns.despine(fig=fig)
    if table["fraction"].nunique() > 1:
        label_points(
            ax, table["train_s"], table["score"], [f"{f:.0%}" for f in table["fraction"]], [False] * len(table)
        )
    return fig


def figure_loss(curve: list[dict]) -> Figure:
    """Draw `finetune.train`'s curve: the loss of each step's batch, and where it was measured, the held-out loss."""
    figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    plt.close(figure)
    ax.plot([c["step"] for c in curve], [c["loss"] for c in curve], label="training batch")
    held_out = [(c["step"], c["held_out_loss"]) for c in curve if c.get("held_out_loss") is not None]
    if held_out:
        ax.plot(*zip(*held_out, strict=True), "o", label="images kept back")
    ax.set(xlabel="optimizer step", ylabel="loss on answers (nats per token)", ylim=(0, None))
    ax.legend(frameon=False)
    return figure


def figure_images(records, per_condition: int = 6):
    """Return a figure of some images of each condition."""
    groups = defaultdict(list)
    for r in records:
        groups[r.condition].append(r)
    figure, axes = plt.subplots(
        len(groups), per_condition, figsize=(1.5 * per_condition, 1.6 * len(groups)), squeeze=False
    )
    for line, (condition, members) in zip(axes, sorted(groups.items()), strict=True):
        for ax in line:
            ax.axis("off")
        for ax, record in zip(line, members, strict=False):
            ax.imshow(open_image(record.path))
        line[0].set_title(condition, loc="left", fontsize=9)
    figure.tight_layout()
    plt.close(figure)
    return figure
