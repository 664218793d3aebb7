# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Arguments of `run_pretraining.py`; loss and schedule from them."""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from modernalbert.cli.arguments import option
from modernalbert.cli.errors import UserError, error_message
from modernalbert.cli.training_arguments import BaseTrainingArguments

from .distillation import DistillationConfig


@dataclass
class ModelArguments:
    """Student and teacher."""

    model_name_or_path: str | None = option(
        None,
        help="The student: folder or Hub name. A folder with a configuration only starts from random weights; "
        "upcycle.py writes one that starts from the teacher's.",
    )
    tokenizer_name_or_path: str | None = option(
        None, help="Folder or Hub name of the tokenizer, if it is not in the student's folder."
    )
    teacher_name_or_path: str | None = option(None, help="The model to distil from.")
    teacher_dtype: str = option(
        "auto", help="Dtype of the teacher: float32, bfloat16, float16, or auto (bfloat16 on a GPU, float32 on a CPU)."
    )
    attn_implementation: str | None = option(
        None, help="Attention of the student: eager, sdpa, flex_attention or flash_attention_2."
    )
    teacher_attn_implementation: str | None = option(
        None, help="Attention of the teacher, which reads padded sequences."
    )
    trust_remote_code: bool = option(False, help="Run code that comes with a teacher.")


@dataclass
class DataArguments:
    """Text, and how it is packed into rows."""

    train_sources: list[str] = option(
        [],
        help="Files (txt, json, jsonl, also with .gz or .xz, and parquet) or Hub data sets as name[:config[:split]]. "
        "Each is a source.",
    )
    source_weights: list[float] = option(
        [],
        help="Share of each source in the tokens, or in the texts with --streaming. Default: by size, or even with "
        "--streaming.",
    )
    validation_file: str | None = option(None, help="A file of held-out text to evaluate on.")
    text_column: str = option("text", help="The column that holds the text in json, jsonl and parquet files.")
    corpus_dir: str | None = option(
        None, help="Folder of the tokenized corpus, which is prepared if absent. Default: in --output_dir."
    )
    streaming: bool = option(False, help="Tokenize the text while training, instead of preparing a corpus.")
    prepare_only: bool = option(False, help="Prepare the corpus and stop; of the models only the tokenizer is loaded.")
    preprocessing_num_workers: int | None = option(None, help="Number of processes that tokenize the corpus.")
    max_seq_length: int = option(512, help="Longer texts are cut into sequences of this length.")
    row_length: int | None = option(
        None, help="Tokens of a packed row, which holds several sequences. Default: --max_seq_length."
    )
    mlm_probability: float = option(0.3, help="Share of the tokens that are masked and predicted.")
    masked_sequence_share: float = option(
        1.0, help="Share of the sequences that are masked; the others serve distillation only."
    )
    whole_word_masking: bool = option(False, help="Mask all pieces of a word or none.")
    max_eval_rows: int = option(256, help="Largest number of held-out rows to evaluate on.")
    overwrite_output_dir: bool = option(
        False, help="Delete an earlier run's checkpoints and results in --output_dir, and start anew."
    )


@dataclass
class DistillationArguments:
    """Weights of the terms of the loss. Without a teacher only the masked language model has one."""

    mlm_weight: float = option(1.0, help="Weight of the masked language modelling loss.")
    logits_weight: float = option(0.0, help="Weight of the KL divergence from the teacher's logits.")
    temperature: float = option(1.0, help="Temperature of both distributions in that divergence.")
    logits_positions: str = option("masked", help="The tokens at which logits are compared: masked or all.")
    hidden_weight: float = option(0.0, help="Weight of the distance to the teacher's hidden states.")
    hidden_loss: str = option("cosine", help="Distance of hidden states: cosine or mse.")
    layer_map: str | None = option(
        None,
        help="Pairs of layers student:teacher, as 0:0,2:4,6:12 (0 is the embeddings). Default: evenly spaced from "
        "first to last.",
    )
    pooled_weight: float = option(0.0, help="Weight of 1 - cosine of the mean-pooled last states.")
    teacher_input: str | None = option(
        None,
        help="The text that the teacher reads: masked or clean. Default: masked if logits are compared, else clean.",
    )
    teacher_cache_dir: str | None = option(
        None,
        help="Folder that caches the teacher's outputs in half precision for later passes and other students. It needs "
        "a prepared corpus and clean input, and takes 2 bytes x width x (tokens x layers + sequences).",
    )


