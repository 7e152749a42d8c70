"""The whole series at `smoke` through the command line: run, run again, killed in the middle of 02 and of 03; and what
counts as done, with notebooks that only play."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import golden
import nbformat
import pandas as pd
import psutil
import pytest

from medprune.runs import series as running
from medprune.runs import upkeep
from medprune.settings import REPO, STAGES
from medprune.store import finish, open_stage, read_json, read_manifest, write_json, write_text

CLI = [sys.executable, "-m", "medprune"]
GUARD = REPO / "tests" / "faults" / "guard"  # which lets children speak to this machine alone, and writes down what else
KEY = "sk-this-is-a-secret-0123456789"
MEASURED = ["ms_per_token", "peak_bytes"]


def medprune(*words, **environment):
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    return subprocess.run([*CLI, *map(str, words)], cwd=REPO, capture_output=True, text=True, timeout=900, env=environment)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    path = os.pathsep.join(filter(None, [str(GUARD), os.environ.get("PYTHONPATH")]))
    guarded = {"PYTHONPATH": path, "MEDPRUNE_NETWORK_LOG": runs / "network.log", "OPENAI_API_KEY": KEY, "HF_TOKEN": KEY}
    return runs / "first", medprune("run", "--profile", "smoke", "--name", "first", "--runs-dir", runs, **guarded)


def test_series_runs_to_its_report(series):
    root, done = series
    assert done.returncode == 0, done.stderr
    assert all((root / stage / "manifest.json").exists() for stage in STAGES)
    report = root / STAGES[-1] / "report.html"
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


def test_no_socket_but_loopback_was_asked_for_and_no_key_was_kept(series):
    root, done = series
    log = root.parent / "network.log"
    assert not log.exists(), log.read_text()
    holding = [f for f in root.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()]
    assert not holding and KEY not in done.stdout + done.stderr


def test_second_run_finds_everything_done(series):
    root, _ = series
    files = {f: f.stat().st_mtime_ns for f in root.rglob("*") if f.is_file()}
    words = ("run", "--profile", "smoke", "--name", root.name, "--runs-dir", root.parent)
    begun = time.monotonic()
    again = medprune(*words)
    assert again.returncode == 0, again.stderr
    assert time.monotonic() - begun < 20  # a few seconds, with none of the libraries that notebooks need
    assert again.stderr.splitlines() == [f"{stage}: done" for stage in STAGES]
    assert again.stdout == series[1].stdout
    assert {f: f.stat().st_mtime_ns for f in root.rglob("*") if f.is_file() and f.name != ".lock"} == {
        f: t for f, t in files.items() if f.name != ".lock"
    }
    dry = medprune(*words, "--dry-run", "-p", "group_size", 32)
    assert "05_awq_vs_bnb: would run, as group_size was 64 and is 32" in dry.stdout and dry.returncode == 0
    assert dry.stdout.count("done") == 6


def test_the_numbers_are_the_golden_ones(series):
    """Of every table and metric; `tests/golden.py` says how near they must be, and writes them anew."""
    found = golden.differences(golden.collect(series[0]), json.loads(golden.FILE.read_text()))
    assert not found, "\n".join(found[:20])


def test_the_folder_holds_what_somebody_needs(series):
    root, _ = series
    assert upkeep.needless(root) == [] and upkeep.stale_units(root) == 0
    assert not list(root.rglob("checkpoints-*")) and not list(root.rglob("tried-*"))
    kept = {f.name for f in (root / "05_awq_vs_bnb" / "quantized").iterdir()}
    assert kept == {"awq-original", "awq-recovered-1", "awq-recovered-2"}
    table = upkeep.list_runs(root.parent).set_index("run").loc["first"]
    assert (table["profile"], table["stages"]) == ("smoke", "01 02 03 04 05 06 07 08") and 0 <= table["score"] <= 100


def test_cards_name_the_true_base(series):
    root, _ = series
    card = (root / "05_awq_vs_bnb" / "quantized" / "awq-recovered-1" / "README.md").read_text()
    assert "random weights" in card and "Apache" not in card and "Scores: " in card and "not evaluated" not in card


# ---- what is done, with notebooks that only play: they read what earlier ones wrote and write what they were told
@pytest.fixture
def played(tmp_path, monkeypatch):
    """Run the series with notebooks that play; return a function that does so and gives (stages run, sentence)."""
    ran, skill = [], {"result": lambda stage, config: {}}

    def execute(stage, root, values, say, reasons):
        given = dict(values)
        run, config = open_stage(stage, given.pop("run_name"), given.pop("runs_dir"), given.pop("profile"), **given)
        earlier = {s: read_json(run.read(s, "out.json")) for s in STAGES[: STAGES.index(stage)]}
        seen = {k: v for k, v in vars(config).items() if k in ("sft_steps", "recover", "group_size", "judge", "seed")}
        write_json(run.dir / "out.json", {"seen": seen, "read": len(earlier), **skill["result"](stage, config)})
        if skill.get("killed") == stage:
            raise ValueError(f"{stage} was killed.")
        finish(run, {})
        if skill.get("changed") == stage:
            manifest = read_manifest(run.root, stage)
            write_json(run.dir / "manifest.json", manifest | {"settings": manifest["settings"] | {"seed": 5}})
        ran.append(stage)

    monkeypatch.setattr(running, "_execute", execute)

    def run(start=None, end=None, **parameters):
        ran.clear()
        try:
            running.run_series("demo", "smoke", start, parameters, str(tmp_path / "runs"), lambda line: None, end=end)
        except ValueError as error:
            return list(ran), str(error)
        return list(ran), ""

    run.root, run.skill = tmp_path / "runs" / "demo", skill
    return run


def test_a_stage_runs_when_a_setting_that_it_reads_has_changed(played):
    assert played() == (list(STAGES), "")
    assert played() == ([], "")
    assert played(group_size=32)[0] == list(STAGES[4:])  # 06 reads what 05 wrote
    assert played()[0] == list(STAGES[4:])
    assert played(sft_steps=5)[0] == list(STAGES)


def test_a_run_ends_with_the_stage_that_is_named_and_goes_on_later(played):
    assert played(end=STAGES[2])[0] == list(STAGES[:3])
    assert played(STAGES[2], STAGES[3])[0] == list(STAGES[2:4])
    assert played()[0] == list(STAGES[4:])


def test_results_that_come_out_the_same_stop_the_chain(played):
    played()
    assert played(batch_rows=64)[0] == [*STAGES[:5], STAGES[6]]  # 06 neither reads it nor finds anything changed


def test_from_with_a_parameter_of_an_earlier_stage_is_refused_and_poisons_nothing(played):
    played(sft_steps=2)
    ran, said = played("03_prune_sweep", sft_steps=200)
    assert ran == [] and "'sft_steps' would change nothing: 01_finetune takes it" in said and "--from 03_prune_sweep" in said
    ran, said = played("03_prune_sweep", settings={"n_held_out": 1})
    assert ran == [] and "'n_held_out' would change nothing: 01_finetune takes it" in said
    assert played(sft_steps=200)[0] == list(STAGES)


def test_from_with_a_setting_that_stages_before_were_run_without_is_refused(played):
    """A judge given to 06 alone would stand beside scores of another."""
    played()
    for start, given in (("06_judge_eval", {"judge": "cosine", "card_judges": []}), ("05_awq_vs_bnb", {"max_new_tokens": 9})):
        ran, said = played(start, settings=given)
        assert ran == [] and "is read by 01_finetune too" in said and f"--from {start} leaves as it is" in said
    assert played("05_awq_vs_bnb", group_size=32) == (list(STAGES[4:]), "")


def test_a_setting_that_01_was_given_and_does_not_read_is_given_up_again(played):
    assert played(awq_rows=5) == (list(STAGES), "")
    assert played() == ([STAGES[4], *STAGES[6:]], "")


def test_what_a_stage_was_given_reaches_the_stages_after_it(played):
    played(blocks_removed=[0, 1, 3])
    assert read_json(played.root / STAGES[5] / "out.json")["seen"]["recover"] == [1]
    assert played("05_awq_vs_bnb") == ([STAGES[4]], "")  # its settings are the run's, and its results as before


def test_settings_a_b_a(played):
    played()
    first = {stage: (played.root / stage / "out.json").read_text() for stage in STAGES}
    assert played(seed=1)[0] == list(STAGES)
    assert played()[0] == list(STAGES)
    assert {stage: (played.root / stage / "out.json").read_text() for stage in STAGES} == first


def test_a_kill_in_01_leaves_no_other_model_for_02(played):
    played()
    played.skill["killed"] = STAGES[0]
    assert played(sft_steps=9)[1].startswith("01_finetune was killed")
    played.skill.pop("killed")
    ran, said = played("02_layer_importance")
    assert ran == [] and "has no finished 01_finetune: run 01_finetune first" in said
    assert played()[0] == list(STAGES[:1])  # with the old settings the old results, which 02 to 06 have read


def test_a_stage_that_ran_with_other_settings_than_asked_for_is_not_believed(played):
    played.skill["changed"] = STAGES[0]
    with pytest.raises(RuntimeError, match="01_finetune ran with seed=5, which was not asked for"):
        played()


def test_photographs_in_the_callers_folder(played, tmp_path, monkeypatch):
    from medprune.data import synthetic

    for condition in ("rosacea", "psoriasis"):
        for n in range(4):
            (tmp_path / "photos" / condition).mkdir(parents=True, exist_ok=True)
            synthetic.draw(condition, n, 64)[0].save(tmp_path / "photos" / condition / f"{n}.png")
    shutil.copyfile(REPO / "data" / "conditions.json", tmp_path / "facts.json")
    monkeypatch.chdir(tmp_path)
    given = {"images": "photos", "settings": {"conditions": "facts.json", "n_train": 6, "n_test": 2, "n_held_out": 0}}
    assert played(**given) == (list(STAGES), "")
    assert read_json(played.root / "run.json")["settings"]["images"] == str(tmp_path / "photos")
    assert played(**given) == ([], "")
    synthetic.draw("rosacea", 99, 64)[0].save(tmp_path / "photos" / "rosacea" / "0.png")  # new pixels, the same name
    assert STAGES[0] in played(**given)[0]


def test_a_run_of_photographs_does_not_turn_synthetic_unasked(played, tmp_path):
    from medprune.data import synthetic

    for condition in ("rosacea", "psoriasis"):
        for n in range(4):
            (tmp_path / "photos" / condition).mkdir(parents=True, exist_ok=True)
            synthetic.draw(condition, n, 64)[0].save(tmp_path / "photos" / condition / f"{n}.png")
    assert played(images=str(tmp_path / "photos"), n_train=None, settings={"n_test": 2})[1] == ""
    ran, said = played()
    assert ran == [] and f"give --images {tmp_path / 'photos'} again, or --images synthetic" in said
    assert played(images="synthetic")[0][0] == STAGES[0]


# ---- upkeep
def test_clean_removes_what_nobody_needs(played, tmp_path):
    played()
    for stage in STAGES[:2]:
        write_text(played.root / stage / "checkpoints-1" / "optimizer.pt", "x" * 1000)
    (played.root / STAGES[1] / "manifest.json").unlink()
    write_text(played.root / STAGES[0] / "answers.jsonl", "of an older version")
    found = {str(path.relative_to(played.root)) for path in upkeep.needless(played.root)}
    assert found == {"01_finetune/checkpoints-1", "01_finetune/answers.jsonl"}  # 02 goes on from its own
    assert upkeep.clean(played.root) >= 1000
    assert not (played.root / STAGES[0] / "checkpoints-1").exists() and (played.root / STAGES[1] / "checkpoints-1").exists()
    with pytest.raises(ValueError, match="is no run"):
        upkeep.needless(tmp_path / "nowhere")


def test_clean_forgets_units_of_settings_that_nobody_has(played):
    from medprune.store import Units

    played()
    manifest = read_manifest(played.root, STAGES[0])
    write_json(played.root / STAGES[0] / "manifest.json", manifest | {"contexts": ["now"]})
    for mark in ("now", "before"):
        Units(played.root / "units.sqlite", mark).add("one", 1)
    assert upkeep.stale_units(played.root) == 1
    upkeep.clean(played.root)
    assert "one" in Units(played.root / "units.sqlite", "now") and "one" not in Units(played.root / "units.sqlite", "before")


def papermill(root, stage, *more):
    """Start one notebook of a run, as a user may."""
    notebook = root / stage / f"{stage}.ipynb"
    notebook.parent.mkdir(parents=True, exist_ok=True)
    words = ["-p", "run_name", root.name, "-p", "runs_dir", str(root.parent), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "papermill", str(REPO / "notebooks" / f"{stage}.ipynb"), str(notebook), *words,
         "--cwd", str(REPO / "notebooks"), "--no-progress-bar", "-k", "python3"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"MEDPRUNE_PROGRESS": os.devnull},
    )  # fmt: skip


def units_of(root):
    """Return a run's units as {(context, key): value}, in the order in which they were written."""
    with sqlite3.connect(root / "units.sqlite", timeout=60) as base:
        return {(c, k): v for c, k, v in base.execute("SELECT context, key, value FROM units ORDER BY rowid")}


