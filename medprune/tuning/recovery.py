"""Ways back after pruning, compared in notebook 04: what is trained, against which loss.

- `lora`: LoRA on every linear of the blocks and the projector in full, on the answers' cross-entropy (the paper, 3.3);
- `projector`: the projector alone, said to be enough up to 20% of the blocks (Huang et al. 2025, arXiv 2507.20749);
- `last_blocks`: the last three blocks, the final norm and, unless it is tied to the embeddings, the head (Lu et al.
  2024, arXiv 2411.15558);
- `distill`: `lora` whose loss also draws the last hidden states to the unpruned model's (Huang et al. 2025).
"""

import random
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from medprune.answers.prompts import IGNORED, Conversations, collator
from medprune.answers.timing import peak_memory
from medprune.data.questions import conversation
from medprune.data.records import repeat_rare, sample_balanced
from medprune.models.families import parts
from medprune.models.loading import load, save
from medprune.pruning.plan import Plan, apply_plan, blocks_of, set_blocks
from medprune.settings import Config, values_of
from medprune.store import content, context, write_folder
from medprune.tuning import finetune

LAST_BLOCKS = 3
MAX_MERGE_KL = 0.5  # nats a token; folding adapters into bfloat16 weights moved runs of `local` by a hundredth of it
DISTILL_WEIGHT = 1.0  # of the hidden states' loss, beside cross-entropy in nats
# The settings that decide a training; it can see no others.
TRAINING = ["seed", "base_bits", "lora_r", "lora_alpha", "lora_targets", "learning_rate", "schedule", "multi_turn"]
TRAINING += ["batch_size", "save_every", "patience"]
FITS = ["micro_batch"]  # how it is taken through memory, which it does not depend on


@dataclass
class Training:
    """What a training starts from and sees.

    source: folder of the unpruned model. plan: None for every block. items, held_out: (image path, messages). steps:
    of the optimizer. config: of any settings, those of TRAINING and FITS.
    """

    source: Path
    plan: Plan | None
    recipe: str
    items: list
    config: Config
    steps: int
    held_out: list = ()

    def __post_init__(self):
        self.config = Config({name: getattr(self.config, name) for name in TRAINING + FITS}, "a training")

    def context(self) -> str:
        """Return what it depends on: the model and blocks it starts from, pictures and texts, settings, code."""
        seen = [(content(path), messages) for path, messages in [*self.items, *self.held_out]]
        kept = self.plan and list(self.plan.kept)
        settings = {name: value for name, value in values_of(self.config).items() if name in TRAINING}
        return context(__name__, content(self.source), kept, self.recipe, seen, settings, self.steps)


def training_items(
    records, fraction: float, n: int, conditions, questions, seed: int, balance: float = 0.0
) -> list[tuple[str, list[dict]]]:
    """Return at least n (image path, conversation) items from a class-balanced `fraction` of the records.

    balance: as `repeat_rare` takes it.
    """
    n_images = max(1, round(fraction * len(records)))
    chosen = sample_balanced(records, n_images, seed) if fraction < 1 else records
    return conversation_items(repeat_rare(chosen, balance), n, conditions, questions, random.Random(seed + 1))


