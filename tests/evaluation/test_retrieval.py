# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Retrieval: sets are read or refused with their line, search is exact wherever blocks end, metrics are trec_eval's."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from small_models import REPOSITORY, run_command


pytest.importorskip("sentence_transformers")

import pytrec_eval

from modernalbert.cli.errors import UserError
from modernalbert.data.beir import load_retrieval_set
from modernalbert.data.retrieval_pairs import pairs_of, read_row_file
from modernalbert.evaluation import retrieval
from modernalbert.evaluation.retrieval import (
    encode_corpus,
    evaluate_ranking,
    mteb_result,
    query_metrics,
    search,
    search_bm25,
    top_k,
)


DOCUMENTS = {
    "d1": "The cat sat on the mat.",
    "d2": "Dogs chase cats through the garden.",
    "d3": "",
    "d4": "Ships sail over the sea.",
}
QUERIES = {"q1": "a cat", "q2": "sailing ships", "q3": "unheard"}
JUDGED = [("q1", "d1", 2), ("q1", "d2", 1), ("q2", "d4", 1), ("q2", "d1", 0), ("q3", "d2", 0)]


def write_set(folder, documents=DOCUMENTS, queries=QUERIES, judged=JUDGED, split="test"):
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    rows = [
        {"_id": i, "title": "Title", "text": text} if i == "d1" else {"_id": i, "text": text}
        for i, text in documents.items()
    ]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    rows = [{"_id": i, "text": text} for i, text in queries.items()]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, line)) for line in judged)]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_set_is_read_as_beir_writes_it(tmp_path):
    data = load_retrieval_set(str(write_set(tmp_path / "set")), "test")
    assert (data.name, data.corpus.ids) == ("set", ["d1", "d2", "d3", "d4"])
    assert data.corpus.texts([3, 0]) == ["Ships sail over the sea.", "Title The cat sat on the mat."]
    assert data.queries == QUERIES and data.qrels["q1"] == {"d1": 2, "d2": 1}
    few = load_retrieval_set(str(tmp_path / "set"), "test", max_queries=2)
    assert list(few.queries) == list(few.qrels) == ["q1", "q2"]
    pairs = pairs_of(data)
    assert pairs["anchor"] == ["a cat", "a cat", "sailing ships"] and pairs["positive"][1] == DOCUMENTS["d2"]


