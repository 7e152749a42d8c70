"""Tune, score and answer in several processes through accelerate, a GPU each, from a job file.

accelerate launch --num_processes 2 -m medprune.tuning.processes JOB.json
"""

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState

from medprune import child
from medprune.answers.decoding import answer_rows
from medprune.device import cards, choose_device
from medprune.models.loading import load
from medprune.pruning.leave_one_out import leave_one_out
from medprune.pruning.plan import Plan, apply_plan, make_plan
from medprune.settings import Config, changed, values_of
from medprune.store import Units, read_json, write_json
from medprune.tuning.recovery import Training, train_into


def train(path: Path, training: Training, folder: Path, out: Path, n_processes: int) -> None:
    """Do a training in n_processes processes and save the model in `out`, with its context and `recover`'s costs.

    path: of the job file. folder: for checkpoints. Raises RuntimeError where a process fails.
    """
    job = vars(training) | {"plan": training.plan and asdict(training.plan), "config": values_of(training.config)}
    job |= {"work": "train", "folder": folder, "out": out, "context": training.context()}
    _run(write_json(path, job), n_processes)


def fill(units: Units, work: str, source, rows: list[dict], config, label: str = "", blocks=(), removed=()) -> None:
    """Compute missing units in config.processes processes, which write them into `units` as they go.

    work: "leave_one_out", the answers without each of `blocks`, or "answers", those to the rows under a label
    (`decoding.answer_rows`). source: the model's folder; removed: blocks it goes without. Raises RuntimeError where a
    process fails.
    """
    if work == "leave_one_out":
        blocks = [b for b in blocks if f"block {b}" not in units]
        done = not blocks and "original" in units
    else:
        rows = [r for r in rows if f"{label} {r['id']}" not in units]
        done = not rows
    if done:
        return
    job = {"work": work, "source": source, "rows": rows, "label": label, "blocks": blocks, "removed": list(removed)}
    job |= {"units": units.path, "context": units.context, "config": values_of(config)}
    with tempfile.TemporaryDirectory() as folder:
        _run(write_json(Path(folder) / "job.json", job), config.processes)


def _run(job: Path, processes: int) -> None:
    """Run a job file in processes of this machine, a GPU each where there are GPUs, through accelerate."""
    words = f"--num_processes {processes} --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    words += ["--main_process_port", "0"]  # any that is free: another run may have accelerate's own
    words += ["--multi_gpu"] if processes > 1 else []  # accelerate's name for torchrun; without a GPU it is gloo's
    launch = [sys.executable, "-m", "accelerate.commands.launch", *words]
    with child.started([*launch, "-m", "medprune.tuning.processes", job]) as process:
        status = process.wait()
    if status:
        raise RuntimeError(f"{job} in {processes} processes ended with status {status}: see above.")


def main(path: str) -> None:
    """Do the share of one of the processes that accelerate started on a job."""
    job, state = read_json(Path(path)), PartialState(cpu=not cards())
    device = f"{choose_device()}:{state.local_process_index}" if cards() else "cpu"
    share = _train if job["work"] == "train" else _answer
    share(job, Config(job["config"]), state, device)


def _train(job: dict, config, state: PartialState, device: str) -> None:
    each, left = divmod(config.batch_size, state.num_processes)
    if left or not each:
        raise ValueError(f"batch_size={config.batch_size} must be a multiple of the {state.num_processes} processes.")
    plan = job["plan"] and Plan(**job["plan"])
    mine = changed(config, batch_size=each, micro_batch=min(config.micro_batch or each, each))
    training = Training(job["source"], plan, job["recipe"], job["items"], mine, job["steps"], job["held_out"])
    record = {"context": job["context"], "processes": state.num_processes}
    train_into(training, Path(job["folder"]), Path(job["out"]), device, **record)
    state.wait_for_everyone()


def _answer(job: dict, config, state: PartialState, device: str) -> None:
    """Answer without every n-th block, or the questions about every n-th image."""
    model, processor = load(job["source"], device, bits=config.held_bits)
    if job["removed"]:
        apply_plan(model, make_plan(model.config, job["removed"], "", ()))
    units, rows = Units(job["units"], job["context"]), job["rows"]
    share = slice(state.process_index, None, state.num_processes)
    if job["work"] == "leave_one_out":
        length = config.calibration_tokens
        leave_one_out(model, processor, rows, job["blocks"][share], units, length, config.batch_rows)
    else:
        paths = list(dict.fromkeys(r["path"] for r in rows))[share]
        answer_rows(model, processor, [r for r in rows if r["path"] in paths], job["label"], units, config)


if __name__ == "__main__":
    main(sys.argv[1])
