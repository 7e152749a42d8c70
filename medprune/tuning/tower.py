"""The vision tower of an assembled base: trained, with its projector, before the language model sees an image.

A small CLIP tower starts at random (`align_vision`), pretrained eyes know the world already (`tune_eyes`).
"""

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from medprune.answers.prompts import image_pixels
from medprune.models.assembled import prepare_base
from medprune.models.eyes import Eyes
from medprune.models.families import parts
from medprune.models.loading import load, save
from medprune.progress import progress
from medprune.store import Run, content, context, made, write_folder
from medprune.tuning.views import augmented, autocast, centre, mixed, seen, wide_pixels


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
    targets = name_embeddings(inner.text_model, processor, names)
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
            logits, loss = contrast(patches, labels[chosen], targets[labels[chosen]], targets)
            accuracy = (logits.argmax(-1) == labels[chosen]).float().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            curve.append({"step": step + 1, "loss": loss.item(), "accuracy": accuracy.item()})
            bar.update()
    tower.to(dtype).eval()
    projector.to(dtype).eval()
    return curve


def name_embeddings(text_model, processor, names: list[str]) -> torch.Tensor:
    """Return the mean embedding of each name's tokens, (names, width), float32."""
    words = text_model.embed_tokens.weight.detach().float()
    tokens = [processor.tokenizer(f" {name}")["input_ids"] for name in names]
    return torch.stack([words[ids].mean(0) for ids in tokens])


def contrast(patches: torch.Tensor, wanted, meant: torch.Tensor, targets: torch.Tensor):
    """Return (logits (batch, names), loss) of patches (batch, patches, width).

    wanted: labels (batch,) or probabilities (batch, names). meant: the embedding (batch, width) that each patch is
    drawn to. targets: those of the names, (names, width).
    """
    centre, size = targets.mean(0), targets.square().mean().sqrt()
    logits = 10 * F.cosine_similarity((patches.mean(1) - centre)[:, None], (targets - centre)[None], dim=-1)
    distance = ((patches - meant[:, None]) / size).square().mean()
    return logits, F.cross_entropy(logits, wanted, label_smoothing=0.05) + 0.3 * distance


def tune_eyes(model, processor, records, steps: int, seed: int = 0, batch: int = 32) -> list[dict]:
    """Tune pretrained eyes to tell apart what the records show, and their projector to say it; return the curve.

    A linear head on the mean token learns the labels: cross-entropy on augmented and mixed images (mixup, Zhang et al.
    2018), classes weighted by 1/sqrt(n) both in the draw and in the loss. It draws the last blocks of the tower along
    and is then let go. The projector sends the tower no gradient; it learns to say in the language model's embeddings
    what the head believes, `contrast` of its probabilities: a doubtful image reads as a mixture of words. Drawn to the
    labels instead, it would be as sure of every image as of those that the tower has learned by heart.
    """
    inner, dtype = parts(model), model.dtype
    names = sorted({r.condition for r in records})
    labels = torch.tensor([names.index(r.condition) for r in records])
    pixels = torch.stack([wide_pixels(processor, r.path) for r in records])
    targets = name_embeddings(inner.text_model, processor, names)
    tower, projector = inner.vision_tower.float().to(memory_format=torch.channels_last), inner.projector.float()
    n_fixed = len(tower.blocks) * 5 // 16  # what the first blocks see is the same in every picture
    torch.manual_seed(seed)
    side, known = processor.image_processor.crop_size["height"], seen(tower, centre(pixels, processor))
    mean, size = known.mean(0), known.std(0) + 1e-3
    head = torch.nn.Linear(len(mean), len(names))
    for parameter in head.parameters():  # its first steps must not shake the tower
        torch.nn.init.zeros_(parameter)
    late = [*tower.blocks[n_fixed:].parameters(), *tower.last.parameters()]
    optimizer, schedule = _at_three_rates(late, head, projector, steps)
    weights, curve = labels.bincount().rsqrt(), []
    with progress(steps, "pretrained eyes and projector", "step") as bar:
        for step in range(steps):
            chosen = torch.multinomial(weights[labels], min(batch, len(records)))
            truth = F.one_hot(labels[chosen], len(names)) * weights[labels[chosen], None]
            x, truth = mixed(augmented(pixels[chosen].float(), side), truth)
            with torch.no_grad(), autocast(dtype):
                early = tower.early(x.to(memory_format=torch.channels_last), n_fixed)
            tokens = tower.late(early.float(), n_fixed)  # bfloat16 takes half as long again backwards
            logits = head(F.dropout((tokens[:, 0] - mean) / size, 0.3))
            smooth = 0.9 * truth + 0.1 * truth.mean(-1, keepdim=True)
            loss = -(smooth * logits.log_softmax(-1)).sum(-1).mean() / weights.mean()
            believed = logits.detach().softmax(-1)
            said, meant = contrast(projector(tokens[:, 1:].detach()), believed, believed @ targets, targets)
            optimizer.zero_grad()
            (loss + meant).backward()
            torch.nn.utils.clip_grad_norm_(late, 1.0)
            optimizer.step()
            schedule.step()
            agree = (said.argmax(-1) == truth.argmax(-1)).float().mean()
            curve.append({"step": step + 1, "loss": loss.item(), "accuracy": agree.item()})
            bar.update()
    tower.to(dtype, memory_format=torch.contiguous_format).eval()
    projector.to(dtype).eval()
    return curve


def _at_three_rates(late: list, head, projector, steps: int) -> tuple:
    """Return (AdamW, its one-cycle schedule) of a tower that knows much, a head of zeros, a random projector."""
    groups = [(late, 2e-4, 0.02), ([*head.parameters()], 2e-3, 0.1), ([*projector.parameters()], 1e-3, 0.05)]
    optimizer = torch.optim.AdamW([{"params": p, "lr": rate, "weight_decay": decay} for p, rate, decay in groups])
    rates = [rate for _, rate, _ in groups]
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.2)


def prepare_tuned_tower(config, run: Run, records, conditions: dict) -> str:
    """Return the base model's folder; an assembled base gets its vision tower trained first, once per run.

    What was trained is kept in tower/; base/, which holds the language model once more, can be made again from it.
    """
    base = prepare_base(config.base)
    if not config.vision_steps or base == config.base:
        return base
    shown = [(content(r.path), r.condition) for r in records]
    how = (config.vision_steps, config.seed, config.image_size, sorted(conditions))
    folder, trained, mark = run.dir / "base", run.dir / "tower", context(__name__, content(base), shown, *how)
    if not made(folder, mark):
        model, processor = load(base, "cpu")
        pieces = torch.nn.ModuleDict({"vision": parts(model).vision_tower, "projector": parts(model).projector})
        if not made(trained, mark):
            how = (config.vision_steps, config.seed)
            if isinstance(pieces["vision"], Eyes):
                curve = tune_eyes(model, processor, records, *how)
            else:
                curve = align_vision(model, processor, records, conditions, *how)
            with write_folder(trained, context=mark, curve=curve) as temporary:
                save_file(pieces.state_dict(), temporary / "model.safetensors")
        pieces.load_state_dict(load_file(trained / "model.safetensors"))
        save(model, processor, folder, context=mark)
    return str(folder)
