"""Four ways to a plan within a budget: random draws, greedy swaps, additive costs solved exactly, evolution.

All have one interface, search(problem, evaluations, seed): `problem.measure(plans, share)` returns the true cost of
each plan on a share of the calibration rows, and counts what that takes in evaluations, one for a plan on all rows; a
search ends when its evaluations are spent. Costs are lower-is-better; plans never take more bytes than the budget.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from medprune.models.sizes import named_config
from medprune.searching.budget import Plan, Space, check_budget, plan_rows, space_of, uniform_costs

FEW = 0.375  # share of the rows that evolution's first round sees
OFFSPRING = 8  # of a generation: half of these go on to all rows


@dataclass
class Problem:
    """A space, a budget in bytes, single-choice costs, and what measures plans.

    costs: {choice: cost} of each site, when all other sites have 16 bits. tables: such costs on resampled calibration
    images. measure_plans(plans, share) -> costs. found: every plan measured on all rows, as (evaluations spent until
    then, plan, cost).
    """

    space: Space
    budget: int
    costs: list[dict[int, float]]
    measure_plans: Callable[[list[Plan], float], list[float]]
    tables: list[list[dict[int, float]]] = field(default_factory=list)
    spent: float = 0.0
    found: list[tuple[float, Plan, float]] = field(default_factory=list)

    def __post_init__(self):
        check_budget(self.space, self.budget)

    def fits(self, plan: Plan) -> bool:
        return self.space.bytes_of(plan) <= self.budget

    def measure(self, plans: list[Plan], share: float = 1.0) -> list[float]:
        """Return the plans' costs, which are spent even where they are known; ValueError for a plan over budget."""
        for plan in plans:
            if not self.fits(plan):
                raise ValueError(f"plan {plan} takes {self.space.bytes_of(plan)} bytes, over {self.budget}.")
        costs = self.measure_plans(plans, share)
        for plan, cost in zip(plans, costs, strict=True):
            self.spent += share
            if share == 1.0:
                self.found.append((self.spent, plan, cost))
        return costs

    def best(self) -> tuple[Plan, float]:
        """Return the plan of the least cost among those measured on all rows, the first of equal ones."""
        _, plan, cost = min(self.found, key=lambda seen: seen[2])
        return plan, cost

    def predicted(self, plan: Plan) -> float:
        """Return the sum of a plan's single-choice costs."""
        return sum(cost[choice] for cost, choice in zip(self.costs, plan, strict=True))


# ---- the exact solution of additive costs
class Front:
    """The least additive cost for every number of bytes: dynamic programming over the sites, exact in integers.

    bytes (n,) rising and costs (n,) falling are those of the plans that no other plan beats in both.
    """

    def __init__(self, space: Space, costs: list[dict[int, float]], most: int | None = None):
        """most: bytes beyond which no plan is wanted."""
        self.choices = [list(price) for price in space.prices]
        least_left = np.cumsum([0, *(min(price.values()) for price in reversed(space.prices))])[::-1]
        sums, totals, self.steps = np.array([space.fixed_bytes]), np.zeros(1), []
        for number, (price, cost) in enumerate(zip(space.prices, costs, strict=True)):
            taken = (sums[:, None] + [price[c] for c in self.choices[number]]).ravel()
            total = (totals[:, None] + [cost[c] for c in self.choices[number]]).ravel()
            order = np.lexsort((total, taken))
            if most is not None:
                order = order[taken[order] <= most - least_left[number + 1]]
            before = np.minimum.accumulate(total[order])
            kept = order[np.append(True, total[order][1:] < before[:-1])] if len(order) else order
            sums, totals = taken[kept], total[kept]
            self.steps.append(np.divmod(kept, len(price)))  # which state it came from, by which choice
        self.bytes, self.costs = sums, totals

    def plan(self, budget: int) -> Plan | None:
        """Return the plan of the least cost within a budget, None where none fits."""
        at = int(np.searchsorted(self.bytes, budget, side="right")) - 1
        if at < 0:
            return None
        plan = []
        for (came_from, choice), choices in zip(reversed(self.steps), reversed(self.choices), strict=True):
            plan.append(choices[choice[at]])
            at = came_from[at]
        return tuple(reversed(plan))


def exact(problem: Problem, evaluations: int, seed: int = 0) -> None:
    """Measure the additive optimum, then those of the costs on resampled calibration images, each plan once."""
    seen = set()
    for costs in [problem.costs, *problem.tables]:
        plan = Front(problem.space, costs, problem.budget).plan(problem.budget)
        if problem.spent + 1 > evaluations:
            return
        if plan not in seen:
            seen.add(plan)
            problem.measure([plan])


# ---- moves from plan to plan
def _ladder(space: Space, plan: Plan, step: int) -> list[tuple[int, int]]:
    """Return (site, the next choice up, for step 1, or down, for -1) of every site that has one."""
    found = []
    for site, (price, choice) in enumerate(zip(space.prices, plan, strict=True)):
        levels = list(price)
        to = levels.index(choice) + step
        if 0 <= to < len(levels):
            found.append((site, levels[to]))
    return found


def _with(plan: Plan, site: int, choice: int) -> Plan:
    return (*plan[:site], choice, *plan[site + 1 :])


def within(problem: Problem, plan: Plan, rng: random.Random) -> Plan:
    """Lower sites at random, a level each, until the plan fits; then raise sites at random while it does."""
    while not problem.fits(plan):
        plan = _with(plan, *rng.choice(_ladder(problem.space, plan, -1)))
    while higher := [p for p in (_with(plan, *up) for up in _ladder(problem.space, plan, 1)) if problem.fits(p)]:
        plan = rng.choice(higher)
    return plan


