# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
The MoL backend `grouped`: slots sorted by expert, so that an expert's factors meet only the tokens that chose it.

Between P_in x and P_out everything is done a few rows of one expert at a time, in memory that stays in the cache. The
backward pass works the slots out again from x and P_in x: what training keeps is less than the plain FFN keeps. The
cost hardly depends on the number of experts. Sorting depends on the data, so nothing of this can be traced.

Shapes as in `modeling_mol`: T tokens, d hidden size, f FFN width, n_in outputs of P_in, E experts of rank r, k slots.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .mol_backends import FFN, DropoutMasks, Experts, in_token_blocks, multiplies_in, register_mol_backend


# Rows of one expert at a time: their states are a few MB, which a last-level cache holds (measured).
ROWS = 512


class Rows(NamedTuple):
    """Some slots of one expert."""

    expert: int
    tokens: torch.Tensor  # (R,) row of x; no token twice
    slots: torch.Tensor  # (R,) place in routing weights flattened, (T k,)
    num_first: int  # so many tokens, the leading ones, have not been met before


def rows_by_expert(top_k_index: torch.Tensor, num_experts: int) -> Iterator[Rows]:
    """Expert indices (T, k) -> all T k slots, expert by expert; of an expert those of tokens not met before lead."""
    num_slots = top_k_index.shape[1]
    # Experts come in their order, so a token is first met in the slot of its lowest.
    was_met = top_k_index > top_k_index.amin(dim=1, keepdim=True)
    keys = (2 * top_k_index + was_met).flatten()
    counts = torch.bincount(keys, minlength=2 * num_experts).view(num_experts, 2).tolist()
    groups = keys.argsort(stable=True).split([sum(count) for count in counts])
    for expert, (group, (num_first, _)) in enumerate(zip(groups, counts)):
        for start in range(0, len(group), ROWS):
            slots = group[start : start + ROWS]
            tokens = slots.div(num_slots, rounding_mode="floor")
            yield Rows(expert, tokens, slots, min(max(num_first - start, 0), len(slots)))


def put_rows(target: torch.Tensor, rows: Rows, values: torch.Tensor) -> None:
    """
    Put values (R, n) at the rows' tokens in `target` (T, n), which starts uninitialised: set at first, then added.
    """
    values, n = values.to(target.dtype), rows.num_first
    if n > 0:
        set_rows(target, rows.tokens[:n], values[:n])
    if n < len(rows.tokens):
        tokens, values = rows.tokens[n:], values[n:]
        if target.element_size() > 2:
            target.index_add_(0, tokens, values)
        else:  # of half precision, thrice as fast as index_add_ (measured)
            set_rows(target, tokens, target.index_select(0, tokens).add_(values))


