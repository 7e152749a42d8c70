"""The series' figures: matplotlib Figures closed to pyplot, which a notebook shows once, as a cell's last line."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from adjustText import adjust_text
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from medprune.data.pictures import open_image
from medprune.models.families import block_number
from medprune.quantizing.activations import OUTLIER_SD
from medprune.results.page import byte_unit, with_interval
from medprune.results.tables import pareto_front

BLUE, RED, GREY = "#0072b2", "#c0392b", "#8c8c8c"
SCORE = "judge score (%)"
REMOVED = "decoder blocks removed (count)"
MARKS = 2000  # outliers of a histogram that are marked one by one
BLOCK = "decoder block (0-based, in the original model)"
PLAIN = {"frameon": False, "fontsize": "small"}  # a legend; ABOVE a figure's axes, or BESIDE them
ABOVE = PLAIN | {"loc": "outside upper right", "ncols": 2}
BESIDE = PLAIN | {"loc": "upper left", "bbox_to_anchor": (1, 1)}
BARS = {"capsize": 2, "elinewidth": 0.8}  # of intervals
CONTROLS = {"random": "--", "reverse_order": ":"}  # criteria that look at nothing, and the lines that draw them

_UNITS = {
    "output_similarity": "1 - cosine", "magnitude": "sum |w|", "block_influence": "1 - cosine",
    "perplexity": "nats/token", "logit_divergence": "KL, nats/token", "reverse_order": "no unit", "random": "no unit",
}  # fmt: skip


def figure_loss(curve: list[dict]) -> Figure:
    """Draw `finetune.train`'s curve: the loss of each step's batch, and where it was measured, the held-out loss."""
    fig, ax = _axes(size=(6, 3))
    steps = pd.DataFrame(curve, columns=["step", "loss", "held_out_loss"], dtype=float)
    ax.plot("step", "loss", data=steps, label="training batch")
    if steps["held_out_loss"].notna().any():
        ax.plot("step", "held_out_loss", "o", data=steps, label="images kept back")
    ax.set(xlabel="optimizer step", ylabel="loss on answers (nats per token)", ylim=(0, None))
    ax.legend(frameon=False)
    return fig


def figure_images(records, per_condition: int = 6) -> Figure:
    """Draw some images of each condition."""
    groups = pd.Series(records).groupby([r.condition for r in records])
    fig, axes = _axes(len(groups), per_condition, (1.5 * per_condition, 1.6 * len(groups)), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for line, (condition, members) in zip(axes, groups, strict=True):
        line[0].set_title(condition, loc="left", fontsize=9)
        for ax, record in zip(line, members, strict=False):
            ax.imshow(open_image(record.path))
    return fig


def figure_importance(df: pd.DataFrame) -> Figure:
    """Draw the paper's figure 3: importance_score by block, those that are protected (bool) in grey."""
    fig, ax = _axes(size=(8, 3.8))
    protected = df["protected"].astype(bool)
    for name, rows, color in (("scored", df[~protected], BLUE), ("protected", df[protected], GREY)):
        ax.bar(rows["block"], rows["importance_score"], color=color, label=name)
    _shade(ax, df.loc[protected, "block"])  # a protected block may have no score to draw
    ax.locator_params(axis="x", integer=True)
    ax.set_xlim(df["block"].min() - 0.7, df["block"].max() + 0.7)
    ax.set(xlabel=BLOCK, ylabel="importance score (no unit, higher = keep)")
    if protected.any():
        fig.legend(**ABOVE)
    return fig


def figure_criteria(table: pd.DataFrame, protect=()) -> Figure:
    """Draw importance_score by block, one panel per criterion, with 95% intervals by image where there are any.

    table: criterion, block, importance_score, low, high, seed (`tables.block_scores`); of a criterion with several
    seeds the lowest is drawn in full and the others faintly. Protected blocks are shaded grey.
    """
    names = list(table["criterion"].unique())
    fig, axes = _axes(len(names), 1, (8, 0.5 + 1.25 * len(names)), sharex=True, squeeze=False)
    for name, ax in zip(names, axes[:, 0], strict=True):
        color = GREY if name in CONTROLS else BLUE
        scored = table[(table["criterion"] == name) & ~table["block"].isin(protect)]
        first = scored["seed"] == scored["seed"].min()
        ax.plot("block", "importance_score", ".", data=scored[~first], color=color, alpha=0.35)
        ax.vlines("block", "low", "high", data=scored[first], color=color, linewidth=1.2)
        ax.plot("block", "importance_score", "o", data=scored[first], color=color, markersize=3.5)
        _shade(ax, protect)
        ax.set_ylabel(_UNITS.get(name, "score"), fontsize="small")
        ax.set_title(name.replace("_", " "), loc="left", fontsize="small", fontweight="bold", pad=2)
        ax.margins(y=0.15)
        ax.tick_params(labelsize="small")
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel(f"{BLOCK}; higher = keep, grey = protected")
    return fig


