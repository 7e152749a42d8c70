"""What a text asserts: which of its words it says, which it denies, which it leaves open, and which oppose the facts.

Triggers and their scopes after NegEx (Chapman et al. 2001, A simple algorithm for identifying negated findings and
diseases in discharge summaries, J Biomed Inform 34) and ConText (Harkema et al. 2009, J Biomed Inform 42): a trigger
reaches forwards or backwards to a break, and pseudo-triggers ("not only") are none. Those of reports were left out,
those of advice ("must be avoided") added. English only; irony, hints and what a reader infers are not seen.
"""

import re
from dataclasses import dataclass, replace


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


STOP = set(
    words(
        "a an and are as at be but by can for from has have in into is it its may more most no not of on or other than "
        "that the their them then there these they this those to usually very was when which with also often some such "
        "sometimes condition disease feature features image patient picture show shows skin treat treated treatment"
    )
)


def stems(text: str) -> list[str]:
    """Return the stems of the content words: cut suffixes, enough to match 'scales' with 'scaly'."""
    return [stem(word) for word in words(text) if word not in STOP]


def stem(word: str) -> str:
    return re.sub(r"(?<=\w{3})(?:ization|isation|ations?|ingly|ings?|edly|ies|ied|ed|es|ly|s|e|y)$", "", word)


SAID, DENIED, AVOIDED, OPEN = "said", "denied", "avoided", "open"


def _any(*phrases: str) -> re.Pattern:
    return re.compile(r"\b(?:" + "|".join(phrases) + r")\b")


