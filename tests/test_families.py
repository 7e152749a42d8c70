"""Thirteen families of image-text-to-text models, tiny and random, go through everything that a LLaVA does."""

import copy
import math
import re

import families
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, Florence2Config, Gemma4Config, MllamaConfig

from medprune.answers import decoding
from medprune.answers.decoding import answer
from medprune.answers.prompts import IGNORED, Conversations, collator, prompt_text, see
from medprune.data.questions import load_conditions, load_questions
from medprune.data.record import Record
from medprune.models import loading
from medprune.models.families import block_number, deepstack, lora_targets, names, parts
from medprune.models.loading import load, load_blockwise, n_parameters
from medprune.models.sizes import GIB, NAMED_SHAPES, account, checkpoints, named_config, shape_of, skeleton
from medprune.pruning.leave_one_out import leave_one_out_logits, teacher_batch
from medprune.pruning.plan import apply_plan, check_kept, check_prunable, make_plan
from medprune.quantizing import awq, checkpoint
from medprune.quantizing.quantize import LEAST_TEXT, is_tied, quantization_batch, quantize, target_linears
from medprune.results import tables
from medprune.settings import REPO, TARGETS
from medprune.store import read_json
from medprune.tuning.finetune import add_lora, answer_loss, merge

EVERY = pytest.mark.parametrize("family", families.FAMILIES)
NEW = 6
SAID = ("This is rosacea.", "Lichen planus, on the wrist.", "Use emollients.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return where a family's model is, written once for all tests."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def get(name):
        if name not in made:
            made[name] = families.save(name, root / name)
        return made[name]

    return get


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Return questions about three pictures, unlike numbers of them about each."""
    files = families.images(tmp_path_factory.mktemp("pictures"))
    asked = zip((3, 2, 1), files, strict=True)
    return [{"id": f"{f.stem}{q}", "path": str(f), "question": q} for n, f in asked for q in families.QUESTIONS[:n]]


def whole_inputs(processor, row, **options):
    """Return what transformers' own chat template and processor make of a question."""
    content = [{"type": "image", "image": Image.open(row["path"])}, {"type": "text", "text": row["question"]}]
    options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    found = processor.apply_chat_template([[{"role": "user", "content": content}]], **options)
    return {k: v for k, v in found.items() if k != "labels"}


@torch.inference_mode()
def generated(model, processor, row, new=NEW):
    """Return the text and the logits (tokens, vocab) of transformers' own generate, a question at a time."""
    inputs = whole_inputs(processor, row)
    how = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, **how)
    ids, ends = out.sequences[0, inputs["input_ids"].shape[1] :], torch.tensor(model.generation_config.eos_token_id)
    ids = ids[~torch.isin(ids, ends)]
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip(), torch.cat(out.logits)


def without(model, blocks):
    pruned = copy.deepcopy(model)
    return apply_plan(pruned, make_plan(pruned.config, blocks, "", protect=()))


@EVERY
def test_leave_one_out_says_what_each_pruned_model_generates(folder, rows, family, monkeypatch):
    model, processor = load(folder(family), dtype=torch.float32)
    free = [b for b in range(families.BLOCKS) if b not in deepstack(model.config)]
    ends = torch.tensor(model.generation_config.eos_token_id).flatten().tolist()
    model.generation_config.eos_token_id = [*ends, *range(0, model.get_input_embeddings().num_embeddings, 9)]  # rows leave
    logits, plain = [], decoding.forward

    def forward(*arguments, **more):
        logits.append(plain(*arguments, **more))
        return logits[-1]

    together = answer(model, processor, rows * (1 + len(free)), NEW, skip=[b for b in (-1, *free) for _ in rows])
    assert len({a.text for a in together}) > len(free), "the test needs answers that differ"
    for number, block in enumerate((-1, *free)):
        pruned = without(model, [block]) if block >= 0 else model
        for row, said in zip(rows, together[number * len(rows) :], strict=False):
            assert said.text == generated(pruned, processor, row)[0], f"without block {block}"
    monkeypatch.setattr(decoding, "forward", forward)
    pruned, row = without(model, [free[-1]]), rows[-1]
    answer(model, processor, [row], NEW, skip=[free[-1]])
    wanted = generated(pruned, processor, row)[1]
    steps = torch.cat(logits if processor.looks_ahead else logits[1:])
    torch.testing.assert_close(steps, wanted[: len(steps)], rtol=0, atol=2e-4)


