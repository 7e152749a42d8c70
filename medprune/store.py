"""What a run keeps, and when it is done: atomic writes, locks, units of work, and hashes of what was read.

runs/<name>/ holds run.json (the settings as resolved by notebook 01), units.sqlite, and a folder a stage with
manifest.json, metrics.json, tables as CSV and weights as folders. There is one notion of done, for a stage and for a
unit of work: its recorded inputs equal the present ones. Inputs are the settings that it reads and hashes of what it
reads: pictures, facts, earlier stages' files, the code, and versions of the libraries that decide values.
"""

import ast
import functools
import hashlib
import json
import os
import platform
import shutil
import sqlite3
import sys
from contextlib import closing, contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from medprune.settings import DATA, PATHS, REPO, STAGES, Config, Settings, build, resolve, seen_by, values_of

PACKAGE = Path(__file__).parent
RECORD = "medprune.json"  # in a folder of weights: what it was made from
UNITS = "units.sqlite"  # in a run's folder
GROUND = {"settings", "store", "progress"}  # modules that decide no value: what they hand on is recorded itself
LIBRARIES = [
    "torch",
    "transformers",
    "peft",
    "autoawq",
    "bitsandbytes",
    "hqq",
    "sentence-transformers",
    "numpy",
    "pillow",
]


# ---- hashes
def fingerprint(*values) -> str:
    """Return a short hash of JSON-able values; a Path stands for the bytes of the file, or files, it names."""
    plain = [content(v) if isinstance(v, Path) else v for v in values]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def content(path: str | Path) -> str:
    """Return a hash of a file's bytes, or of a folder's files with their names; "absent" where there is nothing.

    A folder's README.md and RECORD are left out, for they say how it was made. What is large is read once, and again
    only when a size or a time has changed.
    """
    path = Path(path).absolute()
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.name not in ("README.md", RECORD))
    if not path.exists():
        return "absent"
    stats = [f.stat() for f in files]
    stamp = tuple((str(f), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in zip(files, stats, strict=True))
    return _content(path, stamp, large=sum(s.st_size for s in stats) > 2**20)


@functools.lru_cache(maxsize=100_000)
def _content(path: Path, stamp: tuple, large: bool) -> str:
    if not large:
        return _digest(path, stamp)
    key = hashlib.sha256(repr((path, stamp)).encode()).hexdigest()
    cache = Path(os.environ.get("MEDPRUNE_CACHE") or Path.home() / ".cache" / "medprune") / "hashes.sqlite"
    cache.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(cache, timeout=60)) as base, base:
        base.execute("CREATE TABLE IF NOT EXISTS hashes (stamp TEXT PRIMARY KEY, hash TEXT)")
        found = base.execute("SELECT hash FROM hashes WHERE stamp = ?", [key]).fetchone() or [_digest(path, stamp)]
        base.execute("INSERT OR REPLACE INTO hashes VALUES (?, ?)", [key, found[0]])
    return found[0]


def _digest(path: Path, stamp: tuple) -> str:
    whole = hashlib.sha256()
    for file, *_ in stamp:
        with open(file, "rb") as f:
            whole.update(os.path.relpath(file, path).encode("utf-8", "surrogateescape"))
            whole.update(hashlib.file_digest(f, "sha256").digest())
    return whole.hexdigest()[:16]


def code(*modules: str) -> str:
    """Return a hash of the source of some of the package's modules and all that they import of it.

    Comments, docstrings and layout do not count, nor do the modules of GROUND.
    """
    found, todo = {}, list(modules)
    while todo:
        name = todo.pop()
        if name in found or name.removeprefix("medprune.") in GROUND:
            continue
        found[name], imported = _source(name)
        todo += imported
    return fingerprint(sorted(found.items()))


