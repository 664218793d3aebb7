# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Comparison of merge methods on a fine-tuned model.

    python experiments/merging.py --data sst2 --task_name sst2 --model_name_or_path outputs/sst2 \\
        --train_file $DATA_DIR/sst2/train.jsonl --validation_file $DATA_DIR/sst2/validation.jsonl \\
        --output_file experiments/results/merging.json

Text for the methods that need some is the first 400 training rows; what is lost is measured on all validation rows,
which no method sees. The file gets a row for each way of merging, beside those of other sets that it holds.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from checkpoint_tasks import portable
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.data.glue_tasks import GLUE_TASKS
from modernalbert.data.sentences import load_task_file, relabel
from modernalbert.finetuning.checkpoint import task_in_head_order
from modernalbert.merge_experts import merge_experts


# Name -> arguments of merge_experts.
WAYS = {
    "uniform, linear": {"weights": "uniform"},
    "ema, linear": {"weights": "ema"},
    "calibration, linear": {"weights": "calibration"},
    "calibration, svd": {"weights": "calibration", "method": "svd"},
    "calibration, ties": {"weights": "calibration", "method": "ties"},
    "calibration, dare": {"weights": "calibration", "method": "dare"},
    "calibrated": {"method": "calibrated"},
    "calibrated, rank r": {"method": "calibrated", "rank": "lora_rank"},
}


@dataclass
class MergingArguments:
    """Arguments: a fine-tuned model and its rows."""

    model_name_or_path: str = field(metadata={"help": "A ModernALBERT with experts and a classifier."})
    data: str = field(metadata={"help": "The set's name in the table."})
    task_name: str = field(metadata={"help": "A classification of GLUE: columns and labels."})
    train_file: str = field(metadata={"help": "csv, tsv, json, jsonl or parquet: text to calibrate with."})
    validation_file: str = field(metadata={"help": "The same, of the rows that are judged."})
    output_file: str = field(metadata={"help": "JSON, a list of rows."})
    num_calibration_rows: int = field(default=400, metadata={"help": "Of the training file, the first."})


def batches(rows: Dataset, tokenizer, batch_size: int = 32) -> list[dict]:
    """The rows in their order: input_ids and attention_mask (batch, sequence), labels (batch,)."""
    pairs = [name for name in ("text", "text_pair") if name in rows.column_names]
    result = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        encoded = tokenizer(
            *(part[name] for name in pairs), padding=True, truncation=True, max_length=512, return_tensors="pt"
        )
        result.append({**encoded, "labels": torch.tensor(part["label"])})
    return result


@torch.no_grad()
def predict(model, judged: list[dict]) -> torch.Tensor:
    """The likeliest label of each row, (rows,)."""
    return torch.cat([model(**batch).logits.argmax(dim=-1) for batch in judged])


def main() -> None:
    (arguments,) = parse_arguments(MergingArguments, description=__doc__)
    task = GLUE_TASKS.get(arguments.task_name)
    if task is None or task.is_regression:
        raise UserError(f"--task_name {arguments.task_name} is not allowed: it must be a classification of GLUE.")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model_name_or_path).eval()
    head = task_in_head_order(arguments.model_name_or_path, task)
    files = arguments.train_file, arguments.validation_file
    train, validation = (relabel(load_task_file(file, task), task, head) for file in files)
    text = batches(train.select(range(min(len(train), arguments.num_calibration_rows))), tokenizer)
    judged = batches(validation, tokenizer)
    labels = torch.cat([batch["labels"] for batch in judged])
    routed = predict(model, judged)
    same = {"data": arguments.data, "command": portable(["python", *sys.argv])}
    found = [{**same, "way": "routed", "accuracy": (routed == labels).double().mean().item()}]
    for way, options in WAYS.items():
        rank = options.get("rank") and getattr(model.config, options["rank"])
        report = merge_experts(model, calibration=text, measure_on=judged, **options | ({"rank": rank} if rank else {}))
        predictions = predict(report.model, judged)
        found.append(
            {
                **same,
                "way": way,
                "rank": report.rank,
                "ffn_errors": [layer.relative_error for layer in report.layers.values()],
                "output_error": report.relative_error_of_output,
                "accuracy": (predictions == labels).double().mean().item(),
                "agreement": (predictions == routed).double().mean().item(),
            }
        )
        print(json.dumps(found[-1]), flush=True)
    file = Path(arguments.output_file)
    kept = json.loads(file.read_text("utf-8")) if file.is_file() else []
    kept = [row for row in kept if row["data"] != arguments.data]
    file.write_text(json.dumps(kept + found, indent=1) + "\n", "utf-8")


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
