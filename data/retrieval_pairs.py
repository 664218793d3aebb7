# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Training rows of retrieval: pairs and triplets from files or judgements, mined negatives, a teacher's scores."""

import json
import logging
from pathlib import Path

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from modernalbert.cli.errors import UserError
from modernalbert.data.beir import RetrievalSet
from modernalbert.data.tables import read_rows


logger = logging.getLogger(__name__)

# A negative must be at least this much less like the query than the positive (NV-Retriever, arXiv 2407.15831): what
# is as like it often answers it too.
NEGATIVE_MARGIN = 0.05
# Among how many of the documents most like the query to look for one negative.
CANDIDATES_PER_NEGATIVE = 50
# A cosine times this is a logit, in the loss as in the teacher's scores.
SCALE = 20.0


def read_row_file(file: str) -> Dataset:
    """
    Read rows of "anchor", "positive", any "negative..." columns, and "scores", if there are such columns.

    "scores" holds a teacher's logits of the positive and of each negative, in that order.

    Raises:
        UserError: a column is missing, unknown, empty or of the wrong kind; the file and line are named.
    """
    rows = read_rows(file)
    names = list(rows[0][1])
    texts = ["anchor", "positive", *(name for name in names if name.startswith("negative"))]
    allowed = {*texts, "scores"}
    columns: dict[str, list] = {name: [] for name in names if name in allowed}
    for place, row in rows:
        if set(row) != set(columns) or not {"anchor", "positive"} <= set(row):
            raise UserError(
                f"{place}: the columns {', '.join(map(str, row))} are not allowed: they must be anchor, positive, "
                "negative... and scores, the same in every row."
            )
        for name in texts:
            if not isinstance(row[name], str) or not row[name].strip():
                raise UserError(f"{place}: column {name!r} must hold text, not {row[name]!r}.")
            columns[name].append(row[name])
        if "scores" in columns:
            scores = row["scores"]
            numbers = isinstance(scores, list) and all(isinstance(score, (int, float)) for score in scores)
            if not numbers or len(scores) != len(texts) - 1 or len(scores) < 2:
                raise UserError(
                    f"{place}: column 'scores' must hold one number for the positive and one for each of at least one "
                    f"negative, not {scores!r}."
                )
            columns["scores"].append([float(score) for score in scores])
    # The order of columns is what tells the loss anchor from positive.
    return Dataset.from_dict({name: columns[name] for name in (*texts, "scores") if name in columns})


def pairs_of(data: RetrievalSet) -> Dataset:
    """Make one row for each relevant document of each query."""
    row_of = {identifier: row for row, identifier in enumerate(data.corpus.ids)}
    relevant = [
        (query, document) for query, judged in data.qrels.items() for document, grade in judged.items() if grade > 0
    ]
    texts = data.corpus.texts(row_of[document] for _, document in relevant)
    kept = [(data.queries[query], text) for (query, _), text in zip(relevant, texts) if text]
    if not kept:
        raise UserError(f"{data.name}: the split {data.split!r} judges no document with text as relevant.")
    return Dataset.from_dict({"anchor": [query for query, _ in kept], "positive": [text for _, text in kept]})


def add_negatives(
    rows: Dataset,
    number: int,
    miner: SentenceTransformer,
    documents: list[str] | None,
    batch_size: int,
) -> Dataset:
    """
    Add columns "negative_1", ...: the documents most like the anchor among those clearly less like it than the
    positive.

    Rows for which there are fewer are left out; a warning gives their number.

    Args:
        rows: "anchor" and "positive".
        documents: Where to look; None looks among the positives.
    """
    mined = mine_hard_negatives(
        rows,
        miner,
        corpus=documents,
        num_negatives=number,
        range_max=CANDIDATES_PER_NEGATIVE * number,
        relative_margin=NEGATIVE_MARGIN,
        output_format="n-tuple",
        batch_size=batch_size,
        verbose=False,
    )
    if not len(mined):
        raise UserError(f"--mine_hard_negatives {number}: there are not that many negatives for any row.")
    logger.warning(f"Negatives: {number} for each of {len(mined):,} rows; {len(rows) - len(mined):,} rows have fewer.")
    return mined


def add_teacher_scores(rows: Dataset, teacher: SentenceTransformer, batch_size: int) -> Dataset:
    """Column "scores": the teacher's logits of the positive and of each negative."""
    candidates = [name for name in rows.column_names if name != "anchor"]

    def embed(texts: list[str], encode) -> tuple[np.ndarray, np.ndarray]:
        different, places = np.unique(texts, return_inverse=True)
        embeddings = encode(list(different), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=True)
        return embeddings, places

    anchors, anchor_places = embed(rows["anchor"], teacher.encode_query)
    documents, places = embed([text for name in candidates for text in rows[name]], teacher.encode_document)
    places = places.reshape(len(candidates), len(rows))
    scores = [SCALE * (anchors[anchor] * documents[places[:, i]]).sum(axis=1) for i, anchor in enumerate(anchor_places)]
    return rows.add_column("scores", [values.tolist() for values in scores])


def save_rows(rows: Dataset, file: Path) -> None:
    """Write rows so that `read_row_file` reads them; the file appears when it is complete."""
    temporary = file.with_name(f".{file.name}")
    with temporary.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.replace(file)