@functools.cache
def _source(module: str) -> tuple[str, list[str]]:
    """Return (hash of a module's code, the package's modules that it imports)."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    tree = ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))
    return hash_of_code(tree), imports(tree)


def imports(tree: ast.AST) -> list[str]:
    """Return the package's modules that some code imports, in its functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                is_module = PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py").exists()
                found.append(name if is_module else node.module)
    return list(dict.fromkeys(found))


def hash_of_code(tree: ast.AST) -> str:
    """Return a hash of what some code does: comments, docstrings and layout do not count."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide values."""
    return {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}


def context(module: str, *values) -> str:
    """Return what a unit of work depends on: the values, the code of a module (`__name__`), libraries' versions."""
    return fingerprint(code(module), versions(), *values)


# ---- files
def write_text(path: Path, text: str) -> Path:
    """Write a file so that a reader sees the old text or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: Path, value) -> Path:
    return write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def read_json(path: Path):
    """Read a JSON file; ValueError names the one that holds none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): remove it, and run its notebook again.") from None


def write_csv(path: Path, table: pd.DataFrame) -> Path:
    return write_text(path, table.to_csv(index=False))


@contextmanager
def write_folder(path: Path, **record):
    """Give a temporary folder that takes `path`'s place when the block ends; what stood there is replaced.

    record: what the folder is made from, its `context` among it, for `made` to tell.
    """
    path = Path(path)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if record:
            write_json(temporary / RECORD, record)
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


def made(folder: Path, context: str) -> dict | None:
    """Return the record of a folder that was made in this very context, else None."""
    file = Path(folder) / RECORD
    record = read_json(file) if file.exists() else {}
    return record if record.get("context") == context else None


