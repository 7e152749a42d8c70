"""LoRA / QLoRA fine-tuning on the transformers Trainer, resumed after a kill, and merging; used by 01 and 04.

The paper: QLoRA with r 16 and alpha 8 on multi-turn conversations about an image. Loss falls on the answers and
their end of sequence only. The projector is trained along, as an assembled base's starts at random.
"""

import re
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from IPython.display import display
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from medprune.answers.prompts import IGNORED, Conversations, collator
from medprune.device import cards, on_gpu, rows_that_fit
from medprune.models.families import lora_targets, names, parts
from medprune.progress import progress
from medprune.settings import TARGETS
from medprune.store import read_json
from medprune.tuning.views import viewer


def answer_loss(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    """Return the mean cross-entropy (nats a token) over answer tokens; logits (batch, kept, vocab)."""
    chosen = labels != IGNORED
    loss = F.cross_entropy(outputs.logits[chosen].float(), labels[chosen], reduction="sum")
    return loss / (num_items_in_batch if num_items_in_batch is not None else chosen.sum())


class Adapted(PeftModel):
    """A LLaVA in LoRA that resumes in the dtype it trains in: peft's default, float32, would end elsewhere on a CPU."""

    def load_adapter(self, *arguments, **more):
        return super().load_adapter(*arguments, **more, autocast_adapter_dtype=_on_gpu(self))


def add_lora(model, r: int, alpha: int, targets=TARGETS) -> PeftModel:
    """Wrap a model in LoRA on linears of the language model's blocks, all by default, the projector trained in full.

    On a GPU the adapters and the projector train in float32 under autocast, for the scaler of float16 gradients takes
    none in float16; on a CPU everything stays in the model's bfloat16.
    """
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer's to turn on
    config = LoraConfig(
        r=r, lora_alpha=alpha, target_modules=lora_targets(targets), modules_to_save=names(model).projector
    )
    wrapped = Adapted(model, config, autocast_adapter_dtype=_on_gpu(model))
    if _on_gpu(model):
        for parameter in wrapped.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return wrapped


def _on_gpu(model) -> bool:
    return on_gpu(next(model.parameters()).device)


def train(model, processor, items, folder, config, steps, callbacks=(), label="tuning", loss=answer_loss, held_out=()):
    """Fine-tune on (image path, messages) items for `steps` optimizer steps; return the loss curve.

    Checkpoints go to `folder` every config.save_every steps, and a killed run goes on from the last one to the same
    end. A step's conversations are taken config.micro_batch at a time, or fewer where memory is too small. With
    `held_out` items the curve has their loss too, `held_out_loss`, at every checkpoint; training ends early once it has
    not fallen for config.patience checkpoints (0: never), and the best checkpoint is kept. Pretrained eyes are shown
    another random view of a picture each time (`views.viewer`). `model` is left wrapped: hand it to `merge`. Pure bf16
    without autocast on CPU, where that is fastest, unless float32 weights are trained.
    """
    keep_pixels, dtype = len(items) <= 4096 and not _on_gpu(model), model_dtype(model)
    encoded = partial(Conversations, processor, dtype=dtype, keep_pixels=keep_pixels, multi_turn=config.multi_turn)
    early = [EarlyStoppingCallback(config.patience)] if held_out and config.patience else []
    views = viewer(model, processor, config.seed, dtype, keep_pixels)
    data = {"train_dataset": encoded(items, view=views), "eval_dataset": encoded(held_out) if held_out else None}
    data |= {"data_collator": collator(processor.tokenizer.pad_token_id), "compute_loss_func": loss}
    begun = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad} if cards() else {}

    def attempt(rows: int) -> list[dict]:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.grad = None
                if name in begun:  # as it came, if an earlier attempt has moved it
                    parameter.copy_(begun[name])
        arguments, shown = _arguments(model, folder, config, steps, held_out, rows), [_Bar(label), *callbacks, *early]
        optimizers = (_optimizer(model, config.learning_rate), None)
        trainer = Trainer(model, arguments, **data, optimizers=optimizers, callbacks=shown)
        trainer.remove_callback(PrinterCallback)
        with _prepared(model):
            if ended := _ended(there := last_checkpoint(folder)):
                trainer._load_from_checkpoint(ended["best_model_checkpoint"] or there)
                return curve_of(ended["log_history"])
            trainer.train(resume_from_checkpoint=there)
        return curve_of(trainer.state.log_history)

    return rows_that_fit(attempt, min(config.micro_batch or config.batch_size, config.batch_size), "training")


