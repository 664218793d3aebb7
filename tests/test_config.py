# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Configuration: the sizes are the table's, and every mistake gets one sentence."""

import json

import pytest
import torch
import transformers
from small_models import REPOSITORY, tiny_config, tiny_model
from transformers import AutoConfig, ModernBertConfig

from modernalbert import ModernALBERTConfig, ModernALBERTForMaskedLM, ModernALBERTModel


SIZES = {"tiny": 50.9e6, "medium": 58.2e6, "base": 76.3e6, "large": 121.5e6, "nano": 11.1e6}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_are_the_tables(name):
    config = ModernALBERTConfig.from_pretrained(REPOSITORY / "configs" / name)
    with torch.device("meta"):
        model = ModernALBERTModel(config)
    assert abs(model.num_parameters() / SIZES[name] - 1) < 0.005


def test_defaults_are_tiny():
    stated = ModernALBERTConfig.from_pretrained(REPOSITORY / "configs" / "tiny")
    default = ModernALBERTConfig()
    assert stated.modulated_groups == default.modulated_groups == (5, 6)
    assert stated.num_groups == default.num_groups == 7
    different = {k for k in default.to_dict() if default.to_dict()[k] != stated.to_dict()[k]}
    assert different <= {"mol_groups", "architectures", "_name_or_path"}


