"""Runs brought over from an earlier session."""

import pytest

from medprune.runs.hosted import bring_run
from medprune.store import Units, open_run, write_json


def test_a_run_is_brought_over_whole_and_can_be_written(tmp_path):
    source = tmp_path / "dataset" / "demo"
    Units(source / "01_finetune" / "answers.jsonl", "c").add("block 3", "said")
    write_json(source / "01_finetune" / "model" / "config.json", {"a": 1})
    for path in [*source.rglob("*"), source]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = bring_run(source, "again", str(tmp_path / "runs"))
    assert root == tmp_path / "runs" / "again"
    units = Units(root / "01_finetune" / "answers.jsonl", "c")
    units.add("block 4", "more")
    assert units["block 3"] == "said" and (root / "01_finetune" / "model" / "config.json").read_text() == '{\n "a": 1\n}\n'
    for path in root.rglob("*"):
        assert path.stat().st_mode & 0o200, path
    assert not list((tmp_path / "runs").glob(".*"))
    with pytest.raises(ValueError, match="holds a run already"):
        bring_run(source, "again", str(tmp_path / "runs"))


def test_what_is_no_run_is_not_brought_over(tmp_path):
    with pytest.raises(ValueError, match="holds no 01_finetune: give the folder of a run"):
        bring_run(tmp_path, "demo", str(tmp_path / "runs"))
    with pytest.raises(ValueError, match="plain folder name"):
        open_run("a/b", "01_finetune", None, runs_dir=str(tmp_path))
