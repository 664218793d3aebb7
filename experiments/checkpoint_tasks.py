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
What a checkpoint is worth after fine-tuning: it, its teacher, and its size from random weights, all the same way.

    python experiments/checkpoint_tasks.py --models nano=outputs/nano-decayed teacher=$TEACHER random=configs/nano \\
        --tasks sst2=$DATA_DIR/sst2 mnli=$DATA_DIR/sick_nli --output_dir outputs/checkpoint-tasks

Every model runs on every task: `run_glue.py` with the settings below, chosen once for all of them. The figure is that
of the last epoch: the validation rows choose nothing. `results.json` holds figures and commands. Stop it when you
like; run it again and it continues.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from modernalbert.command_line import UserError, parse_arguments, run
from modernalbert.evaluation.glue import GLUE_TASKS


RUN_GLUE = Path(__file__).parents[1] / "run_glue.py"
SETTINGS = "--learning_rate 2e-4 --num_train_epochs 3 --load_best_model_at_end False --save_strategy no".split()


@dataclass
class TasksArguments:
    """Which models on which tasks."""

    models: list[str] = field(metadata={"help": "NAME=FOLDER, any encoder; a configuration alone = random weights."})
    tasks: list[str] = field(metadata={"help": "TASK=FOLDER, a GLUE task's name and train.jsonl, validation.jsonl."})
    output_dir: str = field(metadata={"help": "Where runs and results.json go."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One run for each."})


def named(option: str, pairs: list[str]) -> dict[str, str]:
    """NAME=VALUE pairs as a dictionary."""
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--{option} {pair} is not allowed: it must be NAME=FOLDER.")
    return dict(pair.split("=", 1) for pair in pairs)


def glue_command(model: str, task: str, folder: str, seed: int, output_dir: Path) -> list[str]:
    """The command line of one run, without the interpreter."""
    files = [f"--{split}_file={Path(folder, split).with_suffix('.jsonl')}" for split in ("train", "validation")]
    command = ["run_glue.py", "--model_name_or_path", model, "--task_name", task, *files, *SETTINGS]
    return [*command, "--seed", str(seed), "--output_dir", str(output_dir)]


def main() -> None:
    (arguments,) = parse_arguments(TasksArguments, description=__doc__)
    models, tasks = named("models", arguments.models), named("tasks", arguments.tasks)
    for task in tasks:
        if task not in GLUE_TASKS:
            raise UserError(f"--tasks {task} is not allowed: it must be one of {', '.join(GLUE_TASKS)}.")
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for task, folder in tasks.items():
        for name, model in models.items():
            scores, metric = [], GLUE_TASKS[task].metrics[0]
            for seed in arguments.seeds:
                run_dir = output_dir / f"{task}-{Path(folder).name}-{name}-{seed}"
                words = glue_command(model, task, folder, seed, run_dir)
                if not (run_dir / "all_results.json").is_file():
                    with (output_dir / f"{run_dir.name}.log").open("w") as log:
                        done = subprocess.run([sys.executable, str(RUN_GLUE), *words[1:]], stdout=log, stderr=log)
                    if done.returncode:
                        raise UserError(f"{' '.join(words)} failed: see {output_dir / run_dir.name}.log.")
                measured = json.loads((run_dir / "all_results.json").read_text())
                scores.append(measured[f"eval_{metric}"])
            results.append(
                {
                    "task": task,
                    "data": Path(folder).name,
                    "model": name,
                    "metric": metric,
                    "mean": statistics.mean(scores),
                    "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
                    "scores": scores,
                    "train_rows": measured["train_samples"],
                    "validation_rows": measured["eval_samples"],
                    "command": " ".join(words),
                }
            )
            (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
            print(f"{Path(folder).name:10s} {name:10s} {100 * statistics.mean(scores):5.1f} {metric}")


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
