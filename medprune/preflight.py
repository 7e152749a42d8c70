"""Predict what every stage will hold in memory and leave on disk, and what to change where that does not fit.

Nothing is loaded: the predictions are sums over the configuration's shapes, meant to be a little high. Their
terms stand in the docstrings, so that a measured peak can be held against each. `medprune preflight`.
"""

import math
import re
from pathlib import Path

import pandas as pd

from medprune.accounting import BNB_BLOCK_SIZE, GIB, Account, account
from medprune.config import judge_names
from medprune.shapes import shape_of

RUNTIME_BYTES = int(0.6 * GIB)  # CUDA context and cuBLAS workspaces: not a model's, yet in its memory
QUESTION_TOKENS = 64  # chat template and question beside the image's tokens
EMBEDDER_BYTES = 4 * 22_713_216  # all-MiniLM-L6-v2 in float32
EMBEDDING_JUDGES = {"reference", "cosine"}  # what compares sentence embeddings, and loads no chat model
CPU_LIMIT_PARAMS_B = 1.0  # a model beyond it would take days a stage without CUDA
DEVICE = ("name", "memory_bytes", "disk_bytes", "cuda")
SETTINGS = ("base_bits", "lora_r", "batch_size", "batch_rows", "max_new_tokens", "calibration_tokens",
            "methods", "recover", "awq_rows", "bits", "group_size", "judge", "judge_bits")  # fmt: skip


def _stored(config, bits: int, blocks_removed: int = 0, **sizes) -> Account:
    """Account for a model as the stages load it: 16 bits, NF4 at 4, else round-to-nearest."""
    method = "bnb" if bits == 4 else "rtn"
    return account(config, blocks_removed, bits, BNB_BLOCK_SIZE, method=method, **sizes)


def lora_params(config, r: int, blocks_removed: int = 0) -> int:
    """Count rank-r adapters' parameters, r x (inputs + outputs) for every linear of the kept blocks."""
    shape = shape_of(config)
    return (shape.blocks - blocks_removed) * sum(r * (n_in + n_out) for _, n_in, n_out in shape.linears)


def block_activation_bytes(config, checkpointed: bool = False) -> int:
    """Return what one token leaves in one block for the backward pass: LoRA in float32, no dropout, SDPA.

    10 x intermediate + 36 x hidden + 4 x key-value width, counted from the tensors that autograd saves in a
    16-bit model (a test counts them again); with checkpointing only the block's 16-bit input, 2 x hidden.
    """
    shape = shape_of(config)
    if checkpointed:
        return 2 * shape.hidden
    return 10 * shape.intermediate + 36 * shape.hidden + 4 * shape.kv_width


def predict_training_bytes(config, lora_r: int, batch: int, tokens: int, base_bits: int = 16,
                           gradient_checkpointing: bool = True, blocks_removed: int = 0,
                           answer_tokens: int | None = None) -> int:  # fmt: skip
    """Predict the peak of a (Q)LoRA step over `batch` conversations of `tokens` tokens, the image's included.

    weights (at 4 bits NF4 blocks, all else in float32, where peft puts it before k-bit training)
    + 16 bytes (value, gradient, two Adam moments in float32) for each adapter and projector parameter
    + batch x tokens x blocks x `block_activation_bytes`; with checkpointing its small form for every block
      and its full form for the one at work (twice the small form over a 4-bit base: a float32 stream)
    + 14 bytes a logit (16 bits, float32, log-softmax and its gradient) on `answer_tokens`, or on all tokens
    + one MLP matrix in 16 bits (de-quantized) and one block's gradients, 6 x intermediate a token.
    """
    shape, a = shape_of(config), _stored(config, base_bits, blocks_removed)
    kept, rows = shape.blocks - blocks_removed, batch * tokens
    outside = sum(n for part, n in a.part_bytes.items() if not part.startswith("block_"))
    weights = a.weights_bytes + (outside if base_bits == 4 else 0)
    trained = 16 * (lora_params(config, lora_r, blocks_removed) + shape.projector_params)
    activations = rows * kept * block_activation_bytes(config)
    if gradient_checkpointing:
        inputs = block_activation_bytes(config, checkpointed=True) * (2 if base_bits == 4 else 1)
        activations = rows * (kept * inputs + block_activation_bytes(config))
    logits = 14 * batch * min(tokens, answer_tokens or tokens) * shape.vocab
    return weights + trained + activations + logits + shape.intermediate * (2 * shape.hidden + 6 * rows)


