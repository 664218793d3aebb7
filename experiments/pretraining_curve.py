# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Log and curve of a pretraining run that ended in a decay.

    python experiments/pretraining_curve.py --run_dir outputs/nano-decayed --tokens_per_step 4096 \\
        --output_file experiments/results/nano_pretraining.json

Writes the JSON file and, beside it, a plot with the same name in PNG: losses by tokens, and speed. Hours are
counted at the median speed, so that pauses do not count.
"""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run


TRAINING_TERMS = {"mlm_loss": "masked words", "hidden_loss": "hidden states", "pooled_loss": "pooled sentences"}


@dataclass
class CurveArguments:
    """The run, and where its log goes."""

    run_dir: str = field(metadata={"help": "Output folder of run_pretraining.py."})
    tokens_per_step: int = field(metadata={"help": "Rows of a step times tokens of a row."})
    output_file: str = field(metadata={"help": "JSON file to write; the plot lies beside it."})
    hardware: str = field(default="", metadata={"help": "What it ran on, in words."})


def read_log(arguments: CurveArguments) -> dict:
    """Read `trainer_state.json` and `all_results.json` of a finished run."""
    folder = Path(arguments.run_dir)
    try:
        state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
        results = json.loads((folder / "all_results.json").read_text("utf-8"))
    except OSError as error:
        raise UserError(f"--run_dir {folder}: {error.filename} is missing: the run has not ended.") from None
    lines = state["log_history"]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    tokens, median = state["global_step"] * arguments.tokens_per_step, statistics.median(speeds)
    return {
        "hardware": arguments.hardware,
        "tokens_per_step": arguments.tokens_per_step,
        "steps": state["global_step"],
        "tokens": tokens,
        "median_tokens_per_second": median,
        "hours_at_the_median_speed": tokens / median / 3600,
        "all_results.json": results,
        "log": [{name: round(value, 5) for name, value in line.items()} for line in lines if "train_loss" not in line],
    }


def plot(log: dict, file: Path) -> None:
    """Draw the losses of training and of held-out text, and the speed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, distances, speed) = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    for axis, names in ((losses, ("mlm_loss",)), (distances, ("hidden_loss", "pooled_loss"))):
        for colour, name in zip(("#0072B2", "#D55E00"), names):
            for prefix, style in (("", {"linewidth": 0.8, "alpha": 0.5}), ("eval_", {"marker": "o", "markersize": 3})):
                points = [line for line in log["log"] if prefix + name in line]
                millions = [line["step"] * log["tokens_per_step"] / 1e6 for line in points]
                label = f"{TRAINING_TERMS[name]}, {'held-out text' if prefix else 'training'}"
                axis.plot(millions, [line[prefix + name] for line in points], color=colour, label=label, **style)
    losses.set_ylabel("cross-entropy (nats per masked word)")
    losses.set_ylim(top=7)
    distances.set_ylabel("1 - cosine to the teacher")
    points = [line for line in log["log"] if "tokens_per_second" in line]
    millions = [line["step"] * log["tokens_per_step"] / 1e6 for line in points]
    speed.plot(millions, [line["tokens_per_second"] for line in points], color="#009E73", linewidth=0.8)
    speed.set_ylabel("tokens per second")
    speed.set_ylim(bottom=0)
    for axis in (losses, distances, speed):
        axis.set_xlabel("million tokens")
        axis.grid(alpha=0.3)
    for axis in (losses, distances):
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    (arguments,) = parse_arguments(CurveArguments, description=__doc__)
    log = read_log(arguments)
    file = Path(arguments.output_file)
    file.write_text(json.dumps(log, indent=0) + "\n", "utf-8")
    plot(log, file.with_suffix(".png"))
    print(f"Written to {file} and {file.with_suffix('.png')}")


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
