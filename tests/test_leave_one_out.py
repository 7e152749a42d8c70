"""Criteria on the tiny LLaVA against each pruned model, and what a kill or another batch size costs."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from medprune.answers import decoding
from medprune.answers.decoding import answer
from medprune.models.families import parts
from medprune.pruning.criteria import block_influence, magnitude, removal_order
from medprune.pruning.leave_one_out import (
    check_skipping,
    leave_one_out_logits,
    logit_divergence,
    output_similarity,
    perplexity,
    similarity_rows,
    teacher_batch,
    teacher_batches,
)
from medprune.pruning.plan import apply_plan, make_plan
from medprune.store import Units
from medprune.tuning.finetune import answer_loss

SAID = ["This is rosacea.", "Use emollients and a mild topical steroid.", "A plaque.", "Lichen planus."]


def embed(texts):
    vectors = np.array([[len(t), t.count(" "), 1.0] for t in texts])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def units(tmp_path):
    return lambda name="units", kind=Units: kind(tmp_path / f"{name}.sqlite", "x")


def without(model, block):
    pruned = copy.deepcopy(model)
    return apply_plan(pruned, make_plan(pruned.config, [block] if block >= 0 else [], "", protect=()))


def test_output_similarity_resumes_without_asking_again(tiny, rows, units, monkeypatch):
    model, processor = tiny
    first = output_similarity(model, processor, rows, embed, [2, 3], units(), 6, 3)
    monkeypatch.setattr("medprune.pruning.leave_one_out.answer", None)
    again = output_similarity(model, processor, rows, embed, [2, 3], units(), 6, 3)
    assert first.equals(again)
    assert first.importance_score.between(0, 2).all()
    by_row = similarity_rows(first)
    assert len(by_row) == 2 * len(rows)
    expected = dict(zip(first.block, first.importance_score, strict=True))
    assert by_row.groupby("block").score.mean().to_dict() == pytest.approx(expected)


@torch.inference_mode()
def test_prefixes_share_what_is_below_a_skipped_block_and_equal_those_of_pruned_models(tiny, rows):
    model, processor = tiny
    images, blocks, entered = rows[:9:3], range(6), []
    for block in parts(model).blocks:
        block.register_forward_pre_hook(lambda _, inputs: entered.append(len(inputs[0])))
    asked, skip = images * 6 + images[:1], [b for b in blocks for _ in images] + [-1]
    seen = decoding._seen(model, processor, asked)
    cached = decoding._run_prefixes(model, seen, torch.tensor(skip))
    assert entered == [3 * (b + 1) for b in blocks], "three images, and three rows more for each block below"
    _, ids = decoding._questions(processor, rows, [[0]], seen)[0][1:]
    ids = ids.expand(len(asked), -1)
    cache = decoding._select(cached, list(range(len(asked))), ids.shape[1])
    with decoding.RowSkip(model, torch.tensor(skip)):
        logits = decoding.forward(model, ids, cache)
    for b in [*blocks, -1]:
        pruned, places = (without(model, b), [i for i, s in enumerate(skip) if s == b])
        alone = [seen[i] for i in places]
        expected = decoding._run_prefixes(pruned, alone, torch.full((len(alone),), -1))
        kept = [layer for number, layer in enumerate(cached.layers) if number != b]
        for ours, theirs in zip(kept, expected.layers, strict=True):
            for states in range(2):
                found = ours[states][ours[2][places]]
                torch.testing.assert_close(found, theirs[states], rtol=1e-5, atol=1e-5)
        own = decoding._select(expected, list(range(len(alone))), ids.shape[1])
        torch.testing.assert_close(logits[places], decoding.forward(pruned, ids[places], own), rtol=1e-5, atol=1e-5)


def test_teacher_forced_leave_one_out_equals_pruned_models(tiny, rows):
    model, processor = tiny
    batch = teacher_batch(processor, rows[:3], SAID[:3], torch.float32)
    found = {b: logp for b, logp, *_ in leave_one_out_logits(model, batch, range(6))}
    for b in range(6):
        _, expected, *_ = next(iter(leave_one_out_logits(without(model, b), batch, [])))
        torch.testing.assert_close(found[b], expected, rtol=1e-5, atol=1e-5)


def test_perplexity_by_row_equals_each_pruned_models_loss(tiny, rows, units):
    model, processor = tiny
    batches = teacher_batches(processor, rows[:3], SAID[:3], torch.float32, 2)
    table = perplexity(model, batches, range(6), units())
    assert list(table.groupby("block").row.apply(list)) == [[0, 1, 2]] * 6
    for b in range(6):
        pruned = without(model, b)
        for i, row in enumerate(rows[:3]):
            alone = teacher_batch(processor, [row], [SAID[i]], torch.float32)
            expected = answer_loss(pruned(**alone.inputs, logits_to_keep=alone.kept), alone.labels).item()
            assert table[(table.block == b) & (table.row == i)].score.item() == pytest.approx(expected, rel=1e-4)


def test_questions_of_one_image_share_it_and_score_as_if_each_were_alone(tiny, rows, units):
    model, processor = tiny
    together = teacher_batches(processor, rows[:4], SAID, torch.float32, 9)
    alone = [teacher_batch(processor, [row], [said], torch.float32) for row, said in zip(rows, SAID, strict=False)]
    assert [len(b.inputs["input_ids"]) for b in together] == [2], "two images, of three questions and of one"
    scores = [perplexity(model, b, [1, 2], units(str(len(b)))) for b in (together, alone)]
    by_block = [t.sort_values(["block", "row"]).score.tolist() for t in scores]
    assert by_block[0] == pytest.approx(by_block[1], rel=1e-4)
    kinds = [block_influence(model, b).sort_values(["block", "row"]) for b in (together, alone)]
    for column in ("score", "image_tokens", "text_tokens"):
        assert kinds[0][column].tolist() == pytest.approx(kinds[1][column].tolist(), rel=1e-4, abs=1e-6)


def test_logit_divergence_is_zero_for_a_block_that_does_nothing(tiny, rows, units):
    model, processor = tiny
    dead = parts(model).blocks[2]
    for linear in (dead.self_attn.o_proj, dead.mlp.down_proj):
        linear.weight.data.zero_()
    batches = teacher_batches(processor, rows[:4], ["This is rosacea."] * 4, torch.float32, 3)
    scores = logit_divergence(model, batches, [1, 2, 3], units())
    means = scores.groupby("block").score.mean()
    assert means[2] == pytest.approx(0, abs=1e-6)
    assert min(means[1], means[3]) > 1e-4
    reference = [next(leave_one_out_logits(model, batch, []))[1] for batch in batches]
    same = logit_divergence(model, batches, [1], units("other"), reference)
    assert same.score.tolist() == pytest.approx(scores[scores.block == 1].score.tolist())


class Killed(BaseException):
    pass


class DyingUnits(Units):
    """Units in which the process dies, as by SIGKILL, before it writes another after `alive` of them."""

    alive = 0

    def add_all(self, found):
        if self.alive < len(found):
            raise Killed
        self.alive -= len(found)
        super().add_all(found)


def spy_on_logits(monkeypatch):
    """Return a list that takes, for each batch that goes through the model, the blocks left out of it."""
    asked = []

    def spy(model, batch, blocks):
        asked.append(list(blocks))
        return leave_one_out_logits(model, batch, blocks)

    monkeypatch.setattr("medprune.pruning.leave_one_out.leave_one_out_logits", spy)
    return asked


def test_a_kill_costs_perplexity_one_block_of_one_batch(tiny, rows, units, monkeypatch):
    model, processor = tiny
    batches = teacher_batches(processor, rows[:4], ["This is rosacea."] * 4, torch.float32, 2)
    whole = perplexity(model, batches, [1, 2, 3], units("whole"))
    dying = units(kind=DyingUnits)
    dying.alive = 3 * 3 + 1  # the first batch's three rows without each block, the second's one row without one
    with pytest.raises(Killed):
        perplexity(model, batches, [1, 2, 3], dying)
    asked = spy_on_logits(monkeypatch)
    again = perplexity(model, batches, [1, 2, 3], units())
    assert asked == [[2, 3]]
    assert again.equals(whole)


@pytest.mark.parametrize(("before", "after", "done", "left"), [(9, 3, 2 * 6, [[3], [3]]), (3, 9, 3 * 3, [[1, 2, 3]])])
def test_other_batch_rows_after_a_kill_go_on_to_the_same_scores(
    tiny, rows, units, monkeypatch, before, after, done, left
):
    """done: rows x blocks before the kill, which costs the block, or the image, that was being written."""
    model, processor = tiny
    batches = {n: teacher_batches(processor, rows[:6], ["This is rosacea."] * 6, torch.float32, n) for n in (3, 9)}
    assert [len(batches[n]) for n in (3, 9)] == [2, 1]
    whole = perplexity(model, batches[after], [1, 2, 3], units("whole"))
    dying = units(kind=DyingUnits)
    dying.alive = done
    with pytest.raises(Killed):
        perplexity(model, batches[before], [1, 2, 3], dying)
    asked = spy_on_logits(monkeypatch)
    again = perplexity(model, batches[after], [1, 2, 3], units())
    assert asked == left
    assert again[["block", "row"]].equals(whole[["block", "row"]])
    assert again.score.tolist() == pytest.approx(whole.score.tolist(), rel=1e-5)


@pytest.mark.parametrize(("alive", "left"), [(3, [[3, 4]]), (2, [[1, 2], [3, 4]])])
def test_a_kill_costs_output_similarity_one_chunk_of_blocks(tiny, rows, units, monkeypatch, alive, left):
    """alive: the original's answers and the first chunk of two blocks, or a unit less, which costs the whole chunk."""
    model, processor = tiny
    blocks = [1, 2, 3, 4]
    whole = output_similarity(model, processor, rows, embed, blocks, units("whole"), 4, 2 * len(rows))
    dying = units(kind=DyingUnits)
    dying.alive = alive
    with pytest.raises(Killed):
        output_similarity(model, processor, rows, embed, blocks, dying, 4, 2 * len(rows))
    asked = []

    def spy(*arguments, skip=None, **more):
        asked.append(sorted(set(skip)))
        return answer(*arguments, skip=skip, **more)

    monkeypatch.setattr("medprune.pruning.leave_one_out.answer", spy)
    again = output_similarity(model, processor, rows, embed, blocks, units(), 4, 2 * len(rows))
    assert asked == left
    assert again.equals(whole)


