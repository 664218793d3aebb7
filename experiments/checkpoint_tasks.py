# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Evaluation of a checkpoint on tasks, beside its teacher, its size from random weights, and baselines without a model.

    python experiments/checkpoint_tasks.py --models nano=outputs/nano-decayed teacher=$TEACHER random=configs/nano \\
        --tasks sst2=$DATA_DIR/sst2 mnli=$DATA_DIR/sick_nli squad=$DATA_DIR/squad_v2 \\
                retrieval=outputs/retrieval-sets/wikipedia_leads --seeds 0 1 2 --output_dir outputs/checkpoint-tasks

Every model runs on every task, by the task's script with settings chosen once for all models. A task is

    a GLUE task's name   run_glue.py on train.jsonl and validation.jsonl; beside it the commonest label, and TF-IDF
    NAME-probe           the same with embedding_probe.py, where NAME is a classification: logistic regression on
                         embeddings as they are
    ner                  run_ner.py on train.jsonl, validation.jsonl and test.jsonl
    squad                run_squad.py on train.json and validation.json; beside it no answer to any question
    squad-answers        a model that `squad` left, made to answer each question, judged by those that have an answer
    retrieval            run_retrieval.py on a folder in BEIR's form: fine-tuned on its training pairs; beside it BM25
    search               the same, nothing fine-tuned
    similarity           embedding_similarity.py on validation.jsonl and test.jsonl: embeddings as they are; beside it
                         the cosine of TF-IDF vectors

Figures are those of the last epoch: the validation rows choose nothing (but SQuAD's threshold for no answer, which is
found on them). The same model without experts is one more folder, which `merge_experts.py` writes.

