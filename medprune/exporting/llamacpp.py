"""Run llama.cpp out of the wheel xllamacpp, in whatever environment has it: a script, which imports nothing of ours.

    python llamacpp.py serve TEXT.gguf MMPROJ.gguf HOST PORT THREADS   an OpenAI-compatible server on this machine
    python llamacpp.py embed TEXT.gguf MMPROJ.gguf IMAGES OUT          what its tower and projector make of images
    python llamacpp.py quantize                                        rows of floats, as its formats hold them

IMAGES is a folder of N.rgb files, sides in their first eight bytes; OUT gets N.f32 of (image tokens, hidden) floats.
The last reads requests from its input, `TYPE ROWS COLUMNS WEIGHTED` and that many float32 (with WEIGHTED 1 the columns'
importance first), and writes each one's bytes to its output, after their number. Both go through the C functions that
the wheel exports. Options are passed as they come, so that nothing here depends on their layout.
"""

import ctypes
import importlib
import struct
import sys
import threading
from pathlib import Path

CONTEXT = 4096


class Options(ctypes.Structure):
    """Room for any struct of options that llama.cpp returns and takes by value: above 16 bytes, on the stack."""

    _fields_ = [("bytes", ctypes.c_uint8 * 2048)]


class Text(ctypes.Structure):
    _fields_ = [("text", ctypes.c_char_p), ("length", ctypes.c_size_t), ("special", ctypes.c_bool * 2)]


def serve(text: str, mmproj: str, host: str, port: int, threads: int) -> None:
    """Serve until this process is ended."""
    wheel = importlib.import_module("xllamacpp")
    options = wheel.CommonParams()
    options.model.path, options.mmproj.path = text, mmproj
    options.hostnames, options.port, options.n_ctx, options.n_parallel = [host], port, CONTEXT, 1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    server = wheel.Server(options)
    print(server.listening_address, flush=True)
    threading.Event().wait()


def embed(text: str, mmproj: str, images: str, out: str) -> None:
    """Write what tower and projector make of each image."""
    wheel = importlib.import_module("xllamacpp.xllamacpp")
    library = ctypes.CDLL(wheel.__file__)
    pointer = ctypes.c_void_p
    returns = {
        "llama_model_default_params": (Options, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, Options]),
        "llama_model_n_embd": (ctypes.c_int32, [pointer]),
        "mtmd_context_params_default": (Options, []),
        "mtmd_init_from_file": (pointer, [ctypes.c_char_p, pointer, Options]),
        "mtmd_get_marker": (ctypes.c_char_p, [pointer]),
        "mtmd_bitmap_init": (pointer, [ctypes.c_uint32, ctypes.c_uint32, ctypes.c_char_p]),
        "mtmd_input_chunks_init": (pointer, []),
        "mtmd_tokenize": (ctypes.c_int32, [pointer, pointer, pointer, pointer, ctypes.c_size_t]),
        "mtmd_input_chunks_size": (ctypes.c_size_t, [pointer]),
        "mtmd_input_chunks_get": (pointer, [pointer, ctypes.c_size_t]),
        "mtmd_input_chunk_get_type": (ctypes.c_int, [pointer]),
        "mtmd_input_chunk_get_n_tokens": (ctypes.c_size_t, [pointer]),
        "mtmd_encode_chunk": (ctypes.c_int32, [pointer, pointer]),
        "mtmd_get_output_embd": (pointer, [pointer]),
    }
    for name, (result, taken) in returns.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, taken
    library.llama_backend_init()
    model = library.llama_model_load_from_file(text.encode(), library.llama_model_default_params())
    tower = model and library.mtmd_init_from_file(mmproj.encode(), model, library.mtmd_context_params_default())
    if not tower:
        raise SystemExit(f"llama.cpp does not load {text if not model else mmproj}.")
    marker, hidden = library.mtmd_get_marker(tower), library.llama_model_n_embd(model)
    for file in sorted(Path(images).glob("*.rgb")):
        raw = file.read_bytes()
        wide, high = struct.unpack("<II", raw[:8])
        bitmaps, chunks = (pointer * 1)(library.mtmd_bitmap_init(wide, high, raw[8:])), library.mtmd_input_chunks_init()
        said = Text(marker, len(marker), (True, True))
        if library.mtmd_tokenize(tower, chunks, ctypes.byref(said), bitmaps, 1):
            raise SystemExit(f"llama.cpp does not take the image {file.name}.")
        for number in range(library.mtmd_input_chunks_size(chunks)):
            chunk = library.mtmd_input_chunks_get(chunks, number)
            if library.mtmd_input_chunk_get_type(chunk) == 1:  # MTMD_INPUT_CHUNK_TYPE_IMAGE
                library.mtmd_encode_chunk(tower, chunk)
                size = 4 * hidden * library.mtmd_input_chunk_get_n_tokens(chunk)
                found = ctypes.string_at(library.mtmd_get_output_embd(tower), size)
                (Path(out) / f"{file.stem}.f32").write_bytes(found)


def quantize() -> None:
    """Quantize what comes in until it ends."""
    library = ctypes.CDLL(importlib.import_module("xllamacpp.xllamacpp").__file__)
    library.ggml_quantize_chunk.restype, size, pointer = ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    while line := sys.stdin.buffer.readline():
        kind, rows, columns, weighted = map(int, line.split())
        importance = sys.stdin.buffer.read(4 * columns * weighted) or None
        values, out = sys.stdin.buffer.read(4 * rows * columns), ctypes.create_string_buffer(4 * rows * columns)
        written = library.ggml_quantize_chunk(kind, values, out, 0, rows, columns, importance)
        sys.stdout.buffer.write(b"%d\n" % written + out.raw[:written])
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:5], *map(int, sys.argv[5:7]))
    elif sys.argv[1] == "embed":
        embed(*sys.argv[2:6])
    else:
        quantize()
