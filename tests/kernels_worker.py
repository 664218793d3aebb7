# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Run the Triton backend in a dtype and `reference` in float64 on the same inputs; print relative errors as JSON, or what
went wrong. For test_kernels.py.

On a GPU where there is one, else in Triton's interpreter (TRITON_INTERPRET=1).
"""

import json
import os
import sys
import traceback

import torch

from modernalbert import mol_triton
from modernalbert.modeling_mol import route
from modernalbert.mol_backends import FFN, DropoutMasks, Experts, reference_mol


IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
HIDDEN = 32
# As large as makes P_in x and the experts' part of h about 2: GELU bends there.
DEVIATIONS = {"x": 1.0, "router": 0.3, "Wi": 0.35, "Wo": 0.1, "A_in": 0.2, "B_in": 0.2, "A_out": 0.1, "B_out": 0.2}


def inputs(tokens, num_experts, rank, width, dtype) -> dict[str, torch.Tensor]:
    """By name, random, in a dtype."""
    torch.manual_seed(0)
    shapes = {"x": (tokens, HIDDEN), "router": (num_experts, HIDDEN), "Wi": (2 * width, HIDDEN), "Wo": (HIDDEN, width)}
    shapes |= {"A_in": (num_experts, rank, HIDDEN), "B_in": (num_experts, 2 * width, rank)}
    shapes |= {"A_out": (num_experts, rank, width), "B_out": (num_experts, HIDDEN, rank)}
    return {name: (torch.randn(shape) * DEVIATIONS[name]).to(DEVICE, dtype) for name, shape in shapes.items()}


def run(backend, leaves: dict[str, torch.Tensor], per_token: int) -> dict[str, torch.Tensor]:
    """Output and gradients by name."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}

    def activate(h):
        activated, gate = h.chunk(2, dim=-1)
        return torch.nn.functional.gelu(activated) * gate

    ffn = FFN(lambda x: x @ leaves["Wi"].t(), activate, lambda u: u @ leaves["Wo"].t(), "gelu")
    experts = Experts(*(leaves[name] for name in ("A_in", "B_in", "A_out", "B_out")), scaling=2.0)
    # Float64 logits, so that both choose the same experts.
    _, weights, index = route(leaves["x"].double() @ leaves["router"].double().t(), per_token)
    output = backend(leaves["x"], weights, index, ffn, experts, DropoutMasks())
    output.double().square().sum().backward()
    results = {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
    return {name: result.double().cpu() for name, result in results.items()}


def errors(tokens, num_experts, per_token, rank, width, dtype) -> dict[str, float]:
    """Relative errors of a case."""
    leaves = inputs(tokens, num_experts, rank, width, getattr(torch, dtype))
    actual = run(mol_triton.triton_mol, leaves, per_token)
    expected = run(reference_mol, {name: leaf.double() for name, leaf in leaves.items()}, per_token)
    return {name: float((actual[name] - b).norm() / (b.norm() + 1e-12)) for name, b in expected.items()}


def main() -> None:
    torch.set_float32_matmul_precision("highest")
    if IS_INTERPRETED:
        # Several tiles of columns for each program, as where there are many tokens.
        mol_triton.PROGRAMS = 4
    results = []
    for case in json.loads(sys.argv[1]):
        try:
            results.append(errors(*case))
        except Exception:  # it is told for this case alone
            results.append(traceback.format_exc())
    print(json.dumps(results))


if __name__ == "__main__":
    main()
