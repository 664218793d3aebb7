# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
All benchmarks, one after the other, into results/<device>.json and results/<device>.png.

    python -m modernalbert.benchmarks [--quick] [--device cuda] [--data_dir $DATA_DIR]

`--quick` takes a few minutes: fewer rounds, no sweep, no compilation. With `--data_dir` the encoders also run on the
lengths of real texts (sst2, rte and squad_v2 in it; see docs/data.md). What failed is named at the end.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from modernalbert.benchmarks.timing import RESULTS_FOLDER, default_device, device_name


FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parent
REAL_ROWS = ("sst2/train.jsonl", "rte/train.jsonl", "squad_v2/train.json")


def commands(quick: bool, device: str, data_dir: str | None) -> list[list[str]]:
    """The benchmarks as command lines, without the interpreter."""
    gpu = device != "cpu"
    common = ["--device", device, "--dtype", "bfloat16" if gpu else "float32"]
    rounds = ["--rounds", "5"] if quick else []
    # The sizes a CPU gets through in minutes, and a GPU needs to be busy.
    shapes = [("64", "512")] if gpu else [("8", "128")]
    if not quick:
        # One short text: there a group's weights, read once, serve all its layers from the cache.
        shapes += [("1", "16"), ("1", "128")]
        shapes += [("64" if gpu else "2", "512"), ("16" if gpu else "1", "2048"), ("1", "8192")]
    runs = [["ffn_speed.py", *common, *rounds, *(["--no-compile"] if quick else [])]]
    runs += [["encoder_speed.py", *common, *rounds, "--batch", b, "--length", n] for b, n in dict.fromkeys(shapes)]
    if data_dir:
        for rows in REAL_ROWS[: 1 if quick else None]:
            number = ["--num_batches", "1" if not gpu or "squad" in rows else "4"]
            batch = ["--batch", "64" if gpu or "sst2" in rows else "16"]
            runs.append(["encoder_speed.py", *common, *rounds, "--rows", str(Path(data_dir, rows)), *batch, *number])
    if not quick:
        if not gpu:
            # Few tokens and rounds: a processor without half-precision arithmetic takes seconds for each product.
            half = ["--device", device, "--dtype", "bfloat16", "--tokens", "512", "--rounds", "3", "--no-compile"]
            runs.append(["ffn_speed.py", *half])
        runs.append(["ffn_speed.py", *common, "--rounds", "3", "--sweep"])
        runs.append(["encoder_speed.py", *common, "--compile"])
    runs.append(["training_speed.py", *common, *rounds, "--config", str(REPOSITORY / "configs" / "nano")])
    if gpu:
        runs.append(["training_speed.py", *common, "--config", str(REPOSITORY / "configs" / "tiny"), "--rows", "64"])
    runs.append(["memory.py", *common, "--batch", "64" if gpu else "2", "--length", "512"])
    return runs


def plot(results: dict[str, dict], file: Path) -> None:
    """FFN by way of computing it, whole encoders, and cost against the number of experts where it was swept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    sections = {name: section["results"] for name, section in results.items()}
    ffn = {name: values for name, values in sections.items() if name.startswith("ffn_") and "forward" in values}
    _bars(
        axes[0], {name[4:]: values["forward"] for name, values in ffn.items()}, "FFN, forward: ratio to the plain FFN"
    )
    encoders = {
        name[8:]: values["against_modernbert"] for name, values in sections.items() if name.startswith("encoder_")
    }
    _bars(axes[1], encoders, "Encoder: ratio to ModernBERT of its shape")
    for name, values in sections.items():
        if not name.startswith("ffn_sweep"):
            continue
        for kind in ("forward", "forward_backward"):
            for backend in values["num_experts"][next(iter(values["num_experts"]))][kind]:
                line = {int(n): row[kind][backend]["ratio"] for n, row in values["num_experts"].items()}
                axes[2].plot(list(line), list(line.values()), marker="o", label=f"{backend}, {kind}")
        axes[2].set(xscale="log", xlabel="experts", title="FFN: ratio to the plain FFN by number of experts")
        axes[2].legend(fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _bars(axis, rows: dict[str, dict[str, dict[str, float]]], title: str) -> None:
    """One group of bars for each row of ratios."""
    width = 0.8 / max(1, len(rows))
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    for i, (row, values) in enumerate(rows.items()):
        places = [names.index(name) + (i - (len(rows) - 1) / 2) * width for name in values]
        axis.bar(places, [value["ratio"] for value in values.values()], width, label=row)
    axis.axhline(1, color="grey", linestyle=":")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_ylim(top=min(4, axis.get_ylim()[1]))
    axis.set_title(title)
    if rows:
        axis.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modernalbert.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes")
    parser.add_argument("--device", default=default_device(), help="cpu or cuda")
    parser.add_argument("--data_dir", help="also the lengths of real texts, from this folder")
    arguments = parser.parse_args()
    failed = []
    for command in commands(arguments.quick, arguments.device, arguments.data_dir):
        print(f"\n$ python benchmarks/{' '.join(command)}", flush=True)
        if subprocess.run([sys.executable, str(FOLDER / command[0]), *command[1:]], cwd=REPOSITORY).returncode:
            failed.append(" ".join(command))
    file = RESULTS_FOLDER / f"{device_name(arguments.device)}.json"
    if file.is_file():
        plot(json.loads(file.read_text()), file.with_suffix(".png"))
        print(f"\nResults: {file}\nPlot: {file.with_suffix('.png')}")
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
