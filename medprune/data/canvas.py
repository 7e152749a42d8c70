"""The canvas under `medprune.data.synthetic`: healthy skin, the marks that signs are made of, and the light.

A picture is a colour, a height and a gloss map at twice the wanted size; the render lights them with one lamp
(Phong's shading with the half vector of Blinn, SIGGRAPH 1977) and averages down. Lengths are in image widths,
so a picture is alike at every size.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import gaussian_filter

# sRGB of healthy skin from light to very dark, and how far along the way from light to dark lesion colours
_TONE_RGB = ((242, 212, 196), (231, 190, 166), (209, 163, 132), (174, 125, 94), (126, 85, 63), (84, 57, 45))
_TONE_DARK = (0.0, 0.08, 0.25, 0.5, 0.8, 1.0)


@dataclass(frozen=True)
class Skin:
    """One picture in the making: maps of shape (n, n) or (n, n, 3), float32, painted in place."""

    rng: np.random.Generator
    n: int
    dark: float  # 0 = lightest skin tone, 1 = darkest
    x: np.ndarray
    y: np.ndarray
    colour: np.ndarray  # sRGB, 0..255
    height: np.ndarray  # image widths
    gloss: np.ndarray  # 0..1

    def paint(self, mask, light, dark) -> None:
        """Blend in, by mask (n, n) in 0..1, a colour that looks `light` on light and `dark` on dark skin."""
        rgb = (1 - self.dark) * np.float32(light) + self.dark * np.float32(dark)
        self.colour[...] += mask[..., None] * (rgb - self.colour)

    def redden(self, mask) -> None:
        """Add erythema by mask: red on light skin, violaceous to dark brown on dark skin."""
        self.paint(mask, (206, 82, 76), (62, 24, 34))

    def noise(self, cells: float) -> np.ndarray:
        """Draw smooth noise (n, n) of about unit variance with `cells` grid cells to the image width."""
        grid = Image.fromarray(self.rng.standard_normal((int(cells) + 2,) * 2).astype(np.float32))
        box = (0, 0, cells, cells)
        return np.asarray(grid.resize((self.n, self.n), Image.Resampling.BICUBIC, box=box)) * 1.3

    def middle(self, spread: float = 0.1) -> list[float]:
        """Draw a point at most `spread` from the middle along each axis."""
        return self.rng.uniform(0.5 - spread, 0.5 + spread, 2).tolist()


def ramp(value, low, high):
    """Smoothstep from 0 at low to 1 at high."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def shape(s: Skin, centre, radius: float, stretch=1.3, irregular=0.2, rough=0.03) -> np.ndarray:
    """Return a lesion's field: 1 at its centre, 0 on its border, negative outside."""
    turn, axis = s.rng.uniform(0, math.pi), math.sqrt(s.rng.uniform(1, stretch))
    z = (s.x - centre[0] + 1j * (s.y - centre[1])) * np.complex64(np.exp(1j * turn))
    z = z.real / axis + 1j * z.imag * axis
    away = np.abs(z) + 1e-6
    unit, border = z / away, 1
    wave = unit
    for k in range(2, 7):
        wave = wave * unit
        swing = s.rng.normal() * irregular / k * np.exp(1j * s.rng.uniform(0, 2 * math.pi))
        border = border + (wave * np.complex64(swing)).real
    return 1 - away / (radius * np.maximum(border, 0.4)) + rough * s.noise(18)


def cells(s: Skin, count: float, jitter=0.4, warp=0.01) -> tuple[np.ndarray, np.ndarray]:
    """Cut the picture into about count x count polygons (Worley, SIGGRAPH 1996) at half resolution.

    Returns each pixel's distance from its polygon's edge (0 on it, about 0.5 inside) and a number in 0..1
    that all pixels of one polygon share, both (n, n).
    """
    k = math.ceil(count) + 4
    points = s.rng.uniform(0.5 - jitter, 0.5 + jitter, (k, k, 2)).astype(np.float32)
    tag = s.rng.random((k, k), dtype=np.float32)
    gx, gy = ((c + warp * s.noise(10))[::2, ::2] * count + 1.5 for c in (s.x, s.y))
    ix, iy = (np.clip(g.astype(np.int32), 1, k - 2) for g in (gx, gy))
    first = second = np.full_like(gx, 9)
    own = np.zeros_like(gx)
    for dy, dx in np.ndindex(3, 3):
        row, column = iy + (dy - 1), ix + (dx - 1)
        p = points[row, column]
        d = np.hypot(p[..., 0] + column.astype(np.float32) - gx, p[..., 1] + row.astype(np.float32) - gy)
        second = np.where(d < first, first, np.minimum(second, d))
        own = np.where(d < first, tag[row, column], own)
        first = np.minimum(first, d)
    edge = Image.fromarray(second - first).resize((s.n, s.n), Image.Resampling.BILINEAR)
    return np.asarray(edge), own.repeat(2, 0).repeat(2, 1)


def domes(s: Skin, points, radii) -> np.ndarray:
    """Return the union of round domes: 1 at each centre, falling to 0 at its radius."""
    out = np.zeros_like(s.x)
    for (px, py), r in zip(points.tolist(), radii.tolist(), strict=True):
        left, top, right, low = (max(0, math.ceil(c * s.n)) for c in (px - r, py - r, px + r, py + r))
        w = np.s_[top:low, left:right]
        np.maximum(out[w], 1 - ((s.x[w] - px) ** 2 + (s.y[w] - py) ** 2) / r**2, out=out[w])
    return out


