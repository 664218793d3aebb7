# Copyright 2026 The ModernALBERT authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
How E LoRA experts become one: each method is a small registered function on their factors.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .modeling_mol import Experts, concatenate_experts


class MergedExpert(NamedTuple):
    """One LoRA in place of E, and the share of the averaged deltas' squared norm it keeps, by projection."""

    expert: Experts  # E = 1, scaling 1
    energy_in: float
    energy_out: float


MERGE_METHODS: dict[str, Callable[[Experts, torch.Tensor, int | None], MergedExpert]] = {}


def register_merge_method(name: str) -> Callable:
    """
    Make a function available as `method=name`.

    A method takes (experts in float64, weights (E,) in float64, rank or None) and returns a MergedExpert.
    """

    def decorator(function: Callable) -> Callable:
        MERGE_METHODS[name] = function
        return function

    return decorator


@register_merge_method("linear")
def merge_linear(experts: Experts, weights: torch.Tensor, rank: int | None) -> MergedExpert:
    """sum_e w_e Delta_e, exactly, by concatenation: rank E r."""
    exact_rank = experts.A_in.shape[0] * experts.A_in.shape[1]
    if rank not in (None, exact_rank):
        raise ValueError(
            f"rank={rank} is not allowed with method='linear': it must be {exact_rank} (num_experts x lora_rank), or "
            "use method='svd'."
        )
    return MergedExpert(concatenate_experts(experts, weights), 1.0, 1.0)


@register_merge_method("svd")
def merge_svd(experts: Experts, weights: torch.Tensor, rank: int | None) -> MergedExpert:
    """The best rank-r approximation of sum_e w_e Delta_e in the Frobenius norm; rank None = that of one expert."""
    exact = concatenate_experts(experts, weights)
    full_rank = exact.A_in.shape[1]
    rank = experts.A_in.shape[1] if rank is None else rank
    if not 1 <= rank <= full_rank:
        raise ValueError(f"rank={rank} is not allowed: it must be from 1 to {full_rank} (num_experts x lora_rank).")
    A_in, B_in, energy_in = truncate_product(exact.A_in[0], exact.B_in[0], rank)
    A_out, B_out, energy_out = truncate_product(exact.A_out[0], exact.B_out[0], rank)
    expert = Experts(A_in[None], B_in[None], A_out[None], B_out[None], scaling=1.0)
    return MergedExpert(expert, energy_in, energy_out)


def truncate_product(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
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
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    total = s.square().sum()
    energy = 1.0 if total == 0 else (s[:rank].square().sum() / total).item()
    root = s[:rank].sqrt()
    # Fewer singular values than the rank asked for, where A or B is narrow: the rest are zeros.
    missing = rank - root.numel()
    small_a = nn.functional.pad((root[:, None] * vh[: root.numel()]) @ q_a.T, (0, 0, 0, missing))
    small_b = nn.functional.pad(q_b @ (u[:, : root.numel()] * root), (0, missing))
    return small_a, small_b, energy
