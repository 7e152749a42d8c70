"""Recognise data sets as they are downloaded, and read what they say of each picture.

A set is recognised by the columns of its table, DermNet by its directories. Which condition a code stands for is said
line by line in data/published_labels.csv, and for DermNet's file names in data/dermnet_classes.json.
"""

import ast
import functools
import json
import re
import unicodedata
from collections import Counter, defaultdict, namedtuple
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path, PureWindowsPath

from medprune.data.questions import name_index, named_conditions, plain, words
from medprune.data.record import OWN, SIDES, TABLE_SUFFIXES, Record, columns_of, known, read_rows, skin_type
from medprune.settings import DATA
from medprune.store import read_json, visible_files

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
DENIED = re.compile(r"\b(not|no|unlikely|ruled? out|exclude\w*|differential|versus|vs)\b", re.IGNORECASE)

Listed = namedtuple("Listed", "image label group skin_type modality split why history", defaults=(None,) * 6)
Table = namedtuple("Table", "set path read others")  # read: of SETS; others: {path: columns} of every table found


def _beside(table: Table, *columns: str) -> dict[Path, list[dict]]:
    """Return {path: rows} of the tables with these columns that lie with this one, or one folder up or down."""
    home = table.path.parent.parent
    found = (path for path, has in table.others.items() if has.issuperset(columns) and path != table.path)
    return {path: read_rows(path) for path in found if path.is_relative_to(home)}


def _ham10000(table: Table, conditions) -> Iterator[Listed]:
    for r in read_rows(table.path):
        history = _history(r.get("age"), r.get("sex"), r.get("localization"))
        yield Listed(r["image_id"], r["dx"], r["lesion_id"], None, "dermoscopic", history=history)


COMPLAINTS = {  # PAD-UFES-20's columns, in words
    "elevation": ("raised", "flat"),
    "itch": ("itches", "does not itch"),
    "hurt": ("hurts", "does not hurt"),
    "bleed": ("has bled", "has not bled"),
    "grew": ("has grown", "has not grown"),
    "changed": ("has changed", "has not changed"),
}


def _pad_ufes_20(table: Table, conditions) -> Iterator[Listed]:
    """What the patient says of the lesion goes along; whether it was biopsied does not, for it tells the diagnosis."""
    for r in read_rows(table.path):
        tone = r.get("fitspatrick") or r.get("fitzpatrick")  # the first is the set's own spelling
        cells = {name: (r.get(name) or "").casefold() for name in COMPLAINTS}  # "unk" is neither
        said = [COMPLAINTS[name][cell == "false"] for name, cell in cells.items() if cell in ("true", "false")]
        history = _history(r.get("age"), None, r.get("region"), *said)
        yield Listed(r["img_id"], r["diagnostic"], r["patient_id"], tone, "clinical", history=history)


def _history(age: str | None, sex: str | None, place: str | None, *said: str) -> str | None:
    """Return "Aged 60 to 69, on the back, itches." of what is known: ages in decades, as few patients share a year."""
    parts = []
    if years := re.match(r"\d+", age or ""):
        decade = int(years[0]) // 10 * 10
        parts.append(f"aged {decade} to {decade + 9}")
    if sex := known(sex):
        parts.append(sex.lower())
    if place := known(place):
        parts.append(f"on the {place.lower()}")
    text = ", ".join([*parts, *said])
    return f"{text[0].upper()}{text[1:]}." if text else None


def _one_hot(table: Table, conditions) -> Iterator[Listed]:
    """Read ISIC's ground truth, a column for each code; lesions are in a table beside it."""
    lesions = {r["image"]: r["lesion_id"] for rows in _beside(table, "image", "lesion_id").values() for r in rows}
    for r in read_rows(table.path):
        codes = [name for name, cell in r.items() if cell in ("1", "1.0") and not name.endswith("_weight")]
        why = None if len(codes) == 1 else f"not one diagnosis: {', '.join(codes) or 'none is marked'}"
        yield Listed(r["image"], " ".join(codes), lesions.get(r["image"]), None, "dermoscopic", None, why)


