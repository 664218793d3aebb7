# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A Trainer callback that logs what routers do, and warns of those that are about to fail."""

import inspect
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from modernalbert.diagnostics.routing_tally import RoutingTally, reduce_tallies


logger = logging.getLogger(__name__)

# All thresholds are our decision.
# Collapse: the two experts that weigh most (one of fewer than four) have so much of the routing weight.
COLLAPSED_SHARE = 0.9
# Dead: an expert whose moving average is below this part of an even share.
DEAD_SHARE = 0.05
# Routers dominate where the norm of their gradient is above that of all other weights' together.
DOMINANT_RATIO = 1.0
# A merge is far from exact above this token dependence (`RouterUse`): 0 means that all tokens are mixed alike.
HIGH_TOKEN_DEPENDENCE = 0.5
# A single measurement may be an odd batch: this number in a row is needed.
PATIENCE = 2
# Steps between measurements where nothing is logged by steps.
DEFAULT_INTERVAL = 50
TUNER_OBSERVER = "modernalbert.tuner.observer"


class RoutedModel(NamedTuple):
    """A module whose output has `router_logits`, and how to read them."""

    module: nn.Module
    names: list[str]  # of the router calls of one forward, in order
    num_experts_per_tok: int
    is_adapter: bool


class RouterCallback(TrainerCallback):
    """
    Logs routing and warns of routers that fail, for ModernALBERT models and MoL adapters in any Trainer.

        trainer = Trainer(...)
        RouterCallback.add_to(trainer)

    One optimizer step before each log line is measured; the others cost nothing. Every log line of training gains

    - `expert_usage_min`, `expert_usage_max`: extremes of the moving averages of the routing, over experts and routers;
    - `router_entropy`: mean entropy of the routing probabilities; 1 = undecided, 0 = certain;
    - `router_usage_entropy`: mean entropy of the mean routing weights; 1 = all experts alike, 0 = one has everything;
    - `router_token_dependence`: mean share of that which a token decides; see `RouterUse`;
    - `router_balance_loss`: mean balance loss without its coefficient; 1 when balanced;
    - `router_grad_norm`, `ffn_grad_norm`: gradient norms of all routers, and of the trained weights of the FFNs that
      they route, experts included, after clipping.

    Entropies are shares of log E. All are means over the router calls of the step, over all processes.

    It warns once each, with advice: when experts collapse, when an expert is dead, when the gradients of the routers
    dominate, and at the end of training when merging the experts is not exact.
    """

    def __init__(self):
        self.routed: list[RoutedModel] = []
        self.latest: dict[str, float] = {}
        self._tallies: dict[str, RoutingTally] = {}
        self._recorded: list[tuple[RoutedModel, tuple[torch.Tensor, ...], dict[str, Any]]] = []
        self._is_measuring = self._is_before_reporters = False
        self._handles: list[Any] = []
        self._norms: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._warned: set[str] = set()

    @classmethod
    def add_to(cls, trainer: Trainer) -> "RouterCallback | None":
        """
        Add a callback in front of the trainer's reporters, so that they get what it logs.

        Returns:
            The callback, or None where the trainer's model routes no tokens.
        """
        if not find_routed_models(trainer.model):
            return None
        callbacks = trainer.callback_handler.callbacks
        callback = next((each for each in callbacks if isinstance(each, cls)), None)
        if callback is None:
            callback = cls()
        else:
            callbacks.remove(callback)
        callbacks.insert(0, callback)
        callback._is_before_reporters = True
        return callback

    # --- events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        self.routed = find_routed_models(model)
        self._remove_hooks()
        if not self.routed:
            logger.warning(
                "RouterCallback has nothing to log: the model has no router that is trained to route tokens."
            )
            return
        if args.report_to and not self._is_before_reporters:
            logger.warning(
                "RouterCallback comes after the reporters, which will not get its values: use "
                "RouterCallback.add_to(trainer) instead of callbacks=[RouterCallback()]."
            )
        for routed in self.routed:
            self._handles += [
                routed.module.register_forward_pre_hook(self._ask, with_kwargs=True, prepend=True),
                routed.module.register_forward_hook(self._recorder(routed), with_kwargs=True),
            ]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        interval = DEFAULT_INTERVAL
        if args.logging_strategy == IntervalStrategy.STEPS:
            interval = state.logging_steps
        is_first = args.logging_first_step and state.global_step == 0
        self._is_measuring = bool(self.routed) and (is_first or (state.global_step + 1) % interval == 0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if self._is_measuring:
            self._norms = gradient_norms(model)
            self.latest = {f"{kind}_grad_norm": self._norms[kind] for kind in ("router", "ffn") if kind in self._norms}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if not self._is_measuring:
            return
        self._is_measuring = False
        self._count_tokens()
        averages = usage_averages(model)
        self.latest["expert_usage_min"] = min(float(average.min()) for average in averages.values())
        self.latest["expert_usage_max"] = max(float(average.max()) for average in averages.values())
        figures = {name: tally.figures() for name, tally in self._tallies.items()}
        self._tallies = {}
        for name, field in (
            ("router_entropy", "probability_entropy"),
            ("router_usage_entropy", "usage_entropy"),
            ("router_token_dependence", "token_dependence"),
            ("router_balance_loss", "balance_loss"),
        ):
            if figures:
                self.latest[name] = sum(use[field] for use in figures.values()) / len(figures)
        if state.is_world_process_zero:
            self._check(figures, averages)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        for name, value in self.latest.items():
            # A Trainer of ours may have logged its own mean over all steps.
            if name not in logs:
                logs[name] = value
                # The history was written before the callbacks are called.
                state.log_history[-1][name] = value
        self.latest = {}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._remove_hooks()
        dependence = next(
            (entry[key] for entry in reversed(state.log_history) for key in entry if key == "router_token_dependence"),
            self.latest.get("router_token_dependence", 0.0),
        )
        if self.routed and dependence > HIGH_TOKEN_DEPENDENCE and state.is_world_process_zero:
            self._warn(
                "merge",
                f"A merge of these experts is not exact: their token dependence is {dependence:.2f} (0 = all tokens "
                f"are mixed alike), above {HIGH_TOKEN_DEPENDENCE}. Measure what it costs: merge_experts.py with "
                "--calibration_file reports it. method='calibrated' is fitted to your text; after some last steps with "
                "expert_mixing='ema' a linear merge is exact.",
            )

    # --- measuring

    def _ask(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not (self._is_measuring and module.training and torch.is_grad_enabled()):
            return None
        return args, kwargs | {"output_router_logits": True}

    def _recorder(self, routed: RoutedModel):
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if not (self._is_measuring and module.training and torch.is_grad_enabled()):
                return
            logits = output.get("router_logits") if hasattr(output, "get") else None
            if logits:
                # Counted when the step is over: a compiled forward is not to be broken.
                inputs = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
                inputs = inputs | inputs.get("kwargs", {})
                self._recorded.append((routed, tuple(each.detach() for each in logits), inputs))

        return record

    @torch.no_grad()
    def _count_tokens(self) -> None:
        for routed, all_logits, inputs in self._recorded:
            names = routed.names
            if len(names) != len(all_logits):  # an FFN that an adapter's base uses several times
                names = [f"router call {i}" for i in range(len(all_logits))]
            for name, logits in zip(names, all_logits):
                mask = inputs.get("attention_mask")
                if routed.is_adapter:
                    from modernalbert.tuner.observer import token_mask

                    mask = token_mask(routed.module, name, logits, inputs)
                tokens = logits.flatten(0, -2)
                if isinstance(mask, torch.Tensor) and mask.numel() == len(tokens):
                    tokens = tokens[mask.flatten().bool()]
                if name not in self._tallies:
                    self._tallies[name] = RoutingTally(logits.shape[-1], routed.num_experts_per_tok)
                self._tallies[name].add(tokens)
        self._recorded = []
        reduce_tallies(list(self._tallies.values()))
        self._tallies = {name: tally for name, tally in self._tallies.items() if tally.num_tokens}

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._recorded, self._is_measuring = [], [], False

    # --- warnings

    def _check(self, figures: dict[str, dict], averages: dict[str, torch.Tensor]) -> None:
        collapsed = {name: busiest_experts(use["usage"]) for name, use in figures.items()}
        collapsed = {name: experts for name, (experts, share) in collapsed.items() if share >= COLLAPSED_SHARE}
        if self._lasts("collapse", bool(collapsed)):
            name, experts = next(iter(collapsed.items()))
            self._warn(
                "collapse",
                f"Experts have collapsed: in {name}{and_others(len(collapsed))}, experts {listed(experts)} take "
                f"{COLLAPSED_SHARE:.0%} of the routing weight or more. Raise router_aux_loss_coef (0.1, say) or "
                "router_jitter_noise, lower --router_learning_rate or give the routers --router_warmup_steps, and "
                "start again: a router rarely comes back.",
            )
        dead = {name: (average < DEAD_SHARE / len(average)).nonzero().flatten() for name, average in averages.items()}
        dead = {name: experts.tolist() for name, experts in dead.items() if len(experts)}
        if self._lasts("dead", bool(dead)):
            name, experts = next(iter(dead.items()))
            self._warn(
                "dead",
                f"Experts are dead: in {name}{and_others(len(dead))}, experts {listed(experts)} get less than "
                f"{DEAD_SHARE:.0%} of an even share, and so hardly any gradient. Raise router_aux_loss_coef, or train "
                "with fewer experts.",
            )
        router, rest = self._norms.get("router", 0.0), self._norms.get("rest", 0.0)
        if self._lasts("gradients", router > DOMINANT_RATIO * rest):
            self._warn(
                "gradients",
                f"The gradients of the routers dominate: their norm is {router:.3g}, that of all other weights "
                f"{rest:.3g}, so that clipping shrinks what the rest learns. Lower router_aux_loss_coef, or give the "
                "routers a --router_learning_rate or --router_warmup_steps of their own.",
            )

    def _lasts(self, kind: str, is_so: bool) -> bool:
        """Return whether something was so in the last `PATIENCE` measurements."""
        self._counts[kind] = self._counts.get(kind, 0) + 1 if is_so else 0
        return self._counts[kind] >= PATIENCE

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)


# --- what a model routes with ---------------------------------------------------------------------------------------


def find_routed_models(model: nn.Module) -> list[RoutedModel]:
    """
    Find the ModernALBERT encoders and the models with MoL adapters inside a model, where their routers route tokens.
    """
    found = []
    for module in model.modules():
        config = getattr(module, "config", None)
        # By its type and not by its class: code from the Hub has classes of its own.
        if getattr(config, "model_type", None) == "modernalbert" and hasattr(module, "groups"):
            has_routers = any(getattr(group.mlp, "mol_router", None) is not None for group in module.groups)
            if has_routers and module.expert_mixing == "token":
                depth = config.group_depth
                names = [
                    f"layer {group * depth + position}"
                    for group in config.modulated_groups
                    for position in range(depth)
                    if config.is_modulated_position(position)
                ]
                found.append(RoutedModel(module, names, config.num_experts_per_tok, is_adapter=False))
    return found + list(adapted_models(model))


def adapted_models(model: nn.Module) -> Iterator[RoutedModel]:
    """Return the models whose forwards the tuner observes, with the layers of their active adapter."""
    for module in model.modules():
        # By where the hook comes from: without adapters the tuner, and peft, need not be there.
        if not any(getattr(hook, "__module__", None) == TUNER_OBSERVER for hook in module._forward_hooks.values()):
            continue
        from modernalbert.tuner.observer import mol_layers

        names, experts_per_tok = [], 1
        for name, layer in mol_layers(module):
            for adapter in layer.active_adapters:
                config = layer.mol_config.get(adapter)
                if config is not None and config.num_experts > 1 and config.expert_mixing == "token":
                    names.append(name)
                    experts_per_tok = config.num_experts_per_tok
        if names:
            yield RoutedModel(module, names, experts_per_tok, is_adapter=True)


def routed_feed_forwards(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the FFNs with a router, native and adapted, by name."""
    return ((name, module) for name, module in model.named_modules() if module._modules.get("mol_router") is not None)


def usage_averages(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the moving averages of the routing (E,), by FFN, and by position where each has a router of its own."""
    averages = {}
    for name, module in routed_feed_forwards(model):
        usage = module.mol_usage
        if not isinstance(usage, torch.Tensor):  # by adapter
            averages |= {f"{name} of {a}": usage[a].cpu() for a in module.active_adapters if a in usage}
        elif usage.dim() == 1:
            averages[name] = usage.cpu()
        else:
            averages |= {f"{name}, position {i}": row for i, row in enumerate(usage.cpu())}
    return averages


@torch.no_grad()
def gradient_norms(model: nn.Module) -> dict[str, float]:
    """
    Compute norms of a model's gradients as they are: of its routers, of the FFNs that these route, experts included,
    and of all that is no router ("rest").
    """
    kinds = {}
    for _, module in routed_feed_forwards(model):
        for name, parameter in module.named_parameters():
            kinds[id(parameter)] = "router" if name.startswith("mol_router.") else "ffn"
    squares: dict[str, list[torch.Tensor]] = {"router": [], "ffn": [], "rest": []}
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
        square = square.full_tensor() if hasattr(square, "full_tensor") else square  # of a sharded model
        kind = kinds.get(id(parameter))
        if kind is not None:
            squares[kind].append(square)
        if kind != "router":
            squares["rest"].append(square)
    return {
        kind: torch.stack([value.to(values[0].device) for value in values]).sum().sqrt().item()
        for kind, values in squares.items()
        if values
    }


def busiest_experts(usage: list[float]) -> tuple[list[int], float]:
    """Return the two experts that weigh most (one of fewer than four), and their share of the routing weight."""
    order = sorted(range(len(usage)), key=lambda expert: -usage[expert])[: 2 if len(usage) >= 4 else 1]
    return sorted(order), sum(usage[expert] for expert in order)


def listed(experts: list[int]) -> str:
    return ", ".join(map(str, experts))


def and_others(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""
