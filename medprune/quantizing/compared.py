"""The models that notebook 05 compares: each quantized once, saved, loaded again and asked."""

import shutil

from medprune.answers import decoding, timing
from medprune.device import choose_device, release
from medprune.models.loading import load_blockwise, load_processor, n_parameters
from medprune.models.sizes import account
from medprune.pruning.plan import apply_plan
from medprune.quantizing import checkpoint, quantize
from medprune.settings import NF4_GROUP
from medprune.store import content, context, made


def work_list(methods, recover) -> list[tuple[str, str]]:
    """Return (method, model) of all that is quantized, n being the first count of `recover`.

    Every method on the original, on n blocks less, and on the recovered models, of which others than the first by the
    paper's two alone (its table 3); AWQ on the model pruned by magnitude, and by text alone; rounding to 3 bits and to
    more bits for blocks that matter more.
    """
    n = recover[0]
    work = [(method, "original") for method in methods]
    work += [(m, f"recovered-{k}") for k in recover for m in methods if k == n or m in ("awq", "bnb")]
    work += [(method, f"pruned-{n}") for method in methods]
    work += [("awq", f"magnitude-{n}"), ("awq_text", f"recovered-{n}")]
    return work + [("rtn_3bit", "original"), ("rtn_mixed", "original")]


def quantize_once(run, method, name, source, plan, bits, calibration, asked, config, card) -> tuple[list[dict], dict]:
    """Quantize a model, save it, load it again and ask it; return (answers' rows, its costs), made once.

    method: as in `work_list`, the part before "_" being the quantizer. source: the 16-bit model's folder. plan: of
    blocks to remove first, or None. bits: one number or one for each block. calibration: awq's batch. card: base, plan
    and licence for the model card. The folder is kept if config.kept_methods names the method and the model is no mere
    comparison.
    """
    quantizer, label = method.split("_")[0], f"{method}-{name}"
    group_size = NF4_GROUP if quantizer == "bnb" else config.group_size
    hashes = quantize.batch_hashes(calibration or {})
    how = (quantizer, bits, group_size)
    mark = context("medprune.quantizing.checkpoint", content(source), plan and list(plan.kept), *how, hashes)
    units = run.units(decoding.answers_context(mark, asked, config.max_new_tokens))
    folder = run.dir / "quantized" / label
    kept = method in config.kept_methods and name.split("-")[0] in ("original", "recovered")
    wanted = [f"{label} speed", "costs", *(f"{label} {q['id']}" for q in asked)]
    model = processor = None
    release()
    if any(key not in units for key in wanted) or (kept and not made(folder, mark)):
        if not made(folder, mark):
            write_quantized(folder, mark, source, plan, how, calibration, card)
        units.add("costs", made(folder, mark)["costs"])
        model, processor = checkpoint.load_quantized(folder, choose_device()), load_processor(folder)
    rows, speed = timing.evaluate(model, processor, label, asked, units, config)
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
    return rows, units["costs"] | speed


def write_quantized(folder, mark, source, plan, how, calibration, card) -> None:
    """Prune and quantize a model a block at a time, and save it with its costs; how: method, bits, group size.

    The other arguments are as `quantize_once` takes them.
    """
    model, processor, fetch = load_blockwise(source)
    if plan:
        apply_plan(model, plan)
    costs = {"parameters": n_parameters(model)}
    model, info = quantize.quantize(model, *how, calibration, fetch=fetch)
    method, bits, group_size = how
    costs["plan_bytes"] = account(model.config, 0, bits, group_size, method=method).weights_bytes
    costs |= {"seconds": info["seconds"], "quantize_peak_bytes": info["peak_bytes"]}
    costs |= {"stored_bytes": info["packed_bytes"]["total"], "loss_curve": info.get("loss_curve")}
    checkpoint.save_quantized(model, folder, method, info, processor, {"context": mark, "costs": costs}, **card)
