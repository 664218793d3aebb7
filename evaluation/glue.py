# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The metrics of sentence tasks, through scikit-learn and scipy."""

import math
import warnings
from collections.abc import Callable

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from modernalbert.data.glue_tasks import Task


def _correlation(function: Callable) -> Callable:
    def correlate(predictions: np.ndarray, labels: np.ndarray) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a constant input: said below
            value = float(function(predictions, labels)[0])
        # Undefined for constant predictions; 0, as scikit-learn says of Matthews' (our decision).
        return 0.0 if math.isnan(value) else value

    return correlate


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda predictions, labels: float(accuracy_score(labels, predictions)),
    "f1": lambda predictions, labels: float(f1_score(labels, predictions, zero_division=0.0)),
    "macro_f1": lambda predictions, labels: float(f1_score(labels, predictions, average="macro", zero_division=0.0)),
    "matthews_correlation": lambda predictions, labels: float(matthews_corrcoef(labels, predictions)),
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
}


def predictions_from_logits(task: Task, logits: np.ndarray) -> np.ndarray:
    """Predict from logits: (rows, labels) -> label ids (rows,), or (rows, 1) -> numbers (rows,) for regression."""
    return logits[:, 0] if task.is_regression else logits.argmax(axis=-1)


def compute_metrics(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """
    Compute the task's metrics.

    Args:
        predictions: (rows,) label ids or numbers.
        labels: (rows,) likewise.
    """
    values = {}
    for name in task.metrics:
        ids = predictions, labels
        if name == "f1":  # a head may have its labels in any order, and more of them
            positive = task.labels.index(task.positive_label)
            ids = np.asarray(predictions) == positive, np.asarray(labels) == positive
        values[name] = METRICS[name](*ids)
    return values
