"""The judges that the settings name, and answers as a table with their scores."""

import functools
from pathlib import Path

import pandas as pd

from medprune.judging.card import cosine_judge
from medprune.judging.chat import chat_judge, server_judge
from medprune.judging.judge import ASPECTS, Judge, combine_judges, judge_in_run
from medprune.judging.reference import reference_judge
from medprune.models import loading
from medprune.settings import STAGES, judge_names
from medprune.store import read_csv

TEXTS = (  # columns of scores.csv that stay text, whatever they look like
    "id", "key", "cluster", "patient", "asked", "condition", "kind", "question", "reference", "method", "answer",
    "judge", "judged_by", "raw",
)  # fmt: skip


def make_judges(config, conditions: dict, names: tuple[str, ...] | None = None) -> list[Judge]:
    """Return the judges named, or the settings': the offline reference or cosine, a server, a chat model in process."""
    names = judge_names(config.judge) if names is None else names
    return [_make_judge(name, config, conditions) for name in names]


def _make_judge(name: str, config, conditions: dict) -> Judge:
    if name == "server":
        return server_judge(config.judge_url, config.judge_model, config.judge_key_env)
    if name not in ("reference", "cosine"):
        return chat_judge(name, quantize_4bit=config.judge_bits == 4)
    embed, embedder = loading.load_embedder(config.embedding), loading.embedder_identity(config.embedding)
    return cosine_judge(embed, embedder) if name == "cosine" else reference_judge(conditions, embed, embedder)


def judged(rows: list[dict], judges: list[Judge], run, combined: str = "median") -> pd.DataFrame:
    """Return the rows as a table with judge scores; `cluster` is the image, which three questions share.

    Judgements are kept among the run's units. Of several judges the scores are combined (median or mean), and each
    one's are kept as `truthfulness@<judge>`, ...; `judged_by` tells scores apart that must not be compared.
    """
    if not rows:
        raise ValueError("there are no answers to judge.")
    named = [r | {"id": f"{r['method']} {r['id']}"} for r in rows]
    tables = [_readable(judge_in_run(named, judge, run)) for judge in judges]
    scores, own = tables[0], []
    if len(tables) > 1:
        scores = combine_judges(tables, combined)
        own = [t[list(ASPECTS)].add_suffix(f"@{judge.name}") for t, judge in zip(tables, judges, strict=True)]
    table = pd.DataFrame(rows).drop(columns=["path"])
    return pd.concat([table, scores.drop(columns=["id"]), *own], axis=1).assign(cluster=table["key"])


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    """Say how many replies of a judge could not be read; ValueError where none could."""
    unread, name = int((~table["parsed"]).sum()), table["judge"][0]
    if unread == len(table):
        raise ValueError(f"the judge {name} gave no score in {unread} replies: choose another chat model.")
    if unread:
        print(f"{unread} of {len(table)} replies of the judge {name} could not be read: no score for those")
    return table


def read_scores(file: Path) -> pd.DataFrame:
    """Return the table of `judged` that an earlier notebook wrote; an id "0029" and an answer "NA" or "" are texts."""
    # a carriage return inside an answer is written without quotes, and ends no line
    read = functools.partial(read_csv, file, lineterminator="\n")
    return read().assign(**read(dtype=str, keep_default_na=False, usecols=lambda column: column in TEXTS))


def scores_of(root: Path) -> pd.DataFrame:
    """Return the scores of all stages of a run; a method that later stages repeat is taken once.

    Raises ValueError where no stage has any.
    """
    tables = [read_scores(file) for stage in STAGES if (file := root / stage / "scores.csv").exists()]
    if not tables:
        raise ValueError(f"run {root.name!r} has no scores: run notebook 01 at least.")
    return pd.concat(tables, ignore_index=True).drop_duplicates(["method", "id"])
