# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Fine-tune and evaluate an encoder on a GLUE task, or on any csv, tsv, json, jsonl or parquet files of sentences.

    python run_glue.py --demo
    python run_glue.py --model_name_or_path M --task_name sst2 --output_dir O
    python run_glue.py --model_name_or_path M --task_name sst2 --train_file T --validation_file V --output_dir O
    python run_glue.py --model_name_or_path M --task_name all --init_from_mnli --seeds 0 1 2 --output_dir O
    python run_glue.py arguments.json

Takes all of transformers' TrainingArguments. Writes the model, `all_results.json` and the predictions to the output
folder; run again after an interruption, it continues from the last checkpoint. With `--task_name all` or `--seeds`,
each task and seed has a folder of its own in the output folder, beside one table of them all (`results.md`,
`results.json`, `results.png`) and the files for GLUE's server (`submission/`).

A GLUE task brings ModernBERT's fine-tuning settings (`finetuning/glue_recipes.py`); options given here win.
"""

import json
import logging
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset
from scipy.special import softmax
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import modernalbert  # noqa: F401  registers the classes with transformers
from modernalbert.cli.arguments import option, run_script
from modernalbert.cli.errors import UserError
from modernalbert.data.glue_tasks import GLUE_TASKS, Task
from modernalbert.data.hub_sets import load_hub_set
from modernalbert.data.sentences import files_of_task, infer_task, load_task_file, relabel
from modernalbert.evaluation.glue import compute_metrics, predictions_from_logits
from modernalbert.finetuning.arguments import ModelArguments, TaskDataArguments, TaskTrainingArguments
from modernalbert.finetuning.checkpoint import load_task_model, match_labels, read_checkpoint
from modernalbert.finetuning.glue_recipes import FROM_MNLI, apply_recipe
from modernalbert.finetuning.glue_submission import write_submission
from modernalbert.finetuning.glue_suite import ALL_TASKS, run_suite
from modernalbert.finetuning.merge_after import check_merge
from modernalbert.finetuning.task_run import RunResults, begin_run, check_run, check_splits, choose_best_by, first_rows
from modernalbert.training.length_grouped_trainer import LengthGroupedTrainer


logger = logging.getLogger("run_glue")


# --- arguments -------------------------------------------------------------------------------------------------------


@dataclass
class DataArguments(TaskDataArguments):
    """Arguments: the task and its rows."""

    task_name: str | None = option(
        None, help=f"One of {', '.join(GLUE_TASKS)}, or {ALL_TASKS} of them, one after another."
    )
    data_dir: str | None = option(
        None, help="A folder with TASK/train.jsonl, TASK/validation.jsonl, TASK/test.jsonl, read instead of the Hub."
    )
    seeds: list[int] | None = option(
        None, help="Run once with each of these seeds, and write their mean and deviation."
    )
    init_from_mnli: str | None = option(
        None,
        help=f"Start {', '.join(FROM_MNLI)} from this checkpoint, fine-tuned on MNLI; with {ALL_TASKS} and no "
        "checkpoint given, from the one of the same seed.",
        nargs="?",
        const="",
    )
    text_columns: str | None = option(
        None, help="The column of text, or two columns as premise,hypothesis, where no --task_name is given."
    )
    label_column: str = option("label", help="The column of the label, where no --task_name is given.")
    demo: bool = option(
        False, help="Fine-tune the shipped checkpoint on film reviews, merge it, evaluate both and plot."
    )


@dataclass
class GlueTrainingArguments(TaskTrainingArguments):
    """Training arguments whose defaults depend on the task: `None` until it is known."""

    learning_rate: float | None = option(None, help="Peak learning rate. Default: the task's, else 5e-5.")
    weight_decay: float | None = option(None, help="Weight decay. Default: the task's, else 0.")
    num_train_epochs: float | None = option(
        None, help="Number of passes over the training rows. Default: the task's, else 3."
    )
    per_device_train_batch_size: int | None = option(
        None,
        help="Training batch size of each device. Default: 64 rows a step over all devices for a GLUE task, else 32 on "
        "each.",
    )


# --- data ------------------------------------------------------------------------------------------------------------


def task_files(arguments: DataArguments) -> dict[str, str]:
    """Return the files by split; none if the Hub is meant."""
    files = arguments.files()
    if arguments.data_dir is None:
        return files
    if files or arguments.task_name is None:
        raise UserError("--data_dir goes with --task_name, and without --train_file, --validation_file, --test_file.")
    return files_of_task(Path(arguments.data_dir), GLUE_TASKS[arguments.task_name])


def load_data(arguments: DataArguments) -> tuple[Task, dict[str, Dataset]]:
    """Load the task, and its data sets by split: "train", "validation" (or "validation_matched", ...), "test"."""
    name = arguments.task_name
    if name is not None and name not in GLUE_TASKS:
        raise UserError(f"--task_name {name} is not allowed: it must be one of {', '.join(GLUE_TASKS)}, {ALL_TASKS}.")
    files = task_files(arguments)
    if files:
        if name is None:
            source = files.get("train") or files.get("validation")
            if source is None:
                raise UserError("--test_file alone does not say what the task is: give --task_name or --train_file.")
            task = infer_task(source, arguments.label_column, arguments.text_columns)
            labels = "numbers to predict" if task.is_regression else f"labels {', '.join(task.labels)}"
            logger.warning(f"{source}: text in {' and '.join(task.text_columns)}, {labels}.")
        else:
            task = GLUE_TASKS[name]
        return task, {split: load_task_file(file, task, not split.startswith("test")) for split, file in files.items()}
    if name is None:
        raise UserError("there is no data: give --task_name, or --train_file and --validation_file, or --demo.")
    task = GLUE_TASKS[name]
    hub_options = {"asked_by": f"--task_name {name}", "instead": "--train_file and --validation_file, or --data_dir"}
    hub = load_hub_set("nyu-mll/glue", name, **hub_options)
    splits = {}
    for split in ("train", *task.validation_splits, *task.test_splits):
        data = load_hub_set("nyu-mll/glue", "ax", **hub_options)["test"] if split == "test_ax" else hub[split]
        data = data.rename_columns(dict(zip(task.text_columns, ("text", "text_pair"))))
        splits[split] = data.remove_columns(["idx"] + (["label"] if split in task.test_splits else []))
    return task, splits


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokenize the columns "text" and "text_pair", cut but not padded; "label" stays."""

    def encode(rows: dict) -> dict:
        return tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length)

    keep = {"label"}
    return data.map(encode, batched=True, remove_columns=[c for c in data.column_names if c not in keep], desc="Tokens")


