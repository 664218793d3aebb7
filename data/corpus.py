# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A corpus tokenized once: an Arrow file per source, memory-mapped, so that any sequence is a slice away."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from modernalbert.cli.errors import UserError, error_message
from modernalbert.cli.output_folders import atomic_folder
from modernalbert.data.text_files import COMPRESSIONS, DAMAGED, check_whole, damaged, kind_of, open_binary


MANIFEST = "corpus.json"
FORMAT_VERSION = 1
# Files that can be read, and the `datasets` builder that reads them.
TEXT_KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# Texts tokenized at a time.
MAP_BATCH = 1000
# What is read of a file to recognise it: at most so many blocks of so many bytes.
BLOCKS, BLOCK = 256, 1 << 20


class TokenizedCorpus:
    """
    A prepared corpus, read in place: opening it costs nothing, and a sequence is a view of the file.

    The folder holds `corpus.json` and one data set per source in the form of `datasets.Dataset.save_to_disk`, with one
    column `input_ids` (int32). It is read with pyarrow alone.

    Args:
        folder: Written by `prepare_corpus`.

    Raises:
        UserError: the folder holds no corpus, one of another format, or one with a file that is missing or cut short.
    """

    def __init__(self, folder: str | Path):
        import pyarrow as pa

        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise UserError(f"{folder}: no prepared corpus (no {MANIFEST}).")
        self.manifest = json.loads((self.folder / MANIFEST).read_text("utf-8"))
        if self.manifest["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{folder}: a corpus of format {self.manifest['format_version']}, this version reads "
                f"{FORMAT_VERSION}: prepare it again."
            )
        self._values: list[np.ndarray] = []  # per Arrow chunk: its tokens, end to end
        self._chunk_of: list[np.ndarray] = []
        self._start_of: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        sizes = []
        for source, counts in self.manifest["sources"].items():
            size = 0
            for file in sorted((self.folder / source).glob("*.arrow")):
                try:
                    with pa.memory_map(str(file)) as mapped:
                        column = pa.ipc.open_stream(mapped).read_all().column("input_ids")
                except (OSError, pa.ArrowInvalid) as error:
                    raise UserError(
                        f"{file}: the file is cut short or damaged; copy or prepare the corpus again "
                        f"({error_message(error)})."
                    ) from None
                for chunk in column.chunks:
                    offsets = np.asarray(chunk.offsets).astype(np.int64)
                    self._chunk_of.append(np.full(len(chunk), len(self._values), dtype=np.int32))
                    self._start_of.append(offsets[:-1])
                    self._values.append(np.asarray(chunk.values))
                    lengths.append(np.diff(offsets))
                    size += len(chunk)
            if size != counts["sequences"]:
                raise UserError(
                    f"{self.folder / source}: {size:,} sequences where {MANIFEST} counts {counts['sequences']:,}: "
                    "a file is missing or changed; copy or prepare the corpus again."
                )
            sizes.append(size)
        self.sources: list[str] = list(self.manifest["sources"])
        # First sequence of each source, and one past the last.
        self.bounds = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
        self._chunks = np.concatenate(self._chunk_of) if lengths else np.zeros(0, dtype=np.int32)
        self._starts = np.concatenate(self._start_of) if lengths else np.zeros(0, dtype=np.int64)
        del self._chunk_of, self._start_of

    def __reduce__(self):
        # To another process: open the files there, rather than send them.
        return TokenizedCorpus, (self.folder,)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Token ids of one sequence with its special tokens: (length,) int32, read-only."""
        start = self._starts[index]
        return self._values[self._chunks[index]][start : start + self.lengths[index]]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Count how often each token occurs, (V,)."""
        return sum(np.bincount(values, minlength=vocab_size) for values in self._values)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise a UserError if the corpus was tokenized by another vocabulary."""
        if self.manifest["vocabulary"] != vocabulary_fingerprint(tokenizer):
            raise UserError(f"{self.folder}: the corpus was prepared with another tokenizer's vocabulary.")

    def check_inputs(self, sources: Sequence[str], max_seq_length: int) -> None:
        """
        Raise a UserError if the corpus was made otherwise than asked for now. Sources that are not at hand are compared
        by name, and none at all not: a prepared corpus travels without them.
        """
        made = self.manifest["max_seq_length"]
        if made != max_seq_length:
            raise UserError(
                f"{self.folder}: the corpus was prepared with sequences of up to {made} tokens, max_seq_length is "
                f"{max_seq_length}."
            )
        inputs = [description for files in self.manifest["inputs"].values() for description in files]
        names = [Path(source).name if kind_of(source) in TEXT_KINDS else source for source in sources]
        asked = [describe_input(source) for source in sources if Path(source).is_file()]
        same_names = names == [description["name"] for description in inputs]
        # Each field that was kept: corpora of earlier versions have no fingerprint.
        same_files = all(any(made.items() <= each.items() for made in inputs) for each in asked)
        if sources and not (same_names and same_files):
            raise UserError(
                f"{self.folder}: the corpus was prepared from other files ({', '.join(d['name'] for d in inputs)}); "
                "give another corpus_dir, or delete it."
            )


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the vocabulary, token -> id."""
    text = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def prepare_corpus(
    sources: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    max_seq_length: int,
    text_column: str = "text",
    num_proc: int | None = None,
) -> TokenizedCorpus:
    """
    Tokenize text files into a corpus folder.

    Args:
        sources: Name -> files (txt: a text per line; json, jsonl, parquet: `text_column`), or a Hub data set's
            "name[:config[:split]]" as the only entry.
        tokenizer: Its special tokens are put around every sequence.
        folder: Written whole or not at all.
        max_seq_length: Longer texts are cut into consecutive sequences of this length.
        text_column: Where the text is.
        num_proc: Processes to tokenize with.

    Returns:
        The corpus, opened.

    Raises:
        UserError: a file is missing, empty, binary or malformed.
    """
    manifest = {
        "format_version": FORMAT_VERSION,
        "vocabulary": vocabulary_fingerprint(tokenizer),
        "max_seq_length": max_seq_length,
        "inputs": {name: [describe_input(file) for file in files] for name, files in sources.items()},
        "sources": {},
    }
    check_text_files([file for files in sources.values() for file in files])
    texts = {name: load_texts(files, text_column) for name, files in sources.items()}
    with atomic_folder(folder, replaceable=(MANIFEST, *sources)) as target:
        for name, data in texts.items():
            tokens = data.map(
                lambda batch: tokenize_texts(batch[text_column], tokenizer, max_seq_length),
                batched=True,
                batch_size=MAP_BATCH,
                remove_columns=data.column_names,
                features=token_features(),
                num_proc=num_proc,
                desc=f"Tokens of {name}",
            )
            if len(tokens) == 0:
                raise UserError(f"{', '.join(sources[name])}: there is no text in it.")
            tokens.save_to_disk(str(target / name))
            manifest["sources"][name] = {"texts": len(data), "sequences": len(tokens)}
        (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    return TokenizedCorpus(folder)


def describe_input(file: str) -> dict:
    """Describe an input: name, size and fingerprint of a file, the name alone of a Hub data set."""
    path = Path(file)
    if not path.is_file():
        return {"name": file}
    return {"name": path.name, "bytes": path.stat().st_size, "fingerprint": text_fingerprint(path)}


def text_fingerprint(path: Path) -> str:
    """Hash a file: all of it up to `BLOCKS` blocks, else as many of its blocks, evenly spaced."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for start in np.linspace(0, max(0, size - BLOCK), min(BLOCKS, -(-size // BLOCK)), dtype=np.int64):
            file.seek(start)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def token_features():
    """Return the type of the one column of a tokenized source: `input_ids`, lists of int32."""
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value("int32"))})


def tokenize_texts(texts: list[str | None], tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> dict:
    """Tokenize texts to sequences of up to `max_seq_length` tokens; a long text gives several, an empty one none."""
    texts = tokenizable(texts)
    if not texts:
        return {"input_ids": []}
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=max_seq_length,
        return_overflowing_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    return {"input_ids": encoded["input_ids"]}


def load_texts(files: Sequence[str], text_column: str, streaming: bool = False):
    """
    Load a `datasets` data set with a column of text, from local files of one kind or from the Hub.

    Raises:
        UserError: as `prepare_corpus`.
    """
    from datasets import load_dataset

    if len(files) == 1 and not is_file(files[0]):
        name, _, rest = files[0].partition(":")
        config, _, split = rest.partition(":")
        try:
            data = load_dataset(name, config or None, split=split or "train", streaming=streaming)
        except Exception as error:  # whatever keeps the Hub out of reach
            raise UserError(
                f"{files[0]}: neither a file nor a data set that can be fetched from the Hub ({error_message(error)})."
            ) from None
    else:
        kinds = {check_text_file(Path(file)) for file in files}
        if len(kinds) > 1:
            raise UserError(f"{', '.join(files)}: the files of one source must be of one kind.")
        kind = kinds.pop()
        arguments = {"sample_by": "line"} if kind == "text" else {}
        try:
            data = load_dataset(kind, data_files=list(files), split="train", streaming=streaming, **arguments)
        except Exception as error:
            raise UserError(f"{', '.join(files)}: {error_message(error.__cause__ or error)}") from None
    if text_column not in (data.column_names or [text_column]):
        raise UserError(
            f"{', '.join(files)}: there is no column {text_column!r}; columns: {', '.join(data.column_names)}."
        )
    if streaming:
        check_stream(data, files, text_column)
    elif not tokenizable(data[:STREAM_PEEK][text_column]):
        raise UserError(f"{', '.join(files)}: there is no text in its first {STREAM_PEEK:,} rows.")
    return data


# Rows that are looked at before anything long starts.
STREAM_PEEK = 1000


def check_stream(rows: Iterable[dict], files: Sequence[str], text_column: str) -> None:
    """Raise a UserError if the first rows of a stream cannot be read, or have no text in that column."""
    try:
        for row in islice(rows, STREAM_PEEK):
            if text_column not in row:
                raise UserError(f"{', '.join(files)}: there is no column {text_column!r}; columns: {', '.join(row)}.")
            if tokenizable([row[text_column]]):
                return
    except UserError:
        raise
    except Exception as error:  # of whatever library reads the files
        raise UserError(f"{', '.join(files)}: {error_message(error.__cause__ or error)}") from None
    raise UserError(f"{', '.join(files)}: there is no text in its first {STREAM_PEEK:,} rows.")


def tokenizable(texts: list[str | None]) -> list[str]:
    """Keep the texts that are neither missing nor blank; a number is no text."""
    return [text for text in texts if isinstance(text, str) and text and not text.isspace()]


def is_file(source: str) -> bool:
    """Tell whether a source is meant as a file; else it is a data set of the Hub."""
    return Path(source).exists() or kind_of(source) in TEXT_KINDS


def check_text_files(sources: Sequence[str]) -> None:
    """Check the sources that are files, as `check_text_file` does."""
    for source in sources:
        if is_file(source):
            check_text_file(Path(source))


def check_text_file(path: Path) -> str:
    """Return the `datasets` builder for a file; a UserError if there is none, or it is empty, cut short or binary."""
    kind = kind_of(path)
    if kind not in TEXT_KINDS or (kind == ".parquet" and path.suffix != kind):
        raise UserError(
            f"{path}: it must end in {', '.join(TEXT_KINDS)}, or in one of {', '.join(COMPRESSIONS)} behind them."
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty.")
    if kind != ".parquet":
        try:
            with open_binary(path) as file:
                start = file.read(4096)
        except DAMAGED as error:
            raise damaged(path, error) from None
        if b"\0" in start:
            raise UserError(f"{path}: the file is binary, not text.")
        try:
            # A character may be cut at the end of the piece.
            start[: len(start) - 3 if len(start) == 4096 else None].decode("utf-8")
        except UnicodeDecodeError as error:
            if error.start < len(start) - 4:
                raise UserError(f"{path}: the file is not UTF-8 text (byte {error.start}).") from None
    check_whole(path)
    return TEXT_KINDS[kind]
