"""The `t4` profile from end to end at tiny size: the llava-hf layout, DermNet's folders, NF4 training, a chat judge.

Only sizes and paths differ from what a T4 runs; the device is whatever there is.
"""

import json

import nbformat
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AddedToken,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from medprune.answers.decoding import answer
from medprune.data.synthetic import draw
from medprune.models.families import parts
from medprune.models.loading import load, load_processor
from medprune.pruning.plan import make_plan
from medprune.quantizing.checkpoint import load_quantized
from medprune.runs.series import run_series
from medprune.settings import DATA, STAGES
from medprune.store import read_json
from medprune.tuning import merging
from medprune.tuning.finetune import add_lora, merge

# How llava-1.5-7b-hf's own template writes a chat.
LLAVA_CHAT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
JUDGE_CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
ACTINIC = "Actinic Keratosis Basal Cell Carcinoma and other Malignant Lesions"
PSORIASIS = "Psoriasis pictures Lichen Planus and related diseases"
PICTURES = {
    "rosacea": ("Acne and Rosacea Photos", "rosacea-{}.jpg"),
    "actinic keratosis": (ACTINIC, "actinic-keratosis-face-{}.jpg"),
    "basal cell carcinoma": (ACTINIC, "basal-cell-carcinoma-arm-{}.jpg"),
    "dermatitis": ("Atopic Dermatitis Photos", "atopic-dermatitis-{}.jpg"),
    "melanoma": ("Melanoma Skin Cancer Nevi and Moles", "malignant-melanoma-{}.jpg"),
    "psoriasis": (PSORIASIS, "psoriasis-{}.jpg"),
    "lichen planus": (PSORIASIS, "lichen-planus-{}.jpg"),
    "seborrheic keratosis": ("Seborrheic Keratoses and other Benign Tumors", "seborrheic-keratoses-ruff-{}.jpg"),
}
REPLIES = ["I cannot say."] + [
    json.dumps({"truthfulness": i % 6, "groundedness": (2 * i + 1) % 6, "hallucination": (i + 3) % 6}) for i in range(12)
]


