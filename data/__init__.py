# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""From disk or Hub to rows: tables, sentences, tagged words, questions, retrieval sets, packed text."""
