"""One HTML page of headings, text, tables and pictures: nothing to load, for a phone too, light or dark."""

import base64
import io
from numbers import Number
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from medprune.store import write_text

_KEYS = ("chapter", "heading", "text", "table", "figure", "image")  # of a section

_CONSTANT = (
    "a",
    "b",
    "n",
    "n images",
    "unmatched",
    "unparsed",
    "n unparsed",
    "n runs",
    "by",
)  # columns that often say one thing

_ONE_DECIMAL = ("diff", "score_percent", "paper_score")  # how the names of such columns end


def html_report(path: Path, title: str, sections: list[dict]) -> Path:
    """Write one HTML file that holds everything it shows, atomically, and return its path.

    A section has a heading and may have text (blank lines part paragraphs; markup is shown, not obeyed),
    image (PIL), table (DataFrame) and figure (Figure or PIL, which a tap enlarges on a phone); sections of the
    same chapter stand together under its name. Raises ValueError for one without heading or with other keys.
    """
    shown, chapters = [], {}
    for number, section in enumerate(sections, 1):
        if not section.get("heading") or not set(section) <= set(_KEYS):
            raise ValueError(f"section {number} has the keys {sorted(section)}: a heading, and any of {_KEYS}.")
        shown.append(dict.fromkeys(_KEYS) | section | {"number": number})
        chapters.setdefault(section.get("chapter") or "", []).append(shown[-1])
    folder = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    page = pages.get_template("page.html.jinja")
    text = page.render(title=title, sections=shown, chapters=chapters, png=_png, cells_of=_cells_of)
    return write_text(Path(path), text)


def with_interval(mean: float, low: float, high: float, digits: int = 1) -> str:
    """Return "80.1 [76.0, 84.2]", "80.1 [no interval]" where the bounds are NaN, "" where the mean is."""
    if pd.isna(mean):
        return ""
    return f"{mean:z.{digits}f} {limits(low, high, digits)}"


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table as text for people: units in the headings, scores with one decimal, blanks for NaN.

    score (diff, right) with low and high becomes one column, any other X with X_low and X_high too, low_all and
    high_all another; _bytes become MiB, or GiB with two decimals; p below 0.001 says so.
    """
    out, limits_of = {}, _limits_of(table)
    bounds = {name for pair in limits_of.values() for name in pair}
    for name, column in table.items():
        heading = str(name).replace("_", " ")
        if name in limits_of:
            low, high = limits_of[name]
            rows = zip(column, table[low], table[high], strict=True)
            digits = 2 if name == "kappa" else 1
            out[f"{heading} [95% interval]"] = [with_interval(*row, digits) for row in rows]
        elif name == "low_all" and "high_all" in table:
            found = zip(column, table["high_all"], strict=True)
            out["[95% for all rows]"] = [limits(low, high) for low, high in found]
        elif not (name in bounds or name == "high_all" and "low_all" in table):
            if str(name).endswith("_bytes"):
                unit, size = byte_unit(column)
                digits, heading = 1 if unit == "MiB" else 2, f"{heading.removesuffix(' bytes')} ({unit})"
                out[heading] = ["" if pd.isna(n) else f"{n / size:z.{digits}f}" for n in column]
            else:
                numbers = pd.to_numeric(column, errors="coerce").dropna()
                out[heading] = [_cell(value, str(name), numbers) for value in column]
    return pd.DataFrame(out, index=table.index)


def markdown_table(table: pd.DataFrame) -> str:
    """Return what the page shows of a table as markdown."""
    cells = _cells_of(table)
    rows = [
        [name for name, _ in cells["columns"]],
        ["---:" if kind == "num" else "---" for _, kind in cells["columns"]],
    ]
    lines = ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in [*rows, *cells["rows"]]]
    return "\n".join(lines) + (f"\n\nThroughout: {cells['same']}." if cells["same"] else "")


def _plain(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")


def _limits_of(table: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Return the columns that have limits, and which columns those are."""
    found = {c: (f"{c}_low", f"{c}_high") for c in table if {f"{c}_low", f"{c}_high"} <= set(table)}
    first = next((c for c in ("score", "diff", "right") if {c, "low", "high"} <= set(table)), None)
    return found | ({first: ("low", "high")} if first else {})


def byte_unit(column: pd.Series) -> tuple[str, int]:
    """Return the unit that suits these sizes, MiB or GiB, and its bytes."""
    return ("GiB", 2**30) if column.max() >= 2**30 else ("MiB", 2**20)


def _cells_of(table: pd.DataFrame) -> dict:
    """Return a table's columns (name, kind) and rows, without empty columns; of _CONSTANT those that say one thing
    are no columns but words: same.
    """
    text = readable(table)
    text = text.loc[:, [text[c].ne("").any() for c in text]]
    said = {c: text[c][text[c] != ""].unique() for c in text if c in _CONSTANT}
    same = {c: values[0] for c, values in said.items() if len(values) == 1 and len(text) > 1}
    text = text.drop(columns=list(same))
    return {
        "columns": [(c, _kind(text[c])) for c in text],
        "rows": text.to_numpy().tolist(),
        "same": ", ".join(f"{c} {value}" for c, value in same.items()),
    }


def limits(low: float, high: float, digits: int = 1) -> str:
    """Return "[76.0, 84.2]", or "[no interval]" where a bound is NaN."""
    return "[no interval]" if pd.isna(low) or pd.isna(high) else f"[{low:z.{digits}f}, {high:z.{digits}f}]"


def _kind(cells: pd.Series) -> str:
    if cells.str.len().max() > 40:
        return "long"
    return "num" if all(not cell or cell[0] in "-<0123456789" for cell in cells) else "short"


def _png(picture) -> str:
    """Return a picture as base64."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=130)
    else:
        picture = picture.convert("RGB")
        picture.thumbnail((1000, 1000))
        picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _cell(value, name: str, numbers: pd.Series) -> str:
    """Return one value as text; numbers are those of its column, which is shown in one style."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if not isinstance(value, Number):
        return str(value)
    if name in ("p", "p_holm"):
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    if name == "score" or name.endswith(_ONE_DECIMAL):
        return f"{value:z.1f}"
    # An outer join turns counts into floats: show them as the counts they are.
    if (numbers % 1 == 0).all():
        return f"{value:,.0f}"
    return f"{value:z.1f}" if numbers.abs().max() >= 10 else f"{value:.4g}"
