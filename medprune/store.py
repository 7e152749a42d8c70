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
import re
import shutil
import sqlite3
import tempfile
import time
from contextlib import closing, contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from medprune.settings import DATA, PATHS, PROFILES, REPO, STAGES, Config, asked, build, resolve, seen_by, values_of

PACKAGE = Path(__file__).parent
RECORD = "medprune.json"  # in a folder of weights: what it was made from
GROUND = {f"medprune.{name}" for name in ("settings", "store", "progress")}  # decide no value that is not recorded
LIBRARIES = [
    "torch", "transformers", "peft", "autoawq", "bitsandbytes", "hqq", "sentence-transformers", "numpy", "pillow",
]  # fmt: skip


# ---- hashes
def fingerprint(*values) -> str:
    """Return a short hash of JSON-able values; a Path stands for the bytes of the file, or files, it names."""
    plain = [content(v) if isinstance(v, Path) else v for v in values]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def visible_files(folder: Path) -> list[Path]:
    """List what lies below a folder, folders apart, without hidden files and hidden folders.

    Links are followed, but not to a folder that holds, or is, one on the way to them.
    """
    found, ways = [], {os.fspath(folder): [Path(folder).resolve()]}
    for home, folders, names in os.walk(folder, followlinks=True):
        way = ways.pop(home)
        below = {name: (Path(home) / name).resolve() for name in folders if name[0] != "."}
        folders[:] = [name for name, real in below.items() if not any(step.is_relative_to(real) for step in way)]
        ways |= {os.path.join(home, name): [*way, below[name]] for name in folders}
        found += [Path(home, name) for name in names if name[0] != "."]
    return sorted(found)


def content(path: str | Path) -> str:
    """Return a hash of a file's bytes, or of a folder's `visible_files` with their names; "absent" for nothing.

    A folder's README.md and RECORD are left out, for they say how it was made. What is large is read once, and again
    only when a size or a time has changed.
    """
    path = Path(path).absolute()
    if not (os.path.isfile(path) or os.path.isdir(path)):  # of a name too long for a file system too
        return "absent"
    files = [path]
    if path.is_dir():
        files = [f for f in visible_files(path) if f.is_file() and f.name not in ("README.md", RECORD)]
    stats = [f.stat() for f in files]
    stamp = tuple((str(f), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in zip(files, stats, strict=True))
    return _content(path, stamp, large=sum(s.st_size for s in stats) > 2**20)


@functools.lru_cache(maxsize=100_000)
def _content(path: Path, stamp: tuple, large: bool) -> str:
    if not large:
        return _digest(path, stamp)
    key = hashlib.sha256(repr((path, stamp)).encode()).hexdigest()
    known = Units(cache_dir() / "hashes.sqlite", "content")
    if key not in known:
        known.add(key, _digest(path, stamp))
    return known[key]


def cache_dir() -> Path:
    """Return where hashes of large files and assembled bases are kept from run to run."""
    return Path(os.environ.get("MEDPRUNE_CACHE") or Path.home() / ".cache" / "medprune")


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
        if name not in found and name not in GROUND:
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
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
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
    except OSError as error:  # of a full disk, which names no file
        raise OSError(error.errno, error.strerror, str(path)) from None
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


def read_parts(path: Path, **kinds: type) -> dict:
    """Read a JSON file that must hold these names with values of these kinds; ValueError names the file otherwise."""
    value = read_json(path)
    wrong = [] if isinstance(value, dict) else ["object"]
    wrong += [name for name, kind in kinds.items() if not wrong and not isinstance(value.get(name), kind)]
    if wrong:
        raise ValueError(f"{path} holds no {wrong[0]} as it was written: remove it, and run its notebook again.")
    return value


def write_csv(path: Path, table: pd.DataFrame) -> Path:
    return write_text(path, table.to_csv(index=False))


def read_csv(path: Path, **options) -> pd.DataFrame:
    """Read a table as pandas does; ValueError names a file that holds none."""
    try:
        table = pd.read_csv(path, **options)
        if not isinstance(table.index, pd.RangeIndex):
            raise ValueError("lines have more cells than the first")
    except ValueError as error:  # of pandas, or of bytes that are no UTF-8
        why = " ".join(str(error).split())
        raise ValueError(f"{path} is no table ({why}): remove it, and run its notebook again.") from None
    return table


def check_new(path: str | Path) -> Path:
    """Return a folder that is to be written, before long work; ValueError where there is one already, or cannot be."""
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} is there already: name a new folder.")
    try:
        os.rmdir(tempfile.mkdtemp(dir=next(place for place in path.absolute().parents if place.exists())))
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): name a folder elsewhere.") from None
    return path


