# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Experiments of the study: what a YAML file says, and the jobs that follow from it."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from modernalbert.cli.errors import UserError


STUDY = Path(__file__).parent
# Fields that are read by the report alone.
REPORT_FIELDS = ("title", "reference", "floor", "ceiling", "consequence", "limits")
KINDS = ("pretraining", "finetuning", "merging", "decoder", "images", "specialisation")


@dataclass(frozen=True)
class Experiment:
    """
    One file of the study.

    Attributes:
        name: Of the file, without its suffix.
        kind: Which module of this folder runs it.
        question: What it asks, for the report.
        variants: By name, what the kind makes a model of; in the order of the report.
        seeds: Of every variant.
        tasks: Of every variant and seed; empty where there is one thing to do.
        settings: Whatever else the kind reads: `tokens`, `arguments`, ...
        minutes: Of one job on one core, by variant or for all ("default"), until results say it better.
    """

    name: str
    kind: str
    question: str
    variants: dict[str, dict]
    seeds: tuple[int, ...]
    tasks: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)
    minutes: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, file: str | Path) -> "Experiment":
        """
        Read a YAML file.

        Raises:
            UserError: the file is missing, is no YAML, or a field of it is not allowed.
        """
        file = Path(file)
        try:
            values = yaml.safe_load(file.read_text("utf-8"))
        except OSError:
            raise UserError(f"{file}: no such file.") from None
        except yaml.YAMLError as error:
            raise UserError(f"{file}: it is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise UserError(f"{file}: it must hold fields and values.")
        for name, kind in (("kind", str), ("question", str), ("variants", dict), ("seeds", list), ("minutes", dict)):
            if not isinstance(values.get(name), kind) or not values[name]:
                raise UserError(f"{file}: {name}={values.get(name)!r} is not allowed: it must be a {kind.__name__}.")
        if values["kind"] not in KINDS:
            raise UserError(f"{file}: kind={values['kind']!r} is not allowed: it must be one of {', '.join(KINDS)}.")
        known = {name: values.pop(name) for name in ("kind", "question", "variants", "seeds", "minutes")}
        return cls(
            name=file.stem,
            kind=known["kind"],
            question=" ".join(known["question"].split()),
            variants={str(name): changes or {} for name, changes in known["variants"].items()},
            seeds=tuple(known["seeds"]),
            tasks=tuple(values.pop("tasks", ())),
            settings=values,
            minutes=known["minutes"],
        )

    @property
    def settings_fingerprint(self) -> str:
        """Of all that holds for every variant, but for texts of the report and what it compares."""
        values = {name: value for name, value in self.settings.items() if name not in REPORT_FIELDS}
        return fingerprint({"kind": self.kind} | values)

    def jobs(self) -> Iterator["Job"]:
        """All jobs, seed by seed, so that an unfinished study can be compared at the seeds it has."""
        for seed in self.seeds:
            for variant, changes in self.variants.items():
                if "same_as" not in changes:
                    for task in self.tasks or (None,):
                        yield Job(self, variant, seed, task)


@dataclass(frozen=True)
class Job:
    """What is run, and recorded, in one piece."""

    experiment: Experiment
    variant: str
    seed: int
    task: str | None = None

    @property
    def name(self) -> str:
        return "-".join(map(str, filter(lambda part: part is not None, (self.variant, self.task, self.seed))))

    @property
    def changes(self) -> dict:
        """What the variant changes."""
        return self.experiment.variants[self.variant]

    def minutes(self, results: Sequence[dict]) -> tuple[float, bool]:
        """Expected minutes, and whether they were measured: the mean of finished jobs of the variant and task."""
        measured = [
            line["seconds"] / 60
            for line in results
            if line["variant"] == self.variant and line.get("task") == self.task and line.get("seconds") is not None
        ]
        if measured:
            return sum(measured) / len(measured), True
        table = self.experiment.minutes
        return float(table.get(self.task, table.get(self.variant, table.get("default", 0.0)))), False


def fingerprint(values: dict) -> str:
    """The first 12 digits of a hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def all_experiments() -> list[Path]:
    """The files of the study, in the order of its questions."""
    return sorted(STUDY.glob("[a-z]_*.yaml"))
