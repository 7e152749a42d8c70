"""The series under papermill: order, what is done already, resume, and publishing executed notebooks."""

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import nbformat
import papermill

from medprune.artifacts import STAGES, fingerprint, open_run, read_json, write_json, write_text
from medprune.config import REPO, resolve, settings

NOTEBOOKS = REPO / "notebooks"


def check_parameters(parameters: dict) -> None:
    """Refuse a name that no notebook takes, before anything starts."""
    known = set()
    for stage in STAGES:
        known |= set(papermill.inspect_notebook(str(NOTEBOOKS / f"{stage}.ipynb")))
    for name in parameters:
        if name not in known:
            raise ValueError(f"parameter {name!r} is taken by no notebook: choose among {', '.join(sorted(known))}.")


def run_series(run_name: str, profile: str = "auto", start: str | None = None, parameters: dict | None = None,
               runs_dir: str | None = None, say=print) -> Path:  # fmt: skip
    """Run the notebooks in order into runs/<run_name>/, skipping what is done with the same parameters.

    start: the stage to begin at, run again even if done; stages before it must be finished. A notebook counts as done
    when it finished with these parameters and its source and every earlier stage are unchanged. Returns the run's
    folder. Raises papermill's error of the first notebook that fails, after naming it.
    """
    parameters = parameters or {}
    check_parameters(parameters)
    shared = {k: v for k, v in parameters.items() if k in settings(resolve("smoke"))}
    config = resolve(profile, **shared)
    if start is not None and start not in STAGES:
        raise ValueError(f"stage {start!r} is not known: choose one of {', '.join(STAGES)}.")
    first = STAGES.index(start) if start else 0
    root = open_run(run_name, STAGES[first], config, needs=STAGES[:first], runs_dir=runs_dir).root
    seen = fingerprint(config.name)
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
        took = _execute(source, root / stage / f"{stage}.ipynb", values, root, say)
        write_json(record, {"key": seen, "seconds": round(took, 1)})
    return root


def _execute(source: Path, target: Path, values: dict, root: Path, say) -> float:
    say(f"{source.stem}: running")
    target.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        with _shown(root / "progress.log"):
            papermill.execute_notebook(
                str(source), str(target), parameters=values, cwd=str(NOTEBOOKS), progress_bar=False, kernel_name="python3",
                log_output=False, request_save_on_cell_execute=True,
            )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        raise ValueError(f"{source.stem} stopped: {error.ename}: {error.evalue} (see {target}).") from error
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


def publish(root: Path) -> None:
    """Copy a run's executed notebooks, as a reader on the web shall see them, over the ones in notebooks/."""
    for stage in STAGES:
        notebook = nbformat.read(root / stage / f"{stage}.ipynb", as_version=4)
        notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
        notebook.metadata = {k: notebook.metadata[k] for k in ("kernelspec", "language_info")}
        for cell in notebook.cells:
            cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags" and v}
        write_text(NOTEBOOKS / f"{stage}.ipynb", nbformat.writes(notebook) + "\n")
