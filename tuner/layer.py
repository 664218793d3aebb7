# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Mixture of LoRAs (MoL) as a peft tuner layer, for the feed-forward network (FFN) of any transformer.

`MoLLayer` replaces the module that holds an FFN and hooks its projections: after the first ones each token becomes k
tokens, one per chosen expert, and before the last one they become one again (mathematics: `modeling_mol`). It holds
adapters only; the state of a forward is in an `FFNCall` of the running thread.
"""

import copy
import re
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.import_utils import is_tracing

from modernalbert.modeling_mol import MoLRouter, init_lora, route
from modernalbert.mol_backends import CPU_TOKEN_BLOCK, Experts, concatenate_experts, token_blocks
from modernalbert.tuner.config import MoLConfig
from modernalbert.tuner.ffn_call import THREAD, AdapterCall, FFNCall, flatten_tokens, group_rows, names_of_rows
from modernalbert.tuner.observer import recordings_of
from modernalbert.tuner.projections import Projections, is_ffn_alone, linear_shape


FACTORS = Experts._fields[:4]
STATE_NAMES = ("mol_router", *(f"mol_{f}" for f in FACTORS), *(f"mol_frozen_{f}" for f in FACTORS), "mol_usage")


def is_adapter_key(key: str) -> bool:
    """Return whether a key of a state dict, with or without the adapter's name, is of a MoL adapter."""
    return re.search(rf"(^|\.)({'|'.join(STATE_NAMES)})(\.|$)", key) is not None


# --- state of an adapter ---------------------------------------------------------------------------------------------


class ExpertFactor(nn.Module):
    """One low-rank factor of the trained experts of an adapter: `weight`, (E, r, inputs) or (E, outputs, r)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        # peft's policy for FSDP wraps what has a trainable weight and no child, to gather it for its own forward; a
        # factor has none, and belongs to what holds the layer.
        self.no_leaf = nn.Identity()

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}"


class Float32Buffers(BufferDict):
    """Buffers by adapter that stay float32: an average of decay 0.99 stalls in bfloat16, and frozen is frozen."""

    def _apply(self, fn, recurse=True):
        kept = dict(self.items())
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if self[name].dtype != torch.float32:
                self[name] = buffer.to(self[name].device)
        return self


class AdapterRouter(MoLRouter):
    """The model's router, (E, d), with what adapters made of others need: a bias, or scores without a sign."""

    def __init__(self, hidden_size: int, config: MoLConfig):
        super().__init__(hidden_size, config.num_experts, jitter_noise=config.router_jitter_noise)
        self.is_absolute = config.router_score == "absolute"
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.router_bias else None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, hidden_states: torch.Tensor, depth: int = 0) -> torch.Tensor:
        return super().forward(hidden_states.to(self.weight.dtype), depth)

    def score(self, hidden_states: torch.Tensor, depth: int) -> torch.Tensor:
        logits = super().score(hidden_states, depth)
        logits = logits.abs() if self.is_absolute else logits
        return logits if self.bias is None else logits + self.bias


# --- the layer -------------------------------------------------------------------------------------------------------


