# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Methods that merge E LoRA experts into one: small registered functions on their factors.

`linear` and `svd` work on the factors alone. `ties` and `dare` choose among the numbers of each delta: they build the
deltas, one after another, and cut what comes out to a LoRA again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from modernalbert.mol_backends import Experts, concatenate_experts


# A (r, x), B (y, r), and the share of the squared norm of B A that the rank keeps.
LowRank = tuple[torch.Tensor, torch.Tensor, float]


class MergedExpert(NamedTuple):
    """
    One LoRA in place of E.

    Attributes:
        expert: E = 1, scaling 1.
        energy_in, energy_out: By projection, the share of the merged delta's squared Frobenius norm that the rank
            keeps; for `calibrated`, of the delta's output on the calibration text.
    """

    expert: Experts
    energy_in: float
    energy_out: float

    @classmethod
    def from_projections(cls, first: LowRank, second: LowRank) -> "MergedExpert":
        """Build it from the merged deltas of both projections."""
        (A_in, B_in, energy_in), (A_out, B_out, energy_out) = first, second
        expert = Experts(A_in[None], B_in[None], A_out[None], B_out[None], scaling=1.0)
        return cls(expert, energy_in, energy_out)


@dataclass(frozen=True)
class MergeSettings:
    """
    Settings of a merge method.

    Attributes:
        rank: Of the merged LoRA; None = what the method does by itself: E r, of one expert (r) for `svd`.
        density: Share of each delta's numbers that `ties` and `dare` keep, above 0 and up to 1; None = 0.5.
    """

    rank: int | None = None
    density: float | None = None


MERGE_METHODS: dict[str, Callable[[Experts, torch.Tensor, MergeSettings], MergedExpert]] = {}
# Methods that drop some of the numbers of a delta.
SPARSE_METHODS = ("ties", "dare")
DENSITY = 0.5


def register_merge_method(name: str) -> Callable:
    """
    Make a function available as `method=name`.

    A method takes (experts in float64, weights (E,) in float64, settings) and returns a MergedExpert.
    """

    def decorator(function: Callable) -> Callable:
        MERGE_METHODS[name] = function
        return function

    return decorator


def merge_factors(method: str, experts: Experts, weights: torch.Tensor, settings: MergeSettings) -> MergedExpert:
    """
    Merge E experts into one by a method of `MERGE_METHODS`, in float64.

    Raises:
        ValueError: density or rank are not allowed, or no density is called for.
    """
    if settings.density is not None:
        if method not in SPARSE_METHODS:
            allowed = " or ".join(map(repr, SPARSE_METHODS))
            raise ValueError(f"density={settings.density} is not allowed with method={method!r}: it is for {allowed}.")
        if not 0 < settings.density <= 1:
            raise ValueError(f"density={settings.density} is not allowed: it must be above 0 and at most 1.")
    experts = Experts(*(factor.detach().double() for factor in experts[:4]), experts.scaling)
    return MERGE_METHODS[method](experts, weights.to(experts.A_in.device).double(), settings)


def default_rank(experts: Experts, rank: int | None) -> int:
    """
    Return the rank of a merged LoRA whose deltas may have full rank; None = E r.

    Raises:
        ValueError: it is not from 1 to full rank, or E r where that is more.
    """
    num_experts, expert_rank, hidden_size = experts.A_in.shape
    all_ranks = num_experts * expert_rank
    if rank is None:
        return all_ranks
    largest = max(all_ranks, min(hidden_size, experts.A_out.shape[-1]))
    if not 1 <= rank <= largest:
        raise ValueError(f"rank={rank} is not allowed: it must be from 1 to {largest}.")
    return rank


@register_merge_method("linear")
def merge_linear(experts: Experts, weights: torch.Tensor, settings: MergeSettings) -> MergedExpert:
    """Concatenate factors: sum_e w_e Delta_e, exactly, with rank E r."""
    exact_rank = experts.A_in.shape[0] * experts.A_in.shape[1]
    if settings.rank not in (None, exact_rank):
        raise ValueError(
            f"rank={settings.rank} is not allowed with method='linear': it must be {exact_rank} (num_experts x "
            "lora_rank), or use method='svd'."
        )
    return MergedExpert(concatenate_experts(experts, weights), 1.0, 1.0)


