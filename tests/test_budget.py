"""Bytes of plans: what the accounting says of every plan, what a plan is in words, and `medprune fit`."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medprune import cli
from medprune.models.sizes import ASSEMBLED, GIB, account, named_config
from medprune.searching.budget import (
    DROP,
    FULL,
    HEAD,
    TABLE,
    TOWER,
    UNPACKED_WEIGHTS,
    parse_size,
    plan_rows,
    space_of,
    uniform_costs,
    working_bytes,
)
from medprune.searching.searchers import budget_plans

LLAVA = named_config("llava-1.5-7b")
SMOLLM2 = ASSEMBLED["smollm2"] | {"model_type": "llava", "tie_word_embeddings": True}
TINY = ASSEMBLED["tiny"] | {"model_type": "llava", "tie_word_embeddings": True}
SPACES = [(config, space_of(config, 840)) for config in (LLAVA, SMOLLM2, TINY)]


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(range(len(SPACES))))
def test_a_plan_s_bytes_are_the_accounting_s(data, number):
    config, space = SPACES[number]
    plan = tuple(data.draw(st.sampled_from(list(price))) for price in space.prices)
    storage = space.storage(plan)
    removed = storage.pop("blocks_removed")
    counted = account(config, removed, method="awq", context=840, **storage)
    assert space.bytes_of(plan) == counted.total_bytes + working_bytes(config, 840)


def test_the_sites_and_their_choices():
    space = SPACES[0][1]
    assert space.sites == (TOWER, *(f"block {b}" for b in range(32)), HEAD, TABLE)
    assert [list(price) for price in space.prices[1:4]] == [[3, 4, 8, 16], [3, 4, 8, 16], [0, 3, 4, 8, 16]]
    assert list(space.prices[0]) == list(space.prices[-2]) == list(space.prices[-1]) == [3, 4, 8, 16]
    assert 0 not in space.prices[-3]
    assert all(list(price.values()) == sorted(price.values()) for price in space.prices)
    assert HEAD not in SPACES[1][1].sites and TOWER in SPACES[1][1].sites  # a tied head is the table's
    assert SPACES[1][1].sites[-1] == TABLE
    assert TOWER in SPACES[2][1].sites  # by those of its linears that groups of 64 divide
    assert space.choice(space.uniform(4), TOWER) == FULL and SPACES[2][1].choice((FULL,) * 6, TOWER) == FULL
    assert space.choice(space.uniform(4), TABLE) == FULL
    assert set(space.blocks_of(space.uniform(4))) == {4}


def test_working_memory_counts_what_a_packed_layer_unpacks_at_once():
    from medprune.quantizing.packed import SLICE_WEIGHTS

    assert UNPACKED_WEIGHTS == SLICE_WEIGHTS
    assert working_bytes(LLAVA, 840) - working_bytes(LLAVA, 0) == 840 * 2 * (4 * 4096 + 3 * 11008)
    assert working_bytes(LLAVA, 0) == 32064 * 6 + 3 * 2**22 and working_bytes(TINY, 0) == 1024 * 6 + 3 * 64 * 1024


@pytest.mark.parametrize(("text", "size"), [("4GiB", 4 * GIB), ("3.5 gib", 3.5 * GIB), ("900MiB", 900 * 2**20), ("8GB", 8e9)])
def test_sizes_are_read_with_their_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["4", "0GiB", "four GiB", "-1GiB", "4 Gi"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is no size of memory"):
        parse_size(text)


def test_what_cards_hold_by_the_accounting_alone():
    """LLaVA-1.5-7B: about 3.9 bits a block in 4 GiB; nothing dropped until 3 bits are too much; more is never worse."""
    space = SPACES[0][1]
    costs, budgets = uniform_costs(space), [GIB // 2, *(n * GIB for n in (3, 4, 6, 8, 16))]
    plans = budget_plans(space, costs, budgets)
    table = plan_rows(space, plans).set_index("budget_bytes")
    assert plans[GIB // 2] is None and table.blocks[GIB // 2] == "nothing fits"
    taken = table.total_bytes.dropna()
    assert (taken <= table.index[1:]).all() and taken.is_monotonic_increasing
    assert table["dropped"].tolist()[1:] == [3, 0, 0, 0, 0]
    assert (table["3 bits"][4 * GIB], table["4 bits"][4 * GIB]) == (2, 30)
    assert set(plans[16 * GIB]) == {FULL}


def test_a_tied_head_has_the_bits_of_the_table():
    space = SPACES[1][1]
    packed = (*space.uniform(4)[:-1], 3)
    table = plan_rows(space, {GIB: packed, 2 * GIB: space.uniform(4)})
    assert table[HEAD].tolist() == table[TABLE].tolist() == [3, FULL]
    untied = SPACES[0][1]
    assert plan_rows(untied, {GIB: (*untied.uniform(4)[:-1], 3)})[[HEAD, TABLE]].iloc[0].tolist() == [FULL, 3]


def test_a_uniform_cost_is_the_share_of_the_weights_times_the_error():
    costs = uniform_costs(SPACES[1][1])
    assert costs[3][DROP] == 4**4 * costs[3][4] == 4**3 * costs[3][3] and costs[3][FULL] == 0
    assert costs[3][DROP] == pytest.approx(SPACES[1][1].prices[3][FULL] / sum(p[FULL] for p in SPACES[1][1].prices))


def fit(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["medprune", "fit", "llava-1.5-7b", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_fit_prints_what_cards_hold(monkeypatch, capsys):
    assert fit(monkeypatch, "--card", "4GiB", "--card", "6.5GiB", "--reserve", "512MiB") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[:2] == ["budget", "(GiB)"] and [line.split()[0] for line in said[1:]] == ["3.50", "6.00"]
    assert [len(line.split()) for line in said[1:]] == [10 + 32] * 2
    for reserve, left in (("0.5GiB", "3.50"), ("0", "4.00"), ("0.0 GiB", "4.00")):
        assert fit(monkeypatch, "--card", "4GiB", "--reserve", reserve) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[0] == left


@pytest.mark.parametrize(("words", "why"), [
    (("--card", "4"), "'4' is no size of memory"),
    (("--card", "4GiB", "--group-size", "48"), "group_size must be one of"),
    (("--card", "4GiB", "--reserve", "0nonsense"), "'0nonsense' is no size of memory"),
    (("--card", "4GiB", "--card", "900MiB", "--reserve", "1GiB"), "--reserve 1GiB must be below every --card"),
    (("--card", "4GiB", "--out", "there"), "--out needs --images"),
    (("--card", "4GiB", "--card", "5GiB", "--out", "there", "--images", "here"), "one --card"),
])  # fmt: skip
def test_fit_refuses_in_one_sentence(monkeypatch, capsys, words, why):
    assert fit(monkeypatch, *words) == 2
    said = capsys.readouterr()
    assert why in said.err and len(said.err.splitlines()) == 1
