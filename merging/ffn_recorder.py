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
"""What the mixtures of a model are given and give while a text runs through it, token by token."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modernalbert.modeling_mol import MoLFeedForward, route
from modernalbert.mol_backends import expert_mask


@contextmanager
def mixture_calls(model: PreTrainedModel, visit: Callable) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """
    While open, the model is in evaluation mode, and each use of a mixture in a forward calls
    `visit(group, mlp, position, x, output)` with x and output (T, d), the real tokens alone.

    Yields:
        What takes the real tokens of the last forward from any (rows, sequence, ...) -> (T, ...).
    """
    real: torch.Tensor | None = None

    def remember_padding(module, args, kwargs):
        nonlocal real
        mask = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        real = mask.bool() if getattr(mask, "ndim", 0) == 2 else None

    def tokens(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1) if real is None else x[real.to(x.device)]

    def call(group: int) -> Callable:
        def hook(mlp, args, output):
            if mlp.is_modulated[args[1]]:
                visit(group, mlp, args[1], tokens(args[0]), tokens(output[0]))

        return hook

    encoder, was_training = model.base_model, model.training
    handles = [encoder.register_forward_pre_hook(remember_padding, with_kwargs=True)]
    handles += [encoder.groups[k].mlp.register_forward_hook(call(k)) for k in model.config.modulated_groups]
    model.eval()
    try:
        yield tokens
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def with_progress(batches: Sequence[dict], title: str) -> Iterable[dict]:
    """The batches, with a bar on a terminal."""
    return tqdm(batches, desc=title, unit=" batches", leave=False, disable=None)


def gates_of(mlp: MoLFeedForward, position: int, x: torch.Tensor) -> torch.Tensor:
    """The weight of every expert for every token, (T, d) -> (T, E); 0 for those not chosen."""
    weights = mlp.get_expert_weights()
    if weights is not None:
        return weights.expand(len(x), -1)
    _, q, experts = route(mlp.mol_router(x, position), mlp.num_experts_per_tok)
    return (expert_mask(experts, mlp.num_experts).to(q.dtype) * q.unsqueeze(-1)).sum(dim=-2)


@torch.no_grad()
def measure_usage(model: PreTrainedModel, batches: Sequence[dict]) -> dict[int, torch.Tensor]:
    """
    Mean mixing weight per expert (E,) float32 and group, over all uses of the group; all real tokens count alike.

    Raises:
        ValueError: the batches hold no tokens.
    """
    sums = dict.fromkeys(model.config.modulated_groups, 0.0)
    counts = dict.fromkeys(sums, 0)

    def visit(group, mlp, position, x, output):
        sums[group] = sums[group] + gates_of(mlp, position, x).double().sum(dim=0).cpu()
        counts[group] += len(x)

    with mixture_calls(model, visit):
        for batch in with_progress(batches, "Measuring the routing"):
            model(**batch)
    if not all(counts.values()):
        raise ValueError("calibration is not allowed to be without tokens: there is nothing to measure on.")
    return {k: (sums[k] / counts[k]).float() for k in sums}
