# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Routers with a learning rate and a warm-up of their own, in any Trainer."""

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from modernalbert.cli.errors import UserError


class RouterLearningRateMixin:
    """
    A Trainer, to be named before Trainer's class, that heeds two arguments where `args` has them:

    - `router_learning_rate`: peak of the routers; None = as all other weights;
    - `router_warmup_steps`: the routers' rate rises from 0 over this number of steps (a share of all steps if below 1),
      on top of the schedule that all weights follow.
    """

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self._has_router_arguments:
            rate = getattr(self.args, "router_learning_rate", None)
            split_router_groups(optimizer, self.model if model is None else model, rate)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        warmup = getattr(self.args, "router_warmup_steps", 0)
        if is_new and warmup:
            warm_up_routers(scheduler, round(warmup * num_training_steps) if warmup < 1 else int(warmup))
        return scheduler

    @property
    def _has_router_arguments(self) -> bool:
        names = ("router_learning_rate", "router_warmup_steps")
        return any(getattr(self.args, name, None) for name in names)


def split_router_groups(optimizer: Optimizer, model: nn.Module, learning_rate: float | None) -> None:
    """
    Move the routers' weights, native and of adapters, into parameter groups of their own, which carry `is_router`.

    Args:
        learning_rate: Of the new groups; None keeps that of the group a weight was in.

    Raises:
        UserError: no router is trained.
    """
    named = model.named_parameters()
    routers = {id(parameter) for name, parameter in named if "mol_router" in name.split(".")}
    new_groups = []
    for group in optimizer.param_groups:
        moved = [parameter for parameter in group["params"] if id(parameter) in routers]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in routers]
            rate = group["lr"] if learning_rate is None else learning_rate
            new_groups.append({**group, "params": moved, "lr": rate, "is_router": True})
    if not new_groups:
        raise UserError(
            "--router_learning_rate and --router_warmup_steps are not allowed here: the model has no router that is "
            "trained."
        )
    for group in new_groups:
        optimizer.add_param_group(group)


def warm_up_routers(scheduler: LRScheduler, num_steps: int) -> None:
    """
    Multiply the rate of the routers' groups by a linear rise over `num_steps` steps.

    Raises:
        UserError: the schedule is not a function of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise UserError(
            f"--router_warmup_steps is not allowed with the schedule {type(scheduler).__name__}: it needs one that "
            "follows from the step alone, such as linear, cosine or warmup_stable_decay."
        )

    def rising(schedule):
        return lambda step: schedule(step) * min(1.0, step / max(1, num_steps))

    for i, group in enumerate(scheduler.optimizer.param_groups):
        if group.get("is_router"):
            scheduler.lr_lambdas[i] = rising(scheduler.lr_lambdas[i])
            group["lr"] = scheduler.base_lrs[i] * scheduler.lr_lambdas[i](0)
