"""The benchmark scripts at sizes of megabytes: what they build, count and compare; no times."""

import importlib.util
import json
from dataclasses import asdict

import gguf
import pytest
import torch

from medprune.data import synthetic
from medprune.models import loading
from medprune.models.assembled import prepare_base
from medprune.models.families import parts
from medprune.models.loading import save
from medprune.models.sizes import account
from medprune.quantizing.checkpoint import save_quantized
from medprune.quantizing.packed import PackedLinear
from medprune.quantizing.quantize import quantize
from medprune.settings import REPO
from medprune.store import write_json


def script(name):
    """Return a benchmark as a module; those beside it can be imported, as when it is run."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", REPO / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def seven_b():
    return script("seven_b")


@pytest.mark.parametrize(
    ("removed", "bits", "whole"), [(0, 16, False), (0, 4, False), (7, 4, False), (10, 4, False), (4, 4, True)]
)
def test_seven_b_holds_what_the_plan_says(seven_b, removed, bits, whole):
    case = seven_b.run_case(removed, bits, tiny=True, new_tokens=3, whole=whole)
    assert case["finite"] and case["prompt_tokens"] == 16 + seven_b.TEXT_TOKENS and case["new_tokens"] == 3
    for key in ("stored_against_plan_frac", "held_against_plan_frac"):
        assert abs(case[key]) < 0.02, key
    assert case["held_bytes"]["total"] == sum(n for p, n in case["held_bytes"].items() if p != "total")
    # K and V of every token but the last, which is said and not read; 4 heads of 64, 2 bytes, each kept block
    assert case["kv_cache_bytes"] == (case["prompt_tokens"] + 3) * 2 * (12 - removed) * 256 * 2
    assert case["plan_total_bytes"] - case["plan_held_bytes"] == case["kv_cache_bytes"]
    assert case["peak_bytes"] >= case["overhead_bytes"] > 0 and case["ms_per_token"] > 0
    json.dumps(case)


@pytest.mark.parametrize("removed,bits", [(0, 16), (7, 4)])
def test_seven_b_for_llama_cpp_reads_what_the_plan_says(monkeypatch, tmp_path, removed, bits):
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    llama = script("seven_b_llamacpp")
    config, table = llama.shape(tiny=True), 1024 * 256 * 2
    read = llama.write(config, removed, bits, tmp_path / "text.gguf")
    parts_of = account(config, removed, 16).part_bytes
    planned = parts_of["block_weights"]
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "text.gguf").tensors}
    linears = sum(int(t.n_bytes) for name, t in tensors.items() if name.startswith("blk.") and "norm" not in name)
    assert linears == planned * (5 if bits == 4 else 16) / 16
    assert sum(int(t.n_bytes) for t in tensors.values()) - table == pytest.approx(read, rel=0.02)
    assert len(tensors) == 3 + 9 * (12 - removed)


def test_seven_b_s_own_size_is_the_plan_s_and_blocks_are_packed_one_by_one(seven_b, monkeypatch):
    assert seven_b.shape(False)["text_config"]["num_hidden_layers"] == 32
    dense = []  # bytes of dense block linears that are in memory whenever one is packed
    real, config = PackedLinear.from_linear, seven_b.shape(True)

    def watch(linear, *rest):
        blocks = parts(found[0]).blocks
        dense.append(
            sum(m.weight.nbytes for m in blocks.modules() if isinstance(m, torch.nn.Linear) and not m.weight.is_meta)
        )
        return real(linear, *rest)

    found, init = [], seven_b.LlavaForConditionalGeneration
    monkeypatch.setattr(seven_b, "LlavaForConditionalGeneration", lambda c: found.append(init(c)) or found[0])
    monkeypatch.setattr(seven_b.PackedLinear, "from_linear", watch)
    built, smaller = seven_b.build(config, 4, torch.bfloat16, "cpu")
    assert len(dense) == 12 * 7 and max(dense) == 2 * 256 * 512  # one linear at a time
    # held with bf16 tables and 4 bits more: 36 bits a group, where a folder has 20
    assert smaller == 12 * (4 * 256 * 256 + 3 * 256 * 512) * (36 - 20) / 64 / 8
    assert not any(p.is_meta for p in built.parameters())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's first stage around the tiny model: its folder of model, splits and images."""
    root = tmp_path_factory.mktemp("run")
    patch = pytest.MonkeyPatch()
    patch.setenv("MEDPRUNE_CACHE", str(root / "cache"))
    folder = root / "01_finetune"
    llava, processor = loading.load(prepare_base("tiny"))
    save(llava, processor, folder / "model")
    splits = {}
    for split in ("train", "test"):
        splits[split] = [asdict(r) for r in synthetic.write_images(folder / "images", 1, 32, 0, split)]
    write_json(folder / "splits.json", splits)
    write_json(folder / "manifest.json", {"settings": {"name": "smoke"}, "outputs": {}})
    patch.undo()
    return folder


