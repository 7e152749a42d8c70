"""Intervals and paired comparisons that know three questions share an image.

statsmodels and scipy do the estimating; this module arranges. Scores travel as a table with one row per
answer: method, id (one image and one question), cluster (the image) and score_percent (0-100, higher is
better, NaN where the judge's reply could not be parsed). Where it also says by which judge (judged_by; its name in
judge) and what was asked (asked), scores of two judges, or of two questions, are refused. Estimators refuse NaN;
tables leave unparsed answers out of the mean and print how many, so a failure is never dropped in silence.
Cluster-robust variance: Liang and Zeger 1986, with the finite-sample factor G/(G-1) and Student's t on G-1 degrees
of freedom for G clusters. With equally large clusters this is the one-sample t test on the clusters' means.
"""

import math
import warnings
from bisect import bisect_left

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats
from scipy.optimize import brentq
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

# A standard error below this share of the largest value is what rounding leaves of a variance of zero.
ROUNDING = 1e-12
ALPHA, POWER = 0.05, 0.8  # of the tests that are planned
SIDES = ["score_percent_a", "score_percent_b"]  # of a pair of methods, side by side


def clustered_mean(values, clusters) -> dict:
    """Return mean, low, high, p, n and n_images of values (n,), of which those of one cluster (n,) are dependent.

    low and high bound the 95% interval, in the values' unit and not clipped to their scale: one outside 0-100 says
    that the normal approximation is strained. p is two-sided, of a true mean of 0. One cluster gives NaN bounds and p.
    Where all clusters have the very same mean, the t test has no variance to work with: the bounds equal the mean, and
    p is that of the exact sign-flip test, 2^(1 - n_images), or 1 if the mean is 0. Raises ValueError for no values,
    NaN or infinite values, or unequal lengths.
    """
    values, groups = np.asarray(values, float), pd.factorize(np.asarray(clusters))[0]
    if values.ndim != 1 or values.shape != groups.shape or values.size == 0:
        raise ValueError(f"values {values.shape} and clusters {groups.shape} must be equally long lists, not empty.")
    bad, gone = (~np.isfinite(values)).sum(), (groups < 0).sum()
    if bad or gone:
        raise ValueError(f"{bad} values are not finite and {gone} clusters are missing: leave those out, and say so.")
    found = {"mean": float(values.mean()), "low": math.nan, "high": math.nan, "p": math.nan}
    found |= {"n": values.size, "n_images": int(groups.max()) + 1}
    if found["n_images"] == 1:
        return found
    model = sm.OLS(values, np.ones(values.size))
    fit = model.fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    mean, (low, high), p = fit.params[0], fit.conf_int()[0], fit.pvalues[0]
    if fit.bse[0] <= ROUNDING * np.abs(values).max():
        low = high = mean
        p = 1.0 if mean == 0 else 2.0 ** (1 - found["n_images"])
    return found | {"mean": float(mean), "low": float(low), "high": float(high), "p": float(p)}


def score_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Summarise answers as one row per method: method, score, low, high, n, n_images, unparsed.

    score, low and high are percent, of the n parsed answers on n_images images; unparsed answers are left out
    of all of these and counted. A method with no parsed answer gets NaN. Raises ValueError for an unusable
    table, such as one where two judges scored the same method.
    """
    rows = []
    for method, answers in _checked(scores).groupby("method", sort=False):
        parsed = answers.dropna(subset="score_percent")
        found = clustered_mean(parsed["score_percent"], parsed["cluster"]) if len(parsed) else {"n": 0, "n_images": 0}
        rows.append({"method": method, "unparsed": len(answers) - len(parsed)} | found)
    columns = ["method", "score", "low", "high", "n", "n_images", "unparsed"]
    return pd.DataFrame(rows).rename(columns={"mean": "score"}).reindex(columns=columns)


def paired_difference(a, b, clusters) -> dict:
    """Return diff = mean(a - b), and low, high, p of no difference, n and n_images, as `clustered_mean` does.

    a, b and clusters are (n,); diff is in their unit, positive where a is higher. Raises ValueError as
    `clustered_mean` does: take unparsed answers out of both sides first, as `compare` does.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"a holds {a.size} scores and b {b.size}: pairs must be complete.")
    differences = a - b
    # What rounding leaves of equal scores is no difference, and must not pass for one that never varies.
    differences[np.abs(differences) <= ROUNDING * np.abs(a).max(initial=0)] = 0
    found = clustered_mean(differences, clusters)
    return {"diff": found.pop("mean")} | found


