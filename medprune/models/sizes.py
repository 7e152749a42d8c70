"""Count a model's parameters and bytes from its configuration alone: no weights.

For a LLaVA of a CLIP tower and Llama or Mistral arithmetic on the shapes that `transformers` gives the same
configuration, without torch, in milliseconds; the tests hold it against the model built on torch's meta device. Of any
other the shapes are those of the model on the meta device itself. Blocks can be removed and stored in fewer bits, each
method counted as it packs.
"""

import json
import math
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

from medprune.models.families import ATTENTION, BLOCKS, deepstack, names, parts
from medprune.settings import DATA, GROUP_SIZES, METHODS, NF4_GROUP, protected_numbers

GIB = 1024**3
MOST_BLOCKS = 1000  # of a model that is counted: another number is a slip, and would take the memory of a list as long
STORED_AS = (*METHODS, "bnb-double")  # bitsandbytes' own compression of the scales, which only `account` knows

NO_LINEARS = "the vision tower is of convolutions, which stay in 16 bits: leave quantize_vision out."
# What may be stored in fewer bits beside the blocks, and the option that says so, which takes true or the bits.
OPTIONS = {"vision tower": "quantize_vision", "head": "quantize_head", "embedding table": "quantize_embeddings"}
TABLES = ("rtn", "awq")  # whose codes an embedding table can be looked up in
TIED_TABLE = "the head is the embedding table (tied): leave quantize_head out, quantize_embeddings packs it for both."
ODD_LINEARS = "no linear of the vision tower has a width that groups of {} divide: leave quantize_vision out."

_CLIP_L_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip

# Vicuna v1.5, with the vocabulary padded to 32,064.
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NAMED_SHAPES = {"llava-1.5-7b": (4096, 11008, 32, 32), "llava-1.5-13b": (5120, 13824, 40, 40)}
_VICUNA = {
    "model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
_LLAVA_15 = {
    "vision_config": _CLIP_L_336, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "image_token_index": 32000, "image_seq_length": 576,
}  # fmt: skip

CHECKPOINTS = DATA / "checkpoints.json"  # configurations of published models, by name: what decides their sizes

# What transformers fills in where a hub config.json leaves a key out.
_TEXT_COMMON = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
_TEXT_DEFAULTS = {
    "llama": _TEXT_COMMON | {"intermediate_size": 11008},
    "mistral": _TEXT_COMMON | {"intermediate_size": 14336, "num_key_value_heads": 8},
}
_VISION_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_VISION_DEFAULTS |= {"num_channels": 3, "image_size": 224, "patch_size": 32}

# EfficientNet-Lite0, the tower of `models.eyes`; stages are (blocks, kernel, stride, expansion, channels).
EYES = "efficientnet_lite"
LITE0 = {
    "model_type": EYES, "hidden_size": 1280, "image_size": 224, "patch_size": 32, "num_channels": 3, "stem_size": 32,
    "views": 4, "stages": [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
               (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)],
}  # fmt: skip

_TOWER_DEFAULTS = {"clip_vision_model": _VISION_DEFAULTS, EYES: LITE0}

# The LLaVAs that `assembled.prepare_base` builds; here, so that they can be counted without loading torch.
ASSEMBLED = {
    "tiny": {
        "text_config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
                        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024},
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                          "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
    },
    "smollm2": {
        "text_config": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49216},
        "vision_config": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6,
                          "num_attention_heads": 3, "image_size": 96, "patch_size": 16},
    },
}  # fmt: skip
ASSEMBLED["smollm2-eyes"] = ASSEMBLED["smollm2"] | {"vision_config": LITE0}


def _short_name(name: str | Path) -> str:
    return re.sub(r"-(hf|it|instruct)$", "", str(name).lower().split("/")[-1])


def named_config(name_or_path: str | Path) -> dict:
    """Return a model's configuration as transformers writes it into config.json.

    `name_or_path`: `llava-1.5-7b`, `llava-1.5-13b` or one of CHECKPOINTS (a hub name such as `llava-hf/llava-1.5-7b-hf`
    is taken for the same), a folder, or its config.json. Raises ValueError for anything else.
    """
    path = Path(name_or_path)
    if path.exists() or path.is_absolute():
        return _read_config(path)
    name = _short_name(name_or_path)
    if name in NAMED_SHAPES:
        sizes = dict(zip(_SIZES, NAMED_SHAPES[name], strict=True))
        return deepcopy(_LLAVA_15 | {"text_config": _VICUNA | sizes})
    if name not in (known := checkpoints()):
        choices = ", ".join((*NAMED_SHAPES, *known, "a model's folder or its config.json"))
        raise ValueError(f"model {str(name_or_path)!r} is not known: give one of {choices}.")
    return known[name]["config"]


