"""Fine-tune from a job file, in one process or in several, on one machine or more.

accelerate launch --num_processes 2 -m medprune.tune JOB.json

`write_job` writes the job. The profile's batch_size is that of all processes together, so that the result does not
depend on their number.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState

from medprune import finetune, prune, recovery
from medprune.artifacts import read_json, settings, write_json
from medprune.config import resolve
from medprune.model import choose_dtype


def write_job(path: Path, source, items, config, steps: int, folder, out, plan=None, recipe: str = "lora",
              held_out=()) -> Path:  # fmt: skip
    """Write a job: source, folder of the model; items, (image path, messages); folder, for checkpoints; out, of the
    merged model; plan, path of a pruning plan, or None for every block."""
    write_json(path, {"source": str(source), "plan": plan and str(plan), "recipe": recipe, "items": items,
                      "steps": steps, "held_out": list(held_out), "folder": str(folder), "out": str(out)}
               | job_settings(config))  # fmt: skip
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
    words = ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    words += ["--multi_gpu"] if processes > 1 else []  # accelerate's name for torchrun; without a GPU it is gloo's
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *words, "-m", module, str(job)])
    if done.returncode:
        raise RuntimeError(f"{module} on {job} in {processes} processes ended with status {done.returncode}: see above.")


def main(path: str) -> None:
    """Run a job as one of the processes that accelerate started."""
    job = read_json(Path(path))
    config, state, device, dtype = this_process(job)
    each, left = divmod(config.batch_size, state.num_processes)
    if left or not each:
        raise ValueError(f"batch_size={config.batch_size} must be a multiple of the {state.num_processes} processes.")
    plan = prune.load_plan(Path(job["plan"])) if job["plan"] else None
    model, processor, costs = recovery.recover(
        Path(job["source"]), plan, job["recipe"], job["items"], Path(job["folder"]),
        replace(config, batch_size=each), job["steps"], device, dtype, held_out=job["held_out"],
    )  # fmt: skip
    if state.is_main_process:
        finetune.save(model, processor, Path(job["out"]))
        write_json(Path(job["out"]) / "training.json", costs | {"processes": state.num_processes})
    state.wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1])
