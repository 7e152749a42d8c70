"""Tables beside the paper's, the series' figures, and one HTML file that holds them all.

Figures are matplotlib Figures already closed to pyplot: a notebook shows one once, as a cell's last line.
"""

import json
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from pandas.api.types import is_numeric_dtype

from medprune.artifacts import write_text
from medprune.page import byte_unit, render_page, with_interval

PAPER_TABLES = Path(__file__).resolve().parents[1] / "data" / "paper_tables.json"
BLUE, RED, GREY = "#0072b2", "#c0392b", "#8c8c8c"
SCORE = "judge score (%)"
_LABELS = {
    "blocks_removed": "decoder blocks removed (count)",
    "params_b": "parameters (billions)",
    "compression_pct": "parameters removed (%)",
    "importance_score": "importance score (no unit, higher = keep)",
    "mean_cosine": "mean cosine to the full model's answers (-1 to 1)",
}


def paper_table(n: int | str) -> pd.DataFrame:
    """Return the paper's table n (1-5, or its name in data/paper_tables.json, which states the units)."""
    held = json.loads(PAPER_TABLES.read_text("utf-8"))
    tables = {key: rows for key, rows in held.items() if key.startswith("table")}
    names = [key for key in tables if n == key or str(n).removeprefix("table") == key[5:].split("_")[0]]
    if not names:
        raise ValueError(f"the paper has no table {n!r}; choose from {list(tables)}.")
    return pd.DataFrame(tables[names[0]])


def beside_paper(ours: pd.DataFrame, table: str, on: str, columns: list[str]) -> pd.DataFrame:
    """Put the paper's columns, named paper_<column>, beside ours.

    Every row of either is there, NaN where the other has none. on is a key column of both, or "rank" to pair
    first with first. Rows are ordered by a numeric key; by a text key ours come first. Raises ValueError for
    a column either lacks, or text keys that have nothing in common.
    """
    paper, ours = paper_table(table), ours.copy()
    if on == "rank":
        paper["rank"] = range(1, len(paper) + 1)
        if "rank" not in ours:
            ours.insert(0, "rank", range(1, len(ours) + 1))
    for name, have in [(on, ours.columns), *((c, paper.columns) for c in [on, *columns])]:
        if name not in have:
            raise ValueError(f"there is no column {name!r} for the paper's table {table!r} in {list(have)}.")
    numeric = is_numeric_dtype(ours[on])
    if not numeric and not set(ours[on]) & set(paper[on]):
        raise ValueError(f"our {on!r} {list(ours[on])} has nothing of the paper's {list(paper[on])}.")
    theirs = paper[[on]].join(paper[columns].add_prefix("paper_"))
    # A left join keeps our order, which merge's outer join would sort; the paper's other rows follow.
    rest = theirs[~theirs[on].isin(ours[on])]
    both = pd.concat([ours.merge(theirs, on=on, how="left"), rest], ignore_index=True)
    return both.sort_values(on, kind="stable", ignore_index=True) if numeric else both


def pareto_front(sizes, scores) -> np.ndarray:
    """Return a mask (n,) of the points that no other beats: none is as small and as good, and better in one.

    sizes: lower is better; scores: higher is better. Points with NaN are never on the front.
    """
    sizes, scores = np.asarray(sizes, float), np.asarray(scores, float)
    if sizes.ndim != 1 or sizes.shape != scores.shape:
        raise ValueError(f"sizes {sizes.shape} and scores {scores.shape} must be equally long lists.")
    as_good = (sizes[None] <= sizes[:, None]) & (scores[None] >= scores[:, None])
    better = (sizes[None] < sizes[:, None]) | (scores[None] > scores[:, None])
    return ~(as_good & better).any(axis=1) & np.isfinite(sizes) & np.isfinite(scores)


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
        ax.errorbar(
            line[x], line["score"], _arms(line, "score"), color=color, marker="o", capsize=3, label=name
        )
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
            ax.errorbar(part["diff"], part.index, xerr=_arms(part, "diff"), fmt="o", capsize=3, label=name,
                        color=color, markerfacecolor=fill)  # fmt: skip
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
    sns.heatmap(means, ax=ax, vmin=0, vmax=100, annot=True, fmt=".0f", cmap="viridis",
                cbar_kws={"label": SCORE})  # fmt: skip
    ax.set(xlabel=by.replace("_", " "), ylabel="method")
    _slant(ax)
    return fig