def checkpoints() -> dict[str, dict]:
    """Return published models whose shapes are known: by name, `config` and `published_b`, the billions stated."""
    return json.loads(CHECKPOINTS.read_text(encoding="utf-8"))


def _read_config(path: Path) -> dict:
    if (path / "adapter_config.json").exists():
        raise ValueError(f"{path} is a LoRA adapter's folder: merge it into its base, and name the merged model's.")
    file = path if path.is_file() else path / "config.json"
    if not file.exists():
        raise ValueError(f"{path} holds no config.json: it is not a model's folder.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}); a model's config.json is needed.") from error
    kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
    if str(kind).startswith("llava_") and "vision_config" not in config:
        script = "convert_llava_weights_to_hf.py (transformers' repository, src/transformers/models/llava)"
        raise ValueError(f"{file} is in LLaVA's original layout: convert it by {script}, and name the new folder.")
    if kind != "llava" and not (isinstance(config, dict) and isinstance(kind, str) and "vision_config" in config):
        raise ValueError(f"{file} is of model_type {kind!r}; one of images and text, with a vision_config, is needed.")
    return config


def base_config(base: str | Path) -> dict | None:
    """Return the configuration of a model that can be tuned, pruned or quantized, named or in a folder.

    None for a hub id whose config.json is neither cached nor to be had. Raises ValueError where there is no such
    model, or where it is a LoRA adapter or quantized already.
    """
    if base in ASSEMBLED:
        return ASSEMBLED[base] | {"model_type": "llava", "tie_word_embeddings": True}
    path = Path(base)
    config = _read_config(path) if path.exists() or path.is_absolute() else _hub_config(str(base))
    if quantized := (config or {}).get("quantization_config"):
        method = quantized.get("quant_method", "some method")
        raise ValueError(f"{base} is quantized already, by {method}: name the 16-bit model that it was made from.")
    whole = config or {}
    for part in (whole, whole.get("text_config"), whole.get("vision_config")):
        if isinstance(part, dict):
            dtype_of(part, f"{base}: config.json")
    return config


def _hub_config(name: str) -> dict | None:
    if not re.fullmatch(r"[^/.][^/]*/[^/]+", name):
        raise ValueError(f"base {name!r} is not known: give {', '.join(ASSEMBLED)}, a hub id or a folder.")
    if _short_name(name) in NAMED_SHAPES:
        return named_config(name)
    from huggingface_hub import hf_hub_download

    try:
        return named_config(hf_hub_download(name, "config.json"))
    except (OSError, RuntimeError):  # offline, no such model, one that wants a login
        return checkpoints().get(_short_name(name), {}).get("config")


def dtype_of(config: dict, name: str = "config.json") -> str:
    """Return the name of the dtype that a configuration states, by transformers 5's field or 4's; else float32's."""
    said = config.get("dtype") or config.get("torch_dtype") or "float32"
    if said not in (known := ("float32", "float16", "bfloat16")):
        raise ValueError(f"{name} has dtype {said!r}: let it be one of {', '.join(known)}, as its tensors are.")
    return said


def skeleton(config, dtype=None):
    """Build a model with its parameters on the meta device, so that dense weights are never in memory."""
    from accelerate import init_empty_weights
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

    if isinstance(config, dict):
        config = {"model_type": "llava"} | deepcopy(config)
        if (kind := config["model_type"]) not in CONFIG_MAPPING:
            raise ValueError(f"config.json is of model_type {kind!r}, which transformers does not know.")
        config = AutoConfig.for_model(**config)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype or config.dtype)
    model.tie_weights()  # which making them empty undid
    return model


def shape_of(config) -> SimpleNamespace:
    """Return the sizes that decide the bytes of a model, of its configuration or the equal dict.

    Linears are (name, inputs, outputs): those of a block, and of one of the vision tower's layers (of the whole tower,
    where it is not CLIP's). Raises ValueError where the layout is not known.
    """
    config = config if isinstance(config, dict) else config.to_dict()
    layers = [part.get("num_hidden_layers") for part in config.values() if isinstance(part, dict)]
    if many := [n for n in layers if isinstance(n, int) and n > MOST_BLOCKS]:
        raise ValueError(f"config.json has {many[0]} layers: at most {MOST_BLOCKS} are counted.")
    try:
        if not is_counted(config):
            return _built(json.dumps(config, sort_keys=True, default=str))
        shape = _counted(config)
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"config.json holds no sizes of a model of images and text ({why}).") from None
    numbers = {k: v for k, v in vars(shape).items() if k not in ("fixed", "tied", "linears", "vision_linears")}
    if wrong := [name for name, n in numbers.items() if not isinstance(n, int) or n < (name == "blocks")]:
        raise ValueError(f"config.json makes {wrong[0]} {numbers[wrong[0]]!r}, which cannot be.")
    return shape


