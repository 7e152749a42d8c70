"""How often do the intervals of `medprune.results.stats` hold the true value, and how often do they say nothing?

python benchmarks/coverage.py [--draws N] [--out FILE]

Draws test sets of 8 to 96 images with three scores each, of 0 to 100 in steps of 20/3 (three aspects of 0 to 5), from
populations whose mean is known, at 50, 80, 92 and 98% right. Prints two tables, of scores and of paired differences:
in % the intervals that hold the true mean, of those given, and in brackets how many of the test sets had one, where
fewer than 99.5%; "no interval" where fewer than 20%. Writes a JSON with a row for each cell.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from medprune.results.stats import mean_score, paired_difference
from medprune.store import write_json

IMAGES, RIGHT = (8, 12, 24, 39, 96), (0.5, 0.8, 0.92, 0.98)
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
    low, high = np.transpose(limits)
    given, holds = ~np.isnan(low), (low <= true) & (true <= high)
    covered = float(holds[given].mean()) if given.any() else float("nan")
    width = float(np.median((high - low)[given])) if given.any() else float("nan")
    cell = {"right": right, "images": images, "draws": draws, "true": true, "given_frac": float(given.mean())}
    return cell | {"covered_frac": covered, "misleading_frac": float((given & ~holds).mean()), "width_points": width}


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
    rounded = table.round(4).astype(object)
    write_json(args.out, {"rows": rounded.where(table.notna(), None).to_dict("records")})


if __name__ == "__main__":
    main()
