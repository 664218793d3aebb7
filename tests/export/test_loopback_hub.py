# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Push and pull over the wire, with the real client: large files in parts, and what goes wrong."""

import json
import os
import subprocess
import sys

import pytest
import torch
from loopback_hub import PART_BYTES, running_hub, use_hub
from safetensors.torch import load_file
from small_models import tiny_model

from modernalbert import ModernALBERTForMaskedLM
from modernalbert.export.hub_folder import push_folders


STRANGER = """
import sys
sys.modules["modernalbert"] = None  # an import of it fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained("me/mine", trust_remote_code=True).eval()
assert len(AutoTokenizer.from_pretrained("me/mine", trust_remote_code=True)("A film.")["input_ids"]) == 5
with torch.no_grad():
    save_file({"logits": model(torch.arange(3, 39).view(2, 18)).logits.contiguous()}, sys.argv[1])
"""


@pytest.fixture
def model(tmp_path, nano_tokenizer):
    model = tiny_model(ModernALBERTForMaskedLM, vocab_size=30522)
    model.save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    return model


def run_process(arguments, hub, place, **options) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= hub.environment(str(place / "hf"), **options)
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=place)


def export(hub, place, *options, **environment):
    return run_process(["-m", "modernalbert.hub", "--output_dir", "out", *options], hub, place, **environment)


def test_a_folder_is_pushed_and_pulled_over_the_wire(tmp_path, model):
    with running_hub() as hub:
        push = ("--model_name_or_path", "model", "--push_to_hub", "--hub_model_id", "me/mine", "--pooling", "mean")
        done = export(hub, tmp_path, *push)
        assert done.returncode == 0, done.stderr
        assert "Uploaded to me/mine" in done.stdout
        written = {
            file.relative_to(tmp_path / "out").as_posix(): file.read_bytes()
            for file in (tmp_path / "out").rglob("*")
            if file.is_file()
        }
        assert hub.files == written and "1_Pooling/config.json" in written
        assert b'from_pretrained("me/mine"' in hub.files["README.md"]
        (large,) = hub.objects.values()
        assert large == written["model.safetensors"] and len(large) > 3 * PART_BYTES  # sent in parts
        done = run_process(["-c", STRANGER, "logits.safetensors"], hub, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        ids = torch.arange(3, 39).view(2, 18)
        torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], model(ids).logits)
        # Exported from the Hub, modules too.
        done = export(hub, tmp_path, "--model_name_or_path", "me/mine", "--revision", "main")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out/1_Pooling/config.json").is_file()


@pytest.fixture
def hub_in_this_process(monkeypatch, tmp_path):
    """A loopback Hub, for this process."""
    with running_hub() as hub:
        use_hub(hub, str(tmp_path / "cache"), monkeypatch)
        yield hub


def test_an_upload_replaces_an_earlier_one(hub_in_this_process, tmp_path):
    hub = hub_in_this_process
    folder, adapter = tmp_path / "out", tmp_path / "adapter"
    for name in ("onnx/model.onnx", "1_Pooling/config.json", "modeling_old.py", "config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    push_folders({"": folder}, "me/mine")
    hub.files |= {"notes/plan.md": b"mine", "plot.png": b"mine", "adapter/adapter_model.safetensors": b"old"}
    for name in ("onnx/model.onnx", "1_Pooling/config.json", "modeling_old.py"):
        (folder / name).unlink()
    (folder / "config.json").write_text("new")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("new")
    push_folders({"": folder, "adapter": adapter}, "me/mine")
    assert hub.files == {  # graphs and tensors of another model would be loaded without a word
        "config.json": b"new", "adapter/adapter_config.json": b"new", "notes/plan.md": b"mine", "plot.png": b"mine"
    }  # fmt: skip
    assert sum("/commit/" in path for _, path in hub.requests) == 2  # each in one step


def test_the_card_that_transformers_uploads_says_how_the_model_is_loaded(hub_in_this_process, tmp_path, monkeypatch):
    hub = hub_in_this_process
    model = tiny_model(ModernALBERTForMaskedLM)
    for upload in (
        lambda: model.push_to_hub("me/mine"),
        lambda: model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/mine"),
    ):  # said once
        upload()
        card = hub.files["README.md"].decode()
        loading = 'AutoModelForMaskedLM.from_pretrained("me/mine", trust_remote_code=True)'
        assert card.startswith("---\n") and card.count(loading) == 1
        assert 'dtype="bfloat16"' in card and "`folded/` loads in the same way" in card
    use_hub(hub, str(tmp_path / "other"), monkeypatch)  # its commits have one name, which a cache knows
    hub.files["README.md"] = b"Mine. It needs trust_remote_code."
    model.push_to_hub("me/mine")
    card = hub.files["README.md"].decode()
    assert card.endswith("Mine. It needs trust_remote_code.") and "## Loading" not in card


MISTAKES = """
import json, sys
from modernalbert.hub import command

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["hub.py", "--output_dir", "out", *arguments]
    try:
        command()
    except SystemExit as stopped:
        print("exit code", stopped.code, file=sys.stderr)
"""


def test_what_goes_wrong_on_the_wire_is_one_sentence(tmp_path, model):
    mistakes = {
        "me/none: cannot be loaded": ("--model_name_or_path", "me/none"),
        "me/mine: cannot be loaded": ("--model_name_or_path", "me/mine", "--revision", "v9"),
        "no good/name/at all: cannot be loaded": ("--model_name_or_path", "no good/name/at all"),
        "out is written, but not uploaded to me/mine": (  # without a token
            "--model_name_or_path",
            "model",
            "--push_to_hub",
            "--hub_model_id",
            "me/mine",
        ),
    }
    with running_hub() as hub:
        hub.exists, hub.files = True, {"config.json": (tmp_path / "model/config.json").read_bytes()}
        done = run_process(["-c", MISTAKES, json.dumps(list(mistakes.values()))], hub, tmp_path, token=None)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("hub.py: error: ")]
    assert len(said) == len(mistakes) and done.stderr.count("exit code 2") == len(mistakes), done.stderr
    for line, message in zip(said, mistakes):
        assert message in line
    assert "v9" in said[1]
    assert (tmp_path / "out/model.safetensors").is_file()  # written, as it says
