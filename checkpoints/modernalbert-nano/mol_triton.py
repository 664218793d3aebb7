# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
The MoL backend `triton`: what lies between P_in and P_out of a GeGLU in one pass over the memory, forward and backward.

A program takes some tokens through the columns of the FFN. For each of the tokens' k slots it adds the low-rank product
of the expert to P_in x, applies GELU and gate, and sums the slots by their routing weights; the k activations exist in
registers alone. The backward pass works them out again. Tokens are sorted by their experts first, so that the tokens of
a program share theirs: each meets little more than its own experts' factors, whatever their number.

Nothing waits for the GPU on the way, and no sum depends on the order in which programs end: what several of them add to
is stored in parts, which are summed afterwards.

Shapes as in `modeling_mol`: T tokens, f FFN width, E experts of rank r, k slots.
"""

import os

import torch
from torch.autograd.function import once_differentiable

from .mol_backends import FFN, DropoutMasks, Experts, register_mol_backend


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("mol_backend='triton' needs triton: pip install triton, or use 'grouped' or 'masked'.") from error


# Tokens and columns that a program works on at a time.
TOKENS, COLUMNS = 32, 64
# Programs that keep a large GPU busy: with few tokens, several share a tile of them and take different columns.
PROGRAMS = 512
# Of `_backward_states`, which with half of them keeps states in local memory (says the compiler, for Hopper).
BACKWARD_WARPS = 8
# Triton reads it at its import; then the kernels run on the CPU, slowly.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The number after that of every expert.
NONE = tl.constexpr(2**31 - 1)


@triton.jit
def _gelu(x, IS_EXACT: tl.constexpr):
    """GELU and its slope."""
    bell = tl.exp2(x * x * -0.7213475204444817)  # exp(-x^2 / 2)
    if IS_EXACT:
        share = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
    else:
        # Abramowitz and Stegun, 7.1.26: off by 1.5e-7 at most, and the slope's exponential is the only one.
        t = 1.0 / (1.0 + 0.23164188933706407 * tl.abs(x))
        series = t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
        tail = 0.5 * bell * t * (0.254829592 + series)
        share = tl.where(x < 0, tail, 1.0 - tail)
    return x * share, share + 0.3989422804014327 * x * bell


@triton.jit
def _tokens(order, num_tokens, TOKENS: tl.constexpr):
    """The tokens of a program of the grid (columns, tokens), and which of them there are."""
    rows = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_token = rows < num_tokens
    return tl.load(order + rows, mask=is_token, other=0).to(tl.int64), is_token


@triton.jit
def _next(expert, e):
    """The least expert above e that some slot (tokens,) holds, or NONE."""
    return tl.min(tl.where(expert > e, expert, NONE))


@triton.jit
def _gather(states, experts, token, is_token, slot, rank, scaling, E: tl.constexpr, r: tl.constexpr, K: tl.constexpr):
    """Of low-rank states (T, E, r) those of each token's own experts, scaled: (tokens, K R), float32."""
    inside = is_token[:, None] & (slot < K)[None, :] & (rank < r)[None, :]
    expert = tl.load(experts + token[:, None] * K + slot[None, :], mask=inside, other=0)
    return scaling * tl.load(states + (token[:, None] * E + expert) * r + rank[None, :], mask=inside, other=0.0)


@triton.jit
def _factor(factors, columns, in_ffn, rank, in_rank, TO_COLUMN: tl.constexpr, TO_RANK: tl.constexpr):
    """Part of one expert's factor, zero outside of it: (columns, ranks)."""
    places = columns[:, None] * TO_COLUMN + rank[None, :] * TO_RANK
    return tl.load(factors + places, mask=in_ffn[:, None] & in_rank[None, :], other=0.0)


@triton.jit
def _own(expert, e, values, like):
    """Values (tokens, n) of the tokens that hold expert e, else zero, in the dtype of the products."""
    return tl.where((expert == e)[:, None], values, 0.0).to(like.dtype.element_ty)


@triton.jit
def _add(total, left, right):
    """total (m, n) + left (m, l) right (l, n), in float32."""
    return total + tl.dot(left, right, input_precision="ieee")


