"""The pretended GPU counts what a card would hold, and full-size models fit it, or do not; a process each."""

import ast
import json
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import families
import pandas as pd
import pytest
import true_size

from medprune import cli
from medprune.models import loading
from medprune.models.families import parts
from medprune.models.loading import load_processor
from medprune.models.sizes import account, base_config, shape_of
from medprune.rehearsing import rehearsal
from medprune.settings import PROFILES, REPO, STAGES

CHECKS = re.findall(r"^def (\w+)\(folder\):", (REPO / "tests" / "pretended.py").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("check", CHECKS)
def test_pretended(check, tmp_path):
    command = [sys.executable, str(REPO / "tests" / "pretended.py"), check, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr[-3000:]


IN_A_STAGE = """
from medprune.rehearsing import card, stage

def run(*_):
    import torch
    from medprune.quantizing.quantize import _packed
    print(type(_packed(torch.nn.Linear(64, 64).half().to(card.NAME), "hqq", 4, 64)))

stage._run = run
stage.main(JOB)
"""


def test_a_stage_imports_hqq_when_its_cards_are_there(tmp_path):
    job = {"stage": "05", "cards": 1, "card_bytes": 2**30, "root": str(tmp_path), "out": str(tmp_path / "out.json")}
    (file := tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-c", IN_A_STAGE.replace("JOB", repr(str(file)))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert "HQQLinear" in done.stdout, done.stderr[-3000:]


def test_every_model_that_answers_is_held_in_the_bits_that_were_asked_for():
    for stage in STAGES:
        text = (REPO / "notebooks" / f"{stage}.ipynb").read_text(encoding="utf-8")
        assert all("bits=cfg." in call for call in re.findall(r"loading\.load\(([^)]*)\)", text)), stage


def steps(block: list[ast.stmt]):
    """Yield the simple statements of some code as texts, in the order they run; a loop runs twice."""
    for statement in block:
        inner = [part for name in ("body", "orelse", "finalbody") for part in getattr(statement, name, [])]
        if isinstance(statement, ast.FunctionDef):
            continue
        if inner:
            yield from [*steps(inner)] * (2 if isinstance(statement, ast.For | ast.While) else 1)
        else:
            yield ast.unparse(statement)


def test_a_model_is_let_go_before_the_next_is_loaded_and_before_a_judge():
    for stage in STAGES:
        cells = json.loads((REPO / "notebooks" / f"{stage}.ipynb").read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        held = False
        for step in steps(ast.parse(code).body):
            if "loading.load(" in step:
                assert not held, f"{stage} loads a model beside another"
                held = True
            elif re.match(r"(.*\bllava)\b.* = .*None\b", step):
                held = False
            elif re.search(r"\b(judged|make_judges)\(", step):
                assert not held, f"{stage} judges beside a model"


TAKEN = {"error": None, "halved": {}, "ram_bytes": 5 * 2**30, "disk_bytes": 60e9, "scratch_bytes": 0}


def test_what_does_not_fit_a_machine_is_said():
    colab = rehearsal.machine("colab")
    assert rehearsal._misfits(TAKEN, colab) == []
    small = rehearsal.machine("colab", ram_gib=4, disk_gb=50)
    assert rehearsal._misfits(TAKEN, small) == ["5.0 of ram are needed, 4 are there", "60.0 of disk are needed, 50 are there"]
    apart = rehearsal.machine("colab", scratch_gb=50)
    assert rehearsal._misfits(TAKEN | {"scratch_bytes": 51e9}, apart) == ["51.0 of scratch are needed, 50 are there"]
    halved = TAKEN | {"halved": {"answers": 3}, "error": "OutOfMemoryError: CUDA out of memory."}
    assert len(rehearsal._misfits(halved, colab)) == 2
    assert rehearsal.machine("kaggle", scratch_gb=0).scratch_gb == 0, "weights lie with the run"
    with pytest.raises(ValueError, match="disk_gb=0 must be above 0"):
        rehearsal.machine("kaggle", disk_gb=0)
    with pytest.raises(ValueError, match="machine 'pc' is not known: choose kaggle or colab"):
        rehearsal.machine("pc")
    assert rehearsal.stages(["02", "05_awq_vs_bnb"]) == (STAGES[1], STAGES[4]) and rehearsal.stages(None) == STAGES[:6]
    with pytest.raises(ValueError, match="stage '09' is not known"):
        rehearsal.stages(["09"])
    with pytest.raises(ValueError, match="07_budget_search is not rehearsed"):
        rehearsal.stages(["02", "07"])


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "smolvlm"])
def test_any_folder_s_model_is_written_as_holes_which_load(family, tmp_path):
    source = families.save(family, tmp_path / "source")
    for file in source.glob("*.safetensors"):
        file.unlink()  # weights need not be there
    model, processor = loading.load(rehearsal.hollow(source, tmp_path / "base"))
    assert len(parts(model).blocks) == families.BLOCKS and processor.chat_template
    assert not any(p.any() for p in parts(model).blocks.parameters()), "holes read as zeros"


@pytest.mark.parametrize("name", true_size.MADE)
def test_checkpoints_are_written_at_their_true_size(name, tmp_path):
    folder = rehearsal.hollow(true_size.save(name, tmp_path / "source"), tmp_path / "base")
    wanted = account(base_config(folder)).weights_bytes
    assert 0 <= (folder / "model.safetensors").stat().st_size - wanted < 2**19, "names and shapes come on top"
    assert load_processor(folder).image_token_ids


def test_a_rehearsal_ends_with_the_stage_that_does_not_fit_and_says_why(tmp_path, monkeypatch):
    (tmp_path / "judge").mkdir()
    ran = []

    def run(command, **_):
        job = json.loads(Path(command[-1]).read_text())
        ran.append(job["stage"])
        small = len(ran) == 2 and {"answers": 9}
        gib = [job["card_bytes"] / 2**30]
        Path(job["out"]).write_text(json.dumps(TAKEN | {"stage": job["stage"], "halved": small or {}, "gib": gib}))
        yield SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(rehearsal.child, "started", contextmanager(run))
    found = rehearsal.rehearse(rehearsal.machine("colab", gpu_gib=11.8), tmp_path)
    assert ran == list(STAGES[:2]) and found.misfit.tolist() == ["", "answers were halved to 9 at once"]
    assert found.gib[0] == [pytest.approx(11.3)], "half a GiB is left to CUDA"


def test_a_rehearsal_s_folder_is_of_one_base_and_made_whole(tmp_path, monkeypatch):
    shapes = []

    def stage(stage, machine, root, asked):
        shapes.append((shape_of(base_config(root / "base")).blocks, len(list((root / "dermnet").rglob("*.jpg")))))
        return {"stage": stage, "misfit": ""}

    monkeypatch.setattr(rehearsal, "_stage", stage)
    sources = [str(families.save(name, tmp_path / name)) for name in ("gemma3", "smolvlm")]
    made = rehearsal.make_images

    def killed(folder, *_):
        (folder / "train").mkdir(parents=True)
        raise KeyboardInterrupt

    def go(base, **settings):
        return rehearsal.rehearse(rehearsal.machine("colab"), tmp_path / "root", STAGES[:1], {"base": base} | settings)

    monkeypatch.setattr(rehearsal, "make_images", killed)
    with pytest.raises(KeyboardInterrupt):
        go(sources[0])
    monkeypatch.setattr(rehearsal, "make_images", made)
    [go(sources[0]) for _ in range(2)]
    assert shapes == [(families.BLOCKS, 8 * (rehearsal.IMAGES + 1 + 2))] * 2, PROFILES["t4"]["batch_rows"]
    for base, settings in ((sources[1], {}), (sources[0], {"batch_rows": 96})):
        with pytest.raises(ValueError, match="root was made for another base or batch_rows: name an empty folder"):
            go(base, **settings)


@pytest.mark.parametrize("base", ["nowhere", "smollm2", "some/hub-id", "llava-1.5-7b"])
def test_a_rehearsal_s_base_is_a_folder(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["medprune", "rehearse", "--folder", str(tmp_path / "root"), "-p", "base", base])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and not (tmp_path / "root").exists(), said


@pytest.mark.parametrize("machine", rehearsal.MACHINES.values())
def test_a_rehearsal_keeps_what_decides_memory(machine, tmp_path):
    asked = PROFILES["t4"]
    cut = rehearsal.short(asked, tmp_path, 32)
    assert not cut.keys() & {"batch_rows", "max_new_tokens", "micro_batch", "batch_size", "base_bits", "held_bits", "recover"}
    assert cut["n_test"] * 3 >= asked["batch_rows"] and cut["awq_rows"] == asked["awq_rows"]
    assert cut["sft_steps"] > cut["save_every"], "a checkpoint is written"


def test_the_command_says_what_fits_and_ends_in_1_where_not(tmp_path, monkeypatch, capsys):
    rows = [{"stage": "01_finetune", "card_bytes": [2**30, 2**31], "seconds": 5, **TAKEN, "misfit": ""}]
    rows.append(rows[0] | {"stage": "02_layer_importance", "misfit": "answers were halved to 3 at once"})

    def rehearse(machine, root, stages, settings, say):
        assert machine.gpu_gib == 11.0 and machine.cards == 2 and stages == STAGES[:6] and settings == {"batch_rows": 4}
        [say(row) for row in rows]
        return pd.DataFrame(rows)

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    words = ["medprune", "rehearse", "--gpu", "11", "--folder", str(tmp_path), "-p", "batch_rows", "4"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().out.splitlines()
    assert end.value.code == 1 and said[0] == (
        "01_finetune: GPU 1.00 + 2.00 GiB, host 5.0 GiB, files 60 + 0 GB, 5 s of rehearsal. fits"
    )
    assert said[1].endswith("answers were halved to 3 at once")
