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
"""SQuAD 1.1 and 2.0: reading files of that format with checks, and the metrics of the official script."""

import json
import logging
import re
import string
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modernalbert.command_line import UserError


logger = logging.getLogger(__name__)

METRICS = ("f1", "exact")


@dataclass(frozen=True)
class Question:
    """
    A question about a text.

    Attributes:
        id: Names it in files of predictions.
        answers: Texts that are right; empty: the context has no answer; `None`: not known.
        starts: For each answer the character of the context at which it begins, `None` if it does not stand there.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...] | None
    starts: tuple[int | None, ...] = ()

    @property
    def span(self) -> tuple[int, int] | None:
        """First and last + 1 character of the answer that most people gave, the earliest of them in a tie."""
        spans = [
            (start, start + len(text)) for text, start in zip(self.answers or (), self.starts) if start is not None
        ]
        return Counter(spans).most_common(1)[0][0] if spans else None


# --- files -----------------------------------------------------------------------------------------------------------


def read_squad(file: str, needs_answers: bool = True, strict: bool = False) -> list[Question]:
    """
    The questions of a file in SQuAD's JSON format, 1.1 or 2.0.

    Args:
        needs_answers: False for a file to predict, whose questions may lack the field "answers".
        strict: Refuse answers that do not stand where their `answer_start` says; otherwise they are reported.

    Raises:
        UserError: the file is missing or malformed, or an id appears twice; the place in the file is named.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: no such file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}, column {error.colno}: {error.msg}.") from None
    return checked(_questions(file, content, needs_answers), file, strict)


def rows_to_questions(rows: Iterable[dict], name: str, needs_answers: bool, strict: bool) -> list[Question]:
    """The questions of a Hub data set with SQuAD's columns: id, question, context, answers {text, answer_start}."""

    def questions() -> Iterator[tuple[str, Question, list]]:
        for i, row in enumerate(rows):
            place = f"{name}, row {i}"
            answers = row.get("answers")
            if answers is not None:
                texts, starts = _field(answers, "text", list, place), _field(answers, "answer_start", list, place)
                answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts)]
            yield _question(row | {"answers": answers}, _field(row, "context", str, place), place, needs_answers)

    return checked(questions(), name, strict)


def checked(found: Iterable[tuple[str, Question, list]], source: str, strict: bool) -> list[Question]:
    """Questions with different ids, after a report of the answers that do not stand where they are said to."""
    questions, places, misplaced, num_answers = [], {}, [], 0
    for place, question, wrong in found:
        if question.id in places:
            raise UserError(f"{place}: the id {question.id!r} is that of {places[question.id]} too; ids must differ.")
        places[question.id] = place
        questions.append(question)
        misplaced += wrong
        num_answers += len(question.answers or ())
    if not questions:
        raise UserError(f"{source}: holds no questions.")
    if misplaced:
        said = f"{len(misplaced)} of {num_answers} answers do not stand where their answer_start says"
        if strict:
            raise UserError(f"{misplaced[0]} ({source}: {said}; --strict refuses that).")
        lost = sum(bool(question.answers) and question.span is None for question in questions)
        logger.warning(f"{source}: {said}, and {lost} questions have no other to train on. First: {misplaced[0]}.")
    return questions


def _questions(file: str, content: object, needs_answers: bool) -> Iterator[tuple[str, Question, list]]:
    for i, article in enumerate(_field(content, "data", list, file)):
        where = f"{file}, data[{i}]"
        for j, paragraph in enumerate(_field(article, "paragraphs", list, where)):
            place = f"{where}.paragraphs[{j}]"
            context = _field(paragraph, "context", str, place)
            for k, entry in enumerate(_field(paragraph, "qas", list, place)):
                yield _question(entry, context, f"{place}.qas[{k}]", needs_answers)


def _question(entry: object, context: str, place: str, needs_answers: bool) -> tuple[str, Question, list[str]]:
    """The place, the question, and a sentence for each answer that does not stand where it should."""
    name = str(_field(entry, "id", (str, int), place))
    text = _field(entry, "question", str, place).strip()
    impossible = _field(entry, "is_impossible", bool, place) if "is_impossible" in entry else None
    if entry.get("answers") is None and (impossible or not needs_answers):
        return place, Question(name, text, context, () if impossible else None), []
    answers, starts, misplaced = [], [], []
    for i, answer in enumerate(_field(entry, "answers", list, place)):
        where = f"{place}.answers[{i}]"
        answers.append(_field(answer, "text", str, where))
        start = _field(answer, "answer_start", int, where)
        if not answers[-1].strip():
            raise UserError(f"{where}: field 'text' is empty.")
        stands = context[max(0, start) : max(0, start) + len(answers[-1])]
        starts.append(start if start >= 0 and stands == answers[-1] else None)
        if starts[-1] is None:
            misplaced.append(f"{where}: {_short(answers[-1])} is not at {start}, there is {_short(stands)}")
    if answers and impossible:
        raise UserError(f"{place}: is_impossible is true, and there are answers.")
    if not answers and impossible is False and needs_answers:
        raise UserError(f"{place}: is_impossible is false, and there are no answers.")
    return place, Question(name, text, context, tuple(answers), tuple(starts)), misplaced


