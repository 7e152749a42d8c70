"""The offline judge: an answer against the reference, the condition's facts and the other conditions'."""

import functools
import re
import zlib
from collections.abc import Callable

import numpy as np

from medprune.data.questions import named_conditions
from medprune.judging.judge import Judge, Judgement
from medprune.store import fingerprint

REFERENCE_VERSION = "1"


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


_STOP = set(
    _words(
        "a an and are as at be but by can for from has have in into is it its may more most no not of on or other than "
        "that the their them then there these they this those to usually very was when which with also often some "
        "sometimes such condition disease feature features image patient picture show shows skin treat treated treatment"
    )
)


_DANGLING = _STOP - set(_words("disease condition skin treatment treated it that them those more most"))


_ENGLISH = (  # everyday frames around a medical answer, so that they count as words in order
    "The picture shows a skin disease. This image shows the disease. The name of this disease is. It is called. "
    "It is most likely. The patient has. There are. It can be treated with. It is usually treated by. Treatment "
    "includes the use of. It may be. They may also be. It is caused by. It appears as. It is a type of. One of the "
    "most. This is due to the. Such as the. It looks like a. Use of a. In the case of. Which is often on the. And the."
)


_ABOUT = {"definition": "definition", "features": "clinical_features", "treatment": "treatment"}


