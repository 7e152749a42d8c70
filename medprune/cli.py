"""`medprune run / plan / preflight / quantize / compare / publish / address`.

Every error a user can cause is one sentence and exit status 2.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


def main() -> None:
    try:
        app(_join_parameters(sys.argv[1:]))
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"medprune: {error}", err=True)
        raise SystemExit(2) from None


def _join_parameters(words: list[str]) -> list[str]:
    """Write "-p NAME VALUE", as papermill has it, as "-p NAME=VALUE", which is one option to typer."""
    words, joined = list(words), []
    while words:
        word = words.pop(0)
        joined.append(word)
        if word == "-p" and len(words) > 1 and "=" not in words[0]:
            joined.append(f"{words.pop(0)}={words.pop(0)}")
    return joined


def _parameters(pairs: list[str]) -> dict:
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"-p {pair} has no value: write -p NAME VALUE.")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return values


@app.command()
def run(
    profile: Annotated[str, typer.Option(help="smoke, local, t4 or auto")] = "auto",
    name: Annotated[str, typer.Option(help="the run's folder under runs/")] = "demo",
    images: Annotated[
        str | None, typer.Option(help="folder or table of photographs instead of synthetic images")
    ] = None,
    start: Annotated[str | None, typer.Option("--from", help="stage to begin at, such as 03_prune_sweep")] = None,
    parameter: Annotated[list[str] | None, typer.Option("-p", help="NAME VALUE; VALUE is JSON or text")] = None,
    runs_dir: Annotated[str | None, typer.Option(help="where runs are kept")] = None,
) -> None:
    """Run the notebooks in order, going on where an earlier run stopped."""
    from medprune.runs.series import closing_text, run_series

    values = _parameters(parameter or [])
    if images is not None:
        values["images"] = images if images == "synthetic" else str(Path(images).absolute())
    root = run_series(name, profile, start, values, runs_dir, say=lambda s: typer.echo(s, err=True))
    typer.echo(closing_text(root))


@app.command()
def plan(
    model: Annotated[
        str, typer.Option(help="llava-1.5-7b, llava-1.5-13b, a LLaVA folder or a config.json")
    ] = "llava-1.5-7b",
    remove: Annotated[list[int] | None, typer.Option(help="blocks removed; may be repeated")] = None,
    bits: Annotated[
        str, typer.Option(help="bits per block weight: 3, 4, 8 or 16; or one for each kept block, as 8,3,4")
    ] = "16",
    group_size: Annotated[int, typer.Option(help="32, 64 or 128")] = 64,
    context: Annotated[int, typer.Option(help="tokens in the KV cache")] = 840,
    bandwidth: Annotated[float, typer.Option(help="memory bandwidth in GB/s; a T4 has 320")] = 320,
    quantize_head: Annotated[bool, typer.Option("--quantize-head", help="the head too")] = False,
    quantize_vision: Annotated[bool, typer.Option("--quantize-vision", help="the vision tower's linears too")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Print parameters, bytes, KV cache and the floor in ms/token, from a configuration, without weights."""
    from medprune.models.sizes import named_config, shape_of
    from medprune.results.tables import plan_json, plan_text

    try:
        widths = [float(b) for b in bits.split(",")]
    except ValueError:
        raise ValueError(f"--bits {bits} must be a number, or one for each kept block with commas between.") from None
    one = len(widths) == 1
    default = (0, 2, 4, 7, 8, 9, 10) if one else [shape_of(named_config(model)).blocks - len(widths)]
    write, stored = plan_json if as_json else plan_text, widths[0] if one else widths
    also = {"quantize_head": quantize_head, "quantize_vision": quantize_vision}
    typer.echo(write(model, list(remove or default), stored, group_size, context, bandwidth=bandwidth, **also))


