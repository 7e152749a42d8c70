"""The offline judge: an answer against the reference, the condition's facts and the other conditions'."""

import functools
import itertools
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from medprune.data.questions import named_conditions
from medprune.judging.judge import Judge, Judgement
from medprune.store import fingerprint


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


_STOP = set(
    _words(
        "a an and are as at be but by can for from has have in into is it its may more most no not of on or other than "
        "that the their them then there these they this those to usually very was when which with also often some such "
        "sometimes condition disease feature features image patient picture show shows skin treat treated treatment"
    )
)
_DANGLING = _STOP - {*_words("disease condition skin treatment treated it that them those more most")}
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
        self.stems = {c: {stem for text in texts for stem in _stems(text)} for c, texts in facts.items()}
        self.pairs, self.words = _neighbours([*itertools.chain(*self.texts.values()), *_ENGLISH.split(".")])
        self.named = functools.cache(lambda text: frozenset(named_conditions(text, conditions)))

    def vec(self, texts: list[str]) -> np.ndarray:
        """Return the (texts, d) embeddings, made once for each text."""
        new = [text for text in dict.fromkeys(texts) if text not in self.vectors]
        self.vectors.update(zip(new, self.embed(new), strict=True) if new else ())
        return np.stack([self.vectors[text] for text in texts])


