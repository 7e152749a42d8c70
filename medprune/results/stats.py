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
from dataclasses import astuple, dataclass

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats
from scipy.optimize import brentq
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

# A standard error below this share of the largest value is what rounding leaves of a variance of zero.
ROUNDING = 1e-12
SIDES = ["score_percent_a", "score_percent_b"]  # of a pair of methods, side by side


@dataclass(frozen=True)
class Interval:
    """A mean and its interval in the values' unit; the bounds are NaN where there is only one cluster."""

    mean: float
    low: float
    high: float
    n: int
    n_clusters: int


def clustered_mean(values, clusters, level: float = 0.95) -> Interval:
    """Return the mean of values (n,) with the interval that allows for clusters (n,) of dependent values.

    The bounds are not clipped to the scale: one outside 0-100 says that the normal approximation is strained.
    One cluster gives NaN bounds, values without variance between clusters give bounds equal to the mean.
    Raises ValueError for no values, NaN or infinite values, unequal lengths, or a level outside (0, 1).
    """
    mean, error, n, n_clusters = _mean_and_error(values, clusters)
    low, high = _bounds(mean, error, n_clusters, level)
    return Interval(mean, low, high, n, n_clusters)


def score_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Summarise answers as one row per method: method, score, low, high, n, n_images, unparsed.

    score, low and high are percent, of the n parsed answers on n_images images; unparsed answers are left out
    of all of these and counted. A method with no parsed answer gets NaN. Raises ValueError for an unusable
    table, such as one where two judges scored the same method.
    """
    rows = []
    for method, answers in _checked(scores).groupby("method", sort=False):
        parsed = answers.dropna(subset="score_percent")
        found = Interval(math.nan, math.nan, math.nan, 0, 0)
        if len(parsed):
            found = clustered_mean(parsed["score_percent"], parsed["cluster"])
        rows.append((method, *astuple(found), len(answers) - len(parsed)))
    return pd.DataFrame(rows, columns=["method", "score", "low", "high", "n", "n_images", "unparsed"])


def paired_difference(a, b, clusters, level: float = 0.95) -> dict:
    """Return diff = mean(a - b), low, high, two-sided p of no difference, n and n_clusters.

    a, b and clusters are (n,); diff is in their unit, positive where a is higher. One cluster gives NaN
    bounds and p. Where all clusters differ by the very same amount, the t test has no variance to work with
    and p is that of the exact sign-flip test, 2^(1 - n_clusters), or 1 if that amount is 0. Raises ValueError
    as `clustered_mean` does: take unparsed answers out of both sides first, as `compare` does.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"a holds {a.size} scores and b {b.size}: pairs must be complete.")
    differences = a - b
    # What rounding leaves of equal scores is no difference, and must not pass for one that never varies.
    differences[np.abs(differences) <= ROUNDING * np.abs(a).max(initial=0)] = 0
    mean, error, n, n_clusters = _mean_and_error(differences, clusters)
    low, high = _bounds(mean, error, n_clusters, level)
    if n_clusters == 1:
        p = math.nan
    elif error == 0:
        p = 1.0 if mean == 0 else 2.0 ** (1 - n_clusters)
    else:
        p = float(2 * stats.t.sf(abs(mean / error), n_clusters - 1))
    return {"diff": mean, "low": low, "high": high, "p": p, "n": n, "n_clusters": n_clusters}


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
        found["n_images"] = found.pop("n_clusters")
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


def minimum_detectable_effect(sd_cluster_diff: float, n_images: int, power=0.8, alpha=0.05) -> float:
    """Return the smallest true difference, in points, that n_images find with this power.

    The test is a two-sided paired t test; sd_cluster_diff is the standard deviation of the images' mean
    differences, in points. Raises ValueError for a negative one or fewer than two images.
    """
    _check_power(sd_cluster_diff, power, alpha)
    if n_images < 2:
        raise ValueError(f"n_images={n_images!r} must be at least 2 to have a variance.")
    high = 1.0
    while not _power(high, n_images, alpha) >= power:
        high *= 2
    return float(sd_cluster_diff * brentq(lambda d: _power(d, n_images, alpha) - power, 0, high))


def images_needed(effect: float, sd_cluster_diff: float, power=0.8, alpha=0.05) -> int:
    """Return how many images find a true difference of `effect` points with this power; at least 2.

    The inverse of `minimum_detectable_effect`. Raises ValueError unless effect is positive.
    """
    _check_power(sd_cluster_diff, power, alpha)
    if not effect > 0:
        raise ValueError(f"effect={effect!r} must be a positive number of points.")
    if sd_cluster_diff == 0:
        return 2
    size, high = effect / sd_cluster_diff, 2
    while not _power(size, high, alpha) >= power:
        high *= 2
    if high == 2:
        return 2
    n = brentq(lambda n: _power(size, n, alpha) - power, high / 2, high)
    return math.ceil(n - 1e-6)  # less the solver's error, lest a whole number go one up


