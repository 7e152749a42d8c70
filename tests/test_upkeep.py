"""What keeps the repository in order: pins that rise together, counts for README, a version that CHANGELOG explains."""

import json
import re
import shutil
import subprocess

import bump
import counts
import pytest

import medprune
from medprune.runs.upkeep import list_runs
from medprune.settings import REPO
from medprune.store import write_json, write_text


def test_newer_pins_go_into_every_file_that_names_them(tmp_path):
    for name in bump.FILES:
        shutil.copy(REPO / name, tmp_path)
    before = bump.pins(tmp_path)
    versions = {"adjusttext": "99.1", "typer": "99.2", "six": "99.3", "peft": before["peft"], "never-heard-of": "1"}
    changed = bump.rewrite(versions, tmp_path)
    assert changed == {name: (before[name], versions[name]) for name in ("adjusttext", "typer", "six")}
    assert bump.pins(tmp_path) == before | {name: versions[name] for name in changed}
    assert "adjustText==99.1\n" in (tmp_path / "requirements.lock").read_text(), "its own spelling"
    for name, files in (("adjusttext", bump.FILES), ("typer", bump.FILES), ("six", bump.FILES[:1])):
        assert all(f"=={versions[name]}" in (tmp_path / file).read_text() for file in files)
    assert bump.rewrite(versions, tmp_path) == {}


def test_only_what_is_neither_pinned_nor_installed_is_said_to_be_lacking():
    found = {"typer": "99", "triton": "3", "never-heard-of": "1"}
    assert bump.lacking(found, {"triton", "torch"}) == ["never-heard-of"]


def test_pip_is_asked_for_what_goes_together_and_torch_stays(monkeypatch):
    asked = []

    def pip(words, **_):
        asked.extend(words)
        found = [{"metadata": {"name": n, "version": v}} for n, v in (("Typer", "99"), ("torch", "9"), ("rich", "98"))]
        return subprocess.CompletedProcess(words, 0, json.dumps({"install": found}), "")

    monkeypatch.setattr(bump.subprocess, "run", pip)
    assert bump.newest(["typer"]) == {"typer": "99", "rich": "98"}
    assert "--dry-run" in asked and f"torch=={bump.pins()['torch']}" in asked and "typer" in asked
    failed = subprocess.CompletedProcess([], 1, "", "one\nResolutionImpossible")
    monkeypatch.setattr(bump.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match="no versions that go together: ResolutionImpossible"):
        bump.newest(["typer"])


def test_a_spoiled_run_is_named_among_the_others(tmp_path):
    for name in ("empty", "good", "spoiled"):
        write_json(tmp_path / name / "run.json", {"settings": {"name": "smoke"}})
    write_text(tmp_path / "spoiled" / "run.json", "{")
    write_text(tmp_path / "empty" / "01_finetune" / "scores.csv", "method,score_percent\n")
    rows = list_runs(tmp_path).set_index("run")
    assert rows.profile.tolist() == ["smoke", "smoke", "?"] and rows.stages.tolist()[:2] == ["none", "none"]
    assert f"spoiled: {tmp_path / 'spoiled' / 'run.json'} is not JSON" in rows.stages["spoiled"]


def test_lines_are_counted_once_each():
    found = counts.lines()
    files = [f for f in (REPO / "medprune").rglob("*.py") if f.name != "__init__.py"]
    package = [found[name] for name in found if name.startswith("medprune")]
    assert sum(n for n, _ in package) == len(files)
    assert sum(n for _, n in package) == sum(len(f.read_text(encoding="utf-8").splitlines()) for f in files)
    assert found["notebooks"][0] == len(list((REPO / "notebooks").glob("*.ipynb"))) and found["notebooks"][1] > 100


def test_the_version_is_the_changelog_s_newest():
    versions = re.findall(r"^## (\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)$", (REPO / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert versions[0] == medprune.__version__
    assert versions == sorted(versions, key=lambda v: [int(n) for n in v.split(".")], reverse=True)