# --- model -----------------------------------------------------------------------------------------------------------


def load_classifier(
    arguments: ModelArguments, task: Task, training: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Task]:
    """
    Load a sequence classifier for the task, its tokenizer, and the task with its labels in the classifier's order.
    """
    labels, keeps_head = match_labels(read_checkpoint(arguments), task.labels, "SequenceClassification", training)
    task = replace(task, labels=labels)
    problem = "regression" if task.is_regression else "single_label_classification"
    model, tokenizer = load_task_model(
        arguments, AutoModelForSequenceClassification, labels, keeps_head, problem_type=problem
    )
    return model, tokenizer, task


def start_from_mnli(model_arguments: ModelArguments, data_arguments: DataArguments) -> ModelArguments:
    """Return the model arguments with the checkpoint of --init_from_mnli, if there is one, as the model."""
    checkpoint = data_arguments.init_from_mnli
    if checkpoint is None:
        return model_arguments
    if data_arguments.task_name not in FROM_MNLI:
        raise UserError(f"--init_from_mnli is for {', '.join(FROM_MNLI)}, and with --task_name {ALL_TASKS}.")
    if not checkpoint:
        raise UserError(f"--init_from_mnli needs a checkpoint, unless --task_name is {ALL_TASKS}.")
    return replace(model_arguments, model_name_or_path=checkpoint)


# --- the run ---------------------------------------------------------------------------------------------------------


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    training_arguments: TrainingArguments,
    train: Dataset | None = None,
    validation: Dataset | None = None,
) -> Trainer:
    """Make a Trainer that pads each batch to its longest row and reports the task's metrics."""

    def metrics(output) -> dict[str, float]:
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        return compute_metrics(task, predictions_from_logits(task, logits), output.label_ids)

    return LengthGroupedTrainer(
        model=model,
        args=training_arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        compute_metrics=metrics,
    )


