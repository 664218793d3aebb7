# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Speed of a training step: forward, backward, AdamW.

    python benchmarks/training_speed.py                                   # nano, a synthetic corpus
    python benchmarks/training_speed.py --config configs/tiny --device cuda --dtype bfloat16 --rows 64 --row_length 1024
    python benchmarks/training_speed.py --fine_tuning --rows 32

A step is one of pretraining: masked words, rows packed from a memory-mapped corpus; or of fine-tuning: a class for each
sequence of the corpus, padded to the longest. The model with its experts and the same without take their steps in turn.
"loading" is the time the main process waits for packed rows when it does nothing else: the worst case, since a
DataLoader's workers read ahead while it computes. On a GPU "step_megabytes" is what a step needs beside weights and
optimizer states, and MFU is of its peak in bfloat16, for those of PEAK_TFLOPS.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader

from modernalbert import ModernALBERTConfig, ModernALBERTForMaskedLM, ModernALBERTForSequenceClassification
from modernalbert.benchmarks.timing import benchmark_parser, positive, summarise, time_in_turn, write_results
from modernalbert.cli.allocator import keep_freed_memory
from modernalbert.cli.errors import UserError, error_message, run
from modernalbert.data.corpus import FORMAT_VERSION, MANIFEST, TokenizedCorpus
from modernalbert.data.packing import Masking, PackedRows
from modernalbert.training.distillation import DistillationConfig, DistilledStudent, TeacherOutputs
from modernalbert.training.pretraining_trainer import training_flops


# Dense products in bfloat16, by what the GPU's name contains.
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}
NUM_LOADS = 50


