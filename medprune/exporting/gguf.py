"""A LLaVA as llama.cpp reads it: a GGUF of the text model and one of tower and projector, with the gguf package alone.

Tensors are read, turned and written one at a time. Weights of 16 bits keep their bits; codes of 3 and 4 bits go into
Q4_1, blocks of 32 weights `code * d + m` of which d is our scale, exactly, and m = -zero_point * scale rounded to fp16:
an error of at most 1% of a step (0.7% where nothing is subnormal). Those of 8 bits, which no format keeps as they are,
are rounded anew to Q8_0. So are mixed widths written, and a packed tower, head and embedding table.
"""

import math
import os
import shutil
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from errno import ENOSPC
from functools import partial
from itertools import product
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from medprune.exporting.engines import MMPROJ, TEXT, quantizer
from medprune.exporting.folders import APART_USE, Source, model_card, shapes_of, write_tower
from medprune.exporting.llamacpp import CHAT
from medprune.exporting.vocabulary import add_tokenizer, chat_pieces, modelfile
from medprune.models.families import ATTENTION, BLOCKS, HEAD, PROJECTOR, VISION_LAYERS, VISION_TOWER, parts
from medprune.models.loading import read_tensor
from medprune.models.sizes import OPTIONS, account
from medprune.quantizing.packed import from_awq, unpack_codes
from medprune.store import check_new, write_folder, write_text

BLOCK = 32  # weights of a block
BLOCK_BYTES = {Kind.Q4_1: 20, Kind.Q8_0: 34}  # codes, and d, of Q4_1 m too, in fp16
PARTS = ("qzeros", "scales", "scale", "zero_point", "multiplier")  # of a packed layer, beside its qweight
MAX_STEP_ERROR = 0.01  # of a step
_USE = """```bash
llama-server -m text.gguf --mmproj mmproj.gguf --jinja --temp 0 --host 127.0.0.1
ollama create NAME -f Modelfile
```
- Photographs that are not square: llama.cpp pads them, where the model was tuned on the middle square. Crop them to it.
- Stock llama.cpp puts CLIP's class token behind the patches (issue 25814), which changes answers. `medprune parity`
  measures whether a runtime does."""
_ARCHITECTURE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
_TEXT_ROOT = BLOCKS.rpartition(".")[0]
_PROJECTOR = f"model.{PROJECTOR}"
_OF_BLOCK = {
    f"{ATTENTION}.q_proj": "attn_q", f"{ATTENTION}.k_proj": "attn_k", f"{ATTENTION}.v_proj": "attn_v",
    f"{ATTENTION}.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_OF_VISION_LAYER = {
    f"{ATTENTION}.q_proj": "attn_q", f"{ATTENTION}.k_proj": "attn_k", f"{ATTENTION}.v_proj": "attn_v",
    f"{ATTENTION}.out_proj": "attn_out", "layer_norm1": "ln1", "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}  # fmt: skip
_DTYPES = {Kind.BF16: torch.bfloat16, Kind.F16: torch.float16, Kind.F32: torch.float32}
_FILE_TYPES = {torch.bfloat16: "MOSTLY_BF16", torch.float16: "MOSTLY_F16", torch.float32: "ALL_F32"}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: its name and kind there, its shape in bytes (uint8) or floats, and how it is read."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    read: object

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape)) * (4 if self.kind == Kind.F32 else 1)


def export_gguf(source: Source, out: Path, **record) -> list[str]:
    """Write text.gguf, mmproj.gguf, a Modelfile and README.md; return lines on their bytes, beside the plan's.

    Tower and projector that go apart stay safetensors. record: as `write_folder` takes it.

    Raises ValueError in one sentence, and leaves nothing, for what llama.cpp would compute otherwise.
    """
    _check(source)
    with write_folder(check_new(out), **record) as temporary:
        worst = _write_pair(source, text_tensors(source), "to GGUF", temporary)
        files = [f for kind in ("gguf", "safetensors") for f in sorted(temporary.rglob(f"*.{kind}"), reverse=True)]
        sizes = {str(f.relative_to(temporary)): f.stat().st_size for f in files}
    lines = [f"{out / name}: {size / 2**20:.1f} MiB" for name, size in sizes.items()]
    return lines + notes(source, sum(sizes.values()), worst)


