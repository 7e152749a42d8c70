"""Each method on a tiny random LLaVA: quantize, generate, save, reload; bytes; refusals; AWQ beside RTN; mixed bits."""

import json
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.quantizers.quantizers_utils import should_convert_module

from medprune.answers.prompts import prompt_text
from medprune.data import synthetic
from medprune.models import loading
from medprune.models.families import parts
from medprune.models.sizes import account, linear_bytes
from medprune.pruning.plan import make_plan
from medprune.quantizing.checkpoint import add_scores, load_quantized, quantize_folder, save_quantized
from medprune.quantizing.packed import PackedLinear, PackedTable, from_awq, kernel_width, to_awq, unpack_codes
from medprune.quantizing.quantize import bits_by_importance, packed_bytes, quantize
from medprune.settings import METHODS
from medprune.store import content, made

IMAGE = 255


def tiny(dtype=torch.float32, tied=True, heads=4, blocks=3, seed=0):
    """A random LLaVA: 3 blocks of width 128, two query heads to a key-value head, a CLIP of 4 image tokens."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, patch_size=16)  # fmt: skip
    text = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=blocks, num_attention_heads=heads,
                       num_key_value_heads=2, vocab_size=256, initializer_range=0.1, tie_word_embeddings=tied,
                       bos_token_id=None, eos_token_id=None)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4,
                         vision_feature_layer=-1, vision_feature_select_strategy="default",
                         tie_word_embeddings=tied)  # fmt: skip
    return LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()


def batch(rows=4, tokens=24, images=True, seed=1):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 250, (rows, tokens), generator=g)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        ids[:, 2:6] = IMAGE
        found["pixel_values"] = torch.randn(rows, 3, 32, 32, generator=g)
    return found


@torch.no_grad()
def logits(model, **kwargs):
    return model(**(kwargs or batch(2, 12))).logits


def quantized(method, dtype=torch.float32, model=None, **kwargs):
    return quantize(model or tiny(dtype), method, calibration=batch() if method == "awq" else None, **kwargs)


CASES = [("rtn", {}), ("rtn", {"bits": 3}), ("rtn", {"bits": [8, 16, 4], "quantize_head": True}), ("awq", {}),
         ("awq", {"bits": [3, 16, 8], "quantize_head": 4}), ("rtn", {"bits": 16, "group_size": 32, "quantize_vision": 8}),
         ("bnb", {}), ("hqq", {}), ("hqq", {"bits": [3, 8, 16], "quantize_head": True}),
         ("rtn", {"group_size": 32, "quantize_vision": True}),
         ("rtn", {"quantize_embeddings": True}), ("rtn", {"bits": 16, "quantize_embeddings": 3, "quantize_vision": 4, "group_size": 32}),
         ("awq", {"bits": [3, 16, 8], "quantize_embeddings": 8}),
         ("hqq", {"group_size": 32, "quantize_vision": True, "quantize_head": True})]  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize(("method", "kwargs"), CASES)
def test_each_method_answers_saves_and_reloads_to_the_same_logits(tmp_path, method, kwargs, dtype):
    model, info = quantized(method, dtype, tiny(dtype, tied=dtype == torch.float32), **kwargs)
    before = logits(model)
    save_quantized(model, tmp_path / "q", method, info, base="tiny", plan="0 removed", scores="judge score 50 %")
    assert torch.equal(logits(model), before)  # saving leaves the model as it was
    again = load_quantized(tmp_path / "q")
    assert torch.equal(logits(again), before)
    answer = again.generate(**batch(1, 12), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert answer.shape == (1, 15)
    card = (tmp_path / "q" / "README.md").read_text()
    assert "Not for clinical use" in card and "0 removed" in card and "judge score 50 %" in card
    assert (info.get("calibration", "none")) in card


def test_scores_come_into_the_model_card_when_there_are_some(tmp_path):
    model, info = quantized("rtn")
    save_quantized(model, tmp_path / "q", "rtn", info, base="tiny", plan="blocks removed: 3", licence="Apache-2.0")
    before = (tmp_path / "q" / "README.md").read_text()
    add_scores(tmp_path / "q", "80.0% [70.0, 90.0]")
    add_scores(tmp_path / "q", "81.0% [71.0, 91.0]")
    after = (tmp_path / "q" / "README.md").read_text()
    assert after == before.replace("- Scores: not evaluated", "- Scores: 81.0% [71.0, 91.0]") != before
    for said in (
        "Base: tiny",
        "blocks removed: 3",
        "Licence: Apache-2.0",
        "bits 4",
        "Not for clinical use",
        "How to load",
    ):
        assert said in after


def test_a_fresh_process_reloads_awq(tmp_path):
    model, info = quantized("awq", torch.bfloat16)
    folder = save_quantized(model, tmp_path / "q", "awq", info)
    code = (
        "import sys, torch; from medprune.quantizing.checkpoint import load_quantized\n"
        "model = load_quantized(sys.argv[1]); ids = torch.arange(3, 19)[None]\n"
        "with torch.no_grad(): torch.save(model(input_ids=ids).logits, sys.argv[2])\n"
        "assert not any(m.split('.')[0] == 'awq' for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "y.pt")], check=True, timeout=120)
    here = logits(model, input_ids=torch.arange(3, 19)[None])
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), here)


def test_plain_transformers_loads_nf4(tmp_path):
    model, info = quantized("bnb")
    before = logits(model)  # on a CPU this reorders the weights, which saving must undo
    save_quantized(model, tmp_path / "q", "bnb", info)
    plain, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "q", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(plain), before)
    kinds = {n: type(m).__name__ for n, m in plain.named_modules() if isinstance(m, nn.Linear)}
    assert all((kind == "Linear4bit") == (".language_model.layers." in n) for n, kind in kinds.items())


@pytest.mark.parametrize("method", ("rtn", "awq"))
def test_awq_folder_says_to_transformers_just_which_layers_are_packed(tmp_path, method):
    model, info = quantized(method)
    folder = save_quantized(model, tmp_path / "q", method, info)
    said = AutoConfig.from_pretrained(folder).quantization_config
    assert {k: said[k] for k in ("quant_method", "version", "bits", "group_size", "zero_point")} == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 64, "zero_point": True,
    }  # fmt: skip
    converted = {n for n, m in tiny().named_modules()
                 if isinstance(m, nn.Linear) and should_convert_module(n, said["modules_to_not_convert"])}  # fmt: skip
    assert converted == {n for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    stored = load_file(folder / "model.safetensors")
    q = "language_model.model.layers.0.self_attn.q_proj."
    shapes = {k.removeprefix(q): (tuple(v.shape), v.dtype) for k, v in stored.items() if k.startswith(q)}
    assert shapes == {"qweight": ((128, 16), torch.int32), "qzeros": ((2, 16), torch.int32),
                      "scales": ((2, 128), torch.float16)}  # fmt: skip


@pytest.mark.parametrize(("method", "bits"), [("rtn", 3), ("rtn", 4), ("rtn", 8), ("awq", 4), ("bnb", 4), ("hqq", 4)])
def test_bytes_agree_with_the_accounting(tmp_path, method, bits):
    dense = tiny(torch.bfloat16)
    shapes = [(m.in_features, m.out_features) for m in dense.model.language_model.layers.modules()
              if isinstance(m, nn.Linear)]  # fmt: skip
    kept = packed_bytes(dense)
    model, info = quantized(method, model=dense, bits=bits)
    planned = sum(sum(linear_bytes(i, o, bits, 64, method)) for i, o in shapes)
    assert info["packed_bytes"]["block_linears"] == planned
    assert all(info["packed_bytes"][p] == n for p, n in kept.items() if p not in ("block_linears", "total"))
    assert info["packed_bytes"]["total"] == kept["total"] - kept["block_linears"] + planned
    folder = save_quantized(model, tmp_path / "q", method, info)
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little") + 8
    # A tiny model's bookkeeping (quant states, HQQ's settings) weighs something; the tensors are what is planned.
    on_disk = (folder / "model.safetensors").stat().st_size - header
    assert on_disk == pytest.approx(info["packed_bytes"]["total"], rel=0.02)


@pytest.mark.parametrize("method", ["rtn", "hqq"])
@pytest.mark.parametrize("tied", [True, False])
def test_head_and_vision_tower_weigh_what_the_plan_says(method, tied):
    dense = tiny(torch.bfloat16, tied=tied)
    also = {"quantize_head": True, "quantize_vision": True}
    plan, least = (account(dense.config, 0, 4, 32, method=method, **o).part_bytes for o in (also, {}))
    before, positions = packed_bytes(dense), 5 * 8  # a buffer of position numbers, which a folder has not
    found = quantized(method, model=dense, group_size=32, **also)[1]["packed_bytes"]
    assert found["vision_tower"] == plan["vision_tower"] + positions and found["head"] == plan["head"]
    assert all(found[p] == plan[p] == before[p] for p in ("projector", "embeddings"))
    assert found["block_linears"] == sum(plan[f"block_{part}"] for part in ("weights", "scales", "zero_points"))
    assert plan["vision_tower"] < least["vision_tower"] and (
        least["head"] == 0 if tied else plan["head"] < least["head"]
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_embedding_table_weighs_what_the_plan_says_and_a_tied_head_stays_the_same_one(tmp_path, tied):
    dense = tiny(torch.bfloat16, tied=tied)
    plan = account(dense.config, 0, 4, 64, quantize_embeddings=8)
    model, info = quantized("rtn", model=dense, quantize_embeddings=8)
    assert info["packed_bytes"]["embeddings"] == plan.part_bytes["embeddings"]
    assert info["packed_bytes"]["head"] == plan.part_bytes["head"] == (0 if tied else 2 * 256 * 128)
    found = parts(model)
    assert (found.head is found.table) == tied
    save_quantized(model, tmp_path / "q", "rtn", info)
    again = parts(load_quantized(tmp_path / "q"))
    assert (again.head is again.table) == tied and again.table.bits == 8 and again.blocks[0].mlp.up_proj.bits == 4


@pytest.mark.parametrize("vocab", [128, 112])  # whole blocks of the kernel's outputs, and not
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_tables_rows_are_those_of_its_weight_in_the_stored_and_in_the_running_form(vocab, bits):
    torch.manual_seed(0)
    embedding = nn.Embedding(vocab, 64).bfloat16()
    table = PackedTable.from_embedding(embedding, bits, 32)
    ids = torch.randint(vocab, (3, 5))
    wanted = table.fake_quantized_weight()[ids].bfloat16()
    assert torch.equal(table(ids), wanted) and (wanted - embedding(ids)).abs().max() < 4.0 / 2**bits + 0.02
    with torch.no_grad():
        product = table(torch.randn(2, 64).bfloat16())  # as the head
    assert product.shape == (2, vocab) and torch.equal(table(ids), wanted)
    assert (table.tables is None) == (bits == 3 or kernel_width() is None)
    table.compact()
    assert torch.equal(table(ids), wanted)
    assert table.to(torch.float32)(ids).dtype == torch.float32


def test_a_table_whose_rows_are_multiplied_keeps_its_factor_and_one_that_does_more_is_refused():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 7.5

    class Shifted(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    embedding = Scaled(64, 64)
    table = PackedTable.from_embedding(embedding, 8, 64)
    ids = torch.arange(64)
    torch.testing.assert_close(table(ids), embedding(ids).detach(), atol=0.15, rtol=0)
    assert float(table.multiplier) == pytest.approx(7.5)
    assert torch.equal(table.fake_quantized_weight()[ids] * table.multiplier, table(ids))
    with pytest.raises(ValueError, match="Shifted does more than look rows up: leave quantize_embeddings out"):
        PackedTable.from_embedding(Shifted(64, 64), 8, 64)


def test_only_block_linears_are_touched():
    for method in METHODS:
        model, info = quantized(method)
        packed = {n for n, m in model.named_modules() if "4" in type(m).__name__ or type(m).__name__ in
                  ("PackedLinear", "HQQLinear")}  # fmt: skip
        assert len(packed) == 3 * 7 and all(".language_model.layers." in n for n in packed)
        assert info["seconds"] > 0 and info["method"] == method
        untouched = dict(tiny().named_parameters())
        for name, tensor in model.named_parameters():
            if ".language_model.layers." not in name:
                assert torch.equal(tensor, untouched[name]), (method, name)


def outlier_model(seed=0):
    """A model with input channels of the MLP that are 30 times as strong as the rest, as real ones have."""
    model = tiny(heads=2, seed=seed)
    with torch.no_grad():
        for block in model.model.language_model.layers:
            block.post_attention_layernorm.weight[[5, 70]] *= 30
            block.input_layernorm.weight[[9, 33]] *= 30
    return model


@torch.no_grad()
def mlp_error(model, reference, inputs):
    """Return the first block's relative MLP output error on the reference's own hidden states; lower is better."""
    block, original = model.model.language_model.layers[0], reference.model.language_model.layers[0]
    y = original.mlp(original.post_attention_layernorm(inputs))
    return float((block.mlp(block.post_attention_layernorm(inputs)) - y).norm() / y.norm())


def test_awq_beats_rtn_where_channels_are_outliers():
    reference = outlier_model()
    inputs = torch.randn(4, 24, 128, generator=torch.Generator().manual_seed(5))
    by_rtn, _ = quantized("rtn", model=outlier_model())
    by_awq, info = quantized("awq", model=outlier_model())
    assert mlp_error(by_awq, reference, inputs) < 0.8 * mlp_error(by_rtn, reference, inputs)
    losses = info["loss_curve"]["losses"]["model.language_model.layers.0.mlp.gate_proj"]
    assert len(losses) == len(info["loss_curve"]["ratios"]) == 20
    assert min(losses) < 0.5 * losses[0]  # ratio 0 is no activation scaling


class Captured(Exception):
    pass


def autoawqs(model, calibration):
    """Quantize in place by autoawq's own walk, search, clip and packing; return (each search's losses, its layer class).

    Stood in: where this transformers has the blocks, calibration by images, and what its search does on a CPU alone:
    it puts weights back from v.cpu(), which there is the very tensor that it scales in place.
    """
    with warnings.catch_warnings(record=True):  # awq announces its deprecation, and turns such warnings on for everyone
        from awq.models.llava import LlavaAWQForCausalLM
        from awq.modules.linear import WQLinear_GEMM
        from awq.quantize.quantizer import AwqQuantizer

    curves = []

    class Llava(LlavaAWQForCausalLM):
        model_type = "llava"
        get_model_layers = staticmethod(lambda model: parts(model).blocks)
        move_embed = staticmethod(lambda model, device: None)

    class Quantizer(AwqQuantizer):
        def init_quant(self, n_samples=None, max_seq_len=None):
            caught = []

            def catch(module, args, kwargs):
                caught.append((args[0], kwargs))
                raise Captured

            blocks = parts(self.model).blocks
            with blocks[0].register_forward_pre_hook(catch, with_kwargs=True), torch.no_grad(), pytest.raises(Captured):
                self.model(**self.calib_data, use_cache=False)
            return blocks, caught[0][1], caught[0][0]

        def _search_best_scale(self, module, prev_op, layers, inp, module2inspect=None, kwargs=None):
            curves.append([])

            def copied(module, state, prefix, meta):
                state.update({k: v.clone() for k, v in state.items()})

            with (module2inspect or layers[0]).register_state_dict_post_hook(copied):
                return super()._search_best_scale(module, prev_op, layers, inp, module2inspect, kwargs or {})

        def _compute_loss(self, *args):
            curves[-1].append(super()._compute_loss(*args))
            return curves[-1][-1]

    Quantizer(Llava, model, None, 4, 64, True, "gemm", calibration, None, None, duo_scaling=True).quantize()
    return curves, WQLinear_GEMM


def codes_of(model, kind=PackedLinear):
    """Return {name: codes, scales and zero points} of a quantized model, ours or autoawq's."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, kind)}
    if kind is PackedLinear:
        return {n: layer.parts() for n, layer in layers.items()}
    stored = {n: from_awq(layer.qweight, layer.qzeros, layer.scales) for n, layer in layers.items()}
    return {n: (unpack_codes(t["qweight"], 4), t["scale"], unpack_codes(t["zero_point"], 4)) for n, t in stored.items()}


