# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""From rows to the table in the documentation: baselines, models side by side, and documents that equal their files."""

import importlib
import json
import math
import random
import shutil
import statistics
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from small_models import REPOSITORY, run_command, tiny_model

from modernalbert import ModernALBERTForMaskedLM, ModernALBERTForSequenceClassification
from modernalbert.benchmarks import __main__ as benchmarks
from modernalbert.benchmarks import ffn_speed
from modernalbert.benchmarks.timing import summarise, time_in_turn
from modernalbert.cli.errors import UserError
from modernalbert.data.glue_tasks import GLUE_TASKS
from modernalbert.experiments.text_baselines import majority, tfidf


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
    assert code == 2 and "sst2-films-small-3.log is of another command: delete it" in error
    elsewhere = tmp_path / "elsewhere/films"
    shutil.copytree(tmp_path / "data/films", elsewhere)
    other_data = ["--tasks", f"sst2={elsewhere}", "--output_dir", tmp_path / "out"]
    code, _, error = run_command(monkeypatch, capsys, module.command, *other_data)
    assert code == 2 and "sst2-films-majority.json is of another command" in error
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
    for split, number in (("train", 3), ("validation", 1)):
        (houses / f"{split}.jsonl").write_text('{"tokens": ["Bo"], "ner_tags": ["B-PER"]}\n' * number)
    tasks = [f"squad={houses}", f"squad-answers={houses}", f"search={houses}", f"ner={houses}"]
    # what the scripts would have written
    squad = {"eval_f1": 60.0, "eval_exact": 50.0, "eval_HasAns_f1": 40.0}
    ner, search = {"eval_f1": 0.7, "test_f1": 0.65}, {"houses_ndcg_at_10": 0.5}
    for place, measured in (("squad", squad), ("squad-answers", squad), ("search", search), ("ner", ner)):
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
        ("houses, answerable ones, never silent", "m", "f1"): 0.4,
        ("houses, entities", "m", "f1"): 0.7,
        ("houses, entities", "m", "test_f1"): 0.65,
        ("houses, not fine-tuned", "bm25", "ndcg_at_10"): 1.0,
        ("houses, not fine-tuned", "m", "ndcg_at_10"): 0.5,
    }
    assert found["houses", "m", "f1"]["train_rows"] == 6 and found["houses", "m", "f1"]["validation_rows"] == 4
    assert found["houses, entities", "m", "f1"]["train_rows"] == 3
    assert found["houses, answerable ones, never silent", "m", "f1"]["validation_rows"] == 2
    assert found["houses, not fine-tuned", "m", "ndcg_at_10"]["validation_rows"] == 2


def test_wrong_arguments_of_the_comparison(experiment, monkeypatch, capsys, tmp_path):
    module = experiment("checkpoint_tasks")
    for arguments, said in (
        (["--tasks", "sst2"], "--tasks sst2 is not allowed: it must be NAME=FOLDER"),
        (["--tasks", "sst3=x"], "--tasks sst3 is not allowed: it must be one of"),
        (["--tasks", "sst2=x"], "--tasks sst2=x: no such folder"),
        (["--tasks", f"sst2={tmp_path}", "--baselines", "svm"], "--baselines svm is not allowed"),
        (["--tasks", f"sst2={tmp_path}", "--baselines", "tfidf"], "train.jsonl: no such file"),
        (["--tasks", f"sst2={tmp_path}", "--models", "a/b=x"], "--models a/b=x is not allowed: it must be NAME=FOLDER"),
        (["--tasks", f"sst2={tmp_path}", "--models", "bm25=x"], "--models bm25 is not allowed: a baseline"),
    ):
        code, _, error = run_command(monkeypatch, capsys, module.command, *arguments, "--output_dir", tmp_path / "o")
        assert code == 2 and said in error, error


def test_a_command_names_folders_as_the_documentation_does(experiment, monkeypatch):
    module = experiment("checkpoint_tasks")
    monkeypatch.setenv("DATA_DIR", "/d")
    monkeypatch.setenv("TEACHER", "/d/teacher")
    words = ["run.py", "--model", "/d/teacher", "--tasks=/d/sst2", "sst2=/d/my data", "/deep", "a b"]
    line = "run.py --model $TEACHER --tasks=$DATA_DIR/sst2 sst2=\"$DATA_DIR/my data\" /deep 'a b'"
    assert module.portable(words) == line


# --- the table -------------------------------------------------------------------------------------------------------