@contextmanager
def write_folder(path: Path, **record):
    """Give a temporary folder that takes `path`'s place when the block ends; what stood there is replaced.

    record: what the folder is made from, its `context` among it, for `made` to tell.
    """
    path = Path(path)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    for left in (temporary, old):  # of a killed process that had this one's number
        shutil.rmtree(left, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if record:
            write_json(temporary / RECORD, record | {"content": content(temporary)})
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
    """Return the record of a folder that was made in this very context and is as it was written, else None."""
    try:
        record = read_parts(Path(folder) / RECORD)
    except (OSError, ValueError):  # there is none, or none that can be read
        return None
    whole = "content" not in record or record["content"] == content(folder)  # an older version did not write it
    return record if whole and record.get("context") == context else None


_DAMAGED = ("not a database", "malformed", "decode to UTF-8", "can't decode")  # the last quotes what is damaged
_CURES = {"disk is full": "make room, and run again"}
_CURES |= dict.fromkeys(_DAMAGED, "remove it, and what it held is done again")


class Units:
    """Finished units of work: `key in units`, `units[key]`, `units.add(key, value)`, `units.add_all({key: value})`.

    path: an SQLite file, which several processes may read and write at once. context: what the values depend on
    (`store.context`); units of other contexts stay in the file and are not seen.
    """

    def __init__(self, path: Path, context: str):
        self.path, self.context = Path(path), context
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._ask("CREATE TABLE IF NOT EXISTS units (context TEXT, key TEXT, value TEXT, PRIMARY KEY (context, key))")

    def _ask(self, words: str, *values, each=None):
        """Return what a statement finds; each: rows of values, for all of which, or none, it is carried out."""
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as base, base:
                return (base.execute(words, values) if each is None else base.executemany(words, each)).fetchall()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            cure = next((cure for words, cure in _CURES.items() if words in str(error)), "see that it can be written")
            raise OSError(f"{self.path} cannot be used: {' '.join(str(error).split())}; {cure}.") from None

    def _found(self, key: str):
        return self._ask("SELECT value FROM units WHERE context = ? AND key = ?", self.context, key)

    def __contains__(self, key: str) -> bool:
        return bool(self._found(key))

    def __getitem__(self, key: str):
        if not (rows := self._found(key)):
            raise KeyError(key)
        try:
            return json.loads(rows[0][0])
        except (ValueError, TypeError):  # no JSON, or nothing at all
            raise ValueError(f"{self.path} is damaged at {key!r}: remove it, and what it held is done again.") from None

    def __len__(self) -> int:
        return self._ask("SELECT COUNT(*) FROM units WHERE context = ?", self.context)[0][0]

    def add(self, key: str, value) -> None:
        self.add_all({key: value})

    def add_all(self, found: dict) -> None:
        """Add what was computed together, all of it or none: the rest of a batch, computed alone, rounds otherwise."""
        each = [(self.context, key, json.dumps(value)) for key, value in found.items()]
        self._ask("INSERT OR REPLACE INTO units VALUES (?, ?, ?)", each=each)

    def drop_others(self, used: set[str], remove: bool) -> int:
        """Return how many units are of other contexts than those used; remove them if asked."""
        where = f"FROM units WHERE context NOT IN ({', '.join('?' * len(used))})"
        [[count]] = self._ask(f"SELECT COUNT(*) {where}", *sorted(used))
        if remove:
            self._ask(f"DELETE {where}", *sorted(used))
            self._ask("VACUUM")
        return count


# ---- runs
def scratch() -> Path | None:
    """Return where weights go that can be made again: MEDPRUNE_SCRATCH, or Kaggle's disk that is not kept."""
    if home := os.environ.get("MEDPRUNE_SCRATCH"):
        return Path(home).absolute()
    return Path("/kaggle/temp/medprune") if Path("/kaggle/working").is_dir() else None


def runs_home(runs_dir: str | None = None) -> Path:
    """Return where runs are kept: runs_dir, else MEDPRUNE_RUNS, else runs/ of the repository."""
    home = Path(runs_dir or os.environ.get("MEDPRUNE_RUNS") or REPO / "runs").absolute()
    if not str(home).isprintable():
        raise ValueError(f"runs_dir={str(home)!r} must be of printable characters, in UTF-8.")
    return home


def run_root(run_name, runs_dir: str | None = None) -> Path:
    """Return a run's folder; ValueError for a name that is no plain folder name."""
    name = str(run_name)
    plain = name.isprintable() and name == Path(name).name and not name.startswith((".", "-"))
    if not (plain and 0 < len(name.encode()) <= 200):
        raise ValueError(f"run_name={run_name!r} must be a plain folder name, such as 'demo'.")
    return runs_home(runs_dir) / name


class Run:
    """A run's folder and the stage that is writing. What the stage reads goes through `read`, to be remembered."""

    def __init__(self, root: Path, stage: str):
        self.root, self.stage, self.dir = Path(root), stage, Path(root) / stage
        self.inputs: dict[str, str] = {}  # hashes by path, which is the run's folder's own or absolute
        self.contexts: set[str] = set()
        self.begun = time.monotonic()

    def of(self, stage: str) -> Path:
        """Return an earlier stage's folder; ValueError says which notebook to run first if it is not finished."""
        if not (self.root / stage / "manifest.json").exists():
            raise ValueError(f"run {self.root.name!r} has no finished {stage}: run {stage} first.")
        return self.root / stage

    def read(self, stage: str, name: str) -> Path:
        """Return a file or folder of an earlier stage, an input of this one from now on.

        ValueError names a file that is not as that stage wrote it, where its manifest says how it did.
        """
        folder = self.of(stage)
        for place, wrote in read_parts(folder / "manifest.json", outputs=dict)["outputs"].items():
            if f"{place}/".startswith(f"{name}/") and content(folder / place) != wrote:
                raise ValueError(f"{folder / place} is not as {stage} wrote it: run {stage} again.")
        return self.reads(folder / name)[0]

    def reads(self, *paths: str | Path) -> list[Path]:
        """Take files or folders as inputs of this stage, and return them."""
        found = [Path(path).absolute() for path in paths]
        for path in found:
            self.inputs[str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)] = content(path)
        return found

    def weights(self, name: str) -> Path:
        """Return where a folder of weights goes: the stage's folder, or `scratch`, to which a link there leads."""
        link, home = self.dir / name, scratch()
        if home is None or (link.exists() and not link.is_symlink()):
            return link
        target = home / f"{self.root.name}-{fingerprint(str(self.root))[:6]}" / self.stage / name
        link.unlink(missing_ok=True)
        link.symlink_to(target, target_is_directory=True)
        return target

    def units(self, context: str) -> Units:
        """Return the run's units of a context, which this stage uses from now on, so that `clean` leaves them."""
        self.contexts.add(context)
        return Units(self.root / "units.sqlite", context)


