"""Tables beside the paper's: scores, plans of bytes, the blocks' scores with intervals, the knee of a sweep."""

import json
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from medprune.data.questions import named_conditions
from medprune.judging.asserted import spoken
from medprune.models.sizes import GIB, NAMED_SHAPES, account, checkpoints, named_config, packable, shape_of
from medprune.pruning.ranking import knee
from medprune.results import groups, stats
from medprune.settings import DATA

PAPER_TABLES = DATA / "paper_tables.json"
TOLERANCE = 5.0  # points of judge score that "no worse than the unpruned model" allows for

# How a plan's model is stored unless it says otherwise: arguments of `account`, as are quantize_head and _vision.
STORAGE = {"bits": 16, "group_size": 64, "method": "rtn", "context": 840, "batch": 1}


def plan_table(model, removes: Sequence[int], storage: dict = STORAGE, bandwidth: float = 320) -> pd.DataFrame:
    """Return one row for each number of `removes`: parameters, bytes by part, and the floor in ms a token.

    model: a name, a folder or a config.json. storage: arguments of `account` that differ from STORAGE; `bits` may be
    a list of one for each block, which fits the one count of `removes` that leaves as many. bandwidth is in GB/s (320:
    a T4). `paper_params_b` is the paper's table 1, NaN where it has no such row or `model` is another one. Raises
    ValueError as `account` does.
    """
    config = named_config(model)
    paper = _paper_params_b(config)
    rows = []
    for removed in removes:
        a = account(config, removed, **STORAGE | storage)
        rows.append(
            {"blocks_removed": removed, "blocks_kept": shape_of(config).blocks - removed}
            | {"params": a.total_params, "params_b": a.params_b, "paper_params_b": paper.get(removed, math.nan)}
            | {f"{part}_bytes": n for part, n in a.part_bytes.items()}
            | {"kv_cache_bytes": a.kv_cache_bytes, "total_bytes": a.total_bytes, "total_gib": a.total_bytes / GIB}
            | {"floor_ms_per_token": a.floor_ms_per_token(bandwidth)}
        )
    return pd.DataFrame(rows)


def fits_table(room_gib: float, storage: dict = STORAGE) -> pd.DataFrame:
    """Return one row for each model known by name: its size in 4 bits, and how many blocks must go to fit `room_gib`.

    Columns: model, blocks, params_b, gib (weights of blocks in 4 bits and the KV cache), packed_gib (an untied head and
    the vision tower in 4 bits too), table_gib (the embedding table, a tied head with it, in 4 bits as well), remove,
    packed_remove, table_remove (blocks to remove for each; NaN where no number will do).
    """
    rows = []
    for name in (*NAMED_SHAPES, *checkpoints()):
        config = named_config(name)
        shape = shape_of(config)
        row = {"model": name, "blocks": shape.blocks, "params_b": account(config).params_b}
        for prefix, packed, table in (("", False, False), ("packed_", True, False), ("table_", True, True)):
            how = STORAGE | storage | {"bits": 4, "quantize_vision": packed}
            if packable(shape.hidden, shape.vocab, how["group_size"]):
                how |= {"quantize_head": packed and not shape.tied, "quantize_embeddings": table}
            sizes = [account(config, n, **how).total_bytes / GIB for n in range(shape.blocks - len(shape.fixed))]
            fitting = [n for n, size in enumerate(sizes) if size <= room_gib]
            row |= {f"{prefix}gib": sizes[0], f"{prefix}remove": min(fitting, default=math.nan)}
        rows.append(row)
    ways = ("", "packed_", "table_")
    columns = ["model", "blocks", "params_b", *(f"{way}gib" for way in ways), *(f"{way}remove" for way in ways)]
    return pd.DataFrame(rows)[columns].sort_values("table_gib", ignore_index=True)


