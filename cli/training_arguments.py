# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""transformers' TrainingArguments with rules for evaluation, saving and routers, for every training command."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from modernalbert.cli.arguments import option
from modernalbert.cli.errors import UserError


logger = logging.getLogger(__name__)


@dataclass
class RouterTrainingArguments:
    """Learning rate and warm-up of routers, to be inherited before TrainingArguments; see `RouterLearningRateMixin`."""

    router_learning_rate: float | None = option(
        None, help="Peak learning rate of routers. Default: that of all other weights."
    )
    router_warmup_steps: float = option(
        0, help="Warm-up of the routers' learning rate, on top of the schedule: a share of all steps below 1, or steps."
    )

    def __post_init__(self):
        rate, steps = self.router_learning_rate, self.router_warmup_steps
        if rate is not None and not rate > 0:
            raise UserError(f"--router_learning_rate {rate} is not allowed: it must be above 0.")
        if not steps >= 0:
            raise UserError(f"--router_warmup_steps {steps} is not allowed: it must be at least 0.")
        super().__post_init__()


@dataclass
class BaseTrainingArguments(RouterTrainingArguments, TrainingArguments):
    """
    transformers' TrainingArguments, where evaluation, saving and the choice of the best checkpoint fit together.

    `bf16` needs no `use_cpu` on a machine without an accelerator.

    An option that is `None` was not given. Options that were not given follow those that were; two given ones that
    contradict each other are an error.

    Raises:
        UserError: two options that were given contradict each other.
    """

    # What holds where nothing is given. DEFAULT_EVAL_STEPS `None` is --logging_steps, as in transformers.
    DEFAULT_EVAL_STRATEGY: ClassVar[str] = "epoch"
    DEFAULT_SAVE_STRATEGY: ClassVar[str] = "epoch"
    DEFAULT_EVAL_STEPS: ClassVar[float | None] = None
    DEFAULT_SAVE_STEPS: ClassVar[float] = 500
    LOADS_BEST: ClassVar[bool] = True

    eval_strategy: str | None = option(
        None, help="When to evaluate: epoch, steps or no. The default follows --save_strategy, else epoch."
    )
    eval_steps: float | None = option(
        None, help="Steps between evaluations, or a share of all steps below 1. Implies --eval_strategy steps."
    )
    save_strategy: str | None = option(
        None, help="When to save: epoch, steps, best or no. The default follows --eval_strategy, else epoch."
    )
    save_steps: float | None = option(
        None, help="Steps between checkpoints, or a share of all steps below 1. Implies --save_strategy steps."
    )
    logging_nan_inf_filter: bool = option(
        False, help="Leave losses of NaN and infinity out of the log, instead of showing them."
    )
    load_best_model_at_end: bool | None = option(
        None,
        help="End with the best checkpoint instead of the last. Default: wherever each checkpoint is evaluated.",
        nargs="?",
        const=True,
    )

    def __post_init__(self):
        self.evaluation_is_asked_for = bool(
            self.eval_strategy not in (None, "no") or self.load_best_model_at_end or self.save_strategy == "best"
        )
        self._settle_strategies()
        if (self.bf16 or self.bf16_full_eval) and not torch.accelerator.is_available():
            # transformers refuses bfloat16 on a processor unless the processor is asked for.
            self.use_cpu = True
        super().__post_init__()

    def _settle_strategies(self) -> None:
        """Fill in the strategies, steps and the choice of the best checkpoint that were not given."""
        given_eval = None if self.eval_strategy is None else IntervalStrategy(self.eval_strategy).value
        given_save = None if self.save_strategy is None else SaveStrategy(self.save_strategy).value
        for name in ("eval_steps", "save_steps"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)} is not allowed: it must be above 0.")
        if not self.do_eval:
            if given_eval not in (None, "no"):
                raise UserError(f"--no_do_eval and --eval_strategy {given_eval} contradict each other: leave one out.")
            given_eval = "no"
        if given_eval is None and self.eval_steps is not None:
            given_eval = "steps"
        if given_save is None and self.save_steps is not None:
            given_save = "steps"
        wants_best = self.LOADS_BEST if self.load_best_model_at_end is None else self.load_best_model_at_end
        evaluates = self.DEFAULT_EVAL_STRATEGY != "no" or bool(self.load_best_model_at_end) or given_save == "best"

        evaluation, saving = given_eval, given_save
        if saving is None:
            saving = evaluation if evaluation in ("steps", "epoch") else self.DEFAULT_SAVE_STRATEGY
        if evaluation is None:
            usual = "epoch" if self.DEFAULT_EVAL_STRATEGY == "no" else self.DEFAULT_EVAL_STRATEGY
            follows = saving if saving in ("steps", "epoch") else usual
            evaluation = follows if evaluates else "no"
        self.eval_strategy, self.save_strategy = evaluation, saving

        if self.eval_steps is None and evaluation == "steps":
            follows = given_eval is None and (wants_best or self.DEFAULT_EVAL_STEPS is None)
            if saving == "steps" and (follows or (wants_best and self.save_steps is not None)):
                self.eval_steps = self.save_steps or self.DEFAULT_SAVE_STEPS
            else:
                self.eval_steps = self.DEFAULT_EVAL_STEPS or self.logging_steps
        if self.save_steps is None:
            follows = wants_best and evaluation == saving == "steps"
            self.save_steps = self.eval_steps if follows else self.DEFAULT_SAVE_STEPS

        obstacle = self._obstacle_to_best()
        if saving == "best" and evaluation == "no":
            raise UserError("--save_strategy best needs evaluation: without it, no checkpoint is known to be the best.")
        if obstacle and self.load_best_model_at_end:
            raise UserError(f"--load_best_model_at_end cannot be done: {obstacle}.")
        if obstacle and wants_best and evaluation != "no":
            logger.warning(f"The run ends with the last model, not with the best: {obstacle}.")
        self.load_best_model_at_end = wants_best and not obstacle

    def _obstacle_to_best(self) -> str:
        """Why the best checkpoint cannot be told or loaded; "" if it can."""
        if self.eval_strategy == "no":
            return "nothing is evaluated during training (--eval_strategy no or --no_do_eval)"
        if self.save_strategy == "no":
            return "no checkpoints are saved (--save_strategy no)"
        if self.save_strategy == "best":
            return ""
        if self.eval_strategy != self.save_strategy:
            return (
                f"--eval_strategy {self.eval_strategy} and --save_strategy {self.save_strategy} differ, and a "
                "checkpoint without an evaluation cannot be compared"
            )
        if self.eval_strategy == "steps" and not _is_multiple(self.save_steps, self.eval_steps):
            return (
                f"--save_steps {self.save_steps:g} is no multiple of --eval_steps {self.eval_steps:g}, and a "
                "checkpoint without an evaluation cannot be compared"
            )
        return ""


def _is_multiple(steps: float, of: float) -> bool:
    """Return whether steps, or shares of all steps below 1, are a multiple of others."""
    if (steps < 1) != (of < 1):
        return False
    scale = 1_000_000 if of < 1 else 1  # without the rounding of binary fractions
    return round(steps * scale) % round(of * scale) == 0
