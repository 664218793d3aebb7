# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Speed of the MoL feed-forward network against the plain one of the same shape.

    python benchmarks/ffn_speed.py [--device cuda] [--dtype bfloat16] [--tokens 4096] [--no-compile]
    python benchmarks/ffn_speed.py --sweep [--device cuda] [--dtype bfloat16]

Shape: the FFN of Tiny's MoL groups (768 -> 2624), 8 experts of rank 16, 2 per token. A row of its own for each backend;
"folded" is the merged model's FFN. What MoL costs when the shared products are not shared: "experts_dense" runs every
expert's own FFN on every token, "experts_looped" each expert's own FFN on the tokens routed to it, "mixlora_style" the
first product once and the second for every expert's tokens. `--sweep` varies one of experts, experts per token, rank
and tokens at a time.
"""

import copy

import torch

from modernalbert import ModernALBERTConfig
from modernalbert.benchmarks.timing import benchmark_parser, positive, summarise, time_in_turn, write_results
from modernalbert.modeling_mol import FeedForward, MoLFeedForward, route
from modernalbert.mol_backends import FFN, MOL_BACKENDS, DropoutMasks, concatenate_experts


SWEEP_TOKENS = 4096
SWEPT = {
    "num_experts": (1, 2, 8, 16, 64),
    "num_experts_per_tok": (1, 2, 4),
    "lora_rank": (4, 8, 16, 64),
    "tokens": (32, 128, 512, 2048, 16384),
}


def backends(device: str) -> list[str]:
    """Those worth timing: Triton's kernels run on a GPU alone."""
    left_out = {"reference"} if torch.device(device).type == "cuda" else {"reference", "triton"}
    return [name for name, backend in MOL_BACKENDS.items() if backend.function and name not in left_out]


def build(config: ModernALBERTConfig, device: str, dtype: torch.dtype) -> tuple[FeedForward, MoLFeedForward]:
    """A plain FFN and a MoL FFN of the last group's shape, experts with weights, in evaluation mode."""
    group = config.num_groups - 1
    plain, mol = FeedForward(config, group), MoLFeedForward(config, group)
    with torch.no_grad():
        for parameter in [*plain.parameters(), *mol.parameters()]:
            parameter.normal_(std=0.02)
    return plain.to(device, dtype).eval(), mol.to(device, dtype).eval()


@torch.no_grad()
def fold(mol: MoLFeedForward, plain: FeedForward) -> FeedForward:
    """The merged MoL: a plain FFN with the mean of the experts added to its weights."""
    folded = copy.deepcopy(plain)
    uniform = torch.full((mol.num_experts,), 1 / mol.num_experts, device=mol.Wi.weight.device)
    merged = concatenate_experts(mol.experts, uniform)
    folded.Wi.weight.copy_(mol.Wi.weight + merged.B_in[0] @ merged.A_in[0])
    folded.Wo.weight.copy_(mol.Wo.weight + merged.B_out[0] @ merged.A_out[0])
    return folded


def looped_experts(mol: MoLFeedForward, x: torch.Tensor) -> torch.Tensor:
    """The usual way: gather each expert's tokens and run its whole FFN on them."""
    _, weights, chosen = route(mol.mol_router(x), mol.num_experts_per_tok)
    output = torch.zeros_like(x)
    linear = torch.nn.functional.linear
    for e in range(mol.num_experts):
        rows, slots = (chosen == e).nonzero(as_tuple=True)
        tokens = x[rows]
        hidden = mol.activate(mol.Wi(tokens) + linear(linear(tokens, mol.mol_A_in[e]), mol.mol_B_in[e]) * mol.scaling)
        result = mol.Wo(hidden) + linear(linear(hidden, mol.mol_A_out[e]), mol.mol_B_out[e]) * mol.scaling
        output.index_add_(0, rows, result * weights[rows, slots, None].to(x.dtype))
    return output


def mixlora_style(mol: MoLFeedForward, x: torch.Tensor) -> torch.Tensor:
    """W_i once for all tokens; activation and W_o expert by expert, on the tokens routed to it."""
    _, weights, chosen = route(mol.mol_router(x), mol.num_experts_per_tok)
    base, output = mol.Wi(x), torch.zeros_like(x)
    linear = torch.nn.functional.linear
    for e in range(mol.num_experts):
        rows, slots = (chosen == e).nonzero(as_tuple=True)
        low_rank = linear(linear(x[rows], mol.mol_A_in[e]), mol.mol_B_in[e]) * mol.scaling
        hidden = mol.activate(base[rows] + low_rank)
        result = mol.Wo(hidden) + linear(linear(hidden, mol.mol_A_out[e]), mol.mol_B_out[e]) * mol.scaling
        output.index_add_(0, rows, result * weights[rows, slots, None].to(x.dtype))
    return output


