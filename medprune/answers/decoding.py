"""Batched greedy answers to questions about images.

Prompts of one image share everything up to its last image token: that prefix is run once and its cache copied to
each question. Questions differ in length, so padding that nothing attends to lies between the prefix and a shorter
question, and all rows decode together (questions of one length only, where a window would count the padding). A row's
answer does not depend on its neighbours, but for what a matrix product of another number of rows rounds otherwise.
`RowSkip` lets each row go past a block of its own: the leave-one-out batch of notebook 02.
"""

import math
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from medprune.answers.prompts import Seen, inputs_of, question_ids, see
from medprune.device import rows_that_fit
from medprune.models.families import parts, window
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

    `rows` (batch,) holds the number of each row's block in the model at hand, or -1; set it anew when rows leave the
    batch. Use as a context manager.
    """

    def __init__(self, model, rows: torch.Tensor):
        super().__init__()
        self.rows = rows
        for b in set(rows.tolist()) - {-1}:
            self.enter_context(parts(model).blocks[b].register_forward_hook(partial(self._pass_by, b)))

    def _pass_by(self, block, _, inputs, output):
        skipped = self.rows == block
        if skipped.any():
            return torch.where(skipped[:, None, None].to(output.device), inputs[0].to(output.device), output)


@torch.inference_mode()
def answer(model, processor, rows: list[dict], max_new_tokens: int, batch_rows: int = 128, skip=None, label="answers"):
    """Answer each row {"path", "question"} greedily; return a list of Answer in the order of the rows.

    batch_rows: how many answers, and the (image, block) prefixes that they need, are held in memory at once. skip: for
    each row the block it goes without, or -1.
    """
    skip = torch.tensor(skip if skip is not None else [-1] * len(rows))
    seen = _seen(model, processor, rows)
    alike = defaultdict(lambda: defaultdict(list))  # shape of a prefix -> (prefix, block) -> numbers of its rows
    for i, prefix in enumerate(seen):
        alike[prefix.shape][id(prefix), int(skip[i])].append(i)
    answers: list[Answer | None] = [None] * len(rows)
    with progress(len(rows), label, "answer") as bar:
        for groups in alike.values():
            for chunk in _whole_groups(list(groups.values()), batch_rows):
                for i, said in _answer_chunk(model, processor, rows, chunk, skip, max_new_tokens, batch_rows, seen):
                    answers[i] = said
                    bar.update()
    return answers


def _seen(model, processor, rows: list[dict]) -> list[Seen]:
    """Return what is seen before each row's question, one object for an image; with the question if it is seen too."""
    look = lru_cache(None)(lambda path, question: see(processor, path, model.dtype, question))
    return [look(row["path"], row["question"] if processor.looks_ahead else None) for row in rows]


def _answer_chunk(model, processor, rows, chunk, skip, max_new_tokens: int, batch_rows: int, seen) -> list[tuple]:
    """Return (row number, Answer) of the groups of a chunk; its caches are gone before the next chunk's are made."""
    first = [group[0] for group in chunk]
    prefixes = [seen[i] for i in first]
    cached = _run_prefixes(model, prefixes, skip[first])
    asked, said = _questions(processor, rows, chunk, prefixes), []
    most = cached.length + max(len(ids) for *_, ids in asked) + max_new_tokens
    for batch in _batches(asked, batch_rows, padded=most <= window(model.config)):
        numbers, which, ids = map(list, zip(*batch, strict=True))
        with RowSkip(model, skip[numbers]) as skipping:
            own = _select(cached, which, max(map(len, ids)) + max_new_tokens)
            logits = cached.logits[which] if processor.looks_ahead else None
            found = _decode(model, processor, own, ids, max_new_tokens, skipping, logits)
            said += zip(numbers, found, strict=True)
            own = None  # before the next batch's
    return said


def _whole_groups(groups: list[list[int]], most: int):
    """Yield groups of rows about one image in lists of at most `most` rows, or of one group."""
    held = []
    for group in groups:
        if held and sum(map(len, held)) + len(group) > most:
            yield held
            held = []
        held.append(group)
    if held:
        yield held


