"""What a search shows: predicted against measured cost, best cost against evaluations, which choices, a slider."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.figure import Figure

from medprune.results.figures import GREY
from medprune.results.page import readable

COST = "KL to the original (nats a token, lower is better)"


def _drawn(size=(7, 4.2)):
    fig, ax = plt.subplots(figsize=size, layout="constrained")
    plt.close(fig)
    sns.despine(fig=fig)
    return fig, ax


def figure_progress(measured: pd.DataFrame) -> Figure:
    """Draw each searcher's best cost so far against evaluations; measured: `fitting.measured_plans`."""
    (fig, ax), end = _drawn(), measured["evaluations"].max()
    for color, (name, rows) in zip(
        sns.color_palette("colorblind"), measured.groupby("searcher", sort=False), strict=False
    ):
        best = [*rows["best"], rows["best"].iloc[-1]]  # of a searcher that ended early, too
        ax.step([*rows["evaluations"], end], best, where="post", color=color, label=name)
        ax.plot(rows["evaluations"], rows["cost"], ".", color=color, alpha=0.4, markersize=4)
    ax.set(xlabel="evaluations (plans on all calibration answers)", ylabel=COST, yscale="log")
    ax.legend(frameon=False, title="best so far")
    return fig


def figure_additivity(measured: pd.DataFrame) -> Figure:
    """Draw measured costs against the sum of single choices' costs, by how many blocks a plan drops."""
    fig, ax = _drawn()
    plans = measured.drop_duplicates("plan")
    low, high = plans[["cost", "predicted"]].min().min(), plans[["cost", "predicted"]].max().max()
    ax.plot([low, high], [low, high], color=GREY, linestyle="--", linewidth=1, label="additive")
    drawn = ax.scatter(plans["predicted"], plans["cost"], c=plans["dropped"], cmap="viridis", s=18)
    fig.colorbar(drawn, label="blocks dropped (count)")
    ax.set(xlabel="sum of single choices' KL (nats a token)", ylabel=COST, xscale="log", yscale="log")
    ax.legend(frameon=False)
    return fig


def figure_choices(shares: pd.DataFrame) -> Figure:
    """Draw in what share of resampled calibration sets the exact plan makes each choice: `searchers.choice_shares`."""
    fig, ax = _drawn((max(6, 0.32 * len(shares)), 2.8))
    names = ["dropped" if choice == 0 else f"{choice} bits" for choice in shares]
    labels = [site.removeprefix("block ") for site in shares.index]
    style = {"vmin": 0, "vmax": 1, "cmap": "viridis", "cbar_kws": {"label": "share of resamples (0-1)"}}
    sns.heatmap(shares.T.to_numpy(), ax=ax, xticklabels=labels, yticklabels=names, **style)
    ax.tick_params(axis="x", labelsize="x-small", rotation=90)
    ax.tick_params(axis="y", rotation=0)
    ax.set(xlabel="block (0-based), and other parts", ylabel="choice")
    return fig


def budget_slider(table: pd.DataFrame) -> HTML:
    """Return `fitting.budget_table` as a slider over its budgets, of HTML alone.

    A widget with output may hang a run without a browser: nbclient (issue 312) sends the output back on the very
    socket that it waits on for the cell's end.
    """
    middle = len(table) // 2
    stops = [readable(table.iloc[[n]]).T.to_html(header=False) for n in range(len(table))]
    shown = "".join(f"<div{'' if n == middle else ' hidden'}>{stop}</div>" for n, stop in enumerate(stops))
    moved = "[...this.parentNode.querySelectorAll('div')].forEach((stop, n) => {stop.hidden = n != this.value})"
    slider = f'<input type="range" max="{len(table) - 1}" value="{middle}" aria-label="budget" oninput="{moved}">'
    return HTML(f"<div>{slider}{shown}</div>")
