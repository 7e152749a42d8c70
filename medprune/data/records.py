"""Read skin photographs, list what is left out, and split them without leakage.

Data sets as they are downloaded, one directory per condition, and a table become the same list of `Record`.
"""

import functools
import os
import random
import warnings
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path, PureWindowsPath

import pandas as pd

from medprune.data import synthetic
from medprune.data.pictures import check_picture, drop_copies, find_duplicates, printable
from medprune.data.published import (
    IMAGE_SUFFIXES,
    by_stem,
    find_published,
    picture_stem,
    read_folders,
    read_published,
    unwrap,
)
from medprune.data.questions import name_index, plain
from medprune.data.record import (
    MODALITIES,
    OWN,
    SIDES,
    TABLE_SUFFIXES,
    Record,
    columns_of,
    known,
    meaning,
    read_rows,
    skin_type,
)
from medprune.settings import SEARCHED
from medprune.store import read_json, read_parts, write_csv, write_json

USES = ("held out", "importance", "quantizing")  # of training pictures, which are drawn apart from each other
KAGGLE = Path("/kaggle/input")  # NAME is mounted there, or since 2026 in datasets/OWNER/NAME
LAYOUTS = (
    "a published data set as downloaded (`medprune data` says which), DIR/{train,test}/<DermNet directory>/*.jpg, "
    "DIR/<condition>/*.{jpg,png,...}, or a CSV or Parquet table with the columns path, condition and optionally "
    "patient, lesion, skin_type, modality, split, history"
)

SplitReport = namedtuple("SplitReport", "dropped notes")  # {key: reason} of what was dropped; remarks


def find_source(source: str | Path) -> Path:
    """Return the folder or table of photographs that `source` names, in either place where Kaggle mounts it.

    Raises ValueError, naming what was tried, where there is none.
    """
    source, also = Path(source), ""
    if source.is_relative_to(KAGGLE) and not source.exists():
        parts = source.relative_to(KAGGLE).parts
        pattern = "/".join(parts[2:] if parts[:1] == ("datasets",) else ("datasets", "*", *parts))
        also = f", and there is no {KAGGLE / pattern}"
        source = min(KAGGLE.glob(pattern), default=source) if pattern else source
    if source.is_dir() or (source.is_file() and source.suffix.lower() in (".parquet", *TABLE_SUFFIXES)):
        return Path(os.path.abspath(source))
    raise ValueError(f"{printable(source)} is neither a folder nor a CSV or Parquet table{also}; expected {LAYOUTS}.")


def _is_windows(given: str) -> bool:
    return "\\" in given or bool(PureWindowsPath(given).drive)


def _named(folder: Path, given: str) -> list[Path]:
    """Return the files that a table's name can mean as it is written, without its suffix perhaps, best first.

    Of another machine's whole path it is the longest end that the table's folder has.
    """
    path = PureWindowsPath(given) if _is_windows(given) else Path(given)
    ends = range(len(path.parts)) if path.is_absolute() or path.drive else [0]
    tried = [folder / given, *(folder.joinpath(*path.parts[i:]) for i in ends)]
    return tried + [folder / f"{given}{suffix}" for suffix in sorted(IMAGE_SUFFIXES)]


def _find(folder: Path, given: str, pictures_of: Callable[[Path], dict]) -> Path:
    """Return the file that a table names, or the only picture there of this name but for suffix, or how it is composed.

    pictures_of(folder): `_pictures` of one.
    """
    if found := next(filter(os.path.isfile, _named(folder, given)), None):
        return found
    alike = pictures_of((folder / given).parent).get(picture_stem(Path(given).name), [])
    return alike[0] if len(alike) == 1 else folder / given


def _pictures(folder: Path) -> dict[str, list[Path]]:
    """Return a folder's pictures by `picture_stem`."""
    files = folder.iterdir() if os.path.isdir(folder) else ()
    return by_stem(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)


def _own_rows(source: Path) -> list[dict[str, str | None]]:
    """Return the rows of a user's table by what its columns say (`meaning`).

    Raises ValueError where it lacks one of its two columns, or two say the same.
    """
    rows = read_rows(source)
    columns = list(rows[0]) if rows else columns_of(source)
    if missing := OWN.difference(columns):
        has = ", ".join(map(repr, columns)) or "none"
        raise ValueError(f"{source} lacks the column {min(missing)!r} of path and condition; it has {has}.")
    given = {}
    for column in columns:
        said = meaning(column)
        if said and given.setdefault(said, column) != column:
            raise ValueError(f"{source} has two columns for the {said}, {given[said]!r} and {column!r}: leave one out.")
    return [{said: row[column] for said, column in given.items()} for row in rows]


def unread_columns(source: Path) -> list[str]:
    """Return the columns of a user's own table that nothing is made of; of any other source none."""
    columns = columns_of(source) if source.is_file() else frozenset()
    return sorted(c for c in columns if c and not meaning(c)) if columns >= OWN else []


