"""Count a LLaVA's parameters and bytes from its configuration alone: no weights, no torch, milliseconds.

Arithmetic on the shapes that `transformers` gives the same configuration; the tests hold it against the model built on
torch's meta device. Blocks can be removed and stored in fewer bits, each method counted as it packs.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}


def _llava_15(hidden: int, intermediate: int, blocks: int, heads: int) -> dict:
    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return {
        "vision_config": dict(_CLIP_L_336),
        "text_config": text,
        "image_token_index": 32000,
        "image_seq_length": 576,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


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
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 1024,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
    },
    "smollm2": {
        "text_config": {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49216,
        },
        "vision_config": {
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "image_size": 96,
            "patch_size": 16,
        },
    },
}


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
        raise ValueError(
            f"the accounting knows LLaVAs of a CLIP tower and {' or '.join(_TEXT_DEFAULTS)}, "
            f"not of {tower!r} and {kind!r}."
        )
    text = {**_TEXT_DEFAULTS[kind], **text}
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size")
    if missing := [key for key in needed if key not in vision]:
        raise ValueError(f"the vision_config lacks {missing[0]}; a complete CLIP configuration is needed.")
    hidden, inter, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    head_size = text.get("head_dim") or hidden // heads
    q_width, kv_width = heads * head_size, (text.get("num_key_value_heads") or heads) * head_size
    attention = (
        ("q_proj", hidden, q_width),
        ("k_proj", hidden, kv_width),
        ("v_proj", hidden, kv_width),
        ("o_proj", q_width, hidden),
    )
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
        hidden,
        inter,
        text["num_hidden_layers"],
        kv_width,
        text["vocab_size"],
        bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        tuple((f"self_attn.{n}", i, o) for n, i, o in attention) + tuple((f"mlp.{n}", i, o) for n, i, o in mlp),
        2 * hidden + biases,
        # class token, patches, positions, the norms before and after, the layers
        wide + patch_embedding + tokens * wide + 4 * wide + vision["num_hidden_layers"] * layer,
        vision_linears,
        projector_in * hidden + hidden * hidden + projector_biases,
        tokens,
        wide,
        v_inter,
        vision["num_hidden_layers"],
    )


GIB = 1024**3


BITS_CHOICES = (3, 4, 8, 16)


GROUP_SIZE_CHOICES = (32, 64, 128)


METHODS = ("rtn", "awq", "bnb", "bnb-double", "hqq")


BNB_BLOCK_SIZE = 64  # what transformers' BitsAndBytesConfig always uses


def check_quantizable(config, group_size: int | None, bits: float) -> None:
    """Raise ValueError, naming the layer, where no block can be stored in `bits` by groups of `group_size`.

    `bits` is one of BITS_CHOICES; `group_size` one of GROUP_SIZE_CHOICES, or None for one group per row.
    """
    if bits not in BITS_CHOICES:
        raise ValueError(f"bits must be one of {BITS_CHOICES}, not {bits}.")
    _check_groups(shape_of(config).linears, group_size)


def _check_groups(linears, group_size: int | None, where: str = "model.language_model.layers.0") -> None:
    if group_size is None:
        return
    if group_size not in GROUP_SIZE_CHOICES:
        raise ValueError(f"group_size must be one of {GROUP_SIZE_CHOICES} or None, not {group_size}.")
    for name, n_in, _ in linears:
        if n_in % group_size:
            fits = [g for g in GROUP_SIZE_CHOICES if all(i % g == 0 for _, i, _ in linears)]
            raise ValueError(
                f"{where}.{name} has {n_in} inputs, not a multiple of group_size "
                f"{group_size}; of {GROUP_SIZE_CHOICES} these fit: {fits}."
            )


def linear_bytes(
    n_in: int,
    n_out: int,
    bits: float,
    group_size: int | None,
    method: str = "rtn",
    scale_bits: int = 16,
    zero_point_bits: int | None = None,
) -> tuple[int, int, int]:
    """Return one Linear's bytes as (codes, scales, zero points), as `method` stores it.

    rtn, awq: dense codes; a scale of `scale_bits` and a zero point of `zero_point_bits` (None: as many as a
    code) for each group of inputs of each output. bnb: NF4, a float32 absmax for 64 weights and the table
    of 16 levels; bnb-double: that absmax in 8 bits, a float32 for 256 of them, an offset, a table of 256.
    hqq: scale and zero point both of `scale_bits`; three-bit codes go ten to a 32-bit word. 16 bits: weights.
    """
    weights = n_in * n_out
    if bits == 16:
        return 2 * weights, 0, 0
    codes = math.ceil(weights * bits / 8)
    if method in ("bnb", "bnb-double"):
        absmax = math.ceil(weights / BNB_BLOCK_SIZE)
        scales = 4 * absmax if method == "bnb" else absmax + 4 * math.ceil(absmax / 256) + 4 + 4 * 256
        return codes, scales + 4 * 16, 0
    groups = n_out * (n_in // group_size if group_size else 1)
    if method == "hqq":
        codes = 4 * math.ceil(groups / 10) * (group_size or n_in) if bits == 3 else codes
        return codes, groups * scale_bits // 8, groups * scale_bits // 8
    zero_bits = math.ceil(bits) if zero_point_bits is None else zero_point_bits
    return codes, groups * scale_bits // 8, math.ceil(groups * zero_bits / 8)


@dataclass(frozen=True)
class Account:
    """Parameters and bytes of a LLaVA by part; `params` and `part_bytes` have the same parts but for scales.

    `decode_read_bytes` is what one decode step must read: blocks, final norm, head (the embedding table where
    it is tied) and the KV cache of every row; not the vision tower, the projector or an untied table.
    """

    params: dict[str, int]
    part_bytes: dict[str, int]
    kv_cache_bytes: int
    decode_read_bytes: int

    @property
    def total_params(self) -> int:
        return sum(self.params.values())

    @property
    def params_b(self) -> float:
        """Billions of parameters, tied ones once."""
        return self.total_params / 1e9

    @property
    def weights_bytes(self) -> int:
        return sum(self.part_bytes.values())

    @property
    def total_bytes(self) -> int:
        """Weights and KV cache; activations and the runtime's own memory come on top."""
        return self.weights_bytes + self.kv_cache_bytes

    def floor_ms_per_token(self, bandwidth_gb_s: float) -> float:
        """Least ms for a decode step (one token for every row) at `bandwidth_gb_s` = 1e9 bytes/s read."""
        if not bandwidth_gb_s > 0:
            raise ValueError(f"bandwidth must be above 0 GB/s, not {bandwidth_gb_s}.")
        return self.decode_read_bytes / (bandwidth_gb_s * 1e9) * 1e3