_KINDS = {list: "a list", str: "text", bool: "true or false", int: "an integer", (str, int): "text"}


def _field(entry: object, name: str, kind: type | tuple, place: str):
    """A field of an object, of the right type."""
    if not isinstance(entry, dict):
        raise UserError(f"{place}: must be an object with the field {name!r}, not {_short(entry)}.")
    if name not in entry:
        raise UserError(f"{place}: no field {name!r}; there are {', '.join(map(str, entry)) or 'none'}.")
    value = entry[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{place}: field {name!r} must be {_KINDS[kind]}, not {_short(value)}.")
    return value


def _short(value: object) -> str:
    return textwrap.shorten(repr(value), 60, placeholder=" ...")


# --- metrics ---------------------------------------------------------------------------------------------------------

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """The text in lower case, without ASCII punctuation, the words a, an, the, and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if both are the same after normalisation."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the words after normalisation; nothing agrees with nothing only."""
    predicted, right = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not predicted or not right:
        return float(predicted == right)
    common = sum((Counter(predicted) & Counter(right)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(right)
    return 2 * precision * recall / (precision + recall)


def question_scores(question: Question, prediction: str) -> dict[str, float]:
    """
    "exact" and "f1" of one prediction, 0 to 1: those of the answer that it is nearest to.

    As in the official script, answers of which normalisation leaves nothing ("the") do not count.
    """
    answers = [answer for answer in question.answers if normalize_answer(answer)] or [""]
    return {
        "exact": max(exact_match(prediction, answer) for answer in answers),
        "f1": max(token_f1(prediction, answer) for answer in answers),
    }


def squad_metrics(questions: Sequence[Question], predictions: dict[str, str]) -> dict[str, float]:
    """
    What the official script (evaluate-v2.0.py) reports, under its names, in percent.

    Args:
        questions: With answers.
        predictions: The answer to each question's id, "" for none.

    Returns:
        "exact", "f1" and "total" (questions), over all; and with the prefix "HasAns_" over the questions that have an
        answer, "NoAns_" over those that have none, where there are such.
    """
    scores = [question_scores(question, predictions[question.id]) for question in questions]
    metrics: dict[str, float] = {}
    parts = {"": (True, False), "HasAns_": (True,), "NoAns_": (False,)}
    for prefix, wanted in parts.items():
        chosen = [score for score, question in zip(scores, questions) if bool(question.answers) in wanted]
        if chosen:
            for name in ("exact", "f1"):
                metrics[prefix + name] = 100.0 * sum(score[name] for score in chosen) / len(chosen)
            metrics[prefix + "total"] = len(chosen)
    return metrics


def best_thresholds(
    questions: Sequence[Question], predictions: dict[str, str], null_odds: dict[str, float]
) -> dict[str, float]:
    """
    The highest metrics that a threshold on the odds can give, in percent, and the threshold.

    A question of higher odds than the threshold gets no answer. Unlike the official script's search, questions of
    equal odds are never parted, as no threshold could, and the threshold is halfway between the odds it parts (our
    decision), where the script takes the lower: rounding, which differs from batch to batch, then moves no question
    across. Otherwise the figures are the same.

    Args:
        predictions: The best answer to each question's id, whatever its odds.
        null_odds: How much more the model believes that there is no answer, by id.

    Returns:
        "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"; the lowest threshold where several are best,
        and 1 beyond all odds where it parts none.
    """
    scores = [question_scores(question, predictions[question.id]) for question in questions]
    odds = np.array([null_odds[question.id] for question in questions], dtype=np.float64)
    has_answer = np.array([bool(question.answers) for question in questions])
    has_text = np.array([bool(predictions[question.id]) for question in questions])
    order = np.argsort(odds, kind="stable")
    sorted_odds = odds[order]
    # Between neighbours, and one beyond both ends. Halves of doubles may round to the upper neighbour: never that.
    bounded = np.concatenate([[sorted_odds[0] - 2.0], sorted_odds, [sorted_odds[-1] + 2.0]])
    below, above = bounded[:-1], bounded[1:]
    thresholds = np.maximum(below, np.minimum((below + above) / 2, np.nextafter(above, -np.inf)))
    # Every possible cut: before the first question, and behind each that is followed by higher odds.
    cuts = np.concatenate([[0], np.flatnonzero(np.append(sorted_odds[1:] > sorted_odds[:-1], True)) + 1])
    metrics = {}
    for name in ("exact", "f1"):
        # What a question adds when it gets its answer instead of none.
        gain = np.where(has_answer, [score[name] for score in scores], -1.0 * has_text)
        totals = np.cumsum(np.concatenate([[np.sum(~has_answer)], gain[order]]))[cuts]
        best = int(totals.argmax())
        metrics[f"best_{name}"] = 100.0 * float(totals[best]) / len(questions)
        metrics[f"best_{name}_thresh"] = float(thresholds[cuts[best]])
    return metrics
