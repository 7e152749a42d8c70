import copy
import itertools
import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from medprune.data.questions import (
    QUESTION_KINDS,
    conversation,
    load_conditions,
    load_questions,
    named_conditions,
    words,
)
from medprune.data.questions import test_questions as rows_of
from medprune.data.record import Record
from medprune.store import content, fingerprint

CONDITIONS, QUESTIONS = load_conditions(), load_questions()
RECORD = Record("train/x/psoriasis-1.jpg", "x/psoriasis-1.jpg", "psoriasis", "train", skin_tone="III")


def text_of(message: dict) -> str:
    return message["content"][-1]["text"]


def kind_of(question: str) -> str:
    return next(k for k, qs in QUESTIONS.items() if question in [q.format(condition="psoriasis") for q in qs])


def test_answers_are_single_sentences_that_tell_the_conditions_apart():
    for kind in ("definition", "features", "treatment"):
        answers = {name: facts["answers"][kind] for name, facts in CONDITIONS.items()}
        for name, answer in answers.items():
            assert 14 <= len(answer.split()) <= 24 and answer.endswith(".") and answer.count(". ") == 0
            assert named_conditions(answer, CONDITIONS) == ([name] if kind == "definition" else [])
        for a, b in itertools.combinations(answers.values(), 2):
            a, b = set(words(a)), set(words(b))
            assert len(a & b) / len(a | b) < 0.35
    for name, facts in CONDITIONS.items():
        assert facts["answers"]["name"] == f"This is {name}."


def test_questions_need_no_name_at_first():
    for kind in QUESTION_KINDS:
        assert len(set(QUESTIONS[kind])) == 5 and "{" not in QUESTIONS[kind][0]
        assert not named_conditions(QUESTIONS[kind][0], CONDITIONS)


def test_conversation_has_the_image_first_and_the_right_answers():
    messages = conversation(RECORD, CONDITIONS, QUESTIONS, random.Random(0))
    assert [m["role"] for m in messages] == ["user", "assistant"] * 4
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
    assert all([part["type"] for part in m["content"]] == ["text"] for m in messages[1:])
    for asked, answered in zip(messages[::2], messages[1::2], strict=True):
        assert text_of(answered) == CONDITIONS["psoriasis"]["answers"][kind_of(text_of(asked))]


def test_every_kind_is_first_equally_often_and_the_name_never_leaks_before_it_is_said():
    rng, first, asked = random.Random(1), Counter(), set()
    for _ in range(800):
        texts = [text_of(m) for m in conversation(RECORD, CONDITIONS, QUESTIONS, rng)]
        kinds = [kind_of(q) for q in texts[::2]]
        start = QUESTION_KINDS.index(kinds[0])
        assert tuple(kinds) == QUESTION_KINDS[start:] + QUESTION_KINDS[:start]
        first[kinds[0]] += 1
        asked.update(texts[::2])
        spoken = next(i for i, text in enumerate(texts) if "psoriasis" in text.lower())
        assert spoken % 2 == 1  # an answer names it first
    assert set(first) == set(QUESTION_KINDS) and min(first.values()) > 160
    assert len(asked) == 20  # all paraphrases are drawn, the named ones too


def test_conversation_is_seeded():
    chats = [conversation(RECORD, CONDITIONS, QUESTIONS, random.Random(s)) for s in (3, 3, 4)]
    assert chats[0] == chats[1] != chats[2]


def test_what_the_patient_says_goes_before_every_question_that_is_learned_or_tested():
    told = replace(RECORD, history="Aged 50 to 59, itches.")
    for tested, plain in zip(rows_of([told], CONDITIONS, QUESTIONS), rows_of([RECORD], CONDITIONS, QUESTIONS), strict=True):
        assert tested["question"] == f"Aged 50 to 59, itches. {plain['question']}" and tested["asked"] != plain["asked"]
    chats = [conversation(r, CONDITIONS, QUESTIONS, random.Random(3))[::2] for r in (told, RECORD)]
    for learned, plain in zip(*chats, strict=True):
        assert text_of(learned) == f"Aged 50 to 59, itches. {text_of(plain)}"


