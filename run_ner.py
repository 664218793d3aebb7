# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Fine-tune and evaluate an encoder that finds entities in text, on CoNLL-style or json files or a data set of the Hub.

    python run_ner.py --model_name_or_path M --train_file train.conll --validation_file valid.conll --output_dir O
    python run_ner.py --model_name_or_path M --dataset_name eriktks/conll2003 --output_dir O
    python run_ner.py arguments.json

A CoNLL-style file has a word and its tag (IOB1, IOB2 or IOBES) on each line, in the first and the last of its columns,
or where --text_column and --label_column say, and an empty line after each sentence. Precision, recall and F1 count
whole entities, as CoNLL's evaluation does. A sentence longer than the window is read in several, so that every word is
predicted.

Takes all of transformers' TrainingArguments. Writes the model, `all_results.json` and the predictions to the output
folder; run again after an interruption, it continues from the last checkpoint.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

import modernalbert  # noqa: F401  registers the classes with transformers
from modernalbert.cli.arguments import option, run_script
from modernalbert.cli.errors import UserError
from modernalbert.data.conll import check_tag, in_scheme, read_sentences, say_unknown_types
from modernalbert.data.entity_tags import is_tag, labels_of, scheme_of
from modernalbert.data.hub_sets import load_hub_set
from modernalbert.data.word_windows import by_sentence, encode_sentences
from modernalbert.evaluation.ner import METRICS, span_metrics
from modernalbert.finetuning.arguments import ModelArguments, TaskDataArguments, TaskTrainingArguments
from modernalbert.finetuning.checkpoint import label_key, load_task_model, match_labels, read_checkpoint
from modernalbert.finetuning.merge_after import check_merge
from modernalbert.finetuning.task_run import RunResults, begin_run, check_run, check_splits, choose_best_by, first_rows
from modernalbert.training.length_grouped_trainer import LengthGroupedTrainer, longest_first


logger = logging.getLogger("run_ner")


# --- arguments -------------------------------------------------------------------------------------------------------


@dataclass
class DataArguments(TaskDataArguments):
    """Arguments: the sentences and their columns."""

    dataset_name: str | None = option(None, help="A data set of the Hub, read instead of files.")
    dataset_config: str | None = option(None, help="The configuration of that data set.")
    text_column: str | None = option(
        None, help="The column of words: a number from 0 (default 0) in lines, a name (default tokens) in tables."
    )
    label_column: str | None = option(
        None, help="The column of tags: a number (default -1) in lines, a name (default ner_tags) in tables."
    )
    max_seq_length: int = option(512, help="Tokens of a window. A longer sentence is read in several.")
    doc_stride: int | None = option(
        None, help="Tokens that two neighbouring windows share. Default: a quarter of a window."
    )


# --- data ------------------------------------------------------------------------------------------------------------


def load_sentences(arguments: DataArguments) -> dict[str, Dataset]:
    """Load the columns "words", "tags" and "place" by split; the test split may have no tags."""
    files = arguments.files()
    if files and arguments.dataset_name is not None:
        raise UserError("--dataset_name goes without --train_file, --validation_file and --test_file.")
    if files:
        columns = arguments.text_column, arguments.label_column
        return {split: read_sentences(file, *columns, with_tags=split != "test") for split, file in files.items()}
    if arguments.dataset_name is None:
        raise UserError("there is no data: give --train_file and --validation_file, or --dataset_name.")
    name = arguments.dataset_name
    hub = load_hub_set(
        name,
        arguments.dataset_config,
        asked_by=f"--dataset_name {name}",
        instead="--train_file and --validation_file",
    )
    splits = {split: hub[split] for split in ("train", "validation", "test") if split in hub}
    return {split: sentences_of_hub(data, f"{name}, {split}", arguments) for split, data in splits.items()}


def sentences_of_hub(data: Dataset, name: str, arguments: DataArguments) -> Dataset:
    """Convert a split of the Hub to the columns of `load_sentences`."""
    words, tags = arguments.text_column or "tokens", arguments.label_column or "ner_tags"
    for column, flag in ((words, "text"), (tags, "label")):
        if column not in data.column_names:
            raise UserError(
                f"{name}: no column {column!r}; there are {', '.join(data.column_names)} (see --{flag}_column)."
            )
    names = getattr(getattr(data.features[tags], "feature", None), "names", None)

    def take(row: dict, number: int) -> dict:
        place = f"{name}, row {number}"
        row_tags = [names[tag] for tag in row[tags]] if names else row[tags]
        return {"words": row[words], "tags": [check_tag(tag, place) for tag in row_tags], "place": place}

    data = data.filter(lambda row: len(row[words]) > 0)
    return data.map(take, with_indices=True, remove_columns=data.column_names, desc="Tags")


