"""Scoring every block by output similarity: the naive way, block by block, and the leave-one-out batch.

python benchmarks/importance.py [--model FOLDER] [--profile local] [--naive-blocks 3] [--out FILE]

(a) naive, as the paper's code: for each block load the model, build a smaller one, copy the weights over by name, and
    `generate` question by question. Timed on --naive-blocks blocks, evenly spaced, and scaled to all: building by the
    number of blocks, answering by the number of decode steps, which (c) has counted.
(b) one model that skips the block, all questions of a block in one batch.
(c) the leave-one-out batch: every row of one batch skips a block of its own, as notebook 02 does it.
All three give the texts whose embeddings are compared; the scores must agree. What is left of a difference in (a) is
rounding: (a)'s models, asked through `decoding.answer` as (b) and (c) are, must say the very same, text for text, on a
machine whose matrix products round a row alike however many rows are beside it (Intel's AMX does not; `rows_round_alike`
tries it). Where they do not, the differences are the noise floor of the measure itself.
Beside them stand the floor of (c) in FLOPs over this machine's matrix product rate, and what applying a plan to
LLaVA-1.5-7B's shape takes.
"""

import argparse
import copy
import gc
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import init_empty_weights
from scipy.stats import spearmanr
from transformers import LlavaConfig, LlavaForConditionalGeneration

from medprune.answers import decoding, prompts
from medprune.data.pictures import open_image
from medprune.data.questions import load_conditions, load_questions, test_questions
from medprune.data.records import load_splits, sample_balanced
from medprune.models.attention import GROUPED
from medprune.models.families import parts, protected
from medprune.models.loading import choose_dtype, load, load_embedder
from medprune.models.sizes import named_config, shape_of
from medprune.pruning import leave_one_out
from medprune.pruning.plan import apply_plan, make_plan
from medprune.settings import REPO, resolve
from medprune.store import Run, Units, describe_machine, write_json

RESULTS = Path(__file__).parent / "results" / "importance.json"
# Of importance_score (0-2). `generate` runs the prompt in one piece and torch's own attention, so that bf16 rounds
# otherwise than in (b) and (c), and now and then another token is chosen.
SCORE_TOLERANCE = 0.05
# Printed in examples/example-usage.ipynb of github.com/takakib123/LLaVA_Prune (commit 6e66579), the code published
# with the paper, for leaving these blocks of LLaVA-1.5-7B out on a Kaggle GPU machine.
PAPER_COPY = {"copy_s": 56.2, "removed": [23, 4, 18]}


def build_by_copying(folder: Path, block: int) -> LlavaForConditionalGeneration:
    """Return a model without one block as the paper's code makes it: a new one, weights copied over by name."""
    source = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    config = copy.deepcopy(source.config)
    config.text_config.num_hidden_layers -= 1
    model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)  # .to() would round the rotary table
    weights = source.state_dict()
    for name, target in model.state_dict().items():
        head, found, tail = name.partition("language_model.layers.")
        number, _, rest = tail.partition(".")
        original = f"{head}{found}{int(number) + (int(number) >= block)}.{rest}" if found else name
        target.copy_(weights[original])
    model.generation_config = source.generation_config
    return model.eval()


@torch.inference_mode()
def ask_one_by_one(model, processor, rows: list[dict], max_new_tokens: int) -> list[str]:
    """Answer question by question with transformers' `generate`."""
    texts = []
    for row in rows:
        prompt = prompts.prompt_text(processor, row["question"])
        batch = processor(text=prompt, images=open_image(row["path"]), return_tensors="pt")
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
        out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[0, batch["input_ids"].shape[1] :]
        texts.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return texts


def scores_of(original: np.ndarray, texts: dict[int, list[str]], embed) -> dict[int, float]:
    """Return importance_score, 1 - mean cosine to the embedded original answers, by block."""
    return {b: 1 - float(leave_one_out.cosine(original, embed(said)).mean()) for b, said in texts.items()}


