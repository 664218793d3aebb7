# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""kill -9 in the middle of writing leaves the earlier or the new output, whole."""

import functools
import json
import os
import random
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from small_models import tiny_model
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from modernalbert import ModernALBERTForMaskedLM
from modernalbert.export import export_onnx, export_to_hub_folder, to_modernbert
from modernalbert.export.hub_folder import load_model
from modernalbert.merge_experts import merge_experts
from modernalbert.run_glue import command as fine_tuning_command


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


def run_and_kill(call, seconds: float) -> bool:
    """Call in a process of its own, which is killed after so long; whether it was still at work."""
    process = os.fork()
    if process == 0:
        try:
            call()
        finally:
            os._exit(0)
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
    start = time.perf_counter()
    write(models[1], folder)
    seconds = time.perf_counter() - start
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
    start = time.perf_counter()
    fine_tune(tmp_path / "model", rows, tmp_path / "whole")
    seconds = time.perf_counter() - start
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
