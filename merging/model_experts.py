# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The experts of a ModernALBERT, to be merged."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from modernalbert.export.plain_model import check_unwrapped
from modernalbert.merging.calibrated import merge_calibrated
from modernalbert.merging.ffn_recorder import (
    dense_routing_weights,
    evaluation_mode,
    mixture_calls,
    with_progress,
)
from modernalbert.merging.fold import (
    Factors,
    copy_with,
    fold,
    with_one_expert,
)
from modernalbert.merging.merge import NO_TOKENS, ExpertSource
from modernalbert.merging.methods import MergedExpert
from modernalbert.merging.report import MergeReport, task_type_of
from modernalbert.mol_backends import Experts


LAST_POSITION_NOTE = (
    "With mol_positions='last' folding would change the other layers of the group: the merged expert stays as one LoRA "
    "without a router, and there is no stock adapter."
)


class ModelExperts(ExpertSource):
    """
    The experts of a ModernALBERT, which is left as it is.

    Raises:
        ValueError: it has no Mixture of LoRAs, or is not exactly what its configuration says.
    """

    def __init__(self, model: PreTrainedModel):
        modulation = getattr(model.config, "ffn_modulation", None)
        if modulation != "mol":
            raise ValueError(
                f"ffn_modulation={modulation!r} of {type(model).__name__} is not allowed: only the experts of a "
                "Mixture of LoRAs ('mol') can be merged."
            )
        check_unwrapped(model)
        self.model = model
        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        # Layer by layer's name: the group.
        self.groups = {f"{prefix}groups.{k}.mlp": k for k in model.config.modulated_groups}
        self.experts = {name: model.get_submodule(name).experts for name in self.groups}

    def moving_average(self) -> dict[str, torch.Tensor]:
        usage = {name: self.model.get_submodule(name).mol_usage.float().cpu() for name in self.groups}
        # One router for each depth has its own average: their mean.
        return {name: value if value.dim() == 1 else value.mean(dim=0) for name, value in usage.items()}

    def measure_usage(self, batches: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Measure what the model mixes with, over all uses of a group; all real tokens count alike."""
        sums, counts = dict.fromkeys(self.groups.values(), 0.0), dict.fromkeys(self.groups.values(), 0)

        def visit(group, mlp, depth, x, output):
            sums[group] = sums[group] + dense_routing_weights(mlp, depth, x).double().sum(dim=0).cpu()
            counts[group] += len(x)

        with torch.no_grad(), mixture_calls(self.model, visit):
            for batch in with_progress(batches, "Measuring the routing"):
                self.model(**batch)
        if not all(counts.values()):
            raise ValueError(NO_TOKENS)
        return {name: (sums[k] / counts[k]).float() for name, k in self.groups.items()}

    def fit(
        self, weights: dict[str, torch.Tensor], batches: Sequence[dict], rank: int | None
    ) -> dict[str, MergedExpert]:
        by_group = {k: weights[name] for name, k in self.groups.items()}
        merged = merge_calibrated(self.model, by_group, batches, rank)
        return {name: merged[k] for name, k in self.groups.items()}

    def make_trainable(self, experts: dict[str, Experts]) -> dict[str, Experts]:
        if self.model.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"recover_steps is not allowed for a model in {self.model.dtype}: load it in float32 first."
            )
        self.merged_model = self._with_one_expert(experts).requires_grad_(False)
        mine = {name: self.merged_model.get_submodule(name).experts for name in self.groups}
        for expert in mine.values():
            for factor in expert[:4]:
                factor.requires_grad_(True)
        return mine

    def finish(self, report: MergeReport, experts: dict[str, Experts]) -> None:
        if self.model.config.mol_positions == "all":
            report.base = copy_with(self.model, ffn_modulation="none")
            report.model = fold(report.base, report.factors)
        else:
            report.model = self._with_one_expert(experts)
            report.notes.append(LAST_POSITION_NOTE)
        report.task_type = task_type_of(self.model)
        if report.task_type is not None and hasattr(self.model, "classifier"):
            report.heads = {"classifier": self.model.classifier}  # peft expects it in an adapter of such a task
        report.parameters_before = self.model.num_parameters()
        report.parameters_after = report.model.num_parameters()
        self.merged_model = report.model

    def _with_one_expert(self, experts: dict[str, Experts]) -> PreTrainedModel:
        return with_one_expert(self.model, {k: experts[name] for name, k in self.groups.items()})

    def evaluating(self) -> contextlib.AbstractContextManager:
        return evaluation_mode(self.model)

    def run(self, batch: dict, merged: bool) -> Any:
        return (self.merged_model if merged else self.model)(**batch, output_hidden_states=True)

    def main_tensor(self, output: Any) -> torch.Tensor:
        return output.hidden_states[-1]

    def token_mask(self, x: torch.Tensor, batch: dict) -> torch.Tensor | None:
        mask = batch.get("attention_mask")
        # Of multiple choice (batch, choices, sequence); a 4-d mask, or one by type of layer, says nothing of padding.
        return mask.flatten(0, -2) if getattr(mask, "ndim", 0) in (2, 3) else None

    @contextlib.contextmanager
    def layer_errors(self) -> Iterator[dict[str, torch.Tensor]]:
        sums = {name: torch.zeros(3, dtype=torch.float64) for name in self.groups}
        names = {k: name for name, k in self.groups.items()}

        def compare(group, mlp, depth, x, output):
            routed = output.double()
            merged = self.merged_model.get_submodule(names[group])(x, depth)[0].double()
            shared = mlp.plain_forward(x).double()
            for i, difference in enumerate((merged - routed, routed, routed - shared)):
                sums[names[group]][i] += difference.square().sum().cpu()

        with mixture_calls(self.model, compare):
            yield sums

    def factors(self, experts: dict[str, Experts]) -> Factors:
        factors = {}
        for name, expert in experts.items():
            factors[f"{name}.Wi"] = expert.A_in[0], expert.B_in[0] * expert.scaling
            factors[f"{name}.Wo"] = expert.A_out[0], expert.B_out[0] * expert.scaling
        return factors
