"""From a model and images to the best plan that fits: what notebook 07 and `medprune fit` share."""

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from medprune.answers import decoding
from medprune.data.questions import load_conditions, load_questions, test_questions
from medprune.data.records import Record, load_images, sample_balanced
from medprune.device import choose_device, choose_dtype
from medprune.models import loading
from medprune.models.assembled import base_card
from medprune.models.sizes import base_config, named_config
from medprune.pruning.leave_one_out import teacher_batches
from medprune.quantizing.quantize import MIN_CALIBRATION_ROWS, quantization_batch
from medprune.searching.budget import DROP, FULL, Plan, Space, check_budget, plan_rows, space_of
from medprune.searching.costs import Costs, cost_tables, resampled
from medprune.searching.levels import Levels
from medprune.searching.searchers import SEARCHERS, Problem, budget_plans, search
from medprune.settings import BITS, Config
from medprune.store import Units, check_new, content, context, write_csv

ROWS_AT_ONCE = 6  # answers of a batch: two images' worth
ANSWER_TOKENS = 64  # of the original's answers, at most, in `fit`
DRAWS = 40  # resamples of the calibration images
BUDGETS = (0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0)  # of the table, as multiples of the one asked for


def two_samples(records: list[Record], n: int, m: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Return n images to measure plans on and m others to choose among plans on; of few, in these shares."""
    if len(records) < 2:
        raise ValueError(f"{len(records)} images cannot measure plans and choose among them: give 2 at least.")
    n, m = (max(1, min(k, len(records) * k // (n + m))) for k in (n, m))
    both = sample_balanced(records, n + m, seed)
    return both[:n], both[n:]


def calibrated_on(records: list[Record], others: list[Record], n: int, seed: int) -> list[Record]:
    """Return n images for AWQ's calibration, or all there are: of few, those of `others` last."""
    taken = {record.key for record in others}
    own = [record for record in records if record.key not in taken]
    drawn = sample_balanced(own, min(n, len(own)), seed) if own else []
    return (drawn + others)[:n]


def own_answers(source, records, conditions: dict, units_of, config, bits: int = 16) -> tuple[list[dict], list[str]]:
    """Return the questions about some images and what the model in `source`, held in `bits`, answers to them.

    units_of(context) gives the units that keep the answers. config: max_new_tokens and batch_rows.
    """
    rows = test_questions(records, conditions, load_questions())
    units = units_of(decoding.answers_context(f"{content(source)} in {bits} bits", rows, config.max_new_tokens))
    model = processor = None
    if any(f"original {row['id']}" not in units for row in rows):
        model, processor = loading.load(source, bits=bits)
    said = decoding.answer_rows(model, processor, rows, "original", units, config)
    return rows, [row["answer"] for row in said]


def measuring(levels: Levels, space: Space, rows: list[dict], answers: list[str], units_of) -> Costs:
    """Return what measures plans on these answers."""
    batches = teacher_batches(levels.processor, rows, answers, levels.model.dtype, ROWS_AT_ONCE)
    asked = [(row["asked"], answer) for row, answer in zip(rows, answers, strict=True)]
    mark = context("medprune.searching.costs", levels.context(), asked)
    return Costs(levels, space, batches, units_of(mark))


def problem_of(costs: Costs, budget: int, images: list[str], seed: int) -> Problem:
    """Return the problem that the searchers solve, its single choices measured; images: of each row."""
    check_budget(costs.space, budget)
    single, found = costs.single()
    tables = [cost_tables(costs.space, single, drawn) for drawn in resampled(found, images, DRAWS, seed)]
    return Problem(costs.space, budget, cost_tables(costs.space, single, found), costs.measure, tables)


def search_all(problem: Problem, evaluations: int, seed: int) -> dict[str, Problem]:
    """Search by every searcher with as many evaluations; return each one's problem, which holds what it found."""
    found = {}
    for name in SEARCHERS:
        found[name] = Problem(problem.space, problem.budget, problem.costs, problem.measure_plans, problem.tables)
        search(name, found[name], evaluations, seed)
    return found


def by_worst(costs: Costs, groups: list[str]):
    """Return what measures plans, as `Costs.measure` does, by the mean cost of whichever group fares worst.

    groups: of each row, such as its image's condition.
    """
    names = np.asarray(groups)

    def measure(plans: list[Plan], share: float = 1.0) -> list[float]:
        rows = costs.rows(plans, share)
        seen = names[: rows.shape[1]]
        return np.max([rows[:, seen == name].mean(1) for name in np.unique(seen)], axis=0).tolist()

    return measure


def measured_plans(found: dict[str, Problem]) -> pd.DataFrame:
    """Return every plan that was measured, in order; best: the least cost so far, predicted: the single costs' sum."""
    rows = []
    for name, problem in found.items():
        best = np.inf
        for spent, plan, cost in problem.found:
            best, taken = min(best, cost), problem.space.bytes_of(plan)
            row = {"searcher": name, "evaluations": spent, "cost": cost, "best": best}
            dropped = problem.space.blocks_of(plan).count(DROP)
            row |= {"predicted": problem.predicted(plan), "total_bytes": taken, "dropped": dropped}
            rows.append(row | {"plan": " ".join(map(str, plan))})
    return pd.DataFrame(rows)


def candidates(found: dict[str, Problem], each: int = 2) -> list[Plan]:
    """Return the best few plans of every searcher, each once, by their cost."""
    costs = {}
    for problem in found.values():
        ranked = sorted({plan: cost for _, plan, cost in problem.found}.items(), key=lambda item: item[1])
        costs |= dict(ranked[:each])
    return sorted(costs, key=costs.get)


def best_uniform(problem: Problem) -> Plan | None:
    """Return the plan of the least predicted cost that fits, drops no block and stores all blocks in one width.

    What mixing widths gains is measured against it; None where no such plan fits.
    """
    sites, prices = problem.space.sites, problem.space.prices
    in_block = [site.startswith("block") for site in sites]
    blocks, others = ([set(p) for p, i in zip(prices, in_block, strict=True) if i == of] for of in (True, False))
    plans = []
    for bits, *beside in product(set.intersection(*blocks) - {DROP}, *others):
        left = iter(beside)
        plans.append(tuple(bits if inside else next(left) for inside in in_block))
    return min(filter(problem.fits, plans), key=problem.predicted, default=None)


def budget_table(problem: Problem) -> pd.DataFrame:
    """Return the additive optimum for budgets around the one asked for, with its predicted cost in nats a token."""
    budgets = [int(problem.budget * share) for share in BUDGETS]
    plans = budget_plans(problem.space, problem.costs, budgets)
    predicted = [problem.predicted(plan) if plan else np.nan for plan in plans.values()]
    table = plan_rows(problem.space, plans)
    table.insert(2, "predicted", predicted)
    return table


def fit(
    source,
    out,
    budget: int,
    images,
    facts=None,
    tokens=840,
    n_images=8,
    evaluations=40,
    group_size=64,
    seed=0,
    say=print,
) -> Plan:
    """Search the best plan of the model in `source` within a budget in bytes, and write it, packed, to `out`.

    images: folder or table that plans are measured on. tokens: of the KV cache. What was measured stays in OUT.search
    until the model is written, so that a killed search goes on; the plans are listed in OUT.csv. Raises ValueError for
    what cannot be done, before the model is loaded.
    """
    out, conditions = check_new(out), load_conditions(facts)
    space = space_of(base_config(source) or named_config(source), tokens, group_size=group_size)
    check_budget(space, budget)
    if (whole := space.bytes_of(space.uniform(FULL))) <= budget:
        mib = 2**20
        raise ValueError(
            f"{source} takes {whole / mib:.1f} MiB as it is, in 16 bits, which {budget / mib:.1f} MiB hold: there is "
            "nothing to search; name a smaller --card."
        )
    records = load_images(images, conditions)[0]
    if len(records) < MIN_CALIBRATION_ROWS:
        raise ValueError(f"{images} holds {len(records)} images; awq needs at least {MIN_CALIBRATION_ROWS}.")
    work = out.with_name(f"{out.name}.search")
    config = Config({"max_new_tokens": ANSWER_TOKENS, "batch_rows": 32}, "medprune fit")
    units_of = lambda mark: Units(work / "units.sqlite", mark)  # noqa: E731
    measured_on, chosen_on = two_samples(records, n_images, n_images, seed)
    rows, said = own_answers(source, measured_on, conditions, units_of, config)
    other, told = own_answers(source, chosen_on, conditions, units_of, config)
    processor = loading.load_processor(source)
    drawn = calibrated_on(records, measured_on + chosen_on, max(2 * n_images, MIN_CALIBRATION_ROWS), seed)
    dtype = choose_dtype(choose_device())
    batch = quantization_batch(processor, drawn, conditions, load_questions(), dtype, seed)
    levels = Levels(Path(source), work / "levels", BITS, group_size, batch)
    problem = problem_of(measuring(levels, space, rows, said, units_of), budget, [r["key"] for r in rows], seed)
    found = search_all(problem, evaluations, seed)
    plans = candidates(found)
    costs = measuring(levels, space, other, told, units_of).measure(plans)
    best = plans[int(np.argmin(costs))]
    write_csv(out.with_name(f"{out.name}.csv"), measured_plans(found))
    card = base_card(source)
    levels.save(space, best, out, context(__name__, best), base=card["name"], licence=card["licence"])
    levels.forget()
    (work / "units.sqlite").unlink()
    work.rmdir()
    say(plan_rows(space, {budget: best}).T.to_string(header=False))
    said = f"{min(costs):.4f} nats a token from the original, the least of {len(plans)} plans, on {len(other)} answers"
    say(f"{said} that the search did not measure plans on")
    return best