def _isic_2020(table: Table, conditions) -> Iterator[Listed]:
    pairs = [r for rows in _beside(table, "image_name_1", "image_name_2").values() for r in rows]
    copies = {r["image_name_2"]: f"the set's own list of duplicates has it: of {r['image_name_1']}" for r in pairs}
    for r in read_rows(table.path):
        why = copies.get(r["image_name"])
        yield Listed(r["image_name"], r["diagnosis"], r["patient_id"], None, "dermoscopic", None, why)


def _fitzpatrick17k(table: Table, conditions) -> Iterator[Listed]:
    for r in read_rows(table.path):
        wrong = (r.get("qc") or "").startswith("3")
        why = f"wrongly labelled, says the set's qc: {r['label']}" if wrong else None
        yield Listed(r["md5hash"], r["label"], None, r["fitzpatrick_scale"], "clinical", None, why)


def _ddi(table: Table, conditions) -> Iterator[Listed]:
    for r in read_rows(table.path):
        yield Listed(r["ddi_file"], r["disease"], None, r.get("skin_tone"), "clinical")


def _scin(table: Table, conditions) -> Iterator[Listed]:
    """Read cases with up to three pictures; the label is the condition that has most of the dermatologists' weight.

    The skin type is what most of them say, or else the user's own word.
    """
    said = {r["case_id"]: r for rows in _beside(table, "weighted_skin_condition_label").values() for r in rows}
    if not said:
        raise ValueError(f"{table.path} names no condition: SCIN's scin_labels.csv must lie beside it.")
    index = name_index(conditions)
    for case in read_rows(table.path):
        labels = said.get(case["case_id"], {})
        weights = _weights(labels.get("weighted_skin_condition_label"))
        sums = Counter()
        for label, weight in weights.items():
            sums[condition_of("SCIN", label, index)[0] or label] += weight
        label, most = next(iter(sums.most_common(1)), (None, 1))
        why = None if most > 0.5 else f"dermatologists disagree: {', '.join(weights)}"
        tones = Counter(filter(None, (labels.get(f"dermatologist_fitzpatrick_skin_type_label_{i}") for i in (1, 2, 3))))
        agreed = [tone for tone, n in tones.items() if n == max(tones.values())]
        tone = agreed[0] if len(agreed) == 1 else case.get("fitzpatrick_skin_type")
        for image in filter(None, (case.get(f"image_{i}_path") for i in (1, 2, 3))):
            yield Listed(image, label, case["case_id"], tone, "clinical", None, why)


def _weights(text: str | None) -> dict[str, float]:
    """Return SCIN's {label: weight}, which is a Python dict in a cell of the table."""
    try:
        return {str(label): float(weight) for label, weight in ast.literal_eval(text or "{}").items()}
    except (ValueError, SyntaxError, AttributeError, TypeError) as error:
        raise ValueError(f"SCIN's weighted_skin_condition_label {text!r} is no dict of numbers.") from error


def _derm7pt(table: Table, conditions) -> Iterator[Listed]:
    """Read cases with two pictures, one of each kind; {train,valid,test}_indexes.csv count its rows from 0."""
    lists = {path.name.split("_")[0]: rows for path, rows in _beside(table, "indexes").items()}
    sides = {r["indexes"]: side for side, rows in lists.items() for r in rows}
    for i, r in enumerate(read_rows(table.path)):
        for kind, column in (("dermoscopic", "derm"), ("clinical", "clinic")):
            yield Listed(r[column], r["diagnosis"], r["case_num"], None, kind, sides.get(str(i)))


def _skincap(table: Table, conditions) -> Iterator[Listed]:
    for r in read_rows(table.path):
        unfit = known(r.get("do not consider this image")) in ("1", "True")
        why = f"not to be considered, says the set: {r['disease']}" if unfit else None
        tone = r.get("fitzpatrick_scale") or r.get("skin_tone")
        yield Listed(r["skincap_file_path"], r["disease"], None, tone, "clinical", None, why)


def _derm1m(table: Table, conditions) -> Iterator[Listed]:
    """Read Derm1M, whose pictures come from papers, videos and forums: it does not say which are dermoscopic."""
    for r in read_rows(table.path):
        yield Listed(r["filename"], r["disease_label"])


def _cases(path: Path) -> list[dict]:
    """Return DermaVQA's cases; ValueError naming the file where it is no list of them."""
    try:
        return [dict(case) | {"image_ids": list(case["image_ids"])} for case in json.loads(path.read_bytes())]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no list of cases with image_ids, as DermaVQA's is.") from error


