"""Does one HTML file hold everything, text for people, and what the notebooks showed?"""

import base64
import html
import io
import json
import math
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from PIL import Image

from medprune.results import figures, shown
from medprune.results.page import html_report, readable, with_interval
from medprune.results.shown import CHAPTERS, keep, report_sections, settings_table
from medprune.settings import STAGES, Config, changed, resolve, values_of
from medprune.store import Run, write_json

METHODS = ["original", "prune", "prune + sft"]


def test_with_interval():
    assert with_interval(80.12, 76, 84.249) == "80.1 [76.0, 84.2]"
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
        "method": "a", "score [95% interval]": "80.1 [76.0, 84.2]", "p holm": "<0.001", "total (GiB)": "3.00",
        "blocks removed": "2", "n": "1,170", "protected": "yes", "importance score": "0.1235",
        "vram gb": "13.4",
    }  # fmt: skip
    assert text.iloc[1].tolist() == ["", "", "0.040", "0.50", "", "3", "no", "0.5", "3.0"]


class Outline(HTMLParser):
    """Collects what a browser would see: balanced tags, anchors, cells, pictures, words."""

    VOID = {"meta", "img", "input", "br", "hr", "link"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.cells, self.images, self.words = [], [], [], [], [], []
        self.tags = set()
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
    evil = '</td><script src="https://example.org/x.js"></script><script>parent.ran = 1</script>'
    evil += '<img src=x onerror="parent.ran = 1"> {braces} & "quotes"'
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
    assert re.findall(r"<th [^>]*>([^<]*)</th>", text) == ["b", "diff"]
    assert "Throughout: a full &amp; whole, n 72." in text


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


def test_kept_tables_and_figures_come_back_in_their_order(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="run 06_judge_eval again"):
        report_sections(tmp_path)
    fig = figures.figure_sweep(pd.DataFrame({"blocks_removed": [0, 1], "score": 5.0, "low": 4.0, "high": 6.0}))
    for stage in STAGES:
        run = Run(tmp_path, stage)
        run.dir.mkdir()
        table = pd.DataFrame({"method": ["NA"], "size_bytes": [2**30]})
        text = keep(run, "z first", table, "How to read it.", Image.new("RGB", (9, 9)))
        assert text["size (GiB)"].tolist() == ["1.00"]
        assert keep(run, "a second", fig) is fig
    sections = report_sections(tmp_path, STAGES[-1])
    assert [s["heading"] for s in report_sections(tmp_path)] == ["z first", "a second"] * 6, "06 knows of no later stage"
    assert [s["heading"] for s in sections] == ["z first", "a second"] * len(STAGES)
    assert sections[0]["chapter"] == CHAPTERS["06_judge_eval"] and len({s["chapter"] for s in sections}) == len(STAGES)
    assert sections[0]["text"] == "How to read it." and sections[0]["image"].size == (9, 9)
    assert "figure" not in sections[0] and "table" not in sections[1] and sections[1]["figure"].size[0] > 100
    assert sections[0]["table"].values.tolist() == [["NA", 2**30]]
    keep(run, "z first", fig)  # a cell run again shows its own again, at the end
    last = lambda: [s for s in report_sections(tmp_path, STAGES[-1]) if s["chapter"] == CHAPTERS[STAGES[-1]]]  # noqa: E731
    assert [s["heading"] for s in last()] == ["a second", "z first"]
    assert "table" not in last()[1]
    monkeypatch.setattr(shown, "_begun", set())  # another run of the notebook begins anew
    keep(run, "only this", fig)
    assert [s["heading"] for s in last()] == ["only this"]
    assert len(report_sections(tmp_path, STAGES[-1])) == 1 + 2 * (len(STAGES) - 1)


def test_settings_table_says_which_stage_was_set_otherwise(tmp_path):
    config = resolve("smoke")
    for stage in STAGES[:-1]:
        settings = values_of(changed(config, seed=7) if stage == "04_sft_recovery" else config)
        if stage != "04_sft_recovery":
            del settings["recipe"]  # which this stage does not read
        write_json(tmp_path / stage / "manifest.json", {"settings": settings, "versions": {"gguf": "0.1"}})
    read_last = Config({"seed": 0, "conditions": None}, STAGES[-1])
    table = settings_table(Run(tmp_path, STAGES[-1]), read_last).set_index("setting")["value"]
    assert table["seed"] == "0; 7 in 04_sft_recovery" and table["recover"] == "[1, 2]" and table["conditions"] == "null"
    assert table["recipe"] == '"lora"' and table["gguf"] == "0.1"
    assert table["torch"] == torch.__version__ and int(table["threads"]) > 0
    with pytest.raises(ValueError, match="run 01_finetune first"):
        settings_table(Run(tmp_path / "none", STAGES[-1]), config)


@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_the_report_at_a_phone_s_width_and_a_desk_s(written, tmp_path, opened, width):
    """The page stands in a frame of that width; a script outside, which its policy does not bind, measures it."""
    wide = pd.DataFrame({f"column_{i}": ["some words"] * 3 for i in range(20)})
    scores = pd.DataFrame({"method": METHODS, "condition": METHODS, "score_percent": 5.0})
    fig = figures.figure_breakdown(scores, "condition")
    path = html_report(tmp_path / "r.html", "t", [*written[2], {"heading": "Wide", "table": wide, "figure": fig}])
    frame = tmp_path / "frame.html"
    page = html.escape(path.read_text("utf-8"))
    frame.write_text(f"""<iframe style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
        <script>addEventListener("load", () => {{
          const d = document.querySelector("iframe").contentDocument, page = d.documentElement;
          const images = [...d.images], plot = d.querySelector(".plot img");
          const widest = boxes => Math.max(...[...boxes].map(box => box.getBoundingClientRect().right));
          const broken = images.filter(i => !i.naturalWidth).length;
          const seen = {{ran: typeof ran, page: page.scrollWidth, images: images.length, broken, widest: widest(images),
                        plot: plot.clientWidth, table: widest(d.querySelectorAll(".scroll"))}};
          d.querySelector(".plot input").click();
          const then = {{enlarged: plot.clientWidth, page_then: page.scrollWidth}};
          document.body.textContent = JSON.stringify({{...seen, ...then}});
        }})</script>""", encoding="utf-8")  # fmt: skip
    seen = json.loads(re.search(r"<body>(\{.*\})", opened(frame))[1])
    assert seen["images"] == 3 and seen["broken"] == 0
    assert seen["ran"] == "undefined", "an answer's script ran"
    # nothing makes the page scroll sideways
    assert max(seen["page"], seen["page_then"], seen["widest"], seen["table"]) <= width
    assert (seen["enlarged"] > width > seen["plot"]) if width == 360 else seen["enlarged"] == seen["plot"]