class Units:
    """Finished units of work: `key in units`, `units[key]`, `units.add(key, value)`.

    path: an SQLite file, which several processes may read and write at once. context: what the values depend on
    (`store.context`); units of other contexts stay in the file and are not seen.
    """

    def __init__(self, path: Path, context: str):
        self.path, self.context = Path(path), context
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._ask("CREATE TABLE IF NOT EXISTS units (context TEXT, key TEXT, value TEXT, PRIMARY KEY (context, key))")

    def _ask(self, words: str, *values):
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as base, base:
                return base.execute(words, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise OSError(f"{self.path} cannot be used: {error}.") from None

    def _found(self, key: str):
        return self._ask("SELECT value FROM units WHERE context = ? AND key = ?", self.context, key)

    def __contains__(self, key: str) -> bool:
        return bool(self._found(key))

    def __getitem__(self, key: str):
        if not (rows := self._found(key)):
            raise KeyError(key)
        return json.loads(rows[0][0])

    def __len__(self) -> int:
        return self._ask("SELECT COUNT(*) FROM units WHERE context = ?", self.context)[0][0]

    def add(self, key: str, value) -> None:
        self._ask("INSERT OR REPLACE INTO units VALUES (?, ?, ?)", self.context, key, json.dumps(value))


# ---- runs
def runs_home(runs_dir: str | None = None) -> Path:
    """Return where runs are kept: runs_dir, else MEDPRUNE_RUNS, else runs/ of the repository."""
    return Path(runs_dir or os.environ.get("MEDPRUNE_RUNS") or REPO / "runs").absolute()


def run_root(run_name, runs_dir: str | None = None) -> Path:
    """Return a run's folder; ValueError for a name that is no plain folder name."""
    name = str(run_name)
    if not name or name != Path(name).name or name.startswith((".", "-")) or len(name.encode()) > 200:
        raise ValueError(f"run_name={run_name!r} must be a plain folder name, such as 'demo'.")
    return runs_home(runs_dir) / name


class Run:
    """A run's folder and the stage that is writing. What the stage reads goes through `read`, to be remembered."""

    def __init__(self, root: Path, stage: str, config=None, overrides: dict | None = None):
        self.root, self.stage, self.config, self.overrides = Path(root), stage, config, overrides or {}
        self.inputs: dict[str, str] = {}
        self.contexts: set[str] = set()
        self.given: set[str] = set()  # settings that the user named
        self.begun = datetime.now()

    @property
    def dir(self) -> Path:
        return self.root / self.stage

    def of(self, stage: str) -> Path:
        """Return an earlier stage's folder; ValueError says which notebook to run first if it is not finished."""
        if not (self.root / stage / "manifest.json").exists():
            raise ValueError(f"run {self.root.name!r} has no finished {stage}: run {stage} first.")
        return self.root / stage

    def read(self, stage: str, name: str) -> Path:
        """Return a file or folder of an earlier stage, an input of this one from now on."""
        return self.reads(self.of(stage) / name)[0]

    def reads(self, *paths: str | Path) -> list[Path]:
        """Take files or folders as inputs of this stage, and return them."""
        for path in paths:
            self.inputs[_place(Path(path), self.root)] = content(path)
        return [Path(path) for path in paths]

    def units(self, context: str) -> Units:
        """Return the run's units of a context, which this stage uses from now on, so that `clean` leaves them."""
        self.contexts.add(context)
        return Units(self.root / UNITS, context)


def open_stage(
    stage: str, run_name, runs_dir: str | None = None, profile: str = "auto", settings: dict | None = None, **given
) -> tuple[Run, Config]:
    """Open a stage of a run for writing; return (run, the settings that the stage reads).

    Notebook 01 resolves the settings and writes them to run.json; later ones take them from there, with what stages
    between have changed, and put in what is given here. Stages before it must be finished. The run is locked until
    `finish`, or until this process ends. Raises ValueError in one sentence.
    """
    root = run_root(run_name, runs_dir)
    run = Run(root, stage)
    if stage == STAGES[0]:
        whole = before = values_of(resolve(profile, settings, **given))
    else:
        for need in STAGES[: STAGES.index(stage)]:
            run.of(need)
        before = settings_before(root, stage, profile)
        whole = values_of(build(before, settings, **given))
    run.given = {name for name, value in {**(settings or {}), **given}.items() if value is not None}
    run.overrides = {name: value for name, value in whole.items() if value != before[name]}
    lock(root)
    run.dir.mkdir(parents=True, exist_ok=True)
    (run.dir / "manifest.json").unlink(missing_ok=True)  # from here on the stage is not finished
    if stage == STAGES[0]:
        write_json(root / "run.json", {"settings": whole})
    run.config = Config(seen_by(stage, whole), stage)
    run.reads(*(path for name in PATHS if Path(path := getattr(run.config, name, None) or "").exists() and path))
    return run, run.config


def settings_before(root: Path, stage: str, profile: str = "auto") -> dict:
    """Return a run's settings as the stages before `stage` left them; ValueError where it has another profile."""
    if not (root / "run.json").exists():
        raise ValueError(f"run {root.name!r} has no run.json: run {STAGES[0]} first.")
    values = read_json(root / "run.json")["settings"]
    if profile not in ("auto", values["name"]):
        raise ValueError(
            f"run {root.name!r} was made with profile {values['name']!r}, not {profile!r}: "
            f"pass profile={values['name']!r}, or another run_name."
        )
    for earlier in STAGES[1 : STAGES.index(stage)]:
        if (root / earlier / "manifest.json").exists():
            values |= read_json(root / earlier / "manifest.json")["overrides"]
    return values


def finish(run: Run, metrics: dict) -> None:
    """Write metrics.json and, last of all, manifest.json, whose presence says that the stage is finished."""
    write_json(run.dir / "metrics.json", metrics)
    files = [f for f in run.dir.rglob("*") if f.is_file() and not _passing(f, run)]
    manifest = {
        "stage": run.stage,
        "settings": values_of(run.config),
        "overrides": run.overrides,
        "inputs": run.inputs,
        "code": stage_code(run.stage),
        "versions": versions(),
        "outputs": {str(f.relative_to(run.dir)): f.stat().st_size for f in sorted(files)},
        "contexts": sorted(run.contexts),
        "seconds": round((datetime.now() - run.begun).total_seconds(), 1),
        "finished": datetime.now().isoformat(timespec="seconds"),
    }
    write_json(run.dir / "manifest.json", manifest)
    unlock(run.root)


def _passing(file: Path, run: Run) -> bool:
    """Say whether a file is none of a stage's results: the notebook itself, and checkpoints."""
    parts = file.relative_to(run.dir).parts
    return file.name == f"{run.stage}.ipynb" or any(p.startswith((".", "checkpoints-")) for p in parts)


def why_undone(root: Path, stage: str, settings: Settings | dict) -> list[str]:
    """Return why a stage has to be run with these settings, in words; nothing where it is done."""
    file = root / stage / "manifest.json"
    if not file.exists():
        return ["it has not been finished"]
    was = read_json(file)
    wanted = seen_by(stage, settings if isinstance(settings, dict) else values_of(settings))
    reasons = [
        f"{name} was {json.dumps(was['settings'].get(name))} and is {json.dumps(value)}"
        for name, value in wanted.items()
        if was["settings"].get(name) != value
    ]
    reasons += [f"{place} has changed" for place, h in was["inputs"].items() if content(_path(place, root)) != h]
    reasons += [
        f"{name} of its own results is gone or cut short"
        for name, size in was["outputs"].items()
        if not (root / stage / name).is_file() or (root / stage / name).stat().st_size != size
    ]
    if was["code"] != stage_code(stage):
        reasons.append("its code has changed")
    now = versions()
    reasons += [f"{k} was {v} and is {now.get(k)}" for k, v in was["versions"].items() if now.get(k) != v]
    return reasons


@functools.cache
def stage_code(stage: str) -> str:
    """Return a hash of a notebook's code, from its parameters on, of the package's that it imports, and of its data."""
    cells = [c for c in read_json(REPO / "notebooks" / f"{stage}.ipynb")["cells"] if c["cell_type"] == "code"]
    first = next(i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
    tree = ast.parse("\n".join("".join(c["source"]) for c in cells[first:]))
    return fingerprint(hash_of_code(tree), code(*imports(tree)), DATA)


def _place(path: Path, root: Path) -> str:
    """Return a path as it is remembered: in the run, in the repository, or absolute; so that both can be moved."""
    path = path.absolute()
    for name, base in (("RUN", root), ("REPO", REPO)):
        if path.is_relative_to(base):
            return f"{name}/{path.relative_to(base).as_posix()}"
    return str(path)


def _path(place: str, root: Path) -> Path:
    name, _, rest = place.partition("/")
    return {"RUN": root, "REPO": REPO}[name] / rest if name in ("RUN", "REPO") else Path(place)


_locks: dict[Path, FileLock] = {}


def lock(root: Path) -> None:
    """Take a run for this process; ValueError says which one has it. Kernels of `medprune run` share its own."""
    if os.environ.get("MEDPRUNE_LOCKED") == str(root) or root in _locks:
        return
    root.mkdir(parents=True, exist_ok=True)
    mine = FileLock(root / ".lock")
    try:
        mine.acquire(timeout=0)
    except Timeout:
        holder = read_json(root / ".holder.json") if (root / ".holder.json").exists() else {}
        raise ValueError(
            f"run {root.name!r} is being written by process {holder.get('pid', '?')} since {holder.get('since', '?')}: "
            "wait for it, end it (restart its notebook's kernel), or give another run_name."
        ) from None
    _locks[root] = mine
    write_json(root / ".holder.json", {"pid": os.getpid(), "since": datetime.now().isoformat(timespec="seconds")})


def unlock(root: Path) -> None:
    """Let other processes write a run."""
    if root in _locks:
        (root / ".holder.json").unlink(missing_ok=True)
        _locks.pop(root).release()


def describe_machine() -> dict:
    """Return what a reader needs to place a timing: processor, cores, GPU, versions."""
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x), model)
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
