# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Write docs/findings.md and its plots from the result files.

    python experiments/study/report.py

Nothing is run. What has no results yet says so; a figure appears only if a result file has it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.cli.markdown import markdown_table
from modernalbert.experiments.study.bootstrap import Interval, Resampler, interval, score
from modernalbert.experiments.study.plan import Experiment, all_experiments
from modernalbert.experiments.study.results import REPOSITORY, RESULTS, Results


# Okabe and Ito's colours, which differ for all kinds of colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HEADER = """# Findings: what experts are worth

Each section asks one question, and answers it from runs with several seeds once they are made.
`python experiments/study/run.py --list` says what is still to be run, and for how many hours;
`python experiments/study/report.py` makes this page and its plots
from `experiments/study/results/`. Intervals are 95 % bootstrap intervals over texts (or rows) and seeds; models are
compared on the same texts, in pairs. The models are small (2 to 11 million parameters, and at least 5 million tokens
from random weights where they are pretrained here): what holds for them may not hold at the paper's 50 to 120 million
parameters and 30 billion tokens.
"""


@dataclass
class ReportArguments:
    """Where results are, and where the page goes."""

    results_dir: str = field(default=str(RESULTS), metadata={"help": "Holds EXPERIMENT.jsonl."})
    page: str = field(default=str(REPOSITORY / "docs" / "findings.md"), metadata={"help": "Gets the page."})
    plots_dir: str = field(default=str(REPOSITORY / "docs" / "findings"), metadata={"help": "Gets the plots."})


def main() -> None:
    (arguments,) = parse_arguments(ReportArguments, description=__doc__)
    write_page(all_experiments(), Path(arguments.results_dir), Path(arguments.page), Path(arguments.plots_dir))


def write_page(files: list[Path], results_dir: Path, page: Path, plots_dir: Path) -> None:
    """All sections, one for each file."""
    experiments = {file.stem: Experiment.load(file) for file in files}
    sections = [section(experiments[file.stem], experiments, results_dir, plots_dir, page) for file in files]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join([HEADER, *sections]), "utf-8")


def section(
    experiment: Experiment, experiments: dict[str, Experiment], results_dir: Path, plots_dir: Path, page: Path
) -> str:
    """One experiment: question, answer, table, plot, consequences, limits."""
    lines = lines_of(experiment, results_dir)
    jobs = [job.name for job in experiment.jobs()]
    missing = set(jobs) - {line["job"] for line in lines}
    parts = [f"## {experiment.settings.get('title', experiment.name)}", "", experiment.question, ""]
    if not lines:
        return "\n".join([*parts, "Not run yet.", ""])
    if missing:
        parts += [f"Unfinished: {len(missing)} of {len(jobs)} jobs have not run yet.", ""]
    describe = DESCRIPTIONS[experiment.kind]
    description = describe(experiment, complete(experiment, lines, results_dir), results_dir)
    parts += [description.answer, "", description.table, ""]
    if description.draw is not None:
        plots_dir.mkdir(parents=True, exist_ok=True)
        figure = Figure(figsize=(7.2, description.height), layout="constrained")
        description.draw(figure)
        figure.savefig(plots_dir / f"{experiment.name}.png", dpi=120)
        path = (plots_dir / f"{experiment.name}.png").resolve().relative_to(page.parent.resolve())
        parts += [f"![{description.caption}]({path})", "", f"*{description.caption}*", ""]
    for name, title in (("consequence", "What follows"), ("limits", "What this cannot tell")):
        if name in experiment.settings and not (name == "consequence" and missing):
            parts += [f"**{title}.** {' '.join(experiment.settings[name].split())}", ""]
    commits = sorted({line["commit"] for line in lines})
    machines = sorted({line["hardware"] for line in lines})
    parts += [
        f"`python experiments/study/run.py experiments/study/{experiment.name}.yaml` at {', '.join(commits)}, on "
        f"{'; '.join(machines)}.",
        "",
    ]
    return "\n".join(parts)


@dataclass
class Description:
    """What a section says: a sentence, a markdown table, and a plot."""

    answer: str
    table: str
    draw: Callable[[Figure], None] | None = None
    caption: str = ""
    height: float = 3.2


def lines_of(experiment: Experiment, results_dir: Path) -> list[dict]:
    """
    The lines of an experiment's results.

    Raises:
        UserError: they are of several commits or of different rows.
    """
    results = Results(experiment.name, results_dir)
    lines = results.lines()
    for name in ("commit", "rows", "settings"):
        values = sorted({line[name] for line in lines})
        if len(values) > 1:
            raise UserError(f"{results.file} mixes results of several {name}s ({', '.join(values)}): take it apart.")
    return lines


def complete(experiment: Experiment, lines: list[dict], results_dir: Path) -> list[dict]:
    """
    The lines with those of variants that are another experiment's, at this experiment's seeds.

    Raises:
        UserError: that experiment ran on other rows.
    """
    lines = list(lines)
    for variant, changes in experiment.variants.items():
        if "same_as" in changes:
            other, name = changes["same_as"].split("/")
            for line in Results(other, results_dir).lines():
                if line["variant"] != name or line["seed"] not in experiment.seeds:
                    continue
                if line["rows"] != lines[0]["rows"]:
                    raise UserError(
                        f"{experiment.name} compares with {changes['same_as']}, which ran on other rows "
                        f"({line['rows']} instead of {lines[0]['rows']})."
                    )
                lines.append(line | {"variant": variant})
    return lines


def signed(value: Interval, digits: int = 3, factor: float = 1.0) -> str:
    numbers = [f"{factor * number:+.{digits}f}" for number in value]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


# --- pretraining


def describe_pretraining(experiment: Experiment, lines: list[dict], results_dir: Path) -> Description:
    results = {line["arrays"]: Results(line["experiment"], results_dir).arrays(line) for line in lines}
    variants = [name for name in experiment.variants if any(line["variant"] == name for line in lines)]
    losses, counts = {}, None
    for name in variants:
        arrays = [results[line["arrays"]] for line in by_seed(lines, name)]
        losses[name] = np.stack([each["loss"] for each in arrays]).astype(np.float64)
        counts = arrays[0]["count"].astype(np.float64)
    resampler = Resampler(len(counts))
    replicates = {name: resampler.seed_means(resampler.loss_means(losses[name], counts)) for name in variants}
    means = {name: losses[name].sum(1).mean() / counts.sum() for name in variants}
    reference = experiment.settings.get("reference", variants[0])
    reference = reference if reference in variants else variants[0]
    differences = {
        name: interval(means[name] - means[reference], replicates[name] - replicates[reference]) for name in variants
    }
    gaps = closed_gaps(experiment, means, replicates)

    header = ["variant", "seeds", "parameters", "without embedding", "masked-word loss", f"difference to {reference}"]
    header += ["gap closed"] if gaps else []
    has_routing = any("top_2_share" in line for line in lines)
    header += ["two busiest experts", "entropy of usage", "idle experts"] if has_routing else []
    rows = []
    for name in variants:
        own = by_seed(lines, name)
        row = [name, str(len(own)), f"{own[0]['parameters']:,}", f"{own[0]['parameters_without_embedding']:,}"]
        row += [f"{means[name]:.3f}", "" if name == reference else signed(differences[name])]
        if gaps:
            row.append(f"{percent(gaps[name])}" if name in gaps else "")
        if has_routing:
            routed = [line for line in own if "top_2_share" in line]
            row += (
                [
                    f"{np.mean([line['top_2_share'] for line in routed]):.0%}",
                    f"{np.mean([line['usage_entropy'] for line in routed]):.3f}",
                    f"{np.mean([line['idle_experts'] for line in routed]):.1f}",
                ]
                if routed
                else ["", "", ""]
            )
        rows.append(row)
    others = [name for name in variants if name != reference]
    best = min(variants, key=means.get)
    if gaps:
        answer = "Of the gap between shared and unshared layers, " + "; ".join(
            f"`{name}` closes {percent(value)}" for name, value in gaps.items()
        )
        answer += "."
    elif others:
        clear = [f"`{name}` ({signed(differences[name])})" for name in others if differences[name].is_clear]
        answer = f"The lowest masked-word loss has `{best}` ({means[best]:.3f}); "
        answer += (
            f"clearly different from `{reference}`: {', '.join(clear)}."
            if clear
            else (f"no variant is clearly different from `{reference}`.")
        )
    else:
        answer = f"So far there is `{reference}` alone."

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        draw_intervals(axis, {name: differences[name] for name in others})
        axis.set_xlabel(f"masked-word loss less that of {reference} (nats per word; lower is better)")

    caption = f"Difference of the masked-word loss to {reference}, with 95 % intervals."
    return Description(
        answer, markdown_table(header, rows), draw if others else None, caption, 1.2 + 0.38 * len(others)
    )


def closed_gaps(experiment: Experiment, means: dict, replicates: dict) -> dict[str, Interval]:
    """Share of the gap between `floor` and `ceiling` that each other variant closes, where the file names them."""
    floor, ceiling = experiment.settings.get("floor"), experiment.settings.get("ceiling")
    if floor not in means or ceiling not in means:
        return {}
    gap = replicates[floor] - replicates[ceiling]
    return {
        name: interval(
            (means[floor] - means[name]) / (means[floor] - means[ceiling]), (replicates[floor] - replicates[name]) / gap
        )
        for name in means
        if name not in (floor, ceiling)
    }


def percent(value: Interval) -> str:
    return f"{value.value:.0%} [{value.low:.0%}, {value.high:.0%}]"


def by_seed(lines: list[dict], variant: str, **fields) -> list[dict]:
    """A variant's lines, in the order of the seeds."""
    chosen = [line for line in lines if line["variant"] == variant and all(line.get(k) == v for k, v in fields.items())]
    return sorted(chosen, key=lambda line: line["seed"])


