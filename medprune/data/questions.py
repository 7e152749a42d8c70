"""Turn the facts about conditions into questions, answers and chats, and find named diagnoses in a text.

`load_conditions` reads the facts file; nothing here depends on which conditions, or how many, it holds.
"""

import json
import random
import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, create_model, model_validator

from medprune.data.record import Record
from medprune.settings import DATA
from medprune.store import content, fingerprint, read_json

QUESTION_KINDS = ("name", "definition", "features", "treatment")
TESTED = ("name", "features", "treatment")
Text = Annotated[str, Field(pattern=r"\S")]
Texts = Annotated[list[Text], Field(min_length=1)]


class Facts(BaseModel):
    """What a facts file must say of a condition; "not" may list phrases that hold a name but mean another disease."""

    aliases: list[Text]
    definition: Text
    clinical_features: list[Text]
    treatment: list[Text]
    sources: list[Text]
    answers: create_model("Answers", **dict.fromkeys(QUESTION_KINDS, Text))
    key_facts: create_model("KeyFacts", **dict.fromkeys(QUESTION_KINDS[1:], Texts))  # phrases of the answers

    @model_validator(mode="after")
    def _find_key_facts(self):
        for kind, phrases in self.key_facts:
            for phrase in phrases:
                if phrase.casefold() not in getattr(self.answers, kind).casefold():
                    raise ValueError(f"has no key fact {phrase!r} in its {kind!r} answer")
        return self


def words(text: str) -> list[str]:
    """Split into lower-case words in the singular: "Seborrheic_Keratoses" reads seborrheic, keratosis."""
    found = re.findall(r"[^\W_]+", text.casefold())
    found = [w[:-4] + "osis" if w.endswith("oses") else w for w in found]
    return [w[:-1] if w[-1] == "s" and len(w) > 3 and w[-2] not in "siu" else w for w in found]


def plain(text: str) -> str:
    """Reduce a name to what counts in it: "Basal-cell carcinomas" reads basalcellcarcinoma."""
    return "".join(words(text))


def name_index(conditions: dict[str, dict]) -> dict[str, str]:
    """Map each name and alias, made `plain`, to its condition; ValueError if two share one."""
    index = {}
    for name, facts in conditions.items():
        for alias in (name, *facts["aliases"]):
            if (other := index.setdefault(plain(alias), name)) != name:
                raise ValueError(f"{alias!r} names both {other!r} and {name!r}.")
    return index


def load_conditions(path: str | Path | None = None) -> dict[str, dict]:
    """Load the facts file {condition: `Facts`}; None takes the paper's eight conditions.

    Raises ValueError, naming the file and the condition, where a part is missing, a key fact does not occur in its
    answer, or two conditions share a name.
    """
    path = Path(path or DATA / "conditions.json")
    try:
        conditions = json.loads(path.read_text(encoding="utf-8"))
        TypeAdapter(Annotated[dict[str, Facts], Field(min_length=2)]).validate_python(conditions)
    except ValidationError as error:
        first = error.errors()[0]
        said = {"missing": "is missing", "string_pattern_mismatch": "must be a text", "too_short": "must not be empty"}
        said |= {} if first["loc"] else {"too_short": "must hold two conditions, for a name to be told from another"}
        why = said.get(first["type"], first["msg"].removeprefix("Value error, ").replace("Input should", "must"))
        raise ValueError(f"{path}: {' '.join(map(repr, first['loc'])) or 'the whole'} {why}.") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} is not a readable JSON file: {why}.") from error
    name_index(conditions)
    return conditions


def load_questions() -> dict[str, list[str]]:
    """Load {question kind: paraphrases}: the first is canonical, the test's; others may hold {condition}."""
    return read_json(DATA / "questions.json")


def with_history(record: Record, question: str) -> str:
    """Return the question with what the patient says before it, where that is known."""
    return f"{record.history} {question}" if record.history else question


def conversation(
    record: Record, conditions: dict[str, dict], questions: dict[str, list[str]], rng: random.Random
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
        asked = {"type": "text", "text": with_history(record, question.replace("{condition}", record.condition))}
        answer = {"type": "text", "text": conditions[record.condition]["answers"][kind]}
        messages.append({"role": "user", "content": [asked] if messages else [{"type": "image"}, asked]})
        messages.append({"role": "assistant", "content": [answer]})
        named = named or kind in ("name", "definition")
    return messages


def test_questions(records: list[Record], conditions: dict[str, dict], questions: dict[str, list[str]]) -> list[dict]:
    """List the test's rows, one per picture and kind of TESTED, with the canonical question and its reference.

    `asked` is a hash of the question, the reference and the picture's bytes: what an answer is an answer to.
    """
    rows = []
    for r in records:
        for kind in TESTED:
            question, reference = with_history(r, questions[kind][0]), conditions[r.condition]["answers"][kind]
            row = {"id": f"{r.key}#{kind}", "key": r.key, "path": r.path, "condition": r.condition, "kind": kind}
            row |= {"question": question, "reference": reference, "skin_tone": r.skin_tone}
            rows.append(row | {"asked": fingerprint(question, reference, content(r.path))})
    return rows


def named_conditions(text: str, conditions: dict[str, dict]) -> list[str]:
    """List the conditions that a text names, each once, in order of appearance.

    Names and aliases match as whole words, the longest first; hyphens, case and plural make no difference. Phrases
    under "not" take their words out: "dermatitis herpetiformis" names no dermatitis. A denial counts as naming.
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
