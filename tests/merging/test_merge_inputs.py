# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""What `merge_experts` is given: wrapped and altered models, and batches of every wrong form."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import tiny_model
from tuner_models import adapt, family

from modernalbert import ModernALBERTForMaskedLM, ModernALBERTForSequenceClassification, ModernALBERTModel, MoLConfig
from modernalbert.merge_experts import merge_experts


IDS = torch.arange(3, 39).view(2, 18)
MERGE_FIRST = "merge or remove the adapter first, and load a quantised model in floating point"


def with_lora(target):
    model = tiny_model(ModernALBERTForMaskedLM)
    model.add_adapter(LoraConfig(r=2, target_modules=[target]))
    return model


def quantised(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def with_another_head():
    model = tiny_model(ModernALBERTForSequenceClassification)
    model.classifier = torch.nn.Linear(32, 7)
    return model


def with_mol_adapter():
    model = tiny_model(ModernALBERTModel, ffn_modulation="none")
    model.add_adapter(MoLConfig(num_experts=2))
    return model


def adapter_on_lora():
    model = family("llama")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    return get_peft_model(model, MoLConfig(num_experts=2))


def adapter_on_merged_adapter():
    model = get_peft_model(family("llama"), MoLConfig(num_experts=2))
    model.add_adapter("other", MoLConfig(num_experts=1))
    model.merge_adapter(["other"])
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (adapter_on_lora, r"layers\.0\.self_attn\.q_proj has an adapter of another type"),
        (adapter_on_merged_adapter, "'other' is merged into the base; unmerge it first"),
        (lambda: with_lora("Wqkv"), rf"groups\.0\.attn\.Wqkv\.lora_A\.default\.weight.*: {MERGE_FIRST}"),
        (lambda: with_lora("Wi"), rf"groups\.0\.mlp\.Wi\.lora_A\.default\.weight.*: {MERGE_FIRST}"),
        (
            lambda: get_peft_model(quantised(family("llama")), MoLConfig()),
            "has a Linear, which is quantised: load the base",
        ),
        (lambda: quantised(tiny_model(ModernALBERTModel)), rf"groups\.0\.attn\.Wqkv\..*: {MERGE_FIRST}"),
        (with_another_head, "a model made from it would lose classifier.weight, classifier.bias"),
        (lambda: tiny_model(ModernALBERTModel).to("meta"), "weight is not in memory"),
        (lambda: tiny_model(ModernALBERTModel).to(torch.float8_e4m3fn), "is Tensor of torch.float8_e4m3fn"),
        (
            lambda: get_peft_model(tiny_model(ModernALBERTModel), LoraConfig(target_modules=["Wqkv"])),
            "whose active adapter is a LORA: merge_and_unload it first",
        ),
        (with_mol_adapter, "with MoL adapters of its own: load them with PeftModel.from_pretrained"),
        (lambda: torch.nn.DataParallel(tiny_model(ModernALBERTModel)), "model is a DataParallel.*unwrap it first"),
        (lambda: family("bert"), "ffn_modulation=None of BertModel is not allowed"),
        (lambda: tiny_model(ModernALBERTModel, ffn_modulation="depth_lora"), "ffn_modulation='depth_lora'"),
        (lambda: tiny_model(ModernALBERTModel, ffn_modulation="none"), "ffn_modulation='none'"),
    ],
)
def test_a_model_that_a_merge_would_damage_is_refused(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        merge_experts(make(), "uniform")
    assert len(str(caught.value)) < 500


def test_a_compiled_model_is_merged_as_the_model_it_is():
    model = tiny_model(ModernALBERTForMaskedLM)
    expected = merge_experts(model, "calibration", calibration=[{"input_ids": IDS}])
    compiled = torch.compile(model, backend="eager")
    compiled(IDS)
    model.compile(backend="eager")
    for given in (compiled, model):
        found = merge_experts(given, "calibration", calibration=[{"input_ids": IDS}])
        assert type(found.model) is ModernALBERTForMaskedLM
        torch.testing.assert_close(found.model(IDS).logits, expected.model(IDS).logits)
        assert found.relative_error_of_output == pytest.approx(expected.relative_error_of_output, rel=1e-4)


@pytest.mark.parametrize(
    "batches, message",
    [
        ({"input_ids": IDS}, "calibration is one dict: it must be a list of batches"),
        (IDS, "calibration is one Tensor"),
        ("a good film", "calibration is one str"),
        (["a good film"], r"calibration\[0\] is a str: it must be a batch of model inputs"),
        (
            [{"input_ids": IDS}, {"input_ids": [[1, 2]]}],
            r"calibration\[1\]\['input_ids'\] is a list: it must be a tensor",
        ),
        ([], "at least one batch"),
        ([{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}], "without tokens"),
    ],
)
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_batches_that_are_none_are_one_sentence(batches, message, kind):
    model = tiny_model(ModernALBERTModel) if kind == "model" else adapt(family("llama"))
    with pytest.raises(ValueError, match=message) as caught:
        merge_experts(model, "uniform", calibration=batches)
    assert len(str(caught.value)) < 300
    assert kind == "model" or list(model.peft_config) == ["default"]


def test_weights_that_are_no_average_are_said(caplog):
    report = merge_experts(tiny_model(ModernALBERTModel), [0.4] * 4)
    (note,) = report.notes
    assert note == "The weights add up to 1.6, not to 1: the merged expert is no average of the experts."
    assert note in caplog.text and note in report.to_markdown() and report.to_dict()["notes"] == [note]
    assert not merge_experts(tiny_model(ModernALBERTModel), [0.4, 0.3, 0.2, 0.1]).notes


def test_batches_to_measure_on_are_measured_once_and_nothing_is_held_out(monkeypatch):
    model = tiny_model(ModernALBERTModel)
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    text = [{"input_ids": IDS + i} for i in range(5)]
    report = merge_experts(model, method="calibrated", calibration=text, measure_on=text[:1])
    assert report.measured_on == "batches of their own" and len(forwards) == 5 + 2 * 5 + 1  # usage, two fits, errors


def test_a_peft_model_is_merged_and_left_as_it_was():
    model = adapt(family("bert"), expert_mixing="uniform")
    inputs = {"input_ids": IDS, "attention_mask": (torch.arange(18) < 15).long().expand(2, 18)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(**inputs).last_hidden_state
    report = merge_experts(model.train(), "uniform", calibration=[inputs])
    assert model.training and list(model.peft_config) == ["default"] and model.active_adapter == "default"
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())
    assert type(report.model) is type(report.base) is type(family("bert")) and report.folded
    torch.testing.assert_close(report.model(**inputs).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert report.relative_error_of_output < 1e-5 and report.parameters_after < report.parameters_before
    with pytest.raises(ValueError, match="not allowed for an adapter"):
        merge_experts(model, method="calibrated", calibration=[inputs])
    with pytest.raises(ValueError, match="save_as_lora"):
        model.merge_experts("uniform").save("nowhere")
