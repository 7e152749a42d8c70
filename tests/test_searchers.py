"""Plans within a budget: the exact solver against brute force, and searchers that never go over and repeat themselves."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medprune.searching import searchers
from medprune.searching.budget import DROP, FULL, Space
from medprune.searching.searchers import SEARCHERS, Front, Problem, choice_shares, search

CHOICES = (DROP, 3, 4, 8, FULL)


@st.composite
def instances(draw, most_sites=5):
    """Return a space with rising bytes and any costs, and a budget that some plan fits."""
    prices, costs = [], []
    for _ in range(draw(st.integers(1, most_sites))):
        choices = sorted(draw(st.sets(st.sampled_from(CHOICES[:-1]), min_size=1, max_size=4)) | {FULL})
        sizes = sorted(draw(st.lists(st.integers(0, 40), min_size=len(choices), max_size=len(choices), unique=True)))
        prices.append(dict(zip(choices, sizes, strict=True)))
        costs.append({c: draw(st.integers(0, 30)) / 8 for c in choices})  # ties, and sums without rounding
    space = Space(tuple(f"block {i}" for i in range(len(prices))), tuple(prices), draw(st.integers(0, 9)))
    least = space.fixed_bytes + sum(min(p.values()) for p in prices)
    most = space.fixed_bytes + sum(max(p.values()) for p in prices)
    return space, costs, draw(st.integers(least, most + 3))


def additive(space, costs):
    return lambda plan: sum(cost[choice] for cost, choice in zip(costs, plan, strict=True))


def brute_force(space, costs, budget):
    plans = [p for p in itertools.product(*space.prices) if space.bytes_of(p) <= budget]
    return min(map(additive(space, costs), plans))


@settings(max_examples=150, deadline=None)
@given(instances())
def test_the_exact_optimum_is_brute_force_s_for_every_budget(instance):
    space, costs, budget = instance
    front, cut = Front(space, costs), Front(space, costs, budget)
    assert (np.diff(front.bytes) > 0).all() and (np.diff(front.costs) < 0).all()
    for some in {budget, int(front.bytes[0]), int(front.bytes[-1])}:
        plan = front.plan(some)
        assert space.bytes_of(plan) <= some and additive(space, costs)(plan) == brute_force(space, costs, some)
    assert front.plan(int(front.bytes[0]) - 1) is None
    assert additive(space, costs)(cut.plan(budget)) == brute_force(space, costs, budget)


def problem_of(space, costs, budget, seed=0):
    """Return a problem whose true costs are the single ones and what pairs of neighbours add or take."""
    rng = random.Random(seed)
    pairs = {key: rng.uniform(-2, 2) for key in itertools.product(range(len(space.sites)), CHOICES, CHOICES)}

    def measure(plans, share):
        couple = lambda p: sum(pairs[i, a, b] for i, (a, b) in enumerate(itertools.pairwise(p)))  # noqa: E731
        return [additive(space, costs)(p) + couple(p) for p in plans]

    return Problem(space, budget, costs, measure)


@pytest.mark.parametrize("name", SEARCHERS)
@settings(max_examples=40, deadline=None)
@given(instances(), st.integers(1, 40), st.integers(0, 3))
def test_no_searcher_measures_a_plan_over_budget_or_more_than_it_may(name, instance, evaluations, seed):
    problem = problem_of(*instance, seed)
    plan, cost = search(name, problem, evaluations, seed)
    assert problem.spent <= evaluations
    assert all(problem.space.bytes_of(p) <= problem.budget for _, p, _ in problem.found)
    assert cost == min(c for _, _, c in problem.found) and (problem.space.bytes_of(plan) <= problem.budget)
    again = problem_of(*instance, seed)
    assert search(name, again, evaluations, seed) == (plan, cost) and again.found == problem.found


def twelve_blocks(seed=5):
    """Return a problem of twelve blocks at about four bits, in which neighbours count."""
    rng = random.Random(seed)
    price = {DROP: 0, 3: 33, 4: 43, 8: 84, FULL: 160}
    space = Space(tuple(f"block {i}" for i in range(12)), (price,) * 12, 100)
    costs = [{c: weight * 4.0**-c for c in (3, 4, 8)} | {DROP: weight, FULL: 0.0} for weight in (rng.uniform(1, 60) for _ in range(12))]
    return problem_of(space, costs, 100 + 12 * 40, seed)


def test_evolution_begins_at_the_additive_optimum_and_improves_on_it():
    exact, evolved, drawn = twelve_blocks(), twelve_blocks(), twelve_blocks()
    search("exact", exact, 1)
    search("evolution", evolved, 200)
    search("random", drawn, 200)
    assert evolved.found[0][1] == exact.found[0][1]
    assert evolved.best()[1] < exact.best()[1] and evolved.best()[1] < drawn.best()[1]
    assert evolved.best()[1] < -3, "a generation's best is the next one's parent: the first one's children come to 0.7"


def test_evolution_measures_all_offspring_on_few_rows_and_half_of_them_on_all():
    problem, asked = twelve_blocks(), []
    plain = problem.measure_plans
    problem.measure_plans = lambda plans, share: asked.append((len(plans), share)) or plain(plans, share)
    search("evolution", problem, 1 + 2 * (searchers.OFFSPRING * searchers.FEW + searchers.OFFSPRING // 2))
    few = (searchers.OFFSPRING, searchers.FEW)
    assert asked == [(1, 1.0), few, (searchers.OFFSPRING // 2, 1.0), few, (searchers.OFFSPRING // 2, 1.0)]


def test_greedy_goes_down_by_cost_a_byte():
    price = {4: 1, FULL: 4}
    space = Space(("block 0", "block 1", "block 2"), (price, price, {4: 1, FULL: 9}), 0)
    costs = [{4: 2.0, FULL: 0.0}, {4: 1.0, FULL: 0.0}, {4: 2.0, FULL: 0.0}]  # the last saves 8 bytes for its 2.0
    problem = Problem(space, 9, costs, lambda plans, share: [0.0] * len(plans))
    search("greedy", problem, 1)
    assert problem.found[0][1] == (FULL, FULL, 4)


def test_a_budget_that_holds_no_plan_and_a_search_of_nothing_are_refused():
    space = Space(("block 0",), ({4: 2**20, FULL: 2**22},), 2**20)
    with pytest.raises(ValueError, match="a budget of 1.0 MiB holds no plan: the least takes 2.0 MiB"):
        Problem(space, 2**20, [{4: 1.0, FULL: 0.0}], lambda plans, share: [])
    problem = Problem(space, 2**21, [{4: 1.0, FULL: 0.0}], lambda plans, share: [0.0] * len(plans))
    with pytest.raises(ValueError, match="evaluations must be 1 or more, not 0"):
        search("exact", problem, 0)
    with pytest.raises(ValueError, match="over 2097152"):
        problem.measure([(FULL,)])


def test_a_plan_for_each_budget_or_none():
    space = Space(("block 0", "block 1"), ({4: 1, FULL: 4},) * 2, 0)
    first = [{4: 1.0, FULL: 0.0}, {4: 2.0, FULL: 0.0}]
    assert searchers.budget_plans(space, first, [1, 2, 5, 8]) == {1: None, 2: (4, 4), 5: (4, FULL), 8: (FULL, FULL)}


def test_shares_of_choices_over_resampled_costs():
    space = Space(("block 0", "block 1"), ({4: 1, FULL: 4},) * 2, 0)
    first, second = [{4: 1.0, FULL: 0.0}, {4: 2.0, FULL: 0.0}], [{4: 2.0, FULL: 0.0}, {4: 1.0, FULL: 0.0}]
    shares = choice_shares(space, [first, first, first, second], 5)
    assert list(shares.columns) == [4, FULL] and shares.to_numpy().tolist() == [[0.75, 0.25], [0.25, 0.75]]
    nearly = choice_shares(space, [first] * 36 + [second] * 4, 5)
    assert nearly[4]["block 0"] == 0.9, "36 of 40 are not over 90%"