def agreement(ours, theirs, part=0):
    """Return the share of equal codes (part 0), scales (1) or zero points (2)."""
    assert ours.keys() == theirs.keys() and len(ours) == 3 * 7
    same = torch.cat([(ours[n][part] == theirs[n][part]).flatten() for n in ours])
    return float(same.float().mean())


@pytest.mark.parametrize(
    ("make", "calibration"), [(tiny, batch()), (lambda: outlier_model(), batch(8, 40))], ids=("grouped queries", "plain")
)
def test_awq_finds_autoawqs_scales_and_integers(make, calibration):
    """320 tokens are more than the 128 and 256 inputs: there the Gram matrices choose what autoawq's loops choose."""
    theirs = make()
    curves, kind = autoawqs(theirs, {k: v for k, v in calibration.items() if k != "attention_mask"})
    ours, info = quantize(make(), "awq", calibration=calibration)
    found = info["loss_curve"]["losses"]
    grouped = "model.language_model.layers.0.self_attn.o_proj" not in found
    assert len(found) == len(curves) == 3 * (3 if grouped else 4) and grouped == (make is tiny)
    for (name, losses), reference in zip(found.items(), curves, strict=True):
        assert losses == pytest.approx(reference, rel=1e-2), name
        assert np.argmin(losses) == np.argmin(reference), f"another alpha for {name}"
    for part in range(3):
        assert agreement(codes_of(ours), codes_of(theirs, kind), part) >= 0.999
    norms = {n: p for n, p in theirs.named_parameters() if "layernorm" in n}
    for name, weight in ours.named_parameters():
        if name in norms:
            torch.testing.assert_close(weight, norms[name], rtol=1e-5, atol=0, msg=name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_awq_in_chunks_of_rows_chooses_the_same(monkeypatch, dtype):
    from medprune.quantizing import awq

    whole, info = quantize(outlier_model().to(dtype), "awq", calibration=batch(8, 40))
    rows, kept = [], awq._inputs

    def inputs(block, groups, hidden, calls):
        rows.append([len(some) for some in hidden])
        return kept(block, groups, hidden, calls)

    monkeypatch.setattr(awq, "_inputs", inputs)
    monkeypatch.setattr(awq, "ENTRIES", 3 * 40 * 256)
    in_chunks, again = quantize(outlier_model().to(dtype), "awq", calibration=batch(8, 40))
    assert rows == [[3, 3, 2]] * 3
    for name, losses in info["loss_curve"]["losses"].items():
        assert again["loss_curve"]["losses"][name] == pytest.approx(losses, rel=1e-3), name
        assert np.argmin(again["loss_curve"]["losses"][name]) == np.argmin(losses), name
    assert agreement(codes_of(in_chunks), codes_of(whole)) > 0.99  # some clips are as good as their neighbours


@given(st.lists(st.integers(1, 900), min_size=1, max_size=6))
def test_the_tokens_that_judge_clips_do_not_depend_on_the_chunks(lengths):
    from medprune.quantizing.awq import CLIP_TOKENS, _sample

    tokens = torch.arange(sum(lengths))[:, None]
    step = max(1, len(tokens) // CLIP_TOKENS)
    assert torch.equal(_sample([chunk[None] for chunk in tokens.split(lengths)]), tokens[::step])


def test_awq_searched_in_float16_as_on_a_gpu_chooses_almost_the_same(monkeypatch):
    from medprune.quantizing import awq

    exact, info = quantize(outlier_model().half(), "awq", calibration=batch(8, 40))
    monkeypatch.setattr(awq, "on_gpu", lambda device: True)
    assert awq._search_dtype(torch.device("cpu"), torch.bfloat16) == torch.float32
    half, found = quantize(outlier_model().half(), "awq", calibration=batch(8, 40))
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    for name, losses in info["loss_curve"]["losses"].items():
        assert found["loss_curve"]["losses"][name] == pytest.approx(losses, rel=0.1), name
        assert losses[np.argmin(found["loss_curve"]["losses"][name])] <= 1.02 * min(losses), name
    assert 0.9 < agreement(codes_of(half), codes_of(exact)) < 1


def test_awq_lets_a_block_s_weights_go_before_the_next_is_searched():
    model = tiny()
    first, second, _ = parts(model).blocks
    dense, alive = [weakref.ref(m.weight) for m in first.modules() if isinstance(m, nn.Linear)], []
    second.register_forward_pre_hook(lambda *_: alive.append(sum(ref() is not None for ref in dense)))
    quantize(model, "awq", calibration=batch())
    assert len(dense) == 7 and alive == [7, 0], "before any search, when blocks only say what they are called with, and after"


class SquaredNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) * self.weight


def fused(block):
    block.self_attn.qkv_proj = nn.Linear(128, 256)
    del block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj


def with_another_norm(block):
    block.pre_feedforward_layernorm = LlamaRMSNorm(128)


def squared(block):
    block.input_layernorm = SquaredNorm(128)


def shifted(block):
    block.post_attention_layernorm = nn.LayerNorm(128)
    nn.init.ones_(block.post_attention_layernorm.bias)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(fused, "AWQ knows no LlamaDecoderLayer with the linear layers self_attn.o_proj, self_attn.qkv_proj"),
     (with_another_norm, "with or without pre_feedforward_layernorm"),
     (squared, "AWQ knows no norm like input_layernorm, SquaredNorm, which is no product with its weight, or with 1"),
     (shifted, "no norm like post_attention_layernorm, LayerNorm")],
)  # fmt: skip
def test_awq_refuses_a_structure_it_does_not_know_before_any_work(change, sentence):
    model = tiny()
    change(parts(model).blocks[1])
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=sentence) as error:
        quantize(model, "awq", calibration=batch())
    assert str(error.value).count("\n") == 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_awq_without_a_finite_error_says_so():
    pixels = batch()["pixel_values"]
    pixels[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"no finite error of self_attn.q_proj, .*the calibration overflows"):
        quantize(tiny(), "awq", calibration=batch() | {"pixel_values": pixels})


