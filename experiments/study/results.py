# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Result files of the study: one JSON line a run, arrays beside them, and who may write."""

import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from modernalbert.cli.errors import UserError


REPOSITORY = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
# What may change without changing what a run gives.
NOT_CODE = (
    ":!experiments/study/results",
    ":!experiments/study/*.yaml",
    ":!experiments/study/report.py",
    ":!docs",
    ":!tests",
    ":!*.md",
    ":!*.png",
)


class Results:
    """
    The results of one experiment: `NAME.jsonl`, and `NAME/*.npz` with the losses of every text or row.

    Args:
        name: Of the experiment.
        folder: Where results lie.
    """

    def __init__(self, name: str, folder: str | Path = RESULTS):
        self.name, self.folder = name, Path(folder)
        self.file = self.folder / f"{name}.jsonl"

    def lines(self) -> list[dict]:
        """
        All lines. A last line that was cut off while it was written does not count.

        Raises:
            UserError: another line is no JSON.
        """
        if not self.file.is_file():
            return []
        text = self.file.read_text("utf-8")
        lines = []
        for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
            try:
                lines.append(json.loads(line))
            except ValueError:
                raise UserError(f"{self.file}, line {number}: it is not JSON.") from None
        return lines

    def check(self, identity: dict[str, str], variants: dict[str, dict]) -> None:
        """
        Raise a UserError if a line was made by another commit, on other rows or with other settings than this run's.

        Args:
            identity: Fields that must agree in all lines: "commit", "rows", "settings".
            variants: What each variant changes now.
        """
        for line in self.lines():
            if line["variant"] in variants and line["changes"] != variants[line["variant"]]:
                raise UserError(
                    f"{self.file} has results of {line['variant']!r} with {line['changes']}, which is now "
                    f"{variants[line['variant']]}: they are not mixed. Give the variant another name, or move the "
                    "file away."
                )
        for name, value in identity.items():
            others: dict[str, int] = {}
            for line in self.lines():
                if line[name] != value:
                    others[line[name]] = others.get(line[name], 0) + 1
            if others:
                found = ", ".join(f"{count} of {other}" for other, count in others.items())
                raise UserError(
                    f"{self.file} has results of another {name} ({found}; this is {value}): they are not mixed. Go "
                    f"back to that {name}, or move the file away."
                )

    def append(self, lines: Sequence[dict], arrays: Sequence[dict[str, np.ndarray] | None]) -> None:
        """Write arrays, then all lines at once: a line that is there is whole, and so are its arrays."""
        folder = self.folder / self.name
        folder.mkdir(parents=True, exist_ok=True)
        for line, values in zip(lines, arrays):
            if values is not None:
                line["arrays"] = f"{self.name}/{line['run']}.npz"
                temporary = folder / f".{line['run']}.npz"
                np.savez_compressed(temporary, **values)
                os.replace(temporary, self.folder / line["arrays"])
        with self.file.open("ab+") as handle:
            handle.seek(0)
            written = handle.read()
            handle.truncate(written.rfind(b"\n") + 1)  # a line that was cut off
            handle.write("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode())
            handle.flush()
            os.fsync(handle.fileno())

    def arrays(self, line: dict) -> dict[str, np.ndarray]:
        """The arrays of a line."""
        with np.load(self.folder / line["arrays"]) as file:
            return dict(file)


@contextmanager
def exclusive(folder: str | Path) -> Iterator[int]:
    """
    Hold the lock of a results folder, which ends with the process, however it ends.

    Yields:
        A file descriptor; a child process that inherits it keeps the lock.

    Raises:
        UserError: another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            raise UserError(
                f"{folder}: another run of the study writes here (process {handle.read().strip()}): wait for it, or "
                "give another --results_dir."
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield handle.fileno()


def code_version() -> str:
    """
    The last commit that changed code, with a hash of what is not committed; "unknown" without git.

    Results, documents and tests do not count: committing results leaves the version as it is.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments, "--", ".", *NOT_CODE], cwd=REPOSITORY, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("log", "-1", "--format=%h")
    changes = git("diff", "HEAD")
    if not commit:
        return "unknown"
    return f"{commit}+{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else commit


def hardware() -> str:
    """Processor, threads and versions, in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def file_fingerprint(file: str | Path) -> str:
    """The first 12 digits of a file's SHA-256."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
