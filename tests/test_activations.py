"""q_proj outputs and their outliers, packed or not; AWQ's loss curve as drawn."""

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis
from test_quantize import batch, outlier_model, quantized, tiny

from medprune.models.families import parts
from medprune.pruning.plan import apply_plan, make_plan
from medprune.quantizing import activations
from medprune.quantizing.activations import outlier_table, q_proj_activations
from medprune.quantizing.quantize import quantize
from medprune.results.figures import figure_activations, figure_loss_curve


def test_q_proj_activations_are_the_layers_own():
    model, inputs = tiny(), batch(2, 12)
    got = q_proj_activations(model, inputs, 0)
    assert got.shape == (2 * 12, 128) and got.dtype == np.float32
    with torch.no_grad():
        block = parts(model).blocks[0]
        embedded = model.model.language_model.embed_tokens(inputs["input_ids"])
        words = inputs["input_ids"] != model.config.image_token_id
        by_hand = block.self_attn.q_proj(block.input_layernorm(embedded))[words].numpy()
    np.testing.assert_allclose(got.reshape(2, 12, 128)[words.numpy()], by_hand, rtol=1e-4, atol=1e-5)
    assert not block.self_attn.q_proj._forward_hooks  # nothing is left behind
    with pytest.raises(ValueError, match="block must be 0 to 2, as the model has 3, not 3"):
        q_proj_activations(model, inputs, 3)


def test_packed_layers_answer_too_and_the_figure_takes_them():
    before = q_proj_activations(tiny(), batch(1, 12), 1)
    model, _ = quantize(tiny(), "rtn")
    after = q_proj_activations(model, batch(1, 12), 1)
    assert 0 < np.abs(after - before).max() < np.abs(before).max()
    figure = figure_activations(before, after, ("16 bits", "4 bits"))
    assert len(figure.axes) == 5


@pytest.mark.parametrize("rows", (3, 20))
def test_the_table_is_that_of_all_entries_at_once_however_many_rows_go_together(monkeypatch, rows):
    monkeypatch.setattr(activations, "ROWS_AT_ONCE", rows)
    model, inputs = outlier_model(), batch(20, 24)
    parts(model).blocks[1].self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(128))  # a mean beside 0
    table = outlier_table(model, inputs)
    for block in range(3):
        values = q_proj_activations(model, inputs, block)
        size, sd, heavy = np.abs(values), values.std(), kurtosis(values, axis=None, fisher=False)
        found = [size.max(), sd, (size > 6 * sd).sum(), values.size, heavy]
        assert table.iloc[block, 1:].tolist() == pytest.approx(found, rel=1e-5)


def test_outliers_are_counted_block_by_block_in_the_original_numbering():
    model = tiny()
    with torch.no_grad():
        parts(model).blocks[2].self_attn.q_proj.weight[7] *= 60  # one channel far from the rest
    table = outlier_table(model, batch(2, 12))
    assert list(table) == ["block", "peak", "sd", "outliers", "entries", "kurtosis"]
    assert list(table.block) == [0, 1, 2] and (table.entries == 2 * 12 * 128).all()
    wide = q_proj_activations(model, batch(2, 12), 2)
    assert table.outliers[2] == (np.abs(wide) > 6 * wide.std()).sum() > 0 and table.outliers[0] == 0
    assert table["kurtosis"][2] > 10 > table["kurtosis"][0] > 1
    assert table.peak[2] == pytest.approx(np.abs(wide).max())
    apply_plan(model, make_plan(model.config, [1], "tiny", protect=()))
    assert list(outlier_table(model, batch(2, 12), [0, 2]).block) == [0, 2]
    with pytest.raises(ValueError, match="lists 3 blocks, but the model has 2"):
        outlier_table(model, batch(2, 12), [0, 1, 2])


def test_the_loss_curve_is_drawn_for_one_block_from_1_at_alpha_0():
    _, info = quantized("awq", model=outlier_model())
    (axes,) = figure_loss_curve(info).axes
    curves = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 20]
    assert len(curves) == 4 and all(c[0] == 1 for c in curves)  # two heads: v -> o is searched too
    losses = np.array(info["loss_curve"]["losses"]["model.language_model.layers.1.mlp.gate_proj"])
    assert any(np.allclose(c, losses / losses[0]) for c in curves)
    assert axes.get_title() == "block 1"