def floor_flops(config, processor, rows: list[dict], answers: list[list[dict]]) -> dict:
    """Return the FLOPs that (c)'s texts need: 2 x weights x tokens, 4 x heads' width x context for attention.

    answers: one list per block, with `tokens` and `ended`. Each image's prompt up to its last image token counts once
    per block and image, the question once per answer, the head once per token chosen; nothing is shared between
    blocks. The vision tower and the projector count once per image.
    """
    shape, blocks = shape_of(config), config.text_config.num_hidden_layers - 1
    linear = sum(i * o for _, i, o in shape.linears)
    wide = next(o for name, _, o in shape.linears if name.endswith("q_proj"))
    images = len({r["path"] for r in rows})
    texts = [prompts.prompt_text(processor, r["question"]) for r in rows]
    encoded = prompts.encode(processor, texts, [open_image(r["path"]) for r in rows], torch.float32)["input_ids"]
    prefix = int((encoded[0] == config.image_token_id).nonzero()[-1]) + 1

    def context(first, last):  # sum of the numbers of tokens attended to by tokens first .. last - 1
        return (last * (last + 1) - first * (first + 1)) // 2

    tokens = attended = chosen = 0
    for said in answers:
        tokens += images * prefix
        attended += images * context(0, prefix)
        for ids, a in zip(encoded, said, strict=True):
            steps = a["tokens"] - (not a["ended"])  # the last token chosen is not run through the model
            tokens += len(ids) - prefix + steps
            attended += context(prefix, len(ids) + steps)
            chosen += steps + 1
    vision = images * 2 * (shape.vision_params * shape.vision_tokens + shape.projector_params * shape.vision_tokens)
    parts_ = {"block_linears": 2 * linear * blocks * tokens, "attention": 4 * wide * blocks * attended,
              "head": 2 * shape.hidden * shape.vocab * chosen, "vision": vision}  # fmt: skip
    return parts_ | {"total": sum(parts_.values())}


@torch.inference_mode()
def matmul_rates(shape) -> dict:
    """Return bf16 matrix product rates in GFLOP/s: large square ones, and a decode step's of 128 rows; best of some."""
    rates = {}
    for name, m, k, n, repeats in (("square_2048", 2048, 2048, 2048, 8), ("square_4096", 4096, 4096, 4096, 3),
                                   ("mlp_of_128_rows", 128, shape.hidden, shape.intermediate, 100)):  # fmt: skip
        a, weight, best = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16(), float("inf")
        for _ in range(repeats):
            started = time.perf_counter()
            torch.nn.functional.linear(a, weight)
            best = min(best, time.perf_counter() - started)
        rates[name] = 2 * m * k * n / best / 1e9
    return rates


@torch.inference_mode()
def rows_round_alike(shape, rows: int) -> bool:
    """Say whether bf16 products of a block's shapes give each of so many rows the same bits as in smaller batches."""
    torch.manual_seed(0)
    for _, inputs, outputs in shape.linears:
        x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
        whole = torch.nn.functional.linear(x, weight)
        if any(not torch.equal(torch.nn.functional.linear(x[:m], weight), whole[:m]) for m in range(1, rows, 7)):
            return False
    return True


def apply_to_7b() -> dict:
    """Time a plan on LLaVA-1.5-7B's shape (bf16, never touched, so its memory is only reserved) and one block's copy.

    copy_all_s is that of one block, 405 MB, times the blocks kept: two such models do not fit in 24 GiB.
    """
    with init_empty_weights(include_buffers=False):
        model = LlavaForConditionalGeneration(LlavaConfig(**named_config("llava-1.5-7b"))).to(torch.bfloat16)
    model.to_empty(device="cpu")
    source = parts(model).blocks[0]
    for parameter in source.parameters():
        parameter.data.fill_(0.5)
    target = [torch.full_like(p, 0.25) for p in source.parameters()]  # pages touched before the clock starts
    started = time.perf_counter()
    for to, parameter in zip(target, source.parameters(), strict=True):
        to.copy_(parameter)
    copy_s = time.perf_counter() - started
    plan = make_plan(model.config, PAPER_COPY["removed"], "", protect=())
    started = time.perf_counter()
    apply_plan(model, plan)
    apply_s = time.perf_counter() - started
    return {"removed": PAPER_COPY["removed"], "apply_ms": apply_s * 1e3, "copy_one_block_s": copy_s,
            "copy_all_s": copy_s * len(plan.kept), "paper_code_copy_s": PAPER_COPY["copy_s"]}  # fmt: skip


