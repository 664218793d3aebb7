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
The table of measured tasks in the documentation, from the files that were measured.

    python experiments/task_table.py --documents README.md docs/tasks.md
    python experiments/task_table.py --documents README.md docs/tasks.md --check

A document's table stands between the lines `<!-- task table -->` and `<!-- end -->`. The files are
`experiments/results/*_tasks.json`. Each is a list of rows, objects with

    data, model, metric     what was measured on what: names
    scores                  the figures, 1 at best, one for each seed; a single one of a method without chance
    mean, deviation         of the scores; the sample standard deviation, null for a single score
    command                 what measured it

and, where known, seeds, train_rows and validation_rows.
"""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from modernalbert.command_line import UserError, parse_arguments, run


REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "experiments" / "results"
BEGIN, END = "<!-- task table -->", "<!-- end -->"
REQUIRED = ("data", "model", "metric", "scores", "mean", "deviation", "command")
# Columns from the left: what needs no training, then models. Others follow as they come.
MODELS = {
    "majority": "majority",
    "no answer": "no answer",
    "tfidf": "TF-IDF",
    "bm25": "BM25",
    "random": "random weights",
    "none": "nano without experts",
    "nano": "nano",
    "teacher": "its teacher",
}
METRICS = {
    "f1": "F1",
    "matthews_correlation": "Matthews",
    "spearmanr": "Spearman",
    "pearson": "Pearson",
    "ndcg_at_10": "nDCG@10",
}


@dataclass
class TableArguments:
    """Which documents."""

    documents: list[str] = field(metadata={"help": "Markdown files with the two marker lines."})
    results_dir: str = field(default=str(RESULTS), metadata={"help": "Folder of the *_tasks.json files."})
    check: bool = field(default=False, metadata={"help": "Write nothing; fail if a table is not that of the files."})


def read_results(folder: Path) -> list[dict]:
    """
    The rows of all files.

    Raises:
        UserError: a file is no list of rows, says something twice, or a mean is not that of its scores.
    """
    rows, places = [], {}
    for file in sorted(folder.glob("*_tasks.json")):
        try:
            entries = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: it is not JSON: {error}") from None
        if not isinstance(entries, list):
            raise UserError(f"{file}: it must hold a list of rows.")
        for number, row in enumerate(entries):
            place = f"{file}, entry {number}"
            missing = [name for name in REQUIRED if not isinstance(row, dict) or name not in row]
            if missing:
                raise UserError(f"{place}: no {', '.join(missing)}.")
            key = row["data"], row["model"], row["metric"]
            if key in places:
                raise UserError(f"{place}: {', '.join(key)} is measured in {places[key]} too.")
            places[key] = place
            check_row(row, place)
            rows.append(row)
    if not rows:
        raise UserError(f"{folder}: there is no *_tasks.json with a row in it.")
    return rows


def check_row(row: dict, place: str) -> None:
    """Refuse a mean or deviation that does not follow from the scores."""
    scores = row["scores"]
    if not scores or not all(-1 <= score <= 1 for score in scores):
        raise UserError(f"{place}: scores {scores} is not allowed: it must hold numbers of at most 1.")
    deviation = statistics.stdev(scores) if len(scores) > 1 else None
    for name, right in (("mean", statistics.mean(scores)), ("deviation", deviation)):
        found = row[name]
        if (found is None) != (right is None) or (right is not None and abs(found - right) > 1e-9):
            raise UserError(f"{place}: {name} is {found}, that of the scores is {right}.")


def as_table(rows: list[dict]) -> str:
    """Markdown: a line per set and metric, a column per model."""
    found = list(dict.fromkeys(row["model"] for row in rows))
    models = [model for model in MODELS if model in found] + [model for model in found if model not in MODELS]
    cells, counts = {}, {}
    for row in rows:
        line = row["data"], row["metric"]
        cells.setdefault(line, {})[row["model"]] = as_cell(row)
        parts = [row[name] for name in ("train_rows", "validation_rows") if row.get(name) is not None]
        if parts:
            counts[row["data"]] = " / ".join(f"{part:,}" for part in parts)
    lines = ["| set (rows trained on / judged by) | metric | " + " | ".join(MODELS.get(m, m) for m in models) + " |"]
    lines += ["|---|---|" + "---:|" * len(models)]
    for (data, metric), values in cells.items():
        name = f"{data} ({counts[data]})" if data in counts else data
        lines.append(
            f"| {name} | {METRICS.get(metric, metric)} | "
            + " | ".join(values.get(model, "") for model in models)
            + " |"
        )
    return "\n".join(lines)


def as_cell(row: dict) -> str:
    """The mean times 100, with deviation and number of seeds where there are several."""
    mean = f"{100 * row['mean']:.1f}"
    if row["deviation"] is None:
        return mean
    return f"{mean} ± {100 * row['deviation']:.1f} ({len(row['scores'])})"


def with_table(document: str, table: str, name: str) -> str:
    """The document's text with the table between its markers."""
    if document.count(BEGIN) != 1 or END not in document.partition(BEGIN)[2]:
        raise UserError(f"{name}: there must be one line {BEGIN} and a line {END} behind it.")
    before, _, behind = document.partition(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{behind.partition(END)[2]}"


def main() -> None:
    (arguments,) = parse_arguments(TableArguments, description=__doc__)
    table = as_table(read_results(Path(arguments.results_dir)))
    for name in arguments.documents:
        document = Path(name)
        if not document.is_file():
            raise UserError(f"{name}: no such file.")
        text = document.read_text("utf-8")
        new = with_table(text, table, name)
        if arguments.check and new != text:
            raise UserError(
                f"{name}: the table is not that of the files: python experiments/task_table.py --documents {name}"
            )
        if not arguments.check:
            document.write_text(new, "utf-8")


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
