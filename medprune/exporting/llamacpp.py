"""Run llama.cpp out of the wheel xllamacpp, in whatever environment has it: a script, which imports nothing of ours.

    python llamacpp.py serve TEXT.gguf MMPROJ.gguf HOST PORT THREADS   an OpenAI-compatible server on this machine
    python llamacpp.py answer TEXT.gguf HOST PORT THREADS              such a server, which takes image embeddings
    python llamacpp.py embed TEXT.gguf MMPROJ.gguf IMAGES OUT          what its tower and projector make of images
    python llamacpp.py quantize                                        rows of floats, as its formats hold them

`answer` takes one user's message with one part "image_embeds", a base64 .npy of (image tokens, hidden) float32 as vLLM
takes it, and answers greedily, one question at a time. IMAGES is a folder of N.rgb files, sides in their first eight
bytes; OUT gets N.f32 of (image tokens, hidden) floats. The last writes a line once it is ready, then reads requests
from its input, `TYPE ROWS COLUMNS WEIGHTED` and that many float32 (with WEIGHTED 1 the columns' importance first), and
writes each one's bytes to its output, after their number. These three go through the C functions that the wheel
exports. Options are passed as they come, but for the first number of a context's, its length, so that nothing here
depends on their layout.
"""

import array
import ast
import base64
import ctypes
import heapq
import importlib
import json
import math
import signal
import socket
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CONTEXT = 4096
CHAT = "medprune.chat."  # keys of a GGUF: the texts of its chat template, before and after an image and a question
AT_ONCE = 512  # tokens of a prompt that are decoded together: llama.cpp ends itself where they are more than 2048
SEEN = "image_embeds"  # what is sent in place of pictures
POINTER = ctypes.c_void_p


class Options(ctypes.Structure):
    """Room for any struct of options that llama.cpp returns and takes by value: above 16 bytes, on the stack."""

    _fields_ = [("bytes", ctypes.c_uint8 * 2048)]


class Batch(ctypes.Structure):
    """llama.cpp's llama_batch: so many tokens, or embeddings; where no place is given they follow what was decoded."""

    _fields_ = [("n", ctypes.c_int32), *((name, POINTER) for name in ("token", "embd", "pos", "n_seq", "seq", "told"))]


class Text(ctypes.Structure):
    _fields_ = [("text", ctypes.c_char_p), ("length", ctypes.c_size_t), ("special", ctypes.c_bool * 2)]


def serve(text: str, mmproj: str, host: str, port: int, threads: int) -> None:
    """Serve until this process is ended."""
    wheel = importlib.import_module("xllamacpp")
    options = wheel.CommonParams()
    options.model.path, options.mmproj.path, options.model_alias = text, mmproj, {named(text)}
    options.hostnames, options.port, options.n_ctx, options.n_parallel = [host], port, CONTEXT, 1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    server = wheel.Server(options)
    print(server.listening_address, flush=True)
    threading.Event().wait()


def named(text: str) -> str:
    """Return the name of the model that a GGUF holds: its folder's, as vLLM's is."""
    return Path(text).resolve().parent.name


class Refused(ValueError):
    """What a request asks for that there is not."""


