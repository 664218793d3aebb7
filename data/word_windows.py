# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Sentences of words as rows of tokens: long ones in overlapping windows, so that every word is predicted once."""

import bisect
import logging
from collections import defaultdict
from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

# What the loss does not count.
NO_LABEL = -100


def tokens_of_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[list[int]]:
    """
    Return each word's token ids, of the words joined by spaces, as the tokenizer sees running text.

    A word of nothing the tokenizer keeps, such as a lone control character, is its unknown token.
    """
    ends, length = [], -1
    for word in words:
        length += 1 + len(word)
        ends.append(length)
    encoded = tokenizer(" ".join(words), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens: list[list[int]] = [[] for _ in words]
    for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"]):
        # A token is part of the word its last character is in; a space alone goes to the word behind it.
        word = bisect.bisect_right(ends, max(0, end - 1))
        tokens[min(word, len(words) - 1)].append(token)
    return [ids or [tokenizer.unk_token_id] for ids in tokens]


def windows_of(lengths: Sequence[int], capacity: int, overlap: int) -> list[range]:
    """
    Cut a sentence into windows of whole words.

    Args:
        lengths: Tokens of each word, none above `capacity`.
        capacity: Tokens that fit into a window.
        overlap: Tokens of its predecessor that a window repeats, at most.

    Returns:
        The words of each window; together they are all words.
    """
    windows, first, past, room = [], 0, 0, capacity
    while True:
        while past < len(lengths) and lengths[past] <= room:
            room -= lengths[past]
            past += 1
        windows.append(range(first, past))
        if past == len(lengths):
            return windows
        # Back by whole words, as far as the next word still fits.
        first, repeated = past, 0
        while repeated + lengths[first - 1] <= min(overlap, capacity - lengths[past]):
            first -= 1
            repeated += lengths[first]
        room = capacity - repeated


def window_of_word(windows: Sequence[range], word: int, num_words: int) -> int:
    """Return the window in which the word has most words on its shorter side, of those that hold it."""

    def context(number: int) -> int:
        window = windows[number]
        left = word - window.start if window.start > 0 else num_words
        right = window.stop - 1 - word if window.stop < num_words else num_words
        return min(left, right)

    return max((i for i, window in enumerate(windows) if word in window), key=context)


def encode_sentences(
    sentences: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int,
    overlap: int,
) -> Dataset:
    """
    Encode sentences as rows of tokens, one or more for each.

    A word is labelled at its first token, in one window only: the one that shows most around it. So each word counts
    once, in the loss as in the predictions.

    Args:
        sentences: Columns "words" and, if known, "tags".
        labels: Tags by label id. A tag that is none of them is not learned from.
        max_length: Tokens of a window, special ones included. A longer word is cut.
        overlap: Tokens that a window repeats.

    Returns:
        Columns "input_ids", "sentence" (number), "words" (by token: the number of the word it stands for, or -1) and,
        where there are tags, "labels" and "tags" (by token; "" where it stands for none).
    """
    example = tokenizer("a", return_special_tokens_mask=True)
    marks = example["special_tokens_mask"]
    before = example["input_ids"][: marks.index(0)]
    behind = example["input_ids"][len(marks) - marks[::-1].index(0) :]
    capacity = max_length - len(before) - len(behind)
    label_ids = {label: i for i, label in enumerate(labels)}
    too_long = []
    has_tags = "tags" in sentences.column_names

    def encode(batch: dict, numbers: list[int]) -> dict:
        rows = defaultdict(list)
        for i, (number, words) in enumerate(zip(numbers, batch["words"])):
            tokens = tokens_of_words(tokenizer, words)
            too_long.extend(word for word, ids in zip(words, tokens) if len(ids) > capacity)
            tokens = [ids[:capacity] for ids in tokens]
            windows = windows_of([len(ids) for ids in tokens], capacity, overlap)
            owners = [window_of_word(windows, word, len(words)) for word in range(len(words))]
            for w, window in enumerate(windows):
                ids, places = list(before), [-1] * len(before)
                for word in window:
                    ids += tokens[word]
                    places += [word if owners[word] == w else -1] + [-1] * (len(tokens[word]) - 1)
                rows["input_ids"].append(ids + behind)
                rows["words"].append(places + [-1] * len(behind))
                rows["sentence"].append(number)
                if has_tags:
                    tags = ["" if word < 0 else batch["tags"][i][word] for word in rows["words"][-1]]
                    rows["tags"].append(tags)
                    rows["labels"].append([label_ids.get(tag, NO_LABEL) for tag in tags])
        return rows

    rows = sentences.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=sentences.column_names,
        load_from_cache_file=False,  # it counts, too
        desc="Tokens",
    )
    if too_long:
        logger.warning(
            f"{len(too_long)} words are longer than a window of {max_length} tokens, and cut: {too_long[0]}."
        )
    return rows


def by_sentence(rows: Dataset, values: Sequence[Sequence]) -> list[list]:
    """
    Put values of tokens together again, by sentence and word.

    Args:
        rows: Of `encode_sentences`, in any order, whole sentences.
        values: A value for each token of each row; more at the end of a row are padding.
    """
    found: dict[int, dict] = defaultdict(dict)
    for sentence, words, row in zip(rows["sentence"], rows["words"], values):
        found[sentence] |= {word: row[place] for place, word in enumerate(words) if word >= 0}
    return [[words[word] for word in sorted(words)] for _, words in sorted(found.items())]
