"""The vision tower of an assembled base: trained, with its projector, before the language model sees an image."""

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from medprune.answers.prompts import image_pixels
from medprune.models.assembled import prepare_base
from medprune.models.families import parts
from medprune.models.loading import load, save
from medprune.progress import progress
from medprune.store import Run, content, context, made, write_folder


def align_vision(model, processor, records, conditions, steps: int, seed: int = 0, batch: int = 32) -> list[dict]:
    """Train an assembled base's vision tower and projector, which start at random; return loss and accuracy.

    A contrastive loss as in CLIP (Radford et al. 2021), but in the language model's own embedding space: the mean
    projected patch of an image is drawn to the mean embedding of its condition's name, away from the other names,
    and every patch to its size (squared error, weight 0.3). What the language model then finds in place of the
    image reads like words it knows. AdamW, one-cycle rate of 6e-4, mirrored and rotated images.
    """
    inner, names, dtype = parts(model), sorted(conditions), model.dtype
    tower, projector = inner.vision_tower.float().train(), inner.projector.float().train()
    labels = torch.tensor([names.index(r.condition) for r in records])
    pixels = torch.stack([image_pixels(processor, r.path, torch.float32) for r in records])
    words = inner.text_model.embed_tokens.weight.detach().float()
    tokens = [processor.tokenizer(f" {name}")["input_ids"] for name in names]
    targets = torch.stack([words[ids].mean(0) for ids in tokens])  # (names, width)
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW([*tower.parameters(), *projector.parameters()], lr=6e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-4, total_steps=steps, pct_start=0.15)
    curve = []
    with progress(steps, "vision tower and projector", "step") as bar:
        for step in range(steps):
            chosen = torch.from_numpy(draw.choice(len(records), min(batch, len(records)), replace=False))
            x = pixels[chosen].flip(-1) if step % 2 else pixels[chosen]
            x = torch.rot90(x, int(draw.integers(4)), (-2, -1))
            patches = projector(tower(pixel_values=x).last_hidden_state[:, 1:])  # (batch, patches, width)
            loss, accuracy = _contrast(patches, labels[chosen], targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            curve.append({"step": step + 1, "loss": loss.item(), "accuracy": accuracy.item()})
            bar.update()
    tower.to(dtype).eval()
    projector.to(dtype).eval()
    return curve


def _contrast(patches: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss, accuracy) of patches (batch, patches, width), labels (batch,) and targets (names, width)."""
    centre, size = targets.mean(0), targets.square().mean().sqrt()
    logits = 10 * F.cosine_similarity((patches.mean(1) - centre)[:, None], (targets - centre)[None], dim=-1)
    distance = ((patches - targets[labels][:, None]) / size).square().mean()
    loss = F.cross_entropy(logits, labels, label_smoothing=0.05) + 0.3 * distance
    return loss, (logits.argmax(-1) == labels).float().mean()


def prepare_tuned_tower(config, run: Run, records, conditions: dict) -> str:
    """Return the base model's folder; an assembled base gets its vision tower trained first, once per run.

    What was trained is kept in tower/; base/, which holds the language model once more, can be made again from it.
    """
    base = prepare_base(config.base)
    if not config.vision_steps or base == config.base:
        return base
    seen = [(content(r.path), r.condition) for r in records]
    how = (config.vision_steps, config.seed, config.image_size, sorted(conditions))
    folder, trained, mark = run.dir / "base", run.dir / "tower", context(__name__, content(base), seen, *how)
    if not made(folder, mark):
        model, processor = load(base, "cpu")
        pieces = torch.nn.ModuleDict({"vision": parts(model).vision_tower, "projector": parts(model).projector})
        if not made(trained, mark):
            curve = align_vision(model, processor, records, conditions, config.vision_steps, config.seed)
            with write_folder(trained, context=mark, curve=curve) as temporary:
                save_file(pieces.state_dict(), temporary / "model.safetensors")
        pieces.load_state_dict(load_file(trained / "model.safetensors"))
        save(model, processor, folder, context=mark)
    return str(folder)
