"""Intervals and paired comparisons that know three questions share an image, and all answers of a run its training.

Scores travel as a table with one row per answer: method, id (one image and one question), cluster (the image) and
score_percent (0-100, higher is better, NaN where the judge's reply could not be parsed). Where it also says by which
judge (judged_by; its name in judge) and what was asked (asked), scores of two judges, or of two questions, are
refused. Estimators refuse NaN; tables leave unparsed answers out of the mean and print how many, so a failure is never
dropped in silence.
The population: images like those tested, of these conditions, each asked these questions. A table of one run is about
the model of that run; where column run tells several apart (seeds), about a model trained and pruned anew, so that
intervals cover seeds and images (`results.cells`). The conditions are those there are; images count as drawn from
their mixture, which makes intervals wider than with the conditions' shares fixed, not narrower.
Intervals are 95%. NaN limits mean "no interval": the data cannot carry one. How often the others cover is simulated in
benchmarks/coverage.py. Where a table makes several comparisons, p is adjusted by Holm, and low_all and high_all hold
for all of them together.
"""

import math
import warnings
from bisect import bisect_left

import numpy as np
import pandas as pd
from scipy import special, stats
from scipy.optimize import brentq
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from medprune.results.cells import ROUNDING, Cells, cells_of, covariance, p_of, student, variance

ALPHA, POWER = 0.05, 0.8  # of the tests that are planned
SIDES = ["score_percent_a", "score_percent_b"]  # of a pair of methods, side by side
LIMITS = ("low", "high", "low_all", "high_all", "p")  # that an estimate of one of several runs goes without

# Chosen by simulation (benchmarks/coverage.py), with scores from all of 8 to 96 images.
LEAST_FROM_END = 1.5  # images' worth of points that a mean must keep from 0 and from 100
LEAST_DIFFERENT = 4  # images on which two methods must differ
UNSEEN = 0.2  # how much the squared skewness of a 0/1 score weighs against the variance that was seen
MOST_FLIPPED = 30  # images whose signs are flipped in all ways


def clustered_mean(values, clusters) -> dict:
    """Return mean, low, high, n and n_images of values (n,), of which those of one cluster (n,) are dependent.

    For values without a lowest or highest, in their unit: Student's t on n_images - 1 degrees of freedom, which for
    equally large clusters is the one-sample t interval of their means. Scores have `mean_score`. NaN limits where
    there is one cluster, or all clusters have the very same mean. Raises ValueError for no values, NaN or infinite
    values, or unequal lengths.
    """
    means, cells, found = _by_image(values, clusters)
    low, high = _t_limits(means, cells, ALPHA)
    return found | {"low": low, "high": high}


def mean_score(scores, clusters, runs=None, strata=None, alpha: float = ALPHA) -> dict:
    """Return mean, low, high, n and n_images of scores (n,) of 0 to 100, of which those of one cluster are dependent.

    runs (n,): where there are several, they are drawn as the images are (`results.cells`), weigh the same, and n_runs
    says how many. strata (n,), such as conditions: each weighs the same, and images vary about their stratum's mean.
    The limits are Jeffreys's for a share (Brown, Cai and DasGupta 2001) at the effective number of images, the number
    of 0/1 scores that would have the variance found, adjusted for degrees of freedom (Korn and Graubard 1998). They
    lie within 0 to 100. A few images near an end may hide a rare failure, so the variance found is averaged with that
    of a 0/1 score, which weighs UNSEEN x the squared skewness of the mean of as many 0/1 scores (after Cochran 1977,
    section 2.15: normal limits need many times the squared skewness).
    NaN limits where all images have the very same mean, or the mean is less than LEAST_FROM_END images' worth from 0
    or 100 (8 images: below 19 or above 81; 24: 6 and 94; 96: 1.6 and 98.4), where there are two runs, or a stratum
    has one image. Raises ValueError as `clustered_mean` does, and for scores outside 0 to 100.
    """
    means, cells, found = _by_image(scores, clusters, runs, strata)
    if not 0 <= np.min(scores) <= np.max(scores) <= 100:
        raise ValueError(f"scores run from {np.min(scores):g} to {np.max(scores):g}: they must lie within 0 to 100.")
    low = high = math.nan
    share = found["mean"] / 100
    if not _near_an_end(cells.images, share, share) and variance(means, cells)[0] > 0:
        low, high = 100 * np.array(_share_limits(means / 100, cells, alpha, UNSEEN))
    return found | {"low": float(low), "high": float(high)}


