"""The tiny LLaVA through generation, the leave-one-out batch, pruning and its gate, LoRA training and merging."""

import copy

import pytest
import torch
from PIL import Image

from medprune.store import Units
from medprune.settings import resolve
from medprune.data.questions import load_conditions
from medprune.answers.prompts import IGNORED, collator, encode_conversation
from medprune.models.loading import save
from medprune.tuning.finetune import add_lora, answer_loss, merge, train
from medprune.answers.decoding import answer
from medprune.answers.prompts import prompt_text
from medprune.pruning.criteria import block_influence, magnitude, removal_order
from medprune.pruning.leave_one_out import leave_one_out_logits, logit_divergence, original_logits, output_similarity, perplexity, similarity_rows, teacher_batch, teacher_batches
from medprune.models.families import parts
from medprune.models.loading import load
from medprune.pruning.plan import apply_plan, check_kept, load_plan, load_pruned, make_plan


@pytest.fixture
def tiny(base):
    return load(base, dtype=torch.float32)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    found = []
    for n, colour in enumerate(("red", "navy", "tan")):
        Image.new("RGB", (40, 48), colour).save(folder / f"{n}.png")
        for question in ("What is the name of this disease?", "How is it treated?", "And the signs?"):
            found.append({"id": f"{n}{question}", "path": str(folder / f"{n}.png"), "question": question})
    return found


