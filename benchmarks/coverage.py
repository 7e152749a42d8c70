"""How often do the intervals of `medprune.results.stats` hold the true value, and how often do they say nothing?

python benchmarks/coverage.py [--draws N] [--out FILE]

One run: draws test sets of 8 to 96 images with three scores each, of 0 to 100 in steps of 20/3 (three aspects of 0 to 5), from
populations whose mean is known, at 50, 80, 92 and 98% right. Prints two tables, of scores and of paired differences:
in % the intervals that hold the true mean, of those given, and in brackets how many of the test sets had one, where
fewer than 99.5%; "no interval" where fewer than 20%.
Several runs: 3 and 5 of 8, 24 and 96 images each, at 50, 80 and 92% right, with runs that differ not at all, by about 4
and by about 10 points (standard deviation, at 80% right), all on the same images, each on images of its own, or each
on a fifth of one pool. Four methods: how much more one pair differs than another, in log-odds. Writes a JSON with a row for each cell.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

from medprune.results.stats import log_odds_interaction, mean_score, paired_difference
from medprune.store import write_json

IMAGES, RIGHT = (8, 12, 24, 39, 96), (0.5, 0.8, 0.92, 0.98)
RUNS, IMAGES_OF_RUNS, RIGHT_OF_RUNS = (3, 5), (8, 24, 96), (0.5, 0.8, 0.92)
RUN_SD = (0.0, 0.2, 0.5)  # of the runs, beside 1 of the images and 1 of all else, on the scale of a probit
DESIGNS = ("same images", "own images", "a fifth of a pool")
FOUR = ((0.85, 0.8, 0.5, 0.3), (0.9, 0.6, 0.5, 0.15), (0.85,) * 4, (0.5, 0.2, 0.3, 0.15))  # right, of four methods
ALIKE = (0.0, 0.5, 0.8)  # how much of four methods' luck is an image's, or a question's
LOST = (0.0, 0.1)  # share of right answers that the second of two methods is down by
MARKS = 15  # of one answer
RARELY = 0.2  # a cell with fewer intervals than this share says "no interval"
RESULTS = Path(__file__).parent / "results" / "coverage.json"


def wrong(rng, shape):
    """Return the marks of wrong answers, 0 to 5, of which those of one image are alike."""
    return rng.integers(1, 5, (*shape, 1)) + rng.integers(-1, 2, (*shape, 3))


def tied(rng, right: float, shape):
    """Return marks (*shape, 3): an image is right in all three answers, with full marks, or wrong in all."""
    return np.where(rng.random((*shape, 1)) < right, MARKS, wrong(rng, shape))


def skewed(rng, right: float, shape):
    """Return marks (*shape, 3), binomial about an image's own quality, which is beta with mean `right`."""
    quality = rng.beta(3 * right, 3 * (1 - right), (*shape, 1))
    return rng.binomial(MARKS, np.clip(quality + rng.normal(0, 0.05, (*shape, 3)), 0, 1))


def graded(rng, right: float, shape):
    """Return marks (*shape, 3): each answer has full marks with its image's own chance, or 0 to 5."""
    chance = rng.beta(3 * right, 3 * (1 - right), (*shape, 1))
    return np.where(rng.random((*shape, 3)) < chance, MARKS, rng.integers(0, 6, (*shape, 3)))


def changed(lost: float, gained: float):
    """Return a population of pairs: b loses a share of the images that a has right, and gains one of the others."""

    def draw(rng, right: float, shape):
        a_right, luck, marks = rng.random((*shape, 1)) < right, rng.random((*shape, 1)), wrong(rng, shape)
        b_right = np.where(a_right, luck >= lost, luck < gained)
        b_wrong = np.where(a_right, wrong(rng, shape), marks)
        return np.where(a_right, MARKS, marks), np.where(b_right, MARKS, b_wrong)

    return draw


def shrunk(rng, right: float, shape):
    """Return pairs of marks: b's images have 80% of a's quality on average, 45 to 99% each."""
    quality = rng.beta(3 * right, 3 * (1 - right), (*shape, 1))
    kept = quality * rng.beta(8, 2, (*shape, 1))
    noise = rng.normal(0, 0.05, (2, *shape, 3))
    return tuple(rng.binomial(MARKS, np.clip(q + n, 0, 1)) for q, n in zip((quality, kept), noise, strict=True))


