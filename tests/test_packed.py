"""Packing, the int4 kernel beside the fake-quantized reference, and AWQ's layout."""

import copy
import importlib
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medprune.quantizing import packed
from medprune.quantizing.packed import PackedLinear, from_awq, pack_codes, rtn_codes, to_awq, unpack_codes


def linear(n_in=128, n_out=80, bias=False, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Linear(n_in, n_out, bias=bias).to(dtype)


def buffer_bytes(layer):
    return sum(b.numel() * b.element_size() for b in layer.buffers())


@settings(max_examples=25, deadline=None)
@given(bits=st.sampled_from((3, 4, 8)), rows=st.integers(1, 5), words=st.integers(1, 6), seed=st.integers(0, 999))
def test_codes_survive_packing_and_packing_is_dense(bits, rows, words, seed):
    codes = torch.randint(0, 2**bits, (rows, 8 * words), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    stored = pack_codes(codes, bits)
    assert stored.shape[1] * 8 == codes.shape[1] * bits
    assert torch.equal(unpack_codes(stored, bits), codes)


@pytest.mark.parametrize("bits", (3, 4, 8))
@pytest.mark.parametrize("group_size", (32, 64, 128))
def test_bytes_are_the_arithmetic_of_bits_and_groups(bits, group_size):
    layer = PackedLinear.from_linear(linear(256, 64), bits, group_size)
    assert buffer_bytes(layer) * 8 == 256 * 64 * (bits + (16 + bits) / group_size)


def test_rtn_errs_by_half_a_step_at_most_and_by_the_scale_that_is_stored():
    weight = linear().weight.detach()
    codes, scale, zero_point = rtn_codes(weight, 4, 64)
    assert scale.dtype == torch.float16
    by_hand = (codes.view(80, 2, 64).float() - zero_point.t()[..., None].float()) * scale.t()[..., None].float()
    layer = PackedLinear.from_codes(codes, scale, zero_point, 4)
    assert torch.equal(layer.fake_quantized_weight(), by_hand.view(80, 128))
    # The range is cut into 15 steps; rounding the scale to fp16 moves the ends by 15 * 2**-11 steps.
    steps = (by_hand - weight.view(80, 2, 64)).abs() / scale.t()[..., None].float()
    assert 0.4 < steps.max() < 1.02  # zero point and code are rounded apart: up to a half each at the ends
    assert steps.median() < 0.3


def test_groups_of_one_sign_or_all_zero_are_kept():
    weight = torch.stack([torch.full((64,), 0.5), torch.zeros(64), torch.linspace(1, 2, 64), -torch.linspace(1, 2, 64)])
    layer = PackedLinear.from_codes(*rtn_codes(weight.repeat(2, 1), 4, 64), 4)
    assert (layer.fake_quantized_weight()[:4] - weight).abs().max() < 0.07  # half of 2 / 15
    with pytest.raises(ValueError, match="too large for an fp16 scale"):
        rtn_codes(torch.full((8, 64), 3e6), 4, 64)


@pytest.mark.parametrize("group_size", (32, 64, 128))
@pytest.mark.parametrize("rows", (1, 7, 300))
@pytest.mark.parametrize("bits", (4, 8))
def test_bf16_forward_is_the_fake_quantized_one_within_one_percent(group_size, rows, bits):
    layer = PackedLinear.from_linear(linear(256, 176, bias=True), bits, group_size)  # 176: two kernel blocks and a rest
    x = torch.randn(2, rows, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    reference = F.linear(x.float(), layer.fake_quantized_weight(), layer.bias)
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == torch.bfloat16 and y.shape == reference.shape
    assert (y.float() - reference).norm() < (0.01 if bits == 4 else 0.005) * reference.norm()
    ran_kernel = layer.tables is not None
    assert ran_kernel == (2 * rows <= packed.MAX_KERNEL_ROWS[bits] and packed.kernel_width() is not None)


def test_fp32_forward_is_exactly_the_fake_quantized_one():
    for bits in (3, 4, 8):
        layer = PackedLinear.from_linear(linear(), bits, 64)
        x = torch.randn(5, 128)
        assert torch.equal(layer(x), F.linear(x, layer.fake_quantized_weight()))


@pytest.mark.skipif(packed.kernel_width() is None, reason="torch has no int4 kernel for this processor")
@pytest.mark.parametrize(("bits", "held"), [(4, 4 + 36 / 64), (8, 8 + 68 / 64)])
def test_running_form_holds_one_copy_and_leads_back_to_the_same_bits(bits, held):
    weight = linear(128, 80).weight.detach() * torch.logspace(-6, 4, 80)[:, None]  # scales down to fp16's subnormals
    layer = PackedLinear.from_codes(*rtn_codes(weight, bits, 64), bits)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    exact = layer.fake_quantized_weight()
    with torch.inference_mode():
        layer(torch.randn(2, 128).bfloat16())
    assert layer.scale is None and layer.zero_point is None
    assert buffer_bytes(layer) * 8 == 128 * 80 * held
    assert torch.equal(layer.fake_quantized_weight(), exact)
    twin = copy.deepcopy(layer)
    after = layer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    twin.float().bfloat16()  # a change of dtype leaves the scales in fp16
    assert twin.scale.dtype == torch.float16 and torch.equal(twin.scale, before["scale"])
    other = PackedLinear.from_linear(linear(128, 80, seed=3), bits)
    layer(torch.randn(2, 128).bfloat16())
    layer.load_state_dict(other.state_dict())  # into the running form
    assert torch.equal(layer.fake_quantized_weight(), other.fake_quantized_weight())


@pytest.mark.parametrize("bits", (3, 4, 8))
def test_unpacking_in_slices_gives_the_whole(monkeypatch, bits):
    layer = PackedLinear.from_linear(linear(256, 176, bias=True), bits)  # 64 + 64 + 48 outputs
    stored = {k: v.clone() for k, v in layer.state_dict().items()}
    exact, x = layer.fake_quantized_weight(), torch.randn(300, 256)
    monkeypatch.setattr(packed, "SLICE_WEIGHTS", 64 * 256)
    assert len(layer._slices()) == 3
    in_slices = PackedLinear.from_linear(linear(256, 176, bias=True), bits).state_dict()
    assert (
        all(torch.equal(tensor, stored[name]) for name, tensor in in_slices.items())
        and in_slices.keys() == stored.keys()
    )
    torch.testing.assert_close(layer(x), F.linear(x, exact, layer.bias), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer(x[:2].bfloat16())  # at 4 and 8 bits, into the running form by slices
        y = layer(x.bfloat16())  # more rows than the kernel takes: unpacked from the running form
    assert (y.float() - F.linear(x, exact, layer.bias)).norm() < 0.01 * y.float().norm()
    assert torch.equal(torch.cat([layer.fake_quantized_weight(torch.float32, i, j) for i, j in layer._slices()]), exact)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in layer.state_dict().items())


def test_an_unknown_kernel_layout_costs_speed_only(monkeypatch):
    layer = PackedLinear.from_linear(linear())
    monkeypatch.setattr(packed, "kernel_width", lambda: None)
    x = torch.randn(2, 128).bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.fake_quantized_weight(torch.bfloat16)))
    assert layer.tables is None


def test_gradients_reach_the_input():
    layer = PackedLinear.from_linear(linear())
    x = torch.randn(2, 128, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0].float(), layer.fake_quantized_weight().sum(0), rtol=0.05, atol=0.02)


