"""Rehearse a run at full size on pretended cards: every stage's own cells, a process each, with loops cut short.

The base is a folder of the true shapes whose weights are holes in a file, LLaVA-1.5-7B's or those of another folder
with a configuration and a processor, whose weights need not be there; images are drawn. What is cut: training
steps, images beyond those that fill a batch, answers to two tokens (in caches as long as whole ones), counts of blocks.
What stays: sizes, dtypes, lifetimes, the second and third model of a loop, files and their bytes.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from medprune import child
from medprune.data.synthetic import draw
from medprune.judging.judge import ASPECTS
from medprune.models.assembled import prepare_base
from medprune.models.families import hub_name
from medprune.models.loading import load_processor, save_processor
from medprune.models.sizes import base_config, shape_of
from medprune.rehearsing import card
from medprune.settings import PROFILES, REPO, STAGES, TWO_CARDS
from medprune.store import fingerprint, read_json, write_folder, write_json

GIB = 2**30
REHEARSED = STAGES[:6]
IMAGES = 5  # of each condition to train on
CONTEXT_BYTES = int(0.5 * GIB)  # of a card: CUDA's context, cuBLAS's workspaces, the allocator's fragments


@dataclass(frozen=True)
class Machine:
    """What a stage may use: cards of gpu_gib each, host memory, disk where the run is, and scratch apart from it."""

    name: str
    cards: int
    gpu_gib: float = 14.7
    ram_gib: float = 12.7
    disk_gb: float = 70.0
    scratch_gb: float = 0.0


MACHINES = {"kaggle": Machine("kaggle", 2, ram_gib=29.0, disk_gb=20.0, scratch_gb=50.0), "colab": Machine("colab", 1)}


def machine(name: str, **changes) -> Machine:
    """Return a machine by name with other sizes put in; ValueError names those that there are."""
    if name not in MACHINES:
        raise ValueError(f"machine {name!r} is not known: choose {' or '.join(MACHINES)}.")
    for what, size in changes.items():
        if not (0 < size < 2**20 or size == 0 and what == "scratch_gb"):
            raise ValueError(f"{what}={size} must be above 0 and below {2**20}.")
    return replace(MACHINES[name], **changes)


def stages(names: list[str] | None) -> tuple[str, ...]:
    """Return stages by name or number, such as 02; all of REHEARSED where none is named."""
    found = tuple(s for s in STAGES if (s in REHEARSED if names is None else any(s.startswith(n) for n in names)))
    if names and (unknown := [n for n in names if not any(s.startswith(n) for s in STAGES)]):
        raise ValueError(f"stage {unknown[0]!r} is not known: the stages are {', '.join(STAGES)}.")
    if others := [s for s in found if s not in REHEARSED]:
        raise ValueError(f"{others[0]} is not rehearsed: its plans are chosen by numbers, which nothing here computes.")
    return found


LLAVA_7B = {
    "text_config": {
        "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
    },
}  # fmt: skip
QWEN_7B = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
DERMNET = {
    "rosacea": "Acne and Rosacea Photos/rosacea-{}.jpg",
    "actinic keratosis": "Actinic Keratosis Basal Cell Carcinoma/actinic-keratosis-face-{}.jpg",
    "basal cell carcinoma": "Actinic Keratosis Basal Cell Carcinoma/basal-cell-carcinoma-arm-{}.jpg",
    "dermatitis": "Atopic Dermatitis Photos/atopic-dermatitis-{}.jpg",
    "melanoma": "Melanoma Skin Cancer Nevi and Moles/malignant-melanoma-{}.jpg",
    "psoriasis": "Psoriasis pictures Lichen Planus and related diseases/psoriasis-{}.jpg",
    "lichen planus": "Psoriasis pictures Lichen Planus and related diseases/lichen-planus-{}.jpg",
    "seborrheic keratosis": "Seborrheic Keratoses and other Benign Tumors/seborrheic-keratoses-ruff-{}.jpg",
}


def make_base(folder: Path, shapes: dict = LLAVA_7B) -> Path:
    """Write a LLaVA of these shapes in the hub's layout: configuration, a processor, and weights that are holes."""
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    processor = load_processor(prepare_base("smollm2"))  # whose tokens are about as long as Llama's
    side, vision = {"height": shapes["vision_config"]["image_size"]}, shapes["vision_config"]
    side["width"] = side["height"]
    processor.image_processor.size, processor.image_processor.crop_size = {"shortest_edge": side["height"]}, side
    processor.patch_size = vision["patch_size"]
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    form = {"image_token_index": image, "vision_feature_layer": -2, "tie_word_embeddings": False}
    config = LlavaConfig(**{k: AutoConfig.for_model(**v) for k, v in shapes.items()}, **form)
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    return _write_model(folder, config, LlavaForConditionalGeneration)


