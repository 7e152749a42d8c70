"""Do the intervals cover, the pairs pair, and the power agree with simulation?"""

import importlib.util
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from medprune.results import stats
from medprune.settings import REPO

IMAGES, QUESTIONS, DRAWS = 39, 3, 2000
CLUSTERS = np.repeat(np.arange(IMAGES), QUESTIONS)


def bell_scores(rng):
    """Unbounded scores about 60, intra-cluster correlation 0.6."""
    image = rng.normal(0, 12, (DRAWS, IMAGES, 1))
    return 60 + image + rng.normal(0, 12 * math.sqrt(0.4 / 0.6), (DRAWS, IMAGES, QUESTIONS)), 60.0


def skewed_scores(rng):
    """0-100 in steps of 20/3, as three marks of 0-5 give, most of them high."""

    def draw(shape):
        image = rng.beta(4, 1.5, (*shape, 1))
        return rng.binomial(15, np.clip(image + rng.normal(0, 0.06, (*shape, QUESTIONS)), 0, 1)) * 100 / 15

    return draw((DRAWS, IMAGES)), draw((400_000,)).mean()


@pytest.fixture(scope="module", params=[bell_scores, skewed_scores], ids=["bell", "skewed"])
def population(request):
    values, mean = request.param(np.random.default_rng(7))
    return values.reshape(DRAWS, -1), mean


def test_interval_covers_95_percent(population):
    values, mean = population
    found = [stats.clustered_mean(row, CLUSTERS) for row in values]
    covered = np.mean([i["low"] <= mean <= i["high"] for i in found])
    assert 0.93 <= covered <= 0.97
    assert found[0]["n"] == 117 and found[0]["n_images"] == 39


def test_interval_without_clusters_fails_to_cover(population):
    values, mean = population
    naive = scipy_stats.ttest_1samp(values, 0, axis=1).confidence_interval()
    assert np.mean((naive.low <= mean) & (mean <= naive.high)) < 0.90


def test_every_value_its_own_cluster_is_the_plain_t_interval():
    values = np.random.default_rng(1).normal(50, 10, 30)
    test = scipy_stats.ttest_1samp(values, 0)
    plain = test.confidence_interval()
    found = stats.clustered_mean(values, np.arange(30))
    assert (found["low"], found["high"]) == pytest.approx((plain.low, plain.high))


def test_unequal_clusters_weigh_answers_not_images():
    found = stats.clustered_mean([90, 90, 90, 10], ["x", "x", "x", "y"])
    assert found["mean"] == pytest.approx(70) and found["n_images"] == 2
    # Residual sums per cluster are +60 and -60, so se^2 = G/(G-1) (n-1)/(n-1) (60^2 + 60^2) / 4^2.
    error = math.sqrt(2 * 7200 / 16)
    assert found["high"] - found["mean"] == pytest.approx(scipy_stats.t.ppf(0.975, 1) * error)


@pytest.mark.parametrize("estimate", [stats.clustered_mean, stats.mean_score])
def test_one_cluster_and_no_variance_have_no_interval(estimate):
    for mean, values, clusters in ((50, [40, 60], ["image", "image"]), (73.15, [73.15] * 12, [0, 1, 2, 3, 4, 5] * 2)):
        found = estimate(values, clusters)
        assert found["mean"] == pytest.approx(mean) and math.isnan(found["low"]) and math.isnan(found["high"])


