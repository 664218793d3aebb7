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
Mixture of LoRAs (MoL) as a peft tuner, for the feed-forward network (FFN) of any transformer.

`MoLLayer` takes the place of the module that holds an FFN. It leaves the FFN's own code alone and works at the borders
of its projections: behind the first ones, each token becomes k tokens, one per chosen expert; the FFN's activation,
gate and dropout run on all of them; before the last one they become one again. The mathematics are those of
`modeling_mol`, where the reasons are told.
"""

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from modernalbert.modeling_mol import MoLRouter, init_lora, route
from modernalbert.mol_backends import (
    CPU_TOKEN_BLOCK,
    Experts,
    add_low_rank,
    concatenate_experts,
    expand_slots,
    fill_slots,
    mix_slots,
    token_blocks,
)
from modernalbert.tuner.config import MoLConfig
from modernalbert.tuner.experts import FACTORS
from modernalbert.tuner.projections import Projections, is_ffn_alone, linear_shape


BASE = "__base__"  # peft's name for "no adapter" in `adapter_names`


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

    def forward(self, hidden_states: torch.Tensor, position: int = 0) -> torch.Tensor:
        logits = super().forward(hidden_states.to(self.weight.dtype), position)
        logits = logits.abs() if self.is_absolute else logits
        return logits if self.bias is None else logits + self.bias


class AdapterCall(NamedTuple):
    """One adapter's part in one use of the FFN."""

    rows: torch.Tensor | None  # tokens it serves, None = all
    experts: Experts
    routing_weights: torch.Tensor  # (T, k)
    experts_index: torch.Tensor  # (T, k)
    low_rank: torch.Tensor  # (T, E r), A_in x of all experts
    dropout: float


class FFNCall(NamedTuple):
    """One use of the FFN, from its first projection to its last."""

    shape: torch.Size  # of the states, without their width
    num_slots: int
    adapters: list[AdapterCall]
    seen: set[int]  # numbers of the first projections that have run


def flat(states: torch.Tensor) -> torch.Tensor:
    """(..., width) -> (tokens, width), also where there are no tokens."""
    return states.reshape(math.prod(states.shape[:-1]), states.shape[-1])


