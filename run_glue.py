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
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from datasets import Dataset, load_dataset
from safetensors import SafetensorError
from scipy.special import softmax
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import modernalbert  # noqa: F401  registers the classes with transformers
from modernalbert.command_line import UserError, check_processes, first_sentence, parse_arguments, run
from modernalbert.configuration_modernalbert import EXPERT_MIXINGS, refuse_original_release
from modernalbert.evaluation.glue import GLUE_TASKS, Task, compute_metrics, predictions_from_logits
from modernalbert.merge_experts import MergeReport, merge_experts, parse_weights
from modernalbert.training.length_grouped_trainer import LengthGroupedTrainer
from modernalbert.training.run_folder import (
    EARLIER_RUN,
    check_output_dir,
    checkpoint_to_resume,
    has_no_weights,
    remove_earlier_run,
)
from modernalbert.training.task_files import infer_task, load_task_file


logger = logging.getLogger("run_glue")

# What a run leaves in its output folder beside the model's files, and may delete there.
RUN_FILES = (*EARLIER_RUN, "predictions_*.jsonl", "merged")
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
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew where a run lies: its checkpoints and results are deleted."}
    )
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
    metric_for_best_model: str | None = field(
        default="task",
        metadata={"help": "Chooses the best checkpoint: a metric, loss, or task (the first metric)."},
    )
    report_to: str | None = field(default="none", metadata={"help": "tensorboard, trackio, wandb, ... or none."})

    def __post_init__(self):
        # Without evaluation there is no best checkpoint to end with.
        if not self.do_eval:
            self.eval_strategy = "no"
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False
        super().__post_init__()


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
            labels = "numbers to predict" if task.is_regression else f"labels {', '.join(task.labels)}"
            logger.warning(f"{source}: text in {' and '.join(task.text_columns)}, {labels}.")
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


def load_classifier(
    arguments: ModelArguments, task: Task, training: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Task]:
    """
    A sequence classifier for the task, its tokenizer, and the task with its labels in the classifier's order.

    A checkpoint that already knows the task's labels by name keeps its order; one that knows others, or another number
    of them, gets a new head, which only training can fill.
    """
    name = arguments.model_name_or_path
    if name is None:
        raise UserError("--model_name_or_path is missing (or use --demo).")
    trust = arguments.trust_remote_code
    try:
        written, _ = PreTrainedConfig.get_config_dict(name)
        refuse_original_release(written)
        bare = has_no_weights(Path(name))
        known = AutoConfig.from_pretrained(name, trust_remote_code=trust).id2label or {}
        known = tuple(known[i] for i in sorted(known)) if written.get("id2label") else ()
        if task.labels and (set(known) == set(task.labels) or (not training and set(known) > set(task.labels))):
            task = replace(task, labels=known)
        elif not training and (bare or len(known) != max(1, len(task.labels))):
            raise UserError(
                f"--no_do_train needs a model with a head for the task: {name} knows the labels "
                f"{', '.join(known) or 'of none'}, the task has {', '.join(task.labels) or 'one number'}."
            )
        changes = {"num_labels": max(1, len(task.labels)), "problem_type": "regression"}
        if task.labels:
            changes |= {
                "id2label": dict(enumerate(task.labels)),
                "label2id": {label: i for i, label in enumerate(task.labels)},
                "problem_type": "single_label_classification",
            }
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust, **changes)
        if arguments.expert_mixing is not None:
            if arguments.expert_mixing not in EXPERT_MIXINGS or not hasattr(config, "expert_mixing"):
                raise UserError(
                    f"--expert_mixing {arguments.expert_mixing} is not allowed: it must be one of "
                    f"{', '.join(EXPERT_MIXINGS)}, for a ModernALBERT."
                )
            config.expert_mixing = arguments.expert_mixing
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        # Trained in float32, whatever it was saved in; --bf16 computes in half precision.
        loading = {"trust_remote_code": trust, "attn_implementation": arguments.attn_implementation}
        loading["dtype"] = torch.float32
        if bare:
            logger.warning(f"{name} holds a configuration without weights: starting from random weights.")
            model = AutoModelForSequenceClassification.from_config(config, **loading)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                name, config=config, ignore_mismatched_sizes=True, **loading
            )
    except UserError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"--model_name_or_path {name} cannot be loaded: {first_sentence(error)}") from None
    return model, tokenizer, task


def relabel(data: Dataset, old: Task, new: Task) -> Dataset:
    """Label ids of the old task's order into the new one's."""
    if old.labels == new.labels or "label" not in data.column_names:
        return data
    ids = [new.labels.index(label) for label in old.labels]
    return data.map(lambda row: {"label": ids[row["label"]]}, desc="Labels")