def _near_an_end(images: int, lowest: float, highest: float) -> bool:
    """Say whether a mean, a share of 1, is less than LEAST_FROM_END images' worth from 0 or 1: from both ends alike.

    What equals LEAST_FROM_END but for rounding is not less, or scores turned upside down would be told apart.
    """
    return round(images * min(lowest, 1 - highest), 9) < LEAST_FROM_END


def score_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Summarise answers as one row per method: method, score, low, high, n, n_images, unparsed; of runs n_runs too.

    score, low and high are percent, of the n parsed answers on n_images images; unparsed answers are left out
    of all of these and counted. Where scores has a run, every run weighs the same. low and high are those of
    `mean_score`, NaN for no interval, as for a method of one run among several. A method with no parsed answer gets
    NaN. Raises ValueError for an unusable table, such as one where two judges scored the same method.
    """
    rows = []
    for method, answers in _checked(scores).groupby("method", sort=False):
        parsed = answers.dropna(subset="score_percent")
        found = {"n": 0, "n_images": 0}
        if len(parsed):
            found = score_of(parsed, scores)
        rows.append({"method": method, "unparsed": len(answers) - len(parsed)} | found)
    columns = ["method", "score", "low", "high", "n", "n_images", *["n_runs"] * ("run" in scores), "unparsed"]
    return pd.DataFrame(rows).rename(columns={"mean": "score"}).reindex(columns=columns)


def paired_difference(a, b, clusters, alpha: float = ALPHA, runs=None) -> dict:
    """Return diff = mean(a - b), low, high, p of no difference, n and n_images; a, b and clusters are (n,).

    a and b are scores of 0 to 100, or differences of such; diff is in points, positive where a is higher, and low and
    high, for a confidence of 1 - alpha, lie within -100 to 100 (of differences: -200 to 200).
    p flips the signs of the images' differences in all ways (Fisher 1935): exact for any number of images, as long as
    at most MOST_FLIPPED differ; beyond, Student's t test. The limits are the wider on each side of Student's t, which
    is right for differences either way, and of those that gains and losses give, each with `mean_score`'s limits,
    put together by Zou and Donner's MOVER (2008; Newcombe 1998 for shares), which is right where few images differ,
    and much. They hold 0 where p is at least alpha.
    runs (n,), as `mean_score` has them: of several, p is the least alpha for which the limits leave 0 out.
    NaN limits where fewer than LEAST_DIFFERENT images differ or all differ by the same; one cluster, or two runs, have
    no p either.
    A loss on so few images that none was drawn is in no interval. Raises ValueError as `clustered_mean` does, and
    for values beyond 100: take unparsed answers out of both sides first, as `compare` does.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"a holds {a.size} scores and b {b.size}: pairs must be complete.")
    means, cells, found = _by_image(a - b, clusters, runs)
    sides = np.concatenate([a, b])
    if np.abs(sides).max() > 100:
        raise ValueError(f"a score of {sides[np.abs(sides).argmax()]:g} is none of 0 to 100, nor a difference of two.")
    means[np.abs(means) <= ROUNDING * np.abs(sides).max()] = 0  # what rounding leaves of equal scores
    found = {"diff": float(cells.shares @ means), "low": math.nan, "high": math.nan, "p": math.nan} | found
    del found["mean"]
    if cells.images > 1:
        found["p"] = _p_of_no_difference(means, cells)
    if np.unique(cells.image[means != 0]).size >= LEAST_DIFFERENT and variance(means, cells)[0] > 0:
        scale = 100 if sides.min() >= 0 else 200
        limits = np.array([_t_limits(means, cells, alpha), scale * _gain_limits(means / scale, cells, alpha)])
        if cells.runs > 1:
            found["p"] = max(found["p"], _p_of_gains(means / scale, cells))
        hold = [0.0] if found["p"] >= alpha else []
        found["low"] = float(max(-scale, min([*limits[:, 0], *hold])))
        found["high"] = float(min(scale, max([*limits[:, 1], *hold])))
    return found


