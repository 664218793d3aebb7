# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Extractive question answering: a context in windows of tokens, the best spans in them, and a helper around both.

    from modernalbert.question_answering import question_answering

    answer = question_answering(model, tokenizer, "Who wrote it?", "It was written by Ada in 1843.")
    answer.text, answer.start, answer.end, answer.score, answer.no_answer_score
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modernalbert.cli.errors import UserError


logger = logging.getLogger(__name__)

# The first token of a window (CLS) stands for "no answer".
NO_ANSWER_TOKEN = 0
# Odds against any answer where a context has no token to answer with; finite, as JSON knows no infinity.
HOPELESS_ODDS = 1e4
# Windows searched at once: the search takes windows * tokens * max_answer_length numbers.
SEARCH_BLOCK = 64


@dataclass(frozen=True)
class Span:
    """A piece of a context: `context[start:end] == text`, and its probability among the candidates."""

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Answer:
    """
    Answer of a model to a question.

    Attributes:
        candidates: The best spans, best first; empty only for a context without text.
        no_answer_score: Probability that there is no answer. It and the scores of the candidates add up to 1.
        null_odds: Logarithm of no_answer_score over the best candidate's score.
        null_threshold: From which odds up there is no answer; `None`: there always is one.
    """

    candidates: tuple[Span, ...]
    no_answer_score: float
    null_odds: float
    null_threshold: float | None = None

    @property
    def best(self) -> Span:
        """The answer given: the best candidate, or the empty span for no answer."""
        is_null = self.null_threshold is not None and self.null_odds > self.null_threshold
        return Span("", 0, 0, self.no_answer_score) if is_null or not self.candidates else self.candidates[0]

    @property
    def text(self) -> str:
        """The answer as it stands in the context; empty for no answer."""
        return self.best.text

    @property
    def start(self) -> int:
        """First character in the context."""
        return self.best.start

    @property
    def end(self) -> int:
        """Last character + 1."""
        return self.best.end

    @property
    def score(self) -> float:
        """Probability of the answer given."""
        return self.best.score


