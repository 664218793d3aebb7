# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The terms of the distillation loss against their definitions, and the teacher on packed rows."""

import math

import numpy as np
import pytest
import torch
from small_models import tiny_model, tiny_modernbert
from transformers import BertConfig, BertForMaskedLM

from modernalbert import ModernALBERTForMaskedLM
from modernalbert.data.packing import Masking, make_row
from modernalbert.training import distillation
from modernalbert.training.distillation import (
    DistillationConfig,
    DistilledStudent,
    Teacher,
    TeacherOutputs,
    batches_by_length,
    distillation_kl,
    mean_pool,
    router_entropy,
    sequence_numbers,
)


VOCABULARY = 96
LENGTHS = ((5, 9, 3), (12, 7))


def packed_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two rows of 20 places with five sequences and some padding, masked."""
    generator = np.random.default_rng(seed)
    continues = np.zeros(VOCABULARY, dtype=bool)
    masking = Masking(0.3, 1.0, False, 4, VOCABULARY, np.array([0, 1, 2]), continues)
    rows = []
    for lengths in LENGTHS:
        sequences = [np.array([1, *generator.integers(5, VOCABULARY, n - 2), 2]) for n in lengths]
        rows.append(make_row(sequences, 20, 0, masking, generator))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def tiny_bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        initializer_range=0.3,
    )
    return BertForMaskedLM(config).eval()


TEACHERS = {
    "bert": tiny_bert,
    "modernbert": lambda: tiny_modernbert(vocab_size=VOCABULARY),
    "modernalbert": lambda: tiny_model(ModernALBERTForMaskedLM, vocab_size=VOCABULARY),
}


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("kind", TEACHERS)
def test_a_teacher_answers_for_packed_sequences_as_for_each_alone(kind, few_shapes, monkeypatch):
    monkeypatch.setattr(distillation, "compiles_each_shape", lambda *_: few_shapes)
    model = TEACHERS[kind]()
    batch = packed_batch()
    config = DistillationConfig(hidden_weight=1.0, pooled_weight=1.0, logits_weight=1.0, logits_positions="all")
    teacher = Teacher(model, config, ((0, 0), (1, 2), (2, 3)))
    arguments = [batch[name] for name in ("input_ids", "position_ids", "attention_mask", "labels")]
    outputs = teacher(*arguments)

    hidden, pooled, logits = [], [], []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            ids = batch["input_ids"][row : row + 1, start : start + length]
            with torch.no_grad():
                alone = model(input_ids=ids, output_hidden_states=True)
            hidden.append(alone.hidden_states[2][0])
            pooled.append(alone.hidden_states[-1][0].mean(0))
            logits.append(alone.logits[0])
            start += length
    torch.testing.assert_close(outputs.hidden_states[1], torch.cat(hidden), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.pooled, torch.stack(pooled), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.logits, torch.cat(logits), atol=1e-4, rtol=1e-4)

    masked = Teacher(model, DistillationConfig(logits_weight=1.0), ())(*arguments)
    chosen = (batch["labels"] != -100)[batch["attention_mask"].bool()]
    torch.testing.assert_close(masked.logits, outputs.logits[chosen])
    assert masked.hidden_states == () and masked.pooled is None


def test_every_term_is_what_it_says():
    batch = packed_batch()
    clean = batch.pop("clean_input_ids")
    student = tiny_model(ModernALBERTForMaskedLM, vocab_size=VOCABULARY)
    teacher_model = tiny_bert()  # narrower: projections
    config = DistillationConfig(
        mlm_weight=0.5, logits_weight=2.0, temperature=3.0, hidden_weight=4.0, hidden_loss="mse", pooled_weight=8.0
    )
    layer_map = ((0, 0), (4, 2), (6, 3))
    teacher = Teacher(teacher_model, config, layer_map)
    answers = teacher(clean, batch["position_ids"], batch["attention_mask"], batch["labels"])
    torch.manual_seed(1)
    model = DistilledStudent(student, config, layer_map, teacher_width=24).eval()
    out = model(**batch, teacher_outputs=answers)

    real = batch["attention_mask"].bool()
    outputs = student(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        output_hidden_states=True,
        output_router_logits=True,
    )
    masked = batch["labels"] != -100
    mlm = torch.nn.functional.cross_entropy(outputs.logits[masked], batch["labels"][masked])
    torch.testing.assert_close(out["mlm_loss"], mlm.detach())
    p = (answers.logits / 3).softmax(-1)
    kl = (p * (p.log() - (outputs.logits[masked] / 3).log_softmax(-1))).sum(-1).mean() * 9
    torch.testing.assert_close(out["logits_loss"], kl.detach(), atol=1e-4, rtol=1e-4)
    differences = [
        (model.projections[str(i)](outputs.hidden_states[s][real]) - answers.hidden_states[i]).square().mean()
        for i, (s, _) in enumerate(layer_map)
    ]
    torch.testing.assert_close(out["hidden_loss"], torch.stack(differences).mean().detach())
    sequences = sequence_numbers(batch["position_ids"], batch["attention_mask"])
    assert torch.bincount(sequences).tolist() == [n for lengths in LENGTHS for n in lengths]
    means = torch.stack([outputs.hidden_states[-1][real][sequences == i].mean(0) for i in range(5)])
    cosine = torch.nn.functional.cosine_similarity(model.projections["pooled"](means), answers.pooled)
    torch.testing.assert_close(out["pooled_loss"], (1 - cosine.mean()).detach())
    total = 0.5 * out["mlm_loss"] + 2 * out["logits_loss"] + 4 * out["hidden_loss"] + 8 * out["pooled_loss"]
    torch.testing.assert_close(out["loss"].detach(), total)
    assert "aux_loss" not in out

    model.train()
    training = model(**batch, teacher_outputs=answers)
    assert training["aux_loss"] > 0
    training["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_logits_at_all_positions():
    batch = packed_batch()
    batch.pop("clean_input_ids")
    student = tiny_model(ModernALBERTForMaskedLM, vocab_size=VOCABULARY)
    config = DistillationConfig(logits_weight=1.0, logits_positions="all")
    teacher = Teacher(student, config, ())
    answers = teacher(batch["input_ids"], batch["position_ids"], batch["attention_mask"], batch["labels"])
    out = DistilledStudent(student.train(False), config)(**batch, teacher_outputs=answers)
    assert out["logits_loss"].abs() < 1e-6  # a student is at no distance from itself
    assert len(answers.logits) == batch["attention_mask"].sum()


def test_rows_added_for_few_shapes_change_no_term(monkeypatch):
    batch = packed_batch()
    del batch["clean_input_ids"]
    student = tiny_model(ModernALBERTForMaskedLM, vocab_size=VOCABULARY)
    results = []
    for few_shapes in (False, True):
        monkeypatch.setattr(distillation, "compiles_each_shape", lambda *_, answer=few_shapes: answer)
        student.zero_grad()
        out = DistilledStudent(student, DistillationConfig())(**batch)
        out["loss"].backward()
        results.append([out["mlm_loss"], *(parameter.grad.clone() for parameter in student.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_without_masks_trains_on_the_other_terms():
    batch = packed_batch()
    batch.pop("clean_input_ids")
    batch["labels"].fill_(-100)
    student = tiny_model(ModernALBERTForMaskedLM, vocab_size=VOCABULARY)
    config = DistillationConfig(pooled_weight=1.0)
    answers = Teacher(student, config, ())(batch["input_ids"], batch["position_ids"], batch["attention_mask"])
    out = DistilledStudent(student.requires_grad_(True).train(), config)(**batch, teacher_outputs=answers)
    assert out["mlm_loss"] == 0 and out["loss"].isfinite()
    out["loss"].backward()


@pytest.mark.parametrize("positions", ["masked", "all"])
def test_logits_a_few_tokens_at_a_time(monkeypatch, positions):
    batch = packed_batch()
    batch.pop("clean_input_ids")
    student = tiny_model(ModernALBERTForMaskedLM, vocab_size=VOCABULARY, router_jitter_noise=0.0).train()
    config = DistillationConfig(logits_weight=0.5, logits_positions=positions, temperature=2.0)
    count = int((batch["labels"] != -100).sum() if positions == "masked" else batch["attention_mask"].sum())
    answers = TeacherOutputs(logits=torch.randn(count, VOCABULARY))
    runs = []
    decoded = []
    student.decoder.register_forward_hook(lambda _, inputs, logits: decoded.append(len(logits)))
    for tokens in (count, 2, 1):
        monkeypatch.setattr(distillation, "VOCABULARY_BLOCK", tokens * VOCABULARY)
        decoded.clear()
        out = DistilledStudent(student, config)(**batch, teacher_outputs=answers)
        assert max(decoded) == tokens and sum(decoded) == count
        student.zero_grad()
        out["loss"].backward()
        runs.append((out, {name: p.grad for name, p in student.named_parameters()}))
    for out, gradients in runs[1:]:
        torch.testing.assert_close(out, runs[0][0])
        torch.testing.assert_close(gradients, runs[0][1])


def test_small_parts():
    states, sequences = torch.tensor([[1.0], [3.0], [10.0]]), torch.tensor([0, 0, 1])
    assert mean_pool(states, sequences, 2).tolist() == [[2.0], [10.0]]
    logits = torch.tensor([[0.0, math.log(3)]])
    wanted = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert distillation_kl(logits, torch.zeros(1, 2), 1.0).item() == pytest.approx(wanted)
    uniform = [torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)]
    assert router_entropy(uniform, torch.ones(1, 2, dtype=torch.bool)).item() == pytest.approx(1.0)
    batches = batches_by_length([3, 100, 98, 4, 2, 20])
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert batches[0] == [1, 2] and [5] in batches


def test_layer_maps():
    config = DistillationConfig(hidden_weight=1.0)
    assert config.resolved_layer_map(6, 6) == tuple((i, i) for i in range(7))
    assert config.resolved_layer_map(14, 22)[0] == (0, 0) and config.resolved_layer_map(14, 22)[-1] == (14, 22)
    assert config.resolved_layer_map(12, 3) == ((0, 0), (4, 1), (8, 2), (12, 3))
    explicit = DistillationConfig(hidden_weight=1.0, layer_map=((2, 4),))
    assert explicit.resolved_layer_map(4, 4) == ((2, 4),)
    with pytest.raises(
        ValueError, match="pair 2:4 is not allowed: the student's states are 0 to 4, the teacher's 0 to 3"
    ):
        explicit.resolved_layer_map(4, 3)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0 is not allowed: it must be at least 0"),
        ({"mlm_weight": 0.0}, "mlm_weight=0 is not allowed without a distillation term"),
        ({"temperature": 0.0}, "temperature=0.0 is not allowed: it must be above 0"),
        ({"hidden_loss": "l1"}, "hidden_loss='l1' is not allowed: it must be 'cosine' or 'mse'"),
        ({"logits_positions": "some"}, "logits_positions='some' is not allowed: it must be 'masked' or 'all'"),
    ],
)
def test_wrong_values(fields, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**fields)
