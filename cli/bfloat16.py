# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Measure how much slower a device multiplies in bfloat16 than in float32, before bfloat16 is used."""

import logging
import time

import torch
from transformers import TrainingArguments


logger = logging.getLogger(__name__)

# Rows, inner size and columns of the product that is timed: a feed-forward layer of a base model on 512 tokens.
SHAPE = (512, 768, 1152)
REPEATS = 5
# Below this the saved memory may be worth it.
TOLERATED = 1.2


def warn_of_slow_bfloat16(arguments: TrainingArguments) -> None:
    """
    Warn if --bf16 is asked for on a device that only emulates products in it, as most processors do.

    The products are timed, which takes some 0.1 s.
    """
    if arguments.bf16 or arguments.bf16_full_eval:
        message = describe_slowdown(bfloat16_slowdown(arguments.device), arguments.device)
        if message and arguments.process_index == 0:
            logger.warning(message)


def bfloat16_slowdown(device: torch.device) -> float:
    """Time of a product of matrices in bfloat16 over its time in float32, the fastest of some repeats each."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows, inner, columns = SHAPE
        left = torch.ones(rows, inner, dtype=dtype, device=device)
        right = torch.ones(columns, inner, dtype=dtype, device=device)
        seconds = []
        for _ in range(REPEATS + 1):  # the first prepares
            start = time.perf_counter()
            product = left @ right.T
            product.flatten()[0].item()  # waits for the device
            seconds.append(time.perf_counter() - start)
        times[dtype] = min(seconds[1:])
    return times[torch.bfloat16] / times[torch.float32]


def describe_slowdown(slowdown: float, device: torch.device) -> str:
    """Return the warning for a measured slowdown; "" if it is none."""
    if slowdown <= TOLERATED:
        return ""
    return (
        f"--bf16: this {'processor' if device.type == 'cpu' else 'device'} has no fast products in bfloat16: they take "
        f"{slowdown:.1f} times as long as in float32 (measured now). Without --bf16 the run is faster and more exact."
    )