def llama_tokenizer():
    """Build what the hub's tokenizer.json holds: BPE with byte fallback over one run of words, <s> put in front."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    texts = [(DATA / "conditions.json").read_text(encoding="utf-8"), "USER: ASSISTANT:"]
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False))
    core.pre_tokenizer = None
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def save_llava(folder):
    """Save a random LLaVA as llava-hf lays out LLaVA-1.5: float16, penultimate CLIP layer, a head of its own."""
    tokenizer = llama_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
        ),
        text_config=LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=1024, rms_norm_eps=1e-5, vocab_size=len(tokenizer) + -len(tokenizer) % 64,
            tie_word_embeddings=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=4, vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).half()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer, patch_size=14, chat_template=LLAVA_CHAT, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_judge(folder):
    """Save a random chat model whose head knows a few whole replies: most can be parsed, and some cannot."""
    tokenizer = llama_tokenizer()
    tokenizer.add_tokens([AddedToken(reply, normalized=False) for reply in REPLIES])
    tokenizer.chat_template = JUDGE_CHAT
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=4096, initializer_range=0.2, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    replies = tokenizer.convert_tokens_to_ids(REPLIES)
    head, embeddings = torch.zeros(config.vocab_size, 64), model.model.embed_tokens.weight.data
    head[replies] = torch.randn(len(replies), 64)
    embeddings[replies] = 0
    embeddings[replies, 0] = 100.0  # a reply is followed by the end of sequence
    head[replies, 0], head[2, 0] = 0.0, 100.0
    model.lm_head.weight.data.copy_(head)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_pictures(folder):
    for number, (condition, (home, name)) in enumerate(PICTURES.items()):
        for split, several in (("train", 2), ("test", 1)):
            for i in range(several):
                path = folder / split / home / name.format(70 + i)
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(condition, 1000 * (split == "test") + 10 * number + i, 64)[0].save(path, quality=95)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t4")
    save_llava(folder / "llava")
    save_judge(folder / "judge")
    save_pictures(folder / "dermnet")
    sizes = {"batch_size": 2, "save_every": 1, "max_new_tokens": 8, "batch_rows": 6, "awq_rows": 4, "kept_methods": ["bnb"]}
    sizes |= {"search_images": 2, "selection_images": 4, "evaluations": 8, "finalists": 1}
    paths = {"embedding": "minilm", "judge": str(folder / "judge")}
    parameters = {
        "base": str(folder / "llava"), "images": str(folder / "dermnet"), "n_train": 16, "n_test": 8, "sft_steps": 2,
        "recovery_steps": 2, "n_calibration": 2, "calibration_tokens": 6, "blocks_removed": [0, 1, 2], "recover": [1],
        "settings": sizes | paths,
    }  # fmt: skip
    root = run_series("t4", "t4", parameters=parameters, runs_dir=str(folder / "runs"))
    return folder, root


def tensors(folder):
    return {k: v.float() for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_merging_nf4_adapters_adds_their_product_to_the_16_bit_weights(series, tmp_path, monkeypatch):
    folder, _ = series
    adapted = add_lora(load(folder / "llava", bits=4)[0], 4, 8)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.01)
    deltas = {n: m.scaling["default"] * m.lora_B["default"].weight.detach().float() @ m.lora_A["default"].weight.detach().float()
              for n, m in adapted.named_modules() if hasattr(m, "get_delta_weight")}  # fmt: skip
    with pytest.raises(ValueError, match="16-bit"):
        merge(adapted)
    for parameter in parts(adapted).projector.modules_to_save["default"].parameters():
        parameter.data.add_(1)
    adapted.save_pretrained(tmp_path / "adapters")
    plan = make_plan(adapted.config, [2], "")
    monkeypatch.setattr(merging, "SHARD_BYTES", 2**16)
    merging.merge_folder(folder / "llava", tmp_path / "adapters", None, tmp_path / "merged", context="x")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2, "the test needs several files"
    whole, after = (dict(load(f, dtype=torch.float32)[0].named_parameters()) for f in (folder / "llava", tmp_path / "merged"))
    assert len(deltas) == 42 and whole.keys() == after.keys()
    for name, tensor in whole.items():
        expected, rounding = tensor, 0
        if (key := f"base_model.model.{name.removesuffix('.weight')}") in deltas:
            expected, rounding = tensor + deltas[key], 2**-11  # of float16, in which it is written
        elif "projector" in name:
            expected, rounding = tensor + 1, 2**-7  # trained in bfloat16 here
        torch.testing.assert_close(after[name], expected, rtol=rounding, atol=rounding / 50, msg=name)
    with pytest.raises(ValueError, match="has no place for the adapter of model.language_model.layers.5"):
        merging.merge_folder(folder / "llava", tmp_path / "adapters", plan, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_every_stage_ran_with_the_settings_of_the_profile(series):
    _, root = series
    made_with = read_json(root / "01_finetune" / "manifest.json")["settings"]
    assert all((root / stage / "manifest.json").exists() for stage in STAGES)
    assert (made_with["base_bits"], made_with["judge_bits"], made_with["lora_r"]) == (4, 4, 16)
    conditions = [r["condition"] for r in read_json(root / "01_finetune" / "splits.json")["test"]]
    assert sorted(conditions) == sorted(PICTURES)


def test_adapters_are_folded_into_the_16_bit_base_not_into_nf4(series):
    folder, root = series
    base, tuned = tensors(folder / "llava"), tensors(root / "01_finetune" / "model")
    assert base.keys() == tuned.keys()
    linears = [k for k in base if "language_model" in k and k.endswith("_proj.weight")]
    assert len(linears) == 6 * 7
    for name, tensor in base.items():
        change = ((tuned[name] - tensor).norm() / tensor.norm()).item() if tensor.norm() else 0.0
        trained = name in linears or "multi_modal_projector" in name
        # bfloat16 rounds by 0.2 %; NF4, which would have been merged into, by about 9 %
        assert change < (0.03 if trained else 0.005), name
    assert any(not torch.equal(tuned[k].bfloat16(), base[k].bfloat16()) for k in linears)
    assert "quantization_config" not in read_json(root / "01_finetune" / "model" / "config.json")


def test_recovered_models_are_pruned_and_in_16_bits(series):
    _, root = series
    plan = read_json(root / "03_prune_sweep" / "plans" / "pruned-1.json")
    tuned = tensors(root / "01_finetune" / "model")
    recovered = tensors(root / "04_sft_recovery" / "model-recovered-1")
    for place, block in enumerate(plan["kept"]):
        name = "language_model.model.layers.{}.mlp.up_proj.weight"
        a, b = tuned[name.format(block)], recovered[name.format(place)]
        assert (a - b).norm() < 0.03 * a.norm()
    assert name.format(len(plan["kept"])) not in recovered


def test_all_four_methods_are_there_and_smaller(series):
    _, root = series
    table = pd.read_csv(root / "05_awq_vs_bnb" / "quantization.csv")
    for model in ("original", "recovered-1"):
        assert {"awq", "bnb", "hqq", "rtn"} <= set(table[table.model == model].quantizer)
    whole = read_json(root / "01_finetune" / "metrics.json")["stored_bytes"]
    assert (table.stored_bytes < whole).all()


def test_nf4_folder_saved_in_the_notebook_answers_as_its_model_did(series):
    _, root = series
    said = pd.read_csv(root / "05_awq_vs_bnb" / "scores.csv", keep_default_na=False)
    said = said[said.method == "bnb-original"]
    paths = {r["key"]: r["path"] for r in read_json(root / "01_finetune" / "splits.json")["test"]}
    folder = root / "05_awq_vs_bnb" / "quantized" / "bnb-original"
    rows = [{"path": paths[r.key], "question": r.question} for r in said.itertuples()]
    again = answer(load_quantized(folder), load_processor(folder), rows, 8, 6)
    assert [a.text for a in again] == said.answer.tolist()


def test_replies_that_cannot_be_read_are_counted_and_said(series):
    _, root = series
    scores = pd.read_csv(root / "05_awq_vs_bnb" / "scores.csv")
    summary = pd.read_csv(root / "05_awq_vs_bnb" / "quantization.csv")
    unread = int(scores.score_percent.isna().sum())
    assert 0 < unread < len(scores) and summary.unparsed.sum() == unread
    cells = nbformat.read(root / "05_awq_vs_bnb" / "05_awq_vs_bnb.ipynb", as_version=4).cells
    printed = "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)
    assert f"{unread} of {len(scores)} replies of the judge chat:judge could not be read" in printed
