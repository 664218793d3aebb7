# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Sums over the tokens that one router has seen, and the figures that follow from them."""

import math

import torch

from modernalbert.modeling_mol import route, sum_over_processes
from modernalbert.mol_backends import expert_mask


class RoutingTally:
    """
    Sums over the tokens of one use of a router.

    Args:
        num_experts: E.
        num_experts_per_tok: k.
    """

    def __init__(self, num_experts: int, num_experts_per_tok: int):
        self.num_experts, self.k = num_experts, num_experts_per_tok
        self.num_tokens = 0
        self.usage = self.slots = self.probabilities = self.pairs = 0.0
        self.entropy = self.weight_entropy = 0.0

    def add(self, router_logits: torch.Tensor) -> torch.Tensor:
        """Count logits (T, E); returns the routing weights (T, E) float64, 0 for experts that are not chosen."""
        probabilities, weights, experts = route(router_logits.double(), self.k)
        chosen = expert_mask(experts, self.num_experts).double()
        dense_weights = (chosen * weights.unsqueeze(-1)).sum(dim=-2)
        slots = chosen.sum(dim=-2)
        self.num_tokens += len(dense_weights)
        self.usage = self.usage + dense_weights.sum(dim=0)
        self.slots = self.slots + slots.sum(dim=0)
        self.probabilities = self.probabilities + probabilities.sum(dim=0)
        self.pairs = self.pairs + slots.T @ slots
        self.entropy = self.entropy + relative_entropy(probabilities).sum()
        self.weight_entropy = self.weight_entropy + relative_entropy(dense_weights).sum()
        return dense_weights

    def figures(self) -> dict[str, list | float]:
        """Return the fields of a `RouterUse`, but for its place in the model."""
        usage, slots = self.usage / self.num_tokens, self.slots / (self.num_tokens * self.k)
        usage_entropy = relative_entropy(usage).item()
        return {
            "usage": usage.tolist(),
            "slots": slots.tolist(),
            "probability_entropy": float(self.entropy) / self.num_tokens,
            "usage_entropy": usage_entropy,
            "token_dependence": usage_entropy - float(self.weight_entropy) / self.num_tokens,
            "balance_loss": (self.num_experts * slots @ (self.probabilities / self.num_tokens)).item(),
            "chosen_together": (self.pairs / self.num_tokens).tolist(),
        }


def relative_entropy(p: torch.Tensor) -> torch.Tensor:
    """Compute entropies of distributions, (..., E) -> (...), as shares of log E."""
    return torch.special.entr(p).sum(dim=-1) / math.log(p.shape[-1])


def reduce_tallies(tallies: list[RoutingTally]) -> None:
    """Add up the tallies of all processes of the run, each of which holds the same routers, in one communication."""
    names = ("usage", "slots", "probabilities", "pairs", "entropy", "weight_entropy", "num_tokens")
    sums = [torch.as_tensor(getattr(tally, name)).to(tally.usage) for tally in tallies for name in names]
    sums = sum_over_processes(*sums)
    for i, tally in enumerate(tallies):
        for j, name in enumerate(names):
            setattr(tally, name, sums[i * len(names) + j])
        tally.num_tokens = int(tally.num_tokens)
