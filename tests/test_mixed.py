"""Bits by importance, and mixed models: bytes as planned, saved and reloaded, refused where they cannot be."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_quantize import logits, tiny

from medprune.models.sizes import account
from medprune.quantizing.checkpoint import load_quantized, save_quantized
from medprune.quantizing.quantize import bits_by_importance
from medprune.models.families import parts
from medprune.quantizing.quantize import quantize


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
    [(([1, float("nan")], 4), "block 1 has no importance_score"), (([], 4), "is empty"),
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
