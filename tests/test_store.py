"""What a run keeps: hashes of what was read, folders that say what they were made from, units that survive, locks."""

import ast
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from medprune import store
from medprune.data import synthetic
from medprune.data.questions import load_conditions
from medprune.data.records import check_training, gather_images
from medprune.runs.hosted import bring_run
from medprune.runs.series import check_run
from medprune.settings import REPO, STAGES, asked, resolve
from medprune.store import (
    Run,
    Units,
    check_new,
    code,
    content,
    context,
    fingerprint,
    finish,
    hash_of_code,
    lock,
    made,
    open_stage,
    read_json,
    run_root,
    unlock,
    visible_files,
    why_undone,
    write_folder,
    write_json,
    write_text,
)


# ---- hashes
def test_content_is_of_bytes_and_names_and_not_of_places_or_times(tmp_path):
    for home in ("a", "b"):
        write_text(tmp_path / home / "x" / "1.txt", "one")
        write_text(tmp_path / home / "README.md", home)
    before = content(tmp_path / "a")
    assert before == content(tmp_path / "b") and fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "a" / "x" / "1.txt").write_text("two")  # in place, of the same size
    assert content(tmp_path / "a") != before
    (tmp_path / "b" / "x" / "1.txt").rename(tmp_path / "b" / "x" / "2.txt")
    assert content(tmp_path / "b") != before
    os.mkfifo(tmp_path / "pipe")
    assert {content(tmp_path / name) for name in ("nowhere", "x" * 300, "pipe")} == {"absent"}


def test_content_of_a_folder_is_of_what_is_found_in_it(tmp_path):
    """Through links too, which are not followed in circles, and without hidden files."""
    write_text(tmp_path / "elsewhere" / "1.txt", "one")
    write_text(tmp_path / "other" / "2.txt", "two")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "x").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "y").symlink_to(tmp_path / "elsewhere")
    assert visible_files(tmp_path / "a") == [tmp_path / "a" / "linked" / name for name in ("1.txt", "x/2.txt")]
    before = content(tmp_path / "a")
    write_text(tmp_path / "a" / ".DS_Store", "x")
    write_text(tmp_path / "a" / ".thumbnails" / "3.txt", "x")
    assert content(tmp_path / "a") == before
    write_text(tmp_path / "elsewhere" / "1.txt", "three")
    assert content(tmp_path / "a") != before


def test_a_large_file_is_read_once_also_by_another_process(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDPRUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "weights").write_bytes(os.urandom(3 * 2**20))
    found = content(tmp_path / "weights")
    store._content.cache_clear()  # as in another process
    monkeypatch.setattr(store, "_digest", lambda *_: pytest.fail("it was read again"))
    assert content(tmp_path / "weights") == found
    monkeypatch.undo()
    monkeypatch.setenv("MEDPRUNE_CACHE", str(tmp_path / "cache"))
    with open(tmp_path / "weights", "r+b") as f:
        f.write(b"other")
    assert content(tmp_path / "weights") != found


@pytest.mark.parametrize(("other", "same"), [
    ("def f(x):\n    return x + 1\n", False),
    ('def f(x):\n    """What it does."""\n    # why\n    return (x - 1)\n', True),
    ("def f(x):\n    return x - 1\n\n\ng = 2\n", False),
])  # fmt: skip
def test_code_counts_and_its_comments_do_not(other, same):
    code = "def f(x):\n    '''Old words.'''\n    return x - 1\n"
    assert (hash_of_code(ast.parse(code)) == hash_of_code(ast.parse(other))) is same


def test_a_unit_depends_on_the_code_that_its_module_imports(monkeypatch):
    before, elsewhere = context("medprune.pruning.leave_one_out", 1), context("medprune.results.stats", 1)
    assert before == context("medprune.pruning.leave_one_out", 1) != context("medprune.pruning.leave_one_out", 2)
    source = store._source.__wrapped__
    changed = "medprune.answers.prompts"
    monkeypatch.setattr(store, "_source", lambda m: ("changed", source(m)[1]) if m == changed else source(m))
    assert context("medprune.pruning.leave_one_out", 1) != before
    assert context("medprune.results.stats", 1) == elsewhere


def test_versions_of_libraries_count(monkeypatch):
    before = context("medprune.results.stats")
    monkeypatch.setattr(store, "versions", lambda: {"torch": "9"})
    assert context("medprune.results.stats") != before


