"""The tensors of a GGUF, read back by the gguf package, are ours: to the last bit in 16, within 1% of a step in Q4_1."""

import errno
import json
from types import SimpleNamespace

import gguf
import jinja2
import numpy as np
import pytest
import torch
from exported import batch_of, retold
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from medprune.exporting import gguf as writing
from medprune.exporting.folders import export_hub, open_source
from medprune.exporting.gguf import MMPROJ, TEXT, export_gguf, paired, q4_1, vision_layers_run
from medprune.exporting.vocabulary import MARKER, modelfile, pre_tokenizer, scores, server_template
from medprune.models.loading import load, save
from medprune.quantizing.checkpoint import load_quantized, save_quantized
from medprune.quantizing.quantize import quantize

OURS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
VISION = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj", "ln1": "layer_norm1", "ln2": "layer_norm2", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
}  # fmt: skip


def read(path):
    """Return ({key: value}, {name: float32 array}) of a GGUF."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


def unpaired(rows, heads):
    """Undo llama.cpp's order of a projection's rows."""
    return rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def text_weight(tensors, name, config, rotated):
    found = tensors[name]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    return unpaired(found, heads) if heads and rotated else found


def ours_of(model, name):
    if name.startswith("blk."):
        _, block, part, kind = name.split(".")
        return model.get_parameter(f"model.language_model.layers.{block}.{OURS[part]}.{kind}")
    heads = {"token_embd": "model.language_model.embed_tokens", "output_norm": "model.language_model.norm"}
    return model.get_parameter({**heads, "output": "lm_head"}[name.split(".")[0]] + ".weight")


@pytest.mark.parametrize("kind,tied,dtype", [
    ("llama", True, torch.bfloat16), ("llama", False, torch.float16), ("mistral", False, torch.float32),
    ("qwen2", True, torch.bfloat16),
])  # fmt: skip
def test_text_tensors_equal_ours_to_the_last_bit(family, tmp_path, kind, tied, dtype):
    model, processor = load(family(kind, tied), dtype=dtype)
    save(model, processor, tmp_path / "in")
    export_gguf(open_source(tmp_path / "in"), tmp_path / "out")
    keys, tensors = read(tmp_path / "out" / TEXT)
    assert ("output.weight" in tensors) != tied
    n_parameters = sum(p.numel() for p in model.model.language_model.parameters())
    assert sum(t.size for t in tensors.values()) == n_parameters + (0 if tied else model.lm_head.weight.numel())
    assert ("blk.1.attn_q.bias" in tensors) == (kind == "qwen2")
    for name in tensors:
        found = text_weight(tensors, name, model.config.text_config, rotated=kind != "qwen2")
        assert np.array_equal(found, ours_of(model, name).detach().float().numpy()), name
    architecture = "qwen2" if kind == "qwen2" else "llama"
    assert keys["general.architecture"] == architecture and keys[f"{architecture}.block_count"] == 2
    assert keys[f"{architecture}.context_length"] == 512 and keys[f"{architecture}.attention.head_count_kv"] == 2
    assert keys[f"{architecture}.vocab_size"] == 1024


def test_the_context_ends_where_a_window_would_be_missed(family, tmp_path):
    folder = family("mistral", True)
    retold(folder, "text_config", sliding_window=256)
    export_gguf(open_source(folder), tmp_path / "out")
    assert read(tmp_path / "out" / TEXT)[0]["llama.context_length"] == 256


@pytest.mark.parametrize("layer,run", [(-2, 1), (-1, 2), (1, 1)])
def test_tower_is_written_as_far_as_it_is_used(family, tmp_path, layer, run):
    model, processor = load(family("llama", True), dtype=torch.bfloat16)
    save(model, processor, tmp_path / "in")
    retold(tmp_path / "in", vision_feature_layer=layer)
    source = open_source(tmp_path / "in")
    assert vision_layers_run(source) == run
    export_gguf(source, tmp_path / "out")
    keys, tensors = read(tmp_path / "out" / MMPROJ)
    assert keys["clip.vision.feature_layer"] == [run] and keys["clip.vision.block_count"] == run
    assert keys["clip.projector_type"] == "mlp" and not keys["clip.use_gelu"]
    assert keys["clip.vision.image_mean"] == pytest.approx(processor.image_processor.image_mean)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    assert not any(name.startswith(f"v.blk.{run}.") for name in tensors)
    want = {"v.class_embd": tower.embeddings.class_embedding, "mm.0.weight": projector.linear_1.weight}
    want |= {"mm.2.bias": projector.linear_2.bias, "v.pre_ln.weight": tower.pre_layrnorm.weight}
    want |= {"v.position_embd.weight": tower.embeddings.position_embedding.weight}
    want |= {"v.patch_embd.weight": tower.embeddings.patch_embedding.weight}
    for i in range(run):
        for theirs, ours in VISION.items():
            for part in ("weight", "bias"):
                want[f"v.blk.{i}.{theirs}.{part}"] = tower.get_parameter(f"encoder.layers.{i}.{ours}.{part}")
    assert want.keys() <= tensors.keys() and len(tensors) == len(want) + 3  # mm.0.bias, mm.2.weight, v.pre_ln.bias
    for name, tensor in want.items():
        np.testing.assert_allclose(tensors[name], tensor.detach().float().numpy(), rtol=0, atol=2**-24)  # F16's least


@pytest.mark.parametrize("method,group_size", [("rtn", 32), ("rtn", 64), ("awq", 32)])
def test_codes_are_kept_in_q4_1(tiny, rows, tmp_path, method, group_size):
    model, processor = tiny
    batch = batch_of(processor, rows)
    calibration = {k: v.repeat(4, *[1] * (v.dim() - 1)) for k, v in batch.items()}
    model, info = quantize(model, method, 4, group_size, calibration if method == "awq" else None)
    save_quantized(model, tmp_path / "in", method, info, processor)
    lines = export_gguf(open_source(tmp_path / "in"), tmp_path / "out")
    assert any("keeps more in the same file" in line for line in lines) == (group_size > 32)
    assert any("where the plan has" in line for line in lines)
    model, config = load_quantized(tmp_path / "in"), model.config.text_config
    _, tensors = read(tmp_path / "out" / TEXT)
    errors = []
    for name in (n for n in tensors if n.startswith("blk.") and "norm" not in n):
        _, block, part, _ = name.split(".")
        layer = model.get_submodule(f"model.language_model.layers.{block}.{OURS[part]}")
        step = layer.parts()[1].float().t().repeat_interleave(group_size, 1)
        error = (torch.from_numpy(text_weight(tensors, name, config, True)) - layer.fake_quantized_weight()).abs()
        errors.append(float((error / step).max()))
    assert len(errors) == 6 * 7 and 0 < max(errors) <= 0.01


@pytest.mark.parametrize("tied", [True, False])
def test_mixed_widths_a_tower_and_a_table_are_kept_as_near_as_gguf_has_them(family, tmp_path, tied):
    model, processor = load(family("llama", tied), dtype=torch.bfloat16)
    options = {"quantize_vision": 8, "quantize_embeddings": 4, "quantize_head": False if tied else 8}
    widths = [3, 8]
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    model, info = quantize(model, "rtn", widths, 32, **options)
    save_quantized(model, tmp_path / "in", "rtn", info, processor)
    lines = export_gguf(open_source(tmp_path / "in"), tmp_path / "out")
    assert any("rounded anew to Q8_0" in line for line in lines) and any("where the plan has" in line for line in lines)
    model, config, seen = load_quantized(tmp_path / "in"), model.config.text_config, {}
    tensors = read(tmp_path / "out" / TEXT)[1]
    assert ("output.weight" in tensors) != tied
    for name, tensor in tensors.items():
        found = torch.from_numpy(text_weight(tensors, name, config, True))
        if name.startswith("blk.") and "norm" not in name:
            _, block, part, _ = name.split(".")
            layer = model.get_submodule(f"model.language_model.layers.{block}.{OURS[part]}")
        elif name in ("token_embd.weight", "output.weight"):
            layer = model.get_input_embeddings() if name[0] == "t" else model.lm_head
        else:
            assert np.array_equal(tensor, ours_of(model, name).detach().float().numpy()), name
            continue
        step = layer.parts()[1].float().t().repeat_interleave(32, 1)
        error = float(((found - layer.fake_quantized_weight()).abs() / step).max())
        seen[layer.bits] = max(seen.get(layer.bits, 0), error)
    assert seen.keys() == {3, 4, 8} and 0 < max(seen[3], seen[4]) <= 0.01 and 0.1 < seen[8] < 1.1
    pictures = read(tmp_path / "out" / MMPROJ)[1]
    whole, tower = plain["model.vision_tower.encoder.layers.0.mlp.fc1.weight"].float(), pictures["v.blk.0.ffn_up.weight"]
    assert 0 < (torch.from_numpy(tower) - whole).abs().max() < 3 * float(whole.abs().max()) / 127
    with pytest.raises(ValueError, match="has mixed widths or a packed table, head or tower, which GGUF alone stores"):
        export_hub(open_source(tmp_path / "in"), tmp_path / "hub")


def test_q4_1_keeps_codes_and_says_its_error():
    codes = torch.arange(64, dtype=torch.uint8).reshape(1, 64) % 16
    data, worst = q4_1(codes, torch.tensor([[0.25]]).half(), torch.tensor([[5]], dtype=torch.uint8))
    assert worst == 0 and data.shape == (1, 40)
    assert np.array_equal(gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_1), (codes.numpy() - 5.0) * 0.25)
    _, worst = q4_1(codes, torch.tensor([[2.0**-24]]).half(), torch.tensor([[15]], dtype=torch.uint8))
    assert worst == 0
    _, worst = q4_1(codes, torch.tensor([[0.30005]]).half(), torch.tensor([[15]], dtype=torch.uint8))
    assert 0 < worst <= 0.0075


def test_pairs_are_the_official_converter_s():
    rows = torch.arange(8)
    assert paired(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7] and paired(rows, None) is rows


# ---- tokenizer and chat template
def test_tokenizer_of_bytes(family, tmp_path):
    folder = family("llama", True)
    processor = load(folder)[1]
    export_gguf(open_source(folder), tmp_path / "out")
    keys, _ = read(tmp_path / "out" / TEXT)
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "gpt-2"
    tokens, tokenizer = keys["tokenizer.ggml.tokens"], processor.tokenizer
    assert len(tokens) == 1024 and tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = gguf.TokenType
    image = tokenizer.convert_tokens_to_ids("<image>")
    types = keys["tokenizer.ggml.token_type"]
    assert types[image] == kinds.CONTROL and types[500] == kinds.NORMAL and types[1023] == kinds.UNUSED
    assert keys["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id and not keys["tokenizer.ggml.add_bos_token"]


@pytest.mark.parametrize("splitting,name", [
    (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
    (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]), "smollm"),
    (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    (pre_tokenizers.Whitespace(), None),
    (pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]), None),
])  # fmt: skip
def test_unknown_splittings_are_refused(splitting, name):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitting
    said = json.loads(tokenizer.to_str())["pre_tokenizer"]
    if name:
        assert pre_tokenizer(said) == name
    else:
        with pytest.raises(ValueError, match="no pre-tokenizer of llama.cpp"):
            pre_tokenizer(said)


def test_llama_2_s_pieces_have_scores_by_merge(family, tmp_path):
    folder = family("llama", True)
    words = {f"<0x{i:02X}>": i + 3 for i in range(256)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in ("▁", "a", "b", "ab", "▁ab", "c"):
        words[piece] = len(words)
    merges = [("a", "b"), ("▁", "ab")]
    raw = Tokenizer(models.BPE(words, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens(["<unk>", "<s>", "</s>", "<image>"])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    raw.save(str(folder / "tokenizer.json"))
    said = json.loads((folder / "tokenizer_config.json").read_text())
    said |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    export_gguf(open_source(folder), tmp_path / "out")
    keys, _ = read(tmp_path / "out" / TEXT)
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_bos_token"]
    score, kinds = keys["tokenizer.ggml.scores"], keys["tokenizer.ggml.token_type"]
    assert score[words["ab"]] == 0 and score[words["▁ab"]] == -1 and score[words["c"]] < -1
    assert kinds[0] == gguf.TokenType.UNKNOWN and kinds[3] == gguf.TokenType.BYTE
    assert kinds[words["ab"]] == gguf.TokenType.NORMAL
    assert scores(["a b", "ab c"], ["ab", "abc", "x", "xyz"]) == [0, -1, -2, -1e9]


VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
OPENING = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"


def renders(processor, turns, **also):
    said = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    next(m for m in said if m["role"] == "user")["content"].insert(0, {"type": "image"})
    return processor.apply_chat_template(said, **also)


@pytest.mark.parametrize("before", ["", OPENING, VICUNA])
def test_server_s_texts_give_our_prompts(tiny, before):
    _, processor = tiny
    processor.chat_template = before if before == VICUNA else before + processor.chat_template
    template = jinja2.Template(server_template(processor))
    turns = [("user", "What is it?"), ("assistant", "Rosacea: papules."), ("user", "How is it treated?")]
    for n in (1, 3):
        theirs = [{"role": role, "content": text} for role, text in turns[:n]]
        theirs[0]["content"] = "<__media_A1b2__>" + theirs[0]["content"]  # as newer servers write the marker
        found = template.render(messages=theirs, add_generation_prompt=True)
        assert found.replace("<__media_A1b2__>", "<image>") == renders(processor, turns[:n], add_generation_prompt=True)
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{MARKER}Why?"}]
    found = template.render(messages=told, add_generation_prompt=True).replace(MARKER, "<image>")
    assert found == renders(processor, [("system", "Be brief."), ("user", "Why?")], add_generation_prompt=True)


def test_templates_that_no_text_can_stand_for_are_refused(tiny):
    _, processor = tiny
    for template in ("{{ messages | length }}", processor.chat_template.replace("<image>\n", "")):
        processor.chat_template = template
        with pytest.raises(ValueError, match="the chat template"):
            server_template(processor)


def test_modelfile_names_both_files_and_the_end(tiny):
    said = modelfile(tiny[1], TEXT, MMPROJ)
    assert said.startswith(f"FROM ./{TEXT}\nFROM ./{MMPROJ}\n") and 'PARAMETER stop "<|im_end|>"' in said
    assert "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>" in said


@pytest.mark.parametrize("part,values,why", [
    ("text_config", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'linear'"),
    ("text_config", {"hidden_act": "gelu"}, "hidden_act of the text model 'gelu'"),
    (None, {"vision_feature_select_strategy": "full"}, "select_strategy 'full'"),
    (None, {"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
])  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused(family, tmp_path, part, values, why):
    folder = family("llama", True)
    retold(folder, part, **values)
    with pytest.raises(ValueError, match=why):
        export_gguf(open_source(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("free,number", [(0, errno.ENOSPC), (2**40, None)])
def test_a_full_disk_is_said_to_be_full(family, tmp_path, monkeypatch, free, number):
    """NumPy says how much it wrote of how much, and no more."""
    source = open_source(family("llama", True))

    def short(*_, **__):
        raise OSError("5120 requested and 3584 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", short)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(OSError, match="No space left on device: .*text.gguf" if number else "^5120 requested") as error:
        export_gguf(source, tmp_path / "out")
    assert error.value.errno == number and not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", [None, []])
def test_a_folder_that_says_no_end_is_refused(family, tmp_path, end):
    folder = family("llama", True)
    retold(folder, "text_config", eos_token_id=None)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(ValueError, match="says no eos_token_id, which ends an answer: put it into generation_config.json"):
        export_gguf(open_source(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_number_beyond_f16_is_refused_and_nothing_is_left(family, tmp_path):
    model, processor = load(family("llama", True), dtype=torch.bfloat16)
    model.model.multi_modal_projector.linear_1.weight.data[0, 0] = 1e6
    save(model, processor, tmp_path / "in")
    with pytest.raises(ValueError, match="multi_modal_projector.linear_1.weight holds NaN, or a number that F16"):
        export_gguf(open_source(tmp_path / "in"), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "llama-True"]
