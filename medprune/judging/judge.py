"""Judging answers: one interface for all judges, and stored judgements.

Each answer gets truthfulness, groundedness and hallucination, 0-5 each, HIGHER IS BETTER for all three: hallucination
5 means that nothing was invented. The score in percent is their mean out of 5 (paper, appendix A).
A row is a dict with id, question, kind, condition, reference, answer and `ended` (the model ended the answer itself).
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from medprune.store import Units, fingerprint

ASPECTS = ("truthfulness", "groundedness", "hallucination")


COLUMNS = ("id", "judge", *ASPECTS, "score_percent", "raw", "parsed")


@dataclass(frozen=True)
class Judgement:
    """Three scores, 0-5, higher is better (NaN where not `parsed`), and the judge's own words."""

    truthfulness: float
    groundedness: float
    hallucination: float
    raw: str
    parsed: bool


def unparsed(raw: str) -> Judgement:
    return Judgement(nan, nan, nan, raw, False)


@dataclass(frozen=True)
class Judge:
    """A named way of scoring rows. `score` yields (row number, Judgement) as they come, in any order.

    `reads` are the fields of a row that a judgement depends on; name, version and those fields are its identity.
    """

    name: str
    version: str
    score: Callable[[list[dict]], Iterator[tuple[int, Judgement]]]
    reads: tuple[str, ...] = ("question", "answer", "reference")

    def __call__(self, rows: list[dict]) -> list[Judgement]:
        found = dict(self.score(rows))
        return [found[i] for i in range(len(rows))]


def judge_answers(rows: list[dict], judge: Judge, store: Path | None, progress: bool = True) -> pd.DataFrame:
    """Score every row; return one line per row with COLUMNS, in order, and the count of unparsed in `attrs`.

    Rows of the same content are asked once, and what stands in `store` (JSONL, appended as judgements arrive) is not
    asked again. Unparsed replies keep NaN scores; `attrs["n_unparsed"]` counts them. Raises ValueError for a row
    without one of the fields the judge reads, and what the judge raises, with everything before that stored.
    """
    for row in rows:
        if missing := [f for f in ("id", *judge.reads) if f not in row]:
            raise ValueError(f"row {row.get('id')!r} has no {missing[0]!r}: {judge.name} reads it.")
    keys = [fingerprint([row[f] for f in judge.reads]) for row in rows]
    units = Units(store, fingerprint(judge.name, judge.version)) if store else {}
    pending = {k: row for k, row in zip(keys, rows, strict=True) if k not in units}
    todo = list(pending)
    found = judge.score(list(pending.values())) if todo else iter(())
    for i, judgement in tqdm(found, total=len(todo), desc=f"judge {judge.name}", disable=not (progress and todo)):
        value = asdict(judgement)
        if store:
            units.add(todo[i], value)
        else:
            units[todo[i]] = value
    table = pd.DataFrame([{"id": r["id"], "judge": judge.name, **units[k]} for r, k in zip(rows, keys, strict=True)])
    table = table.reindex(columns=[c for c in COLUMNS if c != "score_percent"])
    table.insert(COLUMNS.index("score_percent"), "score_percent", table[list(ASPECTS)].mean(axis=1, skipna=False) * 20)
    table.attrs["n_unparsed"] = int((~table["parsed"].astype(bool)).sum())
    if table.attrs["n_unparsed"] and progress:
        print(f"{table.attrs['n_unparsed']} of {len(table)} replies of {judge.name} could not be read: no score.")
    return table


def combine_judges(tables: list[pd.DataFrame], how: str = "median") -> pd.DataFrame:
    """Return one table of the median or mean of several judges' scores, matched by id.

    A judge that could not be parsed on a row is left out of that row; `n_judges` counts those that were. Raises
    ValueError for another `how`, no tables, or tables that do not hold the same ids.
    """
    if how not in ("median", "mean"):
        raise ValueError(f"how={how!r} must be median or mean.")
    if not tables or any(set(t["id"]) != set(tables[0]["id"]) or t["id"].duplicated().any() for t in tables):
        raise ValueError("the judges' tables must hold the same ids, each once.")
    long = pd.concat(tables)
    grouped = long.groupby("id", sort=False)
    table = grouped[list(ASPECTS)].agg(how).reset_index()
    table.insert(1, "judge", f"{how} of {', '.join(dict.fromkeys(long['judge']))}")
    table["score_percent"] = table[list(ASPECTS)].mean(axis=1, skipna=False) * 20
    table["n_judges"] = grouped["parsed"].sum().astype(int).to_numpy()
    table["parsed"] = table["n_judges"] > 0
    return table