class Model:
    """A text model that is given tokens and embeddings, one conversation at a time."""

    def __init__(self, text: str, threads: int):
        integer, pointer, said = ctypes.c_int32, POINTER, ctypes.c_char_p
        self.functions = library = opened({
            "llama_model_default_params": (Options, []),
            "llama_model_load_from_file": (pointer, [said, Options]),
            "llama_model_get_vocab": (pointer, [pointer]),
            "llama_model_n_embd": (integer, [pointer]),
            "llama_model_meta_val_str": (integer, [pointer, said, said, ctypes.c_size_t]),
            "llama_context_default_params": (Options, []),
            "llama_init_from_model": (pointer, [pointer, Options]),
            "llama_n_ctx": (ctypes.c_uint32, [pointer]),
            "llama_set_n_threads": (None, [pointer, integer, integer]),
            "llama_get_memory": (pointer, [pointer]),
            "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
            "llama_tokenize": (integer, [pointer, said, integer, pointer, integer, ctypes.c_bool, ctypes.c_bool]),
            "llama_detokenize": (integer, [pointer, pointer, integer, said, integer, ctypes.c_bool, ctypes.c_bool]),
            "llama_vocab_n_tokens": (integer, [pointer]),
            "llama_vocab_is_eog": (ctypes.c_bool, [pointer, integer]),
            "llama_vocab_get_add_bos": (ctypes.c_bool, [pointer]),
            "llama_batch_get_one": (Batch, [pointer, integer]),
            "llama_decode": (integer, [pointer, Batch]),
            "llama_get_logits_ith": (pointer, [pointer, integer]),
            "llama_sampler_init_greedy": (pointer, []),
            "llama_sampler_sample": (integer, [pointer, pointer, integer]),
        })  # fmt: skip
        library.llama_backend_init()
        self.model = library.llama_model_load_from_file(text.encode(), library.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {text}.")
        options = library.llama_context_default_params()
        struct.pack_into("<I", options.bytes, 0, CONTEXT)
        self.context = library.llama_init_from_model(self.model, options)
        if not self.context or library.llama_n_ctx(self.context) != CONTEXT:
            raise SystemExit(f"llama.cpp makes no context of {CONTEXT} tokens for {text}.")
        library.llama_set_n_threads(self.context, threads, threads)
        self.vocabulary, self.greedy = library.llama_model_get_vocab(self.model), library.llama_sampler_init_greedy()
        self.hidden, self.name = library.llama_model_n_embd(self.model), named(text)
        self.chat = {key: self.meta(CHAT + key) for key in ("opening", "user", "image", "asked", "answering")}
        if not any(self.chat.values()):
            raise SystemExit(f"{text} has no {CHAT}user: it was exported with a tower that llama.cpp runs itself.")

    def meta(self, key: str) -> str:
        """Return one of the GGUF's texts; those that are empty are not written."""
        room = ctypes.create_string_buffer(2**12)
        found = self.functions.llama_model_meta_val_str(self.model, key.encode(), room, len(room))
        return room.value.decode() if found >= 0 else ""

    def tokens(self, text: str, first: bool):
        """Return a text's tokens as a C array, behind the beginning's where it is `first` and there is one."""
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 2))()
        begins = first and self.functions.llama_vocab_get_add_bos(self.vocabulary)
        n = self.functions.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), begins, True)
        return (ctypes.c_int32 * n)(*room[:n])

    def decode(self, tokens=None, embeddings=None) -> None:
        """Put a C array of tokens, or of embeddings' floats, behind what was decoded; Refused where llama.cpp does."""
        wide, given = (1, tokens) if embeddings is None else (self.hidden, embeddings)
        for start in range(0, n := len(given) // wide, AT_ONCE):
            some, at = min(AT_ONCE, n - start), ctypes.addressof(given) + 4 * wide * start
            batch = Batch(some, None, at) if tokens is None else self.functions.llama_batch_get_one(at, some)
            if status := self.functions.llama_decode(self.context, batch):
                raise Refused(f"llama.cpp decodes no batch of {some} (status {status})")

    def likeliest(self, n: int) -> list[dict]:
        """Return the n likeliest next tokens with the logarithms of their probabilities."""
        size = self.functions.llama_vocab_n_tokens(self.vocabulary)
        raw = ctypes.string_at(self.functions.llama_get_logits_ith(self.context, -1), 4 * size)
        logits = array.array("f", raw)
        most = max(logits)
        whole = most + math.log(math.fsum(math.exp(x - most) for x in logits))
        best = heapq.nlargest(n, range(size), key=logits.__getitem__)
        return [{"id": i, "token": "", "logprob": logits[i] - whole} for i in best]

    def answer(self, embeddings: bytes, question: str, most: int, top: int, past_end: bool) -> dict:
        """Answer one question about one image, as the chat-completions API says it."""
        chat, seen = self.chat, len(embeddings) // (4 * self.hidden)
        before = self.tokens(chat["opening"] + chat["user"], True)
        after = self.tokens(chat["image"] + question + chat["asked"] + chat["answering"], False)
        n = len(before) + seen + len(after)
        if n + most > CONTEXT:
            raise Refused(f"{n} tokens and {most} more do not go into {CONTEXT}")
        library = self.functions
        library.llama_memory_clear(library.llama_get_memory(self.context), True)
        self.decode(before)
        self.decode(embeddings=(ctypes.c_float * (seen * self.hidden)).from_buffer_copy(embeddings))
        self.decode(after)
        first, said, token = self.likeliest(top) if top else [], [], (ctypes.c_int32 * 1)()
        while len(said) < most:
            token[0] = library.llama_sampler_sample(self.greedy, self.context, -1)
            if library.llama_vocab_is_eog(self.vocabulary, token[0]) and not past_end:
                break
            said.append(token[0])
            if len(said) < most:
                self.decode(token)
        ids, text = (ctypes.c_int32 * len(said))(*said), ctypes.create_string_buffer(2**16)
        length = library.llama_detokenize(self.vocabulary, ids, len(said), text, len(text), False, False)
        choice = {"index": 0, "finish_reason": "length" if len(said) == most else "stop"}
        choice["message"] = {"role": "assistant", "content": text.raw[:length].decode(errors="replace")}
        choice["logprobs"] = {"content": [{"top_logprobs": first}]} if top else None
        used = {"prompt_tokens": n, "completion_tokens": len(said), "total_tokens": n + len(said)}
        return {"object": "chat.completion", "model": self.name, "choices": [choice], "usage": used}

    def complete(self, asked: dict) -> dict:
        """Answer a request; Refused where it is not one user's message of one image and a text."""
        messages = asked.get("messages")
        parts = messages[0].get("content") if isinstance(messages, list) and len(messages) == 1 else None
        kinds = [part.get("type") for part in parts] if isinstance(parts, list) else []
        if sorted(map(str, kinds)) != [SEEN, "text"]:
            raise Refused(f"give one message whose parts are one {SEEN} and one text; pictures are not taken")
        found = {part["type"]: part.get(part["type"]) for part in parts}
        embeddings = floats(base64.b64decode(found[SEEN]), self.hidden)
        top = int(asked.get("top_logprobs", 0)) if asked.get("logprobs") else 0
        most = int(asked.get("max_tokens") or CONTEXT // 4)
        if most < 1 or top < 0:
            raise Refused(f"max_tokens is {most}, top_logprobs {top}: give at least 1 and 0")
        return self.answer(embeddings, found["text"], most, top, bool(asked.get("ignore_eos")))


def floats(data: bytes, hidden: int) -> bytes:
    """Return the numbers of a .npy file of (image tokens, hidden) float32; Refused where it is another."""
    try:
        if data[:6] != b"\x93NUMPY":
            raise ValueError("it has not the beginning of one")
        size = 2 if data[6] == 1 else 4
        ends = 8 + size + int.from_bytes(data[8 : 8 + size], "little")
        said = ast.literal_eval(data[8 + size : ends].decode("latin1"))
        (rows, columns) = said["shape"]
        if (said["descr"], said["fortran_order"], columns) != ("<f4", False, hidden):
            raise ValueError(f"it is {said}")
        if rows < 1 or len(data) - ends != 4 * rows * columns:
            raise ValueError(f"{len(data) - ends} bytes are not {rows} x {columns} numbers")
    except (ValueError, SyntaxError, KeyError, TypeError, IndexError) as error:
        raise Refused(f"image_embeds is no .npy of (image tokens, {hidden}) float32: {error}") from None
    return data[ends:]


def answer(text: str, host: str, port: int, threads: int) -> None:
    """Serve until this process is ended, what is sent in place of pictures being their embeddings."""
    model, one = Model(text, threads), threading.Lock()
    listed = {"id": model.name, "object": "model", "owned_by": "llama.cpp", "input_modalities": [SEEN]}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60  # seconds that a client may say nothing

        def log_message(self, *_):
            pass

        def do_GET(self):
            said = {"/health": {"status": "ok"}, "/v1/models": {"object": "list", "data": [listed]}}
            self.reply(200 if self.path in said else 404, said.get(self.path, {"error": "not found"}))

        def do_POST(self):
            length = self.headers.get("Content-Length") or "0"
            if not (length.isdecimal() and len(length) < 10):
                self.close_connection = True  # for nobody knows where the next request begins
                return self.reply(400, {"error": {"message": f"Content-Length is {length}, no number of bytes"}})
            raw = self.rfile.read(int(length))
            if self.path != "/v1/chat/completions":
                return self.reply(404, {"error": "not found"})
            try:
                asked = json.loads(raw)
                with one:
                    said = 200, model.complete(asked)
            except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                said = 400, {"error": {"message": str(error)}}
            self.reply(*said)

        def reply(self, status: int, said: dict):
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    if ":" in host:
        ThreadingHTTPServer.address_family = socket.AF_INET6
    ThreadingHTTPServer((host, port), Handler).serve_forever()


def opened(functions: dict):
    """Return the library that the wheel holds; functions: {name: (what it returns, what it takes)}."""
    library = ctypes.CDLL(importlib.import_module("xllamacpp.xllamacpp").__file__)
    for name, (result, taken) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, taken
    return library


def embed(text: str, mmproj: str, images: str, out: str) -> None:
    """Write what tower and projector make of each image."""
    pointer = POINTER
    library = opened({
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
    })  # fmt: skip
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
    size, pointer = ctypes.c_int64, POINTER
    taken = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    library = opened({"ggml_quantize_chunk": (ctypes.c_size_t, taken)})
    print("ready", flush=True)
    while line := sys.stdin.buffer.readline():
        kind, rows, columns, weighted = map(int, line.split())
        importance = sys.stdin.buffer.read(4 * columns * weighted) or None
        values, out = sys.stdin.buffer.read(4 * rows * columns), ctypes.create_string_buffer(4 * rows * columns)
        written = library.ggml_quantize_chunk(kind, values, out, 0, rows, columns, importance)
        sys.stdout.buffer.write(b"%d\n" % written + out.raw[:written])
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:5], *map(int, sys.argv[5:7]))
    elif sys.argv[1] == "answer":
        answer(*sys.argv[2:4], *map(int, sys.argv[4:6]))
    elif sys.argv[1] == "embed":
        embed(*sys.argv[2:6])
    else:
        quantize()