def rare(rng, right: float, shape):
    """Return pairs of marks: two draws of one quality, but b's are wrong on a tenth of the images."""
    quality = rng.beta(3 * right, 3 * (1 - right), (*shape, 1))
    a, b = rng.binomial(MARKS, np.broadcast_to(quality, (2, *shape, 3)))
    return a, np.where(rng.random((*shape, 1)) < 0.1, np.minimum(b, wrong(rng, shape)), b)


SCORES = {"tied": tied, "skewed": skewed, "graded": graded}
PAIRS = {
    "10% lost": changed(0.1, 0), "30% lost": changed(0.3, 0), "10% lost, 30% gained": changed(0.1, 0.3),
    "10% lost and gained": changed(0.1, 0.1), "shrunk": shrunk, "small, 10% lost": rare,
}  # fmt: skip


def simulate(population, right: float, images: int, draws: int, paired: bool = False) -> dict:
    """Return one cell: true (points), given, covered (of those given) and misleading (given and wrong) as shares."""
    rng, points = np.random.default_rng([images, round(100 * right), paired]), 100 / MARKS
    wide = np.array(population(np.random.default_rng(1), right, (400_000,)), float)  # (400 000, 3), or (2, ..., 3)
    true = points * float((wide[0] - wide[1]).mean() if paired else wide.mean())
    marks = points * np.array(population(rng, right, (draws, images)), float)
    clusters, limits = np.repeat(np.arange(images), 3), []
    for draw in range(draws):
        sides = marks[:, draw].reshape(2, -1) if paired else marks[draw].reshape(1, -1)
        found = (paired_difference if paired else mean_score)(*sides, clusters)
        limits.append((found["low"], found["high"]))
    return {"right": right, "images": images} | _covered(true, limits)


def images_of(rng, design: str, runs: int, images: int) -> np.ndarray:
    """Return which images each run is tested on, (runs, images), counted from 0."""
    if design == "same images":
        return np.tile(np.arange(images), (runs, 1))
    if design == "own images":
        return np.arange(runs * images).reshape(runs, images)
    return np.stack([rng.permutation(5 * images)[:images] for _ in range(runs)])


def right_answers(rng, right: float, run_sd: float, effects, chosen) -> np.ndarray:
    """Return which images a method gets right in each run, (runs, images): images have effects, runs have, and luck."""
    runs = run_sd * rng.normal(size=(len(chosen), 1))
    spread = np.sqrt(2 + run_sd**2)
    return norm.ppf(right) * spread + runs + effects[chosen] + rng.normal(size=chosen.shape) > 0


def simulate_runs(design: str, runs: int, images: int, right: float, run_sd: float, lost: float | None, draws: int):
    """Return one cell, as `simulate` does: of the share right, or of what a second method is down by (lost)."""
    rng, limits = np.random.default_rng([runs, images, round(100 * right), round(10 * run_sd)]), []
    number = np.repeat(np.arange(runs), images)
    for _ in range(draws):
        chosen = images_of(rng, design, runs, images)
        effects = rng.normal(size=chosen.max() + 1)
        a = 100.0 * right_answers(rng, right, run_sd, effects, chosen).ravel()
        if lost is None:
            found = mean_score(a, chosen.ravel(), number)
        else:
            b = 100.0 * right_answers(rng, right - lost, run_sd, effects, chosen).ravel()
            found = paired_difference(a, b, chosen.ravel(), runs=number)
        limits.append((found["low"], found["high"]))
    cell = {"design": design, "runs": runs, "right": right, "run_sd": run_sd, "lost": lost, "images": images}
    return cell | _covered(100 * (right if lost is None else lost), limits)


def cells_of_runs():
    """Yield the arguments of `simulate_runs`, without draws."""
    for lost in (None, *LOST):
        for design, right, run_sd in itertools.product(DESIGNS, RIGHT_OF_RUNS, RUN_SD):
            for runs, images in itertools.product(RUNS, IMAGES_OF_RUNS):
                yield design, runs, images, right, run_sd, lost


