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
Experts into and out of MoL adapters: merged into one, written as a stock LoRA, made from stock LoRAs, added to.

All functions take a `MoLModel`; its methods of the same names are how they are called.
"""

import inspect
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_peft_available

from .merge_methods import MERGE_METHODS, MergedExpert, MergeSettings, merge_factors
from .modeling_mol import Experts, summarise_routing
from .routing_observer import RoutingObserver, mol_layers, token_mask


if is_peft_available():
    from peft import LoraConfig, PeftConfig
    from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, load_peft_weights
    from peft.utils.other import get_pattern_key


FACTORS = Experts._fields[:4]
# The logit of a new expert: so far below the usual that practically no token is sent there.
NEW_EXPERT_BIAS = -10.0


def find_adapter(tuner: nn.Module, adapter_name: str | None) -> str:
    """
    The name of an adapter; None = the active one.

    Raises:
        ValueError: there is none of that name.
    """
    adapter_name = adapter_name or tuner.active_adapters[0]
    if adapter_name not in tuner.peft_config:
        names = ", ".join(map(repr, tuner.peft_config))
        raise ValueError(f"adapter_name={adapter_name!r} is not allowed: the adapters are {names}.")
    return adapter_name


def layers_of(tuner: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """The layers that have the adapter, by name."""
    return {name: layer for name, layer in mol_layers(tuner.model) if adapter_name in layer.mol_config}


# --- merging ---------------------------------------------------------------------------------------------------------


@dataclass
class MoLMergeReport:
    """
    What merging an adapter did.

    Attributes:
        adapter_name: Of the merged adapter.
        layer_weights: The experts' weights, by layer.
        energy_kept: Share of the merged deltas' squared norm that is kept, (first, last) projections, by layer.
        measured_on: What the errors were measured on.
        relative_error_of_output: |merged - routed| / |routed|, of the model's logits (or last states).
        loss_before, loss_after: Mean loss of the calibration batches that have labels.
    """

    adapter_name: str
    method: str
    weights: str
    rank: int
    layer_weights: dict[str, list[float]]
    energy_kept: dict[str, list[float]]
    measured_on: str
    relative_error_of_output: float
    loss_before: float | None = None
    loss_after: float | None = None


def merge_experts(
    tuner: nn.Module,
    weights: str | Sequence[float] = "ema",
    method: str = "linear",
    rank: int | None = None,
    adapter_name: str | None = None,
    new_adapter_name: str | None = None,
    calibration: Sequence[dict] | None = None,
    density: float | None = None,
) -> MoLMergeReport:
    """
    Replace an adapter's E experts by one LoRA on all projections of the FFN, by default Delta = sum_e w_e Delta_e.

    That is exact for one expert, and where the adapter ran with `expert_mixing="ema"` or "uniform" and is merged with
    the same weights; otherwise the routing depended on the token, and the report measures what is lost.

    Args:
        weights: "uniform" (1/E), "ema" (the moving average of the routing), "calibration" (mean routing weights on the
            calibration batches), or E numbers.
        method: "linear" (exact sum, rank E r), "svd" (best of `rank`, by default r), "ties" or "dare".
        adapter_name: Which adapter; None = the active one.
        new_adapter_name: Keep it, and add the merged one under this name; None = in its place.
        calibration: Batches of model inputs to measure on; None = random inputs, and the report says so.
        density: Of "ties" and "dare": the share of each delta's numbers that stays; None = 0.5.

    Raises:
        ValueError: there is no such adapter, or weights, method, rank or density are not allowed.
    """
    adapter_name = find_adapter(tuner, adapter_name)
    if new_adapter_name in tuner.peft_config:
        raise ValueError(f"new_adapter_name={new_adapter_name!r} is not allowed: there is an adapter of that name.")
    if method not in MERGE_METHODS:
        raise ValueError(f"method={method!r} is not allowed: it must be one of {', '.join(map(repr, MERGE_METHODS))}.")
    layers = layers_of(tuner, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"adapter_name={adapter_name!r} is not allowed: it is merged into the base; unmerge it first.")
    batches, measured_on = measuring_batches(tuner.model, calibration)
    layer_weights = resolve_weights(tuner, weights, adapter_name, layers, calibration)
    settings = MergeSettings(rank, density)
    merged: dict[str, MergedExpert] = {}
    with only(tuner.model, adapter_name):
        before = measure(tuner.model, batches)
        for name, layer in layers.items():
            merged[name] = merge_factors(method, layer.experts(adapter_name), layer_weights[name], settings)
    new_rank = next(iter(merged.values())).expert.A_in.shape[1]
    target = new_adapter_name or adapter_name
    config = replace(
        tuner.peft_config[adapter_name],
        num_experts=1,
        num_experts_per_tok=1,
        num_frozen_experts=0,
        router_bias=False,
        r=new_rank,
        lora_alpha=new_rank,
    )
    set_experts(tuner, target, config, {name: result.expert for name, result in merged.items()})
    copy_modules_to_save(tuner.model, adapter_name, target)
    with only(tuner.model, target):
        after = measure(tuner.model, batches)
    return MoLMergeReport(
        adapter_name=target,
        method=method,
        weights=weights if isinstance(weights, str) else "explicit",
        rank=new_rank,
        layer_weights={name: value.tolist() for name, value in layer_weights.items()},
        energy_kept={name: [result.energy_in, result.energy_out] for name, result in merged.items()},
        measured_on=measured_on,
        relative_error_of_output=relative_error(before.outputs, after.outputs),
        loss_before=before.loss,
        loss_after=after.loss,
    )


@torch.no_grad()
def copy_modules_to_save(model: nn.Module, source: str, target: str) -> None:
    """Give an adapter the trained heads of another."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and source in module.modules_to_save and source != target:
            module.update(target)
            module.modules_to_save[target].load_state_dict(module.modules_to_save[source].state_dict())
            module.modules_to_save[target].requires_grad_(False)


