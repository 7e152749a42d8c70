"""The series under papermill: in order, what is done already and why the rest is not, and publishing it."""

import ast
import os
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from threading import Event, Thread

import nbformat
import pandas as pd

from medprune.data.pictures import open_image
from medprune.data.questions import load_conditions
from medprune.data.records import load_images
from medprune.models.sizes import account, base_config, shape_of
from medprune.settings import (
    NF4_GROUP,
    REPO,
    STAGES,
    Settings,
    build,
    protected_numbers,
    readers,
    resolve,
    seen_by,
    values_of,
)
from medprune.store import Run, lock, read_json, run_root, settings_before, unlock, why_undone, write_text

NOTEBOOKS = REPO / "notebooks"
OPTIONS = {"profile", "run_name", "runs_dir"}  # parameters that the command line has options for


class NotebookCrashError(RuntimeError):
    """A notebook ended in an error that is no user's mistake."""


def parameters_of(stage: str) -> set[str]:
    """Return the names in a notebook's parameters cell."""
    cells = nbformat.read(NOTEBOOKS / f"{stage}.ipynb", as_version=4).cells
    cell = next(c for c in cells if "parameters" in c.metadata.get("tags", []))
    return {target.id for line in ast.parse(cell.source).body for target in line.targets}


def check_parameters(parameters: dict, stages=STAGES) -> dict:
    """Return parameters as notebooks take them: settings without a place in a parameters cell go into `settings`.

    Raises ValueError for a name that is neither a parameter nor a setting, or that no stage to be run reads.
    """
    takes = {stage: parameters_of(stage) - OPTIONS for stage in STAGES}
    known, passed = set().union(*takes.values()), {}
    settings = parameters.get("settings") or {}
    if not isinstance(settings, dict):
        raise ValueError(f'settings={settings!r} must be a dict such as {{"batch_rows": 8}}.')
    for name, value in parameters.items():
        if name in known:
            _check_taken(name, [stage for stage in STAGES if name in takes[stage]], stages)
            passed[name] = value
        elif name in Settings.model_fields and name != "name":
            settings = settings | {name: value}
        else:
            near = get_close_matches(name, known | Settings.model_fields.keys(), n=1)
            hint = f" (did you mean {near[0]}?)" if near else "; `medprune settings` lists them"
            raise ValueError(f"parameter {name!r} is not known{hint}.")
    for name in settings:
        if name in Settings.model_fields:  # resolve refuses the others, with a hint
            _check_taken(name, readers(name), stages)
    return passed | ({"settings": settings} if settings else {})


def _check_taken(name: str, by, stages) -> None:
    if not set(by) & set(stages):
        raise ValueError(
            f"{name!r} would change nothing: {', '.join(by)} takes it, and is not run with --from {stages[0]}."
        )


def check_run(config: Settings) -> None:
    """Refuse what would only fail notebooks later: images that cannot be used, blocks or groups the base has not."""
    if config.images != "synthetic":
        _check_images(config.images, load_conditions(config.conditions))
    base = base_config(config.base)
    if base is None:
        return
    n_blocks = shape_of(base).blocks
    removable = n_blocks - len(protected_numbers(n_blocks, config.protected_blocks))
    for n in config.blocks_removed:
        if n > removable:
            raise ValueError(
                f"blocks_removed has {n}, but only {removable} of the model's {n_blocks} blocks may be removed."
            )
    for method in config.methods:
        account(base, bits=4, group_size=NF4_GROUP if method == "bnb" else config.group_size, method=method)


def _check_images(source: str, conditions: dict) -> None:
    """Raise ValueError unless at least one picture opens; most often the first is looked at, and no other."""
    records, _ = load_images(source, conditions, check=False)
    if max(Counter(r.condition for r in records).values()) < 2:
        raise ValueError(
            f"{source} shows no condition twice: two images are the least, one to train on and one to test."
        )
    for record in records:
        try:
            open_image(record.path, max_side=64)
            return
        except ValueError:
            continue
    load_images(source, conditions)  # says what is wrong with them


def asked_settings(root: Path, profile: str, start: str | None, parameters: dict) -> Settings:
    """Return the settings of a run with these parameters; with a start those that the run has, changed by them."""
    shared = {k: v for k, v in parameters.items() if k in Settings.model_fields}
    if start in (None, STAGES[0]):
        return resolve(profile, parameters.get("settings"), **shared)
    return build(settings_before(root, start, profile), parameters.get("settings"), **shared)


def run_series(
    run_name, profile="auto", start: str | None = None, parameters: dict | None = None, runs_dir=None, say=print
) -> Path:
    """Run the notebooks in order into runs/<run_name>/, but for those that are done; return the run's folder.

    start: the stage to begin at, run again even if done; stages before it must be finished, and are left as they are.
    Raises ValueError in one sentence for what cannot be run, before any notebook starts, and for a user's mistake that
    stopped one; NotebookCrashError for any other error in one.
    """
    root, config, stages, values = _prepare(run_name, profile, start, parameters or {}, runs_dir)
    lock(root)
    try:
        for stage in STAGES:
            if stage in stages and (reasons := _reasons(root, stage, config, start)):
                _execute(stage, root, values, say, reasons)
                _check_ran(root, stage, config)
            else:
                say(f"{stage}: done")
    finally:
        unlock(root)
    return root