def predict_generation_bytes(config, rows: int, context: int, bits: int = 16, blocks_removed: int = 0) -> int:
    """Predict the peak of answering `rows` questions at once, `context` tokens each with image and answer.

    weights + KV cache (`account`) + one block's K and V again (a growing cache is copied block by block)
    + the larger of two working sets in 16 bits: prefill, rows x context x (3 x intermediate + 4 x hidden) and
      a context x context mask a row; vision tower, rows x its tokens x (all layers' states + 2 x its MLP)
    + float32 and 16-bit logits of one position a row + one de-quantized MLP matrix where bits < 16.
    """
    shape = shape_of(config)
    a = _stored(config, bits, blocks_removed, context=context, batch=rows)
    prefill = 2 * rows * context * (3 * shape.intermediate + 4 * shape.hidden + context)
    states = (shape.vision_layers + 1) * shape.vision_hidden + 2 * shape.vision_intermediate
    vision = 2 * rows * shape.vision_tokens * states
    matrix = 2 * shape.hidden * shape.intermediate if bits < 16 else 0
    growing = a.kv_cache_bytes // (shape.blocks - blocks_removed)
    return a.total_bytes + growing + max(prefill, vision) + 6 * rows * shape.vocab + matrix


def predict_awq_bytes(config, rows: int, context: int, whole_model: bool = True) -> int:
    """Predict the peak of AWQ's search over `rows` conversations of `context` tokens.

    16-bit weights (with whole_model=False all but the blocks, and one block) + one block in float32, twice
    (the weights that are scaled and a copy) + its float32 inputs, rows x context x (hidden + intermediate).
    """
    shape, a = shape_of(config), account(config)
    block = (a.part_bytes["block_weights"] + a.part_bytes["block_norms"]) // shape.blocks
    resident = a.weights_bytes - (0 if whole_model else block * (shape.blocks - 1))
    return resident + 4 * block + 4 * rows * context * (shape.hidden + shape.intermediate)


def judge_bytes(settings: dict) -> float:
    """Return the memory of all judges, the card's too: 0 for a server, the embedder's for those that embed, NaN if unknown.

    A chat model's parameters (`judge_params`) are taken at `judge_bits` (NF4's 4.5 at 4), and 1 GiB is added for its
    cache and activations.
    """
    bits = 4.5 if settings["judge_bits"] == 4 else settings["judge_bits"]
    names = {*judge_names(settings["judge"]), *settings.get("card_judges", ())}
    embedder = EMBEDDER_BYTES if names & EMBEDDING_JUDGES else 0
    return embedder + sum(params * bits / 8 + GIB for params in chat_judge_params(names))


def chat_judge_params(names) -> list[float]:
    """Return `judge_params` of those judges that are chat models in this process."""
    return [judge_params(name) for name in names if name != "server" and name not in EMBEDDING_JUDGES]


def judge_params(name: str) -> float:
    """Return a chat judge's parameters: its folder's 16-bit files, or its name ("Qwen2.5-32B"); NaN if neither tells."""
    if files := list(Path(name).glob("*.safetensors")):
        return sum(f.stat().st_size for f in files) / 2
    found = re.search(r"(\d+(?:\.\d+)?)[Bb]\b", name)
    return float(found[1]) * 1e9 if found else math.nan


def preflight(settings: dict, device: dict, config) -> pd.DataFrame:
    """Return, for every stage, predicted peak_gib and disk_gib, whether it fits, and what to change if not.

    `settings` are a profile's (`config.settings(profile)`); `device` has name, memory_bytes (free for this),
    disk_bytes, cuda (bool) and, with several GPUs, count: only a chat judge is spread over them. Stages 01 to
    04 load the base at `base_bits`. A stage fits if its peak is within the memory, less RUNTIME_BYTES with
    CUDA, and its files and the earlier stages' within the disk (downloads are not counted). A `change` of
    settings was tried out before it is proposed. Raises ValueError for a device or settings lacking a key.
    """
    for what, given, wanted in (("settings", settings, SETTINGS), ("device", device, DEVICE)):
        if missing := [key for key in wanted if key not in given]:
            raise ValueError(f"{what}: {missing[0]!r} is missing; preflight needs {', '.join(wanted)}.")
    settings = {"gradient_checkpointing": device["cuda"], "awq_whole_model": True, **settings}
    room = device["memory_bytes"] - (RUNTIME_BYTES if device["cuda"] else 0)
    free, params_b, rows = device["disk_bytes"], account(config).params_b, []
    for stage, (peak, ladder) in _stages(config).items():
        memory = room * device.get("count", 1) if stage == "06_judge_eval" else room
        disk = _disk_bytes(stage, config, settings)
        free -= disk
        predicted, changes = peak(settings), []
        if not device["cuda"] and params_b > CPU_LIMIT_PARAMS_B:
            changes.append(f"a model of {params_b:.2f}B parameters needs a CUDA GPU, which {device['name']} "
                           'has not: choose profile "local"')  # fmt: skip
        elif math.isnan(predicted):
            changes.append("the judge's size is not in its name (as 7B would be): set judge to server")
        elif predicted > memory:
            none = f"no setting fits it into {device['name']}: use a larger GPU or a smaller base"
            changes.append(_change(peak, ladder, settings, memory) or none)
        if free < 0 < disk:
            changes.append(f"{-free / GIB:.1f} GiB of disk short: shorten recover or methods, or free some")
        rows.append({"stage": stage, "peak_gib": predicted / GIB, "disk_gib": disk / GIB, "fits": not changes,
                     "change": "; ".join(changes)})  # fmt: skip
    return pd.DataFrame(rows)