_NO_TRIGGER = _any(
    "not only", "not just", "not merely", "not necessarily", "not always", "not uncommon(?:ly)?", "no doubt",
    "without (?:a )?doubt", "no more than", "no less than", "no longer than", "not until", "with or without",
    "not to say", "(?:none|nothing) (?:other than|but|less than)",
)  # fmt: skip
_FORWARDS = {
    OPEN: _any(
        r"(?:(?:do|does|did|could|can) not|\w+n't|cannot) (?:know|tell|say|see|decide|determine|judge|identify)",
        r"(?:not|\w+n't|cannot) (?:be )?(?:sure|certain|clear|known|able)", "unsure", "no idea", "unable to", "whether",
        "(?:uncertain|unclear|unknown) (?:if|what|which)", "(?:impossible|hard|difficult) to (?:say|tell|know)",
        "doubts? (?:that|it|this)", "doubtful",
    ),
    DENIED: _any(
        "no(?!,)", "not", r"\w+n't", "cannot", "never", "none", "neither", "nor", "without", "lacks?", "lacking",
        "lack of", "absence of", "free (?:of|from)", "denies", "den(?:y|ied)", "rules? out", "ruling out", "excludes?",
        "excluding", "do without", "refrain(?:s|ing)? from", "fails? to", "(?:speaks?|argues?) against", "far from",
        "(?:it|this|that) is (?:false|wrong|untrue) (?:that|to)", "anything but",
    ),
    AVOIDED: _any("avoid(?:s|ing|ance of)?"),
}  # fmt: skip
_TO_COMMA = {
    DENIED: _any("unlike", "rather than", "other than", "different from", "differs? from"),
    AVOIDED: _any("instead of", "in place of"),
}
_ONE_WORD = _any("non")
_BACKWARDS = {
    OPEN: _any(
        "(?:was|were|been) considered(?! (?:as|an?|the|to be)\\b)",
        "(?:cannot|can't|can not|not) be (?:ruled out|excluded)",
    ),
    DENIED: _any(
        "ruled out", "(?:is|are|was|were|be|been) excluded", "absent", "(?:is|are|seems?) (?:very |most )?unlikely",
        "(?:is|are|was|were|be) (?:contraindicated|forbidden|harmful|useless|ineffective|spared)",
        "(?:is|are|was|were|be) (?:a |the )?(?:false|wrong|untrue|incorrect|mistaken?)", "ha(?:s|ve) no (?:effect|use)",
        "(?:makes?|made) (?:it|this) worse",
        r"(?:not|\w+n't|never) (?:be )?(?:present|seen|found|visible|likely|used|given|taken|applied|done|recommended|"
        "affected|involved|advised|indicated|needed|required|necessary|right|correct|true|helpful|useful|suitable|work|"
        "help|the (?:diagnosis|name|disease|case|answer|treatment)|"
        r"(?:a|an|the|one of (?:the|its))(?: \w+)? (?:feature|sign|symptom|treatment)s?)(?! that\b)",
    ),
    AVOIDED: _any("(?:is|are|be) avoided"),
}  # fmt: skip
_BREAK = _any(
    "(?<!anything )but", "unless", "however", "although", "(?<!as )though", "yet", "except", "whereas", "while",
    "because", "instead(?! of)", "which",
)  # fmt: skip
# a part that holds one of these is a clause of its own, where a denial of the part before does not reach
_VERB = _any(
    "is", "are", "was", "were", "has", "have", "had", "does", "can", "may", "might", "should", "must", "will", "shows?",
    "looks?", "appears?", "leads?", "causes?", "use", "uses", "apply", "take", "treat", "begin", "start", "freeze",
    "wash", "wear", "keep", "give", "helps?", "remains?", "becomes?", "affects?", "grows?", "spreads?", "forms?",
    "comes?", "with", "it", "this", "there", "they", "then",
)  # fmt: skip
# a relative clause that denies, "a sore that does not heal", and the verb behind it, which its denial does not reach
_RELATIVE = re.compile(
    r"(?<=\w )(?:that|which|who) (?:(?:\w+ )?(?:not|never|no longer)|cannot|\w+n't)"
    r"(?! (?:mean|say|show|prove|imply|suggest|indicate)\b)(?: \w[\w'-]*)+?(?<! it)(?<! this)(?<! that)(?<! there)"
    r"(?<! which)(?<! what) (?=(?:is|are|was|were|suggests|indicates|means|points)\b)"
)
_IF = _any("if", "when", "unless", "until", "where")
# a lead-in to all that follows: "none of these:", "do not use these treatments:", "the following is wrong"
_LEADS_IN = re.compile(
    r"\b(?:this|these|those|so)(?: (?:signs?|features?|symptoms?|treatments?|findings?|things?|drugs?))?\W*$"
)
_FOLLOWING = _any("the following", "(?:listed|named|given) below")
_ALL_BEFORE = re.compile(
    r"(?:none|nothing) of (?:this|that|these|those|the above|it|them)\b|"
    r"(?:all|everything|each) (?:of )?(?:this|that|these|those|the above|it|them)?\s*(?:is|are) (?:false|wrong|untrue)|"
    r"(?:this|that|the above) (?:is|are) (?:all )?(?:false|wrong|untrue|not true)"
)


@dataclass(frozen=True)
class Run:
    """Words of a sentence that are said, denied, advised against or left open together, without their triggers."""

    text: str
    state: str
    start: int  # in the sentence
    end: int


def runs(text: str) -> list[tuple[str, list[Run]]]:
    """Cut a text into sentences, and each into runs of one state: [(sentence, runs)].

    A denial that leads in ("none of these:", "none of the following is seen.") reaches to the end of the text, one
    that looks back ("none of this is true.") to its beginning; a question leaves open what it asks.
    """
    found, ahead = [], SAID
    parts = [*re.split(r"((?<=[.!?])\s+|[;:\n]+)", text), ""]
    for sentence, end in zip(parts[::2], parts[1::2], strict=True):
        # letter by letter, for some have two in lower case
        low = "".join(c.lower() if len(c.lower()) == 1 else c for c in sentence).replace("\u2019", "'")
        states, bare = _states(low)
        if sentence.rstrip().endswith("?"):
            states = [OPEN] * len(low)
        last = next((s for s in reversed(states) if s != SAID), SAID)
        if _ALL_BEFORE.search(low) and ":" not in end:
            found = [(s, [replace(run, state=DENIED) for run in cut]) for s, cut in found]
        elif last != SAID and (":" in end and _LEADS_IN.search(low) or _FOLLOWING.search(low)):
            ahead = last
        elif ahead != SAID and _BREAK.match(low.strip()):
            ahead = SAID
        elif ahead != SAID:
            states = [ahead] * len(low)
        found.append((sentence, _runs(sentence, states, bare)))
    return [(sentence, cut) for sentence, cut in found if cut]


