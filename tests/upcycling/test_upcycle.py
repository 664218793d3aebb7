# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Upcycling: which layers go where, and what is copied exactly."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from small_models import run_command, tiny_config, tiny_modernbert
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, ModernBertModel

from modernalbert import ModernALBERTForMaskedLM, upcycle_modernbert
from modernalbert.data.corpus import prepare_corpus
from modernalbert.data.packing import Masking, make_row
from modernalbert.upcycle import command
from modernalbert.upcycling.bert import upcycle_bert
from modernalbert.upcycling.embedding import factorise_embedding
from modernalbert.upcycling.initial_report import measure_student
from modernalbert.upcycling.modernbert import config_from_modernbert, load_teacher, teacher_layers_of_groups


IDS = torch.arange(3, 39).view(2, 18)


@pytest.fixture
def teacher():
    return tiny_modernbert()


@pytest.mark.parametrize("is_bert", [False, True])
def test_a_teacher_with_an_adapter_is_refused(is_bert):
    if is_bert:
        teacher, name = BertModel(BertConfig(vocab_size=120, hidden_size=32, num_attention_heads=4)), "query"
    else:
        teacher, name = tiny_modernbert(), "Wqkv"
    teacher.add_adapter(LoraConfig(target_modules=[name]))
    with pytest.raises(ValueError, match=rf"an adapter on .*{name}: merge it into the weights first"):
        (upcycle_bert if is_bert else upcycle_modernbert)(teacher, tiny_config())


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
    student, plain = student.double(), plain.double()
    torch.testing.assert_close(student(IDS).logits, plain(IDS).logits, atol=1e-6, rtol=0)


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