def row(data="d", model="nano", metric="accuracy", scores=(0.5,), **more):
    scores = list(scores)
    deviation = statistics.stdev(scores) if len(scores) > 1 else None
    found = {"data": data, "model": model, "metric": metric, "scores": scores, "mean": statistics.mean(scores)}
    return found | {"deviation": deviation, "command": "c"} | more


def test_every_source_of_a_corpus_has_an_origin(experiment, tmp_path):
    module = experiment("document_tables")
    counts = {"texts": 1200, "words": 30, "tokens": 40, "texts for validation": 5}
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"sources": {"brown": counts, "wiki_core": counts | {"in an evaluation set": 7}}}))
    lines = module.corpus_table(file).splitlines()
    assert lines[2].startswith("| `wiki_core` |") and lines[2].endswith("| 1,200 | 30 | 40 | 5 | 7 |")
    assert lines[3].endswith("| 5 | 0 |") and lines[4] == "| all |  |  |  | 2,400 | 60 | 80 | 10 | 7 |"
    file.write_text(json.dumps({"sources": {"new": counts}}))
    with pytest.raises(UserError, match="CORPUS has no origin of new"):
        module.corpus_table(file)


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
    document.write_text("<!-- task table -->\nprose\n<!-- memory table -->\n<!-- end -->\n")
    code, _, error = command()
    assert code == 2 and "for each table" in error and "prose" in document.read_text()
    document.write_text("<!-- task table -->\n<!-- end -->\n<!-- tusk table -->\n<!-- end -->\n")
    code, _, error = command()
    assert code == 2 and "the table tusk is not known: it must be one of task, summary, ffn" in error


def test_the_summary_has_the_rows_that_were_measured(experiment):
    module = experiment("document_tables")
    rows = [row("sst2", "majority"), row("sst2", "tfidf", scores=(0.7,)), row("sst2", "teacher", scores=(0.9,))]
    rows += [row("sst2", scores=(0.8, 0.82), train_rows=6920), row("mrpc", metric="f1"), row("other", "bm25")]
    rows += [row("mrpc", "bert-mini", metric="f1", scores=(0.811,)), row("rte", "bert-mini"), row("cola", "teacher")]
    assert module.summary_table(rows).splitlines()[2:] == [
        "| sst2 | 6,920 | accuracy | 70.0 (TF-IDF) |  | 81.0 ± 1.4 (2) | 90.0 |",
        "| mrpc |  | F1 |  | 81.1 | 50.0 |  |",
    ]


def test_the_sizes_are_those_of_the_configurations(experiment):
    lines = experiment("document_tables").sizes_table().splitlines()[2:]
    assert len(lines) == 5
    assert lines[1] == "| `configs/tiny` | 14 = 7 × 2 | 768 | 1,152 / 2,624 | the last 2 | 50.9 M |"


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
        ([row() | {"scores": 0.5}], "scores 0.5 is not allowed"),
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
    folders = (".", "docs", "model_cards", "checkpoints/*")
    files = [file for folder in folders for file in REPOSITORY.glob(f"{folder}/*.md")]
    documents = [file for file in files if " table -->" in file.read_text()]
    assert REPOSITORY / "README.md" in documents
    code, _, error = run_command(monkeypatch, capsys, module.command, "--check", "--documents", *documents)
    assert code == 0, error


# --- merging ---------------------------------------------------------------------------------------------------------


