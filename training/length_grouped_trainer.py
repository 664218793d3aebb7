# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A Trainer that puts rows of like length together, resumes exactly, and predicts in the order of the rows."""

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PredictionOutput

from modernalbert.cli.errors import UserError
from modernalbert.training.model_card import ModelCardMixin
from modernalbert.training.router_learning_rate import RouterLearningRateMixin


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """
    transformers' sampler with an order that follows from seed and epoch alone.

    The original draws from the global random state as it is when the epoch starts, which a run resumed in the middle of
    that epoch does not have: it would see other rows.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class LengthGroupedTrainer(ModelCardMixin, RouterLearningRateMixin, Trainer):
    """
    Trainer for tokenized data sets, padded batch by batch.

    With `train_sampling_strategy="group_by_length"` Trainer's own order of training rows cannot be resumed, and its
    evaluation batches come in a random order too, so that predictions no longer match their rows. Here the order of
    training rows follows from seed and epoch; evaluation goes from the longest row to the shortest, and `predict` puts
    its arrays back in the order of the rows.
    """

    def evaluate(self, eval_dataset: Dataset | None = None, **kwargs) -> dict[str, float]:
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        return super().evaluate(data.select(longest_first(data)), **kwargs)

    def predict(self, test_dataset: Dataset, **kwargs) -> PredictionOutput:
        order = longest_first(test_dataset)
        output = super().predict(test_dataset.select(order), **kwargs)
        place = np.argsort(order)

        def restore(values):
            if isinstance(values, (tuple, list)):
                return type(values)(restore(value) for value in values)
            return values if values is None else values[place]

        return PredictionOutput(restore(output.predictions), restore(output.label_ids), output.metrics)

    def prediction_step(self, *args, **kwargs):
        """
        Raises:
            UserError: the outputs hold NaN; their metrics would be those of arbitrary predictions.
        """
        step = super().prediction_step(*args, **kwargs)
        logits = step[1] if isinstance(step[1], tuple) else (step[1],)
        if any(isinstance(values, torch.Tensor) and bool(values.isnan().any()) for values in logits):
            raise UserError(
                "the model's outputs hold NaN: its training has diverged; lower --learning_rate, or replace --fp16 by "
                "--bf16."
            )
        return step

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        data = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochLengthGroupedSampler(batch_size, [len(ids) for ids in data["input_ids"]], seed)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(eval_dataset)


def longest_first(data: Dataset) -> np.ndarray:
    """Row numbers by number of tokens, descending; rows of equal length keep their order."""
    return np.argsort([-len(ids) for ids in data["input_ids"]], kind="stable")