def fits_text(room_gib: float, storage: dict = STORAGE) -> str:
    """Return `fits_table` as a table in Markdown."""
    table = fits_table(room_gib, storage)
    head = ["model", "blocks", "B parameters", "blocks in 4 bits, GiB", "head and tower too", "and the table"]
    head += ["blocks to remove", "of the second", "of the third"]
    lines = [head, ["---"] * len(head)]
    for row in table.itertuples(index=False):
        removed = (row.remove, row.packed_remove, row.table_remove)
        removed = ["cannot" if math.isnan(n) else f"{n:.0f}" for n in removed]
        sizes = (row.params_b, row.gib, row.packed_gib, row.table_gib)
        lines.append([row.model, str(row.blocks), *(f"{x:.2f}" for x in sizes), *removed])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plan_notes(model) -> list[str]:
    """Return what a reader of the plan should know: which model the paper's table 4 really prints."""
    config = named_config(model)
    if not _paper_params_b(config):
        return []
    printed = paper_table(4).set_index("method")["params_b"]["prune"]
    left_b = [account(config, n).params_b for n in range(shape_of(config).blocks)]
    removed = next(n for n, b in enumerate(left_b) if round(b, 2) <= printed)
    # Table 2 calls the very model, with the same score, "5.6B": table 1's row of 20 %.
    claimed = paper_table(1).set_index("compression_pct")["blocks_removed"][20]
    return [
        f"The paper's {printed}B model (table 4) has {removed} blocks removed, not {claimed}: "
        f"{removed} leave {left_b[removed]:.3f}B parameters, {claimed} leave {left_b[claimed]:.3f}B."
    ]


def plan_text(model, removes: Sequence[int], storage: dict = STORAGE, bandwidth: float = 320) -> str:
    """Return `plan_table` for reading: a column for each number of blocks removed, bytes in GiB."""
    table, storage = plan_table(model, removes, storage, bandwidth), STORAGE | storage
    lines = {"parameters (B)": table["params_b"].map("{:.3f}".format)}
    if table["paper_params_b"].notna().any():
        lines["  the paper's table 1"] = table["paper_params_b"].map("{:.3f}".format).replace("nan", "")
    for column in [c for c in table if c.endswith("_bytes")]:
        label = column.removesuffix("_bytes").replace("_", " ")
        lines[f"{label} (GiB)"] = (table[column] / GIB).map("{:.3f}".format)
    lines["floor (ms/token)"] = table["floor_ms_per_token"].map("{:.1f}".format)
    shown = pd.DataFrame(lines).T.set_axis([f"{n} removed" for n in table["blocks_removed"]], axis=1)
    cache = f"KV cache of {storage['context']} tokens x {storage['batch']}"
    head = f"{model}: {_stored(storage)}; {cache}; floor at {bandwidth} GB/s"
    return "\n".join([head, "", shown.to_string(), "", *plan_notes(model)]).rstrip() + "\n"


def plan_json(model, removes: Sequence[int], storage: dict = STORAGE, bandwidth: float = 320) -> str:
    """Return `plan_table` as JSON: the settings, `rows` with the table's columns, and `notes`."""
    table = plan_table(model, removes, storage, bandwidth)
    plan = {"model": str(model), **STORAGE, **storage, "bandwidth_gb_s": bandwidth}
    plan["rows"] = json.loads(table.to_json(orient="records", double_precision=15))
    return json.dumps(plan | {"notes": plan_notes(model)}, indent=2)


def block_scores(criterion: str, scores, clusters=None, seed: int = 0) -> pd.DataFrame:
    """Return one row per block: criterion, block, importance_score, low, high, n_calibration, seed.

    scores: {block: score}, which has no interval (NaN), or a table (block, row, score), whose mean over rows gets a
    95% interval that knows rows of one image belong together (`stats.clustered_mean`: none where no image differs
    from another); clusters (rows,) names each row's image.
    """
    if isinstance(scores, dict):
        found = {block: {"mean": score, "n": 0} for block, score in sorted(scores.items())}
    else:
        by_block = scores.groupby("block")
        found = {b: stats.clustered_mean(part["score"], [clusters[i] for i in part["row"]]) for b, part in by_block}
    table = pd.DataFrame([{"criterion": criterion, "block": b, "seed": seed} | mean for b, mean in found.items()])
    table = table.rename(columns={"mean": "importance_score", "n": "n_calibration"})
    return table.reindex(columns=["criterion", "block", "importance_score", "low", "high", "n_calibration", "seed"])


