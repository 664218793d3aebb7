# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pretrain a variant from random weights, and measure masked words text by text."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from modernalbert import ModernALBERTConfig, ModernALBERTForMaskedLM
from modernalbert.cli.errors import UserError
from modernalbert.data.packing import Masking
from modernalbert.diagnostics import RoutingReport
from modernalbert.experiments.study.context import Context, Outcome
from modernalbert.experiments.study.plan import Experiment, Job
from modernalbert.experiments.study.results import REPOSITORY, file_fingerprint


TOKENIZER = "configs/nano"
# Of the held-out texts: how many, and the seed and share of their masks, the same for every run.
NUM_TEXTS, MASK_SEED, MASK_SHARE = 2000, 20, 0.15
TEXTS_AT_A_TIME = 50


def rows(experiment: Experiment, context: Context) -> str:
    """Return a fingerprint of what is trained and measured on."""
    corpus = file_fingerprint(context.need("corpus_dir") / "corpus.json")
    return f"{corpus} {file_fingerprint(context.need('validation_file'))}"


def measure(job: Job, context: Context) -> list[Outcome]:
    """Train, or go on, and measure."""
    settings = job.experiment.settings
    folder = context.folder(job.experiment.name, job.name)
    changes = dict(job.changes)
    arguments = settings["arguments"] | changes.pop("arguments", {})
    tokens_per_step = arguments["per_device_train_batch_size"] * arguments["row_length"]
    num_steps = round(settings["tokens"] / tokens_per_step)
    commands = []
    start = changes.pop("start", None)
    if start is None:
        start = write_config(folder / "config", settings["config"], changes)
    else:  # weights that a command makes
        options = settings["starts"][start] | {"corpus_dir": context.need("corpus_dir"), "output_dir": folder / "start"}
        if not (folder / "start" / "config.json").is_file():
            commands.append(context.run("upcycle.py", options, folder / "start.log"))
        start = folder / "start"
    finished = folder / "model" / "all_results.json"
    options = {
        "model_name_or_path": start,
        "tokenizer_name_or_path": TOKENIZER,
        "corpus_dir": context.need("corpus_dir"),
        "output_dir": folder / "model",
        "max_steps": num_steps,
        "seed": job.seed,
        "eval_strategy": "no",
        **arguments,
    }
    if not finished.is_file():
        commands.append(context.run("run_pretraining.py", options, folder / "log.txt"))
    model = ModernALBERTForMaskedLM.from_pretrained(folder / "model")
    losses, counts = masked_losses(model, held_out_texts(context.need("validation_file"), settings))
    encoder = model.base_model
    measures = {
        "tokens": num_steps * tokens_per_step,
        "masked_loss": float(losses.sum() / counts.sum()),
        "parameters": encoder.num_parameters(),
        "parameters_without_embedding": encoder.num_parameters() - encoder.get_input_embeddings().weight.numel(),
        "training_seconds": json.loads(finished.read_text("utf-8"))["train_runtime"],
    }
    measures |= routing(model, context.need("validation_file"), settings)
    return [Outcome(measures, " && ".join(commands), {"loss": losses.astype(np.float32), "count": counts})]


def write_config(folder: Path, base: str, changes: dict) -> Path:
    """A folder with a configuration: that of `base` with other fields."""
    values = json.loads((REPOSITORY / base / "config.json").read_text("utf-8")) | changes
    if values["num_hidden_layers"] != len(values["layer_types"]):
        values["layer_types"] = ["full_attention"] * values["num_hidden_layers"]
    try:
        config = ModernALBERTConfig(**{name: value for name, value in values.items() if name != "model_type"})
    except (ValueError, TypeError) as error:
        raise UserError(f"a variant of {base} is not allowed: {error}") from None
    config.save_pretrained(folder)
    return folder


def held_out_texts(file: Path, settings: dict) -> list[dict[str, torch.Tensor]]:
    """The first texts of a file, each one masked sequence (1, n), the same masks at every call."""
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / TOKENIZER)
    masking = Masking.for_tokenizer(tokenizer, MASK_SHARE)
    length = settings["arguments"]["max_seq_length"]
    texts = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if len(texts) == settings.get("num_texts", NUM_TEXTS):
                break
            ids = tokenizer(json.loads(line)["text"], truncation=True, max_length=length)["input_ids"]
            inputs, labels = masking.apply(np.array(ids), np.random.default_rng([MASK_SEED, number]))
            texts.append({"input_ids": torch.tensor(inputs)[None], "labels": torch.tensor(labels)[None]})
    return texts


def batches(texts: list[dict[str, torch.Tensor]], pad_token_id: int) -> list[tuple[list[int], dict]]:
    """Texts of like length together: their numbers, and padded inputs and labels."""
    order = sorted(range(len(texts)), key=lambda i: texts[i]["input_ids"].shape[1])
    made = []
    for first in range(0, len(order), TEXTS_AT_A_TIME):
        numbers = order[first : first + TEXTS_AT_A_TIME]

        def padded(name: str, value: int) -> torch.Tensor:
            rows = [texts[i][name][0] for i in numbers]  # noqa: B023  called in this turn of the loop
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        ids = padded("input_ids", pad_token_id)
        lengths = torch.tensor([texts[i]["input_ids"].shape[1] for i in numbers])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        made.append((numbers, {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", -100)}))
    return made


@torch.no_grad()
def masked_losses(model: ModernALBERTForMaskedLM, texts: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """For each text the summed loss of its masked words (N,) float64, and their number (N,) int16."""
    model.eval()
    losses, counts = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int16)
    for numbers, batch in batches(texts, model.config.pad_token_id):
        labels = batch.pop("labels")
        masked = labels != -100
        logits = model.decode(model.base_model(**batch).last_hidden_state[masked])
        each = torch.nn.functional.cross_entropy(logits.float(), labels[masked], reduction="none").double()
        row = masked.nonzero()[:, 0].numpy()
        losses[numbers] = np.bincount(row, weights=each.numpy(), minlength=len(numbers))
        counts[numbers] = masked.sum(1).numpy()
    return losses, counts


def routing(model: ModernALBERTForMaskedLM, file: Path, settings: dict) -> dict:
    """Usage of experts on held-out text, of a model that routes; else nothing."""
    config = model.config
    if config.ffn_modulation != "mol" or config.expert_mixing != "token" or config.num_experts < 2:
        return {}
    texts = held_out_texts(file, settings)[:500]
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for _, batch in batches(texts, config.pad_token_id)]
    report = RoutingReport.measure(model.base_model, inputs)
    return {
        "top_2_share": max(sum(sorted(use.usage)[-2:]) for use in report.layers),
        "usage_entropy": min(use.usage_entropy for use in report.layers),
        "token_dependence": sum(use.token_dependence for use in report.layers) / len(report.layers),
        "idle_experts": len(report.idle_experts),
    }