# ---- files and folders
def test_a_folder_is_taken_for_what_it_was_made_from_alone(tmp_path):
    """Settings A, B, A: the folder holds B, and is not A's."""
    for mark in ("a", "b"):
        with write_folder(tmp_path / "model", context=mark, loss=mark) as folder:
            write_text(folder / "weights", mark)
    assert made(tmp_path / "model", "a") is None
    assert made(tmp_path / "model", "b")["loss"] == "b"
    assert made(tmp_path / "none", "b") is None
    (tmp_path / "bare").mkdir()
    assert made(tmp_path / "bare", "b") is None
    assert content(tmp_path / "model") == content(tmp_path / "model")


def test_a_folder_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    with write_folder(tmp_path / "model", context="a") as folder:
        write_text(folder / "weights", "whole")
    with pytest.raises(OSError, match="full"), write_folder(tmp_path / "model", context="b") as folder:
        write_text(folder / "weights", "half")
        raise OSError("the disk is full")
    assert made(tmp_path / "model", "a") and [f.name for f in tmp_path.iterdir()] == ["model"]


def test_a_killed_process_of_the_same_number_is_in_nobody_s_way(tmp_path):
    write_text(tmp_path / "model" / "weights", "old")
    for end in ("tmp", "old"):
        write_text(tmp_path / f".model.{os.getpid()}.{end}" / "left", "half")
    with write_folder(tmp_path / "model") as folder:
        write_text(folder / "weights", "new")
    assert [f.name for f in tmp_path.rglob("*")] == ["model", "weights"]


