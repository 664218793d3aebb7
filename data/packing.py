# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Rows for pretraining: sequences packed to a fixed length, masked, in an order that depends on nothing but a seed.

Row number i is a function of the corpus, the seed and i alone. So a run resumed in the middle of an epoch, or split
over any number of processes and workers, sees exactly the rows it would have seen; and a run made longer sees the same
rows first.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from modernalbert.cli.errors import UserError
from modernalbert.data.corpus import TokenizedCorpus, tokenize_texts


# Sequences shuffled and packed together.
BLOCK = 1 << 16
IGNORE = -100


def pack(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """
    Best-fit-decreasing: each sequence, longest first, goes to the fullest row it fits into.

    Args:
        lengths: (n,), each at most `row_length`.

    Returns:
        Rows of indices into `lengths`.
    """
    rows: list[list[int]] = []
    rows_with_space: list[list[int]] = [[] for _ in range(row_length + 1)]
    spaces = 0  # bit s is set where a row with s free places exists
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_space[space].pop()
            if not rows_with_space[space]:
                spaces &= ~(1 << space)
            rows[row].append(index)
        else:
            space, row = row_length, len(rows)
            rows.append([index])
        rows_with_space[space - length].append(row)
        spaces |= 1 << (space - length)
    return rows


@dataclass(frozen=True)
class Masking:
    """
    Masking of tokens for the masked language model: 80 % become [MASK], 10 % another token, 10 % stay (as BERT).

    Attributes:
        probability: Share of the tokens of a masked sequence that are to be predicted.
        sequence_share: Share of the sequences that are masked at all; the others serve distillation alone.
        whole_words: Mask all pieces of a word or none.
        mask_token_id: Of [MASK].
        vocab_size: Random replacements are drawn below it.
        special_ids: Never masked.
        continues_word: (V,) booleans, whether a token continues the word before it.
    """

    probability: float
    sequence_share: float
    whole_words: bool
    mask_token_id: int
    vocab_size: int
    special_ids: np.ndarray
    continues_word: np.ndarray

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        probability: float = 0.3,
        sequence_share: float = 1.0,
        whole_words: bool = False,
    ) -> "Masking":
        """
        Raises:
            ValueError: the tokenizer has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise ValueError("The tokenizer has no mask token.")
        size = len(tokenizer)
        return cls(
            probability=probability,
            sequence_share=sequence_share,
            whole_words=whole_words,
            mask_token_id=tokenizer.mask_token_id,
            vocab_size=size,
            special_ids=np.array(sorted(tokenizer.all_special_ids)),
            continues_word=word_continuations(tokenizer.convert_ids_to_tokens(range(size))),
        )

    def apply(self, ids: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            ids: (length,) of one sequence.

        Returns:
            Ids with masks, and labels (-100 where nothing is to be predicted), both (length,) int64.
        """
        inputs, labels = ids.astype(np.int64), np.full(len(ids), IGNORE, dtype=np.int64)
        if self.probability == 0 or generator.random() >= self.sequence_share:
            return inputs, labels
        candidates = np.flatnonzero(~np.isin(ids, self.special_ids))
        if len(candidates) == 0:
            return inputs, labels
        # A fixed number, so that all batches weigh alike; a fraction of a token is drawn.
        budget = int(self.probability * len(candidates) + generator.random())
        if self.whole_words:
            words = np.cumsum(~self.continues_word[ids[candidates]])
            order = generator.permutation(words[-1] + 1)[words]
            ranked = candidates[np.argsort(order, kind="stable")]
            sizes = np.bincount(order)
            sizes = sizes[sizes > 0]
            # Words as long as the last one begins within the budget: it may pass it.
            ends = np.cumsum(sizes)
            budget = int(ends[np.searchsorted(ends, budget)]) if budget else 0
            chosen = ranked[:budget]
        else:
            chosen = generator.permutation(candidates)[:budget]
        labels[chosen] = ids[chosen]
        fate = generator.random(len(chosen))
        inputs[chosen[fate < 0.8]] = self.mask_token_id
        replaced = chosen[(fate >= 0.8) & (fate < 0.9)]
        inputs[replaced] = generator.integers(0, self.vocab_size, len(replaced))
        return inputs, labels


