# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""merge_experts.py --adapter_name_or_path: a MoL adapter's experts into a stock LoRA and a folded model."""

import json

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from small_models import run_command
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from tuner_models import COMMON, adapt, family

from modernalbert.merge_experts import command


@pytest.fixture
def folders(tmp_path):
    """A BERT with a new head for three labels, and an adapter that holds the head; inputs, and what they give."""
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**COMMON, num_labels=3)).eval()
    base.bert.save_pretrained(tmp_path / "base")
    model = adapt(base, expert_mixing="ema", task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "mol")
    inputs = {"input_ids": torch.randint(3, 100, (4, 9))}
    return tmp_path, inputs, model(**inputs).logits.detach()


def merge(monkeypatch, capsys, place, *options) -> tuple[int, str, str]:
    words = ["--model_name_or_path", place / "base", "--adapter_name_or_path", place / "mol"]
    return run_command(monkeypatch, capsys, command, *words, "--output_dir", place / "out", *options)


def test_a_merged_adapter_is_a_stock_lora_and_a_folded_model(monkeypatch, capsys, folders):
    place, inputs, logits = folders
    code, out, error = merge(monkeypatch, capsys, place)
    assert code == 0 and "Relative errors against token routing" in out, error
    # trained with one merged expert, so the sum is exact
    folded = AutoModelForSequenceClassification.from_pretrained(place / "out/folded")
    torch.testing.assert_close(folded(**inputs).logits, logits, rtol=0, atol=1e-5)
    config = PeftConfig.from_pretrained(place / "out/adapter")
    assert type(config) is LoraConfig and config.base_model_name_or_path == str(place / "out/base")
    base = AutoModelForSequenceClassification.from_pretrained(place / "out/base", num_labels=3)
    stock = PeftModel.from_pretrained(base, place / "out/adapter").eval()
    torch.testing.assert_close(stock(**inputs).logits, logits, rtol=0, atol=1e-5)
    report = json.loads((place / "out/merge_report.json").read_text())
    assert report["rank"] == 16 and report["relative_error_of_output"] < 1e-5 and len(report["layers"]) == 2
    # again, in its place, and less of it
    code, _, error = merge(monkeypatch, capsys, place, "--method", "svd", "--rank", 2, "--save", "folded")
    assert code == 0 and not (place / "out/adapter").exists(), error
    assert json.loads((place / "out/merge_report.json").read_text())["rank"] == 2


def test_an_adapter_on_a_modernalbert(monkeypatch, capsys, tmp_path):
    base = family("modernalbert")
    base.save_pretrained(tmp_path / "base")
    model = adapt(base, expert_mixing="uniform")
    model.save_pretrained(tmp_path / "mol")
    inputs = {"input_ids": torch.randint(3, 90, (2, 7))}
    logits = model(**inputs).logits.detach()
    code, _, error = merge(monkeypatch, capsys, tmp_path, "--weights", "uniform")
    assert code == 0, error
    folded = type(base).from_pretrained(tmp_path / "out/folded")
    torch.testing.assert_close(folded(**inputs).logits, logits, rtol=1e-5, atol=1e-5)


def test_mistakes_are_sentences(monkeypatch, capsys, folders):
    place, *_ = folders
    code, _, error = merge(monkeypatch, capsys, place, "--method", "calibrated", "--calibration_file", "t")
    assert code == 2 and "--method calibrated is not for adapters" in error
    code, _, error = merge(monkeypatch, capsys, place, "--adapter_name_or_path", place / "nowhere")
    assert code == 2 and "nowhere" in error and "cannot be loaded" in error
    lora = get_peft_model(family("bert"), LoraConfig(target_modules=["query"]))
    lora.save_pretrained(place / "lora")
    code, _, error = merge(monkeypatch, capsys, place, "--adapter_name_or_path", place / "lora")
    assert code == 2 and "is not a MoL adapter: its peft_type is LORA" in error
    code, _, error = merge(monkeypatch, capsys, place, "--weights", "0.5,0.5")
    assert code == 2 and "it must be 4 finite numbers" in error and not (place / "out").exists()
