"""Prune, recover and quantize a medical LLaVA, and know with error bars what it cost.

What a user gets wrong is one sentence and exit status 2; an error inside a notebook is one sentence and 3, with
--debug a traceback.
"""

import gc
import json
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

import medprune
from medprune.runs import upkeep
from medprune.settings import PROFILES, asked, build, describe, resolve
from medprune.store import check_new, run_root, runs_home

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Parameters = Annotated[list[str] | None, typer.Option("-p", help="NAME VALUE; see `medprune settings`")]
Profile = Annotated[str, typer.Option(help="smoke, local, t4, or auto: MEDPRUNE_PROFILE, else t4 with CUDA, or local")]
Name = Annotated[str, typer.Argument(help="the run")]
Groups = Annotated[int, typer.Option(help="32, 64 or 128")]
Table = Annotated[bool, typer.Option("--quantize-embeddings", help="the embedding table too, with a tied head")]
Threads = Annotated[int, typer.Option(help="threads of the engine")]
Runs = Annotated[str | None, typer.Option(envvar="MEDPRUNE_RUNS", help="where runs are kept; else runs/ here")]


def console() -> None:
    """Run the command line as a program; looking for garbage in what torch imports is two of the five seconds of `ask`.

    So it is not looked for there, and the process ends without freeing anything.
    """
    quick = sys.argv[1:2] == ["ask"]
    if quick:
        gc.disable()
    try:
        main()
    except SystemExit as ended:
        if quick:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code)
        raise


def main() -> None:
    """Run the command line; it ends with SystemExit, whose code is the status."""
    debug = "--debug" in sys.argv
    words = _join_parameters([word for word in sys.argv[1:] if word != "--debug"])
    try:
        status = app(words, standalone_mode=False) if words else app(["--help"], standalone_mode=False)
    except typer.Abort:
        raise SystemExit(1) from None
    except (ValueError, OSError, RuntimeError, TyperException) as error:
        if debug:
            raise
        typer.echo(f"medprune: {_sentence(error)}", err=True)
        raise SystemExit(3 if isinstance(error, RuntimeError) else 2) from None
    raise SystemExit(status or 0)


def _sentence(error: Exception) -> str:
    """Return an error in one line that names the file, or the argument, that it is about."""
    if isinstance(error, TyperException):
        text = f"{error.format_message().rstrip('.')}; --help says what is right."
    elif isinstance(error, OSError) and error.filename:
        text = f"{error.filename} cannot be used: {error.strerror}."
    else:
        text = str(error)
    return " ".join(text.encode("utf-8", "backslashreplace").decode().splitlines())  # a name may hold any bytes


def _join_parameters(words: list[str]) -> list[str]:
    """Write "-p NAME VALUE", as papermill has it, as "-p NAME=VALUE", which is one option to typer."""
    joined = []
    for word in words:
        if joined[-2:-1] == ["-p"] and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _parameters(pairs: list[str] | None) -> dict:
    values = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"-p {pair} has no value: write -p NAME VALUE.")
        if name in values:
            raise ValueError(f"-p {name} is given twice: leave one out.")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return values


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    if show_version:
        typer.echo(medprune.__version__)


@app.command()
def run(
    profile: Profile = "auto",
    name: Annotated[str, typer.Option(help="the run's folder")] = "demo",
    images: Annotated[str | None, typer.Option(help="folder or table of photographs")] = None,
    start: Annotated[str | None, typer.Option("--from", help="stage to begin at, such as 03_prune_sweep")] = None,
    end: Annotated[str | None, typer.Option("--to", help="stage to end with, such as 06_judge_eval")] = None,
    parameter: Parameters = None,
    runs_dir: Runs = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would run, and why")] = False,
) -> None:
    """Run the notebooks in order, but for those whose settings, inputs and code are as they were."""
    from medprune.runs.series import closing_text, run_series

    values = _parameters(parameter) | ({} if images is None else {"images": images})
    root = run_series(name, profile, start, values, runs_dir, partial(typer.echo, err=not dry_run), dry_run, end)
    if not dry_run:
        typer.echo(closing_text(root, end))


