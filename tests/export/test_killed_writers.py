# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""kill -9 in the middle of writing leaves the earlier or the new output, whole."""

import os
import random
import signal
import time

import pytest
import torch
from small_models import tiny_model
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from modernalbert import ModernALBERTForMaskedLM
from modernalbert.export import export_to_hub_folder, to_modernbert
from modernalbert.export.hub_folder import load_model
from modernalbert.merge_experts import merge_experts


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


def write_export(model, folder):
    export_to_hub_folder(model, None, folder, pooling="mean")


def write_modernbert(model, folder):
    merged = merge_experts(model, weights="uniform").model
    export_to_hub_folder(to_modernbert(merged), None, folder)


def write_merge(model, folder):
    merge_experts(model, weights="uniform").save(folder)


@pytest.mark.parametrize("write", [write_export, write_modernbert, write_merge])
def test_a_killed_writer_leaves_a_whole_folder(tmp_path, write):
    models = [tiny_model(ModernALBERTForMaskedLM, seed=seed, skip_first_attn_norm=True) for seed in (0, 1)]
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
        process = os.fork()
        if process == 0:  # the writer
            try:
                write(models[1], folder)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, 1.2 * seconds))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found = snapshot(folder)
        assert found in (old, new), sorted(found)
        seen.append(found == new)
        if seen[-1]:
            write(models[0], folder)
            old = snapshot(folder)
    assert not all(seen)  # some were killed before they were done
    if write is write_export:
        assert torch.isfinite(load_model(str(folder)).model.final_norm.weight).all()
