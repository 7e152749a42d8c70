"""Open pictures of any kind as RGB, say which cannot be used, and find the same picture twice."""

import os
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from medprune.data.record import Record
from medprune.store import content

MIN_SIDE = 16  # pixels
MAX_ASPECT = 16  # longer side over shorter side; the image processor would scale a sliver up to a huge input
NEAR = 6  # bits of 64
WHITES = (1, 3, 15, 63, 255, 1023, 4095, 16383, 65535)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale a deep picture to 8 bits a channel by what it holds: white is the least of WHITES above 99% of the values.

    So 12 bits in 16 are no black picture, nor is a float one of 0..1 with a few values above.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    colours = values[..., :3] if values.ndim == 3 else values
    held = np.quantile(colours, 0.99, method="lower")
    white = next((w for w in WHITES if held <= w), held)
    return Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))


def open_image(path: str | Path, max_side: int = 1024) -> Image.Image:
    """Open any picture as upright 8-bit RGB of at most max_side pixels a side.

    A JPEG is decoded at reduced size, so that a large one is cheap. Orientation tags are applied, transparency is laid
    on white, more than 8 bits are scaled. Raises ValueError naming the file where it cannot be decoded to its end, has
    a side under 16 pixels, or is over 16 times as long as wide.
    """
    try:
        # A 12,000-pixel picture makes Pillow warn; one of twice its safe size still raises.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            width, height = image.size
            is_deep = image.mode[0] in "FI" or ";16" in str(image.tile)  # of 16 bits in RGB, Pillow keeps the high 8
            image.draft("RGB", (max_side, max_side))
            upright = ImageOps.exif_transpose(image)
            if is_deep:
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


def find_duplicates(records: list[Record]) -> tuple[list[list[str]], list[list[str]]]:
    """Return (groups of keys of equal files, groups of keys of the same picture).

    The same picture: equal bytes, or 64-bit hashes of imagehash.phash that differ in at most NEAR bits, which
    re-encoding and scaling stay within, over any number of steps. Raises ValueError naming a file that cannot be read.
    """
    import imagehash
    from scipy.sparse.csgraph import connected_components
    from sklearn.neighbors import radius_neighbors_graph  # here, for an answer to one picture should not wait for it

    exact, near = defaultdict(list), defaultdict(list)
    for record in records:
        exact[content(record.path)].append(record)
    hashes = [imagehash.phash(open_image(group[0].path, 256)).hash.ravel() for group in exact.values()]
    alike = radius_neighbors_graph(hashes, NEAR / 64, metric="hamming")  # (files, files)
    for group, number in zip(exact.values(), connected_components(alike)[1], strict=True):
        near[number] += group
    return tuple([[r.key for r in g] for g in groups.values() if len(g) > 1] for groups in (exact, near))


def drop_copies(exact: list[list[str]], by_key: dict[str, Record]) -> dict[str, str]:
    """Return {key: reason} of equal files: all but one, the test's first, or all where their conditions differ."""
    dropped = {}
    for group in exact:
        first, *others = sorted(group, key=lambda key: (by_key[key].split != "test", key))
        labels = sorted({by_key[key].condition for key in group})
        if len(labels) > 1:
            dropped |= dict.fromkeys(group, f"same file under {' and '.join(labels)}")
        else:
            dropped |= dict.fromkeys(others, f"same file as {first}")
    return dropped


def printable(text) -> str:
    r"""Return a text that can be written as UTF-8: a name of other bytes shows them, as L\xe4sion.jpg."""
    return os.fsencode(str(text)).decode("utf-8", "backslashreplace")


def check_picture(path: str, decode: bool) -> str:
    """Return "kept", or why a picture cannot be used, as far as is checked."""
    if path != printable(path):
        return f"name is not UTF-8: {path}"
    if not os.path.isfile(path):  # a link to nothing, or a pipe
        return f"no such file: {path}"
    try:
        if decode:
            open_image(path, max_side=64)
    except ValueError as error:
        return f"unusable image: {error}"
    return "kept"
