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

import inspect
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_peft_available, logging

from .ffn_projections import TARGET_MODULES, Projections, ffn_modules, find_projections, linear_shape
from .merge_methods import MERGE_METHODS
from .modeling_mol import (
    Experts,
    MoLRouter,
    Slots,
    add_low_rank,
    concatenate_experts,
    expand_slots,
    fill_slots,
    init_lora,
    mix_slots,
    route,
    sum_over_processes,
    summarise_routing,
    token_blocks,
)


if is_peft_available():
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftConfig
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge, check_target_module_exists
    from peft.utils import AuxiliaryTrainingWrapper, PeftType, get_peft_model_state_dict, register_peft_method


logger = logging.get_logger(__name__)

MOL_VERSION = 1
MIXINGS = ("token", "ema", "uniform")
BASE = "__base__"  # peft's name for "no adapter" in `adapter_names`


# --- the peft type ---------------------------------------------------------------------------------------------------


def add_peft_type(name: str) -> "PeftType":
    """
    The member of peft's enumeration of that name, added if peft has none.

    peft keeps its methods in an enumeration, which is closed to others; a plain string fails later on.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        type.__setattr__(PeftType, name, member)
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
    return PeftType[name]


MOL = add_peft_type("MOL")


# --- configuration ---------------------------------------------------------------------------------------------------


@dataclass
class MoLConfig(PeftConfig):
    """
    Configuration of a [`MoLModel`].

    Args:
        r: Rank of an expert.
        lora_alpha: The experts' scale is lora_alpha / r.
        lora_dropout: Dropout probability on the input of the low-rank paths.
        num_experts: E, experts per FFN. One expert needs no router: it is a LoRA on all projections of the FFN.
        num_experts_per_tok: k, experts per token.
        target_modules: Names of the modules that hold an FFN, or a regular expression for the whole name. An FFN that
            is no module of its own (BERT, Whisper) is reached through its layer. None = by the type of the model.
        exclude_modules: Names, or a regular expression, of modules to leave alone.
        layers_to_transform: Numbers of the layers to adapt; None = all.
        layers_pattern: Name in front of the layer's number; None = the first number in a module's name counts.
        ffn_projections: Where an FFN is not recognised, the names of its linear layers inside the target, as
            `{"up": "w1", "down": "w2"}`, for a gated one with "gate" too.
        expert_mixing: "token" routes each token; "ema" and "uniform" run the weighted mean of the experts as one, with
            the moving average of the routing, or 1 / E, as weights: merging is then exact.
        router_aux_loss_coef: Weight of the balance loss, added to the loss of a training forward.
        router_z_loss_coef: Weight of the router's z loss, likewise.
        router_jitter_noise: Half-width of the multiplicative noise on the router's input in training.
        router_ema_decay: Decay of the moving average of the routing.
        modules_to_save: Modules besides the adapter to train and save, as a classifier.
        init_weights: True = the adapted model starts as the base model. False is for tests.
        mol_version: Version of the adapter's format.

    Raises:
        ValueError: a value is not allowed; the error names the field, the value, and what is allowed.
    """

    r: int = field(default=8, metadata={"help": "Rank of an expert."})
    lora_alpha: float = field(default=16, metadata={"help": "The experts' scale is lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the low-rank paths."})
    num_experts: int = field(default=8, metadata={"help": "Experts per FFN."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts per token."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules that hold an FFN: names, or a regular expression."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of the layers."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name in front of the layer's number."}
    )
    ffn_projections: dict[str, str] | None = field(
        default=None, metadata={"help": "Names of gate, up and down projection in an FFN that is not recognised."}
    )
    expert_mixing: str = field(default="token", metadata={"help": "'token', 'ema' or 'uniform'."})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "Weight of the balance loss."})
    router_z_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the router's z loss."})
    router_jitter_noise: float = field(default=0.0, metadata={"help": "Noise on the router's input in training."})
    router_ema_decay: float = field(default=0.99, metadata={"help": "Decay of the moving average of the routing."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Further modules to train and save."})
    init_weights: bool = field(default=True, metadata={"help": "Start as the base model."})
    mol_version: int = field(default=MOL_VERSION, metadata={"help": "Version of the adapter's format."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = MOL
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self.validate()

    def validate(self) -> None:
        def require(name: str, is_allowed: bool, allowed: str) -> None:
            if not is_allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be {allowed}.")

        def whole(name: str) -> bool:
            return isinstance(getattr(self, name), int) and not isinstance(getattr(self, name), bool)

        for name in ("r", "num_experts", "num_experts_per_tok"):
            require(name, whole(name) and getattr(self, name) >= 1, "a whole number of at least 1")
        require("num_experts_per_tok", self.num_experts_per_tok <= self.num_experts, f"at most {self.num_experts=}")
        require("lora_alpha", self.lora_alpha > 0, "greater than 0")
        require("lora_dropout", 0 <= self.lora_dropout < 1, "from 0 to below 1")
        require("expert_mixing", self.expert_mixing in MIXINGS, "one of " + ", ".join(map(repr, MIXINGS)))
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("router_jitter_noise", "router_ema_decay"):
            require(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        names = self.ffn_projections
        is_named = names is None or (
            isinstance(names, dict) and {"up", "down"} <= names.keys() <= {"gate", "up", "down"}
        )
        require("ffn_projections", is_named, "a dictionary with 'up' and 'down', and 'gate' where there is one")
        newest = whole("mol_version") and self.mol_version <= MOL_VERSION
        require("mol_version", newest, f"at most {MOL_VERSION}: a newer modernalbert wrote this adapter")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r

    @property
    def is_routed(self) -> bool:
        """Whether there is a router: one expert needs none."""
        return self.num_experts > 1

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write `adapter_config.json`, and tell in the card how to load an adapter that peft alone does not know."""
        super().save_pretrained(save_directory, **kwargs)
        file = Path(save_directory, "adapter_config.json")
        written = json.loads(file.read_text())
        # peft names the class and module of the base; loaded as remote code it lives in no importable module.
        if "transformers_modules" in str(written.get("auto_mapping")):
            file.write_text(json.dumps(written | {"auto_mapping": None}, indent=2, sort_keys=True))
        card = Path(save_directory, "README.md")
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        if CARD_NOTICE not in text:
            front = re.match(r"---\n.*?\n---\n", text, flags=re.DOTALL)
            at = front.end() if front else 0
            card.write_text(f"{text[:at]}{CARD_NOTICE}\n{text[at:]}", encoding="utf-8")


