"""Tables beside the paper's, plans of bytes, the blocks' scores with intervals, the knee of a sweep."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ranking import rows_table
from typer.testing import CliRunner

from medprune.cli import app
from medprune.data.questions import load_conditions
from medprune.models.sizes import account, base_config, named_config
from medprune.results import figures, stats, tables
from medprune.results.tables import plan_json, plan_notes, plan_table, plan_text

SEVEN = named_config("llava-1.5-7b")
BLOCK = 202_383_360


def test_paper_table_by_number():
    table = tables.paper_table(1)
    assert table["blocks_removed"].tolist() == [0, 2, 4, 7, 8, 9, 10]
    pd.testing.assert_frame_equal(tables.paper_table("1"), table)
    assert [len(tables.paper_table(n)) for n in range(1, 6)] == [7, 2, 3, 6, 4]


def test_beside_paper_by_number_keeps_every_row_of_either():
    ours = pd.DataFrame({"blocks_removed": [8, 0, 1], "score": [1.0, 90.0, 70.0]})
    both = tables.beside_paper(ours, "1", on="blocks_removed", columns=["score", "params_b"])
    assert both["blocks_removed"].tolist() == [0, 1, 2, 4, 7, 8, 9, 10]
    assert list(both.columns) == ["blocks_removed", "score", "paper_score", "paper_params_b"]
    by_block = both.set_index("blocks_removed")
    assert by_block.loc[8, ["score", "paper_score", "paper_params_b"]].tolist() == [1.0, 49.5, 5.444]
    assert math.isnan(by_block.loc[1, "paper_score"]) and math.isnan(by_block.loc[9, "score"])
    assert list(ours.columns) == ["blocks_removed", "score"]


def test_beside_paper_by_name_keeps_our_order_and_repeats_the_paper_per_row():
    ours = pd.DataFrame({"method": ["prune", "original", "ours only", "prune"], "score": [1, 2, 3, 4]})
    both = tables.beside_paper(ours, "4", on="method", columns=["score"])
    assert both["method"].tolist()[:4] == ours["method"].tolist()
    assert both["paper_score"].tolist()[:2] == [62.5, 80.12]
    assert math.isnan(both["paper_score"][2]) and both["paper_score"][3] == 62.5
    assert set(both["method"][4:]) == set(tables.paper_table(4)["method"]) - {"prune", "original"}
    assert both["score"][4:].isna().all()


def test_beside_paper_by_rank_pairs_first_with_first():
    ours = pd.DataFrame({"setting": ["a", "b"], "score": [60.0, 50.0]})
    both = tables.beside_paper(ours, "5", on="rank", columns=["setting", "score"])
    assert both["rank"].tolist() == [1, 2, 3, 4]
    assert both["paper_score"].tolist() == [54.25, 47, 50, 25] and both["score"].isna().tolist()[2:] == [True] * 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=25))
def test_pareto_front_is_exactly_the_points_nothing_dominates(points):
    mask = tables.pareto_front([b for b, _ in points], [s for _, s in points])

    def beats(other, point):
        return other[0] <= point[0] and other[1] >= point[1] and other != point

    assert mask.tolist() == [not any(beats(other, point) for other in points) for point in points]
    assert mask.any()
    # Along the front, more bytes buy a better score.
    front = sorted({p for p, m in zip(points, mask, strict=True) if m})
    assert all(a[1] < b[1] for a, b in zip(front, front[1:], strict=False))


def test_pareto_front_leaves_out_nan():
    assert tables.pareto_front([1, 1, math.nan], [math.nan, 5, 9]).tolist() == [False, True, False]


def test_the_papers_numbers_are_the_ones_shipped():
    held = json.loads(tables.PAPER_TABLES.read_text(encoding="utf-8"))
    assert tables.paper_table(5)["score"].tolist() == [row["score"] for row in held["table5_ablation"]]


def test_block_scores_give_the_interval_of_image_means():
    table = tables.block_scores("x", rows_table({4: [1, 1, 3, 3], 5: [2, 2, 2, 2]}), ["a", "a", "b", "b"], seed=3)
    four = table[table.block == 4].iloc[0]
    half = 12.706204736 * 1.0  # Student's t at 1 degree of freedom x the standard error of two means, 1 and 3
    assert (four.importance_score, four.low, four.high) == pytest.approx((2, 2 - half, 2 + half))
    assert table[table.block == 5][["low", "high"]].isna().all(axis=None)  # nothing varies: no interval
    assert table.n_calibration.eq(4).all() and table.seed.eq(3).all()
    # Rows as if they were independent would give a narrower one.
    alone = tables.block_scores("x", rows_table({4: [1, 1, 3, 3]}), list("abcd")).iloc[0]
    assert alone.high - alone.low < four.high - four.low


def test_knee_table_says_which_losses_are_shown_to_be_small():
    means = {0: 80, 1: 79, 2: 78, 3: 30, 4: 0}
    rng = np.random.default_rng(0)
    answers = pd.DataFrame([{"blocks_removed": n, "id": f"{i}-{q}", "cluster": i,
                             "score_percent": np.clip(m + rng.normal(0, 2), 0, 100)}
                            for n, m in means.items() for i in range(20) for q in range(3)])  # fmt: skip
    assert tables.knee_table(answers, draws=10).loc[0, ["diff", "holds"]].tolist() == [0, True]
    table = tables.knee_table(answers, draws=200).set_index("blocks_removed")
    assert table.holds.tolist() == [True, True, True, False, False]
    assert table.knee.tolist() == [False, False, True, False, False]
    assert table.knee_frac.sum() == pytest.approx(1) and table.knee_frac[2] > 0.9
    assert not tables.knee_table(answers, tolerance=0.5, draws=10).holds[1]
    with pytest.raises(ValueError, match="0 must be among them"):
        tables.knee_table(answers[answers.blocks_removed > 0])


def test_a_sweep_of_two_counts_has_no_knee_but_says_what_was_lost():
    answers = pd.DataFrame([{"blocks_removed": n, "id": i, "cluster": i, "score_percent": 80.0 + i % 2 - n * (1, 2, 3, 2)[i % 4]}
                            for n in (0, 1) for i in range(8)])  # fmt: skip
    table = tables.knee_table(answers, draws=10)
    assert table["diff"].tolist() == pytest.approx([0, -2]) and table.holds.all()
    assert not table.knee.any() and table.knee_frac.isna().all() and table["low"].isna().tolist() == [True, False]
    same = answers.assign(score_percent=80.0 - 2 * answers["blocks_removed"])  # the very same loss everywhere
    assert tables.knee_table(same, draws=10).holds.tolist() == [True, False]
    assert len(tables.knee_table(answers[answers.blocks_removed == 0])) == 1


def test_sweep_means_leave_the_unpruned_out_and_feed_compare():
    answers = pd.DataFrame([{"method": f"{c}-{n}", "criterion": c, "blocks_removed": n, "id": f"{i}-{q}", "cluster": i,
                             "score_percent": s + i}
                            for c, found in {"a": (90, 60, 40), "random": (90, 30, 10)}.items()
                            for n, s in enumerate(found) for i in range(4) for q in range(2)])  # fmt: skip
    means = tables.sweep_means(pd.concat([answers, answers[answers.criterion == "random"].assign(score_percent=0)]))
    assert means[means.method == "a"].score_percent.tolist() == [50, 50, 51, 51, 52, 52, 53, 53]
    found = stats.compare(means, [("a", "random")]).iloc[0]
    assert found["diff"] == pytest.approx(50 + 1.5 - (20 + 1.5) / 2) and found.n_images == 4


def test_a_criterion_is_placed_among_random_draws_of_as_many_blocks():
    scores = {"a": {2: 50, 4: 0}, "b": {2: 10, 4: 90}} | {f"random-{k}": {2: 10 * k, 4: k} for k in range(4)}
    answers = pd.DataFrame([{"method": f"{c}-{n}", "criterion": c.split("-")[0], "blocks_removed": n, "id": f"{i}",
                             "score_percent": s + i} for c, found in scores.items() for n, s in (found | {0: 99}).items()
                            for i in (-1, 1)])  # fmt: skip
    placed = tables.among_random(answers).set_index(["criterion", "blocks_removed"])
    assert placed.loc[("a", 2), ["score", "random", "draws", "beaten", "p"]].tolist() == [50, 15, 4, 4, 0.2]
    assert placed.loc[("a", 4), ["beaten", "p"]].tolist() == [0, 1], "a draw with the same score is not beaten"
    assert placed.loc[("b", 2), ["beaten", "p"]].tolist() == [1, 0.8]
    assert placed.loc[("b", 4), ["low", "high"]].tolist() == pytest.approx([0.075, 2.925])
    assert len(placed) == 4
    none = tables.among_random(answers[answers.criterion != "random"])
    assert none.draws.eq(0).all() and none.random.isna().all() and none.p.eq(1).all()
    assert len(figures.figure_among_random(placed.reset_index()).axes) == 2


def test_sweep_means_keep_the_judges_apart_and_what_was_asked():
    answers = pd.DataFrame([{"method": f"{c}-{n}", "criterion": c, "blocks_removed": n, "id": f"{i}", "cluster": i,
                             "score_percent": 50.0 + i, "judge": "j", "judged_by": "j1", "asked": f"q{i}"}
                            for c in ("a", "random") for n in (0, 2, 4) for i in range(4)])  # fmt: skip
    means = tables.sweep_means(answers)
    assert len(means) == 8 and set(means.judged_by) == {"j1"} and list(means.asked[:4]) == ["q0", "q1", "q2", "q3"]
    answers.loc[answers.method == "random-4", "judged_by"] = "j2"
    with pytest.raises(ValueError, match="different judges"):
        stats.compare(tables.sweep_means(answers), [("a", "random")])


def test_table_1_to_three_decimals():
    rows = json.loads(tables.PAPER_TABLES.read_text())["table1_prune_sweep"]
    table = plan_table("llava-1.5-7b", [row["blocks_removed"] for row in rows])
    assert list(table["blocks_removed"]) == [0, 2, 4, 7, 8, 9, 10]
    assert list(table["params_b"].round(3)) == [row["params_b"] for row in rows]
    assert list(table["paper_params_b"]) == [row["params_b"] for row in rows]


def test_the_paper_s_5_85b_model_is_flagged():
    (note,) = plan_notes("llava-1.5-7b")
    assert note.startswith("The paper's 5.85B model (table 4) has 6 blocks removed, not 7")
    assert plan_notes("llava-1.5-13b") == []
    assert plan_table("llava-1.5-13b", [0])["paper_params_b"].isna().all()


def test_plan_as_text_and_as_json(tmp_path):
    text = plan_text("llava-1.5-7b", [0, 7], {"bits": 4}, bandwidth=320)
    lines = {line[:24].strip(): line[24:].split() for line in text.splitlines()}
    assert lines["parameters (B)"] == lines["the paper's table 1"] == ["7.063", "5.647"]
    assert lines["total (GiB)"] == ["4.756", "3.955"] and "6 blocks removed, not 7" in text
    plan = json.loads(plan_json("llava-1.5-7b", [7], {"bits": 4}))
    assert plan["rows"][0]["params"] == 7_063_427_072 - 7 * BLOCK and plan["bits"] == 4
    (tmp_path / "config.json").write_text(json.dumps(base_config("tiny")))
    assert "table 1" not in plan_text(tmp_path, [0, 1], {"bits": 4})
    assert json.loads(plan_json(tmp_path, [1]))["rows"][0]["paper_params_b"] is None


def test_plan_takes_a_width_for_each_block():
    widths = [8] * 6 + [3] * 19
    text = CliRunner().invoke(app, ["plan", "--bits", ",".join(map(str, widths))]).output
    assert "blocks 6 x 8 + 19 x 3 bits (rtn" in text and "7 removed" in text
    said = CliRunner().invoke(app, ["plan", "--bits", ",".join(map(str, widths)), "--json"]).output
    (row,) = json.loads(said)["rows"]
    assert row["total_bytes"] == account(SEVEN, 7, widths).total_bytes
    assert "blocks 4 bits" in CliRunner().invoke(app, ["plan", "--bits", "4"]).output
    error = CliRunner().invoke(app, ["plan", "--bits", "4,x"]).exception
    assert str(error) == "--bits 4,x must be a number, or one for each kept block with commas between."
    error = CliRunner().invoke(app, ["plan", "--bits", "4,3", "--remove", "7"]).exception
    assert "bits lists 2 blocks; 25 are kept" in str(error)


def test_naming_is_counted_apart_by_the_form_of_the_question():
    conditions = load_conditions()
    said = ["This is melanoma.", "This is melanoma or rosacea.", "This is rosacea.", "nothing"]
    answers = pd.DataFrame({"kind": "name", "condition": "melanoma", "answer": said, "cluster": list("abcd")})
    answers = pd.concat([answers, answers.assign(kind="features")]).assign(method="pruned-2")
    choice = answers[:4].assign(kind="choice", score_percent=[100.0, 100.0, 100.0, 100.0])
    twice = pd.concat([answers[:4].assign(kind="yes or no", score_percent=s) for s in (100.0, [0.0, 0.0, 0.0, 100.0])])
    found = tables.naming_forms(answers, pd.concat([choice, twice]), conditions).set_index("asked")
    assert list(found.score) == [25, 100, 62.5] and list(found.n) == [4, 4, 8]
    assert found.chance["choice"] == 12.5 and found.chance["yes or no"] == 50
    # Clopper and Pearson: of 1 in 4, and of 4 in 4, whose lower limit is 0.025 ** (1 / 4)
    assert (found.low["open"], found.high["open"]) == pytest.approx((0.6309, 80.588), abs=1e-3)
    assert (found.low["choice"], found.high["choice"]) == pytest.approx((100 * 0.025**0.25, 100))
    yes = stats.mean_score(twice.score_percent, twice.cluster)
    assert found.loc["yes or no", ["low", "high"]].tolist() == pytest.approx([yes["low"], yes["high"]], nan_ok=True)
