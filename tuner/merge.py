# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A MoL adapter's experts merged into one, and the adapter on any base loaded from folders."""

import contextlib
import copy
import importlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from modernalbert import modeling_modernalbert
from modernalbert.cli.errors import UserError, error_message
from modernalbert.export.plain_model import check_plain_weights
from modernalbert.merging.ffn_recorder import evaluation_mode
from modernalbert.merging.fold import Factors, fold
from modernalbert.merging.merge import ExpertSource, merge_layers
from modernalbert.merging.methods import MergedExpert, MergeSettings
from modernalbert.merging.recovery import RecoverySettings
from modernalbert.merging.report import MergeReport, auto_class_of
from modernalbert.modeling_mol import summarise_routing
from modernalbert.mol_backends import Experts
from modernalbert.tuner.config import MOL, MoLConfig
from modernalbert.tuner.experts import copy_modules_to_save, find_adapter, layers_of, set_experts
from modernalbert.tuner.layer import MoLLayer
from modernalbert.tuner.lora import projection_factors
from modernalbert.tuner.observer import mol_layers, recording, token_mask


logger = logging.getLogger(__name__)

# Of the adapter that holds the merged experts until they take the place of the routed ones.
TEMPORARY_NAME = "merged_experts"


class AdapterExperts(ExpertSource):
    """
    The experts of a MoL adapter; the merged ones are an adapter of one expert beside it.

    Args:
        adapter_name: None = the active one.
        merged_name: Name of the merged adapter; None = a temporary one.

    Raises:
        ValueError: there is no adapter of that name, there is one of the merged name, or it is merged into the base.
    """

    def __init__(self, tuner: nn.Module, adapter_name: str | None, merged_name: str | None = None):
        self.tuner, self.model = tuner, tuner.model
        self.adapter_name = find_adapter(tuner, adapter_name)
        self.merged_name = merged_name or TEMPORARY_NAME
        if self.merged_name in tuner.peft_config:
            raise ValueError(f"new_adapter_name={merged_name!r} is not allowed: there is an adapter of that name.")
        self.layers = layers_of(tuner, self.adapter_name)
        self.config = tuner.peft_config[self.adapter_name]
        merged = {name for _, layer in mol_layers(self.model) for name in layer.merged_adapters}
        if merged:
            raise ValueError(
                f"adapter_name={self.adapter_name!r} is not allowed: {', '.join(sorted(map(repr, merged)))} is merged "
                "into the base; unmerge it first."
            )
        self.experts = {name: layer.experts(self.adapter_name) for name, layer in self.layers.items()}

    def moving_average(self) -> dict[str, torch.Tensor]:
        return {name: layer.expert_weights(self.adapter_name, "ema") for name, layer in self.layers.items()}

    @torch.no_grad()
    def measure_usage(self, batches: Sequence[dict]) -> dict[str, torch.Tensor]:
        if self.config.expert_mixing != "token":
            mixing = self.config.expert_mixing
            return {name: layer.expert_weights(self.adapter_name, mixing) for name, layer in self.layers.items()}
        totals: dict[str, torch.Tensor] = {}
        with single_active_adapter(self.model, self.adapter_name):
            for batch in batches:
                with recording(self.model) as router_logits:
                    self.model(**batch)
                for name, uses in router_logits.items():
                    for logits in uses:
                        mask = token_mask(self.model, name, logits, batch)
                        summary = summarise_routing((logits,), self.config.num_experts_per_tok, mask)
                        totals[name] = totals.get(name, 0) + summary.usage[0] * summary.num_tokens
        unused = [name for name in self.layers if name not in totals or not totals[name].sum()]
        if unused:
            raise ValueError(
                f"The calibration batches do not reach {unused[0]}: weights='calibration' cannot be measured."
            )
        return {name: total / total.sum() for name, total in totals.items()}

    def fit(
        self, weights: dict[str, torch.Tensor], batches: Sequence[dict], rank: int | None
    ) -> dict[str, MergedExpert]:
        raise ValueError("method='calibrated' is not allowed for an adapter: it fits a ModernALBERT's own experts.")

    def make_trainable(self, experts: dict[str, Experts]) -> dict[str, Experts]:
        self._set(self.merged_name, experts)
        mine = {name: layer.experts(self.merged_name) for name, layer in self.layers.items()}
        for expert in mine.values():
            for factor in expert[:4]:
                factor.requires_grad_(True)
        return mine

    def finish(self, report: MergeReport, experts: dict[str, Experts]) -> None:
        self._set(self.merged_name, experts)

    def replace_routed(self) -> None:
        """Put the merged adapter in the place of the routed one."""
        self._set(self.adapter_name, {name: layer.experts(self.merged_name) for name, layer in self.layers.items()})
        self.remove_merged()

    def remove_merged(self) -> None:
        if self.merged_name in self.tuner.peft_config:
            self.tuner.delete_adapter(self.merged_name)

    def _set(self, adapter_name: str, experts: dict[str, Experts]) -> None:
        (rank,) = {expert.A_in.shape[1] for expert in experts.values()}
        one = {"num_experts": 1, "num_experts_per_tok": 1, "num_frozen_experts": 0, "router_bias": False}
        config = replace(self.config, **one, r=rank, lora_alpha=rank)
        copied = {name: Experts(*(x.detach().clone() for x in e[:4]), e.scaling) for name, e in experts.items()}
        set_experts(self.tuner, adapter_name, config, copied, source=self.adapter_name)
        copy_modules_to_save(self.model, self.adapter_name, adapter_name)

    def evaluating(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # `run` sees to it

    def run(self, batch: dict, merged: bool) -> Any:
        with single_active_adapter(self.model, self.merged_name if merged else self.adapter_name):
            return self.model(**batch)

    def main_tensor(self, output: Any) -> torch.Tensor:
        if isinstance(output, torch.Tensor):
            return output
        values = dict(output.items()) if hasattr(output, "items") else dict(enumerate(output))
        tensors = (x for name, x in values.items() if name != "loss" and isinstance(x, torch.Tensor))
        return values["logits"] if "logits" in values else next(tensors)

    def token_mask(self, x: torch.Tensor, batch: dict) -> torch.Tensor | None:
        return token_mask(self.model, "decoder", x, batch)

    def factors(self, experts: dict[str, Experts]) -> Factors:
        return projection_factors(self.layers, experts)


def merge_experts(
    tuner: nn.Module,
    weights: str | Sequence[float] | None = None,
    method: str = "linear",
    rank: int | None = None,
    adapter_name: str | None = None,
    new_adapter_name: str | None = None,
    calibration: Iterable[dict] | None = None,
    density: float | None = None,
) -> MergeReport:
    """
    Replace an adapter's E experts by one LoRA on all projections of the FFN, in the model itself; `merge_experts` of
    `modernalbert.merge_experts` leaves the model as it is, and says what the arguments mean.

    Args:
        adapter_name: Which adapter; None = the active one.
        new_adapter_name: Keep it, and add the merged one under this name; None = in its place.

    Returns:
        A report without models.

    Raises:
        ValueError: there is no such adapter, or an argument is not allowed.
    """
    source = AdapterExperts(tuner, adapter_name, new_adapter_name)
    try:
        report = merge_layers(source, weights, method, MergeSettings(rank, density), calibration)
    except Exception:
        source.remove_merged()
        raise
    if new_adapter_name is None:
        source.replace_routed()
    return report


def merge_adapter(
    model: PeftModel,
    weights: str | Sequence[float] | None,
    method: str,
    settings: MergeSettings,
    calibration: Iterable[dict] | None,
    measure_on: Iterable[dict] | None,
    recovery: RecoverySettings,
) -> MergeReport:
    """
    Merge the experts of a model's active MoL adapter, and fold them into a copy of the base; the model stays as it is.

    Raises:
        ValueError: the adapter is no MoL, its base is not plain, or an argument is not allowed.
    """
    kinds = {name: getattr(c.peft_type, "value", c.peft_type) for name, c in model.peft_config.items()}
    if kinds[model.active_adapter] != MOL:
        raise ValueError(
            f"model is a PeftModel whose active adapter is a {kinds[model.active_adapter]}: merge_and_unload it first, "
            "and give merge_experts what comes of it, if that has experts."
        )
    check_plain_weights(model)
    others = [name for name, module in model.named_modules() if is_of_another_adapter(module)]
    if others:
        raise ValueError(
            f"{others[0]} has an adapter of another type, which the merged model would lose: merge or remove it first."
        )
    source = AdapterExperts(model.base_model, model.active_adapter)
    for name, layer in source.layers.items():
        for projection in (*layer.input_projections, layer.output_projection):
            if not isinstance(getattr(projection, "weight", None), nn.Parameter):
                raise ValueError(
                    f"{name} has a {type(projection).__name__}, which is quantised: load the base in floating point to "
                    "fold an adapter into it."
                )
    try:
        report = merge_layers(source, weights, method, settings, calibration, measure_on, recovery)
    finally:
        source.remove_merged()
    report.base = copy.deepcopy(model).unload().eval()
    report.model = fold(report.base, report.factors)
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and model.active_adapter in module.modules_to_save:
            report.heads[path] = copy.deepcopy(module.modules_to_save[model.active_adapter])
            parent, _, name = path.rpartition(".")
            setattr(report.model.get_submodule(parent), name, copy.deepcopy(report.heads[path]))
    report.task_type = source.config.task_type
    report.parameters_before = sum(parameter.numel() for parameter in model.parameters())
    report.parameters_after = sum(parameter.numel() for parameter in report.model.parameters())
    return report


def is_of_another_adapter(module: nn.Module) -> bool:
    """Return whether a module is a layer of an adapter that is no MoL."""
    return isinstance(module, BaseTunerLayer) and not isinstance(module, MoLLayer)


@contextlib.contextmanager
def single_active_adapter(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Evaluation mode with one adapter active; everything is put back afterwards."""
    layers = [layer for _, layer in mol_layers(model)]
    heads = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper) and adapter_name in m.modules_to_save]
    active = {module: (module._active_adapter, module._disable_adapters) for module in (*layers, *heads)}
    for module in active:
        module._active_adapter, module._disable_adapters = [adapter_name], False
    try:
        with evaluation_mode(model):
            yield
    finally:
        for module, (name, disabled) in active.items():
            module._active_adapter, module._disable_adapters = name, disabled


# --- loading ---------------------------------------------------------------------------------------------------------


def load_adapter(base: str, adapter: str) -> PeftModel:
    """
    Load a base with a MoL adapter, both from folders or the Hub, in evaluation mode.

    Raises:
        UserError: one of them cannot be loaded, they do not belong together, or the adapter is of another kind.
    """
    made_for = None
    try:
        config = PeftConfig.from_pretrained(adapter)
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != MOL:
            raise UserError(f"--adapter_name_or_path {adapter} is not a MoL adapter: its peft_type is {kind}.")
        made_for = config.base_model_name_or_path
        model = load_base(base, config, load_peft_weights(adapter, device="cpu"))
        model = PeftModel.from_pretrained(model, adapter).eval()
    except UserError:
        raise
    except Exception as error:  # a broken file makes the libraries raise anything, KeyError and TypeError too
        kind = "" if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: "
        message = f"--adapter_name_or_path {adapter} on {base} cannot be loaded: {kind}{error_message(error)}"
        if isinstance(made_for, str) and made_for not in message.replace(base, ""):
            message = f"{message.rstrip('.')}. The adapter was made for {made_for}."
        raise UserError(message) from None
    if made_for and made_for != base:
        logger.warning(f"{adapter} was made for {made_for}, and is merged on {base}.")
    return model


def load_base(name: str, config: MoLConfig, adapter_state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """
    Load the base as the class that the adapter was trained on, or else the one that its own configuration names.

    Raises:
        UserError: weights are neither in the base nor in the adapter.
    """
    made_on = config.auto_mapping or {}
    auto_class = auto_class_of(config.task_type)
    if auto_class is not None:
        model_class = getattr(transformers, auto_class)
    elif made_on:
        model_class = getattr(importlib.import_module(made_on["parent_library"]), made_on["base_model_class"])
    else:
        architecture = (AutoConfig.from_pretrained(name).architectures or ["AutoModel"])[0]
        model_class = getattr(modeling_modernalbert, architecture, None) or getattr(transformers, architecture)
    # A head that came with the adapter says how many labels there are.
    heads = [values for key, values in adapter_state.items() if key.endswith(("classifier.weight", "score.weight"))]
    labels = {"num_labels": heads[0].shape[0]} if heads else {}
    model, report = model_class.from_pretrained(name, dtype="auto", output_loading_info=True, **labels)
    brought = {key.removeprefix("base_model.model.") for key in adapter_state}
    # An encoder's pooler is often absent, and not used.
    absent = {key for key in report["missing_keys"] if model.base_model is not model or "pooler" not in key} - brought
    if absent:
        raise UserError(
            f"{name} has no {', '.join(sorted(absent)[:3])}, and the adapter does not bring what is missing: it would "
            "be random."
        )
    return model
