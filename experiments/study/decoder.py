# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A small causal decoder trained on one kind of text, and adapted to another through the tuner."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from modernalbert.cli.errors import UserError
from modernalbert.data.corpus import TokenizedCorpus
from modernalbert.experiments.study.adapters import adapter_size, add_lora, add_mol, train
from modernalbert.experiments.study.context import Context, Outcome
from modernalbert.experiments.study.plan import Experiment, Job
from modernalbert.experiments.study.results import file_fingerprint


FFN = ["gate_proj", "up_proj", "down_proj"]
LENGTH, BATCH = 128, 16


def rows(experiment: Experiment, context: Context) -> str:
    """Return a fingerprint of what is trained and measured on."""
    return file_fingerprint(context.need("corpus_dir") / "corpus.json")


def measure(job: Job, context: Context) -> list[Outcome]:
    """Train the base of this seed if it is not there, adapt it, and measure; for MoL also merged."""
    settings = job.experiment.settings
    corpus = TokenizedCorpus(context.need("corpus_dir"))
    base = trained_base(job, context, corpus)
    domain = source_tokens(corpus, settings["adapt_source"])
    held_out = domain[: settings["held_out_blocks"]]
    kind = job.changes["adapter"]
    command = f"python experiments/study/run.py experiments/study/{job.experiment.name}.yaml --corpus_dir $CORPUS_DIR"
    if kind == "none":
        losses = text_losses(base, held_out)
        return [Outcome(measures_of(losses, 0, 0), command, {"loss": losses}, method="base")]
    torch.manual_seed(job.seed)
    size = adapter_size(add_mol(LlamaForCausalLM(base.config), task_type="CAUSAL_LM"))
    adapted = (
        add_mol(base, task_type="CAUSAL_LM") if kind == "mol" else add_lora(base, FFN, size, task_type="CAUSAL_LM")
    )
    steps = round(settings["adapt_tokens"] / (LENGTH * BATCH))
    train(adapted, blocks(domain[len(held_out) :], job.seed), steps, settings["adapt_learning_rate"])
    size, tokens = adapter_size(adapted), steps * LENGTH * BATCH
    losses = text_losses(adapted, held_out)
    outcomes = [Outcome(measures_of(losses, size, tokens), command, {"loss": losses}, method=kind)]
    if kind == "mol":
        losses = text_losses(adapted.merge_and_unload(), held_out)
        outcomes.append(Outcome(measures_of(losses, size, tokens), command, {"loss": losses}, method="mol, merged"))
    return outcomes


def measures_of(losses: np.ndarray, size: int, tokens: int) -> dict:
    mean = float(losses.mean())
    return {"loss": mean, "perplexity": float(np.exp(mean)), "adapter_parameters": size, "tokens": tokens}


def trained_base(job: Job, context: Context, corpus: TokenizedCorpus) -> LlamaForCausalLM:
    """The decoder of this seed, trained on the base's source."""
    settings = job.experiment.settings
    folder: Path = context.folder(job.experiment.name, f"base-{job.seed}")
    if (folder / "config.json").is_file():
        return LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    torch.manual_seed(job.seed)
    config = LlamaConfig(**settings["config"], attn_implementation="eager", tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    steps = round(settings["base_tokens"] / (LENGTH * BATCH))
    tokens = source_tokens(corpus, settings["base_source"], limit=settings["base_tokens"])
    train(model, blocks(tokens, job.seed), steps, settings["base_learning_rate"])
    temporary = folder.with_name(f".{folder.name}")
    model.save_pretrained(temporary)
    temporary.rename(folder)
    return model


def source_tokens(corpus: TokenizedCorpus, name: str, limit: int | None = None) -> torch.Tensor:
    """
    The tokens of a source in blocks (N, LENGTH), in its own order.

    Raises:
        UserError: there is no such source.
    """
    numbers = [i for i, source in enumerate(corpus.sources) if source.split("-", 1)[-1] == name]
    if not numbers:
        raise UserError(f"{corpus.folder}: there is no source {name}; there are {', '.join(corpus.sources)}.")
    first, last = corpus.bounds[numbers[0]], corpus.bounds[numbers[0] + 1]
    sequences, total = [], 0
    for i in range(first, last):
        sequences.append(corpus[i])
        total += len(sequences[-1])
        if limit is not None and total >= limit:
            break
    tokens = torch.from_numpy(np.concatenate(sequences).astype(np.int64))
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


def blocks(tokens: torch.Tensor, seed: int) -> Iterator[dict]:
    """Endless batches of blocks, each pass in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(tokens), generator=generator)
        for numbers in order.split(BATCH):
            if len(numbers) == min(BATCH, len(tokens)):
                yield {"input_ids": tokens[numbers], "labels": tokens[numbers]}


@torch.no_grad()
def text_losses(model: nn.Module, tokens: torch.Tensor) -> np.ndarray:
    """Mean loss of each block (N,) float32."""
    losses = []
    for batch in tokens.split(BATCH // 2):
        logits = model.eval()(input_ids=batch).logits[:, :-1].float()
        each = nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        losses.append(each.mean(1))
    return torch.cat(losses).numpy()
