# Copyright 2026 The ModernALBERT authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Speed of a pretraining step: rows from a memory-mapped corpus, masked language model, backward, AdamW.

    python benchmarks/training_speed.py                                   # nano, a synthetic corpus
    python benchmarks/training_speed.py --config configs/tiny --device cuda --dtype bfloat16 --rows 64 --row_length 1024

The model with its experts and the same model without take their steps in turn. "loading" is the time the main process
waits for rows when it does nothing else: the worst case, since a DataLoader's workers read ahead while it computes.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader

from modernalbert import ModernALBERTConfig, ModernALBERTForMaskedLM
from modernalbert.benchmarks.timing import benchmark_parser, positive, summarise, time_in_turn, write_results
from modernalbert.training.distillation import DistillationConfig, DistilledStudent
from modernalbert.training.packed_rows import Masking, PackedRows
from modernalbert.training.pretraining_trainer import training_flops
from modernalbert.training.tokenized_corpus import FORMAT_VERSION, MANIFEST, TokenizedCorpus


def synthetic_corpus(folder: Path, vocab_size: int, longest: int, num_sequences: int = 20_000) -> TokenizedCorpus:
    """Sequences of random ids with log-normal lengths, in the format of a prepared corpus."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(3.2, 0.7, num_sequences).astype(np.int64), 3, longest)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = generator.integers(5, vocab_size, offsets[-1], dtype=np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    table = pa.Table.from_arrays([column], names=["input_ids"])
    (folder / "synthetic").mkdir()
    with pa.OSFile(str(folder / "synthetic" / "data.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    manifest = {"format_version": FORMAT_VERSION, "vocabulary": "", "max_seq_length": longest}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"inputs": {}, "sources": {"synthetic": {}}}))
    return TokenizedCorpus(folder)


def make_step(model: DistilledStudent, batch: dict[str, torch.Tensor], dtype: torch.dtype):
    """A function that takes one whole training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    device = batch["input_ids"].device.type

    def step() -> None:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=7)
    parser.add_argument("--config", default="configs/nano", help="folder with a config.json")
    parser.add_argument("--corpus_dir", help="a prepared corpus; default: a synthetic one")
    parser.add_argument("--rows", type=positive, default=8, help="rows of a step")
    parser.add_argument("--row_length", type=positive, default=256, help="tokens of a row")
    parser.add_argument("--attn_implementation", default="sdpa")
    parser.add_argument("--workers", type=positive, default=0, help="of the DataLoader whose speed is measured")
    parser.add_argument("--peak_tflops", type=float, help="of the device in that dtype: reports MFU")
    arguments = parser.parse_args()
    config = ModernALBERTConfig.from_pretrained(arguments.config)
    config._attn_implementation = arguments.attn_implementation

    with tempfile.TemporaryDirectory() as folder:
        if arguments.corpus_dir:
            corpus = TokenizedCorpus(arguments.corpus_dir)
        else:
            corpus = synthetic_corpus(Path(folder), config.vocab_size, arguments.row_length)
        special = np.array(sorted({config.pad_token_id, config.cls_token_id, config.sep_token_id}))
        masking = Masking(0.3, 1.0, False, 4, config.vocab_size, special, np.zeros(config.vocab_size, dtype=bool))
        num_loads = 50
        rows = PackedRows(corpus, num_loads * arguments.rows, arguments.row_length, masking, config.pad_token_id)
        loader = DataLoader(rows, batch_size=arguments.rows, num_workers=arguments.workers)
        start = time.perf_counter()
        batches = list(loader)
        first_pass = (time.perf_counter() - start) / len(batches)
        # The second pass has the plan of the block at hand, as all but one step in a thousand have.
        seconds, start = [], time.perf_counter()
        for _ in loader:
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        loading = statistics.median(seconds)

    batch = {name: values.to(arguments.device) for name, values in batches[0].items() if name != "clean_input_ids"}
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    models = {}
    for modulation in ("none", config.ffn_modulation):
        changed = ModernALBERTConfig.from_dict(config.to_dict() | {"ffn_modulation": modulation})
        changed._attn_implementation = arguments.attn_implementation
        student = ModernALBERTForMaskedLM(changed).to(arguments.device)
        models[modulation] = DistilledStudent(student, DistillationConfig()).train()
    steps = {name: make_step(model, batch, dtype) for name, model in models.items()}
    results = summarise(time_in_turn(steps, arguments.rounds), "none")

    tokens = int(batch["attention_mask"].sum())
    sequences = int(((batch["position_ids"] == 0) & (batch["attention_mask"] == 1)).sum())
    masked = int((batch["labels"] != -100).sum())
    for name, values in results.items():
        values["tokens_per_second"] = 1000 * tokens / values["median_ms"]
        if arguments.peak_tflops:
            flops = training_flops(models[name].student, tokens, sequences, masked)
            values["mfu"] = flops / (values["median_ms"] / 1000) / (arguments.peak_tflops * 1e12)
        print(
            f"{name:5s} {values['median_ms']:9.1f} ms a step  {values['ratio']:5.2f}x"
            f"  {values['tokens_per_second']:10,.0f} tokens/s"
            + (f"  MFU {values['mfu']:.1%}" if "mfu" in values else "")
        )
    step_seconds = results[config.ffn_modulation]["median_ms"] / 1000
    results["loading"] = {
        "median_ms": 1000 * loading,
        "share_of_step": loading / step_seconds,
        "mean_ms_with_planning": 1000 * first_pass,
        "packing_efficiency": tokens / batch["attention_mask"].numel(),
        "workers": arguments.workers,
    }
    print(f"loading {1000 * loading:7.2f} ms a step, {loading / step_seconds:.2%} of it")
    if torch.device(arguments.device).type == "cuda":
        results["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    name = f"{Path(arguments.config).name}_{arguments.dtype}_{arguments.rows}x{arguments.row_length}"
    write_results(arguments, f"training_{name}", results)


if __name__ == "__main__":
    main()
