"""One report over many runs: what each method costs, with intervals that cover seeds and images, and who bears it."""

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from medprune.data.questions import load_conditions
from medprune.judging.scores import read_scores, scores_of
from medprune.results import stats
from medprune.results.cells import LEAST_RUNS
from medprune.results.figures import CONTROLS, figure_forest, figure_shares
from medprune.results.groups import BY, LEAST_IMAGES, group_table, least_harm, naming, naming_table, worst_group
from medprune.results.page import html_report, markdown_table, with_interval
from medprune.results.tables import among_random, sweep_means
from medprune.settings import METHODS, STAGES, at_count
from medprune.store import Run, read_json, settings_before, write_csv, write_text

SIZES = ("03_prune_sweep/sweep.csv", "04_sft_recovery/recovery.csv", "05_awq_vs_bnb/quantization.csv",
         "07_budget_search/search.csv")  # fmt: skip
LABELS = ["run", "method", "id", "cluster", "condition", "skin_tone", "kind", "score_percent"]


def report_over(roots: Iterable[Path], out: Path, title: str) -> Path:
    """Write tables (CSV), figures (PNG), a page and a markdown file over finished runs; return the page's path.

    out: a folder, or a markdown file beside whose folder of the same name the rest goes. Runs of one study differ by
    seed; where they differ by more, a method's name says by what. Raises ValueError where a run is not finished.
    """
    out = Path(out)
    folder = out.with_suffix("") if out.suffix == ".md" else out
    page = out if out.suffix == ".md" else folder / "report.md"
    sections = sections_over(list(roots))
    words = [f"# {title}"]
    for section in sections:
        words += [f"## {section['heading']}", section.get("text", "")]
        kept = section.pop("csv", section.get("table"))
        if kept is not None:
            write_csv(folder / f"{section['heading']}.csv", kept)
        if (table := section.get("table")) is not None:
            words.append(markdown_table(table))
        if (figure := section.get("figure")) is not None:
            folder.mkdir(parents=True, exist_ok=True)
            picture = folder / f"{section['heading']}.png"
            figure.savefig(picture, dpi=110, bbox_inches="tight")
            words.append(f"![{section['heading']}](<{picture.relative_to(page.parent)}>)")
    write_text(page, "\n\n".join(filter(None, words)) + "\n")
    return html_report(folder / "report.html", title, sections)


def sections_over(roots: list[Path]) -> list[dict]:
    """Return the report's sections, as `page.html_report` takes them; the tables are described where they stand."""
    runs = [_read(root) for root in roots]
    if not runs:
        raise ValueError("there is no finished run to report on.")
    scores, names = _together(runs)
    original = [m for m in scores["method"].unique() if m.startswith("original")]
    of = {m: original[0] if len(original) == 1 else _same_settings(m, original) for m in scores["method"].unique()}
    pairs = [(m, ref) for m, ref in of.items() if ref and m != ref]
    pairs += [(a, b) for b in scores["method"].unique() for a in _elsewhere(b, scores)]
    baselines = [m for m in names["method"].unique() if m not in of]
    against = [(ref, base) for base in baselines for ref in original if _share_answers(names, ref, base)]
    methods, named = _methods(runs, scores), naming_table(names).merge(worst_group(names), on="method")
    judged, told = stats.compare(scores, pairs), stats.compare(names, pairs + against)
    steps, dearer = _steps(runs, scores), _dearer(runs, scores)
    sections = [
        {"heading": "In short", "text": _words(runs, scores, named)},
        {"heading": "Methods", "text": _METHODS, "table": methods},
        {"heading": "Judge's score against the original", "text": _PAIRED, "table": judged},
        {"heading": "Names given right", "text": _NAMES, "table": named, "figure": figure_shares(named)},
        {"heading": "Names against the original", "text": f"{_PAIRED} {_BASELINES * bool(against)}", "table": told},
    ]
    if len(judged):
        sections[2]["figure"] = figure_forest(judged)
    if len(steps):
        drawn = {"table": steps, "figure": figure_forest(steps)}
        sections.append({"heading": "Step against step", "text": _STEPS, **drawn})
    if len(dearer):
        sections.append({"heading": "What 4 bits cost a pruned model more", "text": _DEARER, "table": dearer})
    for column in BY:
        if names[column].notna().any():
            what = column.replace("_", " ")
            for heading, table in (("Names right", names), ("Judge's score", scores)):
                groups = group_table(table, [column], exact=table is names)
                shown = {"text": _GROUPS, "csv": groups, "table": _wide(groups)}
                sections.append({"heading": f"{heading} by {what}", **shown})
    if (criteria := _criteria(runs)) is not None:
        sections.append({"heading": "Criteria", "text": _CRITERIA, "table": criteria})
    if (searched := _searched(runs, scores)) is not None:
        sections.append({"heading": "The plan found by the budget search", "text": _FOUND, "table": searched})
    if (ways := _ways_back(runs)) is not None:
        sections.append({"heading": "Ways back", "text": _WAYS, "table": ways})
    sections.append({"heading": "Who harms the worst group least", "text": _harm(runs, scores)})
    sections.append({"heading": "What differs from run to run", "text": _BY_RUN, "table": _by_run(runs, scores)})
    return sections


