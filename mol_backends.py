# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
The experts of a Mixture of LoRAs, and the backends that run them: registry, `reference`, `masked`, and the choice.

The mathematics and the names of shapes are in `modeling_mol`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing


logger = logging.get_logger(__name__)


def expert_mask(top_k_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Map (..., k) indices to (..., k, E) booleans, true where the slot holds that expert."""
    return top_k_index.unsqueeze(-1) == torch.arange(num_experts, device=top_k_index.device)


# --- experts ---------------------------------------------------------------------------------------------------------


class Experts(NamedTuple):
    """E LoRA experts on both projections of one FFN. All of one dtype; `scaling` is s = alpha / r."""

    A_in: torch.Tensor  # (E, r, d)
    B_in: torch.Tensor  # (E, n_in, r)
    A_out: torch.Tensor  # (E, r, f)
    B_out: torch.Tensor  # (E, d, r)
    scaling: float


class FFN(NamedTuple):
    """The shared FFN as three steps on (..., width) tensors, so that MoL needs to know no particular FFN."""

    project_in: Callable[[torch.Tensor], torch.Tensor]  # (..., d) -> (..., n_in)
    activate: Callable[[torch.Tensor], torch.Tensor]  # (..., n_in) -> (..., f)
    project_out: Callable[[torch.Tensor], torch.Tensor]  # (..., f) -> (..., d)
    glu_activation: str | None = None  # of a GLU whose activated half comes first; what fused kernels go by
    activation_learns: bool = False  # whether `activate` has weights of its own, which wait for a gradient


class DropoutMasks(NamedTuple):
    """
    Scaled keep-masks, drawn once per call outside the backends, so that every backend drops the same elements.

    `ffn` acts on every expert's u_e before P_out and A_out alike; the `lora` ones only on the input of the low-rank
    paths. None = no dropout.
    """

    ffn: torch.Tensor | None = None  # (T, f)
    lora_in: torch.Tensor | None = None  # (T, d)
    lora_out: torch.Tensor | None = None  # (T, f)


def _apply(mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return x if mask is None else x * mask


def concatenate_experts(experts: Experts, weights: torch.Tensor) -> Experts:
    """
    Concatenate experts to one LoRA of rank E r whose deltas are sum_e w_e s B_e A_e, exactly: *deltas* are averaged,
    not factors.

    Args:
        experts: E experts.
        weights: (E,), any float dtype.

    Returns:
        One expert, rank E r, scaling 1: A' stacks the A_e, B' the w_e s B_e.
    """

    def stack_a(a: torch.Tensor) -> torch.Tensor:  # (E, r, x) -> (1, E r, x)
        return a.flatten(0, 1).unsqueeze(0)

    def stack_b(b: torch.Tensor) -> torch.Tensor:  # (E, x, r) -> (1, x, E r)
        weighted = b * (weights.to(b.dtype) * experts.scaling).view(-1, 1, 1)
        return weighted.permute(1, 0, 2).flatten(1).unsqueeze(0)

    return Experts(
        stack_a(experts.A_in), stack_b(experts.B_in), stack_a(experts.A_out), stack_b(experts.B_out), scaling=1.0
    )


def single_expert_forward(x: torch.Tensor, ffn: FFN, experts: Experts, masks: DropoutMasks) -> torch.Tensor:
    """Run the FFN with one LoRA (E = 1) for all tokens: (T, d) -> (T, d)."""
    linear = nn.functional.linear
    low_rank = linear(_apply(masks.lora_in, x), experts.A_in[0]) * experts.scaling
    hidden = _apply(masks.ffn, ffn.activate(ffn.project_in(x) + linear(low_rank, experts.B_in[0])))
    low_rank = linear(_apply(masks.lora_out, hidden), experts.A_out[0]) * experts.scaling
    return ffn.project_out(hidden) + linear(low_rank, experts.B_out[0])


# --- backends --------------------------------------------------------------------------------------------------------


def is_available(x: torch.Tensor, ffn: FFN, masks: DropoutMasks) -> None:
    """Return None: the `unavailable_reason` of a backend without limits."""


@dataclass(frozen=True)
class Backend:
    """
    A way to compute MoL. All compute the same thing; they differ in speed and in what they can serve.

    Attributes:
        function: (x (T, d), top_k_weights (T, k), top_k_index (T, k), FFN, Experts, DropoutMasks) -> (T, d); None where
            what it needs is not installed.
        traceable: Whether graphs, and torch.func, can hold it.
        unavailable_reason: (x, FFN, DropoutMasks) -> the reason why it cannot serve them, or None.
    """

    function: Callable | None
    traceable: bool = True
    unavailable_reason: Callable[[torch.Tensor, FFN, DropoutMasks], str | None] = is_available


# By the name that `mol_backend` takes. Modules of backends add theirs when they are imported.
MOL_BACKENDS: dict[str, Backend] = {
    "triton": Backend(None, traceable=False, unavailable_reason=lambda x, ffn, masks: "triton is not installed")
}


def register_mol_backend(name: str, **limits) -> Callable:
    """Decorator: make a function available as `mol_backend=name`, with the `limits` of `Backend`."""

    def decorator(function: Callable) -> Callable:
        MOL_BACKENDS[name] = Backend(function, **limits)
        return function

    return decorator


@register_mol_backend("reference")
def reference_mol(
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_index: torch.Tensor,
    ffn: FFN,
    experts: Experts,
    masks: DropoutMasks,
) -> torch.Tensor:
    """
    Compute the definition, literally: every expert's whole FFN on every token, weighted by its q (0 if not chosen).

    A bias of P_out belongs to no expert: it is added once, so that it is no reason to route anywhere (our decision; it
    changes nothing but the router's gradient for k = 1).
    """
    num_experts = experts.A_in.shape[0]
    chosen = expert_mask(top_k_index, num_experts).to(top_k_weights.dtype)
    dense_routing_weights = (chosen * top_k_weights.unsqueeze(-1)).sum(dim=-2).to(x.dtype)  # (T, E)
    bias = ffn.project_out(x.new_zeros(1, experts.A_out.shape[-1]))
    output = bias.expand(x.shape)
    for e in range(num_experts):
        expert = Experts(*(part[e : e + 1] for part in experts[:4]), scaling=experts.scaling)
        output = output + dense_routing_weights[:, e : e + 1] * (single_expert_forward(x, ffn, expert, masks) - bias)
    return output


# Tokens the CPU works on at a time. The k activations of a block stay in the last-level cache and in memory that the
# allocator already holds; beyond some 30 MB every temporary is fresh pages (measured: benchmarks/ffn_speed.py).
CPU_TOKEN_BLOCK = 512


class Slots(NamedTuple):
    """Contents of the k slots of a token, for experts whose factors are stacked to rank E r."""

    blocks: torch.Tensor  # (k, T, E r), the scale s in the block of the slot's expert, else 0
    gates: torch.Tensor  # (k, T, 1), routing weights


def fill_slots(top_k_weights: torch.Tensor, top_k_index: torch.Tensor, experts: Experts, dtype: torch.dtype) -> Slots:
    """Make slots of routing weights (T, k) and expert indices (T, k), in the dtype of the states they will meet."""
    num_experts, rank, _ = experts.A_in.shape
    blocks = expert_mask(top_k_index, num_experts).transpose(0, 1).to(dtype) * experts.scaling
    return Slots(
        blocks.unsqueeze(-1).expand(*blocks.shape, rank).flatten(-2), top_k_weights.to(dtype).t().unsqueeze(-1)
    )


def expand_slots(base: torch.Tensor, low_rank: torch.Tensor, B_in: torch.Tensor, slots: Slots) -> torch.Tensor:
    """P_in x (T, n), all A_in x (T, E r) and (E, n, r) -> the h_e of the k slots, (k, T, n)."""
    B_in = B_in.permute(0, 2, 1).flatten(0, 1)  # (E r, n)
    # In place: a product with an addend (baddbmm) would first copy the addend k times, which is slower.
    return torch.matmul(low_rank * slots.blocks, B_in).add_(base)


def mix_slots(
    hidden: torch.Tensor, A_out: torch.Tensor, slots: Slots, lora_out_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mix the activated k slots u_e (k, T, f): what P_out gets, sum_e q_e u_e (T, f), and what B_out gets (T, E r).

    Args:
        A_out: (E, r, f).
        lora_out_mask: (T, f) scaled keep-mask on the input of A_out.
    """
    low_rank = nn.functional.linear(_apply(lora_out_mask, hidden), A_out.flatten(0, 1))
    # Slot by slot: a product of all k at once would be another tensor of their size.
    mixture = hidden[0] * slots.gates[0]
    for u, gate in zip(hidden[1:], slots.gates[1:]):
        mixture = torch.addcmul(mixture, u, gate)
    return mixture, (low_rank * (slots.blocks * slots.gates)).sum(dim=0)


def add_low_rank(output: torch.Tensor, low_rank: torch.Tensor, B_out: torch.Tensor) -> torch.Tensor:
    """Add the low-rank part to P_out's result: (T, d), low-rank states (T, E r) and (E, d, r) -> (T, d)."""
    return output + nn.functional.linear(low_rank, B_out.transpose(0, 1).flatten(1))


def token_blocks(tokens: torch.Tensor, size: int = CPU_TOKEN_BLOCK) -> list[slice] | None:
    """Return the blocks of (T, d) to be worked on one after the other, or None for all at once."""
    # A length known only at run time (tracing, export, dynamic compilation) is not cut: the number of blocks would be
    # fixed.
    if tokens.device.type != "cpu" or torch.jit.is_tracing() or not statically_known_true(tokens.shape[0] > size):
        return None
    return [slice(start, start + size) for start in range(0, tokens.shape[0], size)]


def in_token_blocks(
    backend: Callable,
    size: int,
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_index: torch.Tensor,
    ffn: FFN,
    experts: Experts,
    masks: DropoutMasks,
) -> torch.Tensor | None:
    """Run a backend on `size` tokens at a time; None, and nothing done, where all at once is no worse."""
    blocks = token_blocks(x, size)
    if blocks is None:
        return None
    outputs = []
    for rows in blocks:
        block_masks = DropoutMasks(*(None if mask is None else mask[rows] for mask in masks))
        outputs.append(backend(x[rows], top_k_weights[rows], top_k_index[rows], ffn, experts, block_masks))
    return torch.cat(outputs)


@register_mol_backend("masked")
def masked_mol(
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_index: torch.Tensor,
    ffn: FFN,
    experts: Experts,
    masks: DropoutMasks,
) -> torch.Tensor:
    """
    Stack all experts' factors to rank E r; each slot zeroes the blocks of the experts it does not hold.

    No gather, no sort, no data-dependent shape: compiles and exports whole, and every parameter always gets a gradient,
    which data-parallel training needs. Extra multiply-adds per token: E r (d + k n_in + k f + d), against
    k r (d + n_in + f + d) for a gather.
    """
    blocks = in_token_blocks(masked_mol, CPU_TOKEN_BLOCK, x, top_k_weights, top_k_index, ffn, experts, masks)
    if blocks is not None:
        return blocks

    base = ffn.project_in(x)
    # Under autocast the projections are narrower than x: all that follows has their dtype.
    slots = fill_slots(top_k_weights, top_k_index, experts, base.dtype)
    low_rank = nn.functional.linear(_apply(masks.lora_in, x), experts.A_in.flatten(0, 1))
    hidden = _apply(masks.ffn, ffn.activate(expand_slots(base, low_rank, experts.B_in, slots)))
    mixture, low_rank = mix_slots(hidden, experts.A_out, slots, masks.lora_out)
    return add_low_rank(ffn.project_out(mixture), low_rank, experts.B_out)


# Activations of a GLU whose derivative is an operator of its own, (gradient, input) -> gradient.
GLU_DERIVATIVES = {
    "gelu": (nn.functional.gelu, torch.ops.aten.gelu_backward),
    "silu": (nn.functional.silu, torch.ops.aten.silu_backward),
}


class MixStackedSlots(torch.autograd.Function):
    """
    The k slots of a GLU as `masked_mol` computes them, with the backward pass written out.

    (x (T, d), P_in x (T, 2 f), routing weights (T, k), ...) -> sum_e q_e u_e (T, f), and the input of B_out (T, E r).

    Autograd would add up several gradients of width 2 f for each slot, in as many passes over memory. Here each slot
    costs four products with the stacked factors and one pass for each factor of u = act(h) v. Both halves h and v are
    tensors of their own, because an activation of half a tensor runs at half the speed (measured).
    """

    @staticmethod
    def forward(ctx, x, base, top_k_weights, top_k_index, A_in, B_in, A_out, scaling, activation):
        slots = fill_slots(top_k_weights, top_k_index, Experts(A_in, B_in, A_out, None, scaling), base.dtype)
        stacked_A_in, stacked_A_out = A_in.flatten(0, 1), A_out.flatten(0, 1)  # (E r, d), (E r, f)
        stacked_B_in = B_in.permute(0, 2, 1).flatten(0, 1)  # (E r, 2 f)
        act, _ = GLU_DERIVATIVES[activation]
        mixture, low_rank_out, kept = None, None, []
        with torch.autocast(x.device.type, enabled=False):
            low_rank_in = x @ stacked_A_in.t()
            for blocks, gate in zip(*slots):
                a = low_rank_in * blocks
                halves = zip(base.chunk(2, dim=-1), stacked_B_in.chunk(2, dim=-1))
                h, v = (torch.addmm(half, a, factor) for half, factor in halves)
                g = act(h)
                u = g * v
                c = (u @ stacked_A_out.t()).mul_(blocks)
                mixture = u * gate if mixture is None else mixture.addcmul_(u, gate)
                low_rank_out = c * gate if low_rank_out is None else low_rank_out.addcmul_(c, gate)
                kept += [a, h, v, g, u, c]
        ctx.save_for_backward(x, stacked_A_in, stacked_B_in, stacked_A_out, *slots, *kept)
        ctx.activation, ctx.factors_shape, ctx.gate_dtype = activation, A_in.shape, top_k_weights.dtype
        return mixture, low_rank_out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_mixture, d_low_rank_out):
        x, A_in, B_in, A_out, all_blocks, gates, *kept = ctx.saved_tensors
        _, derivative = GLU_DERIVATIVES[ctx.activation]
        num_experts, rank, _ = ctx.factors_shape
        width = A_out.shape[1]
        d_base = d_low_rank_in = None
        d_gates = []
        # Gradients of the experts are summed in at least float32.
        wide = torch.promote_types(x.dtype, torch.float32)
        d_A_out, d_B_in = (x.new_zeros(factor.shape, dtype=wide) for factor in (A_out, B_in))
        with torch.autocast(x.device.type, enabled=False):
            for slot, (blocks, gate) in enumerate(zip(all_blocks, gates)):
                a, h, v, g, u, c = kept[6 * slot : 6 * slot + 6]
                d_gates.append(torch.linalg.vecdot(d_mixture, u) + torch.linalg.vecdot(d_low_rank_out, c))
                d_c = d_low_rank_out * (blocks * gate)
                d_A_out += d_c.t() @ u
                d_u = (d_mixture * gate).addmm_(d_c, A_out)
                d_v = d_u * g
                d_h = derivative(d_u.mul_(v), h)
                d_a = None
                for part, d_half in ((slice(width), d_h), (slice(width, None), d_v)):
                    d_B_in[:, part] += a.t() @ d_half
                    factor = B_in[:, part].t()
                    d_a = d_half @ factor if d_a is None else d_a.addmm_(d_half, factor)
                d_a.mul_(blocks)
                if d_base is None:
                    d_base, d_low_rank_in = torch.cat([d_h, d_v], dim=1), d_a
                else:
                    d_base[:, :width] += d_h
                    d_base[:, width:] += d_v
                    d_low_rank_in += d_a
            d_x = d_low_rank_in @ A_in
            d_A_in = d_low_rank_in.t() @ x

        def by_expert(d_factor: torch.Tensor) -> torch.Tensor:  # (E r, n) -> (E, r, n)
            return d_factor.unflatten(0, (num_experts, rank)).to(x.dtype)

        d_weights = torch.stack(d_gates, dim=1).to(ctx.gate_dtype)
        return d_x, d_base, d_weights, None, by_expert(d_A_in), by_expert(d_B_in).mT, by_expert(d_A_out), None, None


def why_stacked_is_unavailable(x: torch.Tensor, ffn: FFN, masks: DropoutMasks) -> str | None:
    """Return the reason why it cannot be used, or None."""
    if ffn.glu_activation not in GLU_DERIVATIVES:
        return f"it knows only GLUs of {' and '.join(GLU_DERIVATIVES)}"
    return None if all(mask is None for mask in masks) else "it has no dropout"


@register_mol_backend("stacked", traceable=False, unavailable_reason=why_stacked_is_unavailable)
def stacked_mol(
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_index: torch.Tensor,
    ffn: FFN,
    experts: Experts,
    masks: DropoutMasks,
) -> torch.Tensor:
    """
    Compute `masked` with the backward pass of its slots written out: a few large products instead of many passes over
    memory.

    It keeps 4 f numbers for each token and slot until the backward pass. Second derivatives are not available
    (`mol_backend="masked"` has them).
    """
    base = ffn.project_in(x)
    # Under autocast the projections are narrower than x.
    narrow = [factor.to(base.dtype) for factor in experts[:3]]
    mixture, low_rank = MixStackedSlots.apply(
        x.to(base.dtype), base, top_k_weights, top_k_index, *narrow, experts.scaling, ffn.glu_activation
    )
    return add_low_rank(ffn.project_out(mixture), low_rank, experts.B_out)


# On the CPU `grouped` pays from so many tokens on, for 8 experts and for 64: what it saves for each token, and what
# its many small products cost, both grow with the experts; where half precision is fast, it saves less (measured:
# benchmarks/ffn_speed.py).
GROUPED_TOKENS, GROUPED_TOKENS_IN_HALF_PRECISION = 256, 512


def multiplies_in(dtype: torch.dtype) -> bool:
    """Return whether the processor has matrix products in a dtype that are no slower than those in float32."""
    return (
        dtype in (torch.float32, torch.float64)
        or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        or (dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported())
    )


def is_fast_half_precision(x: torch.Tensor) -> bool:
    """
    Return whether products of x on the CPU are in half precision, by autocast or by its dtype, and it has such
    products.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype.itemsize == 2 and multiplies_in(dtype)


def grouped_pays(x: torch.Tensor) -> bool:
    """Return whether `grouped` is faster than `masked` for (T, d) on the CPU."""
    least = GROUPED_TOKENS_IN_HALF_PRECISION if is_fast_half_precision(x) else GROUPED_TOKENS
    return len(x) >= least


def stacked_pays(x: torch.Tensor, experts: Experts) -> bool:
    """
    Return whether `stacked` is the fastest for (T, d) on the CPU: in training, where half precision is fast, if all
    ranks together are no wider than the model (measured: benchmarks/ffn_speed.py).
    """
    num_experts, rank, width = experts.A_in.shape
    narrow = num_experts * rank <= width
    return torch.is_grad_enabled() and narrow and is_fast_half_precision(x)


def check_mol_backend(name: str) -> None:
    """
    Raises:
        ValueError: there is no backend of that name.
    """
    if name != "auto" and name not in MOL_BACKENDS:
        raise ValueError(
            f"mol_backend={name!r} is not allowed: it must be one of {', '.join(('auto', *sorted(MOL_BACKENDS)))}."
        )


def select_mol_backend(name: str, x: torch.Tensor, ffn: FFN, experts: Experts, masks: DropoutMasks) -> Callable:
    """
    Select the backend for tokens x (T, d): the one that is named, or for "auto" the fastest.

    A named backend that cannot be used is replaced by `masked`, with a warning that gives the reason.
    """
    traced = is_tracing(x) or is_transformed()
    if name == "auto":
        name = _fastest_backend(x, ffn, experts, masks, traced)
    else:
        backend = MOL_BACKENDS[name]
        if traced and not backend.traceable:
            reason = "it cannot be traced or transformed"
        else:
            reason = backend.unavailable_reason(x, ffn, masks)
        if reason is not None:
            name = _masked_instead_of(name, reason)
    return MOL_BACKENDS[name].function


def _fastest_backend(x: torch.Tensor, ffn: FFN, experts: Experts, masks: DropoutMasks, traced: bool) -> str:
    """Choose the backend of "auto"; figures are from benchmarks/ffn_speed.py."""

    def serves(name: str) -> bool:
        return MOL_BACKENDS[name].unavailable_reason(x, ffn, masks) is None

    # 1. Graphs and torch.func hold neither a sort nor an autograd function: `masked` has static shapes and plain
    #    operators.
    # 2. Off the CPU `masked` is a few large products. `triton`, whose speed has not been measured, is used
    #    where it is asked for.
    if traced or x.device.type != "cpu":
        return "masked"
    # 3. Training of narrow experts where half precision is fast: autograd's passes over memory are what `masked` spends
    #    its time on, and `stacked` does without them.
    if stacked_pays(x, experts) and serves("stacked"):
        return "stacked"
    # 4. Enough tokens to pay for sorting them: `grouped` multiplies an expert's factors with its own tokens alone.
    if grouped_pays(x) and serves("grouped"):
        return "grouped"
    # 5. Few tokens, or an activation that learns.
    return "masked"


def is_transformed() -> bool:
    """Return whether torch.func or forward-mode differentiation is active, which look into autograd functions."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


@torch.compiler.assume_constant_result  # called while dynamo traces, which could not trace the warning
def _masked_instead_of(name: str, reason: str) -> str:
    logger.warning_once(f"mol_backend={name!r} is not used, because {reason}: 'masked' takes its place.")
    return "masked"