def reference_judge(conditions: dict, embed: Callable[[list[str]], np.ndarray]) -> Judge:
    """Make the offline judge: the answer against the reference, the condition's facts and the other conditions'.

    `conditions` maps each name to its answers, key_facts and texts (data/conditions.json); `embed` returns (n, d)
    unit-norm float32 sentence embeddings. Deterministic. The answer is cut into clauses, each compared with the facts
    of the right condition and of the others by embedding and by word stems:
    truthfulness = right condition x key facts covered; groundedness = right condition x share of words in supported
    clauses, half of it for coverage; hallucination = 5 less foreign, invented and unfinished text. Repetition scales
    all three down, words out of order support nothing, and fluent text about another disease keeps 0.75 of each.
    """
    others = {c: [o for o in conditions if o != c] for c in conditions}
    own = {(c, k): _facts(conditions[c], k) for c in conditions for k in ("name", *_ABOUT)}
    every = {c: list(dict.fromkeys(t for k in ("name", *_ABOUT) for t in own[c, k])) for c in conditions}
    stems = {c: {s for t in texts for s in _stems(t)} for c, texts in every.items()}
    facts = [t for texts in every.values() for t in texts]
    pairs, words = _neighbours([*facts, *_ENGLISH.split(".")])
    vectors: dict[str, np.ndarray] = {}
    names = functools.cache(lambda text: frozenset(named_conditions(text, conditions)))

    def vec(texts):
        return np.stack([vectors[t] for t in texts])  # (texts, d)

    def score(rows):
        for row in rows:
            if (row["condition"], row["kind"]) not in own:
                raise ValueError(
                    f"row {row.get('id')!r} asks for the {row['kind']!r} of {row['condition']!r}: the conditions known "
                    f"are {', '.join(conditions)}, the kinds {', '.join(('name', *_ABOUT))}."
                )
        cut = [_clauses(r["answer"]) for r in rows]
        wanted = [t for r, u in zip(rows, cut, strict=True) for t in (*(x for x, _ in u), r["answer"], r["reference"])]
        wanted = [t for t in dict.fromkeys([*facts, *wanted]) if t not in vectors]
        vectors.update(zip(wanted, embed(wanted), strict=True) if wanted else ())
        for i, (row, clauses) in enumerate(zip(rows, cut, strict=True)):
            if _words(row["answer"]) == _words(row["reference"]):
                yield i, Judgement(5.0, 5.0, 5.0, "the reference, word for word", True)
            elif not clauses:
                yield i, Judgement(0.0, 0.0, 0.0, "empty", True)
            else:
                yield i, one(row, clauses)

    def one(row, cut):
        c, kind, reference = row["condition"], row["kind"], row["reference"]
        clauses = [clause for clause, _ in cut]
        E = vec(clauses)
        here = _neighbours([row["question"], reference])
        order = np.array([_order(sentence, pairs | here[0], words | here[1]) for _, sentence in cut])
        order *= 0.3 ** _slips(row["answer"], row["ended"])
        about = (E @ vec([reference, *own[c, kind]]).T).max(1)
        mine = np.maximum(about, (E @ vec(every[c]).T).max(1))
        theirs = np.max([(E @ vec(every[o]).T).max(1) for o in others[c]], axis=0)
        # a clause that is close to nothing known says little: it weighs half, so that filler dilutes but never helps
        says = _ramp(np.maximum(mine, theirs), 0.25, 0.5)
        weight = np.array([len(_words(u)) for u in clauses]) * (0.5 + 0.5 * says)
        weight /= weight.sum()
        in_reference = np.array([_share(u, set(_stems(reference))) for u in clauses])
        in_facts = np.array([_share(u, stems[c]) for u in clauses])
        foreign = _ramp(theirs - mine, 0.03, 0.18) * _ramp(theirs, 0.35, 0.5) * (1 - in_reference)
        near = np.maximum(_ramp(about, 0.35, 0.65), 0.5 * _ramp(mine, 0.35, 0.65))
        near *= 0.3 + 0.7 * _ramp(in_facts, 0, 0.6)
        support = np.maximum(near, _ramp(in_reference, 0.5, 1)) * (1 - foreign) * order

        named, allowed = [names(u) for u in clauses], {c} | names(reference)
        right, wrong = any(c in n for n in named), any(n - allowed for n in named)
        claims = weight * says / max(weight @ says, 1e-9)
        A, answers = vec([row["answer"]])[0], [conditions[o]["answers"][kind] for o in others[c]]
        margin = A @ vec([reference])[0] - (vec(answers) @ A).max()
        singled_out = _ramp(0.5 * claims @ (mine - theirs) + 0.5 * margin, -0.05, 0.1)
        if kind == "name":
            is_named = np.array([c in n for n in named])
            support = np.maximum(support, is_named * order)
            singled_out, covered = float(right), float((is_named * order).max())
        else:
            covered = _covered(conditions[c]["key_facts"][kind], clauses, E, order, vec)
        if wrong:
            singled_out *= 0.3 if right else 0.0
        supported, foreign_words = weight @ support, weight @ foreign
        foreign_share = foreign_words / max(foreign_words + supported, 1e-9)
        invented = max(0.0, 1 - supported - foreign_words)
        clean = max(0.0, 1 - foreign_share - 0.5 * invented - (0 if row["ended"] else 0.25))
        gate = min(1, supported / 0.3) * min(1, 0.4 + 2 * covered) * (0.3 + 0.7 * singled_out)
        on_topic = 0.75 * float(weight @ (_ramp(np.maximum(mine, theirs), 0.5, 0.7) * order))
        scores = (5 * singled_out * covered, 5 * singled_out * supported * (0.5 + 0.5 * covered), 5 * clean * gate)
        fresh = 1 - _repetition(row["answer"])
        scores = [round(float(max(s, on_topic) * fresh), 2) for s in scores]
        raw = (
            f"singled out {singled_out:.2f}, covered {covered:.2f}, supported {supported:.2f}, "
            f"foreign {foreign_share:.2f}, in order {weight @ order:.2f}, repeated {1 - fresh:.2f}"
        )
        return Judgement(*scores, raw, True)

    version = f"{REFERENCE_VERSION} {fingerprint(conditions)}"
    return Judge("reference", version, score, ("question", "answer", "reference", "kind", "condition", "ended"))


def _facts(condition: dict, kind: str) -> list[str]:
    texts = [condition["answers"][kind], *condition["key_facts"].get(kind, ())]
    listed = condition[_ABOUT[kind]] if kind in _ABOUT else []
    return texts + (re.split(r"(?<=\.)\s+", listed) if isinstance(listed, str) else list(listed))


def _covered(facts, clauses, E, order, vec) -> float:
    """Return the share (0-1) of key facts said, each in its best clause: by stems, or by embedding."""
    likeness = _ramp(vec(facts) @ E.T, 0.6, 0.8)  # (facts, clauses)
    said = [set(_stems(u)) for u in clauses]
    literal = np.array([[np.mean([s in u for s in _stems(f) or _words(f)]) for u in said] for f in facts])
    return float((np.maximum(likeness, _ramp(literal, 0.5, 1)) * order).max(1).mean())


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
            last_is_short = len(found) > start and len(_words(found[-1][0])) < 4
            if last_is_short or (len(found) > start and len(_words(piece)) < 4):
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
