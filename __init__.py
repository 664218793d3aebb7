# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""ModernALBERT: a recursive ModernBERT-style encoder with a Mixture of LoRAs on its shared feed-forward network."""

import warnings

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .cli import moved_modules
from .configuration_modernalbert import ModernALBERTConfig, refuse_original_release
from .export.hub_folder import export_to_hub_folder
from .modeling_modernalbert import (
    ModernALBERTForMaskedLM,
    ModernALBERTForMultipleChoice,
    ModernALBERTForQuestionAnswering,
    ModernALBERTForSequenceClassification,
    ModernALBERTForTokenClassification,
    ModernALBERTModel,
    ModernALBERTPreTrainedModel,
)
from .upcycling.modernbert import upcycle_modernbert


__version__ = "0.1.0"

moved_modules.install(__name__)


class _OriginalRelease(PreTrainedConfig):
    """The original authors' release: the Auto classes know its name only to say that it is another code's format."""

    model_type = "ModernALBERT"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        refuse_original_release(config_dict)


# The first import wins: a second copy of this package (a test runner's, say) must not take over its classes.
if ModernALBERTConfig.model_type not in CONFIG_MAPPING:
    AutoConfig.register(ModernALBERTConfig.model_type, ModernALBERTConfig)
    AutoConfig.register(_OriginalRelease.model_type, _OriginalRelease)
for _auto_class, _model_class in (
    (AutoModel, ModernALBERTModel),
    (AutoModelForMaskedLM, ModernALBERTForMaskedLM),
    (AutoModelForSequenceClassification, ModernALBERTForSequenceClassification),
    (AutoModelForTokenClassification, ModernALBERTForTokenClassification),
    (AutoModelForQuestionAnswering, ModernALBERTForQuestionAnswering),
    (AutoModelForMultipleChoice, ModernALBERTForMultipleChoice),
):
    _auto_class.register(ModernALBERTConfig, _model_class, exist_ok=True)

__all__ = [
    "ModernALBERTConfig",
    "ModernALBERTForMaskedLM",
    "ModernALBERTForMultipleChoice",
    "ModernALBERTForQuestionAnswering",
    "ModernALBERTForSequenceClassification",
    "ModernALBERTForTokenClassification",
    "ModernALBERTModel",
    "ModernALBERTPreTrainedModel",
    "export_to_hub_folder",
    "upcycle_modernbert",
]

try:
    from .tuner import MoLConfig, MoLModel
except Exception as error:  # peft is missing, too old, or broken: its private names go with its versions
    _tuner_error = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"modernalbert.MoLConfig and MoLModel are not available, because peft cannot be used ({_tuner_error}). Models "
        "load and run without it.",
        stacklevel=2,
    )

    def __getattr__(name: str):
        if name in ("MoLConfig", "MoLModel"):
            raise ImportError(f"modernalbert.{name} needs peft, which cannot be used ({_tuner_error}).")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

else:
    __all__ += ["MoLConfig", "MoLModel"]
