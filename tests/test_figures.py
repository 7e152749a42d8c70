"""Do the figures draw the numbers they are given, with names and units at every axis?"""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from test_ranking import rows_table

from medprune.data.questions import load_conditions
from medprune.pruning import ranking
from medprune.results import figures, tables


def labelled(fig) -> bool:
    """True if every axis that shows ticks says what it shows."""
    fig.draw_without_rendering()
    plots = [ax for ax in fig.axes if ax.get_label() != "<colorbar>"]
    bars = [ax for ax in fig.axes if ax.get_label() == "<colorbar>"]
    shared = [ax for ax in plots if not any(t.get_visible() and t.get_text() for t in ax.get_yticklabels())]
    return (
        all(ax.get_xlabel() for ax in plots)
        and all(ax.get_ylabel() for ax in plots if ax not in shared)
        and all(ax.get_ylabel() for ax in bars)
    )


@pytest.fixture(autouse=True)
def no_figure_left_open():
    yield
    assert plt.get_fignums() == []


def test_figure_importance_marks_protected_blocks_grey():
    df = pd.DataFrame({"block": range(5), "importance_score": [math.nan, 0.2, 0.9, 0.4, 0.8],
                       "protected": [True, False, False, False, True]})  # fmt: skip
    fig = figures.figure_importance(df)
    (ax,) = fig.axes
    assert labelled(fig) and "higher = keep" in ax.get_ylabel()
    scored, protected = ax.containers
    assert [bar.get_height() for bar in scored] == [0.2, 0.9, 0.4]
    assert [bar.get_height() for bar in protected][1] == 0.8
    assert {bar.get_facecolor()[:3] for bar in protected} == {plt.matplotlib.colors.to_rgb(figures.GREY)}
    assert {t.get_text() for t in fig.legends[0].get_texts()} == {"scored", "protected"}
    assert not figures.figure_importance(df.assign(protected=False)).legends


def test_figure_sweep_draws_a_line_with_intervals_per_criterion_and_the_papers():
    df = pd.DataFrame({"blocks_removed": [2, 0, 0, 2], "criterion": ["x", "x", "y", "y"],
                       "score": [50.0, 80.0, 80.0, 30.0]})  # fmt: skip
    df = df.assign(low=df["score"] - 5, high=df["score"] + 7, paper_score=[73.15, 80.12, 80.12, 73.15])
    fig = figures.figure_sweep(df)
    (ax,) = fig.axes
    assert labelled(fig) and ax.get_ylabel() == "judge score (%)" and "count" in ax.get_xlabel()
    first, second = ax.containers
    # the two lines stand 0.02 x 2 blocks apart, so that their intervals do not hide each other
    np.testing.assert_allclose(first.lines[0].get_xydata(), [[-0.02, 80], [1.98, 50]])
    np.testing.assert_allclose(second.lines[0].get_xydata(), [[0.02, 80], [2.02, 30]])
    (alone,) = figures.figure_sweep(df[df.criterion == "x"]).axes[0].containers
    assert alone.lines[0].get_xydata().tolist() == [[0, 80], [2, 50]]
    assert [s[:, 1].tolist() for s in second.lines[2][0].get_segments()] == [[75, 87], [25, 37]]
    paper = next(line for line in ax.lines if line.get_label().startswith("paper"))
    assert paper.get_ydata().tolist() == [80.12, 73.15]
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"x", "y", "paper (LLaVA-1.5-7B)"}


def test_figure_activations_shows_a_single_outlier_and_counts_it():
    before = np.random.default_rng(0).normal(0, 1, (300, 500))
    before[123, 457] = -40
    after = np.clip(before, -20, 20)
    fig = figures.figure_activations(before, after, ("before", "after"))
    assert labelled(fig)
    heats = [ax.images[0] for ax in fig.axes if ax.images]
    # Pooled to at most 128 a side, and yet the one entry of 150,000 is there at its full height.
    assert heats[0].get_array().shape == (128, 128) and heats[0].get_array().max() == pytest.approx(40)
    assert heats[1].get_array().max() == pytest.approx(20)
    assert [ax.get_title() for ax in fig.axes[:2]] == ["before: peak 40.0", "after: peak 20.0"]
    histogram = fig.axes[2]
    assert "1 outliers" in [t.get_text() for t in histogram.get_legend().get_texts()]
    assert histogram.lines[0].get_xdata().tolist() == [40]
    assert sum(p.get_height() for p in histogram.patches) == before.size