def evaluate(trainer: Trainer, task: Task, data: Dataset, prefix: str, file: Path) -> dict[str, float]:
    """
    Evaluate in one pass over the rows: metrics (empty without labels), and a file of predictions.

    A line of the file is a row's index, its predicted label (or number), and each label's probability. The predictions
    of a GLUE test set are written once more for its server, in `submission/` beside the file.
    """
    output = trainer.predict(data, metric_key_prefix=prefix)
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    predictions = predictions_from_logits(task, logits).tolist()
    if not task.is_regression:
        predictions = [task.labels[label] for label in predictions]
    if trainer.is_world_process_zero():
        with file.open("w", encoding="utf-8") as handle:
            for i, prediction in enumerate(predictions):
                row = {"index": i, "prediction": prediction}
                if not task.is_regression:
                    row["probabilities"] = dict(zip(task.labels, softmax(logits[i]).round(6).tolist()))
                handle.write(json.dumps(row) + "\n")
        write_submission(task.name, prefix, predictions, file.parent / "submission")
    return output.metrics | {f"{prefix}_samples": len(data)}


def run(
    model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments: TrainingArguments
) -> dict[str, float]:
    """
    Fine-tune, evaluate, predict, and on request merge and evaluate again.

    Returns:
        What `all_results.json` holds.
    """
    check_run(data_arguments, training_arguments)
    apply_recipe(training_arguments, data_arguments.task_name)
    asked, model_arguments = model_arguments, start_from_mnli(model_arguments, data_arguments)
    task, data = load_data(data_arguments)
    validation_splits = check_splits(training_arguments, list(data))
    choose_best_by(training_arguments, task.metrics)
    set_seed(training_arguments.seed)
    model, tokenizer, task_of_model = load_classifier(model_arguments, task, training_arguments.do_train)
    merge_weights = check_merge(
        model_arguments.merge_after, model, bool(validation_splits), training_arguments.do_train
    )
    checkpoint = begin_run(asked, data_arguments, training_arguments)

    max_length = min(data_arguments.max_seq_length, tokenizer.model_max_length)
    for split, rows in data.items():
        rows = relabel(first_rows(rows, split, data_arguments), task, task_of_model)
        data[split] = tokenize(rows, tokenizer, max_length)
    task = task_of_model
    validation = data[validation_splits[0]] if validation_splits else None
    trainer = make_trainer(model, tokenizer, task, training_arguments, data.get("train"), validation)

    results = RunResults(trainer)
    folder = Path(training_arguments.output_dir)
    if training_arguments.do_train:
        results.train(checkpoint)
    evaluated = validation_splits if training_arguments.do_eval else []
    predicted = [split for split in data if split.startswith("test")] if training_arguments.do_predict else []
    for split in (*evaluated, *predicted):
        prefix = split.replace("validation", "eval")
        results.keep(prefix, evaluate(trainer, task, data[split], prefix, folder / f"predictions_{split}.jsonl"))
    if merge_weights is not None:

        def measure(merged: PreTrainedModel) -> dict[str, float]:
            evaluator = make_trainer(merged, tokenizer, task, training_arguments, validation=validation)
            metrics = {}
            for split in validation_splits:
                prefix = split.replace("validation", "eval")
                values = evaluator.evaluate(data[split], metric_key_prefix=prefix)
                metrics |= {f"{prefix}_{name}": values[f"{prefix}_{name}"] for name in task.metrics}
            return metrics

        results.merge_and_evaluate(merge_weights, validation, measure)
    return results.write()


# --- command line ----------------------------------------------------------------------------------------------------


def run_demo_or_suite(
    model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments: TrainingArguments
) -> None:
    """Run the demo, a suite of tasks and seeds, or one task, whichever the arguments ask for."""
    arguments = model_arguments, data_arguments, training_arguments
    if data_arguments.demo:
        from modernalbert.finetuning.demo import run_demo

        run_demo(run, make_trainer, tokenize, *arguments)
    elif data_arguments.task_name == ALL_TASKS or data_arguments.seeds is not None:
        run_suite(run, *arguments, shlex.join(["run_glue.py", *sys.argv[1:]]))
    else:
        run(*arguments)


def command() -> None:
    """Entry point of `modernalbert-glue`."""
    run_script(run_demo_or_suite, ModelArguments, DataArguments, GlueTrainingArguments, description=__doc__)


if __name__ == "__main__":
    command()