class MoLLayer(nn.Module, BaseTunerLayer):
    """
    The module that holds an FFN, with MoL adapters on it.

    State by adapter name, with d, n, f the widths of the FFN's input, first projections together, and inner states:
    `mol_router` (weight (E, d)), `mol_A_in` (weight (E, r, d)), `mol_B_in` (E, n, r), `mol_A_out` (E, r, f),
    `mol_B_out` (E, d, r), `mol_usage` (E,), the float32 moving average of the routing. One expert has no router and no
    usage. Of `num_frozen_experts` the factors are buffers, `mol_frozen_A_in` and so on, which no optimizer moves or
    decays.

    Args:
        base_layer: The FFN, or the layer that holds it.
        names: Its projections.
    """

    adapter_layer_names = ("mol_router", *(f"mol_{factor}" for factor in FACTORS))
    other_param_names = ("mol_usage", *(f"mol_frozen_{f}" for f in FACTORS), "mol_config", "training_weights")

    def __init__(self, base_layer: nn.Module, names: Projections, adapter_name: str, config: MoLConfig):
        super().__init__()
        self.base_layer = base_layer
        self.projection_names = names
        self.mol_router = nn.ModuleDict()
        for factor in FACTORS:
            setattr(self, f"mol_{factor}", nn.ModuleDict())
            setattr(self, f"mol_frozen_{factor}", Float32Buffers(persistent=True))
        self.mol_usage = Float32Buffers(persistent=True)
        self.mol_config: dict[str, MoLConfig] = {}
        # The average of the routing when the last training forward began, which "ema" mixing trains with: the average
        # moves on before the backward, and a checkpoint recompute must see what the forward saw.
        self.training_weights: dict[str, torch.Tensor] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self._unmerged_weights: dict[str, torch.Tensor] = {}

        self.in_features, _ = linear_shape(self.input_projections[0])
        self.input_widths = [linear_shape(projection)[1] for projection in self.input_projections]
        self.width, self.out_features = linear_shape(self.output_projection)
        self._is_ffn_alone = is_ffn_alone(self.get_base_layer(), names)
        self._handles = [
            projection.register_forward_hook(partial(self._after_input, number))
            for number, projection in enumerate(self.input_projections)
        ]
        self._handles.append(self.output_projection.register_forward_pre_hook(self._before_output))
        self._handles.append(self.output_projection.register_forward_hook(self._after_output))
        self.update_layer(adapter_name, config)

    def __getattr__(self, name: str) -> Any:
        # A model asks its layers for more than their forward (a layer's attention type, a projection's dtype).
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("mol_"):
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "mol." + super().__repr__()

    @property
    def input_projections(self) -> list[nn.Module]:
        return [self.get_base_layer().get_submodule(name) for name in self.projection_names.inputs]

    @property
    def output_projection(self) -> nn.Module:
        return self.get_base_layer().get_submodule(self.projection_names.output)

    def remove_hooks(self) -> None:
        """Leave the FFN as it was found."""
        for handle in self._handles:
            handle.remove()

    # -- state

    def update_layer(self, adapter_name: str, config: MoLConfig) -> None:
        """Add an adapter, or replace it."""
        E, r, d, f = config.num_experts, config.r, self.in_features, self.width
        shapes = {"A_in": (r, d), "B_in": (sum(self.input_widths), r), "A_out": (r, f), "B_out": (self.out_features, r)}
        frozen = config.num_frozen_experts
        self._remove(adapter_name)
        with torch.no_grad():
            for factor, shape in shapes.items():
                if frozen < E:
                    getattr(self, f"mol_{factor}")[adapter_name] = ExpertFactor(E - frozen, *shape)
                if frozen:
                    getattr(self, f"mol_frozen_{factor}")[adapter_name] = torch.zeros(frozen, *shape)
            if frozen < E:
                for A, B in ((self.mol_A_in, self.mol_B_in), (self.mol_A_out, self.mol_B_out)):
                    init_lora(A[adapter_name].weight, B[adapter_name].weight)
                    if not config.init_weights:
                        nn.init.normal_(B[adapter_name].weight, std=0.1)
            if config.is_routed:
                self.mol_router[adapter_name] = AdapterRouter(d, config)
                self.mol_usage[adapter_name] = torch.full((E,), 1 / E, dtype=torch.float32)
        self._copy_buffers(adapter_name, config)
        self.mol_config[adapter_name] = config
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def _buffers_by_adapter(self) -> list[Float32Buffers]:
        return [self.mol_usage, *(getattr(self, f"mol_frozen_{factor}") for factor in FACTORS)]

    def _copy_buffers(self, adapter_name: str, config: MoLConfig) -> None:
        # Who adds a second adapter with the very configuration of a first makes a copy of it, as TRL does for its
        # reference, and copies the parameters alone.
        twin = next((name for name, other in self.mol_config.items() if other is config), None)
        for buffers in self._buffers_by_adapter if twin is not None else ():
            if adapter_name in buffers:
                buffers[adapter_name] = buffers[twin].clone()

    def _remove(self, adapter_name: str) -> None:
        for name in self.adapter_layer_names + self.other_param_names:
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]

    @torch.no_grad()
    def load_experts(self, adapter_name: str, experts: Experts) -> None:
        """Copy factors, of all experts, into an adapter whose shapes they have."""
        frozen = self.mol_config[adapter_name].num_frozen_experts
        for factor, value in zip(FACTORS, experts[:4]):
            if frozen:
                getattr(self, f"mol_frozen_{factor}")[adapter_name].copy_(value[:frozen])
            if frozen < len(value):
                getattr(self, f"mol_{factor}")[adapter_name].weight.copy_(value[frozen:])

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # In states written before the factors were modules, their names end with the adapter's.
        for factor in FACTORS:
            for adapter_name in getattr(self, f"mol_{factor}"):
                key = f"{prefix}mol_{factor}.{adapter_name}"
                if key in state_dict:
                    state_dict[f"{key}.weight"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def adapter_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """Return the parameters of an adapter: factors of the experts that are not frozen, and the router's."""
        containers = (getattr(self, name) for name in self.adapter_layer_names)
        return [
            p for container in containers if adapter_name in container for p in container[adapter_name].parameters()
        ]

    def _get_base_layer_device_and_dtype(self, base_layer):
        weight = getattr(self.output_projection, "weight", None)
        if callable(weight):  # torch's own quantised layers have a method of that name
            return weight().device, None
        return super()._get_base_layer_device_and_dtype(self.output_projection)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        kept = [(buffers, buffers[adapter_name]) for buffers in self._buffers_by_adapter if adapter_name in buffers]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for buffers, value in kept:
            if buffers[adapter_name].dtype != torch.float32:
                buffers[adapter_name] = value.to(buffers[adapter_name].device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self.check_active(adapter_names)
        super().set_adapter(adapter_names, inference_mode)
        self.freeze_idle_weights()

    def check_active(self, adapter_names: str | Sequence[str]) -> None:
        """Raise a ValueError if more than one of the adapters is on this layer."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        here = [name for name in names if name in self.mol_config]
        if len(here) > 1:
            raise ValueError(
                f"{here} cannot be active together: the sum of two mixtures has no meaning here. Activate one, or give "
                "each row of a batch its own with adapter_names."
            )

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self.freeze_idle_weights()

    def freeze_idle_weights(self) -> None:
        """Keep out of training what gets no gradient; peft makes all of an active adapter trainable."""
        # A router that mixes nothing gets no gradient: frozen, data-parallel training does not wait for one.
        for name, router in self.mol_router.items():
            if self.mol_config[name].expert_mixing != "token":
                router.requires_grad_(False)

    def experts(self, adapter_name: str, dtype: torch.dtype | None = None) -> Experts:
        """Return the experts of an adapter as the mathematics take them."""
        factors = []
        for factor in FACTORS:
            frozen, trained = getattr(self, f"mol_frozen_{factor}"), getattr(self, f"mol_{factor}")
            parts = [frozen[adapter_name]] if adapter_name in frozen else []
            parts += [trained[adapter_name].weight] if adapter_name in trained else []
            factors.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        return Experts(*(factor.to(dtype or factor.dtype) for factor in factors), self.mol_config[adapter_name].scaling)

    def expert_weights(self, adapter_name: str, weights: str = "ema") -> torch.Tensor:
        """Return the (E,) weights of the merged expert: "uniform", or "ema", the moving average of the routing."""
        config = self.mol_config[adapter_name]
        if weights == "uniform" or not config.is_routed:
            device = self.experts(adapter_name).A_in.device
            return torch.full((config.num_experts,), 1 / config.num_experts, device=device)
        return self.mol_usage[adapter_name]

    def keep_training_weights(self) -> None:
        """Keep the averages of the routing as they are now for the training forward that begins."""
        self.training_weights = {
            name: average.clone()
            for name, average in self.mol_usage.items()
            if self.mol_config[name].expert_mixing == "ema"
        }

    # -- forward

    def adapters_of_tokens(self, tokens: torch.Tensor) -> list[tuple[str, torch.Tensor | None]]:
        """
        Return the adapters that serve tokens (T, d), with the indices of theirs; tokens of the base model are in none.
        """
        names = names_of_rows(self)
        if names is None:
            return [(name, None) for name in self.active_adapters if name in self.mol_config]
        groups = group_rows(names, len(tokens), tokens.device)
        return [(name, rows) for name, rows in groups if name in self.mol_config]

    @property
    def _is_adapted(self) -> bool:
        if self.disable_adapters or self.merged:
            return False
        return any(name in self.mol_config for name in names_of_rows(self) or self.active_adapters)

    def forward(self, *args, **kwargs):
        if getattr(self, "_is_replica", False):
            raise RuntimeError("nn.DataParallel is not supported: start one process per device (torchrun, accelerate).")
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not self._is_adapted:
            return self.base_layer(*args, **kwargs)
        recordings = recordings_of(self)
        THREAD.call, THREAD.logits = None, [] if recordings else None
        try:
            output = self._run_in_blocks(*args, **kwargs)
            for recording in recordings:
                recording.add(self, THREAD.logits, args)
            return output
        finally:
            THREAD.call = THREAD.logits = None

    def _run_in_blocks(self, *args, **kwargs):
        """Let the FFN take its tokens in blocks on the CPU where it can: the k copies of each then stay in cache."""
        x = args[0] if args else None
        if not isinstance(x, torch.Tensor) or names_of_rows(self) is not None or is_tracing(x):
            return self.base_layer(*args, **kwargs)
        tokens = flatten_tokens(x)
        blocks = token_blocks(tokens)
        if blocks is None:
            return self.base_layer(*args, **kwargs)
        if self._is_ffn_alone and len(args) == 1 and not kwargs:
            outputs = [self.base_layer(tokens[rows].unsqueeze(0)) for rows in blocks]
            return torch.cat(outputs, dim=1).view(*x.shape[:-1], -1)
        can_chunk = getattr(self.base_layer, "chunk_size_feed_forward", None) == 0 and x.dim() == 3
        if can_chunk and not torch.is_grad_enabled():  # a checkpoint recompute would not be cut
            # A layer of BERT's kind cuts its sequences itself, if the length divides.
            size = max(
                (c for c in range(1, x.shape[1]) if x.shape[1] % c == 0 and c * len(x) <= CPU_TOKEN_BLOCK), default=0
            )
            if 4 * size * len(x) >= CPU_TOKEN_BLOCK:
                # A shallow copy, with the same weights and hooks: another thread may have a length of its own.
                chunked = copy.copy(self.base_layer)
                chunked.chunk_size_feed_forward = size
                return chunked(*args, **kwargs)
        return self.base_layer(*args, **kwargs)

    def _after_input(self, number: int, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if not self._is_adapted:
            return None
        call = self._current_call()
        if call is None or number in call.seen:
            # Here and not in `forward`: a checkpoint recompute may run the FFN alone.
            call = THREAD.call = FFNCall(self, args[0], output.dtype)
        return call.expand(number, output)

    def _before_output(self, module: nn.Module, args: tuple) -> tuple | None:
        call = self._current_call()
        return None if call is None else (call.mix(args[0]), *args[1:])

    def _after_output(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        call, THREAD.call = self._current_call(), None
        return None if call is None else call.finish(output)

    def _current_call(self) -> FFNCall | None:
        call = getattr(THREAD, "call", None)
        return call if call is not None and call.layer is self else None

    def call_adapter(
        self, name: str, rows: torch.Tensor | None, tokens: torch.Tensor, shape: torch.Size, dtype: torch.dtype
    ) -> AdapterCall:
        """
        Begin an adapter's part in an `FFNCall`: route its tokens, and compute their low-rank states.

        Args:
            tokens: (T, d), those it serves.
            shape: Of the FFN's input, without its width.
            dtype: Of the projections.
        """
        config = self.mol_config[name]
        if config.mol_version == 1:
            raise RuntimeError(
                f"Adapter {name!r} was saved by an earlier version, and transformers' load_adapter does not find its "
                "weights: load it with PeftModel.from_pretrained, and save it again."
            )
        experts = self.experts(name, dtype)
        if experts.A_in.is_meta:
            raise RuntimeError(
                f"The weights of adapter {name!r} are not in memory: a model that is offloaded (device_map with "
                "cpu or disk) cannot carry a MoL adapter; merge it first, or load the model whole."
            )
        routes, collected = config.is_routed and config.expert_mixing == "token", getattr(THREAD, "logits", None)
        if routes or (config.is_routed and collected is not None):
            with torch.set_grad_enabled(torch.is_grad_enabled() and routes):
                logits = self.mol_router[name](tokens)
            if collected is not None and rows is None:
                collected.append(logits.view(*shape, config.num_experts))
        if routes:
            _, weights, index = route(logits, config.num_experts_per_tok)
        else:
            if config.is_routed:
                experts = concatenate_experts(experts, self._mixing_weights(name))
            weights = torch.ones_like(tokens[:, :1])  # no lengths as numbers: a trace would keep them
            index = torch.zeros_like(weights, dtype=torch.long)
        dropout = config.lora_dropout if self.training else 0.0
        inputs = nn.functional.dropout(tokens.to(experts.A_in.dtype), dropout)
        low_rank = nn.functional.linear(inputs, experts.A_in.flatten(0, 1))
        return AdapterCall(rows, experts, weights, index, low_rank, dropout)

    def _mixing_weights(self, name: str) -> torch.Tensor:
        """Return the (E,) weights of the merged expert in a forward."""
        mixing = self.mol_config[name].expert_mixing
        if mixing == "ema" and self.training and torch.is_grad_enabled() and name in self.training_weights:
            return self.training_weights[name]
        return self.expert_weights(name, mixing)

    # -- merging

    def deltas(self, adapter_name: str, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Compute what each projection's weight gains when the experts are merged with (E,) weights: (outputs, inputs).
        """
        one = concatenate_experts(self.experts(adapter_name), weights)
        parts = one.B_in[0].split(self.input_widths)
        deltas = {name: B @ one.A_in[0] for name, B in zip(self.projection_names.inputs, parts)}
        return deltas | {self.projection_names.output: one.B_out[0] @ one.A_out[0]}

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Fold the adapter into the FFN's weights. Exact for one expert; of several, the mean delta is folded.

        Args:
            safe_merge: Refuse weights that would not be finite, before any of the projections has changed.

        Raises:
            ValueError: a projection is quantised, or, with `safe_merge`, a weight would not be finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.mol_config:
                continue
            mixing = "uniform" if self.mol_config[name].expert_mixing == "uniform" else "ema"
            merged = {}
            for path, delta in self.deltas(name, self.expert_weights(name, mixing)).items():
                projection = self.get_base_layer().get_submodule(path)
                delta = delta.T if isinstance(projection, Conv1D) else delta
                weight = getattr(projection, "weight", None)
                # A quantised weight may say that it is of a floating-point dtype: it is a tensor of its own class.
                is_plain = type(getattr(weight, "data", None)) is torch.Tensor and weight.is_floating_point()
                if not is_plain or weight.shape != delta.shape:
                    raise ValueError(
                        f"{path} ({type(projection).__name__}) is quantised: load the base model in floating point to "
                        "merge an adapter into it."
                    )
                merged[path] = (weight + delta.to(weight.device)).to(weight.dtype)
                if safe_merge and not merged[path].isfinite().all():
                    raise ValueError(f"Adapter {name!r} cannot be merged: the weight of {path} would not be finite.")
            for path, weight in merged.items():
                parameter = self.get_base_layer().get_submodule(path).weight
                # Kept, because adding and taking away again is not exact in floating point.
                self._unmerged_weights.setdefault(path, parameter.data)
                parameter.data = weight
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Give the FFN its weights back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for path, weight in self._unmerged_weights.items():
            parameter = self.get_base_layer().get_submodule(path).weight
            parameter.data = weight.to(device=parameter.device, dtype=parameter.dtype)  # the model may have been moved
        self._unmerged_weights.clear()
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False
