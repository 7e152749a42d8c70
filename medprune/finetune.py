"""LoRA / QLoRA fine-tuning on the transformers Trainer, resumed after a kill, and merging; used by 01 and 04.

The paper: QLoRA with r 16 and alpha 8 on multi-turn conversations about an image. Loss falls on the answers and
their end of sequence only. The projector is trained along, as an assembled base's starts at random.
"""

import copy
import re
from functools import partial
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from medprune.artifacts import write_folder
from medprune.config import TARGETS
from medprune.data import open_image
from medprune.generate import encode, prompt_text
from medprune.model import parts
from medprune.progress import progress

IGNORED = -100  # label of a token that carries no loss


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


def encode_questions(processor, messages: list[dict]) -> dict:
    """Return input_ids, labels and turns (seq,) of a conversation whose questions do not see one another.

    The image stands once, as turn 0; each question and answer, numbered from 1, sees it and itself (`collator` makes
    the mask and the positions), as the test asks them. In a plain conversation only the first answer has to be found
    in the image: the later ones can be told from what was said before.
    """
    opening = next(p for p in messages[0]["content"] if p["type"] == "image")
    parts_of, image_token = [], processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    for asked, said in zip(messages[::2], messages[1::2], strict=True):
        text = [p for p in asked["content"] if p["type"] == "text"]
        parts_of.append(encode_conversation(processor, [{"role": "user", "content": [opening, *text]}, said]))
    start = int((parts_of[0]["input_ids"] == image_token).nonzero()[-1]) + 1
    pieces = {k: [x[k][start:] for x in parts_of] for k in ("input_ids", "labels")}
    turns = [torch.full((len(x),), k) for k, x in enumerate(pieces["labels"], 1)]
    return {
        "input_ids": torch.cat([parts_of[0]["input_ids"][:start], *pieces["input_ids"]]),
        "labels": torch.cat([torch.full((start,), IGNORED), *pieces["labels"]]),
        "turns": torch.cat([torch.zeros(start, dtype=torch.long), *turns]),
    }


def _image_tokens(processor) -> int:
    """Return how many tokens an image takes in the prompt."""
    side = processor.image_processor.crop_size
    patches = (side["height"] // processor.patch_size) * (side["width"] // processor.patch_size)
    return patches + processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")


class Conversations(Dataset):
    """Encoded conversations; pixels are read when asked for and kept, if they fit, in memory."""

    def __init__(self, processor, items: list[tuple[str, list[dict]]], dtype, keep_pixels: bool, multi_turn: bool):
        self.processor, self.items, self.dtype = processor, items, dtype
        self.encode = encode_conversation if multi_turn else encode_questions
        self.pixels = {} if keep_pixels else None

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        path, messages = self.items[i]
        return self.encode(self.processor, messages) | {"pixel_values": self._pixels(path)}

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
        batch = {"input_ids": ids, "attention_mask": mask, "labels": targets[:, kept], "logits_to_keep": kept,
                 "pixel_values": torch.stack([r["pixel_values"] for r in rows])}  # fmt: skip
        if "turns" in rows[0]:
            turns = torch.stack([F.pad(r["turns"], (0, n - len(r["turns"])), value=-1) for r in rows])
            batch |= _apart(turns, batch["pixel_values"].dtype)
        return batch

    return collate


def _apart(turns: torch.Tensor, dtype) -> dict:
    """Return the attention mask (batch, 1, seq, seq), added to scores, and position_ids (batch, seq) of `turns`."""
    n = turns.shape[1]
    seen = (turns[:, None] == 0) | (turns[:, None] == turns[:, :, None])
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~(seen & torch.ones(n, n).tril().bool()), torch.finfo(dtype).min)
    image = (turns == 0).sum(1, keepdim=True)
    first = (turns[:, :, None] == turns[:, None]).int().argmax(-1)  # where each turn starts
    place = torch.arange(n) - first + torch.where(turns == 0, 0, image)
    return {"attention_mask": mask[:, None], "position_ids": place}


def answer_loss(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    """Return the mean cross-entropy (nats a token) over answer tokens; logits (batch, kept, vocab)."""
    chosen = labels != IGNORED
    loss = F.cross_entropy(outputs.logits[chosen].float(), labels[chosen], reduction="sum")
    return loss / (num_items_in_batch if num_items_in_batch is not None else chosen.sum())


def add_lora(model, r: int, alpha: int, targets=TARGETS) -> PeftModel:
    """Wrap a model in LoRA on linears of the language model's blocks, all by default, the projector trained in full."""
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer's to turn on
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=rf".*language_model.*\.({'|'.join(targets)})", modules_to_save=["multi_modal_projector"])
    # On a GPU the adapters train in float32 under autocast; on CPU everything stays in the model's bfloat16.
    on_gpu = next(model.parameters()).device.type == "cuda"
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=on_gpu)
    # The Trainer resumes through load_adapter, whose default would go on in float32 and end elsewhere.
    wrapped.load_adapter = partial(wrapped.load_adapter, autocast_adapter_dtype=on_gpu)
    if on_gpu:  # the projector too, for the scaler of float16 gradients takes none in float16
        for parameter in wrapped.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return wrapped