def draw_intervals(axis, values: dict[str, Interval], color: str = COLORS[0], offset: float = 0.0, label=None) -> None:
    """Points with intervals, one below another, and a line at 0."""
    names = list(values)
    places = np.arange(len(names)) + offset
    points = np.array([values[name].value for name in names])
    low = points - np.array([values[name].low for name in names])
    high = np.array([values[name].high for name in names]) - points
    axis.errorbar(points, places, xerr=np.maximum([low, high], 0), fmt="o", color=color, capsize=3, label=label)
    axis.axvline(0, color="0.5", linewidth=1, zorder=0)
    axis.set_yticks(np.arange(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)


# --- tasks and merging


def describe_scores(experiment: Experiment, lines: list[dict], results_dir: Path) -> Description:
    """Scores by task, each model against the reference on the same rows and seeds."""
    results = Results(experiment.name, results_dir)
    is_merging = experiment.kind == "merging"
    groups = list(experiment.variants) if is_merging else [None]
    models = list(dict.fromkeys(line["method"] if is_merging else line["variant"] for line in lines))
    reference = models[0]
    header = ["task", "metric", "seeds", *models]
    header = (["model"] if is_merging else []) + header
    rows, pooled = [], {}
    for group in groups:
        for task in experiment.tasks:
            chosen = [line for line in lines if line["task"] == task and group in (None, line["variant"])]
            found = {
                model: {line["seed"]: line for line in chosen if line["method" if is_merging else "variant"] == model}
                for model in models
            }
            seeds = sorted(set.intersection(*(set(each) for each in found.values()))) if chosen else []
            if not seeds:
                continue
            metric = chosen[0]["metric"]
            arrays = {m: [results.arrays(found[m][seed]) for seed in seeds] for m in models}
            resampler = Resampler(len(arrays[reference][0]["label"]))
            drawn = resampler.draw_seeds(len(seeds))
            whole = np.ones((1, len(arrays[reference][0]["label"])))
            values, replicates = {}, {}
            for model in models:
                each = [(a["prediction"], a["label"]) for a in arrays[model]]
                values[model] = float(np.mean([score(metric, *pair, whole)[0] for pair in each]))
                table = np.stack([score(metric, *pair, resampler.weights) for pair in each], axis=1)
                # A merged model comes from the routed one of its seed: seeds are drawn together.
                replicates[model] = resampler.seed_means(table, drawn if is_merging else None)
            row = [task, metric, str(len(seeds)), f"{100 * values[reference]:.1f}"]
            for model in models[1:]:
                replicate = replicates[model] - replicates[reference]
                difference = interval(values[model] - values[reference], replicate)
                row.append(signed(difference, 1, 100))
                pooled.setdefault((group, model), []).append((difference.value, replicate))
            rows.append(([str(group)] if is_merging else []) + row)
    if not rows:
        return Description("No task has all models yet.", "")
    means = {
        key: interval(np.mean([v for v, _ in pairs]), np.mean([r for _, r in pairs], axis=0))
        for key, pairs in pooled.items()
    }
    parts = [f"{f'{group}, ' if group else ''}`{model}` {signed(v, 2, 100)}" for (group, model), v in means.items()]
    answer = f"Mean difference to `{reference}` over tasks, in points: {'; '.join(parts)}."

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for i, group in enumerate(groups):
            values = {
                model: Interval(*(100 * number for number in means[group, model]))
                for model in models[1:]
                if (group, model) in means
            }
            if values:
                draw_intervals(axis, values, COLORS[i], 0.2 * i, group)
        axis.set_xlabel(f"score less that of {reference}, mean over tasks (points of 100; higher is better)")
        if len(groups) > 1:
            axis.legend(title="model")

    caption = f"Mean over tasks of the difference to {reference}, with 95 % intervals."
    return Description(answer, markdown_table(header, rows), draw, caption, 1.4 + 0.42 * (len(models) - 1))


# --- adapters elsewhere


def describe_adapters(experiment: Experiment, lines: list[dict], results_dir: Path) -> Description:
    """Mean losses of adapters on the same texts or images, against the LoRA."""
    results = Results(experiment.name, results_dir)
    methods = list(dict.fromkeys(line["method"] for line in lines))
    reference = "lora" if "lora" in methods else methods[0]
    losses = {}
    for method in methods:
        chosen = sorted((line for line in lines if line["method"] == method), key=lambda line: line["seed"])
        losses[method] = np.stack([results.arrays(line)["loss"] for line in chosen]).astype(np.float64)
    counts = np.ones(losses[reference].shape[1])
    resampler = Resampler(len(counts))
    replicates = {m: resampler.seed_means(resampler.loss_means(losses[m], counts)) for m in methods}
    differences = {
        m: interval(losses[m].mean() - losses[reference].mean(), replicates[m] - replicates[reference]) for m in methods
    }
    extra = "perplexity" if "perplexity" in lines[0] else "accuracy"
    rows = []
    for method in methods:
        chosen = [line for line in lines if line["method"] == method]
        value = np.mean([line[extra] for line in chosen])
        rows.append(
            [
                method,
                str(len(chosen)),
                f"{chosen[0]['adapter_parameters']:,}",
                f"{value:.2f}" if extra == "perplexity" else f"{value:.1%}",
                f"{losses[method].mean():.3f}",
                "" if method == reference else signed(differences[method]),
            ]
        )
    header = ["adapter", "seeds", "adapter parameters", extra, "loss", f"difference to {reference}"]
    others = [method for method in methods if method != reference]
    answer = f"Loss less that of `{reference}`: " + "; ".join(f"`{m}` {signed(differences[m])}" for m in others) + "."

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        draw_intervals(axis, {method: differences[method] for method in others})
        axis.set_xlabel(f"held-out loss less that of {reference} (nats; lower is better)")

    caption = f"Difference of the held-out loss to {reference}, with 95 % intervals."
    return Description(
        answer, markdown_table(header, rows), draw if others else None, caption, 1.2 + 0.38 * len(others)
    )


# --- specialisation


def describe_specialisation(experiment: Experiment, lines: list[dict], results_dir: Path) -> Description:
    line = lines[0]
    names = sorted(line["mean"], key=lambda name: line["mean"][name]["control"] - line["mean"][name]["bits"])
    layers = list(line["layers"])
    header = ["property", *layers, "mean", "shuffled control"]
    rows = [
        [
            name,
            *(f"{line['layers'][layer][name]['bits']:.3f}" for layer in layers),
            f"{line['mean'][name]['bits']:.3f}",
            f"{line['mean'][name]['control']:.4f}",
        ]
        for name in names
    ]
    answer = (
        f"On {line['num_tokens']:,} words of the Brown corpus the routing says most about {names[0]} "
        f"({line['mean'][names[0]]['bits']:.3f} bits a word; shuffled: {line['mean'][names[0]]['control']:.4f}) and "
        f"least about {names[-1]} ({line['mean'][names[-1]]['bits']:.3f} bits)."
    )

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        places = np.arange(len(names))
        axis.barh(places - 0.2, [line["mean"][n]["bits"] for n in names], 0.4, color=COLORS[0], label="routing")
        axis.barh(places + 0.2, [line["mean"][n]["control"] for n in names], 0.4, color=COLORS[4], label="shuffled")
        axis.set_yticks(places, names)
        axis.invert_yaxis()
        axis.set_xlabel("mutual information with the expert (bits per word, mean over layers)")
        axis.legend()

    return Description(answer, markdown_table(header, rows), draw, "What the routing says about a word.", 3.0)


DESCRIPTIONS = {
    "pretraining": describe_pretraining,
    "finetuning": describe_scores,
    "merging": describe_scores,
    "decoder": describe_adapters,
    "images": describe_adapters,
    "specialisation": describe_specialisation,
}


if __name__ == "__main__":
    run(main)
