# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""All tasks and several seeds: settings, order, what fails and what continues, the table, the server's files."""

import json
import math
import shutil

import pytest
from launches import run_accelerate
from safetensors.torch import load_file
from small_models import REPOSITORY, tiny_model

from modernalbert import ModernALBERTForMaskedLM
from modernalbert.cli.errors import UserError
from modernalbert.data.glue_tasks import GLUE_TASKS
from modernalbert.finetuning.glue_recipes import RECIPES, apply_recipe
from modernalbert.finetuning.glue_submission import SUBMISSION_FILES, write_submission
from modernalbert.finetuning.glue_suite import Run, as_markdown, run_suite, table_rows
from modernalbert.run_glue import DataArguments, GlueTrainingArguments, ModelArguments, run
from modernalbert.run_glue import command as glue_command


TEXTS = ["A dog runs .", "Nobody sleeps here .", "The old man sings .", "Two cats play ."] * 3


def write_rows(file, task, count, labelled=True):
    task = GLUE_TASKS[task]
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        row = {column: TEXTS[(i + 3 * j) % len(TEXTS)] for j, column in enumerate(task.text_columns)}
        row["label"] = (i % 11) / 2 if task.is_regression else i % len(task.labels)
        lines.append(json.dumps(row if labelled else {**row, "label": -1}))
    file.write_text("\n".join(lines) + "\n")


@pytest.fixture
def place(tmp_path, nano_tokenizer):
    """A small model, and rows of three tasks, MNLI's in two validation sets and three test sets."""
    tiny_model(ModernALBERTForMaskedLM, vocab_size=30522, std=0.1).save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    for task in ("mnli", "rte", "stsb"):
        write_rows(tmp_path / "rows" / task / "train.jsonl", task, 16)
        for split in GLUE_TASKS[task].validation_splits:
            write_rows(tmp_path / "rows" / task / f"{split}.jsonl", task, 12)
        for split in GLUE_TASKS[task].test_splits:
            write_rows(tmp_path / "rows" / task / f"{split}.jsonl", task, 5, labelled=False)
    return tmp_path


def options(place, *more):
    given = {str(argument) for argument in more}
    defaults = {
        "--model_name_or_path": place / "model",
        "--data_dir": place / "rows",
        "--task_name": "all",
        "--output_dir": place / "out",
        "--num_train_epochs": 1,
        "--disable_tqdm": "true",
    }
    return [str(word) for flag, value in defaults.items() if flag not in given for word in (flag, value)] + [
        str(word) for word in more
    ]


def suite(command, place, *more):
    return command(glue_command, *options(place, *more))


def rows_of(place):
    return {
        (row["data"], row["model"], row["metric"]): row for row in json.loads((place / "out/results.json").read_text())
    }


# --- settings --------------------------------------------------------------------------------------------------------


def test_a_task_brings_its_settings_and_flags_win(tmp_path):
    arguments = GlueTrainingArguments(str(tmp_path), use_cpu=True, learning_rate=1e-3, gradient_accumulation_steps=4)
    apply_recipe(arguments, "cola")
    found = (arguments.learning_rate, arguments.weight_decay, arguments.num_train_epochs)
    assert found == (1e-3, 1e-6, 5) and arguments.per_device_train_batch_size == 16  # 64 rows a step
    arguments = GlueTrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=7)
    apply_recipe(arguments, None)
    found = (arguments.learning_rate, arguments.weight_decay, arguments.num_train_epochs)
    assert found == (5e-5, 0.0, 3) and arguments.per_device_train_batch_size == 7
    assert set(RECIPES) == set(GLUE_TASKS)


# --- the server's files ----------------------------------------------------------------------------------------------


def test_predictions_as_the_server_takes_them(tmp_path):
    def lines(task, split, predictions):
        return write_submission(task, split, predictions, tmp_path).read_text().splitlines()

    assert lines("stsb", "test", [-0.2, 2.34567, 6.0]) == ["index\tprediction", "0\t0.000", "1\t2.346", "2\t5.000"]
    assert lines("sst2", "test", ["positive", "negative"])[1:] == ["0\t1", "1\t0"]
    assert lines("mrpc", "test", ["equivalent"])[1:] == ["0\t1"]
    assert lines("wnli", "test", ["not_entailment"])[1:] == ["0\t0"]
    assert lines("rte", "test", ["not_entailment"])[1:] == ["0\tnot_entailment"]
    assert lines("mnli", "test_mismatched", ["neutral"])[1:] == ["0\tneutral"]
    names = "CoLA SST-2 MRPC STS-B QQP MNLI-m MNLI-mm AX QNLI RTE WNLI".split()
    assert sorted(SUBMISSION_FILES.values()) == sorted(f"{name}.tsv" for name in names)
    assert write_submission("custom", "test", ["a"], tmp_path) is None
    assert write_submission("sst2", "eval", ["positive"], tmp_path) is None


