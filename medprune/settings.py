"""The settings of a run at the three sizes the same code runs at: name, default, bounds and meaning, each once.

`resolve("local", sft_steps=40)` gives the settings of a run; a misspelt name or an impossible value ends in one
sentence, before anything long starts. `medprune settings` prints this page as a table. Each setting says which
notebooks read it: a notebook sees those alone, and is run again when one of them changes.
"""

import json
import math
import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

REPO = Path(__file__).resolve().parents[1]
DATA = REPO / "data"
STAGES = ("01_finetune", "02_layer_importance", "03_prune_sweep", "04_sft_recovery", "05_awq_vs_bnb", "06_judge_eval",
          "07_budget_search", "08_deploy")  # fmt: skip
N_CONDITIONS = 8  # the conditions that synthetic images show, as many of each
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NOT_QUANTIZED = ("original", "recovered", "magnitude", "found")  # by notebook 05; other models have a method in front
WIDTHS = {"rtn": (3, 4, 8), "awq": (3, 4, 8), "bnb": (4,), "hqq": (3, 4, 8)}  # bits that each method stores
METHODS = tuple(WIDTHS)
BITS = (3, 4, 8)
ENGINES = ("llama.cpp", "vLLM")
MIXTURES = ("Q4_K_M", "Q4_0", "Q3_K_M")  # of llama.cpp's types, that its users take
GROUP_SIZES = (32, 64, 128)  # weights that share a scale
SEARCHED = 2  # training images, at least, that 07 measures plans on and chooses on, beside those of awq_rows
NF4_GROUP = 64  # bitsandbytes' own, whatever group_size says
BASES = ("tiny", "smollm2", "smollm2-eyes")  # put together here
RECIPES = ("lora", "projector", "last_blocks", "distill")
SCHEDULES = ("linear", "cosine", "polynomial", "constant", "constant_with_warmup")  # of transformers
MOST = 2**31 - 1  # of what is counted: torch takes no more
Count = Annotated[int, Field(ge=1, le=MOST)]
Whole = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[float, Field(gt=0, le=MOST, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
JUDGES = ("reference", "cosine", "server")  # other names are chat models'
_HUB_ID = r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}"
PATHS = {  # what may name a file or folder of the user's, and the words that do not
    "images": ("synthetic",), "conditions": (), "base": BASES, "embedding": ("minilm",), "judge": JUDGES,
}  # fmt: skip


def _setting(default: Any, read_by: str, meaning: str, **bounds):
    """Declare a setting. read_by: the numbers of the notebooks that read it."""
    return Field(default, description=meaning, json_schema_extra={"read_by": read_by}, **bounds)


class Settings(BaseModel):
    """Settings of a run. Times are the user's, sizes are counts, rates are per optimizer step."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: str = _setting("local", "12345678", "the profile: smoke, local or t4")
    seed: int = _setting(0, "12345678", "of every random draw", ge=0, lt=2**32)
    # data
    images: str = _setting("synthetic", "167", '"synthetic", or a folder or table of photographs')
    modality: Literal["clinical", "dermoscopic", "both"] | None = _setting(
        None, "1", "of the photographs taken; null takes what there is, but mixes none"
    )
    conditions: str | None = _setting(None, "12345678", "facts file of other conditions, as data/conditions.json")
    n_train: Count | None = _setting(None, "1", "training images; null takes all there are")
    n_test: Count | None = _setting(None, "1", "test images; null takes a third")
    history: bool = _setting(False, "1", "what a patient says of it goes before every question, where the images know")
    image_size: int = _setting(96, "1", "side of synthetic images, pixels", ge=32, le=1024)
    # base model
    base: str = _setting("smollm2", "1578", f"{', '.join(BASES)}, or a hub id or folder in the LLaVA layout")
    base_bits: Literal[4, 16] = _setting(16, "147", "4: QLoRA over an NF4 base")
    held_bits: Literal[4, 16] = _setting(16, "12345678", "of 16-bit models while they answer; 4: as NF4, to fit a card")
    vision_steps: Whole = _setting(0, "1", "optimizer steps of an assembled base's vision tower")
    embedding: str = _setting("minilm", "12345678", '"minilm" (the wheel\'s), a sentence-transformers name or folder')
    # fine-tuning (the paper: QLoRA, r 16, alpha 8)
    lora_r: Count = _setting(16, "147", "rank of the adapters")
    lora_alpha: Count = _setting(8, "147", "their scale, over the rank")
    lora_targets: tuple[Literal[TARGETS], ...] = _setting(TARGETS, "147", "linears that get adapters", min_length=1)
    learning_rate: Positive = _setting(3e-3, "147", "of the adapters; whole weights move at a tenth", le=1)
    schedule: Literal[SCHEDULES] = _setting("linear", "147", "of the rate")
    multi_turn: bool = _setting(False, "147", "later questions see earlier answers, as in the paper")
    batch_size: Count = _setting(4, "147", "conversations per optimizer step, of all processes together")
    micro_batch: Count | None = _setting(
        None, "147", "of these in memory at once; null: all. Halved where they do not fit"
    )
    sft_steps: Count = _setting(80, "1", "optimizer steps of fine-tuning")
    balance: Annotated[float, Field(ge=0, le=1)] = _setting(
        0.0, "147", "how far pictures of rare conditions are tuned on again: 0 not, 1 until all come equally often"
    )
    epochs: Positive | None = _setting(None, "1", "passes over the images instead of sft_steps")
    processes: Count = _setting(1, "123", "that tune, score and answer together, a GPU each")
    save_every: Count = _setting(20, "147", "steps between checkpoints, and held-out losses")
    n_held_out: Whole = _setting(0, "1", "training images kept back to measure the loss")
    patience: Whole = _setting(0, "147", "checkpoints without a lower held-out loss before training ends; 0: never")
    # recovery
    recovery_steps: Count = _setting(40, "47", "optimizer steps after pruning")
    recipe: Literal[RECIPES] = _setting("lora", "47", "the way back whose models notebooks 05 and 06 go on with")
    recipes: tuple[Literal[RECIPES], ...] = _setting(RECIPES, "4", "ways back that are compared", min_length=1)
    data_fractions: tuple[Share, ...] = _setting((1.0,), "4", "shares of the images, for each recipe", min_length=1)
    equal_time: bool = _setting(False, "4", "also give each recipe the time that lora takes")
    # answers
    max_new_tokens: Count = _setting(38, "134578", "length of an answer")
    batch_rows: Count = _setting(128, "123457", "answers decoded at once; halved where they do not fit")
    # importance and pruning
    n_calibration: Count = _setting(8, "2", "training images, three questions each, that score the blocks")
    calibration_tokens: Count = _setting(32, "2", "length of the answers that are compared")
    random_draws: Count = _setting(20, "2", "random orders of removal, among which notebook 03 places every criterion")
    protected_blocks: tuple[int, ...] = _setting((0, 1, -1), "237", "never removed; the paper's 1, 2 and 32, from 0")
    blocks_removed: tuple[int, ...] = _setting((0, 1, 2, 3, 4, 6), "234", "counts that notebook 03 tries")
    recover: tuple[Count, ...] = _setting((2, 4), "2345678", "counts that notebook 04 recovers", min_length=1)
    # quantization
    methods: tuple[Literal[METHODS], ...] = _setting(("awq", "bnb", "rtn"), "5", "of 4 bits, compared")
    kept_methods: tuple[Literal[METHODS], ...] = _setting(("awq",), "5", "whose folders are kept once scored")
    group_size: Literal[GROUP_SIZES] = _setting(64, "57", f"weights that share a scale; NF4 always {NF4_GROUP}")
    awq_rows: int = _setting(8, "578", "calibration conversations", ge=4, le=MOST)
    awq_tokens: Count = _setting(1024, "578", "of each, at most; behind a picture of more, 32 are kept")
    # search for the best model within a budget
    budget_mib: Positive | None = _setting(
        None, "7", "most memory of the model found, KV cache and working memory in it; null: the paper's pipeline's"
    )
    context_tokens: Count = _setting(256, "7", "of the KV cache that the budget holds")
    search_images: Count = _setting(8, "7", "training images that plans are measured on")
    selection_images: Count = _setting(16, "7", "other training images, on which the best are chosen among")
    evaluations: Count = _setting(40, "7", "plans that each searcher may measure")
    finalists: Count = _setting(2, "7", "best plans that are recovered, and chosen among with and without it")
    # other engines
    deployed: tuple[str, ...] = _setting(
        ("awq-recovered", "found"), "8", "models that other engines are given, each without its count", min_length=1
    )
    engines: tuple[str, ...] = _setting(
        ENGINES, "8", f"{' and '.join(ENGINES)}, where installed, and addresses of servers that run", min_length=1
    )
    mixtures: tuple[Literal[MIXTURES], ...] = _setting(MIXTURES, "8", "of llama.cpp's own types, beside ours")
    # judge
    primary: tuple[str, str] = _setting(
        ("awq-recovered", "awq-magnitude"), "6", "the one comparison named beforehand, a - b, each without its count"
    )
    judge: str = _setting("reference", "1345678", '"reference", "server", a chat model, or several with + between')
    judges_combined: Literal["median", "mean"] = _setting("median", "1345678", "of several judges' scores")
    judge_model: str | None = _setting(None, "1345678", "the model that a server is asked for")
    judge_url: str | None = _setting(None, "1345678", "an OpenAI-compatible server, such as http://localhost:8000/v1")
    judge_key_env: str = _setting("OPENAI_API_KEY", "1345678", "the environment variable or secret with a server's key")
    judge_bits: Literal[4, 16] = _setting(16, "1345678", "of a chat model in this process")
    card_images: Count = _setting(8, "6", "test images whose answers the judge card is made of")
    card_judges: tuple[str, ...] = _setting(("cosine",), "6", "further judges, for the card and for agreement only")

    @model_validator(mode="after")
    def _possible(self):
        checks = (_check_images, _check_training, _check_counts, _check_primary, _check_deployed)
        for rule in (*checks, _check_names, _check_judges):
            rule(self)
        return self


PROFILES = {
    "smoke": {
        "n_train": 24, "n_test": 8, "image_size": 64, "base": "tiny", "vision_steps": 4, "sft_steps": 4,
        "recovery_steps": 2, "save_every": 2, "batch_size": 2, "max_new_tokens": 12, "n_calibration": 2,
        "calibration_tokens": 8, "blocks_removed": (0, 1, 2), "recover": (1, 2), "awq_rows": 4, "n_held_out": 2,
        "data_fractions": (0.5, 1.0), "equal_time": True, "search_images": 2, "selection_images": 2,
        "evaluations": 8, "finalists": 1,
    },
    "local": {
        "n_train": 240, "n_test": 24, "vision_steps": 240, "batch_size": 2, "learning_rate": 2e-3, "sft_steps": 90,
        "save_every": 30, "n_held_out": 8, "recovery_steps": 20, "recipes": ("lora", "last_blocks"), "awq_rows": 4,
        "awq_tokens": 96, "methods": ("awq", "bnb", "hqq", "rtn"), "evaluations": 36,
    },
    "t4": {
        "images": "/kaggle/input/dermnet", "n_train": 1737, "n_test": 39, "base": "llava-hf/llava-1.5-7b-hf",
        "base_bits": 4, "held_bits": 4, "embedding": "sentence-transformers/all-MiniLM-L6-v2", "learning_rate": 5e-4,
        "multi_turn": True, "batch_size": 8, "micro_batch": 4, "sft_steps": 434, "recovery_steps": 217,
        "save_every": 50, "max_new_tokens": 200, "batch_rows": 18, "n_calibration": 27, "calibration_tokens": 64,
        "blocks_removed": (0, 2, 4, 7, 8, 9, 10), "recover": (7, 9), "random_draws": 10, "awq_rows": 32,
        "recipes": ("lora", "distill"), "methods": ("awq", "bnb", "hqq", "rtn"), "judge_bits": 4,
        "context_tokens": 840, "search_images": 9,
    },
}  # fmt: skip
TWO_CARDS = {"held_bits": 16}  # what t4 changes where there are several GPUs
# What local changes for photographs: eyes that have seen some before, all of them, and rare conditions more often.
PHOTOGRAPHS = {
    "base": "smollm2-eyes", "n_train": None, "n_test": 96, "vision_steps": 360, "balance": 0.5,
    "learning_rate": 3e-3,
}  # fmt: skip


class Config:
    """Some settings, read-only: those that a notebook says it reads, or those that a job's file holds (`values_of`)."""

    def __init__(self, values: dict, reader: str = "this job"):
        self.__dict__.update({k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}, _reader=reader)

    def __getattr__(self, name: str):
        raise AttributeError(f"{self._reader} reads the setting {name!r}: say so at its place in settings.py.")

    def __setattr__(self, name: str, value):
        raise AttributeError(f"the settings of {self._reader} are read-only: use settings.changed.")


def resolve(profile: str = "auto", settings: dict | None = None, /, **others) -> Settings:
    """Return the settings of `profile` with what is `asked` put in.

    "auto" is MEDPRUNE_PROFILE if set, else `t4` where there is CUDA, else `local`. Where `t4` finds several GPUs,
    16-bit models are spread over them instead of held as NF4; photographs change `local` as PHOTOGRAPHS says. Raises
    ValueError naming the choices for an unknown profile or setting, and the reason for a value that cannot be.
    """
    if profile == "auto":
        profile = os.environ.get("MEDPRUNE_PROFILE") or profile
    gpus = 0
    if profile in ("auto", "t4"):
        from medprune.device import cards  # which imports torch

        gpus = cards()
    if profile == "auto":
        profile = "t4" if gpus else "local"
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is not known: choose one of {', '.join(PROFILES)} or auto.")
    given = asked(settings, others)
    defaults = PROFILES[profile] | (TWO_CARDS if profile == "t4" and gpus > 1 else {})
    if profile == "local" and given.get("images", "synthetic") != "synthetic":
        defaults |= PHOTOGRAPHS
    return build({"name": profile, **defaults}, given)


def asked(settings: dict | None, others: dict) -> dict:
    """Return what a user asks for, in a dict or by name; None by name, as in notebooks' cells, asks for nothing.

    Texts that hold a list or a number, as papermill's -p gives them, are read as such; paths are made absolute.
    """
    if not isinstance(settings, dict | None):
        raise ValueError(f'settings={settings!r} must be a dict such as {{"batch_rows": 8}}.')
    given = {**(settings or {}), **{k: v for k, v in others.items() if v is not None}}
    return {name: _given(name, value) for name, value in given.items()}


def build(whole: dict, given: dict) -> Settings:
    """Return `whole`, settings by name, with those given put in.

    Where blocks_removed is given and recover is not, the counts to recover that are among them stay, or else the
    largest is recovered. Where kept_methods is given and deployed is not, models of other methods are not deployed.
    """
    removed = given.get("blocks_removed")
    counts = [n for n in removed if isinstance(n, int) and n > 0] if isinstance(removed, list | tuple) else []
    recover = [n for n in whole.get("recover", (2, 4)) if n in counts] or [max(counts, default=None)]
    fitted = {"recover": recover} if counts else {}
    if isinstance(kept := given.get("kept_methods"), list | tuple):
        usual = whole.get("deployed", Settings.model_fields["deployed"].default)
        there = [name for name in usual if name.partition("-")[0] in (*kept, *NOT_QUANTIZED)]
        fitted["deployed"] = there or ["original"]
    try:
        return Settings(**{**whole, **fitted, **given})
    except ValidationError as error:
        raise ValueError(_sentence(error)) from None


def judge_names(judge: str) -> tuple[str, ...]:
    """Return the judges that the setting `judge` names, such as "reference+server"; a folder's name may hold a +."""
    return (judge,) if Path(judge).exists() else tuple(name.strip() for name in judge.split("+"))


def protected_numbers(n_blocks: int, blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Return protected block numbers of a model of n_blocks, counted from 0; negative ones count from the end."""
    for b in blocks:
        if not -n_blocks <= b < n_blocks:
            raise ValueError(f"protected_blocks has {b}, but the model's blocks are 0 to {n_blocks - 1}.")
    return tuple(sorted({b % n_blocks for b in blocks}))


def at_count(model: str, n: int) -> str:
    """Return the method that `primary` means, n blocks removed: "awq-recovered" is awq-recovered-2."""
    return model if model.endswith(("original", "found")) else f"{model}-{n}"


def is_loopback(url: str) -> bool:
    """Return whether an address is of this machine alone: what goes there is shown to no proxy."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def values_of(config) -> dict:
    """Return the settings that a config holds as JSON-able values by name."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items() if not k.startswith("_")}


def changed(config, **values) -> Config:
    """Return a copy of a config with other values."""
    return Config(values_of(config) | values, getattr(config, "_reader", "this job"))


def readers(name: str) -> tuple[str, ...]:
    """Return the notebooks that read a setting."""
    return tuple(stage for stage in STAGES if stage[1] in Settings.model_fields[name].json_schema_extra["read_by"])


def seen_by(stage: str, values: dict) -> dict:
    """Return those of the settings that a notebook reads."""
    return {name: value for name, value in values.items() if stage in readers(name)}


def describe() -> list[str]:
    """Return two lines for every setting: name, notebooks that read it and meaning; then each profile's default."""
    plain = Settings.model_construct().model_dump()
    lines = []
    for name, field in Settings.model_fields.items():
        defaults = {profile: json.dumps(values.get(name, plain[name])) for profile, values in PROFILES.items()}
        same = len(set(defaults.values())) == 1
        shown = defaults["local"] if same else ", ".join(f"{profile} {value}" for profile, value in defaults.items())
        lines += [f"{name} ({' '.join(stage[:2] for stage in readers(name))}): {field.description}", f"    {shown}"]
    return lines[2:]  # without the profile's own name


def _given(name: str, value):
    """Return an override as its setting wants it: no text where a list or a number is meant, and paths absolute."""
    if name not in Settings.model_fields or name == "name":
        near = get_close_matches(name, [known for known in Settings.model_fields if known != "name"], n=1)
        hint = f" (did you mean {near[0]}?)" if near else "; `medprune settings` lists them all"
        raise ValueError(f"setting {name!r} is not known{hint}.")
    kind = Settings.model_fields[name].annotation
    if isinstance(value, str) and str not in (kind, *get_args(kind)):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return value  # a choice's name, or what pydantic refuses
    if kind is not bool and any(isinstance(v, bool) for v in (value if isinstance(value, list | tuple) else [value])):
        raise ValueError(f"{name}={value!r} must be no truth value.")
    if name in PATHS and isinstance(value, str):
        value = _absolute(value, PATHS[name])
    if isinstance(value, str) and not (value.isprintable() and 0 < _longest(value) < 256):
        raise ValueError(f"{name}={value!r} must be a text of printable characters, 1 to 255 bytes between two /.")
    return value


def _longest(text: str) -> int:
    """Return the bytes of the longest name of a path, of which a file system takes 255."""
    return max((len(part.encode()) for part in Path(text).parts), default=0)


def _absolute(text: str, words: tuple[str, ...]) -> str:
    """Return the absolute path of what there is in the caller's folder, also where a notebook runs in another one.

    A word stays one, whatever folder has its name: ./server is the folder.
    """
    for folder in (Path.cwd(), Path(os.environ.get("PWD") or ".")):
        if text not in ("", *words) and os.path.exists(there := folder.absolute() / text):
            plain = os.path.abspath(there)  # a way up behind a link may lead elsewhere than its name says
            return plain if os.path.exists(plain) and os.path.samefile(plain, there) else str(there)
    return text


def _sentence(error: ValidationError) -> str:
    """Return pydantic's first complaint in one sentence that names the setting and its value."""
    first = error.errors()[0]
    if first["type"] == "value_error":  # one of the rules below, which name what they are about
        return str(first["ctx"]["error"])
    name = first["loc"][0]
    said = first["msg"].replace("Input should be", "must be").replace("Tuple should have", "must name").rstrip(".")
    said = said.removesuffix(" after validation, not 0")
    where = f"{name}={first['input']!r}" if len(first["loc"]) == 1 else f"{name} has {first['input']!r}, which"
    return f"{where} {said[0].lower()}{said[1:]}."


def _check_images(c: Settings) -> None:
    if c.images != "synthetic":
        return
    if c.conditions is not None:
        raise ValueError(f"conditions={c.conditions!r} needs images of them: synthetic ones show the paper's eight.")
    for name in ("n_train", "n_test"):
        n = getattr(c, name)
        if n is None or n % N_CONDITIONS:
            raise ValueError(f"{name}={n} must be a multiple of {N_CONDITIONS} for synthetic images.")


def _check_training(c: Settings) -> None:
    if c.batch_size % c.processes:
        raise ValueError(f"processes={c.processes} must divide batch_size={c.batch_size}.")
    each = c.batch_size // c.processes
    if each % min(c.micro_batch or each, each):
        whole = f"batch_size={c.batch_size}" + (f" in {c.processes} processes" if c.processes > 1 else "")
        raise ValueError(f"micro_batch={c.micro_batch} must divide {whole}.")
    if c.patience and not c.n_held_out:
        raise ValueError(f"patience={c.patience} needs n_held_out, the images that the loss is measured on.")
    for name, others in {"n_held_out": 1, "n_calibration": 0, "awq_rows": SEARCHED}.items():
        most = (c.n_train or math.inf) - others
        if getattr(c, name) > most:
            raise ValueError(f"{name}={getattr(c, name)} must be at most {most}, for n_train={c.n_train}.")
    whole = {"projector", "last_blocks"}.intersection([c.recipe, *c.recipes])
    if whole and c.base_bits == 4:
        raise ValueError(f"recipe {min(whole)} trains whole weights: with base_bits=4 leave it out, or set 16.")


def _check_counts(c: Settings) -> None:
    once = ("recipes", "data_fractions", "methods", "lora_targets", "recover", "deployed", "engines", "mixtures")
    for name in once:
        if len(set(getattr(c, name))) < len(getattr(c, name)):
            raise ValueError(f"{name}={list(getattr(c, name))} must name each once.")
    counts = c.blocks_removed
    if counts[:1] != (0,) or len(counts) < 3 or list(counts) != sorted(set(counts)):
        raise ValueError(f"blocks_removed={list(counts)} must be 0 and at least two more counts, rising, for a curve.")
    if not set(c.recover) <= set(counts):
        raise ValueError(f"recover={list(c.recover)} must hold counts above 0 among blocks_removed={list(counts)}.")
    if "awq" not in c.methods or len(c.methods) < 2:
        raise ValueError(f"methods={list(c.methods)} must hold awq, which tables 4 and 5 are about, and one beside it.")


def _check_primary(c: Settings) -> None:
    known = {"original", "pruned", "recovered", "magnitude", "awq-magnitude"}
    known |= {f"{method}-{model}" for method in c.methods for model in ("original", "pruned", "recovered")}
    if not set(c.primary) <= known or len(set(c.primary)) < 2:
        raise ValueError(f"primary={list(c.primary)} must name two of {', '.join(sorted(known))}.")


def _check_deployed(c: Settings) -> None:
    known = {f"{method}-{model}" for method in c.kept_methods for model in ("original", "recovered")}
    known |= set(NOT_QUANTIZED)
    if unknown := set(c.deployed) - known:
        raise ValueError(f"deployed has {min(unknown)!r}, of which no folder is kept: name {', '.join(sorted(known))}.")
    for engine in c.engines:
        if engine not in ENGINES and not re.fullmatch(r"https?://[^\s/]+(/v1)?/?", engine):
            choices = ", ".join(ENGINES)
            raise ValueError(f"engines has {engine!r}: give {choices} or an address such as http://localhost:8000.")


def _check_names(c: Settings) -> None:
    """Refuse a misspelt judge or embedding here, and not once a model has been tuned."""
    judges = [("judge", name) for name in judge_names(c.judge)] + [("card_judges", name) for name in c.card_judges]
    for setting, name, known in [("embedding", c.embedding, ("minilm",)), *((*judge, JUDGES) for judge in judges)]:
        if name and not (name in known or re.fullmatch(_HUB_ID, name) or Path(name).exists()):
            choices = ", ".join(known)
            raise ValueError(f"{setting} has {name!r}, which is not known: give {choices}, OWNER/NAME or a folder.")


def _check_judges(c: Settings) -> None:
    if not re.fullmatch(r"[A-Za-z_]\w*", c.judge_key_env):
        raise ValueError("judge_key_env must name an environment variable, as OPENAI_API_KEY, and not be a key itself.")
    judges = judge_names(c.judge)
    if "" in judges or len(set(judges)) < len(judges):
        raise ValueError(f"judge={c.judge!r} must name one judge, or several different ones with + between.")
    if twice := set(c.card_judges) & set(judges):
        raise ValueError(f"card_judges has {min(twice)!r}, which judge={c.judge!r} names already: leave it out.")
    if "server" in (*judges, *c.card_judges) and not (c.judge_url and c.judge_model):
        raise ValueError('judge="server", or "server" among card_judges, needs judge_url and judge_model.')
    if c.judge_url is None:
        return
    address = urlsplit(c.judge_url)
    if "@" in c.judge_url or address.query or address.fragment:
        raise ValueError(f"judge_url must carry no name, password or query: a key belongs in {c.judge_key_env}.")
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(f"judge_url={c.judge_url!r} must be an address such as http://localhost:8000/v1.")
