# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Model cards are those of the template, and say what was not measured."""

import runpy

import pytest
from datasets import Dataset
from small_models import REPOSITORY, tiny_model
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from modernalbert import ModernALBERTForSequenceClassification, ModernALBERTModel
from modernalbert.export import export_to_hub_folder, to_modernbert
from modernalbert.export.cards import default_card
from modernalbert.training.length_grouped_trainer import LengthGroupedTrainer


CARDS = REPOSITORY / "model_cards"
WRITER = CARDS / "write_cards.py"
SIZES = ("nano", "tiny", "medium", "base", "large")


def test_the_cards_are_those_of_the_template(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(WRITER), "--check"])
    runpy.run_path(WRITER, run_name="__main__")  # exits with the name of a card that is not
    assert {file.stem for file in CARDS.glob("modernalbert-*.md")} == {f"modernalbert-{size}" for size in SIZES}


@pytest.mark.parametrize("name", ["tiny", "medium", "base", "large"])
def test_what_was_not_measured_is_said(name):
    card = (CARDS / f"modernalbert-{name}.md").read_text()
    assert "No checkpoint of this size has been trained" in card
    assert card.count("| not measured |") == 5 and "{" not in card.replace("{name}", "")
    assert ("reconstructed" in card) == (name != "tiny")


def test_a_card_of_an_export_says_how_it_is_loaded():
    routed = default_card(tiny_model(ModernALBERTModel), "me/mine")
    assert 'AutoModel.from_pretrained("me/mine", trust_remote_code=True)' in routed
    assert "Weights load as float32" in routed and "merge_experts.py" in routed
    changes = {"ffn_modulation": "none", "skip_first_attn_norm": True}
    plain = tiny_model(ModernALBERTForSequenceClassification, **changes)
    assert "merge_experts.py" not in default_card(plain, "me/mine")
    converted = default_card(to_modernbert(plain), "me/mine")
    assert "trust_remote_code" not in converted and "pad on the right" in converted


def loading_of(card: str) -> str:
    """The parts of a card that its reader needs to load the model."""
    assert "Weights load as float32" in card and 'dtype="bfloat16"' in card and "`folded/` loads as above" in card
    return card


def test_the_card_of_a_training_run_says_how_the_model_is_loaded(tmp_path):
    model = tiny_model(ModernALBERTForSequenceClassification)
    arguments = TrainingArguments(output_dir=tmp_path / "run", report_to="none", use_cpu=True)
    trainer = LengthGroupedTrainer(model, arguments)
    (tmp_path / "run").mkdir(exist_ok=True)
    for _ in range(2):  # written anew, not twice
        trainer.create_model_card(model_name="mine")
    card = loading_of((tmp_path / "run/README.md").read_text())
    loading = 'AutoModelForSequenceClassification.from_pretrained("run", trust_remote_code=True)'
    assert card.startswith("---\n") and card.count(loading) == 1
    bert = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=99)
    LengthGroupedTrainer(BertForSequenceClassification(bert), arguments).create_model_card(model_name="mine")
    assert "trust_remote_code" not in (tmp_path / "run/README.md").read_text()


def test_the_card_of_a_retrieval_run_says_it_too(tmp_path, nano_tokenizer):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from modernalbert.training.contrastive import RetrievalTrainer

    model = tiny_model(ModernALBERTModel, vocab_size=30522)
    folder = export_to_hub_folder(model, nano_tokenizer, tmp_path / "model", pooling="mean")
    embedder = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=tmp_path / "run", report_to="none", use_cpu=True, hub_model_id="me/mine"
    )
    rows = Dataset.from_dict({"anchor": ["a film"], "positive": ["a movie"]})
    (tmp_path / "run").mkdir(exist_ok=True)
    RetrievalTrainer(embedder, arguments, train_dataset=rows).create_model_card(model_name="mine")
    card = loading_of((tmp_path / "run/README.md").read_text())
    assert 'SentenceTransformer("me/mine", trust_remote_code=True)' in card
