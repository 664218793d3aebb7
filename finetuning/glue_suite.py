# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Several tasks and seeds, one run after another, and one table of them all."""

import copy
import gc
import json
import logging
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import TrainingArguments

from modernalbert.cli.errors import UserError, error_message
from modernalbert.cli.markdown import markdown_table
from modernalbert.data.glue_tasks import GLUE_TASKS, Task
from modernalbert.data.sentences import files_of_task, infer_task
from modernalbert.finetuning.arguments import ModelArguments, TaskDataArguments
from modernalbert.finetuning.checkpoint import read_checkpoint
from modernalbert.finetuning.glue_recipes import FROM_MNLI, apply_recipe
from modernalbert.finetuning.run_folder import (
    SETTINGS_FILE,
    check_settings,
    diff_settings,
    remove_earlier_run,
    run_inputs,
    save_settings,
)
from modernalbert.finetuning.task_run import OUTPUT_FILES, check_run, check_splits


logger = logging.getLogger(__name__)

ALL_TASKS = "all"
# The training arguments that decide the outcome of a run; model, rows and batch size do too.
TRAINING_SETTINGS = (
    "learning_rate",
    "weight_decay",
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "train_sampling_strategy",
    "label_smoothing_factor",
    "max_grad_norm",
    "bf16",
    "fp16",
    "do_train",
    "eval_strategy",
    "eval_steps",
    "load_best_model_at_end",
    "metric_for_best_model",
    "seed",
)


@dataclass(frozen=True, eq=False)
class Run:
    """
    A task with a seed.

    Attributes:
        folder: Where it is written: TASK/seed-SEED in the suite's output folder.
        arguments: What `run_glue.run` is given.
        settings: All that decides its outcome.
    """

    task: Task
    seed: int
    folder: Path
    arguments: tuple[ModelArguments, TaskDataArguments, TrainingArguments]
    settings: dict

    @property
    def results(self) -> dict[str, float] | None:
        """The metrics it measured with these settings; `None` until it is finished."""
        file = self.folder / "all_results.json"
        if not (file.is_file() and (self.folder / SETTINGS_FILE).is_file()):
            return None
        return None if diff_settings(self.folder, self.settings) else json.loads(file.read_text())

    def __str__(self):
        return f"{self.task.name} with seed {self.seed}"


def run_suite(
    run_task: Callable[[ModelArguments, TaskDataArguments, TrainingArguments], dict[str, float]],
    model_arguments: ModelArguments,
    data_arguments: TaskDataArguments,
    training_arguments: TrainingArguments,
    command: str,
) -> None:
    """
    Run every task with every seed, each in a folder of its own, and write the table of what is finished after each.

    Finished runs are kept, unfinished ones continue. A run that fails does not stop the others: the failures are named
    at the end. (In several processes only a `UserError`, which they all meet, is that harmless.) A finished run's
    checkpoints are deleted: its folder holds the model.

    Args:
        run_task: `run_glue.run`.
        data_arguments: run_glue's, with `task_name` "all" or with `seeds`.
        command: The command line, for the table.

    Raises:
        UserError: before anything starts, if it cannot work, or a run in the output folder had other settings; at the
            end, if runs failed.
    """
    check_run(data_arguments, training_arguments)
    read_checkpoint(model_arguments)
    runs = plan_runs(model_arguments, data_arguments, training_arguments)
    output_dir, overwrite = Path(training_arguments.output_dir), data_arguments.overwrite_output_dir
    if not overwrite:
        for run in runs:
            check_settings(run.folder, run.settings)
    training_arguments.distributed_state.wait_for_everyone()  # all have looked before one writes

    is_first_process = training_arguments.process_index == 0
    failures: dict[Run, str] = {}
    for number, run in enumerate(runs, start=1):
        kept = not overwrite and run.results is not None
        logger.warning(f"Run {number} of {len(runs)}: {run}{': finished before' if kept else ''}.")
        if kept:
            continue
        if is_first_process:
            if overwrite:
                remove_earlier_run(run.folder, OUTPUT_FILES)
            save_settings(run.folder, run.settings)
        try:
            check_start(run, runs)
            run_task(*run.arguments)
        except Exception as error:
            if not isinstance(error, UserError):
                if training_arguments.world_size > 1:
                    raise  # the other processes wait in the middle of a step
                logger.exception(f"{run} failed.")
            failures[run] = error_message(error).rstrip(".")
        gc.collect()  # a Trainer refers to itself
        training_arguments.distributed_state.wait_for_everyone()
        if is_first_process:
            if run not in failures:
                remove_earlier_run(run.folder, ("checkpoint-*",))
            write_table(runs, output_dir, command)
    if is_first_process:
        rows = write_table(runs, output_dir, command)
        collect_submission(runs, output_dir / "submission")
        if rows:
            plot(rows, output_dir / "results.png")
            print((output_dir / "results.md").read_text())
    if failures:
        message = "; ".join(f"{run}: {sentence}" for run, sentence in failures.items())
        raise UserError(f"{len(failures)} of {len(runs)} runs failed ({message}); the same command goes on with them.")


