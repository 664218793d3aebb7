# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The GLUE script: metrics are right, files are read or refused with their line, and a run leaves what it says."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small_models import tiny_config, tiny_model
from transformers import BertConfig, BertForSequenceClassification

from modernalbert import ModernALBERTForMaskedLM, ModernALBERTForSequenceClassification
from modernalbert.cli.errors import UserError
from modernalbert.data.glue_tasks import GLUE_TASKS
from modernalbert.data.sentences import infer_task, load_task_file
from modernalbert.data.tables import read_rows
from modernalbert.evaluation.glue import METRICS, compute_metrics
from modernalbert.run_glue import command as glue_command


FILM = [
    "A delight from start to end .",
    "Dull and far too long .",
    "Funny , warm and wise .",
    "A mess without a point .",
]


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_against_their_formulas():
    generator = np.random.default_rng(0)
    for _ in range(20):
        labels, predictions = generator.integers(0, 2, 50), generator.integers(0, 2, 50)
        tp = ((predictions == 1) & (labels == 1)).sum()
        tn = ((predictions == 0) & (labels == 0)).sum()
        fp, fn = ((predictions == 1) & (labels == 0)).sum(), ((predictions == 0) & (labels == 1)).sum()
        assert METRICS["accuracy"](predictions, labels) == pytest.approx((tp + tn) / 50)
        assert METRICS["f1"](predictions, labels) == pytest.approx(2 * tp / (2 * tp + fp + fn))
        matthews = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
        assert METRICS["matthews_correlation"](predictions, labels) == pytest.approx(matthews)
        x, y = generator.normal(size=30), generator.normal(size=30)
        y[3] = y[4]  # a tie
        assert METRICS["pearson"](x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
        ranks = [pd.Series(v).rank().to_numpy() for v in (x, y)]
        assert METRICS["spearmanr"](x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_macro_f1_and_rank_correlation_of_many_ties_against_their_formulas():
    generator = np.random.default_rng(1)
    for _ in range(20):
        labels, predictions = generator.integers(0, 3, 30), generator.integers(0, 4, 30)  # 3 is never right
        scores = []
        for label in range(4):
            right = ((predictions == label) & (labels == label)).sum()
            scores.append(2 * right / ((predictions == label).sum() + (labels == label).sum()))
        assert METRICS["macro_f1"](predictions, labels) == pytest.approx(np.mean(scores))
        x, y = generator.integers(0, 4, 30), generator.integers(0, 4, 30)
        # the mean of the places that equal values share
        ranks = [[(v < value).sum() + ((v == value).sum() + 1) / 2 for value in v] for v in (x, y)]
        assert METRICS["spearmanr"](x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_metrics_on_one_class_and_constant_predictions():
    ones, zeros = np.ones(5, dtype=int), np.zeros(5, dtype=int)
    assert METRICS["f1"](zeros, ones) == 0.0 and METRICS["f1"](zeros, zeros) == 0.0
    assert METRICS["matthews_correlation"](ones, ones) == 0.0
    assert METRICS["pearson"](np.ones(5), np.arange(5.0)) == 0.0
    assert compute_metrics(GLUE_TASKS["mrpc"], ones, ones) == {"f1": 1.0, "accuracy": 1.0}


@pytest.mark.parametrize("name", ["mrpc", "qqp", "custom"])
def test_f1_is_that_of_one_label_wherever_a_head_has_it(name, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    task = GLUE_TASKS[name] if name in GLUE_TASKS else infer_task(str(tmp_path / "a.jsonl"))
    labels, predictions = np.array([1, 1, 1, 0, 0]), np.array([1, 0, 1, 1, 0])
    expected = compute_metrics(task, predictions, labels)
    assert expected["f1"] == pytest.approx(2 / 3) and expected["accuracy"] == pytest.approx(3 / 5)
    turned = replace(task, labels=task.labels[::-1])
    assert compute_metrics(turned, 1 - predictions, 1 - labels) == expected
    wider = replace(task, labels=("none of them", *task.labels))
    assert compute_metrics(wider, predictions + 1, labels + 1) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(GLUE_TASKS))
def test_metrics_equal_those_of_evaluate(name):
    evaluate = pytest.importorskip("evaluate")
    try:
        metric = evaluate.load("glue", name)
    except Exception as error:
        pytest.skip(f"evaluate.load needs a network: {error}")
    task, generator = GLUE_TASKS[name], np.random.default_rng(0)
    if task.is_regression:
        labels, predictions = generator.normal(size=50), generator.normal(size=50)
    else:
        labels, predictions = generator.integers(0, len(task.labels), (2, 50))
    theirs = metric.compute(predictions=predictions, references=labels)
    ours = compute_metrics(task, predictions, labels)
    for metric_name, value in theirs.items():
        assert ours[metric_name] == pytest.approx(value)


def test_all_nine_tasks_are_there():
    assert set(GLUE_TASKS) == {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}
    assert GLUE_TASKS["stsb"].is_regression and GLUE_TASKS["mnli"].labels[2] == "contradiction"


# --- files -----------------------------------------------------------------------------------------------------------


def test_every_file_type_gives_the_same_rows(tmp_path):
    table = pd.DataFrame({"sentence": FILM, "label": [1, 0, 1, 0]})
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    table.to_json(tmp_path / "a.json", orient="records")
    table.to_parquet(tmp_path / "a.parquet")
    for suffix in ("csv", "tsv", "jsonl", "json", "parquet"):
        data = load_task_file(str(tmp_path / f"a.{suffix}"), GLUE_TASKS["sst2"])
        assert data["text"] == FILM and data["label"] == [1, 0, 1, 0], suffix


def test_a_task_is_inferred_from_its_file(tmp_path):
    def task_of(rows, **kwargs):
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return infer_task(str(tmp_path / "t.jsonl"), **kwargs)

    named = task_of([{"id": "x", "a": "p", "b": "q", "label": label} for label in ("yes", "no", "maybe")])
    assert named.text_columns == ("a", "b") and named.labels == ("maybe", "no", "yes")
    stars = task_of([{"text": "t", "stars": star} for star in (5, 1, 3)], label_column="stars")
    assert stars.labels == ("1", "3", "5") and stars.metrics[0] == "accuracy"
    assert load_task_file(str(tmp_path / "t.jsonl"), stars)["label"] == [2, 0, 1]
    assert task_of([{"text": "t", "label": value} for value in (0.5, 1, 2.25)]).is_regression
    assert task_of([{"x": "t", "y": "u", "z": "v", "label": i} for i in (0, 1)], text_columns="x,z").text_columns == (
        "x",
        "z",
    )
    with pytest.raises(UserError, match="which columns hold the text.*--text_columns"):
        task_of([{"x": "t", "y": "u", "z": "v", "label": 0}])
    with pytest.raises(UserError, match="one label only"):
        task_of([{"text": "t", "label": 1}] * 3)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("none.jsonl", None, "none.jsonl: no such file"),
        ("a.txt", "x", "'.txt' is not allowed: it must be one of .csv"),
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b", "label": }\n', "a.jsonl, line 2, column 28"),
        ("a.json", '[{"sentence": "a"},\n {"sentence" 3}]', "a.json, line 2, column 14"),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n[1, 2]\n', "line 2: a row must be an object"),
        ("a.jsonl", '{"text": "a", "label": 1}\n', "line 1: no column 'sentence'; there are text, label"),
        ("a.jsonl", '{"sentence": 5, "label": 1}\n', "line 1: column 'sentence' must hold text, not 5"),
        ("a.jsonl", '{"sentence": "a"}\n', "line 1: no column 'label'"),
        (
            "a.jsonl",
            '{"sentence": "a", "label": 1}\n{"sentence": "b", "label": 2}\n',
            "line 2: the label 2 is not allowed",
        ),
        ("a.jsonl", '{"sentence": "a", "label": "good"}\n', "it must be one of 0 to 1 (negative, positive)"),
        ("a.csv", "sentence,label\na,1\nb\n", "a.csv, line 3: 2 columns expected"),
        ("a.csv", 'sentence,label\na,1\n"b,0\n', "a.csv, line 3: unexpected end of data"),
        ("a.jsonl", '{"sentence": "a", "label": null}\n', "line 1: no value in column 'label'"),
        ("a.csv", "sentence,label\na,\n", "line 2: no value in column 'label'"),
        ("a.jsonl", b'{"sentence": "\xff", "label": 1}\n', "not UTF-8 text (byte 14)"),
        ("a.parquet", b"PAR1 but not really", "a.parquet: cannot be read"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_task_file(str(path), GLUE_TASKS["sst2"])
    assert said in str(caught.value), str(caught.value)


def test_a_byte_order_mark_and_tab_separated_quotes_are_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfsentence,label\nfine,1\n")
    assert load_task_file(str(tmp_path / "a.csv"), GLUE_TASKS["sst2"])["text"] == ["fine"]
    (tmp_path / "a.tsv").write_text('sentence\tlabel\nso " quoted\t1\n')
    assert load_task_file(str(tmp_path / "a.tsv"), GLUE_TASKS["sst2"])["text"] == ['so " quoted']


def test_quoted_newlines_do_not_shift_line_numbers(tmp_path):
    (tmp_path / "a.csv").write_text('sentence,label\n"two\nlines",1\nplain,7\n')
    assert read_rows(str(tmp_path / "a.csv"))[0][1]["sentence"] == "two\nlines"
    with pytest.raises(UserError, match="line 4: the label '7'"):
        load_task_file(str(tmp_path / "a.csv"), GLUE_TASKS["sst2"])


def test_regression_labels_must_be_numbers_and_test_labels_may_be_missing(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in ("1.5", "x")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="line 2: the label 'x' is not allowed: it must be a number"):
        load_task_file(str(tmp_path / "a.jsonl"), GLUE_TASKS["stsb"])
    rows = [{"sentence": "a", "label": -1}, {"sentence": "b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_task_file(str(tmp_path / "a.jsonl"), GLUE_TASKS["sst2"], with_labels=False).column_names == ["text"]


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path, nano_tokenizer):
    """A small model with nano's vocabulary, and files for a sentence task, a pair task and a regression."""
    tiny_model(ModernALBERTForMaskedLM, vocab_size=30522, std=0.1).save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"sentence": text, "label": (i + 1) % 2} for i, text in enumerate(FILM * 12)]
    files = {
        "train.jsonl": rows,
        "validation.jsonl": [
            {"sentence": " and ".join([t] * (i + 1)), "label": (i + 1) % 2} for i, t in enumerate(FILM)
        ],
        "test.jsonl": [{"sentence": text} for text in FILM],
        "pairs.jsonl": [
            {"premise": a, "hypothesis": b, "label": i % 3} for i, (a, b) in enumerate(zip(FILM, FILM[::-1]))
        ],
        "scores.jsonl": [{"sentence1": t, "sentence2": t, "label": i / 2} for i, t in enumerate(FILM)],
    }
    for name, content in files.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, content)) + "\n")
    return tmp_path


