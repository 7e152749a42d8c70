"""Batched greedy answers to questions about images.

Prompts of one image share everything up to its last image token: that prefix is run once and its cache copied to
each question. Rows of one batch have prompts of one length, so nothing is padded and a row's answer does not depend
on its neighbours. `RowSkip` lets each row go past a block of its own: the leave-one-out batch of notebook 02.
"""

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from medprune.answers.prompts import encode, prompt_text
from medprune.data.pictures import open_image
from medprune.models.families import parts
from medprune.progress import progress
from medprune.store import context


@dataclass(frozen=True)
class Answer:
    """What a model said: text, its length in tokens, and whether it reached the end of sequence."""

    text: str
    tokens: int
    ended: bool


class RowSkip(ExitStack):
    """Let each row of a batch pass one block unchanged: h_out = where(row skips block, h_in, h_out).

    `skips` names the blocks that any row may skip (indices into the model at hand); set `rows` to one block number,
    or -1, per row before each forward pass. Use as a context manager.
    """

    def __init__(self, model, skips):
        super().__init__()
        self.rows = None
        for b in set(skips) - {-1}:
            self.enter_context(parts(model).blocks[b].register_forward_hook(partial(self._pass_by, b)))

    def _pass_by(self, block, _, inputs, output):
        skipped = self.rows == block
        if skipped.any():
            return torch.where(skipped[:, None, None].to(output.device), inputs[0], output)


@torch.inference_mode()
def answer(model, processor, rows: list[dict], max_new_tokens: int, batch_rows: int = 128, skip=None, label="answers"):
    """Answer each row {"path", "question"} greedily; return a list of Answer in the order of the rows.

    batch_rows: how many (image, block) prefixes, and how many answers, are held in memory at once. skip: for each
    row the block it goes without, or -1.
    """
    skip = torch.tensor(skip if skip is not None else [-1] * len(rows))
    groups = defaultdict(list)  # (image, block) -> numbers of its rows
    for i, row in enumerate(rows):
        groups[row["path"], int(skip[i])].append(i)
    answers: list[Answer | None] = [None] * len(rows)
    with RowSkip(model, skip.tolist()) as skipping, progress(len(rows), label, "answer") as bar:
        for chunk in chunks(list(groups.values()), batch_rows):
            first = [group[0] for group in chunk]
            skipping.rows = skip[first]
            prefix, cache = _run_prefixes(model, processor, [rows[i] for i in first])
            for asked in _questions(processor, rows, chunk, prefix, batch_rows):
                numbers, which, ids = map(list, zip(*asked, strict=True))
                skipping.rows = skip[numbers]
                own = _select(cache, which, len(ids[0]) + max_new_tokens)
                said = _decode(model, processor, own, torch.stack(ids), max_new_tokens, skipping)
                for i, a in zip(numbers, said, strict=True):
                    answers[i] = a
                bar.update(len(said))
    return answers


def chunks(items: list, size: int):
    """Yield the items in lists of `size`, the last one shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _run_prefixes(model, processor, rows: list[dict]):
    """Run each row's prompt up to its last image token; return (token ids (rows, prefix), their cache)."""
    images = [open_image(row["path"]) for row in rows]
    batch = encode(processor, [prompt_text(processor, row["question"]) for row in rows], images, model.dtype)
    image_token = model.config.image_token_id
    heads = [ids[: int((ids == image_token).nonzero()[-1]) + 1] for ids in batch["input_ids"]]
    if len({len(h) for h in heads}) > 1:
        raise ValueError("prompts differ in length before the question: give one chat template and one image size.")
    prefix = torch.stack(heads)
    cache = DynamicCache(config=model.config.text_config)
    forward(model, prefix, cache, batch["pixel_values"])
    return prefix, cache


def _questions(processor, rows: list[dict], groups: list[list[int]], prefix: torch.Tensor, batch_rows: int):
    """Yield batches of (row number, number of its prefix, ids after the prefix), each of ids of one length."""
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    n_images = int((prefix[0] == image_token).sum())
    by_length = defaultdict(list)
    for p, group in enumerate(groups):
        for i in group:
            text = prompt_text(processor, rows[i]["question"])
            text = text.replace(processor.image_token, processor.image_token * n_images)
            ids = torch.tensor(processor.tokenizer(text)["input_ids"])[prefix.shape[1] :]
            by_length[len(ids)].append((i, p, ids))
    for asked in by_length.values():
        yield from chunks(asked, batch_rows)