class MoLLayer(nn.Module, BaseTunerLayer):
    """
    The module that holds an FFN, with MoL adapters on it.

    State by adapter name, with d, n, f the widths of the FFN's input, first projections together, and inner states:
    `mol_router` (weight (E, d)), `mol_A_in` (E, r, d), `mol_B_in` (E, n, r), `mol_A_out` (E, r, f), `mol_B_out`
    (E, d, r), `mol_usage` (E,), the float32 moving average of the routing. One expert has no router and no usage. Of
    `num_frozen_experts` the factors are buffers, `mol_frozen_A_in` and so on, which no optimizer moves or decays.

    Args:
        base_layer: The FFN, or the layer that holds it.
        names: Its projections.
    """

    adapter_layer_names = ("mol_router", "mol_A_in", "mol_B_in", "mol_A_out", "mol_B_out")
    other_param_names = (
        "mol_usage",
        "mol_config",
        "mol_frozen_A_in",
        "mol_frozen_B_in",
        "mol_frozen_A_out",
        "mol_frozen_B_out",
    )

    def __init__(self, base_layer: nn.Module, names: Projections, adapter_name: str, config: MoLConfig):
        super().__init__()
        self.base_layer = base_layer
        self.projection_names = names
        self.mol_router = nn.ModuleDict()
        for factor in FACTORS:
            setattr(self, f"mol_{factor}", nn.ParameterDict())
            setattr(self, f"mol_frozen_{factor}", Float32Buffers(persistent=True))
        self.mol_usage = Float32Buffers(persistent=True)
        self.mol_config: dict[str, MoLConfig] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self._unmerged_weights: dict[str, torch.Tensor] = {}
        # The average of the routing when the forward under way began: a checkpoint recompute must see that one.
        self.usage_at_start: dict[str, torch.Tensor] = {}
        # The adapter of each row of the batch, where they differ.
        self.row_adapters: list[str] | None = None
        # Router logits of the forward under way, one per use; None where nobody listens, as in a checkpoint recompute.
        self.recorded: list[torch.Tensor] | None = None
        self._call: FFNCall | None = None
        self._call_logits: list[torch.Tensor] = []
        self._low_rank: list[torch.Tensor] = []

        self.hidden_size, _ = linear_shape(self.input_projections[0])
        self.input_widths = [linear_shape(projection)[1] for projection in self.input_projections]
        self.width, self.output_size = linear_shape(self.output_projection)
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

    def __getstate__(self) -> dict:
        # Of a forward that did not come to its end nothing is worth a copy, and graphs cannot be copied.
        state = self.__dict__.copy()
        return state | {"recorded": None, "row_adapters": None, "_call": None, "_call_logits": [], "_low_rank": []}

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
        E, r, d, f = config.num_experts, config.r, self.hidden_size, self.width
        shapes = {"A_in": (r, d), "B_in": (sum(self.input_widths), r), "A_out": (r, f), "B_out": (self.output_size, r)}
        self._remove(adapter_name)
        with torch.no_grad():
            for factor, shape in shapes.items():
                frozen = config.num_frozen_experts
                if frozen < E:
                    parameter = nn.Parameter(torch.empty(E - frozen, *shape))
                    getattr(self, f"mol_{factor}")[adapter_name] = parameter
                if frozen:
                    getattr(self, f"mol_frozen_{factor}")[adapter_name] = torch.zeros(frozen, *shape)
            if config.num_frozen_experts < E:
                for A, B in ((self.mol_A_in, self.mol_B_in), (self.mol_A_out, self.mol_B_out)):
                    init_lora(A[adapter_name], B[adapter_name])
                    if not config.init_weights:
                        nn.init.normal_(B[adapter_name], std=0.1)
            if config.is_routed:
                self.mol_router[adapter_name] = AdapterRouter(d, config)
                self.mol_usage[adapter_name] = torch.full((E,), 1 / E, dtype=torch.float32)
        self.mol_config[adapter_name] = config
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

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
                getattr(self, f"mol_{factor}")[adapter_name].copy_(value[frozen:])

    def _get_base_layer_device_and_dtype(self, base_layer):
        return super()._get_base_layer_device_and_dtype(self.output_projection)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        buffers = [self.mol_usage, *(getattr(self, f"mol_frozen_{factor}") for factor in FACTORS)]
        kept = [(container, container[adapter_name]) for container in buffers if adapter_name in container]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for container, value in kept:
            if container[adapter_name].dtype != torch.float32:
                container[adapter_name] = value.to(container[adapter_name].device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        here = [name for name in names if name in self.mol_config]
        if len(here) > 1:
            raise ValueError(
                f"{here} cannot be active together: the sum of two mixtures has no meaning here. Activate one, or give "
                "each row of a batch its own with adapter_names."
            )
        super().set_adapter(adapter_names, inference_mode)
        self.freeze_idle_weights()

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
        """The experts of an adapter as the mathematics take them."""
        factors = []
        for factor in FACTORS:
            containers = (getattr(self, f"mol_frozen_{factor}"), getattr(self, f"mol_{factor}"))
            parts = [container[adapter_name] for container in containers if adapter_name in container]
            factors.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        return Experts(*(factor.to(dtype or factor.dtype) for factor in factors), self.mol_config[adapter_name].scaling)

    def expert_weights(self, adapter_name: str, weights: str = "ema") -> torch.Tensor:
        """(E,) weights of the merged expert: "uniform", or "ema", the moving average of the routing."""
        num_experts = self.mol_config[adapter_name].num_experts
        if weights == "uniform" or num_experts == 1:
            return torch.full((num_experts,), 1 / num_experts, device=self.output_projection.weight.device)
        return self.mol_usage[adapter_name]

    # -- forward

    def _adapters_of_tokens(self, num_tokens: int, device: torch.device) -> list[tuple[str, torch.Tensor | None]]:
        """Which adapter serves which tokens; tokens of the base model are in none."""
        if self.row_adapters is None:
            return [(name, None) for name in self.active_adapters if name in self.mol_config]
        # A row is several rows in a beam search, and several tokens where a model flattens its batch.
        each, rest = divmod(num_tokens, len(self.row_adapters))
        if rest:
            raise ValueError(f"adapter_names has {len(self.row_adapters)} names for {num_tokens} tokens: one per row.")
        rows = torch.arange(num_tokens, device=device).view(-1, each)
        parts = []
        for name in dict.fromkeys(self.row_adapters):
            if name in self.mol_config:
                parts.append((name, rows[[i for i, row in enumerate(self.row_adapters) if row == name]].flatten()))
        return parts

    @property
    def _is_adapted(self) -> bool:
        if self.disable_adapters or self.merged:
            return False
        return any(name in self.mol_config for name in self.row_adapters or self.active_adapters)

    def forward(self, *args, **kwargs):
        if getattr(self, "_is_replica", False):
            raise RuntimeError("nn.DataParallel is not supported: start one process per device (torchrun, accelerate).")
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not self._is_adapted:
            return self.base_layer(*args, **kwargs)
        self._call = None
        self._call_logits = []
        output = self._run_in_blocks(*args, **kwargs)
        if self.recorded is not None and self._call_logits:
            self.recorded.append(torch.cat(self._call_logits, dim=-2))
        self._call_logits = []
        return output

    def _run_in_blocks(self, *args, **kwargs):
        """On the CPU, let the FFN take its tokens in blocks where it can: the k copies of each then stay in cache."""
        x = args[0] if args else None
        if not isinstance(x, torch.Tensor) or self.row_adapters is not None or torch.compiler.is_compiling():
            return self.base_layer(*args, **kwargs)
        tokens = x.reshape(-1, x.shape[-1])
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
                self.base_layer.chunk_size_feed_forward = size
                try:
                    return self.base_layer(*args, **kwargs)
                finally:
                    self.base_layer.chunk_size_feed_forward = 0
        return self.base_layer(*args, **kwargs)

    def _after_input(self, number: int, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Behind a first projection: the h_e of the k chosen experts, (k * batch, ..., n)."""
        if not self._is_adapted:
            return None
        if self._call is None or number in self._call.seen:
            self._call = self._begin(args[0], output.dtype)
        call = self._call
        call.seen.add(number)
        start = sum(self.input_widths[:number])
        rows_of_B = slice(start, start + self.input_widths[number])
        base = flat(output)
        if len(call.adapters) == 1 and call.adapters[0].rows is None:
            (adapter,) = call.adapters
            slots = fill_slots(adapter.routing_weights, adapter.experts_index, adapter.experts, output.dtype)
            hidden = expand_slots(base, adapter.low_rank, adapter.experts.B_in[:, rows_of_B], slots)
        else:
            hidden = base.repeat(call.num_slots, 1, 1)
            for adapter in call.adapters:
                slots = fill_slots(adapter.routing_weights, adapter.experts_index, adapter.experts, output.dtype)
                mine = expand_slots(base[adapter.rows], adapter.low_rank, adapter.experts.B_in[:, rows_of_B], slots)
                hidden[: len(mine), adapter.rows] = mine
        return hidden.view(call.num_slots * call.shape[0], *call.shape[1:], output.shape[-1])

    def _begin(self, x: torch.Tensor, dtype: torch.dtype) -> FFNCall:
        """Route the tokens of x (batch, ..., d)."""
        tokens = flat(x)
        adapters = []
        for name, rows in self._adapters_of_tokens(tokens.shape[0], x.device):
            mine = tokens if rows is None else tokens[rows]
            adapters.append(self._call_adapter(name, rows, mine, x.shape[:-1], dtype))
        num_slots = max([adapter.routing_weights.shape[-1] for adapter in adapters])
        return FFNCall(x.shape[:-1], num_slots, adapters, set())

    def _call_adapter(
        self, name: str, rows: torch.Tensor | None, tokens: torch.Tensor, shape: torch.Size, dtype: torch.dtype
    ) -> AdapterCall:
        config = self.mol_config[name]
        experts = self.experts(name, dtype)
        if experts.A_in.is_meta:
            raise RuntimeError(
                f"The weights of adapter {name!r} are not in memory: a model that is offloaded (device_map with "
                "cpu or disk) cannot carry a MoL adapter; merge it first, or load the model whole."
            )
        logits = None
        if config.is_routed and (config.expert_mixing == "token" or self.recorded is not None):
            router = self.mol_router[name]
            with torch.set_grad_enabled(torch.is_grad_enabled() and config.expert_mixing == "token"):
                logits = router(tokens)
            if self.recorded is not None and rows is None:
                self._call_logits.append(logits.view(*shape, config.num_experts))
        if logits is not None and config.expert_mixing == "token":
            _, weights, index = route(logits, config.num_experts_per_tok)
        else:
            if config.is_routed:
                usage = self.usage_at_start.get(name) if config.expert_mixing == "ema" else None
                experts = concatenate_experts(
                    experts, self.expert_weights(name, config.expert_mixing) if usage is None else usage
                )
            weights = tokens.new_ones(len(tokens), 1)
            index = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
        dropout = config.lora_dropout if self.training else 0.0
        inputs = nn.functional.dropout(tokens.to(experts.A_in.dtype), dropout)
        low_rank = nn.functional.linear(inputs, experts.A_in.flatten(0, 1))
        return AdapterCall(rows, experts, weights, index, low_rank, dropout)

    def _before_output(self, module: nn.Module, args: tuple) -> tuple | None:
        """Before the last projection: the k tokens of each one become sum_e q_e u_e."""
        if self._call is None or not self._is_adapted:
            return None
        call = self._call
        hidden = flat(args[0]).unflatten(0, (call.num_slots, math.prod(call.shape)))
        if len(call.adapters) == 1 and call.adapters[0].rows is None:
            mixture, low_rank = self._mix(hidden, call.adapters[0])
            self._low_rank = [low_rank]
        else:
            mixture, self._low_rank = hidden[0].clone(), []
            for adapter in call.adapters:
                num_slots = adapter.routing_weights.shape[-1]
                mixture[adapter.rows], low_rank = self._mix(hidden[:num_slots, adapter.rows], adapter)
                self._low_rank.append(low_rank)
        return mixture.view(*call.shape, mixture.shape[-1]), *args[1:]

    @staticmethod
    def _mix(hidden: torch.Tensor, adapter: AdapterCall) -> tuple[torch.Tensor, torch.Tensor]:
        slots = fill_slots(adapter.routing_weights, adapter.experts_index, adapter.experts, hidden.dtype)
        mask = None
        if adapter.dropout:
            mask = nn.functional.dropout(torch.ones_like(hidden[0]), adapter.dropout)
        return mix_slots(hidden, adapter.experts.A_out.to(hidden.dtype), slots, mask)

    def _after_output(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Behind the last projection: the experts' low-rank parts are added."""
        if self._call is None or not self._is_adapted:
            return None
        call, self._call = self._call, None
        result = flat(output)
        low_ranks, self._low_rank = self._low_rank, []
        for adapter, low_rank in zip(call.adapters, low_ranks):
            B_out = adapter.experts.B_out.to(low_rank.dtype)
            if adapter.rows is None:
                result = add_low_rank(result, low_rank, B_out).to(output.dtype)
            else:
                result = result.clone()
                result[adapter.rows] = add_low_rank(result[adapter.rows], low_rank, B_out).to(output.dtype)
        return result.view_as(output)

    # -- merging

    def deltas(self, adapter_name: str, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each projection's weight gains when the experts are merged with (E,) weights: (outputs, inputs)."""
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
