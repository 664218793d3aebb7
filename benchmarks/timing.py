# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Timing several functions in turn, so that a slow minute of the machine hits them all."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers


RESULTS_FOLDER = Path(__file__).parent / "results"


def time_in_turn(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """
    Call every function once per round, in the order given.

    Returns:
        Seconds of each call by function, without the rounds that warm up: one, on a GPU three. On a GPU each call is
        timed to its end.
    """
    warm_up = 3 if torch.accelerator.is_available() else 1
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warm_up + rounds):
        for name, function in functions.items():
            synchronise()
            start = time.perf_counter()
            function()
            synchronise()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


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
    if device == "cpu":
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
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_results(device: str, section: str, results: object) -> Path:
    """Put `results` under `section` of `results/<device>.json`, beside what other benchmarks wrote there."""
    RESULTS_FOLDER.mkdir(exist_ok=True)
    path = RESULTS_FOLDER / f"{device_name(device)}.json"
    everything = json.loads(path.read_text()) if path.is_file() else {}
    everything[section] = {"environment": environment(), "results": results}
    path.write_text(json.dumps(everything, indent=2) + "\n")
    return path
