# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Observation of the MoL adapters of a model in one forward: router logits, auxiliary losses, statistics.

What is known of a forward belongs to the thread that runs it, and nothing of it stays.
"""

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers.utils import logging

from modernalbert.modeling_mol import sum_over_processes, summarise_routing
from modernalbert.tuner.config import MOL


logger = logging.get_logger(__name__)


# --- recordings ------------------------------------------------------------------------------------------------------


# `recordings`: those that listen to the forwards of this thread, the innermost last.
_THREAD = threading.local()


class Recording:
    """
    The router logits of a model's MoL layers, from all uses of their FFNs in one thread while it listens.

    Attributes:
        logits: By name of the layer, in the order of the layers' first uses: one (batch, sequence, E) for each use.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.names = {layer: name for name, layer in mol_layers(model)}
        self.logits: dict[str, list[torch.Tensor]] = {}

    def add(self, layer: nn.Module, blocks: list[torch.Tensor], inputs: Sequence[Any]) -> None:
        """Add one use of a layer's FFN, which may have taken its tokens in blocks."""
        if not blocks:
            return
        logits = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-2)
        x = inputs[0] if inputs else None
        if isinstance(x, torch.Tensor) and len(blocks) > 1:
            logits = logits.reshape(*x.shape[:-1], logits.shape[-1])
        self.logits.setdefault(self.names[layer], []).append(logits)

    def start(self) -> None:
        _THREAD.recordings = (*getattr(_THREAD, "recordings", ()), self)

    def stop(self) -> None:
        _THREAD.recordings = tuple(other for other in _THREAD.recordings if other is not self)


def recordings_of(layer: nn.Module) -> list[Recording]:
    """Return the recordings in this thread that listen to a layer."""
    return [recording for recording in getattr(_THREAD, "recordings", ()) if layer in recording.names]


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """
    Record the router logits of a model's MoL layers, in the forwards that this thread runs within the context:

        with recording(model) as router_logits:
            model(**batch)

    Yields:
        By name of the layer, one (batch, sequence, E) for each use of its FFN.
    """
    listener = Recording(model)
    listener.start()
    try:
        yield listener.logits
    finally:
        listener.stop()


# --- the observer ----------------------------------------------------------------------------------------------------


class ForwardRecording(Recording):
    """The recording of one forward of a model, with what was asked of it."""

    def __init__(self, model: nn.Module, is_training: bool, is_asked: bool, expert_labels: torch.Tensor | None):
        super().__init__(model)
        self.is_training, self.is_asked, self.expert_labels = is_training, is_asked, expert_labels


class RoutingObserver:
    """
    Hooks on a whole model. They listen to its MoL layers during one forward, and then

    - in training add the balance and z losses to the loss, and move the averages of the routing;
    - with `expert_labels` (batch,), the expert that each row should go to, add the cross-entropy of the routing;
    - for `output_router_logits=True` put `router_logits` (one (batch, sequence, E) per use of an FFN, in the order of
      the layers, zero at padding) and, in training, `aux_loss` into the output.
    """

    @staticmethod
    def attach(model: nn.Module) -> None:
        """Listen to a model; a second time changes nothing."""
        if begin_forward not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(begin_forward, with_kwargs=True)
            model.register_forward_hook(end_forward, with_kwargs=True, always_call=True)

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Stop listening to a model."""
        for hooks, with_kwargs in (
            (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs),
            (model._forward_hooks, model._forward_hooks_with_kwargs),
        ):
            for number in [number for number, hook in hooks.items() if hook in (begin_forward, end_forward)]:
                del hooks[number], with_kwargs[number]
                model._forward_hooks_always_called.pop(number, None)


def begin_forward(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Before a model's forward: take our arguments away, and listen where there is something to do with it."""
    if "adapter_names" in kwargs:
        raise ValueError("adapter_names is not allowed here: wrap the model in a PeftModel to mix adapters.")
    if not torch.compiler.is_compiling():
        check_other_adapters(model)
    is_asked, expert_labels = bool(kwargs.get("output_router_logits")), kwargs.get("expert_labels")
    if "output_router_logits" in kwargs or "expert_labels" in kwargs:
        known = inspect.signature(model.forward).parameters
        ours = {"output_router_logits", "expert_labels"}.difference(known)
        kwargs = {name: value for name, value in kwargs.items() if name not in ours}
    is_training = model.training and torch.is_grad_enabled()
    if is_training or is_asked or expert_labels is not None:
        forward = ForwardRecording(model, is_training, is_asked, expert_labels)
        forward.start()
        if is_training:
            for layer in forward.names:
                layer.keep_training_weights()
        if expert_labels is not None:
            routes = any(c.expert_mixing == "token" for layer in forward.names for c in layer.mol_config.values())
            if not (is_training and routes):
                logger.warning_once(
                    "expert_labels has no effect: only the training of adapters that route tokens uses it."
                )
    return args, kwargs


