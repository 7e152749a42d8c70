"""The numbers of a `smoke` run that a wrong number in the code would change: collected, written and compared.

python tests/golden.py RUN_FOLDER writes them anew into tests/golden/smoke.json; look at the diff before committing it.
python tests/golden.py --changed RUN_FOLDER only prints which of them changed.
Times, memory and versions are left out, and ways back that are given as much time as another. With oneDNN and ATen held to
AVX2, instead of AVX512 with bfloat16, 95 numbers differ, by half a percent at most: 2 are allowed. Scores, which one word
can move, may differ by some points. Counts, parameters, bytes and orders by weights are exact.
"""

import json
import sys
from pathlib import Path

import pandas as pd

from medprune.settings import STAGES

FILE = Path(__file__).parent / "golden" / "smoke.json"
TABLES = {
    "01_finetune": ["scores"],
    "02_layer_importance": ["importance"],
    "03_prune_sweep": ["sweep", "criteria", "scores"],
    "04_sft_recovery": ["recovery", "recipes", "scores"],
    "05_awq_vs_bnb": ["quantization", "activations", "scores"],
    "06_judge_eval": ["summary", "ablation", "judge_card"],
    "07_budget_search": ["scores"],
}
# measured anew in every run, or long texts
PASSING = ("_s", "_bytes_peak", "seconds", "raw", "answer", "question", "reference", "asked", "judged_by", "paper_",
           "ms_per_token", "peak_bytes", "model_fingerprint", "content", "path", "tokens", "merge_kl_nats")  # fmt: skip
EXACT = ("parameters", "stored_bytes", "plan_bytes", "trainable_params", "n", "n_images", "steps", "images", "block",
         "blocks_removed", "unparsed", "training_words", "entries", "bits")  # fmt: skip
ABSOLUTE = {"score": 6.0, "score_before": 6.0, "diff": 8.0}
BOUNDS = 12.0  # of a score's interval
RELATIVE = 0.02


def collect(root: Path) -> dict:
    """Return {stage/table: {row: {column: value}}} of a run: rows in their order, scores as each method's mean."""
    found = {}
    for stage, names in TABLES.items():
        found[f"{stage}/metrics"] = {"all": _plain(json.loads((root / stage / "metrics.json").read_text()))}
        for name in names:
            table = pd.read_csv(root / stage / f"{name}.csv")
            if name == "recipes":
                table = table[table["budget"] == "steps"]
            if name == "scores":
                table = table.groupby("method", sort=False)["score_percent"].agg(["mean", "size"]).reset_index()
                table = table.rename(columns={"mean": "score", "size": "n"})
            found[f"{stage}/{name}"] = {str(i): _plain(row) for i, row in enumerate(table.to_dict("records"))}
    orders = json.loads((root / STAGES[1] / "removal_order.json").read_text())
    fixed = ("magnitude", "reverse_order", "random-0", "protected")
    found["orders"] = {"all": {name: str(orders[name]) for name in fixed}}
    return found


def _plain(row: dict) -> dict:
    kept = {k: v for k, v in row.items() if not any(k == p or k.endswith(p) or k.startswith(p) for p in PASSING)}
    return {k: v for k, v in kept.items() if isinstance(v, int | float | str | bool) and v == v}


def differences(found: dict, wanted: dict) -> list[str]:
    """Return what differs between two collections, in words."""
    said = [f"{key} is missing" for key in wanted.keys() - found.keys()]
    for key in wanted.keys() & found.keys():
        for row, values in wanted[key].items():
            for column, value in values.items():
                other = found[key].get(row, {}).get(column)
                if not _near(column, other, value, scores="score" in values or "diff" in values):
                    said.append(f"{key} row {row} {column}: {other!r} where {value!r} was")
    return sorted(said)


def _near(column: str, other, value, scores: bool) -> bool:
    if isinstance(value, str) or isinstance(other, str) or other is None or column in EXACT:
        return other == value
    allowed = BOUNDS if scores and column in ("low", "high") else ABSOLUTE.get(column, RELATIVE * abs(value) + 1e-6)
    return abs(other - value) <= allowed


if __name__ == "__main__":
    if sys.argv[1] == "--changed":
        changed = differences(collect(Path(sys.argv[2])), json.loads(FILE.read_text()))
        print("\n".join(changed) or "no golden metric changed")
        sys.exit(0)
    FILE.write_text(json.dumps(collect(Path(sys.argv[1])), indent=1, sort_keys=True) + "\n")
