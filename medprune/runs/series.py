"""The series under papermill: in order, what is done already and why the rest is not, and publishing it."""

import os
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import nbformat

from medprune.data.pictures import check_picture
from medprune.data.questions import load_conditions
from medprune.data.record import SIDES
from medprune.data.records import check_trained, load_images
from medprune.models.sizes import account, base_config, guarded, is_counted, shape_of
from medprune.searching.budget import check_budget, space_of
from medprune.settings import NF4_GROUP, REPO, STAGES, asked, build, readers, resolve, values_of
from medprune.store import (
    Run,
    differing,
    lock,
    read_csv,
    read_manifest,
    run_root,
    settings_before,
    unlock,
    why_undone,
    write_text,
)

NOTEBOOKS = REPO / "notebooks"
_FULL = ("No space left on device", "disk is full", "failed writing file")  # of Python and safetensors, SQLite, torch


def check_run(config) -> None:
    """Refuse what would only fail notebooks later: unusable images; blocks, groups or a budget the base cannot have."""
    if config.images != "synthetic":
        _check_images(config, load_conditions(config.conditions))
    base = base_config(config.base)
    if base is None:
        return
    if not is_counted(base):
        from medprune.pruning.plan import check_prunable  # which imports torch

        check_prunable(base)
    shape = shape_of(base)
    removable = shape.blocks - len(guarded(shape, config.protected_blocks))
    if (most := max(config.blocks_removed)) > removable:
        raise ValueError(
            f"blocks_removed has {most}, but only {removable} of the model's {shape.blocks} blocks may go."
        )
    for method in config.methods:
        account(base, bits=4, group_size=NF4_GROUP if method == "bnb" else config.group_size, method=method)
    if config.budget_mib is not None:
        space = space_of(base, config.context_tokens, config.protected_blocks, config.group_size)
        check_budget(space, int(config.budget_mib * 2**20))


def _check_images(config, conditions: dict) -> None:
    """Raise ValueError for too few pictures or conditions, or unless one opens; most often the first alone is tried."""
    source, modality = config.images, config.modality
    records, _ = load_images(source, conditions, check=False, modality=modality)
    if max(Counter(r.condition for r in records).values()) < 2:
        raise ValueError(f"{source} shows no condition twice, with an image to train on and one to test.")
    if not any(check_picture(record.path, True) == "kept" for record in records):
        load_images(source, conditions, modality=modality)  # says what is wrong with them
    given = set(SIDES) <= {r.split for r in records}
    check_trained([r for r in records if not (given and r.split == "test")], config.awq_rows, source)


def run_series(
    run_name, profile="auto", start=None, parameters=None, runs_dir=None, say=print, dry_run=False, end=None
) -> Path:
    """Run the notebooks in order into runs/<run_name>/, but for those that are done; return the run's folder.

    start: the stage to begin at, run again even if done; stages before it must be finished, and are left as they are.
    end: the last stage, by default of all; later ones are left as they are.
    parameters: settings by name, and more of them in a dict `settings`. dry_run: only say what would run, and why.
    Raises ValueError in one sentence for what cannot be run, before any notebook starts, and for a user's mistake that
    stopped one; RuntimeError for any other error in one.
    """
    root, whole, given, stages = _prepare(run_name, profile, start, end, dict(parameters or {}), runs_dir)
    if not dry_run:
        lock(root)
    doubt = ""
    try:
        for stage in STAGES[: STAGES.index(stages[-1]) + 1]:
            reasons = why_undone(root, stage, whole) if stage in stages else []
            if stage == start:
                reasons = ["--from names it"]
            if not reasons:
                say(f"{stage}: done{doubt}")
            elif dry_run:
                say(f"{stage}: would run, as {'; '.join(reasons)}")
                doubt = f", unless what {stage} writes changes"
            else:
                _execute(stage, root, _parameters(root, stage, whole, given), say, reasons)
                for name, (was, _) in differing(root, stage, whole).items():
                    raise RuntimeError(f"{stage} ran with {name}={was!r}, which was not asked for.")
    finally:
        unlock(root)
    return root


def _prepare(run_name, profile: str, start: str | None, end: str | None, parameters: dict, runs_dir) -> tuple:
    """Check what is asked for; return (the run's folder, its settings, those given, the stages that may be run)."""
    if unknown := {start, end} - {None, *STAGES}:
        raise ValueError(f"stage {min(unknown)!r} is not known: choose one of {', '.join(STAGES)}.")
    before = STAGES[: STAGES.index(start or STAGES[0])]
    stages = STAGES[len(before) : STAGES.index(end or STAGES[-1]) + 1]
    if not stages:
        raise ValueError(f"--to {end} comes before --from {start}.")
    given = asked(parameters.pop("settings", None), {}) | asked(parameters, {})
    for name, takers in {name: readers(name) for name in given}.items():
        if not set(takers) & set(stages):
            out = f"--from {start}" if takers[-1] in before else f"--to {end}"
            raise ValueError(f"{name!r} would change nothing: {takers[-1]} takes it, which {out} leaves out.")
    root = run_root(run_name, runs_dir)
    for stage in before:
        Run(root, start).of(stage)
    config = build(settings_before(root, start, profile), given) if before else resolve(profile, given)
    whole = values_of(config)
    if not before and "images" not in given and (root / STAGES[0] / "manifest.json").exists():
        was = read_manifest(root, STAGES[0])["settings"].get("images", "synthetic")
        if config.images == "synthetic" != was:
            how = f"give --images {was} again, or --images synthetic, or another --name"
            raise ValueError(f"run {root.name!r} is of photographs, which would make way for synthetic images: {how}.")
    for stage in before:
        for name, (was, value) in differing(root, stage, whole).items():
            raise ValueError(
                f"{name}={value!r} is read by {stage} too, which was run with {was!r} and which --from {start} leaves "
                "as it is: leave out --from, and what is still valid is found again."
            )
    check_run(config)
    return root, whole, given, stages


