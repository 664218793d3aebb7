# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""`--merge_after`: the experts of a fine-tuned model merged, and both models measured."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from modernalbert.cli.errors import UserError
from modernalbert.merge_experts import merge_experts, parse_weights
from modernalbert.merging.report import MergeReport


# Rows on which a merge measures its errors, and rows that `calibrated` is fitted to; the metrics are measured on all.
MEASURED_ROWS, FITTED_ROWS = 256, 512
MERGE_AFTER = ("ema", "uniform", "calibrated")
# Largest batch, in tokens, to measure latency on: many forwards of long windows would take minutes.
LATENCY_TOKENS = 4096


def check_merge(
    weights: str | None, model: PreTrainedModel, has_validation: bool, has_training: bool = True
) -> str | list[float] | None:
    """Check the value of --merge_after before anything long starts, and return it."""
    if weights is None:
        return None
    parsed = parse_weights(weights, flag="--merge_after", names=MERGE_AFTER)
    if getattr(model.config, "ffn_modulation", None) != "mol":
        raise UserError("--merge_after needs a ModernALBERT with ffn_modulation='mol'.")
    if not isinstance(parsed, str) and len(parsed) != model.config.num_experts:
        raise UserError(f"--merge_after {weights} is not allowed: it must be {model.config.num_experts} numbers.")
    if not has_validation:
        raise UserError("--merge_after needs --validation_file, to measure what the merge changes.")
    if parsed == "calibrated" and not has_training:
        raise UserError("--merge_after calibrated needs training rows to fit to, and this run does not train.")
    return parsed


def merge_and_report(
    model: PreTrainedModel,
    weights: str | list[float],
    measure_on: Sequence[dict],
    metrics_of: Callable[[PreTrainedModel], dict[str, float]],
    measured_on: str,
    routed_metrics: dict[str, float],
    fit_to: Sequence[dict] = (),
) -> MergeReport:
    """
    Merge a model's experts by the value of --merge_after, and measure the merged model.

    Args:
        measure_on: Batches that the errors are measured on.
        metrics_of: The merged model's metrics on the task.
        measured_on: What the batches are.
        routed_metrics: The model's own metrics, under the same names.
        fit_to: Batches that "calibrated" is fitted to; nothing else uses them.
    """
    how = {"method": "calibrated", "calibration": fit_to} if weights == "calibrated" else {"weights": weights}
    report = merge_experts(model, measure_on=measure_on, **how)
    report.measured_on = measured_on
    merged = metrics_of(report.model)
    routed = {name: routed_metrics[name] for name in merged if name in routed_metrics}
    report.metrics = {"routed": routed, "merged": merged}
    num_rows = max(1, LATENCY_TOKENS // measure_on[0]["input_ids"].shape[-1])
    report.measure_latency(model, {name: value[:num_rows] for name, value in measure_on[0].items()})
    return report
