"""What notebook 08 does: exported once, asked once, and llama.cpp's own types as llama-quantize would choose them."""

import sys
import threading
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace

import gguf
import numpy as np
import psutil
import pytest
import torch
from exported import batch_of, served
from gguf import GGMLQuantizationType as Kind
from test_gguf import text_weight
from test_parity import here as llama_cpp_is_here

from medprune.exporting import engines, parity
from medprune.exporting import gguf as ours
from medprune.exporting.engines import TEXT
from medprune.exporting.folders import open_source
from medprune.exporting.vocabulary import server_template
from medprune.models.families import parts
from medprune.models.loading import load, load_processor, save
from medprune.settings import resolve
from medprune.store import Run


@pytest.fixture
def run(tmp_path):
    found = Run(tmp_path / "demo", "08_deploy")
    found.dir.mkdir(parents=True)
    return found


@pytest.fixture
def served_model(family, run, rows, monkeypatch):
    """Return (exported folder, its questions, pictures, starts) of a model that a stand-in serves for its engine."""
    folder = family("llama", False)
    model, processor = load(folder, dtype=torch.float32)
    starts = []

    @contextmanager
    def running(folder, threads):
        with served(model, processor, server_template(processor)) as url:
            starts.append(folder)
            yield engines.Server(url, 1.5, psutil.Process())

    monkeypatch.setattr(engines, "running", running)
    monkeypatch.setattr(engines, "version", lambda engine: f"{engine} 1.0")
    asked = [{k: r[k] for k in ("id", "path", "question")} | {"asked": r["id"]} for r in rows[:4]]
    return parity.export_once(run, folder, "original", "llama.cpp"), asked, parity.pictures_of(processor, asked), starts


def test_an_engine_is_asked_once_and_goes_on_where_it_was_killed(run, served_model, monkeypatch):
    folder, asked, pictures, starts = served_model
    put, told = engines.ask_server, []

    def dies(*given):
        if len(told) == 2:
            raise KeyboardInterrupt
        told.append(given)
        return put(*given)

    monkeypatch.setattr(engines, "ask_server", dies)
    with pytest.raises(KeyboardInterrupt):
        parity.ask_engine(run, folder, "a", pictures, asked, 6, 1)
    monkeypatch.setattr(engines, "ask_server", lambda *given: told.append(given) or put(*given))
    rows, replies, costs = parity.ask_engine(run, folder, "a", pictures, asked, 6, 1)
    assert len(starts) == 2 and [given[2] for given in told] == [q["question"] for q in asked]
    assert [r["answer"] for r in rows] == [r.text for r in replies] and {r["method"] for r in rows} == {"a"}
    assert costs["load_s"] == 1.5 and costs["version"] == "llama.cpp 1.0" and costs["ms_per_token"] > 0
    assert costs["peak_bytes"] > 2**20
    again = parity.ask_engine(run, folder, "a", pictures, asked, 6, 1)
    assert again == (rows, replies, costs) and len(starts) == 2, "nothing was asked a second time"
    monkeypatch.setattr(engines, "version", lambda engine: f"{engine} 2.0")
    parity.ask_engine(run, folder, "a", pictures, asked, 6, 1)
    assert len(starts) == 3 and len(told) == 8, "another version of the engine is asked anew"


def test_what_was_answered_beside_a_slow_question_is_kept(run, served_model, monkeypatch):
    folder, asked, pictures, _ = served_model
    (folder / "medprune.json").write_text('{"context": "c", "served_by": {"address": "http://127.0.0.1:1", "model": "m"}}')
    others = threading.Semaphore(0)

    def put(address, picture, question, *_):
        if question == "first":
            assert all(others.acquire(timeout=5) for _ in range(3))
            raise ValueError("HTTP 500")
        others.release()
        return engines.Reply("red", True, 5, {})

    monkeypatch.setattr(engines, "ask_server", put)
    asked[0]["question"] = "first"
    with pytest.raises(ValueError, match="HTTP 500"):
        parity.ask_engine(run, folder, "a", pictures, asked, 6, 1)
    (context,) = {row[0] for row in run.units("x")._ask("SELECT DISTINCT context FROM units")}
    assert [f"a {q['id']}" in run.units(context) for q in asked] == [False, True, True, True]


