"""`medprune ask` says in one sentence what cannot be asked."""

import pytest
from test_cli import medprune

from medprune.exporting import asking
from medprune.models.loading import save
from medprune.quantizing.checkpoint import save_quantized
from medprune.quantizing.quantize import quantize


@pytest.fixture
def runs(tiny, tmp_path):
    """Return a folder of runs: of `demo`, the tiny base as original and rounded to 4 bits."""
    model, processor = tiny
    save(model, processor, tmp_path / "demo/01_finetune/model")
    model, info = quantize(model, "rtn", 4, 32)
    save_quantized(model, tmp_path / "demo/05_awq_vs_bnb/quantized/rtn-original", "rtn", info, processor)
    return tmp_path


@pytest.mark.parametrize("words,why", [
    (("demo:original", "IMAGE", "  "), "the question is empty"),
    (("demo:original", "IMAGE", "what <image>?"), "the question holds <image>"),
    (("demo:original", "nowhere.png", "What?"), "nowhere.png is not there"),
    (("demo:original", "BROKEN", "What?"), "cannot be read as an image"),
    (("demo:original", "IMAGE", "What?", "--tokens", "0"), "--tokens is 0"),
    (("demo:awq-pruned-2", "IMAGE", "What?"), "keeps no folder of 'awq-pruned-2'; it keeps original, rtn-original"),
    (("other:original", "IMAGE", "What?"), "there is no run 'other'"),
    (("nowhere", "IMAGE", "What?"), "nowhere is not there"),
    (("demo:original", "IMAGE", "What?", "--beside", "nowhere"), "nowhere is not there"),
])  # fmt: skip
def test_what_cannot_be_asked_is_said_before_loading(runs, rows, tmp_path, monkeypatch, capsys, words, why):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    places = {"IMAGE": rows[0]["path"], "BROKEN": tmp_path / "broken.png"}
    monkeypatch.setattr(asking, "load_folder", lambda *_: pytest.fail("a model was loaded"))
    assert medprune(monkeypatch, "ask", *(places.get(w, w) for w in words), "--runs-dir", runs) == 2
    said = capsys.readouterr().err
    assert why in said and said.strip().count("\n") == 0
