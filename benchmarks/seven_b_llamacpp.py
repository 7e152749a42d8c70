"""LLaVA-1.5-7B's text model in llama.cpp: random weights in 16 bits and in Q4_1, as `medprune export` writes AWQ's codes.

python benchmarks/seven_b_llamacpp.py [--tiny] [--out FILE]

A file for each of 16 bits with every block, and 4 bits with 0 and 7 removed, is written a tensor at a time (13 GiB for
the first), served by llama.cpp (xllamacpp, in this environment or as the python that MEDPRUNE_LLAMACPP names) and asked
for as many tokens after as long a prompt as benchmarks/seven_b.py, whose times it is put beside. The tower is left out:
it runs once for a picture. Random weights take the time and the memory of real ones.
"""

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from seven_b import RESULTS, TEXT_TOKENS, in_own_process, shape

from medprune.exporting import engines, llamacpp
from medprune.exporting.gguf import BLOCK, BLOCK_BYTES, Kind, Tensor
from medprune.exporting.gguf import write as save
from medprune.models.sizes import GIB
from medprune.store import describe_machine, write_json

CASES = ((0, 16), (0, 4), (7, 4))  # blocks removed, bits
OUT = RESULTS.with_name("seven_b_llamacpp.json")
KINDS = {16: Kind.F16, 4: Kind.Q4_1}


def write(config: dict, removed: int, bits: int, path: Path) -> int:
    """Write a text model of a shape with random weights; return the bytes that a token reads: all but the table's."""
    text, random = config["text_config"], np.random.default_rng(0)
    hidden, inner, vocab = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    heads, blocks = text["num_attention_heads"], text["num_hidden_layers"] - removed
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_block_count(blocks)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(text.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("llama")
    words = [*("<unk>", "<s>", "</s>"), *(f"<0x{b:02X}>" for b in range(256))]
    words += [f"▁w{i}" for i in range(vocab - len(words))]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * vocab)
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (vocab - len(kinds)))
    shapes = {"token_embd": (vocab, hidden, 16), "output": (vocab, hidden, 16), "output_norm": (hidden,)}
    linears = {f"attn_{part}": (hidden, hidden, bits) for part in ("q", "k", "v", "output")}
    linears |= {"ffn_gate": (inner, hidden, bits), "ffn_up": (inner, hidden, bits), "ffn_down": (hidden, inner, bits)}
    for block in range(blocks):
        shapes |= {f"blk.{block}.{name}": made for name, made in linears.items()}
        shapes |= {f"blk.{block}.{name}_norm": (hidden,) for name in ("attn", "ffn")}
    some = random.normal(0, 0.02, 1 << 20).astype(np.float16)
    packed = random.integers(0, 256, (1 << 16, BLOCK_BYTES[Kind.Q4_1]), np.uint8)
    packed[:, :4] = np.array([0.005, -0.04], np.float16).view(np.uint8)
    values = {16: some.view(np.uint8), 4: packed.reshape(-1)}

    def tensor(name: str, rows: int, columns: int = 0, width: int = 0) -> Tensor:
        if not columns:  # of a norm
            return Tensor(name, Kind.F32, (rows,), partial(np.ones, rows, np.float32))
        row = columns * 2 if width == 16 else columns // BLOCK * BLOCK_BYTES[Kind.Q4_1]
        return Tensor(name, KINDS[width], (rows, row), partial(np.resize, values[width], (rows, row)))

    save(writer, [tensor(f"{name}.weight", *made) for name, made in shapes.items()], path)
    return path.stat().st_size - vocab * hidden * 2


def ask(path: Path, prompt: int, new_tokens: int, threads: int) -> dict:
    """Serve a file and ask once; return ms_per_token, prefill_s, load_s and peak_bytes of the server."""
    port = engines.free_port()
    words = [*engines.program("llama.cpp"), llamacpp.__file__, "serve", str(path), "", engines.LOOPBACK, str(port), str(threads)]
    with engines.started(words, port, threads, f"llama.cpp does not serve {path.name}") as server:
        body = {"prompt": [1, *range(300, 299 + prompt)], "n_predict": new_tokens, "ignore_eos": True, "temperature": 0}
        said = engines.post(f"{server.address}/completion", body)["timings"]
        assert said["predicted_n"] == new_tokens and said["prompt_n"] == prompt, said
        costs = {"ms_per_token": said["predicted_per_token_ms"], "prefill_s": said["prompt_ms"] / 1e3}
        return costs | {"load_s": server.load_s, "peak_bytes": server.peak_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a model of megabytes, to test the script")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    config, cases = shape(args.tiny), []
    load_before, version = os.getloadavg()[0], engines.version("llama.cpp")
    bandwidth = in_own_process("--bandwidth", *(["--tiny"] if args.tiny else []))
    for removed, bits in CASES:
        with tempfile.TemporaryDirectory() as folder:
            read = write(config, removed, bits, Path(folder) / engines.TEXT)
            case = ask(Path(folder) / engines.TEXT, config["image_seq_length"] + TEXT_TOKENS, args.new_tokens, args.threads)
        name = f"{'16 bits' if bits == 16 else 'Q4_1'}, {removed} removed"
        case |= {"name": name, "blocks_removed": removed, "bits": bits, "read_bytes": read}
        case |= {"read_gb_s": read / case["ms_per_token"] / 1e6, "speedup": (cases or [case])[0]["ms_per_token"] / case["ms_per_token"]}
        cases.append(case)
        print(f"{name}: {case['ms_per_token']:.0f} ms/token, {case['read_gb_s']:.1f} GB/s, prompt {case['prefill_s']:.1f} s, "
              f"peak {case['peak_bytes'] / GIB:.2f} GiB, {case['speedup']:.2f} times 16 bits")  # fmt: skip
    beside = None
    if RESULTS.exists() and not args.tiny:
        torch_ms = {c["name"]: c["ms_per_token"] for c in json.loads(RESULTS.read_text())["cases"]}
        dense = next(iter(torch_ms.values()))
        beside = {c["name"]: dense / c["ms_per_token"] for c in cases}
        print("faster than 16 bits in torch (seven_b.json): " + ", ".join(f"{n} {times:.2f}" for n, times in beside.items()))
    machine = describe_machine() | {"load_before": load_before, "engine": version, "engine_threads": args.threads}
    result = {"machine": machine, "model": "tiny" if args.tiny else "llava-1.5-7b's text model, random weights"}
    write_json(args.out, result | {"bandwidth_gb_s": bandwidth, "cases": cases, "faster_than_torch_16_bits": beside})


if __name__ == "__main__":
    main()