@torch.no_grad()
def set_experts(tuner: nn.Module, adapter_name: str, config, experts: dict[str, Experts]) -> None:
    """Give an adapter a configuration and these experts, by layer; it is made if there is none of that name."""
    tuner.peft_config[adapter_name] = config
    for name, layer in mol_layers(tuner.model):
        if name not in experts:
            continue
        trainable = {parameter: parameter.requires_grad for parameter in layer.parameters()}
        dtypes = {p.dtype for key, p in layer.named_parameters() if key.startswith("mol_")}
        layer.update_layer(adapter_name, config)
        for key, parameter in layer.named_parameters():
            if key.startswith("mol_") and key.split(".")[1] == adapter_name:
                # It was made in the base's dtype; an adapter has its own.
                parameter.data = parameter.data.to(next(iter(dtypes), torch.float32))
        layer.load_experts(adapter_name, experts[name])
        is_new_trainable = adapter_name in layer.active_adapters and any(trainable.values())
        for parameter in layer.parameters():
            parameter.requires_grad_(trainable.get(parameter, is_new_trainable))
        layer.freeze_idle_weights()


def resolve_weights(
    tuner: nn.Module,
    weights: str | Sequence[float],
    adapter_name: str,
    layers: dict[str, nn.Module],
    calibration: Sequence[dict] | None,
) -> dict[str, torch.Tensor]:
    """The (E,) mixing weights of each layer."""
    num_experts = tuner.peft_config[adapter_name].num_experts
    if not isinstance(weights, str):
        weights = torch.tensor(list(weights), dtype=torch.float32)
        if len(weights) != num_experts or not weights.isfinite().all():
            raise ValueError(f"weights={weights.tolist()} is not allowed: it must be {num_experts} finite numbers.")
        return {name: weights.to(layer.output_projection.weight.device) for name, layer in layers.items()}
    if weights not in ("uniform", "ema", "calibration"):
        raise ValueError(
            f"weights={weights!r} is not allowed: it must be 'uniform', 'ema', 'calibration' or {num_experts} numbers."
        )
    if weights == "calibration" and not calibration:
        raise ValueError("weights='calibration' is not allowed without calibration batches.")
    if weights != "calibration" or num_experts == 1:
        return {name: layer.expert_weights(adapter_name, weights) for name, layer in layers.items()}
    totals = dict.fromkeys(layers, 0)
    observer = RoutingObserver.detach(tuner.model)  # it would take the records away
    try:
        with only(tuner.model, adapter_name), torch.no_grad():
            for batch in calibration:
                for layer in layers.values():
                    layer.recorded = []
                tuner.model(**batch)
                for name, layer in layers.items():
                    k = layer.mol_config[adapter_name].num_experts_per_tok
                    for logits in layer.recorded:
                        mask = token_mask(tuner.model, name, logits, batch)
                        summary = summarise_routing((logits,), k, mask)
                        totals[name] = totals[name] + summary.usage[0] * summary.num_tokens
    finally:
        for layer in layers.values():
            layer.recorded = None
        if observer is not None:
            observer.attach(tuner.model)
    unused = [name for name, total in totals.items() if not isinstance(total, torch.Tensor)]
    if unused:
        raise ValueError(f"The calibration batches do not reach {unused[0]}: weights='calibration' cannot be measured.")
    return {name: total / total.sum() for name, total in totals.items()}


