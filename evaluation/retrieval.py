# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exact search in blocks, BM25, and the metrics of a ranking through pytrec_eval."""

import math
from collections.abc import Sequence
from pathlib import Path

import bm25s
import numpy as np
import pytrec_eval
import Stemmer
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from modernalbert.cli.errors import UserError
from modernalbert.data.beir import Corpus, Qrels, RetrievalSet


# MTEB's names, and what they are called in a table. The first is the one that counts.
METRICS = {
    "ndcg_at_10": "nDCG@10",
    "map_at_1000": "MAP@1000",
    "recall_at_100": "Recall@100",
    "mrr_at_10": "MRR@10",
}
# Documents kept for each query.
DEPTH = 1000
# Documents and queries that are compared at once: a block of scores is 64 MB.
CORPUS_BLOCK = 16384
QUERY_BLOCK = 1024
# Documents encoded between two steps of the progress bar.
ENCODED_AT_ONCE = 1024
# (queries, k) scores, best first, and (queries, k) row numbers; a score of -inf stands for no document.
Ranking = tuple[np.ndarray, np.ndarray]


# --- embeddings ------------------------------------------------------------------------------------------------------


def encode_corpus(
    model: SentenceTransformer, corpus: Corpus, file: Path, batch_size: int, pool: dict | None = None
) -> np.ndarray:
    """
    Write the documents' embeddings into a .npy file, the longest documents first.

    Args:
        pool: Processes to encode with, from `model.start_multi_process_pool`.

    Returns:
        (n, d) float32, in the order of the corpus, mapped from the file.

    Raises:
        UserError: an embedding holds NaN or infinity.
    """
    order = np.argsort(-corpus.lengths, kind="stable")
    embeddings = None
    with tqdm(total=len(corpus), desc="Encoding", unit=" documents") as bar:
        for start in range(0, len(order), ENCODED_AT_ONCE):
            rows = order[start : start + ENCODED_AT_ONCE]
            encoded = model.encode_document(
                corpus.texts(rows), batch_size=batch_size, pool=pool, show_progress_bar=False
            )
            if not np.isfinite(encoded).all():
                raise UserError("the model's embeddings hold NaN or infinity.")
            if embeddings is None:
                shape = (len(corpus), encoded.shape[1])
                embeddings = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
            embeddings[rows] = encoded
            bar.update(len(rows))
    embeddings.flush()
    return embeddings


# --- search ----------------------------------------------------------------------------------------------------------


def search(
    queries: np.ndarray,
    documents: np.ndarray,
    depth: int = DEPTH,
    *,
    normalize: bool = True,
    dimensions: int | None = None,
    device: str | torch.device = "cpu",
    block: int = CORPUS_BLOCK,
) -> Ranking:
    """
    Find the best documents of each query by inner product, among all of them.

    Only `block` documents are in memory at once, so `documents` may be mapped from a file larger than it. Documents of
    equal score come in the order of the corpus, wherever the blocks end.

    Args:
        queries: (q, d) embeddings.
        documents: (n, d) embeddings.
        depth: Documents to keep for each query.
        normalize: Compare by cosine.
        dimensions: Number of leading dimensions to compare by.

    Returns:
        Scores and row numbers, (q, min(depth, n)) each.
    """

    def prepare(embeddings: np.ndarray) -> torch.Tensor:
        # A copy, as a mapped file may be read-only.
        part = torch.from_numpy(np.array(embeddings[:, :dimensions], dtype=np.float32)).to(device)
        return torch.nn.functional.normalize(part, dim=-1) if normalize else part

    best: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * math.ceil(len(queries) / QUERY_BLOCK)
    prepared = [prepare(queries[start : start + QUERY_BLOCK]) for start in range(0, len(queries), QUERY_BLOCK)]
    for start in tqdm(range(0, len(documents), block), desc="Searching", unit=" blocks", leave=False):
        part = prepare(documents[start : start + block])
        for i, part_of_queries in enumerate(prepared):
            scores, columns = top_k(part_of_queries @ part.T, depth)
            rows = columns + start
            if best[i] is not None:
                # Earlier blocks come first, so a stable sort keeps equal scores in the order of the corpus.
                scores, rows = torch.cat([best[i][0], scores], dim=1), torch.cat([best[i][1], rows], dim=1)
                order = scores.argsort(dim=1, descending=True, stable=True)[:, :depth]
                scores, rows = scores.gather(1, order), rows.gather(1, order)
            best[i] = scores, rows
    scores, rows = (torch.cat(parts).cpu().numpy() for parts in zip(*best))
    return scores, rows


