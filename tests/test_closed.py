"""Closed questions: their forms, and likelihoods held against one forward pass an option."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from medprune.answers import closed
from medprune.answers.prompts import IGNORED, encode_conversation, see
from medprune.data.questions import load_conditions
from medprune.store import Units


@pytest.fixture(scope="module")
def asked(rows):
    conditions = load_conditions()
    names = list(conditions)
    return [
        row | {"kind": "name", "key": f"picture {i}", "condition": names[i], "asked": str(i)}
        for i, row in enumerate(r for r in rows if "name" in r["question"])
    ]


@pytest.fixture(scope="module")
def questions(asked):
    return closed.closed_questions(asked, load_conditions(), seed=3)


def test_each_picture_is_asked_for_a_choice_a_yes_and_a_no(asked, questions):
    assert Counter(q["kind"] for q in questions) == {"choice": len(asked), "yes or no": 2 * len(asked)}
    facts = load_conditions()
    for q in questions:
        if q["kind"] == "choice":
            assert sorted(q["options"]) == sorted(f["answers"]["name"] for f in facts.values())
            assert q["options"][q["truth"]] == facts[q["condition"]]["answers"]["name"]
            assert not any(name in q["question"] for name in facts)
        else:
            assert q["options"][q["truth"]] == ("Yes." if q["condition"] in q["question"] else "No.")
    assert [q["truth"] for q in questions if q["kind"] == "yes or no"] == [0, 1] * len(asked)


def test_which_other_condition_is_asked_about_hangs_on_the_seed_and_the_picture(asked, questions):
    again = closed.closed_questions(asked[1:], load_conditions(), seed=3)
    assert again == [q for q in questions if q["key"] != asked[0]["key"]]
    assert closed.closed_questions(asked, load_conditions(), seed=4) != questions


def one_by_one(model, processor, row) -> list[float]:
    """Return each option's log-likelihood from its first token on, from a plain forward pass for each."""
    found = []
    for option in row["options"]:
        user = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        said = [{"type": "text", "text": option}]
        turns, seen = [{"role": "user", "content": user}, {"role": "assistant", "content": said}], see(processor, row["path"])
        whole = encode_conversation(processor, turns, seen)
        ids, places = whole["input_ids"], (whole["labels"] != IGNORED).nonzero()[:-1, 0]
        pixels = seen.inputs["pixel_values"].to(model.dtype)
        logits = model(input_ids=ids[None], pixel_values=pixels).logits[0].float().log_softmax(-1)
        found.append(float(logits[places - 1, ids[places]].sum()))
    return found


def test_options_packed_behind_one_question_are_as_likely_as_alone(tiny, questions):
    model, processor = tiny
    found = closed.log_likelihoods(model, processor, questions, batch_rows=20)
    with torch.inference_mode():
        for row, nats in zip(questions, found, strict=True):
            alone = one_by_one(model, processor, row)
            assert [x - nats[0] for x in nats] == pytest.approx([x - alone[0] for x in alone], abs=2e-3)
            assert len(set(nats)) == len(row["options"])


def test_the_likeliest_option_is_the_answer_and_is_found_once(tiny, questions, tmp_path, monkeypatch):
    units, cfg = Units(tmp_path / "units.sqlite", "closed"), SimpleNamespace(batch_rows=16)
    monkeypatch.setattr(Units, "add", None)  # a kill between two would leave the rest to another batch
    rows = closed.choose_rows(*tiny, questions, "original", units, cfg)
    nats = closed.log_likelihoods(*tiny, questions)
    for row, each in zip(rows, nats, strict=True):
        assert row["answer"] == row["options"][each.index(max(each))]
        assert row["score_percent"] == 100 * (row["answer"] == row["options"][row["truth"]])
        assert (row["method"], row["cluster"]) == ("original", row["key"])
    monkeypatch.setattr(closed, "log_likelihoods", None)  # would be called for what is not known yet
    assert closed.choose_rows(None, None, questions, "original", units, cfg) == rows
    with pytest.raises(TypeError):
        closed.choose_rows(None, None, questions, "pruned", units, cfg)
