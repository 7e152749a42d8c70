"""Names given right, groups, and the worst of them."""

import math

import numpy as np
import pandas as pd
import pytest

from medprune.data.questions import load_conditions
from medprune.results import groups

CONDITIONS = load_conditions()


def answers(*rows):
    columns = ["method", "condition", "answer"]
    table = pd.DataFrame(rows, columns=columns).assign(kind="name", judge="reference", judged_by="x")
    return table.assign(id=[f"{i}#name" for i in range(len(rows))], cluster=[f"{i}" for i in range(len(rows))])


def scored(by_group, method="m", start=0):
    """A table of one score to an image, {skin tone: scores}."""
    rows = [(method, tone, score) for tone, scores in by_group.items() for score in scores]
    table = pd.DataFrame(rows, columns=["method", "skin_tone", "score_percent"]).assign(condition="melanoma")
    return table.assign(id=[str(start + i) for i in range(len(rows))], cluster=[str(start + i) for i in range(len(rows))])


def test_a_name_is_right_where_it_is_asserted_and_alone():
    table = answers(
        ("m", "melanoma", "This is melanoma."), ("m", "melanoma", "This is not melanoma."),
        ("m", "melanoma", "Melanoma or psoriasis."), ("m", "melanoma", "This is not psoriasis but melanoma."), ("m", "rosacea", ""),
    )  # fmt: skip
    found = groups.naming(table, CONDITIONS)
    assert found["score_percent"].tolist() == [100, 0, 0, 100, 0] and "judged_by" not in found
    both = pd.concat([table, table.assign(kind="treatment")])
    assert len(groups.naming(both, CONDITIONS)) == 5


def test_exact_limits_are_clopper_and_pearson_s():
    assert groups.exact_share(0, 10) == pytest.approx((0, 30.8497), abs=1e-3)
    assert groups.exact_share(5, 10) == pytest.approx((18.7086, 81.2914), abs=1e-3)


def test_naming_table_of_one_run_is_exact_and_of_several_covers_runs():
    table = answers(*[("m", "melanoma", "This is melanoma.")] * 18, *[("m", "rosacea", "This is melanoma.")] * 4,
                    *[("m", "rosacea", "This is rosacea.")] * 2)  # fmt: skip
    names = groups.naming(table, CONDITIONS)
    (one,) = groups.naming_table(names).to_dict("records")
    assert one["right"] == pytest.approx(100 * 20 / 24) and (one["low"], one["high"]) == groups.exact_share(20, 24)
    assert one["balanced"] == pytest.approx((100 + 100 / 3) / 2)
    several = pd.concat([names.assign(run=run, score_percent=np.roll(names["score_percent"], run)) for run in range(3)])
    (found,) = groups.naming_table(several).to_dict("records")
    assert found["n_runs"] == 3 and found["n_images"] == 24 and (found["low"], found["high"]) != groups.exact_share(60, 72)
    own = several.assign(cluster=several["run"].astype(str) + " " + several["cluster"])
    (found,) = groups.naming_table(own).to_dict("records")
    assert found["n_images"] == 72 and (found["low"], found["high"]) != groups.exact_share(60, 72)


def test_small_groups_have_no_interval_and_are_no_candidates():
    table = scored({"I": [100, 0] * 6, "V": [100, 50] * 5, "VI": [0] * 7, None: [0] * 9})
    found = groups.group_table(table, ["skin_tone"]).set_index("group")
    assert sorted(found.index) == ["I", "V", "VI"] and found.n_images.to_dict() == {"I": 12, "V": 10, "VI": 7}
    assert "fewer than 8" in found.note["VI"] and math.isnan(found.low["VI"]) and found.low["I"] > 0 == len(found.note["I"])
    exact = groups.group_table(table, ["skin_tone"], exact=True).set_index("group")
    assert exact.high["VI"] == pytest.approx(groups.exact_share(0, 7)[1])
    (worst,) = groups.worst_group(table, ["skin_tone"]).to_dict("records")
    assert worst["worst_group"] == "skin tone I" and worst["worst"] == pytest.approx(50) and worst["groups"] == 2 and worst["worst_images"] == 12
    (none,) = groups.worst_group(table[table.skin_tone == "I"], ["skin_tone"]).to_dict("records")
    assert none["worst_group"] == "" and math.isnan(none["worst"])


