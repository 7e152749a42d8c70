"""Importance criteria: one score per decoder block, higher = keep, blocks counted from 0 in the original model.

Criteria that need no data return {block: importance_score}; the others a table of one score per block and
calibration row (block, row, score), whose mean over rows is the importance_score: `ranking.block_scores` adds the
interval. The leave-one-out batch answers for many blocks at once: see `generate.RowSkip`.
"""

from itertools import groupby

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from medprune.answers.decoding import Answer, answer
from medprune.answers.prompts import IGNORED, collator, encode, encode_questions, prompt_text
from medprune.data.pictures import open_image
from medprune.models.families import parts
from medprune.progress import progress
from medprune.store import Units

SHARED = -2  # owner of the tokens that all rows about an image see


def output_similarity(model, processor, rows, embed, blocks, units: Units, max_new_tokens: int, batch_rows: int):
    """Score blocks by how much the answers change without them (the paper, equations 2-5).

    For each block b and calibration row i: cosine of the embedded answer without b and the embedded answer with all
    blocks, averaged over rows; importance_score = 1 - mean cosine, 0 for a block whose absence changes nothing.
    Returns a table (block, importance_score, mean_cosine, cosines, answers). batch_rows bounds the memory: blocks are
    left out in chunks of batch_rows / 2 images x blocks, at least one block. A chunk is the unit of work that a kill
    can cost: its answers are written to `units` when it is done, one line per block, and never asked again.
    """
    leave_one_out(model, processor, rows, blocks, units, max_new_tokens, batch_rows)
    original = embed([a["text"] for a in units["original"]])
    table = []
    for b in blocks:
        said = [Answer(**a) for a in units[f"block {b}"]]
        cosines = cosine(original, embed([a.text for a in said]))
        table.append(
            {
                "block": b,
                "importance_score": 1 - float(cosines.mean()),
                "mean_cosine": float(cosines.mean()),
                "cosines": cosines.tolist(),
                "answers": [a.text for a in said],
            }
        )
    return pd.DataFrame(table)


