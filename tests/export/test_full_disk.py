# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A disk that fills up while a command writes: one sentence, and the earlier output stays whole."""

import json
import shutil
import subprocess

import pytest
from small_models import run_command, tiny_model

from modernalbert import ModernALBERTForMaskedLM
from modernalbert.hub import command as export_command
from modernalbert.merge_experts import command as merge_command
from modernalbert.run_glue import command as glue_command


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many kilobytes, and returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int):
        unmount()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        return folder

    def unmount():
        subprocess.run(["umount", folder], capture_output=True)

    try:
        yield mount
    except FileNotFoundError:
        pytest.skip("there is no command mount")
    finally:
        unmount()


def snapshot(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def model_folder(tmp_path, nano_tokenizer):
    folder = tmp_path / "model"
    options = {"skip_first_attn_norm": True, "num_hidden_layers": 2, "mol_groups": "all", "embedding_size": 2}
    tiny_model(ModernALBERTForMaskedLM, vocab_size=30522, **options).save_pretrained(folder)
    nano_tokenizer.save_pretrained(folder)
    return folder


COMMANDS = {
    "hub": (export_command, ("--pooling", "mean"), (4, 300, 1100)),
    "modernbert": (export_command, ("--format", "modernbert", "--merge", "ema"), (4, 700, 4400)),
    "merge": (merge_command, ("--save", "both", "--weights", "uniform"), (4, 300, 1200)),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_sentence(small_disk, model_folder, monkeypatch, capsys, name):
    entry_point, options, sizes = COMMANDS[name]
    for kilobytes in sizes:
        disk = small_disk(kilobytes)
        places = ("--model_name_or_path", model_folder, "--output_dir", disk / "out")
        code, output, error = run_command(monkeypatch, capsys, entry_point, *places, *options)
        assert code == 2 and "space" in error.strip().splitlines()[-1], (kilobytes, output, error)
        assert list(disk.iterdir()) == [], kilobytes  # nothing is half-written


def test_the_earlier_export_stays_on_a_full_disk(small_disk, model_folder, monkeypatch, capsys):
    disk = small_disk(6000)
    places = ("--model_name_or_path", model_folder, "--output_dir", disk / "out")
    code, _, error = run_command(monkeypatch, capsys, export_command, *places)
    assert code == 0, error
    (disk / "other").write_bytes(b"x" * (shutil.disk_usage(disk).free - 600_000))
    before = snapshot(disk)
    code, _, error = run_command(monkeypatch, capsys, export_command, *places, "--pooling", "mean")
    assert code == 2 and "No space left on device" in error
    assert snapshot(disk) == before


def test_a_run_of_fine_tuning_says_it_too(small_disk, model_folder, tmp_path, monkeypatch, capsys):
    rows = "".join(json.dumps({"sentence": f"a film {i}", "label": i % 2}) + "\n" for i in range(8))
    (tmp_path / "rows.jsonl").write_text(rows)
    for kilobytes in (40, 1500):  # while the run begins, and at its checkpoint
        disk = small_disk(kilobytes)
        code, output, error = run_command(
            monkeypatch, capsys, glue_command, "--model_name_or_path", model_folder, "--output_dir", disk / "out",
            "--train_file", tmp_path / "rows.jsonl", "--validation_file", tmp_path / "rows.jsonl", "--use_cpu",
            "--max_steps", "1", "--save_steps", "1", "--report_to", "none",
        )  # fmt: skip
        assert code == 2 and "the disk is full" in error, (kilobytes, output[-500:], error[-2000:])