def set_rows(target: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> None:
    """Set target (T, n)[places (R,)] = values (R, n), of one dtype."""
    # index_copy_ goes element by element, however narrow they are: here 16 bytes, several times as fast (measured).
    if target.shape[1] * target.element_size() % 16 == 0:
        target, values = target.view(torch.complex128), values.contiguous().view(torch.complex128)
    target.index_copy_(0, places, values)


class MixSlots(torch.autograd.Function):
    """
    (x (T, d), P_in x (T, n_in), routing weights (T, k), ...) -> sum_e q_e u_e (T, f) and s sum_e q_e B_out A_out u_e
    (T, d), with gradients for x, P_in x, the routing weights and the experts.

    Half precision is worked in float32, row by row, unless the processor multiplies in it; gradients of the experts are
    summed in float32 in any case.
    """

    @staticmethod
    def forward(ctx, x, base, top_k_weights, top_k_index, A_in, B_in, A_out, B_out, scaling, activate, masks):
        ctx.save_for_backward(x, base, top_k_weights, top_k_index, A_in, B_in, A_out, B_out, *masks)
        ctx.scaling, ctx.activate = scaling, activate
        experts = at_working_precision(Experts(A_in, B_in, A_out, B_out, scaling))
        gates = top_k_weights.flatten().to(experts.A_in.dtype)
        mixture = base.new_empty(x.shape[0], A_out.shape[-1])
        low_rank = base.new_empty(x.shape[0], x.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            for rows in rows_by_expert(top_k_index, A_in.shape[0]):
                e = rows.expert
                _, _, h = expand_rows(x, base, rows, experts, masks)
                u = activate_rows(h, rows, activate, masks).mul_(gates[rows.slots].unsqueeze(-1))
                put_rows(mixture, rows, u)
                c = apply_mask(masks.lora_out, rows, u) @ experts.A_out[e].t()
                put_rows(low_rank, rows, (c @ experts.B_out[e].t()).mul_(scaling))
        return mixture, low_rank

    @staticmethod
    @once_differentiable
    def backward(ctx, d_mixture, d_low_rank):
        x, base, top_k_weights, top_k_index, *factors = ctx.saved_tensors
        masks = DropoutMasks(*factors[4:])
        experts = at_working_precision(Experts(*factors[:4], ctx.scaling))
        gates = top_k_weights.flatten().to(experts.A_in.dtype)
        d_x, d_base, d_gates = torch.empty_like(x), torch.empty_like(base), torch.empty_like(gates)
        at_least_float = torch.promote_types(experts.A_in.dtype, torch.float32)
        d_experts = Experts(*(torch.zeros_like(factor, dtype=at_least_float) for factor in experts[:4]), ctx.scaling)
        s = ctx.scaling
        with torch.autocast(x.device.type, enabled=False):
            for rows in rows_by_expert(top_k_index, experts.A_in.shape[0]):
                e = rows.expert
                inputs, a, h = expand_rows(x, base, rows, experts, masks)
                h.requires_grad_()
                with torch.enable_grad():
                    activated = activate_rows(h, rows, ctx.activate, masks)
                u, gate = activated.detach(), gates[rows.slots].unsqueeze(-1)
                u_dropped = apply_mask(masks.lora_out, rows, u)
                c = u_dropped @ experts.A_out[e].t()

                d_out = d_low_rank.index_select(0, rows.tokens).to(u.dtype)
                add_product(d_experts.B_out[e], d_out.t(), c * gate, s)
                d_c = d_out @ experts.B_out[e]  # without gate and scale
                add_product(d_experts.A_out[e], (d_c * gate).t(), u_dropped, s)
                d_u = d_mixture.index_select(0, rows.tokens).to(u.dtype)
                if masks.lora_out is None:
                    d_u.addmm_(d_c, experts.A_out[e], alpha=s)
                else:
                    d_u.add_(apply_mask(masks.lora_out, rows, d_c @ experts.A_out[e]), alpha=s)
                d_gates[rows.slots] = torch.linalg.vecdot(d_u, u)

                (d_h,) = torch.autograd.grad(activated, h, d_u.mul_(gate))
                put_rows(d_base, rows, d_h)
                add_product(d_experts.B_in[e], d_h.t(), a, s)
                d_a = d_h @ experts.B_in[e]
                add_product(d_experts.A_in[e], d_a.t(), inputs, s)
                put_rows(d_x, rows, apply_mask(masks.lora_in, rows, d_a @ experts.A_in[e]).mul_(s))
        d_weights = d_gates.view_as(top_k_weights).to(top_k_weights.dtype)
        d_factors = (gradient.to(factor.dtype) for gradient, factor in zip(d_experts[:4], factors))
        return d_x, d_base, d_weights, None, *d_factors, None, None, None


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
    """Add a product: total (m, n) += scaling left (m, R) right (R, n), whose dtype may be narrower."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scaling)
    else:
        # Wide rows rather than narrow ones: the rank comes first in memory, as in the factors (`at_working_precision`).
        total.add_((right.t() @ left.t()).t() if total.stride(0) == 1 else left @ right, alpha=scaling)


def at_working_precision(experts: Experts) -> Experts:
    """Convert to the dtype to work in, every B with its rank first in memory: of small rank, products are faster so."""
    dtype = experts.A_in.dtype
    dtype = dtype if multiplies_in(dtype) else torch.promote_types(dtype, torch.float32)

    def rank_first(B: torch.Tensor) -> torch.Tensor:
        return B.to(dtype).mT.contiguous().mT

    A_in, B_in, A_out, B_out, scaling = experts
    return Experts(A_in.to(dtype), rank_first(B_in), A_out.to(dtype), rank_first(B_out), scaling)


def apply_mask(mask: torch.Tensor | None, rows: Rows, values: torch.Tensor) -> torch.Tensor:
    """Multiply values (R, n) by their rows of a mask (T, n)."""
    return values if mask is None else values * mask.index_select(0, rows.tokens).to(values.dtype)


def expand_rows(
    x: torch.Tensor, base: torch.Tensor, rows: Rows, experts: Experts, masks: DropoutMasks
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the rows' inputs of A_in (R, d), A_in x (R, r), and h_e = P_in x + s B_in A_in x (R, n_in)."""
    dtype = experts.A_in.dtype
    inputs = apply_mask(masks.lora_in, rows, x.index_select(0, rows.tokens).to(dtype))
    a = inputs @ experts.A_in[rows.expert].t()
    h = base.index_select(0, rows.tokens).to(dtype)
    return inputs, a, h.addmm_(a, experts.B_in[rows.expert].t(), alpha=experts.scaling)


def activate_rows(h: torch.Tensor, rows: Rows, activate: Callable, masks: DropoutMasks) -> torch.Tensor:
    """Activate h_e (R, n_in) -> u_e (R, f), with the FFN's dropout."""
    return apply_mask(masks.ffn, rows, activate(h))


def why_grouped_is_unavailable(x: torch.Tensor, ffn: FFN, masks: DropoutMasks) -> str | None:
    """Return the reason why it cannot be used, or None."""
    # The backward pass differentiates the activation by its input alone.
    return "its activation has weights, which would get no gradient" if ffn.activation_learns else None


@register_mol_backend("grouped", traceable=False, unavailable_reason=why_grouped_is_unavailable)
def grouped_mol(
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_index: torch.Tensor,
    ffn: FFN,
    experts: Experts,
    masks: DropoutMasks,
) -> torch.Tensor:
    """
    Sort tokens by expert. Extra multiply-adds per token: k r (2 d + n_in + f), and r (...) again for each slot that
    training works out a second time.

    A gradient reaches every expert's factors, zero where no token chose it. Second derivatives are not available
    (`mol_backend="masked"` has them).
    """
    if not torch.is_grad_enabled():
        # So many tokens that an expert gets ROWS of them.
        size = ROWS * experts.A_in.shape[0] // top_k_index.shape[1]
        blocks = in_token_blocks(grouped_mol, size, x, top_k_weights, top_k_index, ffn, experts, masks)
        if blocks is not None:
            return blocks
    base = ffn.project_in(x)
    # Under autocast the projections are narrower than x.
    narrow = DropoutMasks(*(None if mask is None else mask.to(base.dtype) for mask in masks))
    mixture, low_rank = MixSlots.apply(
        x.to(base.dtype), base, top_k_weights, top_k_index, *experts[:4], experts.scaling, ffn.activate, narrow
    )
    return ffn.project_out(mixture) + low_rank
