"""What a processor makes of questions, answers and images: prompts, labels, batches for training.

Only answers and their end of sequence carry a label; questions of one conversation may be kept from seeing one another.
"""

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from medprune.data.pictures import open_image

IGNORED = -100  # label of a token that carries no loss


def prompt_text(processor, question: str) -> str:
    """Return the chat prompt of one question about one image, ending where the answer starts."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([message], add_generation_prompt=True)


@dataclass(frozen=True)
class Seen:
    """What a processor makes of a prompt up to its last image token, or of a whole prompt.

    image: its file. text: what stands there for the image. ids (tokens,). kinds: what else the model takes for each of
    these tokens, by name, (tokens,). inputs: what it takes of the image, a row of each.
    """

    image: str
    text: str
    ids: torch.Tensor
    kinds: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]

    @property
    def shape(self) -> tuple:
        """What must be alike for prompts to run together: counts of tokens, and shapes of a row's inputs."""
        return len(self.ids), tuple((name, tuple(x.shape[1:])) for name, x in self.inputs.items())


def see(processor, image, dtype=None, question: str | None = None) -> Seen:
    """Return what a processor makes of an image (file or picture) before any question, or with one, of all.

    Floating inputs are given in `dtype`, if one is named. What a model takes beside ids and pixels is carried whole.
    """
    text = prompt_text(processor, question or "")
    options = {"return_tensors": "pt", "return_text_replacement_offsets": True, **_begun(processor, text)}
    picture = open_image(image) if isinstance(image, str | Path) else image
    batch = dict(processor(text=[text], images=[[picture]], **options))
    replaced, ids = batch.pop("text_replacement_offsets"), batch.pop("input_ids")
    batch.pop("attention_mask", None), batch.pop("labels", None)
    marks = torch.isin(ids[0], torch.tensor(processor.image_token_ids))
    n = int(marks.nonzero()[-1]) + 1 if question is None else len(marks)
    kinds = {name: batch.pop(name)[0, :n] for name, x in list(batch.items()) if x.shape == ids.shape}
    inputs = {name: x.to(dtype) if dtype and x.is_floating_point() else x for name, x in batch.items()}
    return Seen(image, replaced[0][0]["replacement"], ids[0, :n], kinds, inputs)


def _begun(processor, text: str) -> dict:
    """Return what keeps a tokenizer from putting a beginning of sequence before a text that has its own."""
    mark = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if mark and text.startswith(mark) else {}


def inputs_of(seen: list[Seen]) -> dict[str, torch.Tensor]:
    """Return what a model takes of prompts of one shape beside their ids, a row each."""
    kinds = {name: torch.stack([s.kinds[name] for s in seen]) for name in seen[0].kinds}
    return kinds | {name: torch.cat([s.inputs[name] for s in seen]) for name in seen[0].inputs}