def known_peak(device: str) -> float | None:
    """TFLOP/s of a GPU in bfloat16, if it is known."""
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else ""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def synthetic_corpus(folder: Path, vocab_size: int, longest: int, median_length: float = 25) -> TokenizedCorpus:
    """20,000 sequences of random ids with log-normal lengths, in the format of a prepared corpus."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(median_length), 0.7, 20_000).astype(np.int64), 3, longest)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = generator.integers(5, vocab_size, offsets[-1], dtype=np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    table = pa.Table.from_arrays([column], names=["input_ids"])
    (folder / "synthetic").mkdir()
    with pa.OSFile(str(folder / "synthetic" / "data.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    manifest = {"format_version": FORMAT_VERSION, "vocabulary": "", "max_seq_length": longest}
    sources = {"synthetic": {"texts": len(lengths), "sequences": len(lengths)}}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"inputs": {}, "sources": sources}))
    return TokenizedCorpus(folder)


def packed_rows(
    corpus: TokenizedCorpus,
    config: ModernALBERTConfig,
    num_rows: int,
    row_length: int,
    mask_probability: float = 0.3,
    workers: int = 0,
) -> tuple[dict, dict]:
    """A batch of packed rows with masks, and how long loading takes: the median step, and the mean with planning."""
    special = np.array(sorted({config.pad_token_id, config.cls_token_id, config.sep_token_id}))
    masking = Masking(
        mask_probability, 1.0, False, 4, config.vocab_size, special, np.zeros(config.vocab_size, dtype=bool)
    )
    rows = PackedRows(corpus, NUM_LOADS * num_rows, row_length, masking, config.pad_token_id)
    loader = DataLoader(rows, batch_size=num_rows, num_workers=workers)
    start = time.perf_counter()
    batches = list(loader)
    first_pass = (time.perf_counter() - start) / len(batches)
    # The second pass has the plan of the block at hand, as all but one step in a thousand have.
    seconds, start = [], time.perf_counter()
    for _ in loader:
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    batch = {name: values for name, values in batches[0].items() if name != "clean_input_ids"}
    loading = {"median_ms": 1000 * statistics.median(seconds), "mean_ms_with_planning": 1000 * first_pass}
    return batch, loading | {"workers": workers}


def padded_sequences(corpus: TokenizedCorpus, config: ModernALBERTConfig, num_rows: int) -> dict:
    """The first sequences of the corpus, padded to the longest, with a class each."""
    sequences = [torch.from_numpy(corpus[i].astype(np.int64)) for i in range(min(num_rows, len(corpus)))]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=config.pad_token_id)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(sequences)) % config.num_labels}


def make_step(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    dtype: torch.dtype,
    ask_teacher: Callable[[], TeacherOutputs] | None = None,
) -> Callable[[], None]:
    """A function that takes one whole training step, with what a teacher says if there is one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    device = batch["input_ids"].device.type

    def step() -> None:
        said = {"teacher_outputs": ask_teacher()} if ask_teacher else {}
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**batch, **said)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_flops(model: DistilledStudent, batch: dict[str, torch.Tensor]) -> float:
    """Floating-point operations of the student's training step on packed rows, the teacher's not counted."""
    real = batch["attention_mask"] == 1
    sequences = int(((batch["position_ids"] == 0) & real).sum())
    return training_flops(model.student, int(real.sum()), sequences, int((batch["labels"] != -100).sum()))


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=7)
    parser.add_argument("--config", default="configs/nano", help="folder with a config.json")
    parser.add_argument("--fine_tuning", action="store_true", help="a classifier on padded sequences")
    parser.add_argument("--corpus_dir", help="a prepared corpus; default: a synthetic one")
    parser.add_argument("--rows", type=positive, default=8, help="rows of a step")
    parser.add_argument("--row_length", type=positive, default=256, help="tokens of a packed row")
    parser.add_argument("--attn_implementation", default="sdpa")
    parser.add_argument("--workers", type=int, default=0, help="of the DataLoader whose speed is measured")
    parser.add_argument("--peak_tflops", type=float, help="of the device in that dtype, for MFU; known for some GPUs")
    arguments = parser.parse_args()
    try:
        config = ModernALBERTConfig.from_pretrained(arguments.config)
    except (OSError, ValueError) as error:
        raise UserError(f"--config {arguments.config} cannot be used: {error_message(error)}") from None
    config._attn_implementation = arguments.attn_implementation

    with tempfile.TemporaryDirectory() as folder:
        if arguments.corpus_dir:
            corpus = TokenizedCorpus(arguments.corpus_dir)
        else:
            corpus = synthetic_corpus(Path(folder), config.vocab_size, arguments.row_length)
        if arguments.fine_tuning:
            batch, loading = padded_sequences(corpus, config, arguments.rows), None
        else:
            shape = arguments.rows, arguments.row_length
            batch, loading = packed_rows(corpus, config, *shape, workers=arguments.workers)
    batch = {name: values.to(arguments.device) for name, values in batch.items()}
    if arguments.device == "cpu":
        keep_freed_memory()  # as the training scripts do
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    models = {}
    for modulation in ("none", config.ffn_modulation):
        changed = ModernALBERTConfig.from_dict(config.to_dict() | {"ffn_modulation": modulation})
        changed._attn_implementation = arguments.attn_implementation
        if arguments.fine_tuning:
            model = ModernALBERTForSequenceClassification(changed)
        else:
            model = DistilledStudent(ModernALBERTForMaskedLM(changed), DistillationConfig())
        models[modulation] = model.to(arguments.device).train()
    steps = {name: make_step(model, batch, dtype) for name, model in models.items()}
    results = summarise(time_in_turn(steps, arguments.rounds), "none")

    tokens = int(batch["attention_mask"].sum())
    peak = arguments.peak_tflops or (known_peak(arguments.device) if dtype == torch.bfloat16 else None)
    for name, values in results.items():
        values["tokens_per_second"] = 1000 * tokens / values["median_ms"]
        if peak and not arguments.fine_tuning:
            values["mfu"] = step_flops(models[name], batch) / (values["median_ms"] / 1000) / (peak * 1e12)
        if torch.device(arguments.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            steps[name]()
            values["step_megabytes"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        print(
            f"{name:5s} {values['median_ms']:9.1f} ms a step  {values['ratio']:5.2f}x"
            f"  {values['tokens_per_second']:10,.0f} tokens/s"
            + (f"  MFU {values['mfu']:.1%}" if "mfu" in values else "")
            + (f"  {values['step_megabytes']:,.0f} MB" if "step_megabytes" in values else "")
        )
    if loading is not None:
        loading["share_of_step"] = loading["median_ms"] / results[config.ffn_modulation]["median_ms"]
        loading["packing_efficiency"] = tokens / batch["attention_mask"].numel()
        results["loading"] = loading
        print(f"loading {loading['median_ms']:7.2f} ms a step, {loading['share_of_step']:.2%} of it")
    results["attn_implementation"] = arguments.attn_implementation
    kind = "fine_tuning" if arguments.fine_tuning else "training"
    shape = f"{arguments.rows}x{batch['input_ids'].shape[1] if arguments.fine_tuning else arguments.row_length}"
    write_results(arguments, f"{kind}_{Path(arguments.config).name}_{arguments.dtype}_{shape}", results)


if __name__ == "__main__":
    run(main)
