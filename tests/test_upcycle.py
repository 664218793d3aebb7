# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Upcycling: which layers go where, and what is copied exactly."""

import pytest
import torch
from small_models import tiny_modernbert
from transformers import ModernBertModel

from modernalbert import upcycle_modernbert
from modernalbert.upcycle import config_from_modernbert, factorise_embedding, teacher_layers_of_groups


IDS = torch.arange(3, 39).view(2, 18)


@pytest.fixture
def teacher():
    return tiny_modernbert()


def test_layer_maps():
    assert teacher_layers_of_groups("stepwise", 3, 7) == [[0], [3], [6]]
    assert teacher_layers_of_groups("stepwise", 1, 7) == [[0]]
    assert teacher_layers_of_groups("first", 3, 7) == [[0], [1], [2]]
    assert teacher_layers_of_groups("last", 3, 7) == [[4], [5], [6]]
    assert teacher_layers_of_groups("average", 3, 7) == [[0, 1], [2, 3, 4], [5, 6]]
    assert teacher_layers_of_groups([5, 0, 5], 3, 7) == [[5], [0], [5]]
    with pytest.raises(ValueError, match="'stepwise', 'first', 'last', 'average'"):
        teacher_layers_of_groups("middle", 3, 7)
    with pytest.raises(ValueError, match="name 3 layers, each from 0 to 6"):
        teacher_layers_of_groups([0, 7, 1], 3, 7)
    with pytest.raises(ValueError, match="at least 8 teacher layers"):
        teacher_layers_of_groups("first", 8, 7)


def test_groups_take_the_layers_of_the_map(teacher):
    config = config_from_modernbert(teacher.config, group_depth=2)
    student = upcycle_modernbert(teacher, config, layer_map=[0, 3, 5])
    assert student.config.skip_first_attn_norm
    for group, layer in zip(student.model.groups, (0, 3, 5)):
        source = teacher.model.layers[layer]
        assert torch.equal(group.attn.Wqkv.weight, source.attn.Wqkv.weight)
        assert torch.equal(group.mlp.Wi.weight, source.mlp.Wi.weight)
        # layer 0 of the teacher has no attention norm: the second use of group 0 takes layer 1's
        norm = teacher.model.layers[max(layer, 1)].attn_norm.weight
        assert torch.equal(group.attn_norm.weight, norm)
    mean = upcycle_modernbert(teacher, config, layer_map="average").model.groups[1].mlp.Wo.weight
    two = [teacher.model.layers[layer].mlp.Wo.weight for layer in (2, 3)]
    torch.testing.assert_close(mean, (two[0] + two[1]) / 2)
    assert student(IDS).logits.isfinite().all()


def test_experts_and_wider_ffn_change_nothing_at_the_start(teacher):
    plain = upcycle_modernbert(teacher, config_from_modernbert(teacher.config, group_depth=2))
    changes = {"group_depth": 2, "ffn_modulation": "mol", "mol_groups": [0, 2], "mol_intermediate_size": 64}
    config = config_from_modernbert(teacher.config, **changes)
    student = upcycle_modernbert(teacher, config)
    assert student.model.groups[2].mlp.width == 64 and student.model.groups[2].mlp.Wi.weight[40:64].abs().min() > 0
    torch.testing.assert_close(student(IDS).logits, plain(IDS).logits, atol=1e-5, rtol=1e-5)


def test_factorised_embedding_is_the_truncated_svd(teacher):
    table = teacher.model.embeddings.tok_embeddings.weight.detach()
    embedding, projection = factorise_embedding(table, 8)
    u, s, vh = torch.linalg.svd(table.double(), full_matrices=False)
    torch.testing.assert_close((embedding @ projection.T).double(), u[:, :8] * s[:8] @ vh[:8], atol=1e-5, rtol=1e-5)
    full = config_from_modernbert(teacher.config, embedding_size=32)
    student = upcycle_modernbert(teacher, full)
    torch.testing.assert_close(student(IDS).logits, teacher(IDS).logits, atol=1e-4, rtol=1e-4)
    assert student.decoder.weight is student.model.embeddings.tok_embeddings.weight


def test_an_encoder_without_a_head_and_a_folder_are_teachers_too(teacher, tmp_path):
    config = config_from_modernbert(teacher.config)
    encoder = ModernBertModel(teacher.config)
    encoder.load_state_dict(teacher.model.state_dict())
    student = upcycle_modernbert(encoder.eval(), config)
    torch.testing.assert_close(student.model(IDS)[0], teacher.model(IDS)[0], atol=1e-5, rtol=1e-5)
    teacher.save_pretrained(tmp_path)
    loaded = upcycle_modernbert(str(tmp_path), config)
    torch.testing.assert_close(loaded(IDS).logits, teacher(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"hidden_size": 64, "num_attention_heads": 4}, "hidden_size=64.*teacher's 32"),
        ({"vocab_size": 130}, "vocab_size=130.*teacher's 120"),
        ({"norm_bias": True}, "norm_bias=True.*teacher's False"),
        ({"intermediate_size": 24}, "width 24 of group 0.*at least the teacher's 40"),
    ],
)
def test_what_cannot_be_mapped_is_said(teacher, changes, said):
    with pytest.raises(ValueError, match=said):
        upcycle_modernbert(teacher, config_from_modernbert(teacher.config, **changes))
