"""A model's folder to be exported: found, checked before anything is written, and written with the hub's names.

transformers 5.23 flattened CLIP's names, and what it saves has `vision_tower.embeddings` where the hub's checkpoints,
older transformers and vLLM have `vision_tower.vision_model.embeddings`. The weights stay as they are, byte for byte:
only the headers of their files are written anew, so that no tensor is ever in memory.

A tower that the engines do not know is written apart, with the projector: they are sent what `embed` makes of pictures.
"""

import json
import shlex
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, LlavaConfig

from medprune.data.pictures import open_image
from medprune.device import choose_device
from medprune.exporting.engines import APART, TOLD_APART
from medprune.models.assembled import base_card
from medprune.models.families import VISION_TOWER, current_name, hub_name, names, of_tower, parts
from medprune.models.loading import INDEX, WEIGHTS, check_loading, load, load_processor, save_processor, stored_tensors
from medprune.models.sizes import OPTIONS, TABLES, dtype_of, named_config, skeleton
from medprune.quantizing.checkpoint import check_quantization, load_quantized
from medprune.quantizing.quantize import fewest, target_linears
from medprune.store import check_new, read_json, run_root, write_folder, write_json, write_text

TEXT_MODELS = ("llama", "mistral", "qwen2")
TOWER = "clip_vision_model"
COPIED = 2**24  # bytes at a time
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "generation_config.json")
NOT_CLINICAL = "Not for clinical use: a research artefact, evaluated on teaching images only."
_UNSAID = ("is_local", "local_files_only", "backend")  # of this machine, not of the tokenizer


@dataclass(frozen=True)
class Source:
    """A checked folder: its config.json, that of text model and tower with the defaults filled in, where each tensor is
    by transformers 5's name, the group size of packed layers or None, their bits by name, the processor, and whether
    tower and projector go apart, engines being sent what these make of pictures."""

    folder: Path
    config: dict
    text: dict
    vision: dict
    tensors: dict[str, tuple[Path, str]]
    group_size: int | None
    packed: dict[str, int]
    processor: object
    apart: bool

    @property
    def dtype(self) -> str:
        return dtype_of(self.config)

    @property
    def standard(self) -> bool:
        """Whether what is packed is in AWQ's layout, 4 bits in all blocks, which others load."""
        return self.config.get("quantization_config", {}).get("quant_method", "awq") == "awq"


def find_model(name: str, runs_dir: str | None = None) -> Path:
    """Return the folder of a model: a folder's own name, or RUN:METHOD such as demo:awq-recovered-2.

    Raises ValueError in one sentence where there is none, naming the methods whose folders the run keeps.
    """
    if Path(name).exists() or ":" not in name:
        if not (Path(name) / "config.json").is_file():
            missing = "holds no config.json" if Path(name).exists() else "is not there"
            raise ValueError(f"{name} {missing}: give a model's folder, or RUN:METHOD such as demo:awq-recovered-2.")
        return Path(name)
    run, _, method = name.partition(":")
    root = run_root(run, runs_dir)
    if not root.is_dir():
        raise ValueError(f"there is no run {run!r} in {root.parent}: `medprune runs` lists them.")
    kept = {"original": root / "01_finetune" / "model"}
    kept |= {f.name.removeprefix("model-"): f for f in sorted((root / "04_sft_recovery").glob("model-*"))}
    kept |= {f.name: f for f in sorted((root / "05_awq_vs_bnb" / "quantized").glob("*"))}
    kept |= {"found": root / "07_budget_search" / "found"}
    kept = {method: folder for method, folder in kept.items() if (folder / "config.json").is_file()}
    if method not in kept:
        raise ValueError(f"run {run!r} keeps no folder of {method!r}; it keeps {', '.join(kept) or 'none'}.")
    return kept[method]


