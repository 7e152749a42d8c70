"""Parameters and bytes held against the model on the meta device, real packers and the paper."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaConfig, LlavaForConditionalGeneration

from medprune.models.sizes import GIB, METHODS, account, check_quantizable, linear_bytes
from medprune.results.tables import plan_json, plan_notes, plan_table, plan_text
from medprune.settings import DATA, REPO
from medprune.models.sizes import named_config

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


def test_table_1_to_three_decimals():
    rows = json.loads((DATA / "paper_tables.json").read_text())["table1_prune_sweep"]
    table = plan_table("llava-1.5-7b", [row["blocks_removed"] for row in rows])
    assert list(table["blocks_removed"]) == [0, 2, 4, 7, 8, 9, 10]
    assert list(table["params_b"].round(3)) == [row["params_b"] for row in rows]
    assert list(table["paper_params_b"]) == [row["params_b"] for row in rows]


def test_the_paper_s_5_85b_model_is_flagged():
    (note,) = plan_notes("llava-1.5-7b")
    assert note.startswith("The paper's 5.85B model (table 4) has 6 blocks removed, not 7")
    assert plan_notes("llava-1.5-13b") == []
    assert plan_table("llava-1.5-13b", [0])["paper_params_b"].isna().all()


def test_plan_as_text_and_as_json(tmp_path):
    text = plan_text("llava-1.5-7b", [0, 7], bits=4, bandwidth=320)
    lines = {line[:24].strip(): line[24:].split() for line in text.splitlines()}
    assert lines["parameters (B)"] == lines["the paper's table 1"] == ["7.063", "5.647"]
    assert lines["total (GiB)"] == ["4.756", "3.955"] and "6 blocks removed, not 7" in text
    plan = json.loads(plan_json("llava-1.5-7b", [7], bits=4))
    assert plan["rows"][0]["params"] == 7_063_427_072 - 7 * BLOCK and plan["bits"] == 4
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    assert "table 1" not in plan_text(tmp_path, [0, 1], bits=4)
    assert json.loads(plan_json(tmp_path, [1]))["rows"][0]["paper_params_b"] is None
    with pytest.raises(ValueError, match="removes is empty"):
        plan_text("llava-1.5-7b", [])


def test_no_torch_is_needed():
    code = "import sys, medprune.preflight; assert not {'torch', 'transformers'} & set(sys.modules)"
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


def test_plan_takes_a_width_for_each_block():
    from typer.testing import CliRunner

    from medprune.cli import app

    widths = [8] * 6 + [3] * 19
    text = CliRunner().invoke(app, ["plan", "--bits", ",".join(map(str, widths))]).output
    assert "blocks 6 x 8 + 19 x 3 bits (rtn" in text and "7 removed" in text
    said = CliRunner().invoke(app, ["plan", "--bits", ",".join(map(str, widths)), "--json"]).output
    (row,) = json.loads(said)["rows"]
    assert row["total_bytes"] == account(SEVEN, 7, widths).total_bytes
    assert "blocks 4 bits" in CliRunner().invoke(app, ["plan", "--bits", "4"]).output
    error = CliRunner().invoke(app, ["plan", "--bits", "4,x"]).exception
    assert str(error) == "--bits 4,x must be a number, or one for each kept block with commas between."
    error = CliRunner().invoke(app, ["plan", "--bits", "4,3", "--remove", "7"]).exception
    assert "bits lists 2 blocks; 25 are kept" in str(error)


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


def test_check_quantizable_names_the_layer_and_what_fits():
    check_quantizable(SEVEN, 128, 4)
    check_quantizable(tiny(), None, 3)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has 64 inputs.*fit: \[32, 64\]"):
        check_quantizable(tiny(), 128, 4)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj has 96 inputs"):
        check_quantizable(tiny(intermediate_size=96), 64, 4)
    with pytest.raises(ValueError, match="group_size must be one of .*, not 48"):
        check_quantizable(SEVEN, 48, 4)
    with pytest.raises(ValueError, match="bits must be one of .*, not 5"):
        check_quantizable(SEVEN, 64, 5)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"blocks_removed": 32}, "blocks_removed must be 0 to 31, not 32"),
        ({"blocks_removed": -1}, "not -1"),
        ({"bits": 12}, "not 12"),
        ({"bits": 3, "method": "awq"}, "awq stores 4 bits, not 3"),
        ({"bits": 4, "method": "bnb", "group_size": 128}, "groups of 64 weights only, not 128"),
        ({"method": "gptq"}, "not 'gptq'"),
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
        "method": st.sampled_from(METHODS),
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