def _dermavqa(table: Table, conditions) -> Iterator[Listed]:
    """Read doctors' answers in words: the label is the one condition that the most frequent answers name.

    Answers that deny or weigh are left out, for a name in them is no diagnosis.
    """
    side = next((side for side in ("train", "valid", "test") if side in table.path.stem.lower()), None)
    for case in _cases(table.path):
        answers = case.get("responses") or []
        frequent = [a for a in answers if float(a.get("contains_freq_ans") or 0) == 1] or answers
        text = " ".join(str(a.get("content_en") or "") for a in frequent)
        named, why = named_conditions(text, conditions), None
        if len(named) != 1:
            why = f"answers name {'several conditions' if named else 'no condition'}: {case['encounter_id']}"
        elif DENIED.search(text):
            why = f"answers deny or weigh a diagnosis: {case['encounter_id']}"
        for image in case["image_ids"]:
            yield Listed(image, " ".join(named[:1]), case["encounter_id"], None, "clinical", side, why)


SETS = (
    ("HAM10000", "lesion_id image_id dx", _ham10000),
    ("HAM10000", "image mel nv bcc akiec bkl df vasc", _one_hot),  # as ISIC 2018, task 3, has it
    ("PAD-UFES-20", "patient_id img_id diagnostic", _pad_ufes_20),
    ("ISIC 2019", "image mel nv bcc ak bkl df vasc scc", _one_hot),
    ("ISIC 2020", "image_name patient_id diagnosis benign_malignant", _isic_2020),
    ("Fitzpatrick17k", "md5hash fitzpatrick_scale label", _fitzpatrick17k),
    ("DDI", "ddi_file disease", _ddi),
    ("SCIN", "case_id image_1_path", _scin),
    ("Derm7pt", "case_num diagnosis clinic derm", _derm7pt),
    ("SkinCAP", "skincap_file_path disease", _skincap),
    ("Derm1M", "filename disease_label", _derm1m),
    ("DermaVQA", "encounter_id image_ids", _dermavqa),
)


def find_published(source: Path) -> tuple[list[Table], list[Path], Path]:
    """Return (tables of published sets in a folder, or the one that a table is; all files there; the folder).

    A table's folder is the one that holds it, or where that has no picture (Derm7pt's meta/) the one above.
    """
    root, asked = source, None
    if source.is_file():
        asked = columns_of(source)
        if not _set_of(asked):
            return [], [], source.parent
        source = source.absolute()
        root = source.parent
    files = visible_files(root)
    if asked and not any(path.suffix.lower() in IMAGE_SUFFIXES for path in files):
        root = root.parent
        files = visible_files(root)
    columns = {path: columns_of(path) for path in files if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()}
    if asked:
        columns[source] = asked
    found = [(path, _set_of(has)) for path, has in columns.items() if path == source or not asked]
    return [Table(is_set[0], path, is_set[2], columns) for path, is_set in found if is_set], files, root


def _set_of(columns: frozenset[str]) -> tuple | None:
    """Return the row of SETS whose columns a table has; a user's own table, with path and condition, is none."""
    if columns.issuperset(OWN):
        return None
    return next((row for row in SETS if columns.issuperset(row[1].split())), None)


@functools.cache
def _label_map() -> dict[tuple[str, str], str]:
    rows = read_rows(DATA / "published_labels.csv")
    return {(row["set"], plain(row["code"])): row["condition"] for row in rows}


def condition_of(name: str, label: str | None, index: dict[str, str]) -> tuple[str | None, str]:
    """Return (condition or None, what the label means) for a set's label; `index` is `name_index` of the facts.

    A facts file that has the label itself among its names decides; else data/published_labels.csv, for this set or any.
    """
    means = _label_map().get((name, plain(label or ""))) or _label_map().get(("any", plain(label or "")))
    return index.get(plain(label or "")) or index.get(plain(means or "")), means or label or "none given"


def picture_stem(name: str) -> str:
    """Return a picture's name without its suffix, and as Unicode composes it; ISIC 2019 marks some as smaller."""
    name = unicodedata.normalize("NFC", name)
    stem, dot, suffix = name.rpartition(".")
    return (stem if f"{dot}{suffix.lower()}" in IMAGE_SUFFIXES else name).removesuffix("_downsampled")


