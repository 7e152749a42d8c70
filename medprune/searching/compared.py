"""The models that notebook 07 compares: a plan's, as found or first recovered, each written, loaded again and asked."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from medprune.answers import decoding, timing
from medprune.device import choose_device, release
from medprune.models import loading
from medprune.models.sizes import OPTIONS
from medprune.quantizing import checkpoint, quantize
from medprune.searching.budget import FULL, Plan, Space
from medprune.searching.levels import METHOD, Levels, kept_blocks, removed_words
from medprune.store import Run, context, made, read_json
from medprune.tuning.recovery import Training
from medprune.tuning.trained import train_once


@dataclass(frozen=True)
class Candidate:
    """A plan for the model of `levels`. training: how that model, without the blocks that the plan drops, is recovered
    before its parts are rounded; None for the plan as it was found."""

    plan: Plan
    space: Space
    levels: Levels
    training: Training | None = None

    def recovered(self, items: list, config) -> "Candidate":
        """Return the plan recovered on (image path, messages) items, as `config` (recipe, recovery_steps) says."""
        how = (kept_blocks(self.space, self.plan), config.recipe, items, config, config.recovery_steps)
        return replace(self, training=Training(self.levels.source, *how))

    def context(self) -> str:
        """Return what its model depends on."""
        return context(__name__, self.levels.context(), self.plan, self.training and self.training.context())

    def write(self, run: Run, folder: Path, **said) -> Path:
        """Write its model, unless the folder holds this very one; said: as `save_quantized` takes it. Return it."""
        mark = self.context()
        if made(folder, mark):
            return folder
        if self.training is None:
            self.levels.save(self.space, self.plan, folder, mark, **said)
            return folder
        self.levels.rest()
        trained = run.dir / f"tried-{mark}"
        train_once(run, trained, self.training, "recovery")
        release()
        self._round(trained, folder, mark, said)
        for left in (trained, run.dir / f"adapters-{trained.name}"):
            shutil.rmtree(left, ignore_errors=True)
        return folder

    def _round(self, trained: Path, folder: Path, mark: str, said: dict) -> None:
        """Round the recovered model as the plan says, and save it."""
        storage = self.space.storage(self.plan)
        options = {option: storage[option] for option in OPTIONS.values()}
        if set(storage["bits"]) == {FULL} and not any(options.values()):
            loading.save(*loading.load(trained, dtype=self.levels.dtype), folder, context=mark)
            return
        model, processor, fetch = loading.load_blockwise(trained, dtype=self.levels.dtype)
        how = (storage["bits"], self.levels.group_size, self.levels.calibration)
        model, info = quantize.quantize(model, METHOD, *how, **options, fetch=fetch)
        words = f"found by the budget search, recovered by {self.training.recipe} before rounding"
        said |= {"plan": f"{words}; {removed_words(self.space, self.plan)}"}
        checkpoint.save_quantized(model, folder, METHOD, info, processor, {"context": mark}, **said)


def ask(run: Run, candidate: Candidate, label: str, asked: list[dict], config, **said) -> tuple[list[dict], dict]:
    """Write a candidate's model, load it again and ask it; return (answers' rows, its costs), made once.

    The folder stays until `keep_one`. said: as `save_quantized` takes it.
    """
    mark = candidate.context()
    units = run.units(decoding.answers_context(mark, asked, config.max_new_tokens))
    model = processor = None
    if any(f"{label} {q['id']}" not in units for q in asked) or f"{label} speed" not in units:
        folder = candidate.write(run, run.weights("plans") / mark, **said)
        candidate.levels.rest()
        packed = "quantization_config" in read_json(folder / "config.json")
        model = checkpoint.load_quantized(folder, choose_device()) if packed else loading.load(folder)[0]
        processor = loading.load_processor(folder)
    return timing.evaluate(model, processor, label, asked, units, config)


def keep_one(run: Run, candidate: Candidate, name: str, **said) -> Path:
    """Keep a candidate's folder as the stage's `name`, and remove those of all others; return it."""
    folder, others = run.weights(name), run.weights("plans")
    if not made(folder, candidate.context()):
        written = candidate.write(run, others / candidate.context(), **said)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(written, folder)
    shutil.rmtree(others, ignore_errors=True)
    return folder
