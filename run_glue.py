# Copyright 2026 The ModernALBERT authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Fine-tune and evaluate an encoder on a GLUE task, or on any csv, tsv, json, jsonl or parquet files of sentences.

    python run_glue.py --demo
    python run_glue.py --model_name_or_path M --task_name sst2 --output_dir O
    python run_glue.py --model_name_or_path M --task_name sst2 --train_file T --validation_file V --output_dir O
    python run_glue.py arguments.json

Takes all of transformers' TrainingArguments. Writes the model, `all_results.json` and the predictions to the output
folder; run again after an interruption, it continues from the last checkpoint.
"""

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from datasets import Dataset, load_dataset
from scipy.special import softmax
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import modernalbert  # noqa: F401  registers the classes with transformers
from modernalbert.command_line import UserError, first_sentence, parse_arguments, run
from modernalbert.configuration_modernalbert import EXPERT_MIXINGS
from modernalbert.evaluation.glue import GLUE_TASKS, Task, compute_metrics, predictions_from_logits
from modernalbert.merge_experts import MergeReport, merge_experts, parse_weights
from modernalbert.training.length_grouped_trainer import LengthGroupedTrainer
from modernalbert.training.task_files import infer_task, load_task_file


logger = logging.getLogger("run_glue")

# Rows on which a merge measures its errors; the metrics are measured on all.
MERGE_CALIBRATION_ROWS = 256


# --- arguments -------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name. A folder with a configuration only starts from random weights."},
    )
    expert_mixing: str | None = field(
        default=None,
        metadata={"help": "For a model with experts: token (route), ema or uniform (train one merged expert)."},
    )
    merge_after: str | None = field(
        default=None,
        metadata={"help": "Then merge the experts with these weights (ema, uniform or E numbers) and evaluate again."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a Hub model."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa, flex_attention or flash_attention_2; default: transformers' choice."},
    )


@dataclass
class DataArguments:
    """Which data."""

    task_name: str | None = field(default=None, metadata={"help": f"One of {', '.join(GLUE_TASKS)}."})
    train_file: str | None = field(default=None, metadata={"help": "csv, tsv, json, jsonl or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Likewise."})
    test_file: str | None = field(default=None, metadata={"help": "Likewise; labels are not needed."})
    text_columns: str | None = field(
        default=None, metadata={"help": "Without a task: the column of text, or two: premise,hypothesis."}
    )
    label_column: str = field(default="label", metadata={"help": "Without a task: the column of the label."})
    max_seq_length: int = field(default=512, metadata={"help": "Longer inputs are cut; shorter ones are not padded."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Delete what the output folder holds."})
    demo: bool = field(
        default=False,
        metadata={"help": "Run the whole story on what is shipped: fine-tune, merge, evaluate both, plot."},
    )


@dataclass
class GlueTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with defaults that suit sentence tasks."""

    do_train: bool = field(default=True, metadata={"help": "Train."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate on the validation rows."})
    do_predict: bool = field(default=True, metadata={"help": "Predict the test rows, if there are any."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Training batch size of a device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Evaluation batch size of a device."})
    warmup_steps: float = field(default=0.06, metadata={"help": "Warm-up: a share of all steps below 1, or steps."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: epoch, steps or no."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: epoch, steps or no."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep beside the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length wastes little on padding; random, sequential."}
    )
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Pin batches in memory; pointless without a GPU."}
    )
    report_to: str | None = field(default="none", metadata={"help": "tensorboard, trackio, wandb, ... or none."})


# --- data ------------------------------------------------------------------------------------------------------------


def load_data(arguments: DataArguments) -> tuple[Task, dict[str, Dataset]]:
    """The task, and its data sets by split: "train", "validation" (or "validation_matched", ...), "test"."""
    name = arguments.task_name
    if name is not None and name not in GLUE_TASKS:
        raise UserError(f"--task_name {name} is not allowed: it must be one of {', '.join(GLUE_TASKS)}.")
    files = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
    files = {split: file for split, file in files.items() if file is not None}
    if files:
        if name is None:
            source = files.get("train") or files.get("validation")
            if source is None:
                raise UserError("--test_file alone does not say what the task is: give --task_name or --train_file.")
            task = infer_task(source, arguments.label_column, arguments.text_columns)
        else:
            task = GLUE_TASKS[name]
        return task, {split: load_task_file(file, task, split != "test") for split, file in files.items()}
    if name is None:
        raise UserError("there is no data: give --task_name, or --train_file and --validation_file, or --demo.")
    task = GLUE_TASKS[name]
    try:
        hub = load_dataset("nyu-mll/glue", name)
    except Exception as error:  # whatever keeps the Hub out of reach
        raise UserError(
            f"the GLUE data of {name} cannot be fetched from the Hub ({first_sentence(error)}); "
            "give --train_file and --validation_file."
        ) from None
    splits = {}
    for split in ("train", *task.validation_splits, *task.test_splits):
        data = hub[split].rename_columns(dict(zip(task.text_columns, ("text", "text_pair"))))
        splits[split] = data.remove_columns(["idx"] + (["label"] if split in task.test_splits else []))
    return task, splits


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Columns "text", "text_pair" -> token ids, cut but not padded; "label" stays."""

    def encode(rows: dict) -> dict:
        return tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length)

    keep = {"label"}
    return data.map(encode, batched=True, remove_columns=[c for c in data.column_names if c not in keep], desc="Tokens")


# --- model -----------------------------------------------------------------------------------------------------------


def load_classifier(arguments: ModelArguments, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier for the task, and its tokenizer."""
    name = arguments.model_name_or_path
    if name is None:
        raise UserError("--model_name_or_path is missing (or use --demo).")
    changes = {"num_labels": max(1, len(task.labels))}
    if task.labels:
        changes |= {
            "id2label": dict(enumerate(task.labels)),
            "label2id": {label: i for i, label in enumerate(task.labels)},
            "problem_type": "single_label_classification",
        }
    else:
        changes |= {"problem_type": "regression"}
    trust = arguments.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust, **changes)
        if arguments.expert_mixing is not None:
            if arguments.expert_mixing not in EXPERT_MIXINGS or not hasattr(config, "expert_mixing"):
                raise UserError(
                    f"--expert_mixing {arguments.expert_mixing} is not allowed: it must be one of "
                    f"{', '.join(EXPERT_MIXINGS)}, for a ModernALBERT."
                )
            config.expert_mixing = arguments.expert_mixing
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        loading = {"trust_remote_code": trust, "attn_implementation": arguments.attn_implementation}
        if has_no_weights(Path(name)):
            logger.warning(f"{name} holds a configuration without weights: starting from random weights.")
            model = AutoModelForSequenceClassification.from_config(config, **loading)
        else:
            # A head for other labels, of a model fine-tuned on another task, is replaced.
            model = AutoModelForSequenceClassification.from_pretrained(
                name, config=config, ignore_mismatched_sizes=True, **loading
            )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--model_name_or_path {name} cannot be loaded: {first_sentence(error)}") from None
    return model, tokenizer


def has_no_weights(folder: Path) -> bool:
    """Whether it is a local folder with a configuration and nothing to load."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "pytorch_model.bin", "pytorch_model.bin.index.json")
    return (folder / "config.json").is_file() and not any((folder / weights).is_file() for weights in names)


# --- the run ---------------------------------------------------------------------------------------------------------


def prepare_output_dir(folder: Path, overwrite: bool, resume: str | None) -> str | None:
    """Clear or check the output folder; returns the checkpoint to continue from, if there is one."""
    if overwrite and folder.is_dir():
        shutil.rmtree(folder)
    if folder.is_file():
        raise UserError(f"--output_dir {folder} is a file.")
    if resume is not None and resume.lower() not in ("true", "false"):
        if not (Path(resume) / "trainer_state.json").is_file():
            raise UserError(f"--resume_from_checkpoint {resume} is not a checkpoint (it holds no trainer_state.json).")
        return resume
    if (folder / "all_results.json").is_file():
        raise UserError(f"--output_dir {folder} holds a finished run; choose another, or add --overwrite_output_dir.")
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    if checkpoint is not None and (resume or "true").lower() != "false":
        logger.warning(f"Continuing from {checkpoint}.")
        return checkpoint
    return None


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    training_arguments: TrainingArguments,
    train: Dataset | None = None,
    validation: Dataset | None = None,
) -> Trainer:
    """A Trainer that pads each batch to its longest row and reports the task's metrics."""

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
    One pass over the rows: metrics (empty without labels), and a file of predictions.

    A line of the file is a row's index, its predicted label (or number), and each label's probability.
    """
    output = trainer.predict(data, metric_key_prefix=prefix)
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    predictions = predictions_from_logits(task, logits)
    if trainer.is_world_process_zero():
        with file.open("w", encoding="utf-8") as handle:
            for i, prediction in enumerate(predictions):
                row = {"index": i, "prediction": float(prediction)}
                if not task.is_regression:
                    probabilities = softmax(logits[i]).round(6).tolist()
                    row["prediction"] = task.labels[int(prediction)]
                    row["probabilities"] = dict(zip(task.labels, probabilities))
                handle.write(json.dumps(row) + "\n")
    return output.metrics | {f"{prefix}_samples": len(data)}


def run_task(
    model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments: TrainingArguments
) -> dict[str, float]:
    """
    Fine-tune, evaluate, predict, and on request merge and evaluate again.

    Returns:
        What `all_results.json` holds.
    """
    output_dir = Path(training_arguments.output_dir)
    task, data = load_data(data_arguments)
    validation_splits = [split for split in data if split.startswith("validation")]
    if training_arguments.do_train and "train" not in data:
        raise UserError("--train_file is missing (or add --no_do_train).")
    if training_arguments.do_eval and not validation_splits:
        raise UserError(
            "--validation_file is missing (or add --no_do_eval --eval_strategy no --no_load_best_model_at_end)."
        )
    checkpoint = prepare_output_dir(
        output_dir, data_arguments.overwrite_output_dir, training_arguments.resume_from_checkpoint
    )
    set_seed(training_arguments.seed)
    model, tokenizer = load_classifier(model_arguments, task)
    merge_weights = None
    if model_arguments.merge_after is not None:
        merge_weights = parse_weights(model_arguments.merge_after, flag="--merge_after")
        if getattr(model.config, "ffn_modulation", None) != "mol":
            raise UserError("--merge_after needs a ModernALBERT with ffn_modulation='mol'.")

    max_length = min(data_arguments.max_seq_length, tokenizer.model_max_length)
    limits = {"train": data_arguments.max_train_samples} | dict.fromkeys(
        validation_splits, data_arguments.max_eval_samples
    )
    for split, rows in data.items():
        if limits.get(split) is not None:
            rows = rows.select(range(min(limits[split], len(rows))))
        data[split] = tokenize(rows, tokenizer, max_length)

    training_arguments.metric_for_best_model = training_arguments.metric_for_best_model or task.metrics[0]
    training_arguments.greater_is_better = not training_arguments.metric_for_best_model.endswith("loss")
    validation = data[validation_splits[0]] if validation_splits else None
    trainer = make_trainer(model, tokenizer, task, training_arguments, data.get("train"), validation)

    results: dict[str, float] = {}

    def keep(split: str, metrics: dict[str, float]) -> None:
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics, combined=False)
        results.update(metrics)

    if training_arguments.do_train:
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()
        keep("train", outcome.metrics | {"train_samples": len(data["train"])})
    if training_arguments.do_eval:
        for split in validation_splits:
            prefix = split.replace("validation", "eval")
            keep(prefix, evaluate(trainer, task, data[split], prefix, output_dir / f"predictions_{split}.jsonl"))
    if training_arguments.do_predict:
        for split in [split for split in data if split.startswith("test")]:
            keep(split, evaluate(trainer, task, data[split], split, output_dir / f"predictions_{split}.jsonl"))
    if merge_weights is not None:
        merged = merge_and_evaluate(trainer, tokenizer, task, merge_weights, validation, results)
        results.update({f"merged_{name}": value for name, value in merged.metrics["merged"].items()})
    if trainer.is_world_process_zero():
        # Written last: its presence says that the run is complete.
        (output_dir / "all_results.json").write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    return results


def merge_and_evaluate(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    weights: str | list[float],
    validation: Dataset,
    results: dict[str, float],
) -> MergeReport:
    """Merge the trainer's model, evaluate the merged one on the same rows, and write both model and report."""
    calibration = trainer.get_eval_dataloader(validation.select(range(min(MERGE_CALIBRATION_ROWS, len(validation)))))
    batches = [trainer._prepare_inputs(batch) for batch in calibration]
    try:
        report = merge_experts(trainer.model, weights, calibration=batches)
    except ValueError as error:
        raise UserError(str(error)) from None
    report.measured_on = f"the first {len(calibration.dataset)} validation rows"
    evaluator = make_trainer(report.model, tokenizer, task, trainer.args, validation=validation)
    metrics = evaluator.evaluate()
    report.metrics = {
        "routed": {name: results[f"eval_{name}"] for name in task.metrics if f"eval_{name}" in results},
        "merged": {name: metrics[f"eval_{name}"] for name in task.metrics},
    }
    report.measure_latency(trainer.model, batches[0])
    if trainer.is_world_process_zero():
        report.save(Path(trainer.args.output_dir) / "merged", tokenizer=tokenizer)
    return report


# --- command line ----------------------------------------------------------------------------------------------------


def main() -> None:
    model_arguments, data_arguments, training_arguments = parse_arguments(
        ModelArguments, DataArguments, GlueTrainingArguments, description=__doc__
    )
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers.utils.logging.set_verbosity_warning()
    if data_arguments.demo:
        from modernalbert.demo import run_demo

        run_demo(model_arguments, data_arguments, training_arguments)
    else:
        run_task(model_arguments, data_arguments, training_arguments)


def command() -> None:
    """Entry point of `modernalbert-glue`."""
    run(main)


if __name__ == "__main__":
    command()