def guarded(shape, protect: Sequence[int]) -> set[int]:
    """Return the blocks that never go: those protected, negative numbers from the end, and those that cannot."""
    return {*protected_numbers(shape.blocks, tuple(protect)), *shape.fixed}


def is_counted(config: dict) -> bool:
    """Say whether a model is a LLaVA of a tower and a text model whose sizes follow by arithmetic."""
    text, vision = config.get("text_config") or {}, config.get("vision_config") or _CLIP_L_336
    known = text.get("model_type", "llama") in _TEXT_DEFAULTS
    known &= vision.get("model_type", "clip_vision_model") in _TOWER_DEFAULTS
    return known and config.get("model_type", "llava") == "llava"


@lru_cache(maxsize=8)
def _built(config: str) -> SimpleNamespace:
    """Return `shape_of` of a configuration's JSON by building the model on the meta device."""
    model = skeleton({k: v for k, v in json.loads(config).items() if k not in ("dtype", "quantization_config")})
    found, called, text = parts(model), names(model), model.config.get_text_config(decoder=True)
    block, projected = found.blocks[0], {id(p) for p in found.projector.parameters()}
    table, head = found.text_model.embed_tokens.weight, found.head.weight
    linears = _linears(block)
    sizes = {"hidden": table.shape[1], "vocab": table.shape[0], "intermediate": text.intermediate_size}
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tower = sum(p.numel() for p in found.vision_tower.parameters() if id(p) not in projected)
    of_text = sum(p.numel() for p in found.text_model.parameters())
    beside = sum(p.numel() for p in model.parameters()) - tower - of_text - (0 if head is table else head.numel())
    return SimpleNamespace(
        **sizes,
        blocks=len(found.blocks),
        kv_width=heads * head_size,
        tied=head is table,
        linears=linears,
        block_extras=sum(p.numel() for p in block.parameters()) - sum(n_in * n_out for _, n_in, n_out in linears),
        projector_params=beside,
        vision_params=tower,
        vision_linears=_linears(found.vision_tower, f"{called.vision_tower}."),
        vision_layers=1,
        vision_tokens=None,
        fixed=deepstack(model.config),
    )


def _linears(module, prefix="") -> list[tuple[str, int, int]]:
    found = [(name, m) for name, m in module.named_modules() if type(m).__name__ == "Linear"]
    return [(prefix + name, m.in_features, m.out_features) for name, m in found]


def _counted(config: dict) -> SimpleNamespace:
    """Return `shape_of` of a LLaVA of a CLIP tower and Llama or Mistral, by arithmetic."""
    text, vision = _text_and_vision(config)
    hidden, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    head_size = text.get("head_dim") or hidden // heads
    wide, kv = heads * head_size, (text.get("num_key_value_heads") or heads) * head_size
    attention = (("q_proj", hidden, wide), ("k_proj", hidden, kv), ("v_proj", hidden, kv), ("o_proj", wide, hidden))
    mlp = (("gate_proj", hidden, inner), ("up_proj", hidden, inner), ("down_proj", inner, hidden))
    biases = sum(n for _, _, n in attention) * bool(text.get("attention_bias"))
    biases += sum(n for _, _, n in mlp) * bool(text.get("mlp_bias"))
    features = config.get("vision_feature_layer", -2)
    projector_in = vision["hidden_size"] * (1 if isinstance(features, int) else len(features))
    projector_biases = 2 * hidden * bool(config.get("multimodal_projector_bias", True))
    return SimpleNamespace(
        hidden=hidden,
        intermediate=inner,
        blocks=text["num_hidden_layers"],
        kv_width=kv,  # key-value heads x head size: what one token adds to K, and to V, in each block
        vocab=text["vocab_size"],
        fixed=(),  # blocks that cannot go
        tied=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        linears=[(f"{module}.{n}", *io) for module, part in ((ATTENTION, attention), ("mlp", mlp)) for n, *io in part],
        block_extras=2 * hidden + biases,  # parameters of a block outside its linears' weights: two norms, and biases
        projector_params=projector_in * hidden + hidden * hidden + projector_biases,
        **_vision_sizes(vision),
    )


