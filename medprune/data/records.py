"""Read skin photographs, list what is left out, and split them without leakage.

DermNet as Kaggle ships it, one directory per condition, and a table become the same list of `Record`.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from medprune.data import synthetic
from medprune.data.dermnet import classify_dermnet
from medprune.data.pictures import find_duplicates, merge_groups, open_image
from medprune.data.questions import load_conditions, name_index, words
from medprune.data.record import Record
from medprune.settings import Profile
from medprune.store import Run, read_json, write_json

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


LAYOUTS = (
    "DIR/{train,test}/<DermNet directory>/*.jpg, DIR/<condition>/*.{jpg,png,...}, or a CSV or Parquet table "
    "with the columns path, condition and optionally patient, skin_type, split"
)


@dataclass(frozen=True)
class SplitReport:
    """What `split_records` did: keys put on the other side, (key, reason) dropped, and remarks."""

    moved: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def _read_directory(source: Path, conditions: dict) -> Iterator[tuple[Record | None, str, str]]:
    """Yield (record or None, key, reason) for all in a DermNet folder or a folder of condition folders."""
    index = name_index(conditions)
    roots = [(d.name.lower(), d) for d in sorted(source.iterdir()) if d.name.lower() in ("train", "test")]
    for split, root in roots or [(None, source)]:
        for entry in sorted(p for p in root.iterdir() if not p.name.startswith(".")):
            prefix, label = f"{split}/" if split else "", index.get("".join(words(entry.name)))
            if entry.is_file() or not (label or split):
                why = "file outside the directories" if entry.is_file() else "directory names no condition"
                yield None, prefix + entry.name, f"{why}: {entry.name}"
                continue
            for path in sorted(p for p in entry.rglob("*") if p.is_file() and not p.name.startswith(".")):
                key = f"{prefix}{entry.name}/{path.relative_to(entry).as_posix()}"
                if path.suffix.lower() not in IMAGE_SUFFIXES:
                    yield None, key, f"not an image file: {path.name}"
                    continue
                found = (label, "kept") if label else classify_dermnet(entry.name, path.name, conditions)
                yield (Record(key, str(path), found[0], split) if found[0] else None), key, found[1]


def _as_text(value) -> str | None:
    """Render a cell: None where empty, 4.0 as "4" (a column of whole numbers with gaps is read as floats)."""
    if pd.isna(value):
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip() or None


def _read_table(source: Path, conditions: dict) -> Iterator[tuple[Record | None, str, str]]:
    """Yield (record or None, key, reason) for each row; relative paths start at the table's folder."""
    try:
        frame = pd.read_csv(source, dtype=str) if source.suffix.lower() == ".csv" else pd.read_parquet(source)
    except Exception as error:  # pandas and pyarrow have their own exception trees
        raise ValueError(f"{source} cannot be read as a table: {error}") from error
    missing = {"path", "condition"} - set(frame.columns)
    if missing:
        raise ValueError(f"{source} lacks the column {min(missing)!r}; a table needs path and condition.")
    index, seen = name_index(conditions), set()
    labels = frame.groupby("path")["condition"].nunique()
    for row in frame.astype(object).to_dict("records"):
        row = {column: _as_text(value) for column, value in row.items()}
        given, split = row["path"] or "", (row.get("split") or "").lower() or None
        if split not in (None, "train", "test"):
            raise ValueError(f"{source}: split {row['split']!r} of {given!r} must be train, test or empty.")
        key = "/".join(filter(None, (split, given.lstrip("/"))))
        condition = index.get("".join(words(row["condition"] or "")))
        path = source.parent / given
        reasons = {
            "not among the conditions": condition is None,
            "listed under two conditions": labels.get(given, 0) > 1,
            "listed twice": given in seen,
            "no such file": not path.is_file(),
        }
        seen.add(given)
        reason = next((f"{text}: {row['condition']}" for text, applies in reasons.items() if applies), "kept")
        record = Record(key, str(path), condition, split, row.get("patient"), row.get("skin_type"))
        yield (record if reason == "kept" else None), key, reason


