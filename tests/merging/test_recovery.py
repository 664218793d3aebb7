# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Recovery: a merged model is trained to give the routed one's outputs, and stays a LoRA on the shared model."""

import pytest
import torch
from peft import PeftModel
from small_models import tiny_model
from tuner_models import adapt, family

from modernalbert import (
    ModernALBERTForMaskedLM,
    ModernALBERTForMultipleChoice,
    ModernALBERTForQuestionAnswering,
    ModernALBERTForSequenceClassification,
    ModernALBERTForTokenClassification,
    ModernALBERTModel,
)
from modernalbert.merge_experts import merge_experts
from modernalbert.merging.recovery import distillation_loss


IDS = torch.arange(3, 39).view(2, 18)
MASK = (torch.arange(18) < 15).long().expand(2, 18)
KL = "KL divergence of the outputs"


@pytest.mark.parametrize(
    "model_class, batch, changes, loss",
    [
        (ModernALBERTForMaskedLM, {"labels": IDS.where(IDS % 3 == 0, -100)}, {}, KL),
        (ModernALBERTForMaskedLM, {}, {"mol_positions": "last"}, KL),
        (ModernALBERTForSequenceClassification, {"labels": torch.tensor([0, 1])}, {}, KL),
        (ModernALBERTForSequenceClassification, {}, {"problem_type": "multi_label_classification"}, KL),
        (ModernALBERTForSequenceClassification, {}, {"num_labels": 1}, "relative squared distance of the logits"),
        (ModernALBERTForTokenClassification, {}, {}, KL),
        (ModernALBERTForQuestionAnswering, {}, {}, KL),
        (ModernALBERTForMultipleChoice, {"input_ids": IDS.view(2, 2, 9), "attention_mask": None}, {}, KL),
        (ModernALBERTModel, {}, {}, "relative squared distance of the states"),
        ("bert", {}, {}, "relative squared distance of the states"),
        ("llama", {}, {}, KL),
    ],
)
def test_recovery_lowers_its_loss_and_trains_the_merged_experts_alone(model_class, batch, changes, loss):
    is_adapter = isinstance(model_class, str)
    model = adapt(family(model_class)) if is_adapter else tiny_model(model_class, **changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = {"input_ids": IDS, "attention_mask": MASK} | batch
    text = [{name: value for name, value in batch.items() if value is not None}] * 3
    plain = merge_experts(model, "uniform", calibration=text)
    report = merge_experts(model, "uniform", calibration=text, recover_steps=15, recover_learning_rate=1e-3)
    assert report.recovery.steps == 15 and report.recovery.loss == loss
    assert 0 < report.recovery.loss_after < 0.8 * report.recovery.loss_before
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    # What was trained is the low-rank part: the model beside it is the one without experts.
    changed = [
        name for name, value in report.model.state_dict().items() if not value.equal(plain.model.state_dict()[name])
    ]
    assert changed and all(name.rpartition(".")[0] in report.factors or ".mol_" in name for name in changed)
    assert report.rank == plain.rank and {A.shape[0] for A, _ in report.factors.values()} == {report.rank}
    assert "15 steps of distillation" in report.to_markdown()


def test_a_recovered_adapter_is_the_folded_model_to_stock_peft(tmp_path):
    model = tiny_model(ModernALBERTForSequenceClassification)
    text = [{"input_ids": IDS, "attention_mask": MASK}] * 2
    report = merge_experts(model, method="svd", rank=2, calibration=text, recover_steps=5)
    report.save(tmp_path / "out")
    base = ModernALBERTForSequenceClassification.from_pretrained(tmp_path / "out/base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "out/adapter").eval()
    torch.testing.assert_close(adapted(**text[0]).logits, report.model(**text[0]).logits, atol=1e-5, rtol=1e-5)
    assert adapted.peft_config["default"].r == 2


def test_the_loss_is_the_divergence_of_distributions():
    routed, merged = torch.randn(5, 3), torch.randn(5, 3)
    found, name = distillation_loss({"logits": routed}, {"logits": merged})
    p = routed.softmax(-1)
    expected = (p * (p.log() - merged.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(found, expected)
    yes = routed.sigmoid()
    found, _ = distillation_loss({"logits": routed}, {"logits": merged}, is_multi_label=True)
    other = merged.sigmoid()
    expected = (yes * (yes / other).log() + (1 - yes) * ((1 - yes) / (1 - other)).log()).mean()
    torch.testing.assert_close(found, expected)
    found, name = distillation_loss({"states": routed}, {"states": merged})
    torch.testing.assert_close(found, (merged - routed).square().sum() / routed.square().sum())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"recover_steps": 3}, "recover_steps is not allowed without calibration batches"),
        ({"recover_steps": -1}, "recover_steps=-1 is not allowed"),
        ({"recover_learning_rate": 0.1}, "not allowed without recover_steps"),
        ({"recover_steps": 1, "recover_learning_rate": 0.0}, "recover_learning_rate=0.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        merge_experts(tiny_model(ModernALBERTModel), **arguments)


def test_half_precision_is_not_trained():
    with pytest.raises(ValueError, match="load it in float32 first"):
        merge_experts(tiny_model(ModernALBERTModel).bfloat16(), calibration=[{"input_ids": IDS}], recover_steps=1)
