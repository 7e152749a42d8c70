"""Importance criteria that leave out one block at a time: by answers (the paper), by loss, by log-probabilities.

Scores are per decoder block, higher = keep, blocks counted from 0 in the model at hand. A table of one score per block
and calibration row (block, row, score) has the importance_score as its mean over rows. The leave-one-out batch answers
for many blocks at once: see `decoding.RowSkip`.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import pandas as pd
import torch

from medprune.answers.decoding import answer, chunks, next_logits, plain_logits
from medprune.answers.prompts import IGNORED, collator, encode_questions, padded, see
from medprune.device import rows_that_fit
from medprune.models.families import parts
from medprune.progress import progress
from medprune.pruning.plan import without
from medprune.store import Units

ROUNDING_NATS = {2: 0.02, 4: 1e-4}  # by bytes of a number: how far two ways to the same token may be apart
SHARED = -2  # owner of the tokens that all rows about an image see


def output_similarity(model, processor, rows, embed, blocks, units: Units, max_new_tokens: int, batch_rows: int):
    """Score blocks by how much the answers change without them (the paper, equations 2-5).

    For each block b and calibration row i: cosine of the embedded answer without b and the embedded answer with all
    blocks, averaged over rows; importance_score = 1 - mean cosine, 0 for a block whose absence changes nothing.
    Returns a table (block, importance_score, mean_cosine, cosines, answers). batch_rows bounds the memory, as
    `leave_one_out` says, which writes the answers to `units`.
    """
    leave_one_out(model, processor, rows, blocks, units, max_new_tokens, batch_rows)
    original = embed([a["text"] for a in units["original"]])
    table = []
    for b in blocks:
        answers = [a["text"] for a in units[f"block {b}"]]
        cosines = cosine(original, embed(answers))
        mean = float(cosines.mean())
        scored = {"block": b, "importance_score": 1 - mean, "mean_cosine": mean}
        table.append(scored | {"cosines": cosines.tolist(), "answers": answers})
    return pd.DataFrame(table)


def leave_one_out(model, processor, rows, blocks, units: Units, max_new_tokens: int, batch_rows: int) -> None:
    """Write the answers with all blocks, and without each, to `units`, where they are not there yet.

    Blocks are left out in chunks of at most batch_rows answers, at least one block: a kill costs the chunk at work.
    """
    if "original" not in units:
        ask = partial(answer, model, processor, rows, max_new_tokens, label="answers with all blocks")
        said = rows_that_fit(lambda n: ask(batch_rows=n), batch_rows, "answers", units)
        units.add("original", [vars(a) for a in said])
    todo = [b for b in blocks if f"block {b}" not in units]
    if todo:
        check_skipping(model, processor, rows[0], todo[0])
    for chunk in chunks(todo, max(1, batch_rows // len(rows))):
        skip, label = [b for b in chunk for _ in rows], f"without block {chunk[0]}..{chunk[-1]}"
        ask = partial(answer, model, processor, rows * len(chunk), max_new_tokens, skip=skip, label=label)
        said = rows_that_fit(lambda n, ask=ask: ask(batch_rows=n), batch_rows, "answers", units)
        without = zip(chunk, chunks(said, len(rows)), strict=True)
        units.add_all({f"block {b}": [vars(a) for a in without_b] for b, without_b in without})


def check_skipping(model, processor, row: dict, block: int) -> None:
    """Raise ValueError where an answer would begin otherwise than the model's own forward pass over the whole prompt.

    Tried with all blocks, and without one, which is skipped here and taken out there. Allowed are a hundredth of the
    divergence (nats) between the two, and rounding: a cache that is cut, a position or a layer's kind that follows a
    block's number, and inputs left behind are seen here, in a family that nobody has tried.
    """
    whole, skipped = (next_logits(model, processor, row, b).float().log_softmax(-1) for b in (-1, block))
    plain = plain_logits(model, processor, row).float().log_softmax(-1)
    with without(model, [block]):
        pruned = plain_logits(model, processor, row).float().log_softmax(-1)
    apart = lambda p, q: float((p.exp() * (p - q.to(p.device))).sum())  # noqa: E731
    most = ROUNDING_NATS[model.dtype.itemsize] + apart(plain, pruned) / 100
    for said, own, how in ((whole, plain, "as it is"), (skipped, pruned, f"without block {block}")):
        if not (found := apart(own, said)) <= most:
            far = f"({found:.2g} nats apart, {most:.2g} allowed)"
            raise ValueError(
                f"{type(model).__name__} {how} does not answer as its own forward pass does {far}: "
                "its structure is none that medprune scores rightly."
            )


def similarity_rows(similarity: pd.DataFrame) -> pd.DataFrame:
    """Return `output_similarity`'s table as one row per block and calibration row: block, row, score = 1 - cosine."""
    found = zip(similarity["block"], similarity["cosines"], strict=True)
    return _by_row({b: [1 - c for c in cosines] for b, cosines in found})