def _arguments(model, folder: Path, config, steps: int, held_out, rows: int) -> TrainingArguments:
    """Return the Trainer's arguments: what the settings say, and what the device and the model's dtypes call for."""
    gpu = _on_gpu(model)
    nf4 = getattr(model.config, "quantization_config", None)
    computed_in = nf4.bnb_4bit_compute_dtype if nf4 else model_dtype(model)
    whole = any(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    chosen = {"max_steps": steps, "learning_rate": config.learning_rate, "lr_scheduler_type": config.schedule}
    chosen |= {"warmup_steps": max(1, steps // 20), "seed": config.seed, "data_seed": config.seed}
    chosen |= {"per_device_train_batch_size": rows, "per_device_eval_batch_size": rows}
    chosen |= {"gradient_accumulation_steps": config.batch_size // rows}
    chosen |= {"output_dir": str(folder), "save_steps": config.save_every, "save_total_limit": 1}
    chosen |= {"eval_strategy": "steps" if held_out else "no", "eval_steps": config.save_every}
    chosen |= {"load_best_model_at_end": bool(held_out and config.patience)}
    chosen |= {"fp16": gpu and computed_in == torch.float16, "bf16": (gpu or whole) and computed_in == torch.bfloat16}
    chosen |= {"use_cpu": not gpu, "gradient_checkpointing": gpu, "dataloader_pin_memory": gpu}
    chosen |= {"label_names": ["labels"], "prediction_loss_only": True, "remove_unused_columns": False}
    arguments = TrainingArguments(**chosen, logging_steps=1, disable_tqdm=True, report_to=[])
    arguments._n_gpu = 1  # of one process: of several visible GPUs the Trainer would make the batch larger
    return arguments


def _optimizer(model, learning_rate: float) -> torch.optim.Optimizer:
    """Return AdamW; whole weights, trained before, move a tenth as fast as adapters, which start at nothing."""
    learned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    adapters, whole = [p for n, p in learned if "lora_" in n], [p for n, p in learned if "lora_" not in n]
    groups = [{"params": adapters}, {"params": whole, "lr": learning_rate / 10}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, weight_decay=0.0)


@contextmanager
def _prepared(model):
    """Train with eager attention on a CPU, for SDPA's backward pass takes a tenth more, and put the model's own back.

    Checkpoints name the tensors as the model does, not as the hub: the Trainer would find none of whole weights again.
    A tower that is not trained stays out of the graph, into which checkpointing would draw it.
    """
    tower = parts(model).vision_tower
    frozen = not any(p.requires_grad for p in tower.parameters())
    text_model = parts(model).text_model
    attention, names = text_model.config._attn_implementation, vars(model).get("_weight_conversions")
    text_model.set_attn_implementation(attention if _on_gpu(model) else "eager")
    model._weight_conversions = []
    if frozen:
        tower.forward = torch.no_grad()(tower.forward)
    try:
        yield
    finally:
        text_model.set_attn_implementation(attention)
        model._weight_conversions = names
        vars(model).pop("forward", None), vars(model).pop("_original_forward", None)  # Accelerate's autocast
        vars(tower).pop("forward", None)


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint in a folder, or None; newer ones, cut short by a kill or full disk, go."""
    found = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for checkpoint in reversed(found):
        try:
            read_json(checkpoint / "trainer_state.json")  # what the Trainer writes last
            return str(checkpoint)
        except (OSError, ValueError):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def _ended(checkpoint: str | None) -> dict | None:
    """Return the Trainer's state where training had come to its end at a checkpoint, after which it takes a step more.

    So it is when the disk is full, or a kill comes, before the model is saved.
    """
    state = read_json(Path(checkpoint) / "trainer_state.json") if checkpoint else {}
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    ended = checkpoint and (state["global_step"] >= state["max_steps"] or control.get("should_training_stop"))
    return state if ended else None


def curve_of(log_history: list[dict]) -> list[dict]:
    """Return the loss of each step, and where it was measured the held-out loss, from the Trainer's log."""
    curve = {x["step"]: {"step": x["step"], "loss": x["loss"]} for x in log_history if "loss" in x}
    for x in log_history:
        if "eval_loss" in x:
            curve[x["step"]]["held_out_loss"] = x["eval_loss"]
    return list(curve.values())


def model_dtype(model) -> torch.dtype:
    """Return the floating dtype a model computes in (that of its norms, which quantization leaves alone)."""
    return next(p.dtype for n, p in model.named_parameters() if "norm" in n)


def merge(model: PeftModel):
    """Return the plain LLaVA with the adapters folded in; raises ValueError if any adapter is left.

    Of a model trained without adapters, the weights. Adapters over an NF4 base go into the 16-bit model's files
    (`merging.merge_folder`).
    """
    if getattr(model, "is_loaded_in_4bit", False):
        raise ValueError("adapters trained over a 4-bit base are folded into the 16-bit model's files: merge_folder.")
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
    """Show the loss below the cell as `draw` (`figures.figure_loss`) draws it, anew at each twentieth of the steps."""

    def __init__(self, draw):
        self.draw, self.shown = draw, None

    def on_log(self, args, state, control, **_):
        points, step = curve_of(state.log_history), state.global_step
        if not points or (step % max(1, state.max_steps // 20) and step != state.max_steps):
            return
        show = self.shown.update if self.shown else partial(display, display_id=True)
        self.shown = show(self.draw(points)) or self.shown