def knee_table(answers: pd.DataFrame, tolerance: float = TOLERANCE, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return one row per count of blocks removed: score, diff, low, high, holds, knee (bool) and knee_frac.

    answers: blocks_removed (0 among them), id, cluster, score_percent of one criterion's sweep, ids answered at all
    counts. diff is the paired difference to the unpruned model in points; holds: its 95% interval, if it has one,
    stays above -tolerance, so that the loss is shown to be smaller; the unpruned model loses nothing. knee: where
    `knee` puts it; knee_frac: in what share of draws of whole images it falls there. Fewer than three counts have no
    knee: False, and NaN.
    """
    wide = answers.pivot(index=["id", "cluster"], columns="blocks_removed", values="score_percent").dropna()
    if 0 not in wide or wide.empty:
        raise ValueError(f"the sweep has blocks_removed {list(wide)} on {len(wide)} answers: 0 must be among them.")
    counts, clusters = list(wide), wide.index.get_level_values("cluster")
    found = [stats.paired_difference(wide[n], wide[0], clusters) for n in counts]
    table = pd.DataFrame(found).assign(blocks_removed=counts, score=list(wide.mean()), knee=False, knee_frac=math.nan)
    table["holds"] = (table["low"] > -tolerance) | (table["blocks_removed"] == 0)
    if len(counts) > 2:
        means = wide.groupby(level="cluster").mean().to_numpy()  # equally many questions per image
        picks = np.random.default_rng([seed, 13]).integers(len(means), size=(draws, len(means)))
        knees = [knee(counts, means[p].mean(0)) for p in picks]
        table["knee"] = [n == knee(counts, table["score"]) for n in counts]
        table["knee_frac"] = [np.mean(np.equal(knees, n)) for n in counts]
    return table[["blocks_removed", "score", "diff", "low", "high", "holds", "knee", "knee_frac"]]


def sweep_means(answers: pd.DataFrame) -> pd.DataFrame:
    """Return each question's mean score over all counts of removed blocks but 0, as `stats.compare` takes it.

    answers: criterion, blocks_removed, id, cluster, score_percent, and the judge and what was asked, if known; the
    draws of `random` share the criterion's name.
    """
    pruned = answers[answers["blocks_removed"] > 0].drop(columns="method", errors="ignore")
    pruned = pruned.rename(columns={"criterion": "method"})
    kept = ("run", "method", "id", "cluster", "condition", "judge", "judged_by", "asked")
    of_one_question = [c for c in kept if c in pruned]
    means = pruned.groupby(of_one_question, as_index=False, sort=False, dropna=False)
    return means["score_percent"].mean()


def among_random(answers: pd.DataFrame) -> pd.DataFrame:
    """Return where each criterion lies among random draws, as many blocks removed, on the same images.

    answers: as `sweep_means` takes them, with the draws' own methods, such as random-3-2. One row per criterion and
    blocks_removed: score, the draws' mean, low and high (their central 95%) and number, beaten (draws with a lower
    score) and p, of a random order doing at least as well: (1 + draws that do) / (1 + draws), one-sided (Davison and
    Hinkley 1997, 4.11). It is about orders, on these images and this model.
    """
    pruned = answers[answers["blocks_removed"] > 0]
    means = pruned.groupby(["criterion", "blocks_removed", "method"], sort=False)["score_percent"].mean().reset_index()
    rows = []
    for removed, part in means.groupby("blocks_removed"):
        drawn = part.loc[part["criterion"] == "random", "score_percent"].to_numpy()
        for row in part[part["criterion"] != "random"].itertuples():
            low, high = np.quantile(drawn, [0.025, 0.975]) if drawn.size else (math.nan, math.nan)
            found = {"criterion": row.criterion, "blocks_removed": removed, "score": row.score_percent}
            found |= {"random": drawn.mean() if drawn.size else math.nan, "low": low, "high": high, "draws": drawn.size}
            beaten = int((drawn < row.score_percent).sum())
            rows.append(found | {"beaten": beaten, "p": (1 + drawn.size - beaten) / (1 + drawn.size)})
    return pd.DataFrame(rows)


def paper_table(n: int | str) -> pd.DataFrame:
    """Return the paper's table n (1-5), of data/paper_tables.json, which states the units."""
    tables = json.loads(PAPER_TABLES.read_text("utf-8"))
    return pd.DataFrame(next(rows for key, rows in tables.items() if key.startswith(f"table{n}_")))


