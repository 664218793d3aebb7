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
The MoL backend `triton`: what lies between P_in and P_out of a GeGLU in one pass over the memory, forward and backward.

A program takes some tokens and some columns of the FFN. For each of the tokens' k slots it adds the expert's low-rank
product to P_in x, applies GELU and gate, and sums the slots by their routing weights; the k activations exist in
registers alone. The backward pass works them out again. Tokens are sorted by their experts first, so that the tokens of
a program share theirs: each meets little more than its own experts' factors, whatever their number.

Shapes as in `modeling_mol`: T tokens, f FFN width, E experts of rank r, k slots.
"""

import os

import torch
from torch.autograd.function import once_differentiable

from .modeling_mol import FFN, DropoutMasks, Experts, register_mol_backend


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("mol_backend='triton' needs triton: pip install triton, or use 'grouped' or 'masked'.") from error


# Tokens and columns of a program.
TOKENS, COLUMNS = 32, 64
# Triton reads it at its import; then the kernels run on the CPU, slowly.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _tile(order, num_tokens, f, r, R: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tokens, columns and ranks of a program of the grid (tokens, columns), and which of them there are."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = rows < num_tokens
    token = tl.load(order + rows, mask=is_token, other=0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, R)
    return token, is_token, columns, columns < f, ranks, ranks < r


@triton.jit
def _experts_of(experts, slots, is_token):
    """The experts of some slots, -1 where there is no token; the least and the greatest of them."""
    expert = tl.load(experts + slots, mask=is_token, other=-1)
    return expert, tl.min(tl.where(is_token, expert, 2147483647)), tl.max(expert)


@triton.jit
def _expand(h1, h2, a, expert, first, last, B_in, columns, in_ffn, ranks, in_rank, f, r):
    """Both halves of P_in x (tokens, columns), and s A_in x of one slot (tokens, R) -> both halves of h."""
    inside = in_rank[:, None] & in_ffn[None, :]
    for e in range(first, last + 1):
        own = tl.where((expert == e)[:, None], a, 0.0).to(B_in.dtype.element_ty)
        places = (e * 2 * f + columns)[None, :] * r + ranks[:, None]
        h1 += tl.dot(own, tl.load(B_in + places, mask=inside, other=0.0), input_precision="ieee")
        h2 += tl.dot(own, tl.load(B_in + places + f * r, mask=inside, other=0.0), input_precision="ieee")
    return h1, h2


@triton.jit
def _forward(
    base, a, gates, experts, order, B_in, A_out, mixture, part_c, num_tokens, f, r,
    K: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """mixture (T, f), and of each tile of columns its part of A_out u: (tiles, T, k, r)."""
    token, is_token, columns, in_ffn, ranks, in_rank = _tile(order, num_tokens, f, r, R, TOKENS, COLUMNS)
    inside = is_token[:, None] & in_ffn[None, :]
    inside_ranks = is_token[:, None] & in_rank[None, :]
    places = token[:, None] * 2 * f + columns[None, :]
    base1 = tl.load(base + places, mask=inside, other=0.0).to(tl.float32)
    base2 = tl.load(base + places + f, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for slot in tl.static_range(K):
        slots = token * K + slot
        expert, first, last = _experts_of(experts, slots, is_token)
        slot_ranks = slots[:, None] * r + ranks[None, :]
        a_slot = tl.load(a + slot_ranks, mask=inside_ranks, other=0.0)
        h1, h2 = _expand(base1, base2, a_slot, expert, first, last, B_in, columns, in_ffn, ranks, in_rank, f, r)
        u = _gelu(h1) * h2
        gate = tl.load(gates + slots, mask=is_token, other=0.0)
        total += gate[:, None] * u
        c = tl.zeros((TOKENS, R), dtype=tl.float32)
        for e in range(first, last + 1):
            own = tl.where((expert == e)[:, None], u, 0.0).to(A_out.dtype.element_ty)
            A = tl.load(
                A_out + (e * r + ranks)[None, :] * f + columns[:, None],
                mask=in_ffn[:, None] & in_rank[None, :],
                other=0.0,
            )
            c += tl.dot(own, A, input_precision="ieee")
        tile = tl.program_id(1).to(tl.int64) * num_tokens * K * r
        tl.store(part_c + tile + slot_ranks, c, mask=inside_ranks)
    to = mixture + token[:, None] * f + columns[None, :]
    tl.store(to, total.to(mixture.dtype.element_ty), mask=inside)


@triton.jit
def _backward_states(
    base, a, gates, experts, order, B_in, A_out, d_mixture, d_c, d_base, part_gates, part_a, num_tokens, f, r,
    K: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d_base (T, 2 f), and of each tile of columns its part of d_gates (tiles, T, k) and of d_a (tiles, T, k, r)."""
    token, is_token, columns, in_ffn, ranks, in_rank = _tile(order, num_tokens, f, r, R, TOKENS, COLUMNS)
    inside = is_token[:, None] & in_ffn[None, :]
    inside_ranks = is_token[:, None] & in_rank[None, :]
    inside_factor = in_ffn[:, None] & in_rank[None, :]
    places = token[:, None] * 2 * f + columns[None, :]
    base1 = tl.load(base + places, mask=inside, other=0.0).to(tl.float32)
    base2 = tl.load(base + places + f, mask=inside, other=0.0).to(tl.float32)
    d_mix = tl.load(d_mixture + token[:, None] * f + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    total1 = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    total2 = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for slot in tl.static_range(K):
        slots = token * K + slot
        expert, first, last = _experts_of(experts, slots, is_token)
        slot_ranks = slots[:, None] * r + ranks[None, :]
        a_slot = tl.load(a + slot_ranks, mask=inside_ranks, other=0.0)
        h1, h2 = _expand(base1, base2, a_slot, expert, first, last, B_in, columns, in_ffn, ranks, in_rank, f, r)
        active = _gelu(h1)
        tile = tl.program_id(1).to(tl.int64) * num_tokens * K
        d_gate = tl.sum(d_mix * active * h2, axis=1)
        tl.store(part_gates + tile + slots, d_gate, mask=is_token)
        gate = tl.load(gates + slots, mask=is_token, other=0.0)
        d_u = gate[:, None] * d_mix
        d_c_slot = tl.load(d_c + slot_ranks, mask=inside_ranks, other=0.0)
        for e in range(first, last + 1):
            own = tl.where((expert == e)[:, None], d_c_slot, 0.0).to(A_out.dtype.element_ty)
            A = tl.load(A_out + (e * r + ranks)[None, :] * f + columns[:, None], mask=inside_factor, other=0.0)
            d_u += tl.dot(own, tl.trans(A), input_precision="ieee")
        d_h1 = d_u * h2 * _gelu_slope(h1)
        d_h2 = d_u * active
        total1 += d_h1
        total2 += d_h2
        d_a = tl.zeros((TOKENS, R), dtype=tl.float32)
        for e in range(first, last + 1):
            is_own = (expert == e)[:, None]
            own1 = tl.where(is_own, d_h1, 0.0).to(B_in.dtype.element_ty)
            own2 = tl.where(is_own, d_h2, 0.0).to(B_in.dtype.element_ty)
            factor = (e * 2 * f + columns)[:, None] * r + ranks[None, :]
            d_a += tl.dot(own1, tl.load(B_in + factor, mask=inside_factor, other=0.0), input_precision="ieee")
            d_a += tl.dot(own2, tl.load(B_in + factor + f * r, mask=inside_factor, other=0.0), input_precision="ieee")
        tl.store(part_a + tile * r + slot_ranks, d_a, mask=inside_ranks)
    tl.store(d_base + places, total1.to(d_base.dtype.element_ty), mask=inside)
    tl.store(d_base + places + f, total2.to(d_base.dtype.element_ty), mask=inside)


@triton.jit
def _backward_experts(
    base, a, gates, slots, ends, B_in, A_out, d_mixture, d_c, d_B_in, d_A_out, f, r,
    K: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d_B_in (E, 2 f, r) and d_A_out (E, r, f) of one expert and one tile of columns, from all slots that hold it."""
    e = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_ffn = columns < f
    ranks = tl.arange(0, R)
    in_rank = ranks < r
    inside_factor = in_ffn[:, None] & in_rank[None, :]
    factor = (e * 2 * f + columns)[:, None] * r + ranks[None, :]
    B1 = tl.load(B_in + factor, mask=inside_factor, other=0.0)
    B2 = tl.load(B_in + factor + f * r, mask=inside_factor, other=0.0)
    to_A = (e * r + ranks)[None, :] * f + columns[:, None]
    A = tl.load(A_out + to_A, mask=inside_factor, other=0.0)
    d_B1 = tl.zeros((COLUMNS, R), dtype=tl.float32)
    d_B2 = tl.zeros((COLUMNS, R), dtype=tl.float32)
    d_A = tl.zeros((COLUMNS, R), dtype=tl.float32)
    begin = tl.load(ends + e - 1, mask=e > 0, other=0)
    end = tl.load(ends + e)
    for start in range(begin, end, TOKENS):
        rows = start + tl.arange(0, TOKENS)
        is_slot = rows < end
        slot = tl.load(slots + rows, mask=is_slot, other=0).to(tl.int64)
        token = slot // K
        inside = is_slot[:, None] & in_ffn[None, :]
        inside_ranks = is_slot[:, None] & in_rank[None, :]
        slot_ranks = slot[:, None] * r + ranks[None, :]
        a_slot = tl.load(a + slot_ranks, mask=inside_ranks, other=0.0).to(B_in.dtype.element_ty)
        d_c_slot = tl.load(d_c + slot_ranks, mask=inside_ranks, other=0.0).to(A_out.dtype.element_ty)
        places = token[:, None] * 2 * f + columns[None, :]
        h1 = tl.load(base + places, mask=inside, other=0.0).to(tl.float32)
        h2 = tl.load(base + places + f, mask=inside, other=0.0).to(tl.float32)
        h1 += tl.dot(a_slot, tl.trans(B1), input_precision="ieee")
        h2 += tl.dot(a_slot, tl.trans(B2), input_precision="ieee")
        active = _gelu(h1)
        d_mix = tl.load(d_mixture + token[:, None] * f + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gates + slot, mask=is_slot, other=0.0)
        d_u = gate[:, None] * d_mix + tl.dot(d_c_slot, tl.trans(A), input_precision="ieee")
        d_h1 = (d_u * h2 * _gelu_slope(h1)).to(B_in.dtype.element_ty)
        d_h2 = (d_u * active).to(B_in.dtype.element_ty)
        u = (active * h2).to(A_out.dtype.element_ty)
        d_B1 += tl.dot(tl.trans(d_h1), a_slot, input_precision="ieee")
        d_B2 += tl.dot(tl.trans(d_h2), a_slot, input_precision="ieee")
        d_A += tl.dot(tl.trans(u), d_c_slot, input_precision="ieee")
    tl.store(d_B_in + factor, d_B1.to(d_B_in.dtype.element_ty), mask=inside_factor)
    tl.store(d_B_in + factor + f * r, d_B2.to(d_B_in.dtype.element_ty), mask=inside_factor)
    tl.store(d_A_out + to_A, d_A.to(d_A_out.dtype.element_ty), mask=inside_factor)


class FusedSlots(torch.autograd.Function):
    """
    P_in x (T, 2 f), s A_in x of the slots (T, k, r) and routing weights (T, k), both float32, expert indices (T, k),
    B_in (E, 2 f, r) and A_out (E, r, f) -> sum_e q_e u_e (T, f) and A_out u of the slots (T, k, r), float32.
    """

    @staticmethod
    def forward(ctx, base, a, gates, experts, B_in, A_out):
        num_tokens, num_slots, rank = a.shape
        width = A_out.shape[-1]
        base, a, gates, B_in, A_out = (x.contiguous() for x in (base, a, gates, B_in, A_out))
        experts = experts.to(torch.int32).contiguous()
        order = order_by_experts(experts, A_out.shape[0])
        grid, sizes = tiling(num_tokens, num_slots, rank, width)
        mixture = base.new_empty(num_tokens, width)
        part_c = a.new_empty(grid[1], num_tokens, num_slots, rank)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(base):
            _forward[grid](
                base, a, gates, experts, order, B_in, A_out, mixture, part_c, num_tokens, width, rank, **sizes
            )  # fmt: skip
        ctx.save_for_backward(base, a, gates, experts, order, B_in, A_out)
        return mixture, part_c.sum(dim=0)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_mixture, d_c):
        base, a, gates, experts, order, B_in, A_out = ctx.saved_tensors
        num_tokens, num_slots, rank = a.shape
        num_experts, _, width = A_out.shape
        d_mixture, d_c = d_mixture.contiguous(), d_c.contiguous()
        grid, sizes = tiling(num_tokens, num_slots, rank, width)
        d_base, d_B_in, d_A_out = torch.empty_like(base), torch.empty_like(B_in), torch.empty_like(A_out)
        part_gates = gates.new_empty(grid[1], num_tokens, num_slots)
        part_a = a.new_empty(grid[1], num_tokens, num_slots, rank)
        slots = experts.flatten().argsort(stable=True)
        ends = torch.bincount(experts.flatten(), minlength=num_experts).cumsum(0)
        with torch.cuda.device_of(base):
            _backward_states[grid](
                base, a, gates, experts, order, B_in, A_out, d_mixture, d_c, d_base, part_gates, part_a,
                num_tokens, width, rank, **sizes,
            )  # fmt: skip
            _backward_experts[(num_experts, grid[1])](
                base, a, gates, slots, ends, B_in, A_out, d_mixture, d_c, d_B_in, d_A_out, width, rank, **sizes
            )  # fmt: skip
        return d_base, part_a.sum(dim=0), part_gates.sum(dim=0), None, d_B_in, d_A_out


def tiling(num_tokens: int, num_slots: int, rank: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid over tokens and columns, and the kernels' constants; a rank below 16 is filled up with zeros."""
    grid = (triton.cdiv(num_tokens, TOKENS), triton.cdiv(width, COLUMNS))
    R = max(16, triton.next_power_of_2(rank))
    return grid, {"K": num_slots, "R": R, "TOKENS": TOKENS, "COLUMNS": COLUMNS}


def order_by_experts(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Expert indices (T, k) -> the tokens (T,) sorted by the expert of the first slot, then the second, ..."""
    key = torch.zeros_like(experts[:, 0], dtype=torch.int64)
    for slot in experts.unbind(dim=1):
        key = key * num_experts + slot
    return key.argsort(stable=True)


def why_not_triton(x: torch.Tensor, ffn: FFN, masks: DropoutMasks) -> str | None:
    """Why the kernels cannot be used, in words that end a sentence; `None` if they can."""
    if x.device.type != "cuda" and not IS_INTERPRETED:
        return f"the tokens are on {x.device.type}, not on a GPU"
    if ffn.glu_activation != "gelu":
        return "the feed-forward network is not a GeGLU with exact GELU"
    if any(mask is not None for mask in masks):
        return "there is dropout"
    return None


@register_mol_backend("triton", traceable=False, why_not=why_not_triton)
def triton_mol(
    x: torch.Tensor,
    routing_weights: torch.Tensor,
    experts_index: torch.Tensor,
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
    num_experts, rank, _ = experts.A_in.shape
    A_in, B_in, A_out, B_out = (factor.to(base.dtype) for factor in experts[:4])
    linear = torch.nn.functional.linear
    places = experts_index.unsqueeze(-1).expand(-1, -1, rank)  # (T, k, r)
    all_a = linear(x.to(base.dtype), A_in.flatten(0, 1)).view(-1, num_experts, rank)
    a = all_a.gather(1, places).float() * experts.scaling
    gates = routing_weights.float()
    mixture, c = FusedSlots.apply(base, a, gates, experts_index, B_in, A_out)
    weighted = (c * (gates.unsqueeze(-1) * experts.scaling)).to(base.dtype)
    low_rank = base.new_zeros(x.shape[0], num_experts, rank).scatter(1, places, weighted)
    return ffn.project_out(mixture) + linear(low_rank.flatten(1), B_out.transpose(0, 1).flatten(1))
