"""A plan's model as found and recovered first: written, loaded, asked once, and one kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from medprune.answers.prompts import inputs_of, see
from medprune.models.families import parts
from medprune.models.loading import load
from medprune.models.sizes import account
from medprune.quantizing.checkpoint import load_quantized
from medprune.quantizing.packed import PackedLinear
from medprune.searching import compared
from medprune.searching.budget import DROP, FULL, space_of, working_bytes
from medprune.searching.levels import Levels
from medprune.settings import Config, resolve, values_of
from medprune.store import Run, made, read_json

BLOCKS = (FULL, 4, DROP, 8, FULL, 3)


@pytest.fixture
def candidate(base, rows, tmp_path):
    """Return a plan of the tiny model that drops a block, the vision tower in 8 bits, the embedding table in 4."""
    model, processor = load(base, dtype=torch.float32)
    seen = [see(processor, rows[i]["path"], torch.float32, "What?") for i in (0, 3, 6, 0)]
    calibration = {"input_ids": torch.stack([s.ids for s in seen])} | inputs_of(seen)
    levels = Levels(base, tmp_path / "levels", (3, 4, 8), 32, calibration, torch.float32)
    return compared.Candidate((8, *BLOCKS, 4), space_of(model.config, 64, (0,), 32), levels)


@pytest.fixture
def config():
    return Config(values_of(resolve("smoke", recipe="projector", recovery_steps=2)))


@pytest.fixture
def run(tmp_path):
    found = Run(tmp_path / "demo", "07_budget_search")
    found.dir.mkdir(parents=True)
    return found


def widths(model):
    return [next((m.bits for m in block.modules() if isinstance(m, PackedLinear)), FULL) for block in parts(model).blocks]


def test_a_recovered_plan_is_trained_pruned_then_rounded(candidate, config, run, rows, chat, tmp_path):
    recovered = candidate.recovered([(rows[0]["path"], chat), (rows[3]["path"], chat)] * 2, config)
    assert len({candidate.context(), recovered.context()}) == 2
    found = load_quantized(candidate.write(run, tmp_path / "found"))
    model = load_quantized(recovered.write(run, tmp_path / "recovered", base="tiny"))
    assert widths(model) == widths(found) == [FULL, 4, 8, FULL, 3]
    assert parts(model).head is parts(model).table and parts(model).table.bits == parts(found).table.bits == 4
    moved = [
        max((x - y).abs().max() for x, y in zip(*(part(parts(m)).parameters() for m in (found, model)), strict=True))
        for part in (lambda p: p.projector, lambda p: p.blocks[0].mlp)
    ]
    assert 5e-4 < moved[0] < 0.1 and moved[1] < 3e-4, "the projector was trained, and nothing else, but for bfloat16"
    counted = account(model.config, **candidate.space.storage(candidate.plan) | {"blocks_removed": 0}, group_size=32, context=64, method="awq")
    assert candidate.space.bytes_of(candidate.plan) == counted.total_bytes + working_bytes(model.config, 64)
    card = (tmp_path / "recovered" / "README.md").read_text()
    assert "recovered by projector before rounding; blocks removed: 2" in card
    assert [f.name for f in run.dir.iterdir()] == [], "what it was trained into is gone"
    plain = replace(recovered, plan=(FULL,) * 8)
    whole = plain.write(run, tmp_path / "whole")
    assert "quantization_config" not in read_json(whole / "config.json") and made(whole, plain.context())


def test_candidates_are_asked_once_and_one_is_kept(candidate, config, run, rows, monkeypatch):
    asked = [row | {"asked": row["id"], "condition": "rosacea", "kind": "name", "reference": "-", "key": row["path"]} for row in rows[:3]]
    other = compared.Candidate((FULL, *(4,) * 6, FULL), candidate.space, candidate.levels)
    said, speed = compared.ask(run, candidate, "one", asked, config)
    compared.ask(run, other, "other", asked, config)
    assert len(list((run.dir / "plans").iterdir())) == 2 and speed["weight_bytes"] > 0
    monkeypatch.setattr(compared.loading, "load_processor", None)  # from here on nothing may be loaded
    assert compared.ask(run, candidate, "one", asked, config) == (said, speed)
    folder = compared.keep_one(run, candidate, "found")
    assert folder == run.dir / "found" and not (run.dir / "plans").exists()
    assert read_json(folder / "config.json")["quantization_config"]["bits"] == [FULL, 4, 8, FULL, 3]
    assert compared.keep_one(run, candidate, "found") == folder and folder.exists(), "found again"
    monkeypatch.undo()
    compared.keep_one(run, other, "found")
    assert np.unique(read_json(folder / "config.json")["quantization_config"]["bits"]).tolist() == [4]
