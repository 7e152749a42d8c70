"""The `smoke` series under faults: kills, full and read-only disks, spoiled files, two runs of one name, wrong clocks.

After each its tables are those of an undisturbed run, to the byte but for times and memory, or one sentence names the
file and says what to do. It takes many minutes, so `make faults` runs it and `make test` does not. MEDPRUNE_FAULTS_RUNS
may name a folder with finished runs `undisturbed` and `other` (`-p seed 1`) of this very code, to save making them.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from medprune.runs import series
from medprune.settings import REPO, STAGES
from medprune.store import read_manifest

pytestmark = pytest.mark.skipif(os.environ.get("MEDPRUNE_FAULTS") != "all", reason="make faults runs it")
KILLS = int(os.environ.get("MEDPRUNE_KILLS", 20))
LONGEST_S = 30  # between two kills
GUARD = Path(__file__).parent / "guard"
# Equal time trains as long as something else took, which is never the same; fewer ways and methods, for time.
GIVEN = {"equal_time": False, "recipes": ["lora"], "data_fractions": [1.0], "methods": ["awq", "rtn"]}
SET = ("--profile", "smoke", *(word for name, value in GIVEN.items() for word in ("-p", name, json.dumps(value))))
MEASURED = ("_s", "seconds", "ms_per_token", "peak_bytes")


def command(root, *words):
    return [sys.executable, "-m", "medprune", "run", "--name", root.name, "--runs-dir", str(root.parent), *SET, *words]


def around(root, **more):
    """Return the environment of a run: guarded against the network, with a cache of hashes of its own."""
    path = os.pathsep.join([str(GUARD), str(REPO), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "MEDPRUNE_NETWORK_LOG": str(root.parent / "network.log"), "MEDPRUNE_CACHE": str(root.parent / "cache")}
    return os.environ | own | {k: str(v) for k, v in more.items()}


def start(root, said, *words, **more):
    """Start the series; what it says goes to the file `said`."""
    with said.open("w") as log:
        return subprocess.Popen(command(root, *words), cwd=REPO, env=around(root, **more), start_new_session=True, stdout=log, stderr=log)


def run(root, *words, **more):
    """Run the series; return (status, the last line that it said)."""
    done = subprocess.run(command(root, *words), cwd=REPO, env=around(root, **more), text=True, capture_output=True, timeout=3000)
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def numbers(root, stages=STAGES):
    """Return what a run found, as {file: text}: every table but its measured columns, orders, plans and splits."""
    found = {}
    for stage in stages:
        for file in (root / stage).glob("*.csv"):
            table = pd.read_csv(file, dtype=str, keep_default_na=False, lineterminator="\n")
            kept = [c for c in table if not c.endswith(MEASURED)]
            found[f"{stage}/{file.name}"] = table[kept].to_csv(index=False)
        for file in [*(root / stage).glob("plans/*.json"), *(root / stage).glob("[rs]*.json")]:
            found[str(file.relative_to(root))] = file.read_text()
        for file in (root / stage).glob("*/model.safetensors"):
            found[str(file.relative_to(root))] = file.read_bytes()
    return found


def differing(root, undisturbed, stages=STAGES):
    one, other = numbers(root, stages), numbers(undisturbed, stages)
    assert one.keys() == other.keys() and len(one) >= 2 * len(stages)
    return [name for name in one if one[name] != other[name]]


def finished(tmp_path_factory, name, *words):
    home = os.environ.get("MEDPRUNE_FAULTS_RUNS")
    root = (Path(home) if home else tmp_path_factory.mktemp("runs")) / name
    status, said = run(root, *words)
    assert status == 0, said
    return root


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return finished(tmp_path_factory, "undisturbed")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return finished(tmp_path_factory, "other", "-p", "seed", "1")


def end(process, whole_tree):
    """Kill a run, its kernel too or its own process alone; in either case its kernel is gone when this returns."""
    main = psutil.Process(process.pid)
    kernels = main.children(recursive=True)
    for victim in [*(kernels if whole_tree else []), main]:
        victim.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(kernels, timeout=60)
    assert not alive, "a kernel outlived its run"


def test_killed_again_and_again_it_ends_with_the_same_tables(undisturbed, tmp_path, counted):
    """At random moments, every other time with a clock that is years off, and once with another run of its name beside."""
    draw, root, log, kills = random.Random(), tmp_path / "killed", tmp_path / "said.txt", 0
    while kills < KILLS:
        process = start(root, log, MEDPRUNE_CLOCK_S=draw.choice([-3e8, 0, 0, 3e8]) * draw.random())
        if kills == 0:
            while not (root / ".holder.json").exists():
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            status, said = run(root)
            assert status == 2 and said.startswith("medprune: run 'killed' is being written by process"), said
            counted("second run of one name refused")
        try:
            process.wait(draw.uniform(3, LONGEST_S))
        except subprocess.TimeoutExpired:
            end(process, whole_tree=draw.random() < 0.6)
            kills += 1
            counted("kills")
        else:  # it came to its end, so that another is begun
            assert process.returncode == 0, log.read_text()
            assert not differing(root, undisturbed)
            shutil.rmtree(root)
    status, said = run(root)
    assert status == 0, said
    assert not differing(root, undisturbed)
    assert run(root) == (0, f"{STAGES[-1]}: done")


def test_no_socket_but_loopback_was_opened(undisturbed):
    log = undisturbed.parent / "network.log"
    assert not log.exists(), log.read_text()


# ---- disks
def mounted(folder, *options):
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")


def copy_up_to(undisturbed, root, stage):
    """Lay out a run as it was before a stage began, its units too."""
    before = STAGES[: STAGES.index(stage)]
    for name in before:
        shutil.copytree(undisturbed / name, root / name)
    if before:
        shutil.copyfile(undisturbed / "run.json", root / "run.json")
        shutil.copyfile(undisturbed / "units.sqlite", root / "units.sqlite")
        used = {context for name in before for context in read_manifest(root, name)["contexts"]}
        with sqlite3.connect(root / "units.sqlite") as base:
            base.execute(f"DELETE FROM units WHERE context NOT IN ({', '.join('?' * len(used))})", sorted(used))
        base.close()


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_one_sentence_and_with_room_it_goes_on(undisturbed, tmp_path, counted, stage):
    home = tmp_path / "disk"
    mounted(home, "-t", "tmpfs", "-o", "size=200m", "tmpfs")
    try:
        copy_up_to(undisturbed, home / "full", stage)
        wrote = sum(f.stat().st_size for f in (undisturbed / stage).rglob("*") if f.is_file())
        room = shutil.disk_usage(home).used + int(wrote * random.uniform(0.1, 0.6))
        subprocess.run(["mount", "-o", f"remount,size={room}", str(home)], check=True)
        cache = {"MEDPRUNE_CACHE": tmp_path / "cache", "MEDPRUNE_NETWORK_LOG": tmp_path / "network.log"}
        status, said = run(home / "full", **cache)
        assert status == 2 and said.startswith("medprune: ") and str(home) in said and said.endswith("."), said
        assert any(words in said for words in ("No space left", "disk is full")), said
        assert not (home / "full" / stage / "manifest.json").exists()
        counted("full disks")
        subprocess.run(["mount", "-o", "remount,size=200m", str(home)], check=True)
        process = start(home / "full", tmp_path / "said.txt", **cache)
        while process.poll() is None and not (home / "full" / stage / "manifest.json").exists():
            time.sleep(0.2)
        if process.poll() is None:
            end(process, whole_tree=True)
        assert (home / "full" / stage / "manifest.json").exists(), (tmp_path / "said.txt").read_text()
        assert not differing(home / "full", undisturbed, STAGES[: STAGES.index(stage) + 1])
    finally:
        subprocess.run(["umount", "-l", str(home)], check=True)


def test_a_read_only_folder_is_one_sentence(undisturbed, tmp_path, counted):
    home = tmp_path / "runs"
    shutil.copytree(undisturbed, home / "demo")
    mounted(home, "--bind", str(home))
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(home)], check=True)
        places = {"MEDPRUNE_CACHE": tmp_path / "cache", "MEDPRUNE_NETWORK_LOG": tmp_path / "network.log"}
        for name, words in (("demo", ()), ("demo", ("-p", "group_size", "32")), ("new", ())):
            status, said = run(home / name, *words, **places)
            assert status == 2 and str(home) in said and "Read-only file system" in said and said.endswith("."), said
            counted("read-only folders")
    finally:
        subprocess.run(["umount", "-l", str(home)], check=True)
    assert not differing(home / "demo", undisturbed)


# ---- files
def edited(whole: bytes) -> bytes | None:
    """Return a table or text with one digit changed, as long as before."""
    at = next((i for i in range(len(whole) // 2, len(whole)) if whole[i : i + 1].isdigit()), None)
    return None if at is None else whole[:at] + (b"1" if whole[at : at + 1] != b"1" else b"2") + whole[at + 1 :]


SPOIL = {
    "truncated": lambda whole, place, other: whole[: len(whole) // 2] if whole else None,
    "emptied": lambda whole, place, other: b"" if whole else None,
    "replaced": lambda whole, place, other: (other / place).read_bytes() if (other / place).exists() else None,
    "edited": lambda whole, place, other: edited(whole) if place.suffix in (".csv", ".json") else None,
}


def ask(root):
    """Return ("would run", why), ("done", "") or ("refused", the sentence) of a run, without starting anything."""
    lines = []
    try:
        series.run_series(root.name, "smoke", None, GIVEN, str(root.parent), lines.append, dry_run=True)
    except (ValueError, OSError) as error:
        return "refused", str(error)
    undone = [line for line in lines if "would run" in line]
    return ("would run", undone[0]) if undone else ("done", "")


def files_of(root):
    return sorted(f.relative_to(root) for f in root.rglob("*") if f.is_file() and f.name != ".lock")


def test_every_file_spoiled_is_noticed(undisturbed, other, tmp_path, counted, monkeypatch):
    """A stage that would run again makes it anew; what goes unnoticed is read by nothing that makes a table."""
    monkeypatch.setenv("MEDPRUNE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "spoiled"
    shutil.copytree(undisturbed, root)
    assert ask(root)[0] == "done"
    unnoticed, outcomes = set(), {}
    for place in files_of(root):
        whole = (root / place).read_bytes()
        for how, spoil in SPOIL.items():
            data = spoil(whole, place, other)
            if data is None or data == whole:
                continue
            (root / place).write_bytes(data)
            kind, said = ask(root)
            outcomes[kind] = outcomes.get(kind, 0) + 1
            if kind == "refused":
                assert str(root / place) in said and "again" in said and len(said.splitlines()) == 1, (place, how, said)
            elif kind == "done":
                unnoticed.add(place.name)
            counted(f"files {how}")
        (root / place).write_bytes(whole)
    assert unnoticed <= {f"{stage}.ipynb" for stage in STAGES} | {"units.sqlite", "run.json"}, unnoticed
    assert ask(root)[0] == "done", "what is put back is as it was"
    print(outcomes)


@pytest.mark.parametrize("how", ["truncated", "replaced"])
def test_a_run_with_a_spoiled_file_in_every_stage_mends_itself(undisturbed, other, tmp_path, counted, how):
    draw, root = random.Random(), tmp_path / "mended"
    shutil.copytree(undisturbed, root)
    for stage in STAGES:
        there = [p for p in files_of(root) if p.parts[0] == stage and p.suffix in (".csv", ".json", ".safetensors", ".png")]
        named = [p for p in there if p.name != "manifest.json"]
        draw.shuffle(named)
        for place in named:
            whole = (root / place).read_bytes()
            data = SPOIL[how](whole, place, other)
            if data not in (None, whole):
                (root / place).write_bytes(data)
                break
    status, said = run(root)
    assert status == 0, said
    assert not differing(root, undisturbed)
    counted("spoiled runs mended", 1)


@pytest.mark.parametrize("name", ["units.sqlite", f"{STAGES[2]}/manifest.json"])
def test_what_the_sentence_says_to_do_helps(undisturbed, tmp_path, counted, name):
    root = tmp_path / "told"
    shutil.copytree(undisturbed, root)
    (root / name).write_bytes(b"{" * 5000)
    if name == "units.sqlite":
        (root / STAGES[2] / "sweep.csv").unlink()
    status, said = run(root)
    assert status == 2 and str(root / name) in said and "remove it" in said, said
    (root / name).unlink()
    status, said = run(root)
    assert status == 0, said
    assert not differing(root, undisturbed)
    counted("advice followed")


def test_a_wrong_clock_changes_nothing(undisturbed, tmp_path, counted, monkeypatch):
    monkeypatch.setenv("MEDPRUNE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "clock"
    shutil.copytree(undisturbed, root)
    for years in (-30, 30):
        for place in files_of(root):
            os.utime(root / place, (time.time() + years * 3e7,) * 2)
        assert ask(root) == ("done", "")
        counted("clock jumps")
