# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Speed of the whole encoder: against transformers' ModernBERT, BERT and ALBERT, and with experts, merged and without.

    python benchmarks/encoder_speed.py [--device cuda] [--dtype bfloat16] [--batch 8] [--length 128] [--compile]
    python benchmarks/encoder_speed.py --rows $DATA_DIR/sst2/train.jsonl [--batch 64] [--num_batches 4]

"modernbert" and "modernalbert" are 14 layers of width 768, FFN 1152, full attention; ModernALBERT uses 7 groups twice.
"bert" and "albert" have that depth and width, with an FFN of equal parameters (1728, not gated). "tiny" is the Tiny
size (wider FFN in its last two groups) with experts, "tiny_folded" the same model merged, "tiny_none" the same without
modulation. All rows are of one length, or with `--rows` as long as a file's texts are, in its order, padded batch by
batch.
"""

from pathlib import Path

import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
)

from modernalbert import ModernALBERTConfig, ModernALBERTModel
from modernalbert.benchmarks.timing import benchmark_parser, positive, summarise, time_in_turn, write_results
from modernalbert.cli.errors import run
from modernalbert.data.squad import read_squad
from modernalbert.data.tables import read_rows
from modernalbert.merge_experts import merge_experts


NUM_LAYERS, WIDTH = 14, 768
# What is compared with what; the first of each is the baseline.
AGAINST = {
    "modernbert": ("modernbert", "modernalbert", "tiny_folded", "bert", "albert"),
    "tiny_none": ("tiny_none", "tiny", "tiny_folded"),
}
Batch = dict[str, torch.Tensor]


def build(device: str, dtype: torch.dtype, attn_implementation: str) -> dict[str, torch.nn.Module]:
    """The models, with random weights, in evaluation mode."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": NUM_LAYERS, "hidden_size": WIDTH, "num_attention_heads": 12}
    shape |= {"max_position_embeddings": 8192, "vocab_size": ModernALBERTConfig().vocab_size}
    peers = {
        "modernbert": (ModernBertModel, ModernBertConfig(**shape, layer_types=["full_attention"] * NUM_LAYERS)),
        "bert": (BertModel, BertConfig(**shape, intermediate_size=1728)),
        "albert": (AlbertModel, AlbertConfig(**shape, intermediate_size=1728)),
        "modernalbert": (ModernALBERTModel, ModernALBERTConfig(ffn_modulation="none", mol_intermediate_size=None)),
        "tiny_none": (ModernALBERTModel, ModernALBERTConfig(ffn_modulation="none")),
        "tiny": (ModernALBERTModel, ModernALBERTConfig()),
    }
    models = {}
    for name, (model_class, config) in peers.items():
        config._attn_implementation = attn_implementation
        models[name] = model_class(config)
    models["tiny_folded"] = merge_experts(models["tiny"], "uniform").model
    return {name: model.to(device, dtype).eval() for name, model in models.items()}


def batches_of_one_length(batch: int, length: int, device: str) -> list[Batch]:
    """One batch of random ids, without padding."""
    return [{"input_ids": torch.randint(1000, 30_000, (batch, length), device=device)}]


def batches_of_a_file(file: str, batch: int, num_batches: int, tokenizer: str, device: str) -> list[Batch]:
    """Texts, padded batch by batch: a row's columns of text together, or a SQuAD file's questions and contexts."""
    if Path(file).suffix == ".json":
        texts = [f"{example.question} {example.context}" for example in read_squad(file)]
    else:
        texts = [" ".join(value for value in row.values() if isinstance(value, str)) for _, row in read_rows(file)]
    encode = AutoTokenizer.from_pretrained(tokenizer)
    texts = texts[: batch * num_batches]
    chosen = (texts[i : i + batch] for i in range(0, len(texts), batch))
    padded = [encode(part, padding=True, truncation=True, max_length=512, return_tensors="pt") for part in chosen]
    return [{name: part[name].to(device) for name in ("input_ids", "attention_mask")} for part in padded]


def forward(model: torch.nn.Module, batches: list[Batch]):
    def run():
        with torch.inference_mode():
            for batch in batches:
                model(**batch)

    return run


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=11)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--length", type=positive, default=128)
    parser.add_argument("--rows", help="a file of rows or a SQuAD file: their lengths instead of --length")
    parser.add_argument("--num_batches", type=positive, default=4, help="of --rows")
    parser.add_argument("--tokenizer", default="configs/nano", help="for --rows")
    parser.add_argument("--attn_implementation", default="sdpa")
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    arguments = parser.parse_args()
    if arguments.rows:
        batches = batches_of_a_file(
            arguments.rows, arguments.batch, arguments.num_batches, arguments.tokenizer, arguments.device
        )
        shape = f"{arguments.batch}x{Path(arguments.rows).resolve().parent.name}"
    else:
        batches = batches_of_one_length(arguments.batch, arguments.length, arguments.device)
        shape = f"{arguments.batch}x{arguments.length}"
    models = build(arguments.device, getattr(torch, arguments.dtype), arguments.attn_implementation)
    if arguments.compile:
        models = {name: torch.compile(model) for name, model in models.items()}
    real = sum(int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in batches)
    results: dict = {"real_tokens": real / sum(batch["input_ids"].numel() for batch in batches)}
    results["attn_implementation"] = arguments.attn_implementation

    seconds = time_in_turn({name: forward(model, batches) for name, model in models.items()}, arguments.rounds)
    for baseline, names in AGAINST.items():
        results[f"against_{baseline}"] = summarise({name: seconds[name] for name in names}, baseline)
        print(f"against {baseline}, {arguments.dtype}, batch {shape}, {results['real_tokens']:.0%} real tokens")
        for name, values in results[f"against_{baseline}"].items():
            print(f"  {name:14s} {values['median_ms']:9.1f} ms  {values['ratio']:5.2f}x")
    section = f"encoder_{arguments.dtype}_{shape}" + ("_compiled" if arguments.compile else "")
    write_results(arguments, section, results)


if __name__ == "__main__":
    run(main)