def test_test_questions_rows():
    rows = rows_of([RECORD], CONDITIONS, QUESTIONS)
    assert [row["kind"] for row in rows] == ["name", "features", "treatment"]
    question, reference = (
        "Describe the clinical features of this disease.",
        CONDITIONS["psoriasis"]["answers"]["features"],
    )
    assert rows[1] == {
        "id": "train/x/psoriasis-1.jpg#features",
        "key": "train/x/psoriasis-1.jpg",
        "path": "x/psoriasis-1.jpg",
        "condition": "psoriasis",
        "kind": "features",
        "question": question,
        "reference": reference,
        "skin_tone": "III",
        "asked": fingerprint(question, reference, content("x/psoriasis-1.jpg")),
    }


def test_what_was_asked_follows_the_pictures_bytes_not_its_place(tmp_path):
    def asked(folder, image=b"one", questions=QUESTIONS, conditions=CONDITIONS):
        path = tmp_path / folder / "a.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
        return rows_of([Record("k", str(path), "psoriasis")], conditions, questions)[0]["asked"]

    other = copy.deepcopy(CONDITIONS)
    other["psoriasis"]["answers"]["name"] = "It is psoriasis."
    assert asked("a") == asked("b")
    changed = {asked("a", b"two"), asked("a", questions=QUESTIONS | {"name": ["What?"]}), asked("a", conditions=other)}
    assert len(changed | {asked("a")}) == 4


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("This is rosacea.", ["rosacea"]),
        ("Likely SEBORRHOEIC KERATOSES, not melanomas", ["seborrheic keratosis", "melanoma"]),
        ("a basal-cell carcinoma (BCC)", ["basal cell carcinoma"]),
        ("seborrheic dermatitis", ["dermatitis"]),
        ("atopic eczema or contact dermatitis", ["dermatitis"]),
        ("a seborrheic keratosis beside an actinic keratosis", ["seborrheic keratosis", "actinic keratosis"]),
        ("chondrodermatitis nodularis", []),
        ("dermatitis herpetiformis", []),
        ("perioral dermatitis, less likely rosacea", ["rosacea"]),
        ("basal cell nevus syndrome; lichen sclerosus; parapsoriasis; melanocytic nevus; task", []),
        ("", []),
    ],
)
def test_named_conditions(text, found):
    assert named_conditions(text, CONDITIONS) == found


def spoil(facts: dict, how: str) -> None:
    changes = {
        "definition": lambda: facts["rosacea"].update(definition=" "),
        "aliases": lambda: facts["rosacea"].pop("aliases"),
        "answers": lambda: facts["rosacea"]["answers"].pop("treatment"),
        "key fact": lambda: facts["rosacea"]["key_facts"].update(features=["hair loss"]),
        "shared alias": lambda: facts["rosacea"]["aliases"].append("Melanomas"),
    }
    changes[how]()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("definition", "'rosacea' 'definition' must be a text"),
        ("aliases", "'rosacea' 'aliases' is missing"),
        ("answers", "'rosacea' 'answers' 'treatment' is missing"),
        ("key fact", "'rosacea' has no key fact 'hair loss'"),
        ("shared alias", "'melanoma' names both 'rosacea' and 'melanoma'"),
    ],
)
def test_load_conditions_names_what_is_wrong(tmp_path, how, message):
    facts = copy.deepcopy(CONDITIONS)
    spoil(facts, how)
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=message):
        load_conditions(path)


def test_one_condition_alone_is_refused(tmp_path):
    (tmp_path / "facts.json").write_text(json.dumps({"rosacea": CONDITIONS["rosacea"]}))
    with pytest.raises(ValueError, match="the whole must hold two conditions"):
        load_conditions(tmp_path / "facts.json")


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_load_conditions_refuses_other_json(tmp_path, content):
    path = tmp_path / "facts.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="facts.json"):
        load_conditions(path)