def word_continuations(tokens: Sequence[str | None]) -> np.ndarray:
    """
    Find the tokens that continue a word.

    In a WordPiece vocabulary: "##x". In a byte-level one: tokens that begin with a letter or digit, without a space.
    """
    if any(token and token.startswith("##") for token in tokens):
        return np.array([bool(token) and token.startswith("##") for token in tokens])
    return np.array([bool(token) and token[0].isalnum() and token[0] not in "ĠĊ" for token in tokens])


def make_row(
    sequences: Sequence[np.ndarray],
    row_length: int,
    pad_token_id: int,
    masking: Masking,
    generator: np.random.Generator,
) -> dict[str, torch.Tensor]:
    """
    Make one row of packed sequences.

    Returns:
        Tensors (row_length,) int64: `input_ids` (masked), `clean_input_ids`, `labels`, `position_ids` (from 0 in every
        sequence, and in the padding at the end), `attention_mask`.
    """
    inputs = np.full(row_length, pad_token_id, dtype=np.int64)
    clean, labels = inputs.copy(), np.full(row_length, IGNORE, dtype=np.int64)
    positions, attention = np.zeros(row_length, dtype=np.int64), np.zeros(row_length, dtype=np.int64)
    start = 0
    for sequence in sequences:
        end = start + len(sequence)
        clean[start:end] = sequence
        inputs[start:end], labels[start:end] = masking.apply(sequence, generator)
        positions[start:end] = np.arange(len(sequence))
        attention[start:end] = 1
        start = end
    positions[start:] = np.arange(row_length - start)
    row = {
        "input_ids": inputs,
        "clean_input_ids": clean,
        "labels": labels,
        "position_ids": positions,
        "attention_mask": attention,
    }
    return {name: torch.from_numpy(values) for name, values in row.items()}


