# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
What ONNX and int8 keep of a fine-tuned classifier: its figures in PyTorch, in ONNX and in ONNX int8.

    python experiments/onnx_accuracy.py --model_name_or_path outputs/checkpoint-tasks/sst2-sst2-nano-0 \\
        --task_name sst2 --validation_file $DATA_DIR/sst2/validation.jsonl \\
        --output_file experiments/results/onnx_accuracy.json

The model is measured as it is, and with its experts merged by the moving average of their use.
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.data.glue_tasks import GLUE_TASKS
from modernalbert.data.sentences import load_task_file, relabel
from modernalbert.evaluation.glue import compute_metrics, predictions_from_logits
from modernalbert.export.hub_folder import load_model
from modernalbert.export.onnx import MODEL_FILE, QUANTIZED_FILE, export_onnx, run_onnx
from modernalbert.finetuning.checkpoint import task_in_head_order
from modernalbert.merge_experts import merge_experts


@dataclass
class OnnxAccuracyArguments:
    """Arguments: a fine-tuned model and its rows."""

    model_name_or_path: str = field(metadata={"help": "A ModernALBERT with experts and a classifier."})
    task_name: str = field(metadata={"help": "Its task of GLUE: columns, labels and metric."})
    validation_file: str = field(metadata={"help": "csv, tsv, json, jsonl or parquet: the rows that are judged."})
    output_file: str = field(metadata={"help": "JSON, a list of rows."})


def make_batches(rows: Dataset, tokenizer: PreTrainedTokenizerBase, size: int = 32) -> list[dict[str, torch.Tensor]]:
    """The rows in their order: input_ids and attention_mask (batch, sequence)."""
    parts = (rows[start : start + size] for start in range(0, len(rows), size))
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]
    options = {"padding": True, "truncation": True, "max_length": 512, "return_tensors": "pt"}
    return [dict(tokenizer(*(part[name] for name in columns), **options)) for part in parts]


def measure(arguments: OnnxAccuracyArguments) -> list[dict]:
    """A row for each form of the model: its figures, and how often it predicts what PyTorch does."""
    task = GLUE_TASKS[arguments.task_name]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = load_model(arguments.model_name_or_path).eval()
    task_of_model = task_in_head_order(arguments.model_name_or_path, task)
    rows = relabel(load_task_file(arguments.validation_file, task), task, task_of_model)
    task = task_of_model
    inputs, labels = make_batches(rows, tokenizer), np.array(rows["label"])
    results = []
    for experts, form in (("routed", model), ("merged", merge_experts(model, weights="ema").model.eval())):
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            folder = Path(scratch) / "out"
            export_onnx(form, tokenizer, folder, quantize="int8")
            logits = {
                "PyTorch": [form(batch["input_ids"], batch["attention_mask"]).logits.numpy() for batch in inputs],
                "ONNX": [outputs[0].numpy() for outputs in run_onnx(folder / MODEL_FILE, inputs)],
                "ONNX, int8": [outputs[0].numpy() for outputs in run_onnx(folder / QUANTIZED_FILE, inputs)],
            }
        predictions = {name: predictions_from_logits(task, np.concatenate(parts)) for name, parts in logits.items()}
        for name, predicted in predictions.items():
            results.append(
                {"task": task.name, "experts": experts, "form": name, "rows": len(rows)}
                | compute_metrics(task, predicted, labels)
                | {"same_prediction": float(np.mean(predicted == predictions["PyTorch"]))}
            )
    return results


def main() -> None:
    (arguments,) = parse_arguments(OnnxAccuracyArguments, description=__doc__)
    classifications = [name for name, task in GLUE_TASKS.items() if not task.is_regression]
    if arguments.task_name not in classifications:
        raise UserError(f"--task_name {arguments.task_name} is not allowed: it must be {', '.join(classifications)}.")
    results = measure(arguments)
    for row in results:
        print(row)
    output = Path(arguments.output_file)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
