# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A ModernALBERT written as transformers' ModernBERT computes the same, for the encoder and every head."""

import pytest
import torch
import transformers
from small_models import TINY, tiny_model, tiny_modernbert
from transformers import AutoModel, AutoModelForMaskedLM, ModernBertForMaskedLM

import modernalbert
from modernalbert import ModernALBERTForMaskedLM, ModernALBERTForSequenceClassification, ModernALBERTModel
from modernalbert.cli.errors import UserError
from modernalbert.export import to_modernbert
from modernalbert.export.hub_folder import load_model
from modernalbert.merge_experts import merge_experts


HEADS = (
    "Model ForMaskedLM ForSequenceClassification ForTokenClassification ForQuestionAnswering ForMultipleChoice".split()
)
LAYER_TYPES = ["full_attention", "sliding_attention", "sliding_attention"] * 2
PLAIN = {"skip_first_attn_norm": True, "ffn_modulation": "none", "layer_types": LAYER_TYPES}


def padded_batch(length: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 120, (3, length))
    mask = torch.ones(3, length, dtype=torch.long)
    third = length // 3
    padding = {"left": slice(0, third), "right": slice(length - third, None), "inside": slice(third, 2 * third)}
    mask[1, padding[side]] = 0
    return ids, mask


@torch.no_grad()
def assert_same_function(model, other, length: int = 24, side: str = "right", dtype: torch.dtype = torch.float32):
    ids, mask = padded_batch(length, side)
    if "MultipleChoice" in type(model).__name__:
        ids, mask = ids.unsqueeze(0), mask.unsqueeze(0)
    expected, actual = model(ids, mask).to_tuple(), other(input_ids=ids, attention_mask=mask).to_tuple()
    assert len(expected) == len(actual)
    for ours, theirs in zip(expected, actual):
        assert theirs.dtype == dtype and theirs.abs().max() > 0.1
        if ours.shape[:2] == mask.shape:  # token by token: at padding there is nothing to compare
            ours, theirs = ours[mask.bool()], theirs[mask.bool()]
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_computes_the_same(tmp_path, head, side):
    cls_pooling = head == "ForMultipleChoice"  # the head whose first token transformers finds under left padding
    pooling = "cls" if cls_pooling or side == "right" else "mean"
    changes = {"num_labels": 3, "classifier_pooling": pooling, "classifier_bias": True, "mlp_bias": True}
    model = tiny_model(getattr(modernalbert, f"ModernALBERT{head}"), **PLAIN, **changes)
    converted = to_modernbert(model)
    assert type(converted) is getattr(transformers, f"ModernBert{head}") and not converted.training
    assert_same_function(model, converted, side=side)
    converted.save_pretrained(tmp_path)
    loaded, info = type(converted).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_function(model, loaded, side=side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_rows(side):
    model = tiny_model(ModernALBERTForMaskedLM, **(PLAIN | {"local_attention": 128}))
    assert_same_function(model, to_modernbert(model), length=1024, side=side)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_inside_a_row(attention):
    """Local attention counts the tokens that are masked."""
    model = tiny_model(ModernALBERTModel, **(PLAIN | {"local_attention": 8, "attn_implementation": attention}))
    assert_same_function(model, to_modernbert(model), length=48, side="inside")


@pytest.mark.parametrize(
    "changes",
    [
        {"embedding_size": None},
        {"mol_intermediate_size": None, "group_depth": 1},
        {"mol_intermediate_size": 20},  # the modulated groups are the narrow ones
        {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True},
        {"decoder_bias": False, "tie_word_embeddings": False},
        {"hidden_activation": "silu", "classifier_activation": "relu", "norm_eps": 1e-3, "local_attention": 7},
        {"layer_types": ["sliding_attention"] * 6, "attn_implementation": "eager"},
        {"initializer_cutoff_factor": None, "pad_token_id": None},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0}},
    ],
)
def test_every_expressible_field_is_expressed(changes):
    model = tiny_model(ModernALBERTForMaskedLM, **(PLAIN | changes))
    assert_same_function(model, to_modernbert(model))


@pytest.mark.parametrize(
    "changes",
    [
        {"ffn_modulation": "depth_lora"},
        {"ffn_modulation": "depth_lora", "mol_positions": "last"},
        {"ffn_modulation": "mol", "num_experts": 1, "mol_positions": "last"},
        {"ffn_modulation": "mol", "expert_mixing": "uniform"},
        {"ffn_modulation": "mol", "expert_mixing": "ema", "router_per_depth": True},
    ],
)
def test_what_serves_all_tokens_alike_is_added_to_the_weights(changes):
    model = tiny_model(ModernALBERTForMaskedLM, std=0.1, **(PLAIN | changes))
    for group in model.model.groups:
        if hasattr(group.mlp, "mol_usage"):
            group.mlp.mol_usage.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert_same_function(model, to_modernbert(model))