def open_stage(stage, run_name, runs_dir=None, profile="auto", settings=None, **given) -> tuple[Run, Config]:
    """Open a stage of a run for writing; return (run, the settings that the stage reads).

    Notebook 01 resolves the settings and writes them to run.json; later ones take them from there, with what stages
    between have changed, and put in what is given here. Stages before it must be finished. The run is locked until
    `finish`, or until this process ends. Raises ValueError in one sentence.
    """
    run, given, first = Run(run_root(run_name, runs_dir), stage), asked(settings, given), stage == STAGES[0]
    for need in STAGES[: STAGES.index(stage)]:
        run.of(need)
    before = values_of(resolve(profile, given)) if first else settings_before(run.root, stage, profile)
    whole = values_of(build(before, given))
    run.given = set(given)  # settings that the user named
    run.overrides = {name: value for name, value in whole.items() if value != before[name]}
    lock(run.root)
    run.dir.mkdir(parents=True, exist_ok=True)
    (run.dir / "manifest.json").unlink(missing_ok=True)  # from here on the stage is not finished
    if first:
        write_json(run.root / "run.json", {"settings": whole})
    seen = seen_by(stage, whole)
    run.config = Config(seen, stage)
    given = [seen[name] for name, words in PATHS.items() if seen.get(name) and seen[name] not in words]
    run.reads(*(path for path in given if Path(path).exists()))
    return run, run.config


