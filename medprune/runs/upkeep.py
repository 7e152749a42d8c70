"""What runs there are, and what of them nobody needs any more."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pandas as pd

from medprune.settings import STAGES
from medprune.store import lock, read_json, unlock


def list_runs(home: Path) -> pd.DataFrame:
    """Return a row for each run in a folder: run, profile, stages, finished, score (of the last step), size_bytes."""
    rows = []
    for root in sorted(f.parent for f in Path(home).glob("*/run.json")):
        manifests = [read_json(f) for stage in STAGES if (f := root / stage / "manifest.json").exists()]
        profile = read_json(root / "run.json")["settings"]["name"]
        stages = " ".join(m["stage"][:2] for m in manifests) or "none"
        finished = max((m["finished"] for m in manifests), default="")
        rows.append([root.name, profile, stages, finished, _last_score(root), size_of(root)])
    return pd.DataFrame(rows, columns=["run", "profile", "stages", "finished", "score", "size_bytes"])


def _last_score(root: Path) -> float | None:
    """Return the mean judge score of what the last stage with scores says, most compressed model last."""
    for stage in reversed(STAGES):
        file = root / stage / "summary.csv"
        if file.exists():
            return float(pd.read_csv(file)["score"].dropna().iloc[-1])
        if (root / stage / "scores.csv").exists():
            table = pd.read_csv(root / stage / "scores.csv")
            return float(table[table["method"] == table["method"].iloc[-1]]["score_percent"].mean())
    return None


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file() and not f.is_symlink())


def needless(root: Path) -> list[Path]:
    """Return what of a run may go: checkpoints of finished stages, and what a kill or an older version left.

    Where a stage is unfinished its checkpoints stay, for it goes on from them.
    """
    if not (root / "run.json").exists():
        raise ValueError(f"{root} is no run: it has no run.json.")
    found = [*root.rglob(".*.tmp"), *root.rglob(".*.old"), *root.glob("*.jsonl"), *root.glob("*/*.jsonl")]
    for stage in STAGES:
        if (root / stage / "manifest.json").exists():
            found += (root / stage).glob("checkpoints-*")
    return sorted(set(found))


def stale_units(root: Path, remove: bool = False) -> int:
    """Return how many units of work no finished stage has used (answers of other settings, say); remove them if asked.

    Only where every stage is finished: what an unfinished one is about to use cannot be told.
    """
    manifests, file = [root / stage / "manifest.json" for stage in STAGES], root / "units.sqlite"
    if not file.exists() or not all(m.exists() for m in manifests):
        return 0
    used = {context for m in manifests for context in read_json(m)["contexts"]}
    where = f"FROM units WHERE context NOT IN ({', '.join('?' * len(used))})"
    with closing(sqlite3.connect(file, timeout=60)) as base:
        (count,) = base.execute(f"SELECT COUNT(*) {where}", sorted(used)).fetchone()
        if remove:
            with base:
                base.execute(f"DELETE {where}", sorted(used))
            base.execute("VACUUM")
    return count


def clean(root: Path) -> int:
    """Remove what `needless` and `stale_units` find; return the bytes that were freed."""
    before = size_of(root)
    lock(root)
    try:
        for path in needless(root):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        stale_units(root, remove=True)
    finally:
        unlock(root)
    return before - size_of(root)