def load_images(
    source: str | Path, conditions: dict[str, dict] | None = None, check: bool = True
) -> tuple[list[Record], pd.DataFrame]:
    """Read photographs from a folder or table; return them and a report (key, reason) of what is left out.

    `conditions` is a facts dict as `load_conditions` gives it. With `check` every picture is decoded, small,
    and one that `open_image` refuses is reported and skipped. Raises ValueError where no picture is usable.
    """
    source, conditions = Path(source), load_conditions() if conditions is None else conditions
    if not source.is_dir() and not (source.is_file() and source.suffix.lower() in (".csv", ".parquet")):
        raise ValueError(f"{source} is neither a folder nor a CSV or Parquet table; expected {LAYOUTS}.")
    records, left_out = [], []
    for record, key, reason in (_read_directory if source.is_dir() else _read_table)(source, conditions):
        if record and check:
            try:
                open_image(record.path, max_side=64)
            except ValueError as error:
                record, reason = None, f"unusable image: {error}"
        records.append(record) if record else left_out.append((key, reason))
    if not records:
        most = Counter(reason.split(": ")[0] for _, reason in left_out).most_common(1)
        why = f"{len(left_out)} entries left out, most often as {most[0][0]!r}" if most else "it is empty"
        raise ValueError(f"{source} holds no usable image ({why}); expected {LAYOUTS}.")
    return records, pd.DataFrame(left_out, columns=["key", "reason"])


def class_counts(records: list[Record], report: pd.DataFrame) -> pd.DataFrame:
    """Count images by condition, then by reason left out; columns kept, train, test, unassigned, total."""
    rows = [(r.condition, True, r.split or "unassigned") for r in records]
    for key, reason in report[["key", "reason"]].itertuples(index=False):
        split = key.split("/")[0]
        rows.append((reason.split(": ")[0], False, split if split in ("train", "test") else "unassigned"))
    frame = pd.DataFrame(rows, columns=["condition or reason", "kept", "split"])
    table = pd.crosstab([frame["condition or reason"], frame["kept"]], frame["split"])
    table = table.reindex(columns=["train", "test", "unassigned"], fill_value=0).reset_index("kept")
    table["total"] = table[["train", "test", "unassigned"]].sum(axis=1)
    table.columns.name = None
    return table.sort_values(["kept", "total"], ascending=False, kind="stable")


def _balanced_order(records: list[Record], seed: int) -> list[Record]:
    """Shuffle within each condition, then deal one of each in turn: every prefix is as balanced as can be."""
    rng, piles = random.Random(seed), {}
    for record in sorted(records, key=lambda r: r.key):
        piles.setdefault(record.condition, []).append(record)
    for name in sorted(piles):
        rng.shuffle(piles[name])
    deals = sorted((i, name) for name, pile in piles.items() for i in range(len(pile)))
    return [piles[name][i] for i, name in deals]


def sample_balanced(records: list[Record], n: int, seed: int) -> list[Record]:
    """Draw n records, conditions as equal as they allow; a smaller n with the same seed gives a prefix."""
    if not 1 <= n <= len(records):
        raise ValueError(f"Cannot draw {n} of {len(records)} records; n must be between 1 and their number.")
    return _balanced_order(records, seed)[:n]


def _count(records: list[Record]) -> Counter:
    return Counter(r.condition for r in records)


def _choose_test(units: list[list[Record]], want: Counter, seed: int) -> list[list[Record]]:
    """Choose units for the test side until each condition has the wanted images, leaving some to train on."""
    total, have, chosen, rest = _count([r for unit in units for r in unit]), Counter(), [], []
    for unit in random.Random(seed).sample(units, len(units)):
        gain = _count(unit)
        fits = all(have[c] + k <= want[c] and have[c] + k < total[c] for c, k in gain.items())
        (chosen if fits else rest).append(unit)
        have += gain if fits else Counter()
    for unit in sorted(rest, key=len):  # a condition that still has no test image gets its smallest unit
        if any(want[r.condition] and not have[r.condition] for r in unit):
            chosen.append(unit)
            have += _count(unit)
    return chosen