_METHODS = (
    "Score: the judge's, of 100, over all questions; open: over those that ask for more than a name. weight: of the "
    "tensors as saved. worst: the group, of a condition or skin tone, with the lowest mean; its limits are of the "
    "lowest of the groups' true means, for whichever group comes out lowest does so by bad luck too."
)
_NAMES = (
    "Share of images, in percent, whose condition is asserted, and no other's, when asked for a name; balanced: every "
    "condition weighs the same. Of one run, limits are Clopper and Pearson's; of several they cover runs and images."
)
_PAIRED = (
    "Paired within run, image and question: diff is a - b in points. p is adjusted by Holm for the rows, and the last "
    "interval holds for all rows together."
)
_BASELINES = "A method without a language model, a head on the vision tower, stands as b."
_GROUPS = (
    f"Each group's mean with its 95% interval. A group of fewer than {LEAST_IMAGES} images is too small for one, "
    "unless it is exact: a share of one run's images."
)
_STEPS = (
    "The first row is the comparison that the settings name beforehand (`primary`), whose p stands as it is; p of the "
    "others is adjusted by Holm, and their last interval holds for all of them together."
)
_DEARER = (
    "How many points more a method's 4 bits take from the pruned model than from the original, paired; the last "
    "interval holds for all rows together."
)
_CRITERIA = (
    "As many blocks removed by each criterion; diff: to output similarity, the paper's, paired, whose limits hold for "
    "all rows of as many blocks together. beaten: in each run, how many random orders score less on the same images."
)
_FOUND = (
    "Paired, against the paper's pipeline, whose bytes it may take unless told otherwise, and against AWQ of the whole "
    "model in 4 bits; limits of the last interval hold for all rows."
)
_WAYS = (
    "Of the pruned model; diff: to LoRA, the paper's, on all images and with as many steps, paired, whose limits hold "
    "for all rows together."
)
_BY_RUN = "Blocks count from 0, the least important first. Criteria and ways back stand best first, by mean score."


def _wide(groups: pd.DataFrame) -> pd.DataFrame:
    """Return `group_table` for reading: a row per method, a column per group, which says how many images it has."""
    images = groups.groupby("group")["n_images"].max()
    cells = [with_interval(row.score, row.low, row.high) for row in groups.itertuples()]
    small = groups["note"].str.startswith("too small")
    cells = pd.Series(cells, groups.index).where(~small, lambda text: text.str.replace("no interval", "too small"))
    wide = groups.assign(cell=cells, group=[f"{g} ({images[g]} images)" for g in groups["group"]])
    wide = wide.pivot(index="method", columns="group", values="cell").reindex(groups["method"].unique()).fillna("")
    return wide.rename_axis(columns=None).reset_index()


def _read(root: Path) -> dict:
    """Return what the report needs of a finished run."""
    for stage in STAGES[:6]:  # of what the search found there need be nothing
        Run(root, STAGES[-1]).of(stage)
    settings = settings_before(root)
    scores = scores_of(root)
    scores = scores[scores["method"] != "pruned-0"]  # the original, once more
    pictures = scores.drop_duplicates("cluster").set_index("cluster")["asked"]
    conditions = load_conditions(settings["conditions"])
    criteria, own = root / "03_prune_sweep" / "criteria_scores.csv", scores.assign(cluster=_picture(scores, pictures))
    run = {"root": root, "settings": settings, "scores": own, "names": naming(own, conditions)}
    run["names"] = run["names"].assign(id=run["names"]["cluster"])
    for key, file in (("criteria", criteria), ("ways", root / "04_sft_recovery" / "recipe_scores.csv")):
        table = read_scores(file) if file.exists() else None
        run[key] = None if table is None else table.assign(cluster=_picture(table, pictures))
    files = [file for file in (root / "baselines.csv", *sorted(root.glob("*/baselines.csv"))) if file.exists()]
    for file in files:
        table = pd.read_csv(file, dtype={"id": str, "cluster": str})
        table = table.rename(columns={"skin_type": "skin_tone"})
        table["score_percent"] = 100.0 * table["right"].astype(float)
        if unknown := set(table["cluster"]) - set(pictures.index):
            raise ValueError(f"{file} has the image {min(unknown)!r}, which no question of the run is about.")
        pictured = _picture(table, pictures)
        run["names"] = pd.concat([run["names"], table.assign(kind="name", cluster=pictured, id=pictured)])
    return run


