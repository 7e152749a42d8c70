"""`medprune ask` says in one sentence what cannot be asked."""

import http.server
import json
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from PIL import Image
from test_cli import medprune

from medprune.exporting import asking, engines
from medprune.models.loading import save
from medprune.quantizing.checkpoint import save_quantized
from medprune.quantizing.quantize import quantize


@pytest.fixture
def runs(tiny, tmp_path):
    """Return a folder of runs: of `demo`, the tiny base as original and rounded to 4 bits."""
    model, processor = tiny
    save(model, processor, tmp_path / "demo/01_finetune/model")
    model, info = quantize(model, "rtn", 4, 32)
    save_quantized(model, tmp_path / "demo/05_awq_vs_bnb/quantized/rtn-original", "rtn", info, processor)
    return tmp_path


@pytest.mark.parametrize("words,why", [
    (("demo:original", "IMAGE", "  "), "the question is empty"),
    (("demo:original", "IMAGE", "what <image>?"), "the question holds <image>"),
    (("demo:original", "nowhere.png", "What?"), "nowhere.png' is not there"),
    (("demo:original", "BROKEN", "What?"), "cannot be read as an image"),
    (("demo:original", "IMAGE", "What?", "--tokens", "0"), "--tokens is 0"),
    (("demo:awq-pruned-2", "IMAGE", "What?"), "keeps no folder of 'awq-pruned-2'; it keeps original, rtn-original"),
    (("other:original", "IMAGE", "What?"), "there is no run 'other'"),
    (("nowhere", "IMAGE", "What?"), "nowhere is not there"),
    (("demo:original", "IMAGE", "What?", "--beside", "nowhere"), "nowhere is not there"),
])  # fmt: skip
def test_what_cannot_be_asked_is_said_before_loading(runs, rows, tmp_path, monkeypatch, capsys, words, why):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    places = {"IMAGE": rows[0]["path"], "BROKEN": tmp_path / "broken.png"}
    monkeypatch.setattr(asking, "load_folder", lambda *_: pytest.fail("a model was loaded"))
    assert medprune(monkeypatch, "ask", *(places.get(w, w) for w in words), "--runs-dir", runs) == 2
    said = capsys.readouterr().err
    assert why in said and said.strip().count("\n") == 0


def test_the_program_ends_with_what_it_said_and_its_status(runs, rows, tmp_path):
    words = [sys.executable, "-m", "medprune", "ask", "demo:original", rows[0]["path"], "What is it?", "--tokens", "2"]
    said = subprocess.run([*words, "--runs-dir", str(runs)], capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.strip() and "nanobind" not in said.stderr, said.stderr
    words[5] = str(tmp_path / "nowhere.png")
    said = subprocess.run([*words, "--runs-dir", str(runs)], capture_output=True, text=True)
    assert said.returncode == 2 and said.stderr.strip().endswith("nowhere.png' is not there, or no file: give a picture.")


def test_two_models_answer_side_by_side(runs, rows, monkeypatch, capsys):
    words = ("ask", "demo:original", rows[0]["path"], "What is it?", "--tokens", "2", "--timing", "--runs-dir", runs)
    assert medprune(monkeypatch, *words, "--beside", "demo:original") == 0
    said = capsys.readouterr()
    lines = said.out.strip().splitlines()
    assert len(lines) == 2 and all(line.startswith("demo:original: ") for line in lines) and lines[0] == lines[1]
    assert said.err.count("for 2 tokens") + said.err.count("for 1 tokens") == 2 and "to load" in said.err


@contextmanager
def saying(models: bytes, answer: bytes, missing: int = 0, status: int = 200):
    """Give the address of a server that answers with these bytes, and tells of so many more than it sends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, status, data, missing):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data) + missing))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.reply(200, models, 0)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(status, answer, missing)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


MODELS = b'{"data": [{"id": "m"}]}'
GOOD = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 5}}


def told(**values) -> bytes:
    return json.dumps(GOOD | values).encode()


@pytest.mark.parametrize("models,answer,options,why", [
    (b"[1]", b"", {}, "it says [1]"),
    (b'{"data": [{"name": "x"}]}', b"", {}, 'it says {"data": [{"name": "x"}]}'),
    (b'{"data": null}', b"", {}, 'it says {"data": null}'),
    (b'{"data": []}', b"", {}, "serves no model"),
    (b'{"data": "caf\xe9"}', b"", {}, "utf-8"),
    (b"[" * 100000, b"", {}, "recursion"),
    (MODELS, told()[:30], {"missing": 100}, "IncompleteRead"),
    (MODELS, b"boom", {"status": 500}, "refuses: boom"),
    (MODELS, b"boom", {"status": 500, "missing": 9}, "refuses: HTTP 500"),
    (MODELS, b'{"error": {"message": "overloaded"}}', {}, "overloaded"),
    (MODELS, b"[]", {}, "it says []"),
    (MODELS, told(choices=[]), {}, 'it says {"choices": []'),
    (MODELS, told(usage=None), {}, '"usage": null'),
    (MODELS, told(choices=[{"message": None}]), {}, '"message": null'),
    (MODELS, told(choices=[{"message": {"content": ["hi"]}}]), {}, '["hi"]'),
    (MODELS, told(choices=[{"message": {"content": "hi"}, "logprobs": {"content": [1]}}]), {}, "[1]"),
])  # fmt: skip
def test_a_server_of_another_form_is_one_sentence(models, answer, options, why):
    with saying(models, answer, **options) as url, pytest.raises(ValueError) as raised:
        engines.ask_server(url, Image.new("RGB", (8, 8)), "What?", 3)
    said = str(raised.value)
    assert why in said and url in said and "\n" not in said and len(said) < 500


def test_an_address_that_is_none_or_no_http_is_one_sentence():
    with http.server.HTTPServer(("127.0.0.1", 0), None) as server:  # whose handler fails: it answers nothing
        server.RequestHandlerClass = lambda connection, *_: connection.sendall(b"SSH-2.0-OpenSSH_9\r\n")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for url in (f"http://127.0.0.1:{server.server_port}", "http://127.0.0.1:port", "localhost", "http://a b"):
            with pytest.raises(ValueError, match=f"{url}/v1/models does not answer as an OpenAI-compatible server: ."):
                engines.served(url)
            assert not engines._healthy(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_probabilities_that_are_not_told_are_none():
    choice = GOOD["choices"][0] | {"logprobs": {"content": [{"token": "a", "top_logprobs": None}]}}
    with saying(MODELS, told(choices=[choice])) as url:
        assert engines.ask_server(url, Image.new("RGB", (8, 8)), "What?", 3) == engines.Reply("hi", True, 5, {})


def test_no_proxy_sees_a_picture_that_stays_on_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with saying(MODELS, told()) as url:
        assert engines.ask_server(url, Image.new("RGB", (8, 8)), "What?", 3).text == "hi" and engines._healthy(url)
    with pytest.raises(ValueError, match="Connection refused"):  # of the proxy, by which others are reached
        engines.served("http://gpu.invalid:8000")


def test_an_engine_that_does_not_answer_is_not_said_to_have_ended(monkeypatch):
    monkeypatch.setattr(engines, "START_S", 0.1)
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(ValueError, match="X does not serve: it did not answer at http://127.0.0.1:.* within 0.1 s"):  # noqa: SIM117
        with engines.started(words, engines.free_port(), 1, "X does not serve"):
            pass