def figure_correlations(rho: pd.DataFrame) -> Figure:
    """Draw `ranking.rank_correlations` as a heat map."""
    fig, ax = _axes(size=(1.8 + 0.75 * len(rho), 1.2 + 0.55 * len(rho)))
    names, bar = [name.replace("_", " ") for name in rho], {"label": "Spearman's rho over blocks"}
    style = {"vmin": -1, "vmax": 1, "cmap": "vlag", "fmt": ".2f", "xticklabels": names, "yticklabels": names}
    _heatmap(ax, rho, annot=True, cbar_kws=bar, **style)
    ax.set(xlabel="criterion", ylabel="criterion")
    return fig


def figure_stability(ranks: pd.DataFrame, overlaps: pd.DataFrame) -> Figure:
    """Draw `ranking.stability`: each block's rank with its central 95% of draws, and the removal sets' overlap."""
    fig, (left, right) = _axes(1, 2, (10, 4), width_ratios=(1.7, 1))
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
    right.set(xlabel=REMOVED, ylabel="overlap of removal sets (Jaccard, 0-1)", ylim=(0, 1.02))
    right.locator_params(axis="x", integer=True)
    right.legend(**PLAIN)
    return fig


def figure_sweep(sweep: pd.DataFrame, what: str = SCORE) -> Figure:
    """Draw `what`, a score, by blocks removed with its intervals: a line per criterion, and the paper's, if there.

    sweep: blocks_removed, score, low, high, and perhaps criterion and paper_score; several draws of `random` share the
    criterion's name and are averaged, their intervals too, if all have one. Controls are grey and broken.
    """
    fig, ax = _axes(size=(8, 4.5))
    named = sweep if "criterion" in sweep else sweep.assign(criterion="ours")
    lines = list(_groups(named.dropna(subset="score"), "criterion"))
    apart = 0.02 * min(np.diff(np.sort(sweep["blocks_removed"].unique())), default=0)  # of the error bars at one count
    for k, (color, name, rows) in enumerate(lines):
        line = rows.groupby("blocks_removed", as_index=False)[["score", "low", "high"]].mean(skipna=False)
        style = {"color": color, "fmt": "o-"}
        if name in CONTROLS:
            style = {"color": GREY, "fmt": "s" + CONTROLS[name]}
        at = line["blocks_removed"] + apart * (k - (len(lines) - 1) / 2)
        ax.errorbar(at, line["score"], _arms(line), **BARS, label=name.replace("_", " "), markersize=5, **style)
    if "paper_score" in sweep:
        paper = sweep.dropna(subset="paper_score").drop_duplicates("blocks_removed").sort_values("blocks_removed")
        ax.plot("blocks_removed", "paper_score", "s--", data=paper, color=GREY, label="paper (LLaVA-1.5-7B)")
    ax.locator_params(axis="x", integer=True)
    ax.set(xlabel=REMOVED, ylabel=what, ylim=(-2, 102))
    ax.legend(**PLAIN)
    return fig


def figure_recipes(table: pd.DataFrame) -> Figure:
    """Draw judge score after recovery against seconds of training: a colour per recipe, a size per share of images.

    table: recipe, fraction, budget, train_s, score, low, high, score_before. Points in the same time are squares.
    """
    fig, ax = _axes(size=(9, 4.5))
    for color, name, rows in _groups(table, "recipe"):
        ax.errorbar(rows["train_s"], rows["score"], _arms(rows), **BARS, fmt="none", ecolor=color)
        for budget, part in rows.groupby("budget", sort=False):
            style = {"color": color, "marker": "s" if budget == "time" else "o"}
            label = f"{name.replace('_', ' ')}, same {budget}"
            ax.scatter(part["train_s"], part["score"], 20 + 60 * part["fraction"], label=label, **style)
    before = table["score_before"].iloc[0]
    ax.axhline(before, color=GREY, linestyle="--", linewidth=1)
    ax.set(xlabel="training (seconds)", ylabel=SCORE, xlim=(0, None), ylim=(0, 100))
    ax.annotate("before", (0.01, before + 1), xycoords=ax.get_yaxis_transform(), fontsize="small", color=GREY)
    ax.legend(**BESIDE)
    if table["fraction"].nunique() > 1:
        shares = [f"{share:.0%}" for share in table["fraction"]]
        _label_points(ax, table["train_s"], table["score"], shares, [False] * len(table))
    return fig


