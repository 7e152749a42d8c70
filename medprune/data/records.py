"""Read skin photographs, list what is left out, and split them without leakage.

DermNet as Kaggle ships it, one directory per condition, and a table become the same list of `Record`.
"""

import os
import random
import re
import warnings
from collections import Counter, defaultdict, namedtuple
from collections.abc import Iterator
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path, PureWindowsPath

import pandas as pd
from scipy.cluster.hierarchy import DisjointSet
from sklearn.model_selection import StratifiedGroupKFold

from medprune.data import synthetic
from medprune.data.dermnet import classify_dermnet
from medprune.data.pictures import find_duplicates, open_image
from medprune.data.questions import name_index, plain
from medprune.data.record import Record
from medprune.store import read_json, write_json

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
SIDES = ("train", "test")
UNKNOWN = {"", "-1", "?", "-", "unknown", "nan", "none", "null", "na", "n/a"}  # no patient, no skin type
KAGGLE = Path("/kaggle/input")  # NAME is mounted there, or since 2026 in datasets/OWNER/NAME
LAYOUTS = (
    "DIR/{train,test}/<DermNet directory>/*.jpg, DIR/<condition>/*.{jpg,png,...}, or a CSV or Parquet table "
    "with the columns path, condition and optionally patient, skin_type, split"
)

SplitReport = namedtuple("SplitReport", "dropped notes")  # {key: reason} of what was dropped; remarks


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
    if source.is_dir() or (source.is_file() and source.suffix.lower() in (".csv", ".parquet")):
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


def _read_directory(source: Path, conditions: dict) -> Iterator[tuple[Record, str]]:
    """Yield (record, "kept" or "reason: detail") for each visible file of a DermNet folder or of condition folders."""
    index = name_index(conditions)
    sides = {d.name: d.name.lower() for d in source.iterdir() if d.is_dir() and d.name.lower() in SIDES}
    for path in _visible_files(source):
        top, *below = path.relative_to(source).parts
        split = sides.get(top)
        parts = below if split else [top, *below]
        label, why = index.get(plain(parts[0])), "kept"
        if sides and not split:
            why = f"beside train and test: {top}"
        elif len(parts) == 1:
            why = f"file outside the directories: {path.name}"
        elif not (label or split):
            why = f"directory names no condition: {parts[0]}"
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            why = f"not an image file: {path.name}"
        elif not label:
            label, why = classify_dermnet(parts[0], path.name, conditions)
        yield Record("/".join([split or top, *below]), str(path), label, split), why


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


def _read_table(source: Path, conditions: dict) -> Iterator[tuple[Record, str]]:
    """Yield (record, "kept" or "reason: detail") for each row; relative paths start at the table's folder."""
    index, rows, labels, seen = name_index(conditions), _table_rows(source), defaultdict(set), set()
    for row in rows:
        row["file"] = _find(source.parent, row["path"] or "")
        row["named"] = index.get(plain(row["condition"] or ""))
        labels[row["file"]].add(row["named"] or row["condition"])
    for row in rows:
        path, given, split = row["file"], row["path"] or "", (row.get("split") or "").lower() or None
        if split not in (None, *SIDES):
            raise ValueError(f"{source}: split {row['split']!r} of {given!r} must be train, test or empty.")
        why = "kept"
        if row["named"] is None:
            why = f"not among the conditions: {row['condition']}"
        elif len(labels[path]) > 1:
            why = f"listed under two conditions: {given}"
        elif path in seen:
            why = f"listed twice: {given}"
        elif not os.path.isfile(path):
            why = f"no such file{' (a Windows path)' if _is_windows(given) else ''}: {path}"
        seen.add(path)
        key = "/".join(filter(None, (split, given.lstrip("/"))))
        yield Record(key, str(path), row["named"], split, _known(row.get("patient")), _known(row.get("skin_type"))), why


def _check_picture(path: str, decode: bool) -> str:
    """Return "kept", or why a picture cannot be used, as far as is checked."""
    if path != printable(path):
        return f"name is not UTF-8: {path}"
    try:
        if decode:
            open_image(path, max_side=64)
    except ValueError as error:
        return f"unusable image: {error}"
    return "kept"