@contextmanager
def only(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Evaluation mode with one adapter active; everything is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    layers = [layer for _, layer in mol_layers(model)]
    heads = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper) and adapter_name in m.modules_to_save]
    active = {module: (module._active_adapter, module._disable_adapters) for module in (*layers, *heads)}
    model.eval()
    for module in active:
        module._active_adapter, module._disable_adapters = [adapter_name], False
    try:
        yield
    finally:
        for layer, (name, disabled) in active.items():
            layer._active_adapter, layer._disable_adapters = name, disabled
        for module, mode in modes.items():
            module.training = mode


def measuring_batches(model: nn.Module, calibration: Sequence[dict] | None) -> tuple[list[dict], str]:
    """What errors are measured on, and its name."""
    if calibration is None:
        return [random_inputs(model)], "random inputs (no calibration batches given)"
    if not list(calibration):
        raise ValueError("calibration=[] is not allowed: it must hold at least one batch.")
    return list(calibration), "the calibration batches"


class Measurement(NamedTuple):
    """What a model said to some batches."""

    outputs: list[torch.Tensor]
    loss: float | None


@torch.no_grad()
def measure(model: nn.Module, batches: list[dict]) -> Measurement:
    """The model's logits, or else its first tensor, for each batch, and its mean loss where there are labels."""
    outputs, losses = [], []
    for batch in batches:
        output = model(**batch)
        output = dict(output.items()) if hasattr(output, "items") else dict(enumerate(output))
        loss = output.pop("loss", None)
        losses += [] if loss is None else [loss.item()]
        states = output.get("logits", next(value for value in output.values() if isinstance(value, torch.Tensor)))
        outputs.append(states.float())
    return Measurement(outputs, sum(losses) / len(losses) if losses else None)


def warn_of_loss(tuner: nn.Module, adapter_name: str) -> None:
    """Say what folding an adapter's experts into the base changes, measured, where it is not exact."""
    config = tuner.peft_config.get(adapter_name)
    if config is None or not config.is_routed or config.expert_mixing != "token":
        return
    layers = [layer for layer in layers_of(tuner, adapter_name).values() if not layer.merged]
    if not layers:
        return
    try:
        batches, measured_on = measuring_batches(tuner.model, None)
        with only(tuner.model, adapter_name):
            before = measure(tuner.model, batches).outputs
            for layer in layers:
                layer.mol_config[adapter_name] = replace(config, expert_mixing="ema")
            after = measure(tuner.model, batches).outputs
        change = f"the model's output changes by {100 * relative_error(before, after):.2f} % on {measured_on}"
    except Exception as error:  # a model may take inputs that nobody here can make up; it can be merged all the same
        change = f"by how much could not be measured ({type(error).__name__})"
    finally:
        for layer in layers:
            layer.mol_config[adapter_name] = config
    warnings.warn(
        f"Merging the {config.num_experts} experts of adapter {adapter_name!r} is not exact, because their weights "
        f"depend on the token: {change}. merge_experts(calibration=...) measures it on batches of yours.",
        stacklevel=4,
    )