@register_merge_method("svd")
def merge_svd(experts: Experts, weights: torch.Tensor, settings: MergeSettings) -> MergedExpert:
    """
    Compute the best rank-r approximation of sum_e w_e Delta_e in the Frobenius norm; rank None = that of one expert.
    """
    exact = concatenate_experts(experts, weights)
    full_rank = exact.A_in.shape[1]
    rank = experts.A_in.shape[1] if settings.rank is None else settings.rank
    if not 1 <= rank <= full_rank:
        raise ValueError(f"rank={rank} is not allowed: it must be from 1 to {full_rank} (num_experts x lora_rank).")
    return MergedExpert.from_projections(
        truncate_product(exact.A_in[0], exact.B_in[0], rank), truncate_product(exact.A_out[0], exact.B_out[0], rank)
    )


@register_merge_method("ties")
def merge_ties(experts: Experts, weights: torch.Tensor, settings: MergeSettings) -> MergedExpert:
    """
    TIES merging (Yadav et al. 2023) of the deltas.

    It keeps the largest entries of each delta, elects the majority sign for each entry, and averages the values that
    have it. It equals `linear` if nothing is trimmed and all signs agree.
    """
    density = DENSITY if settings.density is None else settings.density

    def merge(deltas: Callable[[], Iterator[torch.Tensor]]) -> torch.Tensor:
        smallest = []  # of the numbers that stay
        for delta in deltas():
            keep = max(1, round(density * delta.numel()))
            smallest.append(delta.abs().flatten().kthvalue(delta.numel() - keep + 1).values)

        def trimmed() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for weight, delta, bound in zip(weights, deltas(), smallest):
                yield weight, torch.where(delta.abs() >= bound, delta, 0.0)

        sign = sum(weight * delta for weight, delta in trimmed()).sign()
        total = share = 0.0
        for weight, delta in trimmed():
            agrees = (delta * weight).sign() == sign
            total = total + torch.where(agrees, weight * delta, 0.0)
            share = share + torch.where(agrees & (delta != 0), weight.abs(), 0.0)
        # Those that agree take the weight of those that do not.
        return torch.where(share != 0, total * weights.abs().sum() / share, 0.0)

    return merge_deltas(experts, merge, settings)


@register_merge_method("dare")
def merge_dare(experts: Experts, weights: torch.Tensor, settings: MergeSettings) -> MergedExpert:
    """
    Drop and rescale (DARE, Yu et al. 2023), on the deltas: a random share of each one's numbers stays, divided by that
    share, and the rest is 0; then their weighted sum. The draw is the same for all FFNs of one shape.
    """
    density = DENSITY if settings.density is None else settings.density
    generator = torch.Generator().manual_seed(0)

    def merge(deltas: Callable[[], Iterator[torch.Tensor]]) -> torch.Tensor:
        total = 0.0
        for weight, delta in zip(weights, deltas()):
            keep = torch.rand(delta.shape, generator=generator).to(delta.device) < density
            total = total + torch.where(keep, delta * (weight / density), 0.0)
        return total

    return merge_deltas(experts, merge, settings)


def merge_deltas(experts: Experts, merge: Callable, settings: MergeSettings) -> MergedExpert:
    """Apply `merge` to each projection's deltas, (y, x) each, one built at a time, and return the nearest LoRA."""
    rank = default_rank(experts, settings.rank)

    def merged(A: torch.Tensor, B: torch.Tensor) -> LowRank:
        delta = merge(lambda: (experts.scaling * b @ a for a, b in zip(A, B)))
        return split_evenly(*torch.linalg.svd(delta, full_matrices=False), rank)

    return MergedExpert.from_projections(merged(experts.A_in, experts.B_in), merged(experts.A_out, experts.B_out))


def truncate_product(A: torch.Tensor, B: torch.Tensor, rank: int) -> LowRank:
    """
    Truncated SVD of B A from the factors alone: the product itself is never built.

    Args:
        A: (R, x).
        B: (y, R).
        rank: r <= R.

    Returns:
        A' (r, x), B' (y, r) with the singular values shared evenly, and the share of the squared norm they keep.
    """
    q_a, r_a = torch.linalg.qr(A.T)
    q_b, r_b = torch.linalg.qr(B)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return split_evenly(q_b @ u, s, vh @ q_a.T, rank)


def split_evenly(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, rank: int) -> LowRank:
    """
    Return the first `rank` terms of a singular value decomposition (y, n), (n,), (n, x) as A (rank, x) and B (y, rank),
    with the singular values shared evenly, and the share of the squared norm they keep.
    """
    total = s.square().sum()
    energy = 1.0 if total == 0 else (s[:rank].square().sum() / total).item()
    root = s[:rank].sqrt()
    # Fewer singular values than the rank asked for, where A or B is narrow: the rest are zeros.
    missing = rank - root.numel()
    A = nn.functional.pad(root[:, None] * vh[: root.numel()], (0, 0, 0, missing))
    B = nn.functional.pad(u[:, : root.numel()] * root, (0, missing))
    return A, B, energy