def test_a_server_that_runs_already_is_asked_by_its_address(run, family, rows, monkeypatch):
    folder = family("llama", False)
    model, processor = load(folder, dtype=torch.float32)
    asked = [{k: r[k] for k in ("id", "path", "question")} | {"asked": r["id"]} for r in rows]
    monkeypatch.setattr(engines.subprocess, "Popen", lambda *_, **__: pytest.fail("an engine was started"))
    put, wanted = engines.post, []
    monkeypatch.setattr(engines, "post", lambda url, body=None: wanted.append((body or {}).get("model")) or put(url, body))
    with served(model, processor, server_template(processor)) as url:
        assert engines.version(f"{url}/v1") == "a server of no stated version"
        with pytest.raises(ValueError, match="has other, tiny, not original: serve an export in a folder of that name"):
            parity.export_once(run, folder, "original", url)
        out = parity.export_once(run, folder, "tiny", f"{url}/v1")
        assert parity.export_once(run, folder, "tiny", f"{url}/v1") == out and "/" not in out.name
        assert [f.name for f in out.iterdir()] == ["medprune.json"] and np.isnan(parity.size_of(out))
        pictures = parity.pictures_of(processor, asked)
        said, replies, costs = parity.ask_engine(run, out, "tiny there", pictures, asked, 6, 1)
        monkeypatch.setattr(engines, "ask_server", lambda *_: pytest.fail("asked again"))
        assert parity.ask_engine(run, out, "tiny there", pictures, asked, 6, 1)[1] == replies
    assert [a["answer"] for a in said] == parity.ours(model, processor, asked, 6).texts
    assert {m for m in wanted if m} == {"tiny"} and costs["ms_per_token"] > 0
    assert np.isnan([costs["load_s"], costs["peak_bytes"]]).all() and engines.embeddings(out, []) is None
    with pytest.raises(ValueError, match="does not answer as an OpenAI-compatible server"):
        parity.ask_engine(run, out, "tiny there", pictures, asked, 6, 1)


def test_a_server_s_odd_tower_goes_apart_to_it(run, odd, rows, monkeypatch):
    model, processor = load(odd, dtype=torch.float32)
    asked = [{k: r[k] for k in ("id", "path", "question")} | {"asked": r["id"]} for r in rows]
    with served(model, processor, server_template(processor)) as url:
        out = parity.export_once(run, odd, "tiny", url)
        assert engines.is_apart(out) and not list(out.glob("*.safetensors"))
        pictures, sent, put = parity.pictures_of(processor, asked), [], engines.ask_server
        monkeypatch.setattr(engines, "ask_server", lambda *given: sent.append(given[1]) or put(*given))
        said, *_ = parity.ask_engine(run, out, "odd there", pictures, asked, 6, 1)
    assert {e.shape for e in sent} == {(4, 64)}, "embeddings, not pictures"
    assert [a["answer"] for a in said] == parity.ours(model, processor, asked, 6).texts
    assert engines.wants_embeddings({"id": "a", "input_modalities": ["image_embeds"]})
    assert not engines.wants_embeddings({"id": "a"})


@pytest.mark.parametrize("engine", ["llamacpp", "ftp://a", "http://", "http://a b", "http://a/v2"])
def test_engines_are_names_or_addresses(engine):
    with pytest.raises(ValueError, match=r"engines has .*: give llama.cpp, vLLM or an address such as http://localhost:8000"):
        resolve("smoke", engines=[engine])
    assert resolve("smoke", engines=["vLLM", "http://gpu-1:8000/v1"]).engines == ("vLLM", "http://gpu-1:8000/v1")


def test_answers_say_whether_they_ended(run, served_model):
    folder, asked, pictures, _ = served_model
    rows, _, _ = parity.ask_engine(run, folder, "a", pictures, asked[:1], 2, 1)
    assert rows[0]["ended"] is False


def test_an_export_is_made_once_and_anew_for_other_weights(run, family, monkeypatch):
    folder, written = family("llama", False), []
    write = parity.WAYS["vLLM"]
    monkeypatch.setitem(parity.WAYS, "vLLM", lambda *a, **k: written.append(a) or write(*a, **k))
    out = parity.export_once(run, folder, "original", "vLLM")
    parity.add_parity(out, ["checked"])
    assert parity.export_once(run, folder, "original", "vLLM") == out and len(written) == 1
    assert parity.size_of(out) == (out / "model.safetensors").stat().st_size
    other = family("mistral", False)
    parity.export_once(run, other, "original", "vLLM")
    (out / "config.json").unlink()
    parity.export_once(run, other, "original", "vLLM")
    assert len(written) == 3
    one = parity.export_once(run, folder, "x", "vLLM", lambda source, out, scale, **record: write(source, out, **record), scale={"a": torch.ones(2)})
    stamp = (one / "config.json").stat().st_mtime_ns
    again = parity.export_once(run, folder, "x", "vLLM", lambda source, out, scale, **record: write(source, out, **record), scale={"a": torch.zeros(2)})
    assert (again / "config.json").stat().st_mtime_ns != stamp, "other importances make another file"