def leave_one_out(model, processor, rows, blocks, units: Units, max_new_tokens: int, batch_rows: int) -> None:
    """Write the answers with all blocks, and without each, to `units`, where they are not there yet."""
    if "original" not in units:
        said = answer(model, processor, rows, max_new_tokens, batch_rows, label="answers with all blocks")
        units.add("original", [vars(a) for a in said])
    todo = [b for b in blocks if f"block {b}" not in units]
    n_images = len({r["path"] for r in rows})
    step = max(1, batch_rows // (2 * n_images))  # half a batch: as fast on CPU, and a kill costs half as much
    for start in range(0, len(todo), step):
        chunk = todo[start : start + step]
        said = answer(
            model,
            processor,
            rows * len(chunk),
            max_new_tokens,
            batch_rows,
            skip=[b for b in chunk for _ in rows],
            label=f"without block {chunk[0]}..{chunk[-1]}",
        )
        for k, b in enumerate(chunk):
            units.add(f"block {b}", [vars(a) for a in said[k * len(rows) : (k + 1) * len(rows)]])


def similarity_rows(similarity: pd.DataFrame) -> pd.DataFrame:
    """Return `output_similarity`'s table as one row per block and calibration row: block, row, score = 1 - cosine."""
    return pd.DataFrame(
        [
            {"block": b, "row": i, "score": 1 - c}
            for b, found in zip(similarity["block"], similarity["cosines"], strict=True)
            for i, c in enumerate(found)
        ]
    )


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of a with the same row of b (the paper, equation 4); shapes (n, d) -> (n,)."""
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def teacher_batch(processor, rows: list[dict], answers: list[str], dtype) -> dict:
    """Return one padded batch of questions and given answers, with labels on the answers alone.

    Neighbouring rows about one image share it: a sequence per image, in which the questions do not see one another.
    `owner` (images, seq) names each token's row, SHARED for the image's part, -1 for padding.
    """
    items, owners = [], []
    for path, numbers in _by_image(rows):
        messages = []
        for i in numbers:
            messages += [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": rows[i]["question"]}]},
                {"role": "assistant", "content": [{"type": "text", "text": answers[i]}]},
            ]
        pixels = encode(processor, [prompt_text(processor, "")], [open_image(path)], dtype)["pixel_values"][0]
        item = encode_questions(processor, messages) | {"pixel_values": pixels}
        items.append(item)
        owners.append(torch.tensor([SHARED, *numbers])[item["turns"]])
    n = max(map(len, owners))
    owner = torch.stack([F.pad(o, (0, n - len(o)), value=-1) for o in owners])
    return collator(processor.tokenizer.pad_token_id)(items) | {"owner": owner}


def _by_image(rows: list[dict]):
    """Yield (image path, numbers of the rows about it) for neighbouring rows of one image."""
    for path, group in groupby(range(len(rows)), key=lambda i: rows[i]["path"]):
        yield path, list(group)


def _n_rows(batch: dict) -> int:
    return int(batch["owner"].max()) + 1


def teacher_batches(processor, rows: list[dict], answers: list[str], dtype, batch_rows: int) -> list[dict]:
    """Return `teacher_batch`es of at most batch_rows rows, or one image, each, in the order of the rows."""
    chunks = [[]]
    for _, numbers in _by_image(rows):
        if chunks[-1] and len(chunks[-1]) + len(numbers) > batch_rows:
            chunks.append([])
        chunks[-1] += numbers
    return [teacher_batch(processor, [rows[i] for i in c], [answers[i] for i in c], dtype) for c in chunks]


@torch.inference_mode()
def leave_one_out_logits(model, batch: dict, blocks):
    """Yield (block or None, log-probabilities (targets, vocab), labels (targets,), rows (targets,)) of a batch.

    Teacher-forced on the batch's answers; rows tells which row of the batch a target belongs to. None comes first:
    all blocks. What lies below a removed block is computed once and shared, so leaving out each of n blocks costs
    about n / 2 forward passes. Works on any decoder whose blocks take hidden states first.
    """
    inner = parts(model)
    batch = {k: v.to(model.device) for k, v in batch.items()}
    labels, kept, owner = batch.pop("labels"), batch.pop("logits_to_keep"), batch.pop("owner")
    chosen = labels != IGNORED
    targets, rows = labels[chosen], owner[:, 1:][:, kept][chosen]
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
    yield None, out.logits[chosen].float().log_softmax(-1), targets, rows
    for b in blocks:
        hidden = inputs[b]
        for later in range(b + 1, len(inner.blocks)):
            hidden = inner.blocks[later](hidden, **arguments[later])
        logits = inner.head(inner.text_model.norm(hidden[:, kept]))
        yield b, logits[chosen].float().log_softmax(-1), targets, rows


def perplexity(model, batches: list[dict], blocks, units: Units) -> pd.DataFrame:
    """Score blocks by the loss (nats a token) on the reference answers without them (shortened-llm, Kim 2024).

    batches: `teacher_batches` of the references. Returns one row per block and calibration row (block, row, score),
    the mean over the row's tokens; higher = keep. Each block of each batch is one unit, never computed twice.
    """
    return _teacher_forced(
        "perplexity",
        model,
        batches,
        blocks,
        units,
        lambda i, original, logp, labels: -logp.gather(1, labels[:, None])[:, 0],
    )


def logit_divergence(model, batches: list[dict], blocks, units: Units, reference=None) -> pd.DataFrame:
    """Score blocks by KL(p || p without the block) of the next token, in nats, on the original's own answers.

    batches: `teacher_batches` of the original's answers. p is this model's, or `reference`, the `original_logits`
    of the model that other blocks are gone from already. Returns and resumes as `perplexity` does.
    """

    def divergence(i, original, logp, _):
        p = original if reference is None else reference[i]
        return (p.exp() * (p - logp)).sum(-1)

    return _teacher_forced("logit divergence", model, batches, blocks, units, divergence)


def original_logits(model, batches: list[dict]) -> list[torch.Tensor]:
    """Return log-probabilities (targets, vocab) per batch, float32: 4 bytes x targets x vocabulary are held."""
    return [next(leave_one_out_logits(model, batch, []))[1] for batch in batches]


def _teacher_forced(name, model, batches, blocks, units, score) -> pd.DataFrame:
    """Return (block, row, score) with the mean of score(batch number, original, logp, labels) over a row's targets."""
    tables, first = [], 0
    with progress(len(blocks) * len(batches), name, "block") as bar:
        for i, batch in enumerate(batches):
            n, todo = _n_rows(batch), [b for b in blocks if f"{name} {i} {b}" not in units]
            for b, logp, labels, rows in leave_one_out_logits(model, batch, todo) if todo else ():
                if b is None:
                    original = logp
                    continue
                sums = torch.zeros(n, device=rows.device).index_add(0, rows, score(i, original, logp, labels))
                units.add(f"{name} {i} {b}", (sums / rows.bincount(minlength=n)).tolist())
                bar.update()
            tables += [
                pd.DataFrame({"block": b, "row": range(first, first + n), "score": units[f"{name} {i} {b}"]})
                for b in blocks
            ]
            first += n
    return pd.concat(tables, ignore_index=True)
