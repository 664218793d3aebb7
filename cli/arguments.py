# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Command-line arguments, and checks of what they ask for."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any

import transformers
from transformers import HfArgumentParser
from transformers.integrations import get_reporting_integration_callbacks

from modernalbert.cli.errors import UserError, error_message
from modernalbert.cli.errors import run as run_main


def option(default: Any = MISSING, **metadata) -> Any:
    """Make the field of a dataclass of arguments: its default (none: the option is required), `help` and the like."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it was written."""


def run_script(run: Callable, *dataclass_types: type, description: str) -> None:
    """Call `run` with the arguments of the command line, one object for each dataclass; log warnings as plain lines."""

    def main() -> None:
        arguments = parse_arguments(*dataclass_types, description=description)
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        transformers.utils.logging.set_verbosity_warning()
        run(*arguments)

    run_main(main)


def parse_arguments(*dataclass_types: type, description: str) -> tuple:
    """
    Parse the command line into instances of the dataclasses.

    Its first word may name a .json file of arguments; arguments after it override those of the file.

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
    for dataclass_type in dataclass_types:
        for option in fields(dataclass_type):
            # A switch that is open until the other options are known; transformers adds --no_ to those that are on.
            if option.default is None and option.metadata.get("const") is True:
                parser.add_argument(f"--no_{option.name}", dest=option.name, action="store_false", default=None)
    arguments, file = sys.argv[1:], None
    if arguments and arguments[0].endswith(".json"):
        file = arguments[0]
        arguments = arguments_of_file(Path(file)) + arguments[1:]
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: {error_message(error)}" if file else error_message(error)) from None
    if unknown:
        where = f"{file}: " if file else ""
        raise UserError(f"{where}unrecognized arguments: {' '.join(unknown)} (see --help).")
    return tuple(parsed)


def arguments_of_file(file: Path) -> list[str]:
    """Return the command line that a .json file of arguments stands for."""
    try:
        values = json.loads(file.read_text("utf-8"))
    except OSError:
        raise UserError(f"{file}: no such file.") from None
    except ValueError as error:
        raise UserError(f"{file}: it is not JSON: {error_message(error)}") from None
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
        raise UserError(f"--report_to {' '.join(names)} is not allowed: {error_message(error)}") from None
