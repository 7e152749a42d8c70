"""Tests for medprune.data.synthetic: seeds, skin tones, files, and signs that can be told apart."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from medprune.data import synthetic
from medprune.data.canvas import bare_skin
from medprune.data.synthetic import CONDITIONS, SKIN_TONES, SPLITS, draw, write_images


def pixels(condition, seed, size=64):
    return np.asarray(draw(condition, seed, size)[0], np.float64)


def blank_skin(monkeypatch):
    """Take every condition's signs away, so that only its healthy skin is drawn."""
    monkeypatch.setattr(synthetic, "_PAINTERS", dict.fromkeys(CONDITIONS, lambda skin: None))


def features(image):
    """Return colour quantiles and edge energies of an image (size, size, 3)."""
    chroma = image / image.sum(-1, keepdims=True)  # takes most of the skin tone's brightness out
    grey = image.mean(-1) / image.mean()
    edges = [np.abs(np.diff(grey[::step, ::step], axis=axis)) for step in (1, 2, 4) for axis in (0, 1)]
    channels = (*np.moveaxis(chroma, -1, 0), grey)
    spread = [np.quantile(channel, (0.02, 0.1, 0.5, 0.9, 0.98)) for channel in channels]
    return np.concatenate([*spread, [np.log(e.mean()) for e in edges], [np.log(e.std()) for e in edges]])


def nearest_centroid_accuracy(per_condition=12):
    """Fit class centroids on one half of the seeds and name the other half, in whitened feature space."""
    x = np.array([[features(pixels(c, s)) for s in range(2 * per_condition)] for c in CONDITIONS])
    fit, held_out = x[:, :per_condition], x[:, per_condition:]
    centroids = fit.mean(1)
    within = (fit - centroids[:, None]).reshape(-1, x.shape[-1])
    scale = within.std(0)
    values, axes = np.linalg.eigh(np.cov((within / scale).T) + 0.1 * np.eye(len(scale)))
    whiten = (axes / np.sqrt(values)) / scale[:, None]
    away = np.linalg.norm((held_out[:, :, None] - centroids) @ whiten, axis=-1)  # (true, image, candidate)
    return (away.argmin(-1) == np.arange(len(CONDITIONS))[:, None]).mean()


@pytest.mark.parametrize("condition", CONDITIONS)
def test_draw_repeats_itself_and_seeds_differ(condition):
    assert np.array_equal(pixels(condition, 3), pixels(condition, 3))
    # 9 has the tone of 3, so the skin alone would not tell the two apart by much
    assert np.abs(pixels(condition, 3) - pixels(condition, 9)).mean() > 3


def test_conditions_have_streams_of_their_own(monkeypatch):
    blank_skin(monkeypatch)
    skins = [pixels(c, 5) for c in CONDITIONS]
    assert min(np.abs(a - b).mean() for i, a in enumerate(skins) for b in skins[:i]) > 0.5


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_tone_is_drawn_and_shows_the_signs(condition):
    for seed, tone in enumerate(SKIN_TONES):
        image, label = draw(condition, (seed - CONDITIONS.index(condition)) % 6, 48)
        assert (label, image.mode, image.size) == (tone, "RGB", (48, 48))
        skin = bare_skin(np.random.default_rng(seed), 128, seed)
        healthy = skin.colour.copy()
        synthetic._PAINTERS[condition](skin)
        changed = np.abs(skin.colour - healthy).mean(-1) > 12
        assert 0.05 < changed.mean() < 0.9, f"{condition} is lost on tone {tone}, or leaves no skin"


def test_tone_darkens_the_picture():
    luminance = [
        np.mean(
            [pixels(c, 12 + tone - i + k) @ (0.299, 0.587, 0.114) for i, c in enumerate(CONDITIONS) for k in (0, 6)]
        )
        for tone in range(6)
    ]
    assert (np.diff(luminance) < -5).all()
    assert luminance[0] > 2.5 * luminance[5]


def test_signs_tell_the_conditions_apart():
    accuracy = nearest_centroid_accuracy()
    assert accuracy > 0.9, accuracy  # chance is 0.125


def test_without_signs_nothing_tells_the_conditions_apart(monkeypatch):
    blank_skin(monkeypatch)
    assert nearest_centroid_accuracy() < 0.3


def test_write_images_lays_out_files_and_records(tmp_path):
    records = write_images(tmp_path, 6, 32, 0, "test")
    assert len(records) == 6 * len(CONDITIONS) and {r.split for r in records} == {"test"}
    for condition in CONDITIONS:
        mine = [r for r in records if r.condition == condition]
        assert {r.skin_tone for r in mine} == set(SKIN_TONES)
        home = condition.replace(" ", "_")
        assert [r.path for r in mine] == [str(tmp_path / home / f"test-{i:04d}.png") for i in range(6)]
        assert [r.key for r in mine] == [f"test/{home}/test-{i:04d}.png" for i in range(6)]
    assert sorted(str(p) for p in tmp_path.rglob("*.*")) == sorted(r.path for r in records)
    with Image.open(records[8].path) as image:
        seed = int(image.info["Comment"].split("seed ")[1])
        again, tone = draw(records[8].condition, seed, 32)
        assert image.info["Comment"].startswith("synthetic") and tone == records[8].skin_tone
        assert np.array_equal(np.asarray(image), np.asarray(again))


@pytest.mark.parametrize("split", SPLITS)
def test_three_pictures_of_each_condition_show_every_tone(tmp_path, monkeypatch, split):
    monkeypatch.setattr(synthetic, "_PAINTERS", dict.fromkeys(CONDITIONS, lambda skin: None))
    records = write_images(tmp_path, 3, 32, 0, split)
    assert all(3 <= Counter(r.skin_tone for r in records)[tone] <= 5 for tone in SKIN_TONES)


def test_splits_and_seeds_share_no_image(tmp_path, monkeypatch):
    used, picture = [], draw("melanoma", 0, 32)
    monkeypatch.setattr(synthetic, "draw", lambda c, seed, size: used.append((c, seed)) or picture)
    monkeypatch.setattr(synthetic, "CONDITIONS", ("melanoma",))
    for seed in (0, 1, 2):
        for split in SPLITS:
            write_images(tmp_path / f"{seed}", 5, 32, seed, split)
    assert len(used) == len(set(used)) == 3 * len(SPLITS) * 5
    # the seed blocks are a million apart
    assert np.diff(np.unique([seed // 1_000_000 for _, seed in used])).tolist() == [1] * 8