def _most_often(reasons: list[str]) -> str:
    """Say in words why most was left out, with up to three examples."""
    if not reasons:
        return "it is empty"
    most = Counter(reason.partition(": ")[0] for reason in reasons).most_common(1)[0][0] + ": "
    details = dict.fromkeys(reason.removeprefix(most) for reason in reasons if reason.startswith(most))
    return f"{len(reasons)} entries left out, most often as {most[:-2]!r}, such as {', '.join(list(details)[:3])}"


def load_images(source: str | Path, conditions: dict[str, dict], check=True) -> tuple[list[Record], pd.DataFrame]:
    """Read photographs from a folder or table; return them and a report (key, reason) of what is left out.

    `conditions` is a facts dict as `load_conditions` gives it. With `check` every picture is decoded, small,
    and one that `open_image` refuses is reported and skipped. Raises ValueError where no picture is usable.
    """
    source = find_source(source)
    read = _read_directory if source.is_dir() else _read_table
    records, left_out = [], []
    for record, why in read(source, conditions):
        why = _check_picture(record.path, check) if why == "kept" else why
        if why == "kept":
            records.append(record)
        else:
            left_out.append((printable(record.key), printable(why)))
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
    table = table.reindex(columns=[*SIDES, "unassigned"], fill_value=0).rename_axis(columns=None)
    table["total"] = table.sum(axis=1)
    return table.reset_index("kept").sort_values(["kept", "total"], ascending=False, kind="stable")


def _deal(records: list[Record], rng: random.Random | None = None) -> list[Record]:
    """Deal one record of each condition in turn: every prefix is as balanced as can be.

    Within a condition they come in their order, or are shuffled where there is an `rng`.
    """
    piles = defaultdict(list)
    for record in records:
        piles[record.condition].append(record)
    piles = [piles[name] for name in sorted(piles)]
    if rng:
        for pile in piles:
            rng.shuffle(pile)
    return [record for deal in zip_longest(*piles) for record in deal if record]


def sample_balanced(records: list[Record], n: int, seed: int) -> list[Record]:
    """Draw n records, conditions as equal as they allow; a smaller n with the same seed gives a prefix."""
    if not 1 <= n <= len(records):
        raise ValueError(f"Cannot draw {n} of {len(records)} records; n must be between 1 and their number.")
    return _deal(sorted(records, key=lambda r: r.key), random.Random(seed))[:n]


def _drop_copies(exact: list[list[str]], by_key: dict[str, Record]) -> dict[str, str]:
    """Return {key: reason} of equal files: all but one, the test's first, or all where their conditions differ."""
    dropped = {}
    for group in exact:
        first, *others = sorted(group, key=lambda key: (by_key[key].split != "test", key))
        labels = sorted({by_key[key].condition for key in group})
        if len(labels) > 1:
            dropped |= dict.fromkeys(group, f"same file under {' and '.join(labels)}")
        else:
            dropped |= dict.fromkeys(others, f"same file as {first}")
    return dropped


def _group(by_key: dict[str, Record], same: list[list[str]], dropped) -> list[list[Record]]:
    """Return the groups that must stay on one side, of one patient or of the same picture, without what is dropped."""
    patients = defaultdict(list)
    for key, record in by_key.items():
        patients[record.group or ("only", key)].append(key)
    sets = DisjointSet(by_key)
    for first, *others in [*same, *patients.values()]:
        for key in others:
            sets.merge(first, key)
    groups = [[by_key[key] for key in keys if key not in dropped] for keys in sorted(map(sorted, sets.subsets()))]
    return [group for group in groups if group]


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
    fits = []
    with warnings.catch_warnings(action="ignore"):  # that a condition has fewer images than there are folds
        for trained, held in folds:
            rest = {labels[i] for i in trained}
            fold = [groups[number] for number in sorted({numbers[i] for i in held})]
            fits.append([group for group in fold if rest.issuperset(r.condition for r in group)])
    best = max(fits, key=lambda fold: (len({r.condition for group in fold for r in group}), len(fold)))
    random.Random(seed).shuffle(best)
    test = _deal([r for group in sorted(best, key=len) for r in group])[:n_test]
    tested = set(test)
    return {"train": [r for group in groups if tested.isdisjoint(group) for r in group], "test": test}