def test_models_whose_folders_are_not_kept_are_not_deployed():
    assert resolve("smoke").deployed == ("awq-recovered", "found")
    assert resolve("smoke", kept_methods=["rtn"]).deployed == ("found",)
    assert resolve("smoke", kept_methods=["awq", "rtn"], deployed=["rtn-recovered"]).deployed == ("rtn-recovered",)
    with pytest.raises(ValueError, match="deployed has 'awq-original', of which no folder is kept: name found, "):
        resolve("smoke", kept_methods=["rtn"], deployed=["awq-original"])


def test_replies_are_held_against_others_of_the_engine(tiny):
    tokenizer = tiny[1].tokenizer
    said = [engines.Reply("red scales", True, 5, {0: np.log(0.5), 1: np.log(0.4)})]
    assert parity.against(tokenizer, said, said) == {"equal_tokens": 1.0, "kl_nats": pytest.approx(0)}
    other = [engines.Reply("blue", True, 5, {0: np.log(0.25), 1: np.log(0.4)})]
    found = parity.against(tokenizer, other, said)
    assert found["equal_tokens"] < 0.5 and found["kl_nats"] == pytest.approx(0.5 * np.log(2) + 0.1 * np.log(0.1 / 0.35), rel=1e-6)


def test_an_engine_says_its_version(monkeypatch, tmp_path):
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho version: 9 >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("MEDPRUNE_LLAMACPP", str(program))
    assert engines.version("llama.cpp") == "version: 9"
    with pytest.raises(ValueError, match="is no python that has xllamacpp"), engines.quantizer():
        pass
    for said, wanted in (
        ("ggml_cuda_init: found 1 CUDA devices:\nversion: 4991 (0306aad1)\nbuilt with cc", "version: 4991 (0306aad1)"),
        ("INFO 11-26 10:00:00 __init__.py:190] platform cuda.\n0.7.2", "0.7.2"),
        ("loading\nbuild nine", "build nine"),
    ):
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n")
        assert engines.version("llama.cpp") == wanted
    program.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(ValueError, match="does not say its version: nothing"):
        engines.version("llama.cpp")
    monkeypatch.setitem(engines._PROGRAMS, "vLLM", ("vllm", "torch", "MEDPRUNE_VLLM"))
    monkeypatch.setenv("MEDPRUNE_VLLM", sys.executable)
    assert engines.version("vLLM") == f"torch {torch.__version__}"


@pytest.mark.skipif(find_spec("xllamacpp") is not None, reason="xllamacpp is installed here")
def test_a_python_without_the_library_is_named(monkeypatch, capfd):
    monkeypatch.setenv("MEDPRUNE_LLAMACPP", sys.executable)
    with pytest.raises(ValueError, match="python.* is no python that has xllamacpp, .*: it says ModuleNotFoundError"), engines.quantizer():
        pass
    assert not capfd.readouterr().err


def test_a_server_that_ends_early_is_not_timed(monkeypatch):
    monkeypatch.setattr(engines, "_question", lambda *_: {})
    monkeypatch.setattr(engines, "_complete", lambda address, body: {"usage": {"completion_tokens": 1}})
    with pytest.raises(ValueError, match="ended after 1 of 33 tokens: it does not know ignore_eos"):
        engines.ms_per_token("http://127.0.0.1:1", None, "What?")


# ---- llama.cpp's own types
MORE = {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27}  # blocks of 28 that llama-quantize gives more bits


@pytest.mark.parametrize("mixture,part,kinds", [
    ("Q4_K_M", "attn_v", {b: Kind.Q6_K if b in MORE else Kind.Q4_K for b in range(28)}),
    ("Q4_K_M", "ffn_down", {b: Kind.Q6_K if b in MORE else Kind.Q4_K for b in range(28)}),
    ("Q4_K_M", "attn_q", dict.fromkeys(range(28), Kind.Q4_K)),
    ("Q3_K_M", "attn_v", {b: Kind.Q5_K if b < 2 else Kind.Q4_K for b in range(28)}),
    ("Q3_K_M", "ffn_down", {b: Kind.Q5_K if b < 1 else Kind.Q4_K for b in range(28)}),
    ("Q3_K_M", "attn_output", dict.fromkeys(range(28), Kind.Q4_K)),
    ("Q3_K_M", "ffn_up", dict.fromkeys(range(28), Kind.Q3_K)),
    ("Q4_0", "ffn_down", {b: Kind.Q4_1 if b < 3 else Kind.Q4_0 for b in range(28)}),
    ("Q4_0", "attn_v", dict.fromkeys(range(28), Kind.Q4_0)),
])  # fmt: skip
def test_types_are_chosen_as_llama_quantize_does(mixture, part, kinds):
    assert {b: ours.kind_of(f"blk.{b}.{part}.weight", 1024, mixture, 28, False, True) for b in kinds} == kinds


