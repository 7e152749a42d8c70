"""Do the figures draw the numbers they are given, and does one HTML file hold everything?"""

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medprune.results import figures, shown, tables
from medprune.results.page import html_report, readable, with_interval
from medprune.results.shown import CHAPTERS, keep, report_sections, settings_table
from medprune.settings import STAGES
from medprune.store import Run, finish
from medprune.settings import resolve

METHODS = ["original", "prune", "prune + sft"]


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


# --- the paper's tables -------------------------------------------------------------------------------------


def test_paper_table_by_number_and_by_name():
    table = tables.paper_table(1)
    assert table["blocks_removed"].tolist() == [0, 2, 4, 7, 8, 9, 10]
    for same in ("1", "table1", "table1_prune_sweep"):
        pd.testing.assert_frame_equal(tables.paper_table(same), table)
    assert [len(tables.paper_table(n)) for n in range(1, 6)] == [7, 2, 3, 6, 4]
    with pytest.raises(ValueError, match="no table 6"):
        tables.paper_table(6)


def test_beside_paper_by_number_keeps_every_row_of_either():
    ours = pd.DataFrame({"blocks_removed": [8, 0, 1], "score": [1.0, 90.0, 70.0]})
    both = tables.beside_paper(ours, "1", on="blocks_removed", columns=["score", "params_b"])
    assert both["blocks_removed"].tolist() == [0, 1, 2, 4, 7, 8, 9, 10]
    assert list(both.columns) == ["blocks_removed", "score", "paper_score", "paper_params_b"]
    by_block = both.set_index("blocks_removed")
    assert by_block.loc[8, ["score", "paper_score", "paper_params_b"]].tolist() == [1.0, 49.5, 5.444]
    assert math.isnan(by_block.loc[1, "paper_score"]) and math.isnan(by_block.loc[9, "score"])
    assert list(ours.columns) == ["blocks_removed", "score"]


def test_beside_paper_by_name_keeps_our_order_and_repeats_the_paper_per_row():
    ours = pd.DataFrame({"method": ["prune", "original", "ours only", "prune"], "score": [1, 2, 3, 4]})
    both = tables.beside_paper(ours, "4", on="method", columns=["score"])
    assert both["method"].tolist()[:4] == ours["method"].tolist()
    assert both["paper_score"].tolist()[:2] == [62.5, 80.12]
    assert math.isnan(both["paper_score"][2]) and both["paper_score"][3] == 62.5
    assert set(both["method"][4:]) == set(tables.paper_table(4)["method"]) - {"prune", "original"}
    assert both["score"][4:].isna().all()


def test_beside_paper_by_rank_pairs_first_with_first():
    ours = pd.DataFrame({"setting": ["a", "b"], "score": [60.0, 50.0]})
    both = tables.beside_paper(ours, "5", on="rank", columns=["setting", "score"])
    assert both["rank"].tolist() == [1, 2, 3, 4]
    assert (
        both["paper_score"].tolist() == [54.25, 47, 50, 25]
        and both["score"].isna().tolist()[2:] == [True] * 2
    )


@pytest.mark.parametrize(
    ("on", "columns", "says"),
    [
        ("method", ["accuracy"], "no column 'accuracy'"),
        ("blocks", ["score"], "no column 'blocks'"),
        ("method", ["score"], "has nothing of the paper's"),
    ],
)
def test_beside_paper_refuses(on, columns, says):
    with pytest.raises(ValueError, match=says):
        tables.beside_paper(pd.DataFrame({"method": ["Prune"]}), "4", on=on, columns=columns)


# --- text ---------------------------------------------------------------------------------------------------


def test_with_interval():
    assert with_interval(80.12, 76, 84.249) == "80.1 [76.0, 84.2]"
    assert with_interval(-0.01, -4, 0.54, decimals=2) == "-0.01 [-4.00, 0.54]"
    assert with_interval(-0.01, -0.02, 0) == "0.0 [0.0, 0.0]"
    assert with_interval(50, math.nan, math.nan) == "50.0 [no interval]"
    assert with_interval(math.nan, math.nan, math.nan) == ""


