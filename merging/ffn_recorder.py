# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Hooks on the Mixtures of LoRAs of a ModernALBERT: their inputs and outputs, token by token."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modernalbert.modeling_mol import MoLFeedForward, route
from modernalbert.mol_backends import expert_mask


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """While open, the model is in evaluation mode; afterwards every module is in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def mixture_calls(model: PreTrainedModel, visit: Callable) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """
    While open, the model is in evaluation mode and runs uncompiled (compiled code may ignore new hooks), and each use
    of a mixture in a forward calls `visit(group, mlp, depth, x, output)` with x and output (T, d), the real tokens
    alone.

    Yields:
        A function that takes the real tokens of the last forward: (rows, sequence, ...) -> (T, ...).
    """
    real: torch.Tensor | None = None

    def remember_padding(module, args, kwargs):
        nonlocal real
        mask = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        real = mask.bool() if getattr(mask, "ndim", 0) == 2 else None

    def tokens(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1) if real is None else x[real.to(x.device)]

    def call(group: int) -> Callable:
        def hook(mlp, args, kwargs, output):
            signature = inspect.signature(mlp.forward)
            x, depth = (
                signature.bind(*args, **kwargs).arguments.get(name, 0) for name in list(signature.parameters)[:2]
            )
            if mlp.is_modulated[depth]:
                visit(group, mlp, depth, tokens(x), tokens(output[0]))

        return hook

    encoder = model.base_model
    handles = [encoder.register_forward_pre_hook(remember_padding, with_kwargs=True)]
    handles += [
        encoder.groups[k].mlp.register_forward_hook(call(k), with_kwargs=True) for k in model.config.modulated_groups
    ]
    try:
        with evaluation_mode(model), torch.compiler.set_stance("force_eager"):
            yield tokens
    finally:
        for handle in handles:
            handle.remove()


def with_progress(items: Sequence, title: str, unit: str = " batches") -> Iterable:
    """Iterate over the items, with a bar on a terminal."""
    return tqdm(items, desc=title, unit=unit, leave=False, disable=None)


def dense_routing_weights(mlp: MoLFeedForward, depth: int, x: torch.Tensor) -> torch.Tensor:
    """Return the weight of every expert for every token, (T, d) -> (T, E); 0 for those not chosen."""
    expert_weights = mlp.get_expert_weights()
    if expert_weights is not None:
        return expert_weights.expand(len(x), -1)
    _, top_k_weights, top_k_index = route(mlp.mol_router(x, depth), mlp.num_experts_per_tok)
    chosen = expert_mask(top_k_index, mlp.num_experts).to(top_k_weights.dtype)
    return (chosen * top_k_weights.unsqueeze(-1)).sum(dim=-2)
