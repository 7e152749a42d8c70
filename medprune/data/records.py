"""Read skin photographs, list what is left out, and split them without leakage.

DermNet as Kaggle ships it, one directory per condition, and a table become the same list of `Record`.
"""

import os
import random
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PureWindowsPath

import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from medprune.data import synthetic
from medprune.data.dermnet import classify_dermnet
from medprune.data.pictures import find_duplicates, merge_groups, open_image
from medprune.data.questions import load_conditions, name_index, plain
from medprune.data.record import Record
from medprune.store import read_json, write_json

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
TABLE_SUFFIXES = {".csv", ".parquet"}
SIDES = ("train", "test")
UNKNOWN = {"", "-1", "?", "-", "unknown", "nan", "none", "null", "na", "n/a"}  # no patient, no skin type
KAGGLE = Path("/kaggle/input")  # NAME is mounted there, or since 2026 in datasets/OWNER/NAME
LAYOUTS = (
    "DIR/{train,test}/<DermNet directory>/*.jpg, DIR/<condition>/*.{jpg,png,...}, or a CSV or Parquet table "
    "with the columns path, condition and optionally patient, skin_type, split"
)

Found = Iterator[tuple[Record | None, str, str]]  # (record or None, key, "kept" or "reason: detail")


@dataclass(frozen=True)
class SplitReport:
    """What `split_records` did: keys put on the other side, (key, reason) dropped, and remarks."""

    moved: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def printable(text) -> str:
    r"""Return a text that can be written as UTF-8: a name of other bytes shows them, as L\xe4sion.jpg."""
    return os.fsencode(str(text)).decode("utf-8", "backslashreplace")


def find_source(source: str | Path) -> Path:
    """Return the folder or table of photographs that `source` names, in either place where Kaggle mounts it.

    Raises ValueError, naming what was tried, where there is none.
    """
    source, also = Path(source), ""
    if source.is_relative_to(KAGGLE) and not source.exists():
        pattern = f"datasets/*/{source.relative_to(KAGGLE)}"
        also = f", and there is no {KAGGLE / pattern}"
        source = min(KAGGLE.glob(pattern), default=source)
    if source.is_dir() or (source.is_file() and source.suffix.lower() in TABLE_SUFFIXES):
        return source
    raise ValueError(f"{printable(source)} is neither a folder nor a CSV or Parquet table{also}; expected {LAYOUTS}.")


def _visible_files(folder: Path) -> list[Path]:
    """List the files below a folder, without hidden ones and hidden folders; links are followed, but not upwards."""
    found = []
    for home, folders, names in os.walk(folder, followlinks=True):
        here = Path(home).resolve()
        folders[:] = [f for f in folders if f[0] != "." and not here.is_relative_to((here / f).resolve())]
        found += [Path(home, name) for name in names if name[0] != "."]
    return sorted(found)


def _read_directory(source: Path, conditions: dict) -> Found:
    """Read each visible file of a DermNet folder or a folder of condition folders."""
    index = name_index(conditions)
    sides = {d.name: d.name.lower() for d in source.iterdir() if d.is_dir() and d.name.lower() in SIDES}
    for path in _visible_files(source):
        top, *below = path.relative_to(source).parts
        split = sides.get(top)
        if sides and not split:
            yield None, "/".join((top, *below)), f"beside train and test: {top}"
            continue
        parts = below if split else [top, *below]
        key = "/".join(filter(None, (split, *parts)))
        label = index.get(plain(parts[0]))
        if len(parts) == 1:
            yield None, key, f"file outside the directories: {path.name}"
        elif not (label or split):
            yield None, key, f"directory names no condition: {parts[0]}"
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            yield None, key, f"not an image file: {path.name}"
        else:
            condition, why = (label, "kept") if label else classify_dermnet(parts[0], path.name, conditions)
            yield Record(key, str(path), condition, split) if condition else None, key, why


def _table_rows(source: Path) -> list[dict[str, str | None]]:
    """Return a table's rows as texts by column, None where a cell is empty."""
    try:
        if source.suffix.lower() == ".csv":
            frame = pd.read_csv(source, dtype=str, index_col=False, skipinitialspace=True)
        else:
            frame = pd.read_parquet(source)
    except Exception as error:  # pandas and pyarrow have their own exception trees
        raise ValueError(f"{source} cannot be read as a table: {' '.join(str(error).split())}") from error
    frame.columns = [str(column).strip().lower() for column in frame.columns]
    missing = {"path", "condition"} - set(frame.columns)
    if missing:
        has = ", ".join(map(repr, frame.columns)) + (": is the separator a comma?" if len(frame.columns) == 1 else "")
        raise ValueError(f"{source} lacks the column {min(missing)!r} of path and condition; it has {has}.")
    rows = frame.astype(object).to_dict("records")
    return [{name: None if pd.isna(cell) else str(cell).strip() or None for name, cell in row.items()} for row in rows]


