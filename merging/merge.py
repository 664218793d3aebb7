# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""E experts of every layer become one: weights, method, recovery and errors, wherever the experts are."""

import contextlib
import logging
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from modernalbert.merging.ffn_recorder import with_progress
from modernalbert.merging.fold import Factors
from modernalbert.merging.methods import MERGE_METHODS, MergedExpert, MergeSettings, merge_factors
from modernalbert.merging.recovery import RecoveryReport, RecoverySettings, distillation_loss, recover
from modernalbert.merging.report import LayerReport, MergeReport
from modernalbert.mol_backends import Experts


logger = logging.getLogger(__name__)

WEIGHTS = ("uniform", "ema", "calibration")
# One of this many calibration batches is held out from fitting and training.
HOLD_OUT = 5
LOGITS = ("logits", "start_logits", "end_logits")
NO_TOKENS = "The calibration batches are not allowed to be without tokens: there is nothing to measure on."


def merge_methods() -> tuple[str, ...]:
    """Return the names that `method` may have."""
    return (*MERGE_METHODS, "calibrated")


class ExpertSource(ABC):
    """
    Interface to a model whose experts are merged. It runs the routed model and the merged one in evaluation mode.

    Attributes:
        model: The routed model.
        experts: Its experts, by layer name.
    """

    model: nn.Module
    experts: dict[str, Experts]

    @abstractmethod
    def moving_average(self) -> dict[str, torch.Tensor]:
        """Return the moving average (E,) of the routing in training, by layer."""

    @abstractmethod
    def measure_usage(self, batches: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Measure the mean weight (E,) of each expert on the batches, by layer."""

    @abstractmethod
    def fit(
        self, weights: dict[str, torch.Tensor], batches: Sequence[dict], rank: int | None
    ) -> dict[str, MergedExpert]:
        """Fit experts by `calibrated`."""

    @abstractmethod
    def make_trainable(self, experts: dict[str, Experts]) -> dict[str, Experts]:
        """Make a merged model with these experts (E = 1), to be trained: its own, whose factors are parameters."""

    @abstractmethod
    def finish(self, report: MergeReport, experts: dict[str, Experts]) -> None:
        """Make the merged model of these experts (E = 1)."""

    @abstractmethod
    def evaluating(self) -> AbstractContextManager[None]:
        """While open, both models are in evaluation mode."""

    @abstractmethod
    def run(self, batch: dict, merged: bool) -> Any:
        """Run one of the two models and return its output."""

    @abstractmethod
    def main_tensor(self, output: Any) -> torch.Tensor:
        """Return the part of an output by which the error of the output is measured."""

    @abstractmethod
    def token_mask(self, x: torch.Tensor, batch: dict) -> torch.Tensor | None:
        """True for the real tokens of x (rows, sequence, ...); None if there is no padding, or x is not of tokens."""

    @abstractmethod
    def factors(self, experts: dict[str, Experts]) -> Factors:
        """Return experts (E = 1) by the projections that they change."""

    def layer_errors(self) -> AbstractContextManager[dict[str, torch.Tensor]]:
        """
        While open, forwards of the routed model add |merged - routed|^2, |routed|^2 and |routed - shared FFN|^2 of each
        layer's output to the (3,) sums that it yields; none where that cannot be measured.
        """
        return contextlib.nullcontext({})

    def real_tokens(self, x: torch.Tensor, batch: dict) -> torch.Tensor:
        """Select real tokens: (rows, sequence, ...) -> (T, ...); what is not of tokens comes back as it is."""
        mask = self.token_mask(x, batch)
        return x if mask is None else x[mask.bool().view(x.shape[: mask.dim()])]

    def outputs(self, output: Any, batch: dict) -> dict[str, torch.Tensor]:
        """Return an output as `distillation_loss` takes it; of token logits, those at labels where there are labels."""
        found = {name: output[name] for name in LOGITS if name in output}
        for name, x in found.items():
            labels = batch.get("labels")
            if name != "logits":  # positions compete, and padding is none
                mask = self.token_mask(x, batch)
                found[name] = x if mask is None else x.masked_fill(~mask.bool(), torch.finfo(x.dtype).min)
            elif x.dim() == 3:
                at_labels = labels is not None and labels.shape == x.shape[:2]
                found[name] = (x[labels != -100] if at_labels else self.real_tokens(x, batch)).reshape(-1, x.shape[-1])
        return found or {"states": self.real_tokens(self.main_tensor(output), batch)}


def merge_layers(
    source: ExpertSource,
    weights: str | Sequence[float] | None,
    method: str,
    settings: MergeSettings,
    calibration: Iterable[dict] | None,
    measure_on: Iterable[dict] | None = None,
    recovery: RecoverySettings | None = None,
) -> MergeReport:
    """
    Merge E experts into one in every layer of a source, which ends with the merged ones installed.

    Returns:
        A report without models.

    Raises:
        ValueError: an argument is not allowed.
    """
    recovery = recovery or RecoverySettings()
    recovery.check()
    if method not in merge_methods():
        allowed = ", ".join(map(repr, merge_methods()))
        raise ValueError(f"method={method!r} is not allowed: it must be one of {allowed}.")
    fits = method == "calibrated"
    given = [name for name, value in (("weights", weights), ("density", settings.density)) if value is not None]
    if fits and given:
        raise ValueError(f"{given[0]} is not allowed with method='calibrated', which takes none.")
    if weights is None:
        weights = "calibration" if fits else "ema"
    measures_usage = isinstance(weights, str) and weights == "calibration"
    needs = "method='calibrated'" if fits else "recover_steps" if recovery.steps else "weights='calibration'"
    if calibration is None and (fits or recovery.steps or measures_usage):
        raise ValueError(f"{needs} is not allowed without calibration batches.")
    fit_to, measure_on, measured_on = choose_batches(source.model, calibration, measure_on, fits or recovery.steps > 0)

    layer_weights = resolve_weights(source, weights, fit_to)
    if fits:
        merged = source.fit(layer_weights, fit_to, settings.rank)
    else:
        merged = {
            name: merge_factors(method, experts, layer_weights[name], settings)
            for name, experts in source.experts.items()
        }
    (rank,) = {result.expert.A_in.shape[1] for result in merged.values()}
    report = MergeReport(
        method=method,
        weights=weights if isinstance(weights, str) else "explicit",
        rank=rank,
        layers={
            name: LayerReport(layer_weights[name].tolist(), result.energy_in, result.energy_out)
            for name, result in merged.items()
        },
        measured_on=measured_on,
    )
    total = sum(weights) if not isinstance(weights, str) else 1.0
    if abs(total - 1) > 1e-3:
        report.notes.append(
            f"The weights add up to {total:g}, not to 1: the merged expert is no average of the experts."
        )
        logger.warning(report.notes[-1])
    experts = {name: result.expert for name, result in merged.items()}
    with source.evaluating():
        if recovery.steps:
            experts = source.make_trainable(experts)
            parameters = [factor for expert in experts.values() for factor in expert[:4]]
            report.recovery = _recover(source, parameters, recovery, fit_to, measure_on)
        report.factors = {path: (A.detach(), B.detach()) for path, (A, B) in source.factors(experts).items()}
        source.finish(report, experts)
        measure_errors(report, source, measure_on)
    return report


# --- batches ---------------------------------------------------------------------------------------------------------


def choose_batches(
    model: nn.Module, calibration: Iterable[dict] | None, measure_on: Iterable[dict] | None, fits: bool
) -> tuple[list[dict], list[dict], str | None]:
    """
    Choose batches to fit to, batches to measure on, and say what the latter are.

    Without `measure_on`, what is fitted leaves every fifth calibration batch (or the last of fewer) out, to measure on.
    """
    fit_to = [] if calibration is None else check_batches(calibration, "calibration", model)
    if measure_on is not None:
        return fit_to, check_batches(measure_on, "measure_on", model), "batches of their own"
    if calibration is None:
        batch = random_batch(model)
        return [], [batch] if batch else [], "random token ids (no calibration text given)" if batch else None
    if not fits:
        return fit_to, fit_to, "the calibration text"
    if len(fit_to) == 1:
        return fit_to, fit_to, "the calibration text, to which the experts were fitted"
    held = range(HOLD_OUT - 1, len(fit_to), HOLD_OUT) or [len(fit_to) - 1]
    parts = [[batch for i, batch in enumerate(fit_to) if (i in held) == is_held] for is_held in (False, True)]
    return *parts, "the part of the calibration text that was not fitted to"


def check_batches(batches: Iterable[dict], name: str, model: nn.Module) -> list[dict]:
    """
    Check the batches and return them as a list, with their tensors on the model's device.

    Raises:
        ValueError: it is one batch, texts, or empty.
    """
    example = "[tokenizer(texts, padding=True, return_tensors='pt')]"
    if isinstance(batches, Mapping | str | torch.Tensor):
        raise ValueError(f"{name} is one {type(batches).__name__}: it must be a list of batches, as {example}.")
    batches = list(batches)
    if not batches:
        raise ValueError(f"{name}=[] is not allowed: it must hold at least one batch.")
    for i, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"{name}[{i}] is a {type(batch).__name__}: it must be a batch of model inputs (a dict of tensors), as "
                f"in {example}."
            )
        wrong = [key for key, value in batch.items() if isinstance(value, str | list | tuple)]
        if wrong:
            raise ValueError(
                f"{name}[{i}][{wrong[0]!r}] is a {type(batch[wrong[0]]).__name__}: it must be a tensor, as in "
                f"{example}."
            )
    device = next(model.parameters()).device
    return [{key: value.to(device) if hasattr(value, "to") else value for key, value in b.items()} for b in batches]


def random_batch(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Token ids drawn evenly from the vocabulary, always the same; None for a model that takes anything else."""
    config = getattr(model, "config", None)
    is_text = getattr(model, "main_input_name", None) == "input_ids" and not hasattr(config, "vision_config")
    text_config = config.get_text_config() if is_text else None
    if not hasattr(text_config, "vocab_size"):
        return None
    generator = torch.Generator().manual_seed(0)
    length = min(64, getattr(text_config, "max_position_embeddings", 64))
    shape = (8, 2, length) if "MultipleChoice" in type(model).__name__ else (8, length)
    ids = torch.randint(text_config.vocab_size, shape, generator=generator).to(model.device)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


# --- weights ---------------------------------------------------------------------------------------------------------


def resolve_weights(
    source: ExpertSource, weights: str | Sequence[float], batches: list[dict]
) -> dict[str, torch.Tensor]:
    """Resolve the (E,) float32 weights of each layer's experts."""
    (num_experts,) = {len(experts.A_in) for experts in source.experts.values()}
    if not isinstance(weights, str):
        if len(weights) != num_experts or not torch.tensor([float(w) for w in weights]).isfinite().all():
            raise ValueError(
                f"weights={list(weights)} is not allowed: it must be {num_experts} finite numbers, one per expert."
            )
        return dict.fromkeys(source.experts, torch.tensor(weights, dtype=torch.float32))
    if weights not in WEIGHTS:
        raise ValueError(
            f"weights={weights!r} is not allowed: it must be one of {', '.join(map(repr, WEIGHTS))} or {num_experts} "
            "numbers."
        )
    if num_experts == 1 or weights == "uniform":
        return dict.fromkeys(source.experts, torch.full((num_experts,), 1 / num_experts))
    return source.moving_average() if weights == "ema" else source.measure_usage(batches)


# --- recovery and errors ---------------------------------------------------------------------------------------------


def _recover(
    source: ExpertSource,
    parameters: list[nn.Parameter],
    settings: RecoverySettings,
    fit_to: list[dict],
    measure_on: list[dict],
) -> RecoveryReport:
    is_multi_label = getattr(source.model.config, "problem_type", None) == "multi_label_classification"
    kind = ""

    def loss_of(batch: dict) -> torch.Tensor:
        nonlocal kind
        with torch.no_grad():
            routed = source.outputs(source.run(batch, merged=False), batch)
        merged = source.outputs(source.run(batch, merged=True), batch)
        loss, kind = distillation_loss(routed, merged, is_multi_label)
        return loss

    @torch.no_grad()
    def mean_loss() -> float:
        return statistics.fmean(loss_of(batch).item() for batch in measure_on)

    before = mean_loss()
    learning_rate = recover(loss_of, parameters, fit_to, settings)
    return RecoveryReport(settings.steps, learning_rate, kind, before, mean_loss())


@torch.no_grad()
def measure_errors(report: MergeReport, source: ExpertSource, batches: list[dict]) -> None:
    """
    Fill in the report's errors: of each merged FFN on what its routed original is given, and of the whole model.

    Raises:
        ValueError: the batches hold no tokens.
    """
    if not batches:
        return
    squares, count, losses = torch.zeros(2, dtype=torch.float64), 0, []
    with source.layer_errors() as layer_squares:
        for batch in with_progress(batches, "Measuring the errors"):
            before, after = source.run(batch, merged=False), source.run(batch, merged=True)
            routed, merged = (source.real_tokens(source.main_tensor(out), batch).double() for out in (before, after))
            squares += torch.stack([(merged - routed).square().sum(), routed.square().sum()]).cpu()
            count += routed.numel()
            if getattr(before, "loss", None) is not None:
                losses.append((before.loss.item(), after.loss.item()))
    if not count:
        raise ValueError(NO_TOKENS)
    for name, sums in layer_squares.items():
        difference, routed, of_experts = sums.sqrt().tolist()
        report.layers[name].relative_error = difference / routed if routed else 0.0
        # Experts that add nothing (as before training) have rounding alone.
        report.layers[name].relative_error_of_experts = difference / of_experts if of_experts > 1e-6 * routed else 0.0
    difference, routed = squares.sqrt().tolist()
    report.relative_error_of_output = difference / routed if routed else 0.0
    if losses:
        report.loss_before, report.loss_after = (statistics.fmean(column) for column in zip(*losses))
