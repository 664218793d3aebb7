# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Run the Triton backend and `reference` on the same inputs; print relative errors as JSON. For test_kernels.py.

On a GPU where there is one, else in Triton's interpreter (TRITON_INTERPRET=1).
"""

import json
import os
import sys

import torch

from modernalbert.kernels_mol import triton_mol
from modernalbert.modeling_mol import FFN, DropoutMasks, Experts, reference_mol, route


DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def run(backend, tokens, num_experts, per_token, rank, width, dtype) -> dict[str, torch.Tensor]:
    """Output and gradients by name."""
    hidden = 32
    torch.manual_seed(0)

    def weight(*shape):
        return (torch.randn(*shape) * 0.2).to(DEVICE, dtype).requires_grad_()

    leaves = {"x": weight(tokens, hidden), "router": weight(num_experts, hidden)}
    leaves |= {"Wi": weight(2 * width, hidden), "Wo": weight(hidden, width)}
    leaves |= {"A_in": weight(num_experts, rank, hidden), "B_in": weight(num_experts, 2 * width, rank)}
    leaves |= {"A_out": weight(num_experts, rank, width), "B_out": weight(num_experts, hidden, rank)}

    def activate(h):
        activated, gate = h.chunk(2, dim=-1)
        return torch.nn.functional.gelu(activated) * gate

    ffn = FFN(lambda x: x @ leaves["Wi"].t(), activate, lambda u: u @ leaves["Wo"].t(), "gelu")
    experts = Experts(*(leaves[name] for name in ("A_in", "B_in", "A_out", "B_out")), scaling=2.0)
    # Float64 logits, so that both choose the same experts.
    logits = leaves["x"].double() @ leaves["router"].double().t()
    _, weights, index = route(logits, per_token)
    weights = weights.float() if backend is triton_mol else weights
    output = backend(leaves["x"], weights, index, ffn, experts, DropoutMasks())
    output.float().square().sum().backward()
    results = {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
    return {name: result.cpu() for name, result in results.items()}


def main() -> None:
    results = []
    for *sizes, dtype in json.loads(sys.argv[1]):
        actual = run(triton_mol, *sizes, getattr(torch, dtype))
        expected = run(reference_mol, *sizes, getattr(torch, dtype))
        pairs = {name: (actual[name].double(), expected[name].double()) for name in expected}
        results.append({name: float((a - b).norm() / (b.norm() + 1e-12)) for name, (a, b) in pairs.items()})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
