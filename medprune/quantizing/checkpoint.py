"""Save and load quantized models: a folder in a standard format where there is one, with a model card."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from medprune.data.questions import load_conditions, load_questions
from medprune.data.records import load_images, sample_balanced
from medprune.models import loading
from medprune.models.assembled import base_card
from medprune.models.families import parts, renaming, unquantized
from medprune.models.loading import check_loading, ready, stored_tensors, weight_files
from medprune.models.sizes import EYES, OPTIONS, account, base_config, dtype_of, skeleton
from medprune.progress import quiet
from medprune.pruning.plan import apply_plan, load_plan
from medprune.quantizing import quantize
from medprune.quantizing.packed import PackedLinear, PackedTable, from_awq, to_awq
from medprune.quantizing.quantize import is_quantized, target_linears
from medprune.store import check_new, content, read_json, write_folder, write_text

_FORMAT = "medprune"  # bits other than 4, mixed ones, a quantized head, tower or table, HQQ: no standard layout
_PLAIN = "from transformers import AutoModelForImageTextToText as Auto\nmodel = Auto.from_pretrained(folder)"
_EYES = "import medprune.models.eyes  # teaches transformers this vision tower\n"
_NEEDED = {
    "awq": "gptqmodel installed (vLLM: `--quantization awq --dtype float16`)",
    "bitsandbytes": "bitsandbytes installed",
}
_UNSAID = {"base": "not stated", "plan": "none stated", "scores": "not evaluated", "licence": "that of the base model"}


def save_quantized(model, folder, method: str, info: dict, processor=None, record: dict | None = None, **said) -> Path:
    """Write a model that `quantize` returned, its configuration and a model card, the folder as a whole or not at all.

    4-bit rtn and awq are written in AWQ's GEMM layout, bnb as transformers writes it; both load in plain transformers
    (AWQ's with gptqmodel). Other or mixed bits, a quantized head, tower or table and hqq only `load_quantized` loads.
    `info` is what `quantize` returned beside the model; `record` is what the folder is made from, for `store.made`;
    `said` are sentences for the card: base, plan, scores and licence.
    Raises ValueError where the model is not quantized or was quantized by another method.
    """
    if not is_quantized(model):
        raise ValueError("the model is not quantized; call quantize before save_quantized.")
    if method != info["method"]:
        raise ValueError(f"method is {method!r}, but the model was quantized by {info['method']!r}.")
    config = _quantization_config(model, info)
    with write_folder(folder, **record or {}) as temporary:
        state = _stored_state(model, config)
        model.config.quantization_config = config
        try:
            model.save_pretrained(temporary, state_dict=state, max_shard_size="100GB")  # one file
        finally:
            del model.config.quantization_config
        if processor is not None:
            loading.save_processor(processor, temporary)
        size = sum(file.stat().st_size for file in temporary.iterdir())
        tower = parts(model).vision_tower.modules() if info["quantize_vision"] else ()
        said["odd"] = sum(type(m) is nn.Linear for m in tower)  # of widths that groups do not divide
        said |= {"first": _EYES if model.config.vision_config.model_type == EYES else ""}
        write_text(temporary / "README.md", _card(info, config, size, **said))
    return Path(folder)


def add_scores(folder: str | Path, scores: str) -> None:
    """Put the scores, once there are some, into a folder's model card, in place of those that it had."""
    file = Path(folder) / "README.md"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines = [f"- Scores: {scores}" if line.startswith("- Scores: ") else line for line in lines]
    write_text(file, "\n".join(lines) + "\n")


def load_quantized(folder: str | Path, device: str = "cpu"):
    """Load a folder that `save_quantized` wrote, in eval mode, each tensor in the dtype that it was saved in.

    Raises ValueError naming the tensors where the folder lacks some, has too many or has them in another shape.
    """
    folder = Path(folder)
    settings = read_json(folder / "config.json")
    if not (config := settings.pop("quantization_config", None)):
        raise ValueError(f"{folder} holds no quantization_config; load it with medprune.models.loading.load.")
    check_quantization(folder, config)
    settings["dtype"] = dtype_of(settings)
    dtype, shape = getattr(torch, settings["dtype"]), AutoConfig.for_model(**settings)
    if config["quant_method"] == "bitsandbytes":
        _check_nf4_keys(shape, folder)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, device_map={"": device})
    else:
        model = _load_packed(folder, shape, config, dtype, device)
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return ready(model, device)


