"""Models that a run trains once: each is found again by what it was made from, and by nothing else."""

import math
import random
import shutil
from pathlib import Path

from medprune.answers import decoding
from medprune.data.records import sample_balanced
from medprune.models.loading import load, save
from medprune.settings import Config, values_of
from medprune.store import Run, content, context, made
from medprune.tuning import processes, recovery

# The settings that decide a training; it can see no others.
TRAINING = (
    "seed",
    "base_bits",
    "lora_r",
    "lora_alpha",
    "lora_targets",
    "learning_rate",
    "schedule",
    "multi_turn",
    "batch_size",
    "save_every",
    "patience",
)


def training_context(source, plan, recipe: str, items, held_out, config: Config, steps: int) -> str:
    """Return what a training depends on: the model and blocks it starts from, pictures and texts, settings, code."""
    seen = [(content(path), messages) for path, messages in [*items, *held_out]]
    kept = plan and list(plan.kept)
    return context("medprune.tuning.recovery", content(source), kept, recipe, seen, values_of(config), steps)


def tuning_items(records, config, conditions, questions) -> tuple[int, list, list]:
    """Return (optimizer steps, training items, held-out items) of notebook 01; items are (image path, messages)."""
    n_held_out = min(config.n_held_out, len(records) // 10)
    held_out = sample_balanced(records, n_held_out, config.seed) if n_held_out else []
    learned = [r for r in records if r not in held_out]
    steps = config.sft_steps
    if config.epochs is not None:
        steps = math.ceil(config.epochs * len(learned) / config.batch_size)
    draw = random.Random(config.seed)
    items = recovery.conversation_items(learned, steps * config.batch_size, conditions, questions, draw)
    return steps, items, recovery.conversation_items(held_out, len(held_out), conditions, questions, draw)


def train_once(
    run: Run,
    folder: Path,
    source,
    plan,
    recipe: str,
    items,
    config,
    steps: int,
    device,
    dtype,
    label: str,
    held_out=(),
    callbacks=(),
    n_processes: int = 1,
) -> dict:
    """Train a model into a folder, unless the folder holds this very one; return its record.

    source: folder of the unpruned model. plan: None for every block. items, held_out: (image path, messages). The
    record holds `context`, the loss `curve` and the costs that `recovery.recover` measured.
    """
    chosen = Config({name: getattr(config, name) for name in TRAINING}, "a training")
    mark = training_context(source, plan, recipe, items, held_out, chosen, steps)
    if record := made(folder, mark):
        return record
    checkpoints = run.dir / f"checkpoints-{mark}"
    if n_processes > 1:
        job = {"source": source, "plan": plan, "recipe": recipe, "items": items, "held_out": held_out, "steps": steps}
        processes.train(
            run.dir / "job.json",
            **job,
            config=chosen,
            folder=checkpoints,
            out=folder,
            context=mark,
            n_processes=n_processes,
        )
    else:
        model, processor, costs = recovery.recover(
            source,
            plan,
            recipe,
            items,
            checkpoints,
            chosen,
            steps,
            device,
            dtype,
            label,
            held_out=held_out,
            callbacks=callbacks,
        )
        save(model, processor, folder, context=mark, **costs)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return made(folder, mark)


def compare_recipes(run: Run, source, plan, records, asked, conditions, questions, config, device, dtype, known):
    """Recover one pruned model by every recipe, on every share of the images, and in the time that lora takes.

    known: (rows, record) of the model that config.recipe has trained on all images. A way back is trained, saved,
    loaded and asked; its folder goes. Returns (answers' rows, a list of method, recipe, fraction, budget, images,
    costs).
    """
    rows, table = [], []

    def one(recipe: str, fraction: float, steps: int, budget: str) -> float:
        label = f"{recipe} {fraction:.0%} of images, same {budget}"
        n_items = steps * config.batch_size
        items = recovery.training_items(records, fraction, n_items, conditions, questions, config.seed)
        if (recipe, fraction, budget) == (config.recipe, 1.0, "steps"):
            said, record = known
        else:
            said, record = _try(run, source, plan, recipe, items, asked, config, steps, device, dtype, label)
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


def _try(run: Run, source, plan, recipe, items, asked, config, steps, device, dtype, label):
    """Train, answer and forget one way back; return (rows, record), from the run's units where they are there."""
    chosen = Config({name: getattr(config, name) for name in TRAINING}, "a training")
    mark = training_context(source, plan, recipe, items, (), chosen, steps)
    units = run.units(decoding.answers_context(mark, asked, config.max_new_tokens))
    folder = run.dir / f"tried-{mark}"
    if "record" not in units or any(f"{label} {q['id']}" not in units for q in asked):
        record = train_once(run, folder, source, plan, recipe, items, config, steps, device, dtype, label)
        units.add("record", record)
        model, processor = load(folder, device, dtype)
        decoding.answer_rows(model, processor, asked, label, units, config)
    shutil.rmtree(folder, ignore_errors=True)
    return decoding.answer_rows(None, None, asked, label, units, config), units["record"]
