# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Stock LoRAs out of MoL adapters, and MoL adapters out of stock LoRAs.

All functions take a `MoLModel`; its methods of the same names are how they are called.
"""

import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig
from peft.utils import PeftType, get_peft_model_state_dict, load_peft_weights
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from modernalbert.cli.output_folders import atomic_folder
from modernalbert.merging.fold import Factors, write_stock_lora
from modernalbert.mol_backends import Experts
from modernalbert.tuner.experts import find_adapter, layers_of, set_experts
from modernalbert.tuner.layer import is_adapter_key


# --- as a stock LoRA ---


def save_as_lora(tuner: nn.Module, folder: str | Path, adapter_name: str | None = None) -> Path:
    """
    Write an adapter of one expert as a stock `LoraConfig` checkpoint, which peft loads with none of this code.

    Args:
        folder: Must not exist, or be empty.
        adapter_name: Which adapter; None = the active one.

    Raises:
        ValueError: the adapter has several experts (call `merge_experts` first), or the folder is not empty.
    """
    adapter_name = find_adapter(tuner, adapter_name)
    config = tuner.peft_config[adapter_name]
    if config.num_experts > 1:
        raise ValueError(
            f"Adapter {adapter_name!r} has {config.num_experts} experts, a LoRA has one: call merge_experts first."
        )
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder.")
    state = get_peft_model_state_dict(tuner.model, adapter_name=adapter_name)
    layers = layers_of(tuner, adapter_name)
    projections = [p for layer in layers.values() for p in (*layer.input_projections, layer.output_projection)]
    with atomic_folder(folder, replaceable=()) as temporary:
        write_stock_lora(
            temporary,
            projection_factors(layers, {name: layer.experts(adapter_name) for name, layer in layers.items()}),
            config.base_model_name_or_path,
            config.task_type,
            {name: value for name, value in state.items() if not is_adapter_key(name)},
            config.modules_to_save,
            any(isinstance(projection, Conv1D) for projection in projections),
        )
    return folder


def projection_factors(layers: dict[str, nn.Module], experts: dict[str, Experts]) -> Factors:
    """Return the one expert (E = 1) of each layer as the low-rank factors of its projections."""
    factors = {}
    for name, expert in experts.items():
        names, B_in = layers[name].projection_names, expert.B_in[0] * expert.scaling
        for path, B in zip(names.inputs, B_in.split(layers[name].input_widths)):
            factors[f"{name}.{path}"] = expert.A_in[0], B
        factors[f"{name}.{names.output}"] = expert.A_out[0], expert.B_out[0] * expert.scaling
    return factors


# --- from stock LoRAs ------------------------------------------------------------------------------------------------


# Options that leave a LoRA a sum of low-rank deltas. Any other must have its default, those of later versions too.
PLAIN_OPTIONS = frozenset(
    "r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out use_rslora modules_to_save "
    "init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core "
    "loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config ensure_weight_tying".split()
)
# Initialisations that leave the base's weights as they are.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


class StockLoRA(NamedTuple):
    """A stock LoRA checkpoint: its factors by module of the base, with the scale folded into B."""

    folder: str
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]  # (r, inputs), (outputs, r)


def read_lora(folder: str | Path) -> StockLoRA:
    """
    Read a `LoraConfig` checkpoint, from a folder or the Hub.

    Raises:
        ValueError: it is none, or is of a kind that is no sum of low-rank deltas on the base's own weights (DoRA,
            biases, PiSSA).
    """
    config = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"{folder} is a {config.peft_type.value} adapter: an expert is made from a LoRA.")
    of_every_adapter = {option.name for option in fields(PeftConfig)}
    for option in fields(config):
        value = getattr(config, option.name)
        if option.name not in PLAIN_OPTIONS | of_every_adapter and value not in (option.default, None):
            raise ValueError(f"{folder} has {option.name}={value!r}: an expert is a plain LoRA.")
    if config.init_lora_weights not in PLAIN_STARTS:
        raise ValueError(
            f"{folder} has init_lora_weights={config.init_lora_weights!r}, which changes the base's weights: an expert "
            "is a plain LoRA, so save it with path_initial_model_for_weight_conversion first."
        )
    if config.modules_to_save:
        warnings.warn(
            f"{folder} also has {', '.join(config.modules_to_save)}: modules to save are left out.", stacklevel=4
        )
    weights = load_peft_weights(str(folder), device="cpu")
    factors = {}
    for key, A in weights.items():
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = A.shape[0]
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), path), config.lora_alpha)
        scale = alpha / (rank**0.5 if config.use_rslora else rank)
        factors[path] = A, weights[key.replace("lora_A", "lora_B")] * scale
    return StockLoRA(str(folder), factors)


def expert_from_lora(layer: nn.Module, name: str, lora: StockLoRA) -> tuple[torch.Tensor, ...]:
    """
    Return the factors of one expert of a layer, exactly as the LoRA has them: gate and up get ranks of their own in
    A_in.

    Returns:
        A_in (R, d), B_in (n, R), A_out (S, f), B_out (d, S), with R and S as the LoRA has them (0 = not adapted).
    """
    As, Bs = [], []
    for path, width in zip(layer.projection_names.inputs, layer.input_widths):
        A, B = lora.factors.get(f"{name}.{path}", (torch.zeros(0, layer.in_features), torch.zeros(width, 0)))
        As.append(A)
        Bs.append(B)
    nothing = (torch.zeros(0, layer.width), torch.zeros(layer.out_features, 0))
    A_out, B_out = lora.factors.get(f"{name}.{layer.projection_names.output}", nothing)
    parts = torch.cat(As), torch.block_diag(*Bs), A_out, B_out
    expected = (layer.in_features, sum(layer.input_widths), layer.width, layer.out_features)
    found = (parts[0].shape[1], parts[1].shape[0], parts[2].shape[1], parts[3].shape[0])
    if found != expected:
        raise ValueError(f"{lora.folder} does not fit {name}: its widths are {found}, and the model's are {expected}.")
    return parts


def leading_direction(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Return the unit input direction (d,) that B A amplifies most, from the factors alone; zeros where B A is zero."""
    if A.shape[0] == 0 or not B.any():
        return torch.zeros(A.shape[1])
    q, r = torch.linalg.qr(A.float().T)
    _, _, vh = torch.linalg.svd(torch.linalg.qr(B.float())[1] @ r.T)
    return q @ vh[0]