def random_draws(problem: Problem, evaluations: int, seed: int = 0) -> None:
    """Measure plans drawn at random: any choices, brought within the budget and filled up to it."""
    rng = random.Random(seed)
    while problem.spent + 1 <= evaluations:
        drawn = tuple(rng.choice(list(price)) for price in problem.space.prices)
        problem.measure([within(problem, drawn, rng)])


def greedy(problem: Problem, evaluations: int, seed: int = 0) -> None:
    """Lower, a level at a time, what costs least for a byte saved until the plan fits; then swap while that helps.

    The descent goes by single-choice costs. A swap lowers one site and raises others as the bytes allow, in the order
    of predicted gains; each is measured, and kept where the true cost falls.
    """
    space, plan = problem.space, tuple(max(price) for price in problem.space.prices)
    while not problem.fits(plan):
        plan = min((_with(plan, *down) for down in _ladder(space, plan, -1)), key=lambda p: _price(problem, plan, p))
    best, cost, tried = plan, problem.measure([plan])[0], {plan}
    while problem.spent + 1 <= evaluations:
        new = [p for p in _swaps(problem, best) if p not in tried]
        if not new:
            return
        plan = min(new, key=problem.predicted)
        tried.add(plan)
        if (found := problem.measure([plan])[0]) < cost:
            best, cost = plan, found


def _price(problem: Problem, before: Plan, after: Plan) -> float:
    """Return the predicted cost of a byte saved."""
    saved = problem.space.bytes_of(before) - problem.space.bytes_of(after)
    return (problem.predicted(after) - problem.predicted(before)) / saved


def _swaps(problem: Problem, plan: Plan):
    """Yield the plans in which one site is a level higher and at most one other a level lower, and that fit."""
    for site, choice in _ladder(problem.space, plan, 1):
        raised = _with(plan, site, choice)
        if problem.fits(raised):
            yield raised
        for other, lower in _ladder(problem.space, plan, -1):
            if other != site and problem.fits(swapped := _with(raised, other, lower)):
                yield swapped


def evolution(problem: Problem, evaluations: int, seed: int = 0) -> None:
    """Evolve one plan by level switching (EvoPress, Sieberling et al., ICML 2025), from the additive optimum.

    A generation's offspring each switch one to three sites up and are brought within the budget again; all are measured
    on few rows, half of them on all rows, and the best becomes the parent where it is better.
    """
    rng, start = random.Random(seed), Front(problem.space, problem.costs, problem.budget).plan(problem.budget)
    parent, cost, tried = start, problem.measure([start])[0], {start}
    step = OFFSPRING * FEW + OFFSPRING // 2
    while problem.spent + step <= evaluations:
        children = _offspring(problem, parent, tried, rng)
        if not children:
            return
        few = problem.measure(children, FEW)
        ranked = [child for _, child in sorted(zip(few, children, strict=True), key=lambda pair: pair[0])]
        survivors = ranked[: OFFSPRING // 2]
        tried.update(children)
        found = problem.measure(survivors)
        if min(found) < cost:
            cost = min(found)
            parent = survivors[found.index(cost)]


def _offspring(problem: Problem, parent: Plan, tried: set[Plan], rng: random.Random) -> list[Plan]:
    """Return up to OFFSPRING plans that were not tried, in the order of their sites, so that prefixes are shared."""
    found: set[Plan] = set()
    for _ in range(20 * OFFSPRING):
        child = parent
        for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
            if up := _ladder(problem.space, child, 1):
                child = _with(child, *rng.choice(up))
            if down := _ladder(problem.space, child, -1):
                child = _with(child, *rng.choice(down))
        child = within(problem, child, rng)
        if child not in tried:
            found.add(child)
        if len(found) == OFFSPRING:
            break
    return sorted(found)


SEARCHERS = {"random": random_draws, "greedy": greedy, "exact": exact, "evolution": evolution}


def search(name: str, problem: Problem, evaluations: int, seed: int = 0) -> tuple[Plan, float]:
    """Search by one of SEARCHERS for at most `evaluations` (at least 1), and return the best plan and its cost."""
    if evaluations < 1:
        raise ValueError(f"evaluations must be 1 or more, not {evaluations}.")
    SEARCHERS[name](problem, evaluations, seed)
    return problem.best()


def budget_plans(space: Space, costs: list[dict[int, float]], budgets: list[int]) -> dict[int, Plan | None]:
    """Return the additive optimum for each budget in bytes, None where nothing fits."""
    front = Front(space, costs, max(budgets))
    return {budget: front.plan(budget) for budget in budgets}


def choice_shares(space: Space, tables: list[list[dict[int, float]]], budget: int) -> pd.DataFrame:
    """Return in what share of cost tables the additive optimum makes each choice: sites as rows, choices as columns."""
    choices = sorted({choice for price in space.prices for choice in price})
    shares = pd.DataFrame(0.0, index=space.sites, columns=choices)
    for costs in tables:
        for site, choice in zip(space.sites, Front(space, costs, budget).plan(budget), strict=True):
            shares.loc[site, choice] += 1
    return shares / len(tables)


def uniform_table(model, budgets: list[int], context: int, group_size: int = 64) -> pd.DataFrame:
    """Return a plan for each budget under uniform costs, from the configuration alone: what a card can hold.

    model: as `sizes.named_config` takes it. context: tokens in the KV cache.
    """
    space = space_of(named_config(model), context, group_size=group_size)
    return plan_rows(space, budget_plans(space, uniform_costs(space), budgets))
