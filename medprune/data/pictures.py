"""Open pictures of any kind as RGB, and find the same picture twice."""

import hashlib
import warnings
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image, ImageOps

from medprune.data.record import Record

MIN_SIDE = 16  # pixels


MAX_ASPECT = 16  # longer side over shorter side; the image processor would scale a sliver up to a huge input


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale a 16-bit, 32-bit or float picture to 8-bit grey, by the least white of 1, 255, 65535 it fits."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    whites = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535)
    white = next((w for w in whites if values.max() <= w), values.max())
    return Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))


def open_image(path: str | Path, max_side: int = 1024) -> Image.Image:
    """Open any picture as upright 8-bit RGB of at most max_side pixels a side.

    A JPEG is decoded at reduced size, so that a large one is cheap. Orientation tags are applied,
    transparency is laid on white, 16-bit is scaled. Raises ValueError naming the file where it cannot be
    decoded to its end, has a side under 16 pixels, or is over 16 times as long as wide.
    """
    try:
        # A 12,000-pixel picture makes Pillow warn; one of twice its safe size still raises.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            width, height = image.size
            image.draft("RGB", (max_side, max_side))
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "F" or upright.mode.startswith("I"):
                upright = _to_8_bit(upright)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            upright = upright.convert("RGB")
            upright.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    except Exception as error:  # on broken files Pillow raises many kinds, from OSError to struct.error
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        need = f"at least {MIN_SIDE} a side and at most {MAX_ASPECT} times as long as wide are needed"
        raise ValueError(f"{path} is {width} x {height} pixels: {need}.")
    return upright


def merge_groups(groups: list[list[str]]) -> list[list[str]]:
    """Join groups that share a key, over any number of steps; each key then stands in one group."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for group in groups:
        for key in group:
            parent[root(key)] = root(group[0])
    merged: dict[str, list[str]] = {}
    for key in sorted(parent):
        merged.setdefault(root(key), []).append(key)
    return list(merged.values())


def find_duplicates(records: "list[Record]", near: bool = True, threshold: int = 6) -> list[list[str]]:
    """Return groups of keys of the same picture: equal bytes and, with `near`, a like perceptual hash.

    Near means that the 64-bit hashes of imagehash.phash differ in at most `threshold` bits, which re-encoding
    and scaling stay within. Raises ValueError for a threshold outside 0..16, or naming a file that cannot be
    read.
    """
    if not 0 <= threshold <= 16:
        raise ValueError(f"threshold is {threshold}; it must be 0..16 of 64 bits, or all are alike.")
    same: dict[str, list[Record]] = {}
    for record in records:
        same.setdefault(hashlib.sha256(Path(record.path).read_bytes()).hexdigest(), []).append(record)
    groups = [[r.key for r in group] for group in same.values()]
    if near:
        bits = [imagehash.phash(open_image(group[0].path, 256)).hash for group in same.values()]
        bits = np.array(bits, dtype=bool).reshape(-1, 64)  # (files, bits)
        hashes = np.packbits(bits, axis=1).view(np.uint64).ravel()  # (files,)
        for i, value in enumerate(hashes):
            for j in np.flatnonzero(np.bitwise_count(hashes[i + 1 :] ^ value) <= threshold):
                groups.append([groups[i][0], groups[i + 1 + j][0]])
    return [group for group in merge_groups(groups) if len(group) > 1]
