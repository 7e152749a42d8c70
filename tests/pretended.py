"""Checks of the pretended GPU, each run in a process of its own: python tests/pretended.py NAME FOLDER."""

import gc
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from medprune import device
from medprune.rehearsing import card
from medprune.settings import PROFILES, REPO, resolve

torch.inference_mode = card.no_grad  # before what decorates its functions with it is imported
from medprune.rehearsing import rehearsal, stage  # noqa: E402

GIB = 2**30
T4 = int(14.7 * GIB) - rehearsal.CONTEXT_BYTES
SMALLER = int(0.8 * 14.7 * GIB) - rehearsal.CONTEXT_BYTES
QUESTIONS = ("What is this?", "Describe its signs, please.", "How is it treated?")


def start(cards=1, limit=T4):
    ledger = card.start(cards, limit)
    device.KIND = card.NAME
    return ledger, [torch.device(card.NAME, n) for n in range(cards)]


def bytes_are_counted_once_and_given_back(folder):
    ledger, (gpu,) = start(limit=3 * 2**20)
    whole = torch.zeros(2**18).to(gpu)
    view = whole.view(2, -1)[0]
    assert ledger.now == [2**20] and ledger.peak == [2**20]
    other = view * 2
    assert ledger.now == [2**20 + 2**19]
    del whole
    assert ledger.now == [2**20 + 2**19], "the view still holds it"
    del view, other
    assert ledger.now == [0] and ledger.peak == [2**20 + 2**19]
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.zeros(2**20, device=gpu)
    assert ledger.now == [0]
    weight = torch.nn.Parameter(torch.zeros(4, 2**10).to(gpu).half())
    weight.data = weight.data.float()
    assert ledger.now == [2**14] and weight.dtype == torch.float32 and weight.elem.dtype == torch.float32


def devices_do_not_mix(folder):
    _, (one, two) = start(2)
    here, there, host = torch.ones(3).to(one), torch.ones(3).to(two), torch.ones(3)
    for other in (there, host):
        with pytest.raises(RuntimeError, match="tensors on"):
            here + other
    assert (here + there.to(one)).device == one and (here + 1).device == one
    assert here[torch.tensor([0, 2])].shape == (2,), "indices may lie on the host"


def values_that_came_from_the_host_are_kept(folder):
    _, (gpu,) = start()
    ids, mask = torch.tensor([[3, 1, 4], [1, 5, 9]]).to(gpu), (torch.tensor([[3, 1, 4], [1, 5, 9]]) > 3).to(gpu)
    states = torch.randn(2, 3, 1000).to(gpu)
    assert ids[mask].tolist() == [4, 5, 9] and states[mask].shape == (3, 1000) and mask.sum().item() == 3
    ids[0, 0] = 7
    assert ids.tolist()[0] == [7, 1, 4]
    assert (states @ states.transpose(1, 2)).flatten()[0].item() == card.READ
    assert [states.argmax().item() for _ in range(3)].count(card.END) == 1


def values_are_compared_and_unknown_ones_taken_for_equal(folder):
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer

    from medprune.quantizing.awq import scale_groups

    _, (gpu,) = start()
    few, others = torch.ones(3).to(gpu), torch.tensor([1, 1, 1.01]).to(gpu)
    assert torch.equal(few, few.clone()) and not torch.equal(few, others)
    assert torch.allclose(few, others, atol=0.1) and not torch.allclose(few, others, rtol=0, atol=1e-3)
    assert torch.allclose(torch.zeros(4, 4096).to(gpu) * 2, torch.ones(4, 4096).to(gpu))
    block = LlamaDecoderLayer(LlamaConfig(hidden_size=4096, intermediate_size=64, num_attention_heads=32), 0).half().to(gpu)
    assert [group.offset for group in scale_groups(block)] == [0] * 4, "AWQ knows its norms"