def test_ways_of_merging_are_measured_and_tabled(experiment, tmp_path, nano_tokenizer, monkeypatch, capsys):
    module, tables = experiment("merging"), experiment("document_tables")
    names = {0: "positive", 1: "negative"}  # not in the task's order
    model = tiny_model(ModernALBERTForSequenceClassification, vocab_size=30522, pad_token_id=0, id2label=names)
    model.save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    texts = ("a dull film", "a great film with a great cast", "nothing here is good", "watch it twice")
    for name, repeats in (("train", 48), ("validation", 3)):
        rows = [{"sentence": f"{text} {i}", "label": i % 2} for i in range(repeats) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model_name_or_path", tmp_path / "model", "--output_file", tmp_path / "merging.json"]
    for name in ("train", "validation"):
        arguments += [f"--{name}_file", tmp_path / f"{name}.jsonl"]
    (tmp_path / "merging.json").write_text(json.dumps([{"data": "other", "way": "routed", "accuracy": 0.5}]))
    code, _, error = run_command(
        monkeypatch, capsys, module.command, *arguments, "--data", "films", "--task_name", "sst2"
    )
    assert code == 0, error
    rows = json.loads((tmp_path / "merging.json").read_text())
    assert [row["way"] for row in rows if row["data"] == "films"] == ["routed", *module.WAYS]
    by_way = {row["way"]: row for row in rows if row["data"] == "films"}
    assert by_way["calibrated"]["rank"] == 16 and by_way["calibrated, rank r"]["rank"] == 4
    average = by_way["calibration, linear"]["ffn_errors"]
    assert all(ours < theirs for ours, theirs in zip(by_way["calibrated"]["ffn_errors"], average))
    # Measured on the validation rows alone, again.
    task = module.GLUE_TASKS["sst2"]
    judged = module.batches(module.load_task_file(str(tmp_path / "validation.jsonl"), task), nano_tokenizer)
    report = module.merge_experts(model, "uniform", measure_on=judged)
    assert by_way["uniform, linear"]["output_error"] == pytest.approx(report.relative_error_of_output, abs=1e-5)
    correct = (module.predict(report.model, judged) != torch.tensor([i % 2 for i in range(3) for _ in texts])).sum()
    assert by_way["uniform, linear"]["accuracy"] == pytest.approx(correct.item() / 12)
    lines = tables.merging_table(tmp_path / "merging.json").splitlines()
    assert lines[2].startswith("| routed |  |  |  |  | 50.0 % |") and len(lines) == 3 + len(module.WAYS)
    code, _, error = run_command(
        monkeypatch, capsys, module.command, *arguments, "--data", "films", "--task_name", "stsb"
    )
    assert code == 2 and "--task_name stsb is not allowed" in error


# --- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_int8_keeps_of_a_classifier(experiment, tmp_path, nano_tokenizer, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    module, tables = experiment("onnx_accuracy"), experiment("document_tables")
    names = {0: "positive", 1: "negative"}  # not in the task's order
    model = tiny_model(
        ModernALBERTForSequenceClassification,
        vocab_size=30522,
        id2label=names,
        num_hidden_layers=1,
        group_depth=1,
        mol_groups="all",
    )
    model.save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"sentence": text, "label": i % 2} for i, text in enumerate(("dull", "a great film", "no", "see it twice"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model_name_or_path", tmp_path / "model", "--validation_file", tmp_path / "rows.jsonl"]
    arguments += ["--output_file", tmp_path / "out.json", "--task_name"]
    code, _, error = run_command(monkeypatch, capsys, module.command, *arguments, "sst2")
    assert code == 0, error
    results = json.loads((tmp_path / "out.json").read_text())
    assert [(row["experts"], row["form"]) for row in results[::2]] == [
        ("routed", "PyTorch"), ("routed", "ONNX, int8"), ("merged", "ONNX"),
    ]  # fmt: skip
    batch = nano_tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    predicted = model(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1)
    correct = (predicted == torch.tensor([1, 0, 1, 0])).float().mean().item()
    assert results[0]["accuracy"] == results[1]["accuracy"] == pytest.approx(correct)
    assert results[1]["same_prediction"] == 1.0
    lines = tables.int8_table(tmp_path / "out.json").splitlines()
    assert lines[0] == "| sst2, 4 rows | accuracy | same prediction as PyTorch |" and len(lines) == 8
    for task, said in (("stsb", "--task_name stsb is not allowed"), ("mnli", "predicts the labels positive, negative")):
        code, _, error = run_command(monkeypatch, capsys, module.command, *arguments, task)
        assert code == 2 and said in error


# --- benchmarks ------------------------------------------------------------------------------------------------------


def timed(**ratios):
    return {name: {"median_ms": 10 * ratio, "ratio": ratio} for name, ratio in ratios.items()}


MEASURED = {
    "ffn_float32_4096_tokens": {
        "forward": timed(plain=1, masked=1.5, grouped=1.2, folded=0.99),
        "forward_backward": timed(plain=1, masked=1.6, grouped=1.25),
        "forward_compiled": timed(plain=1, masked=1.4),
    },
    "ffn_sweep_float32": {
        "num_experts": {
            "8": {"forward": timed(plain=1, grouped=1.2), "forward_backward": timed(plain=1, grouped=1.3)},
            "64": {"forward": timed(plain=1, grouped=1.25), "forward_backward": timed(plain=1, grouped=1.35)},
        }
    },
    "encoder_float32_8x128": {
        "real_tokens": 1.0,
        "against_modernbert": timed(modernbert=1, modernalbert=0.99),
        "against_tiny_none": timed(tiny_none=1, tiny=1.05),
    },
    "encoder_float32_16xsquad_v2_compiled": {
        "real_tokens": 0.5,
        "against_modernbert": timed(modernbert=1, modernalbert=0.5),
        "against_tiny_none": timed(tiny_none=1, tiny=1.1),
    },
    "training_nano_float32_4x256": {
        "none": {"median_ms": 1000, "ratio": 1.0, "tokens_per_second": 1000.0},
        "mol": {"median_ms": 1250, "ratio": 1.25, "tokens_per_second": 800.0},
        "loading": {"median_ms": 4, "share_of_step": 0.0032},
    },
    "tuner_float32_16x128": {
        name: {"forward": timed(base=1, lora=1.1, mol=1.3, xlora=6.4), "forward_backward": timed(lora=1, mol=1.4)}
        for name in ("minilm", "modernbert_12")
    },
    "recipe_tiny_float32_1x1024": timed(step=1, teacher=0.3) | {"tokens_per_second": 100.0},
    "recipe_medium_float32_1x1024": timed(step=1, teacher=0.3) | {"tokens_per_second": 50.0},
    "recipe_base_float32_1x1024": timed(step=1, teacher=0.3) | {"tokens_per_second": 40.0},
    "recipe_large_float32_1x1024": timed(step=1, teacher=0.3) | {"tokens_per_second": 20.0},
    "export_nano": {
        "batch": 32, "length": 128, "short_length": 16,
        "forms": {
            form: {
                f"{kind}_{figure}": value
                for kind in ("short_latency", "latency", "throughput")
                for figure, value in (("ms", 10.0), ("ratio", 0.5))
            }
            for form in ("routed", "eager", "compiled", "modernbert", "onnx", "onnx_int8", "minilm")
        },
    },
    "export_starts": {"first result": 2.5},
    "memory_float32_2x512": {
        "none": {
            "peak_megabytes": 1000.0, "peak_ratio": 1.0, "kept_megabytes": 500.0, "kept_ratio": 1.0,
            "optimizer_megabytes": 300.0, "megabytes_on_disk": 150.0, "load_seconds": 0.2,
        }
    },
}  # fmt: skip


def test_tables_of_benchmarks(experiment, tmp_path):
    module = experiment("document_tables")
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({name: {"environment": {}, "results": values} for name, values in MEASURED.items()}))
    sections = module.read_benchmarks(file)
    assert module.ffn_table(sections) == (
        "|  | forward, float32, 4,096 tokens | forward and backward, float32, 4,096 tokens "
        "| forward, compiled, float32, 4,096 tokens |\n"
        "|---|---:|---:|---:|\n"
        "| this MoL (`grouped`, which `auto` takes on a CPU) | 1.20x | 1.25x |  |\n"
        "| this MoL (`masked`, which compiles and exports) | 1.50x | 1.60x | 1.40x |\n"
        "| merged and folded | 0.99x |  |  |"
    )
    assert module.sweep_table(sections).splitlines()[2:] == [
        "| experts: 8 | 1.20x | 1.30x |",
        "| experts: 64 | 1.25x | 1.35x |",
    ]
    assert module.speed_sentence(sections, "gpu") == (
        "Speed on `gpu`, float32: on 4,096 tokens the mixture takes 1.20x the time of the plain FFN (1.25x with the "
        "backward pass), 0.99x when merged. A Tiny encoder with experts takes 1.05x to 1.10x the time of one without."
    )
    assert module.encoder_table(sections).splitlines() == [
        "| batch x length | ModernBERT | ModernALBERT / ModernBERT | Tiny with experts / Tiny without modulation |",
        "|---|---:|---:|---:|",
        "| 16 of squad_v2 (50% real), float32, compiled | 10 ms | 0.50x | 1.10x |",
        "| 8 x 128, float32 | 10 ms | 0.99x | 1.05x |",
    ]
    assert module.training_table(sections).splitlines()[2:] == [
        "| nano, pretraining, 4 x 256, float32 | 1,000 tokens/s | 800 tokens/s | 1.25x | 0.3% |"
    ]
    assert module.tuner_table(sections).splitlines()[2:] == [
        "| all-MiniLM-L6-v2's shape | 1.10x | 1.30x | 6.40x | 1.40x |",
        "| 12 layers of ModernBERT-base's | 1.10x | 1.30x | 6.40x | 1.40x |",
    ]
    # Eight GPUs at 100 tokens/s each take 57,220 steps of 512 x 1,024 tokens.
    assert module.recipe_table(tmp_path).splitlines()[2].endswith("| 100 | 10,417 |")
    file.rename(tmp_path / "cpu-2-threads.json")
    assert module.recipe_table(tmp_path).splitlines()[2].endswith("| 100 | 83,333 |")
    assert module.memory_table(sections).splitlines()[2:] == [
        "| Tiny without modulation | 1,000 MB (1.00x) | 500 MB (1.00x) | 300 MB | 150 MB | 0.20 s |"
    ]
    assert module.export_table(tmp_path).splitlines() == [
        "nano, `cpu-2-threads`:",
        "",
        "|  | 1 x 16 tokens | speed | 1 x 128 tokens | speed | 32 x 128 tokens | speed |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {label} | 10.0 ms | 2.00x | 10.0 ms | 2.00x | 3,200 rows/s | 2.00x |"
            for label in module.EXPORTS.values()
        ),
        "",
        "Start of a new process, warm, `cpu-2-threads`: first result 2.50 s.",
    ]
    assert module.callback_sentence(tmp_path).startswith("Not measured yet")
    measured = {"measured_step": {"ratio": 1.02}, "overhead": 0.002, "logging_steps": 10}
    file.write_text(json.dumps({"router_callback_2x8_float32": {"results": measured}}))
    assert module.callback_sentence(tmp_path) == (
        "On `gpu` a measured step takes 1.020x the time of another, 0.20% of a run with `--logging_steps 10`."
    )
    for broken in ("[", "[]", '{"ffn": 3}'):
        file.write_text(broken)
        with pytest.raises(module.UserError, match="it is not what python -m modernalbert.benchmarks writes"):
            module.read_benchmarks(file)