def test_readable_merges_the_interval_and_names_units():
    table = pd.DataFrame({
        "method": ["a", None], "score": [80.12, math.nan], "low": [76.0, math.nan], "high": [84.2, math.nan],
        "p_holm": [0.0001, 0.04], "total_bytes": [3 * 2**30, 2**29], "blocks_removed": [2.0, math.nan],
        "n": [1170, 3], "protected": [True, False], "importance_score": [0.12345, 0.5],
        "vram_gb": [13.4, 3.0],
    })  # fmt: skip
    text = readable(table)
    assert text.iloc[0].to_dict() == {
        "method": "a", "score [95% interval]": "80.1 [76.0, 84.2]", "p holm": "<0.001", "total (GiB)": "3.0",
        "blocks removed": "2", "n": "1,170", "protected": "yes", "importance score": "0.1235",
        "vram gb": "13.4",
    }  # fmt: skip
    assert text.iloc[1].tolist() == ["", "", "0.040", "0.5", "", "3", "no", "0.5", "3.0"]


# --- figures ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=25))
def test_pareto_front_is_exactly_the_points_nothing_dominates(points):
    mask = tables.pareto_front([b for b, _ in points], [s for _, s in points])

    def beats(other, point):
        return other[0] <= point[0] and other[1] >= point[1] and other != point

    assert mask.tolist() == [not any(beats(other, point) for other in points) for point in points]
    assert mask.any()
    # Along the front, more bytes buy a better score.
    front = sorted({p for p, m in zip(points, mask, strict=True) if m})
    assert all(a[1] < b[1] for a, b in zip(front, front[1:], strict=False))


def test_pareto_front_leaves_out_nan_and_refuses_unequal_lists():
    assert tables.pareto_front([1, 1, math.nan], [math.nan, 5, 9]).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="equally long"):
        tables.pareto_front([1, 2], [1])


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
    plain = figures.figure_importance(df[["block"]].assign(mean_cosine=0.5))
    assert "cosine" in plain.axes[0].get_ylabel() and len(plain.axes[0].containers) == 1


def test_figure_sweep_draws_a_line_with_intervals_per_criterion_and_the_papers():
    df = pd.DataFrame({"blocks_removed": [2, 0, 0, 2], "criterion": ["x", "x", "y", "y"],
                       "score": [50.0, 80.0, 80.0, 30.0]})  # fmt: skip
    df = df.assign(low=df["score"] - 5, high=df["score"] + 7, paper_score=[73.15, 80.12, 80.12, 73.15])
    fig = figures.figure_sweep(df)
    (ax,) = fig.axes
    assert labelled(fig) and ax.get_ylabel() == "judge score (%)" and "count" in ax.get_xlabel()
    first, second = ax.containers
    assert first.lines[0].get_xydata().tolist() == [[0, 80], [2, 50]]
    assert [s[:, 1].tolist() for s in second.lines[2][0].get_segments()] == [[75, 87], [25, 37]]
    paper = next(line for line in ax.lines if line.get_label().startswith("paper"))
    assert paper.get_ydata().tolist() == [80.12, 73.15]
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"x", "y", "paper (LLaVA-1.5-7B)"}
    assert "billions" in figures.figure_sweep(df.assign(params_b=7.0), x="params_b").axes[0].get_xlabel()


