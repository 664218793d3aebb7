# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
import pytest
import torch

from modernalbert.training.linear_cross_entropy import PRODUCT_TOKENS, linear_cross_entropy


def make_inputs(num_tokens: int, dtype: torch.dtype = torch.float64, with_bias: bool = True, vocabulary: int = 101):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    words = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    return draw(num_tokens, 12), draw(vocabulary, 12), draw(vocabulary) if with_bias else None, words


def loss_and_gradients(function, *inputs):
    leaves = [tensor for tensor in inputs[:3] if tensor is not None]
    loss = function(*inputs)
    return [loss.detach(), *torch.autograd.grad(0.3 * loss, leaves)]


def full_cross_entropy(states, weight, bias, words):
    logits = torch.nn.functional.linear(states, weight, bias)
    return torch.nn.functional.cross_entropy(logits, words, reduction="sum")


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 200, PRODUCT_TOKENS + 130])
def test_equals_cross_entropy_of_all_logits(num_tokens, with_bias):
    inputs = make_inputs(num_tokens, with_bias=with_bias)
    for ours, full in zip(
        loss_and_gradients(linear_cross_entropy, *inputs), loss_and_gradients(full_cross_entropy, *inputs)
    ):
        torch.testing.assert_close(ours, full, rtol=1e-10, atol=1e-10)


def test_rows_with_a_negative_word_count_for_nothing():
    states, weight, bias, words = make_inputs(200)
    some = torch.arange(200) % 3 > 0
    ours = loss_and_gradients(linear_cross_entropy, states, weight, bias, words.masked_fill(~some, -100))
    full = loss_and_gradients(
        lambda x, w, b, y: full_cross_entropy(x[some], w, b, y[some]), states, weight, bias, words
    )
    for one, other in zip(ours, full, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_no_tokens_give_no_loss_and_no_gradient():
    loss, *gradients = loss_and_gradients(linear_cross_entropy, *make_inputs(0))
    assert loss == 0
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


def test_without_gradients_it_is_the_same_loss():
    inputs = make_inputs(50)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(*inputs), full_cross_entropy(*inputs))


def test_under_autocast_the_loss_is_float32_of_half_precision_logits():
    inputs = make_inputs(300, torch.float32, vocabulary=1000)
    exact = loss_and_gradients(full_cross_entropy, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = loss_and_gradients(linear_cross_entropy, *inputs)
    assert all(tensor.dtype == torch.float32 for tensor in ours)
    for got, wanted in zip(ours, exact):
        assert (got - wanted).norm() < 0.02 * wanted.norm()
