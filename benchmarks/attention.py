"""One decode step's attention: torch's SDPA as transformers calls it against `attention.grouped_attention`, on CPU.

python benchmarks/attention.py [--out FILE]

The shapes are the `local` profile's: 120 rows, 9 heads, 3 key heads, width 64, bfloat16, with 60 and 100 cached
tokens, without padding and with some in every other row. Prints ms per layer, the fastest of many, and writes a JSON
with the machine's description.
"""

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from medprune.models.attention import grouped_attention
from medprune.store import describe_machine, write_json

ROWS, HEADS, KEY_HEADS, WIDTH = 120, 9, 3, 64
RESULTS = Path(__file__).parent / "results" / "attention.json"


def fastest_ms(function, repeats: int) -> float:
    """Return the fastest of some calls, in ms."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return best * 1e3


@torch.inference_mode()
def measure(cached: int, repeats: int) -> dict:
    """Time both on the same random tensors, and return the largest difference of their results.

    mask_cost: the time of `grouped_attention` with padding over that without.
    """
    torch.manual_seed(0)
    query = torch.randn(ROWS, HEADS, 1, WIDTH).bfloat16()
    key, value = (torch.randn(ROWS, KEY_HEADS, cached, WIDTH).bfloat16() for _ in range(2))
    layer = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, is_causal=True, training=False)
    seen = torch.ones(ROWS, 1, 1, cached, dtype=torch.bool)
    seen[::2, ..., 40:44] = False
    functions = {"sdpa": sdpa_attention_forward, "grouped": grouped_attention}
    calls = {name + end: lambda f=f, mask=mask: f(layer, query, key, value, mask, scaling=WIDTH**-0.5)[0]
             for name, f in functions.items() for end, mask in (("", None), ("_padded", seen))}  # fmt: skip
    row = {"cached_tokens": cached}
    for end in ("", "_padded"):
        difference = calls["sdpa" + end]().float() - calls["grouped" + end]().float()
        row["max_difference" + end] = difference.abs().max().item()
    row |= {f"{name}_ms": fastest_ms(call, repeats) for name, call in calls.items()}
    row |= {f"ratio{end}": row[f"sdpa{end}_ms"] / row[f"grouped{end}_ms"] for end in ("", "_padded")}
    return row | {"mask_cost": row["grouped_padded_ms"] / row["grouped_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200, help="calls of each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    table = pd.DataFrame([measure(cached, arguments.repeats) for cached in (60, 100)])
    print(f"one layer, {ROWS} rows, one new token each, {HEADS} heads, {KEY_HEADS} key heads, width {WIDTH}, bfloat16")
    print(table.round(4).to_string(index=False))
    shape = {"rows": ROWS, "heads": HEADS, "key_heads": KEY_HEADS, "width": WIDTH, "dtype": "bfloat16"}
    write_json(arguments.out, {"machine": describe_machine(), **shape, "cases": table.to_dict("records")})


if __name__ == "__main__":
    main()