def hollow(source: Path, folder: Path) -> Path:
    """Write what a folder's configuration describes, with its processor, and weights that are holes."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(source)
    folder.mkdir(parents=True, exist_ok=True)
    save_processor(load_processor(source), folder)
    return _write_model(folder, config, AutoModelForImageTextToText._model_mapping[type(config)], str, config.dtype)


def make_judge(folder: Path, shape: dict = QWEN_7B) -> Path:
    """Write a chat model of this shape, whose one word is a judgement that can be read."""
    from transformers import AutoConfig, Qwen2ForCausalLM

    tokenizer = load_processor(prepare_base("smollm2")).tokenizer
    tokenizer.save_pretrained(folder)
    words = read_json(folder / "tokenizer.json")
    said = next(word for word in words["added_tokens"] if word["id"] == card.SAID)
    old = said["content"]
    said |= {"content": json.dumps(dict.fromkeys(ASPECTS, 3)), "special": False}
    words["model"]["vocab"][said["content"]] = words["model"]["vocab"].pop(old)
    write_json(folder / "tokenizer.json", words)
    return _write_model(folder, AutoConfig.for_model(**shape), Qwen2ForCausalLM, str)


def _write_model(folder: Path, config, kind: type, name=hub_name, dtype=None) -> Path:
    """Write a model's configuration, and its weights as holes, in float16 unless told; name: what they are called."""
    from transformers import GenerationConfig

    config.dtype = dtype or torch.float16
    with torch.device("meta"):
        model = kind(config).to(config.dtype)
    tensors = {name(k): v for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys}
    card.write_holes(tensors, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=card.END, pad_token_id=0).save_pretrained(folder)
    return folder


def make_images(folder: Path, n_train: int, n_test: int) -> Path:
    """Draw images in DermNet's folders, n_train and n_test of each condition."""
    for number, (condition, name) in enumerate(DERMNET.items()):
        for split, several in (("train", n_train), ("test", n_test)):
            for i in range(several):
                path = folder / split / name.format(70 + i)
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(condition, 1000 * (split == "test") + 100 * number + i, 64)[0].resize((400, 400)).save(path)
    return folder