def chunks(items: list, size: int):
    """Yield the items in lists of `size`, the last one shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _batches(asked: list[tuple], batch_rows: int, padded: bool):
    """Yield like numbers of questions, at most batch_rows; of one length where a window would count padding."""
    together = [asked] if padded else [list(alike) for _, alike in groupby(asked, key=lambda x: len(x[2]))]
    for questions in together:
        yield from chunks(questions, math.ceil(len(questions) / math.ceil(len(questions) / batch_rows)))


@dataclass
class Prefixes:
    """Caches of prompts up to their last image token: `layers` of keys, values and where in them each row's are.

    length: in tokens. logits (rows, vocab): of the next token. shift (images, 1), or None: how far positions behind the
    prefix lie from counts of tokens, where they have several axes; images (rows,): whose of these is each row's.
    """

    layers: list[tuple]
    length: int
    logits: torch.Tensor
    shift: torch.Tensor | None
    images: torch.Tensor


def _run_prefixes(model, rows: list[Seen], skip: torch.Tensor) -> Prefixes:
    """Run each row's prompt up to its last image token without the block that the row skips.

    An image is seen once. What lies below a skipped block is computed once for an image, its cache entries are shared:
    a row joins the batch after its block, with the hidden states that entered it, and an image's own row leaves when no
    other row needs it. The batch is at most all rows, and only the block at work holds its hidden states. The cache
    entry of a skipped block itself is the image's own, which its row attends to for nothing.
    """
    by_image = {id(row): row for row in rows}
    images = list(by_image.values())
    cache = DynamicCache()  # without a configuration, whose windows would cut the prefix for all that follows it
    places = [torch.tensor([list(by_image).index(id(row)) for row in rows])]  # in the batch that enters a block
    image_of = torch.arange(len(images))  # whose are the rows of that batch
    with ExitStack() as hooks:
        for b, block in enumerate(parts(model).blocks):
            if not torch.equal(image_of, torch.arange(len(images))):
                own = partial(_own_arguments, image_of, len(images))
                hooks.enter_context(block.register_forward_pre_hook(own, with_kwargs=True))
            found, place = (places[-1] + (skip == b) * (places[-1].max() + 1)).unique(return_inverse=True)
            places.append(place)
            image_of = image_of.repeat(2)[found]
            if (skip == b).any():
                hooks.enter_context(block.register_forward_hook(partial(_branch, found)))
        logits = forward(model, torch.stack([image.ids for image in images]), cache, inputs_of(images))[places[-1]]
    layers = [(layer.keys, layer.values, at) for layer, at in zip(cache.layers, places[:-1], strict=True)]
    return Prefixes(layers, len(rows[0].ids), logits, cache.shift, places[0])


def _branch(found: torch.Tensor, _, inputs, output) -> torch.Tensor:
    """Return the rows that go on after a block: of what it put out and, numbered after these, of what entered it."""
    return torch.cat([output, inputs[0].to(output.device)])[found]


def _own_arguments(image_of: torch.Tensor, n: int, _, inputs, arguments):
    """Return a block's arguments with masks and positions of n images, where these differ, as those of its rows."""

    def own(value):
        if isinstance(value, tuple | list):
            return type(value)(own(x) for x in value)
        if n == 1 or not isinstance(value, torch.Tensor) or value.ndim < 2:
            return value
        batch = 1 if value.ndim == 4 and value.shape[1] == n else 0  # (axes, n, seq, width) of positions
        return value.index_select(batch, image_of.to(value.device)) if value.shape[batch] == n else value

    return inputs, {name: own(value) for name, value in arguments.items()}


def _questions(processor, rows: list[dict], groups: list[list[int]], prefixes: list[Seen]) -> list[tuple]:
    """Return (row number, number of its prefix, ids after the prefix), shorter ids first.

    Like questions stand together, so that where they are more than a batch holds, long ones do not pad all batches.
    """
    nothing = torch.zeros(0, dtype=torch.long)
    asked = []
    for p, group in enumerate(groups):
        for i in group:
            ids = nothing if processor.looks_ahead else question_ids(processor, rows[i]["question"], prefixes[p])
            asked.append((i, p, ids))
    return sorted(asked, key=lambda x: len(x[2]))


def forward(model, ids, cache, shown=None, seen=None):
    """Return the logits (batch, vocab) of the last of `ids` (batch, seq), by which the cache grows.

    shown: what the beginning of a prompt takes beside its ids, pixels among it. seen (batch, room): which tokens of the
    cache, and of what will be in it, are no padding; by default all are. The beginning of a prompt puts `shift` (batch,
    1) on the cache, how far later positions lie from counts of tokens, or None.
    """
    extra = {}
    if shown is not None:
        extra = {name: x.to(model.device) for name, x in shown.items()}
    elif seen is not None or cache.shift is not None:
        start, end = cache.get_seq_length(), cache.get_seq_length() + ids.shape[1]
        places = torch.arange(start, end, device=model.device)[None].expand(len(ids), -1)
        if seen is not None:
            places = seen[:, :end].cumsum(1)[:, start:] - 1
            extra["attention_mask"] = seen[:, :end]
        extra["position_ids"] = places if cache.shift is None else places + cache.shift.to(places.device)
    out = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
    if shown is not None:
        cache.shift = getattr(model.base_model, "rope_deltas", None)
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


class RoomyCache(DynamicCache):
    """A cache whose layers hold up to `room` tokens a row without growing, with the `shift` of its rows' positions."""

    def __init__(self, n_layers: int, room: int, shift: torch.Tensor | None = None):
        super().__init__()
        self.layers, self.shift = [Roomy(room) for _ in range(n_layers)], shift

    def batch_select_indices(self, indices) -> None:
        super().batch_select_indices(indices)
        self.shift = None if self.shift is None else self.shift[indices]


