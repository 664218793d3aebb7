# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The GLUE tasks: columns, labels, names of metrics."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """
    A sentence or sentence-pair task.

    Attributes:
        name: Its name on the command line.
        text_columns: One or two columns of text.
        labels: Names in the order of the label ids; empty for regression.
        metrics: Names in `METRICS`; the first is the one the best checkpoint is chosen by.
        validation_splits: Split names of the Hub data set `nyu-mll/glue`.
        test_splits: Likewise; "test_ax" is its diagnostic set `ax`.
        label_column: Column of the label id, label name, or number.
        positive_label: The label whose F1 is the metric "f1".
    """

    name: str
    text_columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    validation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)
    label_column: str = "label"
    positive_label: str | None = None

    @property
    def is_regression(self) -> bool:
        return not self.labels


_ENTAILMENT = ("entailment", "not_entailment")
GLUE_TASKS = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation", "accuracy")),
        Task("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
        Task(
            "mrpc",
            ("sentence1", "sentence2"),
            ("not_equivalent", "equivalent"),
            ("f1", "accuracy"),
            positive_label="equivalent",
        ),
        Task("stsb", ("sentence1", "sentence2"), (), ("spearmanr", "pearson")),
        Task(
            "qqp",
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            ("f1", "accuracy"),
            positive_label="duplicate",
        ),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            ("validation_matched", "validation_mismatched"),
            ("test_matched", "test_mismatched", "test_ax"),
        ),
        Task("qnli", ("question", "sentence"), _ENTAILMENT, ("accuracy",)),
        Task("rte", ("sentence1", "sentence2"), _ENTAILMENT, ("accuracy",)),
        Task("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
    )
}
