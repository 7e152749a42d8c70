"""Shapes read from configurations; parameters and bytes held against the meta device, packers and the paper."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from medprune.models.sizes import (
    _TEXT_DEFAULTS,
    _VISION_DEFAULTS,
    GIB,
    STORED_AS,
    account,
    base_config,
    linear_bytes,
    named_config,
    shape_of,
)
from medprune.settings import REPO

SEVEN = named_config("llava-1.5-7b")
BLOCK = 202_383_360


def tiny(**text) -> dict:
    """Return a small configuration with grouped-query attention and tied embeddings, changed by `text`."""
    return {
        "model_type": "llava",
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                          "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
                          "patch_size": 14},
        "text_config": {"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128,
                        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                        "tie_word_embeddings": True} | text,
    }  # fmt: skip


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
    for name in ("llava-hf/llava-1.5-7b-hf", tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert shape_of(named_config(name)) == expected


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b"])
def test_a_dict_and_the_configuration_made_of_it_read_alike(name):
    assert shape_of(LlavaConfig(**named_config(name))) == shape_of(named_config(name))


@pytest.mark.parametrize(
    "defaults, cls",
    [
        (_TEXT_DEFAULTS["llama"], LlamaConfig),
        (_TEXT_DEFAULTS["mistral"], MistralConfig),
        (_VISION_DEFAULTS, CLIPVisionConfig),
    ],
)
def test_defaults_are_those_of_transformers(defaults, cls):
    real = cls()
    for key, value in defaults.items():
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


@pytest.mark.parametrize(
    ("folder", "files", "message"),
    [
        (
            "packed",
            {"config.json": HUB | {"quantization_config": {"quant_method": "awq"}}},
            "quantized already, by awq",
        ),
        ("adapter", {"adapter_config.json": {}}, "is a LoRA adapter's folder: merge it"),
        ("adapter", {"adapter_config.json": {}, "config.json": HUB}, "is a LoRA adapter's folder"),
        ("empty", {"README.md": ""}, "empty holds no config.json: it is not a model's folder"),
    ],
)
def test_a_folder_that_is_no_base_is_refused_by_name(tmp_path, monkeypatch, folder, files, message):
    (tmp_path / folder).mkdir()
    for name, value in files.items():
        (tmp_path / folder / name).write_text(json.dumps(value))
    monkeypatch.chdir(tmp_path)
    for given_as in (tmp_path / folder, str(tmp_path / folder), folder):
        with pytest.raises(ValueError, match=f"{folder}.*{message.removeprefix(folder)}"):
            base_config(given_as)


def test_a_base_that_is_nowhere_is_refused_by_name(tmp_path):
    for base in ("smolm2", "./photos/model", "llava-1.5-7b"):
        with pytest.raises(ValueError, match=f"base '{base}' is not known: give tiny, smollm2, smollm2-eyes, a hub id or"):
            base_config(base)
    with pytest.raises(ValueError, match="gone holds no config.json"):
        base_config(tmp_path / "gone")
    assert base_config("llava-hf/llava-1.5-7b-hf") == SEVEN
    assert base_config("tiny")["text_config"]["num_hidden_layers"] == 6


def meta_params(config: dict, blocks_removed: int = 0) -> dict[str, int]:
    config = copy.deepcopy(config)
    config["text_config"]["num_hidden_layers"] -= blocks_removed
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(**config))
    parts = {"vision_tower": 0, "multi_modal_projector": 0, "embed_tokens": 0, "layers": 0, "lm_head": 0}
    for name, parameter in model.named_parameters():  # each once, tied ones too
        part = next((p for p in list(parts)[:3] if p in name), None)
        part = part or ("layers" if ".layers." in name else "lm_head" if "lm_head" in name else "norm")
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


@pytest.mark.parametrize(
    "config, removed",
    [
        (SEVEN, 0),
        (SEVEN, 7),
        (named_config("llava-1.5-13b"), 3),
        (tiny(), 0),
        (tiny(), 2),
        (tiny(tie_word_embeddings=False, num_key_value_heads=None), 1),
        (tiny(attention_bias=True, mlp_bias=True, head_dim=32), 0),
        (tiny() | {"vision_feature_layer": [-2, -1], "multimodal_projector_bias": False}, 0),
        (tiny() | {"vision_config": {"model_type": "clip_vision_model", "hidden_size": 96}}, 0),
    ],
)
def test_parameters_are_those_of_the_model_on_the_meta_device(config, removed):
    real, counted = meta_params(config, removed), account(config, removed).params
    assert counted == {
        "vision_tower": real["vision_tower"],
        "projector": real["multi_modal_projector"],
        "embeddings": real["embed_tokens"],
        "block_weights": real["layers"] - counted["block_norms"],
        "block_norms": counted["block_norms"],
        "final_norm": real["norm"],
        "head": real["lm_head"],
    }


def test_the_facts_of_llava_7b():
    assert account(SEVEN).total_params == 7_063_427_072
    assert account(SEVEN).total_params - account(SEVEN, 1).total_params == BLOCK
    for removed, gib in ((0, 4.76), (7, 3.95), (8, 3.84), (10, 3.61)):
        total = account(SEVEN, removed, bits=4, group_size=64, context=840).total_bytes
        assert total / GIB == pytest.approx(gib, abs=0.005)
    four = account(SEVEN, bits=4).part_bytes
    quantized = four["block_weights"] + four["block_scales"] + four["block_zero_points"]
    assert quantized * 8 / account(SEVEN).params["block_weights"] == 4 + 20 / 64
    assert account(SEVEN, bits=4, context=0).floor_ms_per_token(320) == pytest.approx(12, abs=0.5)


def test_no_torch_is_needed():
    code = "import sys, medprune.models.sizes; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def test_tied_embeddings_are_stored_once_and_read_at_every_token():
    tied, untied = account(tiny(), context=0), account(tiny(tie_word_embeddings=False), context=0)
    assert untied.total_bytes - tied.total_bytes == 2 * 96 * 64
    assert tied.decode_read_bytes == untied.decode_read_bytes


def test_kv_cache_by_hand():
    # tokens x rows x (K and V) x blocks x key-value heads x head size x 2 bytes
    assert account(tiny(), 1, context=10, batch=3).kv_cache_bytes == 10 * 3 * 2 * 2 * 2 * 16 * 2
    assert account(SEVEN, context=1).kv_cache_bytes == 524_288


def test_mixed_bits_sum_over_blocks():
    each = {b: account(tiny(), bits=b, context=0) for b in (3, 4, 16)}
    mixed = account(tiny(), bits=[3, 4, 16], context=0)
    assert 3 * mixed.total_bytes == sum(a.total_bytes for a in each.values())
    with pytest.raises(ValueError, match="lists 3 blocks; 2 are kept"):
        account(tiny(), 1, bits=[3, 4, 16])


@pytest.mark.parametrize("compress", [False, True])
def test_bnb_bytes_are_bitsandbytes_own(compress):
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(
        torch.randn(96, 512), blocksize=64, quant_type="nf4", compress_statistics=compress
    )
    real = state.absmax.nbytes + state.code.nbytes
    if compress:
        real += state.state2.absmax.nbytes + state.state2.code.nbytes + state.offset.nbytes
    method = "bnb-double" if compress else "bnb"
    assert linear_bytes(512, 96, 4, 64, method) == (codes.nbytes, real, 0)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_hqq_bytes_are_hqq_s_own(bits):
    quantize = pytest.importorskip("hqq.core.quantize")
    weight = torch.randn(96, 512)
    codes, meta = quantize.Quantizer.quantize(weight, nbits=bits, group_size=64, axis=1, device="cpu")
    scale, zero = meta["scale"].bfloat16(), meta["zero"].bfloat16()  # as HQQLinear stores them
    assert linear_bytes(512, 96, bits, 64, "hqq") == (codes.nbytes, scale.nbytes, zero.nbytes)


def test_awq_bytes_are_those_of_its_packed_tensors():
    # qweight int32 (in, out / 8), scales fp16 (in / 64, out), qzeros int32 (in / 64, out / 8)
    assert linear_bytes(512, 96, 4, 64, "awq") == (4 * 512 * 12, 2 * 8 * 96, 4 * 8 * 12)


def test_groups_that_do_not_fit_are_refused_by_layer_with_what_fits():
    account(SEVEN, 0, 4, 128)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has 64 inputs.*fit: \[32, 64\]"):
        account(tiny(), 0, 4, 128)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj has 96 inputs"):
        account(tiny(intermediate_size=96), 0, 4, 64)
    with pytest.raises(ValueError, match="group_size must be one of .*, not 48"):
        account(SEVEN, 0, 4, 48)
    with pytest.raises(ValueError, match=r"model\.vision_tower\.encoder\.layers\.0\.self_attn\.q_proj has 32 inputs"):
        account(tiny(), 0, 4, 64, quantize_vision=True)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"blocks_removed": 32}, "blocks_removed must be 0 to 31, not 32"),
        ({"blocks_removed": -1}, "not -1"),
        ({"bits": 12}, "not 12"),
        ({"method": "gptq"}, "not 'gptq'"),
        ({"bits": 16, "quantize_vision": True}, "by rtn or hqq in fewer than 16 bits, not by rtn in 16"),
        ({"context": -1}, "not -1 and 1"),
        ({"batch": 0}, "not 840 and 0"),
    ],
)
def test_impossible_values_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        account(SEVEN, **wrong)


def test_a_bandwidth_of_zero_is_refused():
    with pytest.raises(ValueError, match="above 0 GB/s, not 0"):
        account(SEVEN).floor_ms_per_token(0)


plans = st.fixed_dictionaries(
    {
        "method": st.sampled_from(STORED_AS),
        "bits": st.sampled_from([4, 16]),
        "context": st.integers(0, 4096),
        "batch": st.integers(1, 64),
    }
)


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(0, 30))
def test_removing_a_block_takes_its_bytes_and_nothing_else(plan, removed):
    more, less = account(SEVEN, removed, **plan), account(SEVEN, removed + 1, **plan)
    assert less.total_bytes < more.total_bytes and less.decode_read_bytes < more.decode_read_bytes
    assert more.total_params - less.total_params == BLOCK
    for part in ("vision_tower", "projector", "embeddings", "final_norm", "head"):
        assert more.part_bytes[part] == less.part_bytes[part]
    # What a block takes does not depend on how many are left.
    first = account(SEVEN, 0, **plan).total_bytes - account(SEVEN, 1, **plan).total_bytes
    assert more.total_bytes - less.total_bytes == first


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(0, 31))
def test_total_is_the_sum_of_parts_and_bounds_what_is_read(plan, removed):
    a = account(SEVEN, removed, **plan)
    assert a.total_bytes == sum(a.part_bytes.values()) + a.kv_cache_bytes
    unread = sum(a.part_bytes[part] for part in ("vision_tower", "projector", "embeddings"))
    assert a.decode_read_bytes == a.total_bytes - unread
    if plan["bits"] == 16:
        assert a.weights_bytes == 2 * a.total_params


@settings(max_examples=30, deadline=None)
@given(st.floats(2, 8), st.floats(2, 8))
def test_more_bits_are_more_bytes(one, other):
    low, high = sorted((one, other))
    assert account(SEVEN, bits=low).total_bytes <= account(SEVEN, bits=high).total_bytes
    assert account(SEVEN, bits=high).total_bytes < account(SEVEN).total_bytes
