# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Text files, plain or compressed by gzip or xz, and whether they are whole."""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

from modernalbert.cli.errors import UserError


# By the last suffix of a file's name: how it is opened.
COMPRESSIONS: dict[str, Callable[..., IO]] = {".gz": gzip.open, ".xz": lzma.open}
# What reading a compressed file raises if it is cut short or damaged.
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
PIECE = 1 << 20


def kind_of(file: str | Path) -> str:
    """Return the suffix that tells a file's form: ".jsonl" of "a.jsonl" and of "a.jsonl.xz"."""
    path = Path(file)
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def open_binary(file: str | Path) -> IO[bytes]:
    """Open a file to read its bytes, decompressed on the way."""
    return COMPRESSIONS.get(Path(file).suffix, open)(file, "rb")


def open_text(file: str | Path, newline: str | None = None) -> IO[str]:
    """Open a file of UTF-8 text, with or without a byte order mark, to read it, decompressed on the way."""
    return COMPRESSIONS.get(Path(file).suffix, open)(file, "rt", encoding="utf-8-sig", newline=newline)


def damaged(file: str | Path, error: Exception) -> UserError:
    """Make the error for a compressed file whose reading raised one of `DAMAGED`."""
    return UserError(f"{file}: the compressed file is cut short or damaged: {error}")


def check_whole(file: str | Path) -> None:
    """
    Raise a UserError if a file was cut short, for example by an interrupted download or copy.

    A gzip file is read through, as its end alone does not tell; of the others only the end is read.
    """
    path = Path(file)
    if path.suffix == ".gz":
        try:
            with open_binary(path) as handle:
                while handle.read(PIECE):
                    pass
        except DAMAGED as error:
            raise damaged(path, error) from None
        return
    with open(path, "rb") as handle:
        size = handle.seek(0, 2)
        handle.seek(max(0, size - PIECE))
        end = handle.read()
    if path.suffix == ".xz":
        # The format ends with these two bytes; zeros may follow.
        if not end.rstrip(b"\0").endswith(b"YZ"):
            raise UserError(f"{file}: the compressed file is cut short or damaged: it has no end mark.")
    elif path.suffix == ".parquet":
        if not end.endswith(b"PAR1"):
            raise UserError(f"{file}: the file is cut short, or it is not a parquet file: it has no end mark.")
    elif path.suffix in (".json", ".jsonl"):
        end = end.rstrip()
        is_whole = not end or end.endswith((b"}", b"]"))
        if is_whole and path.suffix == ".jsonl" and (b"\n" in end or size <= PIECE):
            try:
                json.loads(end.rpartition(b"\n")[2] or b"{}")
            except ValueError:
                is_whole = False
        if not is_whole:
            raise UserError(f"{file}: the file is cut short: its last line is no whole JSON object.")
