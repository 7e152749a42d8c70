"""`medprune ask` says in one sentence what cannot be asked."""

import subprocess
import sys

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


def test_the_program_ends_with_what_it_said_and_its_status(runs, rows, tmp_path):
    words = [sys.executable, "-m", "medprune", "ask", "demo:original", rows[0]["path"], "What is it?", "--tokens", "2"]
    said = subprocess.run([*words, "--runs-dir", str(runs)], capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.strip() and "nanobind" not in said.stderr, said.stderr
    words[5] = str(tmp_path / "nowhere.png")
    said = subprocess.run([*words, "--runs-dir", str(runs)], capture_output=True, text=True)
    assert said.returncode == 2 and said.stderr.strip().endswith("nowhere.png is not there, or no file: give a picture.")


def test_two_models_answer_side_by_side(runs, rows, monkeypatch, capsys):
    words = ("ask", "demo:original", rows[0]["path"], "What is it?", "--tokens", "2", "--timing", "--runs-dir", runs)
    assert medprune(monkeypatch, *words, "--beside", "demo:original") == 0
    said = capsys.readouterr()
    lines = said.out.strip().splitlines()
    assert len(lines) == 2 and all(line.startswith("demo:original: ") for line in lines) and lines[0] == lines[1]
    assert said.err.count("for 2 tokens") + said.err.count("for 1 tokens") == 2 and "to load" in said.err
