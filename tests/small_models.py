# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Small models with real weights everywhere, experts included: an expert that adds nothing would hide its bugs."""

from pathlib import Path

import torch
from transformers import ModernBertConfig, ModernBertForMaskedLM

import modernalbert
from modernalbert import ModernALBERTConfig


REPOSITORY = Path(modernalbert.__file__).parent

TINY = {
    "vocab_size": 120,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "embedding_size": 16,
    "intermediate_size": 40,
    "mol_intermediate_size": 48,
    "num_hidden_layers": 6,
    "group_depth": 2,
    "num_experts": 4,
    "lora_rank": 4,
    "lora_alpha": 8,
    "local_attention": 8,
}


def tiny_config(**changes) -> ModernALBERTConfig:
    """A 6-layer, 3-group model of width 32."""
    return ModernALBERTConfig(**(TINY | changes))


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0, std: float = 0.2) -> torch.nn.Module:
    """Fill every parameter with noise of that size (norms around 1), so that no path is silent."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
        parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model


def tiny_model(model_class, dtype: torch.dtype = torch.float32, seed: int = 0, std: float = 0.2, **changes):
    """A randomised model in evaluation mode."""
    attention = changes.pop("attn_implementation", None)
    config = tiny_config(**changes)
    if attention is not None:
        config._attn_implementation = attention
    return randomise(model_class(config), seed, std).to(dtype).eval()


def tiny_modernbert(**changes) -> ModernBertForMaskedLM:
    """transformers' model of the same shape, randomised, in evaluation mode."""
    attention = changes.pop("attn_implementation", "sdpa")
    fields = {name: value for name, value in TINY.items() if hasattr(ModernBertConfig, name)}
    config = ModernBertConfig(**(fields | changes))
    config._attn_implementation = attention
    return randomise(ModernBertForMaskedLM(config)).eval()


def run_command(monkeypatch, capsys, command, *arguments) -> tuple[int, str, str]:
    """Run a command line's entry point in this process: exit code, standard output, standard error."""
    monkeypatch.setattr("sys.argv", [f"{command.__module__.rsplit('.', 1)[-1]}.py", *map(str, arguments)])
    code = 0
    try:
        command()
    except SystemExit as stopped:
        code = stopped.code or 0
    output, error = capsys.readouterr()
    return code, output, error
