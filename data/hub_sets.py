# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Data sets of the Hub."""

from datasets import DatasetDict, load_dataset

from modernalbert.cli.errors import UserError, error_message


def load_hub_set(name: str, config: str | None = None, *, asked_by: str, instead: str) -> DatasetDict:
    """
    Load all splits of a data set.

    Args:
        asked_by: The option that names the set, for the error.
        instead: The options that do without the Hub, for the error.

    Raises:
        UserError: the data set cannot be fetched.
    """
    try:
        return load_dataset(name, config)
    except Exception as error:  # whatever keeps the Hub out of reach
        raise UserError(
            f"{asked_by} cannot be fetched from the Hub ({error_message(error)}); give {instead}."
        ) from None
