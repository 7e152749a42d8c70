"""LoRA training of the tiny LLaVA: labels and loss, resuming, merging, what is put back afterwards."""

import gc
import types
import weakref

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback, TrainingArguments

from medprune.answers.decoding import answer
from medprune.answers.prompts import IGNORED, collator, encode_conversation, see
from medprune.data.questions import load_conditions
from medprune.models.families import parts
from medprune.models.loading import load
from medprune.settings import resolve
from medprune.tuning import finetune
from medprune.tuning.finetune import LiveCurve, add_lora, answer_loss, last_checkpoint, merge, train
from medprune.tuning.recovery import trainable


def test_loss_falls_on_answers_and_their_end_only(tiny, chat):
    _, processor = tiny
    encoded = encode_conversation(processor, chat, see(processor, Image.new("RGB", (40, 48))))
    said = processor.tokenizer.decode(encoded["input_ids"][encoded["labels"] != IGNORED])
    facts = load_conditions()["rosacea"]["answers"]
    assert said == f"{facts['name']}<|im_end|>{facts['treatment']}<|im_end|>"


def test_kept_logits_give_the_loss_of_transformers(tiny, chat):
    model, processor = tiny
    item = encode_conversation(processor, chat, see(processor, Image.new("RGB", (40, 48))))
    short = item | {k: item[k][: len(item[k]) // 2] for k in ("input_ids", "labels")}
    pixels = {"seen": {"pixel_values": torch.zeros(1, 3, 32, 32)}}
    batch = collator(processor.tokenizer.pad_token_id)([[item | pixels], [short | pixels]])
    labels = batch.pop("labels")
    ours = answer_loss(model(**batch), labels)
    full = torch.full_like(batch["input_ids"], IGNORED)
    full[0, : len(item["labels"])] = item["labels"]
    full[1, : len(short["labels"])] = short["labels"]
    del batch["logits_to_keep"]
    torch.testing.assert_close(ours, model(**batch, labels=full).loss)


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def tuned(base, rows, chat):
    """Return tuned(folder, recipe, stop): (model, processor, curve) after 4 steps; None after a kill at step `stop`."""
    items = [(r["path"], chat) for r in rows]

    def run(folder, recipe="lora", stop=None, **changes):
        config = resolve("smoke", {"sft_steps": 4, "save_every": 2, "learning_rate": 1e-2, "lora_r": 4} | changes)
        model, processor = load(base)
        torch.manual_seed(0)
        model = trainable(model, recipe, config)
        if stop:
            with pytest.raises(KeyboardInterrupt):
                train(model, processor, items, folder, config, 4, [Kill(stop)])
            return None
        curve = train(model, processor, items, folder, config, 4)
        return model, processor, curve

    return run


@pytest.mark.parametrize("recipe", ["lora", "last_blocks", "projector"])
def test_training_resumes_to_the_same_weights_and_merges_clean(tuned, rows, tmp_path, recipe):
    tuned(tmp_path / "b", recipe, stop=3)
    ends = []
    for folder in "ab":
        model, processor, curve = tuned(tmp_path / folder, recipe)
        if recipe == "lora":  # without autocast, weights in float32 beside bfloat16 do not answer
            assert len(answer(model, processor, rows[:2], 5)) == 2
        assert curve[-1]["loss"] < curve[0]["loss"]
        ends.append(merge(model).state_dict())
        assert len(answer(model, processor, rows[:2], 5)) == 2
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


@pytest.mark.parametrize("recipe", ["lora", "last_blocks"])
def test_training_that_had_ended_takes_no_step_more(tuned, tmp_path, recipe):
    """As when the disk is full, or a kill comes, before the model is saved."""
    ends = [tuned(tmp_path, recipe, schedule="constant") for _ in "ab"]
    assert ends[0][2] == ends[1][2] and ends[0][2][-1]["step"] == 4
    one, other = (merge(end[0]).state_dict() for end in ends)
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_training_that_patience_had_ended_is_not_gone_on_with(base, rows, chat, tmp_path):
    config = resolve("smoke", {"learning_rate": 0.3, "save_every": 1, "n_held_out": 2, "patience": 2, "lora_r": 4})
    other = [{**m, "content": [p | {"text": "Lichen."} if "text" in p else p for p in m["content"]]} for m in chat]
    items, held_out = [(r["path"], chat) for r in rows], [(rows[0]["path"], other)]

    def run(folder, *callbacks):
        model, processor = load(base)
        torch.manual_seed(0)
        model = trainable(model, "lora", config)
        curve = train(model, processor, items, tmp_path / folder, config, 8, callbacks, held_out=held_out)
        return curve, {n: p.detach().clone() for n, p in model.named_parameters()}

    class Killed(TrainerCallback):
        def on_save(self, args, state, control, **_):
            if control.should_training_stop:
                raise KeyboardInterrupt

    whole, weights = run("a")
    assert 3 < whole[-1]["step"] < 8, "the test needs patience to end it, and a best step before"
    with pytest.raises(KeyboardInterrupt):
        run("b", Killed())
    assert len(list((tmp_path / "b").glob("checkpoint-*"))) == 2, "the best and the last"
    for folder in "ba":
        curve, again = run(folder)
        assert curve == whole and all(torch.equal(weights[n], again[n]) for n in weights)


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_checkpoint_cut_short_is_passed_over_for_the_one_before(tuned, tmp_path, damage):
    whole = merge(tuned(tmp_path / "a")[0]).state_dict()
    tuned(tmp_path / "b", stop=3)
    before = last_checkpoint(tmp_path / "b")
    torn = tmp_path / "b" / "checkpoint-3"
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"half")
    if damage == "torn":
        (torn / "trainer_state.json").write_text('{"global_step": 3, "log')
    resumed = merge(tuned(tmp_path / "b")[0]).state_dict()
    assert before.endswith("checkpoint-2") and not torn.exists()
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_the_best_checkpoint_of_whole_weights_is_the_one_that_is_kept(base, rows, chat, tmp_path):
    config = resolve("smoke", {"learning_rate": 0.3, "save_every": 1, "n_held_out": 2, "patience": 2})
    other = [{**m, "content": [p | {"text": "Lichen."} if "text" in p else p for p in m["content"]]} for m in chat]
    seen = {}

    class Remember(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **_):
            seen[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters()}

    model, processor = load(base)
    model = trainable(model, "last_blocks", config)
    items = [(r["path"], chat) for r in rows]
    curve = train(model, processor, items, tmp_path, config, 8, [Remember()], held_out=[(rows[0]["path"], other)])
    best = min(curve, key=lambda point: point["held_out_loss"])["step"]
    assert best < curve[-1]["step"], "the test needs a best step before the last"
    assert all(torch.equal(p, seen[best][n]) for n, p in model.named_parameters())


class TwoSeen(TrainingArguments):
    """The Trainer's arguments on a machine where one process sees two GPUs."""

    def __post_init__(self):
        super().__post_init__()
        self._n_gpu = 2


def test_of_two_visible_gpus_the_trainer_takes_one(tuned, tmp_path, monkeypatch):
    one = tuned(tmp_path / "one")[2]
    monkeypatch.setattr(finetune, "TrainingArguments", TwoSeen)
    assert tuned(tmp_path / "two")[2] == one


@pytest.mark.parametrize("recipe", ["lora", "projector"])
def test_training_puts_back_attention_and_autocast(base, tuned, tmp_path, recipe):
    untrained = load(base)[0]
    model, _, _ = tuned(tmp_path, recipe)
    own = parts(untrained).text_model.config._attn_implementation
    assert own != "eager" and parts(model).text_model.config._attn_implementation == own
    assert "forward" not in vars(model), "the Trainer's autocast would go on"
    names = [getattr(m, "_weight_conversions", "none") for m in (untrained, merge(model))]
    assert repr(names[0]) == repr(names[1])


def test_training_that_is_killed_puts_attention_back(base, tmp_path, rows, chat):
    model, processor = load(base)
    own = parts(model).text_model.config._attn_implementation
    with pytest.raises(KeyboardInterrupt):
        train(add_lora(model, 4, 8), processor, [(rows[0]["path"], chat)], tmp_path, resolve("smoke"), 4, [Kill(1)])
    assert parts(model).text_model.config._attn_implementation == own


def test_an_adapted_model_dies_with_its_last_name(base):
    model = add_lora(load(base)[0], 4, 8)
    found = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert found() is None, "it holds itself, and on a GPU its memory"
    finally:
        gc.enable()


def test_the_live_curve_is_drawn_at_every_twentieth_step_and_at_the_end(monkeypatch):
    drawn, shown = [], types.SimpleNamespace(update=lambda figure: drawn.append(figure))
    monkeypatch.setattr(finetune, "display", lambda figure, display_id: drawn.append(figure) or shown)
    live, log = LiveCurve(lambda points: points), []
    for step in range(1, 46):
        log.append({"step": step, "loss": 1 / step})
        log += [{"step": step, "eval_loss": 2.0}] if step == 44 else []
        live.on_log(None, types.SimpleNamespace(log_history=log, global_step=step, max_steps=45), None)
    assert [points[-1]["step"] for points in drawn] == [*range(2, 46, 2), 45]
    assert drawn[-1][43] == {"step": 44, "loss": 1 / 44, "held_out_loss": 2.0}


def test_a_frozen_tower_stays_out_of_the_graph_while_training(base):
    model = add_lora(load(base, dtype=torch.float32)[0], 4, 8)
    tower = parts(model).vision_tower
    pixels = torch.zeros(1, 3, tower.config.image_size, tower.config.image_size, requires_grad=True)
    with finetune._prepared(model):
        assert not tower(pixel_values=pixels).last_hidden_state.requires_grad
    assert tower(pixel_values=pixels).last_hidden_state.requires_grad and "forward" not in vars(tower)
    tower.requires_grad_(True)
    with finetune._prepared(model):
        assert tower(pixel_values=pixels).last_hidden_state.requires_grad, "a tower that learns"
