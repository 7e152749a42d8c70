"""A folder exported with the hub's names is loaded by plain transformers and by us, to the same logits."""

import json

import pytest
import torch
from exported import batch_of, retold
from safetensors.torch import load_file, save_file
from test_cli import medprune
from transformers import AutoProcessor, LlavaForConditionalGeneration

from medprune.exporting.folders import export_hub, find_model, open_source
from medprune.models.families import current_name, hub_name
from medprune.models.loading import load, load_blockwise
from medprune.quantizing.checkpoint import load_quantized, save_quantized
from medprune.quantizing.quantize import quantize

HUB_STARTS = ("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.", "multi_modal_projector.")


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


@pytest.mark.parametrize("kind,tied", [("llama", True), ("llama", False), ("mistral", False), ("qwen2", True)])
def test_hub_names_load_in_plain_transformers_and_here(family, rows, tmp_path, kind, tied):
    folder = family(kind, tied)
    export_hub(open_source(folder), tmp_path / "hub")
    stored = load_file(tmp_path / "hub" / "model.safetensors")
    assert all(name.startswith(HUB_STARTS) for name in stored)
    assert {"vision_tower.vision_model.embeddings.class_embedding", "language_model.model.norm.weight"} <= stored.keys()
    assert ("language_model.lm_head.weight" in stored) != tied

    was, processor = load(folder, dtype=torch.float32)
    batch = batch_of(processor, rows)
    plain, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hub", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    known = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(plain.eval(), batch), logits(known.eval(), batch))
    again, processor = load(tmp_path / "hub", dtype=torch.float32)
    assert torch.equal(logits(again, batch), logits(was, batch))
    blockwise, _, fetch = load_blockwise(tmp_path / "hub", dtype=torch.float32)
    for block in blockwise.model.language_model.layers:
        fetch(block)
    assert torch.equal(logits(blockwise, batch), logits(was, batch))
    theirs = AutoProcessor.from_pretrained(tmp_path / "hub", backend="pil")
    assert torch.equal(batch_of(theirs, rows)["pixel_values"], batch["pixel_values"])
    assert torch.equal(batch_of(theirs, rows)["input_ids"], batch["input_ids"])


def test_configuration_has_the_fields_of_transformers_4_and_no_path(family, tmp_path):
    folder = family("llama", False)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"_name_or_path": "/somewhere", "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}}
    (folder / "config.json").write_text(json.dumps(config))
    export_hub(open_source(folder), tmp_path / "hub")
    found = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert found["text_config"]["rope_theta"] == 5e4 and found["text_config"]["rope_scaling"] is None
    assert found["torch_dtype"] == found["text_config"]["torch_dtype"] == "float32" and found["ignore_index"] == -100
    assert "somewhere" not in (tmp_path / "hub" / "config.json").read_text()
    pictures = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
    assert pictures["image_processor_type"] == "CLIPImageProcessor" and pictures["crop_size"]["height"] == 32
    assert "image_processor" not in json.loads((tmp_path / "hub" / "processor_config.json").read_text())
    names = json.loads((tmp_path / "hub" / "tokenizer_config.json").read_text())["model_input_names"]
    assert names == ["input_ids", "attention_mask"], "generate of transformers 4 refuses others"


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_quantized_folders_keep_their_codes(tiny, rows, chat, tmp_path, method):
    model, processor = tiny
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    batch = batch_of(processor, rows)
    calibration = {k: v.repeat(4, *[1] * (v.dim() - 1)) for k, v in batch.items()}
    model, info = quantize(model, method, 4, 32, calibration if method == "awq" else None)
    save_quantized(model, tmp_path / "q", method, info, processor)
    export_hub(open_source(tmp_path / "q"), tmp_path / "hub")
    stored = load_file(tmp_path / "hub" / "model.safetensors")
    assert "language_model.model.layers.0.mlp.up_proj.qweight" in stored
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in stored
    assert torch.equal(logits(load_quantized(tmp_path / "hub"), batch), logits(load_quantized(tmp_path / "q"), batch))
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "--quantization awq" in card and "group size 32" in card


def test_a_dtype_is_read_as_older_transformers_wrote_it(base, tmp_path):
    model, processor = load(base, dtype=torch.bfloat16)
    model, info = quantize(model, "rtn", 4, 32)
    save_quantized(model, folder := tmp_path / "q", "rtn", info, processor)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"torch_dtype": config.pop("dtype")} | config))
    assert load_quantized(folder).dtype == torch.bfloat16 and open_source(folder).dtype == "bfloat16"


def test_several_shards_stay_several(family, rows, tmp_path):
    folder = family("llama", True)
    model, processor = load(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "cut", max_shard_size="100KB")
    processor.save_pretrained(tmp_path / "cut")
    export_hub(open_source(tmp_path / "cut"), tmp_path / "hub")
    index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2 and all(name.startswith(HUB_STARTS) for name in index)
    batch = batch_of(processor, rows)
    assert torch.equal(logits(load(tmp_path / "hub", dtype=torch.float32)[0], batch), logits(model, batch))


