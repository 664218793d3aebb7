# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The SQuAD script: a run learns, leaves what it says, continues, and says what is wrong with its data."""

import json

import datasets
import pytest
from launches import run_torchrun
from small_models import REPOSITORY, tiny_model
from small_squad import PARAGRAPHS, squad_content, write_squad
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig, BertForSequenceClassification

from modernalbert import ModernALBERTForMaskedLM, ModernALBERTForQuestionAnswering
from modernalbert.data.squad import read_squad
from modernalbert.evaluation.squad import squad_metrics
from modernalbert.question_answering import question_answering
from modernalbert.run_squad import DataArguments, make_split, windows_key
from modernalbert.run_squad import command as squad_command


CHECKPOINT = REPOSITORY / "checkpoints" / "modernalbert-nano"
NUM_QUESTIONS = sum(len(entries) for _, entries in PARAGRAPHS)
NUM_NULL = sum(answer is None for _, entries in PARAGRAPHS for _, answer in entries)


@pytest.fixture
def workplace(tmp_path, nano_tokenizer, monkeypatch):
    """A small model with nano's vocabulary, and files of questions."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_model(ModernALBERTForMaskedLM, vocab_size=30522, std=0.1).save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    write_squad(tmp_path / "train.json", repeat=2)
    write_squad(tmp_path / "validation.json")
    write_squad(tmp_path / "test.json", with_answers=False)
    return tmp_path


SMALL_WINDOWS = ["--max_seq_length", 48, "--doc_stride", 16]


def squad(command, workplace, *arguments, train="train.json", validation="validation.json"):
    places = {
        "--model_name_or_path": workplace / "model",
        "--output_dir": workplace / "out",
        "--train_file": workplace / train,
        "--validation_file": workplace / validation,
    }
    places = [x for flag, value in places.items() if flag not in arguments for x in (flag, value)]
    quick = ["--per_device_train_batch_size", 8, "--disable_tqdm", "true", "--logging_steps", 1]
    return command(squad_command, *places, *quick, *arguments)


def read(workplace, name: str):
    return json.loads((workplace / "out" / name).read_text())


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_short_training_answers_its_questions(command, workplace):
    """The shipped checkpoint learns two paragraphs by heart, the unanswerable questions too."""
    content = squad_content()
    content["data"] = content["data"][:2]
    write_squad(workplace / "two.json", content)
    arguments = ["--model_name_or_path", CHECKPOINT, "--num_train_epochs", 14, "--learning_rate", "1e-3"]
    arguments += ["--eval_strategy", "steps", "--eval_steps", 14, "--save_strategy", "no", "--warmup_steps", 2]
    arguments += ["--load_best_model_at_end", "false"]
    code, _, error = squad(command, workplace, *arguments, train="two.json", validation="two.json")
    assert code == 0, error
    results = read(workplace, "all_results.json")
    assert results["eval_f1"] == results["eval_exact"] == results["eval_HasAns_f1"] == results["eval_NoAns_f1"] == 100.0
    # Evaluation in between, which sees the windows in another order, finds the same.
    log = [entry["eval_f1"] for entry in read(workplace, "trainer_state.json")["log_history"] if "eval_f1" in entry]
    assert log == [100.0]
    model = AutoModelForQuestionAnswering.from_pretrained(workplace / "out")
    tokenizer = AutoTokenizer.from_pretrained(workplace / "out")
    for context, questions in PARAGRAPHS[:2]:
        answers = question_answering(
            model, tokenizer, [text for text, _ in questions], context, null_threshold=results["eval_null_threshold"]
        )
        assert [answer.text for answer in answers] == [answer or "" for _, answer in questions]
        assert all(context[answer.start : answer.end] == answer.text for answer in answers)


def test_fine_tune_predict_merge_and_refuse_to_repeat(command, workplace):
    arguments = ["--test_file", workplace / "test.json", "--num_train_epochs", 1, "--merge_after", "calibrated"]
    code, _, error = squad(command, workplace, *arguments, *SMALL_WINDOWS)
    assert code == 0, error
    results = read(workplace, "all_results.json")
    questions = read_squad(str(workplace / "validation.json"))
    predictions = read(workplace, "predictions_validation.json")
    assert list(predictions) == [question.id for question in questions]
    # The metrics are those of the predictions that were written, at the threshold that was best.
    for name, value in squad_metrics(questions, predictions).items():
        assert results[f"eval_{name}"] == pytest.approx(value)
    assert results["eval_f1"] == pytest.approx(results["eval_best_f1"])
    assert results["eval_f1"] >= 100 * NUM_NULL / NUM_QUESTIONS - 1e-9
    assert {"merged_f1", "merged_exact", "eval_loss", "train_loss"} <= set(results)
    assert results["train_samples"] > 2 * NUM_QUESTIONS  # windows
    odds, candidates = read(workplace, "null_odds_validation.json"), read(workplace, "nbest_validation.json")
    for question in questions:
        best = max((c for c in candidates[question.id] if c["text"]), key=lambda c: c["score"])
        silent = odds[question.id] > results["eval_null_threshold"]
        assert predictions[question.id] == ("" if silent else best["text"])
        assert sum(c["score"] for c in candidates[question.id]) == pytest.approx(1, abs=1e-4)
        assert all(question.context[c["start"] : c["end"]] == c["text"] for c in candidates[question.id])
    # The test file asks the same, without answers: the same predictions, and no metrics.
    assert read(workplace, "predictions_test.json") == predictions
    assert "test_f1" not in results and results["test_samples"] == NUM_QUESTIONS
    ModernALBERTForQuestionAnswering.from_pretrained(workplace / "out")
    report = read(workplace, "merged/merge_report.json")
    assert set(report["metrics"]["merged"]) == {"f1", "exact"} and report["method"] == "calibrated"
    code, _, error = squad(command, workplace, *arguments)
    assert code == 2 and "holds a finished run" in error


def test_two_processes_predict_as_one(command, workplace, monkeypatch):
    words = ["--model_name_or_path", workplace / "model", "--output_dir", workplace / "two", "--use_cpu", "True"]
    words += ["--train_file", workplace / "train.json", "--validation_file", workplace / "validation.json"]
    words += ["--num_train_epochs", 1, "--per_device_train_batch_size", 4, "--per_device_eval_batch_size", 3]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(workplace / "cache"))
    run_torchrun(workplace / "logs", REPOSITORY / "run_squad.py", *words, *SMALL_WINDOWS)
    two = json.loads((workplace / "two/all_results.json").read_text())
    arguments = ["--model_name_or_path", workplace / "two", "--no_do_train", "--per_device_eval_batch_size", 7]
    code, _, error = squad(command, workplace, *arguments, *SMALL_WINDOWS)
    assert code == 0, error
    one = read(workplace, "all_results.json")
    for name in ("eval_f1", "eval_exact", "eval_HasAns_f1", "eval_NoAns_f1", "eval_best_f1_thresh", "eval_samples"):
        assert two[name] == pytest.approx(one[name], abs=1e-4), name
    predictions = json.loads((workplace / "two/predictions_validation.json").read_text())
    assert predictions == read(workplace, "predictions_validation.json")
    odds = json.loads((workplace / "two/null_odds_validation.json").read_text())
    assert odds == pytest.approx(read(workplace, "null_odds_validation.json"), abs=1e-4)
    # Both processes, and then this one, used the windows that the first one made.
    assert len(list((workplace / "cache").rglob("*.arrow"))) == 2


def test_windows_are_made_once_and_again_where_something_changed(command, workplace, nano_tokenizer):
    questions = read_squad(str(workplace / "train.json"))
    folder = workplace / "cache" / "modernalbert_squad"

    def made(name="train", rows=questions, **sizes):
        split = make_split(
            name, rows, nano_tokenizer, DataArguments(**({"max_seq_length": 48, "doc_stride": 16} | sizes))
        )
        return split, {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}

    first, files = made()
    keys = [windows_key("train", {}, [], (48, 16), nano_tokenizer)]
    nano_tokenizer("changes its state", truncation=True, max_length=3, padding="max_length")
    assert keys == [windows_key("train", {}, [], (48, 16), nano_tokenizer)]
    second, again = made()
    assert again == files and first.inputs[:] == second.inputs[:] and len(files) == 1
    for i, change in enumerate(({"name": "test"}, {"doc_stride": 8}, {"max_seq_length": 50}, {"rows": questions[1:]})):
        assert len(made(**change)[1]) == i + 2, change


def test_squad_1_always_answers(command, workplace):
    for name in ("train.json", "validation.json"):
        write_squad(workplace / name, version_2=False)
    code, _, error = squad(command, workplace, "--num_train_epochs", 1)
    assert code == 0, error
    results = read(workplace, "all_results.json")
    assert not any("NoAns" in name or "thresh" in name or "best" in name for name in results)
    assert results["eval_total"] == results["eval_HasAns_total"] == NUM_QUESTIONS - NUM_NULL
    assert all(read(workplace, "predictions_validation.json").values())
    assert not (workplace / "out/null_odds_validation.json").exists()


def test_the_threshold_of_the_validation_questions_serves_the_test(command, workplace):
    arguments = ["--test_file", workplace / "train.json", "--num_train_epochs", 1]
    code, _, error = squad(command, workplace, *arguments)
    assert code == 0, error
    results = read(workplace, "all_results.json")
    assert results["test_null_threshold"] == results["eval_null_threshold"] == results["eval_best_f1_thresh"]
    assert results["test_total"] == 2 * NUM_QUESTIONS
    # One that is given serves both.
    arguments = ["--model_name_or_path", workplace / "out", "--no_do_train", "--null_score_diff_threshold", "-1000"]
    arguments += ["--output_dir", workplace / "silent"]
    code, _, error = squad(command, workplace, *arguments)
    assert code == 0, error
    silent = json.loads((workplace / "silent/all_results.json").read_text())
    assert (
        silent["eval_null_threshold"] == -1000 and silent["eval_NoAns_f1"] == 100.0 and silent["eval_HasAns_f1"] == 0.0
    )
    assert silent["eval_f1"] == pytest.approx(100 * NUM_NULL / NUM_QUESTIONS)
    assert silent["eval_best_f1"] == results["eval_best_f1"]


def test_a_data_set_with_the_columns_of_the_hubs(command, workplace):
    (workplace / "hub").mkdir()
    for split in ("train", "validation"):
        rows = [
            {
                "id": q.id,
                "context": q.context,
                "question": q.question,
                "answers": {"text": list(q.answers), "answer_start": list(q.starts)},
            }
            for q in read_squad(str(workplace / f"{split}.json"))
        ]
        (workplace / "hub" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model_name_or_path", workplace / "model", "--dataset_name", workplace / "hub", "--num_train_epochs"]
    arguments += [1, "--output_dir", workplace / "out", "--disable_tqdm", "true"]
    code, _, error = command(squad_command, *arguments)
    assert code == 0, error
    results = read(workplace, "all_results.json")
    assert results["train_samples"] == 2 * NUM_QUESTIONS and results["eval_NoAns_total"] == NUM_NULL


def test_other_encoders_whatever_head_they_had(command, workplace, nano_tokenizer):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(workplace / "bert")
    nano_tokenizer.save_pretrained(workplace / "bert")
    arguments = ["--model_name_or_path", workplace / "bert", "--num_train_epochs", 1]
    code, _, error = squad(command, workplace, *arguments)
    assert code == 0, error
    assert read(workplace, "config.json")["architectures"] == ["BertForQuestionAnswering"]
    assert "eval_f1" in read(workplace, "all_results.json")


# --- mistakes --------------------------------------------------------------------------------------------------------


def misplaced(workplace) -> None:
    content = squad_content()
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 2
    write_squad(workplace / "wrong.json", content)


def test_misplaced_answers_are_counted_and_not_trained_on(command, workplace, caplog):
    misplaced(workplace)
    files = {"train": "wrong.json", "validation": "wrong.json"}
    code, _, error = squad(command, workplace, "--num_train_epochs", 1, **files)
    assert code == 0, error
    assert "1 of 10 answers do not stand where their answer_start says" in caplog.text
    results = read(workplace, "all_results.json")
    assert results["train_samples"] == NUM_QUESTIONS - 1 and results["eval_total"] == NUM_QUESTIONS


def test_training_needs_an_answer_in_its_place(command, workplace):
    content = squad_content(version_2=False)
    for article in content["data"]:
        for entry in article["paragraphs"][0]["qas"]:
            entry["answers"][0]["answer_start"] += 1
    write_squad(workplace / "shifted.json", content)
    code, _, error = squad(command, workplace, train="shifted.json")
    assert code == 2 and "have no answer that stands where its answer_start says" in error
    assert not (workplace / "out").exists()


def test_questions_longer_than_the_window_are_cut_and_said(command, workplace, caplog):
    content = squad_content()
    content["data"][0]["paragraphs"][0]["qas"][0]["question"] = "Why " + "oh why " * 100 + "?"
    write_squad(workplace / "long.json", content)
    arguments = ["--num_train_epochs", 1, *SMALL_WINDOWS]
    code, _, error = squad(command, workplace, *arguments, validation="long.json")
    assert code == 0, error
    assert "validation: 1 questions were cut to 14 tokens" in caplog.text and "(first: id '0-0')" in caplog.text
    assert len(read(workplace, "predictions_validation.json")) == NUM_QUESTIONS


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--train_file", "{tmp}/wrong.json", "--strict"], "--strict refuses"),
        (["--train_file", "{tmp}/test.json"], "test.json, data[0].paragraphs[0].qas[0]: no field 'answers'"),
        (["--dataset_name", "squad"], "--dataset_name squad and files are given"),
        (["--no_do_train"], "--no_do_train needs a model with a head for question answering"),
        (["--doc_stride", "400"], "windows of 384 tokens that overlap by 400 are not allowed"),
        (["--max_answer_length", "0"], "--max_answer_length 0 is not allowed"),
        (["--n_best_size", "0"], "--n_best_size 0 is not allowed"),
        (["--metric_for_best_model", "accuracy"], "it must be one of task, loss, f1, exact"),
        (["--max_seq_length", "0"], "--max_seq_length 0 is not allowed"),
    ],
)
def test_mistakes_get_one_sentence_and_write_nothing(command, workplace, arguments, said):
    misplaced(workplace)
    before = sorted(path.name for path in workplace.iterdir())
    arguments = [argument.replace("{tmp}", str(workplace)) for argument in arguments]
    code, _, error = squad(command, workplace, *arguments)
    assert code == 2, error
    assert said in error, error
    assert sorted(path.name for path in workplace.iterdir()) == before


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "there is no data"),
        (["--dataset_name", "squad"], "--dataset_name squad cannot be fetched from the Hub"),
        (["--train_file", "{tmp}/train.json"], "--validation_file is missing"),
        (["--validation_file", "{tmp}/validation.json"], "--train_file is missing"),
        (["--train_file", "{tmp}/train.json", "--no_do_eval"], "--model_name_or_path is missing"),
    ],
)
def test_missing_arguments(command, workplace, arguments, said):
    arguments = [argument.replace("{tmp}", str(workplace)) for argument in arguments]
    code, _, error = command(squad_command, "--output_dir", workplace / "out", *arguments)
    assert code == 2 and said in error and not (workplace / "out").exists()
