# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Shared by the jobs of the study: folders, commands in processes of their own, and the form of an outcome."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modernalbert.cli.errors import UserError
from modernalbert.experiments.study.results import REPOSITORY


# One thread a process, and memory that is kept: on a processor, giving pages back and taking them costs half of a step.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "500000000",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass
class Outcome:
    """
    One line of results.

    Attributes:
        measures: Figures and what else the line is to say.
        command: What made it, with folders by name.
        arrays: Of every text or row, for comparisons in pairs; by name.
        method: Where one job has several lines, which of them this is.
    """

    measures: dict
    command: str
    arrays: dict[str, np.ndarray] | None = None
    method: str | None = None


@dataclass
class Context:
    """Folders and files of a run of the study. `lock` is a file descriptor that every child process keeps open."""

    work_dir: Path
    corpus_dir: Path | None = None
    validation_file: Path | None = None
    data_dir: Path | None = None
    download_dir: Path | None = None
    lock: int | None = None
    names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_arguments(cls, arguments) -> "Context":
        folders = {
            name: None if getattr(arguments, name) is None else Path(getattr(arguments, name)).resolve()
            for name in ("work_dir", "corpus_dir", "validation_file", "data_dir", "download_dir")
        }
        folders["download_dir"] = folders["download_dir"] or folders["work_dir"]
        named = ("corpus_dir", "validation_file", "data_dir")
        names = {str(folders[name]): f"${name.upper()}" for name in named if folders[name] is not None}
        names |= {str(folders["work_dir"]): "outputs/study", f"{REPOSITORY}/": ""}
        if teacher := os.environ.get("TEACHER"):
            names[teacher] = "$TEACHER"
        return cls(**folders, names=names)

    def need(self, name: str) -> Path:
        """A path that a job needs; a UserError if it was not given or is not there."""
        path = getattr(self, name)
        if path is None:
            raise UserError(f"--{name} is missing.")
        if not path.exists():
            raise UserError(f"--{name} {path}: there is nothing.")
        return path

    def folder(self, experiment: str, run: str) -> Path:
        """Return the folder of a job's models and logs."""
        return self.work_dir / experiment / run

    def run(self, script: str, options: dict, log: Path) -> str:
        """
        Run a command of this repository in a process of its own, which ends when this one does.

        Args:
            script: Path in the repository.
            options: By name; a list becomes several words, None is left out.
            log: Gets what the command prints.

        Returns:
            The command, with folders by name.

        Raises:
            UserError: it failed; with its last line.
        """
        words = [script]
        for name, value in options.items():
            if value is not None:
                values = value if isinstance(value, (list, tuple)) else [value]
                words += [f"--{name}", *(expanded(name, str(each)) for each in values)]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as handle:
            done = subprocess.run(
                [sys.executable, *words],
                cwd=REPOSITORY,
                env=os.environ | ENVIRONMENT,
                stdout=handle,
                stderr=subprocess.STDOUT,
                pass_fds=[] if self.lock is None else [self.lock],
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        command = self.as_written(words)
        if done.returncode:
            last = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()][-1:]
            raise UserError(f"{command} failed ({log}): {''.join(last)}")
        return command

    def as_written(self, words: list[str]) -> str:
        """A command for the record: folders of this machine by name."""
        text = shlex.join(["python", *words])
        for path, name in sorted(self.names.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(path, name)
        return text


def expanded(name: str, value: str) -> str:
    """A value with environment variables put in; a UserError if one that it names is not set."""
    result = os.path.expandvars(value)
    if result.startswith("$"):
        raise UserError(f"--{name} {value}: the environment variable {value[1:]} is not set.")
    return result


def _end_with_parent() -> None:
    """Linux: a child is told to end when the process that started it is gone, even if that was killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