# --- windows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """
    Places of the tokens of windows in the contexts.

    Attributes:
        question: (windows,) which question a window belongs to; a question's windows follow one another.
        first_token: (windows,) the first token of the context in its window.
        token_starts, token_ends: For each window the characters of its context tokens, (tokens of that window,).
    """

    question: np.ndarray
    first_token: np.ndarray
    token_starts: list[np.ndarray]
    token_ends: list[np.ndarray]

    COLUMNS = ("question_index", "first_token", "token_starts", "token_ends")

    @classmethod
    def from_columns(cls, columns: dict[str, list]) -> "Windows":
        """Build from the columns that `encode_windows` gives."""
        question, first_token, starts, ends = (columns[name] for name in cls.COLUMNS)
        return cls(
            np.array(question), np.array(first_token), [np.array(x) for x in starts], [np.array(x) for x in ends]
        )


def longest_question(tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int) -> int:
    """
    Return how many tokens of a question are kept: half of what the overlap leaves, so that every window brings new
    text.

    Raises:
        UserError: the overlap leaves no room.
    """
    num_special = tokenizer.num_special_tokens_to_add(pair=True)
    if stride < 0 or max_length < stride + num_special + 2:
        raise UserError(
            f"windows of {max_length} tokens that overlap by {stride} are not allowed: they must overlap by at least 0 "
            f"tokens and be {num_special + 2} longer than that."
        )
    return (max_length - num_special - stride) // 2


def cut_questions(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], limit: int
) -> tuple[list[str], list[int]]:
    """Truncate questions to a number of tokens; also return the indices of those that had more."""
    offsets = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    too_long = [i for i, tokens in enumerate(offsets) if len(tokens) > limit]
    cut = list(questions)
    for i in too_long:
        cut[i] = cut[i][: offsets[i][limit - 1][1]]
    return cut, too_long


def encode_windows(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    contexts: Sequence[str],
    max_length: int,
    stride: int,
    first_index: int = 0,
) -> dict[str, list]:
    """
    Encode questions with their contexts as rows of at most `max_length` tokens, not padded.

    A context that is too long gives several windows, of which neighbours share `stride` tokens.

    Args:
        questions: Not longer than `longest_question`.
        first_index: Index of the first question.

    Returns:
        What the tokenizer returns ("input_ids", ...), and `Windows.COLUMNS`, window by window.
    """
    encoded = tokenizer(
        list(questions),
        list(contexts),
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    columns = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
    columns |= {name: [] for name in Windows.COLUMNS}
    for i, (question, offsets) in enumerate(zip(encoded["overflow_to_sample_mapping"], encoded["offset_mapping"])):
        parts = encoded.sequence_ids(i)
        first = parts.index(1) if 1 in parts else len(parts)
        last = len(parts) - parts[::-1].index(1) if 1 in parts else first
        columns["question_index"].append(first_index + question)
        columns["first_token"].append(first)
        columns["token_starts"].append([start for start, _ in offsets[first:last]])
        columns["token_ends"].append([end for _, end in offsets[first:last]])
    return columns


def span_to_tokens(windows: Windows, spans: Sequence[tuple[int, int] | None]) -> tuple[list[int], list[int]]:
    """
    First and last token of each window's answer; the "no answer" token where the answer is not whole in the window.

    Args:
        spans: For each question the characters of its answer; `None` without one.
    """
    firsts, lasts = [], []
    for question, offset, starts, ends in zip(
        windows.question, windows.first_token, windows.token_starts, windows.token_ends
    ):
        span = spans[question]
        first = last = NO_ANSWER_TOKEN
        if span is not None and len(starts) and starts[0] <= span[0] and span[1] <= ends[-1]:
            # The first token that ends behind the answer's beginning, the last that begins before its end: some
            # tokenizers count the space before a word to its token, or make several tokens of one character.
            first = offset + int(np.searchsorted(ends, span[0], side="right"))
            last = offset + int(np.searchsorted(starts, span[1], side="left")) - 1
        firsts.append(int(first))
        lasts.append(int(last))
    return firsts, lasts


# --- spans -----------------------------------------------------------------------------------------------------------


def best_token_spans(
    start_logits: np.ndarray, end_logits: np.ndarray, n_best: int, max_answer_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Find the best spans of at most `max_answer_length` tokens in each row, out of all there are; of the best the first.

    Args:
        start_logits, end_logits: (rows, tokens), minus infinity where no answer may begin or end.

    Returns:
        Score (start logit + end logit), first and last token of the spans, each (rows, n), best first.
    """
    num_tokens = start_logits.shape[1]
    length = min(max_answer_length, num_tokens)
    padded = np.pad(end_logits, ((0, 0), (0, length - 1)), constant_values=-np.inf)
    reachable = np.lib.stride_tricks.sliding_window_view(padded, length, axis=1)  # (rows, tokens, length)
    # The n best spans begin at n tokens at most: those from which the best spans begin.
    best_from = start_logits + reachable.max(axis=2)
    starts = np.argsort(-best_from, axis=1, kind="stable")[:, :n_best]
    scores = np.take_along_axis(start_logits, starts, 1)[..., None] + np.take_along_axis(
        reachable, starts[..., None], axis=1
    )
    scores = scores.reshape(len(scores), -1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :n_best]
    first = np.take_along_axis(starts, order // length, axis=1)
    return np.take_along_axis(scores, order, axis=1), first, first + order % length


def find_answers(
    contexts: Sequence[str],
    windows: Windows,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    n_best: int,
    max_answer_length: int,
    null_threshold: float | None = None,
) -> list[Answer]:
    """
    Find the answer to each question from the logits of its windows.

    A span that several windows hold counts once, with its highest score. The score of no answer is the lowest that a
    window of the question gives it, as in BERT's script.

    Args:
        contexts: One for each question.
        start_logits, end_logits: (windows, tokens), padded to the right with anything.
        n_best: Number of candidates to keep.
        max_answer_length: In tokens.
    """
    spans: list[dict[tuple[int, int], float]] = [{} for _ in contexts]
    null_scores = np.full(len(contexts), np.inf)
    np.minimum.at(null_scores, windows.question, (start_logits + end_logits)[:, NO_ANSWER_TOKEN])
    places = np.arange(start_logits.shape[1])
    for block in range(0, len(windows.question), SEARCH_BLOCK):
        rows = slice(block, block + SEARCH_BLOCK)
        first_token = windows.first_token[rows, None]
        lengths = np.array([len(starts) for starts in windows.token_starts[rows]])[:, None]
        in_context = (places >= first_token) & (places < first_token + lengths)
        scores, firsts, lasts = best_token_spans(
            np.where(in_context, start_logits[rows], -np.inf),
            np.where(in_context, end_logits[rows], -np.inf),
            n_best,
            max_answer_length,
        )
        for row, index in enumerate(range(block, block + len(scores))):
            question, starts, ends = windows.question[index], windows.token_starts[index], windows.token_ends[index]
            found = np.isfinite(scores[row])
            begins = starts[firsts[row][found] - windows.first_token[index]]
            stops = ends[lasts[row][found] - windows.first_token[index]]
            for span in zip(begins.tolist(), stops.tolist(), scores[row][found].tolist()):
                start, end = _without_space(contexts[question], *span[:2])
                if start < end:
                    spans[question][start, end] = max(span[2], spans[question].get((start, end), -np.inf))
    return [
        _answer(context, found, float(null_score), n_best, null_threshold)
        for context, found, null_score in zip(contexts, spans, null_scores)
    ]


def _without_space(context: str, start: int, end: int) -> tuple[int, int]:
    text = context[start:end]
    return start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())


