# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
The experts of a MoL adapter: found, replaced, added to.

All functions take a `MoLModel`; its methods of the same names are how they are called.
"""

from dataclasses import replace

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from modernalbert.mol_backends import Experts
from modernalbert.tuner.config import MoLConfig
from modernalbert.tuner.layer import FACTORS
from modernalbert.tuner.observer import mol_layers


# The logit of a new expert: so far below the usual that practically no token is sent there.
NEW_EXPERT_BIAS = -10.0


def find_adapter(tuner: nn.Module, adapter_name: str | None) -> str:
    """
    Find the name of an adapter; None = the active one.

    Raises:
        ValueError: there is none of that name.
    """
    adapter_name = adapter_name or tuner.active_adapters[0]
    if adapter_name not in tuner.peft_config:
        names = ", ".join(map(repr, tuner.peft_config))
        raise ValueError(f"adapter_name={adapter_name!r} is not allowed: the adapters are {names}.")
    return adapter_name


def layers_of(tuner: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """Return the layers that have the adapter, by name."""
    return {name: layer for name, layer in mol_layers(tuner.model) if adapter_name in layer.mol_config}


@torch.no_grad()
def copy_modules_to_save(model: nn.Module, source: str, target: str) -> None:
    """Give an adapter the trained heads of another."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and source in module.modules_to_save and source != target:
            module.update(target)
            module.modules_to_save[target].load_state_dict(module.modules_to_save[source].state_dict())
            module.modules_to_save[target].requires_grad_(False)


@torch.no_grad()
def set_experts(
    tuner: nn.Module, adapter_name: str, config: MoLConfig, experts: dict[str, Experts], source: str | None = None
) -> None:
    """
    Give an adapter a configuration and experts; it is made if there is none of that name.

    Args:
        experts: By layer.
        source: The adapter that they come from, whose dtype the new one gets; None = `adapter_name`.
    """
    tuner.peft_config[adapter_name] = config
    for name, layer in mol_layers(tuner.model):
        if name not in experts:
            continue
        trainable = {parameter: parameter.requires_grad for parameter in layer.parameters()}
        before = layer.adapter_parameters(source or adapter_name)
        dtype = before[0].dtype if before else torch.float32  # experts that are all frozen are float32
        layer.update_layer(adapter_name, config)
        for parameter in layer.adapter_parameters(adapter_name):
            # It was made in the base's dtype; an adapter has its own.
            parameter.data = parameter.data.to(dtype)
        layer.load_experts(adapter_name, experts[name])
        is_new_trainable = adapter_name in layer.active_adapters and any(trainable.values())
        for parameter in layer.parameters():
            parameter.requires_grad_(trainable.get(parameter, is_new_trainable))
        layer.freeze_idle_weights()


@torch.no_grad()
def add_experts(tuner: nn.Module, number: int, adapter_name: str | None = None) -> None:
    """
    Add experts to a trained adapter. Those it has are frozen from now on; the new ones add nothing, and their logits
    start so far below the usual that practically no token is sent to them: outputs are those of before until the router
    learns otherwise.

    Args:
        number: How many to add.

    Raises:
        ValueError: the number is not allowed, or the adapter is merged or has only one expert, and so no router.
    """
    adapter_name = find_adapter(tuner, adapter_name)
    config = tuner.peft_config[adapter_name]
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"number={number!r} is not allowed: it must be a whole number of at least 1.")
    if not config.is_routed:
        raise ValueError(f"Adapter {adapter_name!r} has one expert and no router: experts cannot be added to it.")
    if config.expert_mixing == "uniform":
        raise ValueError("expert_mixing='uniform' gives added experts weight at once: experts cannot be added to it.")
    layers = layers_of(tuner, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"Adapter {adapter_name!r} is merged into the base; unmerge it first.")
    old = config.num_experts
    grown = replace(config, num_experts=old + number, num_frozen_experts=old, router_bias=True)
    before = {
        name: (layer.experts(adapter_name), layer.mol_router[adapter_name], layer.mol_usage[adapter_name])
        for name, layer in layers.items()
    }
    experts = {}
    for name, (of_layer, _, _) in before.items():
        padded = []
        for part, factor in zip(FACTORS, of_layer[:4]):
            new = torch.zeros(number, *factor.shape[1:], dtype=factor.dtype, device=factor.device)
            if part.startswith("A"):
                new.uniform_(-(factor.shape[-1] ** -0.5), factor.shape[-1] ** -0.5)
            padded.append(torch.cat([factor.detach(), new]))
        experts[name] = Experts(*padded, of_layer.scaling)
    set_experts(tuner, adapter_name, grown, experts)
    for name, layer in layers.items():
        _, old_router, old_usage = before[name]
        router = layer.mol_router[adapter_name]
        router.weight[:old] = old_router.weight
        router.weight[old:] = 0
        router.bias[:old] = 0 if old_router.bias is None else old_router.bias
        router.bias[old:] = NEW_EXPERT_BIAS
        layer.mol_usage[adapter_name] = nn.functional.pad(old_usage, (0, number))