def spoken(text: str) -> str:
    """Return what a text says, without what it denies or leaves open; each run of it ends with a full stop."""
    return " ".join(f"{run.text.rstrip('.!')}." for _, cut in runs(text) for run in cut if run.state == SAID)


def _runs(sentence: str, states: list[str], bare: list[bool]) -> list[Run]:
    cut, start = [], 0
    for i in range(1, len(states) + 1):
        if i == len(states) or states[i] != states[start]:
            whole = sentence[start:i]
            text = "".join(c if keep else " " for c, keep in zip(whole, bare[start:i], strict=True))
            if re.search(r"\w", text):
                cut.append(Run(text.strip(" ,"), states[start], start, i))
            start = i
    return cut


def _states(low: str) -> tuple[list[str], list[bool]]:
    """Return the state of each character of a lower-case sentence, and whether it is no part of a trigger."""
    states, bare = [SAID] * len(low), [True] * len(low)
    taken = [m.span() for m in _NO_TRIGGER.finditer(low)]
    cuts = _cuts(low)

    def triggers(pattern):
        for match in pattern.finditer(low):
            start, end = match.span()
            part = low[max((c for c, _ in cuts if c <= start), default=0) : start]
            if not _IF.search(part) and not any(a < end and start < b for a, b in taken):
                taken.append((start, end))
                bare[start:end] = [False] * (end - start)
                yield start, end

    def mark(start, end, state):
        states[start:end] = [state if s == SAID or state == OPEN else s for s in states[start:end]]

    for state, pattern in _BACKWARDS.items():
        for start, end in triggers(pattern):
            mark(_reach_back(low, start, cuts), end, state)
    for state, pattern in _TO_COMMA.items():
        for start, end in triggers(pattern):
            mark(start, min((c for c, _ in cuts if c >= end), default=len(low)), state)
    for start, end in triggers(_ONE_WORD):
        mark(start, end + len(re.match(r"\W*\w*", low[end:])[0]), DENIED)
    for state, pattern in _FORWARDS.items():
        for start, end in triggers(pattern):
            mark(start, _reach(low, end, cuts), state)
    return states, bare


def _cuts(low: str) -> list[tuple[int, bool]]:
    """Return where a sentence may be cut: (place, whether no denial passes it)."""
    cuts = [(m.start(), True) for m in _BREAK.finditer(low)]
    soft = [m.start() for m in re.finditer(r",(?: and\b)?| and | or (?=\w+ (?:is|are)\b)", low)]
    places = sorted([*soft, *(c for c, _ in cuts)]) + [len(low)]
    for here, there in zip(places, places[1:], strict=False):
        if here in soft:
            # after a comma "or" goes on with what is denied, "and" with something else, unless in a list of words
            other = re.match(r", and(?:\W+\w+){4}", low[here:there]) or _VERB.search(low[here:there])
            cuts.append((here, bool(other)))
    return sorted(cuts)


def _reach(low: str, end: int, cuts: list[tuple[int, bool]]) -> int:
    """Return where what a trigger that ends at `end` denies ends; "tell which" is cut no sooner than "no, it is"."""
    ends = [c for c, hard in cuts if c >= end and hard and (low[c] == "," or low[end:c].strip())][:1]
    ends += [clause.end() for clause in _RELATIVE.finditer(low) if clause.start() < end <= clause.end()]
    return min(ends, default=len(low))