@EVERY
def test_deepstack_blocks_are_refused_by_name_and_others_change_what_is_said(folder, rows, family):
    model, processor = load(folder(family), dtype=torch.float32)
    fixed = deepstack(model.config)
    assert fixed == ((0, 1, 2) if family == "qwen3_vl" else ())
    for block in fixed:
        with pytest.raises(ValueError, match=f"block {block} has visual features added behind it by its place"):
            make_plan(model.config, [block], "", protect=())
    whole = generated(model, processor, rows[0], 1)[1]
    for block in range(len(fixed), families.BLOCKS):
        assert (generated(without(model, [block]), processor, rows[0], 1)[1] - whole).abs().max() > 0.1


@EVERY
def test_a_pruned_folder_loads_in_plain_transformers_with_its_processor_s_files_unchanged(folder, rows, family, tmp_path):
    model, processor = load(folder(family), dtype=torch.float32)
    apply_plan(model, make_plan(model.config, [3, 4], "", protect=()))
    loading.save(model, processor, tmp_path / "pruned")
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name
    assert generated(again.eval(), processor, rows[0])[0] == generated(model, processor, rows[0])[0]
    kept = [f for f in folder(family).iterdir() if f.suffix == ".jinja" or "tokenizer" in f.name or "process" in f.name]
    assert len(kept) >= 3 and all((tmp_path / "pruned" / f.name).read_bytes() == f.read_bytes() for f in kept)
    same = loading.load_processor(tmp_path / "pruned")
    for name, x in whole_inputs(processor, rows[1]).items():
        assert torch.equal(whole_inputs(same, rows[1])[name], x), name
    blockwise, _, fetch = load_blockwise(tmp_path / "pruned", dtype=torch.float32)
    for block in parts(blockwise).blocks:
        fetch(block)
    for name, tensor in again.float().state_dict().items():
        assert torch.equal(blockwise.state_dict()[name], tensor), name


@EVERY
def test_training_rows_are_the_prompt_and_the_answer_and_cost_together_what_they_cost_alone(folder, rows, family):
    model, processor = load(folder(family), dtype=torch.float32)
    items = []
    for n, path in enumerate(dict.fromkeys(r["path"] for r in rows)):
        turns = [(r["question"], SAID[i % 3]) for i, r in enumerate(rows) if r["path"] == path][: 3 - n]
        messages = []
        for question, said in turns:
            messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
        messages[0]["content"].insert(0, {"type": "image"})
        items.append((path, messages))
    data, collate = Conversations(processor, items, torch.float32, True, False), collator(processor.tokenizer.pad_token_id)
    model.train()
    losses, counts = [], []
    for (path, messages), encoded in zip(items, data, strict=True):
        for row in encoded:
            said = processor.tokenizer.decode(row["input_ids"][row["labels"] != IGNORED])
            ends = [m["content"][0]["text"] + processor.turn_end for m in messages[1::2]]
            assert said.replace(" ", "") == "".join(ends).replace(" ", "") or said.strip() in ends
        for asked, answered in zip(messages[::2], messages[1::2], strict=True):
            question = next(p["text"] for p in asked["content"] if p["type"] == "text")
            prompt = whole_inputs(processor, {"path": path, "question": question})
            end = answered["content"][0]["text"] + processor.turn_end
            target = processor.tokenizer(end, add_special_tokens=False, return_tensors="pt")["input_ids"]
            ids = torch.cat([prompt["input_ids"], target], 1)
            more = {k: torch.cat([v, torch.full_like(target, int(processor.looks_ahead))], 1) for k, v in prompt.items()
                    if k.endswith("token_type_ids")}  # fmt: skip
            prompt.pop("attention_mask")
            logits = model(**prompt | {"input_ids": ids} | more).logits[0, -1 - target.shape[1] : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, target[0], reduction="sum").item())
            counts.append(target.shape[1])
    batch = collate(list(data))
    labels = batch.pop("labels")
    assert int((labels != IGNORED).sum()) == sum(counts)
    assert answer_loss(model(**batch), labels).item() == pytest.approx(sum(losses) / sum(counts), rel=2e-4)


