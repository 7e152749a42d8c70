"""LoRA / QLoRA fine-tuning on the transformers Trainer, resumed after a kill, and merging; used by 01 and 04.

The paper: QLoRA with r 16 and alpha 8 on multi-turn conversations about an image. Loss falls on the answers and
their end of sequence only. The projector is trained along, as an assembled base's starts at random.
"""

import copy
import re
from functools import partial
from pathlib import Path

import torch
from IPython.display import display
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from medprune.answers.prompts import IGNORED, Conversations, collator
from medprune.models.families import parts
from medprune.progress import progress
from medprune.settings import TARGETS


def answer_loss(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    """Return the mean cross-entropy (nats a token) over answer tokens; logits (batch, kept, vocab)."""
    chosen = labels != IGNORED
    loss = F.cross_entropy(outputs.logits[chosen].float(), labels[chosen], reduction="sum")
    return loss / (num_items_in_batch if num_items_in_batch is not None else chosen.sum())


def add_lora(model, r: int, alpha: int, targets=TARGETS) -> PeftModel:
    """Wrap a model in LoRA on linears of the language model's blocks, all by default, the projector trained in full."""
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer's to turn on
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=rf".*language_model.*\.({'|'.join(targets)})",
        modules_to_save=["multi_modal_projector"],
    )
    # On a GPU the adapters train in float32 under autocast; on CPU everything stays in the model's bfloat16.
    on_gpu = next(model.parameters()).device.type == "cuda"
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=on_gpu)
    # The Trainer resumes through load_adapter, whose default would go on in float32 and end elsewhere.
    wrapped.load_adapter = partial(wrapped.load_adapter, autocast_adapter_dtype=on_gpu)
    if on_gpu:  # the projector too, for the scaler of float16 gradients takes none in float16
        for parameter in wrapped.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return wrapped


def train(
    model, processor, items, folder: Path, config, steps: int, callbacks=(), label="fine-tuning", loss=None, held_out=()
) -> list[dict]:
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
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=max(1, steps // 20),
        max_grad_norm=1.0,
        save_steps=config.save_every,
        save_total_limit=1,
        logging_steps=1,
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=not cuda,
        fp16=cuda and computed_in == torch.float16,
        bf16=(cuda or whole) and computed_in == torch.bfloat16,
        gradient_checkpointing=cuda,
        disable_tqdm=True,
        prediction_loss_only=True,
        eval_steps=config.save_every,
        eval_strategy="steps" if held_out else "no",
        per_device_eval_batch_size=config.batch_size,
        load_best_model_at_end=stopping,
        metric_for_best_model="loss" if stopping else None,
        greater_is_better=False,
        gradient_checkpointing_kwargs={"use_reentrant": False} if cuda else None,
        dataloader_pin_memory=cuda,
    )
    # Whole weights, trained before, move a tenth as fast as adapters, which start at nothing (the projector in LLaVA).
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if "lora_" in n]},
        {"params": [p for n, p in named if "lora_" not in n], "lr": config.learning_rate / 10},
    ]
    groups = [g for g in groups if g["params"]]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=0.0)
    trainer = Trainer(
        model=model,
        args=arguments,
        optimizers=(optimizer, None),
        train_dataset=dataset,
        data_collator=collator(processor.tokenizer.pad_token_id),
        compute_loss_func=loss or answer_loss,
        eval_dataset=Conversations(processor, list(held_out), model_dtype(model), keep, config.multi_turn)
        if held_out
        else None,
        callbacks=[_Bar(label), *callbacks, *([EarlyStoppingCallback(config.patience)] if stopping else ())],
    )
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


class LiveCurve(TrainerCallback):
    """Show the loss below the cell as `draw` (`figures.figure_loss`) draws it, again at every twentieth of the steps."""

    def __init__(self, draw):
        self.draw, self.curve, self.shown = draw, {}, None

    def on_log(self, args, state, control, logs=None, **_):
        for name, ours in (("loss", "loss"), ("eval_loss", "held_out_loss")):
            if name in (logs or {}):
                self.curve.setdefault(state.global_step, {"step": state.global_step})[ours] = logs[name]
        points = [c for c in self.curve.values() if "loss" in c]
        if points and (state.global_step % max(1, state.max_steps // 20) == 0 or state.global_step == state.max_steps):
            if self.shown is None:
                self.shown = display(self.draw(points), display_id=True)
            else:
                self.shown.update(self.draw(points))