def dense_experts(mol: MoLFeedForward, x: torch.Tensor) -> torch.Tensor:
    """Every expert's own FFN on every token."""
    _, weights, chosen = route(mol.mol_router(x), mol.num_experts_per_tok)
    ffn = FFN(mol.Wi, mol.activate, mol.Wo)
    return MOL_BACKENDS["reference"].function(x, weights, chosen, ffn, mol.experts, DropoutMasks())


def with_backend(mol: MoLFeedForward, name: str) -> MoLFeedForward:
    """The same weights behind another backend."""
    module = copy.deepcopy(mol)
    module.mol_backend = name
    return module


def forward(module, x: torch.Tensor):
    def run():
        with torch.inference_mode():
            return module(x)

    return run


def training_step(module, x: torch.Tensor):
    # Not a constant: a GPU multiplies constants faster, for it needs less power.
    gradient = torch.randn_like(x)

    def run():
        module(x.detach().requires_grad_())[0].backward(gradient)

    return run


def measure(
    config: ModernALBERTConfig, device: str, dtype: torch.dtype, tokens: int, compiled: bool, rounds: int
) -> dict:
    """Forward and forward+backward, eager and compiled; ratios to the plain FFN run the same way."""
    plain, mol = build(config, device, dtype)
    x = torch.randn(tokens, config.hidden_size, device=device, dtype=dtype)
    modules = {"plain": plain} | {name: with_backend(mol, name) for name in backends(device)}
    modules["folded"] = fold(mol, plain)
    others = {
        "mixlora_style": lambda x: mixlora_style(mol, x),
        "experts_looped": lambda x: looped_experts(mol, x),
        "experts_dense": lambda x: dense_experts(mol, x),
    }
    eager = {name: forward(module, x) for name, module in (modules | others).items()}
    results = {"forward": summarise(time_in_turn(eager, rounds), "plain")}
    steps = {name: training_step(module, x) for name, module in modules.items()}
    results["forward_backward"] = summarise(time_in_turn(steps, rounds), "plain")
    if compiled:
        # The others would give way to masked.
        traced = {name: module for name, module in modules.items() if MOL_BACKENDS[name].traceable}
        fast = {name: forward(torch.compile(module, fullgraph=True), x) for name, module in traced.items()}
        results["forward_compiled"] = summarise(time_in_turn(fast, rounds), "plain")
    return results


def sweep(device: str, dtype: torch.dtype, rounds: int) -> dict:
    """The backends' ratios to the plain FFN as one of experts, experts per token, rank and tokens varies."""
    results: dict[str, dict] = {}
    for field, values in SWEPT.items():
        for value in values:
            changes = {} if field == "tokens" else {field: value}
            if value == 1 and field == "num_experts":
                changes["num_experts_per_tok"] = 1
            plain, mol = build(ModernALBERTConfig(**changes), device, dtype)
            x = torch.randn(value if field == "tokens" else SWEEP_TOKENS, 768, device=device, dtype=dtype)
            names = backends(device)
            modules = {"plain": plain} | {name: with_backend(mol, name) for name in names}
            row = {}
            for kind, timed in (("forward", forward), ("forward_backward", training_step)):
                functions = {name: timed(module, x) for name, module in modules.items()}
                row[kind] = summarise(time_in_turn(functions, rounds), "plain")
            results.setdefault(field, {})[str(value)] = row
            ratios = (f"{kind} " + " ".join(f"{n} {row[kind][n]['ratio']:.2f}x" for n in names) for kind in row)
            print(f"  {field} = {value}: {', '.join(ratios)}", flush=True)
    return results


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=15)
    parser.add_argument("--tokens", type=positive, default=4096)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--sweep", action="store_true", help="vary experts, experts per token, rank and tokens")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = ModernALBERTConfig()
    dtype = getattr(torch, arguments.dtype)
    if arguments.sweep:
        results = sweep(arguments.device, dtype, arguments.rounds)
        write_results(arguments, f"ffn_sweep_{arguments.dtype}", results)
        return
    results = measure(config, arguments.device, dtype, arguments.tokens, not arguments.no_compile, arguments.rounds)
    for name, rows in results.items():
        print(f"{name}, {arguments.dtype}, {arguments.tokens} tokens")
        for row, values in rows.items():
            print(f"  {row:16s} {values['median_ms']:9.2f} ms  {values['ratio']:5.2f}x")
    write_results(arguments, f"ffn_{arguments.dtype}_{arguments.tokens}_tokens", results)


if __name__ == "__main__":
    main()