@app.command()
def study(
    grid: Annotated[Path, typer.Argument(help="YAML: settings by name, a list of values for what is crossed")],
    out: Annotated[Path | None, typer.Option(help="the report's folder, or FILE.md; else beside the runs")] = None,
    runs_dir: Runs = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would run, and why")] = False,
    ray: Annotated[str | None, typer.Option(help="run on Ray: local, auto or HOST:PORT")] = None,
    cpus: Annotated[float, typer.Option(help="of each run on Ray")] = 1,
    gpus: Annotated[float | None, typer.Option(help="of each run on Ray; else one for profile t4")] = None,
    ram: Annotated[
        float | None, typer.Option(help="GiB of host memory of each run on Ray; else 12.7 for profile t4")
    ] = None,
) -> None:
    """Make a run for each combination of a grid's settings, and one report over all; status 3 if one failed."""
    from medprune.runs import study as many

    tasks = many.read_grid(grid, runs_dir)
    plans = many.check(tasks)
    if dry_run:
        typer.echo("\n".join(f"{name}: {line}" for name, lines in plans.items() for line in lines))
        return
    board = many.Board(sys.stderr)
    with board.bars():
        if ray is None:
            made = many.one_by_one(tasks, board.say)
        else:
            needs = {"num_cpus": cpus, "num_gpus": gpus, "memory": None if ram is None else ram * 2**30}
            needs = {name: amount for name, amount in needs.items() if amount is not None}
            made = many.on_ray(tasks, board.say, address=ray, **needs)
        failed = {}
        for task, error in made:
            board.say(task.name, f"failed: {error}" if error else "done")
            failed |= {task.name: error} if error else {}
    if done := [task.root for task in tasks if task.name not in failed]:
        from medprune.runs.across import report_over

        out = out or runs_home(runs_dir) / f"{grid.stem}-report"
        typer.echo(f"report: {report_over(done, out, f'medprune: {grid.stem}')}")
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(tasks)} runs failed: {', '.join(failed)}; run it again to go on.")


@app.command()
def runs(runs_dir: Runs = None) -> None:
    """List the runs: stages done, when, profile, score of the last step, disk."""
    from medprune.results.page import readable

    table = upkeep.list_runs(runs_home(runs_dir))
    typer.echo(readable(table).to_string(index=False) if len(table) else f"no runs in {runs_home(runs_dir)}")


@app.command()
def clean(
    name: Name, yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False, runs_dir: Runs = None
) -> None:
    """Remove what of a run nobody needs: checkpoints of finished stages, units of other settings, leftovers."""
    root = run_root(name, runs_dir)
    for path in upkeep.needless(root):
        typer.echo(f"{upkeep.size_of(path) / 2**20:8.1f} MiB  {path.relative_to(root)}")
    typer.echo(f"{upkeep.stale_units(root)} units of work that no finished stage uses")
    if yes or typer.confirm("remove them?"):
        typer.echo(f"freed {upkeep.clean(root) / 2**20:.1f} MiB")


@app.command()
def settings() -> None:
    """List every setting: its default in each profile, the notebooks that read it, and what it means."""
    typer.echo("\n".join(describe()))


@app.command()
def data(
    source: Annotated[str, typer.Argument(help="folder of a data set as downloaded or of conditions, or a table")],
    out: Annotated[Path | None, typer.Option(help="CSV to write, which `images` takes")] = None,
    conditions: Annotated[Path | None, typer.Option(help="facts file of other conditions")] = None,
    modality: Annotated[str | None, typer.Option(help="clinical, dermoscopic or both")] = None,
) -> None:
    """Say which data set this is, its pictures by condition and skin type, and what is left out and why."""
    from medprune.data.questions import load_conditions
    from medprune.data.records import check_table, describe_images, save_table

    if out is not None:
        check_table(out)
    lines, records = describe_images(source, load_conditions(conditions), modality)
    typer.echo("\n".join(lines))
    if out is not None:
        save_table(records, out)
        typer.echo(f"{out}: {len(records)} rows")


