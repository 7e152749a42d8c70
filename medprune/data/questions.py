"""Turn the facts about conditions into questions, answers and chats, and find named diagnoses in a text.

`load_conditions` reads the facts file; nothing here depends on which conditions, or how many, it holds.
"""

import json
import random
import re
from pathlib import Path

from medprune.data.record import Record
from medprune.settings import DATA

QUESTION_KINDS = ("name", "definition", "features", "treatment")


def words(text: str) -> list[str]:
    """Split into lower-case words in the singular: "Seborrheic_Keratoses" reads seborrheic, keratosis."""
    found = re.findall(r"[^\W_]+", text.casefold())
    found = [w[:-4] + "osis" if w.endswith("oses") else w for w in found]
    return [w[:-1] if w[-1] == "s" and len(w) > 3 and w[-2] not in "siu" else w for w in found]


def name_index(conditions: dict[str, dict]) -> dict[str, str]:
    """Map each name and alias, as `words` without spaces, to its condition; ValueError if two share one."""
    index = {}
    for name, facts in conditions.items():
        for alias in (name, *facts["aliases"]):
            if index.setdefault("".join(words(alias)), name) != name:
                raise ValueError(f"{alias!r} names both {index[''.join(words(alias))]!r} and {name!r}.")
    return index


def _read_json_object(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} must hold a JSON object with at least one entry.")
    return found


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def load_conditions(path: Path | None = None) -> dict[str, dict]:
    """Load the facts file {condition: facts}; None takes the paper's eight conditions.

    Facts are "aliases", "definition", "clinical_features", "treatment", "sources", "answers" (one per
    question kind) and "key_facts" (phrases of the answers to definition, features and treatment); optionally
    "not", phrases that hold a name but mean another disease. Raises ValueError, naming the condition, where a
    part is missing, a key fact does not occur in its answer, or two conditions share a name.
    """
    path = Path(path or DATA / "conditions.json")
    conditions = _read_json_object(path)
    for name, facts in conditions.items():
        facts = facts if isinstance(facts, dict) else {}
        for part in ("aliases", "clinical_features", "treatment", "sources"):
            if not _are_texts(facts.get(part)):
                raise ValueError(f"{path}: {name!r} needs {part!r} as a list of texts.")
        if not _is_text(facts.get("definition")):
            raise ValueError(f"{path}: {name!r} needs 'definition' as a text.")
        for part in ("answers", "key_facts"):
            if not isinstance(facts.get(part), dict):
                raise ValueError(f"{path}: {name!r} needs {part!r} as an object by question kind.")
        for kind in QUESTION_KINDS:
            answer, phrases = facts["answers"].get(kind), facts["key_facts"].get(kind)
            if not _is_text(answer):
                raise ValueError(f"{path}: {name!r} needs a text answers[{kind!r}].")
            if kind != "name" and not (phrases and _are_texts(phrases)):
                raise ValueError(f"{path}: {name!r} needs a list of phrases key_facts[{kind!r}].")
            for phrase in phrases or ():
                if phrase.casefold() not in answer.casefold():
                    raise ValueError(f"{path}: {name!r} has no key fact {phrase!r} in its {kind!r} answer.")
    name_index(conditions)
    return conditions


def load_questions(path: Path | None = None) -> dict[str, list[str]]:
    """Load {question kind: paraphrases}, the first one canonical; None takes the questions that ship.

    A paraphrase other than the first may hold {condition}. Raises ValueError where a kind has none, or none
    without.
    """
    path = Path(path or DATA / "questions.json")
    questions = _read_json_object(path)
    for kind in QUESTION_KINDS:
        if not (questions.get(kind) and _are_texts(questions[kind])):
            raise ValueError(f"{path} needs a list of questions for {kind!r}.")
        if "{condition}" in questions[kind][0]:
            raise ValueError(f"{path}: the first {kind!r} question, the test's, must not hold {{condition}}.")
    return questions


def conversation(
    record: "Record", conditions: dict[str, dict], questions: dict[str, list[str]], rng: random.Random
) -> list[dict]:
    """Make one chat of four questions about a picture, in the message format of transformers' chat templates.

    The order name, definition, features, treatment is rotated at random, for the test asks each kind of
    question alone: each must be learned from the picture, not from the answer before. A paraphrase with the
    condition's name is drawn only once the chat has named it.
    """
    start = rng.randrange(len(QUESTION_KINDS))
    messages, named = [], False
    for kind in QUESTION_KINDS[start:] + QUESTION_KINDS[:start]:
        question = rng.choice([q for q in questions[kind] if named or "{condition}" not in q])
        asked = {"type": "text", "text": question.replace("{condition}", record.condition)}
        answer = {"type": "text", "text": conditions[record.condition]["answers"][kind]}
        messages.append({"role": "user", "content": [asked] if messages else [{"type": "image"}, asked]})
        messages.append({"role": "assistant", "content": [answer]})
        named = named or kind in ("name", "definition")
    return messages


def test_questions(
    records: "list[Record]",
    conditions: dict[str, dict],
    questions: dict[str, list[str]],
    kinds: tuple[str, ...] = ("name", "features", "treatment"),
) -> list[dict]:
    """List the test's rows, one per picture and kind, with the canonical question and its reference."""
    wrong = [kind for kind in kinds if kind not in QUESTION_KINDS]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no kind of question; the kinds are {', '.join(QUESTION_KINDS)}.")
    return [
        {
            "id": f"{r.key}#{kind}",
            "key": r.key,
            "path": r.path,
            "condition": r.condition,
            "kind": kind,
            "question": questions[kind][0],
            "reference": conditions[r.condition]["answers"][kind],
            "skin_tone": r.skin_tone,
        }
        for r in records
        for kind in kinds
    ]


test_questions.__test__ = False  # keeps pytest from collecting it where a test imports it by name


def named_conditions(text: str, conditions: dict[str, dict]) -> list[str]:
    """List the conditions that a text names, each once, in order of appearance.

    Names and aliases match as whole words, the longest first; hyphens, case and plural make no difference.
    Phrases under "not" take their words out: "dermatitis herpetiformis" names no dermatitis. A denial counts
    as naming.
    """
    phrases = [(words(p), name) for name, facts in conditions.items() for p in (name, *facts["aliases"])]
    phrases += [(words(phrase), None) for facts in conditions.values() for phrase in facts.get("not", ())]
    phrases.sort(key=lambda item: -len(item[0]))
    tokens, found, i = words(text), [], 0
    while i < len(tokens):
        phrase, name = next((p for p in phrases if tokens[i : i + len(p[0])] == p[0]), ((), None))
        if name and name not in found:
            found.append(name)
        i += max(1, len(phrase))
    return found