@EVERY
def test_teacher_forced_leave_one_out_equals_pruned_models(folder, rows, family):
    model, processor = load(folder(family), dtype=torch.float32)
    batch = teacher_batch(processor, rows[:3], SAID, torch.float32)
    free = range(len(deepstack(model.config)), families.BLOCKS)
    for block, found, *_ in list(leave_one_out_logits(model, batch, free))[1:]:
        expected = next(leave_one_out_logits(without(model, [block]), batch, []))[1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@EVERY
def test_adapters_stand_on_every_linear_of_the_blocks_and_fold_away(folder, rows, family):
    model, processor = load(folder(family), dtype=torch.float32)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and block_number(n) is not None}
    assert linears == {n for n, _ in model.named_modules() if re.fullmatch(lora_targets(TARGETS), n)}
    assert len(linears) == 7 * families.BLOCKS
    keys = model.state_dict().keys()
    wrapped = add_lora(model, 2, 4)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05)
    shown = see(processor, rows[0]["path"], torch.float32, rows[0]["question"])
    inputs = {"input_ids": shown.ids[None], **{k: v[None] for k, v in shown.kinds.items()}, **shown.inputs}
    with torch.inference_mode():
        before = wrapped.eval()(**inputs).logits
        merged = merge(wrapped)
        torch.testing.assert_close(merged(**inputs).logits, before, rtol=1e-3, atol=1e-3)
    assert merged.state_dict().keys() == keys
    trained = {n for n, p in merged.named_parameters() if any(n.startswith(x) for x in names(merged).projector)}
    assert trained, "the projector is trained along"


@EVERY
@pytest.mark.parametrize("method", ["rtn", "bnb"])
def test_packed_folders_say_what_the_packed_model_said(folder, rows, family, method, tmp_path):
    if method == "bnb":
        pytest.importorskip("bitsandbytes")
    model, processor = load(folder(family), dtype=torch.float32)
    model, info = quantize(model, method, 4, 64)
    assert {n for n in target_linears(load(folder(family))[0], 4)} == {
        n for n, m in model.named_modules() if type(m).__name__ in ("PackedLinear", "Linear4bit")
    }
    said = generated(model, processor, rows[0], 2)[1]
    checkpoint.save_quantized(model, tmp_path / "q", method, info, processor)
    again = checkpoint.load_quantized(tmp_path / "q")
    if method == "rtn":
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    torch.testing.assert_close(generated(again, processor, rows[0], 2)[1], said, rtol=1e-5, atol=1e-5)
    config = read_json(tmp_path / "q" / "config.json")["quantization_config"]
    skipped = config.get("modules_to_not_convert") or config.get("llm_int8_skip_modules")
    assert not any(n.startswith(tuple(skipped)) for n in target_linears(load(folder(family))[0], 4))


@EVERY
def test_a_packed_embedding_table_says_what_the_plain_one_says(folder, rows, family, tmp_path):
    model, processor = load(folder(family), dtype=torch.float32)
    tied, whole = is_tied(model), copy.deepcopy(model)
    model, info = quantize(model, "rtn", 8, 64, quantize_embeddings=8)
    blocks_alone, _ = quantize(whole, "rtn", 8, 64)
    said, wanted = (generated(m, processor, rows[0], 2)[1] for m in (model, blocks_alone))
    assert (said - wanted).abs().max() < 0.05 * wanted.abs().max(), "a factor lost would be far more"
    assert (parts(model).head is parts(model).table) == tied
    planned = account(model.config, 0, 8, 64, quantize_embeddings=8).part_bytes
    assert info["packed_bytes"]["embeddings"] == planned["embeddings"] + 2, "its factor is in float32 here"
    checkpoint.save_quantized(model, tmp_path / "q", "rtn", info, processor)
    again = checkpoint.load_quantized(tmp_path / "q")
    held, read = model.state_dict(), again.state_dict()
    assert held.keys() == read.keys() and all(torch.equal(read[name], tensor) for name, tensor in held.items())
    torch.testing.assert_close(generated(again, processor, rows[0], 2)[1], said, rtol=1e-5, atol=1e-5)


