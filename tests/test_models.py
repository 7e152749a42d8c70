"""Names of parts, loading and what it refuses or fills in, identities of embedders, bases and their cards."""

import ast
import gc
import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from medprune.answers.prompts import prompt_text
from medprune.exporting.folders import export_hub, open_source
from medprune.models import assembled, families, loading
from medprune.models.loading import embedder_identity, load, load_processor, save, weight_bytes
from medprune.pruning.plan import apply_plan, make_plan
from medprune.quantizing.checkpoint import save_quantized
from medprune.quantizing.quantize import quantize
from medprune.settings import REPO, TARGETS
from medprune.store import made, read_json, write_json

NAMES = re.compile(r"language_model|multi_modal_projector|vision_tower|lm_head|self_attn")


def _docstrings(tree: ast.AST) -> set[int]:
    owners = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    first = [n.body[0] for n in owners if n.body and isinstance(n.body[0], ast.Expr)]
    return {id(n.value) for n in first}


def _names_of_parts(code: str) -> list[str]:
    """Return the names of model parts that some code holds, as attributes or in texts that are no docstrings.

    "vision_tower" alone is also the name of a part in `parts` and in tables of bytes; a model's own is not allowed.
    """
    tree, found = ast.parse(code), []
    docstrings = _docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and NAMES.search(node.attr):
            of_parts = node.attr == "vision_tower" and getattr(node.value, "attr", None) != "model"
            found += [] if of_parts else [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found += [] if node.value == "vision_tower" else NAMES.findall(node.value)
    return found


def test_names_of_model_parts_stand_in_families_alone():
    assert _names_of_parts('"""lm_head"""\nx.lm_head\ny = f"model.vision_tower.{n}"\nx.model.vision_tower') == [
        "lm_head",
        "vision_tower",
        "vision_tower",
    ]
    assert _names_of_parts('found.vision_tower, {"vision_tower": 3}') == []
    for file in sorted((REPO / "medprune").rglob("*.py")):
        if file.name != "families.py":
            assert _names_of_parts(file.read_text(encoding="utf-8")) == [], file


def test_names_are_those_of_the_model(base, tmp_path):
    model, processor = load(base)
    save(model, processor, tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    own = {name for name, _ in model.named_parameters()}
    assert {*map(families.renaming(model), stored)} == own
    assert families.renaming(model)("language_model.lm_head.weight") == "lm_head.weight"
    assert {families.current_name(name) for name in stored} == own
    assert families.current_name("language_model.lm_head.weight") == "lm_head.weight"
    modules = dict(model.named_modules())
    found, called = families.parts(model), families.names(model)
    assert called.blocks == families.BLOCKS and called.head == families.HEAD
    assert called.projector == [f"model.{families.PROJECTOR}"] and families.VISION_LAYERS.startswith(called.vision_tower)
    assert modules[called.head] is found.head and f"{families.VISION_LAYERS}.1" in modules
    for name in modules:
        inside = name.startswith(f"{families.BLOCKS}.")
        assert families.block_number(name) == (int(name.split(".")[3]) if inside else None)
    assert families.block_number("base_model.model.model.language_model.layers.12.mlp.up_proj.lora_A.weight") == 12
    tuned = {name for name in modules if re.fullmatch(families.lora_targets(TARGETS), name)}
    assert tuned == {n for n, m in modules.items() if isinstance(m, torch.nn.Linear) and n.startswith(families.BLOCKS)}


def test_a_checkpoint_with_a_missing_tensor_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = next(n for n in tensors if "down_proj" in n)
    del tensors[name]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks .*down_proj"):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    "lacks", [["patch_size"], ["num_additional_image_tokens"], ["vision_feature_select_strategy"], 0]
)
def test_a_processor_of_older_transformers_is_completed_from_config_json(base, tmp_path, lacks):
    file = shutil.copytree(base, tmp_path / "m") / "processor_config.json"
    whole = read_json(file)
    keys = lacks or ["patch_size", "num_additional_image_tokens", "vision_feature_select_strategy"]
    assert all(whole.pop(key) for key in keys)
    write_json(file, whole)
    found, right = load(tmp_path / "m"), load(base)
    text = prompt_text(right[1], "What is it?")
    picture = Image.new("RGB", (40, 48), "tan")
    batches = [processor(text=text, images=picture, return_tensors="pt") for _, processor in (found, right)]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    pixels = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in batches[0].items()}
    assert torch.isfinite(found[0](**pixels).logits).all()
    found[1].save_pretrained(tmp_path / "again")  # and a folder made from it says it all
    assert read_json(tmp_path / "again" / "processor_config.json")["patch_size"] == 16


