"""What the tests of exporting share: small LLaVAs of several text models, and a server that stands in for an engine."""

import base64
import copy
import io
import json
import re
import threading
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import patch

import jinja2
import numpy as np
import torch
from PIL import Image
from transformers import LlamaConfig, LlavaForConditionalGeneration, MistralConfig, Qwen2Config
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from medprune.answers.decoding import RoomyCache, forward
from medprune.answers.prompts import see
from medprune.models.eyes import EyesConfig
from medprune.models.families import n_blocks, of_tower
from medprune.models.loading import save

KINDS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "eos_token_id", "pad_token_id",
)  # fmt: skip


def write_family(model, processor, folder, kind: str, tied: bool, blocks: int = 2):
    """Write the tiny base with another text model, its weights random and larger than usual, and return the folder."""
    sizes = {k: getattr(model.config.text_config, k) for k in SIZES}
    config = model.config
    config.text_config = KINDS[kind](**sizes, num_hidden_layers=blocks, bos_token_id=None, tie_word_embeddings=tied)
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    made = LlavaForConditionalGeneration(config)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):  # transformers begins them at 0, which would hide one that is lost
            parameter.data.normal_(0, 0.02)
        elif "norm" not in name:
            parameter.data *= 3  # so that answers depend on the picture
    made.generation_config = model.generation_config
    save(made, processor, folder)
    return folder


def write_odd(model, processor, folder):
    """Write the tiny base with eyes that no engine knows, to which pictures are cut from larger ones."""
    model, processor = copy.deepcopy((model, processor))
    config, stages = model.config, [(1, 3, 1, 1, 8), *[(1, 3, 2, 2, 8)] * 4]
    config.vision_config = EyesConfig(hidden_size=48, image_size=64, patch_size=32, stem_size=8, stages=stages, views=2)
    config.vision_feature_layer, config.image_seq_length = -1, 4
    torch.manual_seed(2)
    made = LlavaForConditionalGeneration(config)
    for name, parameter in made.named_parameters():
        parameter.data *= 3
        if parameter.dim() > 1 and of_tower(name):  # transformers' beginnings would leave nothing of a picture
            torch.nn.init.kaiming_normal_(parameter)
    made.generation_config = model.generation_config
    cut = {"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}}
    processor.image_processor, processor.files, processor.patch_size = CLIPImageProcessorPil(**cut), None, 32
    save(made, processor, folder)
    return folder


def retold(folder, part=None, **values):
    """Change values of a folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(values)
    (folder / "config.json").write_text(json.dumps(config))


def batch_of(processor, rows):
    """Return input_ids and pixel_values of the first row."""
    prompt = see(processor, rows[0]["path"], torch.float32, rows[0]["question"])
    return {"input_ids": prompt.ids[None], **prompt.inputs}


@contextmanager
def served(model, processor, template: str):
    """Give the address of a server on this machine that answers with a model as llama.cpp's does.

    It joins a message's parts to one text, an image's its marker, and renders `template`; so was seen of the real one.
    Embeddings stand for a picture, as vLLM takes them.
    """

    one = threading.Lock()  # a picture's embeddings are put into the model

    class Engine(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.reply({"data": [{"id": "other"}, {"id": "tiny"}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with one:
                said = complete(model, processor, template, asked)
            self.reply(said)

        def reply(self, said):
            data = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@torch.inference_mode()
def complete(model, processor, template: str, asked: dict) -> dict:
    pictures, text, seen = [], "", nullcontext()
    for part in asked["messages"][0]["content"]:
        if part["type"] == "image_url":
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            pictures.append(Image.open(io.BytesIO(data)))
        if part["type"] == "image_embeds":
            found = torch.from_numpy(np.load(io.BytesIO(base64.b64decode(part["image_embeds"]))))
            pictures.append(Image.new("RGB", (96, 96)))  # for its tokens alone
            seen = BaseModelOutputWithPooling(pooler_output=[found])
            seen = patch.object(model.model, "get_image_features", return_value=seen)
        text += part["text"] if part["type"] == "text" else "<__media_Zz9__>"
    prompt = jinja2.Template(template).render(messages=[{"role": "user", "content": text}], add_generation_prompt=True)
    prompt = re.sub("<__media.*?__>", processor.image_token, prompt)
    batch = dict(processor(text=prompt, images=pictures, return_tensors="pt"))
    ids, shown, said, first = batch["input_ids"], {"pixel_values": batch["pixel_values"].to(model.dtype)}, [], None
    cache, n = RoomyCache(n_blocks(model.config), ids.shape[1] + asked["max_tokens"]), ids.shape[1]
    while len(said) < asked["max_tokens"]:
        with seen:
            logits = forward(model, ids, cache, shown)[0].float().log_softmax(-1)
        first, shown = logits if first is None else first, None
        if (token := int(logits.argmax())) == processor.tokenizer.eos_token_id and not asked.get("ignore_eos"):
            break
        said.append(token)
        ids = torch.tensor([[token]])
    top = first.topk(asked.get("top_logprobs", 1))
    likely = [{"id": t, "token": "", "logprob": p} for t, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    words = processor.tokenizer.decode(said, skip_special_tokens=True)
    choice = {"finish_reason": "length" if len(said) == asked["max_tokens"] else "stop"}
    choice |= {"message": {"content": words}, "logprobs": {"content": [{"top_logprobs": likely}]}}
    return {"choices": [choice], "usage": {"prompt_tokens": n, "completion_tokens": len(said)}}
