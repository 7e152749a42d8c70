"""`medprune preflight`: its verdicts on this machine, its predictions of time, and the series that asks it first."""

import math

import pytest

from medprune import cli
from medprune.runs import durations
from medprune.settings import STAGES
from medprune.runs.checkup import checkup
from medprune.settings import resolve, settings
from medprune.runs.series import check_run
from medprune.models.sizes import base_config, named_config

RATES = {"flops_per_s": 3e11, "train_flops_per_s": 1.5e11, "float32_flops_per_s": 1.5e11, "bytes_per_s": 1e10, "rows": 128,
         "step_s": 6e-3, "step_1_s": 1.5e-3}  # fmt: skip
T4 = {"flops_per_s": 2.5e13, "train_flops_per_s": 1.5e13, "float32_flops_per_s": 4e12, "bytes_per_s": 2.5e11, "rows": 6,
      "step_s": 2e-3, "step_1_s": 2e-3}  # fmt: skip


def test_local_fits_and_every_stage_is_predicted(tmp_path):
    lines, fits = checkup(resolve("local"), str(tmp_path))
    assert fits and "synthetic, 240 training and 24 test images" in "\n".join(lines)
    for stage in STAGES:
        assert sum(line.startswith(stage) and line.endswith("fits") for line in lines) == 1


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="this machine has a GPU, which t4 may fit")
def test_t4_is_refused_here_in_clear_words_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.argv", ["medprune", "preflight", "--profile", "t4", "--runs-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().out
    assert stop.value.code == 1
    assert said.count("needs a CUDA GPU") >= 5 and 'choose profile "local"' in said
    assert "/kaggle/input/dermnet" in said and "is not in the hub's cache" in said
    with pytest.raises(ValueError, match="01_finetune does not fit this machine: .* needs a CUDA GPU"):
        check_run(resolve("t4", images="synthetic", n_train=1736, n_test=40))


def test_predicted_seconds_grow_with_what_is_asked():
    small, seven = base_config("smollm2"), named_config("llava-1.5-7b")
    local = durations.predict_seconds(settings(resolve("local")), small, RATES)
    assert list(local) == list(STAGES) and 300 < sum(local.values()) < 3000
    more = durations.predict_seconds(settings(resolve("local", sft_steps=180, n_calibration=16)), small, RATES)
    assert more["01_finetune"] > local["01_finetune"] + 20 and more["02_layer_importance"] > local["02_layer_importance"]
    t4 = settings(resolve("t4"))
    days = durations.predict_seconds(t4, seven, T4, checkpointing=True)
    assert 3600 < days["01_finetune"] < 48 * 3600 and days["06_judge_eval"] > 600
    assert math.isnan(durations.predict_seconds(t4 | {"judge": "some/judge"}, seven, RATES)["06_judge_eval"])


def test_seconds_are_said_in_words():
    assert [durations.in_words(s) for s in (40, 720, 12600, math.nan)] == ["40 s", "12 min", "3.5 h", "?"]


def test_the_probe_measures_rates_that_can_be():
    assert durations.probe("cpu", 200, 96, rows=1)["step_s"] > 0  # a width that 64 does not divide
    rates = durations.probe("cpu", 128, 256, rows=8)
    assert rates.keys() == RATES.keys() and rates["rows"] == 8
    for name in ("flops_per_s", "train_flops_per_s", "float32_flops_per_s"):
        assert 1e8 < rates[name] < 1e15, name
    assert 1e8 < rates["bytes_per_s"] < 1e12 and 1e-5 < rates["step_1_s"] < 1 and 1e-5 < rates["step_s"] < 1