def test_a_folder_without_a_chat_template_is_refused_before_its_weights_are_read(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{folder} has no chat template: put the chat_template.jinja of its base"):
        load(folder)


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
def test_a_dtype_that_is_none_is_said_with_its_folder(base, tmp_path, part):
    folder = shutil.copytree(base, tmp_path / "m")
    config = read_json(folder / "config.json")
    (config[part] if part else config)["dtype"] = "torch.float16"
    write_json(folder / "config.json", config)
    with pytest.raises(ValueError, match=f"{folder}: config.json has dtype 'torch.float16': let it be one of float32"):
        load(folder)


@pytest.mark.parametrize(("method", "said"), [("rtn", "awq"), ("bnb", "bitsandbytes"), ("hqq", "medprune")])
def test_a_quantized_folder_is_not_loaded_as_a_base(base, tmp_path, method, said):
    if method != "rtn":
        pytest.importorskip({"bnb": "bitsandbytes", "hqq": "hqq"}[method])
    model, processor = load(base)
    model, info = quantize(model, method, 4, 64)
    save_quantized(model, tmp_path / "q", method, info, processor=processor)
    for bits in (4, 16):
        with pytest.raises(ValueError, match=f"q is quantized already, by {said}: name the 16-bit model"):
            load(tmp_path / "q", bits=bits)


def test_a_lora_adapter_s_folder_and_an_empty_one_are_not_loaded(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json: it is not a model's folder"):
        load(tmp_path)
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "tiny"})
    with pytest.raises(ValueError, match="is a LoRA adapter's folder"):
        load(str(tmp_path))


def test_weights_are_counted_once_and_a_folder_says_what_it_was_made_from(base, tmp_path):
    model, processor = load(base)
    head = families.parts(model).head
    assert weight_bytes(model) >= 2 * loading.n_parameters(model) > 2 * head.weight.numel()
    assert weight_bytes(head, seen := set()) == 2 * head.weight.numel() and weight_bytes(head, seen) == 0
    save(model, processor, tmp_path / "m", context="x", steps=3)
    found = made(tmp_path / "m", "x")
    assert (found["context"], found["steps"]) == ("x", 3) and made(tmp_path / "m", "y") is None


def test_an_embedder_is_another_when_its_bytes_or_its_name_are(tmp_path):
    for name, weights in (("a", "1"), ("b", "1"), ("c", "2")):
        write_json(tmp_path / name / "model.safetensors", weights)
    same, other = embedder_identity(str(tmp_path / "a")), embedder_identity(str(tmp_path / "c"))
    assert same == embedder_identity(str(tmp_path / "b")) != other
    names = [embedder_identity(name) for name in ("minilm", "some/embedder", "other/embedder")]
    assert len({same, other, *names}) == 5 and embedder_identity("minilm") == names[0]


def test_a_base_that_is_named_is_itself_and_an_assembled_one_is_built_once_of_its_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDPRUNE_CACHE", str(tmp_path))
    assert assembled.prepare_base("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    folder = assembled.prepare_base("tiny")
    made_at = (Path(folder) / "config.json").stat().st_mtime_ns
    assert assembled.prepare_base("tiny") == folder and (Path(folder) / "config.json").stat().st_mtime_ns == made_at
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps(["other words"] * 50))
    monkeypatch.setattr(assembled, "WORDS", facts)
    assert assembled.prepare_base("tiny") != folder
    assert (
        load_processor(folder).tokenizer.vocab_size
        > load_processor(assembled.prepare_base("tiny")).tokenizer.vocab_size
    )


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# A model", "mit"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\nlanguage: en\n---\n", "not stated: see our-llava"),
        ("---\nlicense: [mit\n---\n", "not stated: see our-llava"),
        ("# A model", "not stated: see our-llava"),
        (None, "not stated: see our-llava"),
    ],
)
def test_a_folder_s_licence_is_its_card_s(tmp_path, card, licence):
    folder = tmp_path / "our-llava"
    folder.mkdir()
    if card:
        (folder / "README.md").write_text(card)
    assert assembled.base_card(str(folder)) == {"name": "our-llava", "licence": licence}


def test_the_licences_of_assembled_bases_and_of_the_hub_s(tmp_path, monkeypatch):
    smollm2 = {"name": "SmolLM2-135M-Instruct in a LLaVA (base smollm2)", "licence": "Apache-2.0"}
    assert assembled.base_card("smollm2") == smollm2
    assert assembled.base_card("tiny")["licence"] == "none: random weights for tests"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    seven = "llava-hf/llava-1.5-7b-hf"
    assert assembled.base_card(seven) == {"name": seven, "licence": "Llama 2 Community License"}
    assert assembled.base_card("some/llava") == {"name": "some/llava", "licence": "not stated: see some/llava"}
    cached = tmp_path / "models--some--llava"
    (cached / "snapshots" / "1").mkdir(parents=True)
    (cached / "snapshots" / "1" / "README.md").write_text("---\nlicense: llama2\n---\n")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    assert assembled.base_card("some/llava") == {"name": "some/llava", "licence": "llama2"}


