"""Where the parts of a model are: the only module that knows the names of a model's modules and tensors."""

import re
from types import SimpleNamespace

from medprune.settings import protected_numbers

PROJECTOR = "multi_modal_projector"
HEAD = "lm_head"
ATTENTION = "self_attn"  # of a block, and of a layer of the vision tower
BLOCKS = "model.language_model.layers"
VISION_LAYERS = "model.vision_tower.encoder.layers"

# Matched from the start of a module's name in transformers 5, hence both spellings.
SKIP_QUANTIZATION = ["vision_tower", PROJECTOR, HEAD, "model.vision_tower", f"model.{PROJECTOR}"]

# What AWQ scales in a block of Llama, Mistral or Qwen2, as autoawq 0.2.9 has it: linears that read the same input, the
# module before them that undoes their scales, and the module whose output says which scales are best.
SCALED = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn"),
    (("self_attn.o_proj",), "self_attn.v_proj", "self_attn.o_proj"),
    (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp"),
    (("mlp.down_proj",), "mlp.up_proj", "mlp.down_proj"),
)
BLOCK_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
UNCLIPPED = ("self_attn.q_proj", "self_attn.k_proj")  # only their product counts, which no clip of one is chosen by

# transformers 4's names, which the hub's checkpoints have, and transformers 5's. save_pretrained (5.23) writes the
# first, but CLIP's without `vision_model`: that spelling is read too, and `hub_name` never gives it.
_RENAMED = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def parts(model) -> SimpleNamespace:
    """Return the parts of a LLaVA, also of one that peft has wrapped; blocks is its ModuleList of decoder layers."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    inner, text_model = model.model, model.model.language_model
    of_text = {"text_model": text_model, "blocks": text_model.layers, "head": model.lm_head}
    return SimpleNamespace(vision_tower=inner.vision_tower, projector=inner.multi_modal_projector, **of_text)


def attention(block):
    """Return a block's attention, whose `layer_idx` is its place in the cache of keys and values."""
    return block.self_attn


def current_name(key: str) -> str:
    """Return what transformers 5 calls a checkpoint's tensor."""
    return next((new + key.removeprefix(old) for old, new in _RENAMED.items() if key.startswith(old)), key)


def hub_name(name: str) -> str:
    """Return what the hub's checkpoints call a tensor of transformers 5."""
    return next((old + name.removeprefix(new) for old, new in _RENAMED.items() if name.startswith(new)), name)


def block_number(name: str) -> int | None:
    """Return the number of the block that a module or tensor, by transformers 5's name, is in; None outside them."""
    found = re.search(r"(?:^|\.)language_model\.layers\.(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def lora_targets(names) -> str:
    """Return peft's pattern for the language model's linears of these names, such as q_proj."""
    return rf".*language_model.*\.({'|'.join(names)})"


def spread(n_blocks: int, devices: list[str]) -> dict[str, str]:
    """Return the device of each module, blocks in equal runs; tower and embeddings stand first, norm and head last."""
    text = BLOCKS.rpartition(".")[0]
    first = ["model.vision_tower", f"model.{PROJECTOR}", f"{text}.embed_tokens", f"{text}.rotary_emb"]
    places = dict.fromkeys(first, devices[0]) | dict.fromkeys([f"{text}.norm", HEAD], devices[-1])
    return places | {f"{BLOCKS}.{b}": devices[b * len(devices) // n_blocks] for b in range(n_blocks)}


def n_blocks(config) -> int:
    return config.text_config.num_hidden_layers


def window(config) -> float:
    """Return how many tokens back a block with the shortest window sees: infinity where all see everything."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    if kinds and not any("sliding" in kind or "chunked" in kind for kind in kinds):
        return float("inf")
    found = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((n for n in found if n), default=float("inf"))


def protected(config_or_model, blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Return protected block numbers, counted from 0, with negative ones counted from the end."""
    return protected_numbers(n_blocks(getattr(config_or_model, "config", config_or_model)), blocks)
