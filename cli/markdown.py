# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Markdown tables."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence], num_words: int = 1) -> str:
    """Format a table: the first `num_words` columns left-aligned, the others, figures, right-aligned."""
    rule = "|---" * num_words + "|---:" * (len(header) - num_words) + "|"
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])
