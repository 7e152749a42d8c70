"""Importance criteria: one score per decoder block, higher = keep, blocks counted from 0 in the original model.

Each criterion takes a model and calibration rows and returns {block: importance_score}. Notebook 02 draws them
together. The leave-one-out batch answers for many blocks at once: see `generate.RowSkip`.
"""

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from medprune.artifacts import Units
from medprune.data import open_image
from medprune.finetune import IGNORED, collator, encode_conversation
from medprune.generate import Answer, answer, encode, prompt_text
from medprune.model import parts
from medprune.progress import progress


def output_similarity(model, processor, rows, embed, blocks, units: Units, max_new_tokens: int, batch_rows: int):
    """Score blocks by how much the answers change without them (the paper, equations 2-5).

    For each block b and calibration row i: cosine of the embedded answer without b and the embedded answer with all
    blocks, averaged over rows; importance_score = 1 - mean cosine, 0 for a block whose absence changes nothing.
    Returns a table (block, importance_score, mean_cosine, cosines, answers). Answers are written to `units` as
    they come, one line per block, and never asked again.
    """
    if "original" not in units:
        said = answer(model, processor, rows, max_new_tokens, batch_rows, label="answers with all blocks")
        units.add("original", [vars(a) for a in said])
    todo = [b for b in blocks if f"block {b}" not in units]
    n_images = len({r["path"] for r in rows})
    step = max(1, batch_rows // n_images)
    for start in range(0, len(todo), step):
        chunk = todo[start : start + step]
        said = answer(
            model, processor, rows * len(chunk), max_new_tokens, batch_rows,
            skip=[b for b in chunk for _ in rows], label=f"without block {chunk[0]}..{chunk[-1]}",
        )  # fmt: skip
        for k, b in enumerate(chunk):
            units.add(f"block {b}", [vars(a) for a in said[k * len(rows) : (k + 1) * len(rows)]])
    original = embed([a["text"] for a in units["original"]])
    table = []
    for b in blocks:
        said = [Answer(**a) for a in units[f"block {b}"]]
        cosines = cosine(original, embed([a.text for a in said]))
        table.append({"block": b, "importance_score": 1 - float(cosines.mean()), "mean_cosine": float(cosines.mean()),
                      "cosines": cosines.tolist(), "answers": [a.text for a in said]})  # fmt: skip
    return pd.DataFrame(table)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of a with the same row of b (the paper, equation 4); shapes (n, d) -> (n,)."""
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def magnitude(model) -> dict[int, float]:
    """Score blocks by the sum of absolute weights (Han et al. 2015, the paper's baseline)."""
    return {b: float(sum(p.detach().abs().sum(dtype=torch.float64) for p in block.parameters()))
            for b, block in enumerate(parts(model).blocks)}  # fmt: skip


def reverse_order(n_blocks: int) -> dict[int, float]:
    """Score earlier blocks higher: the control that removes the last blocks first."""
    return {b: float(n_blocks - b) for b in range(n_blocks)}


def random(n_blocks: int, seed: int) -> dict[int, float]:
    """Score blocks at random, uniform in [0, 1): the control that any criterion has to beat."""
    return dict(enumerate(np.random.default_rng([seed, 7]).random(n_blocks).tolist()))


@torch.inference_mode()
def block_influence(model, batch: dict) -> pd.DataFrame:
    """Score blocks by 1 - cosine of hidden states before and after them, averaged over tokens (ShortGPT, Men 2024).

    batch: input_ids (batch, seq), attention_mask, pixel_values. Returns (block, importance_score, image_tokens,
    text_tokens): over all tokens, and over the two kinds apart.
    """
    image = batch["input_ids"] == model.config.image_token_id
    real = batch["attention_mask"].bool()
    table = []

    def compare(block):
        def hook(_, inputs, output):
            change = 1 - F.cosine_similarity(inputs[0].float(), output.float(), dim=-1).cpu()  # (batch, seq)
            table.append({"block": block, "importance_score": change[real].mean().item(),
                          "image_tokens": change[real & image].mean().item(),
                          "text_tokens": change[real & ~image].mean().item()})  # fmt: skip

        return hook

    handles = [block.register_forward_hook(compare(b)) for b, block in enumerate(parts(model).blocks)]
    try:
        model(**{k: v.to(model.device) for k, v in batch.items()}, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return pd.DataFrame(table)


def teacher_batch(processor, rows: list[dict], answers: list[str], dtype) -> dict:
    """Return one padded batch of question and given answer per row, with labels on the answers alone."""
    items = []
    for row, said in zip(rows, answers, strict=True):
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]},
                    {"role": "assistant", "content": [{"type": "text", "text": said}]}]  # fmt: skip
        pixels = encode(processor, [prompt_text(processor, "")], [open_image(row["path"])], dtype)["pixel_values"][0]
        items.append(encode_conversation(processor, messages) | {"pixel_values": pixels})
    return collator(processor.tokenizer.pad_token_id)(items)


