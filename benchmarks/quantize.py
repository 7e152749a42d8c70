"""What each 4-bit method costs and keeps: seconds and peak memory to quantize, bytes, ms a token, KL to 16 bits.

python benchmarks/quantize.py [--run runs/demo] [--gptqmodel-python .venv-gptqmodel/bin/python] [--out FILE]

It takes the tuned model and the images of a run (stage 01_finetune), and runs each row in a process of its own: dense
in float32 and 16 bits, AWQ, NF4, HQQ and RTN at groups of 64, RTN without torch's int4 kernel and in 8 bits. Given the Python of
gptqmodel's environment, it adds gptqmodel's AWQ of the same text model (its tensors put back into the LLaVA, so that
one ruler measures all) and loads our AWQ folder there with plain transformers. The divergence is from the 16-bit
model, over what follows the image in test conversations; float32's tells how much of it is rounding.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file

from medprune.answers import decoding, timing
from medprune.data.questions import load_conditions, load_questions
from medprune.data.records import load_splits, sample_balanced
from medprune.models import loading
from medprune.models.families import parts
from medprune.models.sizes import account
from medprune.progress import quiet
from medprune.quantizing import packed
from medprune.quantizing.checkpoint import save_quantized
from medprune.quantizing.quantize import packed_bytes, quantization_batch, quantize
from medprune.settings import METHODS, REPO
from medprune.store import Run, describe_machine, read_json, write_json

GROUP_SIZE = 64
CALIBRATION_ROWS = 8
CASES = ("float32", "bfloat16", "awq", "awq, text only", "bnb", "hqq", "rtn", "rtn, without the kernel", "rtn, 8 bits")
GPTQMODEL = "awq by gptqmodel, text only"
QUESTION = "What is the name of this skin condition?"
RESULTS = Path(__file__).parent / "results"


def splits(folder: Path) -> dict:
    """Return the records of a run, of which `folder` is the first stage's."""
    return load_splits(Run(folder.absolute().parent, "05_awq_vs_bnb"))


def batches(folder: Path, processor, split: str, rows: int, seed: int) -> dict:
    """Return a processor batch of `rows` conversations about images of a run's split, of one length."""
    records = splits(folder)[split]
    chosen = sample_balanced(records, min(rows, len(records)), seed)
    dtype = loading.choose_dtype(loading.choose_device())
    return quantization_batch(processor, chosen, load_conditions(), load_questions(), dtype, seed)


@torch.inference_mode()
def text_log_probs(llava, batch: dict) -> torch.Tensor:
    """Return log-probabilities (rows, positions after the image, vocabulary) in float32."""
    first = int((batch["input_ids"][0] == llava.config.image_token_id).nonzero()[-1]) + 1
    ids, pixels = batch["input_ids"].to(llava.device), batch["pixel_values"].to(llava.device, llava.dtype)
    rows = [{"input_ids": ids[i : i + 1], "pixel_values": pixels[i : i + 1]} for i in range(len(pixels))]
    logits = [llava(**row, use_cache=False).logits for row in rows]
    return torch.cat(logits)[:, first:].float().log_softmax(-1)


def mean_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean over positions of KL(reference || other) in nats of two (..., vocabulary) log-probabilities."""
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def put_back(llava, folder: Path) -> None:
    """Put the tensors of an AWQ folder of the text model into a LLaVA, in place."""
    text = parts(llava).text_model
    tensors = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
    tensors = {k.removeprefix("model."): v for k, v in tensors.items()}
    for name, linear in [(n, m) for n, m in text.named_modules() if isinstance(m, torch.nn.Linear)]:
        stored = packed.from_awq(*(tensors.pop(f"{name}.{key}") for key in ("qweight", "qzeros", "scales")))
        layer = packed.PackedLinear(linear.in_features, linear.out_features, 4, GROUP_SIZE, linear.bias)
        layer.load_state_dict(stored)
        text.set_submodule(name, layer)
    own = {k: v.to(llava.dtype) for k, v in tensors.items() if k.startswith("layers.") or k == "norm.weight"}
    if unknown := text.load_state_dict(own, strict=False).unexpected_keys:
        raise ValueError(f"{folder} holds {unknown[0]}, which the LLaVA's language model has not.")


def quantized(llava, processor, case: str, folder: Path, awq_folder: Path | None) -> tuple:
    """Quantize by the method that a case names, and save AWQ's; return (model, what it cost and how it was planned)."""
    method, calibration, bits = case.split(",")[0], None, 8 if case.endswith("8 bits") else 4
    if method == "awq":
        calibration = batches(folder, processor, "train", CALIBRATION_ROWS, 0)
    if case == "awq, text only":
        calibration = {"input_ids": without_images(llava, calibration["input_ids"])}
    llava, info = quantize(llava, method, bits, GROUP_SIZE, calibration)
    if case == "awq" and awq_folder is not None:
        save_quantized(llava, awq_folder, "awq", info, processor=processor)
    total, plan = info["packed_bytes"]["total"], account(llava.config, 0, bits, GROUP_SIZE, 0, method=method).weights_bytes
    cost = {"quantize_s": info["seconds"], "quantize_peak_bytes": info["peak_bytes"]}
    return llava, cost | {"packed_bytes": total, "plan_bytes": plan, "packed_against_plan_frac": total / plan - 1}


