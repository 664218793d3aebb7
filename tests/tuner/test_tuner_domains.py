# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Experts for real text of two domains, on the shipped checkpoint: put together, routed, added later."""

import argparse
import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import REPOSITORY
from transformers import AutoTokenizer

from modernalbert import ModernALBERTForMaskedLM, MoLConfig
from modernalbert.merge_experts import merge_experts
from modernalbert.tuner.observer import mol_layers


pytestmark = pytest.mark.slow

NANO = REPOSITORY / "checkpoints" / "modernalbert-nano"
LAW, CODE = 0, 1
PATHS = [f"model.groups.{group}.mlp.{name}" for group in range(3) for name in ("Wi", "Wo")]


def passages(text: str) -> list[str]:
    words = re.sub(r"\s+", " ", text).split(" ")
    return [" ".join(words[start : start + 24]) for start in range(0, 24 * 8, 24)]


@pytest.fixture(scope="module")
def domains() -> list[dict[str, torch.Tensor]]:
    """A batch of 8 passages each: the text of a licence, and of a manual for programmers."""
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    manual = f"{argparse.__doc__} {argparse.ArgumentParser.__doc__} {json.__doc__}"
    batches = []
    for text in ((REPOSITORY / "LICENSE").read_text(), manual):
        batch = tokenizer(passages(text), padding="max_length", truncation=True, max_length=32, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.25
        chosen &= mask.bool() & (ids > 999)  # BERT's special and unused tokens lie below
        masked = ids.masked_fill(chosen, tokenizer.mask_token_id)
        batches.append({"input_ids": masked, "attention_mask": mask, "labels": ids.masked_fill(~chosen, -100)})
    return batches


def plain_nano() -> ModernALBERTForMaskedLM:
    """The shipped checkpoint with its own experts merged: a feed-forward network has one mixture at most."""
    return merge_experts(ModernALBERTForMaskedLM.from_pretrained(NANO, dtype=torch.float32), "ema").model


@torch.no_grad()
def loss(model: torch.nn.Module, batch: dict) -> float:
    return model.eval()(**batch).loss.item()


def train(model: torch.nn.Module, batches: list[dict], steps: int, lr: float) -> torch.nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def experts(domains, tmp_path_factory) -> list[str]:
    """A stock LoRA for each domain."""
    folders = []
    for number, batch in enumerate(domains):
        torch.manual_seed(number)
        model = get_peft_model(plain_nano(), LoraConfig(r=4, lora_alpha=8, target_modules=PATHS))
        train(model, [batch], steps=10, lr=1e-2)
        folders.append(str(tmp_path_factory.mktemp("lora")))
        model.save_pretrained(folders[-1])
    return folders


def share_routed_to_own_expert(model: torch.nn.Module, domains: list[dict]) -> float:
    shares = []
    for number, batch in enumerate(domains):
        with torch.no_grad():
            logits = model.eval()(**batch, output_router_logits=True).router_logits
        real = batch["attention_mask"].bool()
        shares += [(layer[real].argmax(-1) == number).float().mean() for layer in logits]
    return torch.stack(shares).mean().item()


def test_two_loras_become_a_mixture_that_knows_both_domains_and_learns_to_route(domains, experts):
    base = [loss(plain_nano(), batch) for batch in domains]
    alone = [loss(PeftModel.from_pretrained(plain_nano(), folder), b) for folder, b in zip(experts, domains)]
    assert all(trained < before - 0.5 for trained, before in zip(alone, base))
    config = MoLConfig(num_experts=2, router_score="absolute", num_frozen_experts=2, router_aux_loss_coef=0.0)
    model = get_peft_model(plain_nano(), config)
    model.experts_from_loras(experts)
    untrained = [loss(model, batch) for batch in domains]
    assert all(mixed < before for mixed, before in zip(untrained, base))

    before = share_routed_to_own_expert(model, domains)
    frozen = {name: buffer.clone() for name, buffer in model.named_buffers() if "mol_frozen" in name}
    labelled = [batch | {"expert_labels": torch.full((8,), number)} for number, batch in enumerate(domains)]
    train(model, labelled, steps=20, lr=3e-2)
    after = share_routed_to_own_expert(model, domains)
    assert after > 0.8 and after > before
    assert all(torch.equal(frozen[name], buffer) for name, buffer in model.named_buffers() if name in frozen)
    assert sum(loss(model, batch) for batch in domains) < sum(untrained)


def test_a_second_domain_is_learnt_by_added_experts_with_the_first_ones_untouched(domains):
    torch.manual_seed(0)
    model = get_peft_model(plain_nano(), MoLConfig(num_experts=2, r=4, router_aux_loss_coef=0.01))
    train(model, domains[:1], steps=10, lr=1e-2)
    law, code = (loss(model, batch) for batch in domains)
    old = {name: [f.detach().clone() for f in layer.experts("default")[:4]] for name, layer in mol_layers(model)}
    model.add_experts(2)
    assert loss(model, domains[LAW]) == pytest.approx(law, abs=1e-4)
    assert loss(model, domains[CODE]) == pytest.approx(code, abs=1e-4)
    train(model, [domains[CODE] | {"expert_labels": torch.arange(8) % 2 + 2}], steps=25, lr=1e-2)
    assert loss(model, domains[CODE]) < code - 0.5
    for name, layer in mol_layers(model):
        for before, after in zip(old[name], layer.experts("default")[:4]):
            assert torch.equal(after[:2], before)
