"""What is kept of a search: every plan in order, the few that are chosen among, plans for other budgets, figures of them."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from medprune.data.record import Record
from medprune.searching import fitting
from medprune.searching.budget import DROP, FULL, Space
from medprune.searching.figures import budget_slider, figure_additivity, figure_choices, figure_progress
from medprune.searching.searchers import Problem, choice_shares

SPACE = Space(("block 0", "block 1"), ({DROP: 0, 4: 10, FULL: 40},) * 2, 100)
COSTS = [{DROP: 9.0, 4: 1.0, FULL: 0.0}, {DROP: 5.0, 4: 2.0, FULL: 0.0}]


def coupled(plans, share):
    """Return costs that add up, and 4 nats more where both blocks have 4 bits."""
    return [COSTS[0][a] + COSTS[1][b] + 4 * (a == b == 4) for a, b in plans]


@pytest.fixture
def found():
    problem = Problem(SPACE, 140, COSTS, coupled, [COSTS])
    return problem, fitting.search_all(problem, 6, seed=0)


def test_every_searcher_has_as_many_evaluations_and_its_plans_are_listed(found):
    problem, searched = found
    table = fitting.measured_plans(searched)
    assert list(searched) == ["random", "greedy", "exact", "evolution"] and problem.found == [] and problem.spent == 0
    assert table.groupby("searcher").evaluations.max().max() <= 6
    assert (table.total_bytes <= 140).all()
    for _, rows in table.groupby("searcher"):
        assert rows.best.tolist() == rows.cost.cummin().tolist()
    exact = table[table.searcher == "exact"].iloc[0]
    assert (exact["plan"], exact.predicted, exact.cost, exact.dropped) == ("4 4", 3.0, 7.0, 0)
    greedy = table[table.searcher == "greedy"]
    assert greedy.cost.min() == 5.0 and greedy["plan"][greedy.cost.idxmin()] == "16 0", "a swap past what adds up"


def test_the_best_few_of_every_searcher_are_chosen_among_each_once(found):
    assert fitting.candidates(found[1], each=1) == [(FULL, DROP), (4, 4)]
    assert fitting.candidates(found[1], each=3) == [(FULL, DROP), (4, 4), (DROP, FULL)]


def test_the_uniform_plan_has_one_width_for_all_blocks_and_the_cheapest_that_fits_beside_them():
    sites = ("tower", "block 0", "block 1", "table")
    space = Space(sites, ({8: 10, FULL: 20}, {4: 10, FULL: 40}, {DROP: 0, 4: 10, FULL: 40}, {4: 5, 8: 10, FULL: 20}), 0)
    costs = [{8: 1.0, FULL: 0.0}, *COSTS, {4: 3.0, 8: 2.5, FULL: 0.0}]
    assert fitting.best_uniform(Problem(space, 50, costs, None)) == (8, 4, 4, FULL)
    assert fitting.best_uniform(Problem(space, 49, costs, None)) == (FULL, 4, 4, 4), "3.0 more nats where 8 bits cost 3.5"
    assert fitting.best_uniform(Problem(space, 34, costs, None)) is None, "what fits drops a block"


def test_awq_is_calibrated_on_images_that_no_plan_is_measured_on_while_there_are_others():
    records = [Record(f"{i}", f"{i}.png", "melanoma" if i % 2 else "rosacea") for i in range(20)]
    measured, chosen = fitting.two_samples(records, 4, 4, 0)
    drawn = [r.key for r in fitting.calibrated_on(records, measured + chosen, 8, 0)]
    assert len(set(drawn)) == 8 and not set(drawn) & {r.key for r in measured + chosen}
    few = [r.key for r in fitting.calibrated_on(records[:10], records[:8], 8, 0)]
    assert set(few[:2]) == {"8", "9"} and few[2:] == [str(i) for i in range(6)]
    assert fitting.calibrated_on(records[:4], records[:4], 8, 0) == records[:4]


def test_other_budgets_have_their_plans(found):
    table = fitting.budget_table(found[0])
    assert len(table) == len(fitting.BUDGETS) and table.total_bytes.max() <= 2 * 140
    row = table[table.budget_bytes == 140].iloc[0]
    assert (row.blocks, row.predicted) == ("4 4", 3.0)
    assert table.blocks.iloc[0] == "nothing fits" and pd.isna(table.predicted.iloc[0])
    assert table.predicted.dropna().is_monotonic_decreasing


@pytest.mark.parametrize("asked,drawn", [((5, 5), (3, 3)), ((2, 4), (2, 4)), ((1, 20), (1, 6)), ((20, 1), (6, 1))])
def test_images_to_measure_on_and_to_choose_on_are_others(asked, drawn):
    records = [Record(str(i), f"{i}.png", "rosacea") for i in range(7)]
    one, other = fitting.two_samples(records, *asked, seed=0)
    assert (len(one), len(other)) == drawn and not {r.key for r in one} & {r.key for r in other}
    with pytest.raises(ValueError, match="1 images cannot measure plans and choose"):
        fitting.two_samples(records[:1], *asked, seed=0)


def test_a_plan_may_cost_what_it_costs_the_group_that_fares_worst():
    class Rows:
        def rows(self, plans, share):
            return np.array([[1.0, 3.0, 8.0, 0.0], [3.0, 3.0, 0.0, 2.0]])[:, : round(4 * share)]

    measure = fitting.by_worst(Rows(), ["a", "a", "b", "b"])
    assert measure(["one", "other"]) == [4.0, 3.0]
    assert measure(["one", "other"], 0.5) == [2.0, 3.0], "of the groups that a share of the rows shows"


def test_figures_show_what_was_measured(found):
    problem, searched = found
    table = fitting.measured_plans(searched)
    ax = figure_progress(table).axes[0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(searched) and "evaluations" in ax.get_xlabel()
    points = figure_additivity(table).axes[0].collections[0].get_offsets()
    assert sorted(map(tuple, points)) == sorted(zip(*table.drop_duplicates("plan")[["predicted", "cost"]].to_numpy().T, strict=True))
    mesh = figure_choices(choice_shares(SPACE, [COSTS], 150)).axes[0]
    assert mesh.collections[0].get_array().reshape(3, 2).tolist() == [[0, 0], [1, 0], [0, 1]]
    assert [t.get_text() for t in mesh.get_yticklabels()] == ["dropped", "4 bits", "16 bits"]


def test_the_slider_stops_at_every_budget(found):
    table = fitting.budget_table(found[0])
    slider = budget_slider(table)
    stops = slider.data.split("<div")[2:]
    shown = [number for number, stop in enumerate(stops) if not stop.startswith(" hidden>")]
    assert len(stops) == len(table) and shown == [len(table) // 2]
    assert f'max="{len(table) - 1}" value="{len(table) // 2}"' in slider.data and f"{140 / 2**20:.1f}" in stops[4]


def test_a_moved_slider_shows_its_budget_alone(found, tmp_path, opened):
    page = tmp_path / "slider.html"
    move = """<script>const slider = document.querySelector("input"); slider.value = 4;
      slider.dispatchEvent(new Event("input"));
      const shown = [...document.querySelectorAll("table")].map(table => table.getClientRects().length);
      document.body.textContent = JSON.stringify(shown)</script>"""
    page.write_text(budget_slider(table := fitting.budget_table(found[0])).data + move, encoding="utf-8")
    assert json.loads(re.search(r"<body>(\[.*\])", opened(page))[1]) == [int(n == 4) for n in range(len(table))]
