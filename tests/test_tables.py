# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""From rows to the table in the documentation: baselines, models side by side, and documents that equal their files."""

import importlib
import json
import math
import random
import statistics
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from small_models import REPOSITORY, run_command, tiny_model

from modernalbert import ModernALBERTForMaskedLM
from modernalbert.evaluation.glue import GLUE_TASKS
from modernalbert.evaluation.text_baselines import majority, tfidf


@pytest.fixture
def experiment(monkeypatch):
    """A script of experiments/, which is no package, by its name."""
    monkeypatch.syspath_prepend(REPOSITORY / "experiments")
    return importlib.import_module


# --- baselines -------------------------------------------------------------------------------------------------------


def test_the_commonest_label_of_the_training_rows():
    train = Dataset.from_dict({"text": list("abcd"), "label": [2, 0, 2, 1]})
    validation = Dataset.from_dict({"text": list("xy"), "label": [0, 1]})
    assert majority(GLUE_TASKS["mnli"], train, validation).tolist() == [2, 2]
    assert majority(GLUE_TASKS["stsb"], train, validation) is None


def test_similarity_is_the_cosine_of_weighted_counts():
    first = ["red house red", "old man", "green sea", "unseen"]
    second = ["red house", "old sea", "blue sky", "words"]
    train = Dataset.from_dict({"text": first[:3], "text_pair": second[:3], "label": [5.0, 2.0, 0.0]})
    validation = Dataset.from_dict({"text": first, "text_pair": second, "label": [0.0] * 4})

    def terms(text):
        words = text.split()
        return Counter(words + [f"{a} {b}" for a, b in zip(words, words[1:])])

    texts = first[:3] + second[:3]
    seen = Counter(term for text in texts for term in terms(text))

    def vector(text):
        weights = {
            term: (1 + math.log(count)) * (1 + math.log((1 + len(texts)) / (1 + seen[term])))
            for term, count in terms(text).items()
            if term in seen
        }
        length = math.sqrt(sum(w * w for w in weights.values())) or 1.0
        return {term: w / length for term, w in weights.items()}

    expected = []
    for pair in zip(first, second):
        u, v = map(vector, pair)
        expected.append(sum(u[term] * v.get(term, 0.0) for term in u))
    assert tfidf(GLUE_TASKS["stsb"], train, validation) == pytest.approx(expected)


def test_logistic_regression_learns_words_and_overlap_and_does_not_look_at_the_answers():
    draw = random.Random(0)
    words = [f"w{i}" for i in range(30)]
    texts = [" ".join(draw.choices(words, k=6)) for _ in range(120)]
    single = Dataset.from_dict({"text": texts, "label": [int("w3" in t.split() or "w7" in t.split()) for t in texts]})
    # the same words in another order, or other words: no word says which
    pairs = [" ".join(draw.sample(t.split(), 6)) if i % 2 else draw.choice(texts) for i, t in enumerate(texts)]
    pair = Dataset.from_dict({"text": texts, "text_pair": pairs, "label": [i % 2 for i in range(120)]})
    for task, data in (("sst2", single), ("mrpc", pair)):
        train, validation = data.select(range(80)), data.select(range(80, 120))
        predictions = tfidf(GLUE_TASKS[task], train, validation)
        assert (predictions == np.array(validation["label"])).mean() > 0.85, task
        blind = validation.remove_columns("label").add_column("label", [0] * 40)
        assert (tfidf(GLUE_TASKS[task], train, blind) == predictions).all()


# --- models side by side ---------------------------------------------------------------------------------------------


