"""The three sizes the same code runs at, as frozen dataclasses.

`resolve("local", sft_steps=40)` gives the settings of a run; a misspelt name or an impossible value ends in one
sentence, before anything long starts.
"""

import os
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

REPO = Path(__file__).resolve().parents[1]


DATA = REPO / "data"


N_CONDITIONS = 8  # the conditions that synthetic images show, as many of each


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


METHODS = ("awq", "bnb", "hqq", "rtn")


SCHEDULES = ("linear", "cosine", "polynomial", "constant", "constant_with_warmup")  # of transformers' get_scheduler


RECIPES = ("lora", "projector", "last_blocks", "distill")


CRITERIA = (
    "output_similarity",
    "magnitude",
    "block_influence",
    "perplexity",
    "logit_divergence",
    "reverse_order",
    "random",
)


# Settings on which no model's answers depend, and those on which no training does: nothing is redone when they change.
JUDGING = ("judge", "judges_combined", "judge_model", "judge_url", "judge_bits", "card_images", "card_judges")


NOT_TRAINING = (
    *JUDGING,
    "embedding",
    "recipes",
    "data_fractions",
    "equal_time",
    "max_new_tokens",
    "batch_rows",
    "criteria",
    "n_calibration",
    "calibration_tokens",
    "protected_blocks",
    "blocks_removed",
    "recover",
    "methods",
    "bits",
    "group_size",
    "awq_rows",
    "awq_tokens",
)


@dataclass(frozen=True)
class Profile:
    """Settings of a run. Times are the user's, sizes are counts, rates are per optimizer step."""

    name: str
    seed: int = 0
    # data
    images: str = "synthetic"  # "synthetic", or a folder / table of photographs
    conditions: str | None = None  # facts file of other conditions (as data/conditions.json), for photographs of them
    n_train: int | None = None  # images; None takes all there are
    n_test: int | None = None
    image_size: int = 96  # side of the images the generator writes, pixels
    # base model
    base: str = "smollm2"  # "tiny", "smollm2", or a hub id / folder in the LLaVA layout
    base_bits: int = 16  # 4: QLoRA over an NF4 base
    vision_steps: int = 0  # optimizer steps of the vision tower's own training (assembled bases only)
    embedding: str = "minilm"  # "minilm": the wheel's; else a sentence-transformers name or folder
    # fine-tuning (the paper: QLoRA, r 16, alpha 8)
    lora_r: int = 16
    lora_alpha: int = 8
    lora_targets: tuple[str, ...] = TARGETS
    learning_rate: float = 3e-3  # of the adapters; the projector's is a tenth
    schedule: str = "linear"  # of the rate, by transformers' names: linear, cosine, constant_with_warmup, ...
    multi_turn: bool = False  # True: later questions see earlier answers, as in the paper
    batch_size: int = 4  # conversations per optimizer step
    sft_steps: int = 80
    epochs: float | None = None  # passes over the training images instead of sft_steps
    processes: int = 1  # that fine-tune together through accelerate, a GPU each
    recovery_steps: int = 40
    save_every: int = 20  # steps between checkpoints, and between measurements of the held-out loss
    n_held_out: int = 0  # training images kept back to measure it
    patience: int = 0  # checkpoints without a lower held-out loss before training ends early; 0: never
    recipe: str = "lora"  # the way of recovery whose models notebooks 05 and 06 go on with
    recipes: tuple[str, ...] = ("lora", "projector", "last_blocks", "distill")  # ways of recovery that are compared
    data_fractions: tuple[float, ...] = (1.0,)  # of the training images, for each recipe
    equal_time: bool = False  # also give each recipe the time that lora takes
    # answers
    max_new_tokens: int = 38
    batch_rows: int = 128  # answers decoded at once
    # importance and pruning
    criteria: tuple[str, ...] = ("output_similarity", "magnitude")
    n_calibration: int = 8  # images; each is asked the three test questions
    calibration_tokens: int = 32  # length of the answers that are compared
    protected_blocks: tuple[int, ...] = (0, 1, -1)  # the paper's 1, 2 and 32, counted from 0
    blocks_removed: tuple[int, ...] = (0, 1, 2, 3, 4, 6)
    recover: tuple[int, ...] = (2, 4)  # blocks removed in the models that notebook 04 recovers
    # quantization
    methods: tuple[str, ...] = ("awq", "bnb", "rtn")
    bits: int = 4
    group_size: int = 64
    awq_rows: int = 8  # calibration conversations
    awq_tokens: int = 1024  # of each, at most
    # judge
    judge: str = "reference"  # "reference", a chat model's name, "server", or several with + between
    judges_combined: str = "median"  # or "mean": of several judges' scores
    judge_model: str | None = None
    judge_url: str | None = None
    judge_bits: int = 16
    card_images: int = 8  # test images whose answers the judge card is made of
    card_judges: tuple[str, ...] = ("cosine",)  # further judges, for the card and for agreement; they score no table


