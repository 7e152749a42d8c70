"""`medprune study`: grids, runs one after the other and on Ray, and the report over runs."""

import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medprune import cli
from medprune.runs import across, study
from medprune.settings import STAGES, resolve, values_of
from medprune.store import write_csv, write_json, write_text

CONDITIONS = ("melanoma", "psoriasis", "rosacea")


def grid(tmp_path, text):
    file = tmp_path / "photos.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_grid_crosses_lists_and_names_runs_after_what_is_crossed(tmp_path):
    file = grid(tmp_path, "profile: smoke\nseed: [0, 1]\nrecipes: [lora]\nrecover: [[1], [1, 2]]\nsft_steps: 5\n")
    tasks = study.read_grid(file, str(tmp_path))
    assert [t.name for t in tasks] == [
        "photos-seed0-recover_1", "photos-seed0-recover_1_2", "photos-seed1-recover_1", "photos-seed1-recover_1_2",
    ]  # fmt: skip
    assert tasks[3].settings == {"seed": 1, "recipes": ["lora"], "recover": [1, 2], "sft_steps": 5}
    assert tasks[0].profile == "smoke" and tasks[0].root == tmp_path / "photos-seed0-recover_1"
    assert [t.name for t in study.read_grid(grid(tmp_path, "name: one\nseed: 3"), None)] == ["one"]
    named = [t.name for t in study.read_grid(grid(tmp_path, "images: [/a/my skin/, /a/b, 0.5]"), None)]
    assert named == ["photos-images_my_skin", "photos-images_b", "photos-images0.5"]
    plans = study.check(tasks)
    assert list(plans) == [t.name for t in tasks] and "01_finetune: would run" in plans["photos-seed0-recover_1"][0]
    assert list(tmp_path.iterdir()) == [tmp_path / "photos.yaml"]  # nothing was begun


