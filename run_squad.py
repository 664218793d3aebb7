# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Fine-tune and evaluate an encoder on SQuAD 1.1 or 2.0, or on any questions in files of that format.

    python run_squad.py --model_name_or_path M --dataset_name squad_v2 --output_dir O
    python run_squad.py --model_name_or_path M --train_file T --validation_file V [--test_file S] --output_dir O
    python run_squad.py arguments.json

Takes all of transformers' TrainingArguments. Writes the model, `all_results.json` with the official script's metrics in
percent, and for each split `predictions_*.json`, `nbest_*.json` and, where questions may have no answer,
`null_odds_*.json`; run again after an interruption, it continues from the last checkpoint.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from inspect import getsourcefile
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import modernalbert  # noqa: F401  registers the classes with transformers
from modernalbert.cli.arguments import option, run_script
from modernalbert.cli.errors import UserError
from modernalbert.data.hub_sets import load_hub_set
from modernalbert.data.squad import Question, read_squad, rows_to_questions
from modernalbert.evaluation.squad import METRICS, best_thresholds, squad_metrics
from modernalbert.finetuning.arguments import ModelArguments, TaskDataArguments, TaskTrainingArguments
from modernalbert.finetuning.checkpoint import load_task_model, read_checkpoint
from modernalbert.finetuning.merge_after import check_merge
from modernalbert.finetuning.task_run import RunResults, begin_run, check_run, check_splits, choose_best_by
from modernalbert.question_answering import (
    Answer,
    Windows,
    check_tokenizer,
    cut_questions,
    encode_windows,
    find_answers,
    longest_question,
    span_to_tokens,
)
from modernalbert.training.length_grouped_trainer import LengthGroupedTrainer, longest_first


logger = logging.getLogger("run_squad")

SPLITS = ("train", "validation", "test")
HUB_NAMES = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}


# --- arguments -------------------------------------------------------------------------------------------------------


@dataclass
class DataArguments(TaskDataArguments):
    """Arguments: the questions, and how they are read and answered."""

    dataset_name: str | None = option(
        None, help="squad, squad_v2, or any Hub data set with their columns, read instead of files."
    )
    strict: bool = option(
        False, help="Refuse answers that do not stand where their answer_start says, instead of counting them."
    )
    max_seq_length: int = option(384, help="Tokens of a window. A longer context is read in several.")
    doc_stride: int = option(128, help="Tokens that two neighbouring windows share.")
    n_best_size: int = option(20, help="Number of candidate answers to keep for each question.")
    max_answer_length: int = option(30, help="Longest answer to predict, in tokens.")
    null_score_diff_threshold: float | None = option(
        None,
        help="Answer nothing where the odds of no answer are above this. Default: the value of the best F1 on the "
        "validation rows.",
    )


# --- data ------------------------------------------------------------------------------------------------------------


def load_questions(arguments: DataArguments) -> dict[str, list[Question]]:
    """Load the questions by split: "train", "validation", "test", those that there are."""
    files, name = arguments.files(), arguments.dataset_name
    if files and name is not None:
        raise UserError(f"--dataset_name {name} and files are given: the data must come from one of them.")
    if files:
        return {split: read_squad(file, split != "test", arguments.strict) for split, file in files.items()}
    if name is None:
        raise UserError("there is no data: give --dataset_name, or --train_file and --validation_file.")
    hub = load_hub_set(
        HUB_NAMES.get(name, name), asked_by=f"--dataset_name {name}", instead="--train_file and --validation_file"
    )
    return {
        split: rows_to_questions(hub[split], f"{name}, {split}", split != "test", arguments.strict)
        for split in SPLITS
        if split in hub
    }


@dataclass(frozen=True)
class Split:
    """
    The questions of a split and their windows.

    Attributes:
        name: "train", "validation" or "test".
        inputs: What the model gets, window by window: token ids, and outside of a test split the answer's tokens.
        windows: Where the windows stand in the contexts; `None` for training, which has no use for it.
    """

    name: str
    questions: list[Question]
    inputs: Dataset
    windows: Windows | None

    @property
    def is_scored(self) -> bool:
        """Whether the right answers are known."""
        answers = [question.answers for question in self.questions]
        return None not in answers and any(answers)

    def answers(self, start_logits: np.ndarray, end_logits: np.ndarray, arguments: DataArguments) -> list[Answer]:
        """Return the model's answers from its logits, (windows, tokens) each."""
        contexts = [question.context for question in self.questions]
        sizes = arguments.n_best_size, arguments.max_answer_length
        return find_answers(contexts, self.windows, start_logits, end_logits, *sizes)


