# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Speed of the whole encoder: against transformers' ModernBERT of the same shape, and with experts, merged and without.

    python benchmarks/encoder_speed.py [--device cuda] [--dtype bfloat16] [--batch 8] [--length 128] [--compile]

"modernbert" and "modernalbert" are 14 layers of width 768, FFN 1152, full attention; ModernALBERT uses 7 groups twice.
"tiny" is the Tiny size (wider FFN in its last two groups) with experts, "tiny_folded" the same model merged,
"tiny_none" the same without modulation.
"""

import argparse

import torch
from transformers import ModernBertConfig, ModernBertModel

from modernalbert import ModernALBERTConfig, ModernALBERTModel
from modernalbert.benchmarks.timing import default_device, summarise, time_in_turn, write_results
from modernalbert.merge_experts import merge_experts


def build(device: str, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The models, with SDPA attention, in evaluation mode."""
    torch.manual_seed(0)
    bert_config = ModernBertConfig(num_hidden_layers=14, layer_types=["full_attention"] * 14)
    bert_config._attn_implementation = "sdpa"
    tiny = ModernALBERTModel(ModernALBERTConfig())
    models = {
        "modernbert": ModernBertModel(bert_config),
        "modernalbert": ModernALBERTModel(ModernALBERTConfig(ffn_modulation="none", mol_intermediate_size=None)),
        "tiny_none": ModernALBERTModel(ModernALBERTConfig(ffn_modulation="none")),
        "tiny": tiny,
        "tiny_folded": merge_experts(tiny, "uniform").model,
    }
    return {name: model.to(device, dtype).eval() for name, model in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device(), help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    arguments = parser.parse_args()
    models = build(arguments.device, getattr(torch, arguments.dtype))
    if arguments.compile:
        models = {name: torch.compile(model) for name, model in models.items()}
    ids = torch.randint(50_000, (arguments.batch, arguments.length), device=arguments.device)

    def forward(model):
        def run():
            with torch.inference_mode():
                return model(ids)

        return run

    seconds = time_in_turn({name: forward(model) for name, model in models.items()}, arguments.rounds)
    against = {"modernbert": ("modernbert", "modernalbert"), "tiny_none": ("tiny_none", "tiny", "tiny_folded")}
    results = {}
    for baseline, names in against.items():
        results[f"against_{baseline}"] = summarise({name: seconds[name] for name in names}, baseline)
        print(f"against {baseline}, {arguments.dtype}, batch {arguments.batch} x {arguments.length}")
        for name, values in results[f"against_{baseline}"].items():
            print(f"  {name:14s} {values['median_ms']:9.1f} ms  {values['ratio']:5.2f}x")
    section = f"encoder_{arguments.dtype}_{arguments.batch}x{arguments.length}"
    section += "_compiled" if arguments.compile else ""
    print(f"Written to {write_results(arguments.device, section, results)}")


if __name__ == "__main__":
    main()