def train(model, processor, items, folder: Path, config, steps: int, callbacks=(), label="fine-tuning", loss=None,
          held_out=()) -> list[dict]:  # fmt: skip
    """Fine-tune on (image path, messages) items for `steps` optimizer steps; return the loss curve.

    Checkpoints go to `folder` every config.save_every steps, and a killed run goes on from the last one to the same
    end. With `held_out` items the curve has their loss too, `held_out_loss`, at every checkpoint; training ends early
    once it has not fallen for config.patience checkpoints (0: never), and the best checkpoint is kept. loss: as
    `answer_loss`, the default. `model` is left wrapped: hand it to `merge`. Pure bf16 without autocast on CPU, where
    that is fastest, unless float32 weights are trained.
    """
    cuda = next(model.parameters()).device.type == "cuda"
    nf4 = getattr(model.config, "quantization_config", None)
    computed_in = nf4.bnb_4bit_compute_dtype if nf4 else model_dtype(model)
    keep = len(items) <= 4096 and not cuda
    dataset = Conversations(processor, items, model_dtype(model), keep, config.multi_turn)
    whole = any(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    stopping = bool(held_out and config.patience)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate, lr_scheduler_type=config.schedule, warmup_steps=max(1, steps // 20),
        max_grad_norm=1.0, save_steps=config.save_every, save_total_limit=1, logging_steps=1,
        report_to=[], remove_unused_columns=False, label_names=["labels"], seed=config.seed, data_seed=config.seed,
        use_cpu=not cuda, fp16=cuda and computed_in == torch.float16,
        bf16=(cuda or whole) and computed_in == torch.bfloat16,
        gradient_checkpointing=cuda, disable_tqdm=True, prediction_loss_only=True, eval_steps=config.save_every,
        eval_strategy="steps" if held_out else "no", per_device_eval_batch_size=config.batch_size,
        load_best_model_at_end=stopping, metric_for_best_model="loss" if stopping else None, greater_is_better=False,
        gradient_checkpointing_kwargs={"use_reentrant": False} if cuda else None, dataloader_pin_memory=cuda,
    )  # fmt: skip
    # Whole weights, trained before, move a tenth as fast as adapters, which start at nothing (the projector in LLaVA).
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if "lora_" in n]},
              {"params": [p for n, p in named if "lora_" not in n], "lr": config.learning_rate / 10}]  # fmt: skip
    groups = [g for g in groups if g["params"]]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=0.0)
    trainer = Trainer(
        model=model, args=arguments, optimizers=(optimizer, None), train_dataset=dataset,
        data_collator=collator(processor.tokenizer.pad_token_id), compute_loss_func=loss or answer_loss,
        eval_dataset=Conversations(processor, list(held_out), model_dtype(model), keep, config.multi_turn) if held_out else None,
        callbacks=[_Bar(label), *callbacks, *([EarlyStoppingCallback(config.patience)] if stopping else ())],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if not cuda:  # the backward pass of SDPA's flash kernel takes a tenth more of a step
        parts(model).text_model.set_attn_implementation("eager")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if Path(folder).exists() else None)
    curve = {x["step"]: {"step": x["step"], "loss": x["loss"]} for x in trainer.state.log_history if "loss" in x}
    for x in trainer.state.log_history:
        if "eval_loss" in x:
            curve[x["step"]]["held_out_loss"] = x["eval_loss"]
    return list(curve.values())


def model_dtype(model) -> torch.dtype:
    """Return the floating dtype a model computes in (that of its norms, which quantization leaves alone)."""
    return next(p.dtype for n, p in model.named_parameters() if "norm" in n)


def merge(model: PeftModel, into=None):
    """Return the plain LLaVA with the adapters folded in; raises ValueError if any adapter is left.

    into: the 16-bit model of the same blocks. Adapters trained over an NF4 base need it (QLoRA, Dettmers 2023): folded
    into the 4-bit weights they would be rounded away with them. Of a model trained without adapters, the weights.
    """
    if getattr(model, "is_loaded_in_4bit", False):
        if into is None:
            raise ValueError("adapters trained over a 4-bit base are folded into a 16-bit model: give it as `into`.")
        trained = get_peft_model_state_dict(model, save_embedding_layers=False)
        model = get_peft_model(into, copy.deepcopy(model.peft_config["default"]))
        left = set_peft_model_state_dict(model, trained).unexpected_keys
        if left:
            raise ValueError(f"the 16-bit model has no place for the adapter {left[0]}.")
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    left = [n for n, _ in merged.named_parameters() if re.search(r"lora_|modules_to_save|original_module", n)]
    if left:
        raise ValueError(f"merging left adapters behind: {', '.join(left[:3])}.")
    dtype = parts(merged).text_model.embed_tokens.weight.dtype
    for parameter in merged.parameters():  # a projector trained in float32 goes back
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    return merged.eval()


def save(model, processor, folder: Path) -> None:
    """Write a folder that plain transformers loads, whole or not at all."""
    with write_folder(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


class _Bar(TrainerCallback):
    """A progress bar over optimizer steps that shows the loss; begins where a resumed run does."""

    def __init__(self, label):
        self.label = label

    def on_train_begin(self, args, state, control, **_):
        self.bar = progress(state.max_steps, self.label, "step")
        self.bar.update(state.global_step)

    def on_step_end(self, args, state, control, **_):
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args, state, control, **_):
        self.bar.close()
