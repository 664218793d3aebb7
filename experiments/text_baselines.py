# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Baselines of a classification task without a language model: the commonest label, and weighted word counts."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler

from modernalbert.data.glue_tasks import Task
from modernalbert.evaluation.glue import METRICS


STRENGTHS = (0.03, 0.3, 3.0, 30.0, 300.0)


def majority(task: Task, train: Dataset, validation: Dataset) -> np.ndarray | None:
    """The commonest training label for every validation row, (rows,); `None` for a regression, which has none."""
    if task.is_regression:
        return None
    return np.full(len(validation), Counter(train["label"]).most_common(1)[0][0])


def tfidf(task: Task, train: Dataset, validation: Dataset) -> np.ndarray:
    """
    TF-IDF of words and pairs of words (logarithmic counts), and logistic regression upon it.

    Of two texts it sees what classifiers of pairs of embeddings see (Conneau et al. 2017): u, v, |u - v| and u * v, and
    their cosine. The regression's strength is chosen by 5-fold cross-validation on the training rows, by the task's
    first metric. Where a number is to be predicted it is the cosine itself, and nothing is learned but the weights of
    the words.

    Args:
        train: Columns "text", for pairs "text_pair", and "label".
        validation: Likewise; the label is not looked at.

    Returns:
        (rows,) label ids, or similarities.
    """
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, dtype=np.float64)
    words.fit([text for column in ("text", "text_pair") if column in train.column_names for text in train[column]])
    if task.is_regression:
        return cosines(words, validation)
    return logistic_regression(task, features(words, train), train["label"][:], features(words, validation))


def logistic_regression(
    task: Task,
    train_features: csr_matrix | np.ndarray,
    labels: list[int],
    features: csr_matrix | np.ndarray,
    strengths: Sequence[float] = STRENGTHS,
) -> np.ndarray:
    """
    (rows,) label ids, predicted from features (rows, number of them) scaled to at most 1.

    Its strength (scikit-learn's C) is one of `strengths`: by 5-fold cross-validation on the training rows, by the
    task's first metric.
    """
    model = make_pipeline(MaxAbsScaler(), LogisticRegression(max_iter=1000))
    metric = METRICS[task.metrics[0]]
    search = GridSearchCV(
        model,
        {"logisticregression__C": strengths},
        scoring=lambda model, rows, labels: metric(model.predict(rows), labels),
        cv=StratifiedKFold(5, shuffle=True, random_state=0),  # files come in the order of their sources
    )
    search.fit(train_features, labels)
    return search.predict(features)


def features(words: TfidfVectorizer, rows: Dataset) -> csr_matrix:
    """(rows, features), sparse."""
    first = words.transform(rows["text"][:])
    if "text_pair" not in rows.column_names:
        return first
    second = words.transform(rows["text_pair"][:])
    cosine = csr_matrix(cosines(words, rows)[:, None])
    return hstack([first, second, abs(first - second), first.multiply(second), cosine]).tocsr()


def cosines(words: TfidfVectorizer, rows: Dataset) -> np.ndarray:
    """(rows,) of each pair; the vectors are of length 1, or 0 for unknown words alone."""
    product = words.transform(rows["text"][:]).multiply(words.transform(rows["text_pair"][:]))
    return np.asarray(product.sum(axis=1)).ravel()