def compare_scores(scores, texts, reference_scores, reference_texts) -> dict:
    """Hold one way's scores and texts against (c)'s."""
    gap = max(abs(scores[b] - reference_scores[b]) for b in scores)
    pairs = [(x, y) for b in scores for x, y in zip(texts[b], reference_texts[b], strict=True)]
    rank = spearmanr([scores[b] for b in scores], [reference_scores[b] for b in scores]).statistic
    return {"blocks_compared": len(scores), "max_score_difference": gap, "rank_correlation": float(rank),
            "answers_compared": len(pairs), "answers_different": sum(x != y for x, y in pairs)}  # fmt: skip


def run(folder: Path, profile: str, naive_blocks: int) -> dict:
    """Time the three ways on one model; returns everything that is written."""
    cfg = resolve(profile)
    model, processor = load(folder, "cpu", choose_dtype("cpu"))
    guarded = protected(model, cfg.protected_blocks)
    blocks = [b for b in range(model.config.text_config.num_hidden_layers) if b not in guarded]
    train = load_splits(Run(folder.absolute().parents[1], "02_layer_importance"))["train"]
    calibration = sample_balanced(train, cfg.n_calibration, cfg.seed)
    rows = test_questions(calibration, load_conditions(), load_questions())
    limit, embed = cfg.calibration_tokens, load_embedder(cfg.embedding)
    rates = matmul_rates(shape_of(model.config))
    decoding.answer(model, processor, rows, limit, cfg.batch_rows)  # warms up
    seconds, texts, ways = {}, {}, []

    with tempfile.TemporaryDirectory() as place:
        units = Units(Path(place) / "units.jsonl", "")
        said = decoding.answer(model, processor, rows, limit, cfg.batch_rows)
        units.add("original", [vars(a) for a in said])
        original = embed([a.text for a in said])
        started = time.perf_counter()
        table = leave_one_out.output_similarity(model, processor, rows, lambda said: np.ones((len(said), 1)), blocks,
                                             units, limit, cfg.batch_rows)  # fmt: skip
        seconds["c"] = time.perf_counter() - started
        answers = [units[f"block {b}"] for b in blocks]
    texts["c"] = dict(zip(table["block"], table["answers"], strict=True))
    scores = {"c": scores_of(original, texts["c"], embed)}
    print(f"(c) {seconds['c']:.1f} s", flush=True)

    started = time.perf_counter()
    texts["b"] = {b: [a.text for a in decoding.answer(model, processor, rows, limit, cfg.batch_rows, skip=[b] * len(rows))]
                  for b in blocks}  # fmt: skip
    seconds["b"] = time.perf_counter() - started
    scores["b"] = scores_of(original, texts["b"], embed)
    print(f"(b) {seconds['b']:.1f} s", flush=True)

    flops = floor_flops(model.config, processor, rows, answers)
    config = model.config
    del model
    steps = {b: sum(a["tokens"] + a["ended"] for a in said) for b, said in zip(blocks, answers, strict=True)}
    chosen = [blocks[(2 * i + 1) * len(blocks) // (2 * naive_blocks)] for i in range(naive_blocks)]
    build_s, answer_s, same = 0.0, 0.0, 0
    texts["a"] = {}
    for b in chosen:
        started = time.perf_counter()
        pruned = build_by_copying(folder, b)
        built = time.perf_counter()
        texts["a"][b] = ask_one_by_one(pruned, processor, rows, limit)
        build_s, answer_s = build_s + built - started, answer_s + time.perf_counter() - built
        print(f"(a) without block {b}: {time.perf_counter() - started:.1f} s", flush=True)
        pruned.set_attn_implementation({"text_config": GROUPED})
        again = decoding.answer(pruned, processor, rows, limit, cfg.batch_rows)
        same += sum(x.text == y for x, y in zip(again, texts["c"][b], strict=True))
        del pruned
    measured = sum(steps[b] for b in chosen)
    seconds["a"] = build_s * len(blocks) / len(chosen) + answer_s * sum(steps.values()) / measured
    scores["a"] = scores_of(original, texts["a"], embed)

    best_rate = max(rates.values())
    floor_s = flops["total"] / best_rate / 1e9
    names = {"a": "build each model, question by question", "b": "skip the block, questions in a batch",
             "c": "leave-one-out batch"}  # fmt: skip
    for way in "abc":
        row = {"way": way, "what": names[way], "blocks": len(blocks), "blocks_timed": len(texts[way]),
               "seconds": seconds[way], "ratio_to_c": seconds[way] / seconds["c"]}  # fmt: skip
        ways.append(row | compare_scores(scores[way], texts[way], scores["c"], texts["c"]))
    gc.collect()
    return {
        "machine": describe_machine(), "profile": profile, "blocks_in_model": config.text_config.num_hidden_layers,
        "images": len(calibration), "questions": len(rows), "max_new_tokens": limit, "batch_rows": cfg.batch_rows,
        "score_tolerance": SCORE_TOLERANCE, "rows_round_alike": rows_round_alike(shape_of(config), cfg.batch_rows),
        "ways": ways,
        "naive": {"blocks_timed": chosen, "build_s": build_s, "answer_s": answer_s, "steps_timed": measured,
                  "steps_all": sum(steps.values()), "answers_asked_alike": len(chosen) * len(rows),
                  "answers_alike": same},
        "floor": {"flops": flops, "matmul_gflops": rates, "seconds": floor_s, "c_over_floor": seconds["c"] / floor_s},
        "scores": {way: {str(b): s for b, s in found.items()} for way, found in scores.items()},
    }  # fmt: skip


def print_result(result: dict) -> None:
    """Print the tables and the sentences that say what they stand on."""
    table = pd.DataFrame(result["ways"])
    print(table.round({"seconds": 1, "ratio_to_c": 2, "max_score_difference": 4}).to_string(index=False))
    naive, floor, plan = result["naive"], result["floor"], result["llava_1_5_7b"]
    print(f"\n(a) was timed on blocks {naive['blocks_timed']} and scaled: building by blocks, answering by decode steps "
          f"({naive['steps_timed']} of {naive['steps_all']}). Asked as in (b) and (c), its models give "
          f"{naive['answers_alike']} of {naive['answers_asked_alike']} answers to the letter; rows round "
          f"{'alike' if result['rows_round_alike'] else 'otherwise'} in batches of other sizes.")
    print(f"floor of (c): {floor['flops']['total'] / 1e12:.2f} TFLOP at {max(floor['matmul_gflops'].values()):.0f} GFLOP/s "
          f"= {floor['seconds']:.1f} s; (c) takes {floor['c_over_floor']:.1f} times that.")
    print(f"LLaVA-1.5-7B less blocks {plan['removed']}: applying the plan {plan['apply_ms']:.1f} ms; copying the kept "
          f"blocks {plan['copy_all_s']:.1f} s here (one block, scaled); the paper's code prints {plan['paper_code_copy_s']} s.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=REPO / "runs" / "demo" / "01_finetune" / "model",
                        help="folder of notebook 01's model, in its run")  # fmt: skip
    parser.add_argument("--profile", default="local")
    parser.add_argument("--naive-blocks", type=int, default=3, help="blocks on which (a) is timed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").exists():
        raise SystemExit(f"{arguments.model} holds no model: run notebook 01, or give its folder as --model.")
    result = run(arguments.model, arguments.profile, arguments.naive_blocks)
    result["llava_1_5_7b"] = apply_to_7b()
    print_result(result)
    write_json(arguments.out, result)
    if result["rows_round_alike"] and result["naive"]["answers_alike"] < result["naive"]["answers_asked_alike"]:
        raise SystemExit("a model built by copying and the leave-one-out batch answer differently.")
    for way in result["ways"]:
        if way["max_score_difference"] > SCORE_TOLERANCE:
            raise SystemExit(f"({way['way']}) and (c) differ by {way['max_score_difference']:.4f} in a block's score: "
                             f"{SCORE_TOLERANCE} is tolerated.")  # fmt: skip


if __name__ == "__main__":
    main()