def _reach_back(low: str, start: int, cuts: list[tuple[int, bool]]) -> int:
    """Return where what stands before a trigger begins: its own part, and parts before that hold no verb."""
    places = [0, *(place for place, _ in cuts if place < start), start]
    breaks = {m.start() for m in _BREAK.finditer(low)}
    begin = places[-2]
    for earlier, here in reversed(list(zip(places[:-2], places[1:-1], strict=True))):
        if here in breaks or _VERB.search(low[earlier:here]):
            break
        begin = earlier
    return begin


# values of one property, each with its synonyms: what has one of them has no other
_OPPOSITES = [
    [set(words(value)) for value in values.split("|")]
    for values in (
        "red redness reddened reddish pink erythematous|pale paleness pallor|blue bluish|green greenish|"
        "yellow yellowish|purple violet violaceous|white whitish silvery|black blackish|brown tan brownish",
        "raised elevated|flat flattened|sunken depressed",
        "thick thickened thickening|thin thinned thinning",
        "persistent lasting permanent constant chronic long|brief transient temporary fleeting short",
        "repeated recurrent frequent often common commonly|rare rarely seldom uncommon never",
        "visible|invisible hidden",
        "topical topically|oral orally|intravenous intravenously injected",
        "surgical surgery|homeopathic homoeopathic herbal",
        "benign harmless|malignant dangerous cancerous",
        "slow slowly|fast rapid rapidly quick quickly",
        "painful stinging tender|painless",
        "symmetrical symmetrically symmetric symmetry|asymmetrical asymmetrically asymmetric asymmetry",
        "irregular irregularly|regular regularly",
        "rough sandpaper|smooth velvet",
        "dry|wet moist greasy",
        "first|last",
        "mild|severe",
        "new changing evolving|old unchanging stable unchanged",
        "varied various multiple several|uniform single even",
        "central|peripheral",
        "older old elderly|younger young",
        "high|low",
        "large big|small little fine tiny",
        "over above|under below",
        "potent strong|weak",
        "narrowband|broadband",
        "pearly shiny waxy glossy|dull matt matte",
        "translucent|opaque",
        "exposed|protected covered",
        "sharp sharply|blurred blurry ill",
        "avoid avoiding avoided|seek seeking",
        "freeze freezing cryotherapy|heat heating burn burning",
    )
]
_VALUES = {word: (i, j) for i, values in enumerate(_OPPOSITES) for j, value in enumerate(values) for word in value}
_ENDS = set(words("with on in by for to from at as than the a an and is are has"))


def values(text: str) -> set[tuple[int, int, str]]:
    """Return what a text says of what: (property, value, stem of a word that it is said of; "" where it stands alone).

    A value is said of the next three content words of its part of the sentence, "red" of both in "red papules and
    pustules"; or, after "is", of the two before.
    """
    found = set()
    for part in re.split(r"[,.;:()]", text.lower()):
        w = words(part)
        for i, (prop, value) in ((i, _VALUES[word]) for i, word in enumerate(w) if word in _VALUES):
            of, n = [], i + 1
            while n < len(w) and len(of) < 3 and (w[n] not in _ENDS or w[n] in ("and", "the") and w[n - 1] != "with"):
                of += [stem(w[n])] if w[n] not in STOP else []
                n += 1
            if not of and i and w[i - 1] in ("is", "are", "looks", "look"):
                of = [stem(word) for word in w[: i - 1] if word not in STOP][-2:]
            found |= {(prop, value, head) for head in of or [""]}
    return found


def opposed(said: set, reference: set, facts: set) -> int:
    """Count the values (see `values`) of a text that the reference says otherwise, and no fact so."""
    told = {(prop, head) for prop, _, head in reference}
    return len(
        {(prop, value) for prop, value, head in said if (prop, head) in told and (prop, value, head) not in facts}
    )
