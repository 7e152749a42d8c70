"""What a processor makes of questions, answers and images: prompts, labels, batches for training.

Only answers and their end of sequence carry a label; questions of one conversation may be kept from seeing one another.
"""

from functools import cache, partial

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from medprune.data.pictures import open_image

IGNORED = -100  # label of a token that carries no loss


def prompt_text(processor, question: str) -> str:
    """Return the chat prompt of one question about one image, ending where the answer starts."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([message], add_generation_prompt=True)


def encode(processor, texts: list[str], images: list, dtype) -> dict:
    """Return input_ids (list of 1-D tensors, image tokens expanded) and pixel_values (n, 3, side, side)."""
    batch = processor(text=texts, images=images, return_tensors=None, padding=False)
    return {
        "input_ids": [torch.tensor(ids) for ids in batch["input_ids"]],
        "pixel_values": torch.stack([torch.as_tensor(p) for p in batch["pixel_values"]]).to(dtype),
    }


def image_pixels(processor, path, dtype) -> torch.Tensor:
    """Return the pixels (3, side, side) of an image file, as the vision tower takes them."""
    return encode(processor, [prompt_text(processor, "")], [open_image(path)], dtype)["pixel_values"][0]


def encode_conversation(processor, messages: list[dict]) -> dict:
    """Return input_ids and labels (seq,) of a conversation; only answers and their end of sequence carry a label."""
    text, spans = _text_and_spans(processor, messages)
    tokens = processor.tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor(tokens["input_ids"])
    said = [b > a and any(start <= a and b <= end for start, end in spans) for a, b in tokens["offset_mapping"]]
    return {"input_ids": ids, "labels": ids.where(torch.tensor(said), IGNORED)}


def _text_and_spans(processor, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation's text, image tokens expanded, and where in it each answer with its end starts and ends.

    The text is built of the chat template's own pieces: each prompt as it stands when the answer is generated, then
    the answer, then the end-of-sequence token (which some templates leave out).
    """
    image_token, text, spans = processor.image_token, "", []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = processor.apply_chat_template(messages[:i], add_generation_prompt=True)
        earlier = processor.apply_chat_template(messages[: i - 1]) if i > 1 else ""
        if not prompt.startswith(earlier):
            raise ValueError("the processor's chat template rewrites earlier turns, so answers cannot be told apart.")
        text += prompt[len(earlier) :].replace(image_token, image_token * _image_tokens(processor))
        said = "".join(part["text"] for part in message["content"]) + processor.tokenizer.eos_token
        start, gap = len(text), "" if text.endswith((" ", "\n")) else " "
        text += gap + said
        spans.append((start, len(text)))
        text += "\n" if prompt.endswith("\n") else ""
    return text, spans


def encode_questions(processor, messages: list[dict]) -> dict:
    """Return input_ids, labels and turns (seq,) of a conversation whose questions do not see one another.

    The image stands once, as turn 0; each question and answer, numbered from 1, sees it and itself (`collator` makes
    the mask and the positions), as the test asks them. In a plain conversation only the first answer has to be found
    in the image: the later ones can be told from what was said before.
    """
    opening = next(p for p in messages[0]["content"] if p["type"] == "image")
    alone = []
    for asked, said in zip(messages[::2], messages[1::2], strict=True):
        text = [p for p in asked["content"] if p["type"] == "text"]
        alone.append(encode_conversation(processor, [{"role": "user", "content": [opening, *text]}, said]))
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    start = int((alone[0]["input_ids"] == image_token).nonzero()[-1]) + 1
    lengths = torch.tensor([start, *(len(x["input_ids"]) - start for x in alone)])
    return {
        "input_ids": torch.cat([alone[0]["input_ids"][:start], *(x["input_ids"][start:] for x in alone)]),
        "labels": torch.cat([torch.full((start,), IGNORED), *(x["labels"][start:] for x in alone)]),
        "turns": torch.arange(len(lengths)).repeat_interleave(lengths),
    }


def _image_tokens(processor) -> int:
    """Return how many tokens an image takes in the prompt."""
    side = processor.image_processor.crop_size
    patches = (side["height"] // processor.patch_size) * (side["width"] // processor.patch_size)
    return patches + processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")


class Conversations(Dataset):
    """Encoded conversations; pixels are read when asked for and kept, if they fit, in memory.

    view: a function of an item's number and its picture's path that returns other pixels than the picture's own.
    """

    def __init__(self, processor, items: list[tuple[str, list[dict]]], dtype, keep_pixels, multi_turn, view=None):
        self.processor, self.items, self.view = processor, items, view
        self.encode = encode_conversation if multi_turn else encode_questions
        pixels = partial(image_pixels, processor, dtype=dtype)
        self.pixels = cache(pixels) if keep_pixels else pixels

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        path, messages = self.items[i]
        pixels = self.pixels(path) if self.view is None else self.view(i, path)
        return self.encode(self.processor, messages) | {"pixel_values": pixels}


padded = partial(pad_sequence, batch_first=True)  # 1-D tensors as one (rows, longest), filled up on the right


def collator(pad_token_id: int):
    """Return a collate function that pads on the right and keeps logits only where some row's answer is predicted.

    The batch's `labels` are (batch, kept), aligned with the logits that `logits_to_keep` selects, so the head is
    never run on image tokens or on questions asked at the same place by all rows.
    """

    def collate(rows):
        ids = padded([r["input_ids"] for r in rows], padding_value=pad_token_id)
        targets = padded([r["labels"] for r in rows], padding_value=IGNORED)[:, 1:]  # token t is predicted at t - 1
        kept = (targets != IGNORED).any(0).nonzero()[:, 0]
        batch = {
            "input_ids": ids,
            "attention_mask": padded([torch.ones_like(r["input_ids"]) for r in rows]),
            "labels": targets[:, kept],
            "logits_to_keep": kept,
            "pixel_values": torch.stack([r["pixel_values"] for r in rows]),
        }
        if "turns" in rows[0]:
            batch |= _apart(padded([r["turns"] for r in rows], padding_value=-1), batch["pixel_values"].dtype)
        return batch

    return collate


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