@torch.no_grad()
def test_awq_multiplies_differences_in_bfloat16_and_loses_nothing_that_is_compared():
    from medprune.quantizing.awq import _on_differences

    mlp = outlier_model().model.language_model.layers[0].mlp
    x = torch.randn(64, 128)
    x[:, 5] *= 100
    before, kept = mlp(x), mlp.up_proj.weight.detach().clone()
    changed = kept + 1e-3 * torch.randn_like(kept)

    def change():
        mlp.up_proj.weight.data = changed.clone()
        after = mlp(x)
        mlp.up_proj.weight.data = kept.clone()
        return after

    exact, whole = change() - before, change().bfloat16().float() - before.bfloat16().float()
    with _on_differences(mlp, {}):
        assert torch.equal(mlp(x), before)
        found = change() - before
        assert torch.equal(mlp(x), before), "the weights are back"
    assert (found - exact).norm() < 0.01 * exact.norm() < 0.5 * (whole - exact).norm()
    assert "forward" not in vars(mlp.up_proj) and torch.equal(mlp(x), before)


def test_awq_rounding_in_place_is_autoawqs():
    with warnings.catch_warnings(record=True):
        from awq.quantize.quantizer import AwqQuantizer

    from medprune.quantizing.awq import pseudo_quantize

    torch.manual_seed(0)
    theirs = AwqQuantizer.__new__(AwqQuantizer)
    theirs.group_size, theirs.zero_point, theirs.w_bit = 64, True, 4
    for dtype in (torch.float32, torch.float16):
        w = torch.randn(48, 128).to(dtype)
        kept = w.clone()
        for a, b in zip(pseudo_quantize(w, 64), theirs.pseudo_quantize_tensor(w), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(w, kept)


def test_awq_packing_is_autoawqs():
    with warnings.catch_warnings(record=True):
        from awq.modules.linear import WQLinear_GEMM

    from medprune.quantizing.awq import integers, pseudo_quantize

    torch.manual_seed(0)
    linear = nn.Linear(128, 64, bias=False)
    ours = to_awq(PackedLinear.from_codes(*integers(linear, 64), 4))
    rounded, scale, zero = pseudo_quantize(linear.weight.data.half(), 64)
    linear = linear.half()
    linear.weight.data = rounded
    theirs = WQLinear_GEMM.from_linear(linear, 4, 64, scales=scale.t().contiguous(), zeros=zero.t().contiguous())
    for name, tensor in ours.items():
        assert torch.equal(tensor, getattr(theirs, name)), name


def test_text_only_calibration_gives_other_scales():
    _, with_images = quantized("awq")
    ids = batch()["input_ids"]
    words = ids[ids != IMAGE].view(len(ids), -1)  # each row's own, less its image tokens
    _, text_only = quantize(tiny(), "awq", calibration={"input_ids": words})
    assert text_only["calibration"] == "text-only, 4 rows of 20 tokens"
    assert with_images["calibration"].startswith("image-text") and text_only["calibration"].startswith("text-only")
    assert with_images["loss_curve"]["losses"] != text_only["loss_curve"]["losses"]


def test_awq_shows_our_progress_bar(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDPRUNE_PROGRESS", str(tmp_path / "bars"))
    quantized("awq")
    assert "3/3" in (tmp_path / "bars").read_text()


@pytest.mark.parametrize(("method", "bits"), [("rtn", 3), ("awq", 4), ("bnb", 4), ("hqq", 4)])
def test_a_reloaded_folder_stops_where_the_model_did_and_knows_what_it_was_made_of(tmp_path, method, bits):
    model = tiny()
    model.generation_config.eos_token_id = [2, 7]
    model, info = quantized(method, model=model, bits=bits)
    save_quantized(model, tmp_path / "q", method, info, record={"context": "of this", "costs": {"s": 1}})
    assert load_quantized(tmp_path / "q").generation_config.eos_token_id == [2, 7]
    assert made(tmp_path / "q", "of this")["costs"] == {"s": 1} and made(tmp_path / "q", "of that") is None


def test_a_damaged_folder_is_refused_by_name(tmp_path):
    for method, key in (("awq", "qzeros"), ("hqq", "W_q"), ("bnb", "weight")):
        model, info = quantized(method)
        folder = save_quantized(model, tmp_path / method, method, info)
        file = folder / "model.safetensors"
        whole = load_file(file)
        name = f"language_model.model.layers.1.mlp.up_proj.{key}"
        save_file({k: v for k, v in whole.items() if not k.startswith(name)}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
            load_quantized(folder)
        save_file(whole | {"language_model.model.layers.7.mlp.up_proj.bias": torch.zeros(1)}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=r"layers\.7\.mlp\.up_proj"):
            load_quantized(folder)
    save_file(whole, file, {"format": "pt"})
    settings = json.loads((tmp_path / "awq" / "config.json").read_text())
    settings["text_config"]["intermediate_size"] = 512
    (tmp_path / "awq" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="does not fit its config.json"):
        load_quantized(tmp_path / "awq")


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [({"method": "gguf"}, "method must be one of rtn, awq, bnb, hqq, not 'gguf'"),
     ({"method": "rtn", "bits": 5}, r"bits for rtn must be one of \(3, 4, 8, 16\), not 5"),
     ({"method": "awq", "bits": 2}, r"bits for awq must be one of \(3, 4, 8, 16\), not 2"),
     ({"method": "rtn", "bits": [4, 4]}, "bits lists 2 blocks, but the model has 3"),
     ({"method": "hqq", "bits": [4, 4, 4, 4]}, "bits lists 4 blocks, but the model has 3"),
     ({"method": "hqq", "bits": [4, 5, 4]}, r"bits for hqq must be one of \(3, 4, 8, 16\), not 5"),
     ({"method": "bnb", "bits": [4, 8, 4]}, r"bits for bnb must be one of \(4,\), not 8"),
     ({"method": "rtn", "bits": 4.0}, r"bits for rtn must be one of \(3, 4, 8, 16\), not 4.0"),
     ({"method": "rtn", "bits": 16}, "nothing to quantize"),
     ({"method": "rtn", "group_size": 48}, r"group_size must be one of \(32, 64, 128\), not 48"),
     ({"method": "bnb", "group_size": 32}, "groups of 64 weights only"),
     ({"method": "awq"}, "awq needs calibration"),
     ({"method": "awq", "calibration": batch(3)}, "at least 4 calibration rows, not 3"),
     ({"method": "awq", "calibration": batch() | {"attention_mask": torch.zeros(4, 24)}}, "without padding"),
     ({"method": "awq", "calibration": {"input_ids": batch()["input_ids"]}}, "image tokens and pixel_values together"),
     ({"method": "bnb", "quantize_head": True}, "quantize_head works with rtn and awq and hqq, not with bnb"),
     ({"method": "rtn", "bits": 16, "quantize_head": True}, "nothing to quantize"),
     ({"method": "hqq", "quantize_embeddings": True}, "quantize_embeddings works with rtn and awq, not with hqq"),
     ({"method": "rtn", "quantize_embeddings": 5}, "quantize_embeddings must be true, false or one of"),
     ({"method": "awq", "quantize_head": 5, "calibration": batch()}, r"quantize_head must be true, false or one of \(3, 4, 8\) bits, not 5"),
     ({"method": "rtn", "group_size": 128, "quantize_vision": True}, "no linear of the vision tower has a width that groups of 128 divide")],
)  # fmt: skip
def test_bad_requests_are_refused_before_any_work(kwargs, sentence):
    model = tiny()
    with pytest.raises(ValueError, match=sentence) as error:
        quantize(model, **kwargs)
    assert str(error.value).count("\n") == 0
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_bad_models_are_refused_by_name():
    model = tiny()
    model.model.language_model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        quantize(model, "rtn")
    narrow = tiny()
    narrow.model.language_model.layers[2].mlp.down_proj = nn.Linear(96, 128)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj has 96 inputs, which groups of 64"):
        quantize(narrow, "rtn")
    model, info = quantized("hqq")
    with pytest.raises(ValueError, match="already quantized"):
        quantize(model, "rtn")
    with pytest.raises(ValueError, match="quantized by 'hqq'"):
        save_quantized(model, "nowhere", "rtn", info)
    with pytest.raises(ValueError, match="not quantized"):
        save_quantized(tiny(), "nowhere", "rtn", info)


def test_the_most_important_blocks_get_more_and_the_mean_is_kept():
    scores = [0.9, 0.1, 0.5, float("inf"), 0.2, 0.3]
    assert bits_by_importance(scores, 4.5, (3, 4, 8)) == [4, 3, 4, 8, 4, 4]  # 27 bits: 18 and 5 + 1 + 1 + 1 + 1
    assert bits_by_importance(scores, 4, (3, 8)) == [3, 3, 3, 8, 3, 3]
    assert bits_by_importance(scores, 5, (4, 8)) == [4, 4, 4, 8, 4, 4]
    assert bits_by_importance(scores, 16, (4, 16)) == [16] * 6 and bits_by_importance(scores, 3) == [3] * 6
    assert bits_by_importance(np.array([2.0, 2.0, 1.0]), 16 / 3, (4, 8)) == [8, 4, 4]  # ties: the earlier block


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.floats(3, 8),
       st.lists(st.sampled_from((4, 8, 16)), unique=True, max_size=3))  # fmt: skip
def test_bits_follow_the_order_of_the_scores_within_the_mean(scores, mean, more):
    choices = [3, 8, *more]
    bits = bits_by_importance(scores, mean, choices)
    assert len(bits) == len(scores) and set(bits) <= set(choices) and sum(bits) <= mean * len(bits) + 1e-6
    by_score = [bits[i] for i in sorted(range(len(scores)), key=lambda i: -scores[i])]
    assert by_score == sorted(by_score, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(([1, float("nan")], 4), "block 1 has no importance_score"),
     (([1, 2], 9), "target_mean_bits must be 3 to 8, as choices, not 9"), (([1, 2], 2.5), "not 2.5"),
     (([1, 2], float("nan")), "not nan"), (([1, 2], 4, (4, 5)), r"choices must be among \(3, 4, 8, 16\), not \(4, 5\)"),
     (([1, 2], 4, ()), "choices must be among")],
)  # fmt: skip
def test_impossible_rules_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        bits_by_importance(*arguments)


