# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The token embedding a student takes from its teacher, factorised where its own is."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from modernalbert.configuration_modernalbert import ModernALBERTConfig
from modernalbert.modeling_modernalbert import ModernALBERTForMaskedLM


def factorise_embedding(
    embedding: torch.Tensor, width: int, token_counts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute the best rank-e approximation of a (V, d) embedding: (V, e) and (d, e) with embedding ~ first @ second.T.

    By the eigenvectors of the d x d Gram matrix in float64, the same as a truncated SVD and far cheaper for V >> d.
    Both factors get the same root mean square, so that steps of one optimizer suit both.

    Args:
        embedding: (V, d).
        width: e.
        token_counts: (V,) how often each token occurs in the text that matters: the error of a token then weighs as
            its count to the power 3/4 (our decision; no token weighs nothing). None weighs all alike.
    """
    matrix = embedding.double()
    weighted = matrix
    if token_counts is not None:
        weighted = matrix * token_weights(token_counts).to(matrix.device).sqrt()[:, None]
    _, vectors = torch.linalg.eigh(weighted.T @ weighted)  # ascending
    basis = vectors[:, -width:]
    factor = matrix @ basis
    tiny = torch.finfo(torch.float64).tiny
    scale = (factor.square().mean() / basis.square().mean()).clamp(min=tiny) ** 0.25
    return (factor / scale).to(embedding.dtype), (basis * scale).to(embedding.dtype)


def token_weights(token_counts: torch.Tensor) -> torch.Tensor:
    """Convert (V,) counts to (V,) float64 weights that add up to 1."""
    weights = (token_counts.double() + 1) ** 0.75
    return weights / weights.sum()


def check_equal(config: ModernALBERTConfig, teacher: PreTrainedConfig, names: Sequence[str]) -> None:
    """Raise a ValueError at the first field in which the two differ."""
    for name in names:
        ours, theirs = getattr(config, name), getattr(teacher, name)
        if ours != theirs:
            raise ValueError(f"{name}={ours!r} is not allowed: it must be the teacher's {theirs!r}.")


def check_no_adapter(teacher: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: the teacher wears an adapter, which its weights alone do not show.
    """
    adapted = next((name for name, module in teacher.named_modules() if hasattr(module, "base_layer")), None)
    if adapted is not None:
        raise ValueError(f"The teacher has an adapter on {adapted}: merge it into the weights first.")


def teacher_embedding(teacher: PreTrainedModel) -> torch.Tensor:
    """Return (V, d): what the first norm sees of each token, but for a BERT's exact position."""
    if teacher.config.model_type == "bert":
        return bert_embedding(teacher)
    return teacher.base_model.embeddings.tok_embeddings.weight


def set_embedding(
    student: ModernALBERTForMaskedLM, embedding: torch.Tensor, token_counts: torch.Tensor | None = None
) -> None:
    """Give the student a (V, d) embedding, factorised if its own is."""
    if student.config.embedding_size is not None:
        embedding, projection = factorise_embedding(embedding, student.config.embedding_size, token_counts)
        student.model.embeddings.projection.weight.copy_(projection)
    student.model.embeddings.tok_embeddings.weight.copy_(embedding)


# Positions whose mean stands for the learned position embedding: sentences are short.
MEAN_POSITIONS = 64


def bert_embedding(teacher: PreTrainedModel) -> torch.Tensor:
    """
    Return (V, d): word, first token type and mean position; what the first norm sees of a token, but for its place.
    """
    embeddings = teacher.base_model.embeddings
    position = embeddings.position_embeddings.weight[:MEAN_POSITIONS].mean(dim=0)
    return embeddings.word_embeddings.weight + embeddings.token_type_embeddings.weight[0] + position