@pytest.fixture(scope="module")
def coverage():
    spec = importlib.util.spec_from_file_location("coverage_benchmark", REPO / "benchmarks" / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("population", ["tied", "skewed", "graded"])
def test_scores_are_covered_near_the_ends_or_have_no_interval(coverage, population):
    draw = coverage.SCORES[population]
    cells = [coverage.simulate(draw, right, n, draws=300) for right in coverage.RIGHT for n in coverage.IMAGES]
    covered = [cell["covered_frac"] for cell in cells if cell["given_frac"] >= coverage.RARELY]
    assert len(covered) >= 12 and min(covered) > 0.91  # three standard errors below 0.95
    # With many images nothing is refused, and the intervals are no wider than they must be.
    plain = [cell for cell in cells if cell["images"] >= {0.5: 24, 0.8: 39, 0.92: 96, 0.98: 999}[cell["right"]]]
    assert len(plain) == 6 and min(cell["given_frac"] for cell in plain) > 0.97
    assert np.mean([cell["covered_frac"] for cell in plain]) < 0.97
    # Nothing is known of failures of 2 in 100 from 8 images.
    assert cells[15]["images"] == 8 and cells[15]["right"] == 0.98 and cells[15]["given_frac"] < 0.05
    assert max(cell["misleading_frac"] for cell in cells) < 0.1


@pytest.mark.parametrize("population", ["10% lost", "30% lost", "10% lost, 30% gained", "10% lost and gained", "shrunk"])
def test_differences_are_covered_where_few_images_differ_or_have_no_interval(coverage, population):
    draw = coverage.PAIRS[population]
    cells = [coverage.simulate(draw, right, n, 150, True) for right in (0.8, 0.98) for n in (8, 24, 96)]
    covered = [cell["covered_frac"] for cell in cells if cell["given_frac"] >= coverage.RARELY]
    assert len(covered) >= 2 and min(covered) > 0.89 and max(cell["misleading_frac"] for cell in cells) < 0.11


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15), st.integers(0, 9)), min_size=1, max_size=40))
@example([(5, 0, 0), (5, 0, 2), (7, 0, 0), (13, 0, 1)])  # 1.5 images' worth from either end, but for rounding
def test_limits_lie_on_the_scale_and_about_the_estimate(rows):
    a, b, images = np.array(rows, float).T
    for scores in (a, 15 - a):  # as far from 0 as from 100
        found = stats.mean_score(scores * 100 / 15, images)
        limits = [found["low"], found["high"]]
        assert np.isnan(limits).all() or 0 <= limits[0] <= found["mean"] <= limits[1] <= 100
    mirrored = [100 - limit for limit in limits[::-1]]
    assert mirrored == pytest.approx([stats.mean_score(a * 100 / 15, images)[k] for k in ("low", "high")], nan_ok=True)
    found, back = (stats.paired_difference(*(s * 100 / 15 for s in pair), images) for pair in ((a, b), (b, a)))
    assert back["p"] == pytest.approx(found["p"], nan_ok=True)
    assert [-back["high"], -back["low"]] == pytest.approx([found["low"], found["high"]], nan_ok=True)
    if not math.isnan(found["low"]):
        assert -100 <= found["low"] <= found["diff"] <= found["high"] <= 100
        assert found["p"] < 0.05 or found["low"] <= 0 <= found["high"]


def test_all_right_or_all_but_one_has_no_interval_and_two_wrong_have():
    def score(n_wrong, images=24):
        marks = [100.0] * (images - n_wrong) + [15.0] * n_wrong
        return stats.mean_score(np.repeat(marks, 3), np.repeat(range(images), 3))

    assert all(math.isnan(score(n)[limit]) for n in (0, 1) for limit in ("low", "high"))
    found = score(2)
    # 22 of 24 right: the limits are near those of a share of 22 of 24 (Clopper and Pearson: 73 to 99)
    assert 76 < found["low"] < 80 and 98 < found["high"] < 99.5 and found["n"] == 72 and found["n_images"] == 24
    with pytest.raises(ValueError, match="run from -3 to 40: they must lie within 0 to 100"):
        stats.mean_score([40, -3], [0, 1])


def test_jeffreys_limits_of_independent_right_and_wrong():
    # 0/1 scores at 50%: no skewness to add, G - 1 scores are effective, and fewer for Student's t in place of z.
    found = stats.mean_score([0, 100] * 10, range(20))
    effective = 19 * (scipy_stats.norm.ppf(0.975) / scipy_stats.t.ppf(0.975, 19)) ** 2
    limits = 100 * scipy_stats.beta.ppf([0.025, 0.975], effective / 2 + 0.5, effective / 2 + 0.5)
    assert [found["low"], found["high"]] == pytest.approx(limits)


def test_what_a_few_images_cannot_have_shown_widens_the_interval_near_the_ends():
    scores = np.array([96.0] * 20 + [70.0] * 4)
    mean, two_point = scores.mean() / 100, scores.mean() / 100 * (1 - scores.mean() / 100)
    weight = 0.2 * (1 - 2 * mean) ** 2 / (24 * two_point)
    variance = (scores.var(ddof=1) / 1e4 + weight * two_point) / (1 + weight)
    effective = 24 * two_point / variance * (scipy_stats.norm.ppf(0.975) / scipy_stats.t.ppf(0.975, 23)) ** 2
    limits = 100 * scipy_stats.beta.ppf([0.025, 0.975], effective * mean + 0.5, effective * (1 - mean) + 0.5)
    found = stats.mean_score(scores, range(24))
    assert [found["low"], found["high"]] == pytest.approx(limits)
    plain = stats.clustered_mean(scores, range(24))
    assert found["low"] < plain["low"] - 1 and found["high"] < 100


@pytest.mark.parametrize(
    ("values", "clusters", "says"),
    [
        ([1, math.nan], [0, 1], "1 values are not finite"),
        ([1, math.inf], [0, 1], "1 values are not finite"),
        ([1, 2], [0, None], "1 clusters are missing"),
        ([], [], "not empty"),
        ([1, 2, 3], [0, 1], "equally long"),
    ],
)
def test_clustered_mean_refuses(values, clusters, says):
    with pytest.raises(ValueError, match=says):
        stats.clustered_mean(values, clusters)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=6, max_size=6), st.floats(-50, 50), st.permutations(range(6)))
