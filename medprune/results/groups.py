"""Who bears the cost: names given right, by condition and by skin type, and the group that fares worst.

Tables are those of `results.stats`, with columns condition, skin_tone (missing where nobody knows it) and kind. A group
of fewer than LEAST_IMAGES images has no interval and is no candidate for the worst: too small to tell.
"""

import math

import pandas as pd
from scipy.stats import binomtest

from medprune.data.questions import named_conditions
from medprune.judging.asserted import spoken
from medprune.results.stats import ALPHA, compare, is_alone, mean_score, score_of, untold_runs

LEAST_IMAGES = 8  # of a group; benchmarks/coverage.py simulates intervals from here on
BY = ("condition", "skin_tone")


def naming(scores: pd.DataFrame, conditions: dict) -> pd.DataFrame:
    """Return the answers to the question for a name, with a score_percent of 100 where they name it, else 0.

    Right is an answer that asserts its picture's condition and no other: a denial is none (`judging.asserted`).
    Whatever judge scored them, these scores are alike: columns of a judge are left out.
    """
    names = scores[scores["kind"] == "name"].drop(columns=["judge", "judged_by"], errors="ignore")
    pairs = zip(names["condition"], names["answer"], strict=True)
    right = [named_conditions(spoken(str(answer)), conditions) == [condition] for condition, answer in pairs]
    return names.assign(score_percent=[100.0 * r for r in right])


def exact_share(right: int, n: int, alpha: float = ALPHA) -> tuple[float, float]:
    """Return Clopper and Pearson's (1934) limits, in percent, of a share, of n images of which `right` have it."""
    found = binomtest(right, n).proportion_ci(1 - alpha, "exact")
    return 100 * float(found.low), 100 * float(found.high)


def share_right(names: pd.DataFrame, scores: pd.DataFrame | None = None) -> dict:
    """Return mean, low, high, n and n_images of answers that are right (100) or wrong (0), one to an image and run.

    Of one run the limits are exact (`exact_share`), of several `stats.mean_score`'s; of one among several in `scores`,
    of which names are a part, there are none.
    """
    found = mean_score(names["score_percent"], names["cluster"], names.get("run"))
    if found.get("n_runs", 1) == 1 and found["n"] == found["n_images"]:
        found["low"], found["high"] = exact_share(round((names["score_percent"] / 100).sum()), found["n"])
    return found if scores is None else untold_runs(found, scores)


def naming_table(names: pd.DataFrame) -> pd.DataFrame:
    """Summarise `naming` as one row per method: right, low, high, balanced, balanced_low, balanced_high, n_images.

    right is the share of images, in percent, with `share_right`'s limits; balanced the mean over conditions of the
    share within each, so that common conditions do not outweigh rare ones. n_runs stands beside where there are runs.
    """
    rows = []
    for method, answers in names.groupby("method", sort=False):
        found, even = share_right(answers, names), score_of(answers, names, answers["condition"])
        row = {"method": method, "right": found["mean"], "low": found["low"], "high": found["high"]}
        row |= {"balanced": even["mean"], "balanced_low": even["low"], "balanced_high": even["high"]}
        rows.append(row | {key: found[key] for key in ("n_images", "n_runs") if key in found})
    return pd.DataFrame(rows)


def group_table(scores: pd.DataFrame, by=BY, exact: bool = False) -> pd.DataFrame:
    """Return one row per method and group: method, by, group, score, low, high, n, n_images, note.

    Groups are the values of the columns `by`, each column by itself. exact: scores are right or wrong, whose limits
    are `share_right`'s, for groups of any size. note says where a group is too small for an interval, or in one of
    several runs alone. Answers without a score, or whose group is unknown, are left out.
    """
    rows, parsed = [], scores.dropna(subset="score_percent")
    for column in by:
        for (method, group), part in parsed.dropna(subset=column).groupby(["method", column], sort=False):
            found = (share_right if exact else score_of)(part, scores)
            small = found["n_images"] < LEAST_IMAGES
            if small and not (exact and found.get("n_runs", 1) == 1):
                found["low"] = found["high"] = math.nan
            note = "in one run alone" if is_alone(found, scores) else ""
            note = f"too small: fewer than {LEAST_IMAGES} images" if small else note
            rows.append({"method": method, "by": column, "group": str(group), "note": note} | found)
    table = pd.DataFrame(rows).rename(columns={"mean": "score"})
    columns = ["method", "by", "group", "score", "low", "high", "n", "n_images", "n_runs", "note"]
    return table.reindex(columns=[c for c in columns if c in table or c != "n_runs"])


