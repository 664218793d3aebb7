# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Checkpoints: what is known of them, their labels, and loading them with a head for the task."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modernalbert.cli.errors import UserError, explain_loading
from modernalbert.configuration_modernalbert import EXPERT_MIXINGS, refuse_original_release
from modernalbert.data.glue_tasks import Task
from modernalbert.finetuning.arguments import ModelArguments


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """
    Facts about a checkpoint, known before its weights are read.

    Attributes:
        name: Folder or Hub name.
        labels: The labels in its configuration, in the order of their ids: LABEL_0 and so on if it does not name them.
        architectures: Names of the classes it was saved from.
        is_multi_label: Whether its head decides on each label by itself.
        has_weights: False for a folder that holds a configuration only.
    """

    name: str
    labels: tuple[str, ...]
    architectures: tuple[str, ...]
    is_multi_label: bool
    has_weights: bool

    def has_head(self, kind: str) -> bool:
        """Tell whether there are weights of a head, for example "SequenceClassification"."""
        return self.has_weights and any(kind in name for name in self.architectures)

    def describe_labels(self) -> str:
        """Say in words what the head predicts, for messages."""
        if self.is_multi_label:
            return f"several labels at once, out of {', '.join(self.labels)}"
        if len(self.labels) == 1:
            return "one number"
        return f"the labels {', '.join(self.labels)}"


def read_checkpoint(arguments: ModelArguments) -> Checkpoint:
    """
    Look at a checkpoint's configuration.

    Raises:
        UserError: no checkpoint is named, or it cannot be loaded.
    """
    name = arguments.model_name_or_path
    if name is None:
        raise UserError("--model_name_or_path is missing.")
    with explain_loading(f"--model_name_or_path {name}"):
        written, _ = PreTrainedConfig.get_config_dict(name)
        refuse_original_release(written)
        config = AutoConfig.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
        known = config.id2label or {}
    return Checkpoint(
        name,
        labels=tuple(str(known[i]) for i in sorted(known)),
        architectures=tuple(config.architectures or ()),
        is_multi_label=config.problem_type == "multi_label_classification",
        has_weights=not has_no_weights(Path(name)),
    )


def match_labels(
    checkpoint: Checkpoint, labels: Sequence[str], kind: str, training: bool
) -> tuple[tuple[str, ...], bool]:
    """
    Match a task's labels with those of a checkpoint's head, by name.

    A head is kept where its labels have the names of the task's, whatever their order and case; LABEL_0 is the name of
    the label 0. Without training it may know more labels than the task. Any other head is replaced by a new one, with a
    warning. (Our decision: transformers' run_glue keeps other heads by position.)

    Args:
        labels: Their names; none for a regression, whose head gives one number.
        kind: Of the head, for example "SequenceClassification".

    Returns:
        The labels in the order of the head, spelled as the task spells them, and whether the head is kept.

    Raises:
        UserError: without training, if the head cannot be kept.
    """
    spelling = {label_key(label): label for label in labels}
    keys = [label_key(label) for label in checkpoint.labels]
    if labels:
        has_same = set(keys) == set(spelling) or (not training and set(keys) > set(spelling))
        has_same = has_same and len(set(keys)) == len(keys) and not checkpoint.is_multi_label
    else:
        has_same = len(keys) == 1 and not checkpoint.is_multi_label
    has_head = checkpoint.has_head(kind)
    if has_same and (has_head or training):
        return tuple(spelling.get(key, label) for key, label in zip(keys, checkpoint.labels) if labels), has_head
    task = f"the task has the labels {', '.join(labels)}" if labels else "the task predicts one number"
    if not training:
        needed = "--no_do_train needs a model with a head for the task"
        if not has_head:
            saved = ", ".join(checkpoint.architectures) or "no class"
            without = f"names {saved}" if checkpoint.has_weights else "has no weights"
            raise UserError(f"{needed}: {checkpoint.name} {without}, and {kind} is needed.")
        unnamed = all(label.startswith("LABEL_") for label in checkpoint.labels) and len(checkpoint.labels) > 1
        hint = "; name its labels in its config.json (id2label)" if unnamed else ""
        raise UserError(f"{needed}: {checkpoint.name} predicts {checkpoint.describe_labels()}, and {task}{hint}.")
    if has_head:
        logger.warning(
            f"{checkpoint.name} predicts {checkpoint.describe_labels()}, and {task}: training starts with a new head."
        )
    return tuple(labels), False


def task_in_head_order(name: str, task: Task) -> Task:
    """
    Return a task with its labels in the order of a classifier's head.

    Args:
        name: Folder or Hub name of the classifier.

    Raises:
        UserError: it is no classifier, or its labels are not the task's.
    """
    checkpoint = read_checkpoint(ModelArguments(model_name_or_path=name))
    labels, _ = match_labels(checkpoint, task.labels, "SequenceClassification", training=False)
    return replace(task, labels=labels)