def test_a_teacher_that_lacks_weights_is_refused(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for part, is_refused in (("head", False), ("layers.1.attn.Wqkv", True)):
        weights = {name: value for name, value in weights.items() if part not in name}
        save_file(weights, file, {"format": "pt"})
        if not is_refused:  # a head starts fresh
            load_teacher(str(tmp_path))
            continue
        for load in (lambda: load_teacher(str(tmp_path), AutoModel), lambda: upcycle_modernbert(str(tmp_path), None)):
            with pytest.raises(ValueError, match="has no .*layers.1.attn.Wqkv.weight, which would be random"):
                load()


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


# --- experts from what the layers have beyond the shared weight


def test_svd_experts_hold_the_leading_directions_of_each_layers_difference(teacher):
    changes = {"group_depth": 2, "mol_groups": [0, 2], "num_experts": 4, "lora_rank": 2, "lora_alpha": 8}
    config = config_from_modernbert(teacher.config, ffn_modulation="mol", **changes)
    student = upcycle_modernbert(teacher, config, experts="svd")
    for k in (0, 2):
        mlp = student.model.groups[k].mlp
        for e in range(4):
            layer = teacher.model.layers[[0, 1][e % 2] + 2 * k].mlp
            for name, A, B in (("Wi", mlp.mol_A_in, mlp.mol_B_in), ("Wo", mlp.mol_A_out, mlp.mol_B_out)):
                difference = (layer.get_submodule(name).weight - mlp.get_submodule(name).weight).detach()
                left, values, right = torch.linalg.svd(difference, full_matrices=False)
                block = slice(2 * (e // 2), 2 * (e // 2) + 2)
                wanted = left[:, block] * values[block] @ right[block]
                torch.testing.assert_close(4.0 * B[e] @ A[e], wanted, atol=1e-5, rtol=1e-4)
    # of the layers of group 0 one is the shared weight itself, and its expert adds nothing
    assert student.model.groups[0].mlp.mol_B_in[0].abs().max() < 1e-5
    assert student.model.groups[0].mlp.mol_B_in[1].abs().max() > 1e-2


def test_svd_of_full_rank_gives_depth_lora_the_teachers_own_ffn(teacher):
    changes = {"group_depth": 2, "mol_groups": "all", "lora_rank": 32, "mol_intermediate_size": 48}
    config = config_from_modernbert(teacher.config, ffn_modulation="depth_lora", **changes)
    student = upcycle_modernbert(teacher, config, experts="svd")
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    for layer in range(6):
        group, position = divmod(layer, 2)
        torch.testing.assert_close(
            student.model.groups[group].mlp(x, position)[0], teacher.model.layers[layer].mlp(x), atol=1e-4, rtol=1e-4
        )
    shared = upcycle_modernbert(teacher, config_from_modernbert(teacher.config, group_depth=2))
    assert (shared.model.groups[1].mlp(x, 1)[0] - teacher.model.layers[3].mlp(x)).abs().max() > 0.1


def test_unknown_start_of_experts(teacher):
    with pytest.raises(ValueError, match="experts='random' is not allowed: it must be 'zero' or 'svd'"):
        upcycle_modernbert(teacher, config_from_modernbert(teacher.config), experts="random")


# --- the embedding


def test_token_counts_move_the_error_to_rare_tokens(teacher):
    embedding = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
    counts = torch.ones(200)
    counts[:20] = 10_000

    def errors(token_counts):
        table, projection = factorise_embedding(embedding, 12, token_counts)
        assert table.square().mean().item() == pytest.approx(projection.square().mean().item(), rel=1e-3)
        return (table @ projection.T - embedding).norm(dim=1)

    assert errors(counts)[:20].mean() < 0.5 * errors(None)[:20].mean()
    assert errors(counts)[20:].mean() > errors(None)[20:].mean()


# --- a BERT


def test_fitting_to_a_bert_brings_every_state_closer():
    bert, rows, held_out = bert_and_rows()
    changes = {"vocab_size": 96, "hidden_size": 24, "num_attention_heads": 2, "num_experts": 4, "lora_rank": 2}
    config = tiny_config(**changes, embedding_size=16, num_hidden_layers=4, intermediate_size=32)
    torch.manual_seed(0)
    fresh = upcycle_bert(bert, config)
    torch.manual_seed(0)
    fitted = upcycle_bert(bert, config, rows)
    assert torch.equal(fresh.get_input_embeddings().weight, fitted.get_input_embeddings().weight)
    before = measure_student(fresh, bert, held_out, "embedding", "zero")
    after = measure_student(fitted, bert, held_out, "fitted", "zero")
    assert before.embedding_error == after.embedding_error and 0 < after.embedding_error < 0.9
    for (_, _, without), (_, _, with_fit) in list(zip(before.hidden_cosine, after.hidden_cosine))[1:]:
        assert with_fit > without + 0.05
    with pytest.raises(ValueError, match="num_attention_heads=3 is not allowed: it must divide the teacher's 4"):
        upcycle_bert(bert, tiny_config(**(changes | {"num_attention_heads": 3})))
    with pytest.raises(ValueError, match="hidden_size=32 is not allowed: it must be the teacher's 24"):
        upcycle_bert(bert, tiny_config(vocab_size=96))


def bert_and_rows():
    """A small BERT, and rows of random sequences to fit to and to measure on."""
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(
            vocab_size=96,
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=40,
            initializer_range=0.2,
        )
    ).eval()
    generator = np.random.default_rng(0)
    masking = Masking(0.0, 1.0, False, 4, 96, np.array([0, 1, 2]), np.zeros(96, dtype=bool))
    masks = replace(masking, probability=0.3)

    def row(masking):
        sequences = [np.array([1, *generator.integers(5, 96, 14), 2]) for _ in range(3)]
        return make_row(sequences, 48, 0, masking, generator)

    return bert, [row(masking) for _ in range(40)], [row(masks) for _ in range(10)]


# --- the report and the command line


def test_the_report_of_a_perfect_copy(teacher):
    student = upcycle_modernbert(teacher, config_from_modernbert(teacher.config))
    _, _, rows = bert_and_rows()
    result = measure_student(student, teacher, rows, "stepwise", "zero")
    assert result.mlm_loss == pytest.approx(result.teacher_mlm_loss, abs=1e-4)
    assert result.embedding_error == 0
    assert [cosine for _, _, cosine in result.hidden_cosine] == pytest.approx([1.0] * 7, abs=1e-4)


def test_command_line(tmp_path, monkeypatch, capsys, nano_tokenizer):
    changes = {"vocab_size": 30522, "pad_token_id": 0, "cls_token_id": 101, "bos_token_id": 101}
    changes |= {"sep_token_id": 102, "eos_token_id": 102}
    tiny_modernbert(**changes).save_pretrained(tmp_path / "teacher")
    nano_tokenizer.save_pretrained(tmp_path / "teacher")
    shape = {"ffn_modulation": "mol", "group_depth": 2, "embedding_size": 16, "mol_intermediate_size": 48}
    config = config_from_modernbert(tiny_modernbert(**changes).config, **shape, num_experts=4, lora_rank=2)
    config.save_pretrained(tmp_path / "student")
    (tmp_path / "text.txt").write_text("\n".join(f"The house number {i} stands by the river." for i in range(40)))

    def upcycle(*arguments):
        base = ["--teacher_name_or_path", tmp_path / "teacher", "--config", tmp_path / "student"]
        return run_command(monkeypatch, capsys, command, *base, "--output_dir", tmp_path / "out", *arguments)

    code, output, _ = upcycle("--text_file", tmp_path / "text.txt", "--compare")
    assert code == 0 and output.count("| zero |") == output.count("| svd |") == 4
    report = json.loads((tmp_path / "out" / "upcycle_report.json").read_text())
    assert {(entry["layer_map"], entry["experts"]) for entry in report} == {
        (layer_map, experts) for layer_map in ("stepwise", "first", "last", "average") for experts in ("zero", "svd")
    }
    student = ModernALBERTForMaskedLM.from_pretrained(tmp_path / "out")
    assert student.config.skip_first_attn_norm and student.config.num_experts == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token == "[MASK]"

    for arguments, message in [
        (("--layer_map", "middle"), "--layer_map middle is not allowed: it must be stepwise, first, last, average"),
        (("--layer_map", "0,1"), "it must name 3 layers, each from 0 to 5"),
        (("--compare",), "--compare needs --text_file"),
        (("--experts", "one"), "experts='one' is not allowed"),
        (("--corpus_dir", tmp_path), "no prepared corpus"),
    ]:
        code, _, error = upcycle(*arguments)
        assert code == 2 and message in error and "Traceback" not in error, error
    code, output, _ = upcycle()
    assert code == 0 and re.search(r"Factorising the embedding loses \d+\.\d% of its Frobenius norm", output)


def test_command_line_for_a_bert(tmp_path, monkeypatch, capsys, nano_tokenizer):
    changes = {"vocab_size": 30522, "pad_token_id": 0, "cls_token_id": 101, "bos_token_id": 101}
    changes |= {"sep_token_id": 102, "eos_token_id": 102}
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=30522, **shape)).save_pretrained(tmp_path / "teacher")
    nano_tokenizer.save_pretrained(tmp_path / "teacher")
    tiny_config(**changes, embedding_size=16).save_pretrained(tmp_path / "student")
    text = [f"The house number {i} stands by the river." for i in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(text))
    prepare_corpus({"text": [str(tmp_path / "text.txt")]}, nano_tokenizer, tmp_path / "corpus", 64)

    def upcycle(*arguments):
        base = ["--teacher_name_or_path", tmp_path / "teacher", "--config", tmp_path / "student"]
        base += ["--corpus_dir", tmp_path / "corpus", "--fit_rows", 4, "--output_dir", tmp_path / "out"]
        return run_command(monkeypatch, capsys, command, *base, *arguments)

    code, _, error = upcycle("--text_file", tmp_path / "text.txt", "--compare")
    assert code == 0, error
    fitted, embedding = json.loads((tmp_path / "out" / "upcycle_report.json").read_text())
    assert (fitted["layer_map"], embedding["layer_map"]) == ("fitted", "embedding")
    assert fitted["hidden_cosine"][-1][2] > embedding["hidden_cosine"][-1][2]
    for option in (("--layer_map", "first"), ("--experts", "svd")):
        code, _, error = upcycle(*option)
        assert code == 2 and f"{option[0]} is for a ModernBERT" in error, error
