"""One decode step's attention: torch's SDPA as transformers calls it against `attention.grouped_attention`, on CPU.

python benchmarks/attention.py [--out FILE]

The shapes are the `local` profile's: 120 rows, 9 heads, 3 key heads, width 64, bfloat16, with 60 and 100 cached
tokens. Prints ms per layer, the fastest of many, and writes a JSON with the machine's description.
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
    """Time both on the same random tensors, and return the largest difference of their results."""
    torch.manual_seed(0)
    query = torch.randn(ROWS, HEADS, 1, WIDTH).bfloat16()
    key, value = (torch.randn(ROWS, KEY_HEADS, cached, WIDTH).bfloat16() for _ in range(2))
    layer = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, is_causal=True, training=False)
    calls = {name: lambda f=f: f(layer, query, key, value, None, scaling=WIDTH**-0.5)[0]
             for name, f in (("sdpa", sdpa_attention_forward), ("grouped", grouped_attention))}  # fmt: skip
    difference = (calls["sdpa"]().float() - calls["grouped"]().float()).abs().max().item()
    row = {"cached_tokens": cached, "max_difference": difference}
    row |= {f"{name}_ms": fastest_ms(call, repeats) for name, call in calls.items()}
    return row | {"ratio": row["sdpa_ms"] / row["grouped_ms"]}


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