@app.command()
def preflight(
    profile: Annotated[str, typer.Option(help="smoke, local, t4 or auto")] = "auto",
    parameter: Annotated[
        list[str] | None, typer.Option("-p", help="NAME VALUE of any setting; VALUE is JSON or text")
    ] = None,
    runs_dir: Annotated[str | None, typer.Option(help="where runs would be kept")] = None,
) -> None:
    """Say what this machine has, and for every stage what it will need and whether it fits; status 1 if not all do."""
    from medprune.runs.checkup import checkup
    from medprune.settings import resolve

    values = _parameters(parameter or [])
    lines, fits = checkup(resolve(profile, values.pop("settings", None), **values), runs_dir)
    typer.echo("\n".join(lines))
    raise SystemExit(0 if fits else 1)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="a LLaVA in 16 bits: a folder, or a hub name")],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    method: Annotated[str, typer.Option(help="awq, bnb, hqq or rtn")] = "awq",
    bits: Annotated[int, typer.Option(help="4; for hqq and rtn 3 or 8 too")] = 4,
    group_size: Annotated[int, typer.Option(help="32, 64 or 128")] = 64,
    plan: Annotated[Path | None, typer.Option(help="a plan of notebook 03, to remove its blocks first")] = None,
    images: Annotated[str | None, typer.Option(help="folder or table of photographs that awq is calibrated on")] = None,
    conditions: Annotated[
        Path | None, typer.Option(help="facts file of other conditions than data/conditions.json")
    ] = None,
    rows: Annotated[int, typer.Option(help="calibration conversations, an image each")] = 32,
    quantize_head: Annotated[bool, typer.Option("--quantize-head", help="the head too (hqq, rtn)")] = False,
    quantize_vision: Annotated[bool, typer.Option("--quantize-vision", help="the vision tower too (hqq, rtn)")] = False,
) -> None:
    """Prune and quantize a LLaVA, and write it with its model card to a folder that is loaded again."""
    from medprune.quantizing.checkpoint import quantize_folder

    info, size = quantize_folder(
        model, out, method, bits, group_size, plan, images, conditions, rows, quantize_head, quantize_vision
    )
    typer.echo(
        f"{out}: {size / 2**20:.0f} MiB, {info['seconds']:.0f} s, peak {(info['peak_bytes'] or 0) / 2**20:.0f} MiB"
    )


@app.command()
def address(repository: Annotated[str, typer.Argument(help="OWNER/NAME on GitHub")]) -> None:
    """Write where this repository is published into the notebooks' first cells and the README's badges."""
    from medprune.runs.hosted import write_address

    for file in write_address(repository):
        typer.echo(file)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="RUN, or RUN:METHOD such as demo:awq-recovered-2")],
    b: Annotated[str, typer.Argument(help="another; of two runs, every method that both have is compared")],
    runs_dir: Annotated[str | None, typer.Option(help="where runs are kept")] = None,
) -> None:
    """Print paired differences in judge score, by image, with intervals and p adjusted by Holm."""
    import pandas as pd

    from medprune.results.page import readable
    from medprune.results.stats import compare as paired
    from medprune.settings import REPO, STAGES

    def scores(name):
        run, _, method = name.partition(":")
        files = [Path(runs_dir or REPO / "runs") / run / stage / "scores.csv" for stage in STAGES]
        found = [pd.read_csv(f) for f in files if f.exists()]
        if not found:
            raise ValueError(f"run {run!r} has no scores: run notebook 01 at least.")
        table = pd.concat(found).drop_duplicates(["method", "id"])
        if method and method not in set(table["method"]):
            raise ValueError(
                f"run {run!r} has no method {method!r}: it has {', '.join(dict.fromkeys(table['method']))}."
            )
        table = table[table["method"] == method] if method else table
        return table.assign(method=f"{run}:" + table["method"])

    left, right = scores(a), scores(b)
    if ":" in a and ":" in b:
        pairs = [(a, b)]
    else:
        ours, theirs = (list(dict.fromkeys(t["method"].str.partition(":")[2])) for t in (left, right))
        pairs = [(f"{a.partition(':')[0]}:{m}", f"{b.partition(':')[0]}:{m}") for m in ours if m in theirs]
    if not pairs or a == b:
        raise ValueError(f"{a!r} and {b!r} have no two methods to compare: name them as RUN:METHOD.")
    typer.echo(readable(paired(pd.concat([left, right]), pairs)).to_string(index=False))


@app.command()
def publish(name: str = "demo", runs_dir: str | None = None) -> None:
    """Copy a finished run's executed notebooks into notebooks/, to be committed with their outputs."""
    from medprune.runs.series import publish as copy
    from medprune.settings import REPO

    copy(Path(runs_dir or REPO / "runs") / name)
