# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Entities in tag sequences: tagging schemes."""

from collections.abc import Iterable, Sequence

from modernalbert.cli.errors import UserError


# A tag is O, or one of these and a type: beginning, inside, end, single word.
PREFIXES = ("B-", "I-", "E-", "S-")
# Type, first word, last word.
Span = tuple[str, int, int]


def is_tag(tag) -> bool:
    """Tell whether it is O, or a prefix and a type."""
    return tag == "O" or (isinstance(tag, str) and tag.startswith(PREFIXES) and len(tag) > 2)


def spans_of(tags: Sequence[str]) -> list[Span]:
    """
    Return the entities of one sentence, in any scheme, as CoNLL's own evaluation reads them.

    An entity that does not begin with B- or S- begins where its type does. B-, S- and E- separate entities of one type.
    """
    return [(kind, first, last) for kind, first, last in import_seqeval().get_entities(list(tags))]


def tags_of(spans: Iterable[Span], length: int, scheme: str) -> list[str]:
    """Write the tags of a sentence of `length` words, in the scheme IOB2 or IOBES."""
    tags = ["O"] * length
    for kind, first, last in spans:
        tags[first : last + 1] = [f"I-{kind}"] * (last + 1 - first)
        tags[first] = f"B-{kind}"
        if scheme == "IOBES":
            tags[last] = f"{'S' if first == last else 'E'}-{kind}"
    return tags


def scheme_of(tags: Iterable[str]) -> str:
    """Return IOBES if there are tags of ends or single words, else IOB2."""
    return "IOBES" if any(tag.startswith(("E-", "S-")) for tag in tags) else "IOB2"


def is_iob1(sentences: Sequence[Sequence[str]]) -> bool:
    """Tell whether all tags are IOB1: entities begin with I-, and with B- only right behind another of their type."""
    begins_inside = False
    for tags in sentences:
        for before, tag in zip(["O", *tags], tags):
            if tag.startswith(("E-", "S-")) or (tag.startswith("B-") and before[2:] != tag[2:]):
                return False
            begins_inside |= tag.startswith("I-") and before[2:] != tag[2:]
    return begins_inside


def labels_of(types: Iterable[str], scheme: str) -> tuple[str, ...]:
    """List all tags of some types of entity, O first."""
    prefixes = PREFIXES if scheme == "IOBES" else PREFIXES[:2]
    return ("O", *(prefix + kind for kind in sorted(types) for prefix in prefixes))


def import_seqeval():
    try:
        from seqeval.metrics import sequence_labeling
    except ImportError:
        raise UserError(
            "the spans are counted by seqeval, which is missing: pip install 'modernalbert[ner]'."
        ) from None
    return sequence_labeling
