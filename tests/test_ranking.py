"""Intervals, agreement and stability of importance scores on made-up tables; greedy orders on the tiny LLaVA."""

import numpy as np
import pandas as pd
import pytest
import torch

from medprune.models.families import parts
from medprune.models.loading import load
from medprune.pruning import ranking
from medprune.results import tables
from medprune.store import Units


def rows_table(scores: dict[int, list[float]]) -> pd.DataFrame:
    rows = [{"block": b, "row": i, "score": s} for b, found in scores.items() for i, s in enumerate(found)]
    return pd.DataFrame(rows)


def test_scores_without_rows_have_no_interval():
    table = tables.block_scores("magnitude", {1: 5.0, 0: 7.0})
    assert table.block.tolist() == [0, 1] and table.low.isna().all()
    assert ranking.order_of(table, ()) == [1, 0]


def test_rank_correlations_use_shared_blocks_and_average_draws():
    found = [tables.block_scores("a", {b: float(b) for b in range(6)}),
              tables.block_scores("b", {b: b**3.0 for b in range(2, 6)}),
              tables.block_scores("random", {b: float(b) for b in range(6)}, seed=0),
              tables.block_scores("random", {b: -float(b) for b in range(6)}, seed=1)]  # fmt: skip
    rho = ranking.rank_correlations(pd.concat(found))
    assert rho.loc["a", "b"] == pytest.approx(1)
    assert rho.loc["a", "random"] == pytest.approx(0)
    assert np.diag(rho).tolist() == [1, 1, 1] and rho.equals(rho.T)


def test_overlap_is_jaccard_of_the_first_n():
    assert ranking.overlap([1, 2, 3], [3, 2, 1], 2) == pytest.approx(1 / 3)
    assert ranking.overlap([1, 2, 3], [3, 2, 1], 3) == 1


def test_chance_overlap_is_what_random_sets_give():
    rng = np.random.default_rng(0)
    drawn = [ranking.overlap(rng.permutation(9).tolist(), rng.permutation(9).tolist(), 4) for _ in range(4000)]
    assert ranking.chance_overlap(9, 4) == pytest.approx(np.mean(drawn), abs=0.015)


def test_stability_is_whole_where_images_agree_and_low_where_they_do_not():
    clusters = [f"image {i // 3}" for i in range(24)]
    rng = np.random.default_rng(1)
    agreed = rows_table({b: (b + 0.01 * rng.random(24)).tolist() for b in range(2, 10)})
    ranks, overlaps = ranking.stability(agreed, clusters, [1, 3, 5], draws=50)
    assert (ranks.low == ranks["rank"]).all() and (ranks.high == ranks["rank"]).all()
    assert ranks["rank"].tolist() == list(range(8))
    assert overlaps.overlap.eq(1).all() and overlaps.halves.eq(1).all()
    noise = rows_table({b: rng.normal(size=24).tolist() for b in range(2, 10)})
    ranks, overlaps = ranking.stability(noise, clusters, [1, 3, 5], draws=200)
    assert (ranks.high - ranks.low).median() >= 4
    assert (overlaps.halves < overlaps.overlap).all() and (overlaps.overlap < 0.95).all()
    again = ranking.stability(noise, clusters, [1, 3, 5], draws=200)[1]
    assert overlaps.equals(again)


def test_stability_draws_whole_images():
    # Rows of one image cancel out: with rows drawn apart ranks would move, with images they cannot.
    scores = rows_table({0: [5.0, -5.0] * 6, 1: [1.0] * 12})
    ranks, _ = ranking.stability(scores, [i // 2 for i in range(12)], [1], draws=100)
    assert (ranks.low == ranks.high).all()
    with pytest.raises(ValueError, match="1 calibration image cannot"):
        ranking.stability(scores, ["only"] * 12, [1])


def test_greedy_scores_again_in_the_originals_numbers_and_resumes(base, tmp_path):
    model, _ = load(base, dtype=torch.float32)
    whole = list(parts(model).blocks)
    calls = []

    def score(current, kept):
        assert [whole.index(b) for b in parts(current).blocks] == kept
        calls.append(kept)
        # Block 2 is of no use while 3 is there and vital once it is gone: a one-shot order would take 3, then 2.
        return {b: {0: 0.0, 1: 5.0, 2: 1.0 if 3 in kept else 9.0, 3: 0.5, 4: 3.0, 5: 0.0}[b] for b in kept}

    units = Units(tmp_path / "u.jsonl", "x")
    assert ranking.greedy_order(model, score, (0, -1), 2, units) == [3, 4]
    assert calls == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 4, 5]]
    assert list(parts(model).blocks) == whole
    calls.clear()
    assert ranking.greedy_order(model, score, (0, -1), 3, Units(tmp_path / "u.jsonl", "x")) == [3, 4, 1]
    assert calls == [[0, 1, 2, 5]], "finished steps are not scored again"
    with pytest.raises(ValueError, match="n=5 blocks cannot go: 0 to 4"):
        ranking.greedy_order(model, score, (0, -1), 5, units)


def test_a_greedy_order_is_that_of_its_protected_blocks(base, tmp_path):
    model, _ = load(base, dtype=torch.float32)
    units = Units(tmp_path / "u.sqlite", "x")

    def score(current, kept):
        return {b: float(b) for b in kept}

    orders = [ranking.greedy_order(model, score, protect, 2, units) for protect in ((0, 1, -1), (0,), (0, 1, -1))]
    assert orders == [[2, 3], [1, 2], [2, 3]]


def test_a_failing_score_leaves_the_model_whole(base, tmp_path):
    model, _ = load(base, dtype=torch.float32)

    def score(current, kept):
        if len(kept) < 6:
            raise KeyboardInterrupt
        return {b: float(b) for b in kept}

    with pytest.raises(KeyboardInterrupt):
        ranking.greedy_order(model, score, (0,), 2, Units(tmp_path / "u.jsonl", "x"))
    assert len(parts(model).blocks) == model.config.text_config.num_hidden_layers == 6


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([80, 79, 78, 77, 40, 10, 0], 3),  # a shelf, then a fall
        ([80, 40, 20, 10, 5, 2, 0], 0),  # falls at once
        ([80, 70, 60, 50, 40, 20, 0], 0),  # the straight line has no knee
        ([80, 81, 79, 80, 79, 78, 0], 6),  # counts are not equally far apart
    ],
)
def test_knee_is_farthest_above_the_chord(scores, expected):
    assert ranking.knee([0, 1, 2, 3, 4, 6, 8], scores) == expected