def worst_group(scores: pd.DataFrame, by=BY) -> pd.DataFrame:
    """Return one row per method: method, worst_group, worst, worst_low, worst_high, worst_images and groups.

    worst_group has the lowest mean among the `groups` of at least LEAST_IMAGES images; "" where fewer than two are as
    large. Whichever group comes out lowest does so by bad luck too, so that its mean is too low on average:
    the limits are therefore of the lowest of the groups' true means, whichever group has it. They are the lowest of
    the groups' lower limits, and the lowest of upper limits that hold for all groups together (Bonferroni); a group
    without limits of its own has no say, unless it is the lowest: then there is no interval.
    """
    rows = []
    for method, answers in scores.dropna(subset="score_percent").groupby("method", sort=False):
        groups = _groups(answers, by)
        row = {"method": method, "worst_group": "", "worst": math.nan, "worst_low": math.nan, "worst_high": math.nan}
        if len(groups) > 1:
            found = {name: score_of(part, scores) for name, part in groups.items()}
            name = min(found, key=lambda group: found[group]["mean"])
            lowest = found[name]
            row |= {"worst_group": name, "worst": lowest["mean"], "worst_images": lowest["n_images"]}
            if not math.isnan(lowest["low"]):
                highs = [score_of(part, scores, alpha=ALPHA / len(groups))["high"] for part in groups.values()]
                row["worst_low"] = min(g["low"] for g in found.values() if not math.isnan(g["low"]))
                row["worst_high"] = min(high for high in highs if not math.isnan(high))
        rows.append(row | {"groups": len(groups)})
    columns = ["method", "worst_group", "worst", "worst_low", "worst_high", "worst_images", "groups"]
    return pd.DataFrame(rows).reindex(columns=columns)


def least_harm(scores: pd.DataFrame, methods: list[str], by=BY) -> tuple[str, pd.DataFrame]:
    """Return (a sentence: which of the methods harms the worst group least, if it can be told, paired differences).

    The worst group is the one that fares worst over all the methods together, which favours none of them. The method
    with the highest mean there is compared with each other one, paired, on the group's images: it is told apart if
    every difference is above 0 by limits that hold for all rows together (`stats.compare`'s low_all), which also pays
    for having chosen it on the same images (Hsu 1984). A method without a score in that group is not told from. The
    table is `stats.compare`'s, empty where there is no group of LEAST_IMAGES images, or one method.
    """
    shown = scores[scores["method"].isin(methods)]
    groups = _groups(shown.dropna(subset="score_percent"), by)
    if len(groups) < 2 or shown["method"].nunique() < 2:
        why = f"fewer than two groups have {LEAST_IMAGES} images" if len(groups) < 2 else "there is one method"
        return f"Which harms the worst group least cannot be told: {why}.", pd.DataFrame()
    worst = min(groups, key=lambda group: groups[group].groupby("method")["score_percent"].mean().mean())
    means = groups[worst].groupby("method", sort=False)["score_percent"].mean()
    best = means.idxmax()
    rivals = compare(groups[worst], [(best, other) for other in means.index if other != best])
    said = f"In the worst group, {worst}, {best} is ahead with {means[best]:.1f} points, "
    told = {best, *rivals["b"][rivals["low_all"] > 0]}
    others = [method for method in shown["method"].unique() if method not in told]
    if not others:
        return f"{said}and told from every other.", rivals
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"{said}not told from {', '.join(others[:3])}{more}.", rivals


def _groups(answers: pd.DataFrame, by) -> dict[str, pd.DataFrame]:
    """Return the answers of each group that is large enough, by its name: "melanoma", "skin tone V"."""
    found = {}
    for column in by:
        if column in answers:
            for group, part in answers.dropna(subset=column).groupby(column, sort=True):
                name = str(group) if column == "condition" else f"{column.replace('_', ' ')} {group}"
                if part["cluster"].nunique() >= LEAST_IMAGES:
                    found[name] = part
    return found