@pytest.mark.parametrize("method", ("rtn", "hqq"))
def test_a_mixed_model_has_the_planned_bytes_and_reloads(tmp_path, method):
    dense = tiny(torch.bfloat16, blocks=4)
    original = logits(dense)
    bits = bits_by_importance([0.4, 0.1, 0.9, 0.2], 7.75, (3, 4, 8, 16))
    assert bits == [8, 3, 16, 4]
    model, info = quantize(dense, method, bits)
    plan = account(model.config, 0, bits, 64, 0, method=method)
    linears = sum(plan.part_bytes[f"block_{part}"] for part in ("weights", "scales", "zero_points"))
    assert info["packed_bytes"]["block_linears"] == linears and info["bits"] == bits
    assert not any("Packed" in type(m).__name__ or "HQQ" in type(m).__name__ for m in parts(model).blocks[2].modules())
    before = logits(model)
    assert 0 < (before - original).norm() < 0.5 * original.norm()
    folder = save_quantized(model, tmp_path / "q", method, info)
    assert "bits [8, 3, 16, 4]" in (folder / "README.md").read_text()
    again = load_quantized(folder)
    assert torch.equal(logits(again), before)
    assert again.model.language_model.layers[2].mlp.up_proj.weight.dtype == torch.bfloat16