# --- the table -------------------------------------------------------------------------------------------------------


def test_rows_and_averages_of_several_seeds(tmp_path):
    runs = []
    for task, metrics, all_scores in (
        ("mnli", ("eval_matched_accuracy", "eval_mismatched_accuracy"), [(0.5, 0.6), (0.7, 0.8), (0.9, 0.7)]),
        ("mrpc", ("eval_f1", "eval_accuracy", "merged_f1", "merged_accuracy"), [(0.8, 0.7, 0.4, 0.6)]),
        ("wnli", ("eval_accuracy",), [(0.1,)]),
        ("rte", ("eval_accuracy",), [()]),
    ):
        settings = {
            "model_name_or_path": "some/where/small",
            "data_dir": None,
            "train_file": None,
            "validation_file": None,
        }
        settings |= {"learning_rate": 1e-4, "weight_decay": 0.0, "num_train_epochs": 2.0, "train_batch_size": 64}
        settings |= {"init_from_mnli": None}
        for seed, scores in enumerate(all_scores):
            folder = tmp_path / task / str(seed)
            folder.mkdir(parents=True)
            (folder / "run_settings.json").write_text(json.dumps(settings))
            if scores:  # rte is not finished
                (folder / "all_results.json").write_text(json.dumps(dict(zip(metrics, scores))))
            runs.append(Run(GLUE_TASKS[task], seed, folder, (), settings))
    rows = table_rows(runs, "run_glue.py")
    found = {(row["data"], row["model"], row["metric"]): (row["mean"], row["deviation"]) for row in rows}
    assert found["GLUE mnli, matched", "small", "accuracy"] == (pytest.approx(0.7), pytest.approx(0.2))
    assert found["GLUE mnli, mismatched", "small", "accuracy"] == (pytest.approx(0.7), pytest.approx(0.1))
    assert found["GLUE mrpc", "small", "f1"] == (0.8, None)
    assert found["GLUE mrpc", "small, merged", "f1"] == (0.4, None) and len(found) == 7
    text = as_markdown(rows, "run_glue.py")
    assert "| GLUE mnli, matched | small | accuracy | 70.0 | 20.0 | 3 |" in text
    assert "Average of the first metrics of mnli, mrpc (small): 75.0." in text  # without WNLI


# --- runs ------------------------------------------------------------------------------------------------------------


def test_all_tasks_with_two_seeds_then_only_what_is_missing(command, place, caplog):
    shutil.rmtree(place / "rows/stsb")
    arguments = ["--init_from_mnli", "--seeds", 0, 1, "--learning_rate", "3e-3", "--merge_after", "uniform"]
    code, output, error = suite(command, place, *arguments)
    assert code == 0, error
    out = place / "out"
    assert "holds no folders cola, sst2, mrpc, stsb, qqp, qnli, wnli: these tasks are left out" in caplog.text
    measured = {
        (task, seed): json.loads((out / task / f"seed-{seed}/all_results.json").read_text())
        for task in ("mnli", "rte")
        for seed in (0, 1)
    }
    rows = rows_of(place)
    for data, task, key in (
        ("rows/mnli, matched", "mnli", "eval_matched_accuracy"),
        ("rows/mnli, mismatched", "mnli", "eval_mismatched_accuracy"),
        ("rows/rte", "rte", "eval_accuracy"),
    ):
        row, scores = rows[data, "model", key.rsplit("_", 1)[-1]], [measured[task, seed][key] for seed in (0, 1)]
        assert row["scores"] == scores and row["seeds"] == [0, 1] and row["mean"] == pytest.approx(sum(scores) / 2)
        assert row["deviation"] == pytest.approx(abs(scores[0] - scores[1]) / math.sqrt(2))
        assert (row["train_rows"], row["validation_rows"]) == (16, 12)
    merged = rows["rows/mnli, mismatched", "model, merged", "accuracy"]
    assert merged["scores"] == [measured["mnli", seed]["merged_mismatched_accuracy"] for seed in (0, 1)]

    settings = json.loads((out / "rte/seed-1/run_settings.json").read_text())
    assert settings["init_from_mnli"] == str(out / "mnli/seed-1") and settings["seed"] == 1
    assert settings["learning_rate"] == 3e-3 and settings["weight_decay"] == RECIPES["rte"].weight_decay
    assert json.loads((out / "mnli/seed-1/run_settings.json").read_text())["init_from_mnli"] is None

    assert "| rows/rte | model | accuracy |" in output and "Average of the first metrics of mnli, rte" in output
    assert (out / "results.md").read_text() in output and (out / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.glob("*/*/checkpoint-*"))
    assert sorted(path.stem for path in (out / "submission").iterdir()) == ["AX", "MNLI-m", "MNLI-mm", "RTE"]
    best = max((0, 1), key=lambda seed: measured["rte", seed]["eval_accuracy"])
    predicted = (out / f"rte/seed-{best}/predictions_test.jsonl").read_text().splitlines()
    expected = [f"{i}\t{json.loads(line)['prediction']}" for i, line in enumerate(predicted)]
    assert (out / "submission/RTE.tsv").read_text().splitlines()[1:] == expected

    # as if it had been stopped before the last run was complete
    (out / "rte/seed-1/all_results.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/*/all_results.json")}
    code, _, error = suite(command, place, *arguments)
    assert code == 0, error
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()) and rows_of(place) == rows
    # a run of other settings is not passed off as this one
    code, _, error = suite(command, place, *arguments, "--learning_rate", "1e-3")
    assert code == 2 and "learning_rate 0.003 instead of 0.001: choose another folder" in error