@torch.inference_mode()
def leave_one_out_logits(model, batch: dict, blocks):
    """Yield (block or None, log-probabilities (targets, vocab), labels (targets,)) teacher-forced on a batch.

    None comes first: all blocks. What lies below a removed block is computed once and shared, so leaving out each of
    n blocks costs about n / 2 forward passes. Works on any decoder whose blocks take hidden states first.
    """
    inner = parts(model)
    batch = {k: v.to(model.device) for k, v in batch.items()}
    labels, kept = batch.pop("labels"), batch.pop("logits_to_keep")
    chosen = labels != IGNORED
    inputs, arguments = {}, {}

    def remember(block):
        def hook(_, args, kwargs):
            inputs[block] = args[0]
            arguments[block] = kwargs

        return hook

    handles = [m.register_forward_pre_hook(remember(b), with_kwargs=True) for b, m in enumerate(inner.blocks)]
    try:
        out = model(**batch, use_cache=False, logits_to_keep=kept)
    finally:
        for handle in handles:
            handle.remove()
    yield None, out.logits[chosen].float().log_softmax(-1), labels[chosen]
    for b in blocks:
        hidden = inputs[b]
        for later in range(b + 1, len(inner.blocks)):
            hidden = inner.blocks[later](hidden, **arguments[later])
        logits = inner.head(inner.text_model.norm(hidden[:, kept]))
        yield b, logits[chosen].float().log_softmax(-1), labels[chosen]


def perplexity(model, batch: dict, blocks) -> dict[int, float]:
    """Score blocks by the loss (nats a token) on the reference answers without them (shortened-llm, Kim 2024)."""
    scores = {}
    with progress(len(blocks), "perplexity", "block") as bar:
        for b, logp, y in leave_one_out_logits(model, batch, blocks):
            if b is not None:
                scores[b] = float(-logp.gather(1, y[:, None]).mean())
                bar.update()
    return scores


def logit_divergence(model, batch: dict, blocks) -> dict[int, float]:
    """Score blocks by KL(p || p without the block) of next tokens (nats), on the original's own answers."""
    scores, original = {}, None
    with progress(len(blocks), "logit divergence", "block") as bar:
        for b, logp, _ in leave_one_out_logits(model, batch, blocks):
            if b is None:
                original = logp
                continue
            scores[b] = float((original.exp() * (original - logp)).sum(-1).mean())
            bar.update()
    return scores


def removal_order(scores: dict[int, float], protected) -> list[int]:
    """Return blocks, least important first, without the protected; equal scores go in order of their numbers."""
    bad = [b for b, s in scores.items() if not np.isfinite(s)]
    if bad:
        raise ValueError(f"importance_score of block {bad[0]} is {scores[bad[0]]}: it must be a finite number.")
    return sorted((b for b in scores if b not in set(protected)), key=lambda b: (scores[b], b))