@dataclass
class PretrainingArguments(BaseTrainingArguments):
    """Training arguments with defaults that suit pretraining."""

    DEFAULT_EVAL_STRATEGY: ClassVar[str] = "steps"
    DEFAULT_SAVE_STRATEGY: ClassVar[str] = "steps"
    DEFAULT_EVAL_STEPS: ClassVar[float | None] = 1000
    DEFAULT_SAVE_STEPS: ClassVar[float] = 1000
    LOADS_BEST: ClassVar[bool] = False

    do_eval: bool = option(True, help="Evaluate on --validation_file, if there is one.")
    learning_rate: float = option(5e-4, help="Learning rate of the stable phase.")
    warmup_steps: float = option(0.02, help="Warm-up: a share of all steps below 1, or steps.")
    decay_steps: float = option(0.1, help="Final decay: a share of all steps below 1, or steps.")
    decay_type: str = option("1-sqrt", help="Form of the decay: 1-sqrt, linear or cosine.")
    lr_scheduler_type: str = option("warmup_stable_decay", help="warmup_stable_decay, or any schedule of transformers.")
    weight_decay: float = option(0.01, help="Weight decay of matrices; norms and biases have none.")
    adam_beta2: float = option(0.98, help="Second beta of AdamW.")
    per_device_train_batch_size: int = option(16, help="Rows of a device in a step.")
    per_device_eval_batch_size: int = option(16, help="Rows of a device in evaluation.")
    logging_steps: float = option(50, help="Steps between log lines.")
    save_total_limit: int | None = option(2, help="Checkpoints to keep.")
    peak_tflops: float | None = option(
        None,
        help="Peak TFLOPS of one device in the dtype of training (989 for an H100 in bfloat16), to log the share that "
        "is used (MFU).",
    )
    remove_unused_columns: bool = option(False, help="Must stay False: the trainer reads every column.")
    dataloader_pin_memory: bool = option(
        torch.accelerator.is_available(), help="Pin batches in memory, which speeds up their copy to a GPU."
    )
    report_to: str | None = option("none", help="Where to log: tensorboard, trackio, wandb and others, or none.")


def check_numbers(data: DataArguments, training: PretrainingArguments) -> None:
    """Raise a UserError for a number that is not allowed."""
    for name in ("max_seq_length", "max_eval_rows"):
        if getattr(data, name) < 1:
            raise UserError(f"--{name} {getattr(data, name)} is not allowed: it must be at least 1.")
    for name in ("mlm_probability", "masked_sequence_share"):
        if not 0 <= getattr(data, name) <= 1:
            raise UserError(f"--{name} {getattr(data, name)} is not allowed: it must be from 0 to 1.")
    if data.row_length is not None and data.row_length < data.max_seq_length:
        raise UserError(
            f"--row_length {data.row_length} is not allowed: it must be at least --max_seq_length "
            f"{data.max_seq_length}."
        )
    if data.source_weights and len(data.source_weights) != len(data.train_sources):
        raise UserError(
            f"--source_weights has {len(data.source_weights)} numbers for {len(data.train_sources)} --train_sources."
        )
    if any(weight <= 0 for weight in data.source_weights):
        raise UserError("--source_weights must be above 0.")
    if data.streaming and training.max_steps <= 0:
        raise UserError("--streaming needs --max_steps: a stream has no length.")
    if data.streaming and data.prepare_only:
        raise UserError("--streaming and --prepare_only exclude each other.")
    if not training.average_tokens_across_devices:
        raise UserError(
            "--average_tokens_across_devices False is not allowed: masked words are averaged over processes."
        )
    if training.decay_type not in ("1-sqrt", "linear", "cosine"):
        raise UserError(f"--decay_type {training.decay_type} is not allowed: it must be 1-sqrt, linear or cosine.")


def distillation_config(arguments: DistillationArguments, has_teacher: bool) -> DistillationConfig:
    """Return the configuration of the loss, checked."""
    layer_map = None
    if arguments.layer_map is not None:
        try:
            pairs = [pair.split(":") for pair in arguments.layer_map.split(",")]
            layer_map = tuple((int(student), int(teacher)) for student, teacher in pairs)
        except ValueError:
            raise UserError(
                f"--layer_map {arguments.layer_map} is not allowed: it must be pairs student:teacher, as 0:0,2:4,6:12."
            ) from None
    try:
        given = {field.name: getattr(arguments, field.name) for field in fields(DistillationConfig)}
        config = DistillationConfig(**given | {"layer_map": layer_map})
    except ValueError as error:
        raise UserError(f"--{error_message(error)}") from None
    if config.needs_teacher and not has_teacher:
        raise UserError("--teacher_name_or_path is missing: a distillation term has a weight.")
    if has_teacher and not config.needs_teacher:
        raise UserError("the teacher has nothing to do: give --logits_weight, --hidden_weight or --pooled_weight.")
    if arguments.teacher_input not in (None, "masked", "clean"):
        raise UserError(f"--teacher_input {arguments.teacher_input} is not allowed: it must be masked or clean.")
    if arguments.teacher_input == "clean" and config.logits_weight:
        raise UserError("--teacher_input clean is not allowed with --logits_weight: the teacher would see the answers.")
    if arguments.teacher_cache_dir is not None and (config.logits_weight or arguments.teacher_input == "masked"):
        raise UserError("--teacher_cache_dir needs clean input: what a teacher says of masks changes with them.")
    return config


def set_schedule(training: PretrainingArguments) -> None:
    """Put the decay into the scheduler's arguments, once the number of steps is known."""
    if training.lr_scheduler_type == "warmup_stable_decay":
        share = training.decay_steps
        steps = math.ceil(share * training.max_steps) if share < 1 else int(share)
        warmup = training.get_warmup_steps(training.max_steps)
        if steps + warmup > training.max_steps:
            raise UserError(
                f"--decay_steps {share:g} is not allowed: with {warmup} steps of warm-up it is more than --max_steps "
                f"{training.max_steps}."
            )
        training.lr_scheduler_kwargs = {"num_decay_steps": steps, "decay_type": training.decay_type}