def inside(s: Skin, field, count: int) -> np.ndarray:
    """Draw count points (count, 2) where field is positive, or anywhere if it never is."""
    at = np.flatnonzero(field > 0)
    at = s.rng.choice(at if len(at) else field.size, count)
    return np.stack([at % s.n, at // s.n], 1) / s.n


def strokes(s: Skin, starts, headings, lengths, width: float, wander=0.3, branch=0.0) -> np.ndarray:
    """Draw curving lines that taper, with side branches at rate `branch` a step; return their mask (n, n)."""
    sheet = Image.new("L", (s.n, s.n))
    pen = ImageDraw.Draw(sheet)
    todo = [(*p, heading, length, 1.0) for p, heading, length in zip(starts, headings, lengths, strict=True)]
    while todo:
        px, py, heading, length, thick = todo.pop()
        bend = s.rng.normal() * 0.045
        for done in np.linspace(0, 1, max(3, int(length / 0.02))):
            heading += bend + s.rng.normal() * wander
            qx, qy = px + 0.02 * math.cos(heading), py + 0.02 * math.sin(heading)
            w = max(1, round(width * s.n * thick * (1 - 0.6 * done)))
            pen.line([px * s.n, py * s.n, qx * s.n, qy * s.n], fill=255, width=w)
            px, py = qx, qy
            if s.rng.random() < branch and length > 0.06:
                todo.append((px, py, heading + s.rng.choice((-0.8, 0.8)), length * 0.6, thick * 0.75))
    return gaussian_filter(np.asarray(sheet, np.float32) / 255, s.n / 400)


def bare_skin(rng: np.random.Generator, n: int, tone: int) -> Skin:
    """Return a canvas (n, n) of healthy skin, tone 0 (light) to 5: relief, by chance freckles and pores."""
    y, x = np.mgrid[:n, :n].astype(np.float32) / n
    base = np.float32(_TONE_RGB[tone]) * np.float32(rng.normal(rng.uniform(0.94, 1.05), 0.015, 3))
    flat = np.zeros_like(x)
    s = Skin(rng, n, _TONE_DARK[tone], x, y, np.tile(base, (n, n, 1)), flat, flat + rng.uniform(0.02, 0.1))
    s.colour[..., 1:] *= (1 - 0.02 * s.noise(9))[..., None]
    furrows = ramp(cells(s, rng.uniform(24, 42))[0], 0, 0.35)
    s.height[...] = rng.uniform(0.5, 1.2) * (0.0015 * furrows + 0.0004 * s.noise(90))
    if rng.random() < 0.35:
        freckle = base * (0.7, 0.6, 0.52)
        s.paint(rng.uniform(0.3, 0.6) * ramp(s.noise(26), 1.1, 2.2), freckle, freckle)
    if rng.random() < 0.35:
        pores = ramp(s.noise(50), 1.2, 2.2)
        s.paint(0.25 * pores, base * 0.6, base * 0.6)
        s.height[...] -= 0.0015 * pores
    return s


def render(s: Skin, size: int) -> Image.Image:
    """Light the canvas, lay hairs over it by chance, and average its 2 * size pixels a side down to size."""
    r = s.rng
    turn, low = r.normal(-2.36, 0.5), r.uniform(0.6, 0.8)  # a lamp at the upper left, as in most photographs
    lamp = np.array([math.cos(turn) * low, math.sin(turn) * low, 1.0]) / math.hypot(low, 1)
    half = (lamp + (0, 0, 1)) / np.linalg.norm(lamp + (0, 0, 1))
    gy, gx = np.gradient(s.height * s.n)
    norm = 1 / np.sqrt(1 + gx**2 + gy**2)
    ways = ((lamp / lamp[2]).tolist(), half.tolist())
    facing, shine = (np.clip((z - gx * x - gy * y) * norm, 0, None) for x, y, z in ways)
    slope = (s.x - 0.5) * math.cos(turn) + (s.y - 0.5) * math.sin(turn)
    light = (0.45 + 0.55 * facing) * (1 + r.uniform(0, 0.25) * slope)
    light *= 1 + 0.03 * s.noise(5) + 0.025 * s.noise(16) + 0.025 * s.noise(60)
    picture = s.colour * light[..., None] + (220 * s.gloss * shine**60)[..., None]
    if r.random() < 0.35:
        count, way = r.integers(4, 16), r.uniform(0, 2 * math.pi)
        ways, lengths = way + r.normal(size=count) * 0.35, r.uniform(0.15, 0.5, count)
        hair = strokes(s, r.uniform(-0.1, 1.1, (count, 2)), ways, lengths, 0.007, 0.03)
        rgb = np.float32((60, 42, 32) if r.random() < 0.5 + s.dark else (150, 112, 76)) * (1 - 0.6 * s.dark)
        picture += 0.8 * hair[..., None] * (rgb - picture)
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).reduce(2)
    image = image.filter(ImageFilter.GaussianBlur(r.uniform(0.0, 0.6) * size / 112))
    grain = r.standard_normal((size, size, 3), np.float32) * r.uniform(0.5, 3.0)
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
