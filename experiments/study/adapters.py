# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Adapters of equal size on the feed-forward networks of any transformer, and how both networks of the study train."""

from collections.abc import Callable, Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from modernalbert import MoLConfig


NUM_EXPERTS, RANK = 8, 4


def add_mol(model: nn.Module, **options) -> PeftModel:
    """A Mixture of LoRAs on every FFN, where the model's type says they are."""
    return get_peft_model(model, MoLConfig(r=RANK, lora_alpha=2 * RANK, num_experts=NUM_EXPERTS, **options))


def add_lora(model: nn.Module, target_modules: list[str], num_parameters: int, **options) -> PeftModel:
    """A LoRA on the FFNs' linear layers, of the rank that comes nearest to so many trained parameters."""
    linears = [
        m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.split(".")[-1] in target_modules
    ]
    rank = max(1, round(num_parameters / sum(m.in_features + m.out_features for m in linears)))
    # The scale of MoL's experts.
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=target_modules, **options)
    return get_peft_model(model, config)


def adapter_size(model: nn.Module) -> int:
    """Trained parameters of an adapter, without modules that are trained whole."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name)


def train(
    model: nn.Module, batches: Iterator[dict], num_steps: int, learning_rate: float, loss_of: Callable | None = None
) -> None:
    """
    AdamW with a linear warm-up over 5 % of the steps and a linear decay, in bfloat16 autocast.

    Args:
        batches: Endless, of model inputs with labels.
        loss_of: (model, batch) -> scalar; default: the model's own.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    warmup = max(1, num_steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / warmup, (num_steps - step) / (num_steps - warmup + 1))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for _ in range(num_steps):
        batch = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss if loss_of is None else loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()
