"""`medprune compare`: paired differences of two methods, or of two runs."""

import sys

import pandas as pd
import pytest

from medprune import cli


@pytest.fixture
def runs(tmp_path):
    for run, shift in (("one", 0), ("two", 10)):
        rows = [{"method": m, "id": f"{i}#{k}", "cluster": i, "score_percent": 40 + i + drop + shift}
                for m, drop in (("original", 5), ("pruned-1", 0)) for i in range(6) for k in "ab"]  # fmt: skip
        (tmp_path / run / "01_finetune").mkdir(parents=True)
        pd.DataFrame(rows).to_csv(tmp_path / run / "01_finetune" / "scores.csv", index=False)
    return tmp_path


def medprune(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["medprune", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_compare_methods_of_a_run(runs, monkeypatch, capsys):
    assert medprune(monkeypatch, "compare", "one:pruned-1", "one:original", "--runs-dir", runs) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "-5.0 [" in said[1]


def test_compare_runs_pairs_methods_of_one_name(runs, monkeypatch, capsys):
    assert medprune(monkeypatch, "compare", "two", "one", "--runs-dir", runs) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said[1:]] == [["two:original", "one:original"], ["two:pruned-1", "one:pruned-1"]]
    assert all("10.0 [" in line for line in said[1:])


@pytest.mark.parametrize("words,why", [
    (("one:pruned-9", "one:original"), "has no method 'pruned-9'"),
    (("three", "one"), "'three' has no scores"),
    (("one", "one"), "no two methods"),
])  # fmt: skip
def test_compare_refuses_in_one_sentence(runs, monkeypatch, capsys, words, why):
    assert medprune(monkeypatch, "compare", *words, "--runs-dir", runs) == 2
    said = capsys.readouterr()
    assert why in said.err and len(said.err.splitlines()) == 1