def forward(model, ids, cache, pixel_values=None):
    """Return the logits (batch, vocab) of the last of `ids` (batch, seq), by which the cache grows."""
    extra = {} if pixel_values is None else {"pixel_values": pixel_values.to(model.device)}
    out = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
    return out.logits[:, -1]


class Roomy(DynamicLayer):
    """A layer of the cache with room for so many tokens, so that a step writes its token and copies no other."""

    def __init__(self, room: int):
        super().__init__()
        self._room, self._held = room, None

    def update(self, key_states, value_states, *_, **__):
        if self._held is None:
            self.lazy_initialization(key_states, value_states)
            # zeros, for attention on a CPU multiplies what is not written yet by weights of 0
            self._held = [x.new_zeros(*x.shape[:2], self._room, x.shape[3]) for x in (key_states, value_states)]
            self.keys, self.values = (x[:, :, :0] for x in self._held)
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            held[:, :, start:end] = new
        self.keys, self.values = (x[:, :, :end] for x in self._held)
        return self.keys, self.values

    def batch_select_indices(self, indices) -> None:
        self._held = [x[indices] for x in self._held]
        self.keys, self.values = (x[:, :, : self.keys.shape[2]] for x in self._held)


def roomy_cache(n_layers: int, room: int) -> DynamicCache:
    """Return a cache whose layers hold up to `room` tokens a row without growing."""
    cache = DynamicCache()
    cache.layers = [Roomy(room) for _ in range(n_layers)]
    return cache


def _select(cache, which: list[int], room: int):
    """Return a new cache whose rows are copies of the given rows, with room for more tokens."""
    copy = roomy_cache(len(cache.layers), cache.get_seq_length() + room)
    for new, old in zip(copy.layers, cache.layers, strict=True):
        new.update(old.keys[which], old.values[which])
    return copy


def _decode(model, processor, cache, ids, max_new_tokens, skipping) -> list[Answer]:
    """Continue every row greedily until its end of sequence; rows that ended leave the batch."""
    ends = torch.tensor(model.generation_config.eos_token_id).flatten()
    active = torch.arange(len(ids))
    out: list[list[int]] = [[] for _ in ids]
    ended = [False] * len(ids)
    logits = forward(model, ids, cache)
    for step in range(max_new_tokens):
        token = logits.argmax(-1).cpu()
        stop = torch.isin(token, ends)
        for row, chosen, stops in zip(active.tolist(), token.tolist(), stop.tolist(), strict=True):
            ended[row] = stops
            if not stops:
                out[row].append(chosen)
        if stop.all() or step + 1 == max_new_tokens:
            break
        if stop.any():
            keep = ~stop
            cache.batch_select_indices(keep.nonzero()[:, 0])
            active, token, skipping.rows = active[keep], token[keep], skipping.rows[keep]
        logits = forward(model, token[:, None], cache)
    texts = processor.tokenizer.batch_decode(out, skip_special_tokens=True)
    return [Answer(text.strip(), len(ids), end) for text, ids, end in zip(texts, out, ended, strict=True)]


def answer_rows(model, processor, questions: list[dict], label: str, units, config) -> list[dict]:
    """Answer test questions; return each row with method (the label), answer, tokens and ended put in.

    Answers are written to `units` as their batch is done, and those it holds already are not asked again.
    """
    todo = [q for q in questions if f"{label} {q['id']}" not in units]
    for paths in chunks(list(dict.fromkeys(q["path"] for q in todo)), config.batch_rows):
        batch = [q for q in todo if q["path"] in paths]
        said = answer(model, processor, batch, config.max_new_tokens, config.batch_rows, label=f"{label}: answers")
        for q, a in zip(batch, said, strict=True):
            units.add(f"{label} {q['id']}", vars(a))
    rows = []
    for q in questions:
        said = units[f"{label} {q['id']}"]
        rows.append(q | {"method": label, "answer": said["text"], "tokens": said["tokens"], "ended": said["ended"]})
    return rows


def answers_context(model_fingerprint: str, rows: list[dict], max_new_tokens: int) -> str:
    """Return the context of a model's answers: what decides them, but for what their label names."""
    return context(__name__, model_fingerprint, [(r["id"], r["asked"]) for r in rows], max_new_tokens)