@pytest.mark.parametrize(
    "changes, field, allowed",
    [
        ({"group_depth": 4}, "group_depth=4", "divisor of num_hidden_layers=6"),
        ({"mol_groups": [3]}, "mol_groups=[3]", "0 to 2"),
        ({"mol_groups": [1, 1]}, "mol_groups=[1, 1]", "different group numbers"),
        ({"mol_groups": []}, "mol_groups=[]", "0 to 2"),
        ({"mol_groups": "some"}, "mol_groups='some'", "'all'"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5", "at most num_experts=4"),
        ({"num_experts": 0}, "num_experts=0", "at least 1"),
        ({"num_experts": "8"}, "num_experts='8'", "integer"),
        ({"num_experts": True}, "num_experts=True", "integer"),
        ({"lora_rank": 0}, "lora_rank=0", "at least 1"),
        ({"lora_alpha": 0}, "lora_alpha=0", "above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0", "[0, 1)"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf", "a number above 0"),
        ({"num_attention_heads": 5}, "num_attention_heads=5", "divisor of hidden_size=32"),
        ({"num_attention_heads": 32}, "num_attention_heads=32", "even"),
        ({"ffn_modulation": "moe"}, "ffn_modulation='moe'", "'mol', 'moa', 'depth_lora', 'none'"),
        ({"expert_mixing": "mean"}, "expert_mixing='mean'", "'token', 'ema', 'uniform'"),
        ({"mol_positions": "first"}, "mol_positions='first'", "'all', 'last'"),
        ({"classifier_pooling": "max"}, "classifier_pooling='max'", "'cls', 'mean'"),
        ({"layer_types": ["full_attention"]}, "layer_types=['full_attention']", "num_hidden_layers=6"),
        ({"layer_types": ["causal"] * 6}, "layer_types=", "'sliding_attention'"),
        ({"router_per_depth": True, "mol_positions": "last"}, "router_per_depth=True", "mol_positions='last'"),
        ({"router_jitter_noise": -0.1}, "router_jitter_noise=-0.1", "[0, 1)"),
        ({"router_ema_decay": 1.0}, "router_ema_decay=1.0", "[0, 1)"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef=-1", "at least 0"),
        ({"pad_token_id": 120}, "pad_token_id=120", "vocab_size=120"),
        ({"eos_token_id": [2, 500]}, "eos_token_id=[2, 500]", "vocab_size=120"),
        ({"embedding_size": 0}, "embedding_size=0", "None or an integer"),
        ({"hidden_activation": "gelo"}, "hidden_activation='gelo'", "gelu"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1", "True or False"),
        ({"mol_version": 2}, "mol_version=2", "1 to 1"),
        ({"rope_parameters": {"global": {"rope_theta": 1e4}}}, "rope_parameters=", "'full_attention'"),
        ({"rope_parameters": {"rope_type": "foo"}}, "rope_parameters=", "'default'"),
        ({"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "rope_parameters=", "without"),
        ({"num_expert": 3}, "num_expert", "num_experts"),
    ],
)
def test_each_mistake_gets_one_sentence(changes, field, allowed):
    with pytest.raises(ValueError) as caught:
        tiny_config(**changes)
    message = str(caught.value)
    assert field in message and allowed in message
    assert "\n" not in message and message.endswith(".")


def test_unknown_backend_names_the_alternatives():
    with pytest.raises(ValueError, match="mol_backend='fast'.*auto, grouped, masked, reference, stacked, triton"):
        ModernALBERTModel(tiny_config(mol_backend="fast"))


def test_changes_after_construction_are_checked_by_model_and_save(tmp_path):
    config = tiny_config()
    config.num_experts_per_tok = 9
    with pytest.raises(ValueError, match="num_experts_per_tok=9"):
        ModernALBERTModel(config)
    with pytest.raises(ValueError, match="num_experts_per_tok=9"):
        config.save_pretrained(tmp_path)


def test_keys_the_libraries_write_are_accepted():
    config = tiny_config(
        use_cache=False,
        torch_dtype="bfloat16",
        num_labels=5,
        attn_implementation="eager",
        auto_map={"AutoConfig": "x.Y"},
        quantization_config={"quant_method": "x"},
        temperature=1.0,
        _name_or_path="somewhere",
        tokenizer_class="BertTokenizer",
    )
    assert config.num_labels == 5 and config.dtype == torch.bfloat16
    assert config.auto_map["AutoConfig"] == "x.Y" and "AutoModelForMaskedLM" in config.auto_map


def loaded_with_warnings(folder, caplog, **kwargs) -> tuple[ModernALBERTConfig, list[str]]:
    caplog.clear()
    transformers.utils.logging.enable_propagation()
    try:
        return AutoConfig.from_pretrained(folder, **kwargs), [record.getMessage() for record in caplog.records]
    finally:
        transformers.utils.logging.disable_propagation()


def test_what_was_saved_can_be_loaded(tmp_path, caplog):
    config = tiny_config()
    own = {"my_threshold": 0.4, "_num_labels": 3, "padding": "longest", "label_smoothing": {"to": [0.1, None]}}
    for name, value in own.items():
        setattr(config, name, value)
    ModernALBERTModel(config).save_pretrained(tmp_path)
    again, (warning,) = loaded_with_warnings(tmp_path, caplog)
    assert {name: getattr(again, name) for name in own} == own
    assert all(repr(name) in warning for name in own) and "\n" not in warning and "newer" not in warning
    assert ModernALBERTModel.from_pretrained(tmp_path).config.my_threshold == 0.4
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()
    assert loaded_with_warnings(tmp_path, caplog, my_threshold=0.5)[0].my_threshold == 0.5
    config, unused = ModernALBERTConfig.from_pretrained(tmp_path, num_expert=2, return_unused_kwargs=True)
    assert config.my_threshold == 0.4 and unused == {"num_expert": 2}
    # What a user writes is checked all the same.
    with pytest.raises(ValueError, match="no field 'my_threshold'"):
        tiny_config(my_threshold=0.4)
    with pytest.raises(TypeError, match="num_expert"):
        ModernALBERTModel.from_pretrained(tmp_path, num_expert=2)


def test_a_file_of_a_newer_transformers_only_warns(tmp_path, caplog):
    fields = tiny_config().to_dict() | {"future_field": 1}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"transformers_version": "99.0.0"}))
    config, (warning,) = loaded_with_warnings(tmp_path, caplog)
    assert config.future_field == 1 and "transformers 99.0.0, newer than" in warning


def test_a_file_cannot_set_what_follows_from_its_fields(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict() | {"num_groups": 3}))
    with pytest.raises(ValueError, match="'num_groups' is no field.*follows from others"):
        ModernALBERTConfig.from_pretrained(tmp_path)


def test_sliding_window_sets_local_attention_as_in_modernbert(tmp_path):
    ours, theirs = tiny_config(local_attention=8), ModernBertConfig(local_attention=8)
    for config in (ours, theirs):
        assert config.sliding_window == 4
        config.sliding_window = 3
        assert config.local_attention == 6 and config.sliding_window == 3
    assert tiny_config(sliding_window=5).local_attention == ModernBertConfig(sliding_window=5).local_attention == 10
    ours.save_pretrained(tmp_path)
    assert ModernALBERTConfig.from_pretrained(tmp_path).sliding_window == 3
    assert ModernALBERTConfig.from_pretrained(tmp_path, sliding_window=2).local_attention == 4
    with pytest.raises(ValueError, match="sliding_window=0 is not allowed: it must be an integer of at least 1"):
        ours.sliding_window = 0
    # The window is read at each forward.
    model = tiny_model(ModernALBERTModel, layer_types=["sliding_attention"] * 6)
    ids = torch.randint(3, 120, (1, 30))
    before = model(ids)[0]
    model.config.sliding_window = 60
    full = tiny_model(ModernALBERTModel, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    torch.testing.assert_close(model(ids)[0], full(ids)[0])
    assert not torch.allclose(model(ids)[0], before, atol=1e-3)


def test_the_original_release_is_named_as_another_format(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ModernALBERT", "group_depth": 2}))
    with pytest.raises(ValueError, match="original authors' release"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="original authors' release"):
        ModernALBERTConfig.from_pretrained(tmp_path)


def test_round_trip_and_auto_config(tmp_path):
    config = tiny_config(mol_groups="all", num_labels=3, rope_parameters={"full_attention": {"rope_theta": 5e4}})
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is ModernALBERTConfig
    ignored = {"_name_or_path", "transformers_version", "_attn_implementation_internal"}
    for name, value in config.to_dict().items():
        assert name in ignored or again.to_dict()[name] == value, name
    assert again.rope_parameters["sliding_attention"]["rope_theta"] == 10_000


def test_depth_adds_no_parameters():
    model = ModernALBERTForMaskedLM(tiny_config(ffn_modulation="none", mol_intermediate_size=None))
    assert len(model.model.groups) == 3
    deeper = ModernALBERTForMaskedLM(
        tiny_config(ffn_modulation="none", mol_intermediate_size=None, num_hidden_layers=12, group_depth=4)
    )
    assert deeper.num_parameters() == model.num_parameters()


def test_floating_point_ops_count_every_use():
    ids = {"input_ids": torch.ones(2, 16, dtype=torch.long)}
    changes = {"ffn_modulation": "none", "mol_intermediate_size": None}
    shallow = ModernALBERTModel(tiny_config(**changes)).floating_point_ops(ids)
    deep = ModernALBERTModel(tiny_config(num_hidden_layers=12, group_depth=4, **changes)).floating_point_ops(ids)
    d, f, e, tokens = 32, 40, 16, 32
    layer = 4 * d * d + 3 * d * f + 2 * 16 * d
    assert shallow == 6 * tokens * (6 * layer + e * d)
    assert deep == 6 * tokens * (12 * layer + e * d)
    mol = ModernALBERTModel(tiny_config(mol_intermediate_size=None)).floating_point_ops(ids)
    assert mol - shallow == 6 * tokens * 4 * (2 * 4 * (2 * d + 3 * f) + 4 * d)


def test_each_feed_forward_network_counts_its_multiply_adds():
    d, f, expert, router = 32, 48, 4 * (2 * 32 + 3 * 48), 4 * 32
    for changes, added in (
        ({}, 2 * (2 * expert + router)),
        ({"num_experts_per_tok": 1}, 2 * (expert + router)),
        ({"mol_positions": "last"}, 2 * expert + router),
        ({"num_experts": 1}, 2 * expert),
        ({"expert_mixing": "ema"}, 2 * 4 * expert),
        ({"ffn_modulation": "moa", "moa_bottleneck": 5}, 2 * (2 * 2 * 5 * d + router)),
        ({"ffn_modulation": "depth_lora"}, 2 * expert),
        ({"ffn_modulation": "depth_lora", "mol_positions": "last"}, expert),
        ({"ffn_modulation": "none"}, 0),
    ):
        mlp = ModernALBERTModel(tiny_config(**changes)).groups[-1].mlp
        assert sum(mlp.multiply_adds(depth) for depth in range(2)) == 2 * 3 * d * f + added, changes
