# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Cross-entropy over a large vocabulary without the matrix of logits.

Logits of a few tokens at a time are computed and turned into their gradient in place. Memory stays at a block of
logits, whatever the number of tokens, and nothing is computed twice.
"""

import torch
from torch.autograd.function import once_differentiable


# Tokens of one softmax: 16 MB in float32 for 30,522 words, which a last-level cache holds.
SOFTMAX_TOKENS = 128
# Tokens whose gradients meet the states in one product: narrower products cost more passes over the decoder's gradient.
PRODUCT_TOKENS = 1024
# Products are fast for a vocabulary of a multiple of this; it is padded to one (measured: 3 times as fast on AVX-512).
ROW_MULTIPLE = 32


class LinearCrossEntropy(torch.autograd.Function):
    """(states (n, e), weight (V, e), bias (V,) or None, words (n,)) -> the summed cross-entropy, float32 or float64."""

    @staticmethod
    def forward(ctx, states, weight, bias, words):
        wide = torch.promote_types(states.dtype, torch.float32)
        vocabulary, width = weight.shape
        padding = -vocabulary % ROW_MULTIPLE
        rows = torch.nn.functional.pad(weight.to(states.dtype), (0, 0, 0, padding))
        bias_row = states.new_zeros(vocabulary) if bias is None else bias.to(states.dtype)
        bias_row = torch.nn.functional.pad(bias_row, (0, padding), value=-torch.inf)
        total = states.new_zeros((), dtype=wide)
        needs_gradient = any(ctx.needs_input_grad)
        if needs_gradient:
            d_states = []
            d_rows, d_bias = states.new_zeros(rows.shape, dtype=wide), states.new_zeros(len(rows), dtype=wide)
        for block_states, block_words in zip(states.split(PRODUCT_TOKENS), words.split(PRODUCT_TOKENS)):
            logits = block_states.new_empty(len(block_states), len(rows))
            parts = (tensor.split(SOFTMAX_TOKENS) for tensor in (logits, block_states, block_words[:, None]))
            for part_logits, part_states, part_words in zip(*parts):
                torch.addmm(bias_row, part_states, rows.t(), out=part_logits)
                log_p = part_logits.log_softmax(-1, dtype=wide)
                counted = part_words >= 0
                part_words = part_words.clamp(min=0)
                total -= log_p.gather(1, part_words).mul_(counted).sum()
                if needs_gradient:
                    d_logits = log_p.exp_()
                    d_logits.scatter_add_(1, part_words, d_logits.new_full(part_words.shape, -1.0))
                    if not counted.all():
                        d_logits *= counted
                    d_bias += d_logits.sum(0)
                    part_logits.copy_(d_logits)
            if needs_gradient:
                d_states.append(logits @ rows)
                d_rows += logits.t() @ block_states
        if needs_gradient:
            ctx.save_for_backward(torch.cat(d_states), d_rows[:vocabulary].to(weight.dtype))
            ctx.d_bias = None if bias is None else d_bias[:vocabulary].to(bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total):
        d_states, d_weight = ctx.saved_tensors
        d_bias = None if ctx.d_bias is None else ctx.d_bias * d_total
        return d_states * d_total.to(d_states.dtype), d_weight * d_total.to(d_weight.dtype), d_bias, None


def linear_cross_entropy(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, words: torch.Tensor
) -> torch.Tensor:
    """
    Compute the cross-entropy of `states @ weight.T + bias`, summed over tokens.

    Under autocast products are in its dtype, as in `nn.Linear`; the softmax is in at least float32. The gradient is
    computed in the forward pass; second derivatives are not available.

    Args:
        states: (n, e).
        weight: (V, e).
        bias: (V,) or None.
        words: (n,), each from 0 to V - 1, or negative where a row counts for nothing.

    Returns:
        Scalar, 0 for n = 0.
    """
    device = states.device.type
    if torch.is_autocast_enabled(device):
        states = states.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return LinearCrossEntropy.apply(states, weight, bias, words)