def test_figure_activations_shows_a_single_outlier_and_counts_it():
    before = np.random.default_rng(0).normal(0, 1, (300, 500))
    before[123, 457] = -40
    after = np.clip(before, -20, 20)
    fig = figures.figure_activations(before, after)
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
    with pytest.raises(ValueError, match=r"\(tokens, channels\)"):
        figures.figure_activations(before[0], after[0])


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
    (["full", "full"], ["x", "y"], ["x", "y"], "full - method"), (["x", "y"], ["full", "full"], ["x", "y"], "method - full"),
    (["x", "y"], ["v", "w"], ["x  -  v", "y  -  w"], "a - b"), (["x"], ["v"], ["x  -  v"], "a - b"),
])  # fmt: skip
def test_figure_forest_names_a_method_of_every_row_once(a, b, ticks, axis):
    (ax,) = figures.figure_forest(pd.DataFrame({"a": a, "b": b, "diff": 1.0, "low": 0.0, "high": 2.0, "p_holm": 0.5})).axes
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


def test_figure_confusion_counts_and_shades_by_row():
    before, after = np.array([[4, 0, 0], [0, 3, 1]]), np.array([[2, 1, 1], [1, 0, 3]])
    fig = figures.figure_confusion(before, after, ["rosacea", "melanoma"], names=("fp16", "4 bits"))
    assert labelled(fig)
    assert [ax.get_title() for ax in fig.axes[:2]] == ["fp16", "4 bits"]
    assert [t.get_text() for t in fig.axes[1].texts] == ["2", "1", "1", "1", "0", "3"]
    assert fig.axes[0].collections[0].get_array().ravel().tolist() == [100, 0, 0, 0, 75, 25]
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["rosacea", "melanoma", "none named"]
    with pytest.raises(ValueError, match=r"must both be \(3, 3\) or \(3, 4\)"):
        figures.figure_confusion(before, after, ["a", "b", "c"])


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


def test_figures_refuse_a_table_that_lacks_a_column():
    empty = pd.DataFrame({"a": []})
    for draw in (figures.figure_importance, figures.figure_sweep, figures.figure_forest, figures.figure_breakdown,
                 figures.figure_pareto):  # fmt: skip
        with pytest.raises(ValueError, match="lacks the columns"):
            draw(empty)