def _read_table(source: Path, conditions: dict) -> Iterator[tuple[Record, str]]:
    """Yield (record, "kept" or "reason: detail") for each row; relative paths start at the table's folder."""
    index, rows, labels, seen = name_index(conditions), _own_rows(source), defaultdict(set), set()
    pictures_of = functools.cache(_pictures)
    for row in rows:
        row["file"] = _find(source.parent, row["path"] or "", pictures_of)
        row["named"] = index.get(plain(row["condition"] or ""))
        labels[row["file"]].add(row["named"] or row["condition"])
    for row in rows:
        path, given = row["file"], row["path"] or ""
        split, kind = ((row.get(name) or "").lower() or None for name in ("split", "modality"))
        if split not in (None, *SIDES):
            raise ValueError(f"{source}: split {row['split']!r} of {given!r} must be train, test or empty.")
        if kind not in (None, *MODALITIES):
            raise ValueError(
                f"{source}: modality {row['modality']!r} of {given!r} must be {', '.join(MODALITIES)} or empty."
            )
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
        tone, history = skin_type(row.get("skin_type")), (row.get("history") or "").strip() or None
        group = known(row.get("patient")) or known(row.get("lesion"))
        yield Record(key, str(path), row["named"], split, group, tone, kind, history), why


def _most_often(reasons: list[str]) -> str:
    """Say in words why most was left out, with up to three examples."""
    if not reasons:
        return "it is empty"
    most = Counter(reason.partition(": ")[0] for reason in reasons).most_common(1)[0][0] + ": "
    details = dict.fromkeys(reason.removeprefix(most) for reason in reasons if reason.startswith(most))
    return f"{len(reasons)} entries left out, most often as {most[:-2]!r}, such as {', '.join(list(details)[:3])}"


def _check_modality(source: Path, rows: list[tuple[Record, str]], modality: str | None) -> list[tuple[Record, str]]:
    """Leave out pictures of another modality than is asked for.

    Raises ValueError where both are there and none is asked for, or none is of the modality that is.
    """
    if modality not in (None, "both", *MODALITIES):
        raise ValueError(f"modality={modality!r} must be clinical, dermoscopic or both.")
    counts = Counter(record.modality for record, why in rows if why == "kept")
    said = {kind: n for kind, n in counts.items() if kind}
    held = " and ".join(f"{n} {kind}" for kind, n in sorted(said.items()))
    if modality is None and len(said) > 1:
        advice = "set modality to clinical, dermoscopic or both, or give a folder of one kind"
        raise ValueError(f"{printable(source)} holds {held} pictures, which are not mixed unless asked: {advice}.")
    if modality in (None, "both"):
        return rows
    if said and not (said.get(modality) or counts[None]):
        raise ValueError(f"{printable(source)} holds {held} pictures, and modality={modality} takes none of them.")
    other = {kind: f"not the modality asked for: {kind}" for kind in MODALITIES if kind != modality}
    return [(record, other.get(record.modality, why) if why == "kept" else why) for record, why in rows]


def load_images(
    source: str | Path, conditions: dict[str, dict], check=True, modality: str | None = None, history=True
) -> tuple[list[Record], pd.DataFrame]:
    """Read photographs from a folder or table; return them and a report (key, reason) of what is left out.

    `conditions` is a facts dict as `load_conditions` gives it. With `check` every picture is decoded, small,
    and one that `open_image` refuses is reported and skipped. `modality`: "clinical", "dermoscopic" or "both"; None
    takes what there is, and refuses to mix. `history`: with what patients say, where the source knows it. Raises
    ValueError where no picture is usable, and for a folder whose own table stands in it.
    """
    source = find_source(source)
    rows = _check_modality(source, list(_rows_of(source, conditions)), modality)
    records, left_out = [], []
    for record, why in rows:
        why = check_picture(record.path, check) if why == "kept" else why
        if why == "kept":
            records.append(record if history else replace(record, history=None))
        else:
            left_out.append((printable(record.key), printable(why)))
    if not records:
        why = _most_often([reason for _, reason in left_out])
        raise ValueError(f"{printable(source)} holds no usable image ({why}); expected {LAYOUTS}.")
    return records, pd.DataFrame(left_out, columns=["key", "reason"])


def _own_table(source: Path, files: list[Path]) -> str | None:
    """Return the name of a user's own table that stands in a folder of conditions, whose files these are."""
    homes, kinds = (source, unwrap(source, {})), (".parquet", *TABLE_SUFFIXES)
    beside = (path for path in files if path.parent in homes and path.suffix.lower() in kinds and path.is_file())
    return next((printable(path.name) for path in beside if columns_of(path) >= OWN), None)


