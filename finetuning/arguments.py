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
"""The arguments that the task scripts share."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name. A folder with a configuration only starts from random weights."},
    )
    expert_mixing: str | None = field(
        default=None,
        metadata={"help": "For a model with experts: token (route), ema or uniform (train one merged expert)."},
    )
    merge_after: str | None = field(
        default=None,
        metadata={
            "help": "Then merge the experts and evaluate again: with these weights (ema, uniform or E numbers), or "
            "calibrated: fitted to the first training rows."
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a Hub model."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa, flex_attention or flash_attention_2; default: transformers' choice."},
    )


@dataclass
class BaseDataArguments:
    """What every script asks about its data."""

    max_seq_length: int = field(default=512, metadata={"help": "Longer inputs are cut; shorter ones are not padded."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first rows only."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first rows only; in retrieval, on the first queries."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew where a run lies: its checkpoints and results are deleted."}
    )


@dataclass
class TaskDataArguments(BaseDataArguments):
    """Which rows, for every task of labelled rows."""

    train_file: str | None = field(default=None, metadata={"help": "Training rows."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation rows, with answers."})
    test_file: str | None = field(default=None, metadata={"help": "Rows to predict; answers are not needed."})


@dataclass
class RouterTrainingArguments:
    """How routers learn, to be inherited before TrainingArguments; see `RouterLearningRateMixin`."""

    router_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of routers; default: that of all other weights."}
    )
    router_warmup_steps: float = field(
        default=0,
        metadata={
            "help": "Routers' learning rate rises from 0 over so many steps (a share of all steps if below 1), on top "
            "of the schedule."
        },
    )

    def __post_init__(self):
        for name, is_allowed in (
            ("router_learning_rate", self.router_learning_rate is None or self.router_learning_rate > 0),
            ("router_warmup_steps", self.router_warmup_steps >= 0),
        ):
            if not is_allowed:
                bound = "above 0" if name == "router_learning_rate" else "at least 0"
                raise ValueError(f"--{name} {getattr(self, name)} is not allowed: it must be {bound}.")
        super().__post_init__()


@dataclass
class TaskTrainingArguments(RouterTrainingArguments, TrainingArguments):
    """transformers' TrainingArguments with defaults that suit fine-tuning an encoder."""

    do_train: bool = field(default=True, metadata={"help": "Train."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate on the validation rows."})
    do_predict: bool = field(default=True, metadata={"help": "Predict the test rows, if there are any."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Training batch size of a device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Evaluation batch size of a device."})
    warmup_steps: float = field(default=0.06, metadata={"help": "Warm-up: a share of all steps below 1, or steps."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: epoch, steps or no."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: epoch, steps or no."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep beside the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length wastes little on padding; random, sequential."}
    )
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Pin batches in memory; pointless without a GPU."}
    )
    metric_for_best_model: str | None = field(
        default="task",
        metadata={"help": "Chooses the best checkpoint: a metric, loss, or task (the first metric)."},
    )
    report_to: str | None = field(default="none", metadata={"help": "tensorboard, trackio, wandb, ... or none."})

    def __post_init__(self):
        # Without evaluation there is no best checkpoint to end with.
        if not self.do_eval:
            self.eval_strategy = "no"
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False
        super().__post_init__()
