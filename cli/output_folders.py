# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Output folders that are whole or absent."""

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from modernalbert.cli.errors import UserError


@contextlib.contextmanager
def atomic_folder(folder: str | Path, replaceable: Sequence[str]) -> Iterator[Path]:
    """
    Yield a temporary folder beside `folder`, and move it into place when the block ends without an exception.

    Args:
        folder: The final place; a link is followed.
        replaceable: Names or patterns of what an earlier output of the same kind holds. A folder with nothing else in
            it is replaced; any other content is never touched.

    Raises:
        UserError: `folder` is a file, cannot be made, or holds something else.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder, replaceable)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            set_default_mode(path)
        if not folder.exists():
            os.replace(temporary, folder)
        elif not _exchange(temporary, folder):
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            os.replace(folder, old)
            os.replace(temporary, folder)
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def set_default_mode(path: Path) -> None:
    """
    Give a file or folder the mode that the user's umask gives to new ones.

    Libraries that write to a temporary file first (safetensors) leave files that only their owner can read.
    """
    if not path.is_symlink():
        is_executable = path.is_dir() or path.stat().st_mode & 0o100
        path.chmod((0o777 if is_executable else 0o666) & ~_umask())


def check_writable(folder: str | Path) -> None:
    """Raise a UserError unless `folder` can be made, or written into; nothing is left behind."""
    folder = Path(folder)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {place}: {error.strerror}.") from None


def check_replaceable(folder: str | Path, replaceable: Sequence[str]) -> None:
    """Raise a UserError unless `folder` can be made, or holds nothing but what `replaceable` names."""
    folder = Path(folder)
    if not folder.exists():
        check_writable(folder)
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: the output folder is a file.")
    for entry in sorted(folder.iterdir()):
        if not any(entry.match(pattern) for pattern in replaceable):
            raise UserError(f"{folder}: the output folder is not empty, and {entry.name} in it is no earlier output.")


def _exchange(first: Path, second: Path) -> bool:
    """
    Swap two folders in one step, so that a process killed at any moment leaves one of them in either place.

    Returns whether that was done: Linux alone has the call, and not on every file system.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
