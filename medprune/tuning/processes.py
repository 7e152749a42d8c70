"""Fine-tune, score and answer in several processes through accelerate, a GPU each, from a job file.

accelerate launch --num_processes 2 -m medprune.tuning.processes JOB.json
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState

from medprune.answers import decoding
from medprune.models import loading
from medprune.models.loading import choose_dtype, load
from medprune.pruning import leave_one_out
from medprune.pruning.plan import apply_plan, load_plan, make_plan
from medprune.settings import resolve, settings
from medprune.store import Units, read_json, write_json
from medprune.tuning import recovery


def write_job(
    path: Path, source, items, config, steps: int, folder, out, plan=None, recipe: str = "lora", held_out=()
) -> Path:
    """Write a job: source, folder of the model; items, (image path, messages); folder, for checkpoints; out, of the
    merged model; plan, path of a pruning plan, or None for every block."""
    write_json(
        path,
        {
            "source": str(source),
            "plan": plan and str(plan),
            "recipe": recipe,
            "items": items,
            "steps": steps,
            "held_out": list(held_out),
            "folder": str(folder),
            "out": str(out),
        }
        | job_settings(config),
    )
    return path


def job_settings(config) -> dict:
    """Return what a job file says of the profile, for `this_process` to read."""
    chosen = {k: v for k, v in settings(config).items() if k != "name" and v is not None}
    return {"profile": config.name, "settings": chosen}


def this_process(job: dict):
    """Return (profile, accelerate's state, device, dtype) of a process that accelerate started on a job."""
    state = PartialState(cpu=not torch.cuda.is_available())
    device = f"cuda:{state.local_process_index}" if torch.cuda.is_available() else "cpu"
    return resolve(job["profile"], job["settings"]), state, device, choose_dtype(device.split(":")[0])


def launch(job: Path, processes: int) -> list[dict]:
    """Run a job in so many processes; return its loss curve."""
    run_processes("medprune.tune", job, processes)
    return read_json(Path(read_json(job)["out"]) / "training.json")["curve"]


def run_processes(module: str, job: Path, processes: int) -> None:
    """Run a module on a job file in processes of this machine, a GPU each where there are GPUs, through accelerate."""
    words = [
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    words += ["--multi_gpu"] if processes > 1 else []  # accelerate's name for torchrun; without a GPU it is gloo's
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *words, "-m", module, str(job)])
    if done.returncode:
        raise RuntimeError(
            f"{module} on {job} in {processes} processes ended with status {done.returncode}: see above."
        )


def main(path: str) -> None:
    """Run a job as one of the processes that accelerate started."""
    job = read_json(Path(path))
    config, state, device, dtype = this_process(job)
    each, left = divmod(config.batch_size, state.num_processes)
    if left or not each:
        raise ValueError(f"batch_size={config.batch_size} must be a multiple of the {state.num_processes} processes.")
    plan = load_plan(Path(job["plan"])) if job["plan"] else None
    model, processor, costs = recovery.recover(
        Path(job["source"]),
        plan,
        job["recipe"],
        job["items"],
        Path(job["folder"]),
        replace(config, batch_size=each),
        job["steps"],
        device,
        dtype,
        held_out=job["held_out"],
    )
    if state.is_main_process:
        loading.save(model, processor, Path(job["out"]))
        write_json(Path(job["out"]) / "training.json", costs | {"processes": state.num_processes})
    state.wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1])


WORK = ("leave_one_out", "answers")


def fill(
    units: Units, work: str, source: Path, rows: list[dict], config, label: str = "", blocks=(), removed=()
) -> None:
    """Compute missing units in config.processes processes and add them to `units`.

    work: "leave_one_out", the answers without each of `blocks` (`importance.output_similarity`), or "answers", those to
    the rows under a label (`generate.answer_rows`). source: the model's folder; removed: blocks it goes without. Raises
    RuntimeError where a process fails; what the others finished is taken over first, and found again.
    """
    if work not in WORK:
        raise ValueError(f"work {work!r} is not known: choose one of {', '.join(WORK)}.")
    asked = [f"{label} {r['id']}" for r in rows] if work == "answers" else ["original", *(f"block {b}" for b in blocks)]
    missing = {key for key in asked if key not in units}
    if not missing:
        return
    rows = [r for r in rows if f"{label} {r['id']}" in missing] if work == "answers" else rows
    folder = units.path.parent / f"{units.path.stem}-parts"
    folder.mkdir(exist_ok=True)
    job = folder / "job.json"
    write_json(
        job,
        {
            "work": work,
            "source": str(source),
            "rows": rows,
            "label": label,
            "context": units.context,
            "blocks": [b for b in blocks if f"block {b}" in missing],
            "removed": list(removed),
            "parts": str(folder),
        }
        | job_settings(config),
    )
    try:
        run_processes("medprune.spread", job, config.processes)
    finally:
        for part in sorted(folder.glob("*.jsonl")):
            found = Units(part, units.context)
            for key in (key for key in asked if key in found and key not in units):
                units.add(key, found[key])


def main(path: str) -> None:
    """Do one process's share of a job: every n-th block, or the questions about every n-th image."""
    job = read_json(Path(path))
    config, state, device, dtype = this_process(job)
    rank, n = state.process_index, state.num_processes
    model, processor = load(job["source"], device, dtype)
    if job["removed"]:
        apply_plan(model, make_plan(model.config, job["removed"], "", ()))
    units, rows = Units(Path(job["parts"]) / f"{rank}.jsonl", job["context"]), job["rows"]
    if job["work"] == "leave_one_out":
        leave_one_out.leave_one_out(
            model, processor, rows, job["blocks"][rank::n], units, config.calibration_tokens, config.batch_rows
        )
    else:
        mine = set(list(dict.fromkeys(r["path"] for r in rows))[rank::n])
        decoding.answer_rows(model, processor, [r for r in rows if r["path"] in mine], job["label"], units, config)


if __name__ == "__main__":
    main(sys.argv[1])
