"""Folders of three families' checkpoints at their true shapes, without weights: python tests/true_size.py NAME FOLDER.

`medprune rehearse -p base FOLDER` takes them. Shapes are data/checkpoints.json's; the tokenizer is SmolLM2's with the
family's marks, so that prompts are about as long as with its own; image processors have their published sizes.
"""

import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import families
import transformers as hf

from medprune.models.assembled import prepare_base
from medprune.models.loading import load_processor, without_torchvision
from medprune.models.sizes import named_config


def tokenizer(*marks: str, **named: str):
    """Return SmolLM2's tokenizer, as the base of `local` has it, with further marks, some by name."""
    whole = load_processor(prepare_base("smollm2")).tokenizer
    own = {name: getattr(whole, name) for name in ("eos_token", "pad_token", "bos_token")}
    own |= {"extra_special_tokens": named} if named else {}
    made = hf.PreTrainedTokenizerFast(tokenizer_object=whole.backend_tokenizer, **own)
    made.add_tokens([hf.AddedToken(mark, special=True, normalized=False) for mark in (*marks, *named.values())])
    return made


def gemma():
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tok = tokenizer("<start_of_turn>", "<end_of_turn>", **named)
    ids = {name.replace("token", "token_index"): tok.convert_tokens_to_ids(mark) for name, mark in named.items()}
    turns = families.chat("<start_of_image>", "<start_of_turn>{role}\n", "<end_of_turn>", "{{ bos_token }}")
    seen = families.pictures("gemma3", "Gemma3", size={"height": 896, "width": 896})
    return hf.Gemma3Processor(seen, tok, image_seq_length=256, chat_template=turns), ids | {"mm_tokens_per_image": 256}


def qwen():
    marks = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "image": "<|image_pad|>", "video": "<|video_pad|>"}
    tok = tokenizer(*marks.values())
    ids = {f"{name}_token_id": tok.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    seen = families.pictures("qwen2_vl", "Qwen2VL")
    parts = {"image_processor": seen, "tokenizer": tok, "video_processor": families.videos("Qwen2VL")}
    turns = families.chat("<|vision_start|><|image_pad|><|vision_end|>")
    return hf.Qwen2_5_VLProcessor(**parts, chat_template=turns), ids


def smolvlm():
    import transformers.models.smolvlm.processing_smolvlm as module

    module.num2words = module.num2words or str  # it counts frames of videos, which are not seen here
    tok = tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *families.ROWS, "<video>")
    sizes = {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}}
    seen = families.pictures("smolvlm", "SmolVLM", **sizes)
    how = {"video_processor": families.videos("SmolVLM"), "image_seq_len": 81, "chat_template": families.chat("<image>")}
    return hf.SmolVLMProcessor(seen, tok, **how), {"image_token_id": tok.convert_tokens_to_ids("<image>")}


MADE = {"medgemma-4b": gemma, "qwen2.5-vl-3b": qwen, "smolvlm2-2.2b": smolvlm}


def save(name: str, folder: Path) -> Path:
    """Write a checkpoint's configuration and its processor."""
    with without_torchvision() if find_spec("torchvision") is None else nullcontext():
        processor, ids = MADE[name]()
    config = hf.AutoConfig.for_model(**named_config(name) | ids)
    config.dtype = config.get_text_config(decoder=True).dtype = "bfloat16"
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    save(sys.argv[1], Path(sys.argv[2]))
