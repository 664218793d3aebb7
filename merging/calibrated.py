# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Merge method `calibrated` (our own): one LoRA per group, fitted to the routed FFN by ridge regression.

1. Delta_in is fitted to the routed pre-activations, sum_e q_e(x) Delta_in,e x, on x.
2. With Delta_in fixed, Delta_out is fitted to the routed output less P_out u, on the activations u.

Both are regularised toward the weighted average of the deltas, more strongly with less text. Low ranks use an SVD
weighted by the second moments of the inputs, which is the best fit of that rank.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from modernalbert.merging.ffn_recorder import dense_routing_weights, mixture_calls, with_progress
from modernalbert.merging.methods import LowRank, MergedExpert, default_rank, split_evenly
from modernalbert.modeling_mol import MoLFeedForward
from modernalbert.mol_backends import Experts, concatenate_experts


# The weight of staying with the average, relative to the mean square of the inputs: with much text, and for each input
# that a token has to speak for (chosen on nano, fine-tuned on SICK, and on small random models).
RIDGE, RIDGE_PER_INPUT = 0.1, 3.0


class RidgeRegression:
    """A linear map x (T, n) -> y (T, m) from float64 sums over tokens, so that no token is kept."""

    def __init__(self):
        self.num_tokens = 0
        self.gram: torch.Tensor | None = None  # (n, n)
        self.cross: torch.Tensor | None = None  # (m, n)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add a batch of tokens. Products are computed in float32 at least and accumulated in float64."""
        x, y = (z if z.dtype == torch.float64 else z.float() for z in (x, y))
        if self.gram is None:
            self.gram = x.new_zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
            self.cross = x.new_zeros(y.shape[-1], x.shape[-1], dtype=torch.float64)
        self.gram.add_(x.T @ x)
        self.cross.add_(y.T @ x)
        self.num_tokens += len(x)

    def solve(self, prior: tuple[torch.Tensor, torch.Tensor], rank: int, ridge: float) -> LowRank:
        """
        Solve for the map B A of rank r that minimises mean|(B A - B0 A0) x - y|^2 + ridge mean(x^2) |B A - B0 A0|^2.

        Args:
            prior: (A0 (R, n), B0 (m, R)) float64; y is what is left after it.

        Returns:
            A (r, n), B (m, r), and the share of the squares that the rank keeps.
        """
        metric = self.gram / self.num_tokens
        metric.diagonal().add_(ridge * metric.diagonal().mean())
        root = torch.linalg.cholesky(metric)
        full = prior[1] @ prior[0] + torch.cholesky_solve(self.cross.T / self.num_tokens, root).T
        A, B, energy = split_evenly(*torch.linalg.svd(full @ root, full_matrices=False), rank)
        return torch.linalg.solve_triangular(root, A, upper=False, left=False), B, energy


@torch.no_grad()
def merge_calibrated(
    model: PreTrainedModel, weights: dict[int, torch.Tensor], batches: Sequence[dict], rank: int | None = None
) -> dict[int, MergedExpert]:
    """
    Fit one expert for each modulated group to what the group's routed FFN does with the text, at all its layers.

    Args:
        model: With `ffn_modulation="mol"`; it is run twice over the batches, in evaluation mode.
        weights: (E,) by group, of the average that the fit starts from: `measure_usage` on the batches.
        rank: None = E r, that of the exact average.

    Raises:
        ValueError: the rank is not allowed.
    """
    mixtures: dict[int, MoLFeedForward] = {k: model.base_model.groups[k].mlp for k in model.config.modulated_groups}
    averages = {}
    for k, mlp in mixtures.items():
        factors = Experts(*(factor.double() for factor in mlp.experts[:4]), mlp.scaling)
        averages[k] = concatenate_experts(factors, weights[k].to(mlp.mol_A_in.device).double())
    (rank,) = {default_rank(mlp.experts, rank) for mlp in mixtures.values()}

    def fit(name: str, samples: Callable) -> dict[int, LowRank]:
        regressions = {k: RidgeRegression() for k in mixtures}

        def visit(group, mlp, depth, x, output):
            regressions[group].add(*samples(group, mlp, depth, x, output))

        with mixture_calls(model, visit):
            for batch in with_progress(batches, f"Fitting the {name} projections"):
                model(**batch)
        solved = {}
        for k, regression in regressions.items():
            prior = (getattr(averages[k], f"A_{name}")[0], getattr(averages[k], f"B_{name}")[0])
            ridge = RIDGE + RIDGE_PER_INPUT * prior[0].shape[1] / regression.num_tokens
            solved[k] = regression.solve(prior, rank, ridge)
        return solved

    def low_rank(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return (x @ A.to(x).T) @ B.to(x).T

    def pre_activations(group, mlp, depth, x, output):
        # What routing adds to the average: the experts' parts, weighted by q_e - w_e.
        difference = dense_routing_weights(mlp, depth, x) - weights[group].to(x.device)
        blocks = (difference * mlp.scaling).to(x.dtype).repeat_interleave(mlp.mol_A_in.shape[1], dim=-1)
        states = (x @ mlp.mol_A_in.flatten(0, 1).T) * blocks
        return x, states @ mlp.mol_B_in.permute(0, 2, 1).flatten(0, 1)

    def outputs(group, mlp, depth, x, output):
        A, B, _ = first[group]
        u = mlp.activate(mlp.Wi(x) + low_rank(x, A, B))
        average = averages[group]
        return u, output - mlp.Wo(u) - low_rank(u, average.A_out[0], average.B_out[0])

    first = fit("in", pre_activations)
    second = fit("out", outputs)
    return {k: MergedExpert.from_projections(first[k], second[k]) for k in mixtures}