def settings_before(root: Path, stage: str | None = None, profile: str = "auto") -> dict:
    """Return a run's settings as the stages before `stage`, or all, left them; ValueError where its profile differs."""
    if not (root / "run.json").exists():
        raise ValueError(f"run {root.name!r} has no run.json: run {STAGES[0]} first.")
    values = read_parts(root / "run.json", settings=dict)["settings"]
    if values.get("name") not in list(PROFILES):  # which asks of no value that it has a hash
        raise ValueError(f"{root / 'run.json'} names no profile: run {STAGES[0]} again.")
    try:  # an older version wrote fewer
        values = values_of(build({"name": values["name"], **PROFILES[values["name"]]}, values))
    except ValueError as error:
        raise ValueError(f"{root / 'run.json'}: {error}") from None
    if profile not in ("auto", values["name"]):
        raise ValueError(
            f"run {root.name!r} was made with profile {values['name']!r}, not {profile!r}: "
            f"pass profile={values['name']!r}, or another run_name."
        )
    for earlier in STAGES[1 : stage and STAGES.index(stage)]:
        if (root / earlier / "manifest.json").exists():
            values |= read_manifest(root, earlier)["overrides"]
    return values


_MANIFEST = {
    "stage": str, "settings": dict, "overrides": dict, "inputs": dict, "code": str, "versions": dict, "outputs": dict,
    "contexts": list, "seconds": float, "finished": str,
}  # fmt: skip


def finish(run: Run, metrics: dict) -> None:
    """Write metrics.json and, last of all, manifest.json, whose presence says that the stage is finished."""
    write_json(run.dir / "metrics.json", metrics)
    manifest = {
        "stage": run.stage,
        "settings": values_of(run.config),
        "overrides": run.overrides,
        "inputs": run.inputs,
        "code": stage_code(run.stage),
        "versions": versions(),
        "outputs": _outputs(run.dir),
        "contexts": sorted(run.contexts),
        "seconds": round(time.monotonic() - run.begun, 1),
        "finished": datetime.now().isoformat(timespec="seconds"),
    }
    write_json(run.dir / "manifest.json", manifest | {"hash": fingerprint(manifest)})
    unlock(run.root)


def _outputs(folder: Path) -> dict[str, str]:
    """Return hashes of a stage's results: not of the notebook itself, the manifest and checkpoints."""
    passing = (".", "checkpoints-", f"{folder.name}.ipynb", "manifest.json")
    names = (f.relative_to(folder) for f in sorted(folder.rglob("*")) if f.is_file())
    return {str(n): content(folder / n) for n in names if not any(p.startswith(passing) for p in n.parts)}