def test_mean_moves_with_the_values_and_ignores_their_order(values, shift, order):
    clusters = np.array([0, 0, 1, 1, 2, 2])
    found = stats.clustered_mean(values, clusters)
    moved = stats.clustered_mean(np.array(values)[order] + shift, clusters[order])
    assert moved["mean"] == pytest.approx(found["mean"] + shift, abs=1e-6)
    wide, moved_wide = (np.nan_to_num(f["high"] - f["low"]) for f in (found, moved))  # NaN where nothing varies
    assert moved_wide == pytest.approx(wide, abs=1e-6)
    assert math.isnan(found["low"]) or found["low"] <= found["mean"] <= found["high"]


def test_balanced_paired_difference_is_the_t_test_on_image_means():
    rng = np.random.default_rng(3)
    a = rng.uniform(40, 80, IMAGES * QUESTIONS)
    b = a + np.repeat(rng.normal(-3, 8, IMAGES), QUESTIONS) + rng.normal(0, 4, a.size)
    test = scipy_stats.ttest_1samp((a - b).reshape(IMAGES, QUESTIONS).mean(1), 0)
    bounds = test.confidence_interval()
    found = stats.paired_difference(a, b, CLUSTERS)
    assert (found["diff"], found["p"]) == pytest.approx(((a - b).mean(), test.pvalue))
    # Gains and losses apart give nearly the same limits here; the wider are given.
    assert -0.2 < found["low"] - bounds.low < 1e-9 and -1e-9 < found["high"] - bounds.high < 0.2


def test_p_of_few_images_counts_all_flips_of_their_signs():
    rng = np.random.default_rng(5)
    for images in (6, 9, 12):
        d = rng.integers(-2, 9, images) * 20 / 3
        signs = np.array(list(itertools.product((1, -1), repeat=images)))
        by_hand = np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-9)
        found = stats.paired_difference(np.maximum(d, 0), np.maximum(-d, 0), range(images))
        assert found["p"] == pytest.approx(by_hand)
    # Images that are the same under both do not count; 30 that differ are still flipped, fast, and agree with t.
    d = np.r_[rng.normal(4, 10, 30), np.zeros(60)]
    exact = stats.paired_difference(50 + d, np.full(90, 50.0), range(90))["p"]
    assert exact == stats.paired_difference(50 + d[:30], np.full(30, 50.0), range(30))["p"]
    assert exact == pytest.approx(scipy_stats.ttest_1samp(d[:30], 0).pvalue, abs=0.01)


def test_limits_lean_to_the_side_of_a_few_large_losses():
    a = np.full(24, 100.0)
    b = np.array([20.0] * 5 + [100.0] * 19)
    found, plain = stats.paired_difference(b, a, range(24)), stats.clustered_mean(b - a, range(24))
    # Gains are nowhere: the lower limit is that of Jeffreys's for the losses.
    losses = 5 / 24 * 0.8
    effective = losses * (1 - losses) * 24 / np.var((a - b) / 100, ddof=1)
    effective *= (scipy_stats.norm.ppf(0.975) / scipy_stats.t.ppf(0.975, 23)) ** 2
    most = 100 * scipy_stats.beta.ppf(0.975, effective * losses + 0.5, effective * (1 - losses) + 0.5)
    assert found["low"] == pytest.approx(-most) and found["low"] < plain["low"] - 2
    assert found["p"] == 2**-4 and found["high"] == 0 and plain["high"] < 0  # five losses alone may be chance


def test_differences_of_differences_reach_200_and_scores_are_held_to_their_scale():
    a, b = np.array([100.0] * 5 + [-100] * 3), np.array([-100.0] * 5 + [80] * 3)
    found = stats.paired_difference(a, b, range(8))
    assert found["high"] > 100 and found["diff"] == pytest.approx(57.5)
    with pytest.raises(ValueError, match="a score of 130 is none of 0 to 100"):
        stats.paired_difference([130, 20], [20, 20], [0, 1])


def test_paired_difference_without_variance():
    clusters = [0, 1, 2, 3, 4]
    assert stats.paired_difference([0.1] * 5, [0.1] * 5, clusters)["p"] == 1
    shifted = stats.paired_difference([0.7] * 5, [0.4] * 5, clusters)
    assert shifted["p"] == 2**-4 and shifted["diff"] == pytest.approx(0.3) and math.isnan(shifted["low"])
    rounding = stats.paired_difference([0.1 + 0.2, 0.3, 1.0], [0.3, 0.1 + 0.2, 1.0], clusters[:3])
    assert rounding["diff"] == 0 and rounding["p"] == 1 and math.isnan(rounding["high"])
    three = stats.paired_difference([90, 90, 70, 90, 60], [90, 90, 90, 80, 90], clusters)
    # -20 + 10 - 30 points make -40: of the 8 choices of signs, 4 make 40 or 60 either way.
    assert math.isnan(three["low"]) and three["p"] == 0.5
    assert math.isnan(stats.paired_difference([1, 2], [2, 4], [0, 0])["p"])
    with pytest.raises(ValueError, match="a holds 2 scores and b 1"):
        stats.paired_difference([1, 2], [1], [0, 0])