def compare(scores: pd.DataFrame, pairs: list[tuple[str, str]]) -> pd.DataFrame:
    """Compare pairs of methods on the answers both have: one row per pair, diff = a - b in percentage points.

    Columns: a, b, diff, low, high, low_all and high_all (Bonferroni's limits, which hold for all rows together), p,
    p_holm (adjusted for the number of rows with a p; Holm 1979), n answers on n_images in n_runs, if scores has a run
    (answers are paired within it), unmatched (ids that only one
    of the two has) and unparsed (shared ids left out because either score is NaN). A pair without two scores of one id
    has no diff, one of a single one of several runs no limits and no p. Raises ValueError if a method is unknown, a
    pair shares no id or was scored by different judges, or an id changes its image or what was asked.
    """
    scores = _checked(scores)
    rows = []
    for a, b in pairs:
        both, unmatched = _paired(scores, a, b)
        parsed = both.dropna(subset=SIDES)
        found = {"n": 0, "n_images": 0}
        if len(parsed):
            sides = (parsed[column] for column in (*SIDES, "cluster"))
            found = one_difference(len(pairs), *sides, parsed.get("run"), scores)
        rows.append({"a": a, "b": b} | found | {"unmatched": unmatched, "unparsed": len(both) - len(parsed)})
    columns = ["a", "b", "diff", "low", "high", "low_all", "high_all", "p", "p_holm", "n", "n_images", "unmatched"]
    columns += [*["n_runs"] * ("run" in scores), "unparsed"]
    table = pd.DataFrame(rows, columns=columns)
    tested = table["p"].notna()
    table["p_holm"] = math.nan
    if tested.any():
        table.loc[tested, "p_holm"] = multipletests(table.loc[tested, "p"], method="holm")[1]
    return table


def score_of(answers: pd.DataFrame, scores: pd.DataFrame, strata=None, alpha: float = ALPHA) -> dict:
    """Return `mean_score` of a part of `scores`, whose answers all have one, as `untold_runs` leaves it."""
    found = mean_score(answers["score_percent"], answers["cluster"], answers.get("run"), strata, alpha)
    return untold_runs(found, scores)


def one_difference(many: int, a, b, clusters, runs, scores: pd.DataFrame) -> dict:
    """Return `paired_difference` of a part of `scores`, one of so many, as `untold_runs` leaves it.

    low_all and high_all are limits that hold for all of them together.
    """
    found, wide = (paired_difference(a, b, clusters, alpha, runs) for alpha in (ALPHA, ALPHA / many))
    return untold_runs(found | {"low_all": wide["low"], "high_all": wide["high"]}, scores)


def untold_runs(found: dict, scores: pd.DataFrame) -> dict:
    """Return what was found of a part of `scores`, without limits and p where it is of one of several runs.

    Its images tell how sure that run is, and nothing of how much runs differ, which the rows beside it cover.
    """
    return found | {key: math.nan for key in found if key in LIMITS and is_alone(found, scores)}


def is_alone(found: dict, scores: pd.DataFrame) -> bool:
    """Say whether what was found of a part of `scores` is of one run, where they hold several."""
    return found.get("n_runs") == 1 < scores["run"].nunique()


