"""LoRA / QLoRA fine-tuning on the transformers Trainer, resumed after a kill, and merging; used by 01 and 04.

The paper: QLoRA with r 16 and alpha 8 on multi-turn conversations about an image. Loss falls on the answers and
their end of sequence only. The projector is trained along, as an assembled base's starts at random.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from medprune.artifacts import write_folder
from medprune.data import open_image
from medprune.generate import encode, prompt_text
from medprune.model import parts

IGNORED = -100  # label of a token that carries no loss
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def encode_conversation(processor, messages: list[dict]) -> dict:
    """Return input_ids and labels (seq,) of a conversation; only answers and their end of sequence carry a label.

    The text is built of the chat template's own pieces: each prompt as it stands when the answer is generated, then
    the answer, then the end-of-sequence token (which some templates leave out).
    """
    eos = processor.tokenizer.eos_token
    text, spans = "", []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = processor.apply_chat_template(messages[:i], add_generation_prompt=True)
        said = "".join(part["text"] for part in message["content"])
        earlier = processor.apply_chat_template(messages[: i - 1]) if i > 1 else ""
        if not prompt.startswith(earlier):
            raise ValueError("the processor's chat template rewrites earlier turns, so answers cannot be told apart.")
        text += prompt[len(earlier) :]
        gap = "" if text.endswith((" ", "\n")) else " "
        spans.append((len(text), len(text) + len(gap + said + eos)))
        text += gap + said + eos + ("\n" if "\n" in prompt[-1:] else "")
    if not spans:
        raise ValueError("a conversation without an answer carries no loss: give at least one assistant turn.")
    n_images = _image_tokens(processor)
    shift = len(processor.image_token) * (n_images - 1)
    at = text.index(processor.image_token)
    text = text.replace(processor.image_token, processor.image_token * n_images)
    spans = [(a + shift, b + shift) if a > at else (a, b) for a, b in spans]
    tokens = processor.tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor(tokens["input_ids"])
    labels = torch.full_like(ids, IGNORED)
    for k, (a, b) in enumerate(tokens["offset_mapping"]):
        if b > a and any(start <= a and b <= end for start, end in spans):
            labels[k] = ids[k]
    return {"input_ids": ids, "labels": labels}


def _image_tokens(processor) -> int:
    """Return how many tokens an image takes in the prompt."""
    side = processor.image_processor.crop_size
    patches = (side["height"] // processor.patch_size) * (side["width"] // processor.patch_size)
    return patches + processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")


class Conversations(Dataset):
    """Encoded conversations; pixels are read when asked for and kept, if they fit, in memory."""

    def __init__(self, processor, items: list[tuple[str, list[dict]]], dtype, keep_pixels: bool):
        self.processor, self.items, self.dtype = processor, items, dtype
        self.pixels = {} if keep_pixels else None

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        path, messages = self.items[i]
        return encode_conversation(self.processor, messages) | {"pixel_values": self._pixels(path)}

    def _pixels(self, path):
        if self.pixels is not None and path in self.pixels:
            return self.pixels[path]
        pixels = encode(self.processor, [prompt_text(self.processor, "")], [open_image(path)], self.dtype)["pixel_values"][0]
        if self.pixels is not None:
            self.pixels[path] = pixels
        return pixels


def collator(pad_token_id: int):
    """Return a collate function that pads on the right and keeps logits only where some row's answer is predicted.

    The batch's `labels` are (batch, kept), aligned with the logits that `logits_to_keep` selects, so the head is
    never run on image tokens or on questions asked at the same place by all rows.
    """

    def collate(rows):
        n = max(len(r["input_ids"]) for r in rows)
        ids = torch.stack([F.pad(r["input_ids"], (0, n - len(r["input_ids"])), value=pad_token_id) for r in rows])
        labels = torch.stack([F.pad(r["labels"], (0, n - len(r["labels"])), value=IGNORED) for r in rows])
        mask = torch.stack([torch.arange(n) < len(r["input_ids"]) for r in rows]).long()
        targets = labels[:, 1:]  # token t is predicted at t - 1
        kept = (targets != IGNORED).any(0).nonzero()[:, 0]
        return {"input_ids": ids, "attention_mask": mask, "labels": targets[:, kept], "logits_to_keep": kept,
                "pixel_values": torch.stack([r["pixel_values"] for r in rows])}  # fmt: skip

    return collate


def answer_loss(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    """Return the mean cross-entropy (nats a token) over answer tokens; logits (batch, kept, vocab)."""
    chosen = labels != IGNORED
    loss = F.cross_entropy(outputs.logits[chosen].float(), labels[chosen], reduction="sum")
    return loss / (num_items_in_batch if num_items_in_batch is not None else chosen.sum())


def add_lora(model, r: int, alpha: int) -> PeftModel:
    """Wrap a model in LoRA on every linear of the language model's blocks, with the projector trained in full."""
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model)
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=LORA_TARGETS, modules_to_save=["multi_modal_projector"])
    # On a GPU the adapters train in float32 under autocast; on CPU everything stays in the model's bfloat16.
    on_gpu = next(model.parameters()).device.type == "cuda"
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=on_gpu)
    # The Trainer resumes through load_adapter, whose default would go on in float32 and end elsewhere.
    wrapped.load_adapter = partial(wrapped.load_adapter, autocast_adapter_dtype=on_gpu)
    return wrapped


