"""The configuration reader: names, folders, sparse hub configurations, refusals."""

import json

import pytest
from transformers import LlamaConfig, LlavaConfig, MistralConfig

from medprune.models.sizes import _TEXT_DEFAULTS, named_config, shape_of

# What a hub config.json holds: only what differs from transformers' defaults.
HUB = {
    "model_type": "llava",
    "text_config": {"model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "vocab_size": 32000,
    },
}  # fmt: skip


def test_a_name_a_hub_name_a_folder_and_a_file_agree(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    expected = shape_of(named_config("llava-1.5-7b"))
    assert expected.blocks == 32 and expected.hidden == 4096 and expected.vision_tokens == 577
    for given in ("llava-hf/llava-1.5-7b-hf", tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert shape_of(named_config(given)) == expected


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b"])
def test_a_dict_and_the_configuration_made_of_it_read_alike(name):
    assert shape_of(LlavaConfig(**named_config(name))) == shape_of(named_config(name))


@pytest.mark.parametrize("kind, cls", [("llama", LlamaConfig), ("mistral", MistralConfig)])
def test_defaults_are_those_of_transformers(kind, cls):
    real = cls()
    for key, value in _TEXT_DEFAULTS[kind].items():
        assert getattr(real, key) == value, key


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"'llava-2-7b' is not known: .* llava-1.5-7b, llava-1.5-13b"):
        named_config("llava-2-7b")


@pytest.mark.parametrize(
    "text, message",
    [("{", "is not JSON"), ('{"model_type": "llama"}', "model_type 'llama'"), ("[1]", "model_type 'list'")],
)
def test_a_file_that_is_no_llava_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        named_config(tmp_path)


@pytest.mark.parametrize("part, kind", [("text_config", "qwen2"), ("vision_config", "siglip_vision_model")])
def test_a_part_of_another_architecture_is_refused_by_name(part, kind):
    with pytest.raises(ValueError, match=kind):
        shape_of({**HUB, part: {**HUB[part], "model_type": kind}})


def test_an_incomplete_vision_config_is_refused():
    vision = {k: v for k, v in HUB["vision_config"].items() if k != "patch_size"}
    with pytest.raises(ValueError, match="lacks patch_size"):
        shape_of({**HUB, "vision_config": vision})
