# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fine-tune pretrained variants on a task, and keep what they predict row by row."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modernalbert.cli.errors import UserError
from modernalbert.data.glue_tasks import GLUE_TASKS, Task
from modernalbert.data.sentences import load_task_file
from modernalbert.evaluation.glue import compute_metrics, predictions_from_logits
from modernalbert.experiments.study.context import Context, Outcome
from modernalbert.experiments.study.plan import Experiment, Job
from modernalbert.experiments.study.results import REPOSITORY, file_fingerprint


ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class TaskRows:
    """A task of the study: files in a folder of --data_dir, read as a task of GLUE."""

    task: Task
    train_file: Path
    validation_file: Path

    @classmethod
    def of(cls, name: str, context: Context) -> "TaskRows":
        """SICK has the labels of MNLI; every other task is one of GLUE."""
        folder = context.need("data_dir") / name
        files = folder / "train.jsonl", folder / "validation.jsonl"
        for file in files:
            if not file.is_file():
                raise UserError(f"--data_dir {context.data_dir}: {file} is missing.")
        return cls(GLUE_TASKS["mnli" if name == "sick_nli" else name], *files)

    def validation(self) -> Dataset:
        return load_task_file(str(self.validation_file), self.task)


def rows(experiment: Experiment, context: Context) -> str:
    """Return a fingerprint of what is trained and measured on."""
    tasks = [TaskRows.of(name, context) for name in experiment.tasks]
    return " ".join(file_fingerprint(file) for task in tasks for file in (task.train_file, task.validation_file))


def measure(job: Job, context: Context) -> list[Outcome]:
    """Fine-tune, or go on, and measure."""
    task = TaskRows.of(job.task, context)
    start = starting_model(job, context)
    folder, command = fine_tune(job, context, task, start, "model")
    model, tokenizer = load_classifier(folder)
    measures, arrays = evaluate(model, tokenizer, task.task, task.validation())
    return [Outcome(measures, command, arrays)]


def starting_model(job: Job, context: Context) -> Path:
    """
    The checkpoint that a variant starts from: `model` is a path of this repository, `from` a run of another experiment,
    as "a_main/mol", of the same seed unless it names one ("a_main/mol-0").

    Raises:
        UserError: that run is not finished.
    """
    if "model" in job.changes:
        return REPOSITORY / job.changes["model"]
    experiment, run = job.changes["from"].split("/")
    folder = context.folder(experiment, run if run[-1].isdigit() else f"{run}-{job.seed}") / "model"
    if not (folder / "all_results.json").is_file():
        raise UserError(f"{job.experiment.name}: {job.changes['from']} is not trained yet: run {experiment} first.")
    return folder


def fine_tune(job: Job, context: Context, task: TaskRows, start: Path, name: str, **options) -> tuple[Path, str]:
    """Run run_glue.py into a folder of the job; returns that folder and the command, "" where it is finished."""
    folder = context.folder(job.experiment.name, job.name) / name
    options = {
        "model_name_or_path": start,
        "task_name": task.task.name,
        "train_file": task.train_file,
        "validation_file": task.validation_file,
        "output_dir": folder,
        "seed": job.seed,
        # The last epoch counts: validation rows choose nothing.
        "eval_strategy": "no",
        "save_total_limit": 1,
        **job.experiment.settings["arguments"],
        **options,
    }
    if (folder / "all_results.json").is_file():
        return folder, ""
    return folder, context.run("run_glue.py", options, folder.parent / f"{name}.txt")


def load_classifier(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerBase, data: Dataset, numbers: list[int]) -> dict[str, torch.Tensor]:
    """Rows of `load_task_file` as one padded batch, without labels."""
    chosen = data[numbers]
    return dict(
        tokenizer(
            chosen["text"], chosen.get("text_pair"), truncation=True, max_length=512, padding=True, return_tensors="pt"
        )
    )


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, data: Dataset
) -> tuple[dict, dict[str, np.ndarray]]:
    """
    The task's metrics, and `prediction` and `label` (N,) of every row.

    The model's labels must be in the task's order, as run_glue.py trains them.
    """
    order = sorted(range(len(data)), key=lambda i: len(data[i]["text"]) + len(data[i].get("text_pair", "")))
    predictions = np.zeros(len(data))
    for first in range(0, len(order), ROWS_AT_A_TIME):
        numbers = order[first : first + ROWS_AT_A_TIME]
        logits = model(**encode(tokenizer, data, numbers)).logits.float().numpy()
        predictions[numbers] = predictions_from_logits(task, logits)
    labels = np.asarray(data["label"], dtype=np.float64)
    dtype = np.float32 if task.is_regression else np.int8
    metrics = compute_metrics(task, predictions if task.is_regression else predictions.astype(int), labels)
    measures = {"score": metrics[task.metrics[0]], "metric": task.metrics[0], "metrics": metrics}
    return measures, {"prediction": predictions.astype(dtype), "label": labels.astype(dtype)}