def make_scores(shifts: dict, seed=0) -> pd.DataFrame:
    """Answers of several methods on the same 39 images, each method a shift in points from a shared score."""
    rng = np.random.default_rng(seed)
    base = np.clip(rng.normal(60, 10, IMAGES)[CLUSTERS] + rng.normal(0, 5, CLUSTERS.size), 20, 80)
    ids = [f"{c}-{q}" for q, c in enumerate(CLUSTERS)]
    tables = [
        pd.DataFrame({"method": method, "id": ids, "cluster": CLUSTERS,
                      "score_percent": base + shift + np.repeat(rng.normal(0, 2, IMAGES), QUESTIONS)})
        for method, shift in shifts.items()
    ]  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def test_score_table_counts_what_it_leaves_out():
    scores = make_scores({"prune": 0, "original": 9, "broken": 0})
    scores.loc[scores["method"] == "broken", "score_percent"] = None
    scores.loc[scores.index[:4], "score_percent"] = math.nan  # all of image 0, one of image 1
    table = stats.score_table(scores)
    assert list(table.columns) == ["method", "score", "low", "high", "n", "n_images", "unparsed"]
    assert list(table["method"]) == ["prune", "original", "broken"]
    assert table[["n", "n_images", "unparsed"]].values.tolist() == [[113, 38, 4], [117, 39, 0], [0, 0, 117]]
    assert table["score"][0] == pytest.approx(scores["score_percent"][4:117].mean())
    assert table["score"].isna().tolist() == [False, False, True]


def test_tables_refuse_two_scores_of_one_answer():
    scores = make_scores({"a": 0, "b": 1})
    scores = pd.concat([scores, scores.tail(1)])
    for refused in (lambda: stats.score_table(scores), lambda: stats.compare(scores, [("a", "b")])):
        with pytest.raises(ValueError, match="more than one score for id"):
            refused()


def test_compare_adjusts_by_holm_and_finds_the_real_difference():
    scores = make_scores({"original": 10, "same": 10, "prune": 8.9, "quantize": 0})
    table = stats.compare(scores, [("original", "same"), ("original", "prune"), ("original", "quantize")])
    order = np.argsort(table["p"].to_numpy())
    by_hand, largest = np.empty(3), 0.0
    for rank, row in enumerate(order):
        largest = max(largest, (3 - rank) * table["p"][row])
        by_hand[row] = min(1, largest)
    assert table["p_holm"].to_numpy() == pytest.approx(by_hand)
    assert (table["p_holm"] > table["p"]).any()
    assert table["low"][2] < 10 < table["high"][2] and table["p_holm"][2] < 1e-6
    assert table["p_holm"][0] > 0.05
    assert list(table["n"]) == [117] * 3 and list(table["n_images"]) == [39] * 3
    # Bonferroni's limits hold for all three rows: those of one pair at a third of the risk, and wider.
    assert (table["low_all"] < table["low"]).all() and (table["high_all"] > table["high"]).all()
    sides = [scores.loc[scores["method"] == m, "score_percent"].to_numpy() for m in ("original", "quantize")]
    alone = stats.paired_difference(*sides, CLUSTERS, alpha=0.05 / 3)
    assert table.loc[2, ["low_all", "high_all"]].tolist() == [alone["low"], alone["high"]]
    (one,) = stats.compare(scores, [("original", "prune")]).itertuples()
    assert (one.low, one.high) == (one.low_all, one.high_all)


def test_compare_pairs_by_id_whatever_the_order_and_counts_the_rest():
    scores = make_scores({"a": 0, "b": -5})
    expected = stats.compare(scores[~scores["id"].isin(["0-0", "0-1", "38-116"])], [("a", "b")])
    gone = ((scores["method"] == "a") & (scores["id"] == "0-0")) | (
        (scores["method"] == "b") & (scores["id"] == "38-116")
    )
    scores.loc[(scores["method"] == "b") & (scores["id"] == "0-1"), "score_percent"] = math.nan
    table = stats.compare(scores[~gone].sample(frac=1, random_state=5), [("a", "b")])
    assert table.loc[0, ["n", "unmatched", "unparsed"]].tolist() == [114, 2, 1]
    assert table.loc[0, ["diff", "low", "high", "p"]].tolist() == pytest.approx(
        expected.loc[0, ["diff", "low", "high", "p"]].tolist()
    )


def test_compare_refuses_pairs_that_cannot_be_paired():
    scores = make_scores({"a": 0, "b": 0})
    with pytest.raises(ValueError, match="no method 'c' among"):
        stats.compare(scores, [("a", "c")])
    apart = scores.copy()
    apart.loc[apart["method"] == "b", "id"] += "x"
    with pytest.raises(ValueError, match="'a' and 'b' share no id"):
        stats.compare(apart, [("a", "b")])
    moved = scores.copy()
    moved.loc[moved["method"] == "b", "cluster"] += 1
    with pytest.raises(ValueError, match="belongs to different images"):
        stats.compare(moved, [("a", "b")])