def labels_of_task(
    model_arguments: ModelArguments, data: dict[str, Dataset], training: bool
) -> tuple[tuple[str, ...], bool]:
    """
    Return the tags in the order of the head, and whether the checkpoint's head is kept.

    They are those of the training rows, or without training those of the checkpoint, spelled as the rows spell them.
    """
    checkpoint = read_checkpoint(model_arguments)
    if not training:
        if not checkpoint.has_head("TokenClassification") or not all(map(is_tag, checkpoint.labels)):
            raise UserError(
                f"--no_do_train needs a model with a head for tags: {checkpoint.name} names "
                f"{', '.join(checkpoint.architectures) or 'no class'}, with the labels "
                f"{', '.join(checkpoint.labels)}."
            )
        tags = {tag for sentences in data.values() if "tags" in sentences.column_names for tag in _all_tags(sentences)}
        known = {label[2:] for label in checkpoint.labels if label != "O"}
        spelling = {label_key(kind): kind for kind in sorted({tag[2:] for tag in tags} - {""})}
        if len(set(map(label_key, known))) < len(known):
            spelling = {}  # the head tells types apart by case
        respelled = {kind: spelling.get(label_key(kind), kind) for kind in known}
        return tuple(label[:2] + respelled.get(label[2:], label[2:]) for label in checkpoint.labels), True
    tags = set(_all_tags(data["train"]))
    types = {tag[2:] for tag in tags if tag != "O"}
    if not types:
        raise UserError("the training rows hold no entity: all tags are O (see --label_column).")
    labels = labels_of(types, scheme_of(tags))
    return match_labels(checkpoint, labels, "TokenClassification", training)


def _all_tags(sentences: Dataset) -> Iterator[str]:
    return (tag for sentence in sentences["tags"] for tag in sentence)


def check_window(data_arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return the tokens of a window, and those that the next one repeats."""
    if not tokenizer.is_fast:
        raise UserError("the model's tokenizer does not say which characters a token stands for: a fast one is needed.")
    length = min(data_arguments.max_seq_length, tokenizer.model_max_length)
    overlap = length // 4 if data_arguments.doc_stride is None else data_arguments.doc_stride
    room = length - tokenizer.num_special_tokens_to_add()
    if room < 1:
        raise UserError(f"--max_seq_length {length} is not allowed: {room} tokens are left beside the special ones.")
    if not 0 <= overlap < room:
        raise UserError(f"--doc_stride {overlap} is not allowed: it must be 0 to {room - 1}.")
    return length, overlap


# --- the run ---------------------------------------------------------------------------------------------------------


class TaggingTrainer(LengthGroupedTrainer):
    """Trainer on rows of `encode_sentences`: it predicts label ids, and its metrics are of whole sentences."""

    def __init__(self, model: PreTrainedModel, labels: tuple[str, ...], **kwargs):
        super().__init__(model=model, preprocess_logits_for_metrics=best_labels, **kwargs)
        self.labels = labels

    def evaluate(self, eval_dataset: Dataset | None = None, **kwargs) -> dict[str, float]:
        self._measure_on(self.eval_dataset if eval_dataset is None else eval_dataset)
        return super().evaluate(eval_dataset, **kwargs)

    def predict(self, test_dataset: Dataset, **kwargs):
        self._measure_on(test_dataset)
        return super().predict(test_dataset, **kwargs)

    def predicted_tags(self, rows: Dataset, label_ids: np.ndarray) -> list[list[str]]:
        """Label ids by row and token (padded) -> tags by sentence and word."""
        return [[self.labels[label] for label in sentence] for sentence in by_sentence(rows, label_ids)]

    def _measure_on(self, data: Dataset) -> None:
        rows = data.select(longest_first(data))  # the order in which they are predicted

        def metrics(output) -> dict[str, float]:
            return span_metrics(by_sentence(rows, rows["tags"]), self.predicted_tags(rows, output.predictions))

        self.compute_metrics = metrics


def best_labels(logits, labels):
    """Reduce (batch, tokens, labels) to (batch, tokens): all that is kept of an evaluation."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    labels: tuple[str, ...],
    training_arguments: TrainingArguments,
    train: Dataset | None = None,
    validation: Dataset | None = None,
) -> TaggingTrainer:
    """Make a Trainer that pads each batch to its longest row."""
    return TaggingTrainer(
        model,
        labels,
        args=training_arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=8),
    )