def test_head_tables_and_odd_columns_have_types_of_their_own():
    def kind(name, columns=1024, mixture="Q4_K_M", tied=False, weighted=False):
        return ours.kind_of(name, columns, mixture, 30, tied, weighted)

    assert kind("output.weight") == kind("token_embd.weight", tied=True) == Kind.Q6_K
    assert kind("token_embd.weight") == Kind.Q4_K
    assert kind("blk.0.ffn_down.weight", mixture="Q4_0") == Kind.Q4_0, "Q4_1 goes with an importance matrix alone"
    odd = [kind("output.weight", 576), kind("blk.9.attn_q.weight", 576), kind("blk.9.ffn_up.weight", 576, "Q3_K_M"), kind("blk.0.attn_v.weight", 576, "Q3_K_M")]
    assert odd == [Kind.Q8_0, Kind.Q5_0, Kind.IQ4_NL, Kind.Q5_1]


@contextmanager
def plain_quantizer():
    """Stand in for llama.cpp's library with the gguf package's own code, which knows Q4_0 and Q8_0."""
    yield lambda kind, rows, importance=None: gguf.quants.quantize(rows, Kind(kind))


@pytest.mark.parametrize("tied,dtype", [(True, torch.bfloat16), (False, torch.float32), (False, torch.float16)])
def test_a_file_of_llama_cpp_s_types_holds_our_weights(family, tmp_path, monkeypatch, tied, dtype):
    monkeypatch.setattr(ours, "quantizer", plain_quantizer)
    folder = tmp_path / "in"
    save(*load(family("llama", tied), dtype=dtype), folder)
    source = open_source(folder)
    (said,) = ours.export_kquant(source, tmp_path / "out", "Q4_0", None)
    model, _ = load(folder, dtype=torch.float32)
    stored = gguf.GGUFReader(tmp_path / "out" / TEXT).tensors
    kinds = [t.tensor_type for t in stored if len(t.shape) == 2]
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in stored}
    assert said == f"{kinds.count(Kind.Q4_0)} Q4_0, {kinds.count(Kind.Q8_0)} Q8_0" and set(kinds) == {Kind.Q4_0, Kind.Q8_0}
    assert ("output.weight" in tensors) is not tied
    block = parts(model).blocks[1]
    for name, linear in (("blk.1.attn_q.weight", block.self_attn.q_proj), ("blk.1.ffn_down.weight", block.mlp.down_proj)):
        weight = linear.weight
        found = torch.from_numpy(np.array(text_weight(tensors, name, model.config.text_config, True)))
        step = weight.reshape(len(weight), -1, 32).abs().amax(-1) / 8
        worst = ((found - weight).abs().reshape(len(weight), -1, 32) / step[..., None]).max()
        assert worst < 1.02 and (found != weight).any(), name


def test_packed_folders_are_refused(tiny, family, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "quantizer", plain_quantizer)
    source = SimpleNamespace(packed={"a": 4}, folder="awq")
    with pytest.raises(ValueError, match="awq is quantized already"):
        ours.export_kquant(source, tmp_path / "out", "Q4_0", None)


def test_importance_is_that_of_what_comes_in(family, rows):
    folder = family("llama", False)
    model, processor = load(folder, dtype=torch.float32)
    batch = {k: torch.cat([v, v]) for k, v in batch_of(load_processor(folder), rows).items()}
    found = ours.input_importance(model, batch)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert not [hook for hook in hooks if getattr(hook, "func", None) is ours._add_squares], "nothing is left watching"
    with torch.inference_mode():
        states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
        wanted = parts(model).blocks[1].input_layernorm(states[1]).square().flatten(0, 1).sum(0)
    torch.testing.assert_close(found["blk.1.attn_k"], wanted)
    assert len(found) == 7 * len(parts(model).blocks)


@pytest.mark.skipif(not llama_cpp_is_here, reason="llama.cpp (xllamacpp) is neither installed nor named by MEDPRUNE_LLAMACPP")
def test_llama_cpp_s_library_quantizes_as_asked():
    rows = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float32)
    importance = np.concatenate([np.ones(256), np.full(256, 1e-4)]).astype(np.float32)
    with engines.quantizer() as quantize:
        for kind in (Kind.Q4_0, Kind.Q8_0):
            assert (quantize(kind.value, rows) == gguf.quants.quantize(rows, kind)).all()
        for kind, most in ((Kind.Q3_K, 0.2), (Kind.Q4_K, 0.1), (Kind.Q6_K, 0.03)):
            error = gguf.quants.dequantize(quantize(kind.value, rows), kind) - rows
            assert np.linalg.norm(error) / np.linalg.norm(rows) < most
        assert (quantize(Kind.Q4_K.value, rows, importance) != quantize(Kind.Q4_K.value, rows)).any()
