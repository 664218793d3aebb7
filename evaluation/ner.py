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
"""Entities in tag sequences: tagging schemes, and span metrics through seqeval."""

import warnings
from collections.abc import Iterable, Sequence

from modernalbert.command_line import UserError


# A tag is O, or one of these and a type: beginning, inside, end, single word.
PREFIXES = ("B-", "I-", "E-", "S-")
METRICS = ("f1", "precision", "recall", "accuracy")

# Type, first word, last word.
Span = tuple[str, int, int]


def is_tag(tag) -> bool:
    """Whether it is O, or a prefix and a type."""
    return tag == "O" or (isinstance(tag, str) and tag.startswith(PREFIXES) and len(tag) > 2)


def spans_of(tags: Sequence[str]) -> list[Span]:
    """
    The entities of one sentence, in any scheme, as CoNLL's own evaluation reads them.

    An entity that does not begin with B- or S- begins where its type does; neighbours of one type are parted by B-, S-
    and E-.
    """
    return [(kind, first, last) for kind, first, last in _seqeval().get_entities(list(tags))]


def tags_of(spans: Iterable[Span], length: int, scheme: str) -> list[str]:
    """The tags of a sentence of `length` words, in the scheme IOB2 or IOBES."""
    tags = ["O"] * length
    for kind, first, last in spans:
        tags[first : last + 1] = [f"I-{kind}"] * (last + 1 - first)
        tags[first] = f"B-{kind}"
        if scheme == "IOBES":
            tags[last] = f"{'S' if first == last else 'E'}-{kind}"
    return tags


def scheme_of(tags: Iterable[str]) -> str:
    """IOBES if there are tags of ends or single words, else IOB2."""
    return "IOBES" if any(tag.startswith(("E-", "S-")) for tag in tags) else "IOB2"


def is_iob1(sentences: Sequence[Sequence[str]]) -> bool:
    """Whether all tags are IOB1: entities begin with I-, and with B- only right behind another of their type."""
    begins_inside = False
    for tags in sentences:
        for before, tag in zip(["O", *tags], tags):
            if tag.startswith(("E-", "S-")) or (tag.startswith("B-") and before[2:] != tag[2:]):
                return False
            begins_inside |= tag.startswith("I-") and before[2:] != tag[2:]
    return begins_inside


def labels_of(types: Iterable[str], scheme: str) -> tuple[str, ...]:
    """All tags of some types of entity, O first."""
    prefixes = PREFIXES if scheme == "IOBES" else PREFIXES[:2]
    return ("O", *(prefix + kind for kind in sorted(types) for prefix in prefixes))


def span_metrics(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """
    Precision, recall and F1 over entities, all together and by type, and the accuracy over words.

    An entity is right if its type, first and last word are. Entities are read as in `spans_of`, so the figures are
    those of CoNLL's evaluation. A share of nothing is 0.

    Args:
        gold: Tags by sentence and word.
        predicted: Likewise.

    Returns:
        "f1", "precision", "recall", "accuracy", and for each type T of gold or prediction "T_f1", "T_precision",
        "T_recall" and "T_entities", their number in gold.
    """
    gold, predicted = [list(tags) for tags in gold], [list(tags) for tags in predicted]
    score = _seqeval().precision_recall_fscore_support
    types = sorted({kind for tags in (*gold, *predicted) for kind, _, _ in spans_of(tags)})
    words = [one == other for a, b in zip(gold, predicted) for one, other in zip(a, b)]
    metrics = dict.fromkeys(METRICS, 0.0) | {"accuracy": sum(words) / max(1, len(words))}
    if not types:
        return metrics
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shares of nothing: said above
        precision, recall, f1, _ = score(gold, predicted, average="micro", zero_division=0)
        metrics |= {"f1": float(f1), "precision": float(precision), "recall": float(recall)}
        for kind, *values in zip(types, *score(gold, predicted, average=None, zero_division=0)):
            for name, value in zip(("precision", "recall", "f1", "entities"), values):
                metrics[f"{kind}_{name}"] = int(value) if name == "entities" else float(value)
    return metrics


def _seqeval():
    try:
        from seqeval.metrics import sequence_labeling
    except ImportError:
        raise UserError(
            "the spans are counted by seqeval, which is missing: pip install 'modernalbert[ner]'."
        ) from None
    return sequence_labeling
