"""The offline judge: an answer against the reference, the condition's facts and the other conditions'."""

import functools
import itertools
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from medprune.data.questions import named_conditions
from medprune.data.questions import words as question_words
from medprune.judging.asserted import AVOIDED, DENIED, OPEN, SAID, STOP, opposed, runs, spoken, stems, values, words
from medprune.judging.judge import Judge, Judgement
from medprune.store import fingerprint

_DANGLING = STOP - {*words("disease condition skin treatment treated it that them those more most")}
_FRAME = set(
    words("this it here diagnosis name picture image photograph patient disease condition called likely probably")
)
_ENGLISH = (  # everyday frames around a medical answer, so that they count as words in order
    "The picture shows a skin disease. This image shows the disease. The name of this disease is. It is called. "
    "It is most likely. The patient has. There are. It can be treated with. It is usually treated by. Treatment "
    "includes the use of. It may be. They may also be. It is caused by. It appears as. It is a type of. One of the "
    "most. This is due to the. Such as the. It looks like a. Use of a. In the case of. Which is often on the. And the."
)
_ABOUT = {"definition": "definition", "features": "clinical_features", "treatment": "treatment"}
_KINDS = ("name", *_ABOUT)


class Known:
    """What is known of the conditions before an answer is read, and the embeddings of all texts met so far."""

    def __init__(self, conditions: dict[str, dict], embed: Callable[[list[str]], np.ndarray]):
        self.conditions, self.embed, self.vectors = conditions, embed, {}
        facts = {c: [text for kind in _KINDS for text in _facts(conditions[c], kind)] for c in conditions}
        self.texts = {c: list(dict.fromkeys(texts)) for c, texts in facts.items()}
        self.stems = {c: {stem for text in texts for stem in stems(text)} for c, texts in facts.items()}
        self.said = {c: _in_state(texts, SAID, AVOIDED) for c, texts in facts.items()}
        self.denied = {c: _in_state(texts, DENIED, AVOIDED) for c, texts in facts.items()}
        self.values = {c: set().union(*map(values, texts)) for c, texts in facts.items()}
        self.pairs, self.words = _neighbours([*itertools.chain(*self.texts.values()), *_ENGLISH.split(".")])
        self.aliases = {c: [question_words(name) for name in (c, *conditions[c]["aliases"])] for c in conditions}
        self.named = functools.cache(lambda text: frozenset(named_conditions(text, conditions)))

    def diagnosed(self, clause: str) -> frozenset[str]:
        """Return the condition that a clause such as "This picture shows melanoma" makes its diagnosis."""
        w = question_words(spoken(clause))
        n = next((i for i, word in enumerate(w) if word not in STOP and word not in _FRAME), len(w))
        if not _FRAME & set(w[:n]):
            return frozenset()
        begun = {c for c, aliases in self.aliases.items() if any(w[n : n + len(a)] == a for a in aliases)}
        return self.named(spoken(clause)) & begun

    def vec(self, texts: list[str]) -> np.ndarray:
        """Return the (texts, d) embeddings, made once for each text."""
        new = [text for text in dict.fromkeys(texts) if text not in self.vectors]
        self.vectors.update(zip(new, self.embed(new), strict=True) if new else ())
        return np.stack([self.vectors[text] for text in texts])


@dataclass(frozen=True)
class Clause:
    """A part of an answer, the sentence that it stands in, and whether it is said, denied or left open."""

    text: str
    sentence: str
    state: str


@dataclass(frozen=True)
class Said:
    """What an answer says, clause by clause; arrays are (clauses,), cosines or 0-1."""

    clauses: list[str]
    named: list[frozenset[str]]  # the conditions that each names and does not deny
    denied: frozenset[str]  # the conditions that any clause denies
    true: np.ndarray  # is it said, and nothing in it the opposite of a fact?
    order: np.ndarray  # do the words follow each other as in known text?
    near: np.ndarray  # likeness to anything known
    nearer: np.ndarray  # how much closer to the right condition than to another
    weight: np.ndarray  # share of the words; of those close to nothing known half
    foreign: np.ndarray  # is it about another condition?
    support: np.ndarray  # is it borne out by the reference or the right condition's facts?


