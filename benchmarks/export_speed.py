# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
How fast the forms of a checkpoint run: PyTorch, compiled, ModernBERT, ONNX, ONNX int8; and how soon the first result.

    python benchmarks/export_speed.py
    python benchmarks/export_speed.py --part tiny --batch 8
    python benchmarks/export_speed.py --part starts
    python experiments/document_tables.py --documents docs/deployment.md

Encoders of nano (the shipped checkpoint, experts merged) and Tiny (untrained weights of that size), beside one of
all-MiniLM-L6-v2's shape, all timed in turn on the same rows: one of SHORT and one of `--length` tokens for the latency,
`--batch` of `--length` for the throughput, in a fifth of the rounds. onnxruntime gets as many threads as PyTorch
(OMP_NUM_THREADS), and the results go to the file of that number. On one thread the processor's time is measured, which
other processes on the machine change less than the time that passes. Starts are those of new processes, with the files
in the machine's memory: the imports, and the shipped folder from `from_pretrained` to its first result, with
`trust_remote_code`.
"""

import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, PreTrainedModel

from modernalbert import ModernALBERTConfig, ModernALBERTModel
from modernalbert.benchmarks.timing import (
    benchmark_parser,
    device_name,
    positive,
    summarise,
    time_in_turn,
    write_results,
)
from modernalbert.export import export_onnx, to_modernbert
from modernalbert.merge_experts import merge_experts


REPOSITORY = Path(__file__).parents[1]
NANO = REPOSITORY / "checkpoints" / "modernalbert-nano"
SHORT = 16  # tokens, a sentence
CLOCK = """
import sys, time
from torch import get_num_threads
clock = time.process_time if get_num_threads() == 1 else time.perf_counter
"""
STARTS = {
    "import transformers": """
start = clock()
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
print(clock() - start)
""",
    "import modernalbert": """
start = clock()
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
import modernalbert
print(clock() - start)
""",
    "from_pretrained to the first result": """
from transformers import AutoModel, AutoTokenizer
start = clock()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
model(**tokenizer("A film.", return_tensors="pt"))
print(clock() - start)
""",
}


def nano() -> PreTrainedModel:
    """The shipped encoder."""
    return ModernALBERTModel.from_pretrained(NANO, dtype="float32").eval()


def tiny() -> PreTrainedModel:
    """An encoder of the Tiny size."""
    return ModernALBERTModel(ModernALBERTConfig.from_pretrained(REPOSITORY / "configs" / "tiny")).eval()


def minilm() -> PreTrainedModel:
    """An encoder of all-MiniLM-L6-v2's shape."""
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return BertModel(config, add_pooling_layer=False).eval()


MODELS = {"nano": nano, "tiny": tiny}


def onnx_function(file: Path) -> Callable[[torch.Tensor], object]:
    """A call of an ONNX file on token ids (batch, sequence)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def call(ids: torch.Tensor) -> object:
        return session.run(None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})

    return call


def make_forms(model: PreTrainedModel, folder: Path) -> dict[str, Callable[[torch.Tensor], object]]:
    """The forms of a routed model, as functions of token ids (batch, sequence)."""
    folded = merge_experts(model, weights="ema").model
    export_onnx(folded, None, folder, quantize="int8")
    return {
        "routed": model,
        "eager": folded,
        "compiled": torch.compile(folded, dynamic=False),
        "modernbert": to_modernbert(folded),
        "onnx": onnx_function(folder / "onnx/model.onnx"),
        "onnx_int8": onnx_function(folder / "onnx/model_quantized.onnx"),
    }


def measure_forms(name: str, batch: int, length: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a call, and its ratio to eager, by form and what was timed."""
    timed = {
        "short_latency": (1, SHORT, rounds),
        "latency": (1, length, rounds),
        "throughput": (batch, length, max(3, rounds // 5)),
    }
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        forms = make_forms(MODELS[name](), Path(folder) / name) | {"minilm": minilm()}
        results = {form: {} for form in forms}
        for kind, (rows, tokens, times) in timed.items():
            ids = torch.randint(1000, 30_000, (rows, tokens))
            calls = {form: functools.partial(function, ids) for form, function in forms.items()}
            for form, values in summarise(time_in_turn(calls, times, clock), "eager").items():
                results[form] |= {f"{kind}_ms": values["median_ms"], f"{kind}_ratio": values["ratio"]}
    return results


def measure_starts(repeats: int) -> dict[str, float]:
    """Median seconds of each of STARTS in a new process; the first of each is not counted."""
    seconds = {name: [] for name in STARTS}
    for _ in range(1 + repeats):
        for name, code in STARTS.items():
            process = [sys.executable, "-W", "ignore", "-c", CLOCK + code, str(NANO)]
            done = subprocess.run(process, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            seconds[name].append(float(done.stdout.split()[-1]))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=15)
    parts = [*MODELS, "starts"]
    parser.add_argument("--part", choices=parts, nargs="+", default=parts, help="default: all")
    parser.add_argument("--batch", type=positive, default=32, help="rows of the throughput")
    parser.add_argument("--length", type=positive, default=128, help="tokens of a row")
    arguments = parser.parse_args()
    if device_name(arguments.device).split("-")[0] != "cpu" or arguments.dtype != "float32":
        parser.error("the forms are compared on a CPU in float32: leave --device and --dtype")
    shapes = {"batch": arguments.batch, "length": arguments.length, "short_length": SHORT}
    for name in arguments.part:
        if name == "starts":
            write_results(arguments, "export_starts", measure_starts(min(5, arguments.rounds)))
        else:
            forms = measure_forms(name, arguments.batch, arguments.length, arguments.rounds)
            write_results(arguments, f"export_{name}", shapes | {"forms": forms})


if __name__ == "__main__":
    main()
