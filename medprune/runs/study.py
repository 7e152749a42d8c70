"""Many runs: a grid of settings, each combination a run, done one after the other or on a Ray cluster.

GRID.yaml holds settings by name, and `profile` and `name` if they shall be others than auto and the file's own:

    profile: local
    seed: [0, 1, 2]          # a list is crossed with the others
    recipes: [lora, distill] # but for a setting that takes a list: that is one value, and a list of lists is crossed
    sft_steps: 90

A run is named after what is crossed: photos-seed0. Runs that are done are found done in seconds; one that fails leaves
the others to go on.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_origin

import yaml

from medprune.runs.series import run_series
from medprune.settings import STAGES, Settings
from medprune.store import run_root

ERRORS = (ValueError, OSError, RuntimeError)  # what a run says in one sentence


@dataclass(frozen=True)
class Task:
    """A run to be made: all that another machine has to know."""

    name: str
    profile: str
    settings: dict = field(hash=False)
    runs_dir: str | None = None

    @property
    def root(self) -> Path:
        return run_root(self.name, self.runs_dir)


def read_grid(file: Path, runs_dir: str | None = None) -> list[Task]:
    """Return the runs that a grid asks for, in order, the last setting fastest.

    Raises ValueError, in a sentence that names the file and the setting, for what is no grid, a setting that is not
    known, and two runs of one name. What a value may be is the settings' own to say (`check`).
    """
    try:
        grid = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML ({' '.join(str(error).split())}): write NAME: VALUE lines.") from None
    if not isinstance(grid, dict) or not all(isinstance(name, str) for name in grid):
        raise ValueError(f"{file} must hold settings by name, such as `seed: [0, 1, 2]`.")
    name, profile = str(grid.pop("name", Path(file).stem)), str(grid.pop("profile", "auto"))
    values = {setting: _values(file, setting, value) for setting, value in grid.items()}
    crossed = [setting for setting, several in values.items() if len(several) > 1]
    tasks = []
    for combination in itertools.product(*values.values()):
        given = dict(zip(values, combination, strict=True))
        label = "-".join([name, *(f"{setting}{_slug(given[setting])}" for setting in crossed)])
        tasks.append(Task(label, profile, given, runs_dir))
    names = [task.name.casefold() for task in tasks]  # some disks do not tell A from a
    for task in tasks:
        if names.count(task.name.casefold()) > 1:
            raise ValueError(
                f"{file} makes two runs named {task.name!r}: give values that differ in letters or digits."
            )
    return tasks


def _values(file: Path, setting: str, value) -> list:
    """Return the values that a setting is to have, one after the other."""
    takes_list = setting in Settings.model_fields and get_origin(Settings.model_fields[setting].annotation) is tuple
    several = isinstance(value, list) and (not takes_list or any(isinstance(v, list) for v in value))
    if isinstance(value, dict) or several and any(isinstance(v, dict) for v in value):
        raise ValueError(f"{file}: {setting} must be a value or a list of values, not names with values.")
    if several and not value:
        raise ValueError(f"{file}: {setting} names no value.")
    return value if several else [value]


def _slug(value) -> str:
    """Return a value as a part of a run's name: 0, 0.5, _smollm2-eyes, _2_4, of a path its last part."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    text = "_".join(map(str, value)) if isinstance(value, list) else str(value).rstrip("/").rsplit("/", 1)[-1]
    return "_" + re.sub(r"[^\w.+=-]+", "_", text)


def check(tasks: Iterable[Task]) -> dict[str, list[str]]:
    """Return what each run would do, by its name, before anything runs; ValueError names the run that cannot be."""
    plans = {}
    for task in tasks:
        lines: list[str] = []
        try:
            run_series(task.name, task.profile, None, dict(task.settings), task.runs_dir, lines.append, dry_run=True)
        except ValueError as error:
            raise ValueError(f"{task.name}: {error}") from None
        plans[task.name] = lines
    return plans


def make(task: Task, say: Callable[[str], None] = lambda line: None) -> Path:
    """Make a run, but for what of it is done."""
    return run_series(task.name, task.profile, None, dict(task.settings), task.runs_dir, say)


def one_by_one(tasks: list[Task], say: Callable[[str, str], None], run=make) -> Iterator[tuple[Task, str]]:
    """Make the runs in order; yield each with "" or what went wrong. say(name, line) is told how a run gets on."""
    for task in tasks:
        try:
            run(task, lambda line, name=task.name: say(name, line))
        except ERRORS as error:
            yield task, str(error)
        else:
            yield task, ""


def stages_done(task: Task) -> str:
    """Return how far a run has come, such as "3 of 6 stages"; for whoever watches it from another process."""
    done = sum((task.root / stage / "manifest.json").exists() for stage in STAGES)
    return f"{done} of {len(STAGES)} stages"
