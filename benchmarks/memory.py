# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Memory: what training a model with experts takes against the same model without, and what sharing weights saves.

    python benchmarks/memory.py [--device cuda] [--dtype bfloat16] [--batch 8] [--length 512]

"peak" is the most that was allocated above the start during two whole training steps (forward, backward, AdamW) of the
Tiny size: on a GPU what the allocator says, on the CPU the growth of the resident set, in a process of its own for each
model. "kept" is what autograd keeps between forward and backward. "modernbert" is transformers' model of the same depth
and width, whose layers have weights of their own; its and ours sizes on disk, load times and optimizer states are
beside each other.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModel, ModernBertConfig, ModernBertModel
from transformers.utils import SAFE_WEIGHTS_NAME

from modernalbert import ModernALBERTConfig, ModernALBERTModel
from modernalbert.benchmarks.timing import benchmark_parser, positive, write_results


MODELS = {
    "none": lambda: ModernALBERTModel(ModernALBERTConfig(ffn_modulation="none")),
    "mol_masked": lambda: ModernALBERTModel(ModernALBERTConfig(mol_backend="masked")),
    "mol": lambda: ModernALBERTModel(ModernALBERTConfig()),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(num_hidden_layers=14, layer_types=["full_attention"] * 14)),
}
MEGABYTE = 1e6


def saved_megabytes(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """What a forward keeps for the backward, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(ids)[0]
    del output
    return sum(kept.values()) / MEGABYTE


def measure(name: str, device: str, dtype: torch.dtype, batch: int, length: int) -> dict[str, float]:
    """One model, in this process."""
    torch.manual_seed(0)
    model = MODELS[name]().to(device, dtype).train()
    result = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        result["megabytes_on_disk"] = (Path(folder) / SAFE_WEIGHTS_NAME).stat().st_size / MEGABYTE
        start = time.perf_counter()
        AutoModel.from_pretrained(folder)
        result["load_seconds"] = time.perf_counter() - start
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(1000, 30_000, (batch, length), device=device)
    result["kept_megabytes"] = saved_megabytes(model, ids)
    before = resident_megabytes(device)
    for _ in range(2):
        model(ids)[0].float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    result["peak_megabytes"] = peak_megabytes(device) - before
    states = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    result["optimizer_megabytes"] = sum(value.nbytes for value in states) / MEGABYTE
    return result


def resident_megabytes(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MEGABYTE
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MEGABYTE


def peak_megabytes(device: str) -> float:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / MEGABYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE  # Linux counts in KiB


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=None)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--length", type=positive, default=512)
    parser.add_argument("--only", choices=sorted(MODELS), help="one model, in this process: prints JSON")
    arguments = parser.parse_args()
    options = arguments.device, arguments.dtype, arguments.batch, arguments.length
    if arguments.only:
        device, dtype, batch, length = options
        print(json.dumps(measure(arguments.only, device, getattr(torch, dtype), batch, length)))
        return
    results: dict[str, dict[str, float]] = {}
    for name in MODELS:
        command = [sys.executable, __file__, "--only", name]
        for option, value in zip(("device", "dtype", "batch", "length"), options):
            command += [f"--{option}", str(value)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed.")
        results[name] = values = json.loads(done.stdout.splitlines()[-1])
        values["peak_ratio"] = values["peak_megabytes"] / results["none"]["peak_megabytes"]
        values["kept_ratio"] = values["kept_megabytes"] / results["none"]["kept_megabytes"]
        print(
            f"{name:12s} peak {values['peak_megabytes']:7.0f} MB {values['peak_ratio']:5.2f}x"
            f"   kept {values['kept_megabytes']:7.0f} MB {values['kept_ratio']:5.2f}x"
            f"   on disk {values['megabytes_on_disk']:5.0f} MB   loaded in {values['load_seconds']:5.2f} s"
            f"   optimizer {values['optimizer_megabytes']:5.0f} MB",
            flush=True,
        )
    section = f"memory_{arguments.dtype}_{arguments.batch}x{arguments.length}"
    write_results(arguments, section, results)


if __name__ == "__main__":
    main()
