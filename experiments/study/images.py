# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A small vision transformer trained on the digits 0 to 4, and adapted to 5 to 9 through the tuner."""

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from modernalbert.experiments.study.adapters import adapter_size, add_lora, add_mol, train
from modernalbert.experiments.study.context import Context, Outcome
from modernalbert.experiments.study.plan import Experiment, Job


BATCH = 64


def rows(experiment: Experiment, context: Context) -> str:
    """scikit-learn's digits: they come with the package."""
    return "scikit-learn digits"


def measure(job: Job, context: Context) -> list[Outcome]:
    """Train the base of this seed, adapt it, and measure on held-out images; for MoL also merged."""
    settings = job.experiment.settings
    torch.manual_seed(job.seed)
    base = ViTForImageClassification(ViTConfig(**settings["config"], num_labels=5))
    train(base, batches(*digits(range(5), "train"), job.seed), settings["base_steps"], settings["base_learning_rate"])
    base.classifier = nn.Linear(base.config.hidden_size, 5)
    kind = job.changes["adapter"]
    ffn = settings["ffn_modules"]
    size = adapter_size(add_mol(ViTForImageClassification(base.config)))
    torch.manual_seed(job.seed)
    if kind == "none":  # the classifier alone
        adapted, size = base.requires_grad_(False), 0
        base.classifier.requires_grad_(True)
    elif kind == "mol":
        adapted = add_mol(base, modules_to_save=["classifier"])
    else:
        adapted = add_lora(base, ffn, size, modules_to_save=["classifier"])
    train(adapted, batches(*digits(range(5, 10), "train"), job.seed), settings["steps"], settings["learning_rate"])
    size = 0 if kind == "none" else adapter_size(adapted)
    images, labels = digits(range(5, 10), "test")
    command = f"python experiments/study/run.py experiments/study/{job.experiment.name}.yaml"

    def outcome(model: nn.Module, method: str) -> Outcome:
        with torch.no_grad():
            logits = model.eval()(pixel_values=images).logits
        losses = nn.functional.cross_entropy(logits, labels, reduction="none").numpy()
        is_right = (logits.argmax(-1) == labels).numpy()
        figures = {"accuracy": float(is_right.mean()), "loss": float(losses.mean()), "adapter_parameters": size}
        return Outcome(figures, command, {"loss": losses, "right": is_right}, method=method)

    outcomes = [outcome(adapted, {"none": "classifier alone"}.get(kind, kind))]
    if kind == "mol":
        outcomes.append(outcome(adapted.merge_and_unload(), "mol, merged"))
    return outcomes


def digits(classes: range, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 8, 8) in [0, 1] of some digits, labels (N,) from 0; every third image of the set is for "test"."""
    data = load_digits()
    is_test = np.arange(len(data.target)) % 3 == 0
    chosen = np.isin(data.target, list(classes)) & (is_test == (split == "test"))
    images = torch.tensor(data.images[chosen] / 16, dtype=torch.float32)[:, None]
    return images, torch.tensor(data.target[chosen]) - classes[0]


def batches(images: torch.Tensor, labels: torch.Tensor, seed: int) -> Iterator[dict]:
    """Endless batches, each pass in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for numbers in torch.randperm(len(images), generator=generator).split(BATCH):
            yield {"pixel_values": images[numbers], "labels": labels[numbers]}