def check_quantization(folder: Path, config: dict) -> None:
    """Raise ValueError where the quantization_config of a folder's config.json lacks a part, or is not read here."""
    how = config.get("quant_method")
    if how not in ("awq", "bitsandbytes", _FORMAT):
        raise ValueError(f"{folder} is quantized by {how!r}, which medprune does not read.")
    if how == "bitsandbytes":
        return
    if how == "awq" and str(config.get("version", "gemm")).lower() != "gemm":
        raise ValueError(f"{folder} is in AWQ's layout {config['version']!r}, of which 'gemm' alone is read.")
    if lacks := [name for name in ("bits", "group_size") if config.get(name) is None]:
        raise ValueError(f"{folder} has no {lacks[0]} in its config.json's quantization_config: write it there.")
    also = {option: config.get(option, False) for option in OPTIONS.values()}
    try:
        quantize.check_storage(config.get("method", "awq"), config["bits"], config["group_size"], **also)
    except ValueError as error:
        raise ValueError(f"{folder} has a quantization_config that cannot be: {error}") from None


def _load_packed(folder: Path, shape, config: dict, dtype: torch.dtype, device: str):
    model, hqq_layers = skeleton(shape), {}
    name_of = renaming(model)
    tensors = {name_of(k): v for file in weight_files(folder) for k, v in load_file(file).items()}
    tower, head, embeddings = (config.get(option, False) for option in OPTIONS.values())
    if embeddings:
        width, size = quantize.fewest(config["bits"], embeddings), parts(model).table.weight.shape
        table = PackedTable(*size, width, config["group_size"], dtype, "meta")
        quantize.put_table(model, table)
    for name, bits in target_linears(model, config["bits"], head, tower, config["group_size"]).items():
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
    return model.to(device)


def _fill(model, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put the tensors into the model, and raise ValueError naming what is absent, too much, or of another shape."""
    try:
        report = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:  # torch lists shapes that differ, a line for each
        first = [*str(error).splitlines()[1:], str(error)][0].strip()
        raise ValueError(f"checkpoint {folder} does not fit its config.json: {first}") from error
    tied = model.all_tied_weights_keys
    twice = quantize.second_names(model)
    missing = [key for key in report.missing_keys if key not in tied and key not in twice]
    check_loading({"missing_keys": missing, "unexpected_keys": report.unexpected_keys}, folder)
    model.tie_weights(recompute_mapping=False)


def _check_nf4_keys(config, folder: Path) -> None:
    """Compare names before transformers fills gaps with random weights, which it cannot do in 4 bits anyway."""
    model = skeleton(config)
    expected = model.state_dict().keys() - model.all_tied_weights_keys.keys()
    also = ("absmax", "quant_map", "quant_state.bitsandbytes__nf4")
    expected |= {f"{name}.weight.{part}" for name in target_linears(model, 4) for part in also}
    found = stored_tensors(folder, model).keys()
    check_loading({"missing_keys": expected - found, "unexpected_keys": found - expected}, folder)


def _hqq_layer(name: str, tensors: dict[str, Tensor], dtype: torch.dtype, device: str, folder: Path) -> nn.Module:
    from hqq.core.quantize import HQQLinear

    own = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
    check_loading({"missing_keys": {f"{name}.{k}" for k in ("W_q", "scale", "zero", "shape")} - own.keys()}, folder)
    layer = HQQLinear(None, None, compute_dtype=dtype, device=device, initialize=False)
    layer.load_state_dict({key.removeprefix(f"{name}."): tensor for key, tensor in own.items()})
    return layer


def _quantization_config(model, info: dict) -> dict:
    """Return what config.json says of the quantization: transformers' own words where they can say it."""
    method, bits, group_size = info["method"], info["bits"], info["group_size"]
    if method == "bnb":
        return loading.nf4_config(model.dtype, unquantized(model)).to_dict()
    options = {option: info[option] for option in OPTIONS.values()}
    four = bits == 4 or isinstance(bits, list | tuple) and set(bits) == {4}
    if method == "hqq" or not four or any(options.values()):
        return {"quant_method": _FORMAT, "method": method, "bits": bits, "group_size": group_size, **options}
    layout = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group_size, "zero_point": True}
    return layout | {"modules_to_not_convert": unquantized(model)}