def test_models_and_baselines_on_the_same_rows(experiment, monkeypatch, capsys, tmp_path, nano_tokenizer):
    module = experiment("checkpoint_tasks")
    tiny_model(ModernALBERTForMaskedLM, vocab_size=30522, std=0.1).save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    draw = random.Random(0)
    for folder, kind in (("films", "sst2"), ("pairs", "stsb")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for split, count in (("train", 24), ("validation", 10)):
            rows = []
            for i in range(count):
                texts = [f"a {draw.choice(('fine', 'dull'))} film number {draw.randint(0, 5)}" for _ in range(2)]
                row = {"sentence": texts[0]} if kind == "sst2" else {"sentence1": texts[0], "sentence2": texts[1]}
                rows.append({**row, "label": int("fine" in texts[0]) if kind == "sst2" else i % 6})
            (tmp_path / "data" / folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tasks = [f"sst2={tmp_path}/data/films", f"stsb={tmp_path}/data/pairs"]
    arguments = ["--tasks", *tasks, "--models", f"small={tmp_path / 'model'}", "--seeds", 3]
    runs = [tmp_path / f"out/{name}-small-3" for name in ("sst2-films", "stsb-pairs")]
    # the second run is there already: it is not done again
    runs[1].mkdir(parents=True)
    measured = {"eval_spearmanr": 0.25, "eval_pearson": 0.5, "train_samples": 24, "eval_samples": 10}
    (runs[1] / "all_results.json").write_text(json.dumps(measured))
    code, output, error = run_command(monkeypatch, capsys, module.command, *arguments, "--output_dir", tmp_path / "out")
    assert code == 0, error
    # another model later stands beside the first; the same place with another command is refused
    runs.append(tmp_path / "out/sst2-films-other-3")
    runs[2].mkdir()
    (runs[2] / "all_results.json").write_text(json.dumps({"eval_accuracy": 0.75}))
    later = ["--tasks", tasks[0], "--models", "other=y", "--seeds", 3, "--output_dir", tmp_path / "out"]
    assert run_command(monkeypatch, capsys, module.command, *later)[0] == 0
    wrong = [option if option != "other=y" else "small=y" for option in later]
    code, _, error = run_command(monkeypatch, capsys, module.command, *wrong)
    assert code == 2 and "sst2-films-small-3 is of another command: delete it" in error
    rows = json.loads((tmp_path / "out/results.json").read_text())
    found = {(row["data"], row["model"], row["metric"]): row for row in rows}
    assert list(found) == [
        ("films", "majority", "accuracy"),
        ("films", "tfidf", "accuracy"),
        ("films", "small", "accuracy"),
        ("films", "other", "accuracy"),
        ("pairs", "tfidf", "spearmanr"),  # a regression has no commonest label
        ("pairs", "tfidf", "pearson"),
        ("pairs", "small", "spearmanr"),
        ("pairs", "small", "pearson"),
    ]
    assert found["films", "tfidf", "accuracy"]["mean"] == 1.0 and "tfidf      100.0 accuracy" in output
    assert found["pairs", "small", "spearmanr"]["scores"] == [0.25]
    small = found["films", "small", "accuracy"]
    assert small["scores"] == [json.loads((runs[0] / "all_results.json").read_text())["eval_accuracy"]]
    assert "--train_file=$DATA_DIR/films/train.jsonl" in small["command"] and small["seeds"] == [3]
    several = module.table_rows({"data": "films"}, [{"accuracy": 0.5}, {"accuracy": 0.75}])
    assert several[0]["mean"] == 0.625 and several[0]["deviation"] == pytest.approx(0.25 / math.sqrt(2))

    # the table takes these rows as they are
    (tmp_path / "results").mkdir()
    (tmp_path / "out/results.json").rename(tmp_path / "results/films_tasks.json")
    table = experiment("document_tables")
    assert "| films (24 / 10) | accuracy |" in table.task_table(table.read_results(tmp_path / "results"))


def test_question_answering_and_retrieval_beside_their_baselines(experiment, monkeypatch, capsys, tmp_path):
    pytest.importorskip("bm25s")
    module = experiment("checkpoint_tasks")
    paragraphs = []
    for i, colour in enumerate(("red", "green", "blue")):
        answer = {"text": colour, "answer_start": 11}
        paragraphs.append(
            {
                "context": f"House {i} is {colour}.",
                "qas": [
                    {"id": f"{i}a", "question": f"Which colour is house {i}?", "answers": [answer]},
                    {"id": f"{i}b", "question": f"Who built house {i}?", "answers": [], "is_impossible": True},
                ],
            }
        )
    houses = tmp_path / "houses"
    (houses / "qrels").mkdir(parents=True)
    for split, number in (("train", 3), ("validation", 2)):
        (houses / f"{split}.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs[:number]}]}))
    documents = [{"_id": str(i), "text": paragraph["context"]} for i, paragraph in enumerate(paragraphs)]
    (houses / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    queries = [{"_id": "q", "text": "what is green?"}, {"_id": "p", "text": "what is blue?"}]
    (houses / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    (houses / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t1\np\t2\t1\n")
    tasks = [f"squad={houses}", f"search={houses}"]
    # what the scripts would have written
    for place, measured in (("squad", {"eval_f1": 60.0, "eval_exact": 50.0}), ("search", {"houses_ndcg_at_10": 0.5})):
        folder = tmp_path / f"out/{place}-houses-m-0"
        folder.mkdir(parents=True)
        (folder / "all_results.json").write_text(json.dumps(measured))
    arguments = ["--tasks", *tasks, "--models", "m=x", "--output_dir", tmp_path / "out"]
    code, _, error = run_command(monkeypatch, capsys, module.command, *arguments)
    assert code == 0, error
    rows = json.loads((tmp_path / "out/results.json").read_text())
    found = {(row["data"], row["model"], row["metric"]): row for row in rows}
    assert {place: row["mean"] for place, row in found.items()} == {
        ("houses", "no answer", "f1"): 0.5,
        ("houses", "no answer", "exact"): 0.5,
        ("houses", "m", "f1"): 0.6,
        ("houses", "m", "exact"): 0.5,
        ("houses, not fine-tuned", "bm25", "ndcg_at_10"): 1.0,
        ("houses, not fine-tuned", "m", "ndcg_at_10"): 0.5,
    }
    assert found["houses", "m", "f1"]["train_rows"] == 6 and found["houses", "m", "f1"]["validation_rows"] == 4
    assert found["houses, not fine-tuned", "m", "ndcg_at_10"]["validation_rows"] == 2


def test_wrong_arguments_of_the_comparison(experiment, monkeypatch, capsys, tmp_path):
    module = experiment("checkpoint_tasks")
    for arguments, said in (
        (["--tasks", "sst2"], "--tasks sst2 is not allowed: it must be NAME=FOLDER"),
        (["--tasks", "sst3=x"], "--tasks sst3 is not allowed: it must be one of"),
        (["--tasks", "sst2=x"], "--tasks sst2=x: no such folder"),
        (["--tasks", f"sst2={tmp_path}", "--baselines", "svm"], "--baselines svm is not allowed"),
        (["--tasks", f"sst2={tmp_path}", "--baselines", "tfidf"], "train.jsonl: no such file"),
    ):
        code, _, error = run_command(monkeypatch, capsys, module.command, *arguments, "--output_dir", tmp_path / "o")
        assert code == 2 and said in error, error


# --- the table -------------------------------------------------------------------------------------------------------


def row(data="d", model="nano", metric="accuracy", scores=(0.5,), **more):
    scores = list(scores)
    deviation = statistics.stdev(scores) if len(scores) > 1 else None
    found = {"data": data, "model": model, "metric": metric, "scores": scores, "mean": statistics.mean(scores)}
    return found | {"deviation": deviation, "command": "c"} | more


def test_a_document_gets_the_table_and_is_checked(experiment, monkeypatch, capsys, tmp_path):
    module = experiment("document_tables")
    rows = [row(model="peer"), row(scores=(0.6, 0.62, 0.61), train_rows=1200, validation_rows=30), row("e", "bm25")]
    (tmp_path / "a_tasks.json").write_text(json.dumps(rows[:2]))
    (tmp_path / "b_tasks.json").write_text(json.dumps(rows[2:]))
    (tmp_path / "other.json").write_text('{"not": "rows"}')
    document = tmp_path / "doc.md"
    document.write_text("Before\n\n<!-- task table -->\nold\n<!-- end -->\n\nAfter\n")

    def command(*more):
        return run_command(
            monkeypatch, capsys, module.command, "--documents", document, "--results_dir", tmp_path, *more
        )

    code, _, error = command("--check")
    assert code == 2 and "doc.md: a table is not that of the files" in error and "old" in document.read_text()
    assert command()[0] == 0
    assert document.read_text() == (
        "Before\n\n<!-- task table -->\n"
        "| set (rows trained on / judged by) | metric | BM25 | nano | peer |\n"
        "|---|---|---:|---:|---:|\n"
        "| d (1,200 / 30) | accuracy |  | 61.0 ± 1.0 (3) | 50.0 |\n"
        "| e | accuracy | 50.0 |  |  |\n"
        "<!-- end -->\n\nAfter\n"
    )
    assert command("--check")[0] == 0
    document.write_text(document.read_text().replace("61.0", "71.0"))
    assert command("--check")[0] == 2
    document.write_text("no table\n")
    code, _, error = command()
    assert code == 2 and "there must be a line <!-- NAME table -->" in error
    document.write_text("<!-- task table -->\n<!-- end -->\n<!-- tusk table -->\n<!-- end -->\n")
    code, _, error = command()
    assert code == 2 and "the table tusk is not known: it must be one of task, ffn" in error


@pytest.mark.parametrize(
    "rows, said",
    [
        ("[", "it is not JSON"),
        ({"rows": []}, "must hold a list of rows"),
        ([{"data": "d"}], "entry 0: no model, metric, scores, mean, deviation, command"),
        ([row(), row()], "entry 1: d, nano, accuracy is measured in"),
        ([row(mean=0.9)], "mean is 0.9, that of the scores is 0.5"),
        ([row(scores=(0.1, 0.2), deviation=None)], "deviation is None"),
        ([row(scores=(45.0,))], "scores [45.0] is not allowed"),
        ([], "there is no *_tasks.json with a row"),
    ],
)
def test_files_that_make_no_table(experiment, tmp_path, rows, said):
    module = experiment("document_tables")
    (tmp_path / "x_tasks.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    with pytest.raises(module.UserError) as caught:
        module.read_results(tmp_path)
    assert said in str(caught.value), str(caught.value)


def test_the_documentation_equals_the_measured_files(experiment, monkeypatch, capsys):
    module = experiment("document_tables")
    documents = [
        file for file in (REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")) if " table -->" in file.read_text()
    ]
    assert REPOSITORY / "README.md" in documents
    code, _, error = run_command(monkeypatch, capsys, module.command, "--check", "--documents", *documents)
    assert code == 0, error