@app.command()
def plan(
    model: Annotated[
        str, typer.Option(help="llava-1.5-7b, another name of data/checkpoints.json, a folder or a config.json")
    ] = "llava-1.5-7b",
    remove: Annotated[list[int] | None, typer.Option(help="blocks removed; may be repeated")] = None,
    bits: Annotated[str, typer.Option(help="of the blocks: 3, 4, 8, 16, or one for each kept block, as 8,3,4")] = "16",
    group_size: Groups = 64,
    context: Annotated[int, typer.Option(help="tokens in the KV cache", min=0, max=2**31)] = 840,
    bandwidth: Annotated[float, typer.Option(help="memory bandwidth in GB/s; a T4 has 320")] = 320,
    quantize_head: Annotated[bool, typer.Option("--quantize-head", help="the head too")] = False,
    quantize_vision: Annotated[bool, typer.Option("--quantize-vision", help="the vision tower's linears too")] = False,
    quantize_embeddings: Table = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    fit: Annotated[float | None, typer.Option(help="GiB: say of every model known by name what must go to fit")] = None,
) -> None:
    """Print parameters, bytes, KV cache and the floor in ms/token, from a configuration, without weights."""
    from medprune.models.sizes import named_config, shape_of
    from medprune.results.tables import fits_text, plan_json, plan_text

    if fit is not None:
        if not 0 < fit < 2**20:
            raise ValueError(f"--fit {fit} must be above 0 and below a million, in GiB.")
        typer.echo(fits_text(fit, {"group_size": group_size, "context": context}))
        return
    try:
        widths = [float(b) for b in bits.split(",")]
    except ValueError:
        raise ValueError(f"--bits {bits} must be a number, or one for each kept block with commas between.") from None
    if len(widths) == 1:
        widths, default = widths[0], [0, 2, 4, 7, 8, 9, 10]
    else:
        default = [shape_of(named_config(model)).blocks - len(widths)]
    if not 0 < bandwidth < 1e6:
        raise ValueError(f"--bandwidth {bandwidth} must be above 0 and below a million, in GB/s.")
    storage = {"bits": widths, "group_size": group_size, "context": context}
    storage |= {"quantize_head": quantize_head, "quantize_vision": quantize_vision}
    storage |= {"quantize_embeddings": quantize_embeddings}
    typer.echo((plan_json if as_json else plan_text)(model, remove or default, storage, bandwidth))


@app.command()
def preflight(profile: Profile = "auto", parameter: Parameters = None, runs_dir: Runs = None) -> None:
    """Say what this machine has, and whether the data and weights are there and fit; status 1 if not."""
    from medprune.runs.checkup import checkup

    values = _parameters(parameter)
    lines, fits = checkup(resolve(profile, asked(values.pop("settings", None), {}) | values), runs_dir)
    typer.echo("\n".join(lines))
    raise SystemExit(0 if fits else 1)


@app.command()
def rehearse(
    machine: Annotated[str, typer.Option(help="kaggle (two T4s) or colab (one)")] = "kaggle",
    gpu: Annotated[float | None, typer.Option(help="GiB of each GPU, other than the machine's")] = None,
    gpus: Annotated[int | None, typer.Option(help="how many GPUs")] = None,
    ram: Annotated[float | None, typer.Option(help="GiB of host memory")] = None,
    disk: Annotated[float | None, typer.Option(help="GB of disk where the run is")] = None,
    scratch: Annotated[float | None, typer.Option(help="GB for weights, 0: they lie with the run")] = None,
    folder: Annotated[Path | None, typer.Option(help="an empty one to keep; else a temporary one")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="only these; may be repeated")] = None,
    parameter: Parameters = None,
) -> None:
    """Run profile t4 at full size on pretended GPUs, loops cut short; status 1 where it does not fit."""
    import tempfile

    from medprune.rehearsing import rehearsal

    given = {"gpu_gib": gpu, "cards": gpus, "ram_gib": ram, "disk_gb": disk, "scratch_gb": scratch}
    chosen = rehearsal.machine(machine, **{k: v for k, v in given.items() if v is not None})
    stages, values = rehearsal.stages(stage), _parameters(parameter)
    build({"name": "t4", **PROFILES["t4"]}, asked(values, {}))  # which says what cannot be
    with tempfile.TemporaryDirectory() as temporary:
        found = rehearsal.rehearse(chosen, folder or Path(temporary), stages, values, _said)
    raise SystemExit(0 if not found["misfit"].any() else 1)


