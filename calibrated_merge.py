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
The merged expert that least squares finds: what best reproduces a routed FFN on given text, in closed form.

Averaging deltas (`merge_methods.py`) asks no question about the tokens. This method (our own) does, projection by
projection, starting from the average D = sum_e w_e Delta_e:

1. Delta_in is the ridge regression of the pre-activations that routing mixes, sum_e q_e(x) Delta_in,e x, on x;
2. Delta_out that of what the routed FFN puts out, less P_out u, on the u that the merged Delta_in now gives.

Both are shrunk towards D, so that little text, and tokens whose routing does not depend on them, leave D as it is; both
are cut to a rank in the metric of their inputs, which is the best that rank can do for the same sum of squares.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from modernalbert.merge_methods import MergedExpert, default_rank, split_evenly
from modernalbert.modeling_mol import Experts, MoLFeedForward, concatenate_experts, expert_mask, route


# Of the mean square of the inputs: the weight of staying with the average (measured: docs/merging.md).
RIDGE = 0.1


@contextmanager
def mixture_calls(model: PreTrainedModel, visit: Callable) -> Iterator[None]:
    """
    While open, each use of a mixture in a forward calls `visit(group, mlp, position, x, output)`.

    x and output are (T, d), the real tokens alone.
    """
    encoder = model.base_model
    real: torch.Tensor | None = None

    def remember_padding(module, args, kwargs):
        nonlocal real
        mask = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        real = mask.bool() if getattr(mask, "ndim", 0) == 2 else None

    def tokens(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, -2) if real is None else x[real.to(x.device)]

    def call(group: int) -> Callable:
        def hook(mlp, args, output):
            if mlp.is_modulated[args[1]]:
                visit(group, mlp, args[1], tokens(args[0]), tokens(output[0]))

        return hook

    handles = [encoder.register_forward_pre_hook(remember_padding, with_kwargs=True)]
    handles += [encoder.groups[k].mlp.register_forward_hook(call(k)) for k in model.config.modulated_groups]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class RidgeRegression:
    """
    A linear map x (T, n) -> y (T, m) from sums over tokens, so that no token is kept.

    Sums are float64; their terms are computed in the tokens' precision.
    """

    def __init__(self):
        self.gram = self.cross = 0.0  # (n, n), (m, n)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.gram = self.gram + (x.T @ x).double()
        self.cross = self.cross + (y.T @ x).double()

    def solve(self, prior: tuple[torch.Tensor, torch.Tensor], rank: int, ridge: float):
        """
        The map of rank r that minimises |(B A - B0 A0) x - y|^2 + ridge mean|x|^2 |B A - B0 A0|^2.

        Args:
            prior: (A0 (R, n), B0 (m, R)) float64; y is what is left after it.

        Returns:
            A (r, n), B (m, r), and the share of the squares that the rank keeps.
        """
        size = len(self.gram)
        # Where nothing was seen, any positive number keeps the prior.
        strength = ridge * self.gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        metric = self.gram + strength * torch.eye(size, dtype=torch.float64, device=self.gram.device)
        root = torch.linalg.cholesky(metric)
        full = prior[1] @ prior[0] + torch.cholesky_solve(self.cross.T, root).T
        A, B, energy = split_evenly(*torch.linalg.svd(full @ root, full_matrices=False), rank)
        return torch.linalg.solve_triangular(root, A, upper=False, left=False), B, energy


def gates_of(mlp: MoLFeedForward, position: int, x: torch.Tensor) -> torch.Tensor:
    """The weight of every expert for every token, (T, d) -> (T, E); 0 for those not chosen."""
    weights = mlp.mixing_weights()
    if weights is not None:
        return weights.expand(len(x), -1)
    _, q, experts = route(mlp.mol_router(x, position), mlp.num_experts_per_tok)
    return (expert_mask(experts, mlp.num_experts).to(q.dtype) * q.unsqueeze(-1)).sum(dim=-2)


@torch.no_grad()
def merge_calibrated(
    model: PreTrainedModel,
    weights: dict[int, torch.Tensor],
    batches: Iterable[dict],
    rank: int | None = None,
    ridge: float = RIDGE,
) -> dict[int, MergedExpert]:
    """
    One expert for each modulated group, fitted to what the group's routed FFN does with the text, at all its layers.

    Args:
        model: With `ffn_modulation="mol"`; it is run twice over the batches, in evaluation mode.
        weights: (E,) by group, of the average that the fit starts from.
        rank: None = E r, that of the exact average.
        ridge: Weight of staying with the average, relative to the mean square of the inputs.
    """
    config = model.config
    mixtures: dict[int, MoLFeedForward] = {k: model.base_model.groups[k].mlp for k in config.modulated_groups}
    averages = {}
    for k, mlp in mixtures.items():
        factors = Experts(*(factor.double() for factor in mlp.experts[:4]), mlp.scaling)
        averages[k] = concatenate_experts(factors, weights[k].to(mlp.mol_A_in.device).double())
    rank = default_rank(next(iter(mixtures.values())).experts, rank)
    was_training = model.training
    model.eval()

    def fit(name: str, samples: Callable) -> dict[int, tuple[torch.Tensor, torch.Tensor, float]]:
        regressions = {k: RidgeRegression() for k in mixtures}

        def visit(group, mlp, position, x, output):
            regressions[group].add(*samples(group, mlp, position, x, output))

        with mixture_calls(model, visit):
            for batch in batches:
                model(**batch)
        solved = {}
        for k, regression in regressions.items():
            prior = (getattr(averages[k], f"A_{name}")[0], getattr(averages[k], f"B_{name}")[0])
            solved[k] = regression.solve(prior, rank, ridge)
        return solved

    def low_rank(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return (x @ A.to(x).T) @ B.to(x).T

    def pre_activations(group, mlp, position, x, output):
        # What routing adds to the average: the experts' parts, weighted by q_e - w_e.
        difference = gates_of(mlp, position, x) - weights[group].to(x.device)
        blocks = (difference * mlp.scaling).to(x.dtype).repeat_interleave(mlp.mol_A_in.shape[1], dim=-1)
        states = (x @ mlp.mol_A_in.flatten(0, 1).T) * blocks
        return x, states @ mlp.mol_B_in.permute(0, 2, 1).flatten(0, 1)

    def outputs(group, mlp, position, x, output):
        A, B, _ = first[group]
        u = mlp.activate(mlp.Wi(x) + low_rank(x, A, B))
        average = averages[group]
        return u, output - mlp.Wo(u) - low_rank(u, average.A_out[0], average.B_out[0])

    try:
        first = fit("in", pre_activations)
        second = fit("out", outputs)
    finally:
        model.train(was_training)
    return {
        k: MergedExpert(
            Experts(first[k][0][None], first[k][1][None], second[k][0][None], second[k][1][None], scaling=1.0),
            first[k][2],
            second[k][2],
        )
        for k in mixtures
    }