def _select(cached: Prefixes, which: list[int], room: int) -> RoomyCache:
    """Return a cache whose rows are copies of the given rows of `_run_prefixes`'s, with room for more tokens."""
    shift = None if cached.shift is None else cached.shift[cached.images[which]]
    copy = RoomyCache(len(cached.layers), cached.length + room, shift)
    for new, (keys, values, places) in zip(copy.layers, cached.layers, strict=True):
        new.update(keys[places[which]], values[places[which]])
    return copy


def _decode(model, processor, cache, ids: list[torch.Tensor], max_new_tokens, skipping, logits=None) -> list[Answer]:
    """Continue every row greedily until its end of sequence; `logits` of its first token, where `ids` are empty.

    Rows that ended say nothing more, and leave when they are a quarter of the batch: that copies the cache.
    """
    ends = torch.tensor(model.generation_config.eos_token_id).flatten()
    active = torch.arange(len(ids))
    out: list[list[int]] = [[] for _ in ids]
    ended = [False] * len(ids)
    token, seen = _pad(ids, cache.get_seq_length(), max_new_tokens, model.device)
    for step in range(max_new_tokens):
        if step or logits is None:
            logits = forward(model, token, cache, seen=seen)
        token = logits.argmax(-1, keepdim=True).cpu()
        stop = torch.isin(token[:, 0], ends)
        for row, chosen, stops in zip(active.tolist(), token[:, 0].tolist(), stop.tolist(), strict=True):
            ended[row] |= stops
            if not ended[row]:
                out[row].append(chosen)
        gone = torch.tensor(ended)[active]
        if gone.all():
            break
        if step + 1 < max_new_tokens and 4 * gone.sum() >= len(gone):
            keep = (~gone).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            active, token, skipping.rows = active[keep], token[keep], skipping.rows[keep]
            seen = seen if seen is None else seen[keep]
    texts = processor.tokenizer.batch_decode(out, skip_special_tokens=True)
    return [Answer(text.strip(), len(ids), end) for text, ids, end in zip(texts, out, ended, strict=True)]


@torch.inference_mode()
def next_logits(model, processor, row: dict, block: int = -1) -> torch.Tensor:
    """Return the logits (vocab,) of an answer's first token as `answer` finds them, a block skipped unless it is -1."""
    skip, (seen,) = torch.tensor([block]), _seen(model, processor, [row])
    cached = _run_prefixes(model, [seen], skip)
    if processor.looks_ahead:
        return cached.logits[0]
    ((*_, ids),) = _questions(processor, [row], [[0]], [seen])
    with RowSkip(model, skip):
        return forward(model, ids[None], _select(cached, [0], len(ids)))[0]


@torch.inference_mode()
def plain_logits(model, processor, row: dict) -> torch.Tensor:
    """Return the logits (vocab,) of an answer's first token by the model's own forward pass over the whole prompt."""
    seen = see(processor, row["path"], model.dtype, row["question"])
    inputs = {name: x.to(model.device) for name, x in inputs_of([seen]).items()}
    return model(input_ids=seen.ids[None].to(model.device), **inputs, use_cache=False, logits_to_keep=1).logits[0, -1]


def _pad(ids: list[torch.Tensor], prefix: int, room: int, device):
    """Return ids (rows, longest), padded on the left, and what is `seen` of them, the prefix and the room after them.

    seen is None where nothing is padded. Padding is a token of the question's own, for which the model's numbers are
    as finite as for the rest: attention multiplies them by 0.
    """
    lengths = torch.tensor([len(x) for x in ids])
    longest = int(lengths.max())
    padded = torch.stack([torch.cat([x[:1].expand(longest - len(x)), x]) for x in ids])
    seen = torch.ones(len(ids), prefix + longest + room, dtype=torch.bool)
    seen[:, prefix : prefix + longest] = torch.arange(longest) >= longest - lengths[:, None]
    return padded, None if seen.all() else seen.to(device)


def answer_rows(model, processor, questions: list[dict], label: str, units, config) -> list[dict]:
    """Answer test questions; return each row with method (the label), answer, tokens and ended put in.

    Answers are written to `units` as their batch is done, and those it holds already are not asked again.
    """
    todo = [q for q in questions if f"{label} {q['id']}" not in units]
    for paths in chunks(list(dict.fromkeys(q["path"] for q in todo)), config.batch_rows):
        batch = [q for q in todo if q["path"] in paths]
        ask = partial(answer, model, processor, batch, config.max_new_tokens, label=f"{label}: answers")
        said = rows_that_fit(lambda rows, ask=ask: ask(batch_rows=rows), config.batch_rows, "answers", units)
        units.add_all({f"{label} {q['id']}": vars(a) for q, a in zip(batch, said, strict=True)})
    rows = []
    for q in questions:
        said = units[f"{label} {q['id']}"]
        rows.append(q | {"method": label, "answer": said["text"], "tokens": said["tokens"], "ended": said["ended"]})
    return rows


def answers_context(model_fingerprint: str, rows: list[dict], max_new_tokens: int) -> str:
    """Return the context of a model's answers: what decides them, but for what their label names."""
    return context(__name__, model_fingerprint, [(r["id"], r["asked"]) for r in rows], max_new_tokens)
