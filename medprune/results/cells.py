"""How sure is a mean? Answers of one image depend on each other, and so do all answers of one training run.

An image's answers in one run are a cell. Where there is one run, images are drawn and the run is what it is. Where
there are several (seeds), runs and images are both drawn, whether the runs share their images, have images of their
own, or share some: the analysis of Obuchowski and Rockette (1995) for readers and cases, with the runs as readers.
V = variance of the runs' means / runs, and C = covariance of two runs' means by the images that they share, make the
variance of the mean, V + C. Student's quantile is the mean of those for V's and for C's degrees of freedom, weighted by
V and C (Cochran and Cox 1957), which covers 95 to 97% of normal means; Satterthwaite's degrees of freedom cover 92.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special
from scipy.optimize import brentq

# A standard error below this share of the largest value is what rounding leaves of a variance of zero.
ROUNDING = 1e-12
LEAST_RUNS = 3  # that tell how much runs differ: with two, one degree of freedom is left


@dataclass(frozen=True)
class Cells:
    """The cells of an estimate, (cells,) each: share of the mean, run, image and stratum, counted from 0."""

    shares: np.ndarray  # sum to 1, within a run to 1 / runs
    run: np.ndarray
    image: np.ndarray
    stratum: np.ndarray

    @property
    def runs(self) -> int:
        return int(self.run.max()) + 1

    @property
    def images(self) -> int:
        return int(self.image.max()) + 1

    @property
    def degrees(self) -> int:
        """Degrees of freedom that the images leave."""
        return self.images - int(self.stratum.max()) - 1

    def of_images(self, values) -> np.ndarray:
        """Return the mean over runs of each image's cells, (images,)."""
        return np.bincount(self.image, self.shares * values) / np.bincount(self.image, self.shares)


def cells_of(values, clusters, runs=None, strata=None) -> tuple[np.ndarray, Cells]:
    """Return (means of the cells (cells,), the cells) of values (n,), whose images, runs and strata are (n,) each.

    Every run has the same share of the mean, and in it every value, or, where there are strata, every stratum the same
    and in it every value. Raises ValueError for no values, values that are not finite, and unequal lengths.
    """
    values = np.asarray(values, float)
    n = values.size
    keys = [pd.factorize(np.zeros(n) if key is None else np.asarray(key))[0] for key in (runs, clusters, strata)]
    run, image, stratum = keys
    if values.ndim != 1 or n == 0 or any(key.shape != values.shape for key in keys):
        raise ValueError(f"values {values.shape} and clusters {image.shape} must be equally long lists, not empty.")
    bad, gone = (~np.isfinite(values)).sum(), sum((key < 0).sum() for key in keys)
    if bad or gone:
        raise ValueError(f"{bad} values are not finite and {gone} clusters are missing: leave those out, and say so.")
    sizes = [int(key.max()) + 1 for key in keys]
    places, cell = np.unique(np.ravel_multi_index(keys, sizes), return_inverse=True)
    run, image, stratum = np.unravel_index(places, sizes)
    counts, group = np.bincount(cell), run * sizes[2] + stratum
    in_group = np.bincount(group, counts, sizes[0] * sizes[2])
    strata_of_run = (in_group > 0).reshape(sizes[0], sizes[2]).sum(1)
    shares = counts / in_group[group] / strata_of_run[run] / sizes[0]
    return np.bincount(cell, values) / counts, Cells(shares, run, image, stratum)


def covariance(x, y, cells: Cells) -> tuple[float, float]:
    """Return (V, C) of the means of two quantities of each cell (cells,): between runs, and by shared images.

    Of one run C alone is there: the images' own, with the factor G/(G-1) for G images (Liang and Zeger 1986). Within
    strata, if there are, images vary about their stratum's mean; one image in a stratum leaves NaN.
    """
    parts = [_apart(values, cells) for values in (x, y)]
    if cells.runs == 1:
        return 0.0, float((parts[0] * parts[1]).sum())
    n, boxes = cells.runs, []
    for part in parts:
        flat = np.bincount(cells.run * cells.images + cells.image, part, n * cells.images)
        boxes.append(flat.reshape(n, cells.images))
    own, all_pairs = (boxes[0] * boxes[1]).sum(), (boxes[0].sum(0) * boxes[1].sum(0)).sum()
    means = [n * np.bincount(cells.run, cells.shares * values) for values in (x, y)]
    return float(np.cov(*means)[0, 1] / n), float((all_pairs - own) / (n * (n - 1)))


def variance(values, cells: Cells) -> tuple[float, float]:
    """Return (variance of the mean of cells' values (cells,), the share of it between runs); 0 where nothing varies.

    A covariance by shared images below 0 counts as 0. NaN where there are fewer than LEAST_RUNS of several runs.
    """
    if 1 < cells.runs < LEAST_RUNS:
        return math.nan, math.nan
    if cells.degrees < 1:
        return 0.0, 0.0
    between, by_image = covariance(values, values, cells)
    by_image = 0.0 if by_image < 0 else by_image  # and NaN as it is
    whole = between + by_image
    if whole <= (ROUNDING * np.abs(values).max()) ** 2:
        return 0.0, 0.0
    return whole, between / whole


def student(alpha: float, between: float, cells: Cells) -> float:
    """Return the quantile that a mean's two-sided interval multiplies its error with; between: `variance`'s share."""
    by_image = -special.stdtrit(cells.degrees, alpha / 2)
    return by_image - between * (special.stdtrit(cells.runs - 1, alpha / 2) + by_image) if between else by_image


def p_of(error: float, between: float, cells: Cells) -> float:
    """Return the two-sided p of a mean that lies `error` standard errors from 0."""
    if cells.runs == 1:
        return float(2 * special.stdtr(cells.degrees, -abs(error)))

    def beyond(log_p: float) -> float:
        return student(math.exp(log_p), between, cells) - abs(error)

    most, least = 0.0, -300.0
    return math.exp(brentq(beyond, least, most)) if beyond(most) < 0 < beyond(least) else float(error == 0)


def _apart(values, cells: Cells) -> np.ndarray:
    """Return what each cell takes its run's mean away from its strata's means, (cells,), not biased for few images."""
    group = cells.run * (int(cells.stratum.max()) + 1) + cells.stratum
    size = np.bincount(group)[group]
    middle = np.bincount(group, cells.shares * values)[group] / np.bincount(group, cells.shares)[group]
    # One image tells no variance: NaN, but where it is a whole run, whose mean varies with the others'.
    factor = np.sqrt(size / np.where(size > 1, size - 1, np.nan if cells.stratum.any() else 1))
    return cells.runs * cells.shares * (values - middle) * factor