def account(
    config,
    blocks_removed: int = 0,
    bits: float | Sequence[float] = 16,
    group_size: int | None = 64,
    context: int = 840,
    batch: int = 1,
    scale_bits: int = 16,
    zero_point_bits: int | None = None,
    method: str = "rtn",
    quantize_head: bool = False,
    quantize_vision: bool = False,
) -> Account:
    """Count a LLaVA less `blocks_removed` blocks, with its block linears stored in `bits` by `method`.

    `bits`: one number (16, or 2 to 8; a fraction stands for an average) or one for each block that is kept.
    `quantize_head` and `quantize_vision` (rtn, hqq) store the head, of which a tied one becomes a copy, and the
    linears of the vision tower in the fewest of them. Everything else stays at 16 bits, the KV cache of
    `context` tokens x `batch` rows too: tokens x 2 x blocks x key-value heads x head size x 2 bytes. Raises
    ValueError for a value out of its range.
    """
    shape = shape_of(config)
    if not 0 <= blocks_removed < shape.blocks:
        raise ValueError(f"blocks_removed must be 0 to {shape.blocks - 1}, not {blocks_removed}.")
    if context < 0 or batch < 1:
        raise ValueError(f"context must be 0 or more and batch 1 or more, not {context} and {batch}.")
    kept = shape.blocks - blocks_removed
    block_bits = list(bits) if isinstance(bits, Sequence) else [bits] * kept
    if len(block_bits) != kept:
        raise ValueError(f"bits lists {len(block_bits)} blocks; {kept} are kept.")
    _check_storage(shape, set(block_bits), group_size, method)
    if quantize_head or quantize_vision:
        _check_others(shape, min(block_bits), group_size, method, quantize_vision)
    storage = (group_size, method, scale_bits, zero_point_bits)
    sizes = {b: _block_bytes(shape, b, *storage) for b in set(block_bits)}
    codes, scales, zeros = (sum(sizes[b][part] for b in block_bits) for part in range(3))
    table, head = shape.vocab * shape.hidden, 0 if shape.tied else shape.vocab * shape.hidden
    params = {
        "vision_tower": shape.vision_params,
        "projector": shape.projector_params,
        "embeddings": table,
        "block_weights": kept * sum(i * o for _, i, o in shape.linears),
        "block_norms": kept * shape.block_extras,
        "final_norm": shape.hidden,
        "head": head,
    }
    part_bytes = {part: 2 * n for part, n in params.items()}
    part_bytes |= {"block_weights": codes, "block_scales": scales, "block_zero_points": zeros}
    head_bytes = 2 * table
    if quantize_head:
        head_bytes = part_bytes["head"] = sum(linear_bytes(shape.hidden, shape.vocab, min(block_bits), *storage))
    if quantize_vision:
        packed = sum(sum(linear_bytes(i, o, min(block_bits), *storage)) for _, i, o in shape.vision_linears)
        dense = sum(2 * i * o for _, i, o in shape.vision_linears)
        part_bytes["vision_tower"] += shape.vision_layers * (packed - dense)
    kv_cache_bytes = context * batch * 2 * kept * shape.kv_width * 2
    blocks_bytes = codes + scales + zeros + part_bytes["block_norms"]
    read = blocks_bytes + part_bytes["final_norm"] + head_bytes + kv_cache_bytes
    return Account(params, part_bytes, kv_cache_bytes, read)