def _known(text: str | None) -> str | None:
    """Return a patient or skin type: None for one that is unknown; "3.0" is 3."""
    text = re.sub(r"\.0+$", "", text or "")
    return None if text.casefold() in UNKNOWN else text


def _is_windows(given: str) -> bool:
    return "\\" in given or bool(PureWindowsPath(given).drive)


def _find(folder: Path, given: str) -> Path:
    """Return the file that a table names; of a Windows path, the longest end that there is in the table's folder."""
    parts = PureWindowsPath(given).parts if _is_windows(given) else ()
    ends = [folder / given, *(folder.joinpath(*parts[i:]) for i in range(len(parts)))]
    return next(filter(os.path.isfile, ends), folder / given)


def _read_table(source: Path, conditions: dict) -> Found:
    """Read each row; relative paths start at the table's folder."""
    index, rows, labels, seen = name_index(conditions), _table_rows(source), defaultdict(set), set()
    for row in rows:
        row["file"] = _find(source.parent, row["path"] or "")
        row["named"] = index.get(plain(row["condition"] or ""))
        labels[row["file"]].add(row["named"] or row["condition"])
    for row in rows:
        path, given, split = row["file"], row["path"] or "", (row.get("split") or "").lower() or None
        if split not in (None, *SIDES):
            raise ValueError(f"{source}: split {row['split']!r} of {given!r} must be train, test or empty.")
        key, why = "/".join(filter(None, (split, given.lstrip("/")))), "kept"
        if row["named"] is None:
            why = f"not among the conditions: {row['condition']}"
        elif len(labels[path]) > 1:
            why = f"listed under two conditions: {given}"
        elif path in seen:
            why = f"listed twice: {given}"
        elif not os.path.isfile(path):
            why = f"no such file{' (a Windows path)' if _is_windows(given) else ''}: {path}"
        seen.add(path)
        about = _known(row.get("patient")), _known(row.get("skin_type"))
        yield Record(key, str(path), row["named"], split, *about) if why == "kept" else None, key, why


def _unusable(path: str, check: bool) -> str | None:
    """Say why a picture cannot be used; None where it can, as far as is checked."""
    if path != printable(path):
        return f"name is not UTF-8: {path}"
    if check:
        try:
            open_image(path, max_side=64)
        except ValueError as error:
            return f"unusable image: {error}"
    return None


def _most_often(reasons: list[str]) -> str:
    """Say in words why most was left out, with up to three examples."""
    if not reasons:
        return "it is empty"
    kinds = [reason.partition(": ")[0] for reason in reasons]
    most = Counter(kinds).most_common(1)[0][0]
    details = dict.fromkeys(r.removeprefix(f"{most}: ") for r, kind in zip(reasons, kinds, strict=True) if kind == most)
    return f"{len(reasons)} entries left out, most often as {most!r}, such as {', '.join(list(details)[:3])}"


def load_images(
    source: str | Path, conditions: dict[str, dict] | None = None, check: bool = True
) -> tuple[list[Record], pd.DataFrame]:
    """Read photographs from a folder or table; return them and a report (key, reason) of what is left out.

    `conditions` is a facts dict as `load_conditions` gives it. With `check` every picture is decoded, small,
    and one that `open_image` refuses is reported and skipped. Raises ValueError where no picture is usable.
    """
    source, conditions = find_source(source), load_conditions() if conditions is None else conditions
    records, left_out = [], []
    for record, key, why in (_read_directory if source.is_dir() else _read_table)(source, conditions):
        fault = _unusable(record.path, check) if record else why
        if fault:
            left_out.append((printable(key), printable(fault)))
        else:
            records.append(record)
    if not records:
        why = _most_often([reason for _, reason in left_out])
        raise ValueError(f"{printable(source)} holds no usable image ({why}); expected {LAYOUTS}.")
    return records, pd.DataFrame(left_out, columns=["key", "reason"])


def class_counts(records: list[Record], report: pd.DataFrame) -> pd.DataFrame:
    """Count images by condition, then by reason left out; columns kept, train, test, unassigned, total."""
    rows = [(r.condition, True, r.split) for r in records]
    rows += [(why.partition(": ")[0], False, key.split("/")[0]) for key, why in report[["key", "reason"]].values]
    frame = pd.DataFrame(rows, columns=["condition or reason", "kept", "split"])
    side = frame["split"].where(frame["split"].isin(SIDES), "unassigned")
    table = pd.crosstab([frame["condition or reason"], frame["kept"]], side)
    table = table.reindex(columns=[*SIDES, "unassigned"], fill_value=0).reset_index("kept")
    table["total"] = table[[*SIDES, "unassigned"]].sum(axis=1)
    table.columns.name = None
    return table.sort_values(["kept", "total"], ascending=False, kind="stable")