class PackedRows(Dataset):
    """
    A fixed number of rows from a prepared corpus, to be read in order.

    Args:
        corpus: Its sequences are at most `row_length` long.
        num_rows: How many rows there are to be; sources are read again as often as that takes.
        row_length: Tokens of a row.
        masking: How to mask.
        pad_token_id: Fills rows up.
        seed: Of order and masks.
        source_weights: Relative share of the tokens of each source; None takes each in proportion to its size, so that
            none is read again before all are through.
        with_sequence_indices: Give each row also `sequence_indices`, the number in the corpus of each token's sequence,
            -1 for padding.

    Raises:
        UserError: a sequence is longer than a row.
    """

    def __init__(
        self,
        corpus: TokenizedCorpus,
        num_rows: int,
        row_length: int,
        masking: Masking,
        pad_token_id: int,
        seed: int = 0,
        source_weights: Sequence[float] | None = None,
        with_sequence_indices: bool = False,
    ):
        if len(corpus) and corpus.lengths.max() > row_length:
            raise UserError(
                f"{corpus.folder}: the corpus has sequences of {corpus.lengths.max()} tokens, a row has {row_length}."
            )
        self.with_sequence_indices = with_sequence_indices
        self.corpus, self.num_rows, self.row_length = corpus, num_rows, row_length
        self.masking, self.pad_token_id, self.seed = masking, pad_token_id, seed
        sizes = np.diff(corpus.bounds)
        if source_weights is None:
            # One source as large as all: a permutation visits everything once.
            self.bounds, self.shares = np.array([0, len(corpus)]), np.ones(1)
        else:
            tokens = np.array([corpus.lengths[a:b].sum() for a, b in zip(corpus.bounds, corpus.bounds[1:])])
            # Shares of tokens into shares of sequences.
            shares = np.asarray(source_weights, dtype=np.float64) * sizes / tokens
            self.bounds, self.shares = corpus.bounds, shares / shares.sum()
        self._drawn = [np.zeros(len(self.shares), dtype=np.int64)]  # sequences drawn of each source before each block
        self._first_rows = [0]  # number of the first row of each block
        self._block: tuple[int, np.ndarray, list[list[int]]] | None = None
        self._permutation: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        indices = self.sequences_of(number)
        generator = np.random.default_rng([self.seed, 2, number])
        sequences = [self.corpus[i] for i in indices]
        row = make_row(sequences, self.row_length, self.pad_token_id, self.masking, generator)
        if self.with_sequence_indices:
            numbers = np.full(self.row_length, -1, dtype=np.int64)
            repeated = np.repeat(indices, self.corpus.lengths[indices])
            numbers[: len(repeated)] = repeated
            row["sequence_indices"] = torch.from_numpy(numbers)
        return row

    def sequences_of(self, number: int) -> np.ndarray:
        """Return the numbers of the sequences that a row holds."""
        if not 0 <= number < self.num_rows:
            raise IndexError(f"row {number} of {self.num_rows}")
        block = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        while True:
            indices, rows = self._load(block)
            if number < self._first_rows[block] + len(rows):
                return indices[rows[number - self._first_rows[block]]]
            block += 1

    def _load(self, block: int) -> tuple[np.ndarray, list[list[int]]]:
        """Load the sequences of a block and their rows, in a random order. Blocks before it have been loaded once."""
        if self._block is None or self._block[0] != block:
            generator = np.random.default_rng([self.seed, 0, block])
            size = min(BLOCK, max(len(self.corpus), 1))
            labels = generator.choice(len(self.shares), size=size, p=self.shares)
            drawn = self._drawn[block]
            indices = np.empty(size, dtype=np.int64)
            for source in range(len(self.shares)):
                places = np.flatnonzero(labels == source)
                indices[places] = self._sequences(source, drawn[source], len(places))
            rows = pack(self.corpus.lengths[indices], self.row_length)
            rows = [rows[i] for i in generator.permutation(len(rows))]
            if block + 1 == len(self._drawn):
                self._drawn.append(drawn + np.bincount(labels, minlength=len(self.shares)))
                self._first_rows.append(self._first_rows[block] + len(rows))
            self._block = block, indices, rows
        return self._block[1:]

    def _sequences(self, source: int, start: int, count: int) -> np.ndarray:
        """Return `count` sequences of a source from the `start`-th on, in endless random passes."""
        first, size = self.bounds[source], self.bounds[source + 1] - self.bounds[source]
        numbers = np.arange(start, start + count)
        indices = np.empty(count, dtype=np.int64)
        for epoch in np.unique(numbers // size).tolist():
            if (source, epoch) not in self._permutation:
                self._permutation = {key: p for key, p in self._permutation.items() if key[0] != source}
                generator = np.random.default_rng([self.seed, 1, source, epoch])
                self._permutation[source, epoch] = generator.permutation(size)
            here = numbers // size == epoch
            indices[here] = first + self._permutation[source, epoch][numbers[here] % size]
        return indices


class StreamedRows(IterableDataset):
    """
    Rows from an endless or finite stream of texts: tokenized, packed and masked on the way.

    Args:
        texts: A re-iterable of rows with a column of text, a streaming `datasets` data set for one.
        text_column: Where the text is.
        tokenizer: Its special tokens are put around every sequence.
        max_seq_length: Longer texts are cut.
        buffer: Sequences packed together.
        row_length, masking, pad_token_id, seed: As `PackedRows`.
    """

    def __init__(
        self,
        texts: Iterable[dict],
        text_column: str,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_length: int,
        row_length: int,
        masking: Masking,
        seed: int = 0,
        buffer: int = 1 << 12,
    ):
        self.texts, self.text_column, self.tokenizer = texts, text_column, tokenizer
        self.max_seq_length, self.row_length, self.masking = max_seq_length, row_length, masking
        self.seed, self.buffer = seed, buffer

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        number = 0
        for block, sequences in enumerate(self._blocks()):
            rows = pack(np.array([len(sequence) for sequence in sequences]), self.row_length)
            for i in np.random.default_rng([self.seed, 0, block]).permutation(len(rows)):
                generator = np.random.default_rng([self.seed, 2, number])
                row = [sequences[j] for j in rows[i]]
                yield make_row(row, self.row_length, self.tokenizer.pad_token_id, self.masking, generator)
                number += 1

    def _blocks(self) -> Iterator[list[np.ndarray]]:
        texts: list[str] = []
        sequences: list[np.ndarray] = []

        def tokenized() -> list[np.ndarray]:
            ids = tokenize_texts(texts, self.tokenizer, self.max_seq_length)["input_ids"]
            texts.clear()
            return [np.array(sequence, dtype=np.int32) for sequence in ids]

        for row in self.texts:
            texts.append(row[self.text_column])
            if len(texts) == 256:
                sequences += tokenized()
                while len(sequences) >= self.buffer:
                    yield sequences[: self.buffer]
                    sequences = sequences[self.buffer :]
        sequences += tokenized()
        if sequences:
            yield sequences
