# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Forms of a model that others load."""

from modernalbert.export.modernbert import to_modernbert


__all__ = ["to_modernbert"]