def _write_pair(source: Source, tensors: list[Tensor], what: str, folder: Path, stored=None) -> dict[Kind, float]:
    """Write both files, the Modelfile and the card into a folder; return what `write` does of them.

    tensors: the text model's; stored: as `text_writer` takes it; what: as `model_card` does.
    """
    worst = write(text_writer(source, stored), tensors, folder / TEXT)
    if source.apart:
        write_tower(source, folder)
        use = f"```bash\nmedprune serve FOLDER\n```\nwith xllamacpp. {APART_USE}"
        write_text(folder / "README.md", model_card(source, what, use))
        return worst
    worst |= write(vision_writer(source), vision_tensors(source), folder / MMPROJ)
    write_text(folder / "Modelfile", modelfile(source.processor, TEXT, MMPROJ))
    write_text(folder / "README.md", model_card(source, what, _USE))
    return worst


def notes(source: Source, n_bytes: int, worst: dict[Kind, float], context: int = 840) -> list[str]:
    """Return lines that put the files beside the plan, and say what of our storage costs bytes or steps there."""
    lines = []
    if source.text["model_type"] != "qwen2":  # whose biases the plan does not count
        storage = source.config.get("quantization_config") or {}
        known = ("bits", "group_size", *OPTIONS.values())
        storage = {name: storage[name] for name in known if name in storage}
        plan = account(source.config, 0, context=context, **storage)
        cache = plan.kv_cache_bytes / 2**20
        lines += [f"in all {n_bytes / 2**20:.1f} MiB, where the plan has {plan.weights_bytes / 2**20:.1f}"]
        lines += [
            f"with a KV cache of {context} tokens in 16 bits ({cache:.1f} MiB): {n_bytes / 2**20 + cache:.1f} MiB"
        ]
    if Kind.Q4_1 in worst:
        lines += [f"codes and scales are kept in Q4_1, offsets within {worst[Kind.Q4_1]:.2%} of a step"]
    if Kind.Q8_0 in worst:
        lines += [f"what had 8 bits is rounded anew to Q8_0, within {worst[Kind.Q8_0]:.2f} of a step"]
    if (source.group_size or BLOCK) > BLOCK and Kind.Q4_1 in worst:
        lines += [
            f"Q4_1 takes 5 bits a weight for groups of {source.group_size} as for {BLOCK}: "
            f"`medprune quantize --group-size {BLOCK}` keeps more in the same file."
        ]
    return lines


def _check(source: Source) -> None:
    text, vision, config = source.text, source.vision, source.config
    rope = text.get("rope_parameters") or {}
    layer = config.get("vision_feature_layer", -2)
    wanted = {
        "rope_type": (rope.get("rope_type", "default"), ["default"]),
        "hidden_act of the text model": (text["hidden_act"], ["silu"]),
        "mlp_bias": (bool(text.get("mlp_bias")), [False]),
    }
    if not source.apart:
        wanted |= {
            "vision_feature_select_strategy": (config.get("vision_feature_select_strategy", "default"), ["default"]),
            "projector_hidden_act": (config.get("projector_hidden_act", "gelu"), ["gelu"]),
            "hidden_act of the tower": (vision["hidden_act"], ["quick_gelu", "gelu"]),
            "vision_feature_layer": (type(layer).__name__, ["int"]),
        }
    for name, (value, known) in wanted.items():
        if value not in known:
            choices = " or ".join(map(str, known))
            raise ValueError(f"{source.folder} has {name} {value!r}, of which llama.cpp's LLaVA knows {choices} only.")
    if (source.group_size or BLOCK) % BLOCK:
        raise ValueError(f"groups of {source.group_size} are no multiple of a block's {BLOCK} weights.")