@pytest.mark.parametrize("case", ("bfloat16", "awq, text only", "rtn", "rtn, 8 bits"))
def test_quantize_measures_a_method_against_16_bits(run, case):
    result = script("quantize").run_case(case, run, rows=4, new_tokens=2)
    assert result["positions_a_row"] > 20 and result["rows"] == 4
    if case == "bfloat16":
        assert result["mean_kl_nats"] == 0 and result["same_first_choice_frac"] == 1
    else:
        assert 0 < result["mean_kl_nats"] < 0.1 and abs(result["packed_against_plan_frac"]) < 0.02
        assert result["packed_bytes"] < result["dense_bytes"] and result["quantize_peak_bytes"] > 0


def test_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    by_hand = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    quantize_script = script("quantize")
    assert quantize_script.mean_kl(p, q) == pytest.approx(float(by_hand)) and quantize_script.mean_kl(p, p) == 0


def test_an_awq_folder_of_the_text_model_is_put_back_whole(run, tmp_path):
    from safetensors.torch import load_file, save_file

    quantize_script = script("quantize")
    llava, processor = loading.load(run / "model")
    batch = quantize_script.batches(run, processor, "train", 8, 0)
    llava, info = quantize(llava, "awq", calibration=batch)
    before = quantize_script.text_log_probs(llava, batch)
    save_quantized(llava, tmp_path / "llava", "awq", info)
    stored = load_file(tmp_path / "llava" / "model.safetensors")
    text = {k.removeprefix("language_model."): v for k, v in stored.items() if k.startswith("language_model.")}
    (tmp_path / "text").mkdir()
    save_file(text, tmp_path / "text" / "model.safetensors")
    again, _ = loading.load(run / "model")
    quantize_script.put_back(again, tmp_path / "text")
    assert torch.equal(quantize_script.text_log_probs(again, batch), before)
    save_file(text | {"model.layers.0.odd": torch.zeros(1)}, tmp_path / "text" / "model.safetensors")
    with pytest.raises(ValueError, match="layers.0.odd, which the LLaVA"):
        quantize_script.put_back(loading.load(run / "model")[0], tmp_path / "text")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is not measured without a GPU is asserted")
def test_gpu_measures_every_part_and_says_what_it_could_not(monkeypatch, tmp_path, base):
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "prepare_base", lambda _: base)
    monkeypatch.setattr(gpu, "STEPS_S", 0.1)
    result = gpu.measure(tiny=True, limit_s=200, folder=tmp_path)
    answers = result["answers"]
    assert {a["form"] for a in answers} == set(gpu.FORMS) and {a["removed"] for a in answers} == {0, 4}
    for a in answers:
        if a["mode"] == "CUDA graph":
            assert a["note"] == "not measured: no GPU"
            continue
        assert a["finite"] and a["ms_per_token"] > 0 and a["steps"] >= 1 and a["floor_ms_per_token"] > 0, a
        # on a CPU packed layers, and bitsandbytes's too, run in another form than is stored
        assert abs(a["held_bytes"] / a["plan_held_bytes"] - 1) < (0.001 if a["form"] == "16 bits" else 0.06), a
    fewer = [next(a["held_bytes"] for a in answers if a["form"] == "NF4" and a["removed"] == n) for n in (0, 4)]
    assert fewer[1] < fewer[0]
    dense = next(a for a in answers if a["form"] == "16 bits" and a["batch"] == 1 and a["mode"] == "growing cache")
    assert dense["speedup"] == 1
    tuning = result["tuning"]
    assert tuning["base"] == "NF4" and tuning["loss"] > 0 and tuning["step_s"] > 0 and not tuning["refused_rows"], (
        tuning
    )
    assert result["leave_one_out"]["leave_one_out_s_per_answer"] > 0 and result["leave_one_out"]["ratio"] > 0
    assert result["awq"]["s_per_block"] > 0 and result["awq"]["all_blocks_s"] == 3 * result["awq"]["s_per_block"] * 4
    assert "leave_one_out: form 16 bits, new_tokens 6" in gpu.report(result) and json.dumps(result)


def test_gpu_writes_down_what_does_not_fit_and_stops_without_a_gpu(monkeypatch, capsys):
    gpu = script("gpu")

    def too_much():
        raise torch.OutOfMemoryError

    assert gpu.attempt(too_much, form="NF4") == {"form": "NF4", "note": "does not fit"}
    assert gpu.attempt(lambda: {"ms": 1}, form="NF4") == {"form": "NF4", "ms": 1}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no CUDA GPU is here" in capsys.readouterr().err