def simulate_log_odds(right: tuple[float, ...], images: int, alike: float, draws: int) -> dict:
    """Return one cell of `log_odds_interaction`: 3 answers to an image, right or wrong, of four methods."""
    rng, names, limits = np.random.default_rng([images, round(10 * alike)]), list("abcd"), []
    odds = np.log(np.array(right) / (1 - np.array(right)))
    answers = pd.MultiIndex.from_product([range(images), range(3), names], names=["cluster", "question", "method"])
    table = answers.to_frame(index=False)
    table["id"] = 3 * table["cluster"] + table["question"]
    for _ in range(draws):
        luck = rng.normal(size=(images, 1, 1)) + rng.normal(size=(images, 3, 1))
        shown = np.sqrt(alike / 2) * luck + np.sqrt(1 - alike) * rng.normal(size=(images, 3, 4)) < norm.ppf(right)
        found = log_odds_interaction(table.assign(score_percent=100.0 * shown.ravel()), ("a", "b"), ("c", "d"))
        limits.append((found["low"], found["high"]))
    cell = {"population": " ".join(f"{share:.0%}" for share in right), "alike": alike, "images": images}
    return cell | _covered(float(odds @ [1, -1, -1, 1]), limits)


def _covered(true: float, limits: list[tuple[float, float]]) -> dict:
    """Return true, draws, given, covered (of those given), misleading and the median width of a cell's intervals."""
    low, high = np.transpose(limits)
    given, holds = ~np.isnan(low), (low <= true + 1e-9) & (true <= high + 1e-9)
    covered = float(holds[given].mean()) if given.any() else float("nan")
    width = float(np.median((high - low)[given])) if given.any() else float("nan")
    cell = {"draws": len(limits), "true": true, "given_frac": float(given.mean()), "covered_frac": covered}
    return cell | {"misleading_frac": float((given & ~holds).mean()), "width_points": width}


def cell_text(row) -> str:
    if row.given_frac < RARELY:
        return "no interval"
    return f"{100 * row.covered_frac:.1f}" + (f" ({100 * row.given_frac:.0f})" if row.given_frac < 0.995 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000, help="test sets of each cell; a quarter of it for pairs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for paired, populations in ((False, SCORES), (True, PAIRS)):
        for name, population in populations.items():
            for right in RIGHT:
                for images in IMAGES:
                    cell = simulate(population, right, images, args.draws // 4 if paired else args.draws, paired)
                    rows.append({"of": "difference" if paired else "score", "population": name} | cell)
    table = pd.DataFrame(rows)
    for of, part in table.assign(text=[cell_text(row) for row in table.itertuples()]).groupby("of", sort=False):
        wide = part.pivot_table(
            index=["population", "right"], columns="images", values="text", aggfunc="first", sort=False
        )
        print(f"{of}: % that hold the true mean (% given)\n\n{wide.to_string()}\n")
    runs = pd.DataFrame([simulate_runs(*cell, args.draws // 4) for cell in cells_of_runs()])
    for lost, part in runs.assign(text=[cell_text(row) for row in runs.itertuples()]).groupby("lost", dropna=False):
        at = ["design", "right", "run_sd"], ["runs", "images"]
        wide = part.pivot_table(index=at[0], columns=at[1], values="text", aggfunc="first", sort=False)
        of = "share right" if np.isnan(lost) else f"difference, {lost:.0%} lost"
        print(f"several runs, {of}: % that hold the true mean (% given)\n\n{wide.to_string()}\n")
    cells = itertools.product(FOUR, IMAGES_OF_RUNS[1:], ALIKE)
    four = pd.DataFrame([simulate_log_odds(*cell, args.draws // 4) for cell in cells])
    four["text"] = [cell_text(row) for row in four.itertuples()]
    print("log-odds of four methods: % that hold the true difference of differences (% given)\n")
    print(four.pivot(index=["population", "alike"], columns="images", values="text").to_string())
    runs["of"] = np.where(runs["lost"].isna(), "share of runs", "difference of runs")
    table = pd.concat([table, runs, four.drop(columns="text").assign(of="log-odds interaction")])
    rounded = table.round(4).astype(object)
    write_json(args.out, {"rows": rounded.where(table.notna(), None).to_dict("records")})


if __name__ == "__main__":
    main()