def check_merge(weights: str | None, model: PreTrainedModel, has_validation: bool) -> str | list[float] | None:
    """The value of --merge_after, checked before anything long starts."""
    if weights is None:
        return None
    parsed = parse_weights(weights, flag="--merge_after", names=("ema", "uniform"))
    if getattr(model.config, "ffn_modulation", None) != "mol":
        raise UserError("--merge_after needs a ModernALBERT with ffn_modulation='mol'.")
    if not isinstance(parsed, str) and len(parsed) != model.config.num_experts:
        raise UserError(f"--merge_after {weights} is not allowed: it must be {model.config.num_experts} numbers.")
    if not has_validation:
        raise UserError("--merge_after needs --validation_file, to measure what the merge changes.")
    return parsed


# --- the run ---------------------------------------------------------------------------------------------------------


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
    check_processes(training_arguments.world_size, training_arguments.n_gpu)
    output_dir = Path(training_arguments.output_dir)
    overwrite, resume = data_arguments.overwrite_output_dir, training_arguments.resume_from_checkpoint
    for name in ("max_seq_length", "max_train_samples", "max_eval_samples"):
        value = getattr(data_arguments, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"--{name} {value} is not allowed: it must be an integer of at least 1.")
    check_output_dir(output_dir, overwrite, resume)
    task, data = load_data(data_arguments)
    validation_splits = [split for split in data if split.startswith("validation")]
    if training_arguments.do_train and "train" not in data:
        raise UserError("--train_file is missing (or add --no_do_train).")
    if training_arguments.do_eval and not validation_splits:
        raise UserError("--validation_file is missing (or add --no_do_eval).")
    wanted = training_arguments.metric_for_best_model
    allowed = ("task", "loss", *task.metrics)
    if wanted is not None and wanted.removeprefix("eval_") not in allowed:
        raise UserError(f"--metric_for_best_model {wanted} is not allowed: it must be one of {', '.join(allowed)}.")
    if wanted in (None, "task"):
        training_arguments.metric_for_best_model = task.metrics[0]
    training_arguments.greater_is_better = not training_arguments.metric_for_best_model.endswith("loss")

    set_seed(training_arguments.seed)
    model, tokenizer, task_of_model = load_classifier(model_arguments, task, training_arguments.do_train)
    merge_weights = check_merge(model_arguments.merge_after, model, bool(validation_splits))
    if overwrite and training_arguments.process_index == 0:
        remove_earlier_run(output_dir, RUN_FILES)
    # The first process first: the others must find the folder as it leaves it.
    with training_arguments.main_process_first(local=False):
        checkpoint = checkpoint_to_resume(output_dir, resume)

    max_length = min(data_arguments.max_seq_length, tokenizer.model_max_length)
    limits = {"train": data_arguments.max_train_samples} | dict.fromkeys(
        validation_splits, data_arguments.max_eval_samples
    )
    for split, rows in data.items():
        if limits.get(split) is not None:
            rows = rows.select(range(min(limits[split], len(rows))))
        data[split] = tokenize(relabel(rows, task, task_of_model), tokenizer, max_length)
    task = task_of_model

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
        splits = {split: data[split] for split in validation_splits}
        report = merge_and_evaluate(trainer, tokenizer, task, merge_weights, splits, results)
        results.update({f"merged_{name}": value for name, value in report.metrics["merged"].items()})
    if trainer.is_world_process_zero():
        # Written last: its presence says that the run is complete.
        (output_dir / "all_results.json").write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    return results


def merge_and_evaluate(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    weights: str | list[float],
    splits: dict[str, Dataset],
    results: dict[str, float],
) -> MergeReport:
    """Merge the trainer's model, evaluate the merged one on the same rows, and write both model and report."""
    rows = next(iter(splits.values()))
    rows = rows.select(range(min(MERGE_CALIBRATION_ROWS, len(rows))))
    # Not the trainer's loader: every process measures on the same rows.
    loader = torch.utils.data.DataLoader(
        rows, batch_size=trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator
    )
    batches = [{name: value.to(trainer.model.device) for name, value in batch.items()} for batch in loader]
    report = merge_experts(trainer.model, weights, calibration=batches)
    report.measured_on = f"the first {len(rows)} validation rows"
    report.metrics = {"routed": {}, "merged": {}}
    evaluator = make_trainer(report.model, tokenizer, task, trainer.args, validation=rows)
    for split, data in splits.items():
        prefix = split.replace("validation", "eval")
        merged = evaluator.evaluate(data)
        for name in task.metrics:
            full_name = f"{prefix}_{name}".removeprefix("eval_")
            report.metrics["merged"][full_name] = merged[f"eval_{name}"]
            if f"{prefix}_{name}" in results:
                report.metrics["routed"][full_name] = results[f"{prefix}_{name}"]
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