def _rows_of(source: Path, conditions: dict) -> Iterator[tuple[Record, str]]:
    tables, files, root = find_published(source)
    if tables:
        return read_published(tables, files, root, conditions)
    if source.is_file():
        return _read_table(source, conditions)
    if table := _own_table(source, files):
        how = f"which may know of patients: give {table} itself, or move it"
        raise ValueError(f"{printable(source)} has a table of its own, {table}, {how}.")
    return read_folders(unwrap(source, name_index(conditions)), files, conditions)


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


def describe_images(
    source: str | Path, conditions: dict[str, dict], modality: str | None = None
) -> tuple[list[str], list[Record]]:
    """Return (lines that say what a folder or table holds, what is left out and what is lacking; the records).

    Raises ValueError as `load_images` does.
    """
    source = find_source(source)
    records, report = load_images(source, conditions, modality=modality)
    tables, _, root = find_published(source)
    names = [f"{table.set}, by the columns of {printable(table.path.relative_to(root))}" for table in tables]
    folders = "DermNet, by its directories" if records[0].modality else "one folder per condition"
    names = names or [folders if source.is_dir() else "a table, by its columns path and condition"]
    unread = unread_columns(source)
    kinds = Counter(r.modality or "modality not said" for r in records)
    frame = pd.DataFrame([(r.condition, r.group or r.key, r.skin_tone or "unknown") for r in records])
    counts = frame.groupby(0).agg(pictures=(1, "size"), groups=(1, "nunique"))
    counts = counts.join(pd.crosstab(frame[0], frame[2].map("type {}".format)))
    lines = [f"recognised: {'; '.join(names)}", f"{len(records)} pictures: {_most(kinds)}"]
    lines += [f"columns not read: {', '.join(unread)}"] if unread else []
    lines.append(counts.rename_axis(None).to_string())
    lines.append("a group is a patient, else a lesion, else a picture of its own")
    single = counts.index[(counts["groups"] == 1) & (counts["pictures"] > 1)]
    lines += [f"{name}: all of one patient or lesion, so that no other is left to test on" for name in single]
    lines.append(f"left out: {len(report)}")
    reasons = defaultdict(Counter)
    for why in report["reason"]:
        reason, _, detail = why.partition(": ")
        reasons[reason][detail] += 1
    for reason, details in sorted(reasons.items(), key=lambda pair: -pair[1].total()):
        lines.append(f"  {details.total()} {reason}: {_most(details)}")
    lacking = [name for name in conditions if name not in counts.index]
    return [*lines, f"conditions without a picture: {', '.join(lacking) or 'none'}"], records


def _most(counts: Counter) -> str:
    """Say how many of each, the most frequent; where none comes twice, name three."""
    top = counts.most_common(8 if max(counts.values()) > 1 else 3)
    said = [f"{name} {n}" if n > 1 else name for name, n in top]
    return ", ".join(said + ["..."] * (len(counts) > len(top)))


def check_table(out: str | Path) -> None:
    """Raise ValueError where `save_table` should not write: a suffix but .csv, no such folder, or what there is."""
    out = Path(out)
    if out.suffix.lower() != ".csv":
        raise ValueError(f"--out {printable(out)} must end in .csv: a table is written.")
    if not out.parent.is_dir():
        raise ValueError(f"--out {printable(out)} has no folder to go to: make {printable(out.parent)} first.")
    if out.exists():
        raise ValueError(f"--out {printable(out)} exists already: name a new file, or remove that one.")


def save_table(records: list[Record], out: str | Path) -> None:
    """Write a table that `images` takes: paths start at its folder where the pictures lie below it."""
    out = Path(out)
    home = Path(os.path.abspath(out.parent))
    paths = [Path(os.path.abspath(r.path)) for r in records]
    paths = [path.relative_to(home) if path.is_relative_to(home) else path for path in paths]
    rows = [
        (path, r.condition, r.group, r.skin_tone, r.modality, r.split, r.history)
        for path, r in zip(paths, records, strict=True)
    ]
    columns = ["path", "condition", "patient", "skin_type", "modality", "split", "history"]
    write_csv(out, pd.DataFrame(rows, columns=columns))


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


def sample_balanced(records: list[Record], n: int, seed: int, use: str | None = None) -> list[Record]:
    """Draw n records, conditions as equal as they allow; a smaller n with the same seed gives a prefix.

    use: one of USES, which draw from a third of each condition's records each, so that no two share a picture; where
    its third is too small, a use takes of the others' too.
    """
    if not 1 <= n <= len(records):
        raise ValueError(f"Cannot draw {n} of {len(records)} records; n must be between 1 and their number.")
    dealt = _deal(sorted(records, key=lambda r: r.key), random.Random(seed))
    if use is not None:
        seen, turns = Counter(), {}
        for record in dealt:
            turns[record.key] = seen[record.condition] % len(USES)
            seen[record.condition] += 1
        dealt.sort(key=lambda record: turns[record.key] != USES.index(use))
    return dealt[:n]