def test_wider_blocks_are_nearer_to_the_original():
    weight = tiny().model.language_model.layers[0].mlp.up_proj.weight.detach().clone()
    errors = []
    for bits in (3, 4, 8):
        model, _ = quantize(tiny(), "rtn", [bits, 4, 4])
        errors.append(float((model.model.language_model.layers[0].mlp.up_proj.fake_quantized_weight() - weight).norm()))
    assert errors[0] > 1.5 * errors[1] > 10 * errors[2]


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Return a folder of a 16-bit model, its pictures, plans for it and for another, and a quantized model."""
    home = tmp_path_factory.mktemp("folders")
    model, processor = loading.load(base)
    synthetic.write_images(home / "pictures", 1, 32, 0, "train")
    synthetic.write_images(home / "few", 1, 32, 0, "train")
    for picture in sorted((home / "few").rglob("*.png"))[3:]:
        picture.unlink()
    make_plan(model.config, [2], content(base), (), "magnitude").save(home / "plan.json")
    make_plan(model.config, [2], "another", (), "magnitude").save(home / "other.json")
    (home / "no_plan.json").write_text('{"kept": [0]}')
    model, info = quantize(model, "rtn", 4, 32)
    save_quantized(model, home / "packed", "rtn", info, processor=processor)
    return home


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"bits": 5}, r"bits for rtn must be one of \(3, 4, 8, 16\), not 5"),
     ({"method": "bnb", "bits": 3, "group_size": 64}, "bits for bnb must be"),
     ({"method": "gguf"}, "method must be one of rtn, awq, bnb, hqq, not 'gguf'"),
     ({"group_size": 48}, "group_size must be one of"), ({"group_size": 128}, "has 64 inputs"),
     ({"plan": "no_plan.json"}, "no_plan.json is no plan"), ({"plan": "missing.json"}, "missing.json is no plan"),
     ({"plan": "other.json"}, "other.json is for the model 'another', not for this one"),
     ({"source": "packed"}, "quantized already"), ({"out": "pictures"}, "is there already"),
     ({"out": "plan.json/q"}, r"plan.json/q cannot be written \(Not a directory\): name a folder elsewhere"),
     ({"method": "awq"}, "awq needs images"),
     ({"method": "awq", "images": "pictures", "rows": 3}, "rows is 3, but awq needs at least 4"),
     ({"method": "awq", "images": "few"}, "few holds 3 images")],
)  # fmt: skip
def test_what_cannot_be_made_is_refused_before_the_model_is_loaded(base, folders, monkeypatch, options, sentence):
    monkeypatch.setattr(loading, "load_blockwise", lambda *a, **k: pytest.fail("the model was loaded"))
    wanted = {"source": base, "out": "q", "method": "rtn", "group_size": 32} | options
    for name in ("out", "source", "plan", "images"):
        if name in wanted:
            wanted[name] = str(folders / wanted[name])  # an absolute path stays what it is
    with pytest.raises(ValueError, match=sentence) as error:
        quantize_folder(**wanted)
    assert "\n" not in str(error.value) and not (folders / "q").exists()


QUIETLY = """
import sys
from medprune.quantizing.checkpoint import load_quantized, quantize_folder
source, home = sys.argv[1:]
quantize_folder(source, f"{home}/bnb", "bnb", plan=f"{home}/plan.json")
also = {"plan": f"{home}/other.json", "other_model": True, "quantize_head": True}
info, size = quantize_folder(source, f"{home}/rtn", "rtn", 3, 32, **also)
assert info["quantize_head"] and size > info["packed_bytes"]["head"]
for name in ("bnb", "rtn"):
    assert load_quantized(f"{home}/{name}").config.text_config.num_hidden_layers == 5