def open_source(folder: str | Path, apart: bool = False) -> Source:
    """Check a folder for export, and say where its tensors are; nothing but configuration and headers is read.

    apart: have the engines sent image embeddings, though they know the tower. Raises ValueError in one sentence for
    what no engine takes: another kind of model, text model or storage, a folder without chat template, and tensors
    that are absent, too many or of another shape than config.json says.
    """
    folder = Path(folder)
    config = named_config(folder)
    if config["model_type"] != "llava":
        raise ValueError(f"{folder} is of model_type {config['model_type']!r}; exported are LLaVAs, 'llava'.")
    if (kind := config.get("text_config", {}).get("model_type", TEXT_MODELS[0])) not in TEXT_MODELS:
        what = f"text_config is of model_type {kind!r}, which the engines do not take here"
        raise ValueError(f"{folder}: {what}; exported are {', '.join(TEXT_MODELS)}.")
    quantized = config.get("quantization_config") or {}
    awq = quantized.get("quant_method") == "awq" and quantized.get("bits") == 4
    if quantized and not awq and quantized.get("method") not in TABLES:
        how = " ".join(str(quantized[k]) for k in ("quant_method", "method", "bits") if k in quantized)
        raise ValueError(f"{folder} is stored as {how}; exported are 16 bits, awq and rtn.")
    if quantized:
        check_quantization(folder, quantized)
    own = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype")}
    whole = LlavaConfig.from_dict(own | {"dtype": dtype_of(config)})
    tensors = stored_tensors(folder)
    packed = _check_tensors(folder, whole, tensors, quantized)
    text, vision = (whole.to_dict()[part] for part in ("text_config", "vision_config"))
    apart |= vision["model_type"] != TOWER
    if apart and (inside := [name for name in packed if of_tower(name)]):
        raise ValueError(f"{folder} has {inside[0]} in {packed[inside[0]]} bits: a tower goes apart in 16 bits only.")
    group_size = quantized.get("group_size")
    return Source(folder, config, text, vision, tensors, group_size, packed, load_processor(folder), apart)


def load_folder(folder: Path, dtype=None):
    """Load (model, processor) of any folder that the series writes, 16 bits or quantized, in eval mode.

    dtype: None takes each tensor's own, or the device's choice for 16 bits.
    """
    if "quantization_config" not in named_config(folder):
        return load(folder, dtype=dtype)
    device = choose_device()
    model = load_quantized(folder, device)
    return (model if dtype is None else model.to(dtype)), load_processor(folder)