@triton.jit
def _forward(
    base, all_a, gates, experts, order, B_in, A_out, mixture, parts, scaling, num_tokens,
    f: tl.constexpr, r: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, KR: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """mixture (T, f), and of each program's columns their part of A_out u: (programs, T, k, r)."""
    token, is_token = _tokens(order, num_tokens, TOKENS)
    slot_of, rank = tl.arange(0, KR) // R, tl.arange(0, KR) % R
    a = _gather(all_a, experts, token, is_token, slot_of, rank, scaling, E, r, K)
    c = tl.zeros((TOKENS, KR), dtype=tl.float32)
    for start in range(tl.program_id(0) * COLUMNS, f, tl.num_programs(0) * COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        in_ffn = columns < f
        inside = is_token[:, None] & in_ffn[None, :]
        places = token[:, None] * 2 * f + columns[None, :]
        base1 = tl.load(base + places, mask=inside, other=0.0).to(tl.float32)
        base2 = tl.load(base + places + f, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
        for slot in tl.static_range(K):
            in_rank = (slot_of == slot) & (rank < r)
            expert = tl.load(experts + token * K + slot, mask=is_token, other=-1)
            h1, h2 = base1, base2
            e = _next(expert, -1)
            while e < NONE:
                own_a, B = _own(expert, e, a, B_in), B_in + e * 2 * f * r
                h1 = _add(h1, own_a, tl.trans(_factor(B, columns, in_ffn, rank, in_rank, r, 1)))
                h2 = _add(h2, own_a, tl.trans(_factor(B + f * r, columns, in_ffn, rank, in_rank, r, 1)))
                e = _next(expert, e)
            active, _ = _gelu(h1, B_in.dtype.element_ty == tl.float32)
            u = active * h2
            total += tl.load(gates + token * K + slot, mask=is_token, other=0.0)[:, None] * u
            e = _next(expert, -1)
            while e < NONE:
                A = _factor(A_out + e * r * f, columns, in_ffn, rank, in_rank, 1, f)
                c = _add(c, _own(expert, e, u, A_out), A)
                e = _next(expert, e)
        to = mixture + token[:, None] * f + columns[None, :]
        tl.store(to, total.to(mixture.dtype.element_ty), mask=inside)
    to = (tl.program_id(0).to(tl.int64) * num_tokens + token)[:, None] * K * r + (slot_of * r + rank)[None, :]
    tl.store(parts + to, c, mask=is_token[:, None] & (slot_of < K)[None, :] & (rank < r)[None, :])


@triton.jit
def _backward_states(
    base, all_a, gates, experts, order, B_in, A_out, d_mixture, d_low_rank, d_base, part_gates, parts, scaling,
    num_tokens,
    f: tl.constexpr, r: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, KR: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """
    d_base (T, 2 f), and of each program's columns their part of the gradients of the routing weights, (programs, T, k),
    and of a, unscaled, (programs, T, k, r).
    """
    token, is_token = _tokens(order, num_tokens, TOKENS)
    slot_of, rank = tl.arange(0, KR) // R, tl.arange(0, KR) % R
    slots = tl.arange(0, KR // R)
    a = _gather(all_a, experts, token, is_token, slot_of, rank, scaling, E, r, K)
    d_c = _gather(d_low_rank, experts, token, is_token, slot_of, rank, scaling, E, r, K)  # without routing weights
    d_a = tl.zeros((TOKENS, KR), dtype=tl.float32)
    d_gates = tl.zeros((TOKENS, KR // R), dtype=tl.float32)
    for start in range(tl.program_id(0) * COLUMNS, f, tl.num_programs(0) * COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        in_ffn = columns < f
        inside = is_token[:, None] & in_ffn[None, :]
        places = token[:, None] * 2 * f + columns[None, :]
        base1 = tl.load(base + places, mask=inside, other=0.0).to(tl.float32)
        base2 = tl.load(base + places + f, mask=inside, other=0.0).to(tl.float32)
        d_mix = tl.load(d_mixture + token[:, None] * f + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total1 = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
        total2 = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
        for slot in tl.static_range(K):
            in_rank = (slot_of == slot) & (rank < r)
            expert = tl.load(experts + token * K + slot, mask=is_token, other=-1)
            h1, h2, d_u = base1, base2, d_mix
            e = _next(expert, -1)
            while e < NONE:
                own_a, B = _own(expert, e, a, B_in), B_in + e * 2 * f * r
                h1 = _add(h1, own_a, tl.trans(_factor(B, columns, in_ffn, rank, in_rank, r, 1)))
                h2 = _add(h2, own_a, tl.trans(_factor(B + f * r, columns, in_ffn, rank, in_rank, r, 1)))
                A = _factor(A_out + e * r * f, columns, in_ffn, rank, in_rank, 1, f)
                d_u = _add(d_u, _own(expert, e, d_c, A_out), tl.trans(A))
                e = _next(expert, e)
            active, slope = _gelu(h1, B_in.dtype.element_ty == tl.float32)
            d_gate = tl.sum(d_u * active * h2, axis=1)
            d_gates += tl.where((slots == slot)[None, :], d_gate[:, None], 0.0)
            d_u *= tl.load(gates + token * K + slot, mask=is_token, other=0.0)[:, None]
            d_h1, d_h2 = d_u * h2 * slope, d_u * active
            total1 += d_h1
            total2 += d_h2
            e = _next(expert, -1)
            while e < NONE:
                B = B_in + e * 2 * f * r
                d_a = _add(d_a, _own(expert, e, d_h1, B_in), _factor(B, columns, in_ffn, rank, in_rank, r, 1))
                d_a = _add(d_a, _own(expert, e, d_h2, B_in), _factor(B + f * r, columns, in_ffn, rank, in_rank, r, 1))
                e = _next(expert, e)
        tl.store(d_base + places, total1.to(d_base.dtype.element_ty), mask=inside)
        tl.store(d_base + places + f, total2.to(d_base.dtype.element_ty), mask=inside)
    row = (tl.program_id(0).to(tl.int64) * num_tokens + token)[:, None] * K
    tl.store(part_gates + row + slots[None, :], d_gates, mask=is_token[:, None] & (slots < K)[None, :])
    inside = is_token[:, None] & (slot_of < K)[None, :] & (rank < r)[None, :]
    tl.store(parts + row * r + (slot_of * r + rank)[None, :], d_a, mask=inside)


@triton.jit
def _sum_parts(
    parts, gates, experts, states, scaling, num_parts, num_tokens,
    r: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr, IS_WEIGHTED: tl.constexpr,
):  # fmt: skip
    """
    Parts (P, T, k, r) of what the slots have in rank r -> their sums times the scale, and times the routing weights
    where IS_WEIGHTED, at the slots' experts; zero at the others: states (T, E, r). Grid (tokens, E).
    """
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    e = tl.program_id(1)
    rank = tl.arange(0, R)
    is_token, in_rank = token < num_tokens, rank < r
    total = tl.zeros((TOKENS, R), dtype=tl.float32)
    for slot in tl.static_range(K):
        slots = token * K + slot
        holds = is_token & (tl.load(experts + slots, mask=is_token, other=-1) == e)
        value = tl.zeros((TOKENS, R), dtype=tl.float32)
        for part in range(num_parts):
            places = (part * num_tokens * K + slots)[:, None] * r + rank[None, :]
            value += tl.load(parts + places, mask=holds[:, None] & in_rank[None, :], other=0.0)
        if IS_WEIGHTED:
            value *= tl.load(gates + slots, mask=holds, other=0.0)[:, None]
        total += value
    to = states + (token * E + e)[:, None] * r + rank[None, :]
    tl.store(to, (scaling * total).to(states.dtype.element_ty), mask=is_token[:, None] & in_rank[None, :])


@triton.jit
def _backward_experts(
    base, all_a, gates, slots, ends, B_in, A_out, d_mixture, d_low_rank, d_B_in, d_A_out, scaling,
    f: tl.constexpr, r: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """
    Of one expert, one tile of columns and a share of the slots that hold it: d_B_in (shares, E, 2 f, r) and d_A_out
    (shares, E, r, f). Grid (columns, E, shares); `slots` are in the experts' order, expert e's end at ends[e].
    """
    e, share = tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, R)
    in_ffn, in_rank = columns < f, rank < r
    B1 = _factor(B_in + e * 2 * f * r, columns, in_ffn, rank, in_rank, r, 1)
    B2 = _factor(B_in + (e * 2 + 1) * f * r, columns, in_ffn, rank, in_rank, r, 1)
    A = _factor(A_out + e * r * f, columns, in_ffn, rank, in_rank, 1, f)
    d_B1 = tl.zeros((COLUMNS, R), dtype=tl.float32)
    d_B2 = tl.zeros((COLUMNS, R), dtype=tl.float32)
    d_A = tl.zeros((COLUMNS, R), dtype=tl.float32)
    begin = tl.load(ends + e - 1, mask=e > 0, other=0)
    end = tl.load(ends + e)
    size = tl.cdiv(end - begin, tl.num_programs(2))
    begin += tl.program_id(2) * size
    end = tl.minimum(end, begin + size)
    for start in range(begin, end, TOKENS):
        rows = start + tl.arange(0, TOKENS)
        is_slot = rows < end
        slot = tl.load(slots + rows, mask=is_slot, other=0).to(tl.int64)
        token = slot // K
        inside = is_slot[:, None] & in_ffn[None, :]
        inside_rank = is_slot[:, None] & in_rank[None, :]
        to_rank = (token * E + e)[:, None] * r + rank[None, :]
        a = (scaling * tl.load(all_a + to_rank, mask=inside_rank, other=0.0)).to(B_in.dtype.element_ty)
        d_c = scaling * tl.load(d_low_rank + to_rank, mask=inside_rank, other=0.0).to(tl.float32)
        places = token[:, None] * 2 * f + columns[None, :]
        h1 = _add(tl.load(base + places, mask=inside, other=0.0).to(tl.float32), a, tl.trans(B1))
        h2 = _add(tl.load(base + places + f, mask=inside, other=0.0).to(tl.float32), a, tl.trans(B2))
        active, slope = _gelu(h1, B_in.dtype.element_ty == tl.float32)
        d_mix = tl.load(d_mixture + token[:, None] * f + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gates + slot, mask=is_slot, other=0.0)[:, None]
        d_u = gate * _add(d_mix, d_c.to(A_out.dtype.element_ty), tl.trans(A))
        d_h1 = (d_u * h2 * slope).to(B_in.dtype.element_ty)
        d_h2 = (d_u * active).to(B_in.dtype.element_ty)
        d_B1 = _add(d_B1, tl.trans(d_h1), a)
        d_B2 = _add(d_B2, tl.trans(d_h2), a)
        d_A = _add(d_A, tl.trans((active * h2).to(A_out.dtype.element_ty)), (gate * d_c).to(A_out.dtype.element_ty))
    inside = in_ffn[:, None] & in_rank[None, :]
    to_B = ((share * E + e) * 2 * f + columns)[:, None] * r + rank[None, :]
    to_A = ((share * E + e) * r + rank)[None, :] * f + columns[:, None]
    tl.store(d_B_in + to_B, d_B1, mask=inside)
    tl.store(d_B_in + to_B + f * r, d_B2, mask=inside)
    tl.store(d_A_out + to_A, d_A, mask=inside)


class FusedSlots(torch.autograd.Function):
    """
    P_in x (T, 2 f), A_in x of all experts (T, E r), routing weights (T, k) in float32, expert indices (T, k), B_in
    (E, 2 f, r), A_out (E, r, f) and s -> sum_e q_e u_e (T, f), and s q_e A_out u_e of each expert (T, E r).
    """

    @staticmethod
    def forward(ctx, base, all_a, gates, experts, B_in, A_out, scaling):
        base, all_a, gates, B_in, A_out = (x.contiguous() for x in (base, all_a, gates, B_in, A_out))
        experts = experts.to(torch.int32).contiguous()
        order = order_by_experts(experts, len(A_out))
        ctx.save_for_backward(base, all_a, gates, experts, order, B_in, A_out)
        ctx.scaling = scaling
        grid, sizes = tiling(gates, A_out)
        mixture = base.new_empty(len(base), A_out.shape[-1])
        parts = gates.new_empty(grid[0], *gates.shape, A_out.shape[1])
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(base):
            _forward[grid](
                base, all_a, gates, experts, order, B_in, A_out, mixture, parts, scaling, len(base), **sizes
            )  # fmt: skip
            low_rank = sum_parts(parts, gates, experts, all_a, scaling, is_weighted=True)
        return mixture, low_rank

    @staticmethod
    @once_differentiable
    def backward(ctx, d_mixture, d_low_rank):
        base, all_a, gates, experts, order, B_in, A_out = ctx.saved_tensors
        d_mixture, d_low_rank = d_mixture.contiguous(), d_low_rank.contiguous()
        grid, sizes = tiling(gates, A_out)
        d_base = torch.empty_like(base)
        part_gates = gates.new_empty(grid[0], *gates.shape)
        parts = gates.new_empty(grid[0], *gates.shape, A_out.shape[1])
        d_B_in, d_A_out = None, None
        with torch.cuda.device_of(base):
            _backward_states[grid](
                base, all_a, gates, experts, order, B_in, A_out, d_mixture, d_low_rank, d_base, part_gates, parts,
                ctx.scaling, len(base), num_warps=BACKWARD_WARPS, **sizes,
            )  # fmt: skip
            d_all_a = sum_parts(parts, gates, experts, all_a, ctx.scaling, is_weighted=False)
            if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
                slots, ends = slots_by_expert(experts, len(A_out))
                grid, sizes = expert_tiling(gates, A_out)
                d_B_in = B_in.new_empty(grid[2], *B_in.shape, dtype=torch.float32)
                d_A_out = A_out.new_empty(grid[2], *A_out.shape, dtype=torch.float32)
                _backward_experts[grid](
                    base, all_a, gates, slots, ends, B_in, A_out, d_mixture, d_low_rank, d_B_in, d_A_out,
                    ctx.scaling, **sizes,
                )  # fmt: skip
                d_B_in, d_A_out = d_B_in.sum(dim=0).to(B_in.dtype), d_A_out.sum(dim=0).to(A_out.dtype)
        return d_base, d_all_a, part_gates.sum(dim=0), None, d_B_in, d_A_out, None


def sum_parts(
    parts: torch.Tensor,
    gates: torch.Tensor,
    experts: torch.Tensor,
    all_a: torch.Tensor,
    scaling: float,
    is_weighted: bool,
) -> torch.Tensor:
    """What `_sum_parts` says of parts (P, T, k, r), shaped as all_a (T, E r)."""
    num_parts, num_tokens, num_slots, rank = parts.shape
    num_experts = all_a.shape[1] // rank
    states = torch.empty_like(all_a)
    _sum_parts[(triton.cdiv(num_tokens, TOKENS), num_experts)](
        parts, gates, experts, states, scaling, num_parts, num_tokens,
        r=rank, E=num_experts, K=num_slots, R=filled_rank(rank), TOKENS=TOKENS, IS_WEIGHTED=is_weighted,
    )  # fmt: skip
    return states


def filled_rank(rank: int) -> int:
    """The rank that the kernels multiply with: the rest is zeros."""
    return max(16, triton.next_power_of_2(rank))


def shape_constants(gates: torch.Tensor, A_out: torch.Tensor) -> dict[str, int]:
    """What is compiled into the kernels of an FFN, for routing weights (T, k) and A_out (E, r, f)."""
    num_experts, rank, width = A_out.shape
    sizes = {"f": width, "r": rank, "E": num_experts, "K": gates.shape[1], "R": filled_rank(rank)}
    return sizes | {"TOKENS": TOKENS, "COLUMNS": COLUMNS}


def tiling(gates: torch.Tensor, A_out: torch.Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid (columns, tokens) of `_forward` and `_backward_states`, and their constants."""
    sizes = shape_constants(gates, A_out)
    token_tiles, column_tiles = triton.cdiv(len(gates), TOKENS), triton.cdiv(sizes["f"], COLUMNS)
    sizes["KR"] = triton.next_power_of_2(sizes["K"]) * sizes["R"]
    # Their loops over experts run once or twice: loads ahead of them would not pay.
    sizes["num_stages"] = 1
    return (min(column_tiles, triton.cdiv(PROGRAMS, max(1, token_tiles))), token_tiles), sizes


def expert_tiling(gates: torch.Tensor, A_out: torch.Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The grid (columns, experts, shares of an expert's slots) of `_backward_experts`, and its constants."""
    sizes = shape_constants(gates, A_out)
    column_tiles = triton.cdiv(sizes["f"], COLUMNS)
    # Several times what runs at once: experts are not chosen equally often.
    shares = triton.cdiv(4 * PROGRAMS, sizes["E"] * column_tiles)
    most = triton.cdiv(gates.numel(), sizes["E"] * TOKENS)
    return (column_tiles, sizes["E"], max(1, min(shares, most))), sizes


def order_by_experts(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Expert indices (T, k) -> the tokens (T,) sorted by the expert of the first slot, then the second, ..."""
    key = experts[:, 0].to(torch.int64)
    for slot in experts[:, 1:].unbind(dim=1):
        key = key * num_experts + slot
    return narrow(key, num_experts ** experts.shape[1]).argsort(stable=True)


def slots_by_expert(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert indices (T, k) -> the slots (T k,) sorted by expert, and where those of each expert end (E,), int32."""
    sorted_experts, slots = narrow(experts.flatten(), num_experts).sort(stable=True)
    numbers = torch.arange(num_experts, device=experts.device, dtype=sorted_experts.dtype)
    return slots, torch.searchsorted(sorted_experts, numbers, right=True, out_int32=True)


def narrow(keys: torch.Tensor, number: int) -> torch.Tensor:
    """Keys below `number` in a dtype that takes few passes of a GPU's sort."""
    return keys.to(torch.uint8 if number <= 2**8 else torch.int16 if number <= 2**15 else torch.int64)


def why_triton_is_unavailable(x: torch.Tensor, ffn: FFN, masks: DropoutMasks) -> str | None:
    """Why the kernels cannot be used, in words that end a sentence; `None` if they can."""
    if x.device.type != "cuda" and not IS_INTERPRETED:
        return f"the tokens are on {x.device.type}, not on a GPU"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU is older than Ampere"
    if x.dtype == torch.float64:
        return "it does not compute in float64"
    if ffn.glu_activation != "gelu":
        return "the feed-forward network is not a GeGLU with exact GELU"
    if any(mask is not None for mask in masks):
        return "there is dropout"
    return None


@register_mol_backend("triton", traceable=False, unavailable_reason=why_triton_is_unavailable)
def triton_mol(
    x: torch.Tensor,
    top_k_weights: torch.Tensor,
    top_k_index: torch.Tensor,
    ffn: FFN,
    experts: Experts,
    masks: DropoutMasks,
) -> torch.Tensor:
    """
    Fused kernels between the two shared products. Extra multiply-adds per token: E r d twice for A_in and B_out, whose
    products are dense, and little more than k r (n_in + f) in the kernel.

    Raises:
        ValueError: a dtype that the kernels do not take.
    """
    base = ffn.project_in(x)
    if IS_INTERPRETED and base.dtype == torch.bfloat16:
        raise ValueError("mol_backend='triton' multiplies no bfloat16 in Triton's interpreter: use float32 or float16.")
    if base.dtype not in DTYPES:
        raise ValueError(
            f"mol_backend='triton' does not take {base.dtype}: it must be one of "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}, or another backend: masked, grouped."
        )
    A_in, B_in, A_out, B_out = (factor.to(base.dtype) for factor in experts[:4])
    all_a = torch.nn.functional.linear(x.to(base.dtype), A_in.flatten(0, 1))
    mixture, low_rank = FusedSlots.apply(base, all_a, top_k_weights.float(), top_k_index, B_in, A_out, experts.scaling)
    output = ffn.project_out(mixture)
    return torch.addmm(output, low_rank, B_out.transpose(1, 2).flatten(0, 1).to(output.dtype))
