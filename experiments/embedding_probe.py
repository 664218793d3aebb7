# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
A classification task from frozen embeddings: logistic regression on them, and no training of the encoder.

    python experiments/embedding_probe.py --model_name_or_path checkpoints/modernalbert-nano --task_name mrpc \\
        --train_file $DATA_DIR/mrpc/train.jsonl --validation_file $DATA_DIR/mrpc/validation.jsonl \\
        --output_dir outputs/probe

An embedding is the mean of the last states of all real tokens, up to 128. Of a single text the regression sees the
embedding u, of two |u - v| and u * v (as SentEval, Conneau & Kiela 2018); its strength is chosen by cross-validation on
the training rows. `all_results.json` in the output folder has `eval_<metric>`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.data.glue_tasks import GLUE_TASKS
from modernalbert.data.sentences import load_task_file
from modernalbert.evaluation.glue import compute_metrics
from modernalbert.experiments.embeddings import embed, load_encoder
from modernalbert.experiments.text_baselines import logistic_regression


# Of the regression: an embedding has few features, and each of them says a little.
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
CLASSIFICATION = tuple(name for name, task in GLUE_TASKS.items() if not task.is_regression)


@dataclass
class ProbeArguments:
    """Which model on which rows."""

    model_name_or_path: str = field(metadata={"help": "Any encoder; a configuration alone = random weights."})
    task_name: str = field(metadata={"help": f"One of {', '.join(CLASSIFICATION)}: columns, labels and metrics."})
    train_file: str = field(metadata={"help": "csv, tsv, json, jsonl or parquet."})
    validation_file: str = field(metadata={"help": "The same, of the rows that are judged."})
    output_dir: str | None = field(default=None, metadata={"help": "Where all_results.json goes."})


def features(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> np.ndarray:
    """(rows, d), of pairs (rows, 2 d)."""
    first = embed(model, tokenizer, rows["text"][:])
    if "text_pair" not in rows.column_names:
        return first
    second = embed(model, tokenizer, rows["text_pair"][:])
    return np.hstack([np.abs(first - second), first * second])


def main() -> None:
    (arguments,) = parse_arguments(ProbeArguments, description=__doc__)
    if arguments.task_name not in CLASSIFICATION:
        raise UserError(
            f"--task_name {arguments.task_name} is not allowed: it must be one of {', '.join(CLASSIFICATION)}."
        )
    task = GLUE_TASKS[arguments.task_name]
    train, validation = (load_task_file(file, task) for file in (arguments.train_file, arguments.validation_file))
    model, tokenizer = load_encoder(arguments.model_name_or_path)
    train_features, validation_features = (features(model, tokenizer, rows) for rows in (train, validation))
    predictions = logistic_regression(task, train_features, train["label"][:], validation_features, STRENGTHS)
    metrics = compute_metrics(task, predictions, np.array(validation["label"]))
    results = {f"eval_{name}": value for name, value in metrics.items()}
    results |= {"train_samples": len(train), "eval_samples": len(validation)}
    for name, value in metrics.items():
        print(f"{name} {value:.4f}")
    if arguments.output_dir:
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
        Path(arguments.output_dir, "all_results.json").write_text(json.dumps(results, indent=2) + "\n")


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
