# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Mean-pooled sentence embeddings of any encoder."""

import logging
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

import modernalbert  # noqa: F401  registers the classes with transformers
from modernalbert.cli.errors import UserError, error_message
from modernalbert.finetuning.checkpoint import check_weights, has_no_weights


BATCH = 64
MAX_LENGTH = 128


def load_encoder(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    An encoder in float32 and its tokenizer, without the library's notices. A configuration alone gives random weights.

    Raises:
        UserError: it cannot be loaded, or lacks weights.
    """
    transformers.utils.logging.set_verbosity_error()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        if has_no_weights(Path(name)):
            set_seed(0)
            model = AutoModel.from_config(AutoConfig.from_pretrained(name)).eval()
        else:
            model, report = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
            check_weights(model.eval(), set(report["missing_keys"]), name, keeps_head=True)
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--model_name_or_path {name} cannot be loaded: {error_message(error)}") from None


@torch.no_grad()
def embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> np.ndarray:
    """Unit mean-pooled embeddings (n, d), float32."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    embeddings: list[np.ndarray | None] = [None] * len(texts)
    for start in tqdm(range(0, len(order), BATCH), desc="Embeddings", leave=False):
        chosen = order[start : start + BATCH]
        batch = tokenizer(
            [texts[i] for i in chosen], padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).to(model.device)
        states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.float()
        weights = batch["attention_mask"][..., None].float()
        means = (states * weights).sum(1) / weights.sum(1)
        for i, embedding in zip(chosen, torch.nn.functional.normalize(means, dim=-1).cpu().numpy()):
            embeddings[i] = embedding
    return np.stack(embeddings)