def _text_and_vision(config: dict) -> tuple[dict, dict]:
    text, vision = config.get("text_config") or {}, config.get("vision_config") or _CLIP_L_336
    kind, tower = text.get("model_type", "llama"), vision.get("model_type", "clip_vision_model")
    return _TEXT_DEFAULTS[kind] | text, _TOWER_DEFAULTS[tower] | vision


def _vision_sizes(vision: dict) -> dict:
    if vision.get("model_type") == EYES:
        return _eyes_sizes(vision)
    wide, inner, layers = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1  # patches and the class token
    linears = [(f"{ATTENTION}.{name}_proj", wide, wide) for name in ("q", "k", "v", "out")]
    linears += [("mlp.fc1", wide, inner), ("mlp.fc2", inner, wide)]
    layer = sum(n_in * n_out + n_out for _, n_in, n_out in linears) + 4 * wide  # biases, and two norms
    patches = wide * vision["num_channels"] * vision["patch_size"] ** 2
    params = (
        wide + patches + tokens * wide + 4 * wide + layers * layer
    )  # class token, positions, norms before and after
    return {"vision_params": params, "vision_linears": linears, "vision_layers": layers, "vision_tokens": tokens}


def _eyes_sizes(vision: dict) -> dict:
    """Count convolutions, each with a bias into which its norm is folded; none is a Linear."""
    width = vision["stem_size"]
    params = vision["num_channels"] * 9 * width + width
    for blocks, kernel, _, expansion, channels in vision["stages"]:
        for _ in range(blocks):
            wide = width * expansion
            params += (width * wide + wide) * (expansion > 1)
            params += wide * kernel**2 + wide + wide * channels + channels
            width = channels
    params += width * vision["hidden_size"] + vision["hidden_size"]
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1  # patches and their mean
    return {"vision_params": params, "vision_linears": [], "vision_layers": 0, "vision_tokens": tokens}