@pytest.mark.parametrize("positions", ["all", "last"])
def test_a_merged_model_is_expressed(positions):
    changes = PLAIN | {"ffn_modulation": "mol", "mol_positions": positions}
    merged = merge_experts(tiny_model(ModernALBERTForMaskedLM, std=0.1, **changes), weights="ema").model
    assert_same_function(merged, to_modernbert(merged))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"skip_first_attn_norm": False}, "skip_first_attn_norm=False is not allowed"),
        ({"ffn_modulation": "mol"}, "num_experts=4 is not allowed"),
        ({"ffn_modulation": "moa"}, "ffn_modulation='moa' is not allowed"),
        ({"hidden_activation": "xielu"}, "hidden_activation='xielu' is not allowed"),  # it has parameters
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}},
            "rope_parameters=.*rope_type 'dynamic' of full_attention",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(changes, said):
    with pytest.raises(ValueError, match=said):
        to_modernbert(tiny_model(ModernALBERTModel, **(PLAIN | changes)))


def test_other_models_and_other_weights_are_refused():
    from peft import LoraConfig, get_peft_model

    for model in (
        torch.nn.Linear(1, 1),
        get_peft_model(tiny_model(ModernALBERTModel, **PLAIN), LoraConfig(target_modules=["Wqkv"])),
    ):
        with pytest.raises(ValueError, match="must be a ModernALBERT without an adapter"):
            to_modernbert(model)
    for module in ("Wqkv", "mlp.Wi"):
        model = tiny_model(ModernALBERTModel, **PLAIN)
        model.add_adapter(LoraConfig(target_modules=[module]))
        with pytest.raises(ValueError, match="without an adapter"):
            to_modernbert(model)
    quantized = torch.ao.quantization.quantize_dynamic(tiny_model(ModernALBERTModel, **PLAIN), {torch.nn.Linear})
    with pytest.raises(ValueError, match="load a quantised model in floating point"):
        to_modernbert(quantized)


def test_half_precision_keeps_its_dtype_and_rounds_once(tmp_path):
    model = tiny_model(ModernALBERTForMaskedLM, **PLAIN)
    half = tiny_model(ModernALBERTForMaskedLM, **PLAIN).bfloat16()
    converted = to_modernbert(half)
    assert {p.dtype for p in converted.parameters()} == {torch.bfloat16}
    expected = to_modernbert(half.float())
    for (name, actual), value in zip(converted.named_parameters(), expected.parameters()):
        assert torch.equal(actual, value.bfloat16()), name
    ids = torch.randint(3, 120, (2, 16))
    torch.testing.assert_close(converted(ids).logits.float(), model(ids).logits, atol=0.3, rtol=0.1)
    converted.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_the_tie_and_the_labels_survive_a_folder(tmp_path):
    model = tiny_model(ModernALBERTForMaskedLM, **PLAIN)
    to_modernbert(model).save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is ModernBertForMaskedLM
    assert loaded.decoder.weight.data_ptr() == loaded.model.embeddings.tok_embeddings.weight.data_ptr()
    labels = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
    classifier = tiny_model(ModernALBERTForSequenceClassification, problem_type="regression", **PLAIN, **labels)
    config = to_modernbert(classifier).config
    assert config.id2label == labels["id2label"] and config.problem_type == "regression"
    ours = ("auto_map", "group_depth", "lora_rank", "embedding_size", "expert_mixing", "mol_version")
    assert not any(name in config.to_dict() for name in ours)


@pytest.mark.parametrize(
    "layer_types, period",
    [(LAYER_TYPES, 3), (["full_attention"] * 6, 1), (["sliding_attention"] * 6, 0), (LAYER_TYPES[::-1], 0)],
)
def test_earlier_names_of_fields_are_written_where_they_say_the_same(layer_types, period):
    config = to_modernbert(tiny_model(ModernALBERTModel, **(PLAIN | {"layer_types": layer_types}))).config.to_dict()
    assert config["layer_types"] == layer_types and config["global_attn_every_n_layers"] == period
    assert (config["global_rope_theta"], config["local_rope_theta"]) == (160_000.0, 10_000.0)
    assert config["vocab_size"] == TINY["vocab_size"]


def test_a_modernbert_that_lacks_weights_is_refused(tmp_path):
    model = tiny_modernbert()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_model(str(tmp_path), modernbert=True).state_dict(), model.state_dict())
    weights = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.Wi" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UserError, match="has no model.layers.1.mlp.Wi.weight, which would be random"):
        load_model(str(tmp_path), modernbert=True)
