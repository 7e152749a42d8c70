"""One HTML page of headings, text, tables and pictures: nothing to load, for a phone too, light or dark."""

import base64
import html
import io
from numbers import Number
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from medprune.store import write_text


def html_report(path: Path, title: str, sections: list[dict]) -> Path:
    """Write one HTML file that holds everything it shows, atomically, and return its path.

    A section has a heading and may have text (blank lines part paragraphs; markup is shown, not obeyed),
    image (PIL), table (DataFrame) and figure (Figure or PIL, which a tap enlarges on a phone); sections of the
    same chapter stand together under its name. Raises ValueError for one without heading or with other keys.
    """
    return write_text(Path(path), render_page(title, sections))


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"><title>{title}</title><style>
:root{{color-scheme:light dark;--fg:#1c2126;--bg:#fff;--soft:#f3f5f7;--line:#d5dae0;--link:#0b5cad}}
@media(prefers-color-scheme:dark){{:root{{--fg:#e4e7ea;--bg:#14171a;--soft:#1f2429;
--line:#3a424a;--link:#7db8f2}}}}
*{{box-sizing:border-box}}body{{margin:0 auto;padding:1rem;max-width:76rem;background:var(--bg);
color:var(--fg);font:1rem/1.55 system-ui,sans-serif;overflow-wrap:anywhere}}
h1,h2,h3{{line-height:1.25;overflow-wrap:break-word}}h3{{margin-top:2.2rem}}
h2{{margin-top:3rem;border-top:1px solid var(--line);padding-top:1rem}}a{{color:var(--link)}}
nav{{background:var(--soft);border-radius:6px;padding:.6rem 1rem}}nav ul{{margin:.2rem 0 .6rem;padding-left:1.5rem}}
summary{{padding:.15rem 0;cursor:pointer}}p{{max-width:46rem}}.note{{font-size:.9rem;opacity:.8;margin-top:-.5rem}}
img{{display:block;max-width:100%;height:auto;background:#fff;border-radius:4px}}
.picture{{width:15rem;margin:1rem 0}}.picture img{{width:100%}}.plot{{display:block;margin:1rem 0}}
.plot input{{position:absolute;opacity:0}}
.scroll{{overflow-x:auto;margin:1rem 0;border:1px solid var(--line);border-radius:6px;width:fit-content;max-width:100%}}
table{{border-collapse:separate;border-spacing:0;font-size:.9rem}}th,td{{padding:.35rem .7rem;text-align:left;
vertical-align:top;border-bottom:1px solid var(--line);overflow-wrap:normal;background:var(--bg)}}
th{{background:var(--soft);vertical-align:bottom}}td{{max-width:30rem}}td.short{{white-space:nowrap}}
.num{{text-align:right;font-variant-numeric:tabular-nums}}td.num{{white-space:nowrap}}
.long{{min-width:14rem;overflow-wrap:anywhere}}tr:last-child td{{border-bottom:0}}
td.short:first-child,td.num:first-child,th.short:first-child,th.num:first-child{{position:sticky;left:0;
border-right:1px solid var(--line)}}
@media(max-width:48rem){{.plot{{overflow-x:auto}}.plot::after{{content:"tap to enlarge";font-size:.8rem;opacity:.7}}
.plot input:checked+img{{max-width:none;width:52rem}}.plot input:focus-visible+img{{outline:2px solid var(--link)}}
table{{font-size:.82rem}}th,td{{padding:.3rem .45rem}}.long{{min-width:10rem}}}}
</style></head><body><h1>{title}</h1>
<nav aria-label="Contents">{contents}</nav>
<main>{sections}</main></body></html>
"""


_CONSTANT = ("a", "b", "n", "n images", "unmatched", "unparsed", "n unparsed")  # columns that often say one thing


def with_interval(mean: float, low: float, high: float, decimals: int = 1) -> str:
    """Return "80.1 [76.0, 84.2]", "80.1 [no interval]" where the bounds are NaN, "" where the mean is."""
    if pd.isna(mean):
        return ""
    bounds = "no interval" if pd.isna(low) or pd.isna(high) else f"{low:z.{decimals}f}, {high:z.{decimals}f}"
    return f"{mean:z.{decimals}f} [{bounds}]"


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table as text for people: units in the headings, scores with one decimal, blanks for NaN.

    score (or diff, or mean) with low and high becomes one column; _bytes become MiB or GiB; p below 0.001
    says so.
    """
    out, merged = {}, next((c for c in ("score", "diff", "mean") if {c, "low", "high"} <= set(table)), None)
    for name in table.columns:
        column, heading = table[name], str(name).replace("_", " ")
        if merged and name in ("low", "high"):
            continue
        if name == merged:
            rows = zip(column, table["low"], table["high"], strict=True)
            out[f"{heading} [95% interval]"] = [with_interval(*row) for row in rows]
            continue
        if str(name).endswith("_bytes"):
            unit, size = byte_unit(column)
            column, heading = column / size, f"{heading.removesuffix(' bytes')} ({unit})"
        numbers = pd.to_numeric(column, errors="coerce").dropna()
        out[heading] = [_cell(value, str(name), numbers) for value in column]
    return pd.DataFrame(out, index=table.index)


def render_page(title: str, sections: list[dict]) -> str:
    """Return the page of `report.html_report`, which says what a section holds; pictures inside as base64."""
    bodies, chapters = [], {}
    for i, section in enumerate(sections, 1):
        unknown = set(section) - {"chapter", "heading", "text", "table", "figure", "image"}
        if unknown or not section.get("heading"):
            raise ValueError(
                f"section {i} has the keys {sorted(section)}: chapter, heading, text, table, figure and image."
            )
        heading, chapter = html.escape(section["heading"]), section.get("chapter") or ""
        if chapter and chapter not in chapters:
            bodies.append(f"<h2>{html.escape(chapter)}</h2>")
        chapters.setdefault(chapter, []).append(f'<li><a href="#section-{i}">{heading}</a></li>')
        parts = [f"<p>{html.escape(p)}</p>" for p in (section.get("text") or "").split("\n\n") if p.strip()]
        if section.get("image") is not None:
            parts.append(f'<figure class="picture">{_img(section["image"], heading)}</figure>')
        if section.get("table") is not None:
            parts.append(_html_table(section["table"], heading))
        if section.get("figure") is not None:
            # Shrunk to a phone's width a plot's labels cannot be read: there a tap, or the space bar, enlarges it.
            box = f'<input type="checkbox" aria-label="Enlarge: {heading}">'
            parts.append(f'<label class="plot">{box}{_img(section["figure"], heading)}</label>')
        level = "h3" if chapter else "h2"
        bodies.append(f'<section id="section-{i}"><{level}>{heading}</{level}>{"".join(parts)}</section>')
    contents = "".join(
        f"<details><summary>{html.escape(name)}</summary><ul>{''.join(links)}</ul></details>"
        if name
        else f"<ul>{''.join(links)}</ul>"
        for name, links in chapters.items()
    )
    return _PAGE.format(title=html.escape(title), contents=contents, sections="\n".join(bodies))


def _img(picture, heading: str) -> str:
    return f'<img alt="{heading}" src="data:image/png;base64,{base64.b64encode(_png(picture)).decode()}">'


def _html_table(table: pd.DataFrame, heading: str) -> str:
    """Return a table without its empty columns; of _CONSTANT those that say one thing stand in a note below it."""
    text = readable(table)
    text = text.loc[:, [text[c].ne("").any() for c in text]]
    said = {c: text[c][text[c] != ""].unique() for c in text if c in _CONSTANT}
    same = {c: values[0] for c, values in said.items() if len(values) == 1 and len(text) > 1}
    words = html.escape(", ".join(f"{c} {value}" for c, value in same.items()))
    note = f'<p class="note">Throughout: {words}.</p>' if same else ""
    text = text.drop(columns=list(same))
    kinds = []
    for c in text:
        number = all(not v or v[0] in "-<0123456789" for v in text[c])
        kinds.append("long" if text[c].str.len().max() > 40 else "num" if number else "short")

    def row(cells, tag):
        pairs = zip(cells, kinds, strict=True)
        return "".join(f'<{tag} class="{kind}">{html.escape(cell)}</{tag}>' for cell, kind in pairs)

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in text.itertuples(index=False))
    # A box that scrolls must be reachable by keyboard.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {heading}"><table><thead><tr>'
        f"{row(text.columns, 'th')}</tr></thead><tbody>{body}</tbody></table></div>{note}"
    )


def _png(picture) -> bytes:
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=130)
    else:
        picture = picture.convert("RGB")
        picture.thumbnail((1000, 1000))
        picture.save(buffer, format="PNG")
    return buffer.getvalue()


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
    if name.endswith(("_bytes", "diff", "score_percent", "paper_score")) or name == "score":
        return f"{value:z.1f}"
    # An outer join turns counts into floats: show them as the counts they are.
    if (numbers % 1 == 0).all():
        return f"{value:,.0f}"
    return f"{value:z.1f}" if numbers.abs().max() >= 10 else f"{value:.4g}"


def byte_unit(column: pd.Series) -> tuple[str, int]:
    """Return the unit that suits these sizes, MiB or GiB, and its bytes."""
    return ("GiB", 2**30) if column.max() >= 2**30 else ("MiB", 2**20)
