"""A tower that engines do not know goes apart: they are sent what it makes of pictures, and answer as here."""

import base64
import http.client
import io
import json
import os
import socket
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from exported import retold, served
from safetensors.torch import load_file, save_file
from test_cli import medprune
from test_gguf import read
from test_parity import here

from medprune.exporting import engines, llamacpp, parity
from medprune.exporting.folders import APART, embed, export_hub, image_embeddings, open_source
from medprune.exporting.gguf import TEXT, export_gguf
from medprune.exporting.vocabulary import chat_pieces, server_template
from medprune.models.families import hub_name, of_tower
from medprune.models.loading import load
from medprune.quantizing.checkpoint import save_quantized
from medprune.quantizing.quantize import quantize


@pytest.mark.parametrize("write", [export_hub, export_gguf])
def test_text_goes_to_the_engine_and_the_tower_apart(odd, rows, tmp_path, write):
    write(open_source(odd), out := tmp_path / "out")
    tower, whole = load_file(out / APART / "model.safetensors"), load_file(odd / "model.safetensors")
    model, processor = load(odd, dtype=torch.float32)
    assert tower and all(map(of_tower, tower)) and {n for n in model.state_dict() if of_tower(n)} == tower.keys()
    paths = [row["path"] for row in rows]
    found, wanted = embed(out, paths), image_embeddings(model, processor, paths)
    assert found.keys() == wanted.keys() == set(paths) and next(iter(found.values())).shape == (4, 64)
    assert all(np.array_equal(found[p], wanted[p]) for p in wanted)
    assert len({e.tobytes() for e in found.values()}) == 3, "pictures differ"
    if write is export_hub:
        text = load_file(out / "model.safetensors")
        assert len(text) + len(tower) == len(whole) and not any("tower" in name or "projector" in name for name in text)
        assert all(torch.equal(tensor, model.state_dict()[f"model.{n}".replace("language_model.model", "language_model")])
                   for n, tensor in text.items() if "lm_head" not in n)  # fmt: skip
        config = json.loads((out / "config.json").read_text())
        assert config["vision_config"] | {"image_size": 64, "patch_size": 32} == config["vision_config"]
        assert config["vision_config"]["model_type"] == "clip_vision_model" and config["vision_feature_layer"] == -1
    else:
        assert {f.name for f in out.iterdir()} == {TEXT, APART, "README.md"}
        keys, _ = read(out / TEXT)
        pieces = {k.removeprefix(llamacpp.CHAT): v for k, v in keys.items() if k.startswith(llamacpp.CHAT)}
        assert pieces == {k: v for k, v in chat_pieces(processor).items() if v}
    assert "image_embeds" in (out / "README.md").read_text() and engines.is_apart(out)
    assert parity.size_of(out) == sum(f.stat().st_size for f in out.rglob("*") if f.suffix in (".safetensors", ".gguf"))


