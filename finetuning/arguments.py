# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The arguments that the task scripts share."""

from dataclasses import dataclass

import torch

from modernalbert.cli.arguments import option
from modernalbert.cli.training_arguments import BaseTrainingArguments


@dataclass
class ModelArguments:
    """Arguments: the model to start from."""

    model_name_or_path: str | None = option(
        None, help="Folder or Hub name. A folder without weights gives a model with random weights."
    )
    expert_mixing: str | None = option(
        None,
        help="How a model with experts mixes them: token (routing), or ema or uniform (one merged expert is trained). "
        "Default: the checkpoint's.",
    )
    merge_after: str | None = option(
        None,
        help="Merge the experts after training and evaluate again: ema, uniform, one number for each expert, or "
        "calibrated (fitted to the first training rows).",
    )
    trust_remote_code: bool = option(False, help="Run code that comes with a Hub model.")
    attn_implementation: str | None = option(
        None, help="Attention: eager, sdpa, flex_attention or flash_attention_2. Default: transformers' choice."
    )


@dataclass
class BaseDataArguments:
    """Arguments on data that every task script has."""

    max_seq_length: int = option(512, help="Maximum length in tokens; longer inputs are truncated.")
    max_train_samples: int | None = option(None, help="Train on this many of the first rows.")
    max_eval_samples: int | None = option(None, help="Evaluate on this many of the first rows (queries in retrieval).")
    overwrite_output_dir: bool = option(
        False, help="Delete an earlier run's checkpoints and results in --output_dir, and start anew."
    )


@dataclass
class TaskDataArguments(BaseDataArguments):
    """Arguments: the files of a task of labelled rows."""

    train_file: str | None = option(None, help="File of training rows.")
    validation_file: str | None = option(None, help="File of validation rows.")
    test_file: str | None = option(None, help="File of rows to predict; labels are optional.")

    def files(self) -> dict[str, str]:
        """Return the files that were given, by split: "train", "validation", "test"."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: file for split, file in files.items() if file is not None}


@dataclass
class TaskTrainingArguments(BaseTrainingArguments):
    """Training arguments with defaults that suit fine-tuning an encoder."""

    do_train: bool = option(True, help="Train on the training rows.")
    do_eval: bool = option(True, help="Evaluate on the validation rows.")
    do_predict: bool = option(True, help="Predict the test rows, if there are any.")
    learning_rate: float = option(5e-5, help="Peak learning rate.")
    per_device_train_batch_size: int = option(32, help="Training batch size of each device.")
    per_device_eval_batch_size: int = option(64, help="Evaluation batch size of each device.")
    warmup_steps: float = option(0.06, help="Warm-up of the learning rate: a share of all steps below 1, or steps.")
    save_total_limit: int | None = option(1, help="Checkpoints to keep beside the best one.")
    logging_steps: float = option(50, help="Steps between two log lines.")
    train_sampling_strategy: str = option(
        "group_by_length", help="Order of the training rows: group_by_length (least padding), random or sequential."
    )
    dataloader_pin_memory: bool = option(
        torch.accelerator.is_available(), help="Pin batches in memory, which speeds up their copy to a GPU."
    )
    metric_for_best_model: str | None = option(
        "task", help="What the best checkpoint is chosen by: a metric, loss, or task (the task's first metric)."
    )
    report_to: str | None = option("none", help="Where to log: tensorboard, trackio, wandb and others, or none.")
