"""Where the parts of a model are: the only module that knows a model's attribute paths."""

from dataclasses import dataclass

from torch import nn
from transformers import LlavaForConditionalGeneration

from medprune.settings import protected_numbers


@dataclass(frozen=True)
class Parts:
    """The parts of a LLaVA; `blocks` is the language model's ModuleList of decoder layers."""

    vision_tower: nn.Module
    projector: nn.Module
    text_model: nn.Module
    blocks: nn.ModuleList
    head: nn.Module


def parts(model: LlavaForConditionalGeneration) -> Parts:
    """Return the parts of a LLaVA, also of one that peft has wrapped."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    inner = model.model
    return Parts(
        inner.vision_tower,
        inner.multi_modal_projector,
        inner.language_model,
        inner.language_model.layers,
        model.lm_head,
    )


def n_blocks(config) -> int:
    return config.text_config.num_hidden_layers


def protected(config_or_model, blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Return protected block numbers, counted from 0, with negative ones counted from the end."""
    return protected_numbers(n_blocks(getattr(config_or_model, "config", config_or_model)), blocks)


# Matched from the start of a module's name in transformers 5, hence both spellings.
SKIP_QUANTIZATION = [
    "vision_tower",
    "multi_modal_projector",
    "lm_head",
    "model.vision_tower",
    "model.multi_modal_projector",
]