def reference_judge(conditions: dict, embed: Callable[[list[str]], np.ndarray], embedder: str) -> Judge:
    """Make the offline judge: the answer against the reference, the condition's facts and the other conditions'.

    `conditions` maps each name to its answers, key_facts and texts (data/conditions.json); `embed` returns (n, d)
    unit-norm float32 sentence embeddings, of the model that `embedder` identifies. Deterministic. The answer is cut
    into clauses, each compared with the facts of the right condition and of the others by embedding and by word stems:
    truthfulness = right condition x key facts covered; groundedness = right condition x share of words in supported
    clauses, half of it for coverage; hallucination = 5 less foreign, invented and unfinished text. Repetition scales
    all three down, and words out of order support nothing, nor does what is denied, left open or the opposite of a
    fact (`asserted`). Nothing said, another diagnosis and the denied truth are all worth 0.
    """
    known = Known(conditions, embed)

    def score(rows):
        for row in rows:
            if row["condition"] not in conditions or row["kind"] not in _KINDS:
                raise ValueError(
                    f"row {row.get('id')!r} asks for the {row['kind']!r} of {row['condition']!r}: the conditions known "
                    f"are {', '.join(conditions)}, the kinds {', '.join(_KINDS)}."
                )
        cut = [_clauses(row["answer"], row["condition"], known) for row in rows]
        texts = list(itertools.chain(*known.texts.values()))
        for row, clauses in zip(rows, cut, strict=True):
            texts += [*(clause.text for clause in clauses), row["answer"], row["reference"]]
        known.vec(texts)  # all at once is faster
        for i, (row, clauses) in enumerate(zip(rows, cut, strict=True)):
            yield i, _judgement(row, clauses, known)

    reads = ("question", "answer", "reference", "kind", "condition", "ended")
    return Judge("reference", f"facts {fingerprint(conditions)}, {embedder}", score, reads, __name__)


def _facts(condition: dict, kind: str) -> list[str]:
    texts = [condition["answers"][kind], *condition["key_facts"].get(kind, ())]
    listed = condition[_ABOUT[kind]] if kind in _ABOUT else []
    return texts + (re.split(r"(?<=\.)\s+", listed) if isinstance(listed, str) else list(listed))


def _in_state(texts: list[str], *states: str) -> set[str]:
    """Return the stems of those parts of some texts that are in one of the states."""
    parts = [run for text in texts for _, cut in runs(text) for run in cut if run.state in states]
    return {stem for run in parts for stem in stems(run.text)}


def _judgement(row: dict, cut: list[Clause], known: Known) -> Judgement:
    """Score one answer, cut into clauses."""
    if words(row["answer"]) == words(row["reference"]):
        return Judgement(5.0, 5.0, 5.0, "the reference, word for word")
    if not cut:
        return Judgement(0.0, 0.0, 0.0, "nothing said")
    said = _said(row, cut, known)
    singled_out, covered = _singled_out(row, said, known), _covered(row, said, known)
    supported, foreign_words = said.weight @ said.support, said.weight @ said.foreign
    foreign = foreign_words / max(foreign_words + supported, 1e-9)
    invented = max(0.0, 1 - supported - foreign_words)
    clean = max(0.0, 1 - foreign - 0.5 * invented - (0 if row["ended"] else 0.25))
    gate = min(1, supported / 0.3) * min(1, 0.4 + 2 * covered) * singled_out
    scores = (5 * singled_out * covered, 5 * singled_out * supported * (0.5 + 0.5 * covered), 5 * clean * gate)
    fresh = 1 - _repetition(row["answer"])
    raw = (
        f"singled out {singled_out:.2f}, covered {covered:.2f}, supported {supported:.2f}, "
        f"foreign {foreign:.2f}, true {said.weight @ said.true:.2f}, in order {said.weight @ said.order:.2f}, "
        f"repeated {1 - fresh:.2f}"
    )
    return Judgement(*(round(float(score * fresh), 2) for score in scores), raw)


