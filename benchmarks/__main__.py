# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
All benchmarks, one after the other, into <device>.json and <device>.png.

    python -m modernalbert.benchmarks [--quick] [--device cuda] [--data_dir $DATA_DIR]

`--quick` takes some minutes: three rounds, no sweep, no compilation; its results go to outputs/benchmarks, those of the
whole run to the package's benchmarks/results, which the documentation is made of. With `--data_dir` the encoders also
run on the lengths of real texts (sst2, rte and squad_v2 in it; see docs/data.md). On a GPU attention is that of
flash-attn, if it is installed. What failed is named at the end. Run again after an interruption, it goes on.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers.utils import is_flash_attn_2_available

from modernalbert.benchmarks.timing import RESULTS_FOLDER, available_device, default_device, device_name
from modernalbert.cli.errors import UserError, run
from modernalbert.mol_backends import multiplies_in


FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parent
CONFIGS = REPOSITORY / "configs"
TOP = 4  # of the plot's ratios
REAL_ROWS = ("sst2/train.jsonl", "rte/train.jsonl", "squad_v2/train.json")
# Batch and length: what a CPU gets through in minutes, and what a GPU needs to be busy. `--quick` takes the first. One
# short text is there because a group's weights, read once, could serve all its layers from the cache.
CPU_SHAPES = ((8, 128), (1, 16), (1, 128), (2, 512), (1, 2048), (1, 8192))
GPU_SHAPES = ((64, 512), (256, 128), (1, 16), (1, 128), (16, 2048), (1, 8192))


def commands(quick: bool, device: str, data_dir: str | None, output_dir: Path) -> list[list[str]]:
    """The benchmarks as command lines, without the interpreter."""
    gpu = torch.device(device).type != "cpu"
    to = ["--device", device, "--output_dir", str(output_dir)]
    common = [*to, "--dtype", "bfloat16" if gpu else "float32"]
    rounds = ["--rounds", "3"] if quick else []
    attention = ["--attn_implementation", "flash_attention_2"] if gpu and is_flash_attn_2_available() else []
    runs = [["ffn_speed.py", *common, *rounds, *(["--no-compile"] if quick else [])]]
    for batch, length in (GPU_SHAPES if gpu else CPU_SHAPES)[: 1 if quick else None]:
        # What takes a processor a minute a round says enough in two.
        few = ["--rounds", "2" if length > 4096 else "5"] if not gpu and length > 1024 else []
        shape = ["--batch", str(batch), "--length", str(length)]
        runs.append(["encoder_speed.py", *common, *(rounds or few), *attention, *shape])
    if data_dir:
        for rows in REAL_ROWS[: 1 if quick else None]:
            number = ["--num_batches", "1" if not gpu or "squad" in rows else "4"]
            batch = ["--batch", "64" if gpu or "sst2" in rows else "16"]
            few = [] if gpu else ["--rounds", "5"]
            file = str(Path(data_dir, rows).resolve())
            runs.append(["encoder_speed.py", *common, *(rounds or few), *attention, "--rows", file, *batch, *number])
    if not quick:
        if not gpu:
            half = [*to, "--dtype", "bfloat16"]
            if multiplies_in(torch.bfloat16):
                runs.append(["ffn_speed.py", *half, "--no-compile"])
                runs.append(["encoder_speed.py", *half])
            else:  # such a processor takes seconds for each product
                runs.append(["ffn_speed.py", *half, "--rounds", "3", "--tokens", "256", "--no-compile"])
                runs.append(["encoder_speed.py", *half, "--rounds", "3", "--batch", "2", "--length", "128"])
        runs.append(["ffn_speed.py", *common, "--rounds", "5", "--sweep"])
        runs.append(["encoder_speed.py", *common, *([] if gpu else ["--rounds", "5"]), "--compile"])
    for size in ("nano", "tiny") if gpu else ("nano",):
        step = ["training_speed.py", *common, *rounds, *attention, "--config", str(CONFIGS / size)]
        runs.append([*step, *(["--rows", "64", "--row_length", "1024"] if gpu else [])])
        runs.append([*step, "--fine_tuning", "--rows", "256" if gpu else "32"])
    if not quick:
        for size in ("tiny", "medium", "base", "large"):
            step = ["recipe_speed.py", *common, *attention, "--recipe", str(CONFIGS / "pretraining" / f"{size}.json")]
            runs.append([*step, *([] if gpu else ["--rows", "1", "--rounds", "2"])])
        runs.append(["tuner_speed.py", *common, "--rounds", "9" if gpu else "3"])
        runs.append(["callback_speed.py", *common])
        if not gpu:
            runs.append(["export_speed.py", *common])
    runs.append(["memory.py", *common, "--batch", "64" if gpu else "2", "--length", "512"])
    return sorted(runs, key=lambda run: "8192" in run)  # the longest last


