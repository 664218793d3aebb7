# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fine-tuning: the arguments, checkpoints, runs and output folders that the task scripts share."""
