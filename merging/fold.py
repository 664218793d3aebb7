# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Models without their experts: left out, replaced by one, or folded into the shared FFN; and the stock LoRA."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modernalbert.mol_backends import Experts


# Low-rank factors by the path of the module that they change: A (r, inputs), B (outputs, r), with the scale in B.
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
SHOWN_NAMES = 3


def copy_with(model: PreTrainedModel, **changes) -> PreTrainedModel:
    """
    Copy a model with changed configuration, in evaluation mode. All tensors but the experts' are copied, each in its
    dtype.
    """
    config = type(model.config).from_dict(copy.deepcopy(model.config.to_dict()) | changes)
    config._attn_implementation = model.config._attn_implementation
    new = type(model)(config).to(device=model.device, dtype=model.dtype)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))

    def is_of_experts(name: str) -> bool:
        return ".mlp.mol_" in name

    state = {name: value for name, value in model.state_dict().items() if not is_of_experts(name)}
    missing, surplus = new.load_state_dict(state, strict=False)
    lost = [name for name in missing if not is_of_experts(name)] + surplus
    if lost:
        raise ValueError(f"{', '.join(lost[:SHOWN_NAMES])} cannot be copied to a model with {changes}.")
    return new.eval()


@torch.no_grad()
def with_one_expert(model: PreTrainedModel, experts: dict[int, Experts]) -> PreTrainedModel:
    """Build the model with one expert in place of E, by group, and without a router."""
    (rank,) = {expert.A_in.shape[1] for expert in experts.values()}
    new = copy_with(model, num_experts=1, lora_rank=rank, lora_alpha=rank)
    for k, expert in experts.items():
        for parameter, value in zip(new.base_model.groups[k].mlp.experts[:4], expert[:4]):
            parameter.copy_(value)
    return new


@torch.no_grad()
def fold(base: nn.Module, factors: Factors) -> nn.Module:
    """Copy `base` and add the low-rank products to the weights: the plain model's graph."""
    model = copy.deepcopy(base)
    for path, (A, B) in factors.items():
        module = model.get_submodule(path)
        delta = (B.double() @ A.double()).to(module.weight.device)
        module.weight.copy_(module.weight.double() + (delta.T if isinstance(module, Conv1D) else delta))
    return model


def write_stock_lora(
    folder: Path,
    factors: Factors,
    base_model_name: str | None,
    task_type: str | None = None,
    heads: dict[str, torch.Tensor] | None = None,
    modules_to_save: Sequence[str] | None = None,
    is_conv1d: bool = False,
) -> None:
    """
    Write factors as a `LoraConfig` checkpoint, which peft loads with none of this code.

    Args:
        folder: Is made if it is not there.
        base_model_name: What the adapter calls its base.
        task_type: peft's; its Auto classes find the base's class by it.
        heads: State of the modules that the adapter brings along whole.
        modules_to_save: Their names.
        is_conv1d: Whether the factors are for modules of GPT-2's kind, whose weights are transposed.
    """
    (rank,) = {A.shape[0] for A, _ in factors.values()}
    state = dict(heads or {})
    for path, (A, B) in factors.items():
        state |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    config = LoraConfig(
        # alpha = rank: the scale is in the factors already. Full paths: a bare "Wo" would hit attention too.
        r=rank,
        lora_alpha=rank,
        target_modules=list(factors),
        modules_to_save=modules_to_save or None,
        fan_in_fan_out=is_conv1d,
        task_type=task_type,
        base_model_name_or_path=base_model_name,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    # A copy of each: safetensors refuses tensors that share memory, as gate and up do their A.
    tensors = {f"base_model.model.{name}": x.detach().cpu().contiguous().clone() for name, x in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