def _answer(
    context: str, spans: dict[tuple[int, int], float], null_score: float, n_best: int, null_threshold: float | None
) -> Answer:
    best = sorted(spans.items(), key=lambda item: (-item[1], item[0]))[:n_best]
    scores = np.array([null_score, *(score for _, score in best)])
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    candidates = tuple(
        Span(context[start:end], start, end, float(probability))
        for ((start, end), _), probability in zip(best, probabilities[1:])
    )
    odds = null_score - best[0][1] if best else HOPELESS_ODDS
    return Answer(candidates, float(probabilities[0]), odds, null_threshold)


# --- helper ----------------------------------------------------------------------------------------------------------


def question_answering(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str | Sequence[str],
    context: str | Sequence[str],
    *,
    null_threshold: float | None = 0.0,
    n_best: int = 20,
    max_answer_length: int = 30,
    max_length: int = 384,
    stride: int = 128,
    batch_size: int = 32,
) -> Answer | list[Answer]:
    """
    Answer questions from their contexts, of any length.

    Args:
        model: With a head for question answering; used as it is in evaluation mode, on its device.
        tokenizer: Its tokenizer, a fast one.
        question, context: One or several of each; one goes with all of the other.
        null_threshold: No answer if its odds (`Answer.null_odds`) are above; `None`: always an answer. `run_squad.py`
            writes the one that was best on its validation questions as `null_threshold`.
        n_best: Number of candidates to keep for each question.
        max_answer_length: In tokens.
        max_length: Tokens in a window: question, context and special tokens.
        stride: Tokens of a long context that two neighbouring windows share.
        batch_size: Windows that go through the model together.

    Returns:
        An `Answer`, or a list of them if a list was given.

    Raises:
        UserError: the lists differ in length, a size is not allowed, or the tokenizer gives no offsets.
    """
    is_single = isinstance(question, str) and isinstance(context, str)
    if is_single:
        question = [question]
    questions = [question] * len(context) if isinstance(question, str) else list(question)
    contexts = [context] * len(questions) if isinstance(context, str) else list(context)
    if len(questions) != len(contexts):
        raise UserError(f"{len(questions)} questions and {len(contexts)} contexts do not go together.")
    for name, value in {"n_best": n_best, "max_answer_length": max_answer_length, "batch_size": batch_size}.items():
        if value < 1:
            raise UserError(f"{name}={value} is not allowed: it must be at least 1.")
    if not questions:
        return []
    check_tokenizer(tokenizer)
    max_length = min(max_length, tokenizer.model_max_length)
    limit = longest_question(tokenizer, max_length, stride)
    questions, too_long = cut_questions(tokenizer, questions, limit)
    if too_long:
        logger.warning(f"{len(too_long)} questions were cut to {limit} tokens, the first of them number {too_long[0]}.")
    columns = encode_windows(tokenizer, questions, contexts, max_length, stride)
    windows = Windows.from_columns(columns)
    inputs = {name: values for name, values in columns.items() if name not in Windows.COLUMNS}
    start_logits, end_logits = _window_logits(model, tokenizer, inputs, batch_size)
    answers = find_answers(contexts, windows, start_logits, end_logits, n_best, max_answer_length, null_threshold)
    return answers[0] if is_single else answers


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not say which characters its tokens stand for."""
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no offsets into the text: a fast tokenizer is needed.")


@torch.no_grad()
def _window_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: dict[str, list], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Start and end logits, (windows, longest window) each, padded with 0; windows of like length run together."""
    lengths = np.array([len(ids) for ids in inputs["input_ids"]])
    order = np.argsort(-lengths, kind="stable")
    logits = np.zeros((2, len(lengths), lengths.max()), dtype=np.float32)
    was_training = model.training
    model.eval()
    try:
        for rows in np.array_split(order, range(batch_size, len(order), batch_size)):
            batch = {name: [values[i] for i in rows] for name, values in inputs.items()}
            batch = tokenizer.pad(batch, padding_side="right", return_tensors="pt").to(model.device)
            output = model(**batch)
            for part, values in zip(logits, (output.start_logits, output.end_logits)):
                part[rows, : values.shape[1]] = values.float().cpu().numpy()
    finally:
        model.train(was_training)
    return logits[0], logits[1]