def plan_series(run_name, profile="auto", start=None, parameters: dict | None = None, runs_dir=None) -> list[str]:
    """Return what `run_series` would do, a line for each stage, with the reasons."""
    root, config, stages, _ = _prepare(run_name, profile, start, parameters or {}, runs_dir)
    lines, running = [], []
    for stage in STAGES:
        reasons = _reasons(root, stage, config, start) if stage in stages else []
        if reasons:
            lines.append(f"{stage}: would run, as {'; '.join(reasons)}")
            running.append(stage)
        else:
            lines.append(f"{stage}: done" + (f", unless what {running[-1]} writes changes" if running else ""))
    return lines


def _prepare(run_name, profile: str, start: str | None, parameters: dict, runs_dir):
    """Check what is asked for; return (the run's folder, its settings, the stages that may be run, parameters)."""
    if start is not None and start not in STAGES:
        raise ValueError(f"stage {start!r} is not known: choose one of {', '.join(STAGES)}.")
    stages = STAGES[STAGES.index(start) if start else 0 :]
    parameters = check_parameters(parameters, stages)
    root = run_root(run_name, runs_dir)
    for stage in STAGES[: -len(stages)]:
        Run(root, stages[0]).of(stage)
    config = asked_settings(root, profile, start, parameters)
    for stage in STAGES[: -len(stages)]:
        _check_kept(root, stage, config, stages[0])
    check_run(config)
    options = {"profile": config.name, "run_name": root.name, "runs_dir": str(root.parent)}
    return root, config, stages, options | parameters


def _check_kept(root: Path, stage: str, config: Settings, start: str) -> None:
    """Refuse a setting that a stage which is left as it is was run without: its results would meet others."""
    made = read_json(root / stage / "manifest.json")["settings"]
    for name, value in seen_by(stage, values_of(config)).items():
        if made.get(name) != value:
            raise ValueError(
                f"{name}={value!r} is read by {stage} too, which was run with {made.get(name)!r} and which "
                f"--from {start} leaves as it is: leave out --from, and what is still valid is found again."
            )


def _reasons(root: Path, stage: str, config: Settings, start: str | None) -> list[str]:
    return ["--from names it"] if stage == start else why_undone(root, stage, config)


def _check_ran(root: Path, stage: str, config: Settings) -> None:
    """Hold what a stage says it was run with against what was asked for."""
    made = read_json(root / stage / "manifest.json")["settings"]
    if other := [k for k, v in seen_by(stage, values_of(config)).items() if made.get(k) != v]:
        raise RuntimeError(f"{stage} ran with {other[0]}={made.get(other[0])!r}, which was not asked for.")


def _execute(stage: str, root: Path, values: dict, say, reasons: list[str]) -> None:
    import papermill

    manifest = root / stage / "manifest.json"
    last = f", {read_json(manifest)['seconds']:.0f} s the last time" if manifest.exists() else ""
    say(f"{stage}: running, as {reasons[0]}" + (f" and {len(reasons) - 1} more" if reasons[1:] else "") + last)
    target = root / stage / f"{stage}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    takes, started = parameters_of(stage), time.monotonic()
    try:
        with _kernel_of(root):
            papermill.execute_notebook(
                str(NOTEBOOKS / f"{stage}.ipynb"),
                str(target),
                parameters={k: v for k, v in values.items() if k in takes},
                cwd=str(NOTEBOOKS),
                progress_bar=False,
                kernel_name="python3",
                log_output=False,
                request_save_on_cell_execute=True,
                # it warns on every start that it speaks plain TCP, and of the interrupt that ends it
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            )
    except papermill.PapermillExecutionError as error:
        said = " ".join(str(error.evalue).split()).rstrip(".")
        if error.ename == "ValueError":
            raise ValueError(f"{stage} stopped: {said} (its cells: {target}).") from error
        raise NotebookCrashError(f"{stage} crashed: {error.ename}: {said} (its cells: {target}).") from error
    say(f"{stage}: {time.monotonic() - started:.0f} s")


@contextmanager
def _kernel_of(root: Path):
    """Let kernels write the run that this process has locked, and copy their progress bars to the terminal."""
    log = write_text(root / "progress.log", "")
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
    os.environ |= {"MEDPRUNE_PROGRESS": str(log), "MEDPRUNE_LOCKED": str(root)}
    try:
        yield
    finally:
        del os.environ["MEDPRUNE_PROGRESS"], os.environ["MEDPRUNE_LOCKED"]
        stop.set()
        thread.join()
        log.unlink(missing_ok=True)


def closing_text(root: Path) -> str:
    """Return what `medprune run` prints at its end: the summary beside the paper's table 4, and the report's path."""
    folder = root / "06_judge_eval"
    return f"{pd.read_csv(folder / 'summary.csv').round(2).to_string(index=False)}\n\nreport: {folder / 'report.html'}"


def publish(root: Path) -> None:
    """Copy a finished run's executed notebooks, as a reader on the web shall see them, over the ones in notebooks/.

    Injected parameters and what libraries wrote to stderr are left out. The README's figure goes along.
    """
    for stage in STAGES:
        Run(root, STAGES[-1]).of(stage)
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
