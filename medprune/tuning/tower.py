"""The vision tower of an assembled base: trained, with its projector, before the language model sees an image."""

import numpy as np
import torch
from torch.nn import functional as F

from medprune.answers.prompts import encode, prompt_text
from medprune.data.pictures import open_image
from medprune.models import loading
from medprune.models.assembled import prepare_base
from medprune.models.families import parts
from medprune.progress import progress
from medprune.settings import Profile
from medprune.store import Run, fingerprint, read_json, write_json


def align_vision(model, processor, records, conditions, steps: int, seed: int = 0, batch: int = 32) -> list[dict]:
    """Train an assembled base's vision tower and projector, which start at random; return loss and accuracy.

    A contrastive loss as in CLIP (Radford et al. 2021), but in the language model's own embedding space: the mean
    projected patch of an image is drawn to the mean embedding of its condition's name, away from the other names,
    and every patch to its size (squared error, weight 0.3). What the language model then finds in place of the
    image reads like words it knows. AdamW, one-cycle rate of 6e-4, mirrored and rotated images.
    """
    inner = parts(model)
    tower, projector = inner.vision_tower.float().train(), inner.projector.float().train()
    names = sorted(conditions)
    labels = torch.tensor([names.index(r.condition) for r in records])
    pixels = torch.stack(
        [
            encode(processor, [prompt_text(processor, "")], [open_image(r.path)], torch.float32)["pixel_values"][0]
            for r in records
        ]
    )
    table = inner.text_model.embed_tokens.weight.detach().float()
    tokens = [torch.tensor(processor.tokenizer(f" {name}")["input_ids"]) for name in names]
    targets = torch.stack([table[ids].mean(0) for ids in tokens])  # (conditions, width)
    centre, size = targets.mean(0), targets.square().mean().sqrt()
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW([*tower.parameters(), *projector.parameters()], lr=6e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-4, total_steps=steps, pct_start=0.15)
    curve = []
    with progress(steps, "vision tower and projector", "step") as bar:
        for step in range(steps):
            chosen = torch.from_numpy(draw.choice(len(records), min(batch, len(records)), replace=False))
            x, y = pixels[chosen], labels[chosen]
            x = torch.rot90(x.flip(-1) if step % 2 else x, int(draw.integers(4)), (-2, -1))
            patches = projector(tower(pixel_values=x).last_hidden_state[:, 1:])  # (batch, patches, width)
            logits = 10 * F.cosine_similarity((patches.mean(1) - centre)[:, None], (targets - centre)[None], dim=-1)
            distance = ((patches - targets[y][:, None]) / size).square().mean()
            loss = F.cross_entropy(logits, y, label_smoothing=0.05) + 0.3 * distance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            accuracy = (logits.argmax(-1) == y).float().mean()
            curve.append({"step": step + 1, "loss": loss.item(), "accuracy": accuracy.item()})
            bar.update()
    tower.to(model.dtype).eval()
    projector.to(model.dtype).eval()
    return curve


def prepare_tuned_tower(config: Profile, run: Run, records, conditions: dict) -> str:
    """Return the base model's folder; an assembled base gets its vision tower trained first, once per run."""
    base = prepare_base(config)
    if not config.vision_steps or base == config.base:
        return base
    context = fingerprint(base, config.vision_steps, config.seed, [r.key for r in records], [r.path for r in records])
    folder, marker = run.dir / "base", run.dir / "vision.json"
    if not (marker.exists() and read_json(marker)["context"] == context and (folder / "config.json").exists()):
        llava, processor = loading.load(base)
        curve = align_vision(llava, processor, records, conditions, config.vision_steps, config.seed)
        loading.save(llava, processor, folder)
        write_json(marker, {"context": context, "curve": curve})
    return str(folder)
