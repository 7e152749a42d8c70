"""Models that a run trains once: each is found again by what it was made from, and by nothing else."""

import math
import random
import shutil
from pathlib import Path

from medprune.answers import decoding
from medprune.data.records import repeat_rare, sample_balanced
from medprune.device import choose_device, release
from medprune.models.loading import load, weight_files
from medprune.store import Run, made
from medprune.tuning import processes, recovery
from medprune.tuning.merging import merge_folder
from medprune.tuning.recovery import Training


def tuning_items(records, config, conditions, questions) -> tuple[int, list, list]:
    """Return (optimizer steps, training items, held-out items) of notebook 01; items are (image path, messages)."""
    n_held_out = min(config.n_held_out, len(records) // 10)
    held_out = sample_balanced(records, n_held_out, config.seed, "held out") if n_held_out else []
    learned = [r for r in records if r not in held_out]
    steps = config.sft_steps
    if config.epochs is not None:
        steps = math.ceil(config.epochs * len(learned) / config.batch_size)
    draw = random.Random(config.seed)
    often = repeat_rare(learned, config.balance)
    items = recovery.conversation_items(often, steps * config.batch_size, conditions, questions, draw)
    return steps, items, recovery.conversation_items(held_out, len(held_out), conditions, questions, draw)


def train_once(run: Run, folder: Path, training: Training, label: str, callbacks=(), n_processes: int = 1) -> dict:
    """Train a model into a folder, unless the folder holds this very one; return its record.

    The record holds `context`, the loss `curve` and the costs that `recovery.train_into` writes. Adapters over an NF4
    base are kept beside the folder, and folded into it from files, again where a session's scratch has lost it.
    """
    mark = training.context()
    if record := made(folder, mark):
        return record
    over_nf4 = training.config.base_bits == 4
    out = run.dir / f"adapters-{folder.name}" if over_nf4 else folder
    if over_nf4:
        weight_files(training.source)  # or the training would be for nothing
    if not made(out, mark):
        checkpoints = run.dir / f"checkpoints-{mark}"
        if n_processes > 1:
            processes.train(run.dir / "job.json", training, checkpoints, out, n_processes)
        else:
            recovery.train_into(training, checkpoints, out, choose_device(), label, callbacks, context=mark)
        shutil.rmtree(checkpoints, ignore_errors=True)
    if over_nf4:
        release()
        merge_folder(training.source, out, training.plan, folder, **made(out, mark))
    return made(folder, mark)


def compare_recipes(run: Run, source, plan, records, asked, conditions, questions, config, known):
    """Recover one pruned model by every recipe, on every share of the images, and in the time that lora takes.

    known: (rows, record) of the model that config.recipe has trained on all images. A way back is trained, saved,
    loaded and asked; its folder goes. Returns (answers' rows, a list of method, recipe, fraction, budget, images,
    costs).
    """
    rows, table = [], []

    def one(recipe: str, fraction: float, steps: int, budget: str) -> float:
        label = f"{recipe} {fraction:.0%} of images, same {budget}"
        n_items = steps * config.batch_size
        how = (config.seed, config.balance)
        items = recovery.training_items(records, fraction, n_items, conditions, questions, *how)
        if (recipe, fraction, budget) == (config.recipe, 1.0, "steps"):
            said, record = known
        else:
            said, record = _try(run, Training(source, plan, recipe, items, config, steps), asked, config, label)
        rows.extend(row | {"method": label} for row in said)
        images = min(len({path for path, _ in items}), n_items)
        named = {"method": label, "recipe": recipe, "fraction": fraction, "budget": budget, "images": images}
        table.append(named | {k: v for k, v in record.items() if k not in ("curve", "context")})
        return record["train_s"] / steps

    for fraction in config.data_fractions:
        step_s = {recipe: one(recipe, fraction, config.recovery_steps, "steps") for recipe in config.recipes}
    if config.equal_time and "lora" in step_s:
        for recipe in (r for r in config.recipes if r != "lora"):
            steps = max(1, round(config.recovery_steps * step_s["lora"] / step_s[recipe]))
            one(recipe, max(config.data_fractions), steps, "time")
    return rows, table


def _try(run: Run, training: Training, asked, config, label: str):
    """Train, answer and forget one way back; return (rows, record), from the run's units where they are there."""
    mark = training.context()
    units = run.units(decoding.answers_context(f"{mark} in {config.held_bits} bits", asked, config.max_new_tokens))
    folder = run.dir / f"tried-{mark}"  # not to scratch, which the models that stay fill
    if "record" not in units or any(f"{label} {q['id']}" not in units for q in asked):
        units.add("record", train_once(run, folder, training, label))
        model, processor = load(folder, bits=config.held_bits)
        decoding.answer_rows(model, processor, asked, label, units, config)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(run.dir / f"adapters-{folder.name}", ignore_errors=True)
    return decoding.answer_rows(None, None, asked, label, units, config), units["record"]
