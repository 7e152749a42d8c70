"""One photograph, what is known of it, and the tables that say so, as people write them."""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

SIDES = ("train", "test")
MODALITIES = ("clinical", "dermoscopic")
TABLE_SUFFIXES = {".csv", ".tsv", ".tab", ".json", ""}  # Dataverse has HAM10000's without any
OWN = {"path", "condition"}  # columns of a user's own table
SPELLINGS = {  # of its columns, in small letters and without spaces and underscores
    **{name: name for name in ("path", "condition", "split", "modality", "history")},
    **dict.fromkeys(("patient", "patientid", "subject", "subjectid"), "patient"),
    **dict.fromkeys(("lesion", "lesionid", "case", "caseid"), "lesion"),
    **dict.fromkeys(("skintype", "skintone", "fst", "fitzpatrick", "fitspatrick"), "skin_type"),
    **dict.fromkeys(("fitzpatrickskintype", "fitzpatricktype", "fitzpatrickscale"), "skin_type"),
}
HEAD = 1 << 16  # bytes that hold a table's first line
UNKNOWN = {"", "-1", "?", "-", "unknown", "nan", "none", "null", "na", "n/a"}  # no patient, no skin type
ROMAN = ("I", "II", "III", "IV", "V", "VI")  # Fitzpatrick's skin types
TYPES = {form: roman for n, roman in enumerate(ROMAN, 1) for form in (roman.casefold(), str(n))}


@dataclass(frozen=True)
class Record:
    """One photograph; `key` is split/directory/name, for DermNet repeats names across directories."""

    key: str
    path: str
    condition: str
    split: str | None = None  # "train", "test" or None where the source gives no split
    group: str | None = None  # patient, else lesion: one's pictures stay on one side of a split
    skin_tone: str | None = None  # Fitzpatrick's type, "I" to "VI", or "I-II" where two are not told apart
    modality: str | None = None  # one of MODALITIES, or None where the source does not say
    history: str | None = None  # what the patient says of it, a sentence that goes before every question


def known(text: str | None) -> str | None:
    """Return what names a patient or lesion, None for one that is unknown; "3.0" and "3,0" are 3, "007" stays."""
    text = re.sub(r"[.,]0+$", "", (text or "").strip())
    return None if text.casefold() in UNKNOWN else text


def meaning(column: str) -> str | None:
    """Return what a column of a user's own table says, a value of SPELLINGS: of "Patient ID" it is patient."""
    return SPELLINGS.get(re.sub(r"\.\d+$|[\W_]", "", column.casefold()))  # pandas writes a second "path" as path.1


def skin_type(text: str | None) -> str | None:
    """Return a Fitzpatrick type in one form: "3.0", "3", "iii", "FST3" and "type III" are III; "12" and "1-2" are I-II.

    None for one that is unknown, such as -1 and 0; what is on another scale stays as it is.
    """
    text = known(text) or ""
    bare = re.sub(r"fitzpatrick|fst|skin|type|[\s_.:]", "", text.casefold()).strip("-")
    parts = list(bare) if bare in ("12", "34", "56") else re.split(r"[-/&]|to|and", bare)
    if len(parts) < 3 and all(part in TYPES for part in parts):
        return "-".join(TYPES[part] for part in parts)
    return None if bare in ("", "0") or bare.startswith("none") else text


def _decode(raw: bytes) -> str:
    """Decode a text file: UTF-16 by its mark or its zeros, else UTF-8, else Latin-1, which always can be."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw[: len(raw) // 2 * 2].decode("utf-16", "replace")
    if b"\0" in raw[:2]:
        return raw[: len(raw) // 2 * 2].decode("utf-16-be" if raw[0] == 0 else "utf-16-le", "replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _separator(text: str) -> str:
    """Return what stands between the columns of the first line: a comma, semicolon, tab or bar."""
    return max(",;\t|", key=text.partition("\n")[0].count)


def columns_of(path: Path) -> frozenset[str]:
    """Return the columns of a table in small letters, from its first line; of DermaVQA's JSON two of its names."""
    if path.suffix.lower() == ".parquet":
        return frozenset(next(iter(read_rows(path)), ()))
    with path.open("rb") as file:
        raw = file.read(HEAD)
    if path.suffix.lower() == ".json":
        return frozenset(name for name in ("encounter_id", "image_ids") if f'"{name}"'.encode() in raw)
    head = _decode(raw[: raw.rfind(b"\n") + 1] or raw).splitlines()[:1]
    names = next(csv.reader(head, delimiter=_separator(head[0])), []) if head else []
    return frozenset(name.strip().lower() for name in names)


def _check_cells(text: str) -> None:
    """Raise ValueError, naming the line, for a row with more cells than the first, or quotes that swallow rows."""
    how, first = {"delimiter": _separator(text), "skipinitialspace": True}, None
    swallowed = any("\n" in cell for row in csv.reader(io.StringIO(text, newline=""), **how) for cell in row)
    reader = csv.reader(io.StringIO(text, newline=""), **how, strict=swallowed)  # else '"a" ,b' may pass
    for row in reader:
        first = len(row) if first is None else first
        if any(cell.strip() for cell in row[first:]):
            more = f"its {len(row)} cells are more than the first line's {first}"
            raise ValueError(f"line {reader.line_num}: {more}: put a text with a separator in it in quotes")


def read_rows(path: Path) -> list[dict[str, str | None]]:
    """Return a table's rows as texts by column in small letters, None where a cell is empty.

    Raises ValueError naming the file where it is no table.
    """
    try:
        if path.suffix.lower() == ".parquet":
            frame = pd.read_parquet(path)
        else:
            text = _decode(path.read_bytes())
            _check_cells(text)
            how = {"sep": _separator(text), "dtype": str, "index_col": False, "skipinitialspace": True}
            frame = pd.read_csv(io.StringIO(text), **how)
        names = [str(column).strip().lower() for column in frame.columns]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two columns are named {twice[0]!r}, but for capitals and spaces")
        rows = frame.set_axis(names, axis=1).astype(object).to_dict("records")  # where bytes that are no text are met
    except Exception as error:  # pandas and pyarrow have their own exception trees
        raise ValueError(f"{path} cannot be read as a table: {' '.join(str(error).split())}") from error
    return [{name: None if pd.isna(cell) else str(cell).strip() or None for name, cell in row.items()} for row in rows]