def train(model, processor, items, folder: Path, config, steps: int, callbacks=()) -> list[dict]:
    """Fine-tune with LoRA on (image path, messages) items for `steps` optimizer steps; return the loss curve.

    Checkpoints go to `folder` every config.save_every steps, and a killed run goes on from the last one to the same
    end. `model` is left wrapped: hand it to `merge`. Pure bf16 without autocast on CPU, where that is fastest.
    """
    cuda = next(model.parameters()).device.type == "cuda"
    dataset = Conversations(processor, items, model_dtype(model), keep_pixels=len(items) <= 4096 and not cuda)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate, lr_scheduler_type="linear", warmup_steps=max(1, steps // 20),
        max_grad_norm=1.0, optim="adamw_torch", save_steps=config.save_every, save_total_limit=1, logging_steps=1,
        report_to=[], remove_unused_columns=False, label_names=["labels"], seed=config.seed, data_seed=config.seed,
        use_cpu=not cuda, fp16=cuda and model_dtype(model) == torch.float16,
        bf16=cuda and model_dtype(model) == torch.bfloat16, gradient_checkpointing=cuda, disable_tqdm=False,
        gradient_checkpointing_kwargs={"use_reentrant": False} if cuda else None, dataloader_pin_memory=cuda,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=dataset, data_collator=collator(processor.tokenizer.pad_token_id),
        compute_loss_func=answer_loss, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if Path(folder).exists() else None)
    return [{"step": x["step"], "loss": x["loss"]} for x in trainer.state.log_history if "loss" in x]


def model_dtype(model) -> torch.dtype:
    """Return the floating dtype a model computes in (that of its norms, which quantization leaves alone)."""
    return next(p.dtype for n, p in model.named_parameters() if "norm" in n)


def merge(model: PeftModel):
    """Return the plain LLaVA with the adapters folded in; raises ValueError if any adapter is left."""
    merged = model.merge_and_unload()
    left = [n for n, _ in merged.named_parameters() if re.search(r"lora_|modules_to_save|original_module", n)]
    if left:
        raise ValueError(f"merging left adapters behind: {', '.join(left[:3])}.")
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    return merged.eval()


def save(model, processor, folder: Path) -> None:
    """Write a folder that plain transformers loads, whole or not at all."""
    with write_folder(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


def train_vision_tower(model, processor, records, conditions, steps: int, seed: int = 0, batch: int = 32) -> list[dict]:
    """Train an assembled base's vision tower as a classifier of the training images; return loss and accuracy.

    A small CLIP-architecture tower starts at random; mean patch features and a linear head, thrown away afterwards,
    teach it what there is to see. AdamW, rate 5e-4 with a cosine fall, mirrored and rotated images.
    """
    tower = parts(model).vision_tower.float().train()
    names = sorted(conditions)
    labels = torch.tensor([names.index(r.condition) for r in records])
    pixels = torch.stack([encode(processor, [prompt_text(processor, "")], [open_image(r.path)], torch.float32)
                          ["pixel_values"][0] for r in records])  # fmt: skip
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    head = nn.Linear(tower.config.hidden_size, len(names))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=5e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    curve = []
    for step in range(steps):
        chosen = torch.from_numpy(draw.choice(len(records), min(batch, len(records)), replace=False))
        x = pixels[chosen]
        x = torch.rot90(x.flip(-1) if step % 2 else x, int(draw.integers(4)), (-2, -1))
        logits = head(tower(pixel_values=x).last_hidden_state[:, 1:].mean(1))
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        accuracy = (logits.argmax(-1) == labels[chosen]).float().mean()
        curve.append({"step": step + 1, "loss": loss.item(), "accuracy": accuracy.item()})
    tower.to(model.dtype).eval()
    return curve


class LossCallback(TrainerCallback):
    """Hand every logged loss to a function: a live curve in a notebook, a line in a log."""

    def __init__(self, show):
        self.show = show

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            self.show(state.global_step, logs["loss"])