def _deal(records: list[Record]) -> list[Record]:
    """Deal one record of each condition in turn, in their order: every prefix is as balanced as can be."""
    piles = defaultdict(list)
    for record in records:
        piles[record.condition].append(record)
    deals = sorted((i, name) for name, pile in piles.items() for i in range(len(pile)))
    return [piles[name][i] for i, name in deals]


def _balanced_order(records: list[Record], seed: int) -> list[Record]:
    """Shuffle within each condition, then deal."""
    rng, piles = random.Random(seed), {}
    for record in sorted(records, key=lambda r: r.key):
        piles.setdefault(record.condition, []).append(record)
    for name in sorted(piles):
        rng.shuffle(piles[name])
    return _deal([record for pile in piles.values() for record in pile])


def sample_balanced(records: list[Record], n: int, seed: int) -> list[Record]:
    """Draw n records, conditions as equal as they allow; a smaller n with the same seed gives a prefix."""
    if not 1 <= n <= len(records):
        raise ValueError(f"Cannot draw {n} of {len(records)} records; n must be between 1 and their number.")
    return _balanced_order(records, seed)[:n]


def _drop_copies(exact: list[list[str]], order: dict[str, Record]) -> dict[str, str]:
    """Return {key: reason} of equal files: all but the first in `order`, or all where their conditions differ."""
    rank = {key: i for i, key in enumerate(order)}
    dropped = {}
    for group in exact:
        keys = sorted((key for key in group if key in order), key=rank.get)
        labels = sorted({order[key].condition for key in keys})
        if len(labels) > 1:
            dropped |= dict.fromkeys(keys, f"same file under {' and '.join(labels)}")
        else:
            dropped |= dict.fromkeys(keys[1:], f"same file as {keys[0]}" if keys else "")
    return dropped


def _group(order: dict[str, Record], dropped, exact, near) -> tuple[list[list[Record]], list[list[Record]]]:
    """Return (groups that must stay on one side, groups that look alike), without what is dropped."""
    patients = defaultdict(list)
    for key, record in order.items():
        patients[record.group or ("only", key)].append(key)
    merged = merge_groups([*exact, *near, *patients.values()])
    kept = order.keys() - dropped
    bound, alike = ([[order[key] for key in keys if key in kept] for keys in found] for found in (merged, near))
    return [group for group in bound if group], alike


def _breadth(groups: list[list[Record]]) -> tuple[int, int]:
    return len({r.condition for group in groups for r in group}), len(groups)


def _draw_sides(groups: list[list[Record]], n_test: int | None, seed: int) -> dict[str, list[Record]]:
    """Draw n_test images, or a third, from groups so that each condition is on both sides where it can be.

    StratifiedGroupKFold cuts the groups into halves, or thirds; the fold that shows most conditions is taken, without
    groups that have a condition which it alone has. Conditions come in turn, small groups first, and groups without a
    test image are trained on.
    """
    numbers = [i for i, group in enumerate(groups) for _ in group]
    labels = [r.condition for group in groups for r in group]
    n_folds = min(2 if n_test else 3, len(groups), max(Counter(labels).values(), default=0))
    if n_folds < 2:
        return {"train": [r for group in groups for r in group], "test": []}
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed).split(labels, labels, numbers)
    best = []
    with warnings.catch_warnings(action="ignore"):  # that a condition has fewer images than there are folds
        for trained, held in folds:
            rest = {labels[i] for i in trained}
            fold = [groups[number] for number in sorted({numbers[i] for i in held})]
            best = max(best, [group for group in fold if rest.issuperset(r.condition for r in group)], key=_breadth)
    random.Random(seed).shuffle(best)
    test = _deal([r for group in sorted(best, key=len) for r in group])[:n_test]
    tested = set(test)
    return {"train": [r for group in groups if tested.isdisjoint(group) for r in group], "test": test}


def _keep_given(groups: list[list[Record]]) -> tuple[dict[str, list[Record]], list[str]]:
    """Put each group where most of its images are given, the test at a tie; return (sides, keys that moved)."""
    sides, moved = {side: [] for side in SIDES}, []
    for group in groups:
        votes = Counter(r.split for r in group)
        side = "test" if votes["test"] and votes["test"] >= votes["train"] else "train"
        sides[side] += group
        moved += [r.key for r in group if r.split not in (None, side)]
    return sides, moved


