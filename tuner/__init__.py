# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Mixture of LoRAs as a peft tuner, for any transformer."""

from modernalbert.tuner.config import MoLConfig
from modernalbert.tuner.model import MoLModel


__all__ = ["MoLConfig", "MoLModel"]
