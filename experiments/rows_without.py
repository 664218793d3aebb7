# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Rows to train on that share no text with the rows that judge.

    python experiments/rows_without.py --rows $DATA_DIR/stsb/train.jsonl --without $DATA_DIR/mrpc/validation.jsonl \\
        --output_file outputs/stsb-without-mrpc/train.jsonl

Public sets borrow from each other: STS 2012 has pairs of MRPC. A row is left out where a text of it shares eight words
in a row with one of --without, or equals one of four or more: as `experiments/nano_corpus.py` leaves out sentences.
Says how many rows of either file have such a text.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from nano_corpus import shingles, strings_in, words_of

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.data.tables import read_rows


@dataclass
class RowsWithoutArguments:
    """The files."""

    rows: str = field(metadata={"help": "Rows to choose from (csv, tsv, json, jsonl, parquet)."})
    without: str = field(metadata={"help": "Rows whose texts are to be unknown."})
    output_file: str = field(metadata={"help": "Where the chosen rows go, as jsonl."})


def shingles_of(row: dict) -> set[int]:
    """Of all texts of a row."""
    return {shingle for text in strings_in(row) for shingle in shingles(words_of(text))}


def main() -> None:
    (arguments,) = parse_arguments(RowsWithoutArguments, description=__doc__)
    output = Path(arguments.output_file)
    if output.suffix != ".jsonl":
        raise UserError(f"--output_file {output} is not allowed: its name must end in .jsonl.")
    rows, without = ([row for _, row in read_rows(name)] for name in (arguments.rows, arguments.without))
    unknown = [shingles_of(row) for row in without]
    known = [shingles_of(row) for row in rows]
    in_rows, in_without = set().union(*known), set().union(*unknown)
    kept = [row for row, found in zip(rows, known) if found.isdisjoint(in_without)]
    shared = sum(not found.isdisjoint(in_rows) for found in unknown)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), "utf-8")
    os.replace(unfinished, output)
    print(f"{arguments.without}: {shared:,} of {len(without):,} rows share a text with {arguments.rows}.")
    print(f"{output}: {len(kept):,} of its {len(rows):,} rows, those that share none.")


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