def read_manifest(root: Path, stage: str) -> dict:
    """Read what a finished stage says of itself; ValueError names a file that says something else, or was edited."""
    file = root / stage / "manifest.json"
    manifest = read_parts(file, **_MANIFEST)
    whole = manifest.pop("hash", None) in (None, fingerprint(manifest))  # older versions wrote none
    if not whole or not all(isinstance(mark, str) for mark in manifest["contexts"]):
        raise ValueError(f"{file} is not as it was written: remove it, and run its notebook again.")
    return manifest


def differing(root: Path, stage: str, whole: dict) -> dict[str, tuple]:
    """Return {setting: (value that a finished stage was run with, value in `whole`)} where the two differ."""
    was = read_manifest(root, stage)["settings"]
    return {k: (was.get(k), value) for k, value in seen_by(stage, whole).items() if was.get(k) != value}


def why_undone(root: Path, stage: str, whole: dict) -> list[str]:
    """Return why a stage has to be run with these settings, in words; nothing where it is done."""
    file = root / stage / "manifest.json"
    if not file.exists():
        return ["it has not been finished"]
    was, results, now = read_manifest(root, stage), _outputs(root / stage), versions()
    other = differing(root, stage, whole)
    reasons = [f"{k} was {json.dumps(old)} and is {json.dumps(new)}" for k, (old, new) in other.items()]
    reasons += [f"{place} has changed" for place, known in was["inputs"].items() if content(root / place) != known]
    other = [name for name, known in was["outputs"].items() if results.get(name) != known]
    reasons += [f"{name} of its own results is gone or not what it wrote" for name in other]
    reasons += ["its code has changed"] if was["code"] != stage_code(stage) else []
    return reasons + [f"{k} was {v} and is {now.get(k)}" for k, v in was["versions"].items() if now.get(k) != v]


@functools.cache
def stage_code(stage: str) -> str:
    """Return a hash of a notebook's code, from its parameters on, of the package's that it imports, and of its data."""
    cells = [c for c in read_json(REPO / "notebooks" / f"{stage}.ipynb")["cells"] if c["cell_type"] == "code"]
    first = next(i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
    tree = ast.parse("\n".join("".join(c["source"]) for c in cells[first:]))
    return fingerprint(hash_of_code(tree), code(*imports(tree)), DATA)


_locks: dict[Path, FileLock] = {}


def lock(root: Path) -> None:
    """Take a run for this process; ValueError says which one has it. Kernels of `medprune run` share its own."""
    if os.environ.get("MEDPRUNE_LOCKED") == str(root) or root in _locks:
        return
    root.mkdir(parents=True, exist_ok=True)
    mine, holder = FileLock(root / ".lock"), root / ".holder.json"
    try:
        mine.acquire(timeout=0)
    except Timeout:
        by = read_json(holder) if holder.exists() else {"pid": "?", "since": "?"}
        raise ValueError(
            f"run {root.name!r} is being written by process {by['pid']} since {by['since']}: "
            "wait for it, end it (restart its notebook's kernel), or give another run_name."
        ) from None
    _locks[root] = mine
    write_json(holder, {"pid": os.getpid(), "since": datetime.now().isoformat(timespec="seconds")})


def unlock(root: Path) -> None:
    """Let other processes write a run."""
    if root in _locks:
        (root / ".holder.json").unlink(missing_ok=True)
        _locks.pop(root).release()


def describe_machine() -> dict:
    """Return what a reader needs to place a timing: processor, cores, GPU, versions."""
    import torch

    from medprune.device import cards, gpu

    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.MULTILINE)
    return {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": " + ".join(gpu().get_device_name(card) for card in range(cards())) or None,
    } | {name: versions()[name] for name in ("python", "torch", "transformers")}
