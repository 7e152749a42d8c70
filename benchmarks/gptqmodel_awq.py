"""gptqmodel, in an environment of its own: its AWQ of a text model, and our AWQ folder in plain transformers.

gptqmodel 7.6.0 pins numpy 2.2.6 and does not take the LLaVA around a text model. benchmarks/gptqmodel_env.sh makes
its environment; nothing of medprune is imported here.

    .venv-gptqmodel/bin/python benchmarks/gptqmodel_awq.py quantize MODEL TEXTS OUT_FOLDER RESULT.json
    .venv-gptqmodel/bin/python benchmarks/gptqmodel_awq.py answer AWQ_FOLDER IMAGE QUESTION RESULT.json
"""

import argparse
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

GROUP_SIZE = 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def peak_bytes() -> int:
    """Return the most memory that this process has held, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def export_text_model(folder: str, out: Path) -> None:
    """Write a LLaVA's language model and tokenizer as a causal language model of its own."""
    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(llava.config.text_config)
    text.model, text.lm_head = llava.model.language_model, llava.lm_head
    text.generation_config.eos_token_id = llava.generation_config.eos_token_id
    text.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)


@torch.no_grad()
def milliseconds_per_token(model, ids: torch.Tensor, new_tokens: int = 32, **extra) -> float:
    """Return the median ms of one greedy step at batch size 1, the prefill left out."""
    out, seconds = model(input_ids=ids, use_cache=True, **extra), []
    for _ in range(new_tokens):
        token = out.logits[:, -1].argmax(-1)[:, None]
        started = time.perf_counter()
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - started)
    return median(seconds) * 1e3


def quantize(args) -> dict:
    """Export the text model, quantize it by gptqmodel's AWQ on the texts (a JSON list), and time one decoding."""
    # On two cores it would start one worker, and then ask two of them.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    dense, texts = args.out / "text-16bit", json.loads(args.texts.read_text())
    export_text_model(args.model, dense)
    config = QuantizeConfig(bits=4, group_size=GROUP_SIZE, method="awq", format="gemm")
    started = time.perf_counter()
    model = GPTQModel.load(str(dense), config, device=DEVICE)
    model.quantize(texts, batch_size=1, backend=BACKEND.AWQ_TORCH if DEVICE == "cpu" else BACKEND.AUTO)
    seconds, peak = time.perf_counter() - started, peak_bytes()
    model.save(str(args.out / "awq"))
    packed = sum(f.stat().st_size for f in (args.out / "awq").glob("*.safetensors"))
    loaded = GPTQModel.load(str(args.out / "awq"), device=DEVICE, backend=BACKEND.AUTO)
    ids = torch.tensor([loaded.tokenizer(texts[0])["input_ids"]])
    ms_per_token = milliseconds_per_token(loaded.model, ids)
    result = {"seconds": seconds, "peak_bytes": peak, "folder_bytes": packed, "calibration": f"{len(texts)} texts"}
    return result | {"ms_per_token": ms_per_token, "kernel": kernels(loaded.model)}


def answer(args) -> dict:
    """Load an AWQ folder of medprune's with plain transformers and answer one question about an image."""
    from PIL import Image

    model, report = LlavaForConditionalGeneration.from_pretrained(args.folder, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(args.folder, backend="pil")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    batch = processor(text=text, images=Image.open(args.image).convert("RGB"), return_tensors="pt")
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    ids = model.generate(**batch, max_new_tokens=40, do_sample=False)[0, batch["input_ids"].shape[1] :]
    with torch.no_grad():
        logits = model(**batch).logits
    said = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    result = {"question": args.question, "image": args.image.name, "token_ids": ids.tolist(), "answer": said}
    result |= {key: sorted(report[key]) for key in ("missing_keys", "unexpected_keys")}
    result |= {"finite": bool(torch.isfinite(logits).all()), "dtype": str(model.dtype), "kernel": kernels(model)}
    speed = milliseconds_per_token(model, batch["input_ids"], pixel_values=batch["pixel_values"])
    return result | {"ms_per_token": speed}


def kernels(model) -> list[str]:
    """Return the classes of the packed layers that were chosen for this machine."""
    return sorted({type(m).__name__ for m in model.modules() if hasattr(m, "qweight")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("quantize")
    first.add_argument("model", help="a LLaVA folder in 16 bits")
    first.add_argument("texts", type=Path, help="JSON list of calibration texts")
    first.add_argument("out", type=Path, help="folder for the text model in 16 bits and in AWQ")
    first.set_defaults(do=quantize)
    second = commands.add_parser("answer")
    second.add_argument("folder", help="an AWQ folder of a LLaVA")
    second.add_argument("image", type=Path)
    second.add_argument("question")
    second.set_defaults(do=answer)
    for command in (first, second):
        command.add_argument("result", type=Path)
    args = parser.parse_args()
    names = ("gptqmodel", "torch", "transformers", "numpy")
    result = {"python": sys.version.split()[0], **{n: version(n) for n in names}, "threads": torch.get_num_threads()}
    result |= args.do(args)
    args.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