CARD_NOTICE = (
    "> **`pip install modernalbert` and `import modernalbert` before loading this adapter**: it is a Mixture of LoRAs "
    "(peft type `MOL`), which peft alone does not know.\n"
)


# --- the layer -------------------------------------------------------------------------------------------------------


class Float32Buffers(BufferDict if is_peft_available() else object):
    """Buffers by adapter that stay float32: a moving average of decay 0.99 stalls in bfloat16."""

    def _apply(self, fn, recurse=True):
        kept = dict(self.items())
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if self[name].dtype != torch.float32:
                self[name] = buffer.to(self[name].device)
        return self


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


class MoLLayer(nn.Module, BaseTunerLayer):
    """
    The module that holds an FFN, with MoL adapters on it.

    State by adapter name, with d, n, f the widths of the FFN's input, first projections together, and inner states:
    `mol_router` (weight (E, d)), `mol_A_in` (E, r, d), `mol_B_in` (E, n, r), `mol_A_out` (E, r, f), `mol_B_out`
    (E, d, r), `mol_usage` (E,), the float32 moving average of the routing. One expert has no router and no usage.

    Args:
        base_layer: The FFN, or the layer that holds it.
        names: Its projections.
    """

    adapter_layer_names = ("mol_router", "mol_A_in", "mol_B_in", "mol_A_out", "mol_B_out")
    other_param_names = ("mol_usage", "mol_config")

    def __init__(self, base_layer: nn.Module, names: Projections, adapter_name: str, config: MoLConfig):
        super().__init__()
        self.base_layer = base_layer
        self.projection_names = names
        self.mol_router = nn.ModuleDict()
        self.mol_A_in = nn.ParameterDict()
        self.mol_B_in = nn.ParameterDict()
        self.mol_A_out = nn.ParameterDict()
        self.mol_B_out = nn.ParameterDict()
        self.mol_usage = Float32Buffers(persistent=True)
        self.mol_config: dict[str, MoLConfig] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self._unmerged_weights: dict[str, torch.Tensor] = {}
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
        E, r, d, f = config.num_experts, config.r, self.hidden_size, self.width
        shapes = {
            "mol_A_in": (E, r, d),
            "mol_B_in": (E, sum(self.input_widths), r),
            "mol_A_out": (E, r, f),
            "mol_B_out": (E, self.output_size, r),
        }
        with torch.no_grad():
            for name, shape in shapes.items():
                getattr(self, name)[adapter_name] = nn.Parameter(torch.empty(shape))
            for A, B in (("mol_A_in", "mol_B_in"), ("mol_A_out", "mol_B_out")):
                A, B = getattr(self, A)[adapter_name], getattr(self, B)[adapter_name]
                init_lora(A, B)
                if not config.init_weights:
                    nn.init.normal_(B, std=0.1)
            for container in (self.mol_router, self.mol_usage):
                if adapter_name in container:
                    del container[adapter_name]
            if config.is_routed:
                router = MoLRouter(d, E, jitter_noise=config.router_jitter_noise)
                nn.init.normal_(router.weight, std=0.02)
                self.mol_router[adapter_name] = router
                self.mol_usage[adapter_name] = torch.full((E,), 1 / E, dtype=torch.float32)
        self.mol_config[adapter_name] = config
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer):
        return super()._get_base_layer_device_and_dtype(self.output_projection)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        usage = self.mol_usage[adapter_name] if adapter_name in self.mol_usage else None
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if usage is not None and self.mol_usage[adapter_name].dtype != torch.float32:
            self.mol_usage[adapter_name] = usage.to(self.mol_usage[adapter_name].device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        here = [name for name in names if name in self.mol_config]
        if len(here) > 1:
            raise ValueError(
                f"{here} cannot be active together: the sum of two mixtures has no meaning here. Activate one, or give "
                "each row of a batch its own with adapter_names."
            )
        super().set_adapter(adapter_names, inference_mode)
        self._freeze_idle_routers()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_idle_routers()

    def _freeze_idle_routers(self) -> None:
        # A router that mixes nothing gets no gradient: frozen, data-parallel training does not wait for one.
        for name, router in self.mol_router.items():
            if self.mol_config[name].expert_mixing != "token":
                router.weight.requires_grad_(False)

    def experts(self, adapter_name: str, dtype: torch.dtype | None = None) -> Experts:
        """The experts of an adapter as the mathematics take them."""
        factors = (getattr(self, name)[adapter_name] for name in ("mol_A_in", "mol_B_in", "mol_A_out", "mol_B_out"))
        return Experts(*(factor.to(dtype or factor.dtype) for factor in factors), self.mol_config[adapter_name].scaling)

    def expert_weights(self, adapter_name: str, weights: str = "ema") -> torch.Tensor:
        """(E,) weights of the merged expert: "uniform", or "ema", the moving average of the routing."""
        num_experts = self.mol_config[adapter_name].num_experts
        if weights == "uniform" or num_experts == 1:
            return torch.full((num_experts,), 1 / num_experts, device=self.mol_A_in[adapter_name].device)
        # A copy: the average moves on at the end of a training forward, and a checkpoint recompute must see this one.
        return self.mol_usage[adapter_name].clone()

    # -- forward

    def _adapters_of_tokens(self, num_tokens: int, device: torch.device) -> list[tuple[str, torch.Tensor | None]]:
        """Which adapter serves which tokens; tokens of the base model are in none."""
        if self.row_adapters is None:
            return [(name, None) for name in self.active_adapters if name in self.mol_config]
        each, rest = divmod(num_tokens, len(self.row_adapters))
        if rest:
            raise ValueError(
                f"adapter_names has {len(self.row_adapters)} names, which does not divide the {num_tokens} tokens of "
                "this batch: it must have one name per row."
            )
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
        """An FFN alone takes its tokens in blocks, so that the k copies of each stay in cache."""
        is_ffn = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and self.row_adapters is None
        if is_ffn and "." not in self.projection_names.output and self._has_one_argument:
            x = args[0]
            tokens = x.reshape(-1, x.shape[-1])
            blocks = token_blocks(tokens)
            if blocks is not None:
                outputs = [self.base_layer(tokens[rows].unsqueeze(0)) for rows in blocks]
                return torch.cat(outputs, dim=1).view(*x.shape[:-1], -1)
        return self.base_layer(*args, **kwargs)

    @property
    def _has_one_argument(self) -> bool:
        return len(inspect.signature(self.get_base_layer().forward).parameters) == 1

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
        base = output.reshape(-1, output.shape[-1])
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
        return hidden.view(-1, *call.shape[1:], output.shape[-1])

    def _begin(self, x: torch.Tensor, dtype: torch.dtype) -> FFNCall:
        """Route the tokens of x (batch, ..., d)."""
        tokens = x.reshape(-1, x.shape[-1])
        adapters = []
        for name, rows in self._adapters_of_tokens(tokens.shape[0], x.device):
            mine = tokens if rows is None else tokens[rows]
            adapters.append(self._call_adapter(name, rows, mine, x.shape[:-1], dtype))
        num_slots = max((adapter.routing_weights.shape[-1] for adapter in adapters), default=1)
        return FFNCall(x.shape[:-1], num_slots, adapters, set())

    def _call_adapter(
        self, name: str, rows: torch.Tensor | None, tokens: torch.Tensor, shape: torch.Size, dtype: torch.dtype
    ) -> AdapterCall:
        config = self.mol_config[name]
        experts = self.experts(name, dtype)
        logits = None
        if config.is_routed and (config.expert_mixing == "token" or self.recorded is not None):
            router = self.mol_router[name]
            with torch.set_grad_enabled(torch.is_grad_enabled() and config.expert_mixing == "token"):
                logits = router(tokens.to(router.weight.dtype))
            if self.recorded is not None and rows is None:
                self._call_logits.append(logits.view(*shape, -1))
        if logits is not None and config.expert_mixing == "token":
            _, weights, index = route(logits, config.num_experts_per_tok)
        else:
            if config.is_routed:
                experts = concatenate_experts(experts, self.expert_weights(name, config.expert_mixing))
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
        hidden = args[0].reshape(call.num_slots, -1, args[0].shape[-1])
        if len(call.adapters) == 1 and call.adapters[0].rows is None:
            mixture, low_rank = self._mix(hidden, call.adapters[0])
            self._low_rank = [low_rank]
        else:
            mixture, self._low_rank = hidden[0].clone(), []
            for adapter in call.adapters:
                num_slots = adapter.routing_weights.shape[-1]
                mixture[adapter.rows], low_rank = self._mix(hidden[:num_slots, adapter.rows], adapter)
                self._low_rank.append(low_rank)
        return mixture.view(*call.shape, -1), *args[1:]

    @staticmethod
    def _mix(hidden: torch.Tensor, adapter: AdapterCall) -> tuple[torch.Tensor, torch.Tensor]:
        slots: Slots = fill_slots(adapter.routing_weights, adapter.experts_index, adapter.experts, hidden.dtype)
        mask = None
        if adapter.dropout:
            mask = nn.functional.dropout(torch.ones_like(hidden[0]), adapter.dropout)
        return mix_slots(hidden, adapter.experts.A_out.to(hidden.dtype), slots, mask)

    def _after_output(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Behind the last projection: the experts' low-rank parts are added."""
        if self._call is None or not self._is_adapted:
            return None
        call, self._call = self._call, None
        result = output.reshape(-1, output.shape[-1])
        for adapter, low_rank in zip(call.adapters, self._low_rank):
            B_out = adapter.experts.B_out.to(low_rank.dtype)
            if adapter.rows is None:
                result = add_low_rank(result, low_rank, B_out).to(output.dtype)
            else:
                result = result.clone()
                result[adapter.rows] = add_low_rank(result[adapter.rows], low_rank, B_out).to(output.dtype)
        self._low_rank = []
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
                if weight is None or not weight.is_floating_point() or weight.shape != delta.shape:
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
            self.get_base_layer().get_submodule(path).weight.data = weight
        self._unmerged_weights.clear()
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


# --- losses and statistics of one forward ----------------------------------------------------------------------------


class RoutingObserver:
    """
    Hooks on a whole model: they listen to its MoL layers during one forward, and then

    - in training add the balance and z losses to the loss, and move the averages of the routing;
    - for `output_router_logits=True` put `router_logits` (one (batch, sequence, E) per use of an FFN, in the order of
      the layers) and, in training, `aux_loss` into the output.
    """

    def __init__(self):
        self.is_asked = False

    def attach(self, model: nn.Module) -> None:
        """Listen to a model; a second time changes nothing."""
        if not any(
            isinstance(getattr(hook, "__self__", None), RoutingObserver) for hook in model._forward_hooks.values()
        ):
            model.register_forward_pre_hook(self.before, with_kwargs=True)
            model.register_forward_hook(self.after, with_kwargs=True)

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Stop listening to a model."""
        for hooks, with_kwargs in (
            (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs),
            (model._forward_hooks, model._forward_hooks_with_kwargs),
        ):
            for number, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), RoutingObserver):
                    del hooks[number], with_kwargs[number]

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        is_asked = bool(kwargs.get("output_router_logits"))
        if "output_router_logits" not in inspect.signature(model.forward).parameters:
            kwargs = {name: value for name, value in kwargs.items() if name != "output_router_logits"}
        self.is_asked = is_asked
        listening = is_asked or (model.training and torch.is_grad_enabled())
        for _, layer in mol_layers(model):
            layer.recorded = [] if listening else None
        return args, kwargs

    def after(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        records: dict[str, list[torch.Tensor]] = {}
        layers = dict(mol_layers(model))
        for name, layer in layers.items():
            if layer.recorded:
                records[name] = layer.recorded
            layer.recorded = None
        if not records:
            return output
        aux_loss = None
        if model.training and torch.is_grad_enabled():
            aux_loss = self._finish_step(layers, records, kwargs)
        loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
        if aux_loss is not None and loss is not None and kwargs.get("labels") is not None:
            # Where the loss is a sum over the labels of the whole optimizer step, this is this batch's share of them.
            num_items = kwargs.get("num_items_in_batch")
            share = 1 if num_items is None else (kwargs["labels"] != -100).sum() / num_items
            loss = loss + share * aux_loss.to(loss.device)
            if isinstance(output, tuple):
                output = (loss, *output[1:])
            else:
                output["loss"] = loss
        if self.is_asked and not isinstance(output, tuple):
            output["router_logits"] = tuple(logits for record in records.values() for logits in record)
            if aux_loss is not None:
                output["aux_loss"] = aux_loss
        return output

    @staticmethod
    def _finish_step(
        layers: dict[str, MoLLayer], records: dict[str, list[torch.Tensor]], kwargs: dict
    ) -> torch.Tensor | None:
        """The auxiliary loss, a mean over all uses of FFNs; the averages of the routing move, over all processes."""
        losses, usages, counts, averages, decays = [], [], [], [], []
        for name, record in records.items():
            (adapter_name,) = (
                adapter for adapter in layers[name].active_adapters if adapter in layers[name].mol_config
            )
            config = layers[name].mol_config[adapter_name]
            mask = token_mask(name, record[0], kwargs)
            k = config.num_experts_per_tok
            # The uses of a shared FFN may differ in length, as in an encoder and a decoder.
            summaries = [summarise_routing((logits,), k, mask) for logits in record]
            if config.expert_mixing == "token":
                coefficients = config.router_aux_loss_coef, config.router_z_loss_coef
                losses += [coefficients[0] * s.balance_loss + coefficients[1] * s.z_loss for s in summaries]
            counts.append(sum(s.num_tokens for s in summaries))
            usages.append(sum(s.usage[0] * s.num_tokens for s in summaries))
            averages.append(layers[name].mol_usage[adapter_name])
            decays.append(config.router_ema_decay)
        sums = sum_over_processes(*usages, *counts)
        for usage, num_tokens, average, decay in zip(sums, sums[len(usages) :], averages, decays):
            moved = torch.lerp((usage / num_tokens.clamp(min=1)).to(average), average, decay)
            average.copy_(torch.where(num_tokens > 0, moved, average))
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean() if losses else None


def token_mask(layer_name: str, logits: torch.Tensor, kwargs: dict) -> torch.Tensor | None:
    """The (batch, sequence) mask of real tokens that fits a layer's router logits, or None if there is none."""
    name = "decoder_attention_mask" if "decoder" in layer_name.split(".") and "decoder_input_ids" in kwargs else None
    mask = kwargs.get(name or "attention_mask")
    fits = isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.numel() == logits[..., 0].numel()
    return mask if fits else None


def mol_layers(model: nn.Module) -> Iterator[tuple[str, MoLLayer]]:
    """The MoL layers of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MoLLayer))


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
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            if "target_modules" not in str(error) and "Target modules" not in str(error):
                raise
            names = ffn_modules(model)
            patterns = sorted({re.sub(r"\d+", "*", name) for name in names})
            hint = f"Its feed-forward networks are {', '.join(patterns)}." if names else "It has none of a known form."
            raise type(error)(f"{error} {hint}") from None

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
        # Only ever called to give the original back: what is replaced has no weight of its own.
        child.remove_hooks()
        setattr(parent, child_name, new_module)

    def _post_injection_hook(self, model: nn.Module, config: MoLConfig, adapter_name: str) -> None:
        RoutingObserver().attach(model)

    # -- one adapter per row

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, **kwargs) -> Iterator[None]:
        """Run with an adapter for each row of the batch; called by `PeftModel`."""
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names is not allowed in training: each row's own adapter is for inference.")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {BASE})
        if unknown:
            raise ValueError(
                f"adapter_names={unknown} is not allowed: the adapters are {', '.join(map(repr, self.peft_config))} "
                f"and {BASE!r}."
            )
        handles = []
        for module in self.modules():
            if isinstance(module, MoLLayer):
                module.row_adapters = list(adapter_names)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                handles.append(
                    module.register_forward_pre_hook(partial(_add_names, list(adapter_names)), with_kwargs=True)
                )
        try:
            yield
        finally:
            for _, layer in mol_layers(self):
                layer.row_adapters = None
            for handle in handles:
                handle.remove()

    # -- state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoLConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_adapter_state(model, config, adapter_name, mapped)
        return mapped

    def expert_usage(self) -> dict[str, torch.Tensor]:
        """The moving average of the routing, (E,) by layer, of the active adapter."""
        return {
            name: layer.mol_usage[adapter].clone()
            for name, layer in mol_layers(self.model)
            for adapter in layer.active_adapters
            if adapter in layer.mol_usage
        }

    # -- merging

    def merge_experts(
        self,
        weights: str | Sequence[float] = "ema",
        method: str = "linear",
        rank: int | None = None,
        adapter_name: str | None = None,
        new_adapter_name: str | None = None,
        calibration: Sequence[dict] | None = None,
    ) -> "MoLMergeReport":
        """
        Replace an adapter's E experts by one, Delta = sum_e w_e Delta_e, which is a LoRA on all projections of the FFN.

        Exact for one expert, and where the adapter ran with `expert_mixing="ema"` or "uniform" and is merged with the
        same weights; otherwise the routing depended on the token, and the report measures what is lost.

        Args:
            weights: "uniform" (1/E), "ema" (the moving average of the routing), "calibration" (mean routing weights on
                the calibration batches), or E numbers.
            method: "linear" (exact sum, rank E r) or "svd" (best of `rank`, by default r).
            adapter_name: Which adapter; None = the active one.
            new_adapter_name: Keep it, and add the merged one under this name; None = in its place.
            calibration: Batches of model inputs to measure on; None = random inputs, and the report says so.

        Raises:
            ValueError: there is no such adapter, or weights, method or rank are not allowed.
        """
        adapter_name = adapter_name or self.active_adapters[0]
        if adapter_name not in self.peft_config:
            raise ValueError(
                f"adapter_name={adapter_name!r} is not allowed: the adapters are "
                f"{', '.join(map(repr, self.peft_config))}."
            )
        if new_adapter_name in self.peft_config:
            raise ValueError(f"new_adapter_name={new_adapter_name!r} is not allowed: there is an adapter of that name.")
        if method not in MERGE_METHODS:
            raise ValueError(
                f"method={method!r} is not allowed: it must be one of {', '.join(map(repr, MERGE_METHODS))}."
            )
        if any(adapter_name in layer.merged_adapters for _, layer in mol_layers(self.model)):
            raise ValueError(
                f"adapter_name={adapter_name!r} is not allowed: it is merged into the base; unmerge it first."
            )
        config: MoLConfig = self.peft_config[adapter_name]
        batches, measured_on = self._batches(calibration)
        layers = {name: layer for name, layer in mol_layers(self.model) if adapter_name in layer.mol_config}
        layer_weights = self._resolve_weights(weights, adapter_name, layers, calibration)
        with self._only(adapter_name):
            before = self._measure(batches)
            merged = {}
            for name, layer in layers.items():
                experts = layer.experts(adapter_name, torch.float64)
                experts = experts._replace(**{part: getattr(experts, part).detach() for part in experts._fields[:4]})
                merged[name] = MERGE_METHODS[method](experts, layer_weights[name].double(), rank)
        new_rank = next(iter(merged.values())).expert.A_in.shape[1]
        new_config = replace(config, num_experts=1, num_experts_per_tok=1, r=new_rank, lora_alpha=new_rank)
        target = new_adapter_name or adapter_name
        self._put_merged(target, new_config, layers, merged)
        with self._only(target):
            after = self._measure(batches)
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

    def _put_merged(self, adapter_name: str, config: MoLConfig, layers: dict[str, MoLLayer], merged: dict) -> None:
        self.peft_config[adapter_name] = config
        for name, layer in layers.items():
            trainable = any(
                p.requires_grad for a in layer.active_adapters if a in layer.mol_A_in for p in [layer.mol_A_in[a]]
            )
            dtype = next(iter(layer.mol_A_in.values())).dtype
            layer.update_layer(adapter_name, config)
            for part, value in zip(("A_in", "B_in", "A_out", "B_out"), merged[name].expert[:4]):
                container = getattr(layer, f"mol_{part}")
                old = container[adapter_name]
                container[adapter_name] = nn.Parameter(value.to(device=old.device, dtype=dtype))
            layer.set_adapter(layer.active_adapters, inference_mode=not trainable)

    def _resolve_weights(
        self,
        weights: str | Sequence[float],
        adapter_name: str,
        layers: dict[str, MoLLayer],
        calibration: Sequence[dict] | None,
    ) -> dict[str, torch.Tensor]:
        """The (E,) mixing weights of each layer."""
        num_experts = self.peft_config[adapter_name].num_experts
        if not isinstance(weights, str):
            weights = torch.tensor(list(weights), dtype=torch.float32)
            if len(weights) != num_experts or not weights.isfinite().all():
                raise ValueError(f"weights={weights.tolist()} is not allowed: it must be {num_experts} finite numbers.")
            return {name: weights.to(layer.mol_A_in[adapter_name].device) for name, layer in layers.items()}
        if weights not in ("uniform", "ema", "calibration"):
            raise ValueError(
                f"weights={weights!r} is not allowed: it must be 'uniform', 'ema', 'calibration' or {num_experts} "
                "numbers."
            )
        if weights == "calibration" and not calibration:
            raise ValueError("weights='calibration' is not allowed without calibration batches.")
        if weights != "calibration" or num_experts == 1:
            return {name: layer.expert_weights(adapter_name, weights) for name, layer in layers.items()}
        totals = dict.fromkeys(layers, 0)
        with self._only(adapter_name), torch.no_grad():
            for batch in calibration:
                for layer in layers.values():
                    layer.recorded = []
                self.model(**batch)
                for name, layer in layers.items():
                    mask = token_mask(name, layer.recorded[0], batch)
                    k = layer.mol_config[adapter_name].num_experts_per_tok
                    for logits in layer.recorded:
                        summary = summarise_routing((logits,), k, mask)
                        totals[name] = totals[name] + summary.usage[0] * summary.num_tokens
                    layer.recorded = None
        return {name: total / total.sum() for name, total in totals.items()}

    @contextmanager
    def _only(self, adapter_name: str) -> Iterator[None]:
        """Evaluation mode with one adapter active; everything is put back afterwards."""
        modes = {module: module.training for module in self.model.modules()}
        active = {layer: (layer._active_adapter, layer._disable_adapters) for _, layer in mol_layers(self.model)}
        self.model.eval()
        for layer in active:
            layer._active_adapter, layer._disable_adapters = [adapter_name], False
        try:
            yield
        finally:
            for layer, (name, disabled) in active.items():
                layer._active_adapter, layer._disable_adapters = name, disabled
            for module, mode in modes.items():
                module.training = mode

    def _batches(self, calibration: Sequence[dict] | None) -> tuple[list[dict], str]:
        if calibration is not None:
            batches = list(calibration)
            if not batches:
                raise ValueError("calibration=[] is not allowed: it must hold at least one batch.")
            return batches, "the calibration batches"
        return [random_inputs(self.model)], "random inputs (no calibration batches given)"

    @torch.no_grad()
    def _measure(self, batches: list[dict]) -> "Measurement":
        outputs, losses = [], []
        for batch in batches:
            output = self.model(**batch)
            loss = getattr(output, "loss", None)
            losses += [] if loss is None else [loss.item()]
            states = output.get("logits", None) if hasattr(output, "get") else output
            if states is None:
                states = next((v for n, v in output.items() if n != "loss" and isinstance(v, torch.Tensor)), None)
            outputs.append(states.float())
        return Measurement(outputs, sum(losses) / len(losses) if losses else None)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            for name in adapter_names or self.active_adapters:
                self._warn_of_loss(name)
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        RoutingObserver.detach(model)
        return model

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        for name in adapter_names or self.active_adapters:
            self._warn_of_loss(name)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _warn_of_loss(self, adapter_name: str) -> None:
        """Say what merging an adapter changes, measured, where it is not exact."""
        config = self.peft_config.get(adapter_name)
        layers = [layer for _, layer in mol_layers(self.model) if adapter_name in layer.mol_config and not layer.merged]
        if config is None or not config.is_routed or config.expert_mixing != "token" or not layers:
            return
        batches, measured_on = self._batches(None)
        with self._only(adapter_name):
            before = self._measure(batches).outputs
            for layer in layers:
                layer.mol_config[adapter_name] = replace(config, expert_mixing="ema")
            after = self._measure(batches).outputs
            for layer in layers:
                layer.mol_config[adapter_name] = config
        warnings.warn(
            f"Merging the {config.num_experts} experts of adapter {adapter_name!r} is not exact, because their weights "
            f"depend on the token: the model's output changes by {100 * relative_error(before, after):.2f} % on "
            f"{measured_on}. merge_experts(calibration=...) measures it on yours.",
            stacklevel=3,
        )

    # -- for people with plain peft

    def save_as_lora(self, folder: str | Path, adapter_name: str | None = None) -> Path:
        """
        Write an adapter of one expert as a stock `LoraConfig` checkpoint, which peft loads with none of this code.

        Args:
            folder: Must not exist, or be empty.
            adapter_name: Which adapter; None = the active one.

        Raises:
            ValueError: the adapter has several experts (call `merge_experts` first), or the folder is not empty.
        """
        adapter_name = adapter_name or self.active_adapters[0]
        config: MoLConfig = self.peft_config[adapter_name]
        if config.num_experts > 1:
            raise ValueError(
                f"Adapter {adapter_name!r} has {config.num_experts} experts, a LoRA has one: call merge_experts first."
            )
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty.")
        state = get_peft_model_state_dict(self.model, adapter_name=adapter_name)
        state = {f"base_model.model.{name}": value for name, value in state.items() if ".mol_" not in name}
        targets, is_conv1d = [], False
        for name, layer in mol_layers(self.model):
            if adapter_name not in layer.mol_config:
                continue
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
                {name: value.contiguous().cpu() for name, value in state.items()},
                temporary / "adapter_model.safetensors",
            )
            lora.save_pretrained(temporary)
            temporary.chmod(0o755)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder


def _add_names(adapter_names: list[str], module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, kwargs | {"adapter_names": adapter_names}


class Measurement(NamedTuple):
    """What a model said to some batches."""

    outputs: list[torch.Tensor]
    loss: float | None


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
    config, device = model.config, next(model.parameters()).device
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
        shape = (batch_size, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
        inputs["pixel_values"] = torch.randn(shape, generator=generator)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.randint(text.vocab_size, (batch_size, length), generator=generator)
    if not inputs:
        raise ValueError(f"{type(model).__name__} takes inputs of its own kind: give calibration batches.")
    return {name: value.to(device) for name, value in inputs.items()}


def check_adapter_state(model: nn.Module, config: MoLConfig, adapter_name: str, state: dict[str, torch.Tensor]) -> None:
    """
    Refuse an adapter's weights that do not fit the model it is loaded into.

    Raises:
        ValueError: a tensor is missing, or has another shape; the error names it, and the base the adapter wants.
    """
    base = f" The adapter was made for {config.base_model_name_or_path}." if config.base_model_name_or_path else ""
    for name, layer in mol_layers(model):
        if adapter_name not in layer.mol_config:
            continue
        for part in (*layer.adapter_layer_names, "mol_usage"):
            container = getattr(layer, part)
            if adapter_name not in container:
                continue
            key = f"{name}.{part}.{adapter_name}" + (".weight" if part == "mol_router" else "")
            value = container[adapter_name]
            value = value.weight if part == "mol_router" else value
            if key not in state:
                raise ValueError(f"The adapter has no {part} for {name}.{base}")
            if state[key].shape != value.shape:
                raise ValueError(
                    f"The adapter's {part} for {name} is {tuple(state[key].shape)}, and this model and its "
                    f"configuration need {tuple(value.shape)}.{base}"
                )


# --- registration ----------------------------------------------------------------------------------------------------

# The first import wins: a second copy (the package beside a Hub folder's code, say), or a peft that has its own, stays.
if MOL not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="mol", config_cls=MoLConfig, model_cls=MoLModel, prefix=MoLModel.prefix)