def log_odds_interaction(scores: pd.DataFrame, first: tuple[str, str], second: tuple[str, str]) -> dict:
    """Return diff, low and high of how much more the first pair's a - b is than the second's, in log-odds of the mean.

    The same question as a difference of differences in points, on the scale on which a loss near 0 or 100 counts as
    much as one in the middle: the two may answer it differently, and then neither is the answer. first, second: (a, b)
    methods, all four scored on the same answers. The error is by the delta method over images, with Student's t:
    in benchmarks/coverage.py it covers 94 to 98%. NaN where a mean is less than LEAST_FROM_END images' worth from 0 or
    100; no limits where no image differs from another.
    """
    wide = _checked(scores).pivot(index=["cluster", "id"], columns="method", values="score_percent")
    means = wide[[*first, *second]].dropna().groupby(level="cluster").mean().to_numpy() / 100  # (images, 4)
    share, signs = means.mean(0), np.array([1, -1, -1, 1])
    found = {"diff": math.nan, "low": math.nan, "high": math.nan}
    if _near_an_end(len(means), share.min(), share.max()):
        return found
    found["diff"] = float(signs @ special.logit(share))
    parts = (means - share) / (share * (1 - share)) @ signs
    if parts.std(ddof=1) <= ROUNDING * np.abs(parts).max():
        return found
    half = -special.stdtrit(len(means) - 1, ALPHA / 2) * parts.std(ddof=1) / math.sqrt(len(means))
    return found | {"low": found["diff"] - half, "high": found["diff"] + half}


def tested_apart(scores: pd.DataFrame, methods: list[str], rivals: list[str]) -> tuple[str, pd.DataFrame]:
    """Choose the best method on half of the images, and compare it with each rival on the other half.

    Images, condition by condition, go to either half in turn; what chance did for the chosen one in the first half does
    nothing for it in the second. Returns (the method with the highest mean, `compare`'s rows: the chosen method less
    each other rival; no row where one image leaves the other half empty). scores: with a condition.
    """
    images = scores.drop_duplicates("cluster").sort_values(["condition", "cluster"])
    apart = scores["cluster"].isin(set(images["cluster"].iloc[1::2]))
    means = scores[~apart & scores["method"].isin(methods)].groupby("method", sort=False)["score_percent"].mean()
    best = str(means.idxmax())
    return best, compare(scores[apart], [(best, rival) for rival in rivals if rival != best and apart.any()])


def cluster_differences(scores: pd.DataFrame, a: str, b: str) -> pd.Series:
    """Return the mean difference a - b of each image, in points, indexed by cluster.

    Its standard deviation, `.std()`, is what the functions below call sd_cluster_diff. Answers without a
    score on either side are left out. Raises as `compare` does, and where there is no other.
    """
    parsed = _paired(_checked(scores), a, b)[0].dropna(subset=SIDES)
    if parsed.empty:
        raise ValueError(f"{a!r} and {b!r} share no id that both have a score for: no image tells how they differ.")
    diffs = parsed["score_percent_a"] - parsed["score_percent_b"]
    return diffs.groupby(parsed["cluster"]).mean().rename("diff")


def minimum_detectable_effect(sd_cluster_diff: float, n_images: int) -> float:
    """Return the smallest true difference, in points, that n_images (at least 2) find with a power of 80%.

    The test is a two-sided paired t test; sd_cluster_diff is the standard deviation of the images' mean
    differences, in points.
    """
    high = 1.0
    while not _power(high, n_images) >= POWER:
        high *= 2
    return float(sd_cluster_diff * brentq(lambda d: _power(d, n_images) - POWER, 0, high))


def images_needed(effect: float, sd_cluster_diff: float) -> int:
    """Return how many images find a true difference of `effect` > 0 points with a power of 80%; at least 2.

    The inverse of `minimum_detectable_effect`, whose solver's error must not make a whole number go one up.
    """
    if sd_cluster_diff == 0:
        return 2
    return 2 + bisect_left(range(2, 10**9), POWER - 1e-9, key=lambda n: _power(effect / sd_cluster_diff, n))