def _by_row(scores: dict[int, list[float]]) -> pd.DataFrame:
    rows = [{"block": b, "row": i, "score": score} for b, found in scores.items() for i, score in enumerate(found)]
    return pd.DataFrame(rows)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of a with the same row of b (the paper, equation 4); shapes (n, d) -> (n,)."""
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


@dataclass(frozen=True)
class TeacherBatch:
    """Questions with given answers, to be run through a model: one padded sequence per image.

    ids: the rows' ids. inputs: input_ids (images, seq), attention mask, positions and pixels. kept (kept,): where
    answers are predicted; labels (images, kept) there, IGNORED where another image's are. owner (images, seq): the
    number of each token's row, SHARED for the image's part, -1 for padding.
    """

    ids: list[str]
    inputs: dict[str, torch.Tensor]
    kept: torch.Tensor
    labels: torch.Tensor
    owner: torch.Tensor


def teacher_batch(processor, rows: list[dict], answers: list[str], dtype) -> TeacherBatch:
    """Return one batch of rows {"id", "path", "question"} with given answers.

    Neighbouring rows about one image share it: a sequence per image, in which the questions do not see one another; for
    a model that cannot keep them apart (`families.packs`) a sequence per row.
    """
    items, owners = [], []
    for path, numbers in _by_image(rows):
        messages = []
        for i in numbers:
            asked, said = ({"type": "text", "text": text} for text in (rows[i]["question"], answers[i]))
            messages.append({"role": "user", "content": [{"type": "image"}, asked]})
            messages.append({"role": "assistant", "content": [said]})
        seen = see(processor, path, dtype)
        for item in encode_questions(processor, messages, seen):
            owners.append(torch.tensor([SHARED, *numbers])[item["turns"]])
            items.append({k: v for k, v in item.items() if processor.packs or k != "turns"} | {"seen": seen.inputs})
    inputs = collator(processor.tokenizer.pad_token_id)([items])
    labels, kept = inputs.pop("labels"), inputs.pop("logits_to_keep")
    return TeacherBatch([row["id"] for row in rows], inputs, kept, labels, padded(owners, padding_value=-1))


def teacher_batches(processor, rows: list[dict], answers: list[str], dtype, batch_rows: int) -> list[TeacherBatch]:
    """Return `teacher_batch`es of at most batch_rows rows, or one image, each, in the order of the rows."""
    numbers = [[]]
    for _, about_image in _by_image(rows):
        if numbers[-1] and len(numbers[-1]) + len(about_image) > batch_rows:
            numbers.append([])
        numbers[-1] += about_image
    return [teacher_batch(processor, [rows[i] for i in some], [answers[i] for i in some], dtype) for some in numbers]


def _by_image(rows: list[dict]):
    """Yield (image path, numbers of the rows about it) for neighbouring rows of one image."""
    for path, group in groupby(range(len(rows)), key=lambda i: rows[i]["path"]):
        yield path, list(group)


@torch.inference_mode()
def leave_one_out_logits(model, batch: TeacherBatch, blocks):
    """Yield (block or None, log-probabilities (targets, vocab), labels (targets,), rows (targets,)) of a batch.

    Teacher-forced on the batch's answers; rows tells which row of the batch a target belongs to. None comes first:
    all blocks. What lies below a removed block is computed once and shared, so leaving out each of n blocks costs
    about n / 2 forward passes. Works on any decoder whose blocks take hidden states first.
    """
    inner = parts(model)
    inputs = {k: v.to(model.device) for k, v in batch.inputs.items()}
    kept, chosen = batch.kept, batch.labels != IGNORED  # on the host: the model may be spread over several devices
    targets, rows = batch.labels[chosen], batch.owner[:, 1:][:, kept][chosen]
    seen = {}  # block -> the hidden states it takes, and its other arguments

    def remember(block, _, hidden, others):
        seen[block] = hidden[0], others

    with ExitStack() as hooks:
        for b, block in enumerate(inner.blocks):
            hooks.enter_context(block.register_forward_pre_hook(partial(remember, b), with_kwargs=True))
        # the head by itself: a model that is spread would take `kept` to a device where its states are not
        logits = inner.head(model.base_model(**inputs, use_cache=False).last_hidden_state[:, kept])
    targets, rows = targets.to(logits.device), rows.to(logits.device)
    yield None, logits[chosen].float().log_softmax(-1), targets, rows
    for b in blocks:
        hidden = seen[b][0]
        for later in range(b + 1, len(inner.blocks)):
            hidden = inner.blocks[later](hidden, **seen[later][1])
        logits = inner.head(inner.text_model.norm(hidden[:, kept]))
        yield b, logits[chosen].float().log_softmax(-1), targets, rows


def perplexity(model, batches: list[TeacherBatch], blocks, units: Units) -> pd.DataFrame:
    """Score blocks by the loss (nats a token) on the reference answers without them (shortened-llm, Kim 2024).

    batches: `teacher_batches` of the references. Returns one row per block and calibration row (block, row, score),
    the mean over the row's tokens; higher = keep. Each block of each row is one unit, never computed twice.
    """

    def loss(_, logp, labels):
        return -logp.gather(1, labels[:, None])[:, 0]

    return _teacher_forced("perplexity", model, batches, blocks, units, loss)


def logit_divergence(model, batches: list[TeacherBatch], blocks, units: Units, reference=None) -> pd.DataFrame:
    """Score blocks by KL(p || p without the block) of the next token, in nats, on the original's own answers.

    batches: `teacher_batches` of the original's answers. p is this model's, or, log-probabilities (targets,
    vocab) by batch, the `reference` model's, which no block is gone from yet. Returns and resumes as `perplexity`.
    """

    def divergence(p, logp, _):
        return (p.exp() * (p - logp)).sum(-1)

    return _teacher_forced("logit divergence", model, batches, blocks, units, divergence, reference)


def _teacher_forced(name: str, model, batches, blocks, units: Units, score, reference=None) -> pd.DataFrame:
    """Return (block, row, score), the mean over a row's targets of score(p, logp, labels); p: as `logit_divergence`."""

    def key(row: str, block: int) -> str:
        return f"{name} of {row} without block {block}"

    with progress(len(blocks) * len(batches), name, "block") as bar:
        for number, batch in enumerate(batches):
            todo = [b for b in blocks if any(key(row, b) not in units for row in batch.ids)]
            if not todo:
                continue
            found = leave_one_out_logits(model, batch, todo)
            original = next(found)[1]
            p = reference[number] if reference else original
            for b, logp, labels, rows in found:
                sums = torch.zeros(len(batch.ids), device=rows.device).index_add(0, rows, score(p, logp, labels))
                means = (sums / rows.bincount(minlength=len(sums))).tolist()
                units.add_all({key(row, b): mean for row, mean in zip(batch.ids, means, strict=True)})
                bar.update()
    rows = [row for batch in batches for row in batch.ids]
    return _by_row({b: [units[key(row, b)] for row in rows] for b in blocks})
