"""The profile's judges, and answers as a table with their scores."""

from pathlib import Path

import pandas as pd

from medprune.judging import judge
from medprune.judging.card import cosine_judge
from medprune.judging.chat import chat_judge, server_judge
from medprune.judging.reference import reference_judge
from medprune.models import loading
from medprune.settings import Profile, judge_names
from medprune.store import Run


def make_judges(config: Profile, conditions: dict, names: tuple[str, ...] | None = None) -> list[judge.Judge]:
    """Return the judges named, or the profile's: the offline reference or cosine, a server, a chat model in process."""
    found = []
    for name in judge_names(config.judge) if names is None else names:
        if name == "reference":
            found.append(reference_judge(conditions, loading.load_embedder(config)))
        elif name == "cosine":
            found.append(cosine_judge(loading.load_embedder(config)))
        elif name == "server":
            found.append(server_judge(config.judge_url, config.judge_model))
        else:
            found.append(chat_judge(name, quantize_4bit=config.judge_bits == 4))
    return found


def judged(rows: list[dict], judges: list[judge.Judge], run: Run, combined: str = "median") -> pd.DataFrame:
    """Return the rows as a table with judge scores; `cluster` is the image, which three questions share.

    Of several judges the scores are combined (median or mean), and each one's are kept as `truthfulness@<judge>`, ...
    """
    named, tables = [r | {"id": f"{r['method']} {r['id']}"} for r in rows], []
    for one in judges:
        scores = judge.judge_answers(named, one, run.root / "judgements.jsonl", progress=False)
        if unread := scores.attrs["n_unparsed"]:
            print(f"{unread} of {len(scores)} replies of the judge {one.name} could not be read: no score for those")
        if unread == len(scores):
            raise ValueError(f"the judge {one.name} gave no score in {unread} replies: choose another chat model.")
        tables.append(scores)
    table = pd.DataFrame(rows).drop(columns=["path"])
    scores = tables[0] if len(tables) == 1 else judge.combine_judges(tables, combined)
    own = [t[list(judge.ASPECTS)].add_suffix(f"@{one.name}") for t, one in zip(tables, judges, strict=True)]
    table = pd.concat([table, scores.drop(columns=["id"]), *(own if len(own) > 1 else [])], axis=1)
    return table.assign(cluster=table["key"])


def read_scores(folder: Path) -> pd.DataFrame:
    """Return the table of `judged` that an earlier notebook wrote; an empty answer, or "NA", is a text there too."""
    file = folder / "scores.csv"
    answers = pd.read_csv(file, usecols=["answer"], dtype=str, keep_default_na=False)
    return pd.read_csv(file).assign(answer=answers["answer"])
