"""Criteria that look at weights or hidden states, the controls, and the removal order of any scores."""

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from medprune.models.families import parts
from medprune.pruning.leave_one_out import SHARED, _n_rows


def magnitude(model) -> dict[int, float]:
    """Score blocks by the sum of absolute weights (Han et al. 2015, the paper's baseline)."""
    return {
        b: float(sum(p.detach().abs().sum(dtype=torch.float64) for p in block.parameters()))
        for b, block in enumerate(parts(model).blocks)
    }


def reverse_order(n_blocks: int) -> dict[int, float]:
    """Score earlier blocks higher: the control that removes the last blocks first."""
    return {b: float(n_blocks - b) for b in range(n_blocks)}


def random(n_blocks: int, seed: int) -> dict[int, float]:
    """Score blocks at random, uniform in [0, 1): the control that any criterion has to beat."""
    return dict(enumerate(np.random.default_rng([seed, 7]).random(n_blocks).tolist()))


def block_influence(model, batches: list[dict]) -> pd.DataFrame:
    """Score blocks by 1 - cosine of hidden states before and after them, averaged over tokens (ShortGPT, Men 2024).

    batches: as `teacher_batches` gives them. Returns one row per block and calibration row (block, row, score,
    image_tokens, text_tokens): the mean over all tokens, and over the two kinds apart. Higher = keep, in [0, 2].
    """
    tables, first = [], 0
    for batch in batches:
        tables.append(_influence(model, batch).assign(row=lambda t, first=first: t["row"] + first))
        first += _n_rows(batch)
    return pd.concat(tables, ignore_index=True)


@torch.inference_mode()
def _influence(model, batch: dict) -> pd.DataFrame:
    image, owner, n = batch["input_ids"] == model.config.image_token_id, batch["owner"], _n_rows(batch)
    item = torch.stack([(owner == row).any(1).nonzero()[0, 0] for row in range(n)])  # which image a row is about
    tables = []

    def means(change, which):
        """Average (images, seq) over each row's tokens: its own, and those that all rows of its image see."""
        own, shared = which & (owner >= 0), which & (owner == SHARED)
        sums = torch.zeros(n).index_add(0, owner[own], change[own]) + (change * shared).sum(1)[item]
        return sums / (torch.zeros(n).index_add(0, owner[own], torch.ones(int(own.sum()))) + shared.sum(1)[item])

    def compare(block):
        def hook(_, inputs, output):
            change = 1 - F.cosine_similarity(inputs[0].float(), output.float(), dim=-1).cpu()  # (images, seq)
            kinds = {"score": torch.ones_like(image), "image_tokens": image, "text_tokens": ~image}
            found = {kind: means(change, which) for kind, which in kinds.items()}
            tables.append(pd.DataFrame({"block": block, "row": range(n), **found}))

        return hook

    handles = [block.register_forward_hook(compare(b)) for b, block in enumerate(parts(model).blocks)]
    inputs = {k: v.to(model.device) for k, v in batch.items() if k not in ("labels", "logits_to_keep", "owner")}
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return pd.concat(tables, ignore_index=True)


def removal_order(scores: dict[int, float], protected) -> list[int]:
    """Return blocks, least important first, without the protected; equal scores go in order of their numbers."""
    bad = [b for b, s in scores.items() if not np.isfinite(s)]
    if bad:
        raise ValueError(f"importance_score of block {bad[0]} is {scores[bad[0]]}: it must be a finite number.")
    return sorted((b for b in scores if b not in set(protected)), key=lambda b: (scores[b], b))
