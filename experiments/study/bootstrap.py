# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Bootstrap intervals of differences between models that were measured on the same texts or rows."""

from typing import NamedTuple

import numpy as np


NUM_REPLICATES = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Return whether 0 is outside the interval."""
        return self.low > 0 or self.high < 0


def interval(value: float, replicates: np.ndarray) -> Interval:
    """The percentile interval of bootstrap replicates (B,)."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(replicates, [tail, 100 - tail])
    return Interval(float(value), float(low), float(high))


class Resampler:
    """
    Draws rows, the same for all models, and seeds.

    Args:
        num_rows: N.
        seed: Of the draws: the same report comes out each time.
        num_replicates: B.
    """

    def __init__(self, num_rows: int, seed: int = 0, num_replicates: int = NUM_REPLICATES):
        self.generator = np.random.default_rng(seed)
        weights = self.generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=num_replicates)
        self.weights = weights.astype(np.float64)  # products of integers are slow

    def seed_means(self, values: np.ndarray, seeds: np.ndarray | None = None) -> np.ndarray:
        """
        Means over resampled seeds.

        Args:
            values: (B, S), a measure of each replicate and seed.
            seeds: (B, S) from `draw_seeds`, for models that share seeds; None draws anew.
        """
        seeds = self.draw_seeds(values.shape[1]) if seeds is None else seeds
        return np.take_along_axis(values, seeds, axis=1).mean(axis=1)

    def draw_seeds(self, num_seeds: int) -> np.ndarray:
        """(B, S) indices of seeds."""
        return self.generator.integers(0, num_seeds, size=(len(self.weights), num_seeds))

    def loss_means(self, losses: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Summed losses of texts (S, N) and numbers of words (N,) -> mean losses of a word (B, S)."""
        return (self.weights @ losses.T) / (self.weights @ counts)[:, None]


def score(metric: str, prediction: np.ndarray, label: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """
    A metric of weighted rows.

    Args:
        metric: accuracy, f1, matthews_correlation or spearmanr.
        prediction, label: (N,).
        weights: (B, N).

    Returns:
        (B,).
    """
    if metric == "accuracy":
        return weights @ (prediction == label).astype(float) / weights.sum(1)
    if metric == "spearmanr":
        x, y, total = mid_ranks(prediction, weights), mid_ranks(label, weights), weights.sum(1, keepdims=True)
        x, y = (ranks - (weights * ranks).sum(1, keepdims=True) / total for ranks in (x, y))
        variances = (weights * x * x).sum(1) * (weights * y * y).sum(1)
        return (weights * x * y).sum(1) / np.sqrt(np.maximum(variances, 1e-12))
    cells = {(p, y): weights @ ((prediction == p) & (label == y)).astype(float) for p in (0, 1) for y in (0, 1)}
    true_positive, false_positive, false_negative = cells[1, 1], cells[1, 0], cells[0, 1]
    if metric == "f1":
        return 2 * true_positive / np.maximum(2 * true_positive + false_positive + false_negative, 1)
    if metric == "matthews_correlation":
        true_negative = cells[0, 0]
        product = (true_positive + false_positive) * (true_positive + false_negative)
        product = product * (true_negative + false_positive) * (true_negative + false_negative)
        return (true_positive * true_negative - false_positive * false_negative) / np.sqrt(np.maximum(product, 1))
    raise ValueError(f"metric={metric!r} is not allowed: it must be accuracy, f1, matthews_correlation or spearmanr.")


def mid_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ranks (B, N) of values (N,) where row i stands there weights[b, i] times; equal values share their mean rank."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=np.nan) != 0)
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks = counts.cumsum(1) - (counts - 1) / 2
    group = np.zeros(len(values), dtype=np.int64)
    group[order] = np.searchsorted(starts, np.arange(len(values)), side="right") - 1
    return ranks[:, group]