def forms_that_were_seen_before_are_what_they_were(folder):
    ledger, (gpu,) = start()

    def work():
        x = torch.zeros(3, 700, 64).to(gpu)
        y = x.transpose(1, 2) * 2.0
        cut = torch.cat([y, y], 1)[:, :5] @ torch.nn.functional.layer_norm(x, (64,))[:, :, :7]
        top = x.topk(2)
        places = torch.arange(4).to(gpu)
        counted = places.add_(x.argmax(-1).flatten()[:4])
        outs = [x, y, cut, *top, counted, x.split(30, 2)[-1], x.half(), x.new_zeros(2, 9), torch.zeros(2000, device=gpu)]
        forms = [(o.shape, o.stride(), o.dtype, o.storage_offset(), o.truth is None) for o in outs]
        return forms, list(ledger.now), counted is places

    card._FORMS.clear()
    first, n = work(), len(card._FORMS)
    assert n > 5 and work() == first and len(card._FORMS) == n
    assert first[0][5] == ((4,), (1,), torch.int64, 0, True) and first[2], "what was added to is no longer known"
    assert ledger.now == [0]


def what_repeats_takes_the_memory_of_its_first_time(folder):
    from medprune.quantizing.packed import PackedLinear

    ledger, (gpu,) = start()
    layer, x = PackedLinear(4096, 4096).to(gpu), torch.zeros(20, 4096).half().to(gpu)
    known = card.remembered(PackedLinear._product, stage._packed_form)
    held, taken = ledger.now[0], []
    for product in (PackedLinear._product, known, known):
        ledger.peak = [held]
        out = product(layer, x)
        taken.append((ledger.peak[0] - held, ledger.now[0] - held, out.shape, out.stride(), out.dtype))
        del out
    assert taken[0] == taken[1] == taken[2] and taken[0][0] > 2 * 4096**2 // 8 and taken[0][1] == 2 * 20 * 4096
    assert known(layer, x[:7]).shape == (7, 4096), "other rows are another form"
    ledger.limit = held + taken[0][0] - 1
    with pytest.raises(torch.OutOfMemoryError):
        known(layer, x)


def training_takes_what_autocast_and_checkpointing_take(folder):
    ledger, (gpu,) = start()
    layer = torch.nn.Linear(1024, 1024).to(gpu)
    with torch.autocast(card.NAME, torch.float16):
        out = layer(torch.zeros(8, 1024).to(gpu))
    assert out.dtype == torch.float16
    torch.nn.functional.mse_loss(out.float(), torch.zeros(8, 1024).to(gpu)).backward()
    assert layer.weight.grad.dtype == torch.float32
    before = ledger.now[0]
    torch.optim.AdamW(layer.parameters(), foreach=False).step()
    assert ledger.now[0] == before, "the optimizer, and with it its states, is gone"


def files_of_holes_have_every_name_and_size(folder):
    tensors = {"large": torch.empty(2**21, device="meta"), "small": torch.arange(7), "one": torch.tensor(3), "half": torch.zeros(3).half()}
    card.write_holes(tensors, folder / "model.safetensors", {"format": "pt"})
    with safe_open(folder / "model.safetensors", "pt") as opened:
        assert set(opened.keys()) == set(tensors) and opened.metadata() == {"format": "pt"}
        assert torch.equal(opened.get_tensor("small"), tensors["small"])
        assert opened.get_tensor("large").shape == (2**21,)
    found = (folder / "model.safetensors").stat()
    assert found.st_size > 2**23 and found.st_blocks * 512 < 2**20


def seven_billion_parameters(folder, cards):
    """Load LLaVA-1.5-7B at its full shape as NF4 and in 16 bits, and answer; return the ledger."""
    from medprune.answers import decoding
    from medprune.models import loading

    ledger, _ = start(cards)
    rehearsal.make_base(folder / "llava")
    paths = sorted((rehearsal.make_images(folder / "images", 1, 0)).rglob("*.jpg"))
    rows = [{"path": str(path), "question": q} for path in paths for q in QUESTIONS]

    def answer(bits):
        model, processor = loading.load(folder / "llava", bits=bits)
        ledger.peak = list(ledger.now)
        return decoding.answer(model, processor, rows, 200, PROFILES["t4"]["batch_rows"])

    return ledger, answer