def top_k(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `torch.topk` along the second dimension, but equal values come in the order of their columns."""
    k = min(k, scores.shape[1])
    smallest = scores.topk(k, dim=1).values[:, -1:]
    above, equal = scores > smallest, scores == smallest
    room = k - above.sum(dim=1, keepdim=True)
    kept = above | (equal & (equal.cumsum(dim=1) <= room))
    columns = kept.nonzero()[:, 1].view(len(scores), k)
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def search_bm25(queries: Sequence[str], corpus: Corpus, depth: int = DEPTH) -> Ranking:
    """
    Search with Lucene's BM25 (k1 1.5, b 0.75: the defaults of bm25s), without English stop words, words stemmed.

    The texts and their index are in memory. A document that shares no word with the query is not found.
    """
    stemmer = Stemmer.Stemmer("english")

    def words(texts: Sequence[str]) -> list[list[str]]:
        return bm25s.tokenize(list(texts), stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)

    index = bm25s.BM25()
    index.index(words(corpus.texts(range(len(corpus)))), show_progress=True)
    rows, scores = index.retrieve(words(queries), k=min(depth, len(corpus)), show_progress=True)
    return np.where(scores > 0, scores, -np.inf).astype(np.float32), rows.astype(np.int64)


# --- metrics ---------------------------------------------------------------------------------------------------------


def query_metrics(qrels: Qrels, run: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """
    Compute the metrics of each query, as trec_eval counts them.

    Documents of equal score are ordered by id, the greater first: trec_eval's rule. A query for which nothing was found
    or nothing is relevant counts 0.

    Args:
        qrels: Relevance by query and document.
        run: Scores by query and document; a query may be missing.

    Returns:
        By query, the values of `METRICS`.
    """

    def evaluate(measures: set[str], scores: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        return pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(scores)

    values = evaluate({"ndcg_cut.10", "map_cut.1000", "recall.100"}, run)
    # trec_eval's reciprocal rank has no cut of its own.
    first = {
        query: dict(sorted(found.items(), key=lambda entry: entry[::-1], reverse=True)[:10])
        for query, found in run.items()
    }
    reciprocal = evaluate({"recip_rank"}, first)
    nothing = dict.fromkeys(METRICS, 0.0)
    return {
        query: {
            "ndcg_at_10": values[query]["ndcg_cut_10"],
            "map_at_1000": values[query]["map_cut_1000"],
            "recall_at_100": values[query]["recall_100"],
            "mrr_at_10": reciprocal[query]["recip_rank"],
        }
        if query in values
        else nothing
        for query in qrels
    }


def evaluate_ranking(data: RetrievalSet, ranking: Ranking, trec_file: Path | None = None) -> dict[str, float]:
    """
    Mean metrics over the queries of a set.

    Args:
        ranking: Rows in the order of `data.queries`.
        trec_file: Gets the first 100 documents of each query, in trec_eval's form.
    """
    values: list[dict[str, float]] = []
    queries = list(data.queries)
    lines: list[str] = []
    # A few queries at a time: a ranking as Python objects takes a hundred times the memory of its arrays.
    for start in range(0, len(queries), QUERY_BLOCK):
        part = queries[start : start + QUERY_BLOCK]
        run = {}
        for query, scores, rows in zip(part, *(array[start : start + QUERY_BLOCK] for array in ranking)):
            found = [(data.corpus.ids[row], float(score)) for score, row in zip(scores, rows) if score > -np.inf]
            run[query] = dict(found)
            lines += [f"{query} Q0 {doc} {rank} {score} run\n" for rank, (doc, score) in enumerate(found[:100], 1)]
        values += query_metrics({query: data.qrels[query] for query in part}, run).values()
    if trec_file is not None:
        trec_file.write_text("".join(lines), "utf-8")
    return {name: sum(value[name] for value in values) / len(values) for name in METRICS}


def mteb_result(data: RetrievalSet, metrics: dict[str, float], seconds: float) -> dict:
    """Return the metrics in the form of MTEB's result files, which `mteb.results.TaskResult.from_disk` reads."""
    # A folder does not say what language it is in: undetermined, in ISO 639-3 and ISO 15924.
    scores = metrics | {"main_score": metrics["ndcg_at_10"], "hf_subset": "default", "languages": ["und-Zyyy"]}
    return {
        "dataset_revision": "local",
        "task_name": data.name,
        "mteb_version": None,
        "scores": {data.split: [scores]},
        "evaluation_time": seconds,
        "kg_co2_emissions": None,
    }