def relative_error(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """|after - before| / |before| over all batches."""
    difference = sum((b - a).square().sum().item() for a, b in zip(before, after))
    return (difference / max(sum(a.square().sum().item() for a in before), 1e-30)) ** 0.5


def random_inputs(model: nn.Module, batch_size: int = 4, length: int = 32) -> dict[str, torch.Tensor]:
    """
    Inputs of the right form with nothing in them, always the same.

    Raises:
        ValueError: the model takes something else than token ids, pixels or audio features.
    """
    generator = torch.Generator().manual_seed(0)
    config, device = getattr(model, "config", None), next(model.parameters()).device
    text = getattr(config, "text_config", None) or config
    vision = getattr(config, "vision_config", None) or config
    names = inspect.signature(model.forward).parameters
    length = min(length, getattr(text, "max_position_embeddings", length))
    inputs = {}
    if "input_features" in names and hasattr(config, "num_mel_bins"):
        shape = (batch_size, config.num_mel_bins, 2 * config.max_source_positions)
        inputs["input_features"] = torch.randn(shape, generator=generator)
    elif "input_ids" in names and hasattr(text, "vocab_size"):
        inputs["input_ids"] = torch.randint(text.vocab_size, (batch_size, length), generator=generator)
    if "pixel_values" in names and hasattr(vision, "image_size"):
        size = vision.image_size if isinstance(vision.image_size, list | tuple) else [vision.image_size] * 2
        shape = (batch_size, getattr(vision, "num_channels", 3), *size)
        inputs["pixel_values"] = torch.randn(shape, generator=generator)
    if "input_values" in names:  # a waveform
        inputs["input_values"] = torch.randn((batch_size, 4000), generator=generator)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.randint(text.vocab_size, (batch_size, length), generator=generator)
    if not inputs:
        raise ValueError(f"{type(model).__name__} takes inputs of its own kind: give calibration batches.")
    return {name: value.to(device) for name, value in inputs.items()}


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
    state = {f"base_model.model.{name}": value for name, value in state.items() if ".mol_" not in name}
    targets, is_conv1d = [], False
    for name, layer in layers_of(tuner, adapter_name).items():
        experts = layer.experts(adapter_name)
        parts = list(zip(layer.projection_names.inputs, experts.B_in[0].split(layer.input_widths)))
        parts = [(path, experts.A_in[0], B) for path, B in parts]
        for path, A, B in (*parts, (layer.projection_names.output, experts.A_out[0], experts.B_out[0])):
            # Full paths: a bare "Wo" would hit attention too.
            targets.append(f"{name}.{path}")
            state[f"base_model.model.{name}.{path}.lora_A.weight"] = A.detach()
            state[f"base_model.model.{name}.{path}.lora_B.weight"] = B.detach()
            is_conv1d |= isinstance(layer.get_base_layer().get_submodule(path), Conv1D)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        modules_to_save=config.modules_to_save,
        fan_in_fan_out=is_conv1d,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(
            {name: value.cpu().contiguous().clone() for name, value in state.items()},
            temporary / "adapter_model.safetensors",
        )
        lora.save_pretrained(temporary)
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


# --- from stock LoRAs ------------------------------------------------------------------------------------------------


# What makes a LoRA more than a sum of low-rank deltas on the base it names.
PLAIN_LORA = {"use_dora": False, "bias": "none", "lora_bias": False, "layer_replication": None}


class StockLoRA(NamedTuple):
    """A stock LoRA checkpoint: its factors by module of the base, with the scale folded into B."""

    folder: str
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]  # (r, inputs), (outputs, r)


def read_lora(folder: str | Path) -> StockLoRA:
    """
    Read a `LoraConfig` checkpoint, from a folder or the Hub.

    Raises:
        ValueError: it is none, or is of a kind that is no sum of low-rank deltas (DoRA, biases).
    """
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder} is a {config.peft_type.value} adapter: an expert is made from a LoRA.")
    for option, plain in PLAIN_LORA.items():
        if getattr(config, option, plain) not in (plain, None):
            raise ValueError(f"{folder} has {option}={getattr(config, option)!r}: an expert is a plain LoRA.")
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
    The factors of one expert of a layer, exactly as the LoRA has them: gate and up get ranks of their own in A_in.

    Returns:
        A_in (R, d), B_in (n, R), A_out (S, f), B_out (d, S), with R and S as the LoRA has them (0 = not adapted).
    """
    As, Bs = [], []
    for path, width in zip(layer.projection_names.inputs, layer.input_widths):
        A, B = lora.factors.get(f"{name}.{path}", (torch.zeros(0, layer.hidden_size), torch.zeros(width, 0)))
        As.append(A)
        Bs.append(B)
    nothing = (torch.zeros(0, layer.width), torch.zeros(layer.output_size, 0))
    A_out, B_out = lora.factors.get(f"{name}.{layer.projection_names.output}", nothing)
    parts = torch.cat(As), torch.block_diag(*Bs), A_out, B_out
    expected = (layer.hidden_size, sum(layer.input_widths), layer.width, layer.output_size)
    found = (parts[0].shape[1], parts[1].shape[0], parts[2].shape[1], parts[3].shape[0])
    if found != expected:
        raise ValueError(f"{lora.folder} does not fit {name}: its widths are {found}, and the model's are {expected}.")
    return parts


def leading_direction(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The unit input direction (d,) that B A amplifies most, from the factors alone; zeros where B A is zero."""
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


# --- growing ---------------------------------------------------------------------------------------------------------


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
