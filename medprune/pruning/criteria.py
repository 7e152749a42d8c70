"""Criteria that look at weights or hidden states, the controls, and the removal order of any scores.

One score per decoder block, higher = keep, blocks counted from 0. Criteria that need no data return {block:
importance_score}; `block_influence` a table by calibration row, as those of leave_one_out.py.
"""

from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from medprune.models.families import block_number, parts
from medprune.models.loading import read_tensor, stored_tensors
from medprune.pruning.leave_one_out import SHARED, TeacherBatch


def magnitude(source: str | Path) -> dict[int, float]:
    """Score blocks by the sum of absolute weights in 16 bits (Han et al. 2015, the paper's baseline).

    source: the model's folder, which is read a tensor at a time, for a model in memory may be held in fewer bits.
    """
    scores = defaultdict(float)
    for name, where in stored_tensors(source).items():
        if (b := block_number(name)) is not None:
            scores[b] += float(read_tensor(*where).abs().sum(dtype=torch.float64))
    return dict(sorted(scores.items()))


def reverse_order(n_blocks: int) -> dict[int, float]:
    """Score earlier blocks higher: the control that removes the last blocks first."""
    return {b: float(n_blocks - b) for b in range(n_blocks)}


def random(n_blocks: int, seed: int) -> dict[int, float]:
    """Score blocks at random, uniform in [0, 1): the control that any criterion has to beat."""
    return dict(enumerate(np.random.default_rng([seed, 7]).random(n_blocks).tolist()))


def block_influence(model, batches: list[TeacherBatch]) -> pd.DataFrame:
    """Score blocks by 1 - cosine of hidden states before and after them, averaged over tokens (ShortGPT, Men 2024).

    batches: as `teacher_batches` gives them. Returns one row per block and calibration row (block, row, score,
    image_tokens, text_tokens): the mean over all tokens, and over the two kinds apart. Higher = keep, in [0, 2].
    """
    tables, first = [], 0
    for batch in batches:
        image = batch.inputs["input_ids"] == model.config.image_token_id
        kinds = {"score": torch.ones_like(image), "image_tokens": image, "text_tokens": ~image}
        for b, change in _changes(model, batch):
            found = {kind: _row_means(batch, change, which) for kind, which in kinds.items()}
            tables.append(pd.DataFrame({"block": b, "row": range(first, first + len(batch.ids)), **found}))
        first += len(batch.ids)
    return pd.concat(tables, ignore_index=True)


@torch.inference_mode()
def _changes(model, batch: TeacherBatch) -> list[tuple[int, torch.Tensor]]:
    """Return (block, 1 - cosine of each token's hidden states before and after it (images, seq)) of every block."""
    changes = []

    def compare(block, _, inputs, output):
        entered = inputs[0].to(output.device).float()
        changes.append((block, 1 - F.cosine_similarity(entered, output.float(), dim=-1).cpu()))

    with ExitStack() as hooks:
        for b, block in enumerate(parts(model).blocks):
            hooks.enter_context(block.register_forward_hook(partial(compare, b)))
        model(**{k: v.to(model.device) for k, v in batch.inputs.items()}, use_cache=False, logits_to_keep=1)
    return changes


def _row_means(batch: TeacherBatch, change: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Average (images, seq) over the tokens of each row: its own, and those that all rows of its image see."""
    n, owner = len(batch.ids), batch.owner
    image = torch.stack([(owner == row).any(1).nonzero()[0, 0] for row in range(n)])  # which image a row is about
    own, shared = which & (owner >= 0), which & (owner == SHARED)
    sums = torch.zeros(n).index_add(0, owner[own], change[own]) + (change * shared).sum(1)[image]
    return sums / (torch.zeros(n).index_add(0, owner[own], torch.ones(int(own.sum()))) + shared.sum(1)[image])


def removal_order(scores: dict[int, float], protected) -> list[int]:
    """Return blocks, least important first, without the protected; equal scores go in order of their numbers."""
    bad = [b for b, s in scores.items() if not np.isfinite(s)]
    if bad:
        raise ValueError(f"importance_score of block {bad[0]} is {scores[bad[0]]}: it must be a finite number.")
    return sorted((b for b in scores if b not in set(protected)), key=lambda b: (scores[b], b))