def linear_bytes(
    n_in: int, n_out: int, bits: float, group_size: int, method="rtn", scale_bits=16, zero_point_bits: int | None = None
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
        absmax = math.ceil(weights / NF4_GROUP)
        scales = 4 * absmax if method == "bnb" else absmax + 4 * math.ceil(absmax / 256) + 4 + 4 * 256
        return codes, scales + 4 * 16, 0
    groups = n_out * (n_in // group_size)
    scales = groups * scale_bits // 8
    if method == "hqq":
        codes = 4 * math.ceil(groups / 10) * group_size if bits == 3 else codes
        return codes, scales, scales
    zero_bits = math.ceil(bits) if zero_point_bits is None else zero_point_bits
    return codes, scales, math.ceil(groups * zero_bits / 8)


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


def account(config, blocks_removed=0, bits=16, group_size=64, context=840, batch=1, method="rtn", **also) -> Account:
    """Count a LLaVA less `blocks_removed` blocks, with its block linears stored in `bits` by `method`.

    `bits`: one number (16, or 2 to 8; a fraction stands for an average) or one for each block that is kept.
    `also`: `quantize_head` and `quantize_vision` (not bnb) store the head, of which a tied one becomes a copy, and the
    linears of the vision tower in the fewest of them, or in the bits that they name, and so does `quantize_embeddings`
    (rtn, awq) the embedding table, a head that is tied to it with it; `scale_bits` and `zero_point_bits` are as
    `linear_bytes` takes them. Everything else stays at 16 bits, the KV cache of `context` tokens x `batch` rows
    too: tokens x 2 x blocks x key-value heads x head size x 2 bytes. Raises ValueError for a value out of its range.
    """
    options = {part: also.pop(f"quantize_{part}", False) for part in ("head", "vision", "embeddings")}
    shape = shape_of(config)
    if not 0 <= blocks_removed < shape.blocks:
        raise ValueError(f"blocks_removed must be 0 to {shape.blocks - 1}, not {blocks_removed}.")
    if context < 0 or batch < 1:
        raise ValueError(f"context must be 0 or more and batch 1 or more, not {context} and {batch}.")
    kept = shape.blocks - blocks_removed
    block_bits = list(bits) if isinstance(bits, Sequence) else [bits] * kept
    if len(block_bits) != kept:
        raise ValueError(f"bits lists {len(block_bits)} blocks; {kept} are kept.")
    _check_storage(shape, set(block_bits), group_size, method, **options)
    storage = {"group_size": group_size, "method": method, **also}
    width = {part: min(block_bits) if said is True else said for part, said in options.items()}
    params = _params(shape, kept)
    part_bytes = {part: 2 * n for part, n in params.items()}
    each = {width: _stored(shape.linears, width, storage) for width in set(block_bits)}
    for number, part in enumerate(("block_weights", "block_scales", "block_zero_points")):
        part_bytes[part] = sum(each[width][number] for width in block_bits)
    head_bytes = 2 * shape.vocab * shape.hidden
    if options["head"]:
        head_bytes = part_bytes["head"] = sum(linear_bytes(shape.hidden, shape.vocab, width["head"], **storage))
    if options["embeddings"]:
        table = sum(linear_bytes(shape.hidden, shape.vocab, width["embeddings"], **storage))
        part_bytes["embeddings"] = table + 2  # a factor that its rows are multiplied by
        head_bytes = table if shape.tied else head_bytes
    if options["vision"]:
        fits = [linear for linear in shape.vision_linears if packable(*linear[1:], group_size)]
        before, after = (sum(_stored(fits, bits, storage)) for bits in (16, width["vision"]))
        part_bytes["vision_tower"] -= shape.vision_layers * (before - after)
    kv_cache_bytes = context * batch * 2 * kept * shape.kv_width * 2
    blocks_bytes = sum(size for part, size in part_bytes.items() if part.startswith("block_"))
    read = blocks_bytes + part_bytes["final_norm"] + head_bytes + kv_cache_bytes
    return Account(params, part_bytes, kv_cache_bytes, read)


def _params(shape, kept: int) -> dict[str, int]:
    table = shape.vocab * shape.hidden
    return {
        "vision_tower": shape.vision_params,
        "projector": shape.projector_params,
        "embeddings": table,
        "block_weights": kept * sum(n_in * n_out for _, n_in, n_out in shape.linears),
        "block_norms": kept * shape.block_extras,
        "final_norm": shape.hidden,
        "head": 0 if shape.tied else table,
    }


def packable(n_in: int, n_out: int, group_size: int) -> bool:
    """Say whether a Linear can be packed: its inputs in whole groups, its outputs in whole words."""
    return n_in % group_size == 0 and n_out % 8 == 0


def _stored(linears, bits: float, storage: dict) -> list[int]:
    """Return a layer's codes, scales and zero points, in bytes over its linears."""
    return [sum(sizes) for sizes in zip(*(linear_bytes(i, o, bits, **storage) for _, i, o in linears), strict=True)]


def _check_storage(shape, bits: set[float], group_size: int, method: str, head, vision, embeddings) -> None:
    if method not in STORED_AS:
        raise ValueError(f"method must be one of {STORED_AS}, not {method!r}.")
    if wrong := [b for b in bits if b != 16 and not 2 <= b <= 8]:
        raise ValueError(f"bits must be 16 or from 2 to 8, not {wrong[0]}.")
    if bits == {16} and True in (head, vision, embeddings):
        ways = f"by rtn or hqq in fewer than 16 bits, not by {method} in 16"
        raise ValueError(f"head, vision tower and embedding table are quantized {ways}.")
    if embeddings and method not in TABLES:
        raise ValueError(f"quantize_embeddings works with {' and '.join(TABLES)}, not with {method}.")
    if embeddings and head and shape.tied:
        raise ValueError(TIED_TABLE)
    if vision and not shape.vision_linears:
        raise ValueError(NO_LINEARS)
    plain = bits == {16} and not (head or vision or embeddings)
    if plain or method.startswith("bnb"):  # bitsandbytes cuts the flattened matrix, so any width will do
        return
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}, not {group_size}.")
    if vision and not any(packable(*linear[1:], group_size) for linear in shape.vision_linears):
        raise ValueError(ODD_LINEARS.format(group_size))
    if (head or embeddings) and not packable(shape.hidden, shape.vocab, group_size):
        which = f"head and embedding table are {shape.vocab} x {shape.hidden}"
        raise ValueError(f"{which}, which 8 and groups of {group_size} do not divide: leave them in 16 bits.")
    fits = [g for g in GROUP_SIZES if all(n_in % g == 0 for _, n_in, _ in shape.linears)]
    if group_size not in fits:
        name, n_in = next((name, n_in) for name, n_in, _ in shape.linears if n_in % group_size)
        which = f"{BLOCKS}.0.{name} has {n_in} inputs, not a multiple of group_size {group_size}"
        raise ValueError(f"{which}; of {GROUP_SIZES} these fit: {fits}.")