def make_split(
    name: str, questions: list[Question], tokenizer: PreTrainedTokenizerBase, arguments: DataArguments
) -> Split:
    """
    Make windows of tokens of the questions, which are kept in the cache of `datasets`: made once, then read.

    Training questions none of whose answers stands where it should are left out.
    """
    if name == "train":
        questions = [question for question in questions if question.span or not question.answers]
        if not questions:
            raise UserError("the training questions have no answer that stands where its answer_start says.")
    limit = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}.get(name)
    questions = questions[:limit]
    sizes = min(arguments.max_seq_length, tokenizer.model_max_length), arguments.doc_stride
    longest = longest_question(tokenizer, *sizes)
    texts, too_long = cut_questions(tokenizer, [question.question for question in questions], longest)
    if too_long:
        logger.warning(
            f"{name}: {len(too_long)} questions were cut to {longest} tokens, to leave the context room in windows of "
            f"{sizes[0]} (first: id {questions[too_long[0]].id!r})."
        )
    spans = [question.span for question in questions]

    def encode(rows: dict, indices: list[int]) -> dict:
        columns = encode_windows(tokenizer, rows["question"], rows["context"], *sizes, first_index=indices[0])
        if name != "test":
            tokens = span_to_tokens(Windows.from_columns(columns), spans)
            columns["start_positions"], columns["end_positions"] = tokens
        if name == "train":
            columns = {column: values for column, values in columns.items() if column not in Windows.COLUMNS}
        return columns

    rows = {"question": texts, "context": [question.context for question in questions]}
    key = windows_key(name, rows, spans, sizes, tokenizer)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "modernalbert_squad"
    folder.mkdir(parents=True, exist_ok=True)
    data = Dataset.from_dict(rows).map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=list(rows),
        cache_file_name=str(folder / f"{key}.arrow"),
        new_fingerprint=key,
        desc=f"Windows, {name}",
    )
    if name == "train":
        return Split(name, questions, data, None)
    windows = Windows.from_columns({column: data[column] for column in Windows.COLUMNS})
    return Split(name, questions, data.remove_columns(list(Windows.COLUMNS)), windows)


def windows_key(
    name: str, rows: dict[str, list], spans: Sequence, sizes: tuple[int, int], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return a name for the windows that changes with everything they are made from, the code included."""
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    # What the last call was, not what the tokenizer is.
    vocabulary["truncation"] = vocabulary["padding"] = None
    code = [Path(file).read_text(encoding="utf-8") for file in (__file__, getsourcefile(encode_windows))]
    made_from = [name, rows, spans, sizes, vocabulary, tokenizer.model_input_names, code]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]


# --- model -----------------------------------------------------------------------------------------------------------


def load_reader(arguments: ModelArguments, training: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model with a head for spans, and its tokenizer."""
    checkpoint = read_checkpoint(arguments)
    # A classifier of two labels has an output layer of the same size.
    keeps_head = checkpoint.has_head("QuestionAnswering")
    if not training and not keeps_head:
        saved = ", ".join(checkpoint.architectures) or "no class"
        raise UserError(
            f"--no_do_train needs a model with a head for question answering: {checkpoint.name} names {saved}"
            f"{'' if checkpoint.has_weights else ', without weights'}."
        )
    # Some heads take their two outputs, start and end, from the number of labels.
    model, tokenizer = load_task_model(
        arguments, AutoModelForQuestionAnswering, ("LABEL_0", "LABEL_1"), keeps_head=keeps_head
    )
    check_tokenizer(tokenizer)
    # Logits are matched with tokens from the left.
    tokenizer.padding_side = "right"
    return model, tokenizer


# --- metrics ---------------------------------------------------------------------------------------------------------


def score(
    questions: Sequence[Question], answers: Sequence[Answer], may_be_null: bool, threshold: float | None
) -> tuple[dict[str, float], float | None]:
    """
    Return metrics in percent, and the threshold they hold at: the one given, or the one of the best F1.

    Without null answers there is no threshold, and every question gets its best candidate.
    """
    metrics: dict[str, float] = {}
    if may_be_null:
        # The best candidates, whatever speaks against them.
        predictions = predicted_texts(questions, answers, None)
        odds = {question.id: answer.null_odds for question, answer in zip(questions, answers)}
        metrics = best_thresholds(questions, predictions, odds)
        threshold = metrics["best_f1_thresh"] if threshold is None else threshold
        metrics["null_threshold"] = threshold
    else:
        threshold = None
    return squad_metrics(questions, predicted_texts(questions, answers, threshold)) | metrics, threshold


def predicted_texts(
    questions: Sequence[Question], answers: Sequence[Answer], threshold: float | None
) -> dict[str, str]:
    """Return the answer to each question's id, "" for none: the official format of predictions."""
    decided = [replace(answer, null_threshold=threshold) for answer in answers]
    return {question.id: answer.text for question, answer in zip(questions, decided)}


def write_answers(
    folder: Path, split: Split, answers: Sequence[Answer], may_be_null: bool, threshold: float | None
) -> None:
    """Write predictions and odds in the official script's format, and the candidates of each question, best first."""
    files = {"predictions": predicted_texts(split.questions, answers, threshold), "nbest": {}}
    for question, answer in zip(split.questions, answers):
        candidates = [asdict(candidate) for candidate in answer.candidates]
        if may_be_null:
            candidates.append({"text": "", "start": 0, "end": 0, "score": answer.no_answer_score})
        files["nbest"][question.id] = sorted(candidates, key=lambda candidate: -candidate["score"])
    if may_be_null:
        files["null_odds"] = {question.id: answer.null_odds for question, answer in zip(split.questions, answers)}
    for name, content in files.items():
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / f"{name}_{split.name}.json").write_text(text + "\n", encoding="utf-8")