def test_scores_of_two_judges_are_neither_compared_nor_averaged():
    scores = make_scores({"a": 0, "b": 0}).assign(judge="reference", judged_by="r1")
    assert len(stats.compare(scores, [("a", "b")])) == len(stats.score_table(scores)) - 1 == 1
    other = scores.assign(judge=scores["method"].map({"a": "reference", "b": "cosine"}))
    other["judged_by"] = scores["method"].map({"a": "r1", "b": "c1"})
    with pytest.raises(
        ValueError, match=r"of a and b were scored by different judges: reference \(r1\), cosine \(c1\)"
    ):
        stats.compare(other, [("a", "b")])
    with pytest.raises(ValueError, match="different judges"):
        stats.cluster_differences(other, "a", "b")
    assert len(stats.score_table(other)) == 2  # each method has one judge
    mixed = scores.copy()
    mixed.loc[3, "judged_by"] = "r2"  # another version of the same name
    for refused in (lambda: stats.score_table(mixed), lambda: stats.compare(mixed, [("b", "a")])):
        with pytest.raises(
            ValueError, match=r"of a were scored by different judges: reference \(r1\), reference \(r2\)"
        ):
            refused()
    mixed.loc[3, "judged_by"] = None  # of a table from before judges were recorded
    with pytest.raises(ValueError, match="not recorded"):
        stats.score_table(mixed)


def test_compare_refuses_an_id_that_was_asked_differently():
    scores = make_scores({"a": 0, "b": 0}).assign(asked=lambda t: "asked " + t["id"])
    assert stats.compare(scores, [("a", "b")])["n"][0] == 117
    scores.loc[(scores["method"] == "b") & (scores["id"] == "2-7"), "asked"] = "another question"
    for refused in (lambda: stats.compare(scores, [("a", "b")]), lambda: stats.cluster_differences(scores, "a", "b")):
        with pytest.raises(ValueError, match="id '2-7' was asked differently in 'a' and 'b'"):
            refused()
    assert len(stats.score_table(scores)) == 2
    with pytest.raises(ValueError, match="asked differently"):  # one side does not say what was asked
        stats.compare(scores.assign(asked=scores["asked"].where(scores["method"] == "a")), [("a", "b")])


def test_scores_that_are_all_unparsed_may_be_none():
    scores = make_scores({"a": 0, "b": 0}).assign(score_percent=None)
    assert stats.score_table(scores)["unparsed"].tolist() == [117, 117]
    (row,) = stats.compare(scores, [("a", "b")]).to_dict("records")
    assert math.isnan(row["diff"]) and math.isnan(row["low_all"]) and (row["n"], row["unparsed"]) == (0, 117)
    with pytest.raises(ValueError, match="share no id that both have a score for"):
        stats.cluster_differences(scores, "a", "b")
    # one method that no judge can read takes nothing from the others
    scores = make_scores({"a": 0, "b": -5, "c": 3})
    scores.loc[scores["method"] == "c", "score_percent"] = math.nan
    both = stats.compare(scores, [("b", "a"), ("c", "a")])
    assert math.isnan(both["p_holm"][1]) and both["p_holm"][0] == both["p"][0] == stats.compare(scores, [("b", "a")])["p"][0]


def test_what_one_of_several_runs_tells_has_no_interval_over_runs():
    rng, scores = np.random.default_rng(0), make_scores({"a": 0, "b": -5})
    runs = [scores.assign(run=run, score_percent=(scores["score_percent"] - rng.integers(0, 9)).clip(0, 100)) for run in range(4)]
    alone = pd.concat([*runs[:3], runs[3], runs[3][lambda t: t.method == "b"].assign(method="c")])
    table = stats.score_table(alone).set_index("method")
    assert table["n_runs"].tolist() == [4, 4, 1] and table["low"].notna().tolist() == [True, True, False]
    compared = stats.compare(alone, [("b", "a"), ("c", "a")])
    assert compared["diff"].notna().all() and compared["n_runs"].tolist() == [4, 1]
    assert compared[list(stats.LIMITS)].notna().all(axis=1).tolist() == [True, False]
    # a table of that run alone is about that run, and its images tell
    assert stats.score_table(runs[3])["low"].notna().all() and stats.compare(runs[3], [("b", "a")])["p"].notna().all()


def test_compare_of_one_image_leaves_p_open():
    scores = make_scores({"a": 0, "b": -5})
    table = stats.compare(scores[scores["cluster"] == 0], [("a", "b")])
    assert math.isnan(table["p"][0]) and math.isnan(table["p_holm"][0]) and table["n_images"][0] == 1
    assert len(stats.compare(scores, [])) == 0