def label_key(label: str) -> str:
    """Reduce a label to what tells it from others: neither case nor surrounding space does."""
    return str(label).strip().casefold().removeprefix("label_")


def load_task_model(
    arguments: ModelArguments,
    auto_class: type,
    labels: Sequence[str] | None = None,
    keeps_head: bool = True,
    **changes,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a checkpoint with a head for the task, in float32, and its tokenizer.

    Args:
        auto_class: AutoModelForSequenceClassification and the like.
        labels: Their names in the order of the ids; `None` leaves the configuration's.
        keeps_head: Whether the checkpoint's head is the task's. If not, the layer that gives a value for each label is
            new, even where the checkpoint has one of its size.
        changes: Other fields of the configuration to set.

    Raises:
        UserError: the checkpoint cannot be loaded, or lacks weights of the encoder or of a head that is to be kept.
    """
    name, trust = arguments.model_name_or_path, arguments.trust_remote_code
    if labels is not None:
        changes["num_labels"] = max(1, len(labels))
        changes["id2label"] = dict(enumerate(labels or ["LABEL_0"]))
        changes["label2id"] = {label: i for i, label in changes["id2label"].items()}
    with explain_loading(f"--model_name_or_path {name}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust, **changes)
        if arguments.expert_mixing is not None:
            if arguments.expert_mixing not in EXPERT_MIXINGS or not hasattr(config, "expert_mixing"):
                raise UserError(
                    f"--expert_mixing {arguments.expert_mixing} is not allowed: it must be one of "
                    f"{', '.join(EXPERT_MIXINGS)}, for a ModernALBERT."
                )
            config.expert_mixing = arguments.expert_mixing
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        check_tokenizer(tokenizer, config, name)
        # Trained in float32, whatever it was saved in; --bf16 computes in half precision.
        loading = {"trust_remote_code": trust, "attn_implementation": arguments.attn_implementation}
        loading["dtype"] = torch.float32
        if has_no_weights(Path(name)):
            logger.warning(f"{name} holds a configuration without weights: starting from random weights.")
            return auto_class.from_config(config, **loading), tokenizer
        # Only the head may be of another size: check_weights refuses the rest.
        model, report = auto_class.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **loading
        )
        absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        check_weights(model, absent, name, keeps_head)
        if not keeps_head:
            renew_output_layer(model, auto_class, absent, loading)
    return model, tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> None:
    """
    Refuse a tokenizer that does not belong to the model.

    For a folder without a tokenizer's files, transformers may build one that knows no words (BERT's).
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"{name} holds no tokenizer: save the tokenizer that the model was trained with into it.")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model's vocab_size is {config.vocab_size}: they "
            "do not belong together."
        )


def check_weights(model: PreTrainedModel, absent: set[str], name: str, keeps_head: bool) -> None:
    """
    Refuse a checkpoint that lacks weights which training does not begin with.

    Args:
        absent: The weights that were not in the checkpoint, or of another shape there.
    """
    is_encoder = model.base_model is model
    absent = absent & {key for key, _ in model.named_parameters()}  # each buffer has a first value
    if (
        is_encoder or not keeps_head
    ):  # BERT's pooler is no part of its masked language model, and mean pooling uses none
        absent = {key for key in absent if "pooler" not in key}
    of_encoder = {key for key in absent if is_encoder or key.startswith(f"{model.base_model_prefix}.")}
    refused = absent if keeps_head else of_encoder
    if refused:
        listed = ", ".join(sorted(refused)[:3]) + (", ..." if len(refused) > 3 else "")
        raise UserError(
            f"{name} lacks weights of the shape that its config.json asks for ({listed}): it is incomplete, or of "
            "another model."
        )


def renew_output_layer(model: PreTrainedModel, auto_class: type, absent: set[str], loading: dict) -> None:
    """Initialize the layer that gives a value for each label again, unless its weights are new."""
    config = copy.deepcopy(model.config)
    config.num_labels = model.config.num_labels + 1
    with torch.device("meta"):
        other = dict(auto_class.from_config(config, **loading).named_parameters())
    output = {key: value for key, value in model.named_parameters() if other[key].shape != value.shape}
    if not output:  # a reader's two outputs, start and end, whatever the number of labels
        encoder = f"{model.base_model_prefix}."
        head = {key: value for key, value in model.named_parameters() if not key.startswith(encoder)}
        output = {key: value for key, value in head.items() if len(value) == model.config.num_labels}
    if output.keys() <= absent:
        return
    fresh = dict(auto_class.from_config(model.config, **loading).named_parameters())
    with torch.no_grad():
        for key, value in output.items():
            value.copy_(fresh[key])


def has_no_weights(folder: Path) -> bool:
    """Tell whether it is a local folder with a configuration and nothing to load."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "pytorch_model.bin", "pytorch_model.bin.index.json")
    return (folder / "config.json").is_file() and not any((folder / weights).is_file() for weights in names)