def test_texts_of_any_bytes_are_found_again(tmp_path):
    odd = {"d1": "first", "ü": "Ärger – 東京\u2028one line", "e": "last"}
    folder = write_set(tmp_path / "set", odd, {"q": "x"}, [("q", "ü", 1)])
    lines = [json.dumps({"_id": i, "text": text}, ensure_ascii=False) for i, text in odd.items()]
    (folder / "corpus.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())
    (folder / "qrels/test.tsv").write_text("q\tü\t1")  # no line of names, no last line end
    data = load_retrieval_set(str(folder), "test")
    assert data.corpus.texts([2, 1, 0]) == ["last", odd["ü"], "first"] and data.qrels == {"q": {"ü": 1}}


@pytest.mark.parametrize(
    "file, content, said",
    [
        ("corpus.jsonl", None, "corpus.jsonl: no such file"),
        ("corpus.jsonl", "", "corpus.jsonl: holds no rows"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": "d2", "text" "b"}\n', "corpus.jsonl, line 2, column 22"),
        (
            "corpus.jsonl",
            '{"_id": "d1", "text": "a"}\n\n{"_id": "d1", "text": "b"}\n',
            "line 3: the id 'd1' is given twice",
        ),
        ("corpus.jsonl", '{"_id": "d1"}\n', "line 1: no field 'text'; there are _id"),
        ("corpus.jsonl", '{"_id": "d1", "text": 3}\n', "line 1: 'text' must hold text, not 3"),
        ("corpus.jsonl", '{"id": "d1", "text": "a"}\n', "line 1: the field '_id' must hold an id, not None"),
        ("corpus.jsonl", '["d1", "a"]\n', "line 1: a row must be an object"),
        ("corpus.jsonl", b'{"_id": "d1", "text": "\xff"}\n', "line 1: not UTF-8 text (byte 23)"),
        (
            "queries.jsonl",
            '{"_id": "q1", "text": "a"}\n{"_id": "q2", "text": " "}\n',
            "line 2: the query 'q2' is empty",
        ),
        (
            "queries.jsonl",
            '{"_id": "q1", "text": "a"}\n{"_id": "q1", "text": "b"}\n',
            "queries.jsonl, line 2: the id 'q1'",
        ),
        ("qrels/test.tsv", "q1\td9\t1\n", "test.tsv, line 1: the document 'd9' is not in corpus.jsonl"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq9\td1\t1\n", "test.tsv, line 2: the query 'q9' is not in"),
        ("qrels/test.tsv", "q1\td1\t1\nq1 d2 1\n", "test.tsv, line 2: 3 columns"),
        ("qrels/test.tsv", "q1\td1\t1\nq1\td2\tyes\n", "line 2: the relevance 'yes' is not allowed"),
        ("qrels/test.tsv", "q1\td1\t1\nq1\td1\t0\n", "line 2: the query 'q1' and the document 'd1' are judged twice"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "test.tsv: holds no judgements"),
        ("qrels/test.tsv", None, "qrels/test.tsv: no such file"),
    ],
)
def test_a_bad_set_is_named_with_file_and_line(tmp_path, file, content, said):
    folder = write_set(tmp_path / "set")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_retrieval_set(str(folder), "test")
    assert said in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "row, said",
    [
        ({"anchor": "a", "text": "b"}, "line 1: the columns anchor, text are not allowed"),
        ({"anchor": "a", "positive": " "}, "line 1: column 'positive' must hold text"),
        ({"anchor": "a", "positive": "b", "negative": 1}, "line 1: column 'negative' must hold text, not 1"),
        (
            {"anchor": "a", "positive": "b", "negative": "c", "scores": [1]},
            "line 1: column 'scores' must hold one number",
        ),
        ({"anchor": "a", "positive": "b", "scores": [1]}, "line 1: column 'scores' must hold"),
    ],
)
def test_bad_training_rows_are_named_with_their_line(tmp_path, row, said):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError) as caught:
        read_row_file(str(tmp_path / "rows.jsonl"))
    assert said in str(caught.value), str(caught.value)


def test_training_rows_come_in_the_order_the_loss_wants(tmp_path):
    row = {"negative_1": "n", "scores": [1, 0.5], "positive": "p", "anchor": "a"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert read_row_file(str(tmp_path / "rows.jsonl")).column_names == ["anchor", "positive", "negative_1", "scores"]


# --- search ----------------------------------------------------------------------------------------------------------


def whole_ranking(queries, documents, depth):
    """All scores at once, equal ones in the order of the corpus."""
    scores = queries @ documents.T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    return np.take_along_axis(scores, rows, axis=1), rows


@pytest.mark.parametrize("block", [1, 3, 7, 50, 64])
@pytest.mark.parametrize("depth", [1, 5, 50, 80])
def test_search_in_blocks_is_the_whole_product_ties_included(monkeypatch, block, depth):
    # Small integers: sums are exact, and most scores are shared by several documents.
    generator = np.random.default_rng(0)
    queries = generator.integers(-1, 2, (13, 4)).astype(np.float32)
    documents = generator.integers(-1, 2, (50, 4)).astype(np.float32)
    monkeypatch.setattr(retrieval, "QUERY_BLOCK", 5)
    scores, rows = search(queries, documents, depth, normalize=False, block=block)
    whole_scores, whole_rows = whole_ranking(queries, documents, depth)
    assert (scores == whole_scores).all() and (rows == whole_rows).all()


def test_search_in_a_mapped_file_by_cosine_and_by_first_dimensions(tmp_path):
    generator = np.random.default_rng(0)
    queries, documents = (generator.normal(size=(n, 16)).astype(np.float32) for n in (9, 300))
    np.save(tmp_path / "documents.npy", documents)
    mapped = np.load(tmp_path / "documents.npy", mmap_mode="r")
    for dimensions in (None, 4):
        units = [
            e[:, :dimensions] / np.linalg.norm(e[:, :dimensions], axis=1, keepdims=True) for e in (queries, documents)
        ]
        whole_scores, whole_rows = whole_ranking(*units, 10)
        scores, rows = search(queries, mapped, 10, dimensions=dimensions, block=64)
        assert (rows == whole_rows).all()
        np.testing.assert_allclose(scores, whole_scores, atol=1e-6)


def test_top_k_breaks_ties_by_column():
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    values, columns = top_k(scores, 2)
    assert columns.tolist() == [[1, 2], [0, 1]] and values.tolist() == [[2, 2], [0, 0]]


class LengthModel:
    """Embeds a text as its length and its first byte, and notes what it was given."""

    def __init__(self, factor: float = 1.0):
        self.batches, self.factor = [], factor

    def encode_document(self, texts, **kwargs):
        self.batches.append([len(text) for text in texts])
        return np.array([[len(text), ord(text[:1] or " ")] for text in texts], dtype=np.float32) * self.factor


def test_documents_are_encoded_by_length_and_kept_in_order(tmp_path, monkeypatch):
    texts = {f"d{i}": "abcdefghij"[i] * (1 + 7 * i % 10) for i in range(10)}
    data = load_retrieval_set(str(write_set(tmp_path / "set", texts, {"q": "x"}, [("q", "d0", 1)])), "test")
    monkeypatch.setattr(retrieval, "ENCODED_AT_ONCE", 4)
    model = LengthModel()
    embeddings = encode_corpus(model, data.corpus, tmp_path / "e.npy", 2)
    full = data.corpus.texts(range(10))
    assert embeddings.tolist() == [[len(text), ord(text[0])] for text in full]
    seen = [length for batch in model.batches for length in batch]
    # "d1" has a title, and so a longer line than text.
    assert (
        isinstance(embeddings, np.memmap) and len(model.batches) == 3 and seen[0] == max(seen) and seen[-1] == min(seen)
    )
    with pytest.raises(UserError, match="NaN or infinity"):
        encode_corpus(LengthModel(float("nan")), data.corpus, tmp_path / "e.npy", 2)


def test_bm25_finds_shared_words_and_nothing_else(tmp_path):
    data = load_retrieval_set(str(write_set(tmp_path / "set")), "test")
    scores, rows = search_bm25(list(QUERIES.values()), data.corpus)
    found = [[data.corpus.ids[row] for row, score in zip(*line) if score > -np.inf] for line in zip(rows, scores)]
    assert sorted(found[0]) == ["d1", "d2"]  # "cats" is "cat"
    assert found[1:] == [["d4"], []]  # "sailing" is "sail"
    # The formula, for the one word "cat" in two of the four documents.
    idf = np.log(1 + (4 - 2 + 0.5) / (2 + 0.5))
    lengths = np.array([4, 5, 0, 4])  # title cat sat mat; dog chase cat through garden; nothing; ship sail over sea
    expected = idf * 1 / (1 + 1.5 * (1 - 0.75 + 0.75 * lengths[0] / lengths.mean()))
    assert scores[0][0] == pytest.approx(expected, rel=1e-5)


# --- metrics ---------------------------------------------------------------------------------------------------------


def own_metrics(judged, found):
    """The formulas, written out: what is found, in trec_eval's order, against the grades."""
    order = [document for document, _ in sorted(found.items(), key=lambda entry: (entry[1], entry[0]), reverse=True)]
    grades = [max(judged.get(document, 0), 0) for document in order]
    ideal = sorted((grade for grade in judged.values() if grade > 0), reverse=True)
    if not ideal:
        return dict.fromkeys(retrieval.METRICS, 0.0)

    def gain(values):
        return sum(grade / np.log2(rank + 1) for rank, grade in enumerate(values[:10], start=1))

    hits = [rank for rank, grade in enumerate(grades, start=1) if grade > 0]
    return {
        "ndcg_at_10": gain(grades) / gain(ideal),
        "map_at_1000": sum(n / rank for n, rank in enumerate(hits, start=1) if rank <= 1000) / len(ideal),
        "recall_at_100": sum(rank <= 100 for rank in hits) / len(ideal),
        "mrr_at_10": next((1 / rank for rank in hits if rank <= 10), 0.0),
    }


def test_metrics_equal_their_formulas_on_ties_empty_results_and_nothing_relevant():
    generator = np.random.default_rng(0)
    qrels, run = {}, {}
    for i in range(60):
        documents = [f"d{n}" for n in generator.permutation(400)]
        judged = generator.integers(-1, 3, 20) if i % 6 else np.zeros(20, int)
        qrels[f"q{i}"] = dict(zip(documents[:20], judged.tolist()))
        found = generator.permutation(documents)[: generator.integers(0, 300)]
        scores = generator.integers(0, 40, len(found)) / 4  # many ties
        run[f"q{i}"] = dict(zip(found.tolist(), scores.tolist()))
    run["q7"] = {}
    del run["q8"]
    values = query_metrics(qrels, run)
    assert list(values) == list(qrels)
    for query, judged in qrels.items():
        assert values[query] == pytest.approx(own_metrics(judged, run.get(query, {})), abs=1e-9), query
    assert values["q7"] == values["q8"] == values["q0"] == dict.fromkeys(retrieval.METRICS, 0.0)
    # pytrec_eval itself, where it has the measure
    measured = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map", "recall.100"}).evaluate(run)
    for query, value in measured.items():
        assert values[query]["ndcg_at_10"] == value["ndcg_cut_10"] and values[query]["map_at_1000"] == value["map"]


def test_a_ranking_is_averaged_over_all_queries_and_written(tmp_path, monkeypatch):
    data = load_retrieval_set(str(write_set(tmp_path / "set")), "test")
    monkeypatch.setattr(retrieval, "QUERY_BLOCK", 2)
    rows = np.array([[1, 0], [3, 2], [1, 2]])
    scores = np.array([[0.9, 0.5], [0.8, -np.inf], [0.1, 0.0]], dtype=np.float32)
    metrics = evaluate_ranking(data, (scores, rows), tmp_path / "run.trec")
    runs = [{"d2": 0.9, "d1": 0.5}, {"d4": 0.8}, {"d2": 0.1, "d3": 0.0}]
    own = [own_metrics(judged, run) for judged, run in zip(data.qrels.values(), runs)]
    assert metrics == pytest.approx({name: np.mean([value[name] for value in own]) for name in metrics})
    assert metrics["mrr_at_10"] == pytest.approx(2 / 3)
    lines = [line.split() for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert [line[:4] for line in lines[:3]] == [
        ["q1", "Q0", "d2", "1"],
        ["q1", "Q0", "d1", "2"],
        ["q2", "Q0", "d4", "1"],
    ]
    assert len(lines) == 5 and np.float32(lines[0][4]) == np.float32(0.9)


def test_mteb_reads_the_result_file(tmp_path):
    mteb = pytest.importorskip("mteb")
    data = load_retrieval_set(str(write_set(tmp_path / "set")), "test")
    metrics = {"ndcg_at_10": 0.25, "map_at_1000": 0.5, "recall_at_100": 0.75, "mrr_at_10": 1.0}
    (tmp_path / "set.json").write_text(json.dumps(mteb_result(data, metrics, 1.5)))
    result = mteb.results.TaskResult.from_disk(tmp_path / "set.json")
    assert result.task_name == "set" and result.get_score() == 0.25
    assert result.scores["test"][0]["mrr_at_10"] == 1.0


# --- the sets that are built here ------------------------------------------------------------------------------------


@pytest.fixture
def retrieval_sets(monkeypatch):
    """experiments/retrieval_sets.py, which is in no package."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "experiments"))
    spec = importlib.util.spec_from_file_location("retrieval_sets", REPOSITORY / "experiments/retrieval_sets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_query_does_not_hold_its_title(retrieval_sets):
    without = retrieval_sets.without_title
    assert without("Aladdin is a Middle-Eastern folk tale.", "Aladdin") == "is a Middle-Eastern folk tale."
    assert (
        without("The Black Sea (Bulgarian: Черно море) is a sea.", "Black Sea") == "The (Bulgarian: Черно море) is a."
    )
    assert (
        without("Newton's laws, or Newton laws (Newton), hold; newtonian.", "Newton")
        == "laws, or laws, hold; newtonian."
    )


def test_the_leads_that_pretraining_left_out_are_the_test_split(retrieval_sets, tmp_path):
    leads = [
        (f"Title {n}", f"Title {n} is the thing number {n} of J. Smith here. It has {n} parts and words.")
        for n in range(60)
    ]
    leads += [("One", "One is a sentence alone in its lead."), ("Copy", leads[3][1])]
    documents, examples = retrieval_sets.wikipedia_pairs(leads)
    assert len(documents) == len(examples) == 60
    assert (
        documents["w5"] == "It has 5 parts and words." and examples[5].query == "is the thing number of J. Smith here."
    )
    held_out = {f"w{n}" for n in range(60) if retrieval_sets.draw(f"Title {n}", 10) == 0}
    assert held_out and {example.document for example in examples if example.split == "test"} == held_out
    retrieval_sets.write_set(tmp_path / "wiki", documents, examples)
    data = load_retrieval_set(str(tmp_path / "wiki"), "test")
    assert {document for judged in data.qrels.values() for document in judged} == held_out


def test_squad_questions_find_their_paragraphs(retrieval_sets, tmp_path, monkeypatch, capsys):
    def write(file, *paragraphs):
        articles = [{"title": "T", "paragraphs": [{"context": text, "qas": qas} for text, qas in paragraphs]}]
        (tmp_path / file).write_text(json.dumps({"data": articles}))

    answerable = {"question": "Who?", "is_impossible": False}
    write(
        "train.json",
        ("One.", [answerable, {"question": "Why?", "is_impossible": True}]),
        ("Two.", [{"question": "What?"}]),
    )
    write("validation.json", ("Three.", [answerable]), ("Two.", []))
    documents, examples = retrieval_sets.squad_paragraphs(tmp_path)
    assert documents == {"p0": "One.", "p1": "Two.", "p2": "Three."}
    assert [(e.split, e.query, e.document) for e in examples] == [
        ("train", "Who?", "p0"),
        ("train", "What?", "p1"),
        ("test", "Who?", "p2"),
    ]
    (tmp_path / "train.json").write_text("{")
    monkeypatch.setattr(retrieval_sets, "fetch_leads", lambda folder: None)
    words = ["--squad_dir", tmp_path, "--output_dir", tmp_path / "sets"]
    code, _, error = run_command(monkeypatch, capsys, retrieval_sets.command, *words)
    assert code == 2 and "train.json: cannot be read as SQuAD" in error and not (tmp_path / "sets").exists()