def evaluate(trainer: TaggingTrainer, sentences: Dataset, rows: Dataset, prefix: str, file: Path) -> dict[str, float]:
    """
    Evaluate in one pass over the rows: metrics (empty without tags), and a file of predictions.

    A line of the file is a word, its tag if that is known, and the predicted tag: what CoNLL's evaluation reads. White
    space inside a word is written as "_".
    """
    output = trainer.predict(rows, metric_key_prefix=prefix)
    predicted = trainer.predicted_tags(rows, output.predictions)
    if trainer.is_world_process_zero():
        columns = [[["_".join(word.split()) or "_" for word in words] for words in sentences["words"]]]
        columns += [sentences["tags"]] if "tags" in sentences.column_names else []
        with file.open("w", encoding="utf-8") as handle:
            for sentence in zip(*columns, predicted):
                handle.writelines(" ".join(cells) + "\n" for cells in zip(*sentence))
                handle.write("\n")
    return output.metrics | {f"{prefix}_samples": len(sentences)}


def run(
    model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments: TrainingArguments
) -> dict[str, float]:
    """
    Fine-tune, evaluate, predict, and on request merge and evaluate again.

    Returns:
        What `all_results.json` holds.
    """
    check_run(data_arguments, training_arguments)
    data = load_sentences(data_arguments)
    validation_splits = check_splits(training_arguments, list(data))
    choose_best_by(training_arguments, METRICS)
    labels, keeps_head = labels_of_task(model_arguments, data, training_arguments.do_train)
    set_seed(training_arguments.seed)
    model, tokenizer = load_task_model(model_arguments, AutoModelForTokenClassification, labels, keeps_head)
    tokenizer.padding_side = "right"  # so that a token's place in a padded row is its place in the row
    window, overlap = check_window(data_arguments, tokenizer)
    merge_weights = check_merge(
        model_arguments.merge_after, model, bool(validation_splits), training_arguments.do_train
    )
    checkpoint = begin_run(model_arguments, data_arguments, training_arguments)

    rows = {}
    for split, sentences in data.items():
        name = getattr(data_arguments, f"{split}_file") or f"{data_arguments.dataset_name}, {split}"
        sentences = in_scheme(first_rows(sentences, split, data_arguments), scheme_of(labels), name)
        say_unknown_types(sentences, labels, name)
        data[split] = sentences
        rows[split] = encode_sentences(sentences, tokenizer, labels, window, overlap)
        if len(rows[split]) > len(sentences):
            logger.warning(f"{name}: {len(sentences)} sentences in {len(rows[split])} windows of {window} tokens.")
    trainer = make_trainer(model, tokenizer, labels, training_arguments, rows.get("train"), rows.get("validation"))

    results = RunResults(trainer)
    folder = Path(training_arguments.output_dir)
    if training_arguments.do_train:
        results.train(checkpoint)
    evaluated = validation_splits if training_arguments.do_eval else []
    predicted = ["test"] if "test" in data and training_arguments.do_predict else []
    for split in (*evaluated, *predicted):
        prefix = split.replace("validation", "eval")
        file = folder / f"predictions_{split}.conll"
        results.keep(prefix, evaluate(trainer, data[split], rows[split], prefix, file))
    if merge_weights is not None:

        def measure(merged: PreTrainedModel) -> dict[str, float]:
            evaluator = make_trainer(merged, tokenizer, labels, training_arguments, validation=rows["validation"])
            metrics = evaluator.evaluate()
            return {f"eval_{name}": metrics[f"eval_{name}"] for name in METRICS}

        calibration = rows["validation"].select_columns(["input_ids", "labels"])
        results.merge_and_evaluate(merge_weights, calibration, measure)
    return results.write()


# --- command line ----------------------------------------------------------------------------------------------------


def command() -> None:
    """Entry point of `modernalbert-ner`."""
    run_script(run, ModelArguments, DataArguments, TaskTrainingArguments, description=__doc__)


if __name__ == "__main__":
    command()
