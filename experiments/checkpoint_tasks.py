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
What a checkpoint is worth after fine-tuning: it, its teacher, its size from random weights, and what needs no model.

    python experiments/checkpoint_tasks.py --models nano=outputs/nano-decayed teacher=$TEACHER random=configs/nano \\
        --tasks sst2=$DATA_DIR/sst2 mnli=$DATA_DIR/sick_nli --seeds 0 1 2 --output_dir outputs/checkpoint-tasks

Every model runs on every task: `run_glue.py` with the settings below, chosen once for all of them. The figure is that
of the last epoch: the validation rows choose nothing. Beside them, on the same rows, the baselines of
`evaluation/text_baselines.py`. The same model without experts is one more folder, which `merge_experts.py` writes.

`results.json` holds figures and commands, for `experiments/task_table.py`; the values of the environment variables
DATA_DIR and TEACHER are written as their names. Stop it when you like; run it again and it continues.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset

from modernalbert.command_line import UserError, parse_arguments, run
from modernalbert.evaluation.glue import GLUE_TASKS, Task, compute_metrics
from modernalbert.evaluation.text_baselines import majority, tfidf
from modernalbert.training.task_files import load_task_file


RUN_GLUE = Path(__file__).parents[1] / "run_glue.py"
SETTINGS = "--learning_rate 2e-4 --weight_decay 0 --num_train_epochs 3 --per_device_train_batch_size 32".split()
SETTINGS += "--load_best_model_at_end False --save_strategy no".split()
BASELINES: dict[str, Callable[[Task, Dataset, Dataset], np.ndarray | None]] = {"majority": majority, "tfidf": tfidf}


@dataclass
class TasksArguments:
    """Which models on which tasks."""

    tasks: list[str] = field(metadata={"help": "TASK=FOLDER, a GLUE task's name and train.jsonl, validation.jsonl."})
    output_dir: str = field(metadata={"help": "Where runs and results.json go."})
    models: list[str] = field(
        default_factory=list, metadata={"help": "NAME=FOLDER, any encoder; a configuration alone = random weights."}
    )
    baselines: list[str] = field(
        default_factory=lambda: list(BASELINES), metadata={"help": f"Of {', '.join(BASELINES)}; none for none."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One run of each model for each."})


def named(option: str, pairs: list[str]) -> dict[str, str]:
    """NAME=VALUE pairs as a dictionary."""
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--{option} {pair} is not allowed: it must be NAME=FOLDER.")
    return dict(pair.split("=", 1) for pair in pairs)


def portable(words: list[str]) -> str:
    """A command line in which folders of this machine are named as the documentation names them."""
    line = shlex.join(words)
    for name in ("DATA_DIR", "TEACHER"):
        if os.environ.get(name):
            line = line.replace(os.environ[name], f"${name}")
    return line


def files_of(folder: str) -> dict[str, str]:
    """Training and validation rows in a folder."""
    return {split: str(Path(folder, f"{split}.jsonl")) for split in ("train", "validation")}


def glue_command(model: str, task: str, folder: str, seed: int, output_dir: Path) -> list[str]:
    """The command line of one run, without the interpreter."""
    files = [f"--{split}_file={file}" for split, file in files_of(folder).items()]
    command = ["run_glue.py", "--model_name_or_path", model, "--task_name", task, *files, *SETTINGS]
    return [*command, "--seed", str(seed), "--output_dir", str(output_dir)]


def run_model(command: list[str], run_dir: Path) -> dict[str, float]:
    """What a run measured, after the run if there is none yet."""
    if not (run_dir / "all_results.json").is_file():
        with Path(f"{run_dir}.log").open("w") as log:
            done = subprocess.run([sys.executable, str(RUN_GLUE), *command[1:]], stdout=log, stderr=log)
        if done.returncode:
            raise UserError(f"{shlex.join(command)} failed: see {run_dir}.log.")
    return json.loads((run_dir / "all_results.json").read_text())


def run_baseline(name: str, task: str, folder: str, file: Path) -> dict[str, float]:
    """A baseline's metrics under the names of a run's; empty if it has nothing to say about the task."""
    if not file.is_file():
        rows = {split: load_task_file(path, GLUE_TASKS[task]) for split, path in files_of(folder).items()}
        predictions = BASELINES[name](GLUE_TASKS[task], rows["train"], rows["validation"])
        metrics = {}
        if predictions is not None:
            metrics = compute_metrics(GLUE_TASKS[task], predictions, np.array(rows["validation"]["label"]))
            metrics = {f"eval_{metric}": value for metric, value in metrics.items()}
            metrics |= {"train_samples": len(rows["train"]), "eval_samples": len(rows["validation"])}
        file.write_text(json.dumps(metrics, indent=2) + "\n")
    return json.loads(file.read_text())


def table_rows(task: str, folder: str, model: str, results: list[dict], seeds: list[int], command: str) -> list[dict]:
    """A row for each metric of the task."""
    rows = []
    for metric in GLUE_TASKS[task].metrics:
        scores = [measured[f"eval_{metric}"] for measured in results]
        rows.append(
            {
                "data": Path(folder).name,
                "task": task,
                "model": model,
                "metric": metric,
                "mean": statistics.mean(scores),
                "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
                "scores": scores,
                "seeds": seeds,
                "train_rows": results[0]["train_samples"],
                "validation_rows": results[0]["eval_samples"],
                "command": command,
            }
        )
    return rows


def main() -> None:
    (arguments,) = parse_arguments(TasksArguments, description=__doc__)
    models, tasks = named("models", arguments.models), named("tasks", arguments.tasks)
    for task in tasks:
        if task not in GLUE_TASKS:
            raise UserError(f"--tasks {task} is not allowed: it must be one of {', '.join(GLUE_TASKS)}.")
    baselines = [] if arguments.baselines == ["none"] else arguments.baselines
    for name in baselines:
        if name not in BASELINES:
            raise UserError(f"--baselines {name} is not allowed: it must be one of {', '.join(BASELINES)}, or none.")
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    results = []

    def keep(rows: list[dict]) -> None:
        results.extend(rows)
        (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        for row in rows:
            print(f"{row['data']:10s} {row['model']:10s} {100 * row['mean']:5.1f} {row['metric']}", flush=True)

    for task, folder in tasks.items():
        place = f"{task}-{Path(folder).name}"
        for name in baselines:
            words = ["experiments/checkpoint_tasks.py", "--tasks", f"{task}={folder}", "--baselines", name]
            measured = run_baseline(name, task, folder, output_dir / f"{place}-{name}.json")
            if measured:
                command = portable([*words, "--output_dir", arguments.output_dir])
                keep(table_rows(task, folder, name, [measured], [], command))
        for name, model in models.items():
            commands = [
                glue_command(model, task, folder, seed, output_dir / f"{place}-{name}-{seed}")
                for seed in arguments.seeds
            ]
            measured = [run_model(words, Path(words[-1])) for words in commands]
            keep(table_rows(task, folder, name, measured, arguments.seeds, portable(commands[0])))


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
