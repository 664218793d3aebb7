# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Runs of task scripts: their checks, their results, and the merge after them."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from modernalbert.cli.allocator import keep_freed_memory
from modernalbert.cli.arguments import check_processes, check_reporters
from modernalbert.cli.bfloat16 import warn_of_slow_bfloat16
from modernalbert.cli.errors import UserError
from modernalbert.cli.output_folders import set_default_mode
from modernalbert.cli.tokenizer_files import clear_truncation
from modernalbert.diagnostics import RouterCallback
from modernalbert.finetuning.arguments import BaseDataArguments, ModelArguments, TaskDataArguments
from modernalbert.finetuning.merge_after import FITTED_ROWS, MEASURED_ROWS, merge_and_report
from modernalbert.finetuning.run_folder import (
    EARLIER_RUN,
    SETTINGS_FILE,
    check_output_dir,
    check_settings,
    checkpoint_to_resume,
    diff_settings,
    is_inside,
    remove_earlier_run,
    run_inputs,
    save_settings,
)
from modernalbert.merging.report import MergeReport


logger = logging.getLogger(__name__)

OUTPUT_FILES = (*EARLIER_RUN, "predictions_*", "nbest_*", "null_odds_*", "merged", "submission")


def check_run(data_arguments: BaseDataArguments, training_arguments: TrainingArguments) -> None:
    """Refuse processes, sizes and output folders that cannot work. Changes no file."""
    check_processes(training_arguments.world_size, training_arguments.n_gpu)
    check_reporters(training_arguments.report_to)
    warn_of_slow_bfloat16(training_arguments)
    if training_arguments.device.type == "cpu":
        keep_freed_memory()
    for name in ("max_seq_length", "max_train_samples", "max_eval_samples"):
        value = getattr(data_arguments, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"--{name} {value} is not allowed: it must be an integer of at least 1.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        value = getattr(training_arguments, name)
        if value is not None and value < 1:  # None: the task's own, which comes later
            raise UserError(f"--{name} {value} is not allowed: it must be at least 1.")
    check_output_dir(
        Path(training_arguments.output_dir),
        data_arguments.overwrite_output_dir,
        training_arguments.resume_from_checkpoint,
    )


def check_splits(training_arguments: TrainingArguments, splits: Sequence[str]) -> list[str]:
    """Return the validation splits among `splits`; a UserError names rows that are needed and missing."""
    validation_splits = [split for split in splits if split.startswith("validation")]
    if training_arguments.do_train and "train" not in splits:
        raise UserError("--train_file is missing (or add --no_do_train).")
    if training_arguments.do_eval and not validation_splits:
        raise UserError("--validation_file is missing (or add --no_do_eval).")
    return validation_splits


def choose_best_by(training_arguments: TrainingArguments, metrics: Sequence[str]) -> None:
    """Turn metric_for_best_model "task" into the first of the task's metrics, all of which grow as they get better."""
    wanted = training_arguments.metric_for_best_model
    allowed = ("task", "loss", *metrics)
    if wanted is not None and wanted.removeprefix("eval_") not in allowed:
        raise UserError(f"--metric_for_best_model {wanted} is not allowed: it must be one of {', '.join(allowed)}.")
    if wanted in (None, "task"):
        training_arguments.metric_for_best_model = metrics[0]
    training_arguments.greater_is_better = not training_arguments.metric_for_best_model.endswith("loss")


def begin_run(
    model_arguments: ModelArguments,
    data_arguments: BaseDataArguments,
    training_arguments: TrainingArguments,
    reused: Sequence[str] = (),
) -> str | None:
    """
    Delete an earlier run if that is asked for, and find the checkpoint to continue from.

    Args:
        reused: Names in the output folder that a run goes on with, too, if they are there.

    Raises:
        UserError: an earlier run in the folder, which this one would go on with, was of another model or other rows.
    """
    output_dir = Path(training_arguments.output_dir)
    settings = run_inputs(model_arguments, data_arguments)
    is_first = training_arguments.process_index == 0
    if data_arguments.overwrite_output_dir and is_first:
        remove_earlier_run(output_dir, (*OUTPUT_FILES, *reused))
    # The first process first: the others must find the folder as it leaves it.
    with training_arguments.main_process_first(local=False):
        checkpoint = checkpoint_to_resume(output_dir, training_arguments.resume_from_checkpoint)
        continues = checkpoint is not None and is_inside(checkpoint, output_dir)
        if continues or any((output_dir / name).exists() for name in reused):
            check_settings(output_dir, settings)
        elif is_first and diff_settings(output_dir, settings):
            (output_dir / SETTINGS_FILE).unlink()
        # One task of a suite finds more settings there than these.
        if is_first and not (output_dir / SETTINGS_FILE).is_file():
            save_settings(output_dir, settings)
        return checkpoint


def first_rows(data: Dataset, split: str, arguments: TaskDataArguments) -> Dataset:
    """Select as many rows of the split as --max_train_samples or --max_eval_samples asks for."""
    limit = arguments.max_train_samples if split == "train" else arguments.max_eval_samples
    return data if limit is None or split.startswith("test") else data.select(range(min(limit, len(data))))


class RunResults:
    """The metrics of a run: logged, written split by split, and together at the end."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.metrics: dict[str, float] = {}

    def train(self, checkpoint: str | None) -> None:
        """Train, from a checkpoint if there is one, and save the model."""
        if self.trainer.processing_class is not None:
            clear_truncation(self.trainer.processing_class)
        RouterCallback.add_to(self.trainer)
        outcome = self.trainer.train(resume_from_checkpoint=checkpoint)
        self.trainer.save_model()
        self.trainer.save_state()
        if self.trainer.is_world_process_zero():
            for file in Path(self.trainer.args.output_dir).glob("*.safetensors"):
                set_default_mode(file)
        self.keep("train", outcome.metrics | {"train_samples": len(self.trainer.train_dataset)})

    def keep(self, split: str, metrics: dict[str, float]) -> None:
        """Log a split's metrics and write `<split>_results.json`."""
        self.trainer.log_metrics(split, metrics)
        self.trainer.save_metrics(split, metrics, combined=False)
        self.metrics.update(metrics)

    def merge_and_evaluate(
        self, weights: str | list[float], rows: Dataset, measure: Callable[[PreTrainedModel], dict[str, float]]
    ) -> MergeReport:
        """
        Merge the trainer's model, measure the merged one, and write model and report into `merged/`.

        Args:
            weights: The value of --merge_after.
            rows: Tokenized rows; on the first of them the merge measures its errors.
            measure: A model's metrics on the validation rows, under the names that `keep` got for the routed one.
        """
        trainer = self.trainer

        def batches_of(data: Dataset, num_rows: int) -> list[dict]:
            data = data.select_columns(rows.column_names).select(range(min(num_rows, len(data))))
            # Not the trainer's loader: every process works on the same rows.
            loader = torch.utils.data.DataLoader(
                data, batch_size=trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator
            )
            return list(loader)

        def metrics_of(merged: PreTrainedModel) -> dict[str, float]:
            return {name.removeprefix("eval_"): value for name, value in measure(merged).items()}

        report = merge_and_report(
            trainer.model,
            weights,
            batches_of(rows, MEASURED_ROWS),
            metrics_of,
            f"the first {min(MEASURED_ROWS, len(rows))} validation rows",
            {name.removeprefix("eval_"): value for name, value in self.metrics.items() if name.startswith("eval_")},
            batches_of(trainer.train_dataset, FITTED_ROWS) if weights == "calibrated" else (),
        )
        if trainer.is_world_process_zero():
            report.save(Path(trainer.args.output_dir) / "merged", tokenizer=trainer.processing_class)
        self.metrics.update({f"merged_{name}": value for name, value in report.metrics["merged"].items()})
        return report

    def write(self) -> dict[str, float]:
        """Write `all_results.json`, last: its presence says that the run is complete."""
        if self.trainer.is_world_process_zero():
            file = Path(self.trainer.args.output_dir) / "all_results.json"
            file.write_text(json.dumps(self.metrics, indent=2, sort_keys=True) + "\n")
        return self.metrics