`results.json` holds figures and commands, for `experiments/document_tables.py`; the values of the environment variables
DATA_DIR and TEACHER are written as their names. Stop it when you like; run it again and it continues. Other models and
tasks can follow in other runs: `results.json` has them all, of each model, set and metric the last.
"""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from datasets import Dataset

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, error_message, run
from modernalbert.data.beir import load_retrieval_set
from modernalbert.data.glue_tasks import GLUE_TASKS, Task
from modernalbert.data.sentences import load_task_file
from modernalbert.data.squad import read_squad
from modernalbert.evaluation.glue import compute_metrics
from modernalbert.evaluation.squad import squad_metrics
from modernalbert.experiments.text_baselines import majority, tfidf


REPOSITORY = Path(__file__).parents[1]
# In bfloat16: a processor that does not multiply in it warns, and gives the same figures more slowly.
FINE_TUNING = "--load_best_model_at_end False --weight_decay 0 --bf16 --attn_implementation eager"


@dataclass(frozen=True)
class Experiment:
    """
    How the models are compared on a folder of data.

    Attributes:
        options: Of the script, beside model and output folder; {folder} is the data's.
        scores: What the script's `all_results.json` says, 1 at best, by metric.
        baselines: By name, what gives the same of a folder without a model; empty if it has nothing to say about it.
        num_rows: (trained on, judged by), from a folder; None where it is not one number.
        is_trained: Whether chance plays a part, so that seeds make a difference.
        suffix: Of the data's name in the table.
    """

    script: str
    options: str
    scores: Callable[[dict[str, float], Path], dict[str, float]]
    baselines: dict[str, Callable[[Path], dict[str, float]]]
    num_rows: Callable[[Path], tuple[int | None, int | None]]
    is_trained: bool = True
    suffix: str = ""


# --- sentences and pairs ---------------------------------------------------------------------------------------------

GLUE_SETTINGS = f"--per_device_train_batch_size 32 {FINE_TUNING} --save_strategy no"
# Learning rate and epochs. CoLA gets as many epochs as ModernBERT gives it; RTE, which 2e-4 overfits at once, its rate;
# SST-2 has 67,349 rows, of which many are parts of others.
RATE_AND_EPOCHS = {"cola": ("2e-4", 5), "rte": ("5e-5", 3), "sst2": ("2e-4", 1)}
Baseline = Callable[[Task, Dataset, Dataset], np.ndarray | None]


def glue_rows(name: str, folder: Path) -> tuple[Dataset, Dataset]:
    train, validation = (load_task_file(str(folder / f"{s}.jsonl"), GLUE_TASKS[name]) for s in ("train", "validation"))
    return train, validation


def glue(name: str) -> Experiment:
    task = GLUE_TASKS[name]
    rate, epochs = RATE_AND_EPOCHS.get(name, ("2e-4", 3))

    def baseline(predict: Baseline) -> Callable[[Path], dict[str, float]]:
        def scores(folder: Path) -> dict[str, float]:
            train, validation = glue_rows(name, folder)
            predictions = predict(task, train, validation)
            if predictions is None:
                return {}
            return compute_metrics(task, predictions, np.array(validation["label"]))

        return scores

    return Experiment(
        "run_glue.py",
        f"--task_name {name} --train_file={{folder}}/train.jsonl --validation_file={{folder}}/validation.jsonl "
        f"--learning_rate {rate} --num_train_epochs {epochs} {GLUE_SETTINGS} --seed {{seed}}",
        lambda results, folder: {metric: results[f"eval_{metric}"] for metric in task.metrics},
        {"majority": baseline(majority), "tfidf": baseline(tfidf)},
        lambda folder: tuple(len(rows) for rows in glue_rows(name, folder)),
    )


def probe(name: str) -> Experiment:
    return replace(
        glue(name),
        script="experiments/embedding_probe.py",
        options=f"--task_name {name} --train_file={{folder}}/train.jsonl --validation_file={{folder}}/validation.jsonl",
        is_trained=False,
        suffix=", frozen embeddings",
    )


# --- entities --------------------------------------------------------------------------------------------------------

NER = Experiment(
    "run_ner.py",
    "--train_file {folder}/train.jsonl --validation_file {folder}/validation.jsonl --test_file {folder}/test.jsonl "
    f"--learning_rate 3e-4 --num_train_epochs 3 --per_device_train_batch_size 32 {FINE_TUNING} --save_strategy no "
    "--seed {seed}",
    lambda results, folder: {"f1": results["eval_f1"], "test_f1": results["test_f1"]},
    {},
    lambda folder: tuple(num_lines(folder / f"{split}.jsonl") for split in ("train", "validation")),
    suffix=", entities",
)


def num_lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


# --- question answering ----------------------------------------------------------------------------------------------


def squad_scores(results: dict[str, float], folder: Path) -> dict[str, float]:
    return {metric: results[f"eval_{metric}"] / 100 for metric in ("f1", "exact")}


def no_answer(folder: Path) -> dict[str, float]:
    """Silence, the best that can be said without reading where most questions have no answer."""
    questions = read_squad(str(folder / "validation.json"))
    metrics = squad_metrics(questions, {question.id: "" for question in questions})
    return {metric: metrics[metric] / 100 for metric in ("f1", "exact")}


SQUAD = Experiment(
    "run_squad.py",
    "--train_file {folder}/train.json --validation_file {folder}/validation.json --learning_rate 3e-4 "
    f"--num_train_epochs 3 --per_device_train_batch_size 16 {FINE_TUNING} --seed {{seed}}",
    squad_scores,
    {"no answer": no_answer},
    lambda folder: tuple(len(read_squad(str(folder / f"{split}.json"))) for split in ("train", "validation")),
)


def num_answerable(folder: Path) -> tuple[int, int]:
    train, validation = (read_squad(str(folder / f"{split}.json")) for split in ("train", "validation"))
    return len(train), sum(bool(question.answers) for question in validation)


# No odds are above 1,000: silence is never chosen.
ANSWERS = Experiment(
    "run_squad.py",
    "--no_do_train --validation_file {folder}/validation.json --null_score_diff_threshold 1000 --seed {seed}",
    lambda results, folder: {"f1": results["eval_HasAns_f1"] / 100},
    {},
    num_answerable,
    is_trained=False,
    suffix=", answerable ones, never silent",
)


# --- retrieval -------------------------------------------------------------------------------------------------------


def retrieval_scores(results: dict[str, float], folder: Path) -> dict[str, float]:
    return {"ndcg_at_10": results[f"{folder.name}_ndcg_at_10"]}


def bm25(folder: Path) -> dict[str, float]:
    try:
        from modernalbert.evaluation.retrieval import evaluate_ranking, search_bm25
    except ImportError as error:
        needed = "python -m pip install -c constraints.txt -e '.[retrieval]'"
        raise UserError(f"--baselines bm25 needs {error.name}: {needed}") from None
    data = load_retrieval_set(str(folder), "test")
    ranking = search_bm25(list(data.queries.values()), data.corpus)
    return {"ndcg_at_10": evaluate_ranking(data, ranking)["ndcg_at_10"]}


def num_pairs(folder: Path) -> int:
    """Relevant documents of training queries, as many as are trained on."""
    qrels = load_retrieval_set(str(folder), "train").qrels
    return min(4000, sum(relevance > 0 for documents in qrels.values() for relevance in documents.values()))


def num_queries(folder: Path) -> int:
    return len(load_retrieval_set(str(folder), "test").queries)


RETRIEVAL = Experiment(
    "run_retrieval.py",
    "--train_folder {folder} --evaluation_folders {folder} --max_seq_length 256 --learning_rate 2e-4 --weight_decay 0 "
    "--num_train_epochs 5 --per_device_train_batch_size 64 --max_train_samples 4000 --seed {seed}",
    retrieval_scores,
    {"bm25": bm25},
    lambda folder: (num_pairs(folder), num_queries(folder)),
)
SEARCH = Experiment(
    "run_retrieval.py",
    "--no_do_train --evaluation_folders {folder} --max_seq_length 256 --seed {seed}",
    retrieval_scores,
    {"bm25": bm25},
    lambda folder: (0, num_queries(folder)),
    is_trained=False,
    suffix=", not fine-tuned",
)

# --- embeddings as they are ------------------------------------------------------------------------------------------


def tfidf_similarity(folder: Path) -> dict[str, float]:
    train, *judged = (load_task_file(str(folder / f"{s}.jsonl"), GLUE_TASKS["stsb"]) for s in ("train", *JUDGED))
    scores = {}
    for split, rows in zip(JUDGED, judged):
        predictions = tfidf(GLUE_TASKS["stsb"], train, rows)
        metrics = compute_metrics(GLUE_TASKS["stsb"], predictions, np.array(rows["label"]))
        scores[f"{split}_spearman"] = metrics["spearmanr"]
    return scores


JUDGED = ("validation", "test")
SIMILARITY = Experiment(
    "experiments/embedding_similarity.py",
    "--files {folder}/validation.jsonl {folder}/test.jsonl",
    lambda results, folder: {f"{split}_spearman": results[f"{split}_spearman"] for split in JUDGED},
    {"tfidf": tfidf_similarity},
    lambda folder: (None, None),
    is_trained=False,
    suffix=", not fine-tuned",
)

EXPERIMENTS = {name: glue(name) for name in GLUE_TASKS} | {
    **{f"{name}-probe": probe(name) for name, task in GLUE_TASKS.items() if not task.is_regression},
    "ner": NER,
    "squad": SQUAD,
    "squad-answers": ANSWERS,
    "retrieval": RETRIEVAL,
    "search": SEARCH,
    "similarity": SIMILARITY,
}
BASELINES = tuple(dict.fromkeys(name for experiment in EXPERIMENTS.values() for name in experiment.baselines))


# --- the runs --------------------------------------------------------------------------------------------------------


@dataclass
class TasksArguments:
    """Which models on which tasks."""

    tasks: list[str] = field(metadata={"help": f"TASK=FOLDER, TASK one of {', '.join(EXPERIMENTS)}."})
    output_dir: str = field(metadata={"help": "Where runs and results.json go."})
    models: list[str] = field(
        default_factory=list, metadata={"help": "NAME=FOLDER, any encoder; a configuration alone = random weights."}
    )
    baselines: list[str] = field(
        default_factory=lambda: list(BASELINES), metadata={"help": f"Of {', '.join(BASELINES)}; none for none."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One run of each model for each."})


def named(option: str, pairs: list[str]) -> list[tuple[str, str]]:
    """NAME=FOLDER pairs, parted."""
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder) or "/" in name:
            raise UserError(f"--{option} {pair} is not allowed: it must be NAME=FOLDER.")
    return [tuple(pair.split("=", 1)) for pair in pairs]


def portable(words: list[str]) -> str:
    """A command line in which folders of this machine are named as the documentation names them."""
    names = {os.environ[name]: f"${name}" for name in ("DATA_DIR", "TEACHER") if os.environ.get(name)}
    line = []
    for word in words:
        for folder in sorted(names, key=len, reverse=True):
            found = re.fullmatch(f"(|.*=){re.escape(folder)}(|/.*)", word)
            if found:
                quote = '"' if shlex.quote(found[2]) != (found[2] or "''") else ""
                line.append(f"{found[1]}{quote}{names[folder]}{found[2]}{quote}")
                break
        else:
            line.append(shlex.quote(word))
    return " ".join(line)


def check_command(place: Path, command: str, expected: str) -> None:
    """Refuse what another command left behind."""
    if command != expected:
        raise UserError(f"{place} is of another command: delete it, or choose another --output_dir.")


def run_model(command: list[str], run_dir: Path) -> dict[str, float]:
    """What a run measured, after the run if there is none yet. Its log begins with the command."""
    line, log_file = shlex.join(command), Path(f"{run_dir}.log")
    if log_file.is_file():
        check_command(log_file, log_file.read_text().partition("\n")[0], line)
    if not (run_dir / "all_results.json").is_file():
        with log_file.open("w") as log:
            print(line, file=log, flush=True)
            words = [sys.executable, str(REPOSITORY / command[0]), *command[1:]]
            done = subprocess.run(words, stdout=log, stderr=log)
        if done.returncode:
            raise UserError(f"{line} failed: see {log_file}.")
    return json.loads((run_dir / "all_results.json").read_text())


def run_baseline(
    baseline: Callable[[Path], dict[str, float]], command: list[str], folder: Path, file: Path
) -> dict[str, float]:
    """A baseline's scores, kept in a file with the command."""
    line = shlex.join(command)
    kept = json.loads(file.read_text()) if file.is_file() else {}
    if kept:
        check_command(file, kept.get("command", "none that is known"), line)
    else:
        try:
            kept = {"command": line, "scores": baseline(folder)}
        except UserError:
            raise
        except ValueError as error:  # scikit-learn's word on too few rows, or on texts without words
            raise UserError(f"{line} failed: {error_message(error)}") from None
        file.write_text(json.dumps(kept, indent=2) + "\n")
    return kept["scores"]


