"""Greedy answers on the tiny LLaVA against transformers' generate and each pruned model; their time and context."""

import copy
import time
import types

import pytest
import torch
import transformers
from PIL import Image
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from medprune.answers import decoding, timing
from medprune.answers.decoding import answer, answer_rows, answers_context
from medprune.answers.prompts import prompt_text, see
from medprune.models.attention import grouped_attention
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


@torch.inference_mode()
def test_questions_of_several_lengths_have_the_logits_of_each_alone(tiny, rows):
    """The first tokens after a question are forced, the same for all."""
    model, processor = tiny
    forced = torch.tensor([[7, 11, 13]])
    seen = decoding._seen(model, processor, rows[::3])
    cached = decoding._run_prefixes(model, seen, torch.full((3,), -1))
    asked = decoding._questions(processor, rows, [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(3)], seen)
    numbers, which, ids = map(list, zip(*asked, strict=True))
    assert len({len(x) for x in ids}) > 1, "the test needs questions of several lengths"
    cache = decoding._select(cached, which, max(map(len, ids)) + 3)
    padded, seen = decoding._pad(ids, cached.length, 3, model.device)
    logits = [decoding.forward(model, padded, cache, seen=seen)]
    logits += [decoding.forward(model, token.expand(9, 1), cache, seen=seen) for token in forced[0]]
    for number, found in zip(numbers, torch.stack(logits, 1), strict=True):
        text, image = prompt_text(processor, rows[number]["question"]), Image.open(rows[number]["path"])
        batch = processor(text=text, images=image, return_tensors="pt")
        whole = torch.cat([batch["input_ids"], forced], 1)
        alone = model(input_ids=whole, pixel_values=batch["pixel_values"], logits_to_keep=4).logits[0]
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("room", [0, 6])
def test_padding_gets_no_attention_in_a_one_token_step(room):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, 1, 4), torch.randn(3, 2, 9 + room, 4), torch.randn(3, 2, 9 + room, 4)
    value[:, :, 9:] = 0
    seen = torch.ones(3, 1, 1, 9, dtype=torch.bool)
    seen[1, ..., 2:5] = False
    layer = types.SimpleNamespace(num_key_value_groups=3, is_causal=True, training=False)
    arguments = layer, query, key[:, :, :9], value[:, :, :9]
    for mask in (seen, None, torch.zeros(3, 1, 1, 9).masked_fill(~seen, -torch.inf)):
        expected = sdpa_attention_forward(*arguments, mask)[0]
        torch.testing.assert_close(grouped_attention(*arguments, mask)[0], expected)
    key[1, :, 2:5] = 1e4
    again = grouped_attention(layer, query, key[:, :, :9], value[:, :, :9], seen)[0]
    torch.testing.assert_close(again, sdpa_attention_forward(*arguments, seen)[0])


def test_what_enters_a_block_may_lie_on_another_device():
    hidden, output = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, device="meta")
    skipping = decoding.RowSkip.__new__(decoding.RowSkip)
    skipping.rows = torch.tensor([5, -1])
    assert skipping._pass_by(5, None, (hidden,), output).is_meta
    assert decoding._branch(torch.tensor([0, 2, 3]), None, (hidden,), output).shape == (3, 3, 4)


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


def test_rows_that_ended_leave_when_they_are_a_quarter_and_the_others_do_not_notice(tiny, rows, monkeypatch):
    model, processor = tiny
    batches, plain = [], decoding.forward

    def forward(*arguments, **more):
        """Shift what is said at every step, for this model would repeat itself, its end of sequence too."""
        logits = plain(*arguments, **more).roll(len(batches), -1)
        batches.append(logits.argmax(-1).tolist())
        return logits

    monkeypatch.setattr(decoding, "forward", forward)
    model.generation_config.eos_token_id = -1
    whole = answer(model, processor, rows, 12)
    order = sorted(range(9), key=lambda i: len(processor.tokenizer(rows[i]["question"])["input_ids"]))
    said = dict(zip(order, zip(*batches[1:], strict=True), strict=True))  # the first batch is the prefixes
    assert {a.tokens for a in whole} == {12} and not any(a.ended for a in whole)
    ends = [said[i][i] for i in (1, 3, 6, 8)]
    lengths = {i: next((n for n, token in enumerate(tokens) if token in ends), 12) for i, tokens in said.items()}
    assert len(set(lengths.values())) > 4, "the test needs rows that end at several steps"
    batches.clear()
    model.generation_config.eos_token_id = ends
    for i, a in enumerate(answer(model, processor, rows, 12)):
        text = processor.tokenizer.decode(said[i][: lengths[i]], skip_special_tokens=True).strip()
        assert (a.text, a.tokens, a.ended) == (text, lengths[i], lengths[i] < 12)
    left = 9
    for step, batch in enumerate(batches[1:]):
        assert len(batch) == left
        going_on = sum(length > step for length in lengths.values())
        left = going_on if left - going_on >= left / 4 else left


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

    def wait():
        clock["now"], clock["given"] = clock["now"] + clock["given"], 0.0

    monkeypatch.setattr(timing, "forward", forward)
    monkeypatch.setattr(timing, "LIMIT_S", 1e9)
    monkeypatch.setattr(timing, "RoomyCache", lambda *_: None)
    monkeypatch.setattr(timing, "parts", lambda _: types.SimpleNamespace(blocks=[]))
    monkeypatch.setattr(timing, "see", lambda *_: types.SimpleNamespace(ids=torch.zeros(3)))
    monkeypatch.setattr(timing, "inputs_of", lambda _: {"pixel_values": torch.zeros(1)})
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(timing, "wait", wait)
    model = torch.nn.Module()
    model.dtype = torch.float16
    measured = timing.measure_decoding(model, None, {"path": "", "question": ""}, new_tokens=4)
    assert measured["ms_per_token"] == pytest.approx(1000)


def test_peak_memory_is_the_weights_and_what_the_process_grows_by():
    linear = torch.nn.Linear(5000, 5000, bias=False)  # pages that the system takes back meanwhile are few beside it
    with timing.peak_memory(linear) as peak:
        held = torch.ones(50_000_000)
        time.sleep(0.02)
        del held
    assert 280e6 <= peak["bytes"] < 360e6


def test_a_window_shorter_than_the_prompt_cuts_neither_prefix_nor_question(base, tiny, rows, monkeypatch):
    config = transformers.LlavaConfig.from_pretrained(base)
    kept = {k: v for k, v in config.text_config.to_dict().items() if k not in ("model_type", "architectures")}
    config.text_config = transformers.MistralConfig(**kept, sliding_window=6)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # random weights so small that attention hardly matters would hide it
        parameter.data *= 4
    seen, plain_forward = [], decoding.forward

    def forward(*args, **more):
        seen.append(plain_forward(*args, **more))
        return seen[-1]

    monkeypatch.setattr(decoding, "forward", forward)
    processor = tiny[1]
    answer(model, processor, rows[:3], max_new_tokens=1)  # three questions of unlike lengths about one picture
    found = torch.cat([logits for logits in seen[1:]])  # the first is the prefix's
    batches = []
    for row in rows[:3]:
        prompt = see(processor, row["path"], model.dtype, row["question"])
        with torch.inference_mode():
            logits = model(input_ids=prompt.ids[None], **prompt.inputs).logits
        batches.append((len(prompt.ids), logits[0, -1]))
    alone = torch.stack([logits for _, logits in sorted(batches, key=lambda x: x[0])])
    assert (alone - alone.flip(0)).abs().max() > 1  # questions matter
    torch.testing.assert_close(found, alone, atol=2e-3, rtol=0)
