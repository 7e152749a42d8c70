"""`medprune compare`, `plan`, `quantize` and `address`, as they are typed."""

import sys

import pandas as pd
import pytest
import torch

from medprune import cli
from medprune.data import synthetic
from medprune.models import loading
from medprune.models.assembled import prepare_base
from medprune.models.families import parts
from medprune.models.loading import save
from medprune.models.sizes import account
from medprune.pruning.plan import make_plan
from medprune.quantizing.checkpoint import load_quantized
from medprune.searching import fitting
from medprune.store import content


@pytest.fixture
def runs(tmp_path):
    for run, shift in (("one", 0), ("two", 10)):
        rows = [{"method": m, "id": f"{i}#{k}", "cluster": i, "score_percent": 40 + i + drop + shift}
                for m, drop in (("original", 5), ("pruned-1", 0)) for i in range(6) for k in "ab"]  # fmt: skip
        (tmp_path / run / "01_finetune").mkdir(parents=True)
        pd.DataFrame(rows).to_csv(tmp_path / run / "01_finetune" / "scores.csv", index=False)
    return tmp_path


def medprune(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["medprune", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_compare_methods_of_a_run(runs, monkeypatch, capsys):
    assert medprune(monkeypatch, "compare", "one:pruned-1", "one:original", "--runs-dir", runs) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "-5.0 [" in said[1]


def test_compare_runs_pairs_methods_of_one_name(runs, monkeypatch, capsys):
    assert medprune(monkeypatch, "compare", "two", "one", "--runs-dir", runs) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said[1:]] == [["two:original", "one:original"], ["two:pruned-1", "one:pruned-1"]]
    assert all("10.0 [" in line for line in said[1:])


@pytest.mark.parametrize("words,why", [
    (("one:pruned-9", "one:original"), "has no method 'pruned-9'"),
    (("three", "one"), "'three' has no scores"),
    (("one", "one"), "no two methods"),
])  # fmt: skip
def test_compare_refuses_in_one_sentence(runs, monkeypatch, capsys, words, why):
    assert medprune(monkeypatch, "compare", *words, "--runs-dir", runs) == 2
    said = capsys.readouterr()
    assert why in said.err and len(said.err.splitlines()) == 1


def test_plan_counts_head_and_tower_in_four_bits(monkeypatch, capsys):
    assert medprune(monkeypatch, "plan", "--remove", 4, "--bits", 4, "--quantize-head", "--quantize-vision") == 0
    said = capsys.readouterr().out
    assert "blocks and head and vision 4 bits" in said and " 3.708" in said  # GiB in all, with the KV cache
    assert medprune(monkeypatch, "plan", "--quantize-head") == 2
    assert "fewer than 16 bits" in capsys.readouterr().err


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """The tiny base as a folder, four pictures, and a plan without its block 2."""
    home = tmp_path_factory.mktemp("cli")
    patch = pytest.MonkeyPatch()
    patch.setenv("MEDPRUNE_CACHE", str(home / "cache"))
    found, processor = loading.load(prepare_base("tiny"))
    save(found, processor, home / "llava")
    synthetic.write_images(home / "pictures", 1, 32, 0, "train")
    make_plan(found.config, [2], content(home / "llava"), (), "magnitude").save(home / "plan.json")
    return home


def test_quantize_writes_a_folder_that_answers(llava, tmp_path, monkeypatch, capsys):
    out = tmp_path / "awq"
    words = ["--images", llava / "pictures", "--rows", 4, "--plan", llava / "plan.json"]
    assert medprune(monkeypatch, "quantize", llava / "llava", out, *words) == 0, capsys.readouterr()
    assert "MiB" in capsys.readouterr().out
    again = load_quantized(out)
    assert len(parts(again).blocks) == 5
    with torch.no_grad():
        assert torch.isfinite(again(input_ids=torch.arange(5, 12)[None]).logits).all()
    card = (out / "README.md").read_text()
    assert "blocks 2 removed by magnitude" in card and "image-text, 4 rows" in card

    rtn = tmp_path / "rtn"
    words = ["--method", "rtn", "--group-size", 32, "--quantize-head", "--quantize-vision"]
    assert medprune(monkeypatch, "quantize", llava / "llava", rtn, *words) == 0
    plan = account(load_quantized(rtn).config, 0, 4, 32, quantize_head=True, quantize_vision=True)
    stored = sum(f.stat().st_size for f in rtn.glob("*.safetensors"))
    assert stored == pytest.approx(plan.weights_bytes, rel=0.15)  # names and shapes weigh much beside a tiny model


@pytest.mark.parametrize("words,why", [
    (("--method", "awq"), "awq needs images"),
    (("--method", "bnb", "--bits", "3"), "bits for bnb must be one of (4,), not 3"),
    (("--method", "rtn", "--group-size", "48"), "group_size must be one of"),
])  # fmt: skip
def test_quantize_refuses_before_loading(llava, tmp_path, monkeypatch, capsys, words, why):
    monkeypatch.setattr(loading, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    assert medprune(monkeypatch, "quantize", llava / "llava", tmp_path / "q", *words) == 2
    said = capsys.readouterr().err
    assert why in said and len(said.splitlines()) == 1 and not (tmp_path / "q").exists()
    assert medprune(monkeypatch, "quantize", llava / "llava", llava, *words) == 2
    assert "is there already" in capsys.readouterr().err


def test_fit_refuses_what_it_cannot_write_before_it_reads_pictures(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    words = ["--out", tmp_path / "file" / "out", "--card", "300KiB", "--images", tmp_path / "none"]
    assert medprune(monkeypatch, "fit", base, *words) == 2
    assert "out cannot be written (Not a directory): name a folder elsewhere." in capsys.readouterr().err


def test_fit_writes_the_best_model_that_fits(base, tmp_path, monkeypatch, capsys):
    for condition in ("rosacea", "psoriasis"):
        for n in range(3):
            path = tmp_path / "photos" / condition / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            synthetic.draw(condition, n, 64)[0].save(path)
    words = ["--images", tmp_path / "photos", "--n-images", 1, "--evaluations", 5, "--group-size", 32, "--context", 64]
    out = tmp_path / "fitted"
    assert medprune(monkeypatch, "fit", base, "--out", out, "--card", "300KiB", *words) == 2
    assert "MiB holds no plan: the least takes" in capsys.readouterr().err and not out.exists()
    assert medprune(monkeypatch, "fit", base, "--out", out, "--card", "4GiB", *words) == 2
    assert "as it is, in 16 bits, which 4096.0 MiB hold: there is nothing" in capsys.readouterr().err
    shown = {"own_answers": set(), "quantization_batch": set()}  # the images that each was given
    for name, keys in shown.items():
        whole = getattr(fitting, name)
        monkeypatch.setattr(fitting, name, lambda x, drawn, *more, whole=whole, keys=keys: keys.update(r.key for r in drawn) or whole(x, drawn, *more))
    assert medprune(monkeypatch, "fit", base, "--out", out, "--card", "500KiB", *words) == 0
    said = capsys.readouterr().out
    assert [len(keys) for keys in shown.values()] == [2, 4] and not set.intersection(*shown.values())
    assert "on 3 answers that the search did not measure plans on" in said
    model, table = load_quantized(out), pd.read_csv(tmp_path / "fitted.csv")
    assert (table.total_bytes <= 500 * 2**10).all() and set(table.searcher) == {"random", "greedy", "exact", "evolution"}
    assert len(parts(model).blocks) <= 6 and not (tmp_path / "fitted.search").exists()
    assert medprune(monkeypatch, "fit", base, "--out", out, "--card", "500KiB", *words) == 2
    assert "is there already" in capsys.readouterr().err