# --- what to run -----------------------------------------------------------------------------------------------------


def plan_runs(
    model_arguments: ModelArguments, data_arguments: TaskDataArguments, training_arguments: TrainingArguments
) -> list[Run]:
    """List the runs in their order, checked as far as that needs no weights."""
    seeds = data_arguments.seeds or [training_arguments.seed]
    if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))} is not allowed: they must differ, and be 0 or more.")
    name = data_arguments.task_name
    if name == ALL_TASKS:
        tasks = [GLUE_TASKS[task] for task in tasks_with_rows(data_arguments, training_arguments)]
    elif name is None:
        file = data_arguments.train_file or data_arguments.validation_file
        if file is None:
            raise UserError("--seeds needs --task_name, or --train_file and --validation_file.")
        tasks = [infer_task(file, data_arguments.label_column, data_arguments.text_columns)]
    elif name in GLUE_TASKS:
        tasks = [GLUE_TASKS[name]]
    else:
        raise UserError(f"--task_name {name} is not allowed: it must be one of {', '.join(GLUE_TASKS)}, {ALL_TASKS}.")
    runs = []
    for task in tasks:
        for seed in seeds:
            folder = Path(training_arguments.output_dir) / task.name / f"seed-{seed}"
            data = replace(data_arguments, seeds=None, task_name=task.name if task.name in GLUE_TASKS else None)
            if name == ALL_TASKS and task.name not in FROM_MNLI:
                data.init_from_mnli = None
            elif name == ALL_TASKS and data.init_from_mnli == "":
                data.init_from_mnli = str(folder.parents[1] / "mnli" / folder.name)
            training = copy.copy(training_arguments)  # replace() would work out its defaults once more
            training.seed, training.output_dir = seed, str(folder)
            apply_recipe(training, data.task_name)
            settings = settings_of(model_arguments, data, training)
            runs.append(Run(task, seed, folder, (replace(model_arguments), data, training), settings))
    return runs


def tasks_with_rows(data_arguments: TaskDataArguments, training_arguments: TrainingArguments) -> list[str]:
    """
    Return the names of all tasks, MNLI first, as others may start from it.

    In a folder of data, a task without a sub-folder is left out, and said so; one with a sub-folder must have its rows.
    """
    if data_arguments.train_file or data_arguments.validation_file or data_arguments.test_file:
        raise UserError(f"--task_name {ALL_TASKS} takes its rows from the Hub or from --data_dir, not from one file.")
    names = sorted(GLUE_TASKS, key=lambda task: task != "mnli")
    if data_arguments.data_dir is not None:
        data_dir = Path(data_arguments.data_dir)
        present = [task for task in names if (data_dir / task).is_dir()]
        missing = [task for task in names if task not in present]
        if not present:
            raise UserError(f"--data_dir {data_dir} holds no folder with a task's name, such as {names[0]}.")
        for task in present:
            try:
                check_splits(training_arguments, list(files_of_task(data_dir, GLUE_TASKS[task])))
            except UserError as error:
                raise UserError(f"--data_dir {data_dir}, {task}: {error}") from None
        if missing:
            logger.warning(f"{data_dir} holds no folders {', '.join(missing)}: these tasks are left out.")
        names = present
    if data_arguments.init_from_mnli == "" and "mnli" not in names:
        raise UserError("--init_from_mnli needs the rows of mnli, or a checkpoint.")
    return names


def settings_of(
    model_arguments: ModelArguments, data_arguments: TaskDataArguments, training_arguments: TrainingArguments
) -> dict:
    """Collect all that decides the outcome of a run."""
    values = json.loads(training_arguments.to_json_string())
    parts = training_arguments.world_size * training_arguments.gradient_accumulation_steps
    return (
        run_inputs(model_arguments, data_arguments)
        | {"train_batch_size": training_arguments.per_device_train_batch_size * parts}
        | {name: values.get(name) for name in TRAINING_SETTINGS}
    )


def check_start(run: Run, runs: Sequence[Run]) -> None:
    """Refuse to start from another run's model before that is finished."""
    for other in runs:
        if str(other.folder) == run.arguments[1].init_from_mnli and other.results is None:
            raise UserError(f"it starts from {other}, which is not finished")


# --- what came out ---------------------------------------------------------------------------------------------------