def short(settings: dict, root: Path, blocks: int) -> dict:
    """Return what a rehearsal asks for beside a profile's settings: loops cut, lifetimes and sizes kept.

    blocks: of the base.
    """
    images, most = -(-settings["batch_rows"] // 3) + 1, max(settings["recover"])  # they fill a batch, and begin another
    first = blocks // 3
    asked = {
        "base": str(root / "base"), "images": str(root / "dermnet"), "embedding": "minilm",
        "n_train": 8 * IMAGES, "n_test": -(-images // 8) * 8, "sft_steps": 3, "save_every": 2, "recovery_steps": 2,
        "n_calibration": min(settings["n_calibration"], images), "awq_rows": settings["awq_rows"],
        "random_draws": 2,
        "blocks_removed": [0, *settings["recover"]],
        "protected_blocks": [b for b in range(blocks) if not first <= b < first + most],
    }  # fmt: skip
    if settings.get("judge", "reference") != "reference":
        asked["judge"] = str(root / "judge")
    return asked


def rehearse(machine: Machine, root: Path, stages=REHEARSED, settings: dict | None = None, say=None) -> pd.DataFrame:
    """Rehearse stages of profile t4 on a machine; return a row for each of what it took (see `stage`).

    root: a folder for the base, the images and the run; stages need those before them there. settings: other than the
    profile's; `base` is a folder, whose weights need not be there. say: called with each row as it is known. A stage
    that fails ends the rehearsal, its error in the row. Raises ValueError for a base that is none, and for a root that
    was made for another.
    """
    asked = PROFILES["t4"] | (TWO_CARDS if machine.cards > 1 else {}) | (settings or {})
    if base := (settings or {}).get("base"):
        if not Path(base).is_dir():
            raise ValueError(f"base={base!r} is no folder: name one with a config.json, or none for LLaVA-1.5's shape.")
        base_config(base)
    # one picture more than is asked for, as one may be left out as another's equal
    pictures, record = (IMAGES + 1, -(-asked["batch_rows"] // 24) + 1), root / "made.json"
    mark = fingerprint(Path(base, "config.json") if base else LLAVA_7B, pictures)
    if record.exists() and read_json(record) != mark:
        raise ValueError(f"{root} was made for another base or batch_rows: name an empty folder.")
    if not record.exists():
        with write_folder(root / "base") as temporary:
            hollow(Path(base), temporary) if base else make_base(temporary)
        with write_folder(root / "dermnet") as temporary:
            make_images(temporary, *pictures)
        write_json(record, mark)
    if asked.get("judge", "reference") != "reference" and not (root / "judge").exists():
        with write_folder(root / "judge") as temporary:
            make_judge(temporary)
    found, blocks = [], shape_of(base_config(root / "base")).blocks
    for stage in stages:
        found.append(_stage(stage, machine, root, asked | short(asked, root, blocks)))
        if say:
            say(found[-1])
        if found[-1]["misfit"]:
            break
    return pd.DataFrame(found)


def _stage(stage: str, machine: Machine, root: Path, asked: dict) -> dict:
    out = root / f"{stage}.json"
    out.unlink(missing_ok=True)
    parameters = {"profile": "t4", "run_name": machine.name, "runs_dir": str(root / "runs")}
    if stage == STAGES[0]:
        parameters["settings"] = {k: list(v) if isinstance(v, tuple) else v for k, v in asked.items()}
    job = {"stage": stage, "cards": machine.cards, "card_bytes": int(machine.gpu_gib * GIB) - CONTEXT_BYTES}
    job |= {"root": str(root), "out": str(out), "parameters": parameters}
    own = {"MEDPRUNE_SCRATCH": str(root / "scratch") if machine.scratch_gb else "", "MPLBACKEND": "agg"}
    own |= {"MEDPRUNE_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "medprune.rehearsing.stage", str(write_json(root / f"{stage}.job.json", job))]
    with open(root / f"{stage}.log", "w", encoding="utf-8") as log:
        around = {"env": os.environ | own, "cwd": REPO, "stdout": log, "stderr": subprocess.STDOUT}
        with child.started(command, **around) as process:
            status = process.wait()
    if not out.exists():
        raise RuntimeError(f"the rehearsal of {stage} ended with status {status}: see {log.name}.")
    taken = read_json(out)
    return taken | {"misfit": "; ".join(_misfits(taken, machine))}


def _misfits(taken: dict, machine: Machine) -> list[str]:
    """Return what of a stage did not fit a machine, in sentences."""
    found = [taken["error"]] if taken["error"] else []
    found += [f"{what} were halved to {rows} at once" for what, rows in taken["halved"].items()]
    sizes = (("ram", GIB, machine.ram_gib), ("disk", 1e9, machine.disk_gb), ("scratch", 1e9, machine.scratch_gb))
    for name, unit, limit in sizes:
        if taken[f"{name}_bytes"] > limit * unit:
            found.append(f"{taken[f'{name}_bytes'] / unit:.1f} of {name} are needed, {limit} are there")
    return found
