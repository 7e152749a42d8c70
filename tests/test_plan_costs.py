"""A plan's cost is that of the very model it is written as; prefixes are shared; nothing is measured twice."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medprune.answers.prompts import IGNORED, inputs_of, see
from medprune.models.families import parts
from medprune.models.loading import load
from medprune.models.sizes import account
from medprune.pruning.leave_one_out import teacher_batches
from medprune.quantizing.checkpoint import load_quantized
from medprune.searching.budget import DROP, FULL, HEAD, TABLE, space_of, working_bytes
from medprune.searching.costs import Costs, cost_tables, divergence, reference, resampled
from medprune.searching.levels import Levels
from medprune.store import Units, made, read_json

SAID = ["it is rosacea", "with a cream", "redness, and more redness", "no", "yes, once a day", "dry skin", "a", "b c", "d"]
GROUP = 32


@pytest.fixture(scope="module")
def source(base, tmp_path_factory):
    """Return the folder of a tiny model whose head is its own."""
    model, processor = load(base, dtype=torch.float32)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 0.01)
    model.all_tied_weights_keys = {}
    folder = tmp_path_factory.mktemp("untied") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def measured(source, rows, tmp_path):
    return measuring(source, rows, tmp_path)


def measuring(source, rows, tmp_path):
    """Return what measures plans on nine answers about three images, two images at once."""
    model, processor = load(source, dtype=torch.float32)
    seen = [see(processor, rows[i]["path"], torch.float32, "What?") for i in (0, 3, 6, 0)]
    calibration = {"input_ids": torch.stack([s.ids for s in seen])} | inputs_of(seen)
    levels = Levels(source, tmp_path / "levels", (3, 4, 8), GROUP, calibration, torch.float32)
    batches = teacher_batches(processor, rows, SAID, torch.float32, 6)
    space = space_of(model.config, 64, (0,), GROUP)
    return Costs(levels, space, batches, Units(tmp_path / "units.sqlite", "here"))


def plan_of(tower=FULL, head=FULL, table=FULL, blocks=(FULL,) * 6):
    return (tower, *blocks, head, table)


@torch.inference_mode()
def full_divergence(whole, model, batches):
    """Return the divergence of each row over the whole vocabulary, by plain forward passes of two models."""
    found = []
    for batch in batches:
        chosen = batch.labels != IGNORED
        p, q = (m(**batch.inputs, use_cache=False).logits[:, batch.kept][chosen].log_softmax(-1) for m in (whole, model))
        each = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        rows = batch.owner[:, 1:][:, batch.kept][chosen]
        found += [each[rows == r].mean().item() for r in range(len(batch.ids))]
    return found


PLANS = [((FULL, FULL, FULL), (4, 3, DROP, 8, FULL, 4)), ((4, 8, 4), (FULL, DROP, DROP, FULL, 3, 4)),
         ((8, FULL, FULL), (FULL,) * 6), ((FULL, 4, 8), (4,) * 6), ((FULL, FULL, 3), (FULL,) * 6)]  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_a_plan_s_cost_is_that_of_the_model_that_is_written(tied, source, base, rows, tmp_path):
    source = base if tied else source
    measured = measuring(source, rows, tmp_path)
    measured.top = 10**6  # the whole vocabulary
    space, whole = measured.space, load(source, dtype=torch.float32)[0]
    plans = [plan_of(*ends, blocks) for ends, blocks in PLANS]
    plans = [(*p[:-2], p[-1]) if tied else p for p in plans]  # the table is the head
    assert space.sites[-2:] == (("block 5", TABLE) if tied else (HEAD, TABLE))
    costs = measured.rows(plans)
    for number, plan in enumerate(plans):
        folder = tmp_path / f"plan-{number}"
        measured.levels.save(space, plan, folder, "mark", base="tiny")
        model = load_quantized(folder)
        assert costs[number].min() >= 0
        np.testing.assert_allclose(costs[number], full_divergence(whole, model, measured.batches), rtol=2e-3, atol=2e-6)
        counted = account(whole.config, **space.storage(plan), group_size=GROUP, context=64, method="awq")
        assert space.bytes_of(plan) == counted.total_bytes + working_bytes(whole.config, 64)
        held = {t.data_ptr(): t for t in model.state_dict().values()}.values()  # a tied head once
        sizes = sum(t.numel() * t.element_size() for t in held)
        # counted in 16 bits, held here in float32 where it is not packed; a scale is always 16
        packed = sum(t.numel() * t.element_size() for t in held if t.dtype in (torch.uint8, torch.float16))
        assert packed + (sizes - packed) // 2 == counted.weights_bytes
        removed = [b for b, bits in enumerate(space.blocks_of(plan)) if bits == DROP]
        assert f"blocks removed: {', '.join(map(str, removed)) or 'none'}" in (folder / "README.md").read_text()
        assert len(parts(model).blocks) == 6 - len(removed) and made(folder, "mark") and not made(folder, "other")
    assert read_json(tmp_path / "plan-2" / "config.json")["quantization_config"]["quantize_vision"] == 8
    assert read_json(tmp_path / "plan-4" / "config.json")["quantization_config"]["quantize_embeddings"] == 3


def test_the_whole_model_costs_nothing_and_what_is_saved_in_16_bits_is_plain(measured, tmp_path):
    whole = (FULL,) * len(measured.space.sites)
    assert measured.measure([whole]) == [pytest.approx(0, abs=1e-6)]
    measured.levels.save(measured.space, whole, tmp_path / "whole", "mark")
    assert not read_json(tmp_path / "whole" / "config.json").get("quantization_config")


def test_fewer_tokens_told_apart_see_less_and_never_less_than_nothing():
    generator = torch.Generator().manual_seed(0)
    p, q = (3 * torch.randn(7, 50, generator=generator) for _ in range(2))
    found = [divergence(*reference(p, top), q) for top in (2, 10, 49, 60)]
    wanted = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found[-1], wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[-2], wanted, rtol=1e-4, atol=1e-6)
    assert all((a <= b + 1e-5).all() and (a >= 0).all() for a, b in zip(found, found[1:], strict=False))


def test_plans_share_what_lies_below_their_first_difference(measured):
    plans = [plan_of(blocks=b) for b in ((4,) * 6, (4, 4, 4, 4, 4, 8), (4, 4, 4, DROP, 4, 4), (3, 4, 4, 4, 4, 4))]
    measured.measure(plans)
    batches = len(measured.batches)
    assert batches == 2 and measured.without_sharing == (6 + 6 + 5 + 6) * batches
    assert measured.ran == (6 + 1 + 2 + 6) * batches


def test_a_killed_measurement_goes_on_where_it_was(measured, monkeypatch):
    space, plain = measured.space, Levels.block
    single = [(s, c) for s, price in enumerate(space.prices) for c in price if c != FULL]
    left = [60]

    def failing(levels, number, bits):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return plain(levels, number, bits)

    measured.at_once = 4
    monkeypatch.setattr(Levels, "block", failing)
    with pytest.raises(KeyboardInterrupt):
        measured.single()
    done = len(measured.units)
    assert 0 < done < 2 * len(single)
    again = Costs(measured.levels, space, measured.batches, measured.units, at_once=4)
    monkeypatch.setattr(Levels, "block", plain)
    choices, costs = again.single()
    assert choices == single and costs.shape == (len(single), 9) and len(measured.units) == 2 * len(single)
    assert again.without_sharing < 6 * 2 * len(single) * (1 - done / (2 * len(single))) + 1
    monkeypatch.setattr(Levels, "block", None)  # from here on nothing may run
    assert (Costs(measured.levels, space, measured.batches, measured.units).single()[1] == costs).all()
    few = Costs(measured.levels, space, measured.batches, measured.units).rows([plan_of(blocks=(FULL, 4, *(FULL,) * 4))], 0.3)
    assert few.shape == (1, 6), "one batch of two"


def test_widths_are_rounded_once_and_forgotten_when_told(measured, monkeypatch):
    from medprune.searching import levels as module

    measured.levels.block(1, 4)
    monkeypatch.setattr(module.quantize, "quantize", None)
    again = Levels(*(getattr(measured.levels, name) for name in ("source", "home", "widths", "group_size", "calibration", "dtype")))
    again.block(1, 3)
    assert again.context() == measured.levels.context()
    again.forget()
    assert not again.home.exists()
    with pytest.raises(TypeError):
        again.block(1, 3)


def test_tables_of_costs_and_their_resamples():
    costs = np.array([[1.0, 3.0, 5.0, 7.0], [0.0, 0.0, 2.0, 2.0]])
    single = [(0, 3), (1, 4)]

    class Two:
        sites = ("block 0", "block 1")

    assert cost_tables(Two, single, costs) == [{FULL: 0.0, 3: 4.0}, {FULL: 0.0, 4: 1.0}]
    drawn = resampled(costs, ["a", "a", "b", "b"], 200, seed=0)
    assert {tuple(d) for d in drawn} == {(2.0, 0.0), (4.0, 1.0), (6.0, 2.0)}, "whole images, which two rows share"
    assert cost_tables(Two, single, drawn[0])[1][4] == drawn[0][1]
