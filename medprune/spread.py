"""Answer and score in several processes, a GPU each: every process writes units of its own, and the notebook takes them
over as if it had been interrupted after them, so that one process or several end with the same tables.

accelerate launch --num_processes 2 -m medprune.spread JOB.json      (what `fill` does)
"""

import sys
from pathlib import Path

from medprune import generate, importance, prune
from medprune.artifacts import Units, read_json, write_json
from medprune.model import load
from medprune.tune import job_settings, run_processes, this_process

WORK = ("leave_one_out", "answers")


def fill(units: Units, work: str, source: Path, rows: list[dict], config, label: str = "", blocks=(), removed=()) -> None:
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
    write_json(job, {"work": work, "source": str(source), "rows": rows, "label": label, "context": units.context,
                     "blocks": [b for b in blocks if f"block {b}" in missing], "removed": list(removed),
                     "parts": str(folder)} | job_settings(config))  # fmt: skip
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
        prune.apply_plan(model, prune.make_plan(model.config, job["removed"], "", ()))
    units, rows = Units(Path(job["parts"]) / f"{rank}.jsonl", job["context"]), job["rows"]
    if job["work"] == "leave_one_out":
        importance.leave_one_out(model, processor, rows, job["blocks"][rank::n], units, config.calibration_tokens, config.batch_rows)
    else:
        mine = set(list(dict.fromkeys(r["path"] for r in rows))[rank::n])
        generate.answer_rows(model, processor, [r for r in rows if r["path"] in mine], job["label"], units, config)


if __name__ == "__main__":
    main(sys.argv[1])