def test_all_benchmarks_in_one_command_know_their_options(tmp_path):
    for quick, data_dir in ((True, None), (False, "data")):
        runs = benchmarks.commands(quick, "cpu", data_dir, tmp_path)
        scripts = {path.name for path in (REPOSITORY / "benchmarks").glob("*_speed.py")} | {"memory.py"}
        assert {run[0] for run in runs} == scripts - (
            {"callback_speed.py", "export_speed.py", "recipe_speed.py", "tuner_speed.py"} if quick else set()
        )
        for script, *options in runs:
            source = (REPOSITORY / "benchmarks" / script).read_text() + (
                REPOSITORY / "benchmarks/timing.py"
            ).read_text()
            for option in options:
                assert not option.startswith("--") or f'"{option}"' in source, (script, option)


def test_an_interrupted_run_of_all_benchmarks_goes_on(tmp_path, capfd):
    results = tmp_path / "results/cpu.json"
    for name, code in (("good", 0), ("bad", 2)):  # as quick as a benchmark is not
        (tmp_path / f"{name}.py").write_text(f"import sys; print(sys.argv[1]); sys.exit({code})")
    good, bad = [str(tmp_path / "good.py"), "measured"], [str(tmp_path / "bad.py"), "failed"]
    assert benchmarks.run_all([good, bad], results) == [" ".join(bad)]
    capfd.readouterr()
    assert benchmarks.run_all([good, bad], results) == [" ".join(bad)]
    output = capfd.readouterr().out.splitlines()
    assert "1 of 2 are done" in output[0] and "measured" not in output and "failed" in output
    assert benchmarks.run_all([good], results) == [] and not list(results.parent.iterdir())


def test_a_benchmark_refuses_sizes_below_one(command):
    code, _, error = command(ffn_speed.main, "--tokens", 0)
    assert code == 2 and "--tokens: 0 is not allowed: it must be an integer of at least 1" in error


def test_a_plot_of_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    results = {name: {"results": values} for name, values in MEASURED.items()}
    benchmarks.plot(results, tmp_path / "all.png")
    benchmarks.plot({"memory_float32_2x512": results["memory_float32_2x512"]}, tmp_path / "none.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000 and not (tmp_path / "none.png").exists()


def test_functions_are_timed_in_turn_against_the_same_round():
    calls = []
    seconds = time_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3 and [len(times) for times in seconds.values()] == [2, 2]
    summary = summarise({"a": [1.0, 10.0, 2.0], "b": [2.0, 10.0, 6.0]}, "a")
    assert summary["b"] == {"median_ms": 6000.0, "ratio": 2.0}