def test_a_failed_task_is_named_and_the_others_are_kept(command, place):
    good = (place / "rows/mnli/train.jsonl").read_text()
    (place / "rows/mnli/train.jsonl").write_text('{"premise": "a"}\n')
    arguments = ["--init_from_mnli", "--seeds", 5]
    code, _, error = suite(command, place, *arguments)
    assert code == 2 and "3 of 3 runs failed" in error and "mnli/train.jsonl, line 1: no column 'hypothesis'" in error
    assert "rte with seed 5: it starts from mnli with seed 5, which is not finished" in error
    code, _, error = suite(command, place, "--seeds", 5, "--output_dir", place / "out2")
    assert code == 2 and "1 of 3 runs failed (mnli with seed 5" in error
    assert {row["task"] for row in json.loads((place / "out2/results.json").read_text())} == {"rte", "stsb"}
    (place / "rows/mnli/train.jsonl").write_text(good)
    code, _, error = suite(command, place, "--seeds", 5, "--output_dir", place / "out2")
    assert code == 0, error
    rows = json.loads((place / "out2/results.json").read_text())
    assert {row["task"] for row in rows} == {"mnli", "rte", "stsb"}
    assert [row["metric"] for row in rows if row["task"] == "stsb"] == ["spearmanr", "pearson"]


def test_a_crash_in_one_run_does_not_end_the_suite(place):
    def crash_with_seed_1(model_arguments, data_arguments, training_arguments):
        if training_arguments.seed == 1:
            raise RuntimeError("out of luck\nand memory")
        return run(model_arguments, data_arguments, training_arguments)

    arguments = (
        ModelArguments(str(place / "model")),
        DataArguments(task_name="rte", data_dir=str(place / "rows"), seeds=[1, 2]),
        GlueTrainingArguments(str(place / "out"), use_cpu=True, num_train_epochs=1, disable_tqdm=True),
    )
    with pytest.raises(UserError, match=r"1 of 2 runs failed \(rte with seed 1: out of luck and memory\)"):
        run_suite(crash_with_seed_1, *arguments, "run_glue.py")
    assert rows_of(place)["rows/rte", "model", "accuracy"]["seeds"] == [2]


def test_one_task_from_a_checkpoint_of_mnli(command, place):
    tiny_model(ModernALBERTForMaskedLM, vocab_size=30522, std=0.1, seed=9).save_pretrained(place / "mnli")
    shutil.copy(place / "model/tokenizer.json", place / "mnli")
    shutil.copy(place / "model/tokenizer_config.json", place / "mnli")
    arguments = ["--task_name", "stsb", "--init_from_mnli", place / "mnli", "--learning_rate", 0]
    code, _, error = suite(command, place, *arguments)
    assert code == 0, error
    start, end = load_file(place / "mnli/model.safetensors"), load_file(place / "out/model.safetensors")
    name = "model.groups.0.attn.Wqkv.weight"
    assert (start[name] == end[name]).all()
    assert not (load_file(place / "model/model.safetensors")[name] == end[name]).all()


