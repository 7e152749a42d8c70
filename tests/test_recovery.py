"""Ways back after pruning: what each recipe trains and on which loss, held-out loss, early stop."""

import json
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from medprune import device
from medprune.answers.decoding import answer, answer_rows
from medprune.answers.prompts import IGNORED, Conversations, collator
from medprune.data.questions import load_conditions, load_questions
from medprune.data.record import Record
from medprune.models.families import parts
from medprune.models.loading import load, save
from medprune.pruning.leave_one_out import leave_one_out
from medprune.pruning.plan import apply_plan, blocks_of, make_plan
from medprune.results.figures import figure_recipes
from medprune.settings import RECIPES, Config, resolve
from medprune.store import Units, content, made
from medprune.tuning import finetune, processes, recovery, tower, trained
from medprune.tuning.finetune import add_lora, answer_loss, train
from medprune.tuning.recovery import Training


def conversation(answer="Psoriasis, with silvery scale."):
    text = {"type": "text", "text": "What is the name of this disease?"}
    said = {"type": "text", "text": answer}
    return [{"role": "user", "content": [{"type": "image"}, text]}, {"role": "assistant", "content": [said]}]


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for n, colour in enumerate(("red", "navy", "tan", "gray")):
        Image.new("RGB", (40, 48), colour).save(folder / f"{n}.png")
    return [(str(folder / f"{n}.png"), conversation()) for n in range(4)] * 2


@pytest.fixture
def batch(base, items):
    processor = load(base, dtype=torch.float32)[1]
    return collator(processor.tokenizer.pad_token_id)(list(Conversations(processor, items[:2], torch.float32, False, True)))


def changed(model, before):
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_changes_what_it_says_and_nothing_else(recipe, base, items, tmp_path):
    config = resolve("smoke", learning_rate=1e-1)
    plan = make_plan(load(base)[0].config, [3], "")
    pruned = apply_plan(load(base)[0], plan)
    before = {n: p.detach().clone() for n, p in pruned.named_parameters()}
    training = Training(base, plan, recipe, items, config, 2)
    recovery.train_into(training, tmp_path / "checkpoints", tmp_path / "out", "cpu", context="x")
    model, costs = load(tmp_path / "out")[0], made(tmp_path / "out", "x")
    found = changed(model, before)
    projector = {n for n in before if "projector" in n}
    linears = {n for n in before if "language_model.layers" in n and n.endswith("_proj.weight")}
    last = {n for n in before if any(f"language_model.layers.{b}." in n for b in (2, 3, 4))}
    last |= {"model.language_model.norm.weight"}
    adapted = projector | linears
    may = {"lora": adapted, "distill": adapted, "projector": projector, "last_blocks": last}[recipe]
    assert found and found <= may, "and the embeddings, which the tied head is, among what stays"
    assert len(found) > 0.8 * len(may)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    counted = sum(before[n].numel() for n in may) if recipe in ("projector", "last_blocks") else None
    assert costs["trainable_params"] == (counted or costs["trainable_params"]) > 0
    assert costs["steps"] == 2 and costs["train_s"] > 0 and costs["loss"] > 0


def test_last_blocks_train_an_untied_head(base):
    model = load(base)[0]
    model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    recovery.trainable(model, "last_blocks", resolve("smoke"))
    assert model.lm_head.weight.requires_grad and not parts(model).text_model.embed_tokens.weight.requires_grad


def test_recipes_that_cannot_be_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="recipe='lorra' must be 'lora', 'projector', 'last_blocks' or 'distill'"):
        resolve("smoke", recipe="lorra")
    with pytest.raises(ValueError, match="base_bits=4"):
        resolve("smoke", base_bits=4)
    with pytest.raises(ValueError, match="data_fractions"):
        resolve("smoke", data_fractions=[0.0])
    with pytest.raises(ValueError, match="patience=2 needs n_held_out"):
        resolve("local", {"patience": 2, "n_held_out": 0})


