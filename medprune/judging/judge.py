"""Judging answers: one interface for all judges, and stored judgements.

Each answer gets truthfulness, groundedness and hallucination, 0-5 each, HIGHER IS BETTER for all three: hallucination
5 means that nothing was invented. The score in percent is their mean out of 5 (paper, appendix A).
A row is a dict with id, question, kind, condition, reference, answer and `ended` (the model ended the answer itself).
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from medprune.progress import progress
from medprune.store import Units, context, fingerprint

ASPECTS = ("truthfulness", "groundedness", "hallucination")
COLUMNS = ("id", "judge", "judged_by", *ASPECTS, "score_percent", "raw", "parsed")


@dataclass(frozen=True)
class Judgement:
    """Three scores, 0-5, higher is better (NaN where not `parsed`), and the judge's own words."""

    truthfulness: float
    groundedness: float
    hallucination: float
    raw: str
    parsed: bool = True


@dataclass(frozen=True)
class Judge:
    """A named way of scoring rows. `score` yields (row number, Judgement) as they come, in any order.

    version: all that the scores depend on beside the name and the row, such as an embedder or a revision of weights.
    reads: the fields of a row that a judgement depends on. module: the one whose code decides the scores.
    batch_size: rows that are scored together, which are stored together too: the rest alone would round otherwise.
    """

    name: str
    version: str
    score: Callable[[list[dict]], Iterator[tuple[int, Judgement]]]
    reads: tuple[str, ...] = ("question", "answer", "reference")
    module: str = __name__
    batch_size: int = 1

    def __call__(self, rows: list[dict]) -> list[Judgement]:
        found = dict(self.score(rows))
        return [found[i] for i in range(len(rows))]

    @property
    def identity(self) -> str:
        """Return the short hash under which judgements are stored: scores of another identity are not comparable."""
        return context(self.module, self.name, self.version, self.reads)


def judge_answers(rows: list[dict], judge: Judge, store: Path | None) -> pd.DataFrame:
    """Score every row; return one line per row with COLUMNS, in order. Replies that could not be read have NaN scores.

    Rows of the same content are asked once, and what stands in `store`, a file of units that gets each judgement as
    its batch arrives, is not asked again. Raises ValueError for a row without one of the fields the judge reads, and
    what the judge raises, with every batch before that stored.
    """
    for row in rows:
        if missing := [f for f in ("id", *judge.reads) if f not in row]:
            raise ValueError(f"row {row.get('id')!r} has no {missing[0]!r}: {judge.name} reads it.")
    keys = [fingerprint([row[f] for f in judge.reads]) for row in rows]
    stored = Units(store, judge.identity) if store else ()
    found = {key: stored[key] for key in dict.fromkeys(keys) if key in stored}
    pending = {key: row for key, row in zip(keys, rows, strict=True) if key not in found}
    todo = list(pending)
    if todo:
        with progress(len(todo), f"judge {judge.name}") as bar:
            batch = {}
            for n, (i, judgement) in enumerate(judge.score(list(pending.values())), 1):
                found[todo[i]] = batch[todo[i]] = asdict(judgement)
                if store and (n % judge.batch_size == 0 or n == len(todo)):
                    stored.add_all(batch)
                    batch = {}
                bar.update(1)
    own = {"judge": judge.name, "judged_by": judge.identity}
    table = pd.DataFrame([{"id": r["id"]} | own | found[k] for r, k in zip(rows, keys, strict=True)], columns=COLUMNS)
    return table.assign(score_percent=_percent(table))


def judge_in_run(rows: list[dict], judge: Judge, run) -> pd.DataFrame:
    """Score every row as `judge_answers` does, among the units of a run, for which `clean` leaves them."""
    return judge_answers(rows, judge, run.units(judge.identity).path)


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
    table.insert(2, "judged_by", fingerprint(how, list(dict.fromkeys(long["judged_by"]))))
    n_judges = grouped["parsed"].sum().astype(int).to_numpy()
    return table.assign(score_percent=_percent(table), n_judges=n_judges, parsed=n_judges > 0)


def _percent(table: pd.DataFrame) -> pd.Series:
    return table[list(ASPECTS)].mean(axis=1, skipna=False) * 20