def conversation_items(records, n: int, conditions, questions, rng) -> list[tuple[str, list[dict]]]:
    """Return (image path, conversation) items, all records as often as it takes for at least n; [] without records."""
    rounds = -(-n // len(records)) if records else 0
    return [(r.path, conversation(r, conditions, questions, rng)) for r in records * rounds]


def trainable(model, recipe: str, config):
    """Freeze all but what the recipe trains, in place; return the model, wrapped by peft for LoRA.

    What is trained without LoRA is held in float32, for bfloat16 rounds small steps away.
    """
    if recipe in ("lora", "distill"):
        return finetune.add_lora(model, config.lora_r, config.lora_alpha, config.lora_targets)
    inner = parts(model)
    chosen = [inner.projector] if recipe == "projector" else [*inner.blocks[-LAST_BLOCKS:], inner.text_model.norm]
    if recipe == "last_blocks" and not model.config.text_config.tie_word_embeddings:
        chosen.append(inner.head)
    model.requires_grad_(False)
    for module in chosen:
        module.float().requires_grad_(True)
    return model


@contextmanager
def distillation(student, whole: tuple):
    """Yield a loss function for `finetune.train`: cross-entropy plus the L2 distance of the last hidden states.

    The teacher is the unpruned model, without adapters: `whole` are its blocks, as `plan.blocks_of` has returned them
    before the plan was applied, of which the student's are some. The distance is taken where answers are predicted,
    relative to the teacher's: |h - h_teacher|^2 / |h_teacher|^2.
    """
    adapted = hasattr(student, "disable_adapter")
    base, seen = student.get_base_model() if adapted else student, {}

    def remember_inputs(_, args, kwargs):
        seen["inputs"] = {k: v for k, v in kwargs.items() if k not in ("labels", "logits_to_keep")}
        seen["kept"] = kwargs["logits_to_keep"]

    def remember_hidden(_, args, output):
        if "hidden" not in seen:
            seen["hidden"] = output.last_hidden_state

    def taught() -> torch.Tensor:
        kept, training = blocks_of(base), base.training
        set_blocks(base, *whole)
        try:
            with torch.no_grad(), student.disable_adapter() if adapted else nullcontext():
                return base.eval().model(**seen["inputs"], use_cache=False).last_hidden_state
        finally:
            set_blocks(base, *kept)
            base.train(training)

    def loss(outputs, labels, num_items_in_batch=None):
        chosen, hidden = labels != IGNORED, seen.pop("hidden")
        seen["hidden"] = None  # the teacher's pass is not the student's
        wanted, found = (h[:, seen["kept"]][chosen].float() for h in (taught(), hidden))
        del seen["hidden"]
        distance = (found - wanted).square().sum(-1) / wanted.square().sum(-1)
        total = num_items_in_batch if num_items_in_batch is not None else chosen.sum()
        return finetune.answer_loss(outputs, labels, num_items_in_batch) + DISTILL_WEIGHT * distance.sum() / total

    with (
        base.register_forward_pre_hook(remember_inputs, with_kwargs=True),
        base.model.register_forward_hook(remember_hidden),
    ):
        yield loss


def recover(training: Training, folder: Path, device: str, label: str = "", callbacks=()) -> tuple:
    """Load, prune and train one model; return (model as trained, processor, costs).

    folder: where checkpoints go, so that a killed training goes on from the last one. costs: trainable_params,
    train_s, train_peak_bytes, loss (of the last step), steps, and the curve.
    """
    config, recipe, items = training.config, training.recipe, training.items
    model, processor = load(training.source, device, bits=config.base_bits)
    whole = blocks_of(model)
    if training.plan:
        apply_plan(model, training.plan)
    whole = whole if recipe == "distill" else None  # or the removed blocks would stay in memory
    torch.manual_seed(config.seed)
    started, loss = time.perf_counter(), finetune.answer_loss
    with peak_memory(model) as peak, ExitStack() as stack:
        model = trainable(model, recipe, config)
        costs = {"trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        if recipe == "distill":
            loss = stack.enter_context(distillation(model, whole))
        how = (config, training.steps, callbacks, label or recipe, loss, training.held_out)
        curve = finetune.train(model, processor, items, folder, *how)
    costs |= {"train_s": time.perf_counter() - started, "train_peak_bytes": peak["bytes"]}
    costs |= {"loss": curve[-1]["loss"], "steps": training.steps, "curve": curve}
    return model, processor, costs


def train_into(training: Training, checkpoints: Path, out: Path, device: str, label="", callbacks=(), **record) -> None:
    """Do a training and save what it gave in `out`, with the record, `recover`'s costs and merge_kl_nats among it.

    A 16-bit base gives the plain model, merged as `merged` says; an NF4 base gives peft's adapters, for
    `merging.merge_folder`. Of several processes (a record's `processes`), the first saves.
    """
    model, processor, costs = recover(training, checkpoints, device, label, callbacks)
    if training.config.base_bits == 4:
        if PartialState().is_main_process:
            with write_folder(out, **record, **costs, merge_kl_nats=None) as temporary:
                model.save_pretrained(temporary)
        return
    plain, apart = merged(model, processor, training.items[0], training.config.multi_turn)
    if PartialState().is_main_process:
        save(plain, processor, out, **record, **costs, merge_kl_nats=apart)


def merged(model, processor, item, multi_turn: bool) -> tuple:
    """Return a trained model merged, and how far that moved its answers to one item: mean KL in nats a token.

    Raises ValueError where that is beyond MAX_MERGE_KL.
    """
    trained = answer_log_probs(model, processor, item, multi_turn)
    plain = finetune.merge(model)
    apart = trained - answer_log_probs(plain, processor, item, multi_turn)
    apart = float((trained.exp() * apart).sum(-1).mean())
    if not apart <= MAX_MERGE_KL:
        raise ValueError(f"merging changed what the model says by {apart:.2g} nats a token: an adapter was lost.")
    return plain, apart


@torch.inference_mode()
def answer_log_probs(model, processor, item, multi_turn: bool) -> torch.Tensor:
    """Return the log-probabilities (tokens, vocabulary), float32, of the answers of one (image path, messages) item."""
    dtype = finetune.model_dtype(model)
    dataset = Conversations(processor, [item], dtype, keep_pixels=False, multi_turn=multi_turn)
    batch = collator(processor.tokenizer.pad_token_id)([dataset[0]])
    batch = {k: v.to(model.device) for k, v in batch.items()}
    chosen = batch.pop("labels") != IGNORED
    mixed = len({p.dtype for p in model.parameters()}) > 1  # what was trained is in float32, as the Trainer had it
    with torch.autocast(model.device.type, dtype, enabled=mixed):
        logits = model.eval()(**batch, use_cache=False).logits
    return logits[chosen].float().log_softmax(-1)