def test_a_model_that_refers_to_itself_does_not_stay_beside_the_next(base):
    model = torch.nn.Linear(2, 2)
    model.itself = [model]  # as the layers of a 4-bit model do
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is not None
        load(base)
        assert gone() is None
    finally:
        gc.enable()


def test_a_model_loaded_block_by_block_is_the_model(base, tmp_path):
    whole, processor = load(base)
    save(whole, processor, tmp_path / "model")
    model, _, fetch = loading.load_blockwise(tmp_path / "model")
    blocks = families.parts(model).blocks
    assert {p.device.type for p in blocks.parameters()} == {"meta"}
    assert weight_bytes(model) < weight_bytes(whole) / 2 and not model.training
    apply_plan(model, make_plan(model.config, [2], ""))  # a block keeps its place in the files
    apply_plan(whole, make_plan(whole.config, [2], ""))
    for block in families.parts(model).blocks:
        fetch(block)
    assert weight_bytes(model) == weight_bytes(whole) and model.generation_config == whole.generation_config
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.lm_head.weight is families.parts(model).text_model.embed_tokens.weight, "tied"
    batch = processor(text=prompt_text(processor, "What?"), images=Image.new("RGB", (40, 40)), return_tensors="pt")
    assert torch.equal(model(**batch).logits, whole(**batch).logits)


def test_a_damaged_folder_is_refused_block_by_block_too(base, tmp_path):
    save(*load(base), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(k for k in tensors if "layers.3.mlp" in k)
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model\.language_model\.layers\.3\.mlp"):
        loading.load_blockwise(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no safetensors files"):
        loading.load_blockwise(tmp_path)


def test_shards_are_those_of_the_index(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "m")
    whole, places = load_file(folder / "model.safetensors"), {}
    old = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    save_file(old, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    assert loading.weight_files(folder) == [folder / "model.safetensors"]
    (folder / "model.safetensors").unlink()
    for number in range(3):
        part = {name: whole[name] for name in sorted(whole)[number::3]}
        save_file(part, folder / (file := f"model-0000{number + 1}-of-00003.safetensors"), {"format": "pt"})
        places |= dict.fromkeys(part, file)
    write_json(folder / loading.INDEX, {"metadata": {}, "weight_map": places})
    save_file(old, folder / "model-00003-of-00002.safetensors", {"format": "pt"})
    assert {file.name for file in loading.weight_files(folder)} == set(places.values())
    (model, _, fetch), (wanted, _) = loading.load_blockwise(folder), load(folder)
    [fetch(block) for block in families.parts(model).blocks]
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in model.state_dict().items())
    (folder / file).unlink()
    with pytest.raises(ValueError, match="model-00003-of-00003.safetensors is no whole safetensors file"):
        loading.weight_files(folder)


def test_what_transformers_passes_over_is_no_fault_of_a_folder(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "m")
    file, whole = folder / "model.safetensors", load_file(folder / "model.safetensors")
    table = next(name for name in whole if name.endswith("embed_tokens.weight"))
    also = {"vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None], "language_model.lm_head.weight": whole[table].clone()}
    save_file(whole | also, file, {"format": "pt"})
    save_file(whole, folder / "consolidated.safetensors", {"format": "pt"})
    assert load(folder)[0] is not None
    names = loading.stored_tensors(folder).keys()
    assert len(names) == len(whole) and "lm_head.weight" not in names
    loading.load_blockwise(folder)
    export_hub(open_source(folder), tmp_path / "hub")
    assert len(load_file(tmp_path / "hub" / "model.safetensors")) == len(whole)
    save_file(whole | {"language_model.lm_head.weight": whole[table] + 1}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="has, beyond what its config.json describes, lm_head.weight"):
        loading.load_blockwise(folder)


def test_16_bits_are_spread_where_one_gpu_is_too_small(monkeypatch):
    shape = loading.base_config("llava-hf/llava-1.5-7b-hf")
    monkeypatch.setattr(loading, "cards", lambda: 2)
    monkeypatch.setattr(loading, "memory_bytes", lambda: int(14.7 * 2**30))
    places = loading._places(shape, "cuda")
    blocks = [places[f"model.language_model.layers.{b}"] for b in range(32)]
    assert blocks == ["cuda:0"] * 16 + ["cuda:1"] * 16 and len(places) == 32 + 6
    assert places["model.vision_tower"] == places["model.language_model.embed_tokens"] == "cuda:0"
    assert places["lm_head"] == places["model.language_model.norm"] == "cuda:1"
    monkeypatch.setattr(loading, "memory_bytes", lambda: 40 * 2**30)
    assert loading._places(shape, "cuda") == {"": "cuda"}
    monkeypatch.setattr(loading, "cards", lambda: 1)
    monkeypatch.setattr(loading, "memory_bytes", lambda: 2**30)
    assert loading._places(shape, "cuda") == {"": "cuda"}
