# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Rows from csv, tsv, json, jsonl and parquet files, with errors that say which line is wrong."""

import csv
import json
from pathlib import Path

from modernalbert.cli.errors import UserError, error_message
from modernalbert.data.text_files import COMPRESSIONS, DAMAGED, damaged, kind_of, open_text


SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


def read_rows(file: str) -> list[tuple[str, dict]]:
    """
    Read a file of rows.

    A ".json" file is either one array of objects or one object per line. All but parquet may be compressed (".gz",
    ".xz").

    Returns:
        Pairs of a place ("train.csv, line 7") and the row.

    Raises:
        UserError: the file is missing, empty, of unknown type, cut short, or malformed.
    """
    path, kind = Path(file), kind_of(file)
    if not path.is_file():
        raise UserError(f"{file}: no such file.")
    if kind not in SUFFIXES or (kind == ".parquet" and path.suffix != kind):
        raise UserError(
            f"{file}: the file type {path.suffix!r} is not allowed: it must be one of {', '.join(SUFFIXES)}, or one of "
            f"{', '.join(COMPRESSIONS)} behind them."
        )
    try:
        if kind == ".parquet":
            rows = _read_parquet(file)
        elif kind in (".csv", ".tsv"):
            rows = _read_csv(file, "\t" if kind == ".tsv" else ",")
        else:
            rows = _read_json(file)
    except UserError:
        raise  # said with its place
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}).") from None
    except DAMAGED as error:
        raise damaged(file, error) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error_message(error)}") from None
    if not rows:
        raise UserError(f"{file}: holds no rows.")
    return rows


def _read_parquet(file: str) -> list[tuple[str, dict]]:
    import pandas as pd  # here alone: the other kinds are read without it

    def plain(value):
        return value.tolist() if hasattr(value, "tolist") else value

    rows = pd.read_parquet(file).to_dict("records")
    return [(f"{file}, row {i}", {name: plain(value) for name, value in row.items()}) for i, row in enumerate(rows)]


def _read_csv(file: str, delimiter: str) -> list[tuple[str, dict]]:
    rows = []
    with open_text(file, newline="") as handle:
        # Tab-separated files, GLUE's among them, hold quotes as they are.
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        reader = csv.DictReader(handle, delimiter=delimiter, quoting=quoting, strict=True)
        while True:
            start = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise UserError(f"{file}, line {start}: {error}.") from None
            if row is None:
                return rows
            if None in row or None in row.values():
                raise UserError(f"{file}, line {start}: {len(reader.fieldnames)} columns expected, as in the header.")
            rows.append((f"{file}, line {reader.line_num}", row))


def _read_json(file: str) -> list[tuple[str, dict]]:
    with open_text(file) as handle:
        start = handle.read(1)
        while start.isspace():
            start = handle.read(1)
    rows = []
    with open_text(file) as handle:
        try:
            if start == "[":
                rows = [(f"{file}, entry {i}", row) for i, row in enumerate(json.loads(handle.read()))]
            else:
                for number, line in enumerate(handle, start=1):
                    if line.strip():
                        rows.append((f"{file}, line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            line = error.lineno if start == "[" else number
            raise UserError(f"{file}, line {line}, column {error.colno}: {error.msg}.") from None
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place}: a row must be an object with named columns.")
    return rows
