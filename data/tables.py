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
"""Rows from csv, tsv, json, jsonl and parquet files, with errors that say which line is wrong."""

import csv
import json
from pathlib import Path

from modernalbert.cli.errors import UserError


SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


def read_rows(file: str) -> list[tuple[str, dict]]:
    """
    Read a file of rows.

    A ".json" file is either one array of objects or one object per line.

    Returns:
        Pairs of a place ("train.csv, line 7") and the row.

    Raises:
        UserError: the file is missing, empty, of unknown type, or malformed.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: no such file.")
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{file}: the file type {path.suffix!r} is not allowed: it must be one of {', '.join(SUFFIXES)}."
        )
    try:
        if path.suffix == ".parquet":
            import pandas as pd  # here alone: the other kinds are read without it

            rows = [(f"{file}, row {i}", row) for i, row in enumerate(pd.read_parquet(path).to_dict("records"))]
        elif path.suffix in (".csv", ".tsv"):
            rows = _read_csv(file, "\t" if path.suffix == ".tsv" else ",")
        else:
            rows = _read_json(file)
    except UserError:
        raise  # said with its place
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}).") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not rows:
        raise UserError(f"{file}: holds no rows.")
    return rows


def _read_csv(file: str, delimiter: str) -> list[tuple[str, dict]]:
    rows = []
    with open(file, encoding="utf-8-sig", newline="") as handle:
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
    text = Path(file).read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            rows = [(f"{file}, entry {i}", row) for i, row in enumerate(json.loads(text))]
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {error.lineno}, column {error.colno}: {error.msg}.") from None
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append((f"{file}, line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{file}, line {number}, column {error.colno}: {error.msg}.") from None
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place}: a row must be an object with named columns.")
    return rows