@pytest.mark.parametrize("n_images", [2, 5, 39, 120])
@pytest.mark.parametrize("sd", [0.5, 12.0])
def test_minimum_detectable_effect_and_images_needed_are_inverse(n_images, sd):
    effect = stats.minimum_detectable_effect(sd, n_images)
    assert stats.images_needed(effect, sd) == n_images
    assert stats.images_needed(effect * 0.97, sd) > n_images


def test_minimum_detectable_effect_scales():
    assert stats.minimum_detectable_effect(20, 39) == pytest.approx(2 * stats.minimum_detectable_effect(10, 39))
    assert stats.minimum_detectable_effect(0, 39) == 0
    assert stats.images_needed(50, 0.1) == stats.images_needed(5, 0) == 2


def test_one_image_has_no_power_to_simulate():
    with pytest.raises(ValueError, match="1 cluster_diffs: at least 2 images"):
        stats.simulate_detection([3.0], 39, 4)


def test_simulated_power_agrees_with_the_formula():
    diffs = np.random.default_rng(2).normal(3, 15, 200)
    effect = stats.minimum_detectable_effect(diffs.std(ddof=1), 39)
    assert stats.simulate_detection(diffs, 39, effect, draws=4000) == pytest.approx(0.8, abs=0.03)
    assert stats.simulate_detection(diffs, 39, 0, draws=4000) == pytest.approx(0.05, abs=0.015)
    assert stats.simulate_detection(diffs, 39, effect, seed=4) == stats.simulate_detection(diffs, 39, effect, seed=4)
    assert stats.simulate_detection([2.0, 2.0], 5, 4) == 1 and stats.simulate_detection([2.0, 2.0], 5, 0) == 0


def test_note_beside_table_5_prints_what_was_computed():
    scores = make_scores({"a": 0, "b": -5})
    diffs = stats.cluster_differences(scores, "a", "b")
    assert len(diffs) == IMAGES
    assert diffs.mean() == pytest.approx(stats.compare(scores, [("a", "b")])["diff"][0])
    note = stats.detection_note(diffs * 5, draws=500)
    sd = (diffs * 5).std()
    assert f"{stats.simulate_detection(diffs * 5, 39, 4, draws=500):.0%} of 500" in note
    assert note.startswith(f"On these data (standard deviation {sd:.1f} points [")
    low, high = stats.sd_limits(diffs * 5)
    needed = [stats.images_needed(4, s) for s in (sd, low, high)]
    smallest = [stats.minimum_detectable_effect(s, 39) for s in (sd, low, high)]
    assert low < sd < high and needed[1] < needed[0] < needed[2]
    assert "would need {} images [{}, {}]".format(*needed) in note
    assert "in 80% is {:.1f} points [{:.1f}, {:.1f}]".format(*smallest) in note
    assert stats.detection_note([1.0] * 8, draws=10).startswith("All 8 images differ alike: how many")


@pytest.mark.parametrize("draw", ["normal", "laplace", "uniform"])
def test_limits_of_a_standard_deviation_cover_it(draw):
    rng = np.random.default_rng(11)
    true = {"normal": 1, "laplace": math.sqrt(2), "uniform": math.sqrt(1 / 12)}[draw]
    limits = np.array([stats.sd_limits(getattr(rng, draw)(size=39)) for _ in range(600)])
    assert 0.9 <= np.mean((limits[:, 0] <= true) & (true <= limits[:, 1])) <= 0.99
    values = [1.0, 2, 4, 8, 3, 5]
    c = 6 / (6 - scipy_stats.norm.ppf(0.975))
    assert math.prod(stats.sd_limits(values)) == pytest.approx(c * np.var(values, ddof=1))
    assert np.isnan(stats.sd_limits([1, 2, 3, 4])).all() and np.isnan(stats.sd_limits([3.0] * 9)).all()


# ---- several runs: seeds are drawn as images are
def crossed(rng, runs, images, run_sd=8.0, image_sd=12.0):
    """Scores of images in each run, (runs, images), all runs on the same images."""
    apart = run_sd * rng.normal(size=(runs, 1)) + image_sd * rng.normal(size=images)
    return np.clip(50 + apart + 6 * rng.normal(size=(runs, images)), 0, 100)


def places(runs, images):
    return np.tile(np.arange(images), runs), np.repeat(np.arange(runs), images)


def test_runs_on_the_same_images_have_the_mean_squares_of_dorfman_berbaum_and_metz():
    scores = crossed(np.random.default_rng(5), 4, 20)
    images, runs = places(4, 20)
    means, cells = stats.cells_of(scores.ravel(), images, runs)
    of_run, of_image = scores.mean(1), scores.mean(0)
    by_run, by_image = 20 * of_run.var(ddof=1), 4 * of_image.var(ddof=1)
    left = ((scores - of_run[:, None] - of_image + scores.mean()) ** 2).sum() / (3 * 19)
    between, shared = stats.covariance(means, means, cells)
    assert between == pytest.approx(by_run / 80) and shared == pytest.approx((by_image - left) / 80)
    found = stats.mean_score(scores.ravel(), images, runs)
    assert found["n"] == 80 and found["n_images"] == 20 and found["n_runs"] == 4
    assert found["mean"] == pytest.approx(scores.mean())


