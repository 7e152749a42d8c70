"""Tiny random image-text-to-text models of thirteen families, with their processors: built of configurations alone.

Windows are shorter than the prompts, images have unlike grids, and weights are so large that every block matters.
"""

import functools
import sys
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from medprune.models.assembled import WORDS
from medprune.models.loading import NoVideos, without_torchvision

BLOCKS, WIDTH = 6, 64
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
SIZES = ((32, 96), (48, 64), (64, 32))  # height and width of the three pictures: two of as many patches, laid otherwise
QUESTIONS = ("What is it?", "Name the skin condition that this picture shows.", "How is it treated?")


@functools.cache
def _learned() -> str:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = {"vocab_size": 800, "special_tokens": marks, "show_progress": False}
    raw.train([str(WORDS)], trainers.BpeTrainer(**words, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return raw.to_str()


def tokenizer(*marks: str, begins: bool = False, **named: str):
    """Return a tokenizer that knows further marks, some by name; `begins`: it puts one before every text."""
    raw = Tokenizer.from_str(_learned())
    if begins:
        raw.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<|im_start|>"}
    made = hf.PreTrainedTokenizerFast(tokenizer_object=raw, **ends, **({"extra_special_tokens": named} if named else {}))
    made.add_tokens([hf.AddedToken(mark, special=True, normalized=False) for mark in (*marks, *named.values())])
    return made


def chat(image: str, start="<|im_start|>{role}\n", end="<|im_end|>", before="") -> str:
    """Return a chat template whose turns start and end so, and in which `image` stands for a picture."""
    opening, answer = (start.replace("{role}", role) for role in ("{{ message['role'] }}", "assistant"))
    return (
        f"{before}{{% for message in messages %}}{opening}"
        f"{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{image}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
        f"{end}\n{{% endfor %}}{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    )


def text(tok, **more) -> dict:
    """Return what the text configurations share."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "vocab_size": len(tok) + -len(tok) % 64}
    ids = {"bos_token_id": None, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    return sizes | ids | more


def pictures(module: str, name: str, **settings):
    return getattr(import_module(f"transformers.models.{module}.image_processing_pil_{module}"), f"{name}ImageProcessorPil")(**settings)


def videos(name: str):
    return NoVideos(video_processor_type=f"{name}VideoProcessor")


def lively(model, small: float = 1.0):
    """Return a model whose blocks all matter, in eval mode, with its ends and padding in the generation config."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "embed" not in name:
                weight.normal_(0, 0.05 if "conv" in name or "patch" in name else 1.4 / weight.shape[-1] ** 0.5)
            elif weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
        model.get_input_embeddings().weight.normal_(0, small)
    model.tie_weights()
    config = model.config.get_text_config()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = config.eos_token_id, config.pad_token_id
    return model.float().eval()


CLIP_PICTURES = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
SQUARE = {"size": {"height": 32, "width": 32}}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def _llava(text_config, tok):
    image = {"image_token_index": tok.convert_tokens_to_ids("<image>"), "vision_feature_layer": -1, "image_seq_length": 16}
    config = hf.LlavaConfig(text_config=text_config, vision_config=hf.CLIPVisionConfig(**VISION), **image)
    select = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = hf.LlavaProcessor(pictures("clip", "CLIP", **CLIP_PICTURES), tok, chat_template=chat("<image>\n"), **select)
    return lively(hf.LlavaForConditionalGeneration(config)), processor


def llava():
    tok = tokenizer("<image>")
    return _llava(hf.LlamaConfig(**text(tok)), tok)


def llava_mistral():
    tok = tokenizer("<image>")
    return _llava(hf.MistralConfig(**text(tok, sliding_window=12)), tok)


def llava_next():
    tok = tokenizer("<image>")
    inside = {"text_config": hf.MistralConfig(**text(tok, sliding_window=None)), "vision_config": hf.CLIPVisionConfig(**VISION)}
    image = {"image_token_index": tok.convert_tokens_to_ids("<image>"), "vision_feature_layer": -1, "image_seq_length": 16}
    config = hf.LlavaNextConfig(**inside, **image, image_grid_pinpoints=PINPOINTS)
    seen = pictures("llava_next", "LlavaNext", **CLIP_PICTURES, image_grid_pinpoints=PINPOINTS)
    select = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = hf.LlavaNextProcessor(seen, tok, chat_template=chat("<image>\n"), **select)
    return lively(hf.LlavaNextForConditionalGeneration(config)), processor


def llava_onevision():
    tok = tokenizer("<image>", "<video>")
    ids = {f"{kind}_token_index": tok.convert_tokens_to_ids(f"<{kind}>") for kind in ("image", "video")}
    inside = {"text_config": hf.Qwen2Config(**text(tok)), "vision_config": hf.SiglipVisionConfig(**VISION, vision_use_head=False)}
    config = hf.LlavaOnevisionConfig(**inside, **ids, image_grid_pinpoints=[[32, 32], *PINPOINTS])
    seen = pictures("llava_onevision", "LlavaOnevision", **SQUARE, image_grid_pinpoints=[[32, 32], *PINPOINTS])
    parts = {"image_processor": seen, "tokenizer": tok, "video_processor": videos("LlavaOnevision")}
    select = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    processor = hf.LlavaOnevisionProcessor(**parts, **select, chat_template=chat("<image>\n"))
    return lively(hf.LlavaOnevisionForConditionalGeneration(config)), processor


ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def _qwen(kind: str, vision: dict, **more):
    marks = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "image": "<|image_pad|>", "video": "<|video_pad|>"}
    tok = tokenizer(*marks.values())
    ids = {f"{name}_token_id": tok.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    config = getattr(hf, f"{kind}Config")(text_config=text(tok, **more), vision_config={"depth": 2, "num_heads": 2, "patch_size": 8, **vision}, **ids)
    seen = pictures("qwen2_vl", "Qwen2VL", patch_size=8, merge_size=2, size={"shortest_edge": 1024, "longest_edge": 4096})
    parts = {"image_processor": seen, "tokenizer": tok, "video_processor": videos("Qwen2VL")}
    processor = getattr(hf, f"{kind}Processor")(**parts, chat_template=chat("<|vision_start|><|image_pad|><|vision_end|>"))
    return lively(getattr(hf, f"{kind}ForConditionalGeneration")(config)), processor


def qwen2_vl():
    return _qwen("Qwen2VL", {"embed_dim": 64, "hidden_size": WIDTH, "mlp_ratio": 2}, rope_parameters=ROPE)


def qwen2_5_vl():
    vision = {"hidden_size": 64, "intermediate_size": 120, "window_size": 32, "out_hidden_size": WIDTH, "fullatt_block_indexes": [1]}
    return _qwen("Qwen2_5_VL", vision, rope_parameters=ROPE)


def qwen3_vl():
    vision = {"depth": 4, "hidden_size": 64, "intermediate_size": 128, "out_hidden_size": WIDTH, "num_position_embeddings": 64}
    vision |= {"deepstack_visual_indexes": [0, 1, 2]}
    return _qwen("Qwen3VL", vision, head_dim=16, rope_parameters=ROPE | {"mrope_interleaved": True})


def gemma3():
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tok = tokenizer("<start_of_turn>", "<end_of_turn>", begins=True, **named)
    more = {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16, "sliding_window_pattern": 3}
    ids = {name.replace("token", "token_index"): tok.convert_tokens_to_ids(mark) for name, mark in named.items()}
    vision = hf.SiglipVisionConfig(**VISION | {"intermediate_size": 120}, vision_use_head=False)
    config = hf.Gemma3Config(text_config=hf.Gemma3TextConfig(**text(tok, **more)), vision_config=vision, mm_tokens_per_image=4, **ids)
    turns = chat("<start_of_image>", "<start_of_turn>{role}\n", "<end_of_turn>", "{{ bos_token }}")
    processor = hf.Gemma3Processor(pictures("gemma3", "Gemma3", **SQUARE), tok, image_seq_length=4, chat_template=turns)
    return lively(hf.Gemma3ForConditionalGeneration(config), 0.15), processor


ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def _idefics(kind: str, module: str, *marks: str, **more):
    tok = tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *ROWS, *marks)
    inside = {"text_config": hf.LlamaConfig(**text(tok)), "vision_config": dict(VISION)}
    config = getattr(hf, f"{kind}Config")(**inside, scale_factor=2, image_token_id=tok.convert_tokens_to_ids("<image>"))
    seen = pictures(module, kind, size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = getattr(hf, f"{kind}Processor")(seen, tok, **more, image_seq_len=4, chat_template=chat("<image>"))
    return lively(getattr(hf, f"{kind}ForConditionalGeneration")(config)), processor


def idefics3():
    return _idefics("Idefics3", "idefics3")


def smolvlm():
    import transformers.models.smolvlm.processing_smolvlm as module

    module.num2words = module.num2words or str  # it counts frames of videos, which are not seen here
    return _idefics("SmolVLM", "smolvlm", "<video>", video_processor=videos("SmolVLM"))


def internvl():
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    tok = tokenizer(**named)
    inside = {"text_config": hf.Qwen2Config(**text(tok)), "vision_config": dict(VISION)}
    image = {"image_token_id": tok.convert_tokens_to_ids("<IMG_CONTEXT>"), "image_seq_length": 4}
    config = hf.InternVLConfig(**inside, **image, tie_word_embeddings=False)
    seen = pictures("got_ocr2", "GotOcr2", **SQUARE, crop_to_patches=True, max_patches=4)
    parts = {"image_processor": seen, "tokenizer": tok, "video_processor": videos("InternVL")}
    processor = hf.InternVLProcessor(**parts, image_seq_length=4, chat_template=chat("<IMG_CONTEXT>\n"))
    return lively(hf.InternVLForConditionalGeneration(config)), processor


def mistral3():
    tok = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    vision = hf.PixtralVisionConfig(**VISION | {"image_size": 64}, head_dim=32)
    inside = {"text_config": hf.MistralConfig(**text(tok, head_dim=16, sliding_window=None)), "vision_config": vision}
    config = hf.Mistral3Config(**inside, image_token_index=tok.convert_tokens_to_ids("[IMG]"), spatial_merge_size=2)
    seen = pictures("pixtral", "Pixtral", size={"longest_edge": 64}, patch_size=16)
    made = import_module("transformers.models.pixtral.processing_pixtral").PixtralProcessor  # hf's own asks for more
    processor = made(seen, tok, patch_size=8, spatial_merge_size=2, chat_template=chat("[IMG]"))
    return lively(hf.Mistral3ForConditionalGeneration(config)), processor


def paligemma():
    tok = tokenizer("<image>")
    seen = pictures("siglip", "Siglip", **SQUARE)
    seen.image_seq_length = 16
    inside = {"text_config": hf.GemmaConfig(**text(tok, head_dim=16)), "vision_config": hf.SiglipVisionConfig(**VISION, vision_use_head=False)}
    ids = {"image_token_index": tok.convert_tokens_to_ids("<image>"), "vocab_size": inside["text_config"].vocab_size}
    config = hf.PaliGemmaConfig(**inside, **ids, projection_dim=WIDTH, hidden_size=WIDTH)
    return lively(hf.PaliGemmaForConditionalGeneration(config), 0.15), hf.PaliGemmaProcessor(seen, tok, chat_template=chat("<image>"))


FAMILIES = {f.__name__: f for f in (llava, llava_mistral, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, gemma3,
                                    idefics3, smolvlm, internvl, mistral3, paligemma)}  # fmt: skip


def save(name: str, folder: Path) -> Path:
    """Write one of the families' models as a folder that transformers loads."""
    with without_torchvision() if find_spec("torchvision") is None else nullcontext():
        model, processor = FAMILIES[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def images(folder: Path) -> list[Path]:
    """Draw the three pictures; return their files."""
    draw, files = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, (height, width) in enumerate(SIZES):
        files.append(folder / f"{number}.png")
        Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(files[-1])
    return files


if __name__ == "__main__":  # NAME FOLDER
    save(sys.argv[1], Path(sys.argv[2]))
