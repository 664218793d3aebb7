# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Predictions of GLUE's test sets as the benchmark's server takes them."""

from collections.abc import Sequence
from pathlib import Path

from modernalbert.data.glue_tasks import GLUE_TASKS


# By task and split: the eleven files of a submission. MNLI's model also answers the diagnostic set, AX.
SUBMISSION_FILES = {
    ("cola", "test"): "CoLA.tsv",
    ("sst2", "test"): "SST-2.tsv",
    ("mrpc", "test"): "MRPC.tsv",
    ("stsb", "test"): "STS-B.tsv",
    ("qqp", "test"): "QQP.tsv",
    ("mnli", "test_matched"): "MNLI-m.tsv",
    ("mnli", "test_mismatched"): "MNLI-mm.tsv",
    ("mnli", "test_ax"): "AX.tsv",
    ("qnli", "test"): "QNLI.tsv",
    ("rte", "test"): "RTE.tsv",
    ("wnli", "test"): "WNLI.tsv",
}
# The tasks whose labels the server wants by name; the others' it wants as 0 or 1.
LABELS_BY_NAME = ("mnli", "qnli", "rte")


def write_submission(task_name: str, split: str, predictions: Sequence[str | float], folder: Path) -> Path | None:
    """
    Write the test predictions of a GLUE task: a header, then the row's number and its label or score, with tabs.

    Args:
        predictions: Label names, or for STS-B numbers, which are clipped to the scale from 0 to 5.

    Returns:
        The file, or `None` if the server knows no such set.
    """
    name = SUBMISSION_FILES.get((task_name, split))
    if name is None:
        return None
    labels = GLUE_TASKS[task_name].labels
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["index\tprediction"]
    for index, prediction in enumerate(predictions):
        if not labels:
            value = f"{min(5.0, max(0.0, prediction)):.3f}"
        else:
            value = prediction if task_name in LABELS_BY_NAME else labels.index(prediction)
        lines.append(f"{index}\t{value}")
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name