def test_a_run_of_a_grid_is_the_same_one_wherever_it_is_made(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    (task,) = study.read_grid(grid(tmp_path, "images: pictures\nseed: 1"), "runs")
    assert task.settings == {"images": str(tmp_path / "pictures"), "seed": 1}
    assert task.runs_dir == str(tmp_path / "runs")


@pytest.mark.parametrize("text,why", [
    ("seeed: [1, 2]", r"photos-seeed1: setting 'seeed' is not known \(did you mean seed\?\)"),
    ("seed: [0, -1]", r"photos-seed-1: seed=-1 must be greater than or equal to 0"),
    ("seed: {a: 1}", r"seed must be a value or a list of values"),
    ("seed: [{a: 1}, 2]", r"seed must be a value or a list of values"),
    ("seed: []", r"seed names no value"),
    ("seed: 0\nseed: 1", r"has 'seed' twice: write its values as one list"),
    ("seed: [0, 0]", r"two runs named 'photos-seed0'"),
    ("images: [a/x, b/x]", r"two runs named 'photos-images_x'"),
    ("images: [a/x, a/X]", r"two runs named 'photos-images_x'"),
    ("seed: [1", r"is not YAML"),
    ("- 3", r"must hold settings by name"),
    ("", r"must hold settings by name"),
    ("name: ../x\nseed: 1", r"must be a plain folder name"),
    ("profile: huge\nseed: 1", r"profile 'huge' is not known"),
    ("blocks_removed: [0, 1]", r"blocks_removed=\[0, 1\] must be 0 and at least two more"),
])  # fmt: skip
def test_a_bad_grid_is_one_sentence_before_anything_runs(tmp_path, monkeypatch, capsys, text, why):
    monkeypatch.setattr(study.one_by_one, "__defaults__", (lambda *a: pytest.fail("something ran"),))
    text = text if "profile" in text or text in ("", "- 3") else f"profile: smoke\n{text}"
    assert medprune(monkeypatch, "study", grid(tmp_path, text), "--runs-dir", tmp_path) == 2
    said = capsys.readouterr().err
    assert re.search(why, said), said
    assert len(said.strip().splitlines()) == 1


def test_a_grid_that_is_not_there(tmp_path, monkeypatch, capsys):
    assert medprune(monkeypatch, "study", tmp_path / "none.yaml") == 2
    assert "none.yaml" in capsys.readouterr().err


def medprune(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["medprune", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


# ---- a run that only plays
def play(task, say=lambda line: None):
    """Write a finished run whose models name an image right or wrong by rule; seed 7 fails, 9 is a crash."""
    seed = task.settings["seed"]
    if seed == 7:
        raise ValueError("01_finetune stopped: images are blank.")
    say("01_finetune: running")
    play_run(task.root, seed)
    return task.root


MANIFEST = {"settings": {}, "overrides": {}, "inputs": {}, "code": "", "versions": {}, "outputs": {}, "contexts": [],
            "seconds": 1.0, "finished": ""}  # fmt: skip


def play_run(root, seed, settings=None, base="x"):
    rng = np.random.default_rng([seed, 3])
    whole = values_of(resolve("smoke", {"seed": seed, **(settings or {})}))
    write_json(root / "run.json", {"settings": whole})
    for stage in STAGES:
        write_json(root / stage / "manifest.json", MANIFEST | {"stage": stage})
    right = {"original": 0.9, "pruned-0": 0.9, "pruned-1": 0.6, "recovered-1": 0.8, "awq-original": 0.85, "rtn-original": 0.5,
             "rtn-pruned-1": 0.3}
    rows = []
    for i in range(36):
        condition, luck = CONDITIONS[i % 3], rng.random()
        other = CONDITIONS[(i + 1) % 3]
        for method, share in right.items():
            named = luck < share
            for kind in ("name", "features"):
                rows.append({
                    "id": f"{i}#{kind}", "key": str(i), "cluster": str(i), "condition": condition, "kind": kind, "method": method,
                    "skin_tone": ("I", "V", "VI")[i // 3 % 3], "asked": f"picture {seed % 2} {i} {base} {kind}",
                    "question": "?", "reference": "!", "judge": "reference", "judged_by": "j", "raw": "", "parsed": True,
                    "answer": f"This is {condition if named else other}.",
                    "score_percent": (100.0 if kind == "name" else 70.0) * named,
                })  # fmt: skip
    table = pd.DataFrame(rows)
    write_csv(root / "01_finetune" / "scores.csv", table[table.method == "original"])
    write_csv(root / "03_prune_sweep" / "scores.csv", table[table.method.str.startswith("pruned")])
    write_csv(root / "04_sft_recovery" / "scores.csv", table[table.method == "recovered-1"])
    write_csv(root / "05_awq_vs_bnb" / "scores.csv", table[table.method.str.contains("awq|rtn")])
    for name in across.SIZES[:3]:  # nothing was searched
        own = pd.read_csv(root / name.split("/")[0] / "scores.csv")["method"].unique()
        write_csv(root / name, pd.DataFrame({"method": own, "stored_bytes": 2**20}))
    write_json(root / "02_layer_importance" / "removal_order.json", {"output_similarity": [4 + seed, 3, 2]})
    criteria = table[table.method == "pruned-1"].assign(blocks_removed=1, criterion="output_similarity")
    worse = criteria.assign(method="magnitude-1", criterion="magnitude", score_percent=0.0)
    draws = [criteria.assign(method=f"random-{k}-1", criterion="random", score_percent=25.0 * k) for k in range(4)]
    write_csv(root / "03_prune_sweep" / "criteria_scores.csv", pd.concat([criteria, worse, *draws]))
    lora = table[table.method == "recovered-1"].assign(method="lora 100% of images, same steps")
    ways = [lora, lora.assign(method="distill 50% of images, same steps", score_percent=lora.score_percent / 2)]
    write_csv(root / "04_sft_recovery" / "recipe_scores.csv", pd.concat(ways))
    columns = {"method": ["a", "b"], "criterion": ["output_similarity", "magnitude"], "blocks_removed": [1, 1], "score": [60, 0]}
    write_csv(root / "03_prune_sweep" / "criteria.csv", pd.DataFrame(columns))
    recipes = {"recipe": ["lora", "distill"], "fraction": [1.0, 1.0], "budget": ["steps", "steps"], "score": [70, 80]}
    write_csv(root / "04_sft_recovery" / "recipes.csv", pd.DataFrame(recipes))
    heads = pd.DataFrame([{"method": "tower, tuned", "id": str(i), "cluster": str(i), "condition": CONDITIONS[i % 3],
                           "skin_type": "V", "right": i % 12 != 0} for i in range(36)])  # fmt: skip
    write_csv(root / "01_finetune" / "baselines.csv", heads)


def scores_of_run(root, method):
    table = pd.read_csv(root / "03_prune_sweep" / "criteria_scores.csv")
    return table.score_percent[table.method == method].mean()


@pytest.fixture
def played(tmp_path, monkeypatch):
    monkeypatch.setattr(study.one_by_one, "__defaults__", (play,))
    return tmp_path


def test_study_runs_what_it_can_reports_it_and_says_what_failed(played, monkeypatch, capsys):
    file = grid(played, "profile: smoke\nseed: [0, 7, 1, 2]\n")
    assert medprune(monkeypatch, "study", file, "--runs-dir", played, "--out", played / "docs" / "photos.md") == 3
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert "photos-seed7: failed: 01_finetune stopped: images are blank." in lines and "photos-seed2: done" in lines
    assert lines[-1].startswith("medprune: 1 of 4 runs failed: photos-seed7")
    text = (played / "docs" / "photos.md").read_text()
    assert "3 runs with the seeds 0, 1, 2, each on 36 test synthetic images, 72 different ones in all" in text
    assert (played / "docs" / "photos" / "report.html").stat().st_size > 10_000
    pictures = re.findall(r"\]\(<(.*?)>\)", text)
    assert len(pictures) == 2 and all((played / "docs" / name).exists() for name in pictures)
    assert str(played) not in text


def test_dry_run_only_says(played, monkeypatch, capsys):
    file = grid(played, "profile: smoke\nseed: [0, 1]\n")
    assert medprune(monkeypatch, "study", file, "--runs-dir", played, "--dry-run") == 0
    assert capsys.readouterr().out.count("would run") == 2 * len(STAGES) and len(list(played.iterdir())) == 1


def test_the_report_pairs_within_seed_and_picture_and_knows_the_baselines(tmp_path):
    roots = [tmp_path / f"s{seed}" for seed in range(4)]
    for seed, root in enumerate(roots):
        play_run(root, seed)
    sections = {s["heading"]: s for s in across.sections_over(roots)}
    methods = sections["Methods"]["table"].set_index("method")
    assert "pruned-0" not in methods.index and methods.n_runs.eq(4).all()
    # pictures of one name differ between even and odd seeds, and are the same within
    assert methods.n_images.eq(72).all() and methods.loc["original", "weight_bytes"] == 2**20
    assert methods.open["original"] == pytest.approx(methods.score["original"] * 0.7 / 0.85)
    names = sections["Names given right"]["table"].set_index("method")
    assert names.right["tower, tuned"] == pytest.approx(100 * 33 / 36)
    told = sections["Names against the original"]["table"]
    row = told[(told.a == "original") & (told.b == "tower, tuned")].iloc[0]
    assert row["diff"] == pytest.approx(names.right["original"] - names.right["tower, tuned"]) and row.n == 144
    loss = told[told.a == "pruned-1"].iloc[0]
    assert loss.b == "original" and loss.high < 0 and loss.n_runs == 4
    seeds = sections["What differs from run to run"]["table"]
    assert seeds.removed_1.tolist() == ["4", "5", "6", "7"] and seeds.ways_back[0] == "distill 80, lora 70"
    harm = sections["Who harms the worst group least"]["text"]
    assert "1 block removed, by criterion: In the worst group" in harm and "output_similarity" not in harm.split("by method")[1]
    criteria = sections["Criteria"]["table"].set_index("criterion")
    assert list(criteria.index) == ["output_similarity", "random", "magnitude"]
    assert criteria.score["random"] == pytest.approx(37.5) and criteria.beaten["magnitude"] == "0, 0, 0, 0 of 4"
    assert criteria["diff"]["magnitude"] == pytest.approx(-criteria.score["output_similarity"])
    expected = [str(int((25 * np.arange(4) < scores_of_run(root, "pruned-1")).sum())) for root in roots]
    assert criteria.beaten["output_similarity"] == ", ".join(expected) + " of 4"
    ways = sections["Ways back"]["table"]
    assert ways["way back"].str.split().str[0].tolist() == ["lora", "distill"] and math.isnan(ways["diff"][0])
    assert ways["diff"][1] == pytest.approx(-ways.score[0] / 2) and ways.high_all[1] < 0
    assert "random" not in harm
    assert "Step against step" not in sections, "the primary comparison was not run"
    dearer = sections["What 4 bits cost a pruned model more"]["table"].set_index("method")
    assert list(dearer.index) == ["rtn"] and dearer.n_runs["rtn"] == 4
    more = dearer.costs_pruned["rtn"] - dearer.costs_original["rtn"]
    assert dearer["diff"]["rtn"] == pytest.approx(more)
    sides = {"costs_pruned": ("pruned-1", "rtn-pruned-1"), "costs_original": ("original", "rtn-original")}
    lost = {side: methods.score[a] - methods.score[b] for side, (a, b) in sides.items()}
    assert dearer.loc["rtn", list(lost)].tolist() == pytest.approx(list(lost.values()))
    by_tone = sections["Names right by skin tone"]
    assert by_tone["table"].columns[1] == "I (24 images)" and set(by_tone["csv"].group) == {"I", "V", "VI"}


def test_a_model_whose_answers_no_judge_could_read_stays_in_the_report(tmp_path):
    roots = [tmp_path / f"s{seed}" for seed in range(3)]
    for seed, root in enumerate(roots):
        play_run(root, seed, {"primary": ["awq-original", "recovered"]})
        file = root / "03_prune_sweep" / "scores.csv"
        table = pd.read_csv(file)
        write_csv(file, table.assign(score_percent=table.score_percent.where(table.method != "pruned-1")))
    across.report_over(roots, tmp_path / "out.md", "Played")
    sections = {s["heading"]: s["table"] for s in across.sections_over(roots) if "table" in s}
    methods = sections["Methods"].set_index("method")
    assert math.isnan(methods.score["pruned-1"]) and methods.unparsed["pruned-1"] == 3 * 72 and methods.score["original"] > 0
    judged = sections["Judge's score against the original"].set_index("a")
    assert math.isnan(judged["diff"]["pruned-1"]) and judged["diff"]["recovered-1"] < 0
    assert sections["Names against the original"].set_index("a")["diff"]["pruned-1"] < 0, "names need no judge"
    steps = sections["Step against step"]
    assert steps["diff"].isna().tolist() == [False, True, False]


def test_what_one_run_of_several_has_stands_without_an_interval(tmp_path):
    roots = [tmp_path / f"s{seed}" for seed in range(3)]
    for seed, root in enumerate(roots):
        play_run(root, seed)
        file = root / "05_awq_vs_bnb" / "scores.csv"
        table = pd.read_csv(file)
        write_csv(file, table[(table.method != "rtn-pruned-1") | (seed == 0)])
    sections = {s["heading"]: s["table"] for s in across.sections_over(roots) if "table" in s}
    (dearer,) = sections["What 4 bits cost a pruned model more"].to_dict("records")
    assert dearer["n_runs"] == 1 and not math.isnan(dearer["diff"]) and all(math.isnan(dearer[k]) for k in ("low", "p", "high_all"))
    row = {"method": "m", "group": "V", "score": 50.0, "low": math.nan, "high": math.nan, "n_images": 12}
    shown = across._wide(pd.DataFrame([row | {"note": "in one run alone"}, row | {"group": "VI", "note": "too small: few"}]))
    assert shown.iloc[0].tolist() == ["m", "50.0 [no interval]", "50.0 [too small]"]


def test_the_comparison_named_beforehand_comes_first_and_the_others_share_their_error(tmp_path):
    roots = [tmp_path / f"s{seed}" for seed in range(4)]
    for seed, root in enumerate(roots):
        play_run(root, seed, {"primary": ["awq-original", "recovered"]})
    table = next(s["table"] for s in across.sections_over(roots) if s["heading"] == "Step against step")
    assert table[["a", "b"]].values.tolist() == [
        ["awq-original", "recovered-1"], ["recovered-1", "pruned-1"], ["awq-original", "rtn-original"],
    ]  # fmt: skip
    assert table.p_holm[0] == table.p[0] and table.p_holm[1] >= table.p[1]
    assert table.low_all[0] == table.low[0] and table.low_all[1] < table.low[1]


def test_the_plan_found_is_compared_with_the_pipeline_and_with_uniform_awq(tmp_path):
    roots = [tmp_path / f"s{seed}" for seed in range(4)]
    for seed, root in enumerate(roots):
        play_run(root, seed)
    heading = "The plan found by the budget search"
    assert heading not in {s["heading"] for s in across.sections_over(roots)}
    for root in roots:
        table = pd.read_csv(root / "05_awq_vs_bnb" / "scores.csv")
        awq = table[table.method == "awq-original"]
        halved = awq.assign(method="awq-recovered-1", score_percent=awq.score_percent / 2)
        write_csv(root / "05_awq_vs_bnb" / "scores.csv", pd.concat([table, halved]))
        write_csv(root / "07_budget_search" / "scores.csv", awq.assign(method="found"))
        write_csv(root / "07_budget_search" / "search.csv", pd.DataFrame({"method": ["found"], "stored_bytes": [2**19]}))
    sections = {s["heading"]: s["table"] for s in across.sections_over(roots) if "table" in s}
    table, methods = sections[heading], sections["Methods"].set_index("method")
    assert table[["a", "b", "n_runs"]].values.tolist() == [["found", "awq-recovered-1", 4], ["found", "awq-original", 4]]
    assert table["diff"].tolist() == [pytest.approx(methods.score["found"] / 2), 0] and table.low[0] > 0
    assert methods.weight_bytes["found"] == 2**19


def test_runs_that_differ_by_more_than_seed_stand_apart_and_are_compared(tmp_path):
    roots = [tmp_path / f"s{seed}-{n}" for seed in range(3) for n in (4, 5)]
    for root in roots:
        play_run(root, int(root.name[1]), {"sft_steps": int(root.name[-1])})
    judged = {s["heading"]: s for s in across.sections_over(roots)}["Judge's score against the original"]["table"]
    pairs = set(zip(judged.a, judged.b, strict=True))
    assert ("pruned-1 (sft_steps 4)", "original (sft_steps 4)") in pairs
    assert ("original (sft_steps 5)", "original (sft_steps 4)") in pairs
    assert ("pruned-1 (sft_steps 5)", "original (sft_steps 4)") not in pairs


def test_a_run_that_is_not_finished_or_a_baseline_of_another_image_is_refused(tmp_path):
    play_run(tmp_path / "a", 0)
    file = tmp_path / "a" / "01_finetune" / "baselines.csv"
    table = pd.read_csv(file, dtype=str)
    write_csv(file, table.assign(cluster=table.cluster.replace("3", "elsewhere")))
    with pytest.raises(ValueError, match="baselines.csv has the image 'elsewhere'"):
        across.sections_over([tmp_path / "a"])
    (tmp_path / "a" / "06_judge_eval" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="'a' has no finished 06_judge_eval"):
        across.sections_over([tmp_path / "a"])
    with pytest.raises(ValueError, match="no finished run"):
        across.sections_over([])


class Terminal:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_a_terminal_shows_one_line_a_run(monkeypatch):
    screen = Terminal()
    board = study.Board(screen)
    with board.bars():
        print("before any run", file=sys.stderr)
    assert screen.text == ""
    board.say("a", "01: running")
    with board.bars():
        print("  answers:  50%|##\r  answers: 100%|####\n", file=sys.stderr, end="")
    board.say("b", "02: running")
    board.say("b", "02: running")
    assert screen.text.count("\n") == 4 and "\x1b[1A\r\x1b[Ka: answers: 100%|####\n" in screen.text
    assert screen.text.endswith("\x1b[1A\r\x1b[Ka: answers: 100%|####\n\r\x1b[Kb: 02: running\n")
    monkeypatch.setattr(study.shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((20, 5)))
    board.say("b", "03: running, as it has not been finished")
    assert screen.text.endswith("\x1b[Kb: 03: running, as \n"), "a line that wraps would be two"


# ---- on Ray
def play_and_die_once(task, say=lambda line: None):
    """As `play`; the first try at seed 1 kills its worker, as a machine that is switched off does."""
    mark = task.root.with_name(f"{task.name}.tried")
    if task.settings["seed"] == 1 and not mark.exists():
        write_text(mark, "")
        os._exit(1)
    time.sleep(0.5)
    return play(task, say)


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'medprune[ray]'")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    here = str(Path(__file__).parent)
    path = os.pathsep.join([str(Path(here).parent), here])
    ray.init(address=nodes.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    yield ray
    ray.shutdown()
    nodes.shutdown()


def test_on_ray_with_a_worker_killed_the_tables_are_those_of_the_serial_run(cluster, tmp_path):
    runs, said = {}, []
    for where in ("serial", "ray"):
        (tmp_path / where).mkdir()
        tasks = [study.Task(f"s{seed}", "smoke", {"seed": seed}, str(tmp_path / where)) for seed in (0, 1, 2, 7)]
        if where == "serial":
            made = study.one_by_one(tasks, lambda *line: None, play)
        else:
            made = study.on_ray(tasks, lambda *line: said.append(line), play_and_die_once, num_cpus=1)
        found = {task.name: error for task, error in made}
        assert found == {"s0": "", "s1": "", "s2": "", "s7": "01_finetune stopped: images are blank."}
        across.report_over([t.root for t in tasks if not found[t.name]], tmp_path / where / "report", "t")
        runs[where] = {f.relative_to(tmp_path / where): f.read_bytes() for f in (tmp_path / where).rglob("*.csv")}
    assert (tmp_path / "ray" / "s1.tried").exists() and runs["serial"] == runs["ray"] and len(runs["ray"]) > 20


def test_on_ray_a_run_that_no_machine_can_hold_is_refused(cluster, tmp_path):
    task = study.Task("s0", "smoke", {"seed": 0}, str(tmp_path))
    with pytest.raises(ValueError, match="no machine of the cluster has what a run needs: CPU 2"):
        list(study.on_ray([task], print, play, num_cpus=2))  # there are two in all, one on each


def test_on_ray_a_run_takes_what_its_profile_was_rehearsed_with(cluster, tmp_path):
    tasks = [study.Task("s0", "t4", {"seed": 0}, str(tmp_path))]
    with pytest.raises(ValueError, match="what a run needs: GPU 1, memory 12.7 GiB, CPU 1"):
        list(study.on_ray(tasks, print, play, num_cpus=1))
    made = list(study.on_ray(tasks, lambda *_: None, play, num_cpus=1, num_gpus=0, memory=2**20))
    assert made == [(tasks[0], "")], "what is asked for is taken instead"


def test_without_ray_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'medprune\[ray\]'"):
        list(study.on_ray([], print))


def test_what_a_later_stage_changed_is_what_a_run_was_made_with(tmp_path):
    for seed in range(3):
        play_run(tmp_path / str(seed), seed, None if seed == 0 else {"finalists": 3})
    changed = MANIFEST | {"stage": STAGES[-1], "overrides": {"finalists": 3}}
    write_json(tmp_path / "0" / STAGES[-1] / "manifest.json", changed)
    across.report_over([tmp_path / str(seed) for seed in range(3)], tmp_path / "out.md", "Played")
    assert "3 runs with the seeds 0, 1, 2" in (text := (tmp_path / "out.md").read_text()) and "finalists" not in text
