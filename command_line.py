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
"""What every command line shares: one sentence instead of a traceback, and output folders that are whole or absent."""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import distributed
from transformers import HfArgumentParser, PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks


class UserError(ValueError):
    """A mistake of the user's, said in one sentence. Commands print it and exit with code 2."""


def run(main: Callable[[], object]) -> None:
    """
    Run a command's main function.

    A `UserError` becomes one line on standard error and exit code 2, Ctrl-C exit code 130; a defect of ours keeps its
    traceback.
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


def leave_process_group() -> None:
    """
    On several processes: part. The threads of a group that is still there when Python ends may abort the process.

    Those of a destroyed one, too: it lives on with the models that were spread over it (a sharded one's for good, as
    torch keeps device meshes), and to give back the tensors of its last work they need the interpreter, which they get
    while this thread sleeps.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(0.5)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it was written."""


def parse_arguments(*dataclass_types: type, description: str) -> tuple:
    """
    Command-line arguments as instances of the dataclasses. The first may name a .json file of arguments, which those
    after it override.

    Raises:
        UserError: an argument is unknown or a value is not allowed.
    """
    # transformers' TrainingArguments alone would fill a page of usage.
    parser = HfArgumentParser(
        dataclass_types,
        description=description,
        usage="%(prog)s [arguments.json] [options]",
        formatter_class=_HelpFormatter,
    )
    arguments, file = sys.argv[1:], None
    if arguments and arguments[0].endswith(".json"):
        file = arguments[0]
        arguments = arguments_of_file(Path(file)) + arguments[1:]
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: {first_sentence(error)}" if file else first_sentence(error)) from None
    if unknown:
        where = f"{file}: " if file else ""
        raise UserError(f"{where}unrecognized arguments: {' '.join(unknown)} (see --help).")
    return tuple(parsed)


def arguments_of_file(file: Path) -> list[str]:
    """The command line that a .json file of arguments stands for."""
    try:
        values = json.loads(file.read_text("utf-8"))
    except OSError:
        raise UserError(f"{file}: no such file.") from None
    except ValueError as error:
        raise UserError(f"{file}: it is not JSON: {first_sentence(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: it must hold an object of arguments and values.")
    arguments = []
    for name, value in values.items():
        if value is None:
            continue
        arguments.append(f"--{name}")
        if isinstance(value, dict):
            arguments.append(json.dumps(value))
        else:
            arguments += [str(part) for part in (value if isinstance(value, list) else [value])]
    return arguments


def check_processes(num_processes: int, num_gpus: int) -> None:
    """
    Raise a UserError if a launcher started several processes of which training knows nothing, or none for several GPUs.

    Without a GPU, TrainingArguments joins processes only under --use_cpu; else each would train alone, on everything.
    One process with several GPUs means DataParallel, which is slow and takes batches apart by the wrong dimension.

    Args:
        num_processes: As training sees it (`world_size`).
        num_gpus: GPUs of this process (`n_gpu`).
    """
    if num_gpus > 1:
        raise UserError(
            f"one process was started for {num_gpus} GPUs: use accelerate launch, or set CUDA_VISIBLE_DEVICES=0."
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != num_processes and num_processes == 1:
        raise UserError(f"{started} processes were started, and there is no GPU for them: add --use_cpu True.")


def check_reporters(names: Sequence[str]) -> None:
    """Raise a UserError if what `report_to` names is not installed: Trainer says so only when the data are ready."""
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"--report_to {' '.join(names)} is not allowed: {first_sentence(error)}") from None


def first_sentence(error: Exception) -> str:
    """The first line of a library's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def atomic_folder(folder: str | Path, replaceable: Sequence[str]) -> Iterator[Path]:
    """
    Yield a temporary folder beside `folder`, and move it into place when the block ends without an exception.

    Args:
        folder: The final place; a link is followed.
        replaceable: Names or patterns of what an earlier output of the same kind holds. A folder with nothing else in
            it is replaced; any other content is never touched.

    Raises:
        UserError: `folder` is a file, or holds something else.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder, replaceable)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        old = None
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            os.replace(folder, old)
        os.replace(temporary, folder)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(folder: str | Path, replaceable: Sequence[str]) -> None:
    """Raise a UserError unless `folder` is absent or holds nothing but what `replaceable` names."""
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: the output folder is a file.")
    for entry in sorted(folder.iterdir()):
        if not any(entry.match(pattern) for pattern in replaceable):
            raise UserError(f"{folder}: the output folder is not empty, and {entry.name} in it is no earlier output.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def clear_truncation(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Forget the truncation and padding of the last call, which transformers would write into `tokenizer.json`: there they
    hold for everybody who reads it with `tokenizers`. A later call of the tokenizer sets its own.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer that neither truncates nor pads unasked."""
    clear_truncation(tokenizer)
    tokenizer.save_pretrained(folder)