def test_a_new_folder_is_tried_before_it_is_written(tmp_path):
    assert check_new(tmp_path / "a" / "b") == tmp_path / "a" / "b" and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="is there already"):
        check_new(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/a/b cannot be written \(Not a directory\): name a folder elsewhere."):
        check_new(tmp_path / "file" / "a" / "b")


def _write_many(path, text):
    for _ in range(100):
        write_text(path, text * 500)


def test_two_writers_of_one_file_leave_a_whole_one(tmp_path):
    writers = [multiprocessing.Process(target=_write_many, args=(tmp_path / "table.csv", word)) for word in "ab"]
    [w.start() for w in writers]
    [w.join() for w in writers]
    assert [w.exitcode for w in writers] == [0, 0]
    assert (tmp_path / "table.csv").read_text() in ("a" * 500, "b" * 500) and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"settings": {')
    with pytest.raises(ValueError, match=r"run\.json is not JSON .*run its notebook again"):
        read_json(tmp_path / "run.json")


# ---- units
def _add_many(path, name, count=150):
    units = Units(path, "c")
    for i in range(count):
        units.add(f"{name} {i}", "x" * 9000)


def test_several_processes_write_units_at_once(tmp_path):
    path = tmp_path / "units.sqlite"
    writers = [multiprocessing.Process(target=_add_many, args=(path, name)) for name in "abc"]
    [w.start() for w in writers]
    seen = 0
    while any(w.is_alive() for w in writers):
        now = len(Units(path, "c"))
        assert now >= seen
        seen = now
    assert [w.exitcode for w in writers] == [0, 0, 0]
    assert len(Units(path, "c")) == 450 and Units(path, "c")["b 149"] == "x" * 9000


def test_a_kill_leaves_units_that_can_be_read(tmp_path):
    path = tmp_path / "units.sqlite"
    writer = multiprocessing.Process(target=_add_many, args=(path, "a", 100_000))
    writer.start()
    while not (path.exists() and len(Units(path, "c")) > 5):
        time.sleep(0.001)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    units = Units(path, "c")
    held = len(units)
    assert 5 < held < 100_000 and all(units[f"a {i}"] == "x" * 9000 for i in range(held))
    units.add("after", [1])
    assert units["after"] == [1] and "after" in units and "before" not in units
    assert "after" not in Units(path, "another context")


def disk_of(monkeypatch, pages):
    """Let no database grow beyond these pages, as on a full disk."""
    connect = sqlite3.connect

    def full(*arguments, **options):
        base = connect(*arguments, **options)
        base.execute(f"PRAGMA max_page_count = {pages}")
        return base

    monkeypatch.setattr(sqlite3, "connect", full)


def test_what_was_computed_together_is_kept_together_or_not_at_all(tmp_path, monkeypatch):
    units = Units(tmp_path / "units.sqlite", "c")
    units.add_all({})
    units.add_all({"one": 1, "two": [2]})
    assert units["one"] == 1 and units["two"] == [2] and len(units) == 2
    disk_of(monkeypatch, pages=8)
    with pytest.raises(OSError, match="database or disk is full"):
        units.add_all({"three": "x" * 5_000, "four": "x" * 100_000})
    monkeypatch.undo()
    assert "three" not in units and len(units) == 2


def test_a_full_disk_is_one_sentence_and_keeps_what_there_is(tmp_path, monkeypatch):
    units = Units(tmp_path / "units.sqlite", "c")
    units.add("one", 1)
    disk_of(monkeypatch, pages=4)
    with pytest.raises(OSError, match=r"units\.sqlite cannot be used: database or disk is full; make room"):
        units.add("two", "x" * 100_000)
    monkeypatch.undo()
    units.add("three", 3)
    assert units["one"] == 1 and "two" not in units and units["three"] == 3


def test_a_broken_file_of_units_is_named(tmp_path):
    (tmp_path / "units.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(OSError, match=r"units\.sqlite cannot be used: file is not a database; remove it"):
        Units(tmp_path / "units.sqlite", "c")


def test_a_unit_whose_text_is_damaged_names_its_file(tmp_path):
    units = Units(tmp_path / "units.sqlite", "c")
    units.add("one", 1)
    units._ask("UPDATE units SET value = ?", "{")
    with pytest.raises(ValueError, match=r"units\.sqlite is damaged at 'one': remove it, and what it held is done again"):
        units["one"]


# ---- runs
@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "-p", ".hidden", "x" * 300, None])
def test_a_run_has_a_plain_name(tmp_path, name):
    with pytest.raises(ValueError, match=r"run_name=.* must be a plain folder name"):
        run_root("" if name is None else name, str(tmp_path))


def test_a_number_is_a_name_too(tmp_path):
    assert run_root(7, str(tmp_path)) == tmp_path / "7"
    assert run_root("Röntgen 1", str(tmp_path)) == tmp_path / "Röntgen 1"


def play(root, stage, **given):
    """Do what a notebook does: open, read earlier stages' files, write, finish."""
    run, config = open_stage(stage, root.name, str(root.parent), "smoke" if stage == STAGES[0] else "auto", **given)
    for earlier in STAGES[: STAGES.index(stage)]:
        run.read(earlier, "out.json")
    run.contexts.add(f"of {stage}")
    write_json(run.dir / "out.json", {"settings": store.values_of(config)})
    finish(run, {"score": 1})
    return config


@pytest.fixture
def played(tmp_path):
    for stage in STAGES:
        play(tmp_path / "demo", stage)
    return tmp_path / "demo"


def settings_of(root):
    return read_json(root / "run.json")["settings"]


def test_a_finished_run_is_done(played):
    assert [why_undone(played, stage, settings_of(played)) for stage in STAGES] == [[]] * len(STAGES)


def test_settings_of_notebook_01_reach_every_stage_that_reads_them(tmp_path):
    root = tmp_path / "demo"
    play(root, STAGES[0], lora_r=4, learning_rate=1e-3, base="tiny", seed=3)
    for stage in STAGES[1:]:
        config = play(root, stage, **({"blocks_removed": [0, 1, 3]} if stage == "03_prune_sweep" else {}))
        assert config.seed == 3
        if stage == "04_sft_recovery":
            assert (config.lora_r, config.learning_rate, config.blocks_removed) == (4, 1e-3, (0, 1, 3))
            assert config.recover == (1,)  # those of the profile that notebook 03 was left with
        if stage == "05_awq_vs_bnb":
            assert (config.base, config.recover) == ("tiny", (1,))


def test_null_is_a_value_where_it_is_given_by_hand_and_nothing_in_a_notebook_s_cell():
    photographs = {"images": str(REPO / "data")}
    assert resolve("smoke", photographs).n_train == resolve("smoke", photographs, n_train=None).n_train == 24
    assert resolve("smoke", photographs | {"n_train": None}).n_train is None
    assert asked(*[{"n_train": None, "seed": "null"}, {"n_test": None}]) == {"n_train": None, "seed": None}
    with pytest.raises(ValueError, match="seed=None must be a valid integer"):
        resolve("smoke", {"seed": None})


def test_a_path_is_made_absolute_and_a_word_stays_one(tmp_path, monkeypatch):
    for name in ("photos", "server", "minilm", "synthetic", "tiny"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    monkeypatch.setenv("PWD", str(tmp_path / "photos"))
    for given in (".", "./", "../photos", str(tmp_path / "photos"), str(tmp_path / "server" / ".." / "photos")):
        assert asked({"images": given}, {}) == {"images": str(tmp_path / "photos")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    words = {"images": "synthetic", "base": "tiny", "embedding": "minilm", "judge": "server"}
    assert asked(words, {}) == words
    assert asked({"judge": "./server"}, {}) == {"judge": str(tmp_path / "server")}


def test_a_setting_that_a_stage_has_not_declared_cannot_be_read(tmp_path):
    config = play(tmp_path / "demo", STAGES[0])
    with pytest.raises(AttributeError, match="01_finetune reads the setting 'group_size': say so"):
        config.group_size  # noqa: B018
    with pytest.raises(AttributeError, match="read-only"):
        config.seed = 1


@pytest.mark.parametrize(("break_it", "stages", "words"), [
    (lambda root: (root / STAGES[0] / "out.json").write_text("{}"), STAGES, "out.json"),
    (lambda root: (root / STAGES[3] / "out.json").write_text('{"other": 1234567}'), STAGES[3:], "out.json"),
    (lambda root: (root / STAGES[5] / "metrics.json").unlink(), STAGES[5:6], "gone or not what it wrote"),
    (lambda root: (root / STAGES[2] / "manifest.json").unlink(), STAGES[2:3], "not been finished"),
])  # fmt: skip
def test_a_changed_result_undoes_its_stage_and_those_that_read_it(played, break_it, stages, words):
    break_it(played)
    undone = {stage: why_undone(played, stage, settings_of(played)) for stage in STAGES}
    assert {stage for stage, reasons in undone.items() if reasons} == set(stages)
    assert words in "; ".join(undone[stages[0]])


def test_settings_code_and_versions_undo_a_stage(played, monkeypatch):
    changed = settings_of(played) | {"group_size": 32}
    reasons = [why_undone(played, stage, changed) for stage in STAGES]
    assert reasons == [[], [], [], [], ["group_size was 64 and is 32"], [], ["group_size was 64 and is 32"], []]
    monkeypatch.setattr(store, "stage_code", lambda stage: "other")
    assert why_undone(played, STAGES[0], settings_of(played)) == ["its code has changed"]
    monkeypatch.undo()
    monkeypatch.setattr(store, "versions", lambda: dict(read_json(played / STAGES[0] / "manifest.json")["versions"], torch="9"))
    assert "torch was" in why_undone(played, STAGES[0], settings_of(played))[0]


def test_pictures_and_facts_undo_every_stage_that_reads_them(tmp_path):
    facts = json.loads((store.DATA / "conditions.json").read_text())
    write_json(tmp_path / "facts.json", facts)
    write_text(tmp_path / "photos" / "rosacea" / "1.jpg", "pixels")
    root = tmp_path / "demo"
    for stage in STAGES:
        paths = {"images": str(tmp_path / "photos"), "settings": {"conditions": str(tmp_path / "facts.json")}}
        play(root, stage, **(paths if stage == STAGES[0] else {}))
    undone = lambda: [bool(why_undone(root, stage, settings_of(root))) for stage in STAGES]  # noqa: E731
    assert undone() == [False] * len(STAGES)
    write_text(tmp_path / "photos" / "rosacea" / "1.jpg", "PIXELS")
    assert undone() == [True, False, False, False, False, True, True, False]  # the others read what 01 makes of them
    write_text(tmp_path / "photos" / "rosacea" / "1.jpg", "pixels")
    assert undone() == [False] * len(STAGES)
    write_json(tmp_path / "facts.json", facts | {"another": {}})
    assert undone() == [True] * len(STAGES)


@pytest.mark.parametrize(("name", "there"), [("c.png", "c.png"), ("c", "c.jpg"), ("bad.png", "bad.png")])
def test_a_listed_picture_that_is_put_right_undoes_the_stage(tmp_path, name, there):
    conditions, drawn = load_conditions(), [synthetic.draw("rosacea", n, 64)[0] for n in range(3)]
    for n in range(2):
        drawn[n].save(tmp_path / f"{n}.png")
    write_text(tmp_path / "bad.png", "no picture")
    write_text(tmp_path / "t.csv", f"path,condition\n0.png,rosacea\n1.png,rosacea\n{name},rosacea\n")
    run, config = open_stage(STAGES[0], "r", str(tmp_path / "runs"), "smoke", images=str(tmp_path / "t.csv"))
    assert len(gather_images(config, run, conditions)[0]) == 2
    finish(run, {})
    whole = read_json(run.root / "run.json")["settings"]
    assert why_undone(run.root, STAGES[0], whole) == []
    drawn[2].save(tmp_path / there)
    assert why_undone(run.root, STAGES[0], whole) == [f"{tmp_path / there} has changed"]


def test_too_few_training_pictures_for_05_and_07_are_refused_in_01(tmp_path):
    """Where they are split, and as far as can be told before a notebook is started."""
    for name in ("rosacea", "psoriasis"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for n in range(4):
            synthetic.draw(name, n, 64)[0].save(tmp_path / "photos" / name / f"{n}.png")
    given = {"images": str(tmp_path / "photos"), "awq_rows": 6}
    run, config = open_stage(STAGES[0], "r", str(tmp_path / "runs"), "smoke", given)
    records, _ = gather_images(config, run, load_conditions())
    check_training(records, run)
    words = "photos has {} pictures to train on, but {} are needed, awq_rows={} to quantize by and 2 to search with"
    with pytest.raises(ValueError, match=words.format(7, 8, 6)):
        check_training(records[:7], run)
    with pytest.raises(ValueError, match="photos shows psoriasis alone to train on: two conditions are needed"):
        check_training([r for r in records if r.condition == "psoriasis"], run)
    check_run(resolve("smoke", given))
    with pytest.raises(ValueError, match=words.format(8, 9, 7)):
        check_run(resolve("smoke", given | {"awq_rows": 7}))
    with pytest.raises(ValueError, match="awq_rows=23 must be at most 22, for n_train=24"):
        resolve("smoke", awq_rows=23)
    shutil.rmtree(tmp_path / "photos" / "rosacea")
    with pytest.raises(ValueError, match="shows psoriasis alone to train on"):
        check_run(resolve("smoke", given))


def test_a_stage_that_was_begun_again_and_killed_is_not_finished(played):
    run, _ = open_stage(STAGES[0], played.name, str(played.parent), "smoke", seed=9)
    unlock(run.root)  # as a kill does
    with pytest.raises(ValueError, match="has no finished 01_finetune: run 01_finetune first"):
        open_stage(STAGES[1], played.name, str(played.parent))


def test_a_run_keeps_its_profile(played):
    with pytest.raises(ValueError, match="was made with profile 'smoke', not 'local': pass profile='smoke'"):
        open_stage(STAGES[1], played.name, str(played.parent), "local")


def test_two_processes_cannot_write_one_run(tmp_path):
    root = tmp_path / "demo"
    holder = f"import sys; from pathlib import Path; from medprune.store import lock; lock(Path({str(root)!r})); print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"run 'demo' is being written by process {process.pid} since 20.*another run_name"):
        lock(root)
    process.kill()
    process.wait()
    lock(root)  # a lock dies with its process
    unlock(root)


# ---- runs brought from elsewhere
def test_a_run_is_brought_over_whole_and_can_be_written(tmp_path):
    source = tmp_path / "dataset" / "demo"
    Units(source / "units.sqlite", "c").add("block 3", "said")
    write_json(source / "01_finetune" / "model" / "config.json", {"a": 1})
    for path in [*source.rglob("*"), source]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = bring_run(source, "again", str(tmp_path / "runs"))
    assert root == tmp_path / "runs" / "again"
    units = Units(root / "units.sqlite", "c")
    units.add("block 4", "more")
    assert units["block 3"] == "said" and (root / "01_finetune" / "model" / "config.json").read_text() == '{\n "a": 1\n}\n'
    for path in root.rglob("*"):
        assert path.stat().st_mode & 0o200, path
    assert not list((tmp_path / "runs").glob(".*"))
    with pytest.raises(ValueError, match="holds a run already"):
        bring_run(source, "again", str(tmp_path / "runs"))


def test_a_run_that_is_moved_is_still_done(played, tmp_path):
    moved = bring_run(played, "moved", str(tmp_path / "elsewhere"))
    shutil.rmtree(played)
    assert [why_undone(moved, stage, settings_of(moved)) for stage in STAGES] == [[]] * len(STAGES)


def test_what_is_no_run_is_not_brought_over(tmp_path):
    with pytest.raises(ValueError, match="holds no 01_finetune: give the folder of a run"):
        bring_run(tmp_path, "demo", str(tmp_path / "runs"))


def test_the_hash_of_code_reaches_through_a_room():
    assert code("medprune.tuning.recovery") != code("medprune.tuning.tower")


def test_weights_go_to_scratch_and_are_found_by_their_link(tmp_path, monkeypatch):
    monkeypatch.delenv("MEDPRUNE_SCRATCH", raising=False)
    run = Run(tmp_path / "runs" / "demo", "01_finetune")
    run.dir.mkdir(parents=True)
    assert run.weights("model") == run.dir / "model" and not run.weights("model").is_symlink()
    monkeypatch.setenv("MEDPRUNE_SCRATCH", str(tmp_path / "scratch"))
    target = run.weights("model")
    assert target.is_relative_to(tmp_path / "scratch") and not target.exists() and content(run.dir / "model") == "absent"
    with write_folder(target, context="x") as folder:
        write_text(folder / "weights", "w")
    assert run.weights("model") == target and made(run.dir / "model", "x") and content(run.dir / "model") == content(target)
    other = Run(tmp_path / "elsewhere" / "demo", "01_finetune")
    other.dir.mkdir(parents=True)
    assert other.weights("model") != target, "another run of that name"
    monkeypatch.delenv("MEDPRUNE_SCRATCH")
    (run.dir / "kept").mkdir()
    monkeypatch.setenv("MEDPRUNE_SCRATCH", str(tmp_path / "scratch"))
    assert run.weights("kept") == run.dir / "kept", "what lies in the run already stays there"


# ---- what a disk or a hand may do to a run
def test_a_result_edited_by_hand_is_noticed_by_its_own_stage_and_by_the_next(played):
    file = played / STAGES[4] / "out.json"
    file.write_text(file.read_text().replace("0", "1", 1))  # as long as before
    assert why_undone(played, STAGES[4], settings_of(played)) == ["out.json of its own results is gone or not what it wrote"]
    run, _ = open_stage(STAGES[5], played.name, str(played.parent))
    with pytest.raises(ValueError, match=f"{STAGES[4]}/out.json is not as {STAGES[4]} wrote it: run {STAGES[4]} again"):
        run.read(STAGES[4], "out.json")
    unlock(run.root)


def test_weights_that_are_not_as_they_were_written_are_not_taken(tmp_path):
    with write_folder(tmp_path / "model", context="c") as folder:
        (folder / "weights").write_bytes(b"1234")
    assert made(tmp_path / "model", "c")
    (tmp_path / "model" / "weights").write_bytes(b"1235")
    assert made(tmp_path / "model", "c") is None
    (tmp_path / "model" / "weights").write_bytes(b"1234")
    assert made(tmp_path / "model", "c")
    (tmp_path / "model" / store.RECORD).write_text("{")
    assert made(tmp_path / "model", "c") is None


def test_a_manifest_that_was_edited_is_named(played):
    file = played / STAGES[1] / "manifest.json"
    whole = file.read_text()
    assert store.read_manifest(played, STAGES[1])["stage"] == STAGES[1] and '"hash": "' in whole
    for text in (whole.replace('"finished": "2', '"finished": "3'), whole.replace('"outputs": {', '"outputs": {"a": "b", ', 1)):
        file.write_text(text)
        assert text != whole
        with pytest.raises(ValueError, match=f"{STAGES[1]}/manifest.json is not as it was written: remove it, and run its notebook again"):
            store.read_manifest(played, STAGES[1])
    file.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != "hash"}))
    assert store.read_manifest(played, STAGES[1])["stage"] == STAGES[1], "older versions wrote none"


@pytest.mark.parametrize("text", ["[1]", "{}", '{"settings": 3}', "null"])
def test_a_manifest_that_is_none_is_named(played, text):
    (played / STAGES[1] / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=f"{STAGES[1]}/manifest.json holds no .*: remove it, and run its notebook again"):
        why_undone(played, STAGES[1], settings_of(played))
    (played / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json (holds no|names no)"):
        store.settings_before(played, STAGES[1])


def test_settings_that_an_older_version_did_not_write_are_the_profile_s(played):
    was = settings_of(played)
    write_json(played / "run.json", {"settings": {k: v for k, v in was.items() if k != "group_size"}})
    assert store.settings_before(played, STAGES[5]) == was


def test_a_clock_that_jumps_back_leaves_a_stage_s_time_above_0(tmp_path, monkeypatch):
    from datetime import datetime, timedelta

    class Back(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(days=400)

    run, _ = open_stage(STAGES[0], "demo", str(tmp_path), "smoke")
    monkeypatch.setattr(store, "datetime", Back)
    finish(run, {})
    assert 0 <= store.read_manifest(run.root, STAGES[0])["seconds"] < 60


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/table\.csv'"):
        write_text(tmp_path / "table.csv", "1")
    assert not list(tmp_path.iterdir())