def _check_tensors(folder: Path, config: LlavaConfig, tensors: dict, quantized: dict) -> dict[str, int]:
    """Return the bits of the packed layers by name; ValueError where tensors are not those that they should be."""
    model = skeleton(config)
    stored = model.state_dict().keys() - model.all_tied_weights_keys.keys()
    expected = {name: list(t.shape) for name, t in model.state_dict().items() if name in stored}
    tower, head, table = (quantized.get(option, False) for option in OPTIONS.values())
    packed = target_linears(model, quantized["bits"], head, tower, quantized["group_size"]) if quantized else {}
    if table:
        packed |= {names(model).table: fewest(quantized["bits"], table)}
        expected |= {f"{names(model).table}.multiplier": []}
    for name, bits in packed.items():
        n_out, n_in = expected.pop(f"{name}.weight")
        groups = n_in // quantized["group_size"]
        shapes = {"qweight": [n_in, n_out // 8], "qzeros": [groups, n_out // 8], "scales": [groups, n_out]}
        if quantized["quant_method"] != "awq":
            zeros = [groups, n_out * bits // 8]
            shapes = {"qweight": [n_out, n_in * bits // 8], "zero_point": zeros, "scale": [groups, n_out]}
        expected |= {f"{name}.{key}": shape for key, shape in shapes.items()}
    found = shapes_of(tensors)
    known = expected.keys() & found.keys()
    misfits = {
        "missing_keys": expected.keys() - known,
        "unexpected_keys": found.keys() - known,
        "mismatched_keys": [name for name in known if found[name] != expected[name]],
    }
    check_loading(misfits, folder)
    return packed


def shapes_of(tensors: dict[str, tuple[Path, str]]) -> dict[str, list[int]]:
    """Return the shape of each of `stored_tensors`, from its file's header."""
    found = {}
    for file in {file for file, _ in tensors.values()}:
        with safe_open(file, "pt") as opened:
            own = {name: key for name, (place, key) in tensors.items() if place == file}
            found |= {name: opened.get_slice(key).get_shape() for name, key in own.items()}
    return found


def export_hub(source: Source, out: Path, **record) -> list[str]:
    """Write names, configuration and processor files as LLaVA's checkpoints on the hub have them; return its size said.

    record: as `write_folder` takes it. Plain transformers, older ones and vLLM load the folder, by its README.md; one
    whose tower is apart only vLLM. Raises ValueError for widths that none of them knows.
    """
    if not source.standard:
        raise ValueError(f"{source.folder} has mixed widths or a packed table, head or tower, which GGUF alone stores.")
    with write_folder(check_new(out), **record) as temporary:
        copy_tensors(source, temporary, hub_name, lambda name: not (source.apart and of_tower(name)))
        write_json(temporary / "config.json", hub_config(source))
        _write_processor(source, temporary)
        if source.apart:
            write_tower(source, temporary)
        write_text(temporary / "README.md", model_card(source, "with the names of the hub", _vllm_use(source)))
    return [f"{out}: {sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 2**20:.1f} MiB"]


def copy_tensors(source: Source, out: Path, name_of, kept) -> None:
    """Copy the files of a source's tensors, those alone that are kept, and their index, as `name_of` names them.

    kept, name_of: of a name of transformers 5. Bytes are copied as they are.
    """
    found, held = {}, {current_name(key) for _, key in source.tensors.values()}
    for file in sorted({file for file, _ in source.tensors.values()}):
        written = copy_file(file, out / file.name, name_of, lambda name: name in held and kept(name))
        found |= dict.fromkeys(written, file.name)
    if (source.folder / INDEX).exists() and WEIGHTS not in found.values():
        index = read_json(source.folder / INDEX)
        write_json(out / INDEX, {"metadata": index.get("metadata", {}), "weight_map": found})


def copy_file(file: Path, out: Path, name_of, kept) -> list[str]:
    """Copy a safetensors file as `copy_tensors` does, unless nothing in it is kept; return the names written."""
    with open(file, "rb") as old:
        (length,) = struct.unpack("<Q", old.read(8))
        stored = json.loads(old.read(length))
        header = {key: stored.pop(key) for key in ("__metadata__",) if key in stored}
        chosen = [(current_name(key), value) for key, value in stored.items() if kept(current_name(key))]
        chosen.sort(key=lambda item: item[1]["data_offsets"])
        ends = 0
        for name, value in chosen:
            begin, end = value["data_offsets"]
            header[name_of(name)] = value | {"data_offsets": [ends, ends := ends + end - begin]}
        if not chosen:
            return []
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8, as safetensors writes them
        with open(out, "wb") as new:
            new.write(struct.pack("<Q", len(text)) + text)
            for begin, end in (value["data_offsets"] for _, value in chosen):
                old.seek(8 + length + begin)
                for at in range(begin, end, COPIED):
                    new.write(old.read(min(COPIED, end - at)))
    return [name_of(name) for name, _ in chosen]


# ---- a tower apart
def write_tower(source: Source, out: Path) -> None:
    """Write tower, projector and processor into a folder of their own, for whoever asks the engine."""
    folder = out / APART
    folder.mkdir()
    copy_tensors(source, folder, lambda name: name, of_tower)
    write_json(folder / "config.json", {k: v for k, v in source.config.items() if k != "quantization_config"})
    save_processor(source.processor, folder)


@torch.inference_mode()
def image_embeddings(model, processor, paths: list[str]) -> dict[str, np.ndarray]:
    """Return what a LLaVA's tower and projector make of pictures, each (image tokens, hidden) float32, by path."""
    device, found = next(parts(model).vision_tower.parameters()).device, {}
    for path in dict.fromkeys(paths):
        pixels = torch.as_tensor(np.asarray(processor.image_processor(open_image(path))["pixel_values"][0]))
        (seen,) = model.model.get_image_features(pixels[None].to(device, model.dtype)).pooler_output
        found[path] = seen.float().cpu().numpy()
    return found


def embed(exported: Path, paths: list[str]) -> dict[str, np.ndarray]:
    """Return what the tower of an exported folder makes of pictures, as `image_embeddings` does, in 32 bits."""
    folder = exported / APART
    config = LlavaConfig.from_dict(named_config(folder))
    model = skeleton(config)
    model.set_submodule(VISION_TOWER, AutoModel.from_config(config.vision_config))
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor.float() for file in files for name, tensor in load_file(file).items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    wanted = {name for name in model.state_dict() if of_tower(name)}
    check_loading({"missing_keys": wanted - tensors.keys(), "unexpected_keys": tensors.keys() - wanted}, folder)
    return image_embeddings(model.eval(), load_processor(folder), paths)


def hub_config(source: Source) -> dict:
    """Return config.json with the fields of transformers 4 beside those of 5, and without paths of this machine."""
    dtypes = {"torch_dtype": source.dtype, "dtype": source.dtype}
    out = {"ignore_index": -100} | source.config | dtypes
    for part, kind in (("text_config", "llama"), ("vision_config", TOWER)):
        kept = {k: v for k, v in (source.config.get(part) or {}).items() if "name_or_path" not in k}
        out[part] = {"model_type": kind} | kept | dtypes
    scaling = dict(source.text.get("rope_parameters") or {})
    if "rope_theta" in scaling:
        out["text_config"]["rope_theta"] = scaling.pop("rope_theta")
        plain = scaling.get("rope_type", "default") == "default"
        out["text_config"]["rope_scaling"] = None if plain else scaling
    if source.apart:  # vLLM wants a tower that it knows, and does not build it where it may be sent no image
        sides = {k: v for k, v in source.vision.items() if k in ("image_size", "patch_size")}
        sizes = dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim"), 64)
        out["vision_config"] = {"model_type": TOWER, "num_hidden_layers": 1, "num_attention_heads": 1} | sizes | sides
        out["vision_feature_layer"] = -1
    return out


def _write_processor(source: Source, out: Path) -> None:
    """Write tokenizer, image processor and chat template, each in the file in which older transformers look for it."""
    processor, folder = source.processor, source.folder
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / name)
    own = read_json(folder / "tokenizer_config.json")
    own = {k: v for k, v in own.items() if k not in _UNSAID and "name_or_path" not in k}
    if own.get("tokenizer_class") == "TokenizersBackend":  # 5's name of it
        own["tokenizer_class"] = "PreTrainedTokenizerFast"
    own["model_input_names"] = processor.tokenizer.model_input_names  # 4's class would add token_type_ids, in vain
    write_json(out / "tokenizer_config.json", own)
    write_json(out / "special_tokens_map.json", processor.tokenizer.special_tokens_map)
    pictures = {k: v for k, v in processor.image_processor.to_dict().items() if v is not None}
    pictures |= {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    write_json(out / "preprocessor_config.json", pictures)
    counted = ("image_token", "num_additional_image_tokens", "patch_size", "vision_feature_select_strategy")
    said = {name: getattr(processor, name) for name in counted} | {"processor_class": "LlavaProcessor"}
    write_json(out / "processor_config.json", said)
    write_text(out / "chat_template.jinja", processor.chat_template)
    write_json(out / "chat_template.json", {"chat_template": processor.chat_template})


APART_USE = f"""The engine gets no picture but what tower and projector (`{APART}/`) make of it, as `image_embeds`:
```bash
medprune ask FOLDER picture.jpg "What is the name of this disease?" --url http://127.0.0.1:8080
```"""


def model_card(source: Source, what: str, how: str) -> str:
    """Return an exported folder's README.md: what it is, what the source's own card says of it, and how to use it.

    what: completes "A LLaVA exported ..."; how: Markdown. `parity.add_parity` puts its section at the end.
    """
    own = source.folder / "README.md"
    lines = own.read_text(encoding="utf-8").splitlines() if own.exists() else []
    said = [line for line in lines if line.startswith("- ") and not line.startswith("- Bytes")]
    if not said:
        base = base_card(str(source.folder))
        said = [f"- Base: {base['name']}", f"- Licence: {base['licence']}"]
    stored = f"{source.dtype}, not quantized"
    if source.group_size:
        widths = " and ".join(map(str, sorted(set(source.packed.values()))))
        stored = f"groups of {source.group_size}, {widths} bits where packed"
    said = "\n".join([f"- Blocks: {source.text['num_hidden_layers']}, stored as {stored}", *said])
    return f"# A LLaVA exported {what}\n\n{NOT_CLINICAL}\n\n{said}\n\n## How to use it\n{how}\n"


def _vllm_use(source: Source) -> str:
    """Return Markdown on how vLLM serves an exported folder, and plain transformers loads it."""
    options = " --quantization awq --dtype float16" if source.group_size else ""
    lengths = f"--max-model-len {min(source.text['max_position_embeddings'], 4096)}"
    needs = " (with gptqmodel)" if source.group_size else ""
    if source.apart:
        return f"```bash\nvllm serve FOLDER{options} {lengths} {shlex.join(TOLD_APART)}\n```\n{APART_USE}"
    return (
        f"```bash\nvllm serve FOLDER{options} {lengths}\n```\n"
        f"or plain transformers{needs}:\n"
        "```python\nfrom transformers import LlavaForConditionalGeneration as Llava\n"
        "model = Llava.from_pretrained(folder)\n```"
    )
