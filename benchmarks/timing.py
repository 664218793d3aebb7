# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Shared by the benchmarks: options, timing several functions in turn, and the file of results."""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from modernalbert.cli.errors import error_message


GPU_SECONDS, GPU_WARM_UP = 0.02, 5
RESULTS_FOLDER = Path(__file__).parent / "results"


def positive(text: str) -> int:
    """An option's value that is an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be an integer of at least 1")
    return int(text)


def available_device(text: str) -> str:
    """An option's value that is a device of this machine."""
    try:
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {error_message(error)}") from None
    return text


def benchmark_parser(description: str, rounds: int | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have; without `--rounds` for None."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=available_device, default=default_device(), help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    if rounds is not None:
        parser.add_argument("--rounds", type=positive, default=rounds, help=f"calls of each; default: {rounds}")
    parser.add_argument("--output_dir", default=str(RESULTS_FOLDER), help="where <device>.json goes")
    return parser


def time_in_turn(
    functions: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """
    Time every function once per round, in the order given, by a clock in seconds.

    Returns:
        Seconds of a call by function, for each round but the first, which warms up. On a GPU, whose clock and whose
        queue need a while to fill, there are more to warm up, and what is timed is as many calls as take GPU_SECONDS.
    """
    calls = dict.fromkeys(functions, 1)
    if torch.accelerator.is_available():
        for name, function in functions.items():
            for _ in range(GPU_WARM_UP):
                seconds = seconds_of(function, 1)
            calls[name] = math.ceil(GPU_SECONDS / seconds)
    seconds = [
        {name: seconds_of(function, calls[name], clock) for name, function in functions.items()}
        for _ in range(1 + rounds)
    ]
    return {name: [times[name] for times in seconds[1:]] for name in functions}


def seconds_of(function: Callable[[], object], calls: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Mean time of so many calls, to the end of what they started on a GPU."""
    synchronise()
    start = clock()
    for _ in range(calls):
        function()
    synchronise()
    return (clock() - start) / calls


def synchronise() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def summarise(seconds: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Median milliseconds, and the median over rounds of the ratio to the baseline of the same round."""
    return {
        name: {
            "median_ms": 1000 * statistics.median(times),
            "ratio": statistics.median(t / b for t, b in zip(times, seconds[baseline])),
        }
        for name, times in seconds.items()
    }


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    """Of the machine measured on: "cpu-2-threads" or the GPU's name, fit for a file name."""
    if torch.device(device).type == "cpu":
        return f"cpu-{torch.get_num_threads()}-threads"
    return torch.cuda.get_device_name().lower().replace(" ", "-")


def environment() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": processor_name(),
    }


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_results(arguments: argparse.Namespace, section: str, results: object) -> None:
    """Put `results` under `section` of `<output_dir>/<device>.json`, beside what other benchmarks wrote there."""
    path = Path(arguments.output_dir) / f"{device_name(arguments.device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = json.loads(path.read_text()) if path.is_file() else {}
    everything[section] = {"environment": environment(), "results": results}
    path.write_text(json.dumps(everything, indent=2) + "\n")
    print(f"Written to {path}")
