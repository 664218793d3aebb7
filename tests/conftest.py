# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Every test runs offline and starts from the same seed."""

import os


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