@pytest.mark.parametrize("means", [(0.6,) * 5, (0.6, 0.7, 0.8, 0.8, 0.7), (0.4, 0.8, 0.8, 0.8, 0.8)])
def test_the_worst_group_s_interval_covers_the_lowest_true_mean(means):
    rng, held, naive = np.random.default_rng(3), [], []
    for _ in range(150):
        table = scored({f"{g}": 100.0 * (rng.random(20) < p) for g, p in enumerate(means)})
        (found,) = groups.worst_group(table, ["skin_tone"]).to_dict("records")
        if not math.isnan(found["worst_low"]):
            held.append(found["worst_low"] <= 100 * min(means) <= found["worst_high"])
        own = groups.group_table(table, ["skin_tone"]).set_index("group").loc[found["worst_group"].split()[-1]]
        naive.append(own["low"] <= 100 * min(means) <= own["high"])
    assert len(held) > 140 and np.mean(held) >= 0.94
    if len(set(means)) == 1:
        assert np.mean(naive) < 0.91  # the lowest group's own interval, as if it had not been chosen


def test_who_harms_the_worst_group_least_is_named_only_when_it_can_be_told():
    rng = np.random.default_rng(4)
    base = {"I": 80 + 5 * rng.normal(size=20), "V": 55 + 5 * rng.normal(size=20)}
    parts = [scored({g: values - drop for g, values in base.items()}, m)
             for m, drop in (("awq", 1 + rng.normal(size=20)), ("bnb", 20 + rng.normal(size=20)), ("rtn", 21 + rng.normal(size=20)))]  # fmt: skip
    said, table = groups.least_harm(pd.concat(parts), ["awq", "bnb", "rtn"], ["skin_tone"])
    assert "In the worst group, skin tone V, awq is ahead" in said and said.endswith("told from every other.") and "not told" not in said
    assert table["b"].tolist() == ["bnb", "rtn"] and table["n_images"].tolist() == [20, 20]
    said, _ = groups.least_harm(pd.concat(parts), ["bnb", "rtn"], ["skin_tone"])
    same = groups.least_harm(pd.concat([parts[1], parts[1].assign(method="twin")]), ["bnb", "twin"], ["skin_tone"])[0]
    assert same.endswith("not told from twin.")
    assert "cannot be told" in groups.least_harm(parts[0], ["awq"], ["skin_tone"])[0]
    mute = parts[2].assign(score_percent=parts[2]["score_percent"].where(parts[2]["skin_tone"] == "I"))
    assert groups.least_harm(pd.concat([parts[0], mute]), ["awq", "rtn"], ["skin_tone"])[0].endswith("not told from rtn.")


def test_a_group_of_one_run_among_several_has_no_interval():
    rng = np.random.default_rng(2)
    runs = [scored({"I": rng.choice([0, 100], 12), "V": rng.choice([0, 100], 12)}).assign(run=run) for run in range(3)]
    runs[0] = pd.concat([runs[0], scored({"VI": [0] * 6 + [100] * 6}, start=99).assign(run=0)])
    for exact in (True, False):
        table = groups.group_table(pd.concat(runs), ["skin_tone"], exact).set_index("group")
        assert table["low"].notna().to_dict() == {"I": True, "V": True, "VI": False}
        assert table["note"].to_dict() == {"I": "", "V": "", "VI": "in one run alone"}
        assert groups.group_table(runs[0], ["skin_tone"], exact)["low"].notna().all()
    lowest = groups.worst_group(pd.concat([*runs[:1], *(run.assign(score_percent=90.0 + rng.random(24)) for run in runs[1:])]), ["skin_tone"])
    assert lowest["worst_group"][0] == "skin tone VI" and math.isnan(lowest["worst_low"][0])
    named = pd.concat([*runs, runs[0].assign(method="n")])
    table = groups.naming_table(named).set_index("method")
    for limit in ("low", "balanced_low"):
        assert table[limit].notna().to_dict() == {"m": True, "n": False}
    runs = [scored({"I": rng.choice([0, 80], 12), "V": [90.0] * 6 + [100.0] * 6}).assign(run=run) for run in range(3)]
    alone = groups.worst_group(pd.concat([*runs, scored({"VI": [60.0, 62.0] * 30}, start=99).assign(run=0)]), ["skin_tone"])
    assert alone["worst_group"][0] == "skin tone I" and alone["groups"][0] == 3 and alone["worst_high"][0] > 66


def test_chance_alone_names_nobody():
    rng, named = np.random.default_rng(5), 0
    for _ in range(50):
        base = {"I": rng.uniform(60, 90, 12), "V": rng.uniform(30, 60, 12)}
        parts = [scored({g: np.clip(v + rng.normal(0, 8, 12), 0, 100) for g, v in base.items()}, m) for m in "abcd"]
        said, _ = groups.least_harm(pd.concat(parts), list("abcd"), ["skin_tone"])
        named += said.endswith("and told from every other.")
    assert named <= 4
