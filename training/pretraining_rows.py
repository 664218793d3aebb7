# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The text of a pretraining run: sources to a tokenized corpus or a stream, and these to packed rows."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from modernalbert.cli.errors import UserError, error_message
from modernalbert.data.corpus import (
    MANIFEST,
    TokenizedCorpus,
    check_text_files,
    load_texts,
    prepare_corpus,
    tokenize_texts,
)
from modernalbert.data.packing import Masking, PackedRows, StreamedRows

from .pretraining_arguments import DataArguments, PretrainingArguments


logger = logging.getLogger(__name__)


def source_name(source: str, number: int) -> str:
    """Return a folder name for a source."""
    return f"{number:02d}-{Path(source.split(':')[0]).stem}"


def corpus_folder(data: DataArguments, training: PretrainingArguments) -> Path:
    """Return the folder of the tokens."""
    return Path(data.corpus_dir or Path(training.output_dir) / "corpus")


def check_sources(data: DataArguments, training: PretrainingArguments) -> None:
    """Refuse files that cannot be read as text, before a model is loaded; a prepared corpus needs its files no more."""
    is_prepared = not data.streaming and (corpus_folder(data, training) / MANIFEST).is_file()
    check_text_files([*([] if is_prepared else data.train_sources), *filter(None, [data.validation_file])])


def open_corpus(data: DataArguments, training: PretrainingArguments, tokenizer) -> TokenizedCorpus:
    """Open the prepared corpus; prepared now, by the first process, if it is not there."""
    folder = corpus_folder(data, training)
    with training.main_process_first(local=False):
        if (folder / MANIFEST).is_file():
            corpus = TokenizedCorpus(folder)
        elif training.world_size > 1:
            raise UserError(f"{folder} holds no prepared corpus: prepare it first, by one process with --prepare_only.")
        elif not data.train_sources:
            raise UserError("--train_sources is missing, and --corpus_dir holds no prepared corpus.")
        else:
            sources = {source_name(source, i): [source] for i, source in enumerate(data.train_sources)}
            corpus = prepare_corpus(
                sources, tokenizer, folder, data.max_seq_length, data.text_column, data.preprocessing_num_workers
            )
    corpus.check_tokenizer(tokenizer)
    corpus.check_inputs(data.train_sources, data.max_seq_length)
    return corpus


def rows_of_step(training: PretrainingArguments) -> int:
    """Return the number of rows of one optimizer step over all processes."""
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def training_rows(
    data: DataArguments,
    training: PretrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    masking: Masking,
    with_sequence_indices: bool = False,
) -> Dataset | IterableDataset:
    """Return the rows to train on; set `training.max_steps` from the epochs where it is not given."""
    row_length = data.row_length or data.max_seq_length
    if data.streaming:
        from datasets import interleave_datasets

        streams = [
            load_texts([source], data.text_column, streaming=True).select_columns([data.text_column])
            for source in data.train_sources
        ]
        if not streams:
            raise UserError("--train_sources is missing.")
        check_streams(streams, data, rows_of_step(training), row_length, tokenizer)
        streams = [stream.repeat(None) for stream in streams]
        weights = [weight / sum(data.source_weights) for weight in data.source_weights] or None
        texts = streams[0] if len(streams) == 1 else interleave_datasets(streams, weights, seed=training.seed)
        return StreamedRows(
            texts, data.text_column, tokenizer, data.max_seq_length, row_length, masking, seed=training.seed
        )
    corpus = open_corpus(data, training, tokenizer)
    step = rows_of_step(training)
    rows_in_corpus = corpus.num_tokens / row_length
    if rows_in_corpus < step:
        raise UserError(too_short(corpus.num_tokens, step, row_length))
    if training.max_steps <= 0:
        training.max_steps = math.ceil(training.num_train_epochs * rows_in_corpus / step)
    logger.warning(
        f"Corpus: {len(corpus):,} sequences, {corpus.num_tokens:,} tokens. {training.max_steps:,} steps of "
        f"{step} x {row_length} tokens: {training.max_steps * step / rows_in_corpus:.2f} passes."
    )
    return PackedRows(
        corpus,
        num_rows=training.max_steps * step,
        row_length=row_length,
        masking=masking,
        pad_token_id=tokenizer.pad_token_id,
        seed=training.seed,
        source_weights=data.source_weights or None,
        with_sequence_indices=with_sequence_indices,
    )


def check_streams(
    streams: Sequence, data: DataArguments, step: int, row_length: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise a UserError if all of the streams' text is less than one step."""
    tokens = 0
    for stream in streams:
        for texts in stream.iter(batch_size=256):
            encoded = tokenize_texts(texts[data.text_column], tokenizer, data.max_seq_length)
            tokens += sum(len(sequence) for sequence in encoded["input_ids"])
            if tokens >= step * row_length:
                return
    raise UserError(too_short(tokens, step, row_length))


def too_short(tokens: int, step: int, row_length: int) -> str:
    return (
        f"the text has {tokens:,} tokens, less than one step of {step} rows of {row_length}: take more text or smaller "
        "batches."
    )


def validation_rows(
    data: DataArguments, training: PretrainingArguments, tokenizer: PreTrainedTokenizerBase, masking: Masking
) -> list[dict[str, torch.Tensor]] | None:
    """Return rows of held-out text, every sequence masked, the same at every evaluation."""
    if data.validation_file is None:
        return None
    texts = load_texts([data.validation_file], data.text_column)
    rows = StreamedRows(
        texts,
        data.text_column,
        tokenizer,
        data.max_seq_length,
        data.row_length or data.max_seq_length,
        replace(masking, sequence_share=1.0),
    )
    rows = list(islice(rows, data.max_eval_rows))
    if not rows:
        raise UserError(f"--validation_file {data.validation_file}: there is no text in it.")
    return rows


def make_masking(data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Masking:
    """Make the masking that the arguments ask for."""
    try:
        return Masking.for_tokenizer(
            tokenizer, data.mlm_probability, data.masked_sequence_share, data.whole_word_masking
        )
    except ValueError as error:
        raise UserError(error_message(error)) from None
