"""Ways back after pruning, compared in notebook 04: what is trained, against which loss.

- `lora`: LoRA on every linear of the blocks and the projector in full, on the answers' cross-entropy (the paper, 3.3);
- `projector`: the projector alone, said to be enough up to 20% of the blocks (Huang et al. 2025, arXiv 2507.20749);
- `last_blocks`: the last three blocks, the final norm and, unless it is tied to the embeddings, the head (Lu et al.
  2024, arXiv 2411.15558);
- `distill`: `lora` whose loss also draws the last hidden states to the unpruned model's (Huang et al. 2025).
"""

import random
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from medprune.answers.prompts import IGNORED, Conversations, collator
from medprune.answers.timing import peak_memory
from medprune.data.questions import conversation
from medprune.data.records import sample_balanced
from medprune.models.families import parts
from medprune.models.loading import load
from medprune.pruning.plan import apply_plan
from medprune.settings import RECIPES
from medprune.tuning import finetune

LAST_BLOCKS = 3
MAX_MERGE_KL = 0.5  # nats a token; folding adapters into bfloat16 weights moved runs of `local` by a hundredth of it
DISTILL_WEIGHT = 1.0  # of the hidden states' loss, beside cross-entropy in nats


def training_items(records, fraction: float, n: int, conditions, questions, seed: int) -> list[tuple[str, list[dict]]]:
    """Return at least n (image path, conversation) items from a class-balanced `fraction` of the records."""
    chosen = records
    if fraction < 1:
        chosen = sample_balanced(records, max(1, round(fraction * len(records))), seed)
    return conversation_items(chosen, n, conditions, questions, random.Random(seed + 1))


def conversation_items(records, n: int, conditions, questions, rng) -> list[tuple[str, list[dict]]]:
    """Return (image path, conversation) items, all records as often as it takes for at least n; [] without records."""
    rounds = -(-n // len(records)) if records else 0
    return [(r.path, conversation(r, conditions, questions, rng)) for r in records * rounds]


def trainable(model, recipe: str, config):
    """Freeze all but what the recipe trains, in place; return the model, wrapped by peft for LoRA.

    What is trained without LoRA is held in float32, for bfloat16 rounds small steps away. Raises ValueError for an
    unknown recipe, and for one that would train weights which are in 4 bits.
    """
    if recipe in ("lora", "distill"):
        return finetune.add_lora(model, config.lora_r, config.lora_alpha, config.lora_targets)
    if recipe not in ("projector", "last_blocks"):
        raise ValueError(f"recipe {recipe!r} is not known: choose {', '.join(RECIPES)}.")
    if getattr(model, "is_loaded_in_4bit", False):
        raise ValueError(
            f"recipe {recipe} trains whole weights, which the Trainer refuses over a 4-bit base: use base_bits 16."
        )
    inner = parts(model)
    chosen = [inner.projector] if recipe == "projector" else [*inner.blocks[-LAST_BLOCKS:], inner.text_model.norm]
    if recipe == "last_blocks" and not model.config.text_config.tie_word_embeddings:
        chosen.append(inner.head)
    model.requires_grad_(False)
    for module in chosen:
        module.float().requires_grad_(True)
    return model


@contextmanager
def distillation(student, teacher):
    """Yield a loss function for `finetune.train`: cross-entropy plus the L2 distance of the last hidden states.

    The distance is taken where answers are predicted, relative to the teacher's: |h - h_teacher|^2 / |h_teacher|^2.
    """
    base = student.get_base_model() if hasattr(student, "get_base_model") else student
    seen = {}

    def remember_inputs(_, args, kwargs):
        seen["inputs"] = {k: v for k, v in kwargs.items() if k not in ("labels", "logits_to_keep")}
        seen["kept"] = kwargs["logits_to_keep"]

    def remember_hidden(_, args, output):
        seen["hidden"] = output.last_hidden_state

    def loss(outputs, labels, num_items_in_batch=None):
        chosen = labels != IGNORED
        with torch.no_grad():
            wanted = teacher.model(**seen["inputs"], use_cache=False).last_hidden_state
        wanted, found = (h[:, seen["kept"]][chosen].float() for h in (wanted, seen["hidden"]))
        distance = (found - wanted).square().sum(-1) / wanted.square().sum(-1)
        total = num_items_in_batch if num_items_in_batch is not None else chosen.sum()
        return finetune.answer_loss(outputs, labels, num_items_in_batch) + DISTILL_WEIGHT * distance.sum() / total

    with (
        base.register_forward_pre_hook(remember_inputs, with_kwargs=True),
        base.model.register_forward_hook(remember_hidden),
    ):
        yield loss


def recover(
    source: Path, plan, recipe: str, items, folder: Path, config, steps: int, device: str, dtype, label=None, **more
):
    """Load, prune and train one model by a recipe; return (plain model in eval mode, processor, costs).

    source: folder of the unpruned model. plan: None for every block. folder: where checkpoints go, so that a killed
    training goes on from the last one. more: as `finetune.train` takes it (held_out, callbacks). costs:
    trainable_params, train_s, train_peak_bytes, loss (of the last step), steps, the curve, and merge_kl_nats, as
    `merged` says.
    """
    model, processor = _pruned(source, plan, device, dtype, config.base_bits)
    torch.manual_seed(config.seed)
    started = time.perf_counter()
    with peak_memory(model) as peak, ExitStack() as stack:
        model = trainable(model, recipe, config)
        n_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        loss = finetune.answer_loss
        if recipe == "distill":
            teacher = load(source, device, dtype, bits=config.base_bits)[0]
            loss = stack.enter_context(distillation(model, teacher))
        how = {"label": label or recipe, "loss": loss, **more}
        curve = finetune.train(model, processor, items, folder, config, steps, **how)
    costs = {
        "trainable_params": n_trainable,
        "train_s": time.perf_counter() - started,
        "train_peak_bytes": peak["bytes"],
        "loss": curve[-1]["loss"],
        "steps": steps,
        "curve": curve,
    }
    if config.base_bits == 4:  # QLoRA's adapters go into the 16-bit model, beside which there is nothing to compare
        plain = finetune.merge(model, _pruned(source, plan, "cpu", dtype)[0])
        return plain, processor, costs | {"merge_kl_nats": None}
    plain, apart = merged(model, processor, items[0], config.multi_turn)
    return plain, processor, costs | {"merge_kl_nats": apart}


def merged(model, processor, item, multi_turn: bool) -> tuple:
    """Return a trained model merged, and how far that moved its answers to one item: mean KL in nats a token.

    Raises ValueError where that is beyond MAX_MERGE_KL.
    """
    trained = answer_log_probs(model, processor, item, multi_turn)
    plain = finetune.merge(model)
    apart = trained - answer_log_probs(plain, processor, item, multi_turn)
    apart = float((trained.exp() * apart).sum(-1).mean())
    if not apart <= MAX_MERGE_KL:
        raise ValueError(
            f"merging changed what the model says by {apart:.2g} nats a token, where rounding changes "
            f"less than {MAX_MERGE_KL:g}: an adapter was lost or counted twice."
        )
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


def _pruned(source: Path, plan, device: str, dtype, bits: int = 16):
    model, processor = load(source, device, dtype, bits=bits)
    return apply_plan(model, plan) if plan else model, processor
