# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A model with a Mixture of LoRAs on its feed-forward networks: injection, state, and the type registered with peft."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, NoMatchingPeftModuleError
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, register_peft_method
from torch import nn

from modernalbert.tuner.config import MOL, MOL_VERSION, MoLConfig
from modernalbert.tuner.experts import add_experts
from modernalbert.tuner.ffn_call import BASE, group_rows, names_of_rows, row_adapters
from modernalbert.tuner.layer import FACTORS, MoLLayer, is_adapter_key
from modernalbert.tuner.lora import experts_from_loras, save_as_lora
from modernalbert.tuner.merge import merge_experts
from modernalbert.tuner.observer import RoutingObserver, mol_layers
from modernalbert.tuner.projections import TARGET_MODULES, ffn_modules, find_projections


# --- the model -------------------------------------------------------------------------------------------------------


class MoLModel(BaseTuner):
    """
    A model with a Mixture of LoRAs on its feed-forward networks ("Improving Recursive Transformers with Mixture of
    LoRAs", arXiv 2512.12880). Made by `peft.get_peft_model(model, MoLConfig(...))`.

    An FFN that a recursive model uses at several depths is adapted once, and routed at each use.

    Args:
        model: Any transformer.
        peft_config: Its [`MoLConfig`].
        adapter_name: Name of the adapter.
    """

    prefix = "mol_"
    tuner_layer_cls = MoLLayer
    target_module_mapping = TARGET_MODULES

    @staticmethod
    def _check_target_module_exists(peft_config: MoLConfig, key: str) -> bool:
        match = check_target_module_exists(peft_config, key)
        layers = peft_config.layers_to_transform
        if match is not True and isinstance(peft_config.target_modules, str) and match and layers is not None:
            # peft asks for the layer's number only where targets are a list.
            patterns = peft_config.layers_pattern or [r"[^.]*"]
            patterns = [patterns] if isinstance(patterns, str) else patterns
            found = next(filter(None, (re.search(rf"(?:^|\.){p}\.(\d+)(?:\.|$)", key) for p in patterns)), None)
            return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)
        return match

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        config = self.peft_config[adapter_name]
        self._prepare_adapter_config(config, self.get_model_config(model))
        # All is looked at before anything is changed.
        inside = tuple(f"{name}." for name, _ in mol_layers(model))
        for name, module in model.named_modules():
            if name and not name.startswith(inside) and not isinstance(module, MoLLayer):
                if self._check_target_module_exists(config, name):
                    find_projections(module, name, config.ffn_projections)
        if config.mol_version is None:  # a configuration that was loaded says itself what is saved beside the adapter
            config.modules_to_save = with_new_heads(model, config)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingPeftModuleError(f"{error} {describe_ffns(model)}") from None
        if config.mol_version is None:
            config.mol_version = MOL_VERSION

    def _prepare_adapter_config(self, peft_config: MoLConfig, model_config: dict) -> MoLConfig:
        if peft_config.target_modules is None and model_config["model_type"] not in self.target_module_mapping:
            raise ValueError(
                f"target_modules must name the modules that hold a feed-forward network: there is no default for "
                f"models of type {model_config['model_type']!r}. {describe_ffns(self.model)}"
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(
        self,
        peft_config: MoLConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, MoLLayer):
            target.update_layer(adapter_name, peft_config)
            return
        names = find_projections(target, current_key, peft_config.ffn_projections)
        layer = MoLLayer(target, names, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        layer.train(target.training)
        setattr(parent, target_name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Only ever called to give the original back, of a layer or of a module to save.
        if isinstance(child, MoLLayer):
            child.remove_hooks()
        setattr(parent, child_name, new_module)

    def _post_injection_hook(self, model: nn.Module, config: MoLConfig, adapter_name: str) -> None:
        RoutingObserver.attach(model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        for _, layer in mol_layers(self.model):  # before anything is changed
            layer.check_active(adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    # -- one adapter per row

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, **kwargs) -> Iterator[None]:
        """Run with an adapter for each row of the batch; called by `PeftModel`."""
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names is not allowed in training: each row's own adapter is for inference.")
        if any(layer.merged for _, layer in mol_layers(self)):
            raise ValueError("adapter_names is not allowed while an adapter is merged into the base; unmerge it first.")
        num_rows = batch_size(self.model, args, kwargs)
        if num_rows not in (None, len(adapter_names)):
            raise ValueError(f"adapter_names has {len(adapter_names)} names for {num_rows} rows: one per row.")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {BASE})
        if unknown:
            raise ValueError(
                f"adapter_names={unknown} is not allowed: the adapters are {', '.join(map(repr, self.peft_config))} "
                f"and {BASE!r}."
            )
        wrappers = [module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        for wrapper in wrappers:
            if mix_modules_to_save not in wrapper._forward_hooks.values():
                wrapper.register_forward_hook(mix_modules_to_save, with_kwargs=True)
        with row_adapters([*(layer for _, layer in mol_layers(self)), *wrappers], adapter_names):
            yield

    # -- state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoLConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # In version 1 the factors were no modules, and had names without ".weight".
        factors = tuple(f".mol_{factor}" for factor in FACTORS)
        state_dict = {f"{key}.weight" if key.endswith(factors) else key: v for key, v in state_dict.items()}
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_adapter_state(model, config, adapter_name, mapped)
        config.mol_version = MOL_VERSION
        return mapped

    def expert_usage(self) -> dict[str, torch.Tensor]:
        """Return the moving average of the routing, (E,) by layer, of the active adapter."""
        return {
            name: layer.mol_usage[adapter].clone()
            for name, layer in mol_layers(self.model)
            for adapter in layer.active_adapters
            if adapter in layer.mol_usage
        }

    # -- experts in and out

    merge_experts = merge_experts
    save_as_lora = save_as_lora
    experts_from_loras = experts_from_loras
    add_experts = add_experts

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._warn_of_loss(adapter_names)
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        RoutingObserver.detach(model)
        return model

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._warn_of_loss(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _warn_of_loss(self, adapter_names: list[str] | None) -> None:
        """Say that folding experts whose weights depend on the token changes what the model computes."""
        for name in adapter_names or self.active_adapters:
            config = self.peft_config.get(name)
            layers = [layer for _, layer in mol_layers(self.model) if name in layer.mol_config and not layer.merged]
            if layers and config.is_routed and config.expert_mixing == "token":
                warnings.warn(
                    f"Merging the {config.num_experts} experts of adapter {name!r} is not exact, because their weights "
                    "depend on the token: merge_experts(calibration=...) measures on your batches what changes.",
                    stacklevel=4,
                )


def batch_size(model: nn.Module, args: tuple, kwargs: dict) -> int | None:
    """Return the number of rows of a batch of model inputs, or None if there is no tensor to tell."""
    inputs = [kwargs.get(getattr(model, "main_input_name", "input_ids")), *args[:1], *kwargs.values()]
    return next((value.shape[0] for value in inputs if isinstance(value, torch.Tensor) and value.dim() > 0), None)


def mix_modules_to_save(
    wrapper: ModulesToSaveWrapper, args: tuple, kwargs: dict, output: torch.Tensor
) -> torch.Tensor | None:
    """After a module to save: where rows have adapters of their own, each row from the module of its adapter."""
    names = names_of_rows(wrapper)
    if names is None:
        return None
    # peft does this for linear layers alone, and a head may be several modules.
    mixed = torch.empty_like(output)
    for name, rows in group_rows(names, len(args[0]), args[0].device):
        module = wrapper.modules_to_save[name] if name in wrapper.modules_to_save else wrapper.original_module
        mixed[rows] = module(args[0][rows], *args[1:], **kwargs)
    return mixed


# Task types whose models have a head that a checkpoint of the base may lack.
HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def with_new_heads(model: nn.Module, config: MoLConfig) -> list[str] | None:
    """
    Return `modules_to_save`: the configured modules, and the layers of the head and of the base's pooler that were not
    loaded from a checkpoint. Otherwise their random weights would be lost on save.
    """
    chosen = config.modules_to_save
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if config.task_type not in HEAD_TASKS or not isinstance(base, nn.Module):
        return chosen
    heads = {name: module for name, module in model.named_children() if module is not base}
    if isinstance(getattr(base, "pooler", None), nn.Module):
        heads[f"{model.base_model_prefix}.pooler"] = base.pooler
    chosen = list(chosen or ())
    for name, module in heads.items():
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
        # transformers marks what it has loaded; who makes a model in another way has nothing marked.
        is_new = not all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters())
        if is_new and not any(name.endswith(other) for other in chosen):
            chosen.append(name)
    return chosen or None


def describe_ffns(model: nn.Module) -> str:
    """Describe the feed-forward networks that a model has, in a sentence for errors."""
    patterns = sorted({re.sub(r"\d+", "*", name) for name in ffn_modules(model)})
    if not patterns:
        return "It has no feed-forward network of a known form."
    return f"Its feed-forward networks are {', '.join(patterns)}."


def check_adapter_state(model: nn.Module, config: MoLConfig, adapter_name: str, state: dict[str, torch.Tensor]) -> None:
    """
    Refuse an adapter's weights that do not fit the model it is loaded into.

    Raises:
        ValueError: a tensor is missing, or has another shape; the error names it, and the base the adapter wants.
    """
    base = f" The adapter was made for {config.base_model_name_or_path}." if config.base_model_name_or_path else ""
    expected = {
        f"{name}.{key}": (name, key.partition(".")[0], value.shape)
        for name, layer in mol_layers(model)
        for key, value in layer.state_dict().items()
        if not key.startswith("base_layer.") and key.split(".")[1] == adapter_name
    }
    for key, (name, part, shape) in expected.items():
        if key not in state:
            raise ValueError(f"The adapter has no {part} for {name}.{base}")
        if state[key].shape != shape:
            raise ValueError(
                f"The adapter's {part} for {name} is {tuple(state[key].shape)}, and this model and its configuration "
                f"need {tuple(shape)}.{base}"
            )
    surplus = [key for key in state if is_adapter_key(key) and key not in expected]
    if surplus:
        raise ValueError(f"The adapter has {surplus[0]}, for which there is no place in this model.{base}")


# --- registration ----------------------------------------------------------------------------------------------------

# The first import wins: a second copy (the package beside a Hub folder's code, say), or a peft that has its own, stays.
if MOL not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="mol", config_cls=MoLConfig, model_cls=MoLModel, prefix=MoLModel.prefix)