def simulate_detection(cluster_diffs, n_images: int, effect: float, draws=2000, seed=0) -> float:
    """Return the share (0-1) of draws in which a true difference of `effect` points has p < 0.05.

    Bootstraps whole images from cluster_diffs (images,), the observed mean differences in points, moved so
    that their mean is `effect`, and tests each draw by Student's t, with equally many questions per image. effect=0
    gives the rate of false alarms. Raises ValueError for fewer than two images.
    """
    diffs = np.asarray(cluster_diffs, float)
    if diffs.size < 2:
        raise ValueError(f"{diffs.size} cluster_diffs: at least 2 images are needed to have a variance.")
    # The bootstrap's variance is (n-1)/n of the sample's: widen, so that power refers to the sample's.
    spread = (diffs - diffs.mean()) * math.sqrt(diffs.size / (diffs.size - 1))
    picks = np.random.default_rng(seed).integers(diffs.size, size=(draws, n_images))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # A draw of one image repeated has no variance: scipy warns, and gives p = 0, or NaN at a mean of 0.
        warnings.simplefilter("ignore", RuntimeWarning)
        p = stats.ttest_1samp(spread[picks] + effect, 0, axis=1).pvalue
    return float(np.mean(p < ALPHA))


def sd_limits(values) -> tuple[float, float]:
    """Return the 95% limits of the standard deviation of values (n,), without assuming that they are normal.

    Bonett 2006, equation 1; of very skewed values (39 that are exponential) they hold 87%. NaN for fewer than 5
    values, or values that are all the same.
    """
    values = np.asarray(values, float)
    n, variance = values.size, values.var(ddof=1) if values.size > 1 else 0
    if n < 5 or variance <= (ROUNDING * np.abs(values).max()) ** 2:
        return math.nan, math.nan
    middle = stats.trim_mean(values, min(0.5 / math.sqrt(n - 4), 0.49))
    kurtosis = n * ((values - middle) ** 4).sum() / ((n - 1) * variance) ** 2
    z = special.ndtri(1 - ALPHA / 2)
    factor, error = n / (n - z), math.sqrt((kurtosis - (n - 3) / n) / (n - 1))
    low, high = (math.sqrt(factor * variance * math.exp(side * z * factor * error)) for side in (-1, 1))
    return low, high


def detection_note(cluster_diffs, n_images=39, effect=4.0, draws=2000) -> str:
    """Return the sentences beside the paper's table 5: can `effect` points on n_images be told from nothing?

    Every number is computed from cluster_diffs, the observed mean differences of the images in points. What they say
    holds for data that vary as these do; in brackets, what their own spread leaves open at 95% (`sd_limits`).
    """
    diffs = np.asarray(cluster_diffs, float)
    sd, limits = float(np.std(diffs, ddof=1)), sd_limits(diffs)
    if sd <= ROUNDING * np.abs(diffs).max():
        return f"All {diffs.size} images differ alike: how many images a test needs cannot be told from them."
    found = simulate_detection(diffs, n_images, effect, draws)
    between = smallest = needed = "no interval"
    if not math.isnan(limits[0]):
        between = "{:.1f}, {:.1f}".format(*limits)
        smallest = "{:.1f}, {:.1f}".format(*(minimum_detectable_effect(side, n_images) for side in limits))
        needed = "{}, {}".format(*(images_needed(effect, side) for side in limits))
    return (
        f"On these data (standard deviation {sd:.1f} points [{between}] between {diffs.size} images), a true "
        f"difference of {effect:g} points on {n_images} images is found in {found:.0%} of {draws} simulated test sets; "
        f"the smallest difference found in 80% is {minimum_detectable_effect(sd, n_images):.1f} points [{smallest}], "
        f"and {effect:g} points would need {images_needed(effect, sd)} images [{needed}]. Other images or another "
        "model may vary more, or less."
    )


