"""Plans on the tiny LLaVA: what they refuse, applying and undoing them, the integrity gate, files that are none."""

import json

import pytest
import torch
from PIL import Image

from medprune.answers.decoding import answer
from medprune.answers.prompts import prompt_text
from medprune.models.families import parts
from medprune.models.loading import load, save
from medprune.pruning import plan as plan_module
from medprune.pruning.leave_one_out import teacher_batch
from medprune.pruning.plan import Plan, apply_plan, check_kept, load_plan, make_plan, without


def test_empty_plan_changes_no_bit_and_a_saved_pruned_model_is_its_base_without_blocks(tiny, rows, tmp_path):
    model, processor = tiny
    inputs = teacher_batch(processor, rows[:2], ["Yes.", "No."], torch.float32).inputs
    source, before = dict(model.state_dict()), model(**inputs).logits
    apply_plan(model, make_plan(model.config, [], ""))
    assert torch.equal(before, model(**inputs).logits)
    plan = make_plan(model.config, [2, 3], "base", criterion="by hand")
    apply_plan(model, plan)
    said = answer(model, processor, rows, 6)
    save(model, processor, tmp_path / "pruned")
    plan.save(tmp_path / "plan.json")
    again, processor = load(tmp_path / "pruned", dtype=torch.float32)
    assert load_plan(tmp_path / "plan.json", "base") == plan and len(parts(again).blocks) == 4
    check_kept(again.state_dict(), source, plan)
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


def is_whole(model, blocks) -> bool:
    counts = {model.config.text_config.num_hidden_layers, parts(model).text_model.config.num_hidden_layers}
    numbers = [b.self_attn.layer_idx for b in parts(model).blocks]
    return parts(model).blocks is blocks and counts == {6} and numbers == list(range(6))


def test_without_takes_blocks_out_and_puts_all_back(tiny):
    model, _ = tiny
    before, names = parts(model).blocks, list(model.state_dict())
    with without(model, [1, 3]):
        assert len(parts(model).blocks) == model.config.text_config.num_hidden_layers == 4
        assert parts(model).blocks[1] is before[2] and before[2].self_attn.layer_idx == 1
    assert is_whole(model, before) and list(model.state_dict()) == names


def test_a_gate_that_refuses_leaves_the_model_whole(tiny, monkeypatch):
    model, _ = tiny
    before = parts(model).blocks

    def refuse(*_):
        assert len(parts(model).blocks) == 5
        raise ValueError("not bit for bit")

    monkeypatch.setattr(plan_module, "check_kept", refuse)
    for attempt in (lambda: apply_plan(model, make_plan(model.config, [2], "")), without(model, [2]).__enter__):
        with pytest.raises(ValueError, match="not bit for bit"):
            attempt()
        assert is_whole(model, before)


GOOD = {"base": "b", "n_blocks": 4, "kept": [0, 1, 3], "criterion": ""}


@pytest.mark.parametrize(
    "text",
    [
        "{", "[1]", "null", json.dumps({**GOOD, "kept": 3}), json.dumps({k: v for k, v in GOOD.items() if k != "base"}),
        json.dumps({**GOOD, "kept": [0, 3, 1]}), json.dumps({**GOOD, "kept": [0, 1, 4]}),
        json.dumps({**GOOD, "kept": [-1, 1]}), json.dumps({**GOOD, "kept": [1, 1]}), json.dumps({**GOOD, "kept": "01"}),
        json.dumps({**GOOD, "kept": []}), json.dumps({**GOOD, "kept": [0, 1.5]}), json.dumps({**GOOD, "n_blocks": "4"}),
        json.dumps({**GOOD, "base": 7}), json.dumps({**GOOD, "kept": [True, 2]}), None,
    ],
)  # fmt: skip
def test_a_file_that_is_no_plan_is_named_in_one_sentence(text, tmp_path):
    file = tmp_path / "some.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match="some.json is no plan: it must be JSON with") as error:
        load_plan(file)
    assert "\n" not in str(error.value)


def test_a_plan_of_another_base_is_refused_where_the_base_is_known(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(GOOD))
    assert load_plan(tmp_path / "plan.json") == load_plan(tmp_path / "plan.json", "b") == Plan("b", 4, (0, 1, 3))
    with pytest.raises(ValueError, match="plan.json is for the model 'b', not for this one, 'c'"):
        load_plan(tmp_path / "plan.json", "c")
