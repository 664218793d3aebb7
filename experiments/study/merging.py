# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fine-tune a Mixture of LoRAs, merge it in every way, and measure each merged model on the task."""

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from modernalbert.data.sentences import load_task_file
from modernalbert.experiments.study.context import Context, Outcome
from modernalbert.experiments.study.finetuning import (
    ROWS_AT_A_TIME,
    TaskRows,
    encode,
    evaluate,
    fine_tune,
    load_classifier,
    rows,
    starting_model,
)
from modernalbert.experiments.study.plan import Job
from modernalbert.merge_experts import merge_experts


__all__ = ["measure", "rows"]

# By name, the arguments of `merge_experts`. All get the same calibration text.
MERGES = {
    "uniform": {"weights": "uniform"},
    "ema": {"weights": "ema"},
    "svd": {"weights": "ema", "method": "svd"},
    "calibrated": {"method": "calibrated"},
    "recovered": {"weights": "ema", "recover_steps": 100},
}
# Fine-tuned with one merged expert in the forward pass: their linear merge is exact.
TRAINED = {"trained ema": "ema", "trained uniform": "uniform"}
CALIBRATION_ROWS = 512


def measure(job: Job, context: Context) -> list[Outcome]:
    """One line for the routed model, for each merge of it, and for each model trained merged."""
    task = TaskRows.of(job.task, context)
    start, data = starting_model(job, context), task.validation()
    folder, command = fine_tune(job, context, task, start, "routed")
    model, tokenizer = load_classifier(folder)
    outcomes = [Outcome(*_measured(model, tokenizer, task, data, command), method="routed")]
    text = calibration_batches(tokenizer, load_task_file(str(task.train_file), task.task))
    for name, arguments in MERGES.items():
        merged = merge_experts(model, calibration=text, **arguments).model
        call = f"merge_experts(model, {', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        outcomes.append(Outcome(*_measured(merged, tokenizer, task, data, call), method=name))
    for name, mixing in TRAINED.items():
        folder, command = fine_tune(job, context, task, start, f"trained-{mixing}", expert_mixing=mixing)
        outcomes.append(Outcome(*_measured(*load_classifier(folder), task, data, command), method=name))
    return outcomes


def _measured(model, tokenizer, task: TaskRows, data: Dataset, command: str) -> tuple:
    measures, arrays = evaluate(model, tokenizer, task.task, data)
    return measures, command, arrays


def calibration_batches(tokenizer: PreTrainedTokenizerBase, data: Dataset) -> list[dict]:
    """The first training rows, in padded batches."""
    numbers = list(range(min(CALIBRATION_ROWS, len(data))))
    size = ROWS_AT_A_TIME // 2
    return [encode(tokenizer, data, numbers[first : first + size]) for first in range(0, len(numbers), size)]