@dataclass(frozen=True)
class Said:
    """What an answer says, clause by clause; arrays are (clauses,), cosines or 0-1."""

    clauses: list[str]
    named: list[frozenset[str]]  # the conditions that each names
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
    all three down, words out of order support nothing, and fluent text about another disease keeps 0.75 of each.
    """
    known = Known(conditions, embed)

    def score(rows):
        for row in rows:
            if row["condition"] not in conditions or row["kind"] not in _KINDS:
                raise ValueError(
                    f"row {row.get('id')!r} asks for the {row['kind']!r} of {row['condition']!r}: the conditions known "
                    f"are {', '.join(conditions)}, the kinds {', '.join(_KINDS)}."
                )
        cut = [_clauses(row["answer"]) for row in rows]
        texts = list(itertools.chain(*known.texts.values()))
        for row, clauses in zip(rows, cut, strict=True):
            texts += [*(clause for clause, _ in clauses), row["answer"], row["reference"]]
        known.vec(texts)  # all at once is faster
        for i, (row, clauses) in enumerate(zip(rows, cut, strict=True)):
            yield i, _judgement(row, clauses, known)

    reads = ("question", "answer", "reference", "kind", "condition", "ended")
    return Judge("reference", f"facts {fingerprint(conditions)}, {embedder}", score, reads, __name__)


def _facts(condition: dict, kind: str) -> list[str]:
    texts = [condition["answers"][kind], *condition["key_facts"].get(kind, ())]
    listed = condition[_ABOUT[kind]] if kind in _ABOUT else []
    return texts + (re.split(r"(?<=\.)\s+", listed) if isinstance(listed, str) else list(listed))


def _judgement(row: dict, cut: list[tuple[str, str]], known: Known) -> Judgement:
    """Score one answer, cut into clauses, each with its sentence."""
    if _words(row["answer"]) == _words(row["reference"]):
        return Judgement(5.0, 5.0, 5.0, "the reference, word for word")
    if not cut:
        return Judgement(0.0, 0.0, 0.0, "empty")
    said = _said(row, cut, known)
    singled_out, covered = _singled_out(row, said, known), _covered(row, said, known)
    supported, foreign_words = said.weight @ said.support, said.weight @ said.foreign
    foreign = foreign_words / max(foreign_words + supported, 1e-9)
    invented = max(0.0, 1 - supported - foreign_words)
    clean = max(0.0, 1 - foreign - 0.5 * invented - (0 if row["ended"] else 0.25))
    gate = min(1, supported / 0.3) * min(1, 0.4 + 2 * covered) * (0.3 + 0.7 * singled_out)
    scores = (5 * singled_out * covered, 5 * singled_out * supported * (0.5 + 0.5 * covered), 5 * clean * gate)
    on_topic = 0.75 * float(said.weight @ (_ramp(said.near, 0.5, 0.7) * said.order))
    fresh = 1 - _repetition(row["answer"])
    raw = (
        f"singled out {singled_out:.2f}, covered {covered:.2f}, supported {supported:.2f}, "
        f"foreign {foreign:.2f}, in order {said.weight @ said.order:.2f}, repeated {1 - fresh:.2f}"
    )
    return Judgement(*(round(float(max(score, on_topic) * fresh), 2) for score in scores), raw)


def _said(row: dict, cut: list[tuple[str, str]], known: Known) -> Said:
    """Compare each clause with the reference, the right condition's facts and the other conditions'."""
    condition, reference = row["condition"], row["reference"]
    clauses = [clause for clause, _ in cut]
    named = [known.named(clause) for clause in clauses]
    pairs, words = _neighbours([row["question"], reference])
    pairs, words = pairs | known.pairs, words | known.words
    order = np.array([_order(sentence, pairs, words) for _, sentence in cut])
    order *= 0.3 ** _slips(row["answer"], row["ended"])

    vectors = known.vec(clauses)
    like = {c: (vectors @ known.vec(texts).T).max(1) for c, texts in known.texts.items()}
    about = (vectors @ known.vec([reference, *_facts(known.conditions[condition], row["kind"])]).T).max(1)
    mine, theirs = np.maximum(about, like.pop(condition)), np.max(list(like.values()), axis=0)
    near = np.maximum(mine, theirs)
    # filler weighs half: it dilutes but never helps
    weight = np.array([len(_words(clause)) for clause in clauses]) * (0.5 + 0.5 * _ramp(near, 0.25, 0.5))

    in_reference = np.array([_share(clause, set(_stems(reference))) for clause in clauses])
    in_facts = np.array([_share(clause, known.stems[condition]) for clause in clauses])
    foreign = _ramp(theirs - mine, 0.03, 0.18) * _ramp(theirs, 0.35, 0.5) * (1 - in_reference)
    support = np.maximum(_ramp(about, 0.35, 0.65), 0.5 * _ramp(mine, 0.35, 0.65))
    support *= 0.3 + 0.7 * _ramp(in_facts, 0, 0.6)
    support = np.maximum(support, _ramp(in_reference, 0.5, 1)) * (1 - foreign) * order
    if row["kind"] == "name":
        support = np.maximum(support, [condition in n for n in named] * order)
    return Said(clauses, named, order, near, mine - theirs, weight / weight.sum(), foreign, support)


def _singled_out(row: dict, said: Said, known: Known) -> float:
    """Return 0-1: does the answer speak of the right condition, and name no other?"""
    condition, reference, kind = row["condition"], row["reference"], row["kind"]
    right = any(condition in named for named in said.named)
    wrong = any(named - {condition} - known.named(reference) for named in said.named)
    kept = 1.0 if not wrong else 0.3 if right else 0.0
    if kind == "name":
        return float(right) * kept
    says = _ramp(said.near, 0.25, 0.5)
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
    stems = [set(_stems(clause)) for clause in said.clauses]
    wanted = [_stems(fact) or _words(fact) for fact in facts]
    literal = np.array([[np.mean([stem in clause for stem in fact]) for clause in stems] for fact in wanted])
    return float((np.maximum(likeness, _ramp(literal, 0.5, 1)) * said.order).max(1).mean())


def _neighbours(texts: list[str]) -> tuple[set, set]:
    """Return the word pairs that stand next to each other, or one apart, in the texts, and the words."""
    split = [_words(t) for t in texts]
    return {p for w in split for gap in (1, 2) for p in zip(w, w[gap:], strict=False)}, {x for w in split for x in w}


def _order(sentence: str, pairs: set, words: set) -> float:
    """Return 0-1: do neighbouring words follow each other as they do in known text? Short sentences get the benefit."""
    w = _words(sentence)
    tellable = [pair for pair in zip(w, w[1:], strict=False) if pair[0] in words and pair[1] in words]
    return float(_ramp((sum(pair in pairs for pair in tellable) + 2) / (len(tellable) + 2), 0.3, 0.5))


def _slips(text: str, ended: bool) -> int:
    """Count signs of words out of place: "is This", a sentence that starts small, one that ends on "the"."""
    mid = sum(w.lower() in _STOP for w in re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text))
    small = len(re.findall(r"(?<=[a-z]{3}[.!?] )[a-z]", text))
    ends = re.findall(r"([a-z]+)(?:[.!?](?=\s|$)|$)" if ended else r"([a-z]+)[.!?](?=\s|$)", text.strip().lower())
    return mid + small + sum(w in _DANGLING for w in ends)


def _repetition(text: str) -> float:
    """Return the degenerate share of a text, 0-1: repeated trigrams, or how well it compresses if that says more."""
    w = _words(text)
    grams = list(zip(w, w[1:], w[2:], strict=False))
    repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
    raw = text.encode()
    squeezed = _ramp(0.45 - len(zlib.compress(raw)) / len(raw), 0, 0.25) if len(raw) > 120 else 0.0
    return float(max(repeated, squeezed))


def _clauses(text: str) -> list[tuple[str, str]]:
    """Cut a text at sentence ends and, where four words or more stand between, at commas: (clause, its sentence)."""
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+|[;:\n]+", text):
        start = len(found)
        for piece in sentence.split(","):
            if len(found) > start and min(len(_words(piece)), len(_words(found[-1][0]))) < 4:
                found[-1] = (f"{found[-1][0]}, {piece.strip()}", sentence)
            elif _words(piece):
                found.append((piece.strip(), sentence))
    return found


def _stems(text: str) -> list[str]:
    """Return the stems of the content words: cut suffixes, enough to match 'scales' with 'scaly'."""
    suffix = r"(?<=\w{3})(?:ization|isation|ations?|ingly|ings?|edly|ies|ied|ed|es|ly|s|e|y)$"
    return [re.sub(suffix, "", w) for w in _words(text) if w not in _STOP]


def _share(text: str, stems: set[str]) -> float:
    return float(np.mean([s in stems for s in _stems(text)] or [0]))


def _ramp(x, low: float, high: float):
    return np.clip((x - low) / (high - low), 0, 1)
