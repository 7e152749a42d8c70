"""Where the parts of a model are, by what transformers says of image-text-to-text models: no family is named here.

The only module that knows the names of a model's modules and tensors.
"""

import re
from collections.abc import Callable
from types import SimpleNamespace

from medprune.settings import protected_numbers

ATTENTION = "self_attn"  # of a block, and of a layer of the vision tower
BLOCKS = "model.language_model.layers"  # this and the following of a LLaVA, which alone is counted and exported by them
HEAD = "lm_head"
PROJECTOR = "multi_modal_projector"
VISION_TOWER = "model.vision_tower"
VISION_LAYERS = f"{VISION_TOWER}.encoder.layers"

# What AWQ scales in a block, as autoawq 0.2.9 has it: linears that read the same input, the module before them that
# undoes their scales (of the norms named, the first that there is), and the module whose output says which are best.
SCALED = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("input_layernorm",), "self_attn"),
    (("self_attn.o_proj",), ("self_attn.v_proj",), "self_attn.o_proj"),
    (("mlp.gate_proj", "mlp.up_proj"), ("pre_feedforward_layernorm", "post_attention_layernorm"), "mlp"),
    (("mlp.down_proj",), ("mlp.up_proj",), "mlp.down_proj"),
)
_TWO_NORMS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
BLOCK_PARTS = (_TWO_NORMS, _TWO_NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"})
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
    """Return the parts of a model, also of one that peft has wrapped; blocks is its ModuleList of decoder layers.

    The projector is what the model has beside its tower and its text model, or what merges patches in the tower.
    Raises ValueError for a model without a vision tower, or whose blocks are not where they are known.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    text_model, tower, kind = model.get_decoder(), model.get_encoder(modality="image"), type(model).__name__
    n, lists = n_blocks(model.config), {name: m for name, m in text_model.named_children() if _is_list(m)}
    found = [name for name, blocks in lists.items() if len(blocks) == n]
    if tower in (model, model.base_model, None) or found != ["layers"] or not hasattr(text_model, "norm"):
        raise ValueError(f"{kind} has no vision tower and one list of decoder blocks where medprune looks for them.")
    beside = [
        m
        for m in model.base_model.children()
        if m not in (text_model, tower) and next(m.parameters(), None) is not None
    ]
    beside = beside or [m for name, m in tower.named_children() if "merger" in name]
    beside = [m for each in beside for m in (each if _is_list(each) else [each])]
    projector = beside[0] if len(beside) == 1 else _list_of(beside)
    of_text = {"text_model": text_model, "blocks": lists["layers"], "head": model.get_output_embeddings()}
    return SimpleNamespace(vision_tower=tower, projector=projector, table=model.get_input_embeddings(), **of_text)


def _is_list(module) -> bool:
    return type(module).__name__ == "ModuleList"


def _list_of(modules):
    from torch.nn import ModuleList

    return ModuleList(modules)


def names(model) -> SimpleNamespace:
    """Return the full names of a model's `parts`; of the projector a list."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    found, called = parts(model), {module: name for name, module in model.named_modules()}
    several = found.projector if _is_list(found.projector) and found.projector not in called else [found.projector]
    named = {part: called[module] for part, module in vars(found).items() if part != "projector"}
    return SimpleNamespace(**named, projector=[called[module] for module in several])


def unquantized(model) -> list[str]:
    """Return the names of what stays in 16 bits outside the blocks, in both spellings: transformers matches starts."""
    found = names(model)
    inside = [found.vision_tower, *found.projector]
    return [*(name.partition(".")[2] for name in inside), found.head, *inside]


def attention(block):
    """Return a block's attention, whose `layer_idx` is its place in the cache of keys and values."""
    return block.self_attn


def current_name(key: str) -> str:
    """Return what transformers 5 calls a checkpoint's tensor."""
    return next((new + key.removeprefix(old) for old, new in _RENAMED.items() if key.startswith(old)), key)


def hub_name(name: str) -> str:
    """Return what the hub's checkpoints call a tensor of transformers 5."""
    return next((old + name.removeprefix(new) for old, new in _RENAMED.items() if name.startswith(new)), name)


def of_tower(name: str) -> bool:
    """Return whether a LLaVA's module or tensor is the tower's or the projector's."""
    return name.startswith((f"{VISION_TOWER}.", f"model.{PROJECTOR}."))


def block_number(name: str) -> int | None:
    """Return the number of the block that a module or tensor, by transformers 5's name, is in; None outside them."""
    found = re.search(r"(?:^|\.)(?:language_model|text_model)\.layers\.(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def renaming(model) -> Callable[[str], str]:
    """Return what gives the name that a tensor of a checkpoint's files has in the model, as transformers renames it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    prefix, known = model.base_model_prefix, model.state_dict()
    return lambda key: rename_source_key(key, renamings, [], prefix, known)[0]


def lora_targets(linears) -> str:
    """Return peft's pattern for the blocks' linears of these names, such as q_proj."""
    return rf".*(?:language_model|text_model)\.layers\.\d+\..*\.({'|'.join(linears)})"


def spread(model, devices: list[str]) -> dict[str, str]:
    """Return the device of each module, blocks in equal runs; what comes before stands first, norm and head last."""
    found, base = parts(model), model.base_model
    first = [m for m in base.children() if m is not found.text_model]
    first += [m for m in found.text_model.children() if m not in (found.blocks, found.text_model.norm)]
    called = {module: name for name, module in model.named_modules()}
    places = {called[m]: devices[0] for m in first}
    places |= {f"{called[base]}.{name}": devices[0] for name, _ in base.named_parameters(recurse=False)}
    places |= {called[m]: devices[-1] for m in (found.text_model.norm, found.head)}
    n = len(found.blocks)
    return places | {f"{called[found.blocks]}.{b}": devices[b * len(devices) // n] for b in range(n)}


def n_blocks(config) -> int:
    return config.get_text_config(decoder=True).num_hidden_layers


def window(config) -> float:
    """Return how many tokens back a block with the shortest window sees: infinity where all see everything."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    if kinds and not any("sliding" in kind or "chunked" in kind for kind in kinds):
        return float("inf")
    found = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((n for n in found if n), default=float("inf"))


def looks_ahead(config) -> bool:
    """Say whether an image's tokens see the question behind them, so that questions cannot share them."""
    return bool(getattr(config.get_text_config(decoder=True), "use_bidirectional_attention", False))


def packs(config, inputs: list[str]) -> bool:
    """Say whether questions about an image may stand in one sequence, kept apart by a mask, exactly as if each alone.

    Not where a window counts tokens, where positions have more than one axis (M-RoPE), or where attention or positions
    also depend on kinds of tokens (`inputs` are the names of what the processor gives).
    """
    several_axes = "mrope_section" in str(getattr(config.get_text_config(decoder=True), "rope_parameters", None))
    return window(config) == float("inf") and not several_axes and not any("token_type" in name for name in inputs)


def layered(config) -> dict:
    """Return what a text configuration lists for each of its blocks, by name."""
    values, n = config.to_dict(), config.num_hidden_layers
    return {k: v for k, v in values.items() if "layer" in k and isinstance(v, list | tuple) and len(v) == n}


def keep_layers(config, kept) -> None:
    """Let a text configuration describe the kept blocks alone."""
    for name, values in layered(config).items():
        setattr(config, name, [values[b] for b in kept])
    if isinstance(getattr(config, "max_window_layers", None), int):  # of the first blocks, which have no window
        config.max_window_layers = sum(b < config.max_window_layers for b in kept)
    config.num_hidden_layers = len(kept)


def deepstack(config) -> tuple[int, ...]:
    """Return the blocks behind which visual features are added by place: none of them can go."""
    vision = getattr(config, "vision_config", None)
    return tuple(range(len(getattr(vision, "deepstack_visual_indexes", None) or ())))


def protected(config_or_model, blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Return protected block numbers, counted from 0 (negative ones from the end), and those of deepstack."""
    config = getattr(config_or_model, "config", config_or_model)
    return tuple(sorted({*protected_numbers(n_blocks(config), blocks), *deepstack(config)}))