def write_table(runs: Sequence[Run], output_dir: Path, command: str) -> list[dict]:
    """Write the finished runs' table as `results.json` and `results.md`; its rows."""
    rows = table_rows(runs, command)
    (output_dir / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    (output_dir / "results.md").write_text(as_markdown(rows, command))
    return rows


def table_rows(runs: Sequence[Run], command: str) -> list[dict]:
    """Make a row per task, validation set, metric and model: mean and sample deviation over the seeds."""
    rows = []
    for name in dict.fromkeys(run.task.name for run in runs):
        finished = [run for run in runs if run.task.name == name and run.results is not None]
        results = [run.results for run in finished]
        if not finished:
            continue
        task, settings = finished[0].task, finished[0].settings
        places = [
            (kind, part, metric)
            for kind in ("eval", "merged")
            for part in ("", "_matched", "_mismatched")
            for metric in task.metrics
            if f"{kind}{part}_{metric}" in results[0]
        ]
        for kind, part, metric in places:
            scores = [result[f"{kind}{part}_{metric}"] for result in results]
            rows.append(
                {
                    "data": data_name(settings, name) + part.replace("_", ", "),
                    "task": name,
                    "model": Path(settings["model_name_or_path"]).name + (", merged" if kind == "merged" else ""),
                    "metric": metric,
                    "mean": statistics.mean(scores),
                    "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
                    "scores": scores,
                    "seeds": [run.seed for run in finished],
                    "train_rows": results[0].get("train_samples"),
                    "validation_rows": results[0].get(f"eval{part}_samples"),
                    "settings": {key: value for key, value in settings.items() if key != "seed"},
                    "command": command,
                }
            )
    return rows


def data_name(settings: dict, task_name: str) -> str:
    """Name the rows: only those of the Hub are GLUE's."""
    if settings["data_dir"] is not None:
        return f"{Path(settings['data_dir']).name}/{task_name}"
    file = settings["train_file"] or settings["validation_file"]
    return f"GLUE {task_name}" if file is None else Path(file).stem


def task_scores(rows: Sequence[dict]) -> dict[tuple[str, str], float]:
    """Return by task and model the mean of the first metric over the task's validation sets."""
    first: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["task"] not in GLUE_TASKS or row["metric"] == GLUE_TASKS[row["task"]].metrics[0]:
            first.setdefault((row["task"], row["model"]), []).append(row["mean"])
    return {key: statistics.mean(means) for key, means in first.items()}


def as_markdown(rows: Sequence[dict], command: str) -> str:
    """Format the table, with the averages over tasks under it."""
    header = ["data", "model", "metric", "mean", "deviation", "seeds", "rows", "rate", "decay", "epochs", "batch"]
    table = []
    for row in rows:
        settings = row["settings"]
        deviation = "" if row["deviation"] is None else f"{100 * row['deviation']:.1f}"
        counts = " / ".join("" if row[k] is None else f"{row[k]:,}" for k in ("train_rows", "validation_rows"))
        cells = [row["data"], row["model"], row["metric"], f"{100 * row['mean']:.1f}", deviation, len(row["scores"])]
        cells += [counts, settings["learning_rate"], settings["weight_decay"], settings["num_train_epochs"]]
        cells += [settings["train_batch_size"], "yes" if settings["init_from_mnli"] else ""]
        table.append(cells)
    notes = ["Metrics times 100 on the validation rows; the deviation is the sample standard deviation over the seeds;"]
    notes += ["rows are those trained on / judged by."]
    scores = task_scores(rows)
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = {task: score for (task, name), score in scores.items() if name == model and task != "wnli"}
        if len(of_model) > 1:
            average = 100 * statistics.mean(of_model.values())
            notes.append(f"Average of the first metrics of {', '.join(of_model)} ({model}): {average:.1f}.")
    return "\n".join(
        [markdown_table([*header, "from MNLI"], table, num_words=3), "", " ".join(notes), "", f"    {command}", ""]
    )


def collect_submission(runs: Sequence[Run], folder: Path) -> None:
    """Copy the test predictions of each task's best seed on its validation rows into one folder."""
    best: dict[str, tuple[float, Run]] = {}
    for run in runs:
        files = sorted((run.folder / "submission").glob("*.tsv"))
        if run.results is None or not files:
            continue
        scores = [run.results.get(f"eval{part}_{run.task.metrics[0]}") for part in ("", "_matched")]
        score = max((score for score in scores if score is not None), default=0.0)
        if run.task.name not in best or score > best[run.task.name][0]:
            best[run.task.name] = (score, run)
    for _, run in best.values():
        folder.mkdir(parents=True, exist_ok=True)
        for file in (run.folder / "submission").glob("*.tsv"):
            shutil.copy(file, folder / file.name)
    if best:
        logger.warning(f"For GLUE's server, in {folder}: {', '.join(str(run) for _, run in best.values())}.")


def plot(rows: Sequence[dict], file: Path) -> None:
    """Draw a bar per row with a dot per seed; without matplotlib, warn instead."""
    try:
        import matplotlib
    except ImportError:
        logger.warning("No plot without matplotlib: pip install 'modernalbert[plots]'.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axis = plt.subplots(figsize=(8, 1 + 0.35 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        axis.barh(place, 100 * row["mean"], color=f"C{models.index(row['model'])}")
        axis.plot([100 * score for score in row["scores"]], [place] * len(row["scores"]), "k.")
    axis.set_yticks(range(len(rows)), [f"{row['data']}: {row['metric']}" for row in rows])
    axis.invert_yaxis()
    axis.set(title="Mean over the seeds, each a dot", xlabel="metric × 100")
    axis.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=f"C{i}", label=model) for i, model in enumerate(models)],
        loc="lower right",
    )
    figure.savefig(file, dpi=120)
    plt.close(figure)