def test_runs_on_images_of_their_own_are_compared_by_the_t_test_of_their_means():
    rng = np.random.default_rng(6)
    a, b = rng.uniform(40, 60, (2, 5, 30))
    b += rng.normal(0, 4, (5, 1))
    runs = np.repeat(np.arange(5), 30)
    found = stats.paired_difference(a.ravel(), b.ravel(), np.arange(150), runs=runs)
    test = scipy_stats.ttest_1samp((a - b).mean(1), 0)
    assert found["p"] == pytest.approx(test.pvalue, rel=1e-6)
    low, high = test.confidence_interval()
    assert found["low"] <= low + 1e-9 and found["high"] >= high - 1e-9  # or the wider, of gains and losses
    uneven = rng.permutation(150)[:100]  # runs of unlike size weigh the same
    part = stats.mean_score(a.ravel()[uneven], np.arange(150)[uneven], runs[uneven])
    assert part["mean"] == pytest.approx(np.mean([a[r][uneven[runs[uneven] == r] % 30].mean() for r in range(5)]))


def test_p_over_runs_is_below_alpha_where_the_limits_leave_0_out():
    rng, told = np.random.default_rng(5), []
    images, runs = places(3, 16)
    for gain in np.linspace(-30, 30, 24):
        a = np.clip(80 + gain + 6 * rng.normal(size=(3, 1)) + 15 * rng.normal(size=(3, 16)), 0, 100)
        b = np.clip(80 + 15 * rng.normal(size=(3, 16)), 0, 100)
        for alpha in (0.2, 0.05, 0.01):
            found = stats.paired_difference(a.ravel(), b.ravel(), images, alpha, runs)
            told.append(not found["low"] <= 0 <= found["high"])
            assert (found["p"] < alpha) == told[-1], (gain, alpha, found)
    assert 10 < sum(told) < 60, "both happen"


def test_one_run_among_runs_is_a_run_and_two_have_no_interval():
    scores = crossed(np.random.default_rng(7), 3, 24)
    images, runs = places(3, 24)
    one = stats.mean_score(scores[0], images[:24], runs[:24])
    assert one.pop("n_runs") == 1 and one == stats.mean_score(scores[0], images[:24])
    two = stats.paired_difference(scores[:2].ravel(), 50 + 0 * scores[:2].ravel(), images[:48], runs=runs[:48])
    assert all(math.isnan(two[key]) for key in ("low", "high", "p")) and two["diff"] == pytest.approx(scores[:2].mean() - 50)
    assert math.isnan(stats.mean_score(scores[:2].ravel(), images[:48], runs[:48])["low"])
    three = stats.mean_score(scores.ravel(), images, runs)
    pooled = stats.mean_score(scores.ravel(), [f"{r} {i}" for r, i in zip(runs, images, strict=True)])
    assert three["high"] - three["low"] > 1.5 * (pooled["high"] - pooled["low"])  # as if seeds did not differ


@pytest.mark.parametrize("design", ["same images", "own images", "a fifth of a pool"])
def test_intervals_over_runs_cover(coverage, design):
    cells = [(design, 3, images, right, sd, lost, 80) for images in (24, 96)
             for right, sd in ((0.5, 0.5), (0.92, 0.0)) for lost in (None, 0.1)]  # fmt: skip
    found = [coverage.simulate_runs(*cell) for cell in cells]
    assert min(cell["covered_frac"] for cell in found) > 0.88 and np.mean([c["covered_frac"] for c in found]) > 0.94
    assert min(cell["given_frac"] for cell in found) > 0.5
    # Clustered by image alone they would not, where runs differ.
    rng, held = np.random.default_rng(1), []
    for _ in range(200):
        chosen = coverage.images_of(rng, design, 3, 96)
        right = 100.0 * coverage.right_answers(rng, 0.5, 0.5, rng.normal(size=chosen.max() + 1), chosen)
        blind = stats.mean_score(right.ravel(), chosen.ravel())
        held.append(blind["low"] <= 50 <= blind["high"])
    assert np.mean(held) < 0.85


def test_strata_weigh_the_same_and_vary_within():
    scores = np.array([100, 100, 0, 100, 0, 0, 100.0])
    strata = ["a", "a", "a", "a", "b", "b", "b"]
    found = stats.mean_score(scores, range(7), strata=strata)
    assert found["mean"] == pytest.approx((75 + 100 / 3) / 2)
    means, cells = stats.cells_of(scores, range(7), strata=strata)
    by_hand = (scores[:4].var(ddof=1) / 4 + scores[4:].var(ddof=1) / 3) / 4
    assert stats.variance(means, cells)[0] == pytest.approx(by_hand) and cells.degrees == 5
    alone = stats.mean_score(np.append(scores, 0), range(8), strata=[*strata, "c"])
    assert math.isnan(alone["low"]) and alone["mean"] == pytest.approx((75 + 100 / 3) / 3)


