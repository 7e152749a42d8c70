"""Save and load quantized LLaVAs: a folder in a standard format where there is one, with a model card."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from medprune.data.questions import load_conditions, load_questions
from medprune.data.records import load_images, sample_balanced
from medprune.models import loading
from medprune.models.families import SKIP_QUANTIZATION
from medprune.models.loading import check_loading, ready
from medprune.models.sizes import account, base_config
from medprune.pruning.plan import apply_plan, load_plan
from medprune.quantizing import quantize
from medprune.quantizing.packed import PackedLinear, from_awq, to_awq
from medprune.quantizing.quantize import is_quantized, quantization_batch, target_linears
from medprune.store import read_json, write_folder, write_text

# save_pretrained writes the names on the left, so that older transformers and vLLM read the folder too.
_NAMES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


_FORMAT = "medprune"  # bits other than 4, mixed bits, a quantized head or tower, HQQ: no standard layout holds them


_OPTIONS = ("quantize_head", "quantize_vision")


def save_quantized(
    model,
    folder: str | Path,
    method: str,
    info: dict,
    base: str | None = None,
    plan: str | None = None,
    scores: str | None = None,
    processor=None,
    licence: str = "that of the base model",
) -> Path:
    """Write a model that `quantize` returned, its configuration and a model card, the folder as a whole or not at all.

    4-bit rtn and awq are written in AWQ's GEMM layout, bnb as transformers writes it; both load in plain transformers
    (AWQ's with gptqmodel). Other bits, mixed bits, a quantized head or tower and hqq are loaded by `load_quantized` only.
    `info` is what `quantize` returned beside the model; base, plan, scores and licence are sentences for the card.
    Raises ValueError where the model is not quantized or was quantized by another method.
    """
    if not is_quantized(model):
        raise ValueError("the model is not quantized; call quantize before save_quantized.")
    if method != info["method"]:
        raise ValueError(f"method is {method!r}, but the model was quantized by {info['method']!r}.")
    config, state = _quantization_config(model, info), None
    if method == "bnb":
        _restore_nf4(model)
    else:
        state = model.state_dict()
        if config["quant_method"] == "awq":
            state = _awq_state(model, state)
    folder = Path(folder)
    with write_folder(folder) as temporary:
        model.config.quantization_config = config
        try:
            # One file; a state given here keeps transformers from asking the layers for theirs.
            model.save_pretrained(temporary, state_dict=state, max_shard_size="100GB")
        finally:
            del model.config.quantization_config
        if processor is not None:
            processor.save_pretrained(temporary)
        card = _card(info, config, base, plan, scores, licence, sum(f.stat().st_size for f in temporary.iterdir()))
        write_text(temporary / "README.md", card)
    return folder


def add_scores(folder: str | Path, scores: str) -> None:
    """Put the scores, once there are some, into a folder's model card, in place of those that it had."""
    file = Path(folder) / "README.md"
    lines = file.read_text(encoding="utf-8").splitlines()
    write_text(
        file, "\n".join(f"- Scores: {scores}" if line.startswith("- Scores: ") else line for line in lines) + "\n"
    )


def load_quantized(folder: str | Path, device: str = "cpu"):
    """Load a folder that `save_quantized` wrote, in eval mode, each tensor in the dtype that it was saved in.

    Raises ValueError naming the tensors where the folder lacks some, has too many or has them in another shape.
    """
    folder = Path(folder)
    settings = read_json(folder / "config.json")
    config = settings.pop("quantization_config", None)
    if config is None:
        raise ValueError(f"{folder} holds no quantization_config; load it with medprune.model.load.")
    dtype = getattr(torch, settings["dtype"])
    if config["quant_method"] == "bitsandbytes":
        _check_nf4_keys(LlavaConfig.from_dict(settings), folder)
        model, report = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, output_loading_info=True
        )
        check_loading(report, folder)
        return ready(model, device)
    if config["quant_method"] not in ("awq", _FORMAT):
        raise ValueError(f"{folder} is quantized by {config['quant_method']!r}, which medprune does not read.")
    tensors = {_name(k): v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
    model = _skeleton(LlavaConfig.from_dict(settings))
    targets = target_linears(model, config["bits"], *(config.get(option, False) for option in _OPTIONS))
    hqq_layers = {}
    for name, bits in targets.items():
        linear = model.get_submodule(name)
        if config.get("method") == "hqq":  # it answers load_state_dict in its own way, so it joins the model last
            hqq_layers[name] = _hqq_layer(name, tensors, dtype, device, folder)
            model.set_submodule(name, nn.Identity())
            continue
        packed = PackedLinear(linear.in_features, linear.out_features, bits, config["group_size"], linear.bias, "meta")
        model.set_submodule(name, packed)
        if config["quant_method"] == "awq":
            stored = [tensors.pop(f"{name}.{key}", None) for key in ("qweight", "qzeros", "scales")]
            if all(t is not None for t in stored):  # whichever is absent is named by _fill
                tensors |= {f"{name}.{key}": t for key, t in from_awq(*stored).items()}
    _fill(model, tensors, folder)
    for name, layer in hqq_layers.items():
        model.set_submodule(name, layer)
    return ready(model.to(device), device)


def _restore_nf4(model) -> None:
    """Undo the layout that bitsandbytes gives NF4 weights on their first CPU forward.

    Its own inverse (0.50.2), called on saving, leaves the absmax transposed: a saved folder would hold wrong weights.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as inverse
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit) and getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            layer.weight.data, state = inverse(layer.weight.data, layer.weight.quant_state)
            state.absmax = state.absmax.T.reshape(-1).float()  # (groups, out) back to rows of the weight


def _skeleton(config: LlavaConfig):
    """Build the model with its parameters on the meta device, so that dense weights are never in memory."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return LlavaForConditionalGeneration(config)


def _fill(model, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put the tensors into the model, and raise ValueError naming what is absent, too much, or of another shape."""
    try:
        report = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:  # torch lists shapes that differ, a line for each
        first = [*str(error).splitlines()[1:], str(error)][0].strip()
        raise ValueError(f"checkpoint {folder} does not fit its config.json: {first}") from error
    tied = model.all_tied_weights_keys
    missing = [key for key in report.missing_keys if key not in tied]
    check_loading({"missing_keys": missing, "unexpected_keys": report.unexpected_keys}, folder)
    model.tie_weights()


def _check_nf4_keys(config: LlavaConfig, folder: Path) -> None:
    """Compare names before transformers fills gaps with random weights, which it cannot do in 4 bits anyway."""
    model = _skeleton(config)
    expected = model.state_dict().keys() - model.all_tied_weights_keys.keys()
    parts = ("absmax", "quant_map", "quant_state.bitsandbytes__nf4")
    expected |= {f"{name}.weight.{part}" for name in target_linears(model, 4) for part in parts}
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {_name(key) for key in tensors.keys()}  # noqa: SIM118, it is no dict
    check_loading({"missing_keys": expected - found, "unexpected_keys": found - expected}, folder)


def _hqq_layer(name: str, tensors: dict[str, Tensor], dtype: torch.dtype, device: str, folder: Path) -> nn.Module:
    from hqq.core.quantize import HQQLinear

    own = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
    check_loading({"missing_keys": {f"{name}.{k}" for k in ("W_q", "scale", "zero", "shape")} - own.keys()}, folder)
    layer = HQQLinear(None, None, compute_dtype=dtype, device=device, initialize=False)
    layer.load_state_dict({key.removeprefix(f"{name}."): tensor for key, tensor in own.items()})
    return layer


def _quantization_config(model, info: dict) -> dict:
    method, bits, group_size = info["method"], info["bits"], info["group_size"]
    if method == "bnb":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=model.dtype,
            llm_int8_skip_modules=SKIP_QUANTIZATION,
        ).to_dict()
    options = {option: info[option] for option in _OPTIONS}
    if method in ("rtn", "awq") and not any(options.values()) and set([bits] if isinstance(bits, int) else bits) == {4}:
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "modules_to_not_convert": SKIP_QUANTIZATION,
        }
    return {"quant_method": _FORMAT, "method": method, "bits": bits, "group_size": group_size, **options}


def _awq_state(model, state: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            for key in ("qweight", "scale", "zero_point"):
                del state[f"{name}.{key}"]
            state |= {f"{name}.{key}": tensor for key, tensor in to_awq(layer).items()}
    return state


def _name(key: str) -> str:
    return next((new + key.removeprefix(old) for old, new in _NAMES if key.startswith(old)), key)


def _card(info, config, base, plan, scores, licence, folder_bytes: int) -> str:
    """Return the model card: what the folder is, how it was made and how to load it."""
    name = {"rtn": "round to nearest", "awq": "AWQ", "bnb": "bitsandbytes NF4", "hqq": "HQQ"}[info["method"]]
    sizes = "\n".join(f"| {part} | {size} |" for part, size in info["packed_bytes"].items())
    plain = "from transformers import LlavaForConditionalGeneration as Llava\nmodel = Llava.from_pretrained"
    how = {
        "awq": f"Plain transformers, with gptqmodel installed (vLLM: `--quantization awq --dtype float16`):\n\n"
        f"```python\n{plain}(folder)\n```",
        "bitsandbytes": f"Plain transformers, with bitsandbytes installed:\n\n```python\n{plain}(folder)\n```",
        _FORMAT: "No standard layout holds this method or these bits; plain transformers refuses the folder.",
    }[config["quant_method"]]
    kept = "projector, embeddings and norms" + "".join(
        f", {part}" for option, part in zip(_OPTIONS, ("head", "vision tower"), strict=True) if not info[option]
    )
    return f"""# A quantized LLaVA

Not for clinical use: a research artefact, evaluated on teaching images only.

- Base: {base or "not stated"}
- Prune plan: {plan or "none stated"}
- Method: {name}, bits {info["bits"]}, group size {info["group_size"]}; kept as they were: {kept}
- Calibration: {info.get("calibration", "none")}
- Scores: {scores or "not evaluated"}
- Licence: {licence}
- Bytes of this folder's files without this card: {folder_bytes}

| part, in memory right after quantizing | bytes |
|---|---|
{sizes}

## How to load
```python
from medprune.quantizing.checkpoint import load_quantized
model = load_quantized(folder)
```
{how}
"""


def quantize_folder(
    source: str,
    out: Path,
    method: str,
    bits: int = 4,
    group_size: int = 64,
    plan: Path | None = None,
    images: str | None = None,
    facts: Path | None = None,
    rows: int = 32,
    quantize_head: bool = False,
    quantize_vision: bool = False,
) -> tuple[dict, int]:
    """Prune and quantize a 16-bit LLaVA and write it to `out`; return (`quantize`'s info, bytes of the folder).

    source: folder or hub name. plan: of notebook 03. images, facts, rows: what awq is calibrated on. Raises ValueError
    for what cannot be done, most of it before the model is loaded.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: name a new folder.")
    if method == "awq" and images is None:
        raise ValueError("awq needs images to be calibrated on: give a folder or table of them, or take hqq or rtn.")
    chosen = load_plan(plan) if plan else None
    if shape := base_config(source):
        account(shape, 0, bits, group_size, method=method, quantize_head=quantize_head, quantize_vision=quantize_vision)
    conditions, records = load_conditions(facts), []
    if images is not None:
        records = load_images(images, conditions)[0]
        records = sample_balanced(records, min(rows, len(records)), seed=0)
    device = loading.choose_device()
    dtype = loading.choose_dtype(device)
    llava, processor = loading.load(source, device, dtype)
    if chosen:
        apply_plan(llava, chosen)
    calibration = None
    if method == "awq":
        calibration = quantization_batch(processor, records, conditions, load_questions(), dtype, seed=0)
    llava, info = quantize.quantize(llava, method, bits, group_size, calibration, quantize_head, quantize_vision)
    without = f"blocks {', '.join(map(str, chosen.removed))} removed by {chosen.criterion}" if chosen else None
    save_quantized(llava, out, method, info, base=source, plan=without, processor=processor)
    return info, sum(f.stat().st_size for f in out.iterdir())