def _said(row: dict, cut: list[Clause], known: Known) -> Said:
    """Compare each clause with the reference, the right condition's facts and the other conditions'."""
    condition, reference = row["condition"], row["reference"]
    clauses = [clause.text for clause in cut]
    is_said = np.array([clause.state == SAID for clause in cut])
    named = [known.named(spoken(clause.text)) if clause.state == SAID else frozenset() for clause in cut]
    denied = frozenset().union(*(known.named(clause.text) for clause in cut if clause.state in (DENIED, AVOIDED)))
    pairs, vocabulary = _neighbours([row["question"], reference])
    pairs, vocabulary = pairs | known.pairs, vocabulary | known.words
    order = np.array([_order(clause.sentence, pairs, vocabulary) for clause in cut])
    order *= 0.3 ** _slips(row["answer"], row["ended"])

    vectors = known.vec(clauses)
    like = {c: (vectors @ known.vec(texts).T).max(1) for c, texts in known.texts.items()}
    about = (vectors @ known.vec([reference, *_facts(known.conditions[condition], row["kind"])]).T).max(1)
    mine, theirs = np.maximum(about, like.pop(condition)), np.max(list(like.values()), axis=0)
    near = np.maximum(mine, theirs)
    # filler weighs half: it dilutes but never helps; nor does what is left open
    weight = np.array([len(words(clause)) for clause in clauses]) * (0.5 + 0.5 * _ramp(near, 0.25, 0.5))
    weight *= np.array([0.5 if clause.state == OPEN else 1 for clause in cut])
    true = np.array([_true(clause, row, known) for clause in cut])
    denies = _ramp(np.array([_share(clause, known.said[condition]) for clause in clauses]), 0.3, 0.7)
    denies = np.maximum(denies, _ramp(mine, 0.45, 0.65)) * [clause.state in (DENIED, AVOIDED) for clause in cut]

    in_reference = np.array([_share(clause, set(stems(reference))) for clause in clauses])
    in_facts = np.array([_share(clause, known.stems[condition]) for clause in clauses])
    foreign = _ramp(theirs - mine, 0.03, 0.18) * _ramp(theirs, 0.35, 0.5) * (1 - in_reference) * is_said
    foreign = np.maximum(foreign, np.where(is_said, 1 - true, denies))
    support = np.maximum(_ramp(about, 0.35, 0.65), 0.5 * _ramp(mine, 0.35, 0.65))
    support *= 0.3 + 0.7 * _ramp(in_facts, 0, 0.6)
    support = np.maximum(support, _ramp(in_reference, 0.5, 1)) * (1 - foreign) * order * true
    if row["kind"] == "name":
        support = np.maximum(support, [condition in n for n in named] * order)
    return Said(clauses, named, denied, true, order, near, mine - theirs, weight / weight.sum(), foreign, support)


def _true(clause: Clause, row: dict, known: Known) -> float:
    """Return 0-1: is a clause said, without what the facts deny and without the opposite of what the reference says?"""
    if clause.state != SAID:
        return 0.0
    condition = row["condition"]
    denied, here = known.denied[condition] - known.said[condition], _in_state([clause.text], SAID)
    against = _share(clause.text, denied & here)
    facts = values(row["reference"])
    return float(
        (1 - _ramp(against, 0.2, 0.6)) * 0.4 ** opposed(values(clause.text), facts, facts | known.values[condition])
    )


def _singled_out(row: dict, said: Said, known: Known) -> float:
    """Return 0-1: does the answer speak of the right condition, and diagnose no other?

    A condition named beside the right one is another diagnosis where the name is asked for; elsewhere only in words
    such as "this is melanoma", for features may be compared.
    """
    condition, reference, kind = row["condition"], row["reference"], row["kind"]
    right = any(condition in named for named in said.named) and condition not in said.denied
    named = said.named if kind == "name" else [known.diagnosed(clause) for clause in said.clauses]
    wrong = set().union(*named) - {condition} - known.named(reference)
    kept = 1.0 if not wrong else 0.3 / len(wrong) if right else 0.0
    if kind == "name":
        return float(right) * kept
    says = _ramp(said.near, 0.25, 0.5) * (said.true > 0)
    claims = said.weight * says / max(said.weight @ says, 1e-9)
    answer = known.vec([row["answer"]])[0]
    others = [facts["answers"][kind] for c, facts in known.conditions.items() if c != condition]
    margin = answer @ known.vec([reference])[0] - (known.vec(others) @ answer).max()
    return _ramp(0.5 * claims @ said.nearer + 0.5 * margin, -0.05, 0.1) * kept