def _said(taken: dict) -> None:
    gpus = " + ".join(f"{b / 2**30:.2f}" for b in taken["card_bytes"])
    files = f"{taken['disk_bytes'] / 1e9:.0f} + {taken['scratch_bytes'] / 1e9:.0f}"
    used = f"GPU {gpus} GiB, host {taken['ram_bytes'] / 2**30:.1f} GiB, files {files} GB"
    typer.echo(f"{taken['stage']}: {used}, {taken['seconds']:.0f} s of rehearsal. {taken['misfit'] or 'fits'}")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="a LLaVA in 16 bits: a folder, or a hub name")],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    method: Annotated[str, typer.Option(help="awq, bnb, hqq or rtn")] = "awq",
    bits: Annotated[int, typer.Option(help="4; for hqq and rtn 3 or 8 too")] = 4,
    group_size: Groups = 64,
    plan: Annotated[Path | None, typer.Option(help="a plan of notebook 03, to remove its blocks first")] = None,
    images: Annotated[str | None, typer.Option(help="folder or table of photographs that awq is calibrated on")] = None,
    conditions: Annotated[Path | None, typer.Option(help="facts file of other conditions")] = None,
    rows: Annotated[int, typer.Option(help="calibration conversations, an image each")] = 32,
    quantize_head: Annotated[bool, typer.Option("--quantize-head", help="the head too (hqq, rtn)")] = False,
    quantize_vision: Annotated[bool, typer.Option("--quantize-vision", help="the vision tower too (hqq, rtn)")] = False,
    quantize_embeddings: Table = False,
    other_model: Annotated[bool, typer.Option("--other-model", help="take a plan that another model's was")] = False,
) -> None:
    """Prune and quantize a LLaVA, and write it with its model card to a folder that is loaded again."""
    from medprune.quantizing.checkpoint import quantize_folder

    also = {"quantize_head": quantize_head, "quantize_vision": quantize_vision, "other_model": other_model}
    also |= {"quantize_embeddings": quantize_embeddings}
    info, size = quantize_folder(model, out, method, bits, group_size, plan, images, conditions, rows, **also)
    peak = (info["peak_bytes"] or 0) / 2**20
    typer.echo(f"{out}: {size / 2**20:.0f} MiB, {info['seconds']:.0f} s, peak {peak:.0f} MiB")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="a folder in 16 bits, AWQ or RTN, or RUN:METHOD")],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    to: Annotated[str, typer.Option(help="hub, vllm (the same files) or gguf (llama.cpp, Ollama)")],
    apart: Annotated[bool, typer.Option("--apart", help="engines are sent what the tower makes of pictures")] = False,
    runs_dir: Runs = None,
) -> None:
    """Write a model as others load it: with the names of LLaVA's checkpoints on the hub, or as GGUF.

    A tower that engines do not know goes apart, into a folder of its own.
    """
    from medprune.exporting.folders import export_hub, find_model, open_source
    from medprune.exporting.gguf import export_gguf

    ways = {"hub": export_hub, "vllm": export_hub, "gguf": export_gguf}
    if to not in ways:
        raise ValueError(f"--to {to} is not known: give {', '.join(ways)}.")
    check_new(out)
    source = open_source(find_model(model, runs_dir), apart)
    if source.apart and to == "hub":
        kind = source.vision["model_type"]
        raise ValueError(f"{source.folder}: plain transformers loads no tower apart ({kind}): give --to vllm or gguf.")
    for line in ways[to](source, out):
        typer.echo(line)