def check_other_adapters(model: nn.Module) -> None:
    """
    Raises:
        ValueError: an adapter of another type came later, and peft, which looks into no adapter's layer, passed over
            some of its targets without a word.
    """
    for adapter_name, config in getattr(model, "peft_config", {}).items():
        if config.peft_type == MOL or getattr(config, "target_modules", None) is None:
            continue
        for layer_name, layer in mol_layers(model):
            passed_over = (path for path in inner_targets(layer, adapter_name) if _is_target(config, layer_name, path))
            path = next(passed_over, None)
            if path is not None:
                raise ValueError(
                    f"Adapter {adapter_name!r} ({config.peft_type.value}) was added after a MoL adapter, and is not on "
                    f"{layer_name}.{path}, because peft adds nothing inside of another adapter's layer: add the MoL "
                    "adapter last, or name target_modules outside of its feed-forward networks."
                )


def inner_targets(layer: nn.Module, adapter_name: str) -> Iterator[str]:
    """Return the paths inside a MoL layer's FFN where an adapter of that name could be, and is not."""
    inside: tuple[str, ...] = ()
    for path, module in layer.get_base_layer().named_modules():
        if not path or path.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{path}.",)
            if any(adapter_name in getattr(module, name) for name in module.adapter_layer_names):
                continue
        yield path


def _is_target(config: PeftConfig, layer_name: str, path: str) -> bool:
    return bool(check_target_module_exists(config, f"{layer_name}.{path}"))


def end_forward(model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """After a model's forward, and where it failed: what was heard goes into the output."""
    recordings = getattr(_THREAD, "recordings", ())
    forward = next((r for r in recordings[::-1] if isinstance(r, ForwardRecording) and r.model is model), None)
    if forward is None:
        return output
    forward.stop()
    if not forward.logits or output is None:
        return output
    aux_loss = loss = None
    inputs = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    inputs = inputs | inputs.get("kwargs", {})
    if forward.is_training:
        aux_loss = finish_step(forward, inputs)
        loss = getattr(output, "loss", None)
        if isinstance(output, tuple) and inputs.get("labels") is not None:
            loss = output[0]
    if aux_loss is not None and loss is not None:
        loss = loss + label_share(model, inputs) * aux_loss.to(loss.device)
        if isinstance(output, tuple):
            output = (loss, *output[1:])
        else:
            output["loss"] = loss
    if forward.is_asked and not isinstance(output, tuple):
        output["router_logits"] = tuple(
            zero_padding(logits, token_mask(model, name, logits, inputs))
            for name in forward.names.values()
            for logits in forward.logits.get(name, ())
        )
        if aux_loss is not None:
            output["aux_loss"] = aux_loss
    return output


def finish_step(forward: ForwardRecording, inputs: dict) -> torch.Tensor | None:
    """
    Compute the auxiliary loss, a mean over all uses of FFNs, and move the averages of the routing, over all processes.
    """
    model, expert_labels = forward.model, forward.expert_labels
    losses, targets, usages, counts, averages, decays = [], [], [], [], [], []
    for layer, name in forward.names.items():
        record = forward.logits.get(name)
        if record is None:
            continue
        (adapter_name,) = (adapter for adapter in layer.active_adapters if adapter in layer.mol_config)
        config = layer.mol_config[adapter_name]
        if not any(parameter.requires_grad for parameter in layer.adapter_parameters(adapter_name)):
            continue  # a frozen adapter in a model that is trained otherwise
        mask = token_mask(model, name, record[0], inputs)
        # The uses of a shared FFN may differ in length, as in an encoder and a decoder.
        summaries = [summarise_routing((logits,), config.num_experts_per_tok, mask) for logits in record]
        if config.expert_mixing == "token":
            if not record[0].requires_grad and layer.mol_router[adapter_name].weight.requires_grad:
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
        averages.append(layer.mol_usage[adapter_name])
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
    """Average scalars, which a model spread over devices has in several places."""
    return torch.stack([value.to(values[0].device) for value in values]).mean()


def routing_loss(logits: torch.Tensor, expert_labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """
    Compute the cross-entropy of the routing against one expert per row, over real tokens.

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
    """Return this batch's share of the optimizer step's labels, where the loss is a sum over all of them; else 1."""
    num_items, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
    if num_items is None or labels is None:
        return 1.0
    if getattr(model, "loss_type", None) == "ForCausalLM":
        labels = labels[..., 1:]  # the first token is not predicted
    return (labels != -100).sum() / num_items


def token_mask(model: nn.Module, layer_name: str, logits: torch.Tensor, inputs: dict) -> torch.Tensor | None:
    """Return the (batch, sequence) mask of real tokens that fits a layer's router logits, or None if there is none."""
    mask = inputs.get("attention_mask")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder" in layer_name.split("."):
        mask = inputs.get("decoder_attention_mask")
        if mask is None and isinstance(inputs.get("labels"), torch.Tensor):
            mask = inputs["labels"] != -100
    fits = isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.numel() == logits[..., 0].numel()
    return mask if fits else None


def zero_padding(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Router logits (..., E), zero where the mask says padding, as every state that a ModernALBERT returns."""
    return (
        logits
        if mask is None
        else logits.masked_fill(~mask.bool().to(logits.device).reshape(*logits.shape[:-1], 1), 0.0)
    )


def mol_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the MoL layers of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if "mol_config" in module.__dict__)
