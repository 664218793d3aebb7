# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The official metrics of SQuAD 1.1 and 2.0."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from modernalbert.data.squad import Question


METRICS = ("f1", "exact")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Normalise the text: lower case, without ASCII punctuation, the words a, an, the, and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """Return 1.0 if both are the same after normalisation."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the words after normalisation; nothing agrees with nothing only."""
    predicted, right = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not predicted or not right:
        return float(predicted == right)
    common = sum((Counter(predicted) & Counter(right)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(right)
    return 2 * precision * recall / (precision + recall)


def question_scores(question: Question, prediction: str) -> dict[str, float]:
    """
    Compute "exact" and "f1" of one prediction, 0 to 1: those of the answer that it is nearest to.

    As in the official script, answers of which normalisation leaves nothing ("the") do not count.
    """
    answers = [answer for answer in question.answers if normalize_answer(answer)] or [""]
    return {
        "exact": max(exact_match(prediction, answer) for answer in answers),
        "f1": max(token_f1(prediction, answer) for answer in answers),
    }


def squad_metrics(questions: Sequence[Question], predictions: dict[str, str]) -> dict[str, float]:
    """
    Compute what the official script (evaluate-v2.0.py) reports, under its names, in percent.

    Args:
        questions: With answers.
        predictions: The answer to each question's id, "" for none.

    Returns:
        "exact", "f1" and "total" (questions), over all; and with the prefix "HasAns_" over the questions that have an
        answer, "NoAns_" over those that have none, where there are such.
    """
    scores = [question_scores(question, predictions[question.id]) for question in questions]
    metrics: dict[str, float] = {}
    parts = {"": (True, False), "HasAns_": (True,), "NoAns_": (False,)}
    for prefix, wanted in parts.items():
        chosen = [score for score, question in zip(scores, questions) if bool(question.answers) in wanted]
        if chosen:
            for name in ("exact", "f1"):
                metrics[prefix + name] = 100.0 * sum(score[name] for score in chosen) / len(chosen)
            metrics[prefix + "total"] = len(chosen)
    return metrics


def best_thresholds(
    questions: Sequence[Question], predictions: dict[str, str], null_odds: dict[str, float]
) -> dict[str, float]:
    """
    Find the highest metrics that a threshold on the odds can give, in percent, and the threshold.

    A question of higher odds than the threshold gets no answer. Two differences from the official script (our
    decision): questions of equal odds are never separated, because no threshold could; and the threshold is halfway
    between the odds that it separates instead of the lower one, so that rounding, which differs between batches, moves
    no question across it.

    Args:
        predictions: The best answer to each question's id, whatever its odds.
        null_odds: How much more the model believes that there is no answer, by id.

    Returns:
        "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"; the lowest threshold where several are best,
        and 1 beyond all odds where it separates none.
    """
    scores = [question_scores(question, predictions[question.id]) for question in questions]
    odds = np.array([null_odds[question.id] for question in questions], dtype=np.float64)
    has_answer = np.array([bool(question.answers) for question in questions])
    has_text = np.array([bool(predictions[question.id]) for question in questions])
    order = np.argsort(odds, kind="stable")
    sorted_odds = odds[order]
    # Between neighbours, and one beyond both ends. Halves of doubles may round to the upper neighbour: never that.
    bounded = np.concatenate([[sorted_odds[0] - 2.0], sorted_odds, [sorted_odds[-1] + 2.0]])
    below, above = bounded[:-1], bounded[1:]
    thresholds = np.maximum(below, np.minimum((below + above) / 2, np.nextafter(above, -np.inf)))
    # Every possible cut: before the first question, and behind each that is followed by higher odds.
    cuts = np.concatenate([[0], np.flatnonzero(np.append(sorted_odds[1:] > sorted_odds[:-1], True)) + 1])
    metrics = {}
    for name in ("exact", "f1"):
        # What a question adds when it gets its answer instead of none.
        gain = np.where(has_answer, [score[name] for score in scores], -1.0 * has_text)
        totals = np.cumsum(np.concatenate([[np.sum(~has_answer)], gain[order]]))[cuts]
        best = int(totals.argmax())
        metrics[f"best_{name}"] = 100.0 * float(totals[best]) / len(questions)
        metrics[f"best_{name}_thresh"] = float(thresholds[cuts[best]])
    return metrics