def test_answers_equal_those_of_transformers_generate(tiny, rows):
    model, processor = tiny
    ours = answer(model, processor, rows, max_new_tokens=10, batch_rows=4)
    for row, said in zip(rows, ours, strict=True):
        batch = processor(
            text=prompt_text(processor, row["question"]), images=Image.open(row["path"]), return_tensors="pt"
        )
        out = model.generate(**batch, max_new_tokens=10, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert said.text == processor.tokenizer.decode(out, skip_special_tokens=True).strip()


def test_leave_one_out_batch_says_what_each_pruned_model_says(tiny, rows):
    model, processor = tiny
    blocks = range(6)
    together = answer(model, processor, rows * 6, 8, batch_rows=7, skip=[b for b in blocks for _ in rows])
    assert len({a.text for a in together}) > 6, "the test needs answers that differ"
    for b in blocks:
        pruned = copy.deepcopy(model)
        apply_plan(pruned, make_plan(pruned.config, [b], "", protect=()))
        alone = answer(pruned, processor, rows, 8, batch_rows=7)
        assert alone == together[b * len(rows) : (b + 1) * len(rows)]


def test_output_similarity_resumes_without_asking_again(tiny, rows, tmp_path, monkeypatch):
    model, processor = tiny

    def embed(texts):
        vectors = torch.tensor([[len(t), t.count(" "), 1.0] for t in texts])
        return (vectors / vectors.norm(dim=1, keepdim=True)).numpy()

    units = Units(tmp_path / "units.jsonl", "x")
    first = output_similarity(model, processor, rows, embed, [2, 3], units, 6, 3)
    with open(tmp_path / "units.jsonl", "a") as f:
        f.write('{"context": "x", "key": "blo')  # a kill in the middle of a line
    monkeypatch.setattr("medprune.importance.answer", None)
    again = output_similarity(model, processor, rows, embed, [2, 3], Units(tmp_path / "units.jsonl", "x"), 6, 3)
    assert first.equals(again)
    assert first.importance_score.between(0, 2).all()
    by_row = similarity_rows(first)
    assert len(by_row) == 2 * len(rows)
    assert by_row.groupby("block").score.mean().to_dict() == pytest.approx(dict(zip(first.block, first.importance_score, strict=True)))


def test_teacher_forced_leave_one_out_equals_pruned_models(tiny, rows):
    model, processor = tiny
    batch = teacher_batch(processor, rows[:3], ["This is rosacea.", "Emollients.", "A plaque."], torch.float32)
    found = {b: logp for b, logp, *_ in leave_one_out_logits(model, dict(batch), range(6))}
    for b in range(6):
        pruned = copy.deepcopy(model)
        apply_plan(pruned, make_plan(pruned.config, [b], "", protect=()))
        _, expected, *_ = next(iter(leave_one_out_logits(pruned, dict(batch), [])))
        torch.testing.assert_close(found[b], expected, rtol=1e-5, atol=1e-5)


def test_perplexity_by_row_equals_each_pruned_models_loss(tiny, rows, tmp_path):
    model, processor = tiny
    said = ["This is rosacea.", "Use emollients and a mild topical steroid.", "A plaque."]
    batches = teacher_batches(processor, rows[:3], said, torch.float32, 2)
    table = perplexity(model, batches, range(6), Units(tmp_path / "u.jsonl", "x"))
    assert list(table.groupby("block").row.apply(list)) == [[0, 1, 2]] * 6
    for b in range(6):
        pruned = copy.deepcopy(model)
        apply_plan(pruned, make_plan(pruned.config, [b], "", protect=()))
        for i, row in enumerate(rows[:3]):
            alone = teacher_batch(processor, [row], [said[i]], torch.float32)
            labels, _ = alone.pop("labels"), alone.pop("owner")
            expected = answer_loss(pruned(**alone), labels).item()
            assert table[(table.block == b) & (table.row == i)].score.item() == pytest.approx(expected, rel=1e-4)


def test_questions_of_one_image_share_it_and_score_as_if_each_were_alone(tiny, rows, tmp_path):
    model, processor = tiny
    said = ["This is rosacea.", "Use emollients and a mild topical steroid.", "A plaque.", "Lichen planus."]
    together = teacher_batches(processor, rows[:4], said, torch.float32, 9)
    alone = [teacher_batch(processor, [row], [answer], torch.float32) for row, answer in zip(rows, said, strict=False)]
    assert [len(b["input_ids"]) for b in together] == [2], "two images, of three questions and of one"
    scores = [perplexity(model, b, [1, 2], Units(tmp_path / f"{len(b)}.jsonl", "x")) for b in (together, alone)]
    by_block = [t.sort_values(["block", "row"]).score.tolist() for t in scores]
    assert by_block[0] == pytest.approx(by_block[1], rel=1e-4)
    kinds = [block_influence(model, b).sort_values(["block", "row"]) for b in (together, alone)]
    for column in ("score", "image_tokens", "text_tokens"):
        assert kinds[0][column].tolist() == pytest.approx(kinds[1][column].tolist(), rel=1e-4, abs=1e-6)


def test_logit_divergence_is_zero_for_a_block_that_does_nothing(tiny, rows, tmp_path):
    model, processor = tiny
    dead = parts(model).blocks[2]
    for linear in (dead.self_attn.o_proj, dead.mlp.down_proj):
        linear.weight.data.zero_()
    batches = teacher_batches(processor, rows[:4], ["This is rosacea."] * 4, torch.float32, 3)
    scores = logit_divergence(model, batches, [1, 2, 3], Units(tmp_path / "u.jsonl", "x"))
    means = scores.groupby("block").score.mean()
    assert means[2] == pytest.approx(0, abs=1e-6)
    assert min(means[1], means[3]) > 1e-4
    same = logit_divergence(model, batches, [1], Units(tmp_path / "v.jsonl", "x"), original_logits(model, batches))
    assert same.score.tolist() == pytest.approx(scores[scores.block == 1].score.tolist())


class Killed(BaseException):
    pass


class DyingUnits(Units):
    """Units in which the process dies, as by SIGKILL, in the middle of writing the line after `alive` whole ones."""

    alive = 0

    def add(self, key, value):
        if self.alive == 0:
            with open(self.path, "a") as f:
                f.write('{"context": "x", "key": "')
            raise Killed
        self.alive -= 1
        super().add(key, value)


def test_a_kill_costs_perplexity_one_block_of_one_batch(tiny, rows, tmp_path, monkeypatch):
    model, processor = tiny
    batches = teacher_batches(processor, rows[:4], ["This is rosacea."] * 4, torch.float32, 2)
    whole = perplexity(model, batches, [1, 2, 3], Units(tmp_path / "whole.jsonl", "x"))
    units = DyingUnits(tmp_path / "u.jsonl", "x")
    units.alive = 4  # all of the first batch, one block of the second
    with pytest.raises(Killed):
        perplexity(model, batches, [1, 2, 3], units)
    asked = []

    def spy(model, batch, blocks):
        asked.append(list(blocks))
        return leave_one_out_logits(model, batch, blocks)

    monkeypatch.setattr("medprune.importance.leave_one_out_logits", spy)
    again = perplexity(model, batches, [1, 2, 3], Units(tmp_path / "u.jsonl", "x"))
    assert asked == [[2, 3]]
    assert again.equals(whole)


def test_a_kill_costs_output_similarity_one_chunk_of_blocks(tiny, rows, tmp_path, monkeypatch):
    model, processor = tiny

    def embed(texts):
        return torch.tensor([[len(t), t.count(" "), 1.0] for t in texts]).numpy()

    whole = output_similarity(model, processor, rows, embed, [1, 2, 3, 4], Units(tmp_path / "w.jsonl", "x"), 4, 12)
    units = DyingUnits(tmp_path / "u.jsonl", "x")
    units.alive = 3  # the original's answers and the first chunk: half of 12 rows hold 2 blocks of 3 images
    with pytest.raises(Killed):
        output_similarity(model, processor, rows, embed, [1, 2, 3, 4], units, 4, 12)
    asked = []

    def spy(*arguments, skip=None, **more):
        asked.append(sorted(set(skip)))
        return answer(*arguments, skip=skip, **more)

    monkeypatch.setattr("medprune.importance.answer", spy)
    again = output_similarity(model, processor, rows, embed, [1, 2, 3, 4], Units(tmp_path / "u.jsonl", "x"), 4, 12)
    assert asked == [[3, 4]]
    assert again.equals(whole)


def test_block_influence_and_magnitude_see_a_changed_block(tiny, rows):
    model, processor = tiny
    for parameter in parts(model).blocks[3].parameters():
        parameter.data.mul_(3)
    batches = teacher_batches(processor, rows[:3], ["This is rosacea."] * 3, torch.float32, 2)
    influence = block_influence(model, batches)
    assert influence.groupby("block").score.mean().idxmax() == 3
    assert sorted(zip(influence.block, influence.row, strict=True)) == [(b, r) for b in range(6) for r in range(3)]
    between = influence[["image_tokens", "text_tokens"]]
    assert (influence.score.between(between.min(axis=1) - 1e-6, between.max(axis=1) + 1e-6)).all()
    scores = magnitude(model)
    assert max(scores, key=scores.get) == 3
    assert removal_order(scores, (0, 5))[-1] == 3


def test_empty_plan_changes_no_bit_and_a_saved_pruned_model_is_checked(tiny, base, rows, tmp_path):
    model, processor = tiny
    batch = teacher_batch(processor, rows[:2], ["Yes.", "No."], torch.float32)
    kept_logits = batch.pop("logits_to_keep"), batch.pop("labels")
    before = model(**batch).logits
    apply_plan(model, make_plan(model.config, [], ""))
    assert torch.equal(before, model(**batch).logits) and kept_logits
    plan = make_plan(model.config, [2, 3], "base")
    apply_plan(model, plan)
    said = answer(model, processor, rows, 6)
    save(model, processor, tmp_path / "pruned")
    plan.save(tmp_path / "plan.json")
    again, processor = load_pruned(tmp_path / "pruned", load_plan(tmp_path / "plan.json"), base, dtype=torch.float32)
    assert answer(again, processor, rows, 6) == said
    prompt = processor(
        text=prompt_text(processor, rows[0]["question"]), images=Image.open(rows[0]["path"]), return_tensors="pt"
    )
    for cached in (True, False):  # a cache that still counted the removed blocks would tell these apart
        kept = [m.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=cached) for m in (model, again)]
        assert torch.equal(*kept)
        tokens = kept[0][0, prompt["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(tokens, skip_special_tokens=True).strip().startswith(said[0].text)


@pytest.mark.parametrize("damage", ["corrupt", "drop", "rename"])
def test_gate_refuses_a_damaged_tensor_by_name(tiny, damage):
    model, _ = tiny
    source = dict(model.state_dict())
    plan = make_plan(model.config, [2], "")
    apply_plan(model, plan)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    name = "model.language_model.layers.3.mlp.up_proj.weight"
    tensor = state.pop(name)
    if damage == "corrupt":
        state[name] = tensor.clone()
        state[name][0, 0] += 1e-6
    elif damage == "rename":
        state[name.replace("up_proj", "upp_proj")] = tensor
    with pytest.raises(ValueError, match="layers.[34].mlp.upp?_proj.weight"):
        check_kept(state, source, plan)


@pytest.mark.parametrize(
    ("removed", "words"), [([0], "protected"), ([5], "protected"), ([9], "out of range"), ([2, 2], "twice")]
)
def test_plan_refuses_blocks_in_one_sentence(tiny, removed, words):
    with pytest.raises(ValueError, match=words):
        make_plan(tiny[0].config, removed, "")


def test_checkpoint_with_a_missing_tensor_is_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    model, processor = tiny
    save(model, processor, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = next(n for n in tensors if "down_proj" in n)
    del tensors[name]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks .*down_proj"):
        load(tmp_path / "m")


def _conversation():
    facts = load_conditions()["rosacea"]["answers"]
    text = lambda s: [{"type": "text", "text": s}]  # noqa: E731
    return [
        {"role": "user", "content": [{"type": "image"}, *text("What is it?")]},
        {"role": "assistant", "content": text(facts["name"])},
        {"role": "user", "content": text("How is it treated?")},
        {"role": "assistant", "content": text(facts["treatment"])},
    ]


def test_loss_falls_on_answers_and_their_end_only(tiny):
    _, processor = tiny
    encoded = encode_conversation(processor, _conversation())
    said = processor.tokenizer.decode(encoded["input_ids"][encoded["labels"] != IGNORED])
    facts = load_conditions()["rosacea"]["answers"]
    assert said == f"{facts['name']}<|im_end|>{facts['treatment']}<|im_end|>"


def test_kept_logits_give_the_loss_of_transformers(tiny, rows):
    model, processor = tiny
    item = encode_conversation(processor, _conversation())
    short = {k: v[: len(v) // 2] for k, v in item.items()}
    pixels = {"pixel_values": torch.zeros(3, 32, 32)}
    batch = collator(processor.tokenizer.pad_token_id)([item | pixels, short | pixels])
    labels = batch.pop("labels")
    ours = answer_loss(model(**batch), labels)
    full = torch.full_like(batch["input_ids"], IGNORED)
    full[0, : len(item["labels"])] = item["labels"]
    full[1, : len(short["labels"])] = short["labels"]
    del batch["logits_to_keep"]
    torch.testing.assert_close(ours, model(**batch, labels=full).loss)


def test_training_resumes_to_the_same_weights_and_merges_clean(base, rows, tmp_path):
    config = resolve("smoke", sft_steps=4, save_every=2, learning_rate=1e-2)
    items = [(r["path"], _conversation()) for r in rows]

    def run(folder, stop=None):
        model, processor = load(base)
        torch.manual_seed(0)
        model = add_lora(model, 4, 8)
        if stop:
            from transformers import TrainerCallback

            class Kill(TrainerCallback):
                def on_step_end(self, args, state, control, **_):
                    if state.global_step == stop:
                        raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                train(model, processor, items, folder, config, 4, [Kill()])
            return run(folder)
        curve = train(model, processor, items, folder, config, 4)
        adapted = answer(model, processor, rows[:2], 5)
        merged = merge(model)
        assert len(adapted) == 2 and curve[-1]["loss"] < curve[0]["loss"]
        return merged.state_dict()

    whole, resumed = run(tmp_path / "a"), run(tmp_path / "b", stop=3)
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
