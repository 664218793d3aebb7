# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Contrastive training with sentence-transformers: the loss, and a Trainer that keeps routers balanced."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    DistillKLDivLoss,
    MarginMSELoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import pairwise_cos_sim
from torch import nn

from modernalbert.data.retrieval_pairs import SCALE
from modernalbert.training.model_card import ModelCardMixin
from modernalbert.training.router_learning_rate import RouterLearningRateMixin


DISTILLATIONS = ("kl", "margin_mse")


# --- the loss --------------------------------------------------------------------------------------------------------


def scaled_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute the logits (n,) of n pairs."""
    return SCALE * pairwise_cos_sim(a, b)


class DistilledRankingLoss(MultipleNegativesRankingLoss):
    """
    The contrastive loss plus a term that brings the scores of a row's candidates near a teacher's.

    Args:
        distillation: "kl" (distributions over the candidates, arXiv 2010.11386) or "margin_mse" (differences between
            positive and negative, arXiv 2010.02666), on logits.
    """

    def __init__(self, model: SentenceTransformer, distillation: str):
        super().__init__(model, scale=SCALE)
        term = {"kl": DistillKLDivLoss, "margin_mse": MarginMSELoss}[distillation]
        self.distillation = term(model, similarity_fct=scaled_cosine)

    def compute_loss_from_embeddings(self, embeddings: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            embeddings: One (batch, d) for anchor, positive and each negative.
            labels: (batch, 1 + negatives) logits of the teacher.
        """
        contrastive = super().compute_loss_from_embeddings(embeddings, labels)
        return contrastive + self.distillation.compute_loss_from_embeddings(embeddings, labels)


def make_loss(
    model: SentenceTransformer,
    mini_batch_size: int | None = None,
    distillation: str | None = None,
    matryoshka_dims: Sequence[int] | None = None,
) -> nn.Module:
    """
    Make the loss of the rows: every other row's documents are negatives too.

    Args:
        mini_batch_size: Rows in memory at once; the batch may then be as large as you like (GradCache).
        distillation: For rows with a teacher's scores, one of `DISTILLATIONS`.
        matryoshka_dims: Numbers of leading dimensions that are trained as embeddings too.
    """
    if distillation is not None:
        loss = DistilledRankingLoss(model, distillation)
    elif mini_batch_size is not None:
        loss = CachedMultipleNegativesRankingLoss(model, scale=SCALE, mini_batch_size=mini_batch_size)
    else:
        loss = MultipleNegativesRankingLoss(model, scale=SCALE)
    return loss if matryoshka_dims is None else MatryoshkaLoss(model, loss, matryoshka_dims)


# --- balance ---------------------------------------------------------------------------------------------------------


class _Scale:
    """Factor of the current step's loss in the backward pass (accumulation, gradient scaler)."""

    value: torch.Tensor


class _RememberScale(torch.autograd.Function):
    """Identity whose backward pass records the scale of the loss before the gradient reaches the model."""

    @staticmethod
    def forward(ctx, loss, scale):
        ctx.scale = scale
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, gradient):
        ctx.scale.value = gradient
        return gradient, None


class _AddLoss(torch.autograd.Function):
    """Identity on hidden states whose backward pass also starts the gradient of an auxiliary loss."""

    @staticmethod
    def forward(ctx, states, auxiliary, share, scale):
        ctx.share, ctx.scale = share, scale
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, ctx.share * ctx.scale.value, None, None


class RetrievalTrainer(ModelCardMixin, RouterLearningRateMixin, SentenceTransformerTrainer):
    """
    sentence-transformers' Trainer that also trains the auxiliary losses of a ModernALBERT's routers.

    The losses of sentence-transformers see embeddings only, and some run the model again in the backward pass, so
    nothing can be added to them. Instead, the auxiliary loss of each forward is attached to its hidden states, and its
    gradient starts when theirs arrives. It is weighted by the forward's share of the step's rows.
    """

    def __init__(self, model: SentenceTransformer, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        self._scale, self._rows = _Scale(), 1

    def train(self, *args, **kwargs):
        with self.balanced_routers():
            return super().train(*args, **kwargs)

    @contextlib.contextmanager
    def balanced_routers(self) -> Iterator[None]:
        """While it lasts, a backward through the encoder's states goes through its auxiliary loss too."""
        encoder = self.model.transformers_model
        if encoder is None or encoder.config.model_type != "modernalbert":
            yield
            return
        forward = encoder.forward

        def forward_with_auxiliary_loss(*args, **kwargs):
            output = forward(*args, **kwargs)
            auxiliary, states = output.aux_loss, output.last_hidden_state
            if auxiliary is not None and auxiliary.requires_grad:
                output["last_hidden_state"] = _AddLoss.apply(states, auxiliary, len(states) / self._rows, self._scale)
            return output

        # Not a hook: sentence-transformers calls `forward` itself.
        encoder.forward = forward_with_auxiliary_loss
        try:
            yield
        finally:
            del encoder.forward

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        self._rows = sum(len(value) for name, value in inputs.items() if name.endswith("_input_ids"))
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = _RememberScale.apply(loss, self._scale)
        return (loss, outputs) if return_outputs else loss
