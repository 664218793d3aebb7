# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Retrieval sets in BEIR's form: `corpus.jsonl`, `queries.jsonl`, `qrels/<split>.tsv`; errors name file and line."""

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from modernalbert.cli.errors import UserError


Qrels = dict[str, dict[str, int]]


class Corpus:
    """
    The documents of a `corpus.jsonl`, read from the file when they are asked for.

    Memory holds ids, places and lengths only, so that a corpus may be larger than it.

    Attributes:
        ids: The documents' ids, in the order of the file.
        lengths: (n,) bytes of each document's line: what encoding sorts by.
    """

    def __init__(self, file: Path):
        self.file = file
        self.ids: list[str] = []
        offsets, lengths, seen = array("q"), array("q"), set()
        for line in tqdm(_json_lines(file), desc=f"Reading {file.parent.name}", unit=" documents", leave=False):
            identifier = _identifier(line, seen)
            for name in ("title", "text"):
                if not isinstance(line.row.get(name, "") or "", str):
                    raise UserError(f"{line.place}: {name!r} must hold text, not {line.row[name]!r}.")
            if "text" not in line.row:
                raise UserError(f"{line.place}: no field 'text'; there are {', '.join(line.row)}.")
            self.ids.append(identifier)
            offsets.append(line.offset)
            lengths.append(line.length)
        self.offsets, self.lengths = np.asarray(offsets), np.asarray(lengths)

    def __len__(self) -> int:
        return len(self.ids)

    def texts(self, rows: Iterable[int]) -> list[str]:
        """Title and text, as BEIR joins them, of the documents with these row numbers."""
        texts = []
        with self.file.open("rb") as handle:
            for row in rows:
                handle.seek(self.offsets[row])
                document = json.loads(handle.read(self.lengths[row]).decode("utf-8-sig"))
                texts.append(f"{document.get('title') or ''} {document['text'] or ''}".strip())
        return texts


@dataclass
class RetrievalSet:
    """
    A corpus, the queries of one split, and what is relevant to them.

    Attributes:
        name: The folder's name.
        queries: Text by query id, of the queries that the split judges.
        qrels: Relevance (0 is none) by query id and document id.
    """

    name: str
    split: str
    corpus: Corpus
    queries: dict[str, str]
    qrels: Qrels


def load_retrieval_set(folder: str, split: str, max_queries: int | None = None) -> RetrievalSet:
    """
    Read a folder in BEIR's form.

    Args:
        max_queries: Keep the first queries only, in the order of the judgements.

    Raises:
        UserError: a file is missing or malformed, an id is given twice, a query is empty, or a judgement names a query
            or document that does not exist; file and line are named.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{folder}: no such folder.")
    judgements = path / "qrels" / f"{split}.tsv"
    for file in (path / "corpus.jsonl", path / "queries.jsonl", judgements):
        if not file.is_file():
            raise UserError(f"{file}: no such file; a retrieval set is corpus.jsonl, queries.jsonl, qrels/{split}.tsv.")
    corpus = Corpus(path / "corpus.jsonl")
    queries = read_queries(path / "queries.jsonl")
    qrels = read_qrels(judgements, queries, set(corpus.ids))
    kept = list(qrels)[:max_queries]
    return RetrievalSet(
        path.resolve().name,
        split,
        corpus,
        {query: queries[query] for query in kept},
        {query: qrels[query] for query in kept},
    )


def read_queries(file: Path) -> dict[str, str]:
    """Read the texts of queries by their ids."""
    queries, seen = {}, set()
    for line in _json_lines(file):
        identifier = _identifier(line, seen)
        text = line.row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{line.place}: the query {identifier!r} is empty.")
        queries[identifier] = text
    return queries


def read_qrels(file: Path, queries: Iterable[str], documents: Iterable[str]) -> Qrels:
    """
    Read judgements: lines of query id, document id and relevance, with tabs between; a line of names may come first.

    Args:
        queries, documents: The ids that exist.
    """
    qrels: Qrels = {}
    for number, text in enumerate(_text_lines(file), start=1):
        fields = text.split("\t")
        place = f"{file}, line {number}"
        if len(fields) != 3:
            raise UserError(f"{place}: 3 columns with tabs between expected (query, document, relevance): {text!r}.")
        query, document, relevance = (field.strip() for field in fields)
        try:
            grade = int(relevance)
        except ValueError:
            if number == 1:
                continue
            raise UserError(f"{place}: the relevance {relevance!r} is not allowed: it must be an integer.") from None
        if query not in queries:
            raise UserError(f"{place}: the query {query!r} is not in queries.jsonl.")
        if document not in documents:
            raise UserError(f"{place}: the document {document!r} is not in corpus.jsonl.")
        if document in qrels.setdefault(query, {}):
            raise UserError(f"{place}: the query {query!r} and the document {document!r} are judged twice.")
        # trec_eval, and so everybody, counts what is below 0 as not relevant.
        qrels[query][document] = grade
    if not qrels:
        raise UserError(f"{file}: holds no judgements.")
    return qrels


@dataclass
class _Line:
    place: str
    offset: int
    length: int
    row: dict


def _json_lines(file: Path) -> Iterator[_Line]:
    """Yield the objects of a JSON Lines file, one at a time, each with where it lies (in bytes)."""
    offset, found = 0, False
    with file.open("rb") as handle:
        for number, content in enumerate(handle, start=1):
            place, start = f"{file}, line {number}", offset
            offset += len(content)
            if not content.strip():
                continue
            try:
                row = json.loads(content.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: not UTF-8 text (byte {error.start}).") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{place}, column {error.colno}: {error.msg}.") from None
            if not isinstance(row, dict):
                raise UserError(f"{place}: a row must be an object with named fields.")
            found = True
            yield _Line(place, start, len(content), row)
    if not found:
        raise UserError(f"{file}: holds no rows.")


def _text_lines(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}).") from None


def _identifier(line: _Line, seen: set[str]) -> str:
    identifier = line.row.get("_id")
    if not isinstance(identifier, (str, int)) or identifier == "":
        raise UserError(f"{line.place}: the field '_id' must hold an id, not {identifier!r}.")
    identifier = str(identifier)
    if identifier in seen:
        raise UserError(f"{line.place}: the id {identifier!r} is given twice.")
    seen.add(identifier)
    return identifier
