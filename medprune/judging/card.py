"""The judge card: how far a judge can be trusted, measured on answers whose worth is known by construction."""

import random
import string
from collections.abc import Callable
from itertools import combinations
from math import nan
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from medprune.data.questions import named_conditions
from medprune.judging.judge import ASPECTS, Judge, Judgement, judge_answers

LEVELS = ("right", "truncated", "wrong disease", "shuffled words", "gibberish")  # must score in this order


PADDING = "As with every case, much more could be said about it, and a doctor can tell you more."


MAX_DRIFT = 1.0  # percent points of mean absolute change that still count as the same score


MAX_FAILURES = 0.02  # share of replies that may be unreadable


MIN_NAMING = 0.95  # share of naming answers on which judge and exact naming must agree


PASS_MARK = 50.0  # percent score from which the judge is taken to call a name right


def graded_answers(row: dict, conditions: dict, rng: random.Random) -> dict[str, dict]:
    """Return the row with an answer of each of LEVELS, made from its reference and another condition's answer.

    Truncated keeps the first half of the words; gibberish has random letters in words of the same lengths. Raises
    ValueError for a reference of fewer than two different words, which cannot be shuffled.
    """
    words = row["reference"].split()
    if len(set(words)) < 2:
        raise ValueError(f"reference {row['reference']!r} of row {row['id']!r} is too short: it needs two words.")
    other = rng.choice([c for c in conditions if c != row["condition"]])
    shuffled = rng.sample(words, len(words))
    while shuffled == words:
        shuffled = rng.sample(words, len(words))
    answers = {
        "right": row["reference"],
        "truncated": " ".join(words[: len(words) // 2]),
        "wrong disease": conditions[other]["answers"][row["kind"]],
        "shuffled words": " ".join(shuffled),
        "gibberish": " ".join("".join(rng.choices(string.ascii_lowercase, k=len(w))) for w in words),
    }
    return {level: {**row, "answer": a, "ended": level != "truncated"} for level, a in answers.items()}


def judge_card(judge: Judge, rows: list[dict], conditions: dict, seed: int = 0) -> pd.DataFrame:
    """Measure a judge on `rows` and on answers graded by construction; return check, value, wanted, passed, n.

    Asks without a store: each row three times (once in reverse order), and eleven answers made from each different
    reference; choose a few dozen rows for a judge that costs money. `value` is in percent points, or a share for
    failures and naming. Means leave unreadable replies out and `n` says what is left; a check with nothing left has
    not passed. Raises ValueError for rows without a question of kind "name", or of an unknown condition.
    """
    if unknown := {r["condition"] for r in rows} - set(conditions):
        raise ValueError(f"rows are of {', '.join(map(repr, sorted(unknown)))}, which the conditions do not hold.")
    if all(r["kind"] != "name" for r in rows):
        raise ValueError("rows hold no question of kind 'name', which the naming check needs.")
    rng = random.Random(seed)
    references = {(r["condition"], r["kind"], r["reference"]): r for r in rows}
    graded = [graded_answers(row, conditions, rng) for row in references.values()]
    asked = [*rows, *(g[level] for g in graded for level in LEVELS)]
    # a cut answer is closed with a full stop first, so that padding is compared with the same words, ended
    closed = [g[level] for g in graded for level in LEVELS[:3]]
    closed = [{**row, "answer": _closed(row["answer"]), "ended": True} for row in closed]
    padded = [{**row, "answer": f"{row['answer']} {PADDING}"} for row in closed]

    replies = {
        "first": judge(asked),
        "again": judge(rows),
        "reverse": judge(rows[::-1])[::-1],
        "closed": judge(closed),
        "padded": judge(padded),
    }
    score = {name: np.array([_percent(j) for j in js]) for name, js in replies.items()}
    everything = np.concatenate(list(score.values()))
    n = len(rows)
    checks = [
        _check(
            "repeatability: mean |difference|, same answer twice",
            np.abs(score["first"][:n] - score["again"]),
            f"<= {MAX_DRIFT:g}",
            lambda v: v <= MAX_DRIFT,
        ),
        _check(
            "parse failures: share of replies",
            np.isnan(everything).astype(float),
            f"<= {MAX_FAILURES:g}",
            lambda v: v <= MAX_FAILURES,
        ),
        _check(
            "order bias: mean |difference|, rows in reverse order",
            np.abs(score["first"][:n] - score["reverse"]),
            f"<= {MAX_DRIFT:g}",
            lambda v: v <= MAX_DRIFT,
        ),
        _check(
            "length bias: mean change by true but empty words",
            score["padded"] - score["closed"],
            "<= 0",
            lambda v: v <= 0,
        ),
    ]
    by_level, above = score["first"][n:].reshape(-1, len(LEVELS)), nan
    for i, level in enumerate(LEVELS):
        wanted = f"< {LEVELS[i - 1]}" if i else "the highest"
        checks.append(
            _check(
                f"graded: {level}, mean score",
                by_level[:, i],
                wanted,
                lambda v, i=i, above=above: v < above if i else True,
            )
        )
        above = checks[-1]["value"]
    # whole answers only: of a name cut short or shuffled it is a matter of taste whether it is given
    whole = [i for i in range(len(asked)) if i < n or LEVELS[(i - n) % len(LEVELS)] in ("right", "wrong disease")]
    naming = [i for i in whole if asked[i]["kind"] == "name"]
    exact = np.array([named_conditions(asked[i]["answer"], conditions) == [asked[i]["condition"]] for i in naming])
    called = score["first"][naming]
    agree = np.where(np.isnan(called), nan, (called >= PASS_MARK) == exact)
    checks.append(
        _check(
            f"naming: share that agrees with the exact name (right from {PASS_MARK:g} %)",
            agree,
            f">= {MIN_NAMING:g}",
            lambda v: v >= MIN_NAMING,
        )
    )
    table = pd.DataFrame(checks)
    table.insert(0, "judge", judge.name)
    return table


def agreement(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Return how far two judges' tables agree on the ids both hold: quadratic-weighted kappa (Cohen 1968) per aspect.

    Scores are rounded to whole numbers 0-5 first; 1 is full agreement, 0 what chance gives, NaN where neither judge
    ever varies. Columns aspect, kappa, mean_difference (a - b, of 5), n and n_unparsed (rows left out). Raises
    ValueError when no id is in both.
    """
    both = a.merge(b, on="id", suffixes=("_a", "_b"))
    if both.empty:
        raise ValueError("the two tables have no id in common, so their agreement cannot be told.")
    read = both[both["parsed_a"].astype(bool) & both["parsed_b"].astype(bool)]
    found = []
    for aspect in ASPECTS:
        x, y = read[f"{aspect}_a"].astype(float), read[f"{aspect}_b"].astype(float)
        # halves go up: numpy's rounding to even would call 2.5 and 3.5 two apart
        p, q = np.floor(x + 0.5).astype(int), np.floor(y + 0.5).astype(int)
        varies = len(set(p) | set(q)) > 1
        kappa = cohen_kappa_score(p, q, weights="quadratic", labels=range(6)) if varies else nan
        found.append(
            {
                "aspect": aspect,
                "kappa": kappa,
                "mean_difference": (x - y).mean(),
                "n": len(read),
                "n_unparsed": len(both) - len(read),
            }
        )
    return pd.DataFrame(found)


def agreements(rows: list[dict], judges: list[Judge], store: Path | None) -> pd.DataFrame:
    """Return `agreement` of every two judges on the same rows, with their names; empty for one judge.

    What stands in `store` is not asked again.
    """
    tables = {j.name: judge_answers(rows, j, store, progress=False) for j in judges}
    found = [agreement(tables[a], tables[b]).assign(judges=f"{a} - {b}") for a, b in combinations(tables, 2)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def cosine_judge(embed: Callable[[list[str]], np.ndarray]) -> Judge:
    """Make a control for the card: the cosine of answer and reference (the paper's eq. 4), times 5, for all three.

    embed returns (n, d) unit-norm sentence embeddings. What output similarity can see of an answer's worth, no more.
    """

    def score(rows):
        cosines = np.sum(embed([r["answer"] for r in rows]) * embed([r["reference"] for r in rows]), axis=1)  # (rows,)
        for i, cosine in enumerate(np.clip(cosines, 0, 1)):
            value = round(float(5 * cosine), 2)
            yield i, Judgement(value, value, value, f"cosine {cosine:.3f}", True)

    return Judge("cosine", "1", score, ("answer", "reference"))


def _closed(text: str) -> str:
    text = text.strip()
    return text if not text or text[-1] in ".!?" else text + "."


def _percent(judgement) -> float:
    return float(np.mean([getattr(judgement, aspect) for aspect in ASPECTS])) * 20 if judgement.parsed else nan


def _check(name: str, values: np.ndarray, wanted: str, passes) -> dict:
    values = values[~np.isnan(values)]
    value = float(values.mean()) if len(values) else nan
    return {
        "check": name,
        "value": value,
        "wanted": wanted,
        "passed": bool(len(values) and passes(value)),
        "n": len(values),
    }