def _picture(table: pd.DataFrame, pictures: pd.Series) -> pd.Series:
    """Name an image by what it shows, for runs may show other pictures under one name, and one under two."""
    return table["cluster"].map(pictures)


def _together(runs: list[dict]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the scores, and the names given right, of all runs: run is the seed, and a method says what else it is."""
    _label(runs)
    tables = []
    for key in ("scores", "names"):
        parts = [run[key].assign(run=run["seed"], method=run[key]["method"] + run["label"]) for run in runs]
        table = pd.concat(parts, ignore_index=True)
        tables.append(table.drop(columns=[c for c in table if c not in LABELS and c not in ("judge", "judged_by")]))
    scores, names = tables
    return scores.assign(id=scores["cluster"] + "#" + scores["kind"]), names


def _label(runs: list[dict]) -> None:
    """Give each run its seed, and a label of the settings, the seed apart, in which the runs differ."""
    whole = [{k: json.dumps(v) for k, v in run["settings"].items() if k != "seed"} for run in runs]
    differ = [k for k in whole[0] if len({values.get(k) for values in whole}) > 1]
    for run, values in zip(runs, whole, strict=True):
        said = ", ".join(f"{k} {values[k].strip(chr(34))}" for k in differ)
        run |= {"seed": run["settings"]["seed"], "label": f" ({said})" if said else ""}


def _same_settings(method: str, original: list[str]) -> str | None:
    """Return the original of a method's settings, which stand in brackets behind its name."""
    return next((name for name in original if method.endswith(name.removeprefix("original"))), None)


def _elsewhere(method: str, scores: pd.DataFrame) -> list[str]:
    """Return the same method under other settings than the first's, if `method` is the first's and answers match."""
    name, found = method.partition(" (")[0], scores["method"].unique()
    same = [other for other in found if other.partition(" (")[0] == name]
    return [other for other in same[1:] if method == same[0] and _share_answers(scores, method, other)]


def _share_answers(table: pd.DataFrame, a: str, b: str) -> bool:
    """Say whether two methods answered some question both, and one judge scored them."""
    sides = [table[table["method"] == method] for method in (a, b)]
    if "judged_by" in table and len(set(pd.concat(sides)["judged_by"].dropna())) > 1:
        return False
    answers = [set(zip(side["run"], side["id"], strict=True)) for side in sides]
    return bool(answers[0] & answers[1])


def _methods(runs: list[dict], scores: pd.DataFrame) -> pd.DataFrame:
    """Return one row per method: bytes, score over all and over open questions, and the group that fares worst."""
    sizes = []
    for run in runs:
        tables = [pd.read_csv(file) for name in SIZES if (file := run["root"] / name).exists()]
        known = pd.concat(tables)[["method", "stored_bytes"]].replace({"method": {"pruned-0": "original"}})
        sizes.append(known.assign(method=known["method"] + run["label"]))
    weight = pd.concat(sizes).groupby("method")["stored_bytes"].mean().rename("weight_bytes")
    open_ = stats.score_table(scores[scores["kind"] != "name"])[["method", "score", "low", "high"]]
    open_ = open_.set_axis(["method", "open", "open_low", "open_high"], axis=1)
    table = stats.score_table(scores).merge(open_, on="method").merge(worst_group(scores), on="method", how="left")
    table.insert(1, "weight_bytes", table["method"].map(weight))
    return table


def _harm(runs: list[dict], scores: pd.DataFrame) -> str:
    """Return the paragraphs about criteria that remove as many blocks, and quantizers of one model."""
    said = []
    if (table := _pooled(runs, "criteria")) is not None:
        for count, part in table[table["blocks_removed"] > 0].groupby("blocks_removed"):
            sentence, _ = least_harm(part, list(part["method"][~part["criterion"].isin(CONTROLS)].unique()))
            said.append(f"{count:.0f} block{'s' * (count != 1)} removed, by criterion: {sentence}")
    methods = scores["method"].unique()
    for model in dict.fromkeys(m.removeprefix("awq-") for m in methods if m.startswith("awq-")):
        rivals = [m for m in methods if m.partition("-")[0] in METHODS and m.partition("-")[2] == model]
        if len(rivals) > 1:
            said.append(f"{model} in 4 bits, by method: {least_harm(scores, rivals)[0]}")
    return "\n\n".join(said) or "No two methods are alike but in one thing."


def _pooled(runs: list[dict], key: str) -> pd.DataFrame | None:
    """Return the answers that `key` names of all runs that differ by seed alone, run being the seed; None without."""
    tables = [run[key].assign(run=run["seed"]) for run in runs if run[key] is not None and not run["label"]]
    return pd.concat(tables, ignore_index=True) if tables else None


def _steps(runs: list[dict], scores: pd.DataFrame) -> pd.DataFrame:
    """Return the primary comparison, then what recovery gives and what it leaves after AWQ, and AWQ against others."""
    settings, have = runs[0]["settings"], set(scores["method"])
    n = settings["recover"][0]
    primary = tuple(at_count(name, n) for name in settings["primary"])
    pairs = [(f"recovered-{n}", f"pruned-{n}"), (f"awq-recovered-{n}", f"awq-pruned-{n}")]
    pairs += [(f"awq-recovered-{n}", f"{m}-{n}") for m in ("awq-magnitude", "awq_text-recovered")]
    others = [m for m in settings["methods"] if m != "awq"]
    pairs += [(f"awq-{x}", f"{m}-{x}") for x in ("original", f"recovered-{n}") for m in others]
    pairs = [pair for pair in pairs if set(pair) <= have and pair != primary]
    if not set(primary) <= have or any(run["label"] for run in runs):
        return pd.DataFrame()
    return pd.concat([stats.compare(scores, [primary]), stats.compare(scores, pairs)], ignore_index=True)


def _dearer(runs: list[dict], scores: pd.DataFrame) -> pd.DataFrame:
    """Return, of each method, what its 4 bits cost the pruned model more than the original."""
    settings, have = runs[0]["settings"], set(scores["method"])
    pruned = f"pruned-{settings['recover'][0]}"
    methods = [m for m in settings["methods"] if {f"{m}-{pruned}", f"{m}-original", pruned} <= have]
    wide = scores.pivot(index=["run", "id", "cluster"], columns="method", values="score_percent")
    rows = []
    for m in methods:
        four = wide[[pruned, f"{m}-{pruned}", "original", f"{m}-original"]].dropna()
        if four.empty:
            continue
        cost, own = four[pruned] - four[f"{m}-{pruned}"], four["original"] - four[f"{m}-original"]
        run, _, image = (four.index.get_level_values(level) for level in four.index.names)
        found = stats.one_difference(len(methods), cost, own, image, run, scores)
        rows.append({"method": m, "costs_pruned": cost.mean(), "costs_original": own.mean()} | found)
    return pd.DataFrame(rows)


def _criteria(runs: list[dict]) -> pd.DataFrame | None:
    """Return each criterion's score at each count of blocks removed, and its place among random orders in each run."""
    answers, rows = _pooled(runs, "criteria"), []
    if answers is None:
        return None
    for count, part in answers[answers["blocks_removed"] > 0].groupby("blocks_removed"):
        table = _against(sweep_means(part), "output_similarity").rename(columns={"method": "criterion"})
        table.insert(1, "blocks_removed", count)
        placed = pd.concat([among_random(own) for _, own in part.groupby("run")])
        beaten = placed.groupby("criterion")["beaten"].agg(lambda each: ", ".join(map(str, each)))
        table["beaten"] = table["criterion"].map(beaten + f" of {placed['draws'].min()}").fillna("")
        rows.append(table.sort_values("score", ascending=False, kind="stable"))
    return pd.concat(rows, ignore_index=True)


def _searched(runs: list[dict], scores: pd.DataFrame) -> pd.DataFrame | None:
    """Return the differences of notebook 07's plan to the paper's pipeline and to uniform AWQ, where there are any."""
    models = [(run["label"], f"recovered-{run['settings']['recover'][0]}") for run in runs]
    pairs = [(f"found{label}", f"awq-{m}{label}") for label, own in dict.fromkeys(models) for m in (own, "original")]
    pairs = [pair for pair in pairs if set(pair) <= set(scores["method"])]
    return stats.compare(scores, pairs) if pairs else None


def _ways_back(runs: list[dict]) -> pd.DataFrame | None:
    """Return the score of each way back, and what it is ahead of LoRA on all images."""
    answers = _pooled(runs, "ways")
    if answers is None:
        return None
    lora = [m for m in answers["method"].unique() if m.startswith("lora") and m.endswith("same steps")]
    table = _against(answers, max(lora, key=lambda m: int(m.split()[1].rstrip("%")), default=None))
    return table.sort_values("score", ascending=False, kind="stable").rename(columns={"method": "way back"})


def _against(scores: pd.DataFrame, reference: str | None) -> pd.DataFrame:
    """Return `stats.score_table` with the paired difference to a reference method, limits for all rows together."""
    table = stats.score_table(scores)[["method", "score", "low", "high", "n_images"]]
    others = [method for method in table["method"] if method != reference]
    if reference not in set(table["method"]) or not others:
        return table
    found = stats.compare(scores, [(method, reference) for method in others])
    found = found[["a", "diff", "low_all", "high_all", "p_holm"]].rename(columns={"a": "method"})
    return table.merge(found, on="method", how="left")


def _by_run(runs: list[dict], scores: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each run: seed, the original's score, blocks removed, criteria and ways back, best first."""
    rows = []
    for run in runs:
        root, settings, orders = run["root"], run["settings"], {}
        own = scores[(scores["run"] == run["seed"]) & (scores["method"] == f"original{run['label']}")]
        row = {"run": root.name, "seed": run["seed"], "images": own["cluster"].nunique()}
        row["original_score_percent"] = own["score_percent"].mean()
        orders = read_json(root / "02_layer_importance" / "removal_order.json")
        for count in settings["recover"]:
            row[f"removed_{count}"] = " ".join(map(str, orders["output_similarity"][:count]))
        criteria = pd.read_csv(root / "03_prune_sweep" / "criteria.csv")
        row["criteria"] = _ranking(criteria[criteria["blocks_removed"].isin(settings["recover"])], "criterion")
        recipes = root / "04_sft_recovery" / "recipes.csv"
        if recipes.exists():
            table = pd.read_csv(recipes)
            whole = table[(table["fraction"] == table["fraction"].max()) & (table["budget"] == "steps")]
            row["ways_back"] = _ranking(whole, "recipe")
        rows.append(row)
    return pd.DataFrame(rows)


def _ranking(table: pd.DataFrame, by: str) -> str:
    means = table.groupby(by, sort=False)["score"].mean().sort_values(ascending=False, kind="stable")
    return ", ".join(f"{name} {score:.0f}" for name, score in means.items())


def _words(runs: list[dict], scores: pd.DataFrame, named: pd.DataFrame) -> str:
    """Return what the tables rest on, and what their intervals cover."""
    seeds, images = sorted({run["seed"] for run in runs}), scores["cluster"].nunique()
    each = scores.groupby("run")["cluster"].nunique()
    least, most = each.min(), each.max()
    shown = "synthetic images" if all(run["settings"]["images"] == "synthetic" for run in runs) else "images"
    many = f"{len(runs)} runs with the seeds {', '.join(map(str, seeds))}" if len(runs) > 1 else "one run"
    covered = "Intervals cover seeds and images: they are about a model trained and compressed anew, on new images."
    if len(seeds) == 1:
        covered = "Intervals cover images alone: they are about this one model, and say nothing of another seed."
    elif len(seeds) < LEAST_RUNS:
        covered = f"{len(seeds)} seeds cannot tell how much seeds differ: there are no intervals below {LEAST_RUNS}."
    first = named[named["method"].str.startswith("original")].iloc[0]
    named_right = with_interval(first["right"], first["low"], first["high"]).replace(" [", "% [")
    return (
        f"{many[0].upper()}{many[1:]}, each on {f'{least} to {most}' if most > least else most} test {shown}, {images} "
        f"different ones in all. Judge: {' and '.join(map(str, scores['judge'].dropna().unique()))}.\n\nBefore "
        f"compression the model names {named_right} of conditions right.\n\n{covered} The conditions are "
        "those there are, not drawn; images count as drawn from their mixture. 95%, where nothing else is said. "
        "Not for clinical use."
    )