def test_awq_layout_is_autoawqs_own():
    with warnings.catch_warnings(record=True):  # awq announces its deprecation
        gemm = importlib.import_module("awq.utils.packing_utils")
    layer = PackedLinear.from_linear(linear(128, 80))
    tensors = to_awq(layer)
    assert tensors["qweight"].shape == (128, 10) and tensors["qzeros"].shape == (2, 10)
    theirs = gemm.dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"].float(), 4, 64)
    assert torch.equal(theirs.t(), layer.fake_quantized_weight())
    back = from_awq(tensors["qweight"], tensors["qzeros"], tensors["scales"])
    assert all(torch.equal(back[k], v) for k, v in layer.state_dict().items())


@pytest.mark.parametrize(
    ("shape", "bits", "group_size", "sentence"),
    [((128, 64), 5, 64, "5 bits in groups of 64"), ((128, 64), 4, 48, "groups of 48"),
     ((96, 64), 4, 64, "a layer of 96 inputs"), ((128, 60), 4, 64, "128 inputs and 60 outputs")],
)  # fmt: skip
def test_impossible_layers_are_refused(shape, bits, group_size, sentence):
    with pytest.raises(ValueError, match=sentence):
        PackedLinear(*shape, bits, group_size)


GPU_KERNEL = """
import torch
from medprune.quantizing import kernels, packed
from medprune.quantizing.packed import PackedLinear, kernel_agrees, rtn_codes

cpu, real = torch.device("cpu"), kernels.gemv
near = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
packed.gpu_kernel = lambda device, dtype: real
for group_size in (32, 64, 128):
    for rows, outs, dtype in (
        (1, 8, torch.float32), (2, 40, torch.float16), (5, 72, torch.bfloat16), (16, 16, torch.float32)
    ):
        torch.manual_seed(rows)
        codes = rtn_codes(torch.randn(outs, 11 * group_size), 4, group_size)  # 11 groups: the last 5 of 16 are masked
        layer, x = PackedLinear.from_codes(*codes, 4, torch.randn(outs)), torch.randn(rows, 11 * group_size).to(dtype)
        wanted = (x.float() @ layer.fake_quantized_weight().t() + layer.bias).to(dtype).float()
        found = layer(x[None])[0].float()
        error = float((found - wanted).abs().max() / wanted.abs().max())
        assert found.shape == wanted.shape and error < near[dtype], error
        assert layer.tables is None, "the stored form is read, and no other made"

seen = []
kernel = kernels._kernel
class Spy:
    def __getitem__(self, grid):
        return lambda *sizes: (seen.append(sizes[7]), kernel[grid](*sizes))
kernels._kernel = Spy()
for rows in range(1, 17):
    assert real(torch.randn(rows, 11 * 128), layer.qweight, layer.scale, layer.zero_point, 128).shape == (rows, 16)
assert set(seen) == {1, 2, 4, 8, 16}, "rows are padded, so that at most five kernels are compiled"
kernels._kernel = kernel

def refused(gemv, why):
    import warnings
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not kernel_agrees(gemv, cpu, torch.float16)
    assert why in str(said[0].message), said

def broken(*a):
    raise RuntimeError("out of resource")

assert kernel_agrees(real, cpu, torch.float16)
refused(lambda *a: real(*a) * 1.1, "off by 10%")
refused(lambda *a: real(*a) * float("nan"), "off by nan%")
refused(lambda x, *a: real(x, *a) * (1 if len(x) < 16 else 1.1), "off by")  # with many rows alone
refused(lambda x, codes, *a: real(x, codes, *a) * (1 if codes.shape[1] < 512 else 1.1), "off by")  # in turn 2
refused(broken, "cannot be compiled for cpu: out of resource")
print("equal")
"""


def test_the_gpu_kernel_gives_what_unpacking_gives_and_a_wrong_one_is_not_used():
    # Triton's interpreter runs the kernel on a CPU; it has to be asked for before Triton is imported.
    done = subprocess.run(
        [sys.executable, "-c", GPU_KERNEL], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "equal\n", done.stderr


def test_without_a_gpu_no_gpu_kernel_is_looked_for():
    assert packed.gpu_kernel(torch.device("cpu"), torch.float16) is None