def _by_image(values, clusters, runs=None, strata=None) -> tuple[np.ndarray, Cells, dict]:
    """Return the means of images, in each run, (cells,), the cells, and mean, n, n_images, and n_runs if there are."""
    means, cells = cells_of(values, clusters, runs, strata)
    mean = np.mean(values) if runs is None and strata is None else cells.shares @ means
    found = {"mean": float(mean), "n": np.size(values), "n_images": cells.images}
    return means, cells, found | ({} if runs is None else {"n_runs": cells.runs})


def _error(means, cells: Cells) -> float:
    """Return the standard error of the mean; 0 where only rounding makes cells differ."""
    return math.sqrt(variance(means, cells)[0])


def _t_limits(means, cells: Cells, alpha: float) -> tuple[float, float]:
    mean, (spread, between) = float(cells.shares @ means), variance(means, cells)
    half = student(alpha, between, cells) * math.sqrt(spread) if spread else math.nan
    return mean - half, mean + half


def _share_limits(shares, cells: Cells, alpha: float, unseen: float) -> tuple[float, float]:
    """Return Jeffreys's limits of the mean of cells' shares (cells,) of 0 to 1; the mean, where none varies."""
    mean, (spread, between) = float(cells.shares @ shares), variance(shares, cells)
    if not spread:
        return mean, mean
    two_point = mean * (1 - mean)
    weight = unseen * (1 - 2 * mean) ** 2 / (cells.images * two_point)  # unseen x the squared skewness
    spread = (spread + weight * two_point / cells.images) / (1 + weight)
    effective = two_point / spread * (special.ndtri(1 - alpha / 2) / student(alpha, between, cells)) ** 2
    right, wrong = effective * mean + 0.5, effective * (1 - mean) + 0.5
    low, high = special.betaincinv(right, wrong, [alpha / 2, 1 - alpha / 2])
    return min(float(low), mean), max(float(high), mean)


def _gain_limits(means, cells: Cells, alpha: float) -> np.ndarray:
    """Return the limits (2,) of the mean difference from those of gains and losses; means (cells,) of -1 to 1."""
    gains, losses = np.maximum(means, 0), np.maximum(-means, 0)
    errors = _error(gains, cells) * _error(losses, cells)
    r = np.clip(sum(covariance(gains, losses, cells)) / errors, -1, 1) if errors else 0.0

    def arm(gain_limit: float, loss_limit: float) -> float:
        x, y = gain_limit - cells.shares @ gains, loss_limit - cells.shares @ losses  # of opposite signs
        return math.sqrt(max(0, x**2 + 2 * r * x * y + y**2))

    least_gain, most_gain = _share_limits(gains, cells, alpha, 0)
    least_loss, most_loss = _share_limits(losses, cells, alpha, 0)
    return cells.shares @ means + np.array([-arm(least_gain, most_loss), arm(most_gain, least_loss)])


def _p_of_gains(means, cells: Cells) -> float:
    """Return the least alpha for which `_gain_limits` leave 0 out; means (cells,) of -1 to 1."""
    side = 0 if cells.shares @ means > 0 else 1

    def beyond(log_alpha: float) -> float:
        limit = _gain_limits(means, cells, math.exp(log_alpha))[side]
        return -limit if side else limit

    most, least = math.log(0.999), math.log(1e-12)
    if beyond(most) <= 0:
        return 1.0
    return math.exp(brentq(beyond, least, most)) if beyond(least) < 0 else math.exp(least)


def _p_of_no_difference(means, cells: Cells) -> float:
    """Return the two-sided p of the sign-flip test of images' differences; of the t test where too many differ.

    Several runs have the t test: an image's signs in two of them cannot be flipped apart, nor a run's.
    """
    if cells.runs > 1:
        return _p_of_t(means, cells)
    parts = (cells.shares * means)[means != 0]
    if (parts > 0).all() or (parts < 0).all():
        return 2.0 ** (1 - parts.size) if parts.size else 1.0
    if parts.size > MOST_FLIPPED:
        return _p_of_t(means, cells)
    halves = [np.zeros(1), np.zeros(1)]  # the sums of half the images with every choice of signs
    for number, part in enumerate(parts):
        sums = halves[number % 2]
        halves[number % 2] = np.concatenate([sums + part, sums - part])
    least = abs(parts.sum()) - ROUNDING * np.abs(parts).sum()
    as_far = 2 * (halves[1].size - np.searchsorted(np.sort(halves[1]), least - halves[0])).sum()
    return min(1.0, float(as_far / 2**parts.size))


