# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Model cards are those of the template, and say what was not measured."""

import subprocess
import sys

import pytest
from small_models import REPOSITORY, tiny_model

from modernalbert import ModernALBERTForSequenceClassification, ModernALBERTModel
from modernalbert.export import to_modernbert
from modernalbert.export.cards import default_card


CARDS = REPOSITORY / "model_cards"
WRITER = CARDS / "write_cards.py"


def test_the_cards_are_those_of_the_template():
    done = subprocess.run([sys.executable, WRITER, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