def _parameters(root: Path, stage: str, whole: dict, given: dict) -> dict:
    """Return a notebook's parameters: the first takes the settings given, later ones what the run has otherwise."""
    options = {"profile": whole["name"], "run_name": root.name, "runs_dir": str(root.parent)}
    if stage != STAGES[0]:
        before = settings_before(root, stage)
        given = {name: value for name, value in whole.items() if value != before[name]}
    return options | {"settings": given}


def _execute(stage: str, root: Path, values: dict, say, reasons: list[str]) -> None:
    import papermill

    manifest = root / stage / "manifest.json"
    last = f", {read_manifest(root, stage)['seconds']:.0f} s the last time" if manifest.exists() else ""
    say(f"{stage}: running, as {reasons[0]}" + (f" and {len(reasons) - 1} more" if reasons[1:] else "") + last)
    target = root / stage / f"{stage}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    # a kernel warns on every start that it speaks plain TCP, and of the interrupt that ends it
    kernel = {"kernel_name": "python3", "extra_arguments": ["--IPKernelApp.log_level=CRITICAL"], "cwd": str(NOTEBOOKS)}
    try:
        with _kernel_of(root):
            papermill.execute_notebook(NOTEBOOKS / f"{stage}.ipynb", target, values, progress_bar=False, **kernel)
    except papermill.PapermillExecutionError as error:
        said = " ".join(str(error.evalue).split()).rstrip(".")
        if any(words in said for words in _FULL):
            raise ValueError(f"{stage} stopped: {said}. Make room for {root}, and run again.") from error
        if error.ename in ("ValueError", "OSError", "PermissionError"):
            raise ValueError(f"{stage} stopped: {said} (its cells: {target}).") from error
        raise RuntimeError(f"{stage} crashed: {error.ename}: {said} (its cells: {target}).") from error
    except RuntimeError as error:  # of a kernel that died
        raise RuntimeError(f"{stage} was killed, for want of memory maybe: run again, and it goes on there.") from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(target)) from error
    say(f"{stage}: {time.monotonic() - started:.0f} s")


@contextmanager
def _kernel_of(root: Path):
    """Let kernels write the run that this process has locked, and copy their progress bars to the terminal."""
    log = write_text(root / "progress.log", "")
    stop = Event()

    def copy():
        ends, stopped = "\n", False
        with open(log, encoding="utf-8") as f:
            while not stopped:
                stopped = stop.wait(0.5)
                if text := f.read():
                    print(text, end="", file=sys.stderr, flush=True)
                    ends = text[-1]
        if ends != "\n":  # of a bar that was cut short: what follows begins a line
            print(file=sys.stderr)

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


def closing_text(root: Path, end: str | None = None) -> str:
    """Return what `medprune run` prints at its end: the summary beside the paper's table 4, and the report's path.

    end: the stage that it ended with; of one before 06, which writes both, where the run is.
    """
    if not (report := root / (end or STAGES[-1]) / "report.html").exists():
        return f"run: {root}"
    summary = read_csv(root / "06_judge_eval" / "summary.csv").round(2).to_string(index=False)
    return f"{summary}\n\nreport: {report}"


def _executed(file: Path):
    """Read a notebook whose every cell has run; ValueError names one that a kill has cut short."""
    try:
        notebook = nbformat.read(file, as_version=4)
        whole = all(c.execution_count for c in notebook.cells if c.cell_type == "code")
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{file} is no whole executed notebook: run the series again --from {file.stem}.")
    return notebook


def publish(root: Path) -> None:
    """Copy a finished run's executed notebooks, as a reader on the web shall see them, over the ones in notebooks/.

    Injected parameters and what libraries wrote to stderr are left out. The README's figure goes along.
    """
    for stage in STAGES:
        _executed(Run(root, STAGES[-1]).of(stage) / f"{stage}.ipynb")
    for stage in STAGES:
        notebook = _executed(root / stage / f"{stage}.ipynb")
        notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
        notebook.metadata = {k: notebook.metadata[k] for k in ("kernelspec", "language_info")}
        for cell in notebook.cells:
            cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags" and v}
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        write_text(NOTEBOOKS / f"{stage}.ipynb", nbformat.writes(notebook) + "\n")
    (REPO / "docs").mkdir(exist_ok=True)
    shutil.copyfile(root / "07_budget_search" / "shown" / "Score against memory.png", REPO / "docs" / "results.png")
