# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Files of rows as the data of a task: its columns and labels, checked row by row."""

import logging
import re
from collections import Counter
from pathlib import Path

from datasets import Dataset

from modernalbert.cli.errors import UserError
from modernalbert.data.glue_tasks import Task
from modernalbert.data.tables import read_rows


logger = logging.getLogger(__name__)

# Text that is a number. "007" and "1_2", which Python takes for numbers too, are names.
NUMBER = re.compile(r"[+-]?(0|[1-9]\d*|(?=\.\d))(\.\d*)?(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def infer_task(file: str, label_column: str = "label", text_columns: str | None = None) -> Task:
    """
    Infer the task that a training file stands for.

    The text is in `text_columns` ("a" or "a,b"), or in the one or two columns of strings that are not the label.
    Numbers with a fraction make it a regression; otherwise the labels are the different values, in sorted order.
    Labels that differ only in case are one label, in its most frequent spelling.

    Raises:
        UserError: the text cannot be told, or the column of labels holds one label only, or what is no label.
    """
    rows = read_rows(file)
    place, first = rows[0]
    if label_column not in first:
        raise UserError(f"{place}: no column {label_column!r}; there are {', '.join(first)} (see --label_column).")
    columns = _infer_text_columns(place, first, label_column, text_columns)
    values = []
    for place, row in rows:
        _check_label(row.get(label_column), label_column, place)
        values.append(row[label_column])
    numbers = [_as_number(value) for value in values]
    has_fractions = any(number is not None and number != int(number) for number in numbers)
    if has_fractions:
        for (place, _), value, number in zip(rows, values, numbers):
            if number is None:
                raise UserError(
                    f"{place}: the label {value!r} is not allowed: the column {label_column!r} holds numbers with "
                    "fractions, so that every label must be a number."
                )
        return Task("custom", columns, (), ("spearmanr", "pearson"), label_column=label_column)
    if None not in numbers:
        labels = tuple(str(int(number)) for number in sorted(set(numbers)))
    else:
        spellings: dict[str, Counter[str]] = {}
        for value, number in zip(values, numbers):
            name = _label_name(value, number)
            spellings.setdefault(name.casefold(), Counter())[name] += 1
        labels = tuple(sorted(found.most_common(1)[0][0] for found in spellings.values()))
    if len(labels) < 2:
        raise UserError(
            f"{file}: column {label_column!r} holds one label only, {labels[0]!r}; there must be two or more."
        )
    positive = "1" if labels == ("0", "1") else None
    metrics = ("accuracy", "macro_f1" if positive is None else "f1")
    return Task("custom", columns, labels, metrics, label_column=label_column, positive_label=positive)


def _infer_text_columns(place: str, row: dict, label_column: str, text_columns: str | None) -> tuple[str, ...]:
    if text_columns is not None:
        columns = tuple(name.strip() for name in text_columns.split(","))
        missing = [name for name in columns if name not in row]
        if missing or len(columns) > 2:
            raise UserError(f"--text_columns {text_columns} is not allowed: one or two of {', '.join(row)}.")
        return columns
    columns = tuple(
        name
        for name, value in row.items()
        if name != label_column and isinstance(value, str) and name.lower() not in ("id", "idx", "index", "guid")
    )
    if not 1 <= len(columns) <= 2:
        raise UserError(
            f"{place}: which columns hold the text? Give --text_columns with one or two of {', '.join(row)}."
        )
    return columns


def files_of_task(data_dir: Path, task: Task) -> dict[str, str]:
    """
    Return the files of a task in a folder of tasks, by split: TASK/train.jsonl and so on.

    Besides "train", "validation" and "test" these are the splits the task has of its own ("validation_matched", ...).

    Raises:
        UserError: there is no such folder, or no such file in it.
    """
    splits = dict.fromkeys(("train", "validation", *task.validation_splits, "test", *task.test_splits))
    files = {split: data_dir / task.name / f"{split}.jsonl" for split in splits}
    files = {split: str(file) for split, file in files.items() if file.is_file()}
    if not files:
        raise UserError(f"{data_dir / task.name}: there is no train.jsonl, validation.jsonl or test.jsonl.")
    return files


def load_task_file(file: str, task: Task, with_labels: bool = True) -> Dataset:
    """
    Read a data set with columns "text", for pairs "text_pair", and "label" (id or number), checked row by row.

    A label may be an id or a label name in any case. A row's label may be missing (or -1, as in GLUE's test sets) only
    where `with_labels` is false; the column is then left out unless every row has one.

    Raises:
        UserError: a column is missing or a label is not allowed; the file and line are named.
    """
    columns: dict[str, list] = {name: [] for name in ("text", "text_pair")[: len(task.text_columns)]}
    labels = []
    rows = read_rows(file)
    # -1 stands for a missing label where it is none of the task's.
    allows_minus_one = "-1" in task.labels or (
        task.is_regression and any(_as_number(row.get(task.label_column)) not in (None, -1) for _, row in rows)
    )
    for place, row in rows:
        for target, name in zip(columns, task.text_columns):
            if not isinstance(row.get(name), str):
                message = (
                    f"no column {name!r}; there are {', '.join(map(str, row))}"
                    if name not in row
                    else (f"column {name!r} must hold text, not {row[name]!r}")
                )
                raise UserError(f"{place}: {message}.")
            columns[target].append(row[name])
        label = row.get(task.label_column)
        if not with_labels and (_is_missing(label) or (_as_number(label) == -1 and not allows_minus_one)):
            continue
        if task.label_column not in row:
            raise UserError(f"{place}: no column {task.label_column!r}; there are {', '.join(map(str, row))}.")
        _check_label(label, task.label_column, place)
        labels.append(_label_value(task, label, place))
    if len(labels) == len(columns["text"]):
        columns["label"] = labels
    elif labels:
        logger.warning(
            f"{file}: {len(labels)} of {len(columns['text'])} rows have a label: they are predicted without metrics."
        )
    return Dataset.from_dict(columns)


def relabel(data: Dataset, old: Task, new: Task) -> Dataset:
    """Map the label ids of `load_task_file` from the old task's order to the new one's."""
    if old.labels == new.labels or "label" not in data.column_names:
        return data
    ids = [new.labels.index(label) for label in old.labels]
    return data.map(lambda row: {"label": ids[row["label"]]}, desc="Labels")


def _check_label(label, column: str, place: str) -> None:
    """Refuse what cannot be a label."""
    if isinstance(label, (list, tuple, dict)):
        raise UserError(
            f"{place}: the label {label!r} is not allowed: a row must have one label, a name or a number (several "
            "labels a row are not supported)."
        )
    if _is_missing(label):
        raise UserError(f"{place}: no value in column {column!r}.")


def _label_name(label, number: float | None) -> str:
    """Write a label as a name: whole numbers without a fraction, text without space around it."""
    return str(int(number)) if number is not None and number == int(number) else str(label).strip()


def _label_value(task: Task, label, place: str) -> int | float:
    number = _as_number(label)
    if task.is_regression:
        if number is None:
            raise UserError(f"{place}: the label {label!r} is not allowed: it must be a number.")
        return number
    # Names first: a custom task's names may themselves be numbers, such as "1" to "5".
    ids = {name.casefold(): i for i, name in enumerate(task.labels)}
    found = ids.get(_label_name(label, number).casefold())
    if found is not None:
        return found
    if number is not None and number == int(number) and task.name != "custom" and 0 <= number < len(task.labels):
        return int(number)
    allowed = ", ".join(task.labels)
    if task.name != "custom":
        allowed = f"0 to {len(task.labels) - 1} ({allowed})"
    raise UserError(f"{place}: the label {label!r} is not allowed: it must be one of {allowed}.")


def _as_number(value) -> float | None:
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()) is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number and abs(number) != float("inf") else None


def _is_missing(label) -> bool:
    """Tell whether it is None, an empty cell, or the NaN that tables put in place of nothing."""
    if isinstance(label, (list, tuple, dict)):
        return False
    return label is None or label != label or not str(label).strip()