@EVERY
def test_awq_is_nearer_to_the_whole_model_than_rounding_and_its_folder_is_the_model(folder, rows, family, tmp_path, monkeypatch):
    monkeypatch.setattr(awq, "ENTRIES", 1)  # a row at a time
    whole, processor = load(folder(family), dtype=torch.float32)
    for block in parts(whole).blocks:  # loud channels, which rounding is coarse beside
        norm = block.input_layernorm.weight.data
        norm[::16] = norm[::16] * 8 + 8
    picture = Image.open(rows[0]["path"])
    pictures = [picture, ImageOps.flip(picture), ImageOps.mirror(picture), ImageOps.invert(picture)]
    prompts = [see(processor, picture, torch.float32, rows[i % 3]["question"]) for i, picture in enumerate(pictures)]
    shortest = min(len(p.ids) for p in prompts)
    batch = {"input_ids": torch.stack([p.ids[:shortest] for p in prompts])}
    batch |= {k: torch.stack([p.kinds[k][:shortest] for p in prompts]) for k in prompts[0].kinds}
    batch |= {k: torch.cat([p.inputs[k] for p in prompts]) for k in prompts[0].inputs}
    with torch.inference_mode():
        wanted = whole(**batch).logits.log_softmax(-1)

    def apart(model):
        with torch.inference_mode():
            return float((wanted.exp() * (wanted - model(**batch).logits.log_softmax(-1))).sum(-1).mean())

    rounded, _ = quantize(copy.deepcopy(whole), "rtn", 4, 64)
    searched, info = quantize(whole, "awq", 4, 64, batch)
    assert apart(searched) < apart(rounded)
    checkpoint.save_quantized(searched, tmp_path / "q", "awq", info, processor)
    again = checkpoint.load_quantized(tmp_path / "q").state_dict()
    assert again.keys() == searched.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in searched.state_dict().items())


@EVERY
def test_calibration_rows_are_cut_behind_their_images(folder, rows, family):
    model, processor = load(folder(family), dtype=torch.float32)
    records = [Record(row["id"], row["path"], "rosacea") for row in rows[:4]]
    batches = [quantization_batch(processor, records, load_conditions(), load_questions(), model.dtype, 0, most) for most in (8, 200)]
    short, long = (batch["input_ids"].shape[1] for batch in batches)
    seen = len(see(processor, records[0].path, model.dtype).ids)  # whose form all take where forms differ
    assert 8 < seen < short < long and short - seen <= LEAST_TEXT
    with torch.inference_mode():
        assert all(model(**batch).logits.isfinite().all() for batch in batches)


def test_the_integrity_gate_knows_blocks_of_every_name(folder):
    model, _ = load(folder("smolvlm"))
    plan, source = make_plan(model.config, [2], "", protect=()), dict(model.state_dict())
    pruned = dict(without(model, [2]).state_dict())
    check_kept(pruned, source, plan)
    pruned[next(n for n in pruned if block_number(n) == 2)] += 1
    with pytest.raises(ValueError, match="is not bit for bit"):
        check_kept(pruned, source, plan)


def test_a_turn_ends_as_the_template_ends_it(folder):
    model, processor = load(folder("gemma3"))
    end = processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert processor.turn_end == "<end_of_turn>" and end in model.generation_config.eos_token_id
    assert prompt_text(processor, "What?").startswith("<|im_start|>")
    seen = see(processor, Image.new("RGB", (40, 40)))
    assert (seen.ids == processor.tokenizer.bos_token_id).sum() == 1, "one beginning of sequence, not two"
    assert load(folder("llava"))[0].generation_config.eos_token_id == processor.tokenizer.eos_token_id


@EVERY
def test_sizes_are_those_of_the_model(folder, family):
    model, _ = load(folder(family))
    whole = account(model.config)
    assert whole.total_params == n_parameters(model) and whole.weights_bytes == 2 * whole.total_params
    apply_plan(model, make_plan(model.config, [4], "", protect=()))
    assert account(model.config).total_params == account(read_json(folder(family) / "config.json"), 1).total_params
    assert account(model.config).total_params == n_parameters(model) < whole.total_params


