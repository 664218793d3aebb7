# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""SQuAD 1.1 and 2.0: reading files of that format with checks."""

import json
import logging
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from modernalbert.cli.errors import UserError


logger = logging.getLogger(__name__)


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


def read_squad(file: str, needs_answers: bool = True, strict: bool = False) -> list[Question]:
    """
    Read the questions of a file in SQuAD's JSON format, 1.1 or 2.0.

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
    """Read questions of a Hub data set with SQuAD's columns: id, question, context, answers {text, answer_start}."""

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
    """Check that ids are unique, and report the answers that are not at their answer_start."""
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
    """Return the place, the question, and a sentence for each answer that does not stand where it should."""
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
    """Return a field of an object, of the right type."""
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
