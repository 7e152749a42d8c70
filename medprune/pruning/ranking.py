"""What the criteria's scores are worth: intervals, agreement, stability under another calibration set, greedy orders.

A criterion's scores are {block: importance_score}, or a table of one score per block and calibration row (block, row,
score; higher = keep). Three questions share an image, so rows are resampled, and intervals drawn, by image.
"""

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from medprune.models.families import n_blocks, protected
from medprune.pruning.criteria import removal_order
from medprune.pruning.leave_one_out import leave_one_out_logits, logit_divergence, teacher_batches
from medprune.pruning.plan import without
from medprune.store import Units


def order_of(table: pd.DataFrame, protect) -> list[int]:
    """Return the removal order of one criterion's `block_scores`."""
    return removal_order(dict(zip(table["block"], table["importance_score"], strict=True)), protect)


def rank_correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Return Spearman's rho between criteria, over the blocks that all of them score.

    table: `block_scores` of several criteria. A criterion with several seeds enters with the mean of its draws'
    correlations.
    """
    wide = table.pivot(index="block", columns=["criterion", "seed"], values="importance_score").dropna()
    rho = wide.corr(method="spearman").groupby(level="criterion", sort=False).mean()
    rho = rho.T.groupby(level="criterion", sort=False).mean().T
    return rho.where(~np.eye(len(rho), dtype=bool), 1.0)


def overlap(order_a, order_b, n: int) -> float:
    """Return the Jaccard index (0-1, 1 = the same) of the first n blocks of two removal orders."""
    a, b = set(order_a[:n]), set(order_b[:n])
    return len(a & b) / len(a | b)


def chance_overlap(n_blocks: int, n: int) -> float:
    """Return the expected Jaccard index of two sets of n blocks drawn at random from n_blocks."""
    shared = np.arange(n + 1)
    return float((scipy_stats.hypergeom.pmf(shared, n_blocks, n, n) * shared / (2 * n - shared)).sum())


def stability(scores: pd.DataFrame, clusters, n_removed, draws: int = 1000, seed: int = 0):
    """Say how much a removal order owes to the calibration images drawn; returns (ranks, overlaps).

    scores: (block, row, score) of the blocks that may go; clusters (rows,) names each row's image. Whole images are
    resampled with replacement. ranks: block, rank (0 = first to go), low, high, the central 95% of draws. overlaps:
    n_removed, overlap (mean Jaccard index of a draw's removal set with the full set's), halves (of the sets that two
    disjoint halves of the images choose: two calibration sets half as large), chance (two sets drawn at random).
    """
    wide = scores.pivot(index="block", columns="row", values="score")
    images, which = np.unique(np.asarray(list(clusters))[wide.columns], return_inverse=True)
    if len(images) < 2:
        raise ValueError(f"{len(images)} calibration image cannot be resampled: give at least 2.")
    member = np.eye(len(images))[which]  # (rows, images)
    sums, counts = wide.to_numpy() @ member, member.sum(0)  # (blocks, images), (images,)
    rng = np.random.default_rng([seed, 11])
    picks = rng.multinomial(len(images), np.full(len(images), 1 / len(images)), size=draws)
    shuffled = rng.permuted(np.tile(np.arange(len(images)), (draws, 1)), axis=1)

    def orders(weights):  # (draws, images) -> blocks' positions, first to go first (draws, blocks)
        means = weights @ sums.T / (weights @ counts)[:, None]
        return np.argsort(means, axis=1, kind="stable")

    full, drawn = orders(np.ones((1, len(images))))[0], orders(picks)
    half = len(images) // 2
    left, right = orders(shuffled < half), orders((shuffled >= half) & (shuffled < 2 * half))
    low, high = np.quantile(np.argsort(drawn, axis=1), [0.025, 0.975], axis=0)
    ranks = pd.DataFrame({"block": wide.index, "rank": np.argsort(full), "low": low, "high": high})
    found = [np.mean([overlap(full, d, n) for d in drawn]) for n in n_removed]
    halves = [np.mean([overlap(a, b, n) for a, b in zip(left, right, strict=True)]) for n in n_removed]
    chance = [chance_overlap(len(full), n) for n in n_removed]
    return ranks, pd.DataFrame({"n_removed": n_removed, "overlap": found, "halves": halves, "chance": chance})


def greedy_order(model, score_fn, protect, n: int, units: Units) -> list[int]:
    """Return n blocks, first to go first, scoring again after each removal (the paper's "pruned iteratively").

    score_fn(model, kept) scores a model whose block i is the original's kept[i], and returns {original block:
    importance_score}. protect: the original's protected blocks; negative ones count from the end. One unit per step
    and protected set. The model is left as it came.
    """
    guarded, whole = protected(model, tuple(protect)), n_blocks(model.config)
    if not 0 <= n <= whole - len(guarded):
        raise ValueError(f"n={n} blocks cannot go: 0 to {whole - len(guarded)} of this model's {whole} may be removed.")
    removed: list[int] = []
    while len(removed) < n:
        key = f"greedy without {removed}, {list(guarded)} protected"
        if key not in units:
            kept = [b for b in range(whole) if b not in removed]
            with without(model, removed):
                scores = score_fn(model, kept)
            left = removal_order({b: s for b, s in scores.items() if b in kept}, guarded)
            units.add(key, {"block": left[0], "scores": {str(b): s for b, s in scores.items()}})
        removed.append(units[key]["block"])
    return removed


class _Passing(dict):
    """Units that are not kept: a step of a greedy order is one unit, its scores by themselves are none."""

    add_all = dict.update


def greedy_by_divergence(model, processor, rows, said, first, protect, n, units, batch_rows: int) -> list[int]:
    """Return `greedy_order` by logit divergence from the whole model, the cheapest criterion that looks at answers.

    rows, said: calibration questions and the whole model's answers; a question an image is scored again after each
    removal. first: `leave_one_out.logit_divergence` of the whole model on every question.
    """
    some = range(1, len(rows), 3)
    few = teacher_batches(processor, [rows[i] for i in some], [said[i] for i in some], model.dtype, batch_rows)
    # 4 bytes x targets x vocabulary are held of each batch
    reference, whole = [next(leave_one_out_logits(model, batch, []))[1] for batch in few], n_blocks(model.config)

    def divergence(current, kept):
        if len(kept) == whole:  # scored already, on every question
            return first.groupby("block")["score"].mean().to_dict()
        left = [i for i, block in enumerate(kept) if block not in protect]
        found = logit_divergence(current, few, left, _Passing(), reference).groupby("block")["score"].mean()
        return {kept[i]: score for i, score in found.items()}

    return greedy_order(model, divergence, protect, n, units)


def knee(removed, scores) -> int:
    """Return the count of blocks at which the curve of scores bends: the point farthest above its chord.

    removed (n,) rising, scores (n,) in percent; the chord joins the first point and the last (Kneedle, Satopaa et
    al. 2011, for a falling concave curve). Of a curve nowhere above its chord, which falls at once, the first count.
    """
    x, y = np.asarray(removed, float), np.asarray(scores, float)
    above = y - np.interp(x, [x[0], x[-1]], [y[0], y[-1]])
    above[above <= 1e-9 * max(1.0, np.abs(y).max())] = 0
    return int(removed[int(np.argmax(above))])