def _p_of_t(means, cells: Cells) -> float:
    """Return the two-sided p of Student's t test; 1 where no cell differs, NaN where all differ alike."""
    spread, between = variance(means, cells)
    if not spread > 0:
        return math.nan if means.any() or math.isnan(spread) else 1.0
    return p_of(cells.shares @ means / math.sqrt(spread), between, cells)


def _power(size: float, n_images: float) -> float:
    """Return the power of a paired t test for a difference of `size` standard deviations."""
    # Both tails would add the chance of a find in the wrong direction: nothing at any power of interest, and
    # NaN for large sizes, on which statsmodels' own solve_power fails to converge.
    return float(TTestPower().power(size, n_images, ALPHA / 2, alternative="larger"))


def _checked(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the table with score_percent as floats, None as NaN; ValueError for two judges or two scores of one id."""
    scores = scores.assign(score_percent=pd.to_numeric(scores["score_percent"]).astype(float))
    for method in scores["method"].unique():
        _one_judge(scores, method)
    twice = scores[scores.duplicated(["method", *_answer(scores)])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(f"method {first['method']!r} has more than one score for id {first['id']!r}.")
    return scores


def _one_judge(scores: pd.DataFrame, *methods: str) -> None:
    """Raise ValueError if the table says that the answers of `methods` were not all scored by the same judge."""
    if "judged_by" not in scores:
        return
    judges = scores[scores["method"].isin(methods)].fillna({"judged_by": ""}).drop_duplicates("judged_by")
    if len(judges) > 1:
        said = [f"{row.judge} ({row.judged_by or 'not recorded'})" for row in judges.itertuples()]
        raise ValueError(f"answers of {' and '.join(methods)} were scored by different judges: {', '.join(said)}.")


def _paired(scores: pd.DataFrame, a: str, b: str) -> tuple[pd.DataFrame, int]:
    """Return the answers to the ids both methods have, side by side, and how many ids only one of them has."""
    for method in (a, b):
        if method not in set(scores["method"]):
            raise ValueError(f"there is no method {method!r} among {list(scores['method'].unique())}.")
    _one_judge(scores, a, b)
    columns = [c for c in ("run", "id", "cluster", "score_percent", "asked") if c in scores]
    left, right = (scores.loc[scores["method"] == method, columns] for method in (a, b))
    both = left.merge(right, on=_answer(scores), suffixes=("_a", "_b"))
    if both.empty:
        raise ValueError(f"{a!r} and {b!r} share no id, so they cannot be paired.")
    _same(both, "cluster", f"belongs to different images in {a!r} and {b!r}")
    if "asked" in scores:
        _same(both, "asked", f"was asked differently in {a!r} and {b!r}: question, reference or picture is another")
    return both.rename(columns={"cluster_a": "cluster"}), len(left) + len(right) - 2 * len(both)


def _answer(scores: pd.DataFrame) -> list[str]:
    """Return the columns that say which answer a method's score is of."""
    return ["run", "id"] if "run" in scores else ["id"]


def _same(both: pd.DataFrame, column: str, otherwise: str) -> None:
    """Raise ValueError with the first id whose two sides differ in a column; where one side is missing they do."""
    a, b = both[f"{column}_a"], both[f"{column}_b"]
    differs = both["id"][(a != b) & ~(a.isna() & b.isna())]
    if len(differs):
        raise ValueError(f"id {differs.iloc[0]!r} {otherwise}.")