def figure_confusion(
    before: np.ndarray, after: np.ndarray, labels: list[str], names=("before", "after")
) -> Figure:
    """Draw counts (true, named) before and after compression, shaded by share of the true condition.

    before, after: (len(labels), len(labels)), or one column more for answers that name none of them.
    """
    matrices, k = [np.asarray(m) for m in (before, after)], len(labels)
    if any(m.shape not in {(k, k), (k, k + 1)} for m in matrices) or matrices[0].shape != matrices[1].shape:
        raise ValueError(
            f"matrices of shapes {[m.shape for m in matrices]} must both be ({k}, {k}) or ({k}, {k + 1})."
        )
    named = [*labels, "none named"][: matrices[0].shape[1]]
    fig, axes = plt.subplots(1, 2, figsize=(4.4 + 0.95 * k, 2.4 + 0.4 * k), layout="constrained", sharey=True)
    plt.close(fig)
    for name, counts, ax in zip(names, matrices, axes, strict=True):
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        sns.heatmap(share * 100, ax=ax, vmin=0, vmax=100, annot=counts, fmt="g", cmap="Blues", linewidths=0.5,
                    xticklabels=named, yticklabels=labels, cbar=ax is axes[1],
                    cbar_kws={"label": "share of true condition (%)"})  # fmt: skip
        ax.set(
            xlabel="condition named (answers)", ylabel="true condition" if ax is axes[0] else "", title=name
        )
        _slant(ax)
    return fig


def figure_pareto(df: pd.DataFrame) -> Figure:
    """Draw score against size from label, bytes, score, low, high, family; the Pareto front joined."""
    _need(df, "label", "bytes", "score", "low", "high", "family")
    unit, size = byte_unit(df["bytes"])
    fig, ax = _axes(f"model size ({unit})", SCORE, (8, 5))
    families = df.groupby("family", sort=False)
    # beyond the palette's ten colours other markers tell families apart
    for i, (color, (family, part)) in enumerate(zip(sns.color_palette("colorblind", len(families)), families, strict=True)):
        ax.errorbar(part["bytes"] / size, part["score"], _arms(part, "score"), color=color, label=family,
                    fmt="os^D"[i // 10 % 4], capsize=2, elinewidth=0.8)  # fmt: skip
    front = df[pareto_front(df["bytes"], df["score"])].sort_values("bytes")
    ax.plot(front["bytes"] / size, front["score"], color=GREY, linestyle="--", zorder=0, label="Pareto front")
    ax.margins(x=0.15)
    legend(ax)
    shown = df.dropna(subset=["bytes", "score"])
    label_points(ax, shown["bytes"] / size, shown["score"], shown["label"], shown.index.isin(front.index))
    return fig


def html_report(path: Path, title: str, sections: list[dict]) -> Path:
    """Write one HTML file that holds everything it shows, atomically, and return its path.

    A section has a heading and may have text (blank lines part paragraphs; markup is shown, not obeyed),
    image (PIL), table (DataFrame) and figure (Figure or PIL, which a tap enlarges on a phone); sections of the
    same chapter stand together under its name. Raises ValueError for one without heading or with other keys.
    """
    return write_text(Path(path), render_page(title, sections))


def _need(df: pd.DataFrame, *columns: str) -> None:
    missing = [c for c in columns if c not in df]
    if missing or df.empty:
        raise ValueError(
            f"the table to draw has {len(df)} rows of {list(df)} and lacks the columns {missing}."
        )


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
    texts = [ax.annotate(name, at, (0, 0), textcoords="offset points", fontsize="x-small",
                         fontweight="bold" if b else "normal",
                         path_effects=[withStroke(linewidth=2, foreground="white")])
             for name, at, b in zip(labels, zip(x, y, strict=True), bold, strict=True)]  # fmt: skip
    ax.figure.draw_without_rendering()  # settles the layout, without which extents are not final
    taken = [
        Bbox.from_bounds(px - 4, py - 4, 8, 8) for px, py in ax.transData.transform(np.column_stack([x, y]))
    ]
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