# --- the run ---------------------------------------------------------------------------------------------------------


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training_arguments: TrainingArguments,
    data_arguments: DataArguments,
    may_be_null: bool,
    train: Split | None = None,
    validation: Split | None = None,
) -> Trainer:
    """Make a Trainer that pads each batch to its longest window and reports the metrics of the validation split."""

    def metrics(output) -> dict[str, float]:
        place = np.argsort(longest_first(validation.inputs))
        logits = [part[place] for part in output.predictions[:2]]
        answers = validation.answers(*logits, data_arguments)
        return score(validation.questions, answers, may_be_null, data_arguments.null_score_diff_threshold)[0]

    return LengthGroupedTrainer(
        model=model,
        args=training_arguments,
        train_dataset=None if train is None else train.inputs,
        eval_dataset=None if validation is None else validation.inputs,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        compute_metrics=None if validation is None else metrics,
    )


def evaluate(
    trainer: Trainer, split: Split, prefix: str, arguments: DataArguments, may_be_null: bool, threshold: float | None
) -> tuple[dict[str, float], float | None]:
    """
    Evaluate in one pass over a split: its metrics, as far as answers are known, the null threshold used, and the files.
    """
    output = trainer.predict(split.inputs, metric_key_prefix=prefix)
    answers = split.answers(*output.predictions[:2], arguments)
    metrics = output.metrics | {f"{prefix}_samples": len(split.questions)}
    if split.is_scored:
        scores, threshold = score(split.questions, answers, may_be_null, threshold)
        metrics |= {f"{prefix}_{name}": value for name, value in scores.items()}
    elif may_be_null and threshold is None:
        logger.warning(f"{split.name}: no validation rows to choose the null threshold on: it is 0.")
        threshold = 0.0
    if trainer.is_world_process_zero():
        write_answers(Path(trainer.args.output_dir), split, answers, may_be_null, threshold)
    return metrics, threshold


def run(
    model_arguments: ModelArguments, data_arguments: DataArguments, training_arguments: TrainingArguments
) -> dict[str, float]:
    """
    Fine-tune, evaluate, predict, and on request merge and evaluate again.

    Returns:
        What `all_results.json` holds.
    """
    check_run(data_arguments, training_arguments)
    for name in ("n_best_size", "max_answer_length"):
        if getattr(data_arguments, name) < 1:
            raise UserError(f"--{name} {getattr(data_arguments, name)} is not allowed: it must be at least 1.")
    questions = load_questions(data_arguments)
    has_validation = bool(check_splits(training_arguments, list(questions)))
    threshold = data_arguments.null_score_diff_threshold
    known = [question.answers for name in ("train", "validation") for question in questions.get(name, ())]
    may_be_null = threshold is not None or () in known
    choose_best_by(training_arguments, METRICS)
    set_seed(training_arguments.seed)
    model, tokenizer = load_reader(model_arguments, training_arguments.do_train)
    merge_weights = check_merge(model_arguments.merge_after, model, has_validation, training_arguments.do_train)
    if not training_arguments.do_train:
        questions.pop("train", None)
    # The first process makes the windows, the others read them.
    with training_arguments.main_process_first(local=False):
        data = {name: make_split(name, found, tokenizer, data_arguments) for name, found in questions.items()}
    checkpoint = begin_run(model_arguments, data_arguments, training_arguments)

    validation = data.get("validation")
    make = (tokenizer, training_arguments, data_arguments, may_be_null)
    trainer = make_trainer(model, *make, data.get("train"), validation)

    results = RunResults(trainer)
    if training_arguments.do_train:
        results.train(checkpoint)
    if training_arguments.do_eval:
        metrics, threshold = evaluate(trainer, validation, "eval", data_arguments, may_be_null, threshold)
        results.keep("eval", metrics)
    if training_arguments.do_predict and "test" in data:
        metrics, _ = evaluate(trainer, data["test"], "test", data_arguments, may_be_null, threshold)
        results.keep("test", metrics)
    if merge_weights is not None:

        def measure(merged: PreTrainedModel) -> dict[str, float]:
            values = make_trainer(merged, *make, validation=validation).evaluate()
            return {f"eval_{name}": values[f"eval_{name}"] for name in METRICS}

        results.merge_and_evaluate(merge_weights, validation.inputs, measure)
    return results.write()


# --- command line ----------------------------------------------------------------------------------------------------


def command() -> None:
    """Entry point of `modernalbert-squad`."""
    run_script(run, ModelArguments, DataArguments, TaskTrainingArguments, description=__doc__)


if __name__ == "__main__":
    command()
