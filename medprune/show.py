"""What the notebooks show is kept for the report: tables and figures of every stage, in order."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from medprune.artifacts import STAGES, Run, write_csv
from medprune.conversations import named_conditions
from medprune.page import readable


def keep(run: Run, title: str, shown: pd.DataFrame | Figure):
    """Write a table (CSV) or figure (PNG) of a stage for the report; return it as a notebook shows it."""
    folder = run.dir / "shown"
    folder.mkdir(exist_ok=True)
    if isinstance(shown, Figure):
        shown.savefig(folder / f"{title}.png", dpi=110, bbox_inches="tight")
        return shown
    write_csv(folder / f"{title}.csv", shown)
    return readable(shown)


def report_sections(root: Path) -> list[dict]:
    """Return what the stages of a run kept as sections of `report.html_report`, by stage, then by title."""
    sections = []
    for stage in STAGES:
        for path in sorted((root / stage / "shown").glob("*.*")):
            table = pd.read_csv(path) if path.suffix == ".csv" else None
            picture = Image.open(path) if path.suffix == ".png" else None
            heading = f"{stage[:2]} · {path.stem}"
            sections.append({"heading": heading, "text": "", "table": table, "figure": picture, "image": None})
    return sections


def confusion(rows: pd.DataFrame, conditions: dict, labels: list[str]) -> np.ndarray:
    """Count (true condition, condition named) over the questions for a name: (n, n + 1), last column: no one name."""
    counts = np.zeros((len(labels), len(labels) + 1), int)
    for row in rows[rows["kind"] == "name"].itertuples():
        named = named_conditions(str(row.answer), conditions)
        one = len(named) == 1 and named[0] in labels
        counts[labels.index(row.condition), labels.index(named[0]) if one else len(labels)] += 1
    return counts