def test_distillation_adds_the_distance_to_the_teacher_where_answers_are_predicted(base, batch):
    teacher, student = (load(base, dtype=torch.float32)[0] for _ in range(2))
    inputs, chosen = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"] != IGNORED
    seen = {k: v for k, v in inputs.items() if k != "logits_to_keep"}
    n_hooks, whole = len(student._forward_pre_hooks), blocks_of(student)
    with torch.no_grad(), recovery.distillation(student, whole) as loss:
        out = student(**inputs)
        assert loss(out, batch["labels"]) == pytest.approx(answer_loss(out, batch["labels"])), "nothing is pruned"
        apply_plan(student, make_plan(student.config, [3], ""))
        wanted, found = (m.model(**seen).last_hidden_state[:, inputs["logits_to_keep"]][chosen] for m in (teacher, student))
        distance = ((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
        for _ in range(2):  # of a step taken in two parts
            out = student(**inputs)
            assert loss(out, batch["labels"]) - answer_loss(out, batch["labels"]) == pytest.approx(distance.item(), rel=1e-3)
        assert distance > 1e-4 and len(parts(student).blocks) == 5
    assert len(student._forward_pre_hooks) == n_hooks


def test_the_teacher_is_the_student_s_own_base_with_its_adapters_off(base, batch):
    teacher, student = (load(base, dtype=torch.float32)[0] for _ in range(2))
    whole = blocks_of(student)
    apply_plan(student, make_plan(student.config, [3], ""))
    student = add_lora(student, 4, 8).train()
    for name, parameter in student.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.add_(0.05)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    kept, chosen = inputs["logits_to_keep"], batch["labels"] != IGNORED
    wanted = teacher.model(**{k: v for k, v in inputs.items() if k != "logits_to_keep"}).last_hidden_state[:, kept][chosen]
    with recovery.distillation(student, whole) as loss:
        out = student(**inputs, output_hidden_states=True)
        found = out.hidden_states[-1][:, kept][chosen]
        distance = ((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
        added = loss(out, batch["labels"]) - answer_loss(out, batch["labels"])
        assert added.item() == pytest.approx(distance.item(), rel=1e-3)
    assert student.training and len(parts(student).blocks) == 5 and student.active_adapters == ["default"]


def test_training_items_are_a_balanced_share_of_the_images(base):
    names = list(load_conditions())
    records = [Record(f"{c}{i}", f"/{c}/{i}.png", c, "train", None, None) for c in names for i in range(10)]
    found = recovery.training_items(records, 0.2, 100, load_conditions(), load_questions(), 0)
    paths = {path for path, _ in found}
    assert len(found) >= 100 and len(paths) == 16
    assert {sum(p.startswith(f"/{c}/") for p in paths) for c in names} == {2}


def test_held_out_loss_is_measured_and_ends_training_early(base, items, tmp_path):
    config = resolve("smoke", {"learning_rate": 1e-2, "save_every": 2, "n_held_out": 2, "patience": 0})
    model, processor = load(base)
    curve = train(add_lora(model, 4, 8), processor, items, tmp_path / "a", config, 4, held_out=items[:2])
    assert [c["step"] for c in curve if "held_out_loss" in c] == [2, 4] and len(curve) == 4
    hopeless = resolve("smoke", {"learning_rate": 3.0, "save_every": 1, "n_held_out": 2, "patience": 2})
    other = [(path, conversation("Lichen planus.")) for path, _ in items[:2]]
    model, processor = load(base)
    curve = train(add_lora(model, 4, 8), processor, items, tmp_path / "b", hopeless, 30, held_out=other)
    losses = [c["held_out_loss"] for c in curve]
    assert len(curve) < 30 and len(losses) - 1 - losses.index(min(losses)) == 2


def test_recipes_are_drawn_with_their_shares_and_budgets():
    table = pd.DataFrame({"recipe": ["lora", "lora", "projector", "projector"], "fraction": [1.0, 0.25, 1.0, 1.0],
                          "budget": ["steps", "steps", "steps", "time"], "train_s": [30.0, 30, 20, 30],
                          "score": [80.0, 70, 50, 55], "low": 40.0, "high": 90.0, "score_before": 45.0})  # fmt: skip
    ax = figure_recipes(table).axes[0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "lora, same steps",
        "projector, same steps",
        "projector, same time",
    ]


def test_two_processes_learn_what_one_does(base, items, tmp_path):
    config = resolve("smoke", {"batch_size": 2, "learning_rate": 1e-2, "save_every": 2})
    plan, found = make_plan(load(base)[0].config, [3], ""), {}
    for n in (1, 2):
        out, training = tmp_path / f"out{n}", Training(base, plan, "lora", items, config, 3)
        processes.train(tmp_path / "job.json", training, tmp_path / f"checkpoints{n}", out, n)
        record = made(out, training.context())
        assert record["processes"] == n and record["steps"] == 3 and record["trainable_params"] > 0
        found[n] = [c["loss"] for c in record["curve"]]
    assert found[1] == pytest.approx(found[2], rel=1e-2) and found[1][-1] < found[1][0]
    one, two = (load_file(tmp_path / f"out{n}" / "model.safetensors") for n in (1, 2))
    before = apply_plan(load(base)[0], plan)
    before.save_pretrained(tmp_path / "before")
    before = load_file(tmp_path / "before" / "model.safetensors")
    moved = sum((one[k] - before[k]).float().norm() ** 2 for k in before) ** 0.5
    apart = sum((one[k] - two[k]).float().norm() ** 2 for k in before) ** 0.5
    assert apart < 0.1 * moved


@pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv of util-linux is here")
def test_processes_end_with_the_one_that_started_them(tmp_path):
    os.mkfifo(job := tmp_path / "job.json")  # which nobody writes, so that they would wait for ever
    words = f"from medprune.tuning import processes; processes._run({str(job)!r}, 2)"
    with subprocess.Popen([sys.executable, "-c", words]) as process:
        begun = []
        while len(begun) < 4 and process.poll() is None:  # accelerate, and two that it started
            time.sleep(0.1)
            begun = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.kill()
    _, alive = psutil.wait_procs(begun[1:], timeout=60)
    for one in alive:
        one.kill()
    assert len(begun) == 4 and not alive


def test_a_merged_model_says_what_the_adapted_one_did(base, items):
    model, processor = load(base, dtype=torch.float32)
    adapted = add_lora(model, 4, 8)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    rows = [{"path": path, "question": "What is it?"} for path, _ in items[:4]]
    plain = answer(load(base, dtype=torch.float32)[0], processor, rows, 12)
    before = answer(adapted.eval(), processor, rows, 12)
    assert before != plain, "the adapters do something"
    assert answer(finetune.merge(adapted), processor, rows, 12) == before


def test_a_merge_that_changes_what_is_said_is_refused(base, items, tmp_path, monkeypatch):
    real = finetune.merge

    def lossy(model):
        merged = real(model)
        merged.lm_head.weight.data.mul_(-1000)
        return merged

    def train(folder):
        training = Training(base, None, "lora", items, resolve("smoke"), 1)
        recovery.train_into(training, tmp_path / f"{folder}-checkpoints", tmp_path / folder, "cpu", context="x")
        return made(tmp_path / folder, "x")

    assert 0 <= train("whole")["merge_kl_nats"] < recovery.MAX_MERGE_KL
    monkeypatch.setattr(finetune, "merge", lossy)
    with pytest.raises(ValueError, match="merging changed what the model says by"):
        train("lossy")


def test_two_processes_answer_and_score_what_one_does(base, items, tmp_path, monkeypatch):
    config = resolve("smoke", {"processes": 2, "max_new_tokens": 6, "calibration_tokens": 6})
    rows = [{"id": f"{path} {k}", "path": path, "question": q} for path, _ in items[:4] for k, q in enumerate("ab")]
    model, processor = load(base)
    alone, together = (Units(tmp_path / name / "units.sqlite", "x") for name in ("one", "two"))
    leave_one_out(model, processor, rows, [1, 2, 3, 4], alone, 6, config.batch_rows)
    answer_rows(model, processor, rows, "whole", alone, config)
    processes.fill(together, "leave_one_out", base, rows, config, blocks=[1, 2, 3, 4])
    processes.fill(together, "answers", base, rows, config, label="whole")
    assert len(together) == len(alone) == 1 + 4 + len(rows)
    assert all(together[key] == alone[key] for key in [f"block {b}" for b in (1, 2, 3, 4)] + ["original"])
    assert all(together[f"whole {r['id']}"] == alone[f"whole {r['id']}"] for r in rows)
    monkeypatch.setattr(processes, "_run", lambda *_: pytest.fail("nothing was left to do"))
    processes.fill(together, "answers", base, rows, config, label="whole")
    processes.fill(together, "leave_one_out", base, rows, config, blocks=[1, 2, 3, 4])


def test_processes_are_asked_for_what_is_missing_and_take_their_share(base, items, tmp_path, monkeypatch):
    config = resolve("smoke", {"processes": 2, "max_new_tokens": 6, "calibration_tokens": 6})
    rows = [{"id": f"{path} {k}", "path": path, "question": q} for path, _ in items[:4] for k, q in enumerate("ab")]
    units, state = Units(tmp_path / "units.sqlite", "x"), types.SimpleNamespace(process_index=1, num_processes=2)
    units.add(f"whole {rows[0]['id']}", {"text": "", "tokens": 0, "ended": True})
    jobs = []
    monkeypatch.setattr(processes, "_run", lambda path, n: jobs.append((json.loads(path.read_text()), n)))
    processes.fill(units, "answers", base, rows, config, label="whole", removed=(2,))
    job, n = jobs[0]
    assert n == 2 and [r["id"] for r in job["rows"]] == [r["id"] for r in rows[1:]] and job["removed"] == [2]
    processes._answer(job, Config(job["config"]), state, "cpu")
    second = list(dict.fromkeys(path for path, _ in items))[1::2]
    assert {r["path"] for r in rows if f"whole {r['id']}" in units} == {rows[0]["path"], *second}


def test_the_tower_is_trained_again_where_what_it_saw_is_other(base, items, tmp_path, monkeypatch):
    records = [Record(f"{i}", path, c, "train", None, None) for i, (path, c) in enumerate(zip(
        [p for p, _ in items], list(load_conditions()) * 2, strict=False))]  # fmt: skip
    monkeypatch.setattr(tower, "prepare_base", lambda name: {"tiny": str(base)}.get(name, name))
    run, trained = types.SimpleNamespace(dir=tmp_path), []
    align = tower.align_vision
    monkeypatch.setattr(tower, "align_vision", lambda *args: trained.append(1) or align(*args))

    def prepare(**changes):
        config = resolve("smoke", vision_steps=2, **changes)
        assert tower.prepare_tuned_tower(config, run, records, load_conditions()) == str(tmp_path / "base")
        return len(trained)

    assert prepare() == prepare() == 1
    record = json.loads((tmp_path / "tower" / "medprune.json").read_text())
    assert [c["step"] for c in record["curve"]] == [1, 2] and not (tmp_path / "vision.json").exists()
    before = {n: p.clone() for n, p in load(base)[0].named_parameters()}
    moved = {n for n in changed(load(tmp_path / "base")[0], before)}
    assert moved and all("vision_tower" in n or "projector" in n for n in moved)
    first = content(tmp_path / "base")  # what it was put together from must not show, or the model is tuned again
    shutil.rmtree(tmp_path / "base")
    assert prepare() == 1 and content(tmp_path / "base") == first
    assert changed(load(tmp_path / "base")[0], before) == moved, "base/ is put together from tower/"
    assert [prepare(image_size=32), prepare(seed=1), prepare()] == [2, 3, 4], "A, B, A is trained three times"
    pixels = Path(records[0].path).read_bytes()
    Image.new("RGB", (40, 48), "white").save(records[0].path)
    assert prepare() == 5, "another picture under the same name"
    Path(records[0].path).write_bytes(pixels)
    assert tower.prepare_tuned_tower(resolve("smoke", base=str(base)), run, records, {}) == str(base)


def test_weights_that_scratch_has_lost_are_folded_again_and_nothing_is_trained(base, items, tmp_path, monkeypatch):
    run, config = types.SimpleNamespace(dir=tmp_path / "run"), resolve("smoke", base_bits=4, recipes=["lora"])
    save(*load(base), tmp_path / "source")
    training = Training(tmp_path / "source", make_plan(load(base)[0].config, [3], ""), "lora", items, config, 2)
    record = trained.train_once(run, tmp_path / "scratch", training, "x")
    first = content(tmp_path / "scratch")
    assert record["steps"] == 2 and record["merge_kl_nats"] is None
    assert (tmp_path / "run" / "adapters-scratch" / "adapter_config.json").exists()
    shutil.rmtree(tmp_path / "scratch")
    monkeypatch.setattr(recovery, "train_into", None)
    assert trained.train_once(run, tmp_path / "scratch", training, "x") == record
    assert content(tmp_path / "scratch") == first and load(tmp_path / "scratch")[0].config.text_config.num_hidden_layers == 5


def test_a_step_is_taken_in_parts_that_fit_and_learns_the_same(base, items, tmp_path, monkeypatch):
    config = resolve("smoke", {"batch_size": 4, "learning_rate": 1e-2, "save_every": 2})
    seen, real = [], finetune._arguments
    monkeypatch.setattr(finetune, "_arguments", lambda *a: seen.append(a[-1]) or real(*a))

    def learn(folder, **changes):
        torch.manual_seed(0)
        model, processor = load(base, dtype=torch.float32)
        wanted = Config({**vars(config), **changes})
        return [c["loss"] for c in train(add_lora(model, 4, 8), processor, items, tmp_path / folder, wanted, 3)]

    whole, parts_of_two = learn("a", micro_batch=None), learn("b", micro_batch=2)
    assert seen == [4, 2] and parts_of_two == pytest.approx(whole, rel=1e-3)
    forward, tried = finetune.Trainer.training_step, []

    def too_large(self, *args, **kwargs):
        tried.append(self.args.per_device_train_batch_size)
        if len(tried) > 1 and tried[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(finetune.Trainer, "training_step", too_large)
    monkeypatch.setattr(finetune, "cards", lambda: 1)
    monkeypatch.setattr(device, "HALVED", {})
    assert learn("c", micro_batch=2) == pytest.approx(whole, rel=1e-3), "as if no step had been tried before"
    assert device.HALVED == {"training": 1}
