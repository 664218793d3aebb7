# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tokenizer files that neither truncate nor pad unasked."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase


def clear_truncation(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Forget the truncation and padding of the last call, which transformers would write into `tokenizer.json`.

    There they would hold for everybody who reads it with `tokenizers`. A later call of the tokenizer sets its own.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer's files without the truncation and padding of its last call."""
    clear_truncation(tokenizer)
    tokenizer.save_pretrained(folder)
