"""Predicted peaks held against what autograd saves, and the verdicts on faked devices of 16 GB and 4 GB."""

import pytest
import torch

from medprune.runs import preflight
from medprune.models.sizes import GIB, account
from medprune.settings import STAGES
from medprune.settings import resolve, settings
from medprune.models.sizes import named_config

SEVEN = named_config("llava-1.5-7b")
T4 = {"name": "a faked T4", "memory_bytes": 15_828_320_256, "disk_bytes": 200 * GIB, "cuda": True}
SMALL = {"name": "a faked 4 GB GPU", "memory_bytes": 4_000_000_000, "disk_bytes": 200 * GIB, "cuda": True}
CPU = {"name": "a faked laptop", "memory_bytes": 64 * GIB, "disk_bytes": 200 * GIB, "cuda": False}
# A LLaVA the size of the `local` profile's.
LOCAL = {
    "model_type": "llava", "tie_word_embeddings": True,
    "vision_config": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "image_size": 96,
                      "patch_size": 16},
    "text_config": {"vocab_size": 49216, "hidden_size": 576, "intermediate_size": 1536,
                    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
}  # fmt: skip


def small(blocks: int) -> dict:
    return {
        "model_type": "llava", "image_token_index": 63,
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                          "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
                          "patch_size": 14},
        "text_config": {"model_type": "llama", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256,
                        "num_hidden_layers": blocks, "num_attention_heads": 8, "num_key_value_heads": 2},
    }  # fmt: skip


