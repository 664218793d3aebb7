# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The card that a Trainer writes, with how a ModernALBERT is loaded."""

from pathlib import Path

from transformers import PreTrainedModel

from modernalbert.export.cards import loading_section, usage_section


class ModelCardMixin:
    """
    A Trainer, to be named before Trainer's class, whose card says how the model is loaded.

    The libraries' cards do not say that a ModernALBERT needs `trust_remote_code`, what dtype it loads as, or how its
    merged forms are loaded. Cards of other models and of adapters stay as they are.
    """

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        encoder = model if isinstance(model, PreTrainedModel) else getattr(model, "transformers_model", None)
        is_ours = isinstance(encoder, PreTrainedModel) and encoder.config.model_type == "modernalbert"
        if not is_ours or not self.is_world_process_zero():
            return
        name = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).name
        sections = [f"## Loading\n\n{loading_section(encoder, name)}"]
        if encoder is not model:
            sections.insert(0, usage_section(encoder, name))
        card = Path(self.args.output_dir, "README.md")
        card.write_text("\n".join([card.read_text("utf-8").rstrip("\n") + "\n", *sections]), "utf-8")