def _stages(config) -> dict:
    """Map a stage to its peak as a function of the settings, and to the settings that may bring it down."""
    prompt = shape_of(config).vision_tokens + QUESTION_TOKENS

    def training(blocks_removed):
        # A conversation holds the three questions with their answers.
        return lambda s: predict_training_bytes(
            config, s["lora_r"], s["batch_size"], prompt + 2 * QUESTION_TOKENS + 3 * s["max_new_tokens"],
            s["base_bits"], s["gradient_checkpointing"], blocks_removed(s), 3 * s["max_new_tokens"],
        )  # fmt: skip

    def answering(length, bits="base_bits"):
        return lambda s: predict_generation_bytes(config, s["batch_rows"], prompt + s[length], s[bits])

    def quantizing(s):
        search = predict_awq_bytes(config, s["awq_rows"], prompt + s["max_new_tokens"], s["awq_whole_model"])
        return max(search if "awq" in s["methods"] else 0, answering("max_new_tokens", "bits")(s))

    answer = ("batch_rows", "base_bits")
    tune = ("gradient_checkpointing", "batch_size", "base_bits", "max_new_tokens")
    return {
        "01_finetune": (training(lambda s: 0), tune),
        "02_layer_importance": (answering("calibration_tokens"), (*answer, "calibration_tokens")),
        "03_prune_sweep": (answering("max_new_tokens"), (*answer, "max_new_tokens")),
        "04_sft_recovery": (training(lambda s: min(s["recover"], default=0)), tune),
        "05_awq_vs_bnb": (quantizing, ("awq_rows", "awq_whole_model", "batch_rows", "max_new_tokens")),
        "06_judge_eval": (judge_bytes, ("judge_bits", "judge")),
    }


def _disk_bytes(stage: str, config, settings: dict) -> int:
    """Predict a stage's files: merged and packed models, checkpoints of 12 bytes a trained parameter."""
    recover, files = settings["recover"], 0
    for n in {"01_finetune": (0,), "04_sft_recovery": recover}.get(stage, ()):
        adapters = lora_params(config, settings["lora_r"], n) + shape_of(config).projector_params
        files += account(config, n).weights_bytes + 12 * adapters
    if stage == "05_awq_vs_bnb":
        for method in settings["methods"]:
            files += sum(_packed(config, method, settings, n).weights_bytes for n in (0, *recover))
    return files


def _packed(config, method: str, settings: dict, blocks_removed: int) -> Account:
    bits, group_size = (4, BNB_BLOCK_SIZE) if method == "bnb" else (settings["bits"], settings["group_size"])
    return account(config, blocks_removed, bits, group_size, method=method)


def _smaller(setting: str, value) -> list:
    """Return the values to try in place of a setting's, in order, each asking for less memory."""
    least_of = {"gradient_checkpointing": True, "awq_whole_model": False, "base_bits": 4, "judge_bits": 4}
    least_of["judge"] = "server"
    if setting in least_of:
        return [] if value == least_of[setting] else [least_of[setting]]
    least = 16 if setting.endswith("tokens") else 1
    return [value // 2**k for k in range(1, value.bit_length()) if value // 2**k >= least]


def _change(peak, ladder: tuple[str, ...], settings: dict, memory: float) -> str:
    """Return the first single setting that makes `peak` fit, else the first of them together, else ''."""
    for setting in ladder:
        for value in _smaller(setting, settings[setting]):
            if peak({**settings, setting: value}) <= memory:
                return _sentence({setting: value}, settings)
    tried = {}
    for setting in ladder:
        for value in _smaller(setting, settings[setting]):
            tried[setting] = value
            if peak({**settings, **tried}) <= memory:
                return _sentence(tried, settings)
    return ""


def _sentence(changed: dict, settings: dict) -> str:
    own_words = {
        "gradient_checkpointing": "turn gradient checkpointing on",
        "awq_whole_model": "keep the model in host memory, AWQ taking one block at a time",
    }
    return ", ".join(own_words.get(k, f"set {k} to {v} (is {settings[k]})") for k, v in changed.items())


def this_device(folder) -> dict:
    """Return this machine as `preflight` takes it: the GPUs, or the memory that is free; and the disk of a folder."""
    import shutil

    import psutil
    import torch

    disk = shutil.disk_usage(folder).free
    if torch.cuda.is_available():
        first = torch.cuda.get_device_properties(0)
        return {"name": first.name, "memory_bytes": first.total_memory, "disk_bytes": disk, "cuda": True,
                "count": torch.cuda.device_count()}  # fmt: skip
    return {"name": "this machine", "memory_bytes": psutil.virtual_memory().available, "disk_bytes": disk, "cuda": False}