def test_shards_keep_what_is_the_text_model_s(odd, tmp_path):
    whole = load_file(odd / "model.safetensors")
    names, files = sorted(whole), {}
    for number, part in enumerate((names[::2], names[1::2], [n for n in names if "vision_tower" in n][:1]), 1):
        file = f"model-0000{number}-of-00003.safetensors"
        taken = [n for n in part if n not in files and not (number < 3 and n == [m for m in names if "vision_tower" in m][0])]
        save_file({n: whole[n] for n in taken}, odd / file, {"format": "pt"})
        files |= dict.fromkeys(taken, file)
    (odd / "model.safetensors").unlink()
    (odd / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    export_hub(open_source(odd), out := tmp_path / "out")
    kept = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert {f.name for f in out.glob("*.safetensors")} == set(kept.values()) and len(set(kept.values())) == 2
    for place, other in ((out, False), (out / APART, True)):
        listed = json.loads((place / "model.safetensors.index.json").read_text())["weight_map"]
        stored = {n: load_file(place / file)[n] for n, file in listed.items()}
        wanted = {n: t for n, t in whole.items() if ("vision_tower" in n or "projector" in n) == other}
        spelled = stored if not other else {hub_name(n): t for n, t in stored.items()}
        short = {n.replace("vision_model.", ""): t for n, t in spelled.items()}
        assert short.keys() == wanted.keys() and all(torch.equal(short[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("write", [export_hub, export_gguf])
def test_parity_sends_embeddings_and_names_another_tower(odd, rows, tmp_path, write):
    write(open_source(odd), out := tmp_path / "out")
    model, processor = load(odd, dtype=torch.float32)
    asked = [{k: r[k] for k in ("path", "question")} for r in rows]
    with served(model, processor, server_template(processor)) as url:
        found = parity.parity(odd, out, asked, url, max_new_tokens=6)
        assert found["faults"] == [] and found["equal_tokens"] == 1 and found["kl_nats"] < 1e-6
        here = parity.ask_here(odd, asked, 2)
        assert here.misplaced is None and parity.probe(here, out) == ([], 0.0)
        file = out / APART / "model.safetensors"
        other = {n: t * (-8 if "linear_2.weight" in n else 1) for n, t in load_file(file).items()}
        save_file(other, file, {"format": "pt"})
        (fault,), worst = parity.probe(here, out)
        assert "tower, projector or pictures are not the model's" in fault and worst > 0.1
        assert any("first tokens diverge" in f for f in parity.parity(odd, out, asked, url, max_new_tokens=6)["faults"])
    file.unlink()
    with pytest.raises(ValueError, match="lacks model"):
        embed(out, [rows[0]["path"]])


def test_a_tower_that_engines_know_goes_apart_when_asked(family, rows, tmp_path):
    folder = family("llama", False)
    retold(folder, vision_feature_layer=-2)
    export_hub(open_source(folder, apart=True), tmp_path / "hub")
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["vision_feature_layer"] == -1
    export_gguf(open_source(folder, apart=True), out := tmp_path / "out")
    assert engines.engine_of(out) == "llama.cpp" and not (out / engines.MMPROJ).exists()
    model, processor = load(folder, dtype=torch.float32)
    asked = [{k: r[k] for k in ("path", "question")} for r in rows[:3]]
    with served(model, processor, server_template(processor)) as url:
        found = parity.parity(folder, out, asked, url, max_new_tokens=4)
    assert found["faults"] == [] and found["equal_tokens"] == 1


def test_a_server_is_asked_what_its_folder_needs(odd, family, rows, tmp_path, monkeypatch, capsys):
    export_gguf(open_source(odd), apart := tmp_path / "apart")
    export_gguf(open_source(family("llama", False)), pair := tmp_path / "pair")
    model, processor = load(odd, dtype=torch.float32)
    sent, put = [], engines.ask_server
    monkeypatch.setattr(engines, "ask_server", lambda *given: sent.append(given[1]) or put(*given))
    with served(model, processor, server_template(processor)) as url:
        words = ("ask", apart, rows[0]["path"], "What is it?", "--tokens", 3, "--url", url + "/v1")
        assert medprune(monkeypatch, *words) == 0
        said = capsys.readouterr().out.strip()
        assert said == parity.ours(model, processor, [{"path": rows[0]["path"], "question": "What is it?"}], 3).texts[0]
        assert medprune(monkeypatch, "ask", pair, rows[0]["path"], "What is it?", "--tokens", 3, "--url", url) == 0
    assert sent[0].shape == (4, 64) and sent[1].size == (40, 40), "the middle square of 40 x 48"
    assert medprune(monkeypatch, *words, "--beside", apart) == 2
    assert "leave --beside out" in capsys.readouterr().err


def test_what_cannot_go_apart_is_one_sentence(odd, tiny, tmp_path, monkeypatch, capsys):
    assert medprune(monkeypatch, "export", odd, tmp_path / "x", "--to", "hub") == 2
    assert "plain transformers loads no tower apart (efficientnet_lite): give --to vllm or gguf." in capsys.readouterr().err
    model, info = quantize(tiny[0], "rtn", 4, 32, quantize_vision=8)
    save_quantized(model, tmp_path / "q", "rtn", info, tiny[1])
    assert medprune(monkeypatch, "export", tmp_path / "q", tmp_path / "x", "--to", "gguf", "--apart") == 2
    assert "in 8 bits: a tower goes apart in 16 bits only" in capsys.readouterr().err and not (tmp_path / "x").exists()
    export_gguf(open_source(odd), out := tmp_path / "out")
    own = tmp_path / "llama-server"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("MEDPRUNE_LLAMACPP", str(own))
    assert medprune(monkeypatch, "serve", out) == 2
    assert "takes no image embeddings, which this folder needs" in capsys.readouterr().err


def test_engines_are_started_for_embeddings(odd, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDPRUNE_LLAMACPP", os.sys.executable)
    monkeypatch.setenv("MEDPRUNE_VLLM", os.sys.executable)
    export_gguf(open_source(odd), tmp_path / "g")
    export_hub(open_source(odd), tmp_path / "v")
    words = engines.command(tmp_path / "g", "127.0.0.1", 8080, 2)
    assert words[2:] == ["answer", str(tmp_path / "g" / TEXT), "127.0.0.1", "8080", "2"]
    words = engines.command(tmp_path / "v", "127.0.0.1", 8080, 2)
    assert words[-3:] == ["--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 0}']


def npy(array) -> bytes:
    np.save(held := io.BytesIO(), array)
    return held.getvalue()


@pytest.mark.parametrize("data,why", [
    (b"\x89PNG", "not the beginning"),
    (npy(np.zeros((2, 3), "<f4")), r"it is \{"),
    (npy(np.zeros((2, 4), "<f8")), "it is {"),
    (npy(np.zeros(4, "<f4")), "unpack"),
    (npy(np.zeros((2, 4), "<f4"))[:-1], "31 bytes are not 2 x 4 numbers"),
    (npy(np.zeros((0, 4), "<f4")), "0 bytes are not 0 x 4"),
    (npy(np.zeros((2, 4), "<f4"))[:20], ""),
])  # fmt: skip
def test_embeddings_of_another_form_are_refused(data, why):
    with pytest.raises(llamacpp.Refused, match=r"no .npy of \(image tokens, 4\) float32: .*" + why):
        llamacpp.floats(data, 4)
    assert np.frombuffer(llamacpp.floats(npy(np.arange(8, dtype="<f4").reshape(2, 4)), 4), "<f4").tolist() == list(range(8))


@pytest.mark.parametrize("asked", [
    {}, {"messages": []}, {"messages": [{"role": "user", "content": "What?"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "What?"}]}]},
])  # fmt: skip
def test_a_request_without_embeddings_is_refused(asked):
    with pytest.raises(llamacpp.Refused, match="one image_embeds and one text; pictures are not taken"):
        llamacpp.Model.complete(types.SimpleNamespace(hidden=4), asked)


@pytest.fixture
def answering(monkeypatch):
    """Return the port of the server for embeddings, with a stand-in for its model that answers what it is asked."""

    class Model:
        name = "tiny"

        def __init__(self, *_):
            self.asked = 0

        def complete(self, asked):
            self.asked += 1
            time.sleep(0.01)
            self.asked -= 1
            return {"together": self.asked, "most": int(asked["most"])}

    monkeypatch.setattr(llamacpp, "Model", Model)
    threading.Thread(target=llamacpp.answer, args=("", "127.0.0.1", port := engines.free_port(), 1), daemon=True).start()
    while not engines._healthy(f"http://127.0.0.1:{port}"):
        time.sleep(0.01)
    return port


def test_a_client_that_says_nothing_keeps_nobody_waiting(answering):
    with socket.create_connection(("127.0.0.1", answering)) as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert b"200 OK" in idle.recv(1000) and engines._healthy(f"http://127.0.0.1:{answering}")
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda n: engines._complete(f"http://127.0.0.1:{answering}", {"most": n}), range(8)))
    assert said == [{"together": 0, "most": n} for n in range(8)]


@pytest.mark.parametrize("length,body,why", [
    (None, b'{"most": Infinity}', "infinity"),
    (None, b"[" * 100000, "recursion"),
    (None, b"\xff", "utf-8"),
    (None, b"[]", "indices"),
    ("-1", b"", "Content-Length is -1, no number of bytes"),
    ("all", b"", "Content-Length is all, no number"),
    ("9" * 30, b"", "no number of bytes"),
])  # fmt: skip
def test_an_odd_request_is_refused_in_one_sentence(answering, length, body, why):
    client = http.client.HTTPConnection("127.0.0.1", answering, timeout=5)
    headers = {"Content-Length": length or str(len(body))}
    client.request("POST", "/v1/chat/completions", body, headers)
    answered = client.getresponse()
    assert answered.status == 400 and why in json.loads(answered.read())["error"]["message"]
    client.close()
    assert engines._complete(f"http://127.0.0.1:{answering}", {"most": 1})["most"] == 1


@pytest.mark.skipif(not here, reason="llama.cpp (xllamacpp) is neither installed nor named by MEDPRUNE_LLAMACPP")
def test_llama_cpp_answers_from_embeddings_as_here(odd, family, rows, tmp_path):
    """Where CLIP goes apart, its class token is not misplaced either, as stock llama.cpp has it (issue 25814)."""
    asked = [{k: r[k] for k in ("path", "question")} for r in rows]
    for number, (folder, apart) in enumerate([(odd, False), (family("llama", False), True)]):
        export_gguf(open_source(folder, apart), out := tmp_path / str(number))
        found = parity.parity(folder, out, asked, max_new_tokens=8)
        assert found["faults"] == [] and found["embedding_error"] == 0 and found["equal_tokens"] > 0.9
        assert (found["table"]["prompt_tokens"] == found["table"]["their_prompt_tokens"]).all()
    with engines.running(out) as server:
        for length in (1000, 3000):  # of more than 2048 in one piece llama.cpp ends itself
            seen = np.zeros((length, 64), "<f4")
            for question in ("What?", " a" * 1000):
                assert engines.ask_server(server.address, seen, question, 2).prompt_tokens > length
        with pytest.raises(ValueError, match="max_tokens is -3"):
            engines.ask_server(server.address, seen, "What?", -3)
        ask = {"model": "x", "messages": [], "temperature": 0}
        with pytest.raises(ValueError, match="refuses: .*pictures are not taken"):
            engines._complete(server.address, ask)
        long = {"type": "image_embeds", "image_embeds": base64.b64encode(npy(np.zeros((4096, 64), "<f4"))).decode()}
        ask["messages"] = [{"role": "user", "content": [long, {"type": "text", "text": "What?"}]}]
        with pytest.raises(ValueError, match="do not go into 4096"):
            engines._complete(server.address, ask)