def saved_bytes(blocks: int, checkpointing: bool, rows: int = 2, tokens: int = 64) -> int:
    """Count the bytes autograd keeps for the backward pass of a LoRA step, beyond the parameters."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration(LlavaConfig(**small(blocks))).to(torch.bfloat16)
    targets = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
    model = get_peft_model(model, LoraConfig(r=1, target_modules=targets))
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # storage -> (bytes, tensor): holding the tensor keeps its address from being used again

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(0, 60, (rows, tokens))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(n for n, _ in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_block_s_activations_are_what_autograd_saves(checkpointing):
    measured = (saved_bytes(3, checkpointing) - saved_bytes(2, checkpointing)) / (2 * 64)
    assert measured == pytest.approx(preflight.block_activation_bytes(small(2), checkpointing), rel=0.03)


def test_lora_params_are_peft_s():
    from peft import LoraConfig, get_peft_model
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(**small(3)))
        model = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*_proj"))
    real = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert preflight.lora_params(small(3), 4) == real == preflight.lora_params(small(4), 4, blocks_removed=1)


def test_predictions_grow_with_what_they_depend_on():
    def train(batch=4, tokens=900, base_bits=4, checkpointing=True, removed=0):
        return preflight.predict_training_bytes(SEVEN, 16, batch, tokens, base_bits, checkpointing, removed)

    assert train(batch=8) > train() and train(tokens=1200) > train() and train(base_bits=16) > train()
    assert train(checkpointing=False) > train() > train(removed=7) > account(SEVEN, 7, 4).weights_bytes

    def answer(rows=4, context=800, bits=4, removed=0):
        return preflight.predict_generation_bytes(SEVEN, rows, context, bits, removed)

    assert answer(rows=8) > answer() and answer(context=1000) > answer() and answer(bits=16) > answer()
    assert answer() > answer(removed=7) > account(SEVEN, 7, 4, context=800, batch=4).weights_bytes
    assert preflight.predict_awq_bytes(SEVEN, 8, 800) > preflight.predict_awq_bytes(SEVEN, 8, 800, whole_model=False)


def test_a_faked_t4_fits_what_it_can_and_is_told_what_to_change():
    chosen = settings(resolve("t4"))
    table = preflight.preflight(chosen, T4, SEVEN).set_index("stage")
    assert tuple(table.index) == STAGES and (table["peak_gib"] > 0).all()
    assert table.loc["02_layer_importance", "fits"] and table.loc["03_prune_sweep", "fits"]
    assert "set judge to server" in table.loc["06_judge_eval", "change"]
    assert (table["fits"] == (table["change"] == "")).all()
    two = preflight.preflight(chosen, {**T4, "count": 2}, SEVEN).set_index("stage")
    assert two.loc["06_judge_eval", "fits"], "a judge of 32B in 4 bits is spread over two T4s"


def test_a_proposed_change_makes_the_stage_fit():
    wide = settings(resolve("t4", batch_rows=64, batch_size=64, base_bits=4))
    before = preflight.preflight(wide, T4, SEVEN).set_index("stage")
    for stage, setting in (("02_layer_importance", "batch_rows"), ("01_finetune", "batch_size")):
        words = before.loc[stage, "change"].split()
        assert words[:3] == ["set", setting, "to"] and not before.loc[stage, "fits"]
        after = preflight.preflight(wide | {setting: int(words[3])}, T4, SEVEN).set_index("stage")
        assert after.loc[stage, "fits"], after.loc[stage, "change"]
        doubled = preflight.preflight(wide | {setting: 2 * int(words[3])}, T4, SEVEN).set_index("stage")
        assert not doubled.loc[stage, "fits"], "no smaller value than needed"


def test_several_settings_are_changed_where_one_is_not_enough():
    sixteen = settings(resolve("t4", batch_rows=512, base_bits=16))
    change = preflight.preflight(sixteen, {**T4, "memory_bytes": 7 * GIB}, SEVEN).set_index("stage")["change"]
    assert change["02_layer_importance"] == "set batch_rows to 1 (is 512), set base_bits to 4 (is 16)"


def test_a_faked_4_gb_gpu_refuses_7b_and_takes_the_local_size():
    table = preflight.preflight(settings(resolve("t4")), SMALL, SEVEN)
    assert not table["fits"].any()
    assert table["change"][:5].str.contains("no setting fits it into a faked 4 GB GPU").all()
    local = preflight.preflight(settings(resolve("local", batch_rows=32)), SMALL, LOCAL)
    assert local["fits"].all(), local.to_string()


def test_a_machine_without_cuda_refuses_t4_and_takes_local():
    refused = preflight.preflight(settings(resolve("t4")), CPU, SEVEN)
    assert not refused["fits"].any()
    assert refused["change"].str.contains("7.06B parameters needs a CUDA GPU, which a faked laptop").all()
    assert preflight.preflight(settings(resolve("local")), CPU, LOCAL)["fits"].all()


def test_a_full_disk_is_told_from_the_stage_that_no_longer_fits():
    table = preflight.preflight(settings(resolve("t4")), {**T4, "disk_bytes": 20 * GIB}, SEVEN).set_index("stage")
    assert "disk short" not in table.loc["01_finetune", "change"]
    assert "GiB of disk short" in table.loc["04_sft_recovery", "change"]
    assert table.loc["01_finetune", "disk_gib"] > account(SEVEN).weights_bytes / GIB


def test_judges():
    def size(**judge):
        return preflight.judge_bytes({"judge_bits": 4, **judge})

    assert size(judge="server") == 0 and 0 < size(judge="reference") < GIB
    assert size(judge="Qwen/Qwen2.5-0.5B-Instruct", judge_bits=16) == 1e9 + GIB
    assert size(judge="Qwen/Qwen2.5-0.5B-Instruct+reference+server", judge_bits=16) == 1e9 + GIB + size(judge="reference")
    unnamed = preflight.preflight(settings(resolve("t4", judge="my-judge")), T4, SEVEN).set_index("stage")
    assert "set judge to server" in unnamed.loc["06_judge_eval", "change"]


@pytest.mark.parametrize("lost, where", [("recover", "settings"), ("memory_bytes", "device")])
def test_a_missing_key_is_named(lost, where):
    chosen, device = settings(resolve("t4")), dict(T4)
    (chosen if where == "settings" else device).pop(lost)
    with pytest.raises(ValueError, match=f"{where}: '{lost}' is missing"):
        preflight.preflight(chosen, device, SEVEN)