@app.command()
def parity(
    model: Annotated[str, typer.Argument(help="the folder that was exported, or RUN:METHOD")],
    exported: Annotated[Path, typer.Argument(help="what `medprune export` wrote")],
    images: Annotated[str | None, typer.Option(help="folder of pictures, or one; else some are drawn")] = None,
    n: Annotated[int, typer.Option("--n", help="images, three questions each")] = 8,
    url: Annotated[str | None, typer.Option(help="a server that has it already; else its engine is started")] = None,
    threads: Threads = 1,
    runs_dir: Runs = None,
) -> None:
    """Ask an exported model in its real engine what we ask here; status 1 where they differ beyond the floor."""
    import tempfile

    from medprune.exporting import parity as check
    from medprune.exporting.folders import find_model, open_source
    from medprune.progress import quiet

    quiet()
    source = open_source(find_model(model, runs_dir))
    with tempfile.TemporaryDirectory() as drawn:
        rows = check.rows_of(images, n, Path(drawn), source.vision["image_size"])
        found = check.parity(source.folder, exported, rows, url, threads)
    lines = check.report(found)
    typer.echo("\n".join(lines))
    check.add_parity(exported, lines)
    raise SystemExit(1 if found["faults"] else 0)


@app.command()
def ask(
    model: Annotated[str, typer.Argument(help="a folder, or RUN:METHOD such as demo:awq-recovered-2")],
    image: Annotated[str, typer.Argument(help="a picture")],
    question: Annotated[str, typer.Argument(help="in words")],
    beside: Annotated[str | None, typer.Option(help="another model, to answer the same")] = None,
    tokens: Annotated[int, typer.Option(help="of the answer, at most")] = 96,
    timing: Annotated[bool, typer.Option("--timing", help="say what took how long")] = False,
    url: Annotated[str | None, typer.Option(help="a server that has MODEL, then a folder that was exported")] = None,
    runs_dir: Runs = None,
) -> None:
    """Ask a model, or two side by side, about a picture. Not for clinical use."""
    import time
    from unittest.mock import patch

    if url is not None:
        if beside is not None:
            raise ValueError("--url has one model: leave --beside out.")
        from medprune.exporting.asking import ask_served

        typer.echo(ask_served(Path(model), image, question, tokens, url))
        return
    begun = time.perf_counter()
    # hqq takes a second to import, for quantized caches, scipy half of one, for losses of detectors: neither is used
    missing = dict.fromkeys(("is_hqq_available", "is_scipy_available"), lambda: False)
    with patch.multiple("transformers.utils", **missing):
        from medprune.exporting.asking import ask as put

    started = time.perf_counter() - begun
    for said in put([model] if beside is None else [model, beside], image, question, tokens, runs_dir):
        typer.echo(said.text if beside is None else f"{said.name}: {said.text}")
        if timing:
            rate = f"{said.answer_s:.1f} s for {said.tokens} tokens"
            typer.echo(
                f"({started:.1f} s to start torch and transformers, {said.load_s:.1f} s to load, {rate})", err=True
            )


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="what `medprune export` wrote, for llama.cpp or vLLM")],
    host: Annotated[str, typer.Option(help="address; another than this machine's own lets others in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port")] = 8080,
    threads: Threads = 1,
) -> None:
    """Start llama.cpp's or vLLM's OpenAI-compatible server for an exported folder, where it is installed."""
    from medprune.exporting.engines import serve as start

    raise SystemExit(start(model, host, port, threads, typer.echo))


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="a LLaVA's 16-bit folder; without --out a shape such as llava-1.5-7b")],
    card: Annotated[list[str], typer.Option(help="its memory, such as 4GiB; for a table may be repeated")],
    out: Annotated[Path | None, typer.Option(help="folder to write the packed model to; else print a table")] = None,
    images: Annotated[str | None, typer.Option(help="folder or table of photographs to measure plans on")] = None,
    conditions: Annotated[Path | None, typer.Option(help="facts file of other conditions")] = None,
    context: Annotated[int, typer.Option(help="tokens in the KV cache")] = 840,
    reserve: Annotated[str, typer.Option(help="of the card, for the runtime: CUDA takes about 512MiB")] = "0MiB",
    n_images: Annotated[int, typer.Option(help="images that plans are measured on; as many others choose")] = 8,
    evaluations: Annotated[int, typer.Option(help="plans that each of four searchers may measure")] = 40,
    group_size: Groups = 64,
) -> None:
    """Find the best plan (bits of each part, blocks dropped) that fits a card, and write its model; goes on if killed.

    Without --out it prints what each card can hold if all weights matter alike, from the configuration alone.
    """
    from medprune.searching.budget import parse_size

    kept = 0 if re.fullmatch(r"0+(\.0*)?\s*([kmg]i?b)?", reserve.strip().lower()) else parse_size(reserve)
    budgets = [parse_size(size) - kept for size in card]
    if min(budgets) <= 0:
        raise ValueError(
            f"--reserve {reserve} must be below every --card, and {min(card, key=parse_size)} is not above."
        )
    if out is None:
        from medprune.results.page import readable
        from medprune.searching.searchers import uniform_table

        typer.echo(readable(uniform_table(model, budgets, context, group_size)).to_string(index=False))
        return
    if images is None or len(budgets) > 1:
        raise ValueError("--out needs --images, which plans are measured on, and one --card.")
    from medprune.searching.fitting import fit as search

    search(model, out, budgets[0], images, conditions, context, n_images, evaluations, group_size, say=typer.echo)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="RUN, or RUN:METHOD such as demo:awq-recovered-2")],
    b: Annotated[str, typer.Argument(help="another; of two runs, every method that both have is compared")],
    runs_dir: Runs = None,
) -> None:
    """Print paired differences in judge score, by image, with intervals and p adjusted by Holm."""
    import pandas as pd

    from medprune.judging.scores import scores_of
    from medprune.results.page import readable
    from medprune.results.stats import compare as paired

    def scores(name):
        run, _, method = name.partition(":")
        table = scores_of(run_root(run, runs_dir))
        if method and method not in set(table["method"]):
            there = ", ".join(dict.fromkeys(table["method"]))
            raise ValueError(f"run {run!r} has no method {method!r}: it has {there}.")
        table = table[table["method"] == method] if method else table
        return table.assign(method=f"{run}:" + table["method"])

    left, right = scores(a), scores(b)
    pairs = [(x, y) for x in left["method"].unique() for y in right["method"].unique()]
    if not (":" in a and ":" in b):
        pairs = [(x, y) for x, y in pairs if x.partition(":")[2] == y.partition(":")[2]]
    if not pairs or a == b:
        raise ValueError(f"{a!r} and {b!r} have no two methods to compare: name them as RUN:METHOD.")
    both = pd.concat([left, right]).drop_duplicates(["method", "id"])
    typer.echo(readable(paired(both, pairs)).to_string(index=False))


@app.command()
def address(repository: Annotated[str, typer.Argument(help="OWNER/NAME on GitHub")]) -> None:
    """Write where this repository is published into the notebooks' first cells and the README's badges."""
    from medprune.runs.hosted import write_address

    for file in write_address(repository):
        typer.echo(file)


@app.command()
def publish(name: Name = "demo", runs_dir: Runs = None) -> None:
    """Copy a finished run's executed notebooks into notebooks/, to be committed with their outputs."""
    from medprune.runs.series import publish as copy

    copy(run_root(name, runs_dir))