"""


def test_a_plan_of_this_model_is_taken_as_is_one_of_another_if_told_so_and_libraries_keep_quiet(base, folders):
    words = [sys.executable, "-c", QUIETLY, base, str(folders)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr
    card = (folders / "rtn" / "README.md").read_text()
    assert "blocks 2 removed by magnitude" in card and f"Licence: not stated: see {Path(base).name}" in card
    assert "kept as they were: projector and norms, vision tower, embedding table\n" in card


@pytest.mark.parametrize("method", ["awq", "rtn", "hqq", "bnb"])
def test_block_by_block_is_quantized_what_the_whole_model_is(base, tmp_path, method):
    from medprune.models.loading import load, load_blockwise, save

    save(*load(base), tmp_path)
    (whole, processor), (parted, _, fetch) = load(tmp_path), load_blockwise(tmp_path)
    question = prompt_text(processor, "What?")
    inputs = processor(text=[question] * 4, images=[Image.new("RGB", (40, 40), c) for c in ("red", "tan", "navy", "gray")],
                      return_tensors="pt")  # fmt: skip
    calibration = {k: inputs[k] for k in ("input_ids", "pixel_values")} if method == "awq" else None
    quantize(whole, method, group_size=64 if method == "bnb" else 32, calibration=calibration)
    quantize(parted, method, group_size=64 if method == "bnb" else 32, calibration=calibration, fetch=fetch)
    with torch.no_grad():
        assert torch.equal(parted(**inputs).logits, whole(**inputs).logits)


def test_a_block_of_a_file_that_holds_nan_is_refused(base, tmp_path):
    from medprune.models.loading import load, load_blockwise, save

    model, processor = load(base)
    parts(model).blocks[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    save(model, processor, tmp_path)
    parted, _, fetch = load_blockwise(tmp_path)
    with pytest.raises(ValueError, match="mlp.up_proj.weight holds NaN"):
        quantize(parted, "rtn", group_size=32, fetch=fetch)
