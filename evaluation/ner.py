# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Span metrics of entities, through seqeval."""

import warnings
from collections.abc import Sequence

from modernalbert.data.entity_tags import import_seqeval, spans_of


METRICS = ("f1", "precision", "recall", "accuracy")


def span_metrics(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """
    Compute precision, recall and F1 over entities, all together and by type, and the accuracy over words.

    An entity is right if its type, first and last word are. Entities are read as in `spans_of`, so the figures are
    those of CoNLL's evaluation. A share of nothing is 0.

    Args:
        gold: Tags by sentence and word.
        predicted: Likewise.

    Returns:
        "f1", "precision", "recall", "accuracy", and for each type T of gold or prediction "T_f1", "T_precision",
        "T_recall" and "T_entities", their number in gold.
    """
    gold, predicted = [list(tags) for tags in gold], [list(tags) for tags in predicted]
    score = import_seqeval().precision_recall_fscore_support
    types = sorted({kind for tags in (*gold, *predicted) for kind, _, _ in spans_of(tags)})
    words = [one == other for a, b in zip(gold, predicted) for one, other in zip(a, b)]
    metrics = dict.fromkeys(METRICS, 0.0) | {"accuracy": sum(words) / max(1, len(words))}
    if not types:
        return metrics
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shares of nothing: said above
        precision, recall, f1, _ = score(gold, predicted, average="micro", zero_division=0)
        metrics |= {"f1": float(f1), "precision": float(precision), "recall": float(recall)}
        for kind, *values in zip(types, *score(gold, predicted, average=None, zero_division=0)):
            for name, value in zip(("precision", "recall", "f1", "entities"), values):
                metrics[f"{kind}_{name}"] = int(value) if name == "entities" else float(value)
    return metrics
