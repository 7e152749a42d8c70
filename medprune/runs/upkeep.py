"""What runs there are, and what of them nobody needs any more."""

import shutil
from pathlib import Path

import pandas as pd

from medprune.settings import STAGES
from medprune.store import Units, lock, read_csv, read_manifest, settings_before, unlock


def list_runs(home: Path) -> pd.DataFrame:
    """Return a row for each run in a folder: run, profile, stages, finished, score (of the last step), size_bytes.

    Of a run with a spoiled file `stages` says which that is.
    """
    rows = []
    for root in sorted(f.parent for f in Path(home).glob("*/run.json")):
        try:
            rows.append(_row(root))
        except (ValueError, OSError, LookupError) as error:
            rows.append([root.name, "?", f"spoiled: {error}", "", None, size_of(root)])
    return pd.DataFrame(rows, columns=["run", "profile", "stages", "finished", "score", "size_bytes"])


def _row(root: Path) -> list:
    manifests = [read_manifest(root, s) for s in STAGES if (root / s / "manifest.json").exists()]
    profile = settings_before(root, STAGES[0])["name"]
    stages = " ".join(m["stage"][:2] for m in manifests) or "none"
    finished = max((m["finished"] for m in manifests), default="")
    return [root.name, profile, stages, finished, _last_score(root), size_of(root)]


def _last_score(root: Path) -> float | None:
    """Return the mean judge score of what the last stage with scores says, most compressed model last."""
    for stage in reversed(STAGES):
        file = root / stage / "summary.csv"
        if file.exists():
            scores = read_csv(file)["score"].dropna()
            return float(scores.iloc[-1]) if len(scores) else None
        if (root / stage / "scores.csv").exists():
            table = read_csv(root / stage / "scores.csv")
            if table.empty:
                return None
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
    file = root / "units.sqlite"
    if not file.exists() or not all((root / stage / "manifest.json").exists() for stage in STAGES):
        return 0
    return Units(file, "").drop_others({c for stage in STAGES for c in read_manifest(root, stage)["contexts"]}, remove)


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