def _covered(row: dict, said: Said, known: Known) -> float:
    """Return the share (0-1) of key facts said, each in its best clause: by stems or by embedding; of a name, all."""
    if row["kind"] == "name":
        return float(([row["condition"] in named for named in said.named] * said.order).max())
    facts = known.conditions[row["condition"]]["key_facts"][row["kind"]]
    likeness = _ramp(known.vec(facts) @ known.vec(said.clauses).T, 0.6, 0.8)  # (facts, clauses)
    in_clauses = [set(stems(clause)) for clause in said.clauses]
    wanted = [stems(fact) or words(fact) for fact in facts]
    literal = np.array([[np.mean([stem in clause for stem in fact]) for clause in in_clauses] for fact in wanted])
    return float((np.maximum(likeness, _ramp(literal, 0.5, 1)) * said.order * said.true).max(1).mean())


def _neighbours(texts: list[str]) -> tuple[set, set]:
    """Return the word pairs that stand next to each other, or one apart, in the texts, and the words."""
    split = [words(t) for t in texts]
    return {p for w in split for gap in (1, 2) for p in zip(w, w[gap:], strict=False)}, {x for w in split for x in w}


def _order(sentence: str, pairs: set, vocabulary: set) -> float:
    """Return 0-1: do neighbouring words follow each other as they do in known text? Short sentences get the benefit."""
    w = words(sentence)
    tellable = [pair for pair in zip(w, w[1:], strict=False) if pair[0] in vocabulary and pair[1] in vocabulary]
    return float(_ramp((sum(pair in pairs for pair in tellable) + 2) / (len(tellable) + 2), 0.3, 0.5))


def _slips(text: str, ended: bool) -> int:
    """Count signs of words out of place: "is This", a sentence that starts small, one that ends on "the"."""
    mid = sum(w.lower() in STOP for w in re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text))
    small = len(re.findall(r"(?<=[a-z]{3}[.!?] )[a-z]", text))
    ends = re.findall(r"([a-z]+)(?:[.!?](?=\s|$)|$)" if ended else r"([a-z]+)[.!?](?=\s|$)", text.strip().lower())
    return mid + small + sum(w in _DANGLING for w in ends)


def _repetition(text: str) -> float:
    """Return the degenerate share of a text, 0-1: repeated trigrams, or how well it compresses if that says more."""
    w = words(text)
    grams = list(zip(w, w[1:], w[2:], strict=False))
    repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
    raw = text.encode()
    squeezed = _ramp(0.45 - len(zlib.compress(raw)) / len(raw), 0, 0.25) if len(raw) > 120 else 0.0
    return float(max(repeated, squeezed))


def _clauses(text: str, condition: str, known: Known) -> list[Clause]:
    """Cut a text where what is said ends and, where four words or more stand between, at commas.

    Denials that the facts hold too are part of what is said. Left out is what is denied of other conditions alone, and
    what a denial leaves over of its sentence, such as "this is".
    """
    found = []
    for sentence, cut in runs(text):
        stretches = []
        for run in cut:
            state = (
                SAID if run.state in (DENIED, AVOIDED) and _denied_by_facts(run.text, condition, known) else run.state
            )
            if stretches and state == stretches[-1][0] == SAID:
                stretches[-1] = (SAID, stretches[-1][1], run.end)
            else:
                stretches.append((state, run.start, run.end))
        whole = len(stretches) == 1 and stretches[0][0] == SAID
        for state, start, end in [(SAID, 0, len(sentence))] if whole else stretches:
            part = sentence[start:end]
            of_others = state in (DENIED, AVOIDED) and known.named(part) and condition not in known.named(part)
            if whole or not of_others and any(len(stem) > 3 for stem in stems(part)):
                found += [Clause(piece, sentence, state) for piece in _pieces(part)]
    return found


def _denied_by_facts(text: str, condition: str, known: Known) -> bool:
    denied = 0 if condition in known.named(text) else _share(text, known.denied[condition])
    return denied >= 0.5 and denied >= _share(text, known.said[condition])


def _pieces(sentence: str) -> list[str]:
    """Cut a sentence at commas between which four words or more stand."""
    found = []
    for piece in sentence.split(","):
        if found and min(len(words(piece)), len(words(found[-1]))) < 4:
            found[-1] = f"{found[-1]}, {piece.strip()}"
        elif words(piece):
            found.append(piece.strip())
    return found


def _share(text: str, known: set[str]) -> float:
    return float(np.mean([stem in known for stem in stems(text)] or [0]))


def _ramp(x, low: float, high: float):
    return np.clip((x - low) / (high - low), 0, 1)
