"""Which device, what fits it: waiting for every GPU, and batches that are halved until they fit."""

import types

import pytest
import torch

from medprune import device
from medprune.settings import resolve
from medprune.store import Units


@pytest.fixture
def two_cards(monkeypatch):
    """Pretend that torch sees two T4s; `waited` lists those that were waited for."""
    fake = types.SimpleNamespace(waited=[], is_available=lambda: True, device_count=lambda: 2)
    fake.synchronize = fake.waited.append
    fake.get_device_capability = lambda: (7, 5)
    fake.get_device_properties = lambda card: types.SimpleNamespace(total_memory=[16, 14][card])
    fake.reset_peak_memory_stats = lambda card: None
    fake.memory_allocated = lambda card: 100 * card
    fake.max_memory_allocated = lambda card: [30, 170][card]
    monkeypatch.setattr(device, "gpu", lambda: fake)
    return fake


def test_a_clock_waits_for_every_gpu(two_cards):
    device.wait()
    assert two_cards.waited == [0, 1]


def test_two_t4s_compute_in_half_precision_and_their_growth_adds_up(two_cards):
    assert device.choose_device() == "cuda" and device.cards() == 2 and device.memory_bytes() == 14
    assert device.choose_dtype("cuda") == torch.float16 and device.choose_dtype("cpu") == torch.bfloat16
    assert device.growth(device.start_peak()) == 30 + 70


def test_profile_t4_holds_16_bits_where_there_are_two_gpus(two_cards, monkeypatch):
    assert resolve("auto").name == "t4" and resolve("auto").held_bits == 16
    assert resolve("t4", held_bits=4).held_bits == 4
    two_cards.device_count = lambda: 1
    assert resolve("auto").held_bits == 4
    monkeypatch.setattr(device, "gpu", lambda: types.SimpleNamespace(is_available=lambda: False))
    assert resolve("auto").name == "local" and resolve("t4").held_bits == 4


def work(fits: int, tried: list):
    def run(rows):
        tried.append(rows)
        if rows > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return f"{rows} rows"

    return run


@pytest.fixture(autouse=True)
def nothing_halved_yet(monkeypatch):
    monkeypatch.setattr(device, "HALVED", {})


def test_rows_are_halved_until_they_fit_said_and_remembered(tmp_path, capsys):
    units, tried = Units(tmp_path / "units.sqlite", "x"), []
    assert device.rows_that_fit(work(3, tried), 12, "answers", units) == "3 rows" and tried == [12, 6, 3]
    assert "answers: does not fit; going on with 3 at once" in capsys.readouterr().out
    assert device.rows_that_fit(work(3, tried), 12, "answers", units) == "3 rows" and tried == [12, 6, 3, 3]
    device.HALVED.clear()  # another session goes on with the run
    assert device.rows_that_fit(work(3, tried), 12, "answers", units) == "3 rows" and tried[4:] == [3]
    assert device.rows_that_fit(work(9, tried), 8, "training", units) == "8 rows", "other work is not halved with it"


def test_what_fits_is_not_kept_as_a_limit(tmp_path):
    units = Units(tmp_path / "units.sqlite", "x")
    assert device.rows_that_fit(work(4, []), 4, "answers", units) == "4 rows" and len(units) == 0


def test_where_not_even_one_row_fits_it_is_said():
    with pytest.raises(MemoryError, match="one row of answers does not fit this machine's memory: take a smaller base"):
        device.rows_that_fit(work(0, []), 4, "answers")


def test_other_errors_are_not_taken_for_too_little_memory():
    def broken(rows):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        device.rows_that_fit(broken, 4, "answers")
