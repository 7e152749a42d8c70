"""What several notebooks share: a run's images and splits, the base model, answering and judging one model."""

import random
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

from medprune import (
    checkpoint,
    conversations,
    data,
    finetune,
    generate,
    judge,
    judge_card,
    judge_chat,
    model,
    prune,
    quantize,
    synthetic,
    vision,
)
from medprune.accounting import account
from medprune.artifacts import Run, Units, fingerprint, read_json, write_json
from medprune.config import Profile, judge_names
from medprune.shapes import base_config


def gather_images(config: Profile, run: Run, conditions: dict):
    """Return (records, report of what was left out): synthetic images, drawn into the run's folder, or the user's."""
    if config.images != "synthetic":
        return data.load_images(config.images, conditions)
    folder = run.dir / "images"
    records = []
    for split, n in (("train", config.n_train), ("test", config.n_test)):
        rows = synthetic.write_images(folder, n // len(synthetic.CONDITIONS), config.image_size, config.seed, split)
        for row in rows:
            path = Path(row["path"])
            key = f"{split}/{path.parent.name}/{path.name}"
            records.append(data.Record(key, str(path), row["condition"], split, None, row["skin_tone"]))
    return records, pd.DataFrame({"key": [], "reason": []})


def save_splits(run: Run, splits: dict) -> None:
    write_json(run.dir / "splits.json", {name: [asdict(r) for r in records] for name, records in splits.items()})


def load_splits(run: Run) -> dict:
    """Return {"train": records, "test": records} as notebook 01 made them."""
    raw = read_json(run.of("01_finetune") / "splits.json")
    return {name: [data.Record(**r) for r in records] for name, records in raw.items()}


def prepare_tuned_tower(config: Profile, run: Run, records, conditions: dict) -> str:
    """Return the base model's folder; an assembled base gets its vision tower trained first, once per run."""
    base = model.prepare_base(config)
    if not config.vision_steps or base == config.base:
        return base
    context = fingerprint(base, config.vision_steps, config.seed, [r.key for r in records], [r.path for r in records])
    folder, marker = run.dir / "base", run.dir / "vision.json"
    if not (marker.exists() and read_json(marker)["context"] == context and (folder / "config.json").exists()):
        llava, processor = model.load(base)
        curve = vision.align_vision(llava, processor, records, conditions, config.vision_steps, config.seed)
        finetune.save(llava, processor, folder)
        write_json(marker, {"context": context, "curve": curve})
    return str(folder)


def make_judges(config: Profile, conditions: dict, names: tuple[str, ...] | None = None) -> list[judge.Judge]:
    """Return the judges named, or the profile's: the offline reference or cosine, a server, a chat model in process."""
    found = []
    for name in judge_names(config.judge) if names is None else names:
        if name == "reference":
            found.append(judge.reference_judge(conditions, model.load_embedder(config)))
        elif name == "cosine":
            found.append(judge_card.cosine_judge(model.load_embedder(config)))
        elif name == "server":
            found.append(judge_chat.server_judge(config.judge_url, config.judge_model))
        else:
            found.append(judge_chat.chat_judge(name, quantize_4bit=config.judge_bits == 4))
    return found


def evaluate(llava, processor, label: str, questions: list[dict], units: Units, config: Profile):
    """Answer the test questions and time one answer; return (rows, {"ms_per_token", "peak_bytes", "weight_bytes"})."""
    rows = generate.answer_rows(llava, processor, questions, label, units, config)
    key = f"{label} speed"
    if key not in units:
        measured = generate.measure_decoding(llava, processor, questions[0])
        units.add(key, measured | {"weight_bytes": model.weight_bytes(llava)})
    return rows, units[key]


def judged(rows: list[dict], judges: list[judge.Judge], run: Run, combined: str = "median") -> pd.DataFrame:
    """Return the rows as a table with judge scores; `cluster` is the image, which three questions share.

    Of several judges the scores are combined (median or mean), and each one's are kept as `truthfulness@<judge>`, ...
    """
    named, tables = [r | {"id": f"{r['method']} {r['id']}"} for r in rows], []
    for one in judges:
        scores = judge.judge_answers(named, one, run.root / "judgements.jsonl", progress=False)
        if unread := scores.attrs["n_unparsed"]:
            print(f"{unread} of {len(scores)} replies of the judge {one.name} could not be read: no score for those")
        if unread == len(scores):
            raise ValueError(f"the judge {one.name} gave no score in {unread} replies: choose another chat model.")
        tables.append(scores)
    table = pd.DataFrame(rows).drop(columns=["path"])
    scores = tables[0] if len(tables) == 1 else judge.combine_judges(tables, combined)
    own = [t[list(judge.ASPECTS)].add_suffix(f"@{one.name}") for t, one in zip(tables, judges, strict=True)]
    table = pd.concat([table, scores.drop(columns=["id"]), *(own if len(own) > 1 else [])], axis=1)
    return table.assign(cluster=table["key"])


def read_scores(folder: Path) -> pd.DataFrame:
    """Return the table of `judged` that an earlier notebook wrote; an empty answer, or "NA", is a text there too."""
    file = folder / "scores.csv"
    answers = pd.read_csv(file, usecols=["answer"], dtype=str, keep_default_na=False)
    return pd.read_csv(file).assign(answer=answers["answer"])


def answers_context(config: Profile, model_fingerprint: str, questions: list[dict]) -> str:
    """Return the context of a model's answers: everything that decides them but the label's own changes."""
    asked = [(q["id"], q["question"], q["path"]) for q in questions]
    return fingerprint(model_fingerprint, asked, config.max_new_tokens)


def figure_images(records, per_condition: int = 6):
    """Return a figure of some images of each condition."""
    groups = defaultdict(list)
    for r in records:
        groups[r.condition].append(r)
    figure, axes = plt.subplots(
        len(groups), per_condition, figsize=(1.5 * per_condition, 1.6 * len(groups)), squeeze=False
    )
    for line, (condition, members) in zip(axes, sorted(groups.items()), strict=True):
        for ax in line:
            ax.axis("off")
        for ax, record in zip(line, members, strict=False):
            ax.imshow(data.open_image(record.path))
        line[0].set_title(condition, loc="left", fontsize=9)
    figure.tight_layout()
    plt.close(figure)
    return figure


def quantization_batch(processor, records, conditions: dict, questions: dict, dtype, seed: int, most: int = 1024) -> dict:
    """Return input_ids and pixel_values of one conversation per record, cut to one length, for AWQ's calibration.

    most: tokens per row, the image's among them.
    """
    rng = random.Random(seed)
    ids = [
        finetune.encode_conversation(processor, conversations.conversation(r, conditions, questions, rng))["input_ids"]
        for r in records
    ]
    images = [data.open_image(r.path) for r in records]
    pixels = generate.encode(processor, [generate.prompt_text(processor, "")] * len(images), images, dtype)
    shortest = min(most, *map(len, ids))
    return {"input_ids": torch.stack([x[:shortest] for x in ids]), "pixel_values": pixels["pixel_values"]}


def quantize_folder(source: str, out: Path, method: str, bits: int = 4, group_size: int = 64, plan: Path | None = None,
                    images: str | None = None, facts: Path | None = None, rows: int = 32, quantize_head: bool = False,
                    quantize_vision: bool = False) -> tuple[dict, int]:  # fmt: skip
    """Prune and quantize a 16-bit LLaVA and write it to `out`; return (`quantize`'s info, bytes of the folder).

    source: folder or hub name. plan: of notebook 03. images, facts, rows: what awq is calibrated on. Raises ValueError
    for what cannot be done, most of it before the model is loaded.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: name a new folder.")
    if method == "awq" and images is None:
        raise ValueError("awq needs images to be calibrated on: give a folder or table of them, or take hqq or rtn.")
    chosen = prune.load_plan(plan) if plan else None
    if shape := base_config(source):
        account(shape, 0, bits, group_size, method=method, quantize_head=quantize_head, quantize_vision=quantize_vision)
    conditions, records = conversations.load_conditions(facts), []
    if images is not None:
        records = data.load_images(images, conditions)[0]
        records = data.sample_balanced(records, min(rows, len(records)), seed=0)
    device = model.choose_device()
    dtype = model.choose_dtype(device)
    llava, processor = model.load(source, device, dtype)
    if chosen:
        prune.apply_plan(llava, chosen)
    calibration = None
    if method == "awq":
        calibration = quantization_batch(processor, records, conditions, conversations.load_questions(), dtype, seed=0)
    llava, info = quantize.quantize(llava, method, bits, group_size, calibration, quantize_head, quantize_vision)
    without = f"blocks {', '.join(map(str, chosen.removed))} removed by {chosen.criterion}" if chosen else None
    checkpoint.save_quantized(llava, out, method, info, base=source, plan=without, processor=processor)
    return info, sum(f.stat().st_size for f in out.iterdir())
