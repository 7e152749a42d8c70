"""The series under papermill: order, what is done already, resume, and publishing executed notebooks."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import nbformat
import pandas as pd
import papermill

from medprune.accounting import account
from medprune.artifacts import STAGES, fingerprint, open_run, read_json, write_json, write_text
from medprune.config import REPO, Profile, protected_numbers, resolve, settings
from medprune.conversations import load_conditions
from medprune.data import load_images
from medprune.durations import in_words, predict_seconds
from medprune.images import open_image
from medprune.preflight import preflight, this_device
from medprune.shapes import ASSEMBLED, base_config, shape_of

NOTEBOOKS = REPO / "notebooks"


def check_parameters(parameters: dict) -> None:
    """Refuse a name that no notebook takes, before anything starts."""
    known = set()
    for stage in STAGES:
        known |= set(papermill.inspect_notebook(str(NOTEBOOKS / f"{stage}.ipynb")))
    known -= {"profile", "run_name", "runs_dir"}  # which the command line has options for
    for name in parameters:
        if name not in known:
            raise ValueError(f"parameter {name!r} is not known: choose among {', '.join(sorted(known))}.")


def check_run(config: Profile) -> None:
    """Refuse what would only fail notebooks later: images that cannot be used, blocks or groups the base has not."""
    if config.images != "synthetic":
        _check_images(config.images, load_conditions(config.conditions))
    for name in ("n_calibration", "awq_rows"):
        if config.n_train is not None and getattr(config, name) > config.n_train:
            raise ValueError(f"{name}={getattr(config, name)} must be at most n_train={config.n_train}.")
    base = base_config(config.base)
    if base is None:
        return
    n_blocks = shape_of(base).blocks
    removable = n_blocks - len(protected_numbers(n_blocks, config.protected_blocks))
    for n in config.blocks_removed:
        if n > removable:
            raise ValueError(f"blocks_removed has {n}, but only {removable} of the model's {n_blocks} blocks may be removed.")
    for method in config.methods:
        account(base, bits=config.bits, group_size=config.group_size, method=method)
    if config.base not in ASSEMBLED:  # those fit anywhere
        table = preflight(settings(config), this_device(REPO), base)
        for row in table[~table["fits"]].itertuples():
            raise ValueError(f"{row.stage} does not fit this machine: {row.change} (`medprune preflight` shows every stage).")


def _check_images(source: str, conditions: dict) -> None:
    """Raise ValueError unless at least one picture opens; most often the first is looked at, and no other."""
    records, _ = load_images(source, conditions, check=False)
    if max(Counter(r.condition for r in records).values()) < 2:
        raise ValueError(f"{source} shows no condition twice: two images are the least, one to train on and one to test.")
    for record in records:
        try:
            open_image(record.path, max_side=64)
            return
        except ValueError:
            continue
    load_images(source, conditions)  # says what is wrong with them


def run_series(run_name: str, profile: str = "auto", start: str | None = None, parameters: dict | None = None,
               runs_dir: str | None = None, say=print) -> Path:  # fmt: skip
    """Run the notebooks in order into runs/<run_name>/, skipping what is done with the same parameters.

    start: the stage to begin at, run again even if done; stages before it must be finished. A notebook counts as done
    when it finished with these parameters and its source and every earlier stage are unchanged. Returns the run's
    folder. Raises ValueError in one sentence for what cannot be run, before any notebook starts, and for a notebook
    that stopped, with its name and its error.
    """
    parameters = parameters or {}
    if start is not None and start not in STAGES:
        raise ValueError(f"stage {start!r} is not known: choose one of {', '.join(STAGES)}.")
    check_parameters(parameters)
    shared = {k: v for k, v in parameters.items() if k in settings(resolve("smoke"))}
    config = resolve(profile, parameters.get("settings"), **shared)
    check_run(config)
    first = STAGES.index(start) if start else 0
    root = open_run(run_name, STAGES[first], config, needs=STAGES[:first], runs_dir=runs_dir).root
    seen = fingerprint(settings(resolve(config.name)))  # parameters count from the first stage that takes them
    expected = None
    for number, stage in enumerate(STAGES):
        source = NOTEBOOKS / f"{stage}.ipynb"
        takes = papermill.inspect_notebook(str(source))
        values = {"profile": config.name, "run_name": run_name, "runs_dir": str(root.parent)} | parameters
        values = {k: v for k, v in values.items() if k in takes}
        seen = fingerprint(seen, _source(source), values)
        record = root / stage / "done.json"
        if number < first or (start is None and _done(record, seen)):
            say(f"{stage}: done")
            continue
        record.unlink(missing_ok=True)  # a kill from here on leaves the stage undone
        if expected is None:
            expected = expected_seconds(config)
        took = _execute(source, root / stage / f"{stage}.ipynb", values, root, say, expected.get(stage))
        write_json(record, {"key": seen, "seconds": round(took, 1)})
    return root


def expected_seconds(config: Profile) -> dict[str, float]:
    """Return the time that each stage will take; nothing where a download must tell the base's size.

    The machine is probed in a process of its own, so that the series holds no memory of a GPU beside its notebooks.
    """
    base = base_config(config.base)
    if base is None:
        return {}
    sizes = [str(shape_of(base).hidden), str(shape_of(base).intermediate), str(config.batch_rows)]
    probed = subprocess.run([sys.executable, "-m", "medprune.durations", *sizes], check=True, stdout=subprocess.PIPE, text=True)
    rates = json.loads(probed.stdout)
    return predict_seconds(settings(config), base, rates, checkpointing=rates["device"] == "cuda")


def _execute(source: Path, target: Path, values: dict, root: Path, say, expected: float | None) -> float:
    say(f"{source.stem}: running" + ("" if expected is None else f", about {in_words(expected)} as predicted"))
    target.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        with _shown(root / "progress.log"):
            papermill.execute_notebook(
                str(source), str(target), parameters=values, cwd=str(NOTEBOOKS), progress_bar=False, kernel_name="python3",
                log_output=False, request_save_on_cell_execute=True,
                extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it warns on every start that it speaks plain TCP
            )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        said = " ".join(str(error.evalue).split()).rstrip(".")
        kind = "" if error.ename == "ValueError" else f"{error.ename}: "
        raise ValueError(f"{source.stem} stopped: {kind}{said} (its cells: {target}).") from error
    took = time.monotonic() - started
    say(f"{source.stem}: {took:.0f} s")
    return took


def _source(path: Path) -> list:
    return [(c.cell_type, c.source) for c in nbformat.read(path, as_version=4).cells]


def _done(record: Path, key: str) -> bool:
    return record.exists() and (record.parent / "manifest.json").exists() and read_json(record)["key"] == key


@contextmanager
def _shown(log: Path):
    """Copy the kernel's progress bars, written to a file, to the terminal while the block runs."""
    write_text(log, "")
    stop = Event()

    def copy():
        with open(log, encoding="utf-8") as f:
            while True:
                last = stop.wait(0.5)
                sys.stderr.write(f.read())
                sys.stderr.flush()
                if last:
                    return

    thread = Thread(target=copy, daemon=True)
    thread.start()
    os.environ["MEDPRUNE_PROGRESS"] = str(log)
    try:
        yield
    finally:
        del os.environ["MEDPRUNE_PROGRESS"]
        stop.set()
        thread.join()


def closing_text(root: Path) -> str:
    """Return what `medprune run` prints at its end: the summary beside the paper's table 4, and the report's path."""
    folder = root / "06_judge_eval"
    return f"{pd.read_csv(folder / 'summary.csv').round(2).to_string(index=False)}\n\nreport: {folder / 'report.html'}"


def publish(root: Path) -> None:
    """Copy a run's executed notebooks, as a reader on the web shall see them, over the ones in notebooks/.

    Injected parameters and what libraries wrote to stderr are left out. The README's figure goes along.
    """
    for stage in STAGES:
        notebook = nbformat.read(root / stage / f"{stage}.ipynb", as_version=4)
        notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
        notebook.metadata = {k: notebook.metadata[k] for k in ("kernelspec", "language_info")}
        for cell in notebook.cells:
            cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags" and v}
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        write_text(NOTEBOOKS / f"{stage}.ipynb", nbformat.writes(notebook) + "\n")
    (REPO / "docs").mkdir(exist_ok=True)
    shutil.copyfile(root / STAGES[-1] / "shown" / "Size against score.png", REPO / "docs" / "results.png")