def split_records(
    records: list[Record],
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    exact: list[list[str]] | None = None,
    near: list[list[str]] | None = None,
    test_frac: float = 1 / 3,
) -> tuple[dict[str, list[Record]], SplitReport]:
    """Split into {"train": [...], "test": [...]}, disjoint by content and patient, class-balanced and seeded.

    Splits that the records carry are kept; where they carry one side or none, `n_test` images (None:
    `test_frac` of each condition, at least one) go to the test. Duplicates and patients on both sides go
    whole to the side with most of their images, the test at a tie. Of equal files one is kept, the test's
    first; equal files under different conditions are all dropped. `exact` and `near` are groups as
    `find_duplicates` gives them, None to compute them. None for a size takes all; a size out of reach gives
    what there is, and a note. Raises ValueError for sizes below 1, a test_frac outside 0..1, or keys that are
    not unique.
    """
    if any(size is not None and size < 1 for size in (n_train, n_test)) or not 0 < test_frac < 1:
        raise ValueError(f"{n_train=}, {n_test=}, {test_frac=}: sizes must be 1 or more, test_frac in 0..1.")
    order = {r.key: r for r in sorted(records, key=lambda r: (r.split != "test", r.key))}
    if len(order) < len(records):
        raise ValueError(f"{len(records)} records share {len(order)} keys; each needs its own.")
    exact = find_duplicates(records, near=False) if exact is None else exact
    near = find_duplicates(records) if near is None else near
    rank = {key: i for i, key in enumerate(order)}
    dropped: dict[str, str] = {}
    notes: list[str] = []
    for group in exact:
        keys = sorted((key for key in group if key in order), key=rank.get)
        labels = sorted({order[key].condition for key in keys})
        for key in keys if len(labels) > 1 else keys[1:]:
            conflict = f"same file under {' and '.join(labels)}"
            dropped[key] = conflict if len(labels) > 1 else f"same file as {keys[0]}"
    left = [{order[key].condition for key in group if key in order and key not in dropped} for group in near]
    if mixed := sum(len(labels) > 1 for labels in left):
        notes.append(f"{mixed} groups of near duplicates hold several conditions; each went to one side.")
    patients: dict[str, list[str]] = {}
    for r in records:
        patients.setdefault(r.group or f"only {r.key}", []).append(r.key)
    merged = merge_groups([*exact, *near, *patients.values()])
    units = [[order[key] for key in unit if key in order and key not in dropped] for unit in merged]
    given = {r.split for r in records if r.split}
    if len(given) == 1:
        notes.append(f"Only the {min(given)} split is given; all was split afresh.")
    sides: dict[str, list[Record]] = {"train": [], "test": []}
    moved, free = [], []
    for unit in filter(None, units):
        votes = Counter(r.split for r in unit if r.split)
        if len(given) < 2 or not votes:
            free.append(unit)
            continue
        side = "train" if votes["train"] > votes["test"] else "test"
        sides[side] += unit
        moved += [r.key for r in unit if r.split not in (None, side)]
    pool = [r for unit in free for r in unit]
    in_pool, want = _count(pool), Counter()
    if n_test:
        stays = {r.condition: r for r in pool if in_pool[r.condition] > 1}  # one of each to train on
        may_go = [r for r in pool if r is not stays.get(r.condition)]
        want = _count(_balanced_order([*sides["test"], *may_go], seed)[:n_test]) - _count(sides["test"])
    elif not sides["test"]:
        want = Counter({c: max(1, round(test_frac * k)) for c, k in in_pool.items()})
    for unit in _choose_test(free, want, seed):
        sides["test"] += unit
    in_test = {r.key for r in sides["test"]}
    sides["train"] += [r for r in pool if r.key not in in_test]
    split = {}
    for side, size in (("train", n_train), ("test", n_test)):
        split[side] = _balanced_order(sides[side], seed)[:size]
        if size and len(split[side]) < size:
            notes.append(f"{size} {side} images were asked for; {len(split[side])} can be given.")
        absent = {r.condition for r in records} - {r.condition for r in split[side]}
        notes += [f"No {side} image shows {condition}." for condition in sorted(absent)]
    return split, SplitReport(tuple(sorted(moved)), tuple(sorted(dropped.items())), tuple(notes))


def gather_images(config: Profile, run: Run, conditions: dict):
    """Return (records, report of what was left out): synthetic images, drawn into the run's folder, or the user's."""
    if config.images != "synthetic":
        return load_images(config.images, conditions)
    folder = run.dir / "images"
    records = []
    for split, n in (("train", config.n_train), ("test", config.n_test)):
        rows = synthetic.write_images(folder, n // len(synthetic.CONDITIONS), config.image_size, config.seed, split)
        for row in rows:
            path = Path(row["path"])
            key = f"{split}/{path.parent.name}/{path.name}"
            records.append(Record(key, str(path), row["condition"], split, None, row["skin_tone"]))
    return records, pd.DataFrame({"key": [], "reason": []})


def save_splits(run: Run, splits: dict) -> None:
    write_json(run.dir / "splits.json", {name: [asdict(r) for r in records] for name, records in splits.items()})


def load_splits(run: Run) -> dict:
    """Return {"train": records, "test": records} as notebook 01 made them."""
    raw = read_json(run.of("01_finetune") / "splits.json")
    return {name: [Record(**r) for r in records] for name, records in raw.items()}