def test_names_go_there_and_back():
    for name in ("model.vision_tower.encoder.layers.1.mlp.fc1.bias", "model.language_model.norm.weight", "lm_head.weight"):
        assert current_name(hub_name(name)) == name
    assert current_name("vision_tower.embeddings.class_embedding") == "model.vision_tower.embeddings.class_embedding"


def without(folder, start):
    """Drop the tensors of this start from a folder."""
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.startswith(start)}, file, {"format": "pt"})


@pytest.mark.parametrize("spoil,why", [
    (lambda f: without(f, "vision_tower."), "lacks model.vision_tower."),
    (lambda f: without(f, "multi_modal_projector.linear_2.bias"), "lacks model.multi_modal_projector.linear_2.bias"),
    (lambda f: retold(f, "vision_config", model_type="siglip_vision_model"), "lacks model.vision_tower"),
    (lambda f: retold(f, "text_config", model_type="gemma"), "text_config is of model_type 'gemma'"),
    (lambda f: retold(f, "text_config", num_hidden_layers=1), "has, beyond what its config.json describes"),
    (lambda f: retold(f, "text_config", intermediate_size=64), "in the wrong shape"),
    (lambda f: retold(f, quantization_config={"quant_method": "medprune", "method": "hqq", "bits": 4}), "medprune hqq 4"),
    (lambda f: retold(f, quantization_config={"quant_method": "bitsandbytes"}), "stored as bitsandbytes"),
    (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template"),
    (lambda f: retold(f, dtype="float64"), "config.json has dtype 'float64': let it be one of float32, float16"),
    (lambda f: retold(f, dtype="auto"), "config.json has dtype 'auto'"),
    (lambda f: retold(f, dtype="torch.float16"), "config.json has dtype 'torch.float16'"),
    (lambda f: retold(f, quantization_config={"method": "rtn", "bits": 4, "group_size": 32}), "quantized by None"),
    (lambda f: retold(f, quantization_config={"quant_method": "awq", "bits": 4}), "has no group_size in its config.json"),
    (lambda f: retold(f, quantization_config={"quant_method": "awq", "bits": 4, "group_size": -1}), "group_size must be one of"),
    (lambda f: retold(f, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}), "AWQ's layout 'gemv'"),
])  # fmt: skip
def test_what_no_engine_takes_is_refused_before_writing(family, tmp_path, spoil, why):
    folder = family("llama", True)
    spoil(folder)
    with pytest.raises(ValueError, match=why) as error:
        export_hub(open_source(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists() and str(error.value).count("\n") == 0


def test_a_folder_that_is_there_is_not_written_over(family):
    folder = family("llama", True)
    with pytest.raises(ValueError, match="is there already"):
        export_hub(open_source(folder), folder)


def test_the_command_says_what_it_wrote(family, tmp_path, monkeypatch, capsys):
    folder = family("llama", True)
    assert medprune(monkeypatch, "export", folder, tmp_path / "hub", "--to", "vllm") == 0
    assert medprune(monkeypatch, "export", folder, tmp_path / "gguf", "--to", "gguf") == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'hub'}: " in said and "mmproj.gguf: " in said and "where the plan has" in said
    for words, why in (((tmp_path / "x", "--to", "onnx"), "--to onnx is not known"), ((folder, "--to", "hub"), "is there already")):
        assert medprune(monkeypatch, "export", folder, *words) == 2
        assert why in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_model_is_found_by_folder_or_by_run_and_method(tmp_path):
    folders = ("01_finetune/model", "04_sft_recovery/model-recovered-2", "05_awq_vs_bnb/quantized/awq-recovered-2")
    for name in (*folders, "07_budget_search/found"):
        (tmp_path / "demo" / name).mkdir(parents=True)
        (tmp_path / "demo" / name / "config.json").write_text("{}")
    home = str(tmp_path)
    assert find_model("demo:awq-recovered-2", home) == tmp_path / "demo/05_awq_vs_bnb/quantized/awq-recovered-2"
    assert find_model("demo:found", home) == tmp_path / "demo/07_budget_search/found"
    assert find_model("demo:original", home).name == "model" and find_model(str(tmp_path / "demo/01_finetune/model"))
    with pytest.raises(ValueError, match="keeps no folder of 'pruned-2'; it keeps original, recovered-2, awq-recovered-2, found"):
        find_model("demo:pruned-2", home)
    with pytest.raises(ValueError, match="there is no run 'other'"):
        find_model("other:original", home)
    with pytest.raises(ValueError, match="is not there"):
        find_model("nowhere")
    with pytest.raises(ValueError, match="holds no config.json"):
        find_model(str(tmp_path))
