# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Forms of a model that others load: a Hub folder, transformers' ModernBERT, ONNX."""

from modernalbert.export.hub_folder import export_to_hub_folder
from modernalbert.export.modernbert import to_modernbert
from modernalbert.export.onnx import export_onnx


__all__ = ["export_onnx", "export_to_hub_folder", "to_modernbert"]