def one_t4_holds_nf4_and_no_16_bits_and_a_card_a_fifth_smaller_neither(folder):
    ledger, answer = seven_billion_parameters(folder, 1)
    gc.disable()  # NF4's layers refer to themselves: they stay until somebody collects
    assert len(answer(4)) == 24 and SMALLER < ledger.peak[0] < T4
    assert len(answer(4)) == 24, "the next model has the room of the last"
    device.release()
    assert ledger.now == [0], "an NF4 model that was let go stays"
    with pytest.raises(torch.OutOfMemoryError):
        answer(16)
    device.release()
    ledger.limit = SMALLER
    with pytest.raises(torch.OutOfMemoryError):
        answer(4)


def two_t4s_hold_16_bits_together(folder):
    ledger, answer = seven_billion_parameters(folder, 2)
    assert len(answer(16)) == 24
    assert all(0.5 * T4 < peak < T4 for peak in ledger.peak) and abs(ledger.peak[0] - ledger.peak[1]) < GIB


def two_t4s_weigh_the_options_of_closed_questions(folder):
    from medprune.answers import closed
    from medprune.models import loading

    ledger, _ = start(2)
    rehearsal.make_base(folder / "llava")
    path = next((rehearsal.make_images(folder / "images", 1, 0)).rglob("*.jpg"))
    model, processor = loading.load(folder / "llava", bits=16)
    rows = [{"path": str(path), "question": QUESTIONS[0], "options": ["It is acne.", "It is a wart."]}] * 2
    assert [len(nats) for nats in closed.log_likelihoods(model, processor, rows, 4)] == [2, 2]
    assert min(ledger.peak) > 0.4 * T4


def a_chat_judge_of_7b_finds_the_card_empty_and_reads_out_a_verdict(folder):
    from medprune.judging import chat
    from medprune.models import loading

    ledger, _ = start()
    rehearsal.make_base(folder / "llava")
    gc.disable()  # NF4's layers refer to themselves: they stay until somebody collects
    judge = chat.chat_judge(str(rehearsal.make_judge(folder / "judge")), quantize_4bit=True)
    model = loading.load(folder / "llava", bits=4)[0]
    held = ledger.now[0]
    del model
    ledger.peak = [0]
    row = {"question": QUESTIONS[0], "reference": "It is acne.", "answer": "Acne.", "kind": "name", "id": "1"}
    assert [judged.parsed for judged in judge([row] * 3)] == [True] * 3
    assert 3.5 * GIB < held < 5 * GIB < ledger.peak[0] < 8 * GIB, "the LLaVA is still on the card"


def notebook_01_begins_on_a_t4_by_itself(folder):
    ledger, _ = start()
    stage.store._digest = stage._named
    rehearsal.make_base(folder / "llava")
    rehearsal.make_images(folder / "dermnet", 3, 1)
    cells = json.loads((REPO / "notebooks" / "01_finetune.ipynb").read_text())["cells"][:15]
    space = {"__name__": "__main__"}
    for cell in (c for c in cells if c["cell_type"] == "code"):
        exec("".join(cell["source"]), space)
        if "parameters" in cell["metadata"].get("tags", ()):
            paths = {"base": str(folder / "llava"), "images": str(folder / "dermnet"), "n_train": 16, "n_test": 8}
            space |= paths | {"profile": "auto", "runs_dir": str(folder / "runs")}
            space["settings"] = {"embedding": "minilm", "n_calibration": 8, "awq_rows": 8}
    assert space["cfg"].name == "t4" and space["cfg"].held_bits == 4 and space["llava"].is_loaded_in_4bit
    assert 4 * GIB < ledger.now[0] < 5 * GIB
    assert resolve("t4").held_bits == 4


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "agg")
    globals()[sys.argv[1]](Path(sys.argv[2]))
