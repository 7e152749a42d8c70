"""Read from a LLaVA's configuration the sizes that decide its parameters and bytes: no torch, no weights."""

import json
from dataclasses import dataclass
from pathlib import Path

_CLIP_L_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip


def _llava_15(hidden: int, intermediate: int, blocks: int, heads: int) -> dict:
    text = {
        "model_type": "llama", "vocab_size": 32064, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": heads,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    return {
        "vision_config": dict(_CLIP_L_336), "text_config": text, "image_token_index": 32000,
        "image_seq_length": 576, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    }  # fmt: skip


# name -> hidden size, intermediate size, blocks, heads (vicuna v1.5, with the vocabulary padded to 32,064)
NAMED_SHAPES = {"llava-1.5-7b": (4096, 11008, 32, 32), "llava-1.5-13b": (5120, 13824, 40, 40)}

# What transformers fills in where a hub config.json leaves a key of the text configuration out.
_TEXT_DEFAULTS = {
    kind: {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000} | own
    for kind, own in {
        "llama": {"intermediate_size": 11008},
        "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8},
    }.items()
}
# The LLaVAs that `model.prepare_base` assembles; here, so that they can be counted without loading torch.
ASSEMBLED = {
    "tiny": {
        "text_config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "vocab_size": 1024},
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "image_size": 32, "patch_size": 16},
    },
    "smollm2": {
        "text_config": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                        "num_key_value_heads": 3, "vocab_size": 49216},
        "vision_config": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3,
                          "image_size": 96, "patch_size": 16},
    },
}  # fmt: skip


def named_config(name_or_path: str | Path) -> dict:
    """Return a LLaVA configuration as keyword arguments of `transformers.LlavaConfig`.

    `name_or_path`: `llava-1.5-7b` or `llava-1.5-13b` (a hub name such as `llava-hf/llava-1.5-7b-hf` is taken
    for the same), a LLaVA-layout folder, or its config.json. Raises ValueError for anything else.
    """
    path = Path(name_or_path)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not JSON ({error}); a LLaVA's config.json is needed.") from error
        if not isinstance(config, dict) or config.get("model_type") != "llava":
            kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
            raise ValueError(f"{file} is of model_type {kind!r}; a LLaVA's, 'llava', is needed.")
        return config
    name = str(name_or_path).lower().split("/")[-1].removesuffix("-hf")
    if name not in NAMED_SHAPES:
        choices = ", ".join((*NAMED_SHAPES, "a LLaVA-layout folder or its config.json"))
        raise ValueError(f"model {str(name_or_path)!r} is not known: give one of {choices}.")
    return _llava_15(*NAMED_SHAPES[name])


def base_config(base: str) -> dict | None:
    """Return a base's configuration; None for a hub id whose config.json is neither cached nor to be had."""
    if base in ASSEMBLED:
        return ASSEMBLED[base] | {"model_type": "llava", "tie_word_embeddings": True}
    organisation, slash, name = base.partition("/")
    on_hub = slash and organisation.strip(".") and "/" not in name
    if not on_hub and not Path(base).exists():
        raise ValueError(f"base {base!r} is not known: give {', '.join(ASSEMBLED)}, a hub id or a LLaVA-layout folder.")
    if Path(base).exists() or name.lower().removesuffix("-hf") in NAMED_SHAPES:
        return named_config(base)
    from huggingface_hub import hf_hub_download

    try:
        return named_config(hf_hub_download(base, "config.json"))
    except (OSError, RuntimeError):  # offline, no such model, one that wants a login
        return None


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaVA that decide its bytes; `linears` are a block's (name, inputs, outputs)."""

    hidden: int
    intermediate: int
    blocks: int
    kv_width: int  # key-value heads x head size: what one token adds to K, and to V, in each block
    vocab: int
    tied: bool
    linears: tuple[tuple[str, int, int], ...]
    block_extras: int  # parameters of a block outside its linears' weights: two norms, and biases if any
    vision_params: int
    vision_linears: tuple[tuple[str, int, int], ...]  # those of one of its layers
    projector_params: int
    vision_tokens: int  # patches and the class token
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int


def shape_of(config) -> Shape:
    """Read the sizes from a `LlavaConfig` or the equal dict; ValueError where the layout is not known."""
    config = config if isinstance(config, dict) else config.to_dict()
    parts = [config.get("text_config") or {}, config.get("vision_config") or _CLIP_L_336]
    text, vision = (part if isinstance(part, dict) else part.to_dict() for part in parts)
    kind, tower = text.get("model_type", "llama"), vision.get("model_type", "clip_vision_model")
    if kind not in _TEXT_DEFAULTS or tower != "clip_vision_model":
        raise ValueError(f"the accounting knows LLaVAs of a CLIP tower and {' or '.join(_TEXT_DEFAULTS)}, "
                         f"not of {tower!r} and {kind!r}.")  # fmt: skip
    text = {**_TEXT_DEFAULTS[kind], **text}
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size")
    if missing := [key for key in needed if key not in vision]:
        raise ValueError(f"the vision_config lacks {missing[0]}; a complete CLIP configuration is needed.")
    hidden, inter, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    head_size = text.get("head_dim") or hidden // heads
    q_width, kv_width = heads * head_size, (text.get("num_key_value_heads") or heads) * head_size
    attention = (("q_proj", hidden, q_width), ("k_proj", hidden, kv_width), ("v_proj", hidden, kv_width),
                 ("o_proj", q_width, hidden))  # fmt: skip
    mlp = (("gate_proj", hidden, inter), ("up_proj", hidden, inter), ("down_proj", inter, hidden))
    biases = sum(o for _, _, o in attention) * bool(text.get("attention_bias"))
    biases += sum(o for _, _, o in mlp) * bool(text.get("mlp_bias"))
    wide, v_inter = vision["hidden_size"], vision["intermediate_size"]
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    patch_embedding = wide * vision.get("num_channels", 3) * vision["patch_size"] ** 2
    layer = 4 * (wide * wide + wide) + 2 * wide * v_inter + v_inter + wide + 4 * wide
    vision_linears = tuple((f"self_attn.{n}_proj", wide, wide) for n in ("q", "k", "v", "out"))
    vision_linears += (("mlp.fc1", wide, v_inter), ("mlp.fc2", v_inter, wide))
    layers_read = config.get("vision_feature_layer", -2)
    projector_in = wide * (1 if isinstance(layers_read, int) else len(layers_read))
    projector_biases = 2 * hidden * bool(config.get("multimodal_projector_bias", True))
    return Shape(
        hidden, inter, text["num_hidden_layers"], kv_width, text["vocab_size"],
        bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        tuple((f"self_attn.{n}", i, o) for n, i, o in attention)
        + tuple((f"mlp.{n}", i, o) for n, i, o in mlp),
        2 * hidden + biases,
        # class token, patches, positions, the norms before and after, the layers
        wide + patch_embedding + tokens * wide + 4 * wide + vision["num_hidden_layers"] * layer,
        vision_linears, projector_in * hidden + hidden * hidden + projector_biases, tokens, wide, v_inter,
        vision["num_hidden_layers"],
    )  # fmt: skip
