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
What the MoL adapters of a model say about one forward: auxiliary losses, statistics, router logits.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from modernalbert.modeling_mol import sum_over_processes, summarise_routing


logger = logging.get_logger(__name__)


class RoutingObserver:
    """
    Hooks on a whole model: they listen to its MoL layers during one forward, and then

    - in training add the balance and z losses to the loss, and move the averages of the routing;
    - with `expert_labels` (batch,), the expert that each row should go to, add the cross-entropy of the routing;
    - for `output_router_logits=True` put `router_logits` (one (batch, sequence, E) per use of an FFN, in the order of
      the layers) and, in training, `aux_loss` into the output.
    """

    def __init__(self):
        self.is_asked = self.is_listening = False
        self.expert_labels: torch.Tensor | None = None

    def attach(self, model: nn.Module) -> None:
        """Listen to a model; a second time changes nothing."""
        if not any(
            isinstance(getattr(hook, "__self__", None), RoutingObserver) for hook in model._forward_hooks.values()
        ):
            model.register_forward_pre_hook(self.before, with_kwargs=True)
            model.register_forward_hook(self.after, with_kwargs=True)

    @staticmethod
    def detach(model: nn.Module) -> "RoutingObserver | None":
        """Stop listening to a model; returns who did, if anybody."""
        observer = None
        for hooks, with_kwargs in (
            (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs),
            (model._forward_hooks, model._forward_hooks_with_kwargs),
        ):
            for number, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), RoutingObserver):
                    observer = hook.__self__
                    del hooks[number], with_kwargs[number]
        return observer

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if "adapter_names" in kwargs:
            raise ValueError("adapter_names is not allowed here: wrap the model in a PeftModel to mix adapters.")
        self.is_asked = bool(kwargs.get("output_router_logits"))
        self.expert_labels = kwargs.get("expert_labels")
        known = inspect.signature(model.forward).parameters
        ours = {"output_router_logits", "expert_labels"}.difference(known)
        kwargs = {name: value for name, value in kwargs.items() if name not in ours}
        is_training = model.training and torch.is_grad_enabled()
        self.is_listening = self.is_asked or is_training
        can_use_labels = False
        for _, layer in mol_layers(model):
            layer.recorded = [] if self.is_listening else None
            usage = layer.mol_usage.items() if is_training else ()
            layer.usage_at_start = {name: average.clone() for name, average in usage}
            can_use_labels |= any(layer.mol_config[name].expert_mixing == "token" for name in layer.mol_router)
        if self.expert_labels is not None and not (is_training and can_use_labels):
            logger.warning_once("expert_labels has no effect: only the training of adapters that route tokens uses it.")
        return args, kwargs

    def after(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not self.is_listening:
            return output
        records: dict[str, list[torch.Tensor]] = {}
        layers = dict(mol_layers(model))
        for name, layer in layers.items():
            if layer.recorded:
                records[name] = layer.recorded
            layer.recorded = None
        if not records:
            return output
        aux_loss = loss = None
        if model.training and torch.is_grad_enabled():
            inputs = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
            inputs = inputs | inputs.get("kwargs", {})
            aux_loss = self._finish_step(model, layers, records, inputs, self.expert_labels)
            loss = getattr(output, "loss", None)
            if isinstance(output, tuple) and inputs.get("labels") is not None:
                loss = output[0]
        if aux_loss is not None and loss is not None:
            loss = loss + label_share(model, inputs) * aux_loss.to(loss.device)
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
        model: nn.Module,
        layers: dict[str, nn.Module],
        records: dict[str, list[torch.Tensor]],
        inputs: dict,
        expert_labels: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """The auxiliary loss, a mean over all uses of FFNs; the averages of the routing move, over all processes."""
        losses, targets, usages, counts, averages, decays = [], [], [], [], [], []
        for name, record in records.items():
            (adapter_name,) = (
                adapter for adapter in layers[name].active_adapters if adapter in layers[name].mol_config
            )
            config = layers[name].mol_config[adapter_name]
            parameters = (p for key, p in layers[name].named_parameters() if key.split(".")[1:2] == [adapter_name])
            if not any(parameter.requires_grad for parameter in parameters):
                continue  # a frozen adapter in a model that is trained otherwise
            mask = token_mask(model, name, record[0], inputs)
            k = config.num_experts_per_tok
            # The uses of a shared FFN may differ in length, as in an encoder and a decoder.
            summaries = [summarise_routing((logits,), k, mask) for logits in record]
            if config.expert_mixing == "token":
                if not record[0].requires_grad and layers[name].mol_router[adapter_name].weight.requires_grad:
                    logger.warning_once(
                        "The routing losses have no gradient, because reentrant gradient checkpointing hides the "
                        "router from them: use gradient_checkpointing_kwargs={'use_reentrant': False}."
                    )
                coefficients = config.router_aux_loss_coef, config.router_z_loss_coef
                losses += [coefficients[0] * s.balance_loss + coefficients[1] * s.z_loss for s in summaries]
                if expert_labels is not None:
                    targets += [config.router_target_coef * routing_loss(u, expert_labels, mask) for u in record]
            counts.append(sum(s.num_tokens for s in summaries))
            usages.append(sum(s.usage[0] * s.num_tokens for s in summaries))
            averages.append(layers[name].mol_usage[adapter_name])
            decays.append(config.router_ema_decay)
        if not counts:
            return None
        sums = sum_over_processes(*usages, *counts)
        for usage, num_tokens, average, decay in zip(sums, sums[len(usages) :], averages, decays):
            moved = torch.lerp((usage / num_tokens.clamp(min=1)).to(average), average, decay)
            average.copy_(torch.where(num_tokens > 0, moved, average))
        terms = [mean_over_devices(values) for values in (losses, targets) if values]
        return sum(terms) if terms else None


def mean_over_devices(values: list[torch.Tensor]) -> torch.Tensor:
    """The mean of scalars, which a model spread over devices has in several places."""
    return torch.stack([value.to(values[0].device) for value in values]).mean()


def routing_loss(logits: torch.Tensor, expert_labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """
    Cross-entropy of the routing against one expert per row, over real tokens.

    Raises:
        ValueError: a label is no number of an expert, or there is not one label per row.
    """
    num_experts = logits.shape[-1]
    if expert_labels.min() < 0 or expert_labels.max() >= num_experts:
        raise ValueError(f"expert_labels={expert_labels.tolist()} is not allowed: they must be below {num_experts}.")
    num_rows = len(logits)
    logits = logits.reshape(-1, num_experts)
    each, rest = divmod(len(logits), len(expert_labels))
    is_flat = num_rows == len(logits)  # some models flatten a batch before the FFN
    if rest or (num_rows != len(expert_labels) and not is_flat):
        raise ValueError(f"expert_labels has {len(expert_labels)} numbers for {num_rows} rows: one per row.")
    losses = nn.functional.cross_entropy(
        logits, expert_labels.to(logits.device).repeat_interleave(each), reduction="none"
    )
    if mask is None:
        return losses.mean()
    mask = mask.reshape(-1).to(losses)
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def label_share(model: nn.Module, inputs: dict) -> torch.Tensor | float:
    """This batch's share of the optimizer step's labels, where the loss is a sum over all of them; else 1."""
    num_items, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
    if num_items is None or labels is None:
        return 1.0
    if getattr(model, "loss_type", None) == "ForCausalLM":
        labels = labels[..., 1:]  # the first token is not predicted
    return (labels != -100).sum() / num_items


def token_mask(model: nn.Module, layer_name: str, logits: torch.Tensor, inputs: dict) -> torch.Tensor | None:
    """The (batch, sequence) mask of real tokens that fits a layer's router logits, or None if there is none."""
    mask = inputs.get("attention_mask")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder" in layer_name.split("."):
        mask = inputs.get("decoder_attention_mask")
        if mask is None and isinstance(inputs.get("labels"), torch.Tensor):
            mask = inputs["labels"] != -100
    fits = isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.numel() == logits[..., 0].numel()
    return mask if fits else None


def mol_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The MoL layers of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if "mol_config" in module.__dict__)
