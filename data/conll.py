# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Sentences of tagged words from CoNLL-style, json, jsonl and parquet files, with errors that name the line."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from modernalbert.cli.errors import UserError
from modernalbert.data.entity_tags import is_iob1, is_tag, spans_of, tags_of
from modernalbert.data.tables import read_rows
from modernalbert.data.text_files import DAMAGED, damaged, kind_of, open_text


logger = logging.getLogger(__name__)

TABLES = (".json", ".jsonl", ".parquet")
NEW_DOCUMENT = "-DOCSTART-"


def read_sentences(file: str, text_column: str | None, label_column: str | None, with_tags: bool = True) -> Dataset:
    """
    Read the sentences of a file: a table of lists (".json", ".jsonl", ".parquet"), or else lines of one word.

    A line holds a word and its tags, in columns separated by tabs or, without tabs, by spaces; an empty line ends
    the sentence, and so does a line of -DOCSTART-.

    Args:
        text_column: Of the words: for lines a number from 0 (by default 0), for tables a name (by default "tokens").
        label_column: Of the tags, likewise (by default the last, -1; "ner_tags").
        with_tags: Whether tags must be there. If not, a file without that column is a file without tags.

    Returns:
        Columns "words", "tags" (if there are any) and "place" ("train.conll, line 7": where the sentence begins).

    Raises:
        UserError: naming file and line.
    """
    if kind_of(file) == ".csv":
        raise UserError(
            f"{file}: the file type '.csv' is not allowed: write words and tags in lines, parted by tabs or spaces, or "
            f"as lists in {', '.join(TABLES)}."
        )
    if kind_of(file) in TABLES:
        rows = _read_table(file, text_column or "tokens", label_column or "ner_tags", with_tags)
    else:
        rows = _read_lines(file, _number(text_column, "text", 0), _number(label_column, "label", -1), with_tags)
    if not rows:
        raise UserError(f"{file}: holds no sentences.")
    return Dataset.from_list(rows)


def check_tag(tag, place: str) -> str:
    """Return the tag; a UserError if it is none."""
    if is_tag(tag):
        return tag
    raise UserError(
        f"{place}: the tag {tag!r} is not allowed: it must be O, or B-, I-, E- or S- and a type (see --label_column)."
    )


def in_scheme(sentences: Dataset, scheme: str, name: str) -> Dataset:
    """
    Bring the tags into the scheme IOB2 or IOBES, whatever they were; irregular ones are counted in a warning.

    Args:
        name: What to call the sentences in messages.
    """
    if "tags" not in sentences.column_names:
        return sentences
    tags = sentences["tags"][:]
    spans = [spans_of(sentence) for sentence in tags]
    if is_iob1(tags):
        logger.warning(f"{name}: the tags are IOB1, where B- only parts neighbours: read as {scheme}.")
    else:
        odd = [i for i, found in enumerate(spans) for _, first, _ in found if tags[i][first][0] not in "BS"]
        if odd:
            logger.warning(
                f"{name}: {len(odd)} of {sum(map(len, spans))} entities begin with I- or E- (the first in the sentence "
                f"at {sentences[odd[0]]['place']}): read as if with B-."
            )
    new = [tags_of(found, len(sentence), scheme) for found, sentence in zip(spans, tags)]
    return sentences.remove_columns("tags").add_column("tags", new)


def say_unknown_types(sentences: Dataset, labels: Sequence[str], name: str) -> None:
    """Count the entities of types that a model with these labels cannot predict."""
    if "tags" not in sentences.column_names:
        return
    known = {label[2:] for label in labels}
    found = [(kind, row["place"]) for row in sentences for kind, _, _ in spans_of(row["tags"]) if kind not in known]
    if found:
        kinds = ", ".join(sorted({kind for kind, _ in found}))
        logger.warning(
            f"{name}: {len(found)} entities of types that the model does not know, {kinds} (the first in the sentence "
            f"at {found[0][1]}): they count as missed."
        )


def _number(column: str | None, name: str, default: int) -> int:
    try:
        return default if column is None else int(column)
    except ValueError:
        raise UserError(f"--{name}_column {column} is not allowed: a file of lines has numbered columns.") from None


def _read_lines(file: str, text_column: int, label_column: int, with_tags: bool) -> list[dict]:
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file.")
    try:
        with open_text(file) as handle:
            lines = handle.read().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}).") from None
    except DAMAGED as error:
        raise damaged(file, error) from None
    sentences, width = [], None
    is_open = has_tags = False
    for number, line in enumerate(lines, start=1):
        line = line.strip(" \t\r")
        if not line or line.startswith(NEW_DOCUMENT):
            is_open = False
            continue
        place = f"{file}, line {number}"
        # No other white space: a word may be a no-break space.
        cells = [cell.strip(" ") for cell in line.split("\t")] if "\t" in line else re.split(" +", line)
        if width is None:
            width, first = len(cells), number
            if not -width <= text_column < width:
                raise UserError(f"{place}: no column {text_column}, there are {width} (see --text_column).")
            has_tags = -width <= label_column < width and (label_column - text_column) % width != 0
            if with_tags and not has_tags:
                raise UserError(f"{place}: no column of tags among {width} (see --label_column).")
        if len(cells) != width:
            raise UserError(f"{place}: {len(cells)} columns instead of the {width} of line {first}.")
        if not is_open:
            sentences.append({"words": [], "place": place} | ({"tags": []} if has_tags else {}))
            is_open = True
        sentences[-1]["words"].append(cells[text_column])
        if has_tags:
            sentences[-1]["tags"].append(check_tag(cells[label_column], place))
    return sentences


def _read_table(file: str, text_column: str, label_column: str, with_tags: bool) -> list[dict]:
    sentences, empty = [], 0
    rows = read_rows(file)
    has_tags = with_tags or label_column in rows[0][1]
    for place, row in rows:
        for column, flag in ((text_column, "text"), (label_column, "label"))[: 1 + has_tags]:
            if column not in row:
                raise UserError(f"{place}: no column {column!r}; there are {', '.join(row)} (see --{flag}_column).")
            if isinstance(row[column], str) or not hasattr(row[column], "__len__"):
                raise UserError(f"{place}: column {column!r} must hold a list, not {row[column]!r}.")
        words = list(row[text_column])
        if not all(isinstance(word, str) for word in words):
            raise UserError(f"{place}: column {text_column!r} must hold a list of words.")
        sentence = {"words": words, "place": place}
        if has_tags:
            if len(row[label_column]) != len(words):
                raise UserError(f"{place}: {len(words)} words and {len(row[label_column])} tags.")
            sentence["tags"] = [check_tag(tag, place) for tag in row[label_column]]
        if words:
            sentences.append(sentence)
        else:
            empty += 1
    if empty:
        logger.warning(f"{file}: {empty} rows without words are left out.")
    return sentences