def run_all(runs: list[list[str]], results: Path) -> list[str]:
    """Run the command lines that an interrupted run into the same file has not done yet; those that fail."""
    unfinished = results.with_suffix(".unfinished")  # a line for each that is done
    done = unfinished.read_text().splitlines() if unfinished.is_file() else []
    if done:
        print(f"Going on with a run of which {len(done)} of {len(runs)} are done; without {unfinished} all begin anew.")
    failed = []
    results.parent.mkdir(parents=True, exist_ok=True)
    for command in runs:
        line = " ".join(command)
        if line in done:
            continue
        print(f"\n$ python benchmarks/{line}", flush=True)
        if subprocess.run([sys.executable, str(FOLDER / command[0]), *command[1:]], cwd=REPOSITORY).returncode:
            failed.append(line)
            continue
        with unfinished.open("a") as file:
            file.write(line + "\n")
    if not failed:
        unfinished.unlink()
    return failed


def plot(results: dict[str, dict], file: Path) -> None:
    """FFN by way of computing it, whole encoders, cost against the number of experts: as far as they were run."""
    try:
        import matplotlib
    except ImportError:
        print("No plot without matplotlib: pip install 'modernalbert[plots]'.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sections = {name: section["results"] for name, section in results.items()}
    sweeps = {name: rows for name, rows in sections.items() if name.startswith("ffn_sweep_")}
    bars = {
        "FFN, forward: ratio to the plain FFN": {
            name.removeprefix("ffn_"): values["forward"]
            for name, values in sections.items()
            if name.startswith("ffn_") and name not in sweeps
        },
        "Encoder: ratio to ModernBERT of its shape": {
            name.removeprefix("encoder_"): values["against_modernbert"]
            for name, values in sections.items()
            if name.startswith("encoder_")
        },
    }
    bars = {title: rows for title, rows in bars.items() if rows}
    count = len(bars) + len(sweeps)
    if not count:
        return
    figure, axes = plt.subplots(1, count, figsize=(6 * count, 4.6), layout="constrained", squeeze=False)
    for axis, (title, rows) in zip(axes[0], bars.items()):
        draw_bars(axis, title, rows)
    for axis, (name, values) in zip(axes[0][len(bars) :], sweeps.items()):
        draw_sweep(axis, name.removeprefix("ffn_sweep_"), values["num_experts"])
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_bars(axis, title: str, rows: dict[str, dict[str, dict[str, float]]]) -> None:
    """One group of bars for each row of ratios but the baseline's, which is a line; a bar cut off has its number."""
    from matplotlib import colormaps

    width = 0.8 / len(rows)
    names = list(dict.fromkeys(name for values in rows.values() for name in values))[1:]
    for i, (row, values) in enumerate(rows.items()):
        ratios = {names.index(name): value["ratio"] for name, value in values.items() if name in names}
        places = [place + (i - (len(rows) - 1) / 2) * width for place in ratios]
        drawn = axis.bar(places, ratios.values(), width, label=row, color=colormaps["tab20"](i % 20))
        for bar, ratio in zip(drawn, ratios.values()):
            if ratio > TOP:
                place = (bar.get_x() + width / 2, TOP)
                axis.annotate(f"{ratio:.1f}", place, ha="center", va="top", color="w", fontsize=7, rotation=90)
    axis.axhline(1, color="grey", linestyle=":")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_ylim(top=min(TOP, 1.4 * axis.get_ylim()[1]))  # room for the legend
    axis.set_title(title)
    axis.legend(fontsize=7, ncols=1 + len(rows) // 4, loc="upper left")


def draw_sweep(axis, dtype: str, rows: dict[str, dict]) -> None:
    """Cost against the number of experts, a line for each backend and pass."""
    for kind, values in next(iter(rows.values())).items():
        for backend in values:
            line = {int(number): row[kind][backend]["ratio"] for number, row in rows.items()}
            axis.plot(list(line), list(line.values()), marker="o", label=f"{backend}, {kind}")
    axis.set(xscale="log", xlabel="experts", title=f"FFN, {dtype}: ratio to the plain FFN by number of experts")
    axis.set_xticks([int(number) for number in rows], list(rows))
    axis.minorticks_off()
    axis.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modernalbert.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes")
    parser.add_argument("--device", type=available_device, default=default_device(), help="cpu or cuda")
    parser.add_argument("--data_dir", help="also the lengths of real texts, from this folder")
    parser.add_argument("--output_dir", help="where <device>.json and <device>.png go")
    arguments = parser.parse_args()
    if arguments.data_dir:
        missing = [rows for rows in REAL_ROWS if not Path(arguments.data_dir, rows).is_file()]
        if missing:
            raise UserError(f"--data_dir {arguments.data_dir} has no {', '.join(missing)}.")
    output_dir = Path(arguments.output_dir or ("outputs/benchmarks" if arguments.quick else RESULTS_FOLDER)).resolve()
    file = output_dir / f"{device_name(arguments.device)}.json"
    failed = run_all(commands(arguments.quick, arguments.device, arguments.data_dir, output_dir), file)
    if file.is_file():
        plot(json.loads(file.read_text()), file.with_suffix(".png"))
        print(f"\nResults and plot: {file.with_suffix('')}.json, .png")
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    run(main)