def kill_at_first_unit(root, stage):
    """Kill a notebook, its kernel too, as soon as it has written its first unit of work; return what it had written."""
    before = len(units_of(root))
    process = papermill(root, stage)
    deadline = time.monotonic() + 600
    while len(units_of(root)) == before:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.002)
    # the kernel leads a session of its own, so it is not in papermill's process group
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (root / stage / "manifest.json").exists(), "killed too late to be in the middle"
    return units_of(root)


def test_killed_in_02_and_in_03_it_ends_with_the_same_tables(series, tmp_path):
    undisturbed, _ = series
    root = tmp_path / "killed"
    shutil.copytree(undisturbed / "01_finetune", root / "01_finetune")
    shutil.copyfile(undisturbed / "run.json", root / "run.json")
    shutil.copyfile(undisturbed / "units.sqlite", root / "units.sqlite")
    everything = units_of(root)
    of_01 = set(read_json(root / "01_finetune" / "manifest.json")["contexts"])
    with sqlite3.connect(root / "units.sqlite") as base:
        base.execute(f"DELETE FROM units WHERE context NOT IN ({', '.join('?' * len(of_01))})", sorted(of_01))
        base.execute("DELETE FROM units WHERE key LIKE 'without %'")
    for stage in ("02_layer_importance", "03_prune_sweep"):
        before = kill_at_first_unit(root, stage)
        again = papermill(root, stage)
        assert again.wait(timeout=600) == 0, again.stderr.read()
        after = units_of(root)
        assert list(after.items())[: len(before)] == list(before.items()), "what was written before the kill is kept"
        assert len(after) > len(before)
    assert {k: v for k, v in units_of(root).items() if "speed" not in k[1]}.items() <= everything.items()
    importance = [pd.read_csv(r / "02_layer_importance" / "importance.csv") for r in (root, undisturbed)]
    pd.testing.assert_frame_equal(*importance)
    orders = [read_json(r / "02_layer_importance" / "removal_order.json") for r in (root, undisturbed)]
    assert orders[0] == orders[1]
    sweeps = [pd.read_csv(r / "03_prune_sweep" / "sweep.csv").drop(columns=MEASURED) for r in (root, undisturbed)]
    pd.testing.assert_frame_equal(*sweeps)


def test_ways_back_of_another_pruned_model_are_trained_anew(series, tmp_path):
    """They have the same labels; what a model without one block was tuned to is not another's."""
    done, _ = series
    root = tmp_path / "other"
    shutil.copytree(done, root, ignore=shutil.ignore_patterns("quantized"))
    process = papermill(root, "04_sft_recovery", "-p", "recover", "[2]")
    assert process.wait(600) == 0, process.stderr.read()
    trained = [
        pd.read_csv(r / "04_sft_recovery" / "recipes.csv").set_index("method").trainable_params["lora 50% of images, same steps"]
        for r in (done, root)
    ]
    assert trained[1] < trained[0]  # a block less has adapters


@pytest.mark.parametrize("text,ends", [("    tuning:   0%|", "|\n"), ("    tuning: 100%|\n", "|\n"), ("", "")])
def test_what_follows_a_bar_that_was_cut_short_begins_a_line(tmp_path, capsys, text, ends):
    with running._kernel_of(tmp_path), (tmp_path / "progress.log").open("a") as bar:
        bar.write(text)
    assert capsys.readouterr().err == text.rstrip("\n") + ends[1:]
    assert not (tmp_path / "progress.log").exists()