def figure_forest(differences: pd.DataFrame, what: str | None = None) -> Figure:
    """Draw `stats.compare`'s differences with their intervals; filled where p_holm is below 0.05.

    A method that is in every row on the same side is named once, on the axis. what: the difference that every row
    shows ("a - b"), where the rows are groups, named by column a.
    """
    rows = differences.reset_index(drop=True)
    names, sides = rows["a"] + "  -  " + rows["b"], "methods, a - b"
    if what:
        names, sides = rows["a"], "group"
    elif len(rows) > 1 and rows["b"].nunique() == 1:
        names, sides, what = rows["a"], "method", f"method - {rows['b'][0]}"
    elif len(rows) > 1 and rows["a"].nunique() == 1:
        names, sides, what = rows["b"], "method", f"{rows['a'][0]} - method"
    fig, ax = _axes(size=(8, 1.5 + 0.4 * len(rows)))
    ax.axvline(0, color=GREY, linewidth=1)
    kinds = {False: ("p (Holm) < 0.05", BLUE, BLUE), True: ("not told from nothing", GREY, "white")}
    for untold, part in rows.groupby(~(rows["p_holm"] < 0.05)):
        name, color, fill = kinds[untold]
        style = {"fmt": "o", "color": color, "markerfacecolor": fill, "capsize": 3}
        ax.errorbar(part["diff"], part.index, xerr=_arms(part, "diff"), label=name, **style)
    for i, row in rows.iterrows():
        text = with_interval(row["diff"], row["low"], row["high"])
        ax.annotate(text, (1.02, i), xycoords=ax.get_yaxis_transform(), va="center", fontsize="small")
    ax.set_yticks(rows.index, names)
    ax.set(xlabel=f"judge score, {what or 'a - b'} (percentage points)", ylabel=sides, ylim=(len(rows) - 0.5, -0.5))
    fig.legend(**ABOVE)
    return fig


def figure_among_random(placed: pd.DataFrame) -> Figure:
    """Draw `tables.among_random`: each criterion's score, and the central 95% of the random draws' as a band."""
    counts = sorted(placed["blocks_removed"].unique())
    tall = 1.5 + 0.3 * placed["criterion"].nunique()
    fig, axes = _axes(1, len(counts), (4 + 3 * len(counts), tall), sharey=True, squeeze=False)
    for ax, (count, rows) in zip(axes[0], placed.groupby("blocks_removed"), strict=True):
        rows = rows.reset_index(drop=True)
        ax.axvspan(rows["low"][0], rows["high"][0], color=GREY, alpha=0.25, linewidth=0, label="95% of random draws")
        ax.axvline(rows["random"][0], color=GREY, linestyle="--", label="their mean")
        ax.plot(rows["score"], rows.index, "o", color=BLUE)
        ax.set_yticks(rows.index, [name.replace("_", " ") for name in rows["criterion"]])
        ax.set(xlabel=SCORE, xlim=(-2, 102), ylim=(len(rows) - 0.5, -0.5))
        ax.set_title(f"{count} blocks removed, {rows['draws'][0]} draws", fontsize="small")
    axes[0][0].set_ylabel("criterion")
    fig.legend(*axes[0][0].get_legend_handles_labels(), **ABOVE)
    return fig


def figure_shares(named: pd.DataFrame) -> Figure:
    """Draw `groups.naming_table`: the share of images named right with its interval, and the worst group's beside."""
    rows = named.reset_index(drop=True)
    fig, ax = _axes(size=(8, 1.5 + 0.3 * len(rows)))
    ax.errorbar(rows["right"], rows.index, xerr=_arms(rows, "right"), fmt="o", color=BLUE, label="all images", **BARS)
    ax.plot(rows["worst"], rows.index, "|", color=RED, markersize=10, label="worst group")
    ax.set_yticks(rows.index, rows["method"])
    ax.set(xlabel="names given right (% of images)", ylabel="method", xlim=(-2, 102), ylim=(len(rows) - 0.5, -0.5))
    fig.legend(**ABOVE)
    return fig