def table_rows(about: dict[str, object], scores: list[dict[str, float]]) -> list[dict]:
    """A row for each metric, from the scores of each seed."""
    rows = []
    for metric in scores[0]:
        values = [score[metric] for score in scores]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        found = {"metric": metric, "mean": statistics.mean(values), "deviation": deviation, "scores": values}
        rows.append(about | found)
    return rows


def write_rows(file: Path, rows: list[dict]) -> None:
    """Put rows into a file, in the place of those about the same."""
    found = json.loads(file.read_text()) if file.is_file() else []
    by_subject = {(row["data"], row["model"], row["metric"]): row for row in [*found, *rows]}
    places = {task: place for place, task in enumerate(EXPERIMENTS)}
    in_order = sorted(by_subject.values(), key=lambda row: (places.get(row["task"], len(places)), row["data"]))
    file.write_text(json.dumps(in_order, indent=2) + "\n")


def main() -> None:
    (arguments,) = parse_arguments(TasksArguments, description=__doc__)
    models, tasks = named("models", arguments.models), named("tasks", arguments.tasks)
    for name, _ in models:
        if name in BASELINES:
            raise UserError(f"--models {name} is not allowed: a baseline has that name.")
    for task, folder in tasks:
        if task not in EXPERIMENTS:
            raise UserError(f"--tasks {task} is not allowed: it must be one of {', '.join(EXPERIMENTS)}.")
        if not Path(folder).is_dir():
            raise UserError(f"--tasks {task}={folder}: no such folder.")
    baselines = [] if arguments.baselines == ["none"] else arguments.baselines
    for name in baselines:
        if name not in BASELINES:
            raise UserError(f"--baselines {name} is not allowed: it must be one of {', '.join(BASELINES)}, or none.")
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    def keep(rows: list[dict]) -> None:
        write_rows(output_dir / "results.json", rows)
        for row in rows:
            print(f"{row['data']:10s} {row['model']:10s} {100 * row['mean']:5.1f} {row['metric']}", flush=True)

    for task, name in tasks:
        experiment, folder = EXPERIMENTS[task], Path(name)
        data = folder.resolve().name
        place = f"{task}-{data}"
        about = {"data": data + experiment.suffix, "task": task}
        about |= dict(zip(("train_rows", "validation_rows"), experiment.num_rows(folder)))
        for baseline, function in experiment.baselines.items():
            if baseline not in baselines:
                continue
            file = output_dir / f"{place}-{baseline.replace(' ', '-')}.json"
            words = ["experiments/checkpoint_tasks.py", "--tasks", f"{task}={name}", "--baselines", baseline]
            words += ["--output_dir", arguments.output_dir]
            scores = run_baseline(function, words, folder, file)
            keep(table_rows(about | {"model": baseline, "seeds": [], "command": portable(words)}, [scores]))
        for model, checkpoint in models:
            seeds = arguments.seeds if experiment.is_trained else arguments.seeds[:1]
            scores, commands = [], []
            for seed in seeds:
                run_dir = output_dir / f"{place}-{model}-{seed}"
                options = [option.format(folder=name, seed=seed) for option in experiment.options.split()]
                words = [experiment.script, "--model_name_or_path", checkpoint, *options]
                commands.append([*words, "--output_dir", str(run_dir)])
                scores.append(experiment.scores(run_model(commands[-1], run_dir), folder.resolve()))
            keep(table_rows(about | {"model": model, "seeds": seeds, "command": portable(commands[0])}, scores))


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
