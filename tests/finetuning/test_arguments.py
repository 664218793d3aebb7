# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Evaluation, saving and the choice of the best checkpoint: what is given wins, the rest follows."""

import itertools
import json

import pytest
import torch
from transformers.trainer_utils import SaveStrategy

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError
from modernalbert.finetuning.arguments import TaskTrainingArguments
from modernalbert.run_pretraining import PretrainingArguments


CHOICES = {
    "eval_strategy": (None, "no", "epoch", "steps"),
    "eval_steps": (None, 10),
    "save_strategy": (None, "no", "epoch", "steps", "best"),
    "save_steps": (None, 15, 20),
    "load_best_model_at_end": (None, True, False),
}


@pytest.mark.parametrize("arguments_class", [TaskTrainingArguments, PretrainingArguments])
def test_every_combination_keeps_what_was_given_or_names_the_conflict(arguments_class):
    accepted = refused = 0
    for values in itertools.product(*CHOICES.values()):
        given = {name: value for name, value in zip(CHOICES, values) if value is not None}
        try:
            arguments = arguments_class("out", use_cpu=True, **given)
        except UserError as error:
            message = str(error)
            assert message.endswith(".") and "\n" not in message, message
            # two of the given options are named, or one and the option that is needed
            assert sum(f"--{name}" in message or f"--no_{name}" in message for name in given) >= 1, (given, message)
            assert given.get("load_best_model_at_end") or given.get("eval_strategy") == "no"
            refused += 1
            continue
        accepted += 1
        for name, value in given.items():
            assert getattr(arguments, name) == value, (given, name)
        if arguments.load_best_model_at_end:
            assert arguments.save_strategy == SaveStrategy.BEST or (
                arguments.save_strategy.value == arguments.eval_strategy.value != "no"
            )
        if given.get("load_best_model_at_end") is None and arguments_class is PretrainingArguments:
            assert not arguments.load_best_model_at_end
    assert accepted > 200 and refused > 50


def test_steps_given_alone_imply_their_strategy():
    arguments = TaskTrainingArguments("out", use_cpu=True, save_steps=20)
    assert (arguments.eval_strategy.value, arguments.eval_steps) == ("steps", 20)
    assert (arguments.save_strategy.value, arguments.save_steps) == ("steps", 20)
    assert arguments.load_best_model_at_end
    arguments = PretrainingArguments("out", use_cpu=True, save_steps=20)
    assert (arguments.eval_steps, arguments.save_steps) == (1000, 20)
    with pytest.raises(UserError, match="--no_do_eval and --eval_strategy steps contradict each other"):
        TaskTrainingArguments("out", use_cpu=True, do_eval=False, eval_strategy="steps")
    assert TaskTrainingArguments("out", use_cpu=True, do_eval=False).eval_strategy == "no"
    with pytest.raises(UserError, match="--save_steps 0 is not allowed: it must be above 0"):
        TaskTrainingArguments("out", use_cpu=True, save_steps=0)


def test_the_default_of_the_best_checkpoint_yields_with_a_warning(caplog):
    assert not TaskTrainingArguments("out", use_cpu=True, eval_steps=20, save_steps=30).load_best_model_at_end
    assert (
        "ends with the last model, not with the best: --save_steps 30 is no multiple of --eval_steps 20" in caplog.text
    )


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(
    "given, load_best",
    [({}, True), ({"load_best_model_at_end": True}, True), ({"load_best_model_at_end": False}, False)],
)
def test_a_switch_is_known_to_be_given(monkeypatch, tmp_path, as_file, given, load_best):
    words = ["--output_dir", "out", "--use_cpu", "True"]
    if as_file:
        (tmp_path / "a.json").write_text(json.dumps({"output_dir": "out", "use_cpu": True} | given))
        words = [str(tmp_path / "a.json")]
    else:
        words += [f"--{'' if value else 'no_'}{name}" for name, value in given.items()]
    monkeypatch.setattr("sys.argv", ["x", *words])
    (arguments,) = parse_arguments(TaskTrainingArguments, description="")
    assert arguments.load_best_model_at_end is load_best
    words += ["--save_strategy", "no"]
    monkeypatch.setattr("sys.argv", ["x", *words])
    if given.get("load_best_model_at_end"):
        with pytest.raises(UserError, match="--load_best_model_at_end cannot be done: no checkpoints are saved"):
            parse_arguments(TaskTrainingArguments, description="")
    else:
        (arguments,) = parse_arguments(TaskTrainingArguments, description="")
        assert not arguments.load_best_model_at_end


@pytest.mark.parametrize("arguments_class", [TaskTrainingArguments, PretrainingArguments])
def test_bfloat16_needs_no_other_option_without_an_accelerator(arguments_class, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    arguments = arguments_class(output_dir=tmp_path, bf16=True)
    assert arguments.use_cpu and arguments.device.type == "cpu"
    assert not arguments_class(output_dir=tmp_path).use_cpu


def test_a_loss_that_diverged_is_shown():
    """transformers logs the mean of the other steps in its place."""
    arguments = TaskTrainingArguments("out", use_cpu=True)
    assert not arguments.logging_nan_inf_filter
