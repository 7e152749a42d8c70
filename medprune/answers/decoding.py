"""Batched greedy answers to questions about images; milliseconds per token; peak memory.

Prompts of one image share everything up to its last image token: that prefix is run once and its cache copied to
each question. Rows of one batch have prompts of one length, so nothing is padded and a row's answer does not depend
on its neighbours. `RowSkip` lets each row go past a block of its own: the leave-one-out batch of notebook 02.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from medprune.answers.prompts import encode, prompt_text
from medprune.data.pictures import open_image
from medprune.models.families import parts
from medprune.progress import progress
from medprune.settings import Profile
from medprune.store import fingerprint


@dataclass(frozen=True)
class Answer:
    """What a model said: text, its length in tokens, and whether it reached the end of sequence."""

    text: str
    tokens: int
    ended: bool


class RowSkip:
    """Let each row of a batch pass one block unchanged: h_out = where(row skips block, h_in, h_out).

    `skips` names the blocks that any row may skip (indices into the model at hand); set `rows` to one block number,
    or -1, per row before each forward pass. Use as a context manager.
    """

    def __init__(self, model, skips):
        self.blocks = parts(model).blocks
        self.skips = sorted({b for b in skips if b >= 0})
        self.rows = None

    def __enter__(self):
        self._handles = [self.blocks[b].register_forward_hook(self._hook(b)) for b in self.skips]
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()

    def _hook(self, block):
        def pass_by(_, inputs, output):
            skipped = self.rows == block
            if skipped.any():
                return torch.where(skipped[:, None, None].to(output.device), inputs[0], output)

        return pass_by


@torch.inference_mode()
def answer(model, processor, rows: list[dict], max_new_tokens: int, batch_rows: int = 128, skip=None, label="answers"):
    """Answer each row {"path" (or "image"), "question"} greedily; return a list of Answer in the order of the rows.

    batch_rows: how many (image, block) prefixes, and how many answers, are held in memory at once. skip: for each
    row the block it goes without, or -1.
    """
    if not rows:
        return []
    skip = list(skip) if skip is not None else [-1] * len(rows)
    prefixes = defaultdict(list)  # (image, block) -> its rows
    for i, row in enumerate(rows):
        prefixes[row.get("path") or id(row["image"]), skip[i]].append(i)
    keys = list(prefixes)
    answers: list[Answer | None] = [None] * len(rows)
    with RowSkip(model, skip) as skipping, progress(len(rows), label, "answer") as bar:
        for start in range(0, len(keys), batch_rows):
            chunk = keys[start : start + batch_rows]
            for i, done in _answer_chunk(
                model, processor, rows, [prefixes[k] for k in chunk], max_new_tokens, batch_rows, skip, skipping
            ):
                answers[i] = done
                bar.update()
    return answers


def _answer_chunk(model, processor, rows, row_groups, max_new_tokens, batch_rows, skip, skipping):
    """Yield (row number, Answer) for the rows of some prefixes, given as one list of row numbers per prefix."""
    image_token = model.config.image_token_id
    first = [group[0] for group in row_groups]
    images = [rows[i]["image"] if "image" in rows[i] else open_image(rows[i]["path"]) for i in first]
    texts = [prompt_text(processor, rows[i]["question"]) for i in first]
    batch = encode(processor, texts, images, model.dtype)
    heads = [ids[: int((ids == image_token).nonzero()[-1]) + 1] for ids in batch["input_ids"]]
    if len({len(h) for h in heads}) > 1:
        raise ValueError("prompts differ in length before the question: give one chat template and one image size.")
    n_prefix = len(heads[0])
    skipping.rows = torch.tensor([skip[i] for i in first])
    cache = _forward(model, torch.stack(heads), DynamicCache(config=model.config.text_config), batch["pixel_values"])[1]

    by_length = defaultdict(list)  # length of the question part -> (row number, its prefix, its ids)
    for p, group in enumerate(row_groups):
        expanded = batch["input_ids"][p][:n_prefix]
        for i in group:
            ids = _question_ids(processor, rows[i]["question"], expanded, image_token)
            by_length[len(ids)].append((i, p, ids))
    for items in by_length.values():
        for start in range(0, len(items), batch_rows):
            part = items[start : start + batch_rows]
            numbers, which, ids = zip(*part, strict=True)
            skipping.rows = torch.tensor([skip[i] for i in numbers])
            own = _select(cache, which, len(ids[0]) + max_new_tokens)
            done = _decode(model, processor, own, torch.stack(ids), max_new_tokens, skipping)
            yield from zip(numbers, done, strict=True)


def _question_ids(processor, question, prefix, image_token):
    """Return the ids that follow the image in the prompt of `question`."""
    text = prompt_text(processor, question)
    text = text.replace(processor.image_token, processor.image_token * int((prefix == image_token).sum()))
    return torch.tensor(processor.tokenizer(text)["input_ids"])[len(prefix) :]


def _forward(model, ids, cache, pixel_values=None):
    extra = {} if pixel_values is None else {"pixel_values": pixel_values.to(model.device)}
    out = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
    return out.logits[:, -1], cache


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


def _select(cache, which, room: int):
    """Return a new cache whose rows are copies of the given rows, with room for more tokens."""
    index = torch.tensor(which)
    copy = roomy_cache(len(cache.layers), cache.get_seq_length() + room)
    for new, old in zip(copy.layers, cache.layers, strict=True):
        new.update(old.keys[index.to(old.keys.device)], old.values[index.to(old.values.device)])
    return copy


def _decode(model, processor, cache, ids, max_new_tokens, skipping) -> list[Answer]:
    """Continue every row greedily until its end of sequence; rows that ended leave the batch."""
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [ends])
    active = torch.arange(len(ids))
    out = [[] for _ in ids]
    ended = [False] * len(ids)
    logits, cache = _forward(model, ids, cache)
    for step in range(max_new_tokens):
        token = logits.argmax(-1).cpu()
        stop = torch.isin(token, ends)
        for row, t, s in zip(active.tolist(), token.tolist(), stop.tolist(), strict=True):
            if s:
                ended[row] = True
            else:
                out[row].append(t)
        if stop.all() or step + 1 == max_new_tokens:
            break
        if stop.any():
            keep = ~stop
            cache.batch_select_indices(keep.nonzero()[:, 0].to(model.device))
            active, token, skipping.rows = active[keep], token[keep], skipping.rows[keep]
        logits, cache = _forward(model, token[:, None], cache)
    texts = processor.tokenizer.batch_decode(out, skip_special_tokens=True)
    return [Answer(text.strip(), len(t), e) for text, t, e in zip(texts, out, ended, strict=True)]


def answer_rows(model, processor, questions: list[dict], label: str, units, config) -> list[dict]:
    """Answer test questions; return each row with method (the label), answer, tokens and ended put in.

    Answers are written to `units` as their batch is done, and those it holds already are not asked again.
    """
    todo = [q for q in questions if f"{label} {q['id']}" not in units]
    paths = list(dict.fromkeys(q["path"] for q in todo))
    for start in range(0, len(paths), config.batch_rows):
        chosen = set(paths[start : start + config.batch_rows])
        batch = [q for q in todo if q["path"] in chosen]
        said = answer(model, processor, batch, config.max_new_tokens, config.batch_rows, label=f"{label}: answers")
        for q, a in zip(batch, said, strict=True):
            units.add(f"{label} {q['id']}", vars(a))
    rows = []
    for q in questions:
        a = units[f"{label} {q['id']}"]
        rows.append(q | {"method": label, "answer": a["text"], "tokens": a["tokens"], "ended": a["ended"]})
    return rows


def answers_context(config: Profile, model_fingerprint: str, questions: list[dict]) -> str:
    """Return the context of a model's answers: everything that decides them but the label's own changes."""
    asked = [(q["id"], q["question"], q["path"]) for q in questions]
    return fingerprint(model_fingerprint, asked, config.max_new_tokens)
