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
The tables of figures in the documentation, from the files that were measured.

    python experiments/document_tables.py --documents README.md docs/performance.md
    python experiments/document_tables.py --documents README.md docs/performance.md --check

A document's tables stand between lines `<!-- NAME table -->` and `<!-- end -->`, NAME one of

    task      experiments/results/*_tasks.json: what `experiments/checkpoint_tasks.py` and its like measured
    ffn, sweep, encoder, memory
              benchmarks/results/DEVICE.json: what `python -m modernalbert.benchmarks` measured

A file of tasks is a list of rows, objects with

    data, model, metric     what was measured on what: names
    scores                  the figures, 1 at best, one for each seed; a single one of a method without chance
    mean, deviation         of the scores; the sample standard deviation, null for a single score
    command                 what measured it

and, where known, seeds, train_rows and validation_rows.
"""

import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from modernalbert.command_line import UserError, parse_arguments, run


REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "experiments" / "results"
BENCHMARKS = REPOSITORY / "benchmarks" / "results"
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


# Rows of the benchmarks, in this order.
FFNS = {
    "grouped": "this MoL (`grouped`, which `auto` takes on a CPU)",
    "masked": "this MoL (`masked`, which compiles and exports)",
    "triton": "this MoL (`triton`)",
    "folded": "merged and folded",
    "mixlora_style": "first product shared, second per expert",
    "experts_looped": "each expert's FFN on its tokens",
    "experts_dense": "every expert's FFN on every token",
}
FFN_KINDS = {
    "forward": "forward",
    "forward_backward": "forward and backward",
    "forward_compiled": "forward, compiled",
}
ENCODERS = {
    "modernbert": "transformers' ModernBERT, 14 layers",
    "modernalbert": "ModernALBERT of its shape, 7 groups x 2",
    "tiny_folded": "Tiny (wider FFN in two groups), merged and folded",
    "tiny": "Tiny with experts",
    "tiny_none": "Tiny without modulation",
    "bert": "BERT of its depth and width",
    "albert": "ALBERT of its depth and width",
}
MEMORIES = {
    "none": "Tiny without modulation",
    "mol": "Tiny with experts",
    "mol_masked": "the same, `masked`",
    "modernbert": "ModernBERT of its depth and width",
}
SWEPT = {
    "num_experts": "experts",
    "num_experts_per_tok": "experts per token",
    "lora_rank": "rank",
    "tokens": "tokens",
}


@dataclass
class TableArguments:
    """Which documents."""

    documents: list[str] = field(metadata={"help": "Markdown files with marker lines."})
    results_dir: str = field(default=str(RESULTS), metadata={"help": "Folder of the *_tasks.json files."})
    benchmarks: str = field(
        default=str(BENCHMARKS / "cpu-2-threads.json"), metadata={"help": "What the benchmarks wrote."}
    )
    check: bool = field(default=False, metadata={"help": "Write nothing; fail if a table is not that of the files."})


# --- tasks -----------------------------------------------------------------------------------------------------------


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


def task_table(rows: list[dict]) -> str:
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
    header = ["set (rows trained on / judged by)", "metric", *(MODELS.get(model, model) for model in models)]
    body = [
        [
            f"{data} ({counts[data]})" if data in counts else data,
            METRICS.get(metric, metric),
            *(values.get(model, "") for model in models),
        ]
        for (data, metric), values in cells.items()
    ]
    return markdown(header, body, num_words=2)


def as_cell(row: dict) -> str:
    """The mean times 100, with deviation and number of seeds where there are several."""
    mean = f"{100 * row['mean']:.1f}"
    if row["deviation"] is None:
        return mean
    return f"{mean} ± {100 * row['deviation']:.1f} ({len(row['scores'])})"


# --- benchmarks ------------------------------------------------------------------------------------------------------


def read_benchmarks(file: Path) -> dict[str, dict]:
    """What each benchmark wrote, by its section."""
    if not file.is_file():
        raise UserError(f"{file}: no such file: python -m modernalbert.benchmarks writes it.")
    return {name: section["results"] for name, section in json.loads(file.read_text("utf-8")).items()}


def ratio(values: dict[str, dict[str, float]], name: str) -> str:
    return f"{values[name]['ratio']:.2f}x" if name in values else ""


def ffn_table(sections: dict[str, dict]) -> str:
    """Ways to compute the mixture, as ratios to the plain FFN."""
    columns = {}
    for name, section in sections.items():
        if found := re.fullmatch(r"ffn_(\w+)_(\d+)_tokens", name):
            for kind, values in section.items():
                columns[f"{FFN_KINDS[kind]}, {found[1]}"] = values
    body = [[label, *(ratio(values, row) for values in columns.values())] for row, label in FFNS.items()]
    return markdown(["", *columns], [line for line in body if any(line[1:])])


def sweep_table(sections: dict[str, dict]) -> str:
    """The backends' ratios to the plain FFN, as one thing varies."""
    lines, backends = [], []
    for name, section in sections.items():
        if not name.startswith("ffn_sweep_"):
            continue
        for what, rows in section.items():
            for value, kinds in rows.items():
                backends = [backend for backend in FFNS if backend in kinds["forward"]]
                found = [ratio(kinds[kind], backend) for kind in kinds for backend in backends]
                lines.append([f"{value} {SWEPT[what]}", *found])
    header = [f"`{backend}`, {kind}" for kind in ("forward", "forward and backward") for backend in backends]
    return markdown(["", *header], lines)


def encoder_table(sections: dict[str, dict]) -> str:
    """Whole encoders as ratios to ModernBERT, and Tiny's to itself without modulation."""
    columns = {
        name.removeprefix("encoder_").replace("_", ", "): section
        for name, section in sections.items()
        if name.startswith("encoder_")
    }
    body = []
    for against, baseline in (("modernbert", "ModernBERT"), ("tiny_none", "Tiny without modulation")):
        for row, label in ENCODERS.items():
            cells = [ratio(section[f"against_{against}"], row) for section in columns.values()]
            if any(cells) and row != against:
                body.append([f"{label}, to {baseline}", *cells])
    header = [f"{name} ({section['real_tokens']:.0%} real tokens)" for name, section in columns.items()]
    return markdown(["", *header], body)


def memory_table(sections: dict[str, dict]) -> str:
    """Memory of training steps, and what weights take."""
    for name, section in sections.items():
        if name.startswith("memory_"):
            body = [
                [
                    label,
                    f"{section[row]['peak_megabytes']:,.0f} MB ({section[row]['peak_ratio']:.2f}x)",
                    f"{section[row]['kept_megabytes']:,.0f} MB ({section[row]['kept_ratio']:.2f}x)",
                    f"{section[row]['optimizer_megabytes']:,.0f} MB",
                    f"{section[row]['megabytes_on_disk']:,.0f} MB",
                ]
                for row, label in MEMORIES.items()
                if row in section
            ]
            shape = name.removeprefix("memory_").replace("_", ", ")
            return markdown([shape, "peak of training", "kept for the backward", "optimizer", "weights"], body)
    raise UserError("the benchmarks' file has no memory_ section: python benchmarks/memory.py writes it.")


# --- documents -------------------------------------------------------------------------------------------------------


def markdown(header: list[str], body: list[list[str]], num_words: int = 1) -> str:
    """A table whose first columns are words, the others figures."""
    lines = [f"| {' | '.join(line)} |" for line in (header, *body)]
    rule = "|---" * num_words + "|---:" * (len(header) - num_words) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def with_tables(document: str, tables: dict[str, str], name: str) -> str:
    """The document's text with the tables between their markers."""
    found = re.findall(r"<!-- (\w+) table -->\n.*?<!-- end -->", document, flags=re.DOTALL)
    if not found:
        raise UserError(f"{name}: there must be a line <!-- NAME table --> and a line <!-- end --> behind it.")
    for table in found:
        if table not in tables:
            raise UserError(f"{name}: the table {table} is not known: it must be one of {', '.join(tables)}.")

    def fill(match: re.Match) -> str:
        return f"<!-- {match[1]} table -->\n{tables[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) table -->\n.*?<!-- end -->", fill, document, flags=re.DOTALL)


def main() -> None:
    (arguments,) = parse_arguments(TableArguments, description=__doc__)
    sections = read_benchmarks(Path(arguments.benchmarks))
    tables = {
        "task": task_table(read_results(Path(arguments.results_dir))),
        "ffn": ffn_table(sections),
        "sweep": sweep_table(sections),
        "encoder": encoder_table(sections),
        "memory": memory_table(sections),
    }
    for name in arguments.documents:
        document = Path(name)
        if not document.is_file():
            raise UserError(f"{name}: no such file.")
        text = document.read_text("utf-8")
        new = with_tables(text, tables, name)
        if arguments.check and new != text:
            raise UserError(
                f"{name}: a table is not that of the files: python experiments/document_tables.py --documents {name}"
            )
        if not arguments.check:
            document.write_text(new, "utf-8")


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