def _keep_given(groups: list[list[Record]]) -> dict[str, list[Record]]:
    """Put each group on the side where most of its images are given, the test at a tie."""
    sides = {side: [] for side in SIDES}
    for group in groups:
        votes = Counter(r.split for r in group)
        sides["test" if votes["test"] >= max(1, votes["train"]) else "train"] += group
    return sides


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
    records: list[Record], n_train: int | None = None, n_test: int | None = None, seed: int = 0
) -> tuple[dict[str, list[Record]], SplitReport]:
    """Split into {"train": [...], "test": [...]}, disjoint by content and patient, class-balanced and seeded.

    Splits that the records carry are kept, and images without one are trained on; where they carry one side or none,
    `n_test` images (at most half; None: a third) go to the test. Duplicates and patients on both sides go whole to the
    side with most of their images, the test at a tie. Of equal files one is kept, the test's first; equal files under
    different conditions are all dropped. None for a size takes all; a size out of reach gives what there is, and a
    note. Raises ValueError for keys that are not unique, an empty side, and a condition that is tested without an image
    to train on.
    """
    by_key = {r.key: r for r in records}
    if len(by_key) < len(records):
        raise ValueError(f"{len(records)} records share {len(by_key)} keys; each needs its own.")
    exact, near = find_duplicates(records)
    dropped = _drop_copies(exact, by_key)
    groups = _group(by_key, near, dropped)
    notes = []
    if mixed := sum(len({by_key[key].condition for key in keys if key not in dropped}) > 1 for keys in near):
        notes.append(f"{mixed} groups of near duplicates hold several conditions; each went to one side.")
    given = {r.split for r in records if r.split}
    if len(given) == 1:
        notes.append(f"Only the {min(given)} split is given; all was split afresh.")
    sides = _keep_given(groups) if len(given) == 2 else _draw_sides(groups, n_test, seed)
    split = {}
    for side, size in zip(SIDES, (n_train, n_test), strict=True):
        split[side] = _deal(sorted(sides[side], key=lambda r: r.key), random.Random(seed))[:size]
        if size and len(split[side]) < size:
            notes.append(f"{size} {side} images were asked for; {len(split[side])} can be given.")
        absent = {r.condition for r in records} - {r.condition for r in split[side]}
        notes += [f"No {side} image shows {condition}." for condition in sorted(absent)]
    _check_split(split, sides)
    return split, SplitReport(dropped, tuple(notes))


def gather_images(config, run, conditions: dict) -> tuple[list[Record], pd.DataFrame]:
    """Return (records, report of what was left out): synthetic images, drawn into the run's folder, or the user's."""
    if config.images != "synthetic":
        source = find_source(config.images)
        records, left_out = load_images(source, conditions)
        run.reads(source, *(() if source.is_dir() else (r.path for r in records)))
        return records, left_out
    records = []
    for split, n in (("train", config.n_train), ("test", config.n_test)):
        n_each = n // len(synthetic.CONDITIONS)
        records += synthetic.write_images(run.dir / "images", n_each, config.image_size, config.seed, split)
    return records, pd.DataFrame(columns=["key", "reason"])


def save_splits(run, splits: dict[str, list[Record]]) -> None:
    """Write splits.json into the folder of the stage that writes; a run's own pictures by their place in the run."""
    root = f"{run.root}/"
    rows = {name: [asdict(r) | {"path": r.path.removeprefix(root)} for r in side] for name, side in splits.items()}
    write_json(run.dir / "splits.json", rows)


def load_splits(run) -> dict[str, list[Record]]:
    """Return {"train": records, "test": records} as notebook 01 made them."""
    raw = read_json(run.read("01_finetune", "splits.json"))
    return {name: [Record(**r | {"path": str(run.root / r["path"])}) for r in rows] for name, rows in raw.items()}