def _block_bytes(shape: Shape, *storage) -> list[int]:
    """Return a block's codes, scales and zero points, in bytes over its seven linears."""
    columns = zip(*(linear_bytes(n_in, n_out, *storage) for _, n_in, n_out in shape.linears), strict=True)
    return [sum(column) for column in columns]


def _check_storage(shape: Shape, bits: set[float], group_size: int | None, method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, not {method!r}.")
    if wrong := [b for b in bits if b != 16 and not 2 <= b <= 8]:
        raise ValueError(f"bits must be 16 or from 2 to 8, not {wrong[0]}.")
    if bits == {16}:
        return
    if method in ("awq", "bnb", "bnb-double") and (wrong := sorted(bits - {4, 16})):
        raise ValueError(f"{method} stores 4 bits, not {wrong[0]}; rtn and hqq store other numbers.")
    if not method.startswith("bnb"):  # bitsandbytes cuts the flattened matrix, so any width will do
        _check_groups(shape.linears, group_size)
    elif group_size != BNB_BLOCK_SIZE:
        raise ValueError(f"{method} has groups of {BNB_BLOCK_SIZE} weights only, not {group_size}.")


def _check_others(shape: Shape, bits: float, group_size: int | None, method: str, vision: bool) -> None:
    if method not in ("rtn", "hqq") or bits == 16:
        raise ValueError(
            f"head and vision tower are quantized by rtn or hqq in fewer than 16 bits, not by {method} in {bits}."
        )
    if vision:
        _check_groups(shape.vision_linears, group_size, "model.vision_tower.encoder.layers.0")
