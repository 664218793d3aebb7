# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Distance of a student from its teacher before any training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from modernalbert.cli.markdown import markdown_table
from modernalbert.modeling_modernalbert import ModernALBERTForMaskedLM
from modernalbert.training.distillation import DistillationConfig, Teacher
from modernalbert.upcycling.embedding import teacher_embedding


@dataclass
class InitialReport:
    """
    Figures of a student before any training, beside its teacher's.

    Attributes:
        layer_map: How the groups took their layers; "fitted" or "embedding" if it was a BERT.
        experts: How the experts started.
        mlm_loss: Masked-LM loss of the student, in nats per masked token.
        teacher_mlm_loss: Of the teacher on the same masks; None if it has no head.
        hidden_cosine: [student state, teacher state, mean cosine over tokens], state 0 the embeddings.
        embedding_error: Frobenius norm of what the factorised embedding lost, as a share of the embedding's.
    """

    layer_map: str | list[int]
    experts: str
    mlm_loss: float
    teacher_mlm_loss: float | None
    hidden_cosine: list[tuple[int, int, float]]
    embedding_error: float


@torch.no_grad()
def measure_student(
    student: ModernALBERTForMaskedLM,
    teacher: PreTrainedModel,
    rows: Sequence[dict[str, torch.Tensor]],
    layer_map: str | Sequence[int],
    experts: str,
) -> InitialReport:
    """
    Measure a student against its teacher.

    Args:
        student: As upcycled.
        teacher: The model it came from, on the student's device.
        rows: Packed and masked rows of text, see `data/packing.py`.
        layer_map, experts: For the record.
    """
    has_head = teacher.get_output_embeddings() is not None
    config = DistillationConfig(hidden_weight=1.0, logits_weight=float(has_head))
    pairs = config.resolved_layer_map(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    answers = Teacher(teacher, config, pairs)
    cosines = torch.zeros(len(pairs), device=student.device)
    losses, teacher_losses, masked, tokens = 0.0, 0.0, 0, 0
    for row in rows:
        row = {name: values.unsqueeze(0).to(student.device) for name, values in row.items()}
        real, labels = row["attention_mask"].bool(), row["labels"]
        theirs = answers(row["input_ids"], row["position_ids"], row["attention_mask"], labels)
        ours = student(
            row["input_ids"],
            attention_mask=row["attention_mask"],
            position_ids=row["position_ids"],
            output_hidden_states=True,
        )
        targets = labels[labels != -100]
        losses += summed_loss(ours.logits[labels != -100], targets)
        if has_head:
            teacher_losses += summed_loss(theirs.logits, targets)
        for i, (state, _) in enumerate(pairs):
            cosines[i] += torch.nn.functional.cosine_similarity(
                ours.hidden_states[state][real].float(), theirs.hidden_states[i].float(), dim=-1
            ).sum()
        masked += len(targets)
        tokens += int(real.sum())
    return InitialReport(
        layer_map=layer_map if isinstance(layer_map, str) else list(layer_map),
        experts=experts,
        mlm_loss=losses / masked,
        teacher_mlm_loss=teacher_losses / masked if has_head else None,
        hidden_cosine=[(ours, theirs, float(c) / tokens) for (ours, theirs), c in zip(pairs, cosines)],
        embedding_error=embedding_error(student, teacher),
    )


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum the cross-entropy of (n, V) logits, in nats."""
    return float(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))


@torch.no_grad()
def embedding_error(student: ModernALBERTForMaskedLM, teacher: PreTrainedModel) -> float:
    """Compute || E - factors || / || E ||, both Frobenius, for the token embedding E that the student was given."""
    target = teacher_embedding(teacher).double()
    ours = student.get_input_embeddings().weight
    if student.model.embeddings.projection is not None:
        ours = student.model.embeddings.projection(ours)
    return float((ours.double() - target).norm() / target.norm())


def to_markdown(results: Sequence[InitialReport]) -> str:
    """Format one row per option."""
    header = ["layer map", "experts", "masked-LM loss", "embedding error"]
    states = [f"{ours}:{theirs}" for ours, theirs, _ in results[0].hidden_cosine]
    header += [f"cosine at {states[0]}", *states[1:]]
    rows = []
    for result in results:
        figures = (result.mlm_loss, result.embedding_error, *(cosine for _, _, cosine in result.hidden_cosine))
        rows.append([result.layer_map, result.experts, *(f"{figure:.3f}" for figure in figures)])
    table = markdown_table(header, rows, num_words=2) + "\n"
    if results[0].teacher_mlm_loss is not None:
        table += f"\nMasked-LM loss of the teacher on the same masks: {results[0].teacher_mlm_loss:.3f}.\n"
    return table