def beside_paper(ours: pd.DataFrame, table: str, on: str, columns: list[str]) -> pd.DataFrame:
    """Put the paper's columns, named paper_<column>, beside ours.

    Every row of either is there, NaN where the other has none. on is a key column of both, or "rank" to pair
    first with first. Rows are ordered by a numeric key; by a text key ours come first.
    """
    paper = paper_table(table)
    if on == "rank":
        ours, paper = (t.set_axis(range(1, len(t) + 1)).rename_axis("rank").reset_index() for t in (ours, paper))
    theirs = paper[[on]].join(paper[columns].add_prefix("paper_"))
    # A left join keeps our order, which merge's outer join would sort; the paper's other rows follow.
    rest = theirs[~theirs[on].isin(ours[on])]
    both = pd.concat([ours.merge(theirs, on=on, how="left"), rest], ignore_index=True)
    return both.sort_values(on, kind="stable", ignore_index=True) if is_numeric_dtype(ours[on]) else both


def pareto_front(sizes, scores) -> np.ndarray:
    """Return a mask (n,) of the points that no other beats: none is as small and as good, and better in one.

    sizes (n,): lower is better; scores (n,): higher is better. Points with NaN are never on the front.
    """
    sizes, scores = np.asarray(sizes, float), np.asarray(scores, float)
    as_good = (sizes[None] <= sizes[:, None]) & (scores[None] >= scores[:, None])
    better = (sizes[None] < sizes[:, None]) | (scores[None] > scores[:, None])
    return ~(as_good & better).any(axis=1) & np.isfinite(sizes) & np.isfinite(scores)


def confusion(rows: pd.DataFrame, conditions: dict, labels: list[str]) -> np.ndarray:
    """Count (true condition, condition named) over the questions for a name: (n, n + 1), last column: no one name."""
    counts = np.zeros((len(labels), len(labels) + 1), int)
    for row in rows[rows["kind"] == "name"].itertuples():
        named = named_conditions(spoken(str(row.answer)), conditions)
        one = len(named) == 1 and named[0] in labels
        counts[labels.index(row.condition), labels.index(named[0]) if one else len(labels)] += 1
    return counts


def naming_forms(answers: pd.DataFrame, closed: pd.DataFrame, conditions: dict) -> pd.DataFrame:
    """Return how often each method is right about what a picture shows, by the form of the question.

    answers: open answers (kind, condition, method, cluster, answer), of which those to the question for a name count,
    right as `groups.naming` has it; closed: rows of `answers.closed.choose_rows`. One row per form and method: asked,
    method, score (percent right) with `groups.share_right`'s limits, n, and chance, percent that guessing has right.
    """
    forms = {"open": groups.naming(answers, conditions)} | dict(list(closed.groupby("kind", sort=False)))
    chance, rows = {"choice": 100 / len(conditions), "yes or no": 50.0}, []
    for form, asked in forms.items():
        for method, scores in asked.groupby("method", sort=False):
            found = groups.share_right(scores)
            row = {"asked": form, "method": method, "score": found["mean"], "low": found["low"], "high": found["high"]}
            rows.append(row | {"n": found["n"], "chance": chance.get(form, math.nan)})
    return pd.DataFrame(rows)


def _paper_params_b(config) -> dict[int, float]:
    """Return the paper's billions of parameters by blocks removed; nothing if `config` is another model."""
    found = paper_table(1).set_index("blocks_removed")["params_b"].to_dict()
    return found if round(account(config).params_b, 3) == found[0] else {}


def _stored(storage: dict) -> str:
    """Say what a plan stores in how many bits, such as "blocks 6 x 8 + 19 x 3 bits (rtn, group size 64), ..."."""
    bits = storage["bits"]
    if bits == 16:
        return "all 16 bits"
    if isinstance(bits, Sequence):
        widths = " + ".join(f"{bits.count(b)} x {b:g}" for b in sorted(set(bits), reverse=True))
    else:
        widths = f"{bits:g}"
    parts = ["blocks", *(part for part in ("head", "vision") if storage.get(f"quantize_{part}"))]
    how = f"{storage['method']}, group size {storage['group_size']}"
    return f"{' and '.join(parts)} {widths} bits ({how}), the rest 16 bits"