def _shared(given: str, path: Path) -> int:
    """Count the folders, from the file upwards, that a table's name and a path have in common."""
    pairs = zip(PureWindowsPath(given).parts[-2::-1], path.parts[-2::-1], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def by_stem(found: Iterable[Path]) -> dict[str, list[Path]]:
    """Return files by `picture_stem`."""
    pictures = defaultdict(list)
    for path in found:
        pictures[picture_stem(path.name)].append(path)
    return pictures


def _match(names: list[str], found: list[Path]) -> list[list[Path]]:
    """Return for each name of a table the files that it can mean, best first.

    Names may lack suffix or folders. Where a folder of one name is found, those of all others must be: Derm1M has the
    same name in several.
    """
    pictures, matches = by_stem(found), []
    for name in names:
        last = PureWindowsPath(name).name
        alike = pictures[picture_stem(last)]
        ranked = [(-_shared(name, path), path.name != last, len(path.parts), path) for path in alike]
        matches.append(sorted(ranked))
    placed = any(ranked and ranked[0][0] for ranked in matches)
    deep = [placed and len(PureWindowsPath(name).parts) > 1 for name in names]
    return [[path for n, *_, path in ranked if n or not must] for ranked, must in zip(matches, deep, strict=True)]


def read_published(
    tables: list[Table], files: list[Path], root: Path, conditions: dict[str, dict]
) -> Iterator[tuple[Record, str]]:
    """Yield (record, "kept" or "reason: detail") for each picture that published tables list, or that none does.

    Pictures are looked for below a table's folder, or, where that has none, below the one that holds it.
    """
    index = name_index(conditions)
    found = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    rows, copies = _listed(tables, found, conditions)
    place = {path: path.relative_to(root).as_posix() for path in (*found, *copies)}
    for path, first in copies.items():
        yield Record(place[path], str(path), None), f"another table of what {first.name} lists: {place[path]}"
    meant = {(name, listed.label): condition_of(name, listed.label, index) for name, listed, _ in rows}
    labels, seen, others = defaultdict(set), set(), set()
    for name, listed, paths in rows:
        condition, means = meant[name, listed.label]
        labels[paths[0] if paths else None].add(condition or means)
        others.update(paths[1:])
    several = len({table.set for table in tables}) > 1
    for name, listed, paths in rows:
        path, split = paths[0] if paths else None, listed.split if listed.split in SIDES else None
        condition, means = meant[name, listed.label]
        why = _doubt(listed, path, condition, means, index)
        if path and len(labels[path]) > 1:
            why = f"listed under two conditions: {listed.image}"
        elif path in seen:
            why = f"listed twice: {listed.image}"
        seen.update(paths[:1])
        group = known(listed.group)
        group = f"{name} {group}" if several and group else group
        key = "/".join(filter(None, (split, place[path] if path else listed.image or "no name")))
        tone = skin_type(listed.skin_type)
        yield Record(key, str(path), condition, split, group, tone, listed.modality, listed.history), why
    for path in found:
        if path not in seen:
            why = "another file of a listed picture" if path in others else "in no table"
            yield Record(place[path], str(path), None), f"{why}: {place[path]}"


def _doubt(listed: Listed, path: Path | None, condition: str | None, means: str, index: dict[str, str]) -> str:
    """Return "kept", or why a row's picture cannot be taken, as far as the row alone says."""
    if not path:
        return f"listed, but no such picture: {listed.image}"
    if listed.why:
        return listed.why
    if listed.split not in (None, *SIDES):
        return f"beside train and test: {listed.split}"
    if not condition:
        code = f" ({listed.label})" if listed.label and listed.label != means else ""
        return f"not among the conditions: {means}{code}"
    if (folder := index.get(plain(path.parent.name), condition)) != condition:
        return f"in a folder of {folder}, but listed as {condition}: {listed.image}"
    return "kept"


def _listed(tables: list[Table], found: list[Path], conditions: dict) -> tuple[list[tuple], dict[Path, Path]]:
    """Return ([(set, Listed, files that it can be, best first)], {table that says nothing new: table that does}).

    Of two tables of one set the one that knows more groups is read first.
    """
    whole = [(table, list(table.read(table, conditions))) for table in tables]
    whole.sort(key=lambda pair: -sum(listed.group is not None for listed in pair[1]))
    rows, copies, read = [], {}, defaultdict(dict)
    for table, listed in whole:
        known_from = read[table.set]
        if listed and all(each.image in known_from for each in listed):
            copies[table.path] = known_from[listed[0].image]
            continue
        known_from |= {each.image: table.path for each in listed}
        home = table.path.parent
        near = [path for path in found if path.is_relative_to(home)]
        near = near or [path for path in found if path.is_relative_to(home.parent)]
        matches = _match([each.image or "" for each in listed], near)
        rows += [(table.set, each, paths) for each, paths in zip(listed, matches, strict=True)]
    return rows, copies


@functools.cache
def _rules() -> dict:
    return read_json(DATA / "dermnet_classes.json")


def dermnet_slug(file_name: str) -> str:
    """Reduce a file name to its class: 07RosaceaK0216.jpg to rosacea-k, Lichen-Planus-Oral-5.jpg likewise."""
    stem = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", file_name.rsplit(".", 1)[0])
    return re.sub(r"[^a-z]+", "-", stem.lower()).strip("-")


def classify_dermnet(class_dir: str, file_name: str, conditions: dict[str, dict]) -> tuple[str | None, str]:
    """Return (condition, "kept") or (None, "reason: class") for one DermNet picture; `conditions` is a facts dict.

    A picture counts where its file name says the condition, for the 23 directories are mixtures. A condition
    without a rule is found by its name and aliases at the start of the file name.
    """
    rules, slug, directory = _rules(), dermnet_slug(file_name), class_dir.casefold()

    def first(candidates: list[dict]) -> dict | None:
        tests = (("directory", directory), ("name", slug))
        fits = (rule for rule in candidates if all(re.search(rule.get(part, ""), text) for part, text in tests))
        return next(fits, None)

    hits, traps = [], []
    for name, facts in conditions.items():
        rule = rules["conditions"].get(name)
        if rule is None:
            aliases = [words(alias) for alias in (name, *facts["aliases"])]
            if any(words(slug)[: len(alias)] == alias for alias in aliases):
                hits.append(name)
        elif first(rule["include"]):
            trap = first(rule["exclude"])
            traps.append(trap["reason"]) if trap else hits.append(name)
    left_out = first(rules["left_out"]) if hits or traps else None
    if left_out:
        return None, f"{left_out['reason']}: {slug}"
    if len(hits) == 1:
        return hits[0], "kept"
    unnamed = "no diagnosis in the file name" if re.search(rules["unnamed"], slug) else "another disease"
    return None, f"{'names two diagnoses' if hits else [*traps, unnamed][0]}: {slug}"


def unwrap(folder: Path, index: dict[str, str]) -> Path:
    """Return the folder inside folders that hold nothing else, as in dermnet/dermnet/train."""
    below = [path for path in folder.iterdir() if path.name[0] != "."]
    if len(below) != 1 or below[0].name.lower() in SIDES or plain(below[0].name) in index:
        return folder
    return unwrap(below[0], index) if below[0].is_dir() and any(d.is_dir() for d in below[0].iterdir()) else folder


def read_folders(source: Path, files: list[Path], conditions: dict) -> Iterator[tuple[Record, str]]:
    """Yield (record, "kept" or "reason: detail") for each visible file of a DermNet folder or of condition folders.

    DermNet's train directory may be given alone.
    """
    index = name_index(conditions)
    sides = {d.name: d.name.lower() for d in source.iterdir() if d.is_dir() and d.name.lower() in SIDES}
    alone = source.name.lower() in SIDES
    for path in files:
        top, *below = path.relative_to(source).parts
        split = sides.get(top)
        parts = below if split else [top, *below]
        label, why = index.get(plain(parts[0])), "kept"
        if sides and not split:
            why = f"beside train and test: {top}"
        elif len(parts) == 1:
            why = f"file outside the directories: {path.name}"
        elif not (label or split or alone):
            why = f"directory names no condition: {parts[0]}"
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            why = f"not an image file: {path.name}"
        elif not label:
            label, why = classify_dermnet(parts[0], path.name, conditions)
        kind = None if index.get(plain(parts[0])) else "clinical"  # DermNet, whose dermoscopy is left out by name
        yield Record("/".join([split or top, *below]), str(path), label, split, modality=kind), why