def test_tables_of_several_runs_pair_within_a_run():
    scores = crossed(np.random.default_rng(8), 4, 24)
    rows = [{"run": r, "method": m, "id": f"{i}#q", "cluster": f"image {i}", "score_percent": max(0, scores[r, i] - drop)}
            for r in range(4) for i in range(24) for m, drop in (("original", 0), ("pruned", 7 + r))]  # fmt: skip
    table = pd.DataFrame(rows)
    assert stats.score_table(table)["n_runs"].tolist() == [4, 4]
    found = stats.compare(table, [("pruned", "original")]).iloc[0]
    assert found["n"] == 96 and found["n_runs"] == 4 and found["n_images"] == 24 and found["unmatched"] == 0
    assert found["diff"] == pytest.approx(-8.5, abs=0.5) and found["high"] < 0 and found["p"] < 0.01
    twice = pd.concat([table, table.iloc[:1]])
    with pytest.raises(ValueError, match="more than one score for id '0#q'"):
        stats.score_table(twice)
    with pytest.raises(ValueError, match="more than one score"):
        stats.score_table(table.drop(columns="run"))


def four_methods(values, clusters=range(8)):
    rows = [
        {"method": m, "id": f"{i}", "cluster": c, "condition": "x", "score_percent": float(v)}
        for m, column in zip("abcd", values, strict=True)
        for i, (c, v) in enumerate(zip(clusters, column, strict=True))
    ]
    return pd.DataFrame(rows)


def test_an_interaction_in_log_odds_is_what_it_says():
    a, b, c, d = [100] * 6 + [0, 50], [100] * 4 + [0] * 4, [100, 0] * 4, [100, 0, 0, 0] * 2
    found = stats.log_odds_interaction(four_methods([a, b, c, d]), ("a", "b"), ("c", "d"))
    assert found["diff"] == pytest.approx(math.log(13 / 3) - 0 - (0 - math.log(1 / 3)))
    # Each image's pull on the four log-odds, (x - mean) / (mean (1 - mean)), written out.
    x = np.array([a, b, c, d]).T / 100
    pull = (x - x.mean(0)) / (x.mean(0) * (1 - x.mean(0))) @ [1, -1, -1, 1]
    half = scipy_stats.t.ppf(0.975, 7) * pull.std(ddof=1) / math.sqrt(8)
    assert (found["low"], found["high"]) == pytest.approx((found["diff"] - half, found["diff"] + half))
    none = stats.log_odds_interaction(four_methods([[100] * 8, b, c, d]), ("a", "b"), ("c", "d"))
    assert all(math.isnan(value) for value in none.values()), "nobody knows the odds of what never fails"
    alike = stats.log_odds_interaction(four_methods([[70.0] * 8, [50.0] * 8, [60.0] * 8, [40.0] * 8]), ("a", "b"), ("c", "d"))
    assert alike["diff"] > 0 and math.isnan(alike["low"]) and math.isnan(alike["high"])


def test_log_odds_cover_as_they_should(coverage):
    cells = [coverage.simulate_log_odds(right, 24, 0.5, 300) for right in coverage.FOUR]
    assert all(cell["covered_frac"] > 0.91 for cell in cells) and np.mean([c["covered_frac"] for c in cells]) < 0.985


def test_the_best_is_chosen_on_one_half_of_the_images_and_tested_on_the_other():
    rng, misled = np.random.default_rng(0), []
    for _ in range(30):  # eight methods of one worth: whichever is ahead is so by luck
        luck = rng.integers(0, 101, (8, 24))
        rows = [{"method": f"m{m}", "id": f"{i}", "cluster": i, "condition": i % 3, "score_percent": luck[m, i]}
                for m in range(8) for i in range(24)]  # fmt: skip
        scores = pd.DataFrame(rows)
        names = [f"m{m}" for m in range(8)]
        best, apart = stats.tested_apart(scores, names, names)
        assert len(apart) == 7 and set(apart.a) == {best} and (apart.n_images == 12).all()
        misled.append(apart["diff"].mean())
    assert abs(np.mean(misled)) < 4, "on the other half the chosen one is worth what all are"
    both = [("m0", i, c, 100.0 * (i % 4 < 2)) for i, c in enumerate("aabbaabb")]
    both += [("m1", i, c, 100.0 * (i % 4 >= 2)) for i, c in enumerate("aabbaabb")]
    _, found = stats.tested_apart(
        pd.DataFrame(both, columns=["method", "cluster", "condition", "score_percent"]).assign(id=lambda t: t.cluster),
        ["m0", "m1"],
        ["m1", "m0"],
    )
    assert found.n_images[0] == 4 and found["diff"][0] == 0, "each half has as many of every condition"
    best, none = stats.tested_apart(scores[scores["cluster"] == 0], names, names)
    assert best in names and none.empty, "one image leaves nothing to test on"
