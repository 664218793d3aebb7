# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""`hub.py --verify` tells this release's code from any other, and names what else could run."""

import json

import pytest
import torch
from peft import LoraConfig
from small_models import run_command, tiny_model

from modernalbert import ModernALBERTForMaskedLM, ModernALBERTModel
from modernalbert.cli.errors import UserError
from modernalbert.export import export_to_hub_folder, to_modernbert
from modernalbert.export.cards import file_hash
from modernalbert.export.onnx import export_onnx
from modernalbert.export.verify import CODE_FILES, verify_folder
from modernalbert.hub import command as export_command


@pytest.fixture
def folder(tmp_path):
    return export_to_hub_folder(tiny_model(ModernALBERTForMaskedLM), None, tmp_path / "out")


def test_an_export_is_this_releases_and_its_card_has_the_hashes(folder, monkeypatch, capsys):
    assert verify_folder(folder) == []
    assert {file.name for file in folder.glob("*.py")} == set(CODE_FILES)
    card = (folder / "README.md").read_text()
    assert all(f"| `{name}` | `{file_hash(folder / name)}` |" in card for name in CODE_FILES)
    code, output, _ = run_command(monkeypatch, capsys, export_command, "--verify", folder)
    assert code == 0 and "its code is this release's" in output
    (folder / "modeling_mol.py").write_text("import os\n")
    code, _, error = run_command(monkeypatch, capsys, export_command, "--verify", folder)
    assert code == 2 and "modeling_mol.py differs from this release's." in error


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_everything_that_could_run_is_named(folder):
    (folder / "mol_triton.py").unlink()
    (folder / "deep").mkdir()
    (folder / "deep/more.py").write_text("")
    (folder / "training_args.bin").write_bytes(b"")
    change_json(folder / "config.json", auto_map={"AutoModel": "someone/else--modeling.Model"})
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tok.Mine", None]}}))
    modules = [
        {"type": "mine.Module", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    assert verify_folder(folder) == [
        "deep/more.py is no file of this release.",
        "mol_triton.py is missing.",
        "config.json: auto_map names 'someone/else--modeling.Model' for AutoModel, which is no code of this release.",
        "modules.json: type 'mine.Module' is not sentence-transformers' own.",
        "tokenizer_config.json: auto_map={'AutoTokenizer': ['tok.Mine', None]} names code of its own.",
        "training_args.bin is no safetensors file: loading it could run code.",
    ]


def test_a_modernbert_folder_has_no_code(tmp_path):
    model = to_modernbert(tiny_model(ModernALBERTModel, ffn_modulation="none", skip_first_attn_norm=True))
    folder = export_to_hub_folder(model, None, tmp_path / "out")
    assert list(folder.glob("*.py")) == [] and verify_folder(folder) == []
    assert "trust_remote_code" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("content, said", [(None, "cannot be read"), ("{", "it is not JSON"), ("[]", "hold an object")])
def test_folders_of_another_kind(tmp_path, content, said):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=said):
        verify_folder(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        verify_folder(tmp_path / "none")


@pytest.mark.parametrize("form", ["hub folder", "modernbert", "onnx"])
@pytest.mark.parametrize("kind", ["adapter", "quantised"])
def test_a_model_that_would_lose_something_is_refused_in_every_form(form, kind, tmp_path):
    model = tiny_model(ModernALBERTForMaskedLM, ffn_modulation="none")
    if kind == "adapter":
        model.add_adapter(LoraConfig(r=2, target_modules=["Wqkv"]))
    else:
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match="merge or remove the adapter|it must be a ModernALBERT without an adapter"):
        if form == "hub folder":
            export_to_hub_folder(model, None, folder)
        elif form == "onnx":
            export_onnx(model, None, folder)
        else:
            to_modernbert(model)
    assert not folder.exists()
