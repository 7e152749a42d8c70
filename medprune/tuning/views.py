"""How pretrained eyes are shown a photograph: its centre when they are asked, random views while they are tuned."""

from functools import cache, partial

import torch
from torch.nn import functional as F

from medprune.data.pictures import open_image
from medprune.models.eyes import Eyes
from medprune.models.families import parts

MOST_ITEMS = 2**24  # of a training, whose views no other seed's repeat


def wide_pixels(processor, path) -> torch.Tensor:
    """Return a picture's pixels (3, edge, edge) with the margin that the centre crop cuts off.

    (x - 127) / 128 of 8 bits is exact in bfloat16.
    """
    edge = processor.image_processor.size["shortest_edge"]
    shown = processor.image_processor(open_image(path), crop_size={"height": edge, "width": edge}, return_tensors="pt")
    return shown["pixel_values"][0].to(torch.bfloat16)


def centre(pixels: torch.Tensor, processor) -> torch.Tensor:
    """Return the centre crop (n, 3, side, side) of `wide_pixels`, which the tower is asked about."""
    side = processor.image_processor.crop_size["height"]
    first = (pixels.shape[-1] - side) // 2
    return pixels[..., first : first + side, first : first + side]


def autocast(dtype):
    """Compute in bfloat16 where the model does: forwards, the tower takes half of float32's time."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


@torch.inference_mode()
def seen(tower, pixels: torch.Tensor, batch: int = 32) -> torch.Tensor:
    """Return the tower's mean token (n, hidden_size), float32, of pixels (n, 3, side, side)."""
    with autocast(torch.bfloat16):
        found = [tower(pixel_values=some.float()).pooler_output.float() for some in pixels.split(batch)]
    return torch.cat(found)


def augmented(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Return random views (n, 3, side, side) of wide pixels in -1 to 1.

    Turned by any angle, mirrored, half to all of the area, stretched by up to 15%; in other contrast, brightness,
    saturation and tint. What lies outside is the picture mirrored at its edge.
    """
    n = len(pixels)

    def draw(*shape) -> torch.Tensor:
        return torch.rand(n, *shape) * 2 - 1

    angle, mirror = draw() * torch.pi, draw().sign()
    scale, stretch = (0.75 + 0.25 * draw()).sqrt(), (0.15 * draw()).exp()
    wide, high = 0.95 * scale * stretch, 0.95 * scale / stretch
    right = torch.stack([mirror * wide * angle.cos(), -high * angle.sin(), draw() * (1 - wide).clamp(min=0)], -1)
    down = torch.stack([mirror * wide * angle.sin(), high * angle.cos(), draw() * (1 - high).clamp(min=0)], -1)
    places = F.affine_grid(torch.stack([right, down], 1), [n, 3, side, side], align_corners=False)  # (n, 2, 3) to grid
    x = F.grid_sample(pixels, places, padding_mode="reflection", align_corners=False)
    mean = x.mean((2, 3), keepdim=True)
    x = (x - mean) * (1 + 0.24 * draw(1, 1, 1)) + mean + 0.2 * (mean + 1) * draw(1, 1, 1)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (1 + 0.3 * draw(1, 1, 1))
    return ((x + 1) * (1 + 0.06 * draw(3, 1, 1)) - 1).clamp(-1, 1)


def viewer(model, processor, seed: int, dtype, keep: bool):
    """Return what shows a model with pretrained eyes item `number`'s picture, as (number, path) -> pixels, or None.

    The eyes know their training pictures by heart, and what is tuned on these as they are learns to trust them more
    than it may trust those of other patients: so each item has a random view, the same whenever training is resumed.
    Other towers are shown pictures as they are. dtype: of the pixels. keep: whether pictures stay in memory.
    """
    if not isinstance(parts(model).vision_tower, Eyes):
        return None
    side = processor.image_processor.crop_size["height"]
    wide = cache(partial(wide_pixels, processor)) if keep else partial(wide_pixels, processor)

    def view(number: int, path) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * MOST_ITEMS + number)
            return augmented(wide(path)[None].float(), side)[0].to(dtype)

    return view


def mixed(x: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay another image over each, and its truth over the truth: mixup, its share drawn from Beta(0.3, 0.3)."""
    share, other = float(torch.distributions.Beta(0.3, 0.3).sample()), torch.randperm(len(x))
    return share * x + (1 - share) * x[other], share * truth + (1 - share) * truth[other]