@pytest.mark.parametrize("name", ["medgemma-4b", "llava-med-v1.5-mistral-7b", "qwen2.5-vl-3b", "smolvlm2-2.2b", "internvl3-1b", "qwen3-vl-2b"])
def test_published_checkpoints_have_the_parameters_that_are_stated(name):
    found, config = account(named_config(name)), named_config(name)
    assert found.params_b == pytest.approx(checkpoints()[name]["published_b"], rel=0.01)
    assert found.total_params == n_parameters(skeleton(config))
    whole_words = shape_of(config).vocab % 8 == 0  # InternVL3-1B's 151,674 are not
    less = account(config, 2, 4, quantize_vision=True, quantize_embeddings=whole_words)
    assert less.weights_bytes < account(config, 0, 4).weights_bytes < found.weights_bytes
    if not whole_words:
        with pytest.raises(ValueError, match="151674 x 896, which 8 and groups of 64 do not divide"):
            account(config, 0, 4, quantize_embeddings=True)
    with pytest.raises(ValueError, match="medgemma-27b, smolvlm2-256m"):
        named_config("medgemma-7b")


def test_the_table_of_what_fits_removes_as_many_blocks_as_it_takes_and_no_more(monkeypatch):
    some = {name: checkpoints()[name] for name in ("medgemma-4b", "smolvlm2-256m", "qwen3-vl-8b")}
    monkeypatch.setattr(tables, "checkpoints", lambda: some)
    found = tables.fits_table(3.5, {"context": 1024}).set_index("model")
    assert {*found.index} == {*NAMED_SHAPES, *some}
    for name, row in found.iterrows():
        for column, packed, table in (("remove", 0, 0), ("packed_remove", 1, 0), ("table_remove", 1, 1)):
            how = {"bits": 4, "context": 1024, "quantize_vision": bool(packed), "quantize_embeddings": bool(table)}
            how |= {"quantize_head": bool(packed) and not shape_of(named_config(name)).tied}
            shape, n = shape_of(named_config(name)), row[column]
            less = shape.blocks - len(shape.fixed) - 1 if math.isnan(n) else int(n)
            sizes = [account(named_config(name), m, **how).total_bytes / GIB for m in range(less + 1)]
            assert (sizes.pop() <= 3.5) != math.isnan(n) and all(size > 3.5 for size in sizes)
    assert found.remove["smolvlm2-256m"] == 0 < found.packed_remove["llava-1.5-7b"] < found.remove["llava-1.5-7b"]
    assert found.table_gib["medgemma-4b"] < found.packed_gib["medgemma-4b"] - 0.8, "a tied table of 262,208 x 2560"
    assert math.isnan(found.remove["qwen3-vl-8b"]), "three of its blocks are fixed"
    assert "| cannot |" in tables.fits_text(0.5, {"context": 1024})


TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
UNFIT = {
    "mllama": lambda: MllamaConfig(text_config=TEXT | {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}),
    "gemma4": lambda: Gemma4Config(text_config=TEXT | {"num_hidden_layers": 4}),
    "florence2": lambda: Florence2Config(),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_the_structure_cannot_carry_is_refused_in_one_sentence(kind):
    with pytest.raises(ValueError, match="cannot be pruned|looks for them") as refused:
        check_prunable(UNFIT[kind]().to_dict())
    assert str(refused.value).count("\n") == 0 and str(refused.value).endswith(".")


def test_no_family_is_named_outside_the_file_of_shapes():
    named = re.compile(r"qwen[\d._]*.?vl|gemma|idefics|smolvlm|internvl|mistral.?3|pixtral|onevision|llava.?next|mllama", re.I)
    assert named.findall("hf.Qwen2_5_VLConfig medgemma-4b") == ["Qwen2_5_VL", "gemma"]
    for file in sorted((REPO / "medprune").rglob("*.py")):
        assert not named.findall(file.read_text(encoding="utf-8")), file
