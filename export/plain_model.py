# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Refuses models of which a merge or an export would lose something: adapters, quantised or absent weights."""

import torch
from torch import nn
from transformers import PreTrainedModel


FLOATING_POINT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHOWN_NAMES = 3


def check_plain_weights(model: nn.Module) -> None:
    """
    Raises:
        ValueError: a weight is quantised, sharded or not in memory; the error names it.
    """
    for name, parameter in model.named_parameters():
        data = parameter.data
        if type(data) is not torch.Tensor or data.is_meta or data.dtype not in FLOATING_POINT:
            kind = "not in memory" if data.is_meta else f"{type(data).__name__} of {data.dtype}"
            raise ValueError(
                f"{name} is {kind}: a model can only be merged or exported whole and in floating point, so load it "
                "without quantisation, sharding or offloading first."
            )


def check_unwrapped(model: PreTrainedModel) -> None:
    """
    Check that a model holds exactly the tensors that its class and configuration describe. A model built from that
    configuration would lack what was added (an adapter, quantised or compiled layers).

    Raises:
        ValueError: as `check_plain_weights`; or a tensor is missing, surplus or of another shape. The error names it.
    """
    check_plain_weights(model)
    with torch.device("meta"):
        expected = type(model)(model.config).state_dict()
    found = model.state_dict()
    shapes = {name: getattr(value, "shape", None) for name, value in found.items()}
    differing = [name for name, shape in shapes.items() if name not in expected or expected[name].shape != shape]
    differing += [name for name in expected if name not in found]
    if differing:
        rest = len(differing) - SHOWN_NAMES
        raise ValueError(
            f"{type(model).__name__} differs from what its configuration describes, and a model made from it would "
            f"lose {', '.join(differing[:SHOWN_NAMES])}{f' and {rest} more' if rest > 0 else ''}: merge or remove the "
            "adapter first, and load a quantised model in floating point."
        )