def rows_of(batch: dict, start: int, stop: int) -> dict:
    """Return some rows of a processor batch, of which an input may have several lines a row."""
    n = len(batch["input_ids"])
    return {name: x[start * len(x) // n : min(stop, n) * len(x) // n] for name, x in batch.items()}


def image_pixels(processor, path, dtype) -> torch.Tensor:
    """Return the pixels (3, side, side) of an image file, as the vision tower takes them."""
    return see(processor, path, dtype).inputs["pixel_values"][0]


def question_ids(processor, question: str, seen: Seen) -> torch.Tensor:
    """Return the ids of a prompt behind what was `seen` of its image; ValueError where that does not come first."""
    text = prompt_text(processor, question)
    options = _begun(processor, text)
    ids = torch.tensor(processor.tokenizer(text.replace(processor.image_token, seen.text), **options)["input_ids"])
    if not torch.equal(ids[: len(seen.ids)], seen.ids):
        raise ValueError("the chat template puts the question before the image, so that questions cannot share it.")
    return ids[len(seen.ids) :]


def encode_conversation(processor, messages: list[dict], seen: Seen) -> dict:
    """Return input_ids and labels (seq,), and kinds of tokens, of a conversation about an image that was `seen`.

    Only answers and their ends carry a label.
    """
    text, spans = _text_and_spans(processor, messages)
    before, options = 0, {**_begun(processor, text), "return_offsets_mapping": True}
    if processor.looks_ahead:  # the prompt is what its processor makes of it, and what follows is seen from behind
        question = "".join(part["text"] for part in messages[0]["content"] if part["type"] == "text")
        seen = see(processor, seen.image, question=question)
        before = len(prompt_text(processor, question))
        options["add_special_tokens"], text = False, text[before:]
    else:
        text, before = text.replace(processor.image_token, seen.text), len(processor.image_token) - len(seen.text)
    tokens = processor.tokenizer(text, **options)
    ids = torch.tensor(tokens["input_ids"])
    spans = [(start - before, end - before) for start, end in spans]
    said = [b > a and any(start <= a and b <= end for start, end in spans) for a, b in tokens["offset_mapping"]]
    labels = ids.where(torch.tensor(said), IGNORED)
    if processor.looks_ahead:
        ids, labels = torch.cat([seen.ids, ids]), torch.cat([torch.full_like(seen.ids, IGNORED), labels])
    behind = torch.full((len(ids) - len(seen.ids),), int(processor.looks_ahead))
    kinds = {name: torch.cat([kind, behind.to(kind.dtype)]) for name, kind in seen.kinds.items()}
    return {"input_ids": ids, "labels": labels, "kinds": kinds}


def _text_and_spans(processor, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation's text and where in it each answer with its end starts and ends.

    The text is built of the chat template's own pieces: each prompt as it stands when the answer is generated, then
    the answer, then the mark that ends a turn (which some templates leave out).
    """
    text, spans = "", []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = processor.apply_chat_template(messages[:i], add_generation_prompt=True)
        earlier = processor.apply_chat_template(messages[: i - 1]) if i > 1 else ""
        if not prompt.startswith(earlier):
            raise ValueError("the processor's chat template rewrites earlier turns, so answers cannot be told apart.")
        text += prompt[len(earlier) :]
        said = "".join(part["text"] for part in message["content"]) + processor.turn_end
        start, gap = len(text), "" if text.endswith((" ", "\n")) else " "
        text += gap + said
        spans.append((start, len(text)))
        text += "\n" if prompt.endswith("\n") else ""
    return text, spans


def encode_questions(processor, messages: list[dict], seen: Seen) -> list[dict]:
    """Return input_ids, labels and turns (seq,) of a conversation whose questions do not see one another.

    The image stands once, as turn 0; each question and answer, numbered from 1, sees it and itself (`collator` makes
    the mask and the positions), as the test asks them. In a plain conversation only the first answer has to be found
    in the image: the later ones can be told from what was said before. Where the processor's model cannot keep
    questions apart in one sequence (`families.packs`), there is a row for each.
    """
    opening = next(p for p in messages[0]["content"] if p["type"] == "image")
    alone, start = [], len(seen.ids)
    for asked, said in zip(messages[::2], messages[1::2], strict=True):
        text = [p for p in asked["content"] if p["type"] == "text"]
        alone.append(encode_conversation(processor, [{"role": "user", "content": [opening, *text]}, said], seen))
    if not processor.packs:
        for turn, row in enumerate(alone, 1):
            row["turns"] = torch.full_like(row["input_ids"], turn)
            row["turns"][:start] = 0
        return alone
    lengths = torch.tensor([start, *(len(x["input_ids"]) - start for x in alone)])
    packed = {
        "input_ids": torch.cat([alone[0]["input_ids"][:start], *(x["input_ids"][start:] for x in alone)]),
        "labels": torch.cat([torch.full((start,), IGNORED), *(x["labels"][start:] for x in alone)]),
        "turns": torch.arange(len(lengths)).repeat_interleave(lengths),
    }
    return [packed | {"kinds": {}}]


class Conversations(Dataset):
    """Encoded conversations, a list of rows each; images are seen when asked for and kept, if they fit, in memory.

    view: a function of an item's number and its picture's path that returns other pixels than the picture's own.
    """

    def __init__(self, processor, items: list[tuple[str, list[dict]]], dtype, keep_pixels, multi_turn, view=None):
        self.processor, self.items, self.multi_turn, self.view = processor, items, multi_turn, view
        look = partial(see, processor, dtype=dtype)
        self.see = cache(look) if keep_pixels else look

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        path, messages = self.items[i]
        seen = self.see(path)
        shown = seen.inputs if self.view is None else seen.inputs | {"pixel_values": self.view(i, path)[None]}
        packed = self.processor.packs and not self.multi_turn
        encode = encode_conversation if self.multi_turn else encode_questions
        rows = encode(self.processor, messages, seen)
        rows = [rows] if self.multi_turn else rows
        return [{k: v for k, v in row.items() if packed or k != "turns"} | {"seen": shown} for row in rows]


padded = partial(pad_sequence, batch_first=True)  # 1-D tensors as one (rows, longest), filled up on the right


def collator(pad_token_id: int):
    """Return a collate function that pads on the right and keeps logits only where some row's answer is predicted.

    The batch's `labels` are (batch, kept), aligned with the logits that `logits_to_keep` selects, so the head is
    never run on image tokens or on questions asked at the same place by all rows.
    """

    def collate(items):
        rows = [row for item in items for row in item]
        ids = padded([r["input_ids"] for r in rows], padding_value=pad_token_id)
        targets = padded([r["labels"] for r in rows], padding_value=IGNORED)[:, 1:]  # token t is predicted at t - 1
        kept = (targets != IGNORED).any(0).nonzero()[:, 0]
        batch = {
            "input_ids": ids,
            "attention_mask": padded([torch.ones_like(r["input_ids"]) for r in rows]),
            "labels": targets[:, kept],
            "logits_to_keep": kept,
        }
        batch |= {name: padded([r["kinds"][name] for r in rows]) for name in rows[0]["kinds"]}
        batch |= {name: _joined([r["seen"][name] for r in rows]) for name in rows[0]["seen"]}
        if "turns" in rows[0]:
            batch |= _apart(padded([r["turns"] for r in rows], padding_value=-1), batch["pixel_values"].dtype)
        return batch

    return collate


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    """Return tensors one after the other along the first axis, filled up with zeros along the others."""
    sizes = [max(x.shape[d] for x in rows) for d in range(1, rows[0].ndim)]
    out = rows[0].new_zeros(sum(len(x) for x in rows), *sizes)
    for x, place in zip(rows, out.split([len(x) for x in rows]), strict=True):
        place[(slice(None), *(slice(n) for n in x.shape[1:]))] = x
    return out


def _apart(turns: torch.Tensor, dtype) -> dict:
    """Return the attention mask (batch, 1, seq, seq), added to scores, and position_ids (batch, seq) of `turns`."""
    n = turns.shape[1]
    seen = (turns[:, None] == 0) | (turns[:, None] == turns[:, :, None])
    seen &= torch.ones(n, n, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    image = (turns == 0).sum(1, keepdim=True)
    first = (turns[:, :, None] == turns[:, None]).int().argmax(-1)  # where each turn starts
    place = torch.arange(n) - first + torch.where(turns == 0, 0, image)
    return {"attention_mask": mask[:, None], "position_ids": place}