# ---- text
def text_writer(source: Source, stored: gguf.LlamaFileType | None = None) -> gguf.GGUFWriter:
    """Return a writer with the text model's keys, tokenizer and chat template put in; stored: how, or as the source."""
    text = source.text
    heads = text["num_attention_heads"]
    size = text.get("head_dim") or text["hidden_size"] // heads
    writer = gguf.GGUFWriter(None, _ARCHITECTURE[text["model_type"]])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.folder.name)
    writer.add_block_count(text["num_hidden_layers"])
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    writer.add_context_length(min(text["max_position_embeddings"], window or math.inf))  # up to it, none is missed
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(text.get("num_key_value_heads") or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base((text.get("rope_parameters") or text)["rope_theta"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_vocab_size(text["vocab_size"])
    widths = set(source.packed.values())
    packed = "MOSTLY_Q8_0" if widths == {8} else "MOSTLY_Q4_1"
    name = packed if widths else _FILE_TYPES[getattr(torch, source.dtype)]
    writer.add_file_type(stored or gguf.LlamaFileType[name])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, source)
    if source.apart:  # whoever serves it has no other template, for llama.cpp's own server takes no embeddings
        for name, said in chat_pieces(source.processor).items():
            writer.add_string(f"{CHAT}{name}", said)
    return writer


def text_tensors(source: Source) -> list[Tensor]:
    """Return the text model's tensors; a head that is tied to the embeddings is none, as llama.cpp has it."""
    names = {f"{_TEXT_ROOT}.embed_tokens": "token_embd", f"{_TEXT_ROOT}.norm": "output_norm", HEAD: "output"}
    for block in range(source.text["num_hidden_layers"]):
        names |= {f"{BLOCKS}.{block}.{old}": f"blk.{block}.{new}" for old, new in _OF_BLOCK.items()}
    shapes, found = shapes_of(source.tensors), []
    for key, shape in shapes.items():
        module, _, part = key.rpartition(".")
        if module not in names or part in PARTS:
            continue
        heads = _rotated_heads(source, module)
        if part == "qweight":
            found.append(_packed(source, module, names[module], shape, heads))
        else:
            found.append(_floats(source, key, f"{names[module]}.{part}", shape, heads))
    return found


def _packed(source: Source, module: str, name: str, shape, heads: int | None = None) -> Tensor:
    """Return a packed layer's weight: in Q8_0 where it has 8 bits, else in Q4_1. shape: of its qweight."""
    bits = source.packed[module]
    n_out, n_in = (shape[1] * 8, shape[0]) if source.standard else (shape[0], shape[1] * 8 // bits)
    kind = Kind.Q8_0 if bits == 8 else Kind.Q4_1
    read = partial(_read_packed, source, module, heads)
    return Tensor(f"{name}.weight", kind, (n_out, n_in // BLOCK * BLOCK_BYTES[kind]), read)


def _rotated_heads(source: Source, module: str) -> int | None:
    """Return how many heads a projection has whose rows llama.cpp wants in pairs (RoPE of Meta's order), or None."""
    if _ARCHITECTURE[source.text["model_type"]] != "llama":
        return None
    heads = source.text["num_attention_heads"]
    kv_heads = source.text.get("num_key_value_heads") or heads
    return {"q_proj": heads, "k_proj": kv_heads}.get(module.rpartition(".")[2])


def paired(rows: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Return rows (out, ...) with those of each head's two halves in turn, as llama.cpp's llama rotates them."""
    if heads is None:
        return rows
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _floats(source: Source, key: str, name: str, shape, heads=None, kind: Kind | None = None) -> Tensor:
    """Return a tensor of floats: of one dimension in F32, else in `kind` or as it is stored."""
    kinds = {"bfloat16": Kind.BF16, "float16": Kind.F16, "float32": Kind.F32}
    kind = Kind.F32 if len(shape) == 1 else kind or kinds[source.dtype]
    shape = tuple(shape) if kind == Kind.F32 else (*shape[:-1], 2 * shape[-1])
    return Tensor(name, kind, shape, partial(_read_floats, source, key, heads, kind))


def _read_floats(source: Source, key: str, heads: int | None, kind: Kind) -> np.ndarray:
    stored = paired(read_tensor(*source.tensors[key]), heads)
    found = stored.to(_DTYPES[kind])
    if not torch.isfinite(found).all():
        raise ValueError(f"{key} holds NaN, or a number that {kind.name} does not reach.")
    found = found.contiguous()
    return (found if kind == Kind.F32 else found.view(torch.uint8)).numpy()


def _read_packed(source: Source, module: str, heads: int | None) -> tuple[np.ndarray, float]:
    """Return (blocks (out, bytes) uint8, the worst error as a share of a step)."""
    parts = ("qweight", "qzeros", "scales") if source.standard else ("qweight", "zero_point", "scale")
    stored, bits = [read_tensor(*source.tensors[f"{module}.{part}"]) for part in parts], source.packed[module]
    layer = from_awq(*stored) if source.standard else dict(zip(parts, stored, strict=True))
    codes, zeros = unpack_codes(layer["qweight"], bits), unpack_codes(layer["zero_point"], bits)
    codes, scale, zeros = (paired(part, heads) for part in (codes, layer["scale"].t(), zeros.t()))
    if bits == 8:
        return q8_0(codes, scale, zeros)
    data, worst = q4_1(codes, scale, zeros)
    if not worst <= MAX_STEP_ERROR:
        raise ValueError(f"{module}: Q4_1 would be off by {worst:.1%} of a step, more than {MAX_STEP_ERROR:.0%}.")
    return data, worst


def q4_1(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> tuple[np.ndarray, float]:
    """Return codes (out, in) uint8 with scale fp16 and zero_point uint8 (out, groups) as Q4_1, and the worst error.

    Blocks are (out, in / 32 * 20) bytes: d, m, then 32 codes, the first half in the low nibbles. The error is m's, as
    a share of a step.
    """
    times = codes.shape[1] // scale.shape[1] // BLOCK  # blocks in a group
    exact = -zero_point.float() * scale.float()
    m = exact.half()
    worst = float(((m.float() - exact).abs() / scale.float()).max())
    d, m = (part.repeat_interleave(times, 1)[..., None].contiguous().view(torch.uint8) for part in (scale.half(), m))
    halves = codes.reshape(len(codes), -1, 2, BLOCK // 2)  # (out, blocks, halves, 16)
    return torch.cat([d, m, halves[:, :, 0] | (halves[:, :, 1] << 4)], -1).reshape(len(codes), -1).numpy(), worst


def q8_0(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> tuple[np.ndarray, float]:
    """Return 8-bit codes, as `q4_1` takes them, rounded anew to Q8_0, and the worst error as a share of their step.

    Blocks are (out, in / 32 * 34) bytes: d, then 32 signed codes; d is the largest weight's size over 127.
    """
    grouped = codes.reshape(*scale.shape, -1).float()
    weight = ((grouped - zero_point.float()[..., None]) * scale.float()[..., None]).reshape(codes.shape)
    data = gguf.quants.quantize(weight.numpy(), Kind.Q8_0)
    again = torch.from_numpy(gguf.quants.dequantize(data, Kind.Q8_0))
    steps = (again - weight).abs().reshape(grouped.shape) / scale.float()[..., None]
    return data, float(steps.max())


# ---- tower and projector
def vision_layers_run(source: Source) -> int:
    """Return how many of the tower's layers come before the features that the projector takes."""
    layer, n = source.config.get("vision_feature_layer", -2), source.vision["num_hidden_layers"]
    return n + 1 + layer if layer < 0 else layer


def vision_writer(source: Source) -> gguf.GGUFWriter:
    """Return a writer with the keys of tower and projector; without feature_layer, llama.cpp would skip a layer."""
    vision, pictures = source.vision, source.processor.image_processor
    depth = vision_layers_run(source)
    writer = gguf.GGUFWriter(None, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(source.folder.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if _half(source) else gguf.LlamaFileType.ALL_F32)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_use_gelu(vision["hidden_act"] == "gelu")
    writer.add_vision_image_size(vision["image_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_projection_dim(source.text["hidden_size"])
    writer.add_vision_block_count(depth)
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(vision["layer_norm_eps"])
    writer.add_vision_image_mean(list(pictures.image_mean))
    writer.add_vision_image_std(list(pictures.image_std))
    writer.add_array("clip.vision.feature_layer", [depth])
    return writer


def _half(source: Source) -> bool:
    return source.dtype != "float32"


def vision_tensors(source: Source) -> list[Tensor]:
    """Return the tensors of tower and projector: matrices in F16 where the model is of 16 bits, the rest in F32."""
    embeddings = f"{VISION_TOWER}.embeddings"
    names = {f"{embeddings}.patch_embedding": "v.patch_embd", f"{VISION_TOWER}.pre_layrnorm": "v.pre_ln"}
    names |= {f"{embeddings}.position_embedding": "v.position_embd"}
    names |= {f"{_PROJECTOR}.linear_{n}": f"mm.{2 * n - 2}" for n in (1, 2)}
    for layer in range(vision_layers_run(source)):
        names |= {f"{VISION_LAYERS}.{layer}.{old}": f"v.blk.{layer}.{new}" for old, new in _OF_VISION_LAYER.items()}
    shapes = shapes_of(source.tensors)
    found = [_floats(source, f"{embeddings}.class_embedding", "v.class_embd", shapes[f"{embeddings}.class_embedding"])]
    for key, shape in shapes.items():
        module, _, part = key.rpartition(".")
        if module in names and part == "qweight":
            found.append(_packed(source, module, names[module], shape))
        elif module in names and part not in PARTS:
            kind = Kind.F16 if _half(source) and "position" not in module else Kind.F32
            found.append(_floats(source, key, f"{names[module]}.{part}", shape, kind=kind))
    return found


def write(writer: gguf.GGUFWriter, tensors: list[Tensor], path: Path) -> dict[Kind, float]:
    """Write a file, a tensor in memory at a time; return the worst error of packed ones, as a share of a step."""
    for t in tensors:
        dtype = np.dtype(np.float32 if t.kind == Kind.F32 else np.uint8)
        writer.add_tensor_info(t.name, t.shape, dtype, t.n_bytes, raw_dtype=t.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    worst = {}
    try:
        for t in tensors:
            data = t.read()
            if isinstance(data, tuple):  # of a packed layer, with its error
                data, error = data
                worst[t.kind] = max(worst.get(t.kind, 0.0), error)
            writer.write_tensor_data(np.ascontiguousarray(data))
    except OSError as error:
        if error.errno is not None or shutil.disk_usage(path.parent).free > t.n_bytes:
            raise
        raise OSError(ENOSPC, os.strerror(ENOSPC), str(path)) from error  # NumPy says how many bytes, and no more
    finally:
        writer.close()
    return worst


# ---- llama.cpp's own types, which its users would take instead
# The codes come out of llama.cpp's library. Which tensor gets which type is decided by the rules of its llama-quantize
# (src/llama-quant.cpp), a program that no wheel has: they are stated here for Llama-like text models without experts.
_USUAL = {"Q4_K_M": Kind.Q4_K, "Q4_0": Kind.Q4_0, "Q3_K_M": Kind.Q3_K}
_INSTEAD = {Kind.Q3_K: Kind.IQ4_NL, Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}  # odd columns


def kind_of(name: str, columns: int, mixture: str, blocks: int, tied: bool, weighted: bool) -> Kind:
    """Return the type that llama-quantize gives a matrix of this name, where there are so many blocks.

    weighted: whether there is an importance matrix. Types whose blocks the columns do not fill are replaced.
    """
    words = name.split(".")
    block, part = (int(words[1]), words[2]) if words[0] == "blk" else (0, words[0])
    kind = _USUAL[mixture]
    ends = block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
    more = mixture == "Q4_K_M" and part in ("attn_v", "ffn_down") and ends
    if part == "output" or tied and part == "token_embd" or more:
        kind = Kind.Q6_K
    elif mixture == "Q4_0" and part == "ffn_down" and weighted and block < blocks // 8:
        kind = Kind.Q4_1
    elif mixture == "Q3_K_M" and part == "attn_v":
        kind = Kind.Q5_K if block < 2 else Kind.Q4_K
    elif mixture == "Q3_K_M" and part == "ffn_down":
        kind = Kind.Q5_K if block < blocks // 16 else Kind.Q4_K
    elif mixture == "Q3_K_M" and part == "attn_output":
        kind = Kind.Q4_K
    return kind if columns % gguf.GGML_QUANT_SIZES[kind][0] == 0 else _INSTEAD[kind]


def export_kquant(source: Source, out: Path, mixture: str, importance: dict | None, **record) -> list[str]:
    """Write a 16-bit model as `export_gguf` does, its text model's matrices in a mixture of types; return those said.

    importance: of each linear's input columns, as `input_importance` returns it, or None. A tensor is in memory at a
    time. Raises ValueError for a packed folder, and without xllamacpp.
    """
    if source.packed:
        raise ValueError(f"{source.folder} is quantized already: llama.cpp's types are for 16 bits.")
    _check(source)
    floats, blocks, counts = text_tensors(source), source.text["num_hidden_layers"], Counter()
    tied = "output.weight" not in [t.name for t in floats]
    with quantizer() as quantize, write_folder(check_new(out), **record) as temporary:
        tensors = []
        for t in floats:
            if len(t.shape) == 2:
                columns = t.shape[1] // (1 if t.kind == Kind.F32 else 2)
                kind = kind_of(t.name, columns, mixture, blocks, tied, bool(importance))
                counts[kind.name] += 1
                per_block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
                read = partial(_quantized, t, quantize, kind, (importance or {}).get(t.name.removesuffix(".weight")))
                t = Tensor(t.name, kind, (t.shape[0], columns // per_block * n_bytes), read)
            tensors.append(t)
        what = f"to GGUF, {mixture}{' with an importance matrix' if importance else ''}, the tower in 16 bits"
        _write_pair(source, tensors, what, temporary, gguf.LlamaFileType[f"MOSTLY_{mixture}"])
    return [", ".join(f"{n} {kind}" for kind, n in counts.most_common())]


def _quantized(tensor: Tensor, quantize, kind: Kind, importance) -> np.ndarray:
    rows = torch.from_numpy(np.array(tensor.read())).view(_DTYPES[tensor.kind])
    return quantize(kind.value, rows.float().numpy(), importance)


def _add_squares(found: dict, name: str, _, inputs, __) -> None:
    found[name] = found[name] + inputs[0].float().square().flatten(0, -2).sum(0).cpu()


@torch.inference_mode()
def input_importance(model, batch: dict) -> dict[str, torch.Tensor]:
    """Return the sum of squares of each linear's inputs over a calibration batch, (columns,) by GGUF's names.

    Only what the columns have in proportion matters. batch: of `quantize.quantization_batch`.
    """
    found, linears = defaultdict(float), {ours: theirs for ours, theirs in _OF_BLOCK.items() if "norm" not in ours}
    with ExitStack() as hooks:
        for (number, block), (ours, theirs) in product(enumerate(parts(model).blocks), linears.items()):
            add = partial(_add_squares, found, f"blk.{number}.{theirs}")
            hooks.enter_context(block.get_submodule(ours).register_forward_hook(add))
        for i in range(len(batch["input_ids"])):
            model(**{name: values[i : i + 1].to(model.device) for name, values in batch.items()}, use_cache=False)
    return dict(found)
