# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Speed of adapters on feed-forward networks: MoL against X-LoRA and a plain LoRA, and against no adapter.

    python benchmarks/tuner_speed.py [--device cuda] [--dtype bfloat16] [--batch 16] [--length 128]

"minilm" is all-MiniLM-L6-v2's shape, "modernbert_12" 12 layers of ModernBERT-base's, with random weights. MoL has 8
experts of rank 8, two per token; X-LoRA the same 8 adapters of rank 8, two per token; LoRA has rank 8. Forward against
no adapter; forward and backward, of what is trained, against LoRA.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel

from modernalbert import MoLConfig
from modernalbert.benchmarks.timing import benchmark_parser, positive, summarise, time_in_turn, write_results


RANK, NUM_EXPERTS, PER_TOKEN = 8, 8, 2
# Shape -> (model, linear layers of its FFNs).
SHAPES = {
    "minilm": (
        lambda: BertModel(
            BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        ),
        r".*layer\.\d+\.(intermediate|output)\.dense",
    ),
    "modernbert_12": (
        lambda: ModernBertModel(ModernBertConfig(num_hidden_layers=12, layer_types=["full_attention"] * 12)),
        r".*mlp\.(Wi|Wo)",
    ),
}


class Holder(torch.nn.Module):
    """X-LoRA finds its adapters' weights only where the base is called `model` inside of what it adapts."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **inputs):
        return self.model(**inputs)


def with_adapters(base: torch.nn.Module, targets: str) -> dict[str, torch.nn.Module]:
    """The base, and copies of it with each kind of adapter, in its dtype (peft's default is float32)."""
    lora = LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False)
    mol = MoLConfig(r=RANK, num_experts=NUM_EXPERTS, num_experts_per_tok=PER_TOKEN, init_weights=False)
    same = {"autocast_adapter_dtype": False}
    models = {"base": base, "lora": get_peft_model(copy.deepcopy(base), lora, **same)}
    models["mol"] = get_peft_model(copy.deepcopy(base), mol, **same)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models["lora"].save_pretrained(folder)
        base.config.use_cache = False  # X-LoRA demands it
        config = XLoraConfig(
            hidden_size=base.config.hidden_size,
            adapters=dict.fromkeys(map(str, range(NUM_EXPERTS)), str(Path(folder))),
            top_k_lora=PER_TOKEN,
        )
        models["xlora"] = get_peft_model(copy.deepcopy(base), config, **same)
    return models


def forward(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    def run():
        with torch.no_grad():
            return model(input_ids=ids)[0]

    return run


def forward_backward(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    model.base_model.set_adapter(model.active_adapter)  # trainable

    def run():
        model(input_ids=ids)[0].float().square().mean().backward()

    return run


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=9)
    parser.add_argument("--batch", type=positive, default=16)
    parser.add_argument("--length", type=positive, default=128)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    for shape, (make, targets) in SHAPES.items():
        base = Holder(make()).to(arguments.device, getattr(torch, arguments.dtype))
        ids = torch.randint(1000, 30_000, (arguments.batch, arguments.length), device=arguments.device)
        models = {name: model.to(arguments.device).eval() for name, model in with_adapters(base, targets).items()}

        forwards = {name: forward(model, ids) for name, model in models.items()}
        trained = {name: forward_backward(models[name], ids) for name in ("lora", "mol")}
        results[shape] = {
            "forward": summarise(time_in_turn(forwards, arguments.rounds), "base"),
            "forward_backward": summarise(time_in_turn(trained, arguments.rounds), "lora"),
        }
        for kind, values in results[shape].items():
            print(f"{shape}, {kind}, {arguments.dtype}, batch {arguments.batch} x {arguments.length}")
            for name, value in values.items():
                print(f"  {name:6s} {value['median_ms']:9.1f} ms  {value['ratio']:5.2f}x")
    section = f"tuner_{arguments.dtype}_{arguments.batch}x{arguments.length}"
    write_results(arguments, section, results)


if __name__ == "__main__":
    main()
