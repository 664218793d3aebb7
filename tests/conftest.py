# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Every test runs offline and starts from the same seed."""

import os
from typing import NamedTuple


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Small tensors are faster on one thread, and so are two processes side by side; processes that tests start follow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import modernalbert  # noqa: F401  before pytest imports the root's __init__.py as a package of the folder's name


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def nano_tokenizer():
    from small_models import REPOSITORY
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(REPOSITORY / "configs" / "nano")


class Ran(NamedTuple):
    """What a command line did: its exit code, and what it wrote to standard output and standard error."""

    code: int
    output: str
    error: str


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command's entry point in this process: `command(entry_point, *arguments)` -> `Ran`."""

    def run(entry_point, *arguments) -> Ran:
        monkeypatch.setattr("sys.argv", [f"{entry_point.__module__.rsplit('.', 1)[-1]}.py", *map(str, arguments)])
        code = 0
        try:
            entry_point()
        except SystemExit as stopped:
            code = stopped.code or 0
        return Ran(code, *capsys.readouterr())

    return run