def test_a_histogram_marks_no_more_outliers_than_can_be_seen():
    before = np.zeros((500, 200), np.float32)
    before[:30] = np.arange(200) + 100
    before[0, 0] = 400
    fig = figures.figure_activations(before, before * 0 + 999, ("before", "after"))
    marked = [line.get_xdata() for ax in fig.axes for line in ax.lines if "outliers" in str(line.get_label())]
    assert any(len(x) > 1000 for x in marked) and all(len(x) < 2 * figures.MARKS + 2 for x in marked)
    assert max(max(x) for x in marked if len(x)) == 999



def test_figure_forest_tells_found_differences_from_the_rest():
    df = pd.DataFrame({"a": ["original"] * 3, "b": ["x", "y", "z"], "diff": [9.0, 1.0, 2.0],
                       "low": [5.0, -3.0, math.nan], "high": [13.0, 5.0, math.nan],
                       "p_holm": [0.001, 0.6, math.nan]})  # fmt: skip
    fig = figures.figure_forest(df)
    (ax,) = fig.axes
    assert labelled(fig) and "percentage points" in ax.get_xlabel()
    found, other = ax.containers
    assert found.lines[0].get_xydata().tolist() == [[9, 0]]
    assert other.lines[0].get_xydata().tolist() == [[1, 1], [2, 2]]
    assert found.lines[2][0].get_segments()[0][:, 0].tolist() == [5, 13]
    assert [t.get_text() for t in ax.texts] == [
        "9.0 [5.0, 13.0]", "1.0 [-3.0, 5.0]", "2.0 [no interval]"]  # fmt: skip


@pytest.mark.parametrize(("a", "b", "ticks", "axis"), [
    (["full", "full"], ["x", "y"], ["x", "y"], "full - method"),
    (["x", "y"], ["full", "full"], ["x", "y"], "method - full"),
    (["x", "y"], ["v", "w"], ["x  -  v", "y  -  w"], "a - b"), (["x"], ["v"], ["x  -  v"], "a - b"),
])  # fmt: skip
def test_figure_forest_names_a_method_of_every_row_once(a, b, ticks, axis):
    rows = pd.DataFrame({"a": a, "b": b, "diff": 1.0, "low": 0.0, "high": 2.0, "p_holm": 0.5})
    (ax,) = figures.figure_forest(rows).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ticks
    assert ax.get_xlabel() == f"judge score, {axis} (percentage points)"


def test_figure_forest_of_groups():
    rows = pd.DataFrame({"a": ["I", "V"], "b": "", "diff": 1.0, "low": 0.0, "high": 2.0, "p_holm": 0.5})
    (ax,) = figures.figure_forest(rows, "after - before").axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["I", "V"] and ax.get_ylabel() == "group"
    assert ax.get_xlabel() == "judge score, after - before (percentage points)"


def test_figure_breakdown_shows_means_and_leaves_gaps_blank():
    df = pd.DataFrame({"method": list("aaabb"), "kind": ["name", "name", "treatment", "name", "name"],
                       "score_percent": [40.0, 60.0, 90.0, 10.0, None]})  # fmt: skip
    fig = figures.figure_breakdown(df, by="kind")
    assert labelled(fig) and fig.axes[1].get_ylabel() == "judge score (%)"
    cells = fig.axes[0].collections[0].get_array()
    assert cells.filled(-1).reshape(2, 2).tolist() == [[50, 90], [10, -1]]
    assert [t.get_text() for t in fig.axes[0].texts if t.get_text() != "nan"] == ["50", "90", "10"]


