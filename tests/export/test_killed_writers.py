# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""kill -9 in the middle of writing leaves the earlier or the new output, whole."""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
from loopback_hub import running_hub, use_hub
from safetensors.torch import load_file
from small_models import randomise, tiny_model, tiny_modernbert
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from modernalbert import ModernALBERTForMaskedLM
from modernalbert.export import export_onnx, export_to_hub_folder, to_modernbert
from modernalbert.export.hub_folder import load_model, push_folders
from modernalbert.hub import command as export_command
from modernalbert.merge_experts import command as merge_command
from modernalbert.merge_experts import merge_experts
from modernalbert.run_glue import command as fine_tuning_command
from modernalbert.run_pretraining import command as pretraining_command
from modernalbert.upcycle import command as upcycle_command


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
KILLS = 20


@pytest.fixture(autouse=True)
def without_progress_bars():
    """Their lock is one for all processes: a killed child would keep it."""
    disable_progress_bar()
    yield
    enable_progress_bar()


def snapshot(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def start(call) -> int:
    """Call in a process of its own; returns its number."""
    process = os.fork()
    if process == 0:
        try:
            call()
        finally:
            os._exit(0)
    return process


def run_and_kill(call, seconds: float) -> bool:
    """Call in a process of its own, which is killed after so long; whether it was still at work."""
    process = start(call)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def write_export(model, folder):
    export_to_hub_folder(model, None, folder, pooling="mean")


def write_modernbert(model, folder):
    merged = merge_experts(model, weights="uniform").model
    export_to_hub_folder(to_modernbert(merged), None, folder)


def write_merge(model, folder):
    merge_experts(model, weights="uniform").save(folder)


def write_onnx(model, folder):
    export_onnx(model, None, folder, quantize="int8")


@pytest.mark.parametrize(
    "write", [write_export, write_modernbert, write_merge, pytest.param(write_onnx, marks=pytest.mark.slow)]
)
def test_a_killed_writer_leaves_a_whole_folder(tmp_path, write):
    options = {"skip_first_attn_norm": True} | ({"num_hidden_layers": 2} if write is write_onnx else {})
    models = [tiny_model(ModernALBERTForMaskedLM, seed=seed, **options) for seed in (0, 1)]
    folder = tmp_path / "out"
    write(models[0], folder)
    began = time.perf_counter()
    write(models[1], folder)
    seconds = time.perf_counter() - began
    new = snapshot(folder)
    write(models[0], folder)
    old = snapshot(folder)
    assert old.keys() == new.keys() and old != new
    draw, seen = random.Random(0), []
    for _ in range(KILLS):
        run_and_kill(lambda: write(models[1], folder), draw.uniform(0, 1.2 * seconds))
        found = snapshot(folder)
        assert found in (old, new), sorted(found)
        seen.append(found == new)
        if seen[-1]:
            write(models[0], folder)
            old = snapshot(folder)
    assert not all(seen)  # some were killed before they were done
    if write is write_export:
        assert torch.isfinite(load_model(str(folder)).model.final_norm.weight).all()


# --- the command lines -----------------------------------------------------------------------------------------------


def run_quietly(entry_point, *arguments) -> None:
    """Run a command in this process; what it prints goes nowhere."""
    sys.argv = [f"{entry_point.__module__.rsplit('.', 1)[-1]}.py", *map(str, arguments)]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        entry_point()


def export_with(*options):
    """A writer: `hub.py` with these options on a model folder."""
    return lambda source, out: run_quietly(
        export_command, "--model_name_or_path", source, "--output_dir", out, *options
    )


def merge(source, out):
    run_quietly(merge_command, "--model_name_or_path", source, "--output_dir", out, "--save", "both")


def upcycle(source, out):
    run_quietly(upcycle_command, "--teacher_name_or_path", source / "teacher", "--config", source, "--output_dir", out)


def prepare_corpus(source, out):
    run_quietly(
        pretraining_command, "--model_name_or_path", source, "--train_sources", source / "text.txt", "--corpus_dir",
        out, "--prepare_only", "--output_dir", source / "run", "--max_seq_length", 32, "--row_length", 64, "--use_cpu",
    )  # fmt: skip


COMMANDS = {
    "hub": export_with("--pooling", "mean"),
    "modernbert": export_with("--format", "modernbert", "--merge", "ema"),
    "onnx": export_with("--format", "onnx", "--quantize", "int8", "--merge", "ema", "--encoder_only"),
    "merge": merge,
    "upcycle": upcycle,
    "corpus": prepare_corpus,
}
SPECIAL = {"pad_token_id": 0, "cls_token_id": 101, "bos_token_id": 101, "sep_token_id": 102, "eos_token_id": 102}


@pytest.fixture
def sources(tmp_path, nano_tokenizer):
    """Two folders of what a command reads: a model, a teacher of the same shape, a text. Only their contents differ."""
    folders = [tmp_path / "first", tmp_path / "second"]
    shape = {"vocab_size": 30522, "num_hidden_layers": 2, "skip_first_attn_norm": True, "intermediate_size": 48}
    for seed, folder in enumerate(folders):
        tiny_model(ModernALBERTForMaskedLM, seed=seed, mol_groups="all", **SPECIAL, **shape).save_pretrained(folder)
        teacher = tiny_modernbert(vocab_size=30522, num_hidden_layers=2, **SPECIAL)
        randomise(teacher, seed).save_pretrained(folder / "teacher")
        for place in (folder, folder / "teacher"):
            nano_tokenizer.save_pretrained(place)
        (folder / "text.txt").write_text("".join(f"The house number {i} of {seed} is old.\n" for i in range(2000)))
    return folders


def run_and_kill_while_writing(call, folder, num_files: int) -> bool:
    """The same, killed once that many files lie in the temporary folder beside `folder`."""
    process = start(call)
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        temporaries = list(folder.parent.glob(f".{folder.name}.*"))
        if any(sum(len(files) for _, _, files in os.walk(place)) >= num_files for place in temporaries):
            os.kill(process, signal.SIGKILL)
            return os.WIFSIGNALED(os.waitpid(process, 0)[1])
        time.sleep(0.0005)
    return False


def comparable(found: dict[str, bytes]) -> dict[str, bytes]:
    """Without the bytes of what says how long a command took, and from where it read."""
    named = ("README.md", "merge_report.json", "merge_report.md")
    return {name: b"" if name.endswith(named) else data for name, data in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_leaves_a_whole_folder(tmp_path, sources, monkeypatch, name):
    monkeypatch.setattr("sys.argv", sys.argv)
    write, out = COMMANDS[name], tmp_path / "out"

    def write_earlier():
        if name == "corpus":  # which is never replaced
            shutil.rmtree(out, ignore_errors=True)
        else:
            write(sources[0], out)

    write(sources[1], out)
    new = comparable(snapshot(out))
    write_earlier()
    old = comparable(snapshot(out))
    assert old != new and (old.keys() == new.keys() or name == "corpus")
    killed, seen = 0, []
    for kill in range(KILLS):  # from the first file to the last
        num_files = round(kill * len(new) / (KILLS - 1))
        killed += run_and_kill_while_writing(lambda: write(sources[1], out), out, num_files)
        found = comparable(snapshot(out))
        assert found in (old, new), sorted(name for name in found if found[name] not in (old.get(name), new.get(name)))
        seen.append("new" if found == new else "old")
        if found == new:
            write_earlier()
        for left in tmp_path.glob(".out.*"):
            shutil.rmtree(left)
    print(f"{name}: {killed} of {KILLS} killed at work, {seen.count('old')} left the earlier output")
    assert killed and "old" in seen


@pytest.mark.slow
def test_a_killed_upload_leaves_a_whole_repository(tmp_path, sources, monkeypatch):
    folders = []
    for i, source in enumerate(sources):
        folders.append(tmp_path / f"out{i}")
        COMMANDS["hub"](source, folders[-1])
    monkeypatch.setattr("sys.argv", sys.argv)
    with running_hub() as hub:
        use_hub(hub, str(tmp_path / "cache"), monkeypatch)
        hub.handle_error = lambda *_: None  # clients are cut off
        seconds = []
        for folder in folders:
            began = time.perf_counter()
            push_folders({"": folder}, "me/mine")
            seconds.append(time.perf_counter() - began)
        push_folders({"": folders[0]}, "me/mine")
        old, new = map(snapshot, folders)
        assert hub.files == old != new
        draw, killed, seen = random.Random(0), 0, []
        for _ in range(KILLS):
            upload = functools.partial(push_folders, {"": folders[1]}, "me/mine")
            killed += run_and_kill(upload, draw.uniform(0, 1.2 * max(seconds)))
            found = dict(hub.files)
            assert found in (old, new)
            seen.append("new" if found == new else "old")
            hub.files = dict(old)
    print(f"upload: {killed} of {KILLS} killed at work, {seen.count('old')} left the earlier repository")
    assert killed and "old" in seen


# --- runs ------------------------------------------------------------------------------------------------------------


def fine_tune(model_folder, rows, folder):
    """Run `run_glue.py` in this process: eight steps, a checkpoint after each."""
    sys.argv = [
        *f"run_glue.py --model_name_or_path {model_folder} --train_file {rows} --validation_file {rows}".split(),
        *f"--output_dir {folder} --max_steps 8 --save_steps 1 --per_device_train_batch_size 2".split(),
        *"--use_cpu --report_to none --merge_after ema --disable_tqdm true --load_best_model_at_end false".split(),
    ]
    fine_tuning_command()


@pytest.mark.parametrize("kills", [3, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path, nano_tokenizer, monkeypatch, kills):
    monkeypatch.setattr("sys.argv", sys.argv)
    tiny_model(ModernALBERTForMaskedLM, vocab_size=30522, num_hidden_layers=2).save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"sentence": f"film {i}", "label": i % 2}) + "\n" for i in range(16)))
    began = time.perf_counter()
    fine_tune(tmp_path / "model", rows, tmp_path / "whole")
    seconds = time.perf_counter() - began
    draw, killed, longest = random.Random(0), 0, seconds * min(0.5, 4 / kills)
    for _ in range(kills):
        write = functools.partial(fine_tune, tmp_path / "model", rows, tmp_path / "out")
        killed += run_and_kill(write, draw.uniform(0, longest))
    assert killed
    if not (tmp_path / "out/all_results.json").is_file():
        fine_tune(tmp_path / "model", rows, tmp_path / "out")
    for name in ("model.safetensors", "merged/folded/model.safetensors"):
        expected, actual = (load_file(tmp_path / run / name) for run in ("whole", "out"))
        assert expected.keys() == actual.keys()
        for tensor, value in expected.items():
            torch.testing.assert_close(actual[tensor], value, msg=tensor)