def run_case(case: str, folder: Path, rows: int, new_tokens: int, awq_folder: Path | None = None) -> dict:
    """Quantize one way, time it and hold it against the 16-bit model. Runs in its own process.

    `awq_folder` is where "awq" is saved, or where gptqmodel's text model is read. Bytes are without the process's own.
    """
    quiet()
    device = loading.choose_device()
    sixteen = loading.choose_dtype(device)
    llava, processor = loading.load(folder / "model", device, torch.float32 if case == "float32" else sixteen)
    result = {"case": case, "dense_bytes": loading.weight_bytes(llava)}
    if case == GPTQMODEL:
        put_back(llava, awq_folder)
    elif case.split(",")[0] in METHODS:
        llava, found = quantized(llava, processor, case, folder, awq_folder)
        result |= found
    if case == "rtn, without the kernel":  # what a processor without one does: unpack for every call
        packed.kernel_width = lambda: None
    record = splits(folder)["test"][0]
    asked = {"path": record.path, "question": QUESTION}
    speed = timing.measure_decoding(llava, processor, asked, new_tokens)
    (said,) = decoding.answer(llava, processor, [asked], 40)
    result |= {"ms_per_token": speed["ms_per_token"], "answer_peak_bytes": speed["peak_bytes"], "answer": said.text}
    result["held_bytes"] = packed_bytes(llava)["total"]
    test = batches(folder, processor, "test", rows, 1)
    ours = text_log_probs(llava, test)
    del llava
    reference = text_log_probs(loading.load(folder / "model", device, sixteen)[0], test)
    same = ours.argmax(-1) == reference.argmax(-1)
    result |= {"mean_kl_nats": mean_kl(reference, ours), "same_first_choice_frac": float(same.float().mean())}
    return result | {"rows": reference.shape[0], "positions_a_row": reference.shape[1]}


def without_images(llava, ids: torch.Tensor) -> torch.Tensor:
    """Return equal rows of token ids without their image tokens, of which each row must have as many."""
    return ids[ids != llava.config.image_token_id].view(len(ids), -1)


def beside_gptqmodel(python: Path, folder: Path, awq_folder: Path, scratch: Path, again) -> tuple[dict, dict]:
    """Run gptqmodel in its own environment; return (its outputs, the case of its text model in the LLaVA)."""
    llava, processor = loading.load(folder / "model")
    ids = without_images(llava, batches(folder, processor, "train", CALIBRATION_ROWS, 0)["input_ids"])
    write_json(scratch / "texts.json", processor.tokenizer.batch_decode(ids))
    del llava
    record = splits(folder)["test"][0]
    script, outputs = str(Path(__file__).with_name("gptqmodel_awq.py")), {}
    for name, words in (
        ("quantize", [folder / "model", scratch / "texts.json", scratch / "gptqmodel"]),
        ("answer", [awq_folder, record.path, QUESTION]),
    ):
        done = [str(python), script, name, *map(str, words), str(scratch / f"{name}.json")]
        subprocess.run(done, check=True, stdout=subprocess.DEVNULL)
        outputs[name] = read_json(scratch / f"{name}.json")
    return outputs, again(GPTQMODEL, scratch / "gptqmodel" / "awq")


def report(cases: list[dict]) -> str:
    """Return the cases as a table for reading."""
    columns = ["case", "quantize_s", "quantize_peak_bytes", "packed_bytes", "held_bytes", "packed_against_plan_frac"]
    table = pd.DataFrame(cases).reindex(columns=[*columns, "ms_per_token", "mean_kl_nats", "same_first_choice_frac"])
    return table.to_string(index=False, float_format="{:,.4g}".format, na_rep="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=REPO / "runs" / "demo", help="a run with a finished 01_finetune")
    parser.add_argument("--rows", type=int, default=16, help="test conversations for the divergence")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--cases", nargs="*", default=CASES, help=f"among {', '.join(CASES)}")
    parser.add_argument("--gptqmodel-python", type=Path, help="Python of the environment that gptqmodel_env.sh makes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--case", help="one case alone, as JSON")
    parser.add_argument("--awq-folder", type=Path, help="with --case: where AWQ's folder is written or read")
    args = parser.parse_args()
    folder = args.run.absolute() / "01_finetune"
    if not (folder / "model").is_dir():
        raise SystemExit(f"{args.run} holds no tuned model: run notebook 01, or give --run.")
    if args.case:
        print(json.dumps(run_case(args.case, folder, args.rows, args.new_tokens, args.awq_folder)))
        return

    def again(case: str, awq_folder: Path) -> dict:
        words = ["--run", args.run, "--rows", args.rows, "--new-tokens", args.new_tokens, "--case", case]
        words = [sys.executable, __file__, *map(str, words), "--awq-folder", str(awq_folder)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        print(f"{case}: done", file=sys.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    profile = read_json(folder / "manifest.json")["settings"]["name"]
    machine = describe_machine() | {"load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        cases = [again(case, scratch / "awq") for case in args.cases]
        if args.gptqmodel_python:
            outputs, case = beside_gptqmodel(args.gptqmodel_python, folder, scratch / "awq", scratch, again)
            cases.append(case)
            ours = next(c["answer"] for c in cases if c["case"] == "awq")
            write_json(args.out / "gptqmodel_awq.json", {"machine": machine, **outputs, "answer_of_medprune": ours})
    about = {"machine": machine, "profile": profile, "group_size": GROUP_SIZE, "calibration_rows": CALIBRATION_ROWS}
    write_json(args.out / "quantize.json", {**about, "cases": cases})
    print(report(cases))


if __name__ == "__main__":
    main()