def _check_split(split: dict[str, list[Record]], sides: dict[str, list[Record]]) -> None:
    """Raise ValueError for an empty side, or a condition that is tested without an image to train on."""
    trained, tested = ({r.condition for r in split[side]} for side in SIDES)
    if not (trained and tested):
        why = "a patient's images stay together, as do copies, and one file under two conditions is dropped"
        names = ", ".join(sorted(trained | tested)) or "any condition"
        raise ValueError(f"No image of {names} is left to {'test' if trained else 'train'} on: {why}.")
    for condition in sorted(tested - trained):
        n_tested, n_left = (sum(r.condition == condition for r in side) for side in (split["test"], sides["train"]))
        why = f"n_train={len(split['train'])} holds none" if n_left else "given splits, patients and copies leave none"
        raise ValueError(f"{condition!r} has {n_tested} test images and none to train on: {why}.")


def split_records(
    records: list[Record],
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    exact: list[list[str]] | None = None,
    near: list[list[str]] | None = None,
) -> tuple[dict[str, list[Record]], SplitReport]:
    """Split into {"train": [...], "test": [...]}, disjoint by content and patient, class-balanced and seeded.

    Splits that the records carry are kept, and images without one are trained on; where they carry one side or none,
    `n_test` images (at most half; None: a third) go to the test. Duplicates and patients on both sides go whole to the
    side with most of their images, the test at a tie. Of equal files one is kept, the test's first; equal files under
    different conditions are all dropped. `exact` and `near` are groups as `find_duplicates` gives them, None to compute
    them. None for a size takes all; a size out of reach gives what there is, and a note. Raises ValueError for sizes
    below 1, keys that are not unique, an empty side, and a condition that is tested without an image to train on.
    """
    if any(size is not None and size < 1 for size in (n_train, n_test)):
        raise ValueError(f"{n_train=}, {n_test=}: sizes must be 1 or more.")
    order = {r.key: r for r in sorted(records, key=lambda r: (r.split != "test", r.key))}
    if len(order) < len(records):
        raise ValueError(f"{len(records)} records share {len(order)} keys; each needs its own.")
    exact = find_duplicates(records, near=False) if exact is None else exact
    near = find_duplicates(records) if near is None else near
    dropped = _drop_copies(exact, order)
    groups, alike = _group(order, dropped, exact, near)
    notes = []
    if mixed := sum(len({r.condition for r in group}) > 1 for group in alike):
        notes.append(f"{mixed} groups of near duplicates hold several conditions; each went to one side.")
    given = {r.split for r in records if r.split}
    if len(given) == 1:
        notes.append(f"Only the {min(given)} split is given; all was split afresh.")
    sides, moved = _keep_given(groups) if len(given) == 2 else (_draw_sides(groups, n_test, seed), [])
    split = {}
    for side, size in zip(SIDES, (n_train, n_test), strict=True):
        split[side] = _balanced_order(sides[side], seed)[:size]
        if size and len(split[side]) < size:
            notes.append(f"{size} {side} images were asked for; {len(split[side])} can be given.")
        absent = {r.condition for r in records} - {r.condition for r in split[side]}
        notes += [f"No {side} image shows {condition}." for condition in sorted(absent)]
    _check_split(split, sides)
    return split, SplitReport(tuple(sorted(moved)), tuple(sorted(dropped.items())), tuple(notes))


def gather_images(config, run, conditions: dict) -> tuple[list[Record], pd.DataFrame]:
    """Return (records, report of what was left out): synthetic images, drawn into the run's folder, or the user's."""
    if config.images != "synthetic":
        return load_images(config.images, conditions)
    records = []
    for split, n in (("train", config.n_train), ("test", config.n_test)):
        n_each = n // len(synthetic.CONDITIONS)
        for row in synthetic.write_images(run.dir / "images", n_each, config.image_size, config.seed, split):
            key = "/".join((split, *Path(row["path"]).parts[-2:]))
            records.append(Record(key, row["path"], row["condition"], split, None, row["skin_tone"]))
    return records, pd.DataFrame(columns=["key", "reason"])


def save_splits(run, splits: dict[str, list[Record]]) -> None:
    """Write splits.json into the folder of the stage that writes."""
    write_json(run.dir / "splits.json", {name: [asdict(r) for r in records] for name, records in splits.items()})


def load_splits(run) -> dict[str, list[Record]]:
    """Return {"train": records, "test": records} as notebook 01 made them."""
    raw = read_json(run.read("01_finetune", "splits.json"))
    return {name: [Record(**r) for r in records] for name, records in raw.items()}
