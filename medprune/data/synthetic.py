"""Draw procedural skin images of the eight conditions, for machines that hold no photographs.

The images are synthetic: textbook signs of each condition on six skin tones, so that the series runs
anywhere. They are no clinical material, and a score on them says nothing about patients. Each condition
paints its signs on the colour, height and gloss maps of `medprune.data.canvas`.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin
from scipy.ndimage import gaussian_filter

from medprune.data.canvas import Skin, bare_skin, cells, domes, inside, ramp, render, shape, strokes
from medprune.data.record import Record

SPLITS = ("train", "test", "calibration")
SKIN_TONES = ("I", "II", "III", "IV", "V", "VI")


def _vessels(s: Skin, field, count: int, branch: float) -> None:
    """Paint telangiectasia where field is positive."""
    turn, length = s.rng.uniform(0, 2 * math.pi, count), s.rng.uniform(0.1, 0.22, count)
    lines = strokes(s, inside(s, field - 0.1, count), turn, length, 0.01, 0.3, branch)
    s.paint(0.75 * lines * ramp(field, 0, 0.1), (168, 32, 42), (108, 18, 34))


def _rosacea(s: Skin) -> None:
    """Paint a butterfly band of erythema with vessels, papules and a few pustules."""
    r = s.rng
    (cx, cy), tilt, apart = s.middle(0.13), r.normal() * 0.2, r.uniform(0.22, 0.3)
    u, v = s.x - cx + tilt * (s.y - cy), s.y - cy - tilt * (s.x - cx)
    nose = np.exp(-((u / 0.1) ** 2)) * ramp(v, -0.5, 0.1) * ramp(-v, -0.34, -0.16)
    cheeks = np.exp(-(((np.abs(u) - apart) / 0.22) ** 2) - ((v - 0.04) / 0.26) ** 2)
    band = np.clip(cheeks + 0.75 * nose + 0.12 * s.noise(6), 0, 1)
    s.height[...] += 0.04 * nose + 0.03 * cheeks
    s.gloss[...] += 0.12 * band
    s.redden(r.uniform(0.5, 0.72) * ramp(band, 0.0, 0.9) * (1 + 0.12 * s.noise(14)))
    _vessels(s, band - 0.35, r.integers(7, 14), 0.1)
    count, pus = r.integers(10, 22), r.integers(2, 7)
    points, radii = inside(s, band - 0.4, count), r.uniform(0.016, 0.036, count)
    dome = domes(s, points, radii)
    s.redden(0.5 * ramp(domes(s, points, radii * 1.8), 0, 0.9))
    s.paint(0.45 * ramp(dome, 0, 0.8), (180, 48, 52), (80, 24, 36))
    s.paint(0.8 * ramp(domes(s, points[:pus], radii[:pus] * 0.75), 0, 0.8), (244, 226, 178), (214, 190, 140))
    s.height[...] += 0.008 * ramp(dome, 0, 1.2)
    s.gloss[...] += 0.2 * ramp(dome, 0.1, 0.6)


def _actinic_keratosis(s: Skin) -> None:
    """Paint several gritty yellowish-pink patches on mottled, sun-damaged skin."""
    r, grit, coarse = s.rng, s.noise(80), s.noise(30)
    s.paint(0.35 * ramp(s.noise(7), 0.2, 1.6), (196, 140, 96), (60, 36, 26))
    s.paint(0.55 * ramp(s.noise(24), 0.9, 2.0), (158, 106, 70), (42, 26, 20))
    s.paint(0.35 * ramp(s.noise(8), 0.8, 1.8), (246, 222, 204), (120, 84, 66))
    spots = [(0.25, 0.27), (0.72, 0.3), (0.3, 0.74), (0.74, 0.72), (0.5, 0.5)]
    for spot in r.permutation(spots)[: r.integers(3, 6)]:
        field = shape(s, (spot + r.normal(size=2) * 0.06).tolist(), r.uniform(0.13, 0.19), 1.8, 0.3, 0.08)
        rough = ramp(field + 0.14 * coarse, -0.05, 0.7)
        s.redden(0.5 * ramp(field, -0.3, 0.5))
        s.paint(0.75 * rough * ramp(0.7 * coarse + grit, -1.6, 1.2), (236, 212, 164), (136, 112, 88))
        s.paint(0.5 * rough * ramp(grit + 0.4 * coarse, 0.6, 1.8), (176, 128, 82), (70, 50, 38))
        s.height[...] += rough * (0.003 + 0.001 * grit + 0.001 * coarse)


def _basal_cell_carcinoma(s: Skin) -> None:
    """Paint one pearly nodule with a rolled edge, arborising vessels and sometimes a crusted ulcer."""
    r, ulcer = s.rng, s.rng.random() < 0.5
    field = shape(s, s.middle(), r.uniform(0.24, 0.33), 1.4, 0.1, 0.015)
    body = ramp(field, -0.08, 0.16)
    s.redden(0.3 * ramp(field, -0.5, 0.1))
    s.paint(0.55 * body, (236, 172, 162), (136, 92, 84))
    s.paint(0.5 * body * ramp(s.noise(7), -0.3, 1.6), (250, 222, 214), (172, 136, 126))
    s.redden(0.25 * body * ramp(s.noise(9), 0, 1.6))
    s.paint((0.1 + 0.35 * s.dark) * body * ramp(s.noise(12), 0.8, 1.7), (112, 98, 108), (50, 38, 42))
    s.height[...] *= 1 - 0.8 * body  # stretched smooth
    rolled = (0.018 if ulcer else 0.009) * np.exp(-(((field - 0.24) / 0.17) ** 2))
    s.height[...] += (rolled + (0.025 if ulcer else 0.07) * (2 - field) * field + 0.003 * s.noise(8)) * body
    s.gloss[...] += 0.55 * body
    _vessels(s, field, r.integers(5, 9), 0.22)
    if ulcer:
        hole = ramp(field + 0.1 * s.noise(12), 0.42, 0.66)
        s.paint(0.85 * hole, (128, 44, 38), (54, 22, 22))
        s.paint(0.7 * hole * ramp(s.noise(18), 0.0, 1.2), (70, 34, 24), (30, 16, 14))
        s.paint(0.5 * hole * ramp(s.noise(20), 0.6, 1.6), (196, 148, 92), (130, 96, 62))
        s.height[...] += hole * (-0.012 + 0.003 * s.noise(24))
        s.gloss[...] *= 1 - 0.7 * hole


def _dermatitis(s: Skin) -> None:
    """Paint ill-defined red, dry patches with vesicles, scratch lines and weeping crust."""
    r = s.rng
    field = shape(s, s.middle(0.12), r.uniform(0.4, 0.52), 1.8, 0.3, 0.1) + 0.22 * s.noise(6)
    red = ramp(field, -0.2, 0.7)
    s.redden(r.uniform(0.5, 0.65) * red)
    s.redden(0.35 * red * ramp(s.noise(26), 0.0, 1.5))
    s.paint(0.55 * red * ramp(s.noise(64) + 0.6 * s.noise(12), 0.6, 1.7), (246, 224, 212), (146, 128, 120))
    weep = ramp(field - 0.55 + 0.3 * s.noise(12), 0.1, 0.8)
    s.paint(0.6 * weep, (214, 164, 92), (136, 94, 52))
    count, heading = r.integers(30, 55), r.uniform(0, math.pi)
    blister = domes(s, inside(s, field - 0.25, count), r.uniform(0.01, 0.018, count))
    s.paint(0.5 * ramp(blister, 0, 0.6), (242, 182, 160), (124, 84, 74))
    s.height[...] += 0.006 * ramp(blister, 0, 1) + 0.0008 * red * s.noise(45)
    s.height[...] += weep * (0.003 + 0.001 * s.noise(40))
    s.gloss[...] += 0.5 * ramp(blister, 0.1, 0.6) + 0.25 * weep
    count = r.integers(6, 11)
    turns = heading + r.normal(size=count) * 0.22
    scratch = strokes(s, inside(s, field - 0.2, count), turns, r.uniform(0.15, 0.32, count), 0.018, 0.05)
    s.redden(0.35 * ramp(gaussian_filter(scratch, s.n * 0.012), 0, 0.5))
    s.paint(0.75 * scratch * ramp(s.noise(40), -1.5, 0.4), (132, 34, 34), (38, 12, 14))


def _melanoma(s: Skin) -> None:
    """Paint one asymmetric, notched lesion of several colours."""
    r, centre = s.rng, s.middle(0.08)
    radius, turn = r.uniform(0.22, 0.3), r.uniform(0, 2 * math.pi)
    bud = [c + radius * 0.75 * f(turn) for c, f in zip(centre, (math.cos, math.sin), strict=True)]
    field = shape(s, centre, radius, 1.7, 0.45, 0.07)
    field = np.maximum(field, 0.6 * shape(s, bud, radius * 0.6, 1.6, 0.45, 0.1))
    body = ramp(field + 0.03 * s.noise(45), -0.06, 0.18)
    s.redden(0.2 * ramp(field, -0.35, 0.0))
    s.paint(0.85 * body, (134, 88, 62), (46, 28, 22))
    s.paint(0.5 * body * ramp(s.noise(7), -0.4, 1.4), (74, 46, 35), (22, 14, 13))
    s.paint(0.45 * body * ramp(np.abs(s.noise(28)), 0.6, 0.0), (70, 44, 33), (20, 13, 12))
    zones = (
        ((32, 24, 24), (12, 9, 10), 1.0),  # black
        ((27, 21, 24), (11, 9, 11), 0.8),
        ((100, 102, 110), (70, 73, 81), 0.55),  # blue-grey veil
        ((150, 80, 70), (86, 42, 40), 0.6),  # red
        ((212, 186, 174), (124, 104, 96), 0.5),  # white, regressed
    )
    for light, dark, reach in zones:
        px, py = inside(s, field - 0.05, 1)[0].tolist()
        zone = 1 - np.hypot(s.x - px, s.y - py) / (radius * reach * r.uniform(0.8, 1.2)) + 0.3 * s.noise(10)
        s.paint(0.8 * body * ramp(zone, 0.0, 0.9), light, dark)
    s.height[...] += body * (0.006 + 0.02 * ramp(1 - np.hypot(s.x - bud[0], s.y - bud[1]) / radius, 0, 1))
    s.gloss[...] += 0.15 * body


def _psoriasis(s: Skin) -> None:
    """Paint well-demarcated thick red plaques under flakes of silvery scale."""
    r, (cx, cy) = s.rng, s.middle()
    field = shape(s, (cx, cy), r.uniform(0.29, 0.38), 1.5, 0.2, 0.04)
    for turn in r.uniform(0, 2 * math.pi, r.integers(0, 3)).tolist():
        place, radius = (cx + 0.5 * math.cos(turn), cy + 0.5 * math.sin(turn)), r.uniform(0.08, 0.15)
        field = np.maximum(field, shape(s, place, radius, 1.4, 0.2, 0.06) * radius / 0.3)
    plaque = ramp(field, -0.02, 0.06)
    s.paint(0.8 * plaque, (198, 84, 78), (80, 40, 46))
    s.paint(0.4 * plaque * ramp(s.noise(12), 0, 1.6), (156, 50, 52), (48, 22, 29))
    edge, own = cells(s, r.uniform(15, 24), warp=0.02)
    cover = ramp(field + 0.08 * s.noise(12), 0.06, 0.3) * ramp(s.noise(7) + 0.8 * s.noise(20), -1.6, 0.3)
    flake = plaque * cover * (0.35 + 0.65 * ramp(edge, 0.0, 0.2) * ramp(own, 0.1, 0.6))
    s.paint(0.9 * flake, (240, 234, 230), (184, 174, 173))
    s.paint(0.3 * flake * ramp(s.noise(60), 0.0, 1.6), (206, 192, 188), (136, 124, 125))
    s.height[...] += plaque * (0.01 + cover * (0.002 + 0.005 * own * ramp(edge, 0, 0.3)))
    s.height[...] += 0.0008 * flake * s.noise(70)
    s.gloss[...] += 0.2 * flake


def _lichen_planus(s: Skin) -> None:
    """Paint a cluster or a line of violaceous, flat-topped, polygonal papules with white striae."""
    r, turn = s.rng, s.rng.uniform(0, math.pi)
    field = shape(s, s.middle(0.08), r.uniform(0.34, 0.44))
    if r.random() < 0.35:  # along a scratch, as Koebner described
        across = (s.x - 0.5) * math.sin(turn) - (s.y - 0.5) * math.cos(turn) + 0.03 * s.noise(4)
        field = 0.6 - np.abs(across) / r.uniform(0.15, 0.22)
    edge, own = cells(s, r.uniform(7, 10), 0.33, 0.02)
    gap = 0.08 + 0.14 * (own * 37 % 1)
    top = ramp(0.45 + 0.9 * field - own, 0, 0.04) * ramp(field, -0.35, -0.2) * ramp(edge - gap, 0, 0.1)
    bevel = gaussian_filter(top, s.n * 0.011)
    top = ramp(bevel, 0.3, 0.7)
    s.redden(0.3 * ramp(gaussian_filter(top, s.n * 0.02), 0, 0.9))
    s.paint(0.78 * top, (150, 84, 118), (62, 34, 52))
    s.paint((0.5 * top) * ramp(s.noise(12) + own - 0.5, -0.2, 1.6), (118, 58, 98), (42, 24, 38))
    striae = ramp(np.abs(s.noise(20)), 0.26, 0.04) * ramp(bevel, 0.6, 0.95)
    s.paint(0.6 * striae, (236, 216, 230), (152, 128, 144))
    s.height[...] = s.height * (1 - 0.6 * top) + 0.013 * ramp(bevel, 0.1, 0.8)
    s.gloss[...] += 0.6 * top


def _seborrheic_keratosis(s: Skin) -> None:
    """Paint one stuck-on waxy plaque with fissures, horn cysts and comedo-like openings."""
    r, step = s.rng, round(0.02 * s.n)
    field = shape(s, s.middle(0.08), r.uniform(0.27, 0.37), 1.6, 0.1, 0.03)
    body, deep = ramp(field, -0.02, 0.06), r.uniform(0, 1)
    drop = gaussian_filter(np.roll(body, (step, step), (0, 1)), s.n * 0.015)
    s.colour[...] *= 1 - 0.35 * drop[..., None]
    wax = (1 - deep) * np.array((190, 132, 92)) + deep * np.array((114, 72, 50))
    s.paint(0.9 * body, wax, wax * 0.46)
    s.paint(0.5 * body * ramp(s.noise(9), -0.4, 1.6), wax * 0.76, wax * 0.33)
    folds, warts = np.abs(s.noise(14) + 0.3 * s.noise(34)), s.noise(34)
    s.paint(0.6 * body * ramp(folds, 0.32, 0.0), wax * 0.42, wax * 0.16)
    s.paint(0.3 * body * ramp(warts, 0.3, 1.6), wax * 1.2, wax * 0.6)
    s.height[...] += body * (0.01 + 0.006 * ramp(folds, 0, 0.8) + 0.03 * (2 - field) * field + 0.001 * warts)
    s.gloss[...] += 0.25 * body
    for count, rgb in ((r.integers(7, 14), (238, 220, 178)), (r.integers(6, 12), (36, 23, 17))):
        dots = domes(s, inside(s, field - 0.12, count), r.uniform(0.013, 0.025, count))
        s.paint(0.8 * ramp(dots, 0, 0.7), rgb, np.float32(rgb) * 0.85)


_PAINTERS = {
    "rosacea": _rosacea,
    "actinic keratosis": _actinic_keratosis,
    "basal cell carcinoma": _basal_cell_carcinoma,
    "dermatitis": _dermatitis,
    "melanoma": _melanoma,
    "psoriasis": _psoriasis,
    "lichen planus": _lichen_planus,
    "seborrheic keratosis": _seborrheic_keratosis,
}
CONDITIONS: tuple[str, ...] = tuple(_PAINTERS)


def draw(condition: str, seed: int, size: int = 112) -> tuple[Image.Image, str]:
    """Draw one synthetic image, the same for the same condition, seed and size; signs need 32 pixels to be seen.

    Consecutive seeds go through the six skin tones in turn, each condition from the next tone on, so that in whole
    turns the tone tells nothing about the condition, and three pictures of each show every tone. Returns the RGB
    image (size x size pixels) and its tone, "I" (light) to "VI" (very dark).
    """
    number = CONDITIONS.index(condition)
    tone = (seed + number) % len(SKIN_TONES)
    skin = bare_skin(np.random.default_rng([number, seed]), 2 * size, tone)
    _PAINTERS[condition](skin)
    return render(skin, size), SKIN_TONES[tone]


def write_images(folder: Path, n_per_condition: int, size: int, seed: int, split: str) -> list[Record]:
    """Write synthetic images as folder/<condition>/<split>-<nnnn>.png, each saying what it is; return their records.

    Images are drawn from the seeds 10**6 * (split's index in SPLITS + 3 * seed) + number, so two splits, or two seeds,
    share no image.
    """
    first, records = 10**6 * (SPLITS.index(split) + len(SPLITS) * seed), []
    for condition in CONDITIONS:
        home = folder / condition.replace(" ", "_")
        home.mkdir(parents=True, exist_ok=True)
        for number in range(n_per_condition):
            image, tone = draw(condition, first + number, size)
            said, path = PngImagePlugin.PngInfo(), home / f"{split}-{number:04d}.png"
            said.add_text("Comment", f"synthetic {condition}, seed {first + number}")
            image.save(path, pnginfo=said)
            records.append(Record(f"{split}/{home.name}/{path.name}", str(path), condition, split, skin_tone=tone))
    return records
