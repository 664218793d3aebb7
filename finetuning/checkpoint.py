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
"""A checkpoint with a head for the task."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modernalbert.cli.errors import UserError, first_sentence
from modernalbert.configuration_modernalbert import EXPERT_MIXINGS, refuse_original_release
from modernalbert.finetuning.arguments import ModelArguments


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """
    What is known of a checkpoint before its weights are read.

    Attributes:
        name: Folder or Hub name.
        labels: The labels it knows by name, in the order of their ids; empty if it names none.
        has_weights: False for a folder that holds a configuration only.
    """

    name: str
    labels: tuple[str, ...]
    has_weights: bool


@contextlib.contextmanager
def _one_sentence_if_it_fails(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"--model_name_or_path {name} cannot be loaded: {first_sentence(error)}") from None


def read_checkpoint(arguments: ModelArguments) -> Checkpoint:
    """Look at a checkpoint's configuration."""
    name = arguments.model_name_or_path
    if name is None:
        raise UserError("--model_name_or_path is missing.")
    with _one_sentence_if_it_fails(name):
        written, _ = PreTrainedConfig.get_config_dict(name)
        refuse_original_release(written)
        known = AutoConfig.from_pretrained(name, trust_remote_code=arguments.trust_remote_code).id2label or {}
    labels = tuple(known[i] for i in sorted(known)) if written.get("id2label") else ()
    return Checkpoint(name, labels, not has_no_weights(Path(name)))


def labels_in_order(checkpoint: Checkpoint, labels: Sequence[str], training: bool) -> tuple[str, ...]:
    """
    The task's labels in the order of the checkpoint's head.

    A checkpoint that knows the labels by name keeps its order; one that knows others, or another number of them, gets
    a new head, which only training can fill. Without labels the head gives one number.
    """
    known = checkpoint.labels
    if labels and (set(known) == set(labels) or (not training and set(known) > set(labels))):
        return known
    if not training and (not checkpoint.has_weights or len(known) != max(1, len(labels))):
        raise UserError(
            f"--no_do_train needs a model with a head for the task: {checkpoint.name} knows the labels "
            f"{', '.join(known) or 'of none'}, the task has {', '.join(labels) or 'one number'}."
        )
    return tuple(labels)


def load_task_model(
    arguments: ModelArguments, auto_class: type, labels: Sequence[str] | None = None, **changes
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A checkpoint with a head for the task, in float32, and its tokenizer.

    Args:
        auto_class: AutoModelForSequenceClassification and the like.
        labels: Their names in the order of the ids; `None` leaves the configuration's.
        changes: Other fields of the configuration to set.
    """
    name, trust = arguments.model_name_or_path, arguments.trust_remote_code
    if labels is not None:
        changes["num_labels"] = max(1, len(labels))
        if labels:
            changes["id2label"] = dict(enumerate(labels))
            changes["label2id"] = {label: i for i, label in enumerate(labels)}
    with _one_sentence_if_it_fails(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust, **changes)
        if arguments.expert_mixing is not None:
            if arguments.expert_mixing not in EXPERT_MIXINGS or not hasattr(config, "expert_mixing"):
                raise UserError(
                    f"--expert_mixing {arguments.expert_mixing} is not allowed: it must be one of "
                    f"{', '.join(EXPERT_MIXINGS)}, for a ModernALBERT."
                )
            config.expert_mixing = arguments.expert_mixing
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        # Trained in float32, whatever it was saved in; --bf16 computes in half precision.
        loading = {"trust_remote_code": trust, "attn_implementation": arguments.attn_implementation}
        loading["dtype"] = torch.float32
        if has_no_weights(Path(name)):
            logger.warning(f"{name} holds a configuration without weights: starting from random weights.")
            model = auto_class.from_config(config, **loading)
        else:
            model = auto_class.from_pretrained(name, config=config, ignore_mismatched_sizes=True, **loading)
    return model, tokenizer


def has_no_weights(folder: Path) -> bool:
    """Whether it is a local folder with a configuration and nothing to load."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "pytorch_model.bin", "pytorch_model.bin.index.json")
    return (folder / "config.json").is_file() and not any((folder / weights).is_file() for weights in names)
