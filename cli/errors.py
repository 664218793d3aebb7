# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Errors that a user can mend: one sentence instead of a traceback."""

import contextlib
import errno
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch import distributed


# What libraries raise for a folder or file that is missing, cut short, or not what it should be.
LOADING_ERRORS = (OSError, ValueError, ImportError, EOFError, SafetensorError, pickle.UnpicklingError)


class UserError(ValueError):
    """A mistake of the user's, in a whole sentence. Commands print it and exit with code 2."""


def run(main: Callable[[], object]) -> None:
    """
    Run a command's main function.

    A `UserError` or a full disk becomes one line on standard error and exit code 2, Ctrl-C exit code 130; a defect of
    ours keeps its traceback.
    """
    try:
        main()
        leave_process_group()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error.filename}: {error.strerror}.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not is_full_disk(error):
            raise
        print(f"{Path(sys.argv[0]).name}: error: the disk is full: {error_message(error)}", file=sys.stderr)
        sys.exit(2)


# What the writers of safetensors, tokenizers and torch say of a full disk; the last two are torch's, whatever it was.
_FULL_DISK = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "unexpected pos")


def is_full_disk(error: BaseException) -> bool:
    """Return whether a write failed for want of space, in the words of any library."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in _FULL_DISK)


def leave_process_group() -> None:
    """
    Leave the process group of a run on several processes, if there is one.

    Threads of a group that exists when Python ends may abort the process, and so may those of a destroyed one: a group
    lives as long as models that were spread over it (a sharded model's until the end, because torch keeps device
    meshes), and its threads need the interpreter to free their last tensors. They get it while this thread sleeps.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(0.5)


# Messages of libraries are shown whole up to this number of characters; longer ones end after a sentence.
MESSAGE_LENGTH = 600
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'`(\[<])")


def error_message(error: BaseException) -> str:
    """
    Return a library's message on one line: whole if it is short, else the sentences at its beginning.

    A sentence is never cut: one that is longer than `MESSAGE_LENGTH` is shown to its end. An exception without a
    message gives its class name.
    """
    text = str(error).strip() or type(error).__name__
    if len(text) > MESSAGE_LENGTH:
        text = text.split("\n\n")[0]
    kept = ""
    for sentence in _SENTENCE_END.split(" ".join(text.split())):
        if kept and len(kept) + len(sentence) > MESSAGE_LENGTH:
            break
        kept += f" {sentence}" if kept else sentence
    return kept


@contextlib.contextmanager
def explain_loading(what: str) -> Iterator[None]:
    """Turn a library's error in this block into a UserError: `what` cannot be loaded, and why."""
    try:
        yield
    except UserError:
        raise
    except LOADING_ERRORS as error:
        raise UserError(f"{what} cannot be loaded: {error_message(error)}") from None