def test_seeds_of_rows_of_ones_own(command, place):
    rows = [{"text": text, "label": ("yes", "no")[i % 2]} for i, text in enumerate(TEXTS)]
    (place / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--train_file", place / "mine.jsonl", "--validation_file", place / "mine.jsonl"]
    words = options(place, *files, "--seeds", 3, 4, "--per_device_train_batch_size", 6)
    for flag in ("--data_dir", "--task_name"):
        del words[words.index(flag) : words.index(flag) + 2]
    code, _, error = command(glue_command, *words)
    assert code == 0, error
    row = rows_of(place)["mine", "model", "macro_f1"]
    assert row["seeds"] == [3, 4] and row["settings"]["train_batch_size"] == 6
    assert (place / "out/custom/seed-4/all_results.json").is_file() and not (place / "out/submission").exists()
    for flag, value, said in (
        ("--adam_epsilon", 1, "adam_epsilon 1e-08 instead of 1"),
        ("--test_file", "t", "test_file"),
    ):
        code, _, error = command(glue_command, *words, flag, value)
        assert code == 2 and f"was run with {said}" in error


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--seeds", 1, 1], "--seeds 1 1 is not allowed"),
        (["--seeds", -1], "--seeds -1 is not allowed"),
        (["--task_name", "sst3", "--seeds", 1], "--task_name sst3 is not allowed: it must be one of cola, sst2"),
        (["--data_dir", "{tmp}/model"], "holds no folder with a task's name"),
        (["--data_dir", "{tmp}/half"], "half, rte: --validation_file is missing"),
        (["--data_dir", "{tmp}/half", "--init_from_mnli"], "half, rte: --validation_file is missing"),
        (["--data_dir", "{tmp}/lone", "--init_from_mnli"], "--init_from_mnli needs the rows of mnli"),
        (["--train_file", "{tmp}/rows/rte/train.jsonl"], "--task_name all takes its rows from the Hub or"),
        (["--task_name", "mnli", "--init_from_mnli", "{tmp}/model"], "--init_from_mnli is for rte, mrpc, stsb"),
        (["--task_name", "rte", "--init_from_mnli"], "--init_from_mnli needs a checkpoint"),
        (["--task_name", "rte", "--train_file", "x.jsonl"], "--data_dir goes with --task_name, and without"),
        (["--task_name", "sst2"], "sst2: there is no train.jsonl, validation.jsonl or test.jsonl"),
        (["--model_name_or_path", "{tmp}/nothing"], "nothing cannot be loaded"),
    ],
)
def test_mistakes_are_said_before_anything_starts(command, place, arguments, said):
    write_rows(place / "half/rte/train.jsonl", "rte", 4)
    shutil.copytree(place / "rows/rte", place / "lone/rte")
    arguments = [str(argument).replace("{tmp}", str(place)) for argument in arguments]
    code, _, error = suite(command, place, *arguments)
    assert code == 2 and said in error, error
    assert not (place / "out").exists()


def test_two_processes_predict_what_one_does(command, place):
    shutil.rmtree(place / "rows/stsb")
    # Nothing is learned at this rate, so predictions tell whether rows keep their places.
    arguments = ["--seeds", 1, "--learning_rate", 0, "--per_device_eval_batch_size", 2, "--use_cpu", "true"]
    code, _, error = suite(command, place, *arguments, "--output_dir", place / "one")
    assert code == 0, error
    launch = ["--config_file", REPOSITORY / "configs/accelerate/cpu_2_processes.yaml", "--main_process_port", "0"]
    words = options(place, *arguments, "--output_dir", place / "two")
    run_accelerate(place / "logs", *launch, REPOSITORY / "run_glue.py", *words)
    for file in ("mnli/seed-1/predictions_validation_matched.jsonl", "rte/seed-1/predictions_test.jsonl"):
        one, two = (
            [json.loads(line) for line in (place / run / file).read_text().splitlines()] for run in ("one", "two")
        )
        assert len(one) == len(two)
        for a, b in zip(one, two):
            assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-4)
    one, two = (json.loads((place / run / "results.json").read_text()) for run in ("one", "two"))
    assert [row["scores"] for row in one] == [row["scores"] for row in two]
    assert {row["settings"]["train_batch_size"] for row in two} == {64}
