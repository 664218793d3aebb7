# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a merge writes: every head and dtype, moved folders, sentence-transformers folders, and the documentation."""

import json
import re

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from small_models import run_command, tiny_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel
from tuner_models import COMMON, adapt, family

from modernalbert import (
    ModernALBERTForMaskedLM,
    ModernALBERTForMultipleChoice,
    ModernALBERTForQuestionAnswering,
    ModernALBERTForSequenceClassification,
    ModernALBERTForTokenClassification,
    ModernALBERTModel,
)
from modernalbert.export.hub_folder import export_to_hub_folder
from modernalbert.merge_experts import command, merge_experts


IDS = torch.arange(3, 39).view(2, 18)


@pytest.mark.parametrize(
    "model_class, changes",
    [
        (ModernALBERTModel, {"expert_mixing": "uniform"}),
        (ModernALBERTForMaskedLM, {"expert_mixing": "ema"}),
        (ModernALBERTForMaskedLM, {"tie_word_embeddings": False, "decoder_bias": True, "num_experts": 1}),
        (ModernALBERTForMaskedLM, {"embedding_size": None, "router_per_depth": True, "expert_mixing": "ema"}),
        (ModernALBERTForSequenceClassification, {"num_labels": 1, "expert_mixing": "uniform"}),
        (ModernALBERTForTokenClassification, {"mlp_bias": True, "attention_bias": True, "expert_mixing": "uniform"}),
        (ModernALBERTForQuestionAnswering, {"expert_mixing": "uniform"}),
        (ModernALBERTForMultipleChoice, {"expert_mixing": "uniform"}),
    ],
)
def test_every_head_is_the_same_model_folded_and_as_adapter_on_base(tmp_path, model_class, changes):
    model = tiny_model(model_class, torch.float64, **changes)  # these run merged, so that a merge is exact
    ids = IDS.view(2, 2, 9) if model_class is ModernALBERTForMultipleChoice else IDS
    merge_experts(model, changes.get("expert_mixing", "ema")).save(tmp_path / "out")
    loaded = {
        part: model_class.from_pretrained(tmp_path / "out" / part, dtype="auto").eval() for part in ("folded", "base")
    }
    loaded["adapter"] = PeftModel.from_pretrained(loaded.pop("base"), tmp_path / "out/adapter").eval()
    for part, found in loaded.items():
        assert found.dtype == torch.float64
        torch.testing.assert_close(found(input_ids=ids)[0], model(ids)[0], atol=1e-9, rtol=1e-9, msg=part)
    tied = model.config.tie_word_embeddings and model_class is ModernALBERTForMaskedLM
    assert ("decoder.weight" in load_file(tmp_path / "out/base/model.safetensors")) == (
        model_class is ModernALBERTForMaskedLM and not tied
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_command_keeps_the_dtype_and_loses_no_precision(tmp_path, nano_tokenizer, monkeypatch, capsys, dtype):
    model = tiny_model(ModernALBERTModel, dtype, vocab_size=30522, pad_token_id=0, expert_mixing="uniform")
    export_to_hub_folder(model, None, tmp_path / "model")  # half precision is stored, and loads as float32
    places = ("--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "out")
    code, _, error = run_command(monkeypatch, capsys, command, *places, "--weights", "uniform")
    assert code == 0, error
    for part in ("folded", "base"):
        state = load_file(tmp_path / "out" / part / "model.safetensors")
        assert {value.dtype for value in state.values()} == {dtype}
    exact = merge_experts(model if dtype == torch.float64 else model.float(), "uniform").model.state_dict()
    state = load_file(tmp_path / "out/folded/model.safetensors")
    assert all(torch.equal(value, exact[name].to(dtype)) for name, value in state.items())
    factors = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value.dtype for value in factors.values()} == {expected}


def test_a_folder_that_was_moved_loads_as_its_card_says(tmp_path, monkeypatch):
    model = tiny_model(ModernALBERTForSequenceClassification, expert_mixing="uniform")
    merge_experts(model, "uniform").save(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    card = (tmp_path / "moved/adapter/README.md").read_text()
    monkeypatch.chdir(tmp_path / "moved")
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1], names)
    torch.testing.assert_close(names["model"].eval()(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    # A base that is named by the user is found where it is put.
    merge_experts(model, "uniform").save(tmp_path / "named", base_model_name=str(tmp_path / "later/base"))
    (tmp_path / "named").rename(tmp_path / "later")
    adapted = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "later/adapter").eval()
    torch.testing.assert_close(adapted(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_an_uploaded_adapter_names_the_repository_of_its_base(tmp_path, monkeypatch, capsys):
    tiny_model(ModernALBERTForSequenceClassification).save_pretrained(tmp_path / "model")
    uploaded = []
    monkeypatch.setattr("modernalbert.merge_experts.push_folders", lambda *given: uploaded.append(given))
    places = ("--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "out")
    code, _, error = run_command(monkeypatch, capsys, command, *places, "--push_to_hub", "--hub_model_id", "me/m")
    assert code == 0, error
    found = [({place: folder.name for place, folder in folders.items()}, name) for folders, name in uploaded]
    # The root of me/m is the folded model: an adapter that named it would be applied twice.
    assert found == [({"": "base"}, "me/m-base"), ({"": "folded", "adapter": "adapter"}, "me/m")]
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/m-base"


def test_a_sentence_transformers_folder_stays_one(tmp_path, nano_tokenizer, monkeypatch, capsys):
    encoder = tiny_model(ModernALBERTModel, vocab_size=30522, pad_token_id=0, expert_mixing="uniform")
    encoder.save_pretrained(tmp_path / "encoder")
    nano_tokenizer.save_pretrained(tmp_path / "encoder")
    modules = [Transformer(str(tmp_path / "encoder")), Pooling(32, "cls"), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "query: "})
    model.save(str(tmp_path / "model"))
    places = ("--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "out", "--weights", "uniform")
    code, _, error = run_command(monkeypatch, capsys, command, *places)
    assert code == 0, error
    texts = ["a good film", "dull"]
    expected = torch.tensor(model.encode(texts, prompt_name="query"))
    for part in ("folded", "base"):
        merged = SentenceTransformer(str(tmp_path / "out" / part), device="cpu")
        assert [type(module) for module in merged] == [type(module) for module in model]
        found = torch.tensor(merged.encode(texts, prompt_name="query"))
        assert torch.allclose(found, expected, atol=1e-5) == (part == "folded")


def test_a_sentence_transformers_folder_of_another_encoder_stays_one(tmp_path, nano_tokenizer, monkeypatch, capsys):
    base = BertModel(BertConfig(**COMMON | {"vocab_size": 30522})).eval()
    base.save_pretrained(tmp_path / "encoder")
    nano_tokenizer.save_pretrained(tmp_path / "encoder")
    modules = [Transformer(str(tmp_path / "encoder")), Pooling(32, "cls"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "model"))
    adapted = adapt(base, expert_mixing="uniform")
    adapted.save_pretrained(tmp_path / "adapter")
    words = ("--model_name_or_path", tmp_path / "model", "--adapter_name_or_path", tmp_path / "adapter")
    words += ("--output_dir", tmp_path / "out", "--weights", "uniform")
    code, _, error = run_command(monkeypatch, capsys, command, *words)
    assert code == 0, error
    texts = ["a good film", "dull"]
    with torch.no_grad():
        states = adapted(**nano_tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state
    expected = torch.nn.functional.normalize(states[:, 0], dim=-1)
    for part in ("folded", "base"):
        merged = SentenceTransformer(str(tmp_path / "out" / part), device="cpu")
        assert [type(module) for module in merged] == [type(module) for module in modules]
        found = torch.tensor(merged.encode(texts))
        assert torch.allclose(found, expected, atol=1e-5) == (part == "folded")


@pytest.mark.parametrize("kind", ["other task", "other shape"])
def test_an_adapter_on_another_base_names_its_own(tmp_path, monkeypatch, capsys, kind):
    adapter = adapt(family("bert"))
    adapter.base_model.peft_config["default"].base_model_name_or_path = "me/right-base"
    adapter.save_pretrained(tmp_path / "adapter")
    base = (
        family("distilbert")
        if kind == "other task"
        else type(family("bert"))(
            family("bert").config.__class__(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, vocab_size=50
            )
        )
    )
    base.save_pretrained(tmp_path / "base")
    words = ("--model_name_or_path", tmp_path / "base", "--adapter_name_or_path", tmp_path / "adapter")
    code, _, error = run_command(monkeypatch, capsys, command, *words, "--output_dir", tmp_path / "out")
    assert code == 2 and error.count("me/right-base") == 1 and not (tmp_path / "out").exists(), error


def test_a_base_whose_weights_would_be_random_is_refused(tmp_path, monkeypatch, capsys):
    model = AutoModelForSequenceClassification.from_config(family("bert").config)
    model.bert.save_pretrained(tmp_path / "base")
    adapt(model.bert).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text()) | {"task_type": "SEQ_CLS"}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    words = ("--model_name_or_path", tmp_path / "base", "--adapter_name_or_path", tmp_path / "adapter")
    code, _, error = run_command(monkeypatch, capsys, command, *words, "--output_dir", tmp_path / "out")
    assert code == 2 and "has no classifier.bias, classifier.weight" in error and "would be random" in error, error


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, monkeypatch, capsys):
    tiny_model(ModernALBERTModel).save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model/model.safetensors")
    del state["groups.1.mlp.Wi.weight"]
    save_file(state, tmp_path / "model/model.safetensors", {"format": "pt"})
    places = ("--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "out")
    code, _, error = run_command(monkeypatch, capsys, command, *places)
    assert code == 2 and "it has no groups.1.mlp.Wi.weight, which would be random" in error, error


def test_recovery_by_the_command(tmp_path, nano_tokenizer, monkeypatch, capsys):
    tiny_model(ModernALBERTForMaskedLM, vocab_size=30522, pad_token_id=0).save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The film was a delight from start to end.\nNobody laughed once.\n" * 20)
    places = ("--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "out", "--save", "folded")
    how = ("--weights", "0.5,0.5,0.5,0.5", "--recover_steps", 5)
    code, _, error = run_command(monkeypatch, capsys, command, *places, *how)
    assert code == 2 and "--recover_steps needs --calibration_file" in error
    code, out, error = run_command(
        monkeypatch, capsys, command, *places, *how, "--calibration_file", tmp_path / "text.txt"
    )
    assert code == 0 and "The weights add up to 2, not to 1" in out and "5 steps of distillation" in out, error
    recovery = json.loads((tmp_path / "out/merge_report.json").read_text())["recovery"]
    assert recovery["steps"] == 5 and recovery["loss_after"] < recovery["loss_before"]
    code, out, _ = run_command(monkeypatch, capsys, command, "--help")
    assert "an average if the numbers add up to 1" in " ".join(out.split())