def compare(scores: pd.DataFrame, pairs: list[tuple[str, str]]) -> pd.DataFrame:
    """Compare pairs of methods on the answers both have: one row per pair, diff = a - b in percentage points.

    Columns: a, b, diff, low, high, p, p_holm (adjusted for the number of rows with a p; Holm 1979), n answers
    on n_images, unmatched (ids that only one of the two has) and unparsed (shared ids left out because either
    score is NaN). Raises ValueError if a method is unknown, a pair shares no scored id or was scored by different
    judges, or an id changes its image or what was asked.
    """
    scores = _checked(scores)
    rows = []
    for a, b in pairs:
        both, unmatched = _paired(scores, a, b)
        parsed = both.dropna(subset=SIDES)
        found = paired_difference(*(parsed[side] for side in SIDES), parsed["cluster"])
        rows.append({"a": a, "b": b} | found | {"unmatched": unmatched, "unparsed": len(both) - len(parsed)})
    columns = ["a", "b", "diff", "low", "high", "p", "p_holm", "n", "n_images", "unmatched", "unparsed"]
    table = pd.DataFrame(rows, columns=columns)
    tested = table["p"].notna()
    table["p_holm"] = math.nan
    if tested.any():
        table.loc[tested, "p_holm"] = multipletests(table.loc[tested, "p"], method="holm")[1]
    return table


def cluster_differences(scores: pd.DataFrame, a: str, b: str) -> pd.Series:
    """Return the mean difference a - b of each image, in points, indexed by cluster.

    Its standard deviation, `.std()`, is what the functions below call sd_cluster_diff. Answers without a
    score on either side are left out. Raises as `compare` does.
    """
    parsed = _paired(_checked(scores), a, b)[0].dropna(subset=SIDES)
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
    that their mean is `effect`, and tests each draw as `paired_difference` does with equally many questions
    per image. effect=0 gives the rate of false alarms. Raises ValueError for fewer than two images.
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


def detection_note(cluster_diffs, n_images=39, effect=4.0, draws=2000) -> str:
    """Return the sentences beside the paper's table 5: can `effect` points on n_images be told from nothing?

    Every number is computed from cluster_diffs, the observed mean differences of the images in points.
    """
    sd = float(np.std(np.asarray(cluster_diffs, float), ddof=1))
    found = simulate_detection(cluster_diffs, n_images, effect, draws)
    return (
        f"At the variance observed (standard deviation {sd:.1f} points between images), a true difference of "
        f"{effect:g} points on {n_images} images is found in {found:.0%} of {draws} simulated test sets; the "
        f"smallest difference found in 80% is {minimum_detectable_effect(sd, n_images):.1f} points, and "
        f"{effect:g} points would need {images_needed(effect, sd)} images."
    )


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
    twice = scores[scores.duplicated(["method", "id"])]
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
    columns = [c for c in ("id", "cluster", "score_percent", "asked") if c in scores]
    left, right = (scores.loc[scores["method"] == method, columns] for method in (a, b))
    both = left.merge(right, on="id", suffixes=("_a", "_b"))
    if both.dropna(subset=SIDES).empty:
        raise ValueError(f"{a!r} and {b!r} share no id that both have a score for, so they cannot be paired.")
    _same(both, "cluster", f"belongs to different images in {a!r} and {b!r}")
    if "asked" in scores:
        _same(both, "asked", f"was asked differently in {a!r} and {b!r}: question, reference or picture is another")
    return both.rename(columns={"cluster_a": "cluster"}), len(left) + len(right) - 2 * len(both)


def _same(both: pd.DataFrame, column: str, otherwise: str) -> None:
    """Raise ValueError with the first id whose two sides differ in a column; where one side is missing they do."""
    a, b = both[f"{column}_a"], both[f"{column}_b"]
    differs = both["id"][(a != b) & ~(a.isna() & b.isna())]
    if len(differs):
        raise ValueError(f"id {differs.iloc[0]!r} {otherwise}.")
