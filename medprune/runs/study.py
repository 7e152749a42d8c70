"""Many runs: a grid of settings, each combination a run, done one after the other or on a Ray cluster.

GRID.yaml holds settings by name, and `profile` and `name` if they shall be others than auto and the file's own:

    profile: local
    seed: [0, 1, 2]          # a list is crossed with the others
    recipes: [lora, distill] # but for a setting that takes a list: that is one value, and a list of lists is crossed
    sft_steps: 90

A run is named after what is crossed: photos-seed0. Runs that are done are found done in seconds; one that fails leaves
the others to go on.
"""

import contextlib
import io
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_origin

import yaml

from medprune.runs.series import run_series
from medprune.settings import PATHS, STAGES, Settings, asked
from medprune.store import run_root

RETRIES = 3  # of a run whose worker was lost; what a run itself says is wrong is not tried again
# Of a run on Ray, where nothing else is asked for: what `medprune rehearse --machine colab` finds that a run fits in.
REHEARSED = {"t4": {"num_gpus": 1, "memory": int(12.7 * 2**30)}}
WATCHED_S = 2.0  # seconds between two looks at runs on a cluster
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
        text = Path(file).read_text(encoding="utf-8")
        grid, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML ({' '.join(str(error).split())}): write NAME: VALUE lines.") from None
    if not isinstance(grid, dict) or not all(isinstance(name, str) for name in grid):
        raise ValueError(f"{file} must hold settings by name, such as `seed: [0, 1, 2]`.")
    given = [key.value for key, _ in tree.value]  # YAML takes the last of two
    if twice := [setting for setting in given if given.count(setting) > 1]:
        raise ValueError(f"{file} has {twice[0]!r} twice: write its values as one list, or leave one out.")
    name, profile = str(grid.pop("name", Path(file).stem)), str(grid.pop("profile", "auto"))
    values = {setting: _values(file, setting, value) for setting, value in grid.items()}
    crossed = [setting for setting, several in values.items() if len(several) > 1]
    home, tasks = runs_dir and os.path.abspath(runs_dir), []
    for combination in itertools.product(*values.values()):
        given = dict(zip(values, combination, strict=True))
        label = "-".join([name, *(f"{setting}{_slug(given[setting])}" for setting in crossed)])
        paths = {setting: given[setting] for setting in PATHS if isinstance(given.get(setting), str)}
        tasks.append(Task(label, profile, given | asked(paths, {}), home))
    names = [task.name.casefold() for task in tasks]  # some disks do not tell A from a
    for task in tasks:
        if names.count(task.name.casefold()) > 1:
            raise ValueError(f"{file} makes two runs named {task.name!r}: give values that differ in name.")
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
        yield task, _made(run, task, lambda line, name=task.name: say(name, line))


def on_ray(tasks: list[Task], say, run=make, address: str = "local", retries: int = RETRIES, **needs):
    """Make the runs as tasks of a Ray cluster, as `one_by_one` does, many at once, whichever ends first first.

    address: "local" starts one on this machine, "auto" or HOST:PORT joins one whose machines share the folder of runs
    and have medprune installed. needs: num_cpus, num_gpus and memory (bytes) of each run, else as REHEARSED says of its
    profile. A run whose worker or machine is lost goes on where it was, `retries` times. Raises ValueError without
    Ray, or where no machine has as much.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("Ray is not installed: pip install 'medprune[ray]', or leave out --ray.") from None
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, logging_level="warning", log_to_driver=False)
    try:
        remote, running = ray.remote(max_retries=retries)(_made), {}
        wanted = [(task, REHEARSED.get(task.profile, {}) | needs) for task in tasks]
        for _, each in wanted:
            _refuse_what_nobody_has(ray, each)
        for task, each in wanted:
            running[remote.options(**each).remote(run, task)] = task
        while running:
            ended, _ = ray.wait(list(running), num_returns=1, timeout=WATCHED_S)
            for one in ended:
                task = running.pop(one)
                try:
                    yield task, ray.get(one)
                except ray.exceptions.RayError as lost:
                    said = " ".join(str(lost).split())
                    yield task, f"lost {retries + 1} times with its worker: {said}"
            for task in running.values():
                say(task.name, stages_done(task))
    finally:
        if started:
            ray.shutdown()


def _refuse_what_nobody_has(ray, needs: dict) -> None:
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {{"num_cpus": "CPU", "num_gpus": "GPU"}.get(name, name): amount for name, amount in needs.items()}
    if not any(all(has.get(name, 0) >= amount for name, amount in wanted.items()) for has in machines):
        sizes = {name: f"{n / 2**30:.1f} GiB" if name == "memory" else f"{n:g}" for name, n in wanted.items()}
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"no machine of the cluster has what a run needs: {asked}.")


def _made(run, task: Task, say: Callable[[str], None] = lambda line: None) -> str:
    """Make a run; return "" or what went wrong."""
    try:
        run(task, say)
    except ERRORS as error:
        return str(error)
    return ""


def stages_done(task: Task) -> str:
    """Return how far a run has come, such as "3 of 6 stages"; for whoever watches it from another process."""
    done = sum((task.root / stage / "manifest.json").exists() for stage in STAGES)
    return f"{done} of {len(STAGES)} stages"


class Board:
    """A line for each run, redrawn in place on a terminal; elsewhere a new line for whatever is new."""

    def __init__(self, stream):
        self.stream, self.lines, self.drawn = stream, {}, 0

    def say(self, name: str, line: str) -> None:
        if self.lines.get(name) == line:
            return
        self.lines[name] = line
        if not self.stream.isatty():
            self.stream.write(f"{name}: {line}\n")
        else:
            width = shutil.get_terminal_size().columns - 1
            up = f"\x1b[{self.drawn}A" if self.drawn else ""
            drawn = [f"\r\x1b[K{f'{run}: {text}'[:width]}\n" for run, text in self.lines.items()]
            self.stream.write(up + "".join(drawn))
            self.drawn = len(drawn)
        self.stream.flush()

    def bars(self):
        """Return a context in which the notebooks' bars are shown in the last run's line, on a terminal alone."""
        return contextlib.redirect_stderr(_Bars(self))


class _Bars(io.TextIOBase):
    """Takes what is written to stderr: the latest line of it is what the run at hand is doing."""

    def __init__(self, board: Board):
        self.board = board

    def write(self, text: str) -> int:
        latest = next((part.strip() for part in reversed(re.split("[\r\n]", text)) if part.strip()), "")
        if latest and self.board.lines and self.board.stream.isatty():
            self.board.say(list(self.board.lines)[-1], latest)
        return len(text)
