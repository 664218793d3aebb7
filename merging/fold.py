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
"""A model without its experts: left out, folded into the shared FFN, or replaced by one."""

import copy

import torch
from transformers import PreTrainedModel

from modernalbert.mol_backends import Experts


def copy_with(model: PreTrainedModel, **changes) -> PreTrainedModel:
    """A model of the same class with changed configuration, with all weights the two have in common, frozen in eval."""
    config = type(model.config).from_dict(copy.deepcopy(model.config.to_dict()) | changes)
    config._attn_implementation = model.config._attn_implementation
    new = type(model)(config).to(device=model.device, dtype=model.dtype)
    state = model.state_dict()
    new.load_state_dict({name: value for name, value in state.items() if ".mlp.mol_" not in name}, strict=False)
    return new.eval()


def without_experts(model: PreTrainedModel) -> PreTrainedModel:
    """The shared model alone."""
    return copy_with(model, ffn_modulation="none")


@torch.no_grad()
def fold(base: PreTrainedModel, experts: dict[int, Experts]) -> PreTrainedModel:
    """`base` with each group's one LoRA added to the weights: no experts, no router, the plain model's graph."""
    model = copy.deepcopy(base)
    for k, expert in experts.items():
        mlp = model.base_model.groups[k].mlp
        for layer, A, B in ((mlp.Wi, expert.A_in, expert.B_in), (mlp.Wo, expert.A_out, expert.B_out)):
            layer.weight.copy_(layer.weight.double() + B[0] @ A[0])
    return model


@torch.no_grad()
def with_one_expert(model: PreTrainedModel, experts: dict[int, Experts]) -> PreTrainedModel:
    """The model with the merged expert as its only one, without a router."""
    rank = next(iter(experts.values())).A_in.shape[1]
    new = copy_with(model, num_experts=1, lora_rank=rank, lora_alpha=rank)
    for k, expert in experts.items():
        mlp = new.base_model.groups[k].mlp
        for parameter, value in zip((mlp.mol_A_in, mlp.mol_B_in, mlp.mol_A_out, mlp.mol_B_out), expert[:4]):
            parameter.copy_(value)
    return new