def glue(command, workplace, *arguments, train="train.jsonl", validation="validation.jsonl"):
    places = ["--model_name_or_path", workplace / "model", "--output_dir", workplace / "out"]
    places += ["--train_file", workplace / train, "--validation_file", workplace / validation]
    quick = ["--per_device_train_batch_size", 8, "--disable_tqdm", "true", "--logging_steps", 1]
    given = {argument for argument in arguments if str(argument).startswith("--")}
    places = [x for flag, value in zip(places[::2], places[1::2]) if flag not in given for x in (flag, value)]
    return command(glue_command, *places, *quick, *arguments)


def test_fine_tune_predict_and_merge(command, workplace):
    arguments = ["--task_name", "sst2", "--test_file", workplace / "test.jsonl", "--num_train_epochs", 4]
    arguments += ["--learning_rate", "5e-3", "--merge_after", "ema"]
    code, _, error = glue(command, workplace, *arguments)
    out = workplace / "out"
    assert code == 0, error
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_accuracy"] == 1.0 and results["train_loss"] < 0.6 and "merged_accuracy" in results
    predictions = [json.loads(line) for line in (out / "predictions_test.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in predictions] == ["positive", "negative"] * 2
    assert sum(predictions[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    model = ModernALBERTForSequenceClassification.from_pretrained(out).eval()
    assert model.config.id2label == {0: "negative", 1: "positive"}
    # predictions come in the order of the rows, although evaluation goes by length
    validation = [json.loads(line) for line in (out / "predictions_validation.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in validation] == ["positive", "negative"] * 2
    for part in ("modeling_modernalbert.py", "tokenizer.json", "merged/folded/model.safetensors", "merged/adapter"):
        assert (out / part).exists(), part
    # Rows were cut to the longest length; whoever reads the tokenizer alone is not.
    for folder in (out, out / "merged/folded"):
        saved = json.loads((folder / "tokenizer.json").read_text())
        assert saved["truncation"] is None and saved["padding"] is None
    assert set(json.loads((out / "merged/merge_report.json").read_text())["metrics"]) == {"routed", "merged"}


def test_the_best_checkpoint_is_chosen_by_the_tasks_metric(command, workplace):
    code, _, error = glue(command, workplace, "--task_name", "cola", "--num_train_epochs", 2)
    assert code == 0, error
    state = json.loads((workplace / "out/trainer_state.json").read_text())
    scores = [entry["eval_matthews_correlation"] for entry in state["log_history"] if "eval_loss" in entry]
    assert state["best_metric"] == max(scores)


def test_evaluating_a_classifier_keeps_its_own_label_order(command, workplace, nano_tokenizer):
    names = {0: "positive", 1: "negative"}
    model = tiny_model(ModernALBERTForSequenceClassification, vocab_size=30522, id2label=names)
    model.config.label2id = {name: i for i, name in names.items()}
    model.save_pretrained(workplace / "turned")
    nano_tokenizer.save_pretrained(workplace / "turned")
    arguments = ["--task_name", "sst2", "--model_name_or_path", workplace / "turned", "--no_do_train"]
    code, _, error = glue(command, workplace, *arguments)
    assert code == 0, error
    rows = [json.loads(line) for line in (workplace / "out/predictions_validation.jsonl").read_text().splitlines()]
    texts = [json.loads(line)["sentence"] for line in (workplace / "validation.jsonl").read_text().splitlines()]
    predicted = []
    for row, text in zip(rows, texts):
        logits = model(**nano_tokenizer(text, return_tensors="pt")).logits[0]
        predicted.append(names[int(logits.argmax())])
        assert row["prediction"] == predicted[-1]
    accuracy = np.mean([name == ("positive", "negative")[i % 2] for i, name in enumerate(predicted)])
    assert json.loads((workplace / "out/all_results.json").read_text())["eval_accuracy"] == pytest.approx(accuracy)
    more = ("--merge_after", "calibrated", "--output_dir", workplace / "out2")
    code, _, error = glue(command, workplace, *arguments, *more)
    assert code == 2 and "--merge_after calibrated needs training rows to fit to" in error


def test_evaluation_alone_needs_a_trained_head(command, workplace):
    arguments = ("--task_name", "mnli", "--no_do_train")
    files = {"train": "pairs.jsonl", "validation": "pairs.jsonl"}
    code, _, error = glue(command, workplace, *arguments, **files)
    assert code == 2 and "--no_do_train needs a model with a head" in error


def test_no_evaluation_needs_no_other_flag(command, workplace):
    arguments = ("--task_name", "sst2", "--num_train_epochs", 1, "--overwrite_output_dir")
    for flags, evaluated in ((["--no_do_eval"], False), (["--eval_strategy", "no"], True)):
        code, _, error = glue(command, workplace, *arguments, *flags)
        assert code == 0, error
        assert ("eval_loss" in json.loads((workplace / "out/all_results.json").read_text())) == evaluated


def test_the_demo_from_data_to_plot(command, tmp_path):
    arguments = ["--demo", "--output_dir", tmp_path / "demo", "--max_train_samples", 32, "--max_eval_samples", 16]
    code, output, error = command(glue_command, *arguments, "--disable_tqdm", "true")
    assert code == 0, error
    summary = json.loads((tmp_path / "demo/demo.json").read_text())
    assert set(summary["rows"]) == {"token routing", "merged, folded", "merged, stock LoRA on base"}
    assert "| token routing" in output and (tmp_path / "demo/demo.png").read_bytes()[:4] == b"\x89PNG"
    files = (tmp_path / "demo-data/train.jsonl", tmp_path / "demo-data/validation.jsonl")
    train, validation = (set(file.read_text().splitlines()) for file in files)
    assert len(validation) == 1000 and len(train) > 7400 and not train & validation


def test_pairs_regression_and_expert_mixing(command, workplace):
    for task, file, metric in (("mnli", "pairs.jsonl", "eval_accuracy"), ("stsb", "scores.jsonl", "eval_spearmanr")):
        arguments = ["--task_name", task, "--expert_mixing", "ema", "--num_train_epochs", 1, "--overwrite_output_dir"]
        code, _, error = glue(command, workplace, *arguments, train=file, validation=file)
        assert code == 0, error
        assert metric in json.loads((workplace / "out/all_results.json").read_text())
        config = json.loads((workplace / "out/config.json").read_text())
        assert config["expert_mixing"] == "ema"
        assert config["problem_type"] == ("regression" if task == "stsb" else "single_label_classification")


def test_other_encoders_and_json_arguments(command, workplace, nano_tokenizer):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForSequenceClassification(config).save_pretrained(workplace / "bert")
    nano_tokenizer.save_pretrained(workplace / "bert")
    arguments = {
        "model_name_or_path": str(workplace / "bert"),
        "train_file": str(workplace / "train.jsonl"),
        "validation_file": str(workplace / "validation.jsonl"),
        "output_dir": str(workplace / "out"),
        "num_train_epochs": 1,
        "disable_tqdm": True,
    }
    (workplace / "arguments.json").write_text(json.dumps(arguments))
    code, _, error = command(glue_command, workplace / "arguments.json")
    assert code == 0, error
    assert "eval_f1" in json.loads((workplace / "out/all_results.json").read_text())


def test_a_configuration_alone_starts_from_random_weights_and_says_so(command, workplace, nano_tokenizer, caplog):
    config = tiny_config(vocab_size=30522, pad_token_id=0)
    (workplace / "bare").mkdir()
    config.to_json_file(workplace / "bare/config.json")
    nano_tokenizer.save_pretrained(workplace / "bare")
    arguments = ["--task_name", "sst2", "--model_name_or_path", workplace / "bare", "--num_train_epochs", 1]
    code, _, _ = glue(command, workplace, *arguments)
    assert code == 0 and "random weights" in caplog.text


def test_a_checkpoint_in_half_precision_is_trained_in_float32(command, workplace, nano_tokenizer):
    tiny_model(ModernALBERTForMaskedLM, vocab_size=30522).bfloat16().save_pretrained(workplace / "half")
    nano_tokenizer.save_pretrained(workplace / "half")
    arguments = ["--task_name", "sst2", "--model_name_or_path", workplace / "half", "--num_train_epochs", 1]
    code, _, error = glue(command, workplace, *arguments)
    assert code == 0, error
    assert {value.dtype for value in load_file(workplace / "out/model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--task_name", "sst3"], "--task_name sst3 is not allowed: it must be one of cola, sst2"),
        (["--task_name", "rte"], "no column 'sentence1'"),
        (["--merge_after", "calibration"], "--merge_after calibration is not allowed"),
    ],
)
def test_mistakes_get_one_sentence_and_write_nothing(command, workplace, arguments, said):
    before = sorted(path.name for path in workplace.iterdir())
    arguments = [a.replace("{tmp}", str(workplace)) for a in arguments]
    code, _, error = glue(command, workplace, *arguments)
    assert code == 2, error
    assert said in error, error
    assert sorted(path.name for path in workplace.iterdir()) == before


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "there is no data"),
        (
            ["--train_file", "{tmp}/train.jsonl", "--validation_file", "{tmp}/validation.jsonl"],
            "--model_name_or_path is missing",
        ),
        (["--test_file", "{tmp}/test.jsonl"], "--test_file alone"),
        (["--train_file", "{tmp}/train.jsonl"], "--validation_file is missing"),
        (["--validation_file", "{tmp}/validation.jsonl"], "--train_file is missing"),
    ],
)
def test_missing_arguments(command, workplace, arguments, said):
    arguments = [a.replace("{tmp}", str(workplace)) for a in arguments]
    code, _, error = command(glue_command, "--output_dir", workplace / "out", *arguments)
    assert code == 2 and said in error and not (workplace / "out").exists()


def test_merging_needs_experts(command, workplace, nano_tokenizer):
    plain = tiny_model(ModernALBERTForMaskedLM, vocab_size=30522, ffn_modulation="none")
    plain.save_pretrained(workplace / "plain")
    nano_tokenizer.save_pretrained(workplace / "plain")
    arguments = ["--model_name_or_path", workplace / "plain", "--merge_after", "ema"]
    code, _, error = glue(command, workplace, *arguments)
    assert code == 2 and "--merge_after needs a ModernALBERT" in error and not (workplace / "out").exists()


def test_every_command_explains_itself(command):
    from modernalbert.hub import command as export_command
    from modernalbert.merge_experts import command as merge_command

    for entry_point in (merge_command, export_command):
        code, output, _ = command(entry_point, "--help")
        assert code == 0 and "--model_name_or_path" in output


@torch.no_grad()
def test_length_grouped_prediction_keeps_the_order_of_rows(tmp_path, workplace):
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, TrainingArguments

    from modernalbert.export.hub_folder import load_tokenizer
    from modernalbert.training.length_grouped_trainer import LengthGroupedTrainer

    tokenizer = load_tokenizer(str(workplace / "model"))
    model = tiny_model(ModernALBERTForSequenceClassification, vocab_size=30522)
    rows = [list(range(100, 100 + n)) for n in (3, 9, 1, 5, 7)]
    data = Dataset.from_dict({"input_ids": rows, "label": [0, 1, 0, 1, 1]})
    arguments = TrainingArguments(
        str(tmp_path / "o"), per_device_eval_batch_size=2, train_sampling_strategy="group_by_length", report_to="none"
    )
    trainer = LengthGroupedTrainer(model, arguments, data_collator=DataCollatorWithPadding(tokenizer))
    output = trainer.predict(data)
    assert output.label_ids.tolist() == [0, 1, 0, 1, 1]
    for row, logits in zip(rows, output.predictions):
        torch.testing.assert_close(torch.tensor(logits), model(torch.tensor([row])).logits[0], atol=1e-5, rtol=1e-5)
