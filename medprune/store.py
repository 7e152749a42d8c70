"""A run's folders: what a stage writes, atomically, and how it finds what is done already.

runs/<name>/<stage>/ holds manifest.json, metrics.json, tables as CSV, long lists as JSONL, weights as folders.
A unit of work (a block scored, a model's answers, a judgement) is one JSONL line under the `context` it was made
in: a hash of everything that decides its value. Lines of another context stay in the file and are not used.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from medprune.settings import REPO, Profile, settings

_VERSIONS = ("torch", "transformers", "peft", "autoawq", "bitsandbytes", "sentence-transformers", "numpy")


@dataclass(frozen=True)
class Run:
    """A run's folder and the stage that is writing: `run.dir` is its own, `run.of(stage)` an earlier one's."""

    root: Path
    stage: str

    @property
    def dir(self) -> Path:
        return self.root / self.stage

    def of(self, stage: str) -> Path:
        """Return an earlier stage's folder; ValueError says which notebook to run first if it is not there."""
        if not (self.root / stage / "manifest.json").exists():
            raise ValueError(f"run {self.root.name!r} has no finished {stage}: run {stage} first.")
        return self.root / stage


def open_run(run_name: str, stage: str, config: Profile, needs=(), runs_dir: str | None = None) -> Run:
    """Open a stage of a run, checking that the stages it needs are finished and of the same profile."""
    if not run_name or Path(run_name).name != run_name:
        raise ValueError(f"run_name={run_name!r} must be a plain folder name, such as 'demo'.")
    root = Path(runs_dir or os.environ.get("MEDPRUNE_RUNS") or REPO / "runs") / run_name
    run = Run(root.absolute(), stage)
    for need in needs:
        made_with = read_json(run.of(need) / "manifest.json")["parameters"]["name"]
        if made_with != config.name:
            raise ValueError(
                f"run {run_name!r} was made with profile {made_with!r}, not {config.name!r}: "
                f"pass profile={made_with!r}, or another run_name."
            )
    run.dir.mkdir(parents=True, exist_ok=True)
    return run


def finish(run: Run, config: Profile, metrics: dict, inputs: dict | None = None) -> None:
    """Write metrics.json and, last of all, manifest.json, whose presence says that the stage is finished."""
    write_json(run.dir / "metrics.json", metrics)
    write_json(
        run.dir / "manifest.json",
        {
            "stage": run.stage,
            "parameters": settings(config),
            "inputs": inputs or {},
            "versions": {name: version(name) for name in _VERSIONS} | {"python": platform.python_version()},
        },
    )


def fingerprint(*values) -> str:
    """Return a short hash of JSON-able values; a Path stands for the bytes of the file, or files, it names."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Path):
            for file in sorted(value.rglob("*")) if value.is_dir() else [value]:
                if file.is_file() and file.name != "README.md":
                    with open(file, "rb") as f:
                        digest.update(file.name.encode() + hashlib.file_digest(f, "sha256").digest())
        else:
            digest.update(json.dumps(value, sort_keys=True, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def write_text(path: Path, text: str) -> Path:
    """Write a file so that a reader sees the old text or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    return path


def write_json(path: Path, value) -> Path:
    return write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def read_json(path: Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_csv(path: Path, table: pd.DataFrame) -> Path:
    return write_text(path, table.to_csv(index=False))


@contextmanager
def write_folder(path: Path):
    """Give a temporary folder that takes `path`'s place when the block ends; what stood there is replaced."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)


class Units:
    """Finished units of work in a JSONL file: `key in units`, `units[key]`, `units.add(key, value)`."""

    def __init__(self, path: Path, context: str):
        self.path, self.context, self._done = Path(path), context, {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for line in _whole_lines(self.path):
            if line["context"] == context:
                self._done[line["key"]] = line["value"]

    def __contains__(self, key):
        return key in self._done

    def __getitem__(self, key):
        return self._done[key]

    def __len__(self):
        return len(self._done)

    def add(self, key: str, value) -> None:
        line = json.dumps({"context": self.context, "key": key, "value": value})
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(line + "\n")
            f.flush()
            os.fsync(f.fileno())
        self._done[key] = value


def _whole_lines(path: Path) -> list[dict]:
    """Return the records of a JSONL file, cutting off a last line that a kill left unfinished."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    end = raw.rfind(b"\n") + 1
    if end < len(raw):
        with open(path, "r+b") as f:
            f.truncate(end)
    return [json.loads(line) for line in raw[:end].splitlines()]


def describe_machine() -> dict:
    """Return what a reader needs to place a timing: processor, cores, GPU, versions."""
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x), model)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