def test_a_confusion_is_of_what_is_asserted():
    said = ["This is rosacea.", "This is not rosacea.", "This is melanoma, not rosacea.", "Rosacea or melanoma."]
    rows = pd.DataFrame({"kind": "name", "condition": "rosacea", "answer": said})
    found = tables.confusion(rows, load_conditions(), ["rosacea", "melanoma"])
    assert found.tolist() == [[1, 1, 2], [0, 0, 0]]


def test_figure_confusion_counts_and_shades_by_row():
    before, after = np.array([[4, 0, 0], [0, 3, 1]]), np.array([[2, 1, 1], [1, 0, 3]])
    fig = figures.figure_confusion(before, after, ["rosacea", "melanoma"], names=("fp16", "4 bits"))
    assert labelled(fig)
    assert [ax.get_title() for ax in fig.axes[:2]] == ["fp16", "4 bits"]
    assert [t.get_text() for t in fig.axes[1].texts] == ["2", "1", "1", "1", "0", "3"]
    assert fig.axes[0].collections[0].get_array().ravel().tolist() == [100, 0, 0, 0, 75, 25]
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["rosacea", "melanoma", "none named"]


def test_figure_pareto_joins_the_front_and_labels_without_overlap():
    df = pd.DataFrame({"label": ["fp16", "int4", "int4 rtn", "int4 hqq", "pruned"], "family": list("abcda"),
                       "bytes": np.array([13.4, 4.5, 4.5, 4.55, 11.2]) * 2**30,
                       "score": [80.0, 65.0, 64.0, 64.5, 60.0]})  # fmt: skip
    fig = figures.figure_pareto(df.assign(low=df["score"] - 4, high=df["score"] + 4))
    (ax,) = fig.axes
    assert labelled(fig) and ax.get_xlabel() == "model size (GiB)"
    front = next(line for line in ax.lines if line.get_label() == "Pareto front")
    assert front.get_xydata().tolist() == [[4.5, 65], [13.4, 80]]
    assert {t.get_text(): t.get_fontweight() for t in ax.texts}["fp16"] == "bold"
    boxes = [t.get_window_extent() for t in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    small = df.assign(bytes=df["bytes"] / 1000, low=0, high=100)
    assert figures.figure_pareto(small).axes[0].get_xlabel() == "model size (MiB)"


def test_figures_draw_every_criterion():
    scores = [tables.block_scores("perplexity", rows_table({b: [b, b + 1.0, b + 2.0] for b in range(4)}), "abc")]
    scores += [tables.block_scores("random", {b: float(-b) for b in range(4)}, seed=s) for s in (0, 1)]
    table = pd.concat(scores)
    fig = figures.figure_criteria(table, protect=(0,))
    assert [ax.get_title("left") for ax in fig.axes] == ["perplexity", "random"]
    drawn = fig.axes[0].lines[-1].get_xydata()
    np.testing.assert_allclose(drawn, [[1, 2], [2, 3], [3, 4]])  # protected blocks have no score to read
    heat = figures.figure_correlations(ranking.rank_correlations(table)).axes[0]
    assert [t.get_text() for t in heat.texts] == ["1.00", "-1.00", "-1.00", "1.00"]
    sweep = pd.DataFrame({"criterion": ["perplexity"] * 3 + ["random"] * 6, "blocks_removed": [0, 1, 2] * 3,
                          "score": [80, 70, 10, 80, 20, 0, 80, 40, 0]}).assign(low=0, high=100)  # fmt: skip
    ax = figures.figure_sweep(sweep).axes[0]
    assert any(line.get_ydata().tolist() == [80, 30, 0] for line in ax.lines), "draws of the control are averaged"
    ranks, overlaps = ranking.stability(rows_table({0: [1, 2], 1: [2, 1], 2: [9, 9]}), "ab", [1, 2], draws=20)
    left, right = figures.figure_stability(ranks, overlaps).axes
    assert [t.get_text() for t in left.get_xticklabels()] == ["0", "1", "2"]
    assert len(right.lines) == 3