PROFILES = {
    "smoke": Profile(
        name="smoke",
        n_train=24,
        n_test=8,
        image_size=64,
        base="tiny",
        vision_steps=4,
        sft_steps=4,
        recovery_steps=2,
        save_every=2,
        batch_size=2,
        max_new_tokens=12,
        n_calibration=2,
        calibration_tokens=8,
        blocks_removed=(0, 1, 2),
        recover=(1, 2),
        awq_rows=4,
        n_held_out=2,
        data_fractions=(0.5, 1.0),
        equal_time=True,
    ),
    "local": Profile(
        name="local",
        n_train=240,
        n_test=24,
        vision_steps=240,
        batch_size=2,
        learning_rate=2e-3,
        sft_steps=90,
        save_every=30,
        n_held_out=8,
        recovery_steps=20,
        recipes=("lora", "last_blocks"),
        awq_rows=4,
        awq_tokens=96,
        methods=("awq", "bnb", "hqq", "rtn"),
    ),
    "t4": Profile(
        name="t4",
        images="/kaggle/input/dermnet",
        n_train=1737,
        n_test=39,
        base="llava-hf/llava-1.5-7b-hf",
        base_bits=4,
        embedding="sentence-transformers/all-MiniLM-L6-v2",
        learning_rate=5e-4,
        multi_turn=True,
        batch_size=8,
        sft_steps=434,
        recovery_steps=217,
        save_every=50,
        max_new_tokens=200,
        batch_rows=6,
        n_calibration=27,
        calibration_tokens=64,
        blocks_removed=(0, 2, 4, 7, 8, 9, 10),
        recover=(7, 9),
        awq_rows=32,
        recipes=("lora", "distill"),
        methods=("awq", "bnb", "hqq", "rtn"),
        judge="Qwen/Qwen2.5-32B-Instruct",
        judge_bits=4,
    ),
}


def resolve(profile: str = "auto", others: dict | None = None, **overrides) -> Profile:
    """Return the settings of `profile` with every override that is not None put in, those of `others` first.

    "auto" is MEDPRUNE_PROFILE if set, else `t4` where there is CUDA, else `local`. Lists become tuples, so that
    papermill's JSON values fit. Where blocks_removed is given and recover is not, the profile's counts that are among
    them are recovered, or else the largest. Raises ValueError naming the choices for an unknown profile or setting,
    and the reason for a value that cannot be.
    """
    if profile == "auto":
        profile = os.environ.get("MEDPRUNE_PROFILE") or ("t4" if _has_cuda() else "local")
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is not known: choose one of {', '.join(PROFILES)} or auto.")
    if not isinstance(others, dict | None):
        raise ValueError(f'settings={others!r} must be a dict such as {{"batch_rows": 8}}.')
    names = {f.name: f for f in fields(Profile)}
    values = {}
    for name, value in [*(others or {}).items(), *overrides.items()]:
        if name not in names or name == "name":
            near = get_close_matches(name, names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else f": choose among {', '.join(list(names)[1:])}"
            raise ValueError(f"setting {name!r} is not known{hint}.")
        if value is not None:
            values[name] = _fit(name, value, names[name].type)
    if "blocks_removed" in values and "recover" not in values:
        counts = values["blocks_removed"]
        values["recover"] = tuple(n for n in PROFILES[profile].recover if n in counts) or (max(counts, default=0),)
    config = replace(PROFILES[profile], **values)
    _check(config)
    return config


def judge_names(judge: str) -> tuple[str, ...]:
    """Return the judges that the setting `judge` names, such as "reference+server"; a folder's name may hold a +."""
    return (judge,) if Path(judge).exists() else tuple(name.strip() for name in judge.split("+"))


def protected_numbers(n_blocks: int, blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Return protected block numbers of a model of n_blocks, counted from 0; negative ones count from the end."""
    for b in blocks:
        if not -n_blocks <= b < n_blocks:
            raise ValueError(f"protected_blocks has {b}, but the model's blocks are 0 to {n_blocks - 1}.")
    return tuple(sorted({b % n_blocks for b in blocks}))


def settings(config: Profile, without: tuple[str, ...] = ()) -> dict:
    """Return the settings, but those named in `without`, as JSON-able values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items() if k not in without}


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _fit(name, value, kind):
    wanted = [t for t in (get_args(kind) or (kind,)) if t is not type(None)]
    if kind in (tuple[int, ...], tuple[str, ...], tuple[float, ...]):
        item = get_args(kind)[0]
        if item is float and isinstance(value, list | tuple):
            value = [float(v) if type(v) is int else v for v in value]
        if isinstance(value, list | tuple) and all(type(v) is item for v in value):
            return tuple(value)
        raise ValueError(f"{name}={value!r} must be a list of {item.__name__}.")
    if float in wanted and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) not in wanted:
        raise ValueError(f"{name}={value!r} must be {' or '.join(t.__name__ for t in wanted)}.")
    return value


