"""The whole series at `smoke` through the command line: run, run again, and killed in the middle of 02 and of 03."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import nbformat
import pandas as pd
import psutil
import pytest

from medprune.settings import STAGES
from medprune.store import read_json, write_csv
from medprune.settings import REPO

CLI = [sys.executable, "-c", "from medprune.cli import main; main()"]
MEASURED = ["ms_per_token", "peak_bytes"]


def medprune(*words):
    return subprocess.run([*CLI, *map(str, words)], cwd=REPO, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return runs / "first", medprune("run", "--profile", "smoke", "--name", "first", "--runs-dir", runs)


def test_series_runs_to_its_report(series):
    root, done = series
    assert done.returncode == 0, done.stderr
    assert all((root / stage / "manifest.json").exists() for stage in STAGES)
    report = root / "06_judge_eval" / "report.html"
    assert done.stdout.rstrip().endswith(f"report: {report}") and report.stat().st_size > 1000
    summary = pd.read_csv(root / "06_judge_eval" / "summary.csv")
    assert summary.method.tolist() == ["original", "prune", "prune + sft", "quantize", "prune + quantize", "prune + sft + quantize"]
    assert all(method in done.stdout for method in summary.model)
    assert all(f"{stage}: running" in done.stderr for stage in STAGES)


def test_executed_notebooks_hold_no_error_and_every_cell_ran(series):
    root, _ = series
    for stage in STAGES:
        cells = nbformat.read(root / stage / f"{stage}.ipynb", as_version=4).cells
        assert all(c.execution_count for c in cells if c.cell_type == "code")
        assert not any(o.output_type == "error" for c in cells if c.cell_type == "code" for o in c.outputs)


def test_second_run_finds_everything_done(series):
    root, _ = series
    files = {f: f.stat().st_mtime_ns for f in root.rglob("*") if f.is_file()}
    again = medprune("run", "--profile", "smoke", "--name", root.name, "--runs-dir", root.parent)
    assert again.returncode == 0, again.stderr
    assert again.stderr.splitlines() == [f"{stage}: done" for stage in STAGES]
    assert again.stdout == series[1].stdout
    assert {f: f.stat().st_mtime_ns for f in root.rglob("*") if f.is_file()} == files


def test_other_parameters_run_again_from_the_stage_they_touch(series, monkeypatch):
    from medprune.runs import series

    root, _ = series
    said, ran = [], []
    monkeypatch.setattr(series, "_execute", lambda source, *_: ran.append(source.stem) or 0.0)
    kept = {stage: (root / stage / "done.json").read_text() for stage in STAGES}
    try:
        arguments = (root.name, "smoke", None, {"blocks_removed": [0, 1]}, str(root.parent))
        series.run_series(*arguments, say=said.append)
    finally:
        for stage, text in kept.items():
            (root / stage / "done.json").write_text(text)
    assert said == ["01_finetune: done"] and ran == list(STAGES[1:])


def test_empty_answers_are_texts_when_scores_are_read_again(tmp_path):
    from medprune.judging.scores import read_scores

    table = pd.DataFrame({"answer": ["", "NA", "Rosacea, \"red\"."], "score_percent": [None, 0.0, 100.0]})
    write_csv(tmp_path / "scores.csv", table)
    again = read_scores(tmp_path)
    assert again.answer.tolist() == table.answer.tolist() and again.score_percent.isna().tolist() == [True, False, False]


def papermill(root, stage, *more):
    """Start one notebook of a run, as the series does."""
    notebook = root / stage / f"{stage}.ipynb"
    notebook.parent.mkdir(parents=True, exist_ok=True)
    words = ["-p", "profile", "smoke", "-p", "run_name", root.name, "-p", "runs_dir", str(root.parent), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "papermill", str(REPO / "notebooks" / f"{stage}.ipynb"), str(notebook), *words,
         "--cwd", str(REPO / "notebooks"), "--no-progress-bar", "-k", "python3"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"MEDPRUNE_PROGRESS": os.devnull},
    )  # fmt: skip


def kill_at_first_line(root, stage, units):
    """Kill a notebook, its kernel too, as soon as it has written its first unit of work; return what it had written."""
    process = papermill(root, stage)
    deadline = time.monotonic() + 600
    while not (units.exists() and b"\n" in units.read_bytes()):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.002)
    # the kernel leads a session of its own, so it is not in papermill's process group
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (root / stage / "manifest.json").exists(), "killed too late to be in the middle"
    return units.read_bytes()


def keys(units):
    lines = [json.loads(line) for line in units.read_text().splitlines()]
    return Counter((line["context"], line["key"]) for line in lines)


def test_killed_in_02_and_in_03_it_ends_with_the_same_tables(series, tmp_path):
    undisturbed, _ = series
    root = tmp_path / "killed"
    # the images that 01's splits name stay where the first run drew them
    shutil.copytree(undisturbed / "01_finetune", root / "01_finetune", ignore=shutil.ignore_patterns("images", "base"))
    for stage, name in (("02_layer_importance", "leave_one_out.jsonl"), ("03_prune_sweep", "answers.jsonl")):
        units = root / stage / name
        before = kill_at_first_line(root, stage, units)
        whole = before[: before.rindex(b"\n") + 1]
        again = papermill(root, stage)
        assert again.wait(timeout=600) == 0, again.stderr.read()
        assert units.read_bytes().startswith(whole), "what was written before the kill is kept"
        assert set(keys(units).values()) == {1}, "a unit of work was done twice"
        assert keys(units) == keys(undisturbed / stage / name) and len(keys(units)) > len(whole.splitlines())
    importance = [pd.read_csv(r / "02_layer_importance" / "importance.csv") for r in (root, undisturbed)]
    pd.testing.assert_frame_equal(*importance)
    orders = [read_json(r / "02_layer_importance" / "removal_order.json") for r in (root, undisturbed)]
    assert orders[0] == orders[1]
    sweeps = [pd.read_csv(r / "03_prune_sweep" / "sweep.csv").drop(columns=MEASURED) for r in (root, undisturbed)]
    pd.testing.assert_frame_equal(*sweeps)


def test_ways_back_of_another_pruned_model_are_trained_anew(series, tmp_path):
    """They stand in one file under the same labels; what a model without one block was tuned to is not another's."""
    done, _ = series
    root = tmp_path / "other"
    shutil.copytree(done, root, ignore=shutil.ignore_patterns("images", "base", "quantized"))
    process = papermill(root, "04_sft_recovery", "-y", "{recover: [2]}")
    assert process.wait(600) == 0, process.stderr.read()
    trained = [
        pd.read_csv(r / "04_sft_recovery" / "recipes.csv").set_index("method").trainable_params["lora 50% of images, same steps"]
        for r in (done, root)
    ]
    assert trained[1] < trained[0]  # a block less has adapters
