# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""One rank of a data-parallel training, started by test_training.py; also its single-process reference."""

import sys
from pathlib import Path

import torch
from small_models import tiny_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tuner_models import adapt

from modernalbert import ModernALBERTForMaskedLM
from modernalbert.cli.errors import leave_process_group
from modernalbert.modeling_modernalbert import ModernALBERTLayerGroup


def make_model(kind: str) -> torch.nn.Module:
    """
    A ModernALBERT with experts of its own ("native", "sharded"), or one without that has them from an adapter
    ("adapter"). In float64, in which sums in another order hardly differ.
    """
    # The balance loss is not a mean over tokens, and jitter is random: without them both runs are the same mathematics.
    changes = {"num_experts": 8, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.0}
    if kind != "adapter":
        return tiny_model(ModernALBERTForMaskedLM, **changes).double().train()
    torch.manual_seed(0)
    changes["r"] = 4
    return adapt(tiny_model(ModernALBERTForMaskedLM, ffn_modulation="none"), **changes).double().train()


def global_batch(step: int) -> torch.Tensor:
    """(2, 3) ids; row i is rank i's."""
    return torch.randint(3, 120, (2, 3), generator=torch.Generator().manual_seed(step))


def shard(model: torch.nn.Module) -> torch.nn.Module:
    """Fully sharded: a group's weights are one unit, which its layers gather one after the other."""
    for group in model.modules():
        if isinstance(group, ModernALBERTLayerGroup):
            fully_shard(group)
    return fully_shard(model)


def train(model: torch.nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    """A step per batch; the loss of each."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    kind = sys.argv[2]
    model = make_model(kind)
    parallel = shard(model) if kind == "sharded" else DistributedDataParallel(model)
    loss = train(parallel, [global_batch(step)[rank : rank + 1] for step in range(3)])
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=kind == "sharded"))
    torch.save({"loss": loss, "state": state}, Path(sys.argv[1]) / f"rank{rank}.pt")
    leave_process_group()