def figure_breakdown(df: pd.DataFrame, by: str) -> Figure:
    """Draw each method's mean score_percent (rows) in each group of `by` (columns), such as condition or kind."""
    means = df.pivot_table(index="method", columns=by, values="score_percent", sort=False, dropna=False)
    fig, ax = _axes(size=(3.2 + 0.85 * means.shape[1], 1.9 + 0.5 * len(means)))
    _heatmap(ax, means, vmin=0, vmax=100, annot=True, fmt=".0f", cmap="viridis", cbar_kws={"label": SCORE})
    ax.set(xlabel=by.replace("_", " "), ylabel="method")
    return fig


def figure_confusion(before: np.ndarray, after: np.ndarray, labels: list[str], names: tuple[str, str]) -> Figure:
    """Draw counts (true, named) before and after compression, shaded by share of the true condition.

    before, after: (len(labels), len(labels) + 1), the last column for answers that name none of them.
    """
    fig, axes = _axes(1, 2, (4.4 + 0.95 * len(labels), 2.4 + 0.4 * len(labels)), sharey=True)
    style = {"vmin": 0, "vmax": 100, "fmt": "g", "cmap": "Blues", "linewidths": 0.5, "yticklabels": labels}
    style |= {"xticklabels": [*labels, "none named"], "cbar_kws": {"label": "share of true condition (%)"}}
    for name, counts, ax in zip(names, (before, after), axes, strict=True):
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        _heatmap(ax, share * 100, annot=counts, cbar=ax is axes[1], **style)
        ax.set(xlabel="condition named (answers)", title=name)
    axes[0].set_ylabel("true condition")
    return fig