# --- the HTML report ----------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Collects what a browser would see: balanced tags, anchors, cells, pictures, words."""

    VOID = {"meta", "img", "input", "br", "hr", "link"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.cells, self.images, self.tags, self.words = (
            [],
            [],
            [],
            [],
            [],
            set(),
            [],
        )
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "a":
            self.links.append(attrs["href"])
        if tag == "img":
            self.images.append(attrs["src"])
            assert attrs["alt"]
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data
        self.words.append(data)


@pytest.fixture
def written(tmp_path):
    evil = '</td><script src="https://example.org/x.js"></script> {braces} & "quotes"'
    scores = pd.DataFrame({"method": METHODS, "score": [80.0, 62.5, 74.25]})
    scores = scores.assign(low=scores["score"] - 4, high=scores["score"] + 4)
    fig = figures.figure_sweep(scores.assign(blocks_removed=[0, 2, 4]))
    sections = [
        {"heading": "Scores", "text": "One.\n\nTwo.", "table": scores, "figure": fig},
        {"chapter": "A & B", "heading": "Scores", "text": evil, "table": pd.DataFrame({"answer": [evil, "x" * 300]})},
        {"chapter": "A & B", "heading": "Case <study>", "text": "", "image": Image.new("RGBA", (1500, 30), "red")},
    ]
    path = html_report(tmp_path / "new" / "report.html", "A <title> & more", sections)
    return path, evil, sections


def test_html_report_is_well_formed_and_holds_everything(written):
    path, evil, sections = written
    text = path.read_text(encoding="utf-8")
    seen = Outline(text)
    assert seen.cells == [
        "original", "80.0 [76.0, 84.0]", "prune", "62.5 [58.5, 66.5]", "prune + sft", "74.2 [70.2, 78.2]",
        evil, "x" * 300]  # fmt: skip
    assert evil in seen.words and "A <title> & more" in seen.words and "Case <study>" in seen.words
    assert "One." in seen.words and "Two." in seen.words
    sizes = []
    for source in seen.images:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        sizes.append(Image.open(io.BytesIO(base64.b64decode(data))).size)
    assert len(sizes) == 2 and sizes[1] == (1000, 20)
    assert sections[2]["image"].size == (1500, 30)


def test_html_report_loads_nothing_and_fits_a_phone(written):
    text = written[0].read_text(encoding="utf-8")
    seen = Outline(text)
    assert not seen.tags & {"script", "link", "iframe", "object", "base", "form"}
    assert not re.search(r'(?:src|href|action)="(?!data:image/png|#)', text.replace("&quot;", ""))
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text
    assert 'name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme:dark" in text and "max-width:100%" in text
    assert text.count('class="scroll"') == text.count("<table>") == 2


def test_html_report_contents_lead_to_unique_sections(written):
    seen = Outline(written[0].read_text(encoding="utf-8"))
    assert seen.links == ["#section-1", "#section-2", "#section-3"]
    assert [f"#{i}" for i in seen.ids] == seen.links


def test_html_report_groups_sections_in_chapters(written):
    text = written[0].read_text(encoding="utf-8")
    assert text.count("<h2>") == 2 and text.count("<h2>A &amp; B</h2>") == 1 and text.count("<h3>") == 2
    assert text.count("<details>") == text.count("<summary>A &amp; B</summary>") == 1


def test_tables_leave_out_what_says_nothing(tmp_path):
    table = pd.DataFrame({"method": METHODS, "score": [1.0, 2, 3], "low": math.nan, "high": math.nan, "n": 72,
                          "n_images": [24, 24, 23], "unparsed": 0, "paper_score": math.nan})  # fmt: skip
    text = html_report(tmp_path / "r.html", "t", [{"heading": "h", "table": table}]).read_text("utf-8")
    assert re.findall(r"<th [^>]*>([^<]*)</th>", text) == ["method", "score [95% interval]", "n images"]
    assert "Throughout: n 72, unparsed 0." in text
    one = html_report(tmp_path / "r.html", "t", [{"heading": "h", "table": table[:1]}]).read_text("utf-8")
    assert "Throughout" not in one and ">72</td>" in one  # of a single row every column says something
    assert "<table>" in html_report(tmp_path / "r.html", "t", [{"heading": "h", "table": table[:0]}]).read_text("utf-8")
    pairs = pd.DataFrame({"a": "full & whole", "b": ["x", "y"], "diff": [1.0, 2], "n": [72, None]})
    text = html_report(tmp_path / "r.html", "t", [{"heading": "h", "table": pairs}]).read_text("utf-8")
    assert re.findall(r"<th [^>]*>([^<]*)</th>", text) == ["b", "diff"] and "Throughout: a full &amp; whole, n 72." in text


def test_kept_tables_and_figures_come_back_in_their_order(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="run 06_judge_eval again"):
        report_sections(tmp_path)
    fig = figures.figure_sweep(pd.DataFrame({"blocks_removed": [0, 1], "score": 5.0, "low": 4.0, "high": 6.0}))
    for stage in STAGES:
        run = Run(tmp_path, stage)
        run.dir.mkdir()
        shown = keep(run, "z first", pd.DataFrame({"method": ["NA"], "size_bytes": [2**30]}), "How to read it.", Image.new("RGB", (9, 9)))
        assert shown["size (GiB)"].tolist() == ["1.0"]
        assert keep(run, "a second", fig) is fig
    sections = report_sections(tmp_path)
    assert [s["heading"] for s in sections] == ["z first", "a second"] * len(STAGES)
    assert sections[0]["chapter"] == CHAPTERS["06_judge_eval"] and len({s["chapter"] for s in sections}) == len(STAGES)
    assert sections[0]["text"] == "How to read it." and sections[0]["image"].size == (9, 9)
    assert sections[0]["figure"] is None and sections[1]["table"] is None and sections[1]["figure"].size[0] > 100
    assert sections[0]["table"].values.tolist() == [["NA", 2**30]]
    keep(run, "z first", fig)  # a cell run again shows its own again, at the end
    assert [s["heading"] for s in report_sections(tmp_path)][:2] == ["a second", "z first"]
    assert report_sections(tmp_path)[1]["table"] is None
    monkeypatch.setattr(shown, "_begun", set())  # another run of the notebook begins anew
    keep(run, "only this", fig)
    assert [s["heading"] for s in report_sections(tmp_path)] == ["only this"] + ["z first", "a second"] * (len(STAGES) - 1)


def test_settings_table_says_which_stage_was_set_otherwise(tmp_path):
    config = resolve("smoke")
    for stage in STAGES[:-1]:
        finish(Run(tmp_path, stage), replace(config, seed=7) if stage == "04_sft_recovery" else config, {})
    table = settings_table(Run(tmp_path, STAGES[-1]), config).set_index("setting")["value"]
    assert table["seed"] == "0; 7 in 04_sft_recovery" and table["recover"] == "[1, 2]" and table["conditions"] == "null"
    assert table["torch"] == torch.__version__ and int(table["threads"]) > 0
    with pytest.raises(ValueError, match="run 01_finetune first"):
        settings_table(Run(tmp_path / "none", STAGES[-1]), config)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here to open the report in")
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_the_report_at_a_phone_s_width_and_a_desk_s(written, tmp_path, width):
    """The page stands in a frame of that width; a script outside, which the page's policy does not bind, measures it."""
    wide = pd.DataFrame({f"column_{i}": ["some words"] * 3 for i in range(20)})
    fig = figures.figure_breakdown(pd.DataFrame({"method": METHODS, "condition": METHODS, "score_percent": 5.0}))
    path = html_report(tmp_path / "r.html", "t", [*written[2], {"heading": "Wide", "table": wide, "figure": fig}])
    frame = tmp_path / "frame.html"
    frame.write_text(f"""<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(path.read_text('utf-8'))}"></iframe>
        <script>addEventListener("load", () => {{
          const d = document.querySelector("iframe").contentDocument, images = [...d.images], plot = d.querySelector(".plot img");
          const seen = {{page: d.documentElement.scrollWidth, broken: images.filter(i => !i.naturalWidth).length, images: images.length,
                        widest: Math.max(...images.map(i => i.getBoundingClientRect().right)), plot: plot.clientWidth,
                        table: Math.max(...[...d.querySelectorAll(".scroll")].map(t => t.getBoundingClientRect().right))}};
          d.querySelector(".plot input").click();
          document.body.textContent = JSON.stringify({{...seen, enlarged: plot.clientWidth, page_then: d.documentElement.scrollWidth}});
        }})</script>""", encoding="utf-8")  # fmt: skip
    shown = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=1400,1000", "--virtual-time-budget=3000", "--dump-dom", str(frame)],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    seen = json.loads(re.search(r"<body>(\{.*\})", shown)[1])
    assert seen["images"] == 3 and seen["broken"] == 0
    assert max(seen["page"], seen["page_then"], seen["widest"], seen["table"]) <= width  # nothing makes the page scroll sideways
    assert (seen["enlarged"] > width > seen["plot"]) if width == 360 else seen["enlarged"] == seen["plot"]


def test_html_report_keeps_the_old_file_if_the_new_one_fails(written):
    path = written[0]
    old = path.read_bytes()
    with pytest.raises(ValueError, match="section 2 has the keys"):
        html_report(path, "t", [{"heading": "a"}, {"heading": "b", "tables": []}])
    with pytest.raises(ValueError, match="section 1 has the keys"):
        html_report(path, "t", [{"text": "no heading"}])
    assert path.read_bytes() == old and [p.name for p in path.parent.iterdir()] == ["report.html"]
    html_report(path, "t", [])
    assert "<title>t</title>" in path.read_text(encoding="utf-8")


def test_the_papers_numbers_are_the_ones_shipped():
    held = json.loads(tables.PAPER_TABLES.read_text(encoding="utf-8"))
    assert tables.paper_table(5)["score"].tolist() == [row["score"] for row in held["table5_ablation"]]