def simulate_detection(cluster_diffs, n_images: int, effect: float, draws=2000, seed=0, alpha=0.05) -> float:
    """Return the share (0-1) of draws in which a true difference of `effect` points has p < alpha.

    Bootstraps whole images from cluster_diffs (images,), the observed mean differences in points, moved so
    that their mean is `effect`, and tests each draw as `paired_difference` does with equally many questions
    per image. effect=0 gives the rate of false alarms. Raises ValueError for fewer than two images or NaN.
    """
    diffs = np.asarray(cluster_diffs, float)
    if diffs.size < 2 or n_images < 2 or draws < 1:
        given = f"{diffs.size} cluster_diffs, n_images={n_images!r} and draws={draws!r}"
        raise ValueError(f"{given}: at least 2 differences, 2 images and 1 draw are needed.")
    if not np.isfinite(diffs).all():
        raise ValueError(f"cluster_diffs holds {(~np.isfinite(diffs)).sum()} values that are not finite.")
    # The bootstrap's variance is (n-1)/n of the sample's: widen, so that power refers to the sample's.
    spread = (diffs - diffs.mean()) * math.sqrt(diffs.size / (diffs.size - 1))
    picks = np.random.default_rng(seed).integers(diffs.size, size=(draws, n_images))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # A draw of one image repeated has no variance: scipy warns, and gives p = 0, or NaN at a mean of 0.
        warnings.simplefilter("ignore", RuntimeWarning)
        p = stats.ttest_1samp(spread[picks] + effect, 0, axis=1).pvalue
    return float(np.mean(p < alpha))


def detection_note(cluster_diffs, n_images=39, effect=4.0, draws=2000, seed=0) -> str:
    """Return the sentences beside the paper's table 5: can `effect` points on n_images be told from nothing?

    Every number is computed from cluster_diffs, the observed mean differences of the images in points.
    """
    sd = float(np.std(np.asarray(cluster_diffs, float), ddof=1))
    found = simulate_detection(cluster_diffs, n_images, effect, draws, seed)
    return (
        f"At the variance observed (standard deviation {sd:.1f} points between images), a true difference of "
        f"{effect:g} points on {n_images} images is found in {found:.0%} of {draws} simulated test sets; the "
        f"smallest difference found in 80% is {minimum_detectable_effect(sd, n_images):.1f} points, and "
        f"{effect:g} points would need {images_needed(effect, sd)} images."
    )


def _mean_and_error(values, clusters) -> tuple[float, float, int, int]:
    """Return mean, cluster-robust standard error (NaN for one cluster), number of values and of clusters."""
    values, groups = np.asarray(values, float), pd.factorize(np.asarray(clusters))[0]
    if values.ndim != 1 or values.shape != groups.shape or values.size == 0:
        raise ValueError(f"values {values.shape} and clusters {groups.shape} must be equally long lists, not empty.")
    bad, gone = (~np.isfinite(values)).sum(), (groups < 0).sum()
    if bad or gone:
        raise ValueError(f"{bad} values are not finite and {gone} clusters are missing: leave those out, and say so.")
    n_clusters = int(groups.max()) + 1
    if n_clusters == 1:
        return float(values.mean()), math.nan, values.size, 1
    model = sm.OLS(values, np.ones(values.size))
    fit = model.fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    error = float(fit.bse[0])
    if error <= ROUNDING * np.abs(values).max():
        error = 0.0
    return float(fit.params[0]), error, values.size, n_clusters


def _bounds(mean: float, error: float, n_clusters: int, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level={level!r} must lie between 0 and 1, such as 0.95.")
    half_width = math.nan if n_clusters == 1 else stats.t.ppf((1 + level) / 2, n_clusters - 1) * error
    return float(mean - half_width), float(mean + half_width)


def _checked(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the table with score_percent as floats, None as NaN, or raise ValueError."""
    missing = {"method", "id", "cluster", "score_percent"} - set(scores.columns)
    if missing:
        raise ValueError(f"scores lacks the columns {sorted(missing)}; it has {list(scores.columns)}.")
    scores = scores.assign(score_percent=pd.to_numeric(scores["score_percent"]).astype(float))
    outside = scores.loc[(scores["score_percent"] < 0) | (scores["score_percent"] > 100), "score_percent"]
    if len(outside):
        raise ValueError(f"score_percent={outside.iloc[0]:g} must lie between 0 and 100.")
    for method in scores["method"].unique():
        _one_judge(scores, method)
    twice = scores[scores.duplicated(["method", "id"])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(f"method {first['method']!r} has more than one score for id {first['id']!r}.")
    return scores


def _power(size: float, n_images: float, alpha: float) -> float:
    """Return the power of a paired t test for a difference of `size` standard deviations."""
    # Both tails would add the chance of a find in the wrong direction: nothing at any power of interest, and
    # NaN for large sizes, on which statsmodels' own solve_power fails to converge.
    return float(TTestPower().power(size, n_images, alpha / 2, alternative="larger"))


def _check_power(sd_cluster_diff: float, power: float, alpha: float) -> None:
    if not (sd_cluster_diff >= 0 and math.isfinite(sd_cluster_diff)):
        raise ValueError(f"sd_cluster_diff={sd_cluster_diff!r} must be a finite number of points, 0 or more.")
    if not 0 < alpha < power < 1:
        raise ValueError(f"alpha={alpha!r} and power={power!r} must satisfy 0 < alpha < power < 1.")


def _one_judge(scores: pd.DataFrame, *methods: str) -> None:
    """Raise ValueError if the table says that the answers of `methods` were not all scored by the same judge."""
    if "judged_by" not in scores:
        return
    judges = scores[scores["method"].isin(methods)].fillna({"judged_by": ""}).drop_duplicates("judged_by")
    if len(judges) > 1:
        names = judges["judge"] if "judge" in judges else ["a judge"] * len(judges)
        said = [f"{name} ({by or 'not recorded'})" for name, by in zip(names, judges["judged_by"], strict=True)]
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