def figure_pareto(df: pd.DataFrame) -> Figure:
    """Draw score against size from label, bytes, score, low, high, family; the Pareto front joined."""
    unit, size = byte_unit(df["bytes"])
    df = df.assign(size=df["bytes"] / size, front=pareto_front(df["bytes"], df["score"]))
    fig, ax = _axes(size=(9, 5.5))
    for i, (color, family, rows) in enumerate(_groups(df, "family")):
        style = {"color": color, "fmt": "os^D"[i // 10 % 4]}  # the palette has ten colours
        ax.errorbar(rows["size"], rows["score"], _arms(rows), **BARS, label=family, **style)
    front = df[df["front"]].sort_values("size")
    ax.plot(front["size"], front["score"], color=GREY, linestyle="--", zorder=0, label="Pareto front")
    ax.set(xlabel=f"model size ({unit})", ylabel=SCORE)
    ax.margins(x=0.15)
    ax.legend(**BESIDE)
    shown = df.dropna(subset=["size", "score"])
    _label_points(ax, shown["size"], shown["score"], shown["label"], shown["front"])
    return fig


def figure_activations(before: np.ndarray, after: np.ndarray, names: tuple[str, str]) -> Figure:
    """Draw the paper's figure 4: |activation| of (tokens, channels) as heat maps, histograms below.

    Outliers, marked in the histograms, exceed OUTLIER_SD standard deviations of `before` in both.
    """
    arrays = [np.abs(a, dtype=np.float32) for a in (before, after)]
    peak, limit = max(a.max() for a in arrays), OUTLIER_SD * float(np.std(before))
    fig, (maps, counts) = _axes(2, 2, (10, 6.5), sharex="row")
    for name, values, heat, ax in zip(names, arrays, maps, counts, strict=True):
        tokens, channels = values.shape
        edges = (-0.5, channels - 0.5, tokens - 0.5, -0.5)
        norm = PowerNorm(0.5, 0, peak)  # a linear scale shows the outliers on black
        heat.grid(visible=False)
        drawn = heat.imshow(_pooled(values), cmap="magma", norm=norm, aspect="auto", extent=edges)
        heat.set(title=f"{name}: peak {values.max():.1f}", xlabel="channel (index)", ylabel="token (position)")
        ax.hist(values.ravel(), bins=np.linspace(0, peak, 81), color=BLUE, log=True)
        outliers = values[values > limit]
        few = outliers
        if few.size > MARKS:
            few = np.append(few[:: few.size // MARKS], few.max())
        ax.plot(few, np.full(few.size, 0.7), "|", color=RED, label=f"{outliers.size:,} outliers")
        ax.axvline(limit, color=RED, linestyle=":", label=f"{OUTLIER_SD} sd of {names[0]} = {limit:.1f}")
        ax.set(xlabel="|activation| (no unit)", ylabel="entries (count, log scale)", ylim=(0.5, None))
        ax.legend(**PLAIN)
    fig.colorbar(drawn, ax=list(maps), label="|activation| (no unit)")
    return fig


def figure_loss_curve(info: dict) -> Figure:
    """Draw AWQ's search in the middle one of its blocks: loss against the ratio alpha of equation 5.

    Each curve is divided by its own first point, alpha = 0, where activations do not scale the weights; the chosen
    ratio, the least loss, is marked. `info` is what quantize(..., "awq") returned beside the model.
    """
    ratios, losses = info["loss_curve"]["ratios"], info["loss_curve"]["losses"]
    blocks = sorted({block_number(name) for name in losses})
    block = blocks[len(blocks) // 2]
    shared = {"q_proj": "q, k, v", "gate_proj": "gate, up", "o_proj": "o", "down_proj": "down"}
    fig, ax = _axes()
    for name in [n for n in losses if block_number(n) == block]:
        relative = np.asarray(losses[name]) / losses[name][0]
        best = int(relative.argmin())
        short = name.rsplit(".", 1)[1]
        (line,) = ax.plot(ratios, relative, label=f"{shared.get(short, short)}: alpha {ratios[best]:.2f}")
        ax.plot(ratios[best], relative[best], "o", color=line.get_color())
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.set(xlabel="alpha (no unit; 0: weights not scaled by activations)", title=f"block {block}")
    ax.set_ylabel("loss / loss at alpha = 0 (no unit, lower is better)")
    ax.legend(**PLAIN, title="linears that share a scale")
    return fig


def _axes(rows: int = 1, columns: int = 1, size=(7, 4.2), **also):
    """Return a figure and its axes. pyplot, whose first figure makes a notebook draw Figures, forgets it at once."""
    fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **also)
    plt.close(fig)
    sns.despine(fig=fig)
    return fig, axes


def _groups(table: pd.DataFrame, by: str):
    """Yield the colour, name and rows of each group, in the table's order."""
    groups = table.groupby(by, sort=False)
    colors = [c for c in sns.color_palette("colorblind") if max(c) - min(c) > 0.1]  # its grey is for controls
    for number, (name, rows) in enumerate(groups):
        yield colors[number % len(colors)], name, rows


def _arms(rows: pd.DataFrame, middle: str = "score") -> np.ndarray:
    """Return the lengths (2, n) of an error bar's arms; NaN bounds draw none."""
    return np.maximum(0, [rows[middle] - rows["low"], rows["high"] - rows[middle]])


def _label_points(ax, x, y, labels, bold) -> None:
    """Write each point's label beside it, off the points and the other labels, with a line where it is far."""
    style = {"fontsize": "x-small", "path_effects": [withStroke(linewidth=2, foreground="white")]}
    texts = [ax.text(*at, name, **style) for *at, name in zip(x, y, labels, strict=True)]
    plt.setp([text for text, b in zip(texts, bold, strict=True) if b], fontweight="bold")
    points = ax.scatter(x, y, s=70, alpha=0)  # what the labels keep off
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6}
    apart = {"expand": (1.2, 1.6), "force_text": (0.5, 0.8)}  # less, and labels of equal points stay on each other
    adjust_text(texts, x, y, ax=ax, objects=points, iter_lim=500, arrowprops=line, **apart)
    points.remove()


def _shade(ax, blocks) -> None:
    for block in blocks:
        ax.axvspan(block - 0.5, block + 0.5, color=GREY, alpha=0.2, linewidth=0)


def _heatmap(ax, values, **style) -> None:
    sns.heatmap(values, ax=ax, **style)
    if max(len(t.get_text()) for t in ax.get_xticklabels()) > 9:
        ax.tick_params(axis="x", labelrotation=40)
        plt.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor")
    ax.tick_params(axis="y", labelrotation=0)


def _pooled(values: np.ndarray, most: int = 128) -> np.ndarray:
    """Return values with each side cut to `most` by maxima: averaging would hide the outliers."""
    for axis in (0, 1):
        size = values.shape[axis]
        starts = np.linspace(0, size, min(most, size), endpoint=False, dtype=int)
        values = np.maximum.reduceat(values, starts, axis=axis)
    return values
