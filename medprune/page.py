"""One HTML page of headings, text, tables and pictures: nothing to load, for a phone too, light or dark."""

import base64
import html
import io
from numbers import Number

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"><title>{title}</title><style>
:root{{color-scheme:light dark;--fg:#1c2126;--bg:#fff;--soft:#f3f5f7;--line:#d5dae0;--link:#0b5cad}}
@media(prefers-color-scheme:dark){{:root{{--fg:#e4e7ea;--bg:#14171a;--soft:#1f2429;
--line:#3a424a;--link:#7db8f2}}}}
*{{box-sizing:border-box}}body{{margin:0 auto;padding:1rem;max-width:62rem;background:var(--bg);
color:var(--fg);font:1rem/1.55 system-ui,sans-serif;overflow-wrap:anywhere}}
h1,h2{{line-height:1.25;overflow-wrap:break-word}}
h2{{margin-top:2.5rem;border-top:1px solid var(--line);padding-top:1rem}}a{{color:var(--link)}}
nav{{background:var(--soft);border-radius:6px;padding:.6rem 1rem}}nav ol{{margin:0;padding-left:1.5rem}}
p{{max-width:46rem}}figure{{margin:1rem 0}}img{{display:block;max-width:100%;height:auto;background:#fff;
border-radius:4px}}.scroll{{overflow-x:auto;margin:1rem 0;border:1px solid var(--line);border-radius:6px}}
table{{border-collapse:collapse;font-size:.9rem;width:100%}}th,td{{padding:.35rem .7rem;text-align:left;
vertical-align:top;border-bottom:1px solid var(--line);overflow-wrap:normal}}th{{background:var(--soft)}}
td{{max-width:30rem}}.num{{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}}
.long{{min-width:14rem;overflow-wrap:anywhere}}tr:last-child td{{border-bottom:0}}
@media(max-width:40rem){{.plot{{overflow-x:auto}}.plot img{{max-width:none;width:40rem}}}}
</style></head><body><h1>{title}</h1>
<nav aria-label="Contents"><ol>{contents}</ol></nav>
<main>{sections}</main></body></html>
"""


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
    contents, bodies = [], []
    for i, section in enumerate(sections, 1):
        unknown = set(section) - {"heading", "text", "table", "figure", "image"}
        if unknown or not section.get("heading"):
            raise ValueError(
                f"section {i} has the keys {sorted(section)}: heading, text, table, figure and image."
            )
        heading = html.escape(section["heading"])
        contents.append(f'<li><a href="#section-{i}">{heading}</a></li>')
        parts = [f"<p>{html.escape(p)}</p>" for p in (section.get("text") or "").split("\n\n") if p.strip()]
        if section.get("table") is not None:
            parts.append(_html_table(section["table"], heading))
        # Shrunk to a phone's width a plot's labels could not be read: a plot scrolls in its own box there.
        for kind, box in (("figure", '<figure class="plot" tabindex="0">'), ("image", "<figure>")):
            if section.get(kind) is not None:
                png = base64.b64encode(_png(section[kind])).decode()
                parts.append(f'{box}<img alt="{heading}" src="data:image/png;base64,{png}"></figure>')
        bodies.append(f'<section id="section-{i}"><h2>{heading}</h2>{"".join(parts)}</section>')
    return _PAGE.format(title=html.escape(title), contents="".join(contents), sections="\n".join(bodies))


def _html_table(table: pd.DataFrame, heading: str) -> str:
    text = readable(table)
    numbers = [all(not v or v[0] in "-<0123456789" for v in text[c]) and text[c].any() for c in text]
    long = [text[c].str.len().max() > 40 for c in text]
    kinds = [
        ' class="long"' if w else ' class="num"' if n else "" for n, w in zip(numbers, long, strict=True)
    ]

    def row(cells, tag):
        return "".join(f"<{tag}{k}>{html.escape(c)}</{tag}>" for c, k in zip(cells, kinds, strict=True))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in text.itertuples(index=False))
    # A box that scrolls must be reachable by keyboard.
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {heading}"><table><thead><tr>'
            f'{row(text.columns, "th")}</tr></thead><tbody>{body}</tbody></table></div>')  # fmt: skip


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