def _check(c: Profile) -> None:
    positive = (
        "image_size",
        "lora_r",
        "lora_alpha",
        "learning_rate",
        "batch_size",
        "sft_steps",
        "save_every",
        "recovery_steps",
        "max_new_tokens",
        "batch_rows",
        "n_calibration",
        "calibration_tokens",
        "awq_rows",
        "awq_tokens",
    )
    for name in positive:
        if getattr(c, name) <= 0:
            raise ValueError(f"{name}={getattr(c, name)} must be greater than 0.")
    if c.group_size not in (32, 64, 128):
        raise ValueError(f"group_size={c.group_size} must be 32, 64 or 128.")
    if c.bits not in (3, 4, 8):
        raise ValueError(f"bits={c.bits} must be 3, 4 or 8.")
    if c.base_bits not in (4, 16):
        raise ValueError(f"base_bits={c.base_bits} must be 4 (QLoRA) or 16.")
    if c.judge_bits not in (4, 16):
        raise ValueError(f"judge_bits={c.judge_bits} must be 4 or 16.")
    judges = judge_names(c.judge)
    if "" in judges or len(set(judges)) < len(judges):
        raise ValueError(f"judge={c.judge!r} must name one judge, or several different ones with + between.")
    if twice := set(c.card_judges) & set(judges):
        raise ValueError(f"card_judges has {min(twice)!r}, which judge={c.judge!r} names already: leave it out.")
    if "server" in (*judges, *c.card_judges) and not (c.judge_url and c.judge_model):
        raise ValueError('judge="server", or "server" among card_judges, needs judge_url and judge_model.')
    named = (
        ("methods", c.methods, METHODS),
        ("criteria", c.criteria, CRITERIA),
        ("recipe", (c.recipe,), RECIPES),
        ("recipes", c.recipes, RECIPES),
        ("lora_targets", c.lora_targets, TARGETS),
        ("schedule", (c.schedule,), SCHEDULES),
        ("judges_combined", (c.judges_combined,), ("median", "mean")),
    )
    for name, chosen, choices in named:
        for value in chosen:
            if value not in choices:
                raise ValueError(f"{name} has {value!r}: choose among {', '.join(choices)}.")
    if "output_similarity" not in c.criteria:
        raise ValueError("criteria must hold output_similarity, whose order notebook 03 prunes by.")
    if "awq" not in c.methods:
        raise ValueError(f"methods={list(c.methods)} must hold awq, which tables 4 and 5 are about.")
    if c.epochs is not None and c.epochs <= 0:
        raise ValueError(f"epochs={c.epochs} must be greater than 0, or None for sft_steps.")
    if c.processes < 1 or c.batch_size % c.processes:
        raise ValueError(f"processes={c.processes} must be 1 or more, and divide batch_size={c.batch_size}.")
    if not c.data_fractions or any(not 0 < f <= 1 for f in c.data_fractions):
        raise ValueError(
            f"data_fractions={list(c.data_fractions)} must be shares of the training images, above 0 and up to 1."
        )
    if c.n_held_out < 0 or c.patience < 0 or (c.patience and not c.n_held_out):
        raise ValueError(
            f"n_held_out={c.n_held_out} and patience={c.patience} must be 0 or more, and patience needs n_held_out."
        )
    for name in (c.recipe, *c.recipes):
        if c.base_bits == 4 and name in ("projector", "last_blocks"):
            raise ValueError(
                f"recipe {name} trains whole weights, which base_bits=4 does not allow: leave it out or set base_bits=16."
            )
    if c.awq_rows < 4:
        raise ValueError(f"awq_rows={c.awq_rows} must be 4 or more.")
    for n in (*c.blocks_removed, *c.recover):
        if n < 0:
            raise ValueError(f"blocks_removed and recover hold counts of blocks, so {n} cannot be: use 0 or more.")
    if not c.recover or 0 in c.recover or not set(c.recover) <= set(c.blocks_removed):
        raise ValueError(
            f"recover={list(c.recover)} must hold counts above 0 that are among blocks_removed={list(c.blocks_removed)}."
        )
    if c.conditions is not None and c.images == "synthetic":
        raise ValueError(f"conditions={c.conditions!r} needs images of them: synthetic ones show the paper's eight.")
    if c.n_train is not None and c.n_held_out >= c.n_train:
        raise ValueError(f"n_held_out={c.n_held_out} must be less than n_train={c.n_train}.")
    for name in ("n_train", "n_test"):
        n = getattr(c, name)
        if n is not None and n <= 0:
            raise ValueError(f"{name}={n} must be greater than 0.")
        if c.images == "synthetic" and (n is None or n % N_CONDITIONS):
            raise ValueError(f"{name}={n} must be a multiple of {N_CONDITIONS} for synthetic images.")


STAGES = ("01_finetune", "02_layer_importance", "03_prune_sweep", "04_sft_recovery", "05_awq_vs_bnb", "06_judge_eval")