def _stored_state(model, config: dict) -> dict[str, Tensor] | None:
    """Return the tensors to be saved, so that transformers does not ask the layers; None where it should (NF4)."""
    if config["quant_method"] == "bitsandbytes":
        _restore_nf4(model)
        return None
    state, twice = model.state_dict(), quantize.second_names(model)
    state = {name: tensor for name, tensor in state.items() if name not in twice}
    if config["quant_method"] != "awq":
        return state
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            for key in ("qweight", "scale", "zero_point"):
                del state[f"{name}.{key}"]
            state |= {f"{name}.{key}": tensor for key, tensor in to_awq(layer).items()}
    return state


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


def _card(info: dict, config: dict, folder_bytes: int, **said) -> str:
    """Return the model card: what the folder is, how it was made and how to load it."""
    said = _UNSAID | said
    name = {"rtn": "round to nearest", "awq": "AWQ", "bnb": "bitsandbytes NF4", "hqq": "HQQ"}[info["method"]]
    sizes = "\n".join(f"| {part} | {size} |" for part, size in info["packed_bytes"].items())
    kept = ["projector and norms", *(part for part, option in OPTIONS.items() if not info[option])]
    if odd := said["odd"]:
        kept.append(f"{odd} linears of the vision tower, whose widths groups of {info['group_size']} do not divide")
    how = "No standard layout holds this method or these bits; plain transformers refuses the folder."
    if needed := _NEEDED.get(config["quant_method"]):
        how = f"Plain transformers, with {needed}:\n\n```python\n{said['first']}{_PLAIN}\n```"
    return f"""# A quantized model of images and text

Not for clinical use: a research artefact, evaluated on teaching images only.

- Base: {said["base"]}
- Prune plan: {said["plan"]}
- Method: {name}, bits {info["bits"]}, group size {info["group_size"]}; kept as they were: {", ".join(kept)}
- Calibration: {info.get("calibration", "none")}
- Scores: {said["scores"]}
- Licence: {said["licence"]}
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
    source, out, method, bits=4, group_size=64, plan=None, images=None, facts=None, rows=32, other_model=False, **also
) -> tuple[dict, int]:
    """Prune and quantize a 16-bit LLaVA and write it to `out`; return (`quantize`'s info, bytes of the folder).

    source: folder or hub name. method, bits, group_size and also (quantize_head, quantize_vision): as `quantize` takes
    them. plan: of notebook 03, for `source` itself unless `other_model`. images, facts, rows: what awq is calibrated
    on. Raises ValueError for what cannot be done, most of it before the model is loaded.
    """
    quiet()
    out, storage = check_new(out), {"bits": bits, "group_size": group_size, **also}
    quantize.check_storage(method, **storage)
    if shape := base_config(source):
        account(shape, 0, method=method, **storage)
    identity = content(source) if Path(source).is_dir() else source
    chosen = load_plan(plan, None if other_model else identity) if plan else None
    conditions = load_conditions(facts)
    records = _calibration_records(images, conditions, rows) if method == "awq" else None
    llava, processor, fetch = loading.load_blockwise(source)
    card, calibration = base_card(source), None
    said = {"base": card["name"], "licence": card["licence"]}
    if chosen:
        apply_plan(llava, chosen)
        said["plan"] = f"blocks {', '.join(map(str, chosen.removed))} removed by {chosen.criterion}"
    if records:
        calibration = quantize.quantization_batch(processor, records, conditions, load_questions(), llava.dtype, seed=0)
    llava, info = quantize.quantize(llava, method, calibration=calibration, fetch=fetch, **storage)
    save_quantized(llava, out, method, info, processor, **said)
    return info, sum(file.stat().st_size for file in out.iterdir())


def _calibration_records(images: str | None, conditions: dict, rows: int) -> list:
    least = quantize.MIN_CALIBRATION_ROWS
    if images is None:
        raise ValueError("awq needs images to be calibrated on: give a folder or table of them, or take hqq or rtn.")
    if rows < least:
        raise ValueError(f"rows is {rows}, but awq needs at least {least} calibration rows.")
    records = load_images(images, conditions)[0]
    if len(records) < least:
        raise ValueError(f"{images} holds {len(records)} images, but awq needs at least {least} to be calibrated on.")
    return sample_balanced(records, min(rows, len(records)), seed=0)