@torch.no_grad()
def experts_from_loras(tuner: nn.Module, folders: Sequence[str | Path], adapter_name: str | None = None) -> None:
    """
    Fill an adapter with one expert per stock LoRA, exactly, and a router that needs no training: a token goes to the
    experts whose leading input directions it lies along (the idea of Arrow, Ostapenko et al. 2024).

    The adapter's rank becomes the largest of the LoRAs'; smaller ones are padded with zeros. Train on to improve the
    router; with `num_frozen_experts` = E in the configuration, nothing else moves.

    Args:
        folders: One LoRA checkpoint per expert, made for this model.

    Raises:
        ValueError: their number is not that of the experts, one is no plain LoRA on this model's FFNs, or the adapter
            has `router_score="linear"`, which knows no direction without a sign.
    """
    adapter_name = find_adapter(tuner, adapter_name)
    config = tuner.peft_config[adapter_name]
    if any(adapter_name in layer.merged_adapters for layer in layers_of(tuner, adapter_name).values()):
        raise ValueError(f"Adapter {adapter_name!r} is merged into the base; unmerge it first.")
    if len(folders) != config.num_experts:
        raise ValueError(f"{len(folders)} LoRAs were given for num_experts={config.num_experts}.")
    if config.router_score != "absolute":
        raise ValueError(
            f"router_score={config.router_score!r} is not allowed here: it must be 'absolute', because a "
            "direction has no sign."
        )
    loras = [read_lora(folder) for folder in folders]
    layers = layers_of(tuner, adapter_name)
    parts = {name: [expert_from_lora(layer, name, lora) for lora in loras] for name, layer in layers.items()}
    paths = {f"{n}.{p}" for n, l in layers.items() for p in (*l.projection_names.inputs, l.projection_names.output)}
    for lora in loras:
        if not paths & lora.factors.keys():
            raise ValueError(
                f"{lora.folder} is not on this model's feed-forward networks, but on "
                f"{', '.join(sorted(lora.factors)[:3])}."
            )
        beside = sorted(lora.factors.keys() - paths)
        if beside:
            warnings.warn(
                f"{lora.folder} also adapts {len(beside)} modules outside of the feed-forward networks, as "
                f"{beside[0]}: that part is left out.",
                stacklevel=3,
            )
    rank = max(max(A_in.shape[0], A_out.shape[0]) for experts in parts.values() for A_in, _, A_out, _ in experts)

    def stack(factors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        missing = [rank - factor.shape[dim] for factor in factors]
        padding = ((0, 0, 0, n) if dim == 0 else (0, n) for n in missing)
        return torch.stack([nn.functional.pad(factor.float(), pad) for factor, pad in zip(factors, padding)])

    experts = {}
    for name, of_layer in parts.items():
        A_in, B_in, A_out, B_out = zip(*of_layer)
        experts[name] = Experts(stack(A_in, 0), stack(B_in, 1), stack(A_out, 0), stack(B_out, 1), 1.0)
    set_experts(tuner, adapter_name, replace(config, r=rank, lora_alpha=rank), experts)
    for name, layer in layers.items():
        if config.is_routed:
            directions = torch.stack([leading_direction(A, B) for A, B, _, _ in parts[name]])
            layer.mol_router[adapter_name].weight.copy_(directions)