def test_block_influence_and_magnitude_see_a_changed_block(tiny, rows, tmp_path):
    model, processor = tiny
    for parameter in parts(model).blocks[3].parameters():
        parameter.data.mul_(3)
    batches = teacher_batches(processor, rows[:3], ["This is rosacea."] * 3, torch.float32, 2)
    influence = block_influence(model, batches)
    assert influence.groupby("block").score.mean().idxmax() == 3
    assert sorted(zip(influence.block, influence.row, strict=True)) == [(b, r) for b in range(6) for r in range(3)]
    between = influence[["image_tokens", "text_tokens"]]
    assert (influence.score.between(between.min(axis=1) - 1e-6, between.max(axis=1) + 1e-6)).all()
    model.save_pretrained(tmp_path)
    scores = magnitude(tmp_path)
    assert max(scores, key=scores.get) == 3
    assert removal_order(scores, (0, 5))[-1] == 3


def test_a_model_whose_blocks_do_something_by_their_place_is_not_scored(tiny, rows, units):
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    check_skipping(model, processor, rows[0], 1)

    def by_place(block, inputs):  # as a family may scale or mask by a block's number, which no configuration says
        return (inputs[0] * (1 + block.self_attn.layer_idx), *inputs[1:])

    for block in parts(model).blocks:
        block.register_forward_pre_hook(by_place)
    with pytest.raises(ValueError, match="without block 1 does not answer as its own forward pass does"):
        output_similarity(model, processor, rows, embed, [1, 2], units(), 6, 3)
    assert "block 1" not in units(), "before anything was scored"


def test_a_model_whose_prefix_is_cut_is_not_scored(tiny, rows, units, monkeypatch):
    real = decoding._select

    def cut(cached, which, room):
        layers = [(keys[:, :, -6:], values[:, :, -6:], places) for keys, values, places in cached.layers]
        return real(dataclasses.replace(cached, layers=layers), which, room)

    monkeypatch.setattr(decoding, "_select", cut)
    with pytest.raises(ValueError, match="does not answer as its own forward pass does"):
        output_similarity(*tiny, rows, embed, [1, 2], units(), 6, 3)
