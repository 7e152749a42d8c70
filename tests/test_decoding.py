"""Greedy answers on the tiny LLaVA against transformers' generate and each pruned model; their time and context."""

import copy
import time
import types

import pytest
import torch
from PIL import Image

from medprune.answers import timing
from medprune.answers.decoding import answer, answer_rows, answers_context
from medprune.answers.prompts import prompt_text
from medprune.pruning.plan import apply_plan, make_plan
from medprune.settings import resolve
from medprune.store import Units


def test_answers_equal_those_of_transformers_generate(tiny, rows):
    model, processor = tiny
    ours = answer(model, processor, rows, max_new_tokens=10, batch_rows=4)
    for row, said in zip(rows, ours, strict=True):
        batch = processor(
            text=prompt_text(processor, row["question"]), images=Image.open(row["path"]), return_tensors="pt"
        )
        out = model.generate(**batch, max_new_tokens=10, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert said.text == processor.tokenizer.decode(out, skip_special_tokens=True).strip()


def test_leave_one_out_batch_says_what_each_pruned_model_says(tiny, rows):
    model, processor = tiny
    blocks = range(6)
    together = answer(model, processor, rows * 6, 8, batch_rows=7, skip=[b for b in blocks for _ in rows])
    assert len({a.text for a in together}) > 6, "the test needs answers that differ"
    for b in blocks:
        pruned = copy.deepcopy(model)
        apply_plan(pruned, make_plan(pruned.config, [b], "", protect=()))
        alone = answer(pruned, processor, rows, 8, batch_rows=7)
        assert alone == together[b * len(rows) : (b + 1) * len(rows)]


def test_a_row_that_ends_leaves_the_batch_and_the_others_do_not_notice(tiny, rows):
    model, processor = tiny
    whole = answer(model, processor, rows, 10)
    ids = [processor.tokenizer(a.text)["input_ids"] for a in whole]
    model.generation_config.eos_token_id = [2, next(i for i in ids[0][1:] if i not in ids[4])]
    ended = answer(model, processor, rows, 10)
    assert ended[0].ended and ended[0].tokens < whole[0].tokens and whole[0].text.startswith(ended[0].text)
    assert not ended[4].ended and ended[4] == whole[4]


def test_answers_are_asked_once_and_their_context_is_what_decides_them(tiny, rows, tmp_path, monkeypatch):
    model, processor = tiny
    config, units = resolve("smoke", max_new_tokens=5, batch_rows=2), Units(tmp_path / "u.sqlite", "x")
    said = answer_rows(model, processor, rows, "whole", units, config)
    assert [r["id"] for r in said] == [r["id"] for r in rows] and {r["method"] for r in said} == {"whole"}
    monkeypatch.setattr("medprune.answers.decoding.answer", None)
    assert answer_rows(model, processor, rows, "whole", units, config) == said
    asked = [r | {"asked": f"{r['id']} and its picture"} for r in rows]
    other = [asked[0] | {"asked": "another picture of that name"}, *asked[1:]]
    contexts = [answers_context(*x) for x in (("m", asked, 5), ("m", asked, 6), ("n", asked, 5), ("m", other, 5))]
    assert len(set(contexts)) == 4 and contexts[0] == answers_context("m", asked, 5)


def test_the_prefill_is_not_in_the_time_and_the_last_step_is(monkeypatch):
    """A GPU that takes 9 s for a prompt and 1 s a token, and works on while nobody waits for it."""
    clock = {"now": 0.0, "given": 0.0}

    def forward(model, ids, cache, pixels=None):
        clock["given"] += 9.0 if pixels is not None else 1.0
        return torch.zeros(1, 4)

    def synchronize(device):
        assert device.type == "cuda"
        clock["now"], clock["given"] = clock["now"] + clock["given"], 0.0

    monkeypatch.setattr(timing, "forward", forward)
    monkeypatch.setattr(timing, "LIMIT_S", 1e9)
    monkeypatch.setattr(timing, "open_image", lambda _: None)
    monkeypatch.setattr(timing, "roomy_cache", lambda *_: None)
    monkeypatch.setattr(timing, "parts", lambda _: types.SimpleNamespace(blocks=[]))
    monkeypatch.setattr(timing, "prompt_text", lambda *_: "")
    monkeypatch.setattr(timing, "encode", lambda *_: {"input_ids": [torch.zeros(3)], "pixel_values": torch.zeros(1)})
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    model = torch.nn.Module()
    model.device, model.dtype = torch.device("cuda"), torch.float16
    measured = timing.measure_decoding(model, None, {"path": "", "question": ""}, new_tokens=4)
    assert measured["ms_per_token"] == pytest.approx(1000)


def test_peak_memory_is_the_weights_and_what_the_process_grows_by():
    linear = torch.nn.Linear(1000, 1000)
    with timing.peak_memory(linear) as peak:
        held = torch.ones(50_000_000)
        time.sleep(0.02)
        del held
    assert 204e6 <= peak["bytes"] < 260e6