def repeat_rare(records: list[Record], balance: float) -> list[Record]:
    """Return the records, those of a condition (most / n) ** balance times, rounded, that n of them show.

    0 repeats none, 0.5 evens out half of what conditions differ by, 1 lets all come about equally often.
    """
    counts = Counter(r.condition for r in records)
    most = max(counts.values(), default=0)
    return [r for r in records for _ in range(round((most / counts[r.condition]) ** balance))]


def _group(by_key: dict[str, Record], same: list[list[str]], dropped) -> list[list[Record]]:
    """Return the groups that must stay on one side, of one patient or of the same picture, without what is dropped."""
    from scipy.cluster.hierarchy import DisjointSet  # half a second that `medprune ask` need not wait

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
    from sklearn.model_selection import StratifiedGroupKFold  # here, as in data.pictures

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


def _check_split(split: dict[str, list[Record]], sides: dict[str, list[Record]], groups: list[list[Record]]) -> None:
    """Raise ValueError for an empty side, or a condition that is tested without an image to train on."""
    if len(groups) == 1 and len(groups[0]) > 1:
        who = " and ".join(sorted({f"patient {r.group!r}" for r in groups[0] if r.group})) or "one picture"
        raise ValueError(f"All {len(groups[0])} images are of {who} and stay together: a test needs another patient's.")
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
    dropped = drop_copies(exact, by_key)
    groups = _group(by_key, near, dropped)
    notes = []
    if mixed := sum(len({by_key[key].condition for key in keys if key not in dropped}) > 1 for keys in near):
        notes.append(f"{mixed} groups of near duplicates hold several conditions; each went to one side.")
    given = {r.split for r in records if r.split}
    if len(given) == 1:
        notes.append(f"Only the {min(given)} split is given; all was split afresh.")
    sides = _keep_given(groups) if len(given) == 2 else _draw_sides(groups, n_test, seed)
    split, shown = {}, Counter(condition for group in groups for condition in {r.condition for r in group})
    for side, size in zip(SIDES, (n_train, n_test), strict=True):
        split[side] = _deal(sorted(sides[side], key=lambda r: r.key), random.Random(seed))[:size]
        if size and len(split[side]) < size:
            notes.append(f"{size} {side} images were asked for; {len(split[side])} can be given.")
        for condition in sorted({r.condition for r in records} - {r.condition for r in split[side]}):
            only = shown[condition] == 1
            notes.append(f"No {side} image shows {condition}{': all are of one patient or picture' * only}.")
    _check_split(split, sides, groups)
    return split, SplitReport(dropped, tuple(notes))


def _listed_files(source: Path, conditions: dict) -> list[Path]:
    """Return what a table's pictures are read from: of a published set's its folder, where they may lie anywhere.

    Of an own table's the files that it names, and where one is lacking those that it could be.
    """
    if source.is_dir():
        return []
    tables, _, root = find_published(source)
    paths = [root] if tables else [Path(record.path) for record, _ in _rows_of(source, conditions)]
    return [each for p in paths for each in ([p] if os.path.exists(p) else _named(p.parent, p.name))]


def check_trained(records: list[Record], awq_rows: int, source: str | Path) -> None:
    """Raise ValueError where the training pictures are too few for notebooks 05 and 07, or show one condition alone."""
    if len(shown := {r.condition for r in records}) < 2:
        raise ValueError(
            f"{source} shows {' and '.join(shown) or 'nothing'} alone to train on: two conditions are needed."
        )
    if len(records) < (need := awq_rows + SEARCHED):
        why = f"{need} are needed, awq_rows={awq_rows} to quantize by and {SEARCHED} to search with"
        raise ValueError(
            f"{source} has {len(records)} pictures to train on, but {why}: give more, or set awq_rows lower."
        )


def check_training(records: list[Record], run) -> None:
    """Raise ValueError as `check_trained` does for the settings of a run, of which 01 itself does not read all."""
    settings = read_parts(run.root / "run.json", settings=dict)["settings"]
    check_trained(records, settings["awq_rows"], settings["images"])


def gather_images(config, run, conditions: dict) -> tuple[list[Record], pd.DataFrame]:
    """Return (records, report of what was left out): synthetic images, drawn into the run's folder, or the user's."""
    if config.images != "synthetic":
        source = find_source(config.images)
        inputs = [source, *_listed_files(source, conditions)]
        if within := [path for path in inputs if run.root.is_relative_to(path)]:
            raise ValueError(
                f"the run's folder {run.root} lies among the photographs of {within[0]}: give another runs_dir."
            )
        records, left_out = load_images(source, conditions, modality=config.modality, history=config.history)
        run.reads(*inputs)
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
