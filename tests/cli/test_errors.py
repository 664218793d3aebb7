# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Messages of libraries, shown in whole sentences; output folders and their modes."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel, TrainingArguments

from modernalbert import ModernALBERTConfig
from modernalbert.cli.bfloat16 import bfloat16_slowdown, describe_slowdown
from modernalbert.cli.errors import MESSAGE_LENGTH, UserError, error_message, explain_loading
from modernalbert.cli.output_folders import atomic_folder, check_replaceable, check_writable
from modernalbert.finetuning.run_folder import check_output_dir


def library_errors(folder):
    """Messages that transformers, torch and safetensors raise for a user's mistake, on several lines each."""
    BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(folder / "bert")
    ModernALBERTConfig().save_pretrained(folder / "albert")
    (folder / "cut").mkdir()
    (folder / "cut/config.json").write_bytes((folder / "bert/config.json").read_bytes())
    weights = (folder / "bert/model.safetensors").read_bytes()
    (folder / "cut/model.safetensors").write_bytes(weights[: len(weights) // 2])
    strategies = {"eval_strategy": "steps", "save_strategy": "epoch", "load_best_model_at_end": True}
    return (
        lambda: AutoConfig.from_pretrained(folder / "nothing"),
        lambda: AutoConfig.from_pretrained("no/such-model"),
        lambda: AutoTokenizer.from_pretrained(folder / "albert"),
        lambda: AutoModel.from_pretrained(folder / "cut"),
        lambda: TrainingArguments("out", use_cpu=True, **strategies),
        lambda: BertModel(BertConfig()).load_state_dict({"a": torch.ones(1)}),
    )


def test_messages_of_libraries_are_on_one_line_and_end_with_a_sentence(tmp_path):
    for raise_it in library_errors(tmp_path):
        with pytest.raises(Exception) as caught:
            raise_it()
        whole, shown = " ".join(str(caught.value).split()), error_message(caught.value)
        assert "\n" not in shown and whole.startswith(shown), shown
        # Either all of it, or up to the end of a sentence.
        assert shown == whole or len(shown) > MESSAGE_LENGTH / 2 or shown.endswith((".", ":", "'")), shown
    message = error_message(ValueError('it must match, except when "best", but found\n- Evaluation: steps\n- Save: no'))
    assert message == 'it must match, except when "best", but found - Evaluation: steps - Save: no'
    long = ValueError("One. " + "Word " * MESSAGE_LENGTH + "end. Three.")
    assert error_message(long) == "One."
    assert error_message(ValueError("word " * MESSAGE_LENGTH + "end. Two.")).endswith(" end.")
    assert error_message(EOFError()) == "EOFError"


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(UserError, match="--model_name_or_path .*cut cannot be loaded: "):
        library_errors(tmp_path)
        with explain_loading(f"--model_name_or_path {tmp_path / 'cut'}"):
            AutoModel.from_pretrained(tmp_path / "cut")
    with pytest.raises(UserError, match="^said already$"), explain_loading("it"):
        raise UserError("said already")
    with pytest.raises(ZeroDivisionError), explain_loading("it"):
        raise ZeroDivisionError  # a defect of ours keeps its traceback


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_output_files_have_the_modes_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "out", replaceable=()) as folder:
            (folder / "sub").mkdir(mode=0o700)
            save_file({"a": torch.ones(1)}, folder / "sub/model.safetensors")
            (folder / "script").write_text("#!/bin/sh\n")
            (folder / "script").chmod(0o700)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")}
    modes["out"] = stat.S_IMODE((tmp_path / "out").stat().st_mode)
    of_folder, of_file = 0o777 & ~umask, 0o666 & ~umask
    assert modes == {"out": of_folder, "sub": of_folder, "script": of_folder, "model.safetensors": of_file}


def test_slow_bfloat16_is_said_with_its_factor():
    cpu = torch.device("cpu")
    assert 0 < bfloat16_slowdown(cpu) < 1000
    assert describe_slowdown(0.5, cpu) == ""
    assert "they take 3.4 times as long as in float32" in describe_slowdown(3.42, cpu)


def test_a_place_that_cannot_be_written_is_named_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    for place, parent in ((tmp_path / "file/out", tmp_path / "file"), (Path("/proc/out/deep"), Path("/proc"))):
        for check in (check_writable, lambda p: check_replaceable(p, ()), lambda p: check_output_dir(p, False, None)):
            with pytest.raises(UserError, match=f"^{place} cannot be written: {parent}: "):
                check(place)
    check_writable(tmp_path / "new/deep")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
