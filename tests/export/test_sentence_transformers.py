# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exports, merges and sentence-transformers: modules, pooling and prompts stay with the model."""

import json

import numpy as np
import pytest
import torch
from small_models import run_command, tiny_model
from transformers import AutoModelForMaskedLM, pipeline

from modernalbert import ModernALBERTForMaskedLM, ModernALBERTModel
from modernalbert.cli.errors import UserError
from modernalbert.export.hub_folder import export_to_hub_folder
from modernalbert.export.sentence_transformers import copy_modules, write_pooling_modules
from modernalbert.hub import command as export_command


pytest.importorskip("sentence_transformers")
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling


TEXTS = ["A good film.", "The actors are great, but the film is too long.", "Rain."]
PROMPTS = {"query": "search: ", "document": "text: "}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory, nano_tokenizer):
    """A sentence-transformers folder whose settings are none of the defaults: CLS pooling, a Dense layer, prompts."""
    folder = tmp_path_factory.mktemp("embedder")
    torch.manual_seed(0)
    model = tiny_model(ModernALBERTModel, vocab_size=30522, skip_first_attn_norm=True, std=0.1)
    export_to_hub_folder(model, nano_tokenizer, folder / "model")
    transformer = Transformer(str(folder / "model"), max_seq_length=64)
    modules = [transformer, Pooling(32, "cls"), Dense(32, 8), Normalize()]
    SentenceTransformer(
        modules=modules, device="cpu", prompts=PROMPTS, default_prompt_name="query", similarity_fn_name="dot"
    ).save(str(folder / "st"))
    return folder / "st"


@pytest.mark.parametrize("options", [(), ("--format", "modernbert", "--merge", "ema")])
def test_exports_keep_modules_and_prompts(tmp_path, embedder, monkeypatch, capsys, options):
    places = ("--model_name_or_path", embedder, "--output_dir", tmp_path / "out")
    code, _, error = run_command(monkeypatch, capsys, export_command, *places, *options)
    assert code == 0, error
    before, after = (SentenceTransformer(str(folder), device="cpu") for folder in (embedder, tmp_path / "out"))
    assert [type(module) for module in after] == [Transformer, Pooling, Dense, Normalize]
    assert after.prompts == PROMPTS and after.default_prompt_name == "query" and after.similarity_fn_name == "dot"
    assert after.max_seq_length == 64 and after[1].pooling_mode == before[1].pooling_mode
    expected, actual = before.encode(TEXTS), after.encode(TEXTS)
    assert actual.shape == (3, 8)
    if options:  # merged: other numbers, of the same direction
        assert (expected * actual).sum(axis=1).min() > 0.5
    else:
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    if options:
        assert type(after[0].auto_model).__name__ == "ModernBertModel"
    assert "SentenceTransformer(" in (tmp_path / "out/README.md").read_text()


def test_a_model_becomes_an_embedding_folder_and_still_fills_masks(tmp_path, nano_tokenizer):
    model = tiny_model(ModernALBERTForMaskedLM, vocab_size=30522)
    folder = export_to_hub_folder(model, nano_tokenizer, tmp_path / "out", pooling="mean")
    embedder = SentenceTransformer(str(folder), device="cpu")
    assert [type(module) for module in embedder] == [Transformer, Pooling] and embedder.similarity_fn_name == "cosine"
    batch = nano_tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    weights = batch["attention_mask"].unsqueeze(-1)
    expected = (states * weights).sum(1) / weights.sum(1)
    np.testing.assert_allclose(embedder.encode(TEXTS), expected, atol=1e-5)
    filled = pipeline("fill-mask", model=str(folder))("The film was [MASK].")
    assert len(filled) == 5
    export_to_hub_folder(AutoModelForMaskedLM.from_pretrained(folder), nano_tokenizer, folder, source=folder)
    assert (folder / "1_Pooling/config.json").is_file()  # exported over itself


def test_an_encoder_without_its_head_embeds_alike(tmp_path, nano_tokenizer, monkeypatch, capsys):
    model = tiny_model(ModernALBERTForMaskedLM, vocab_size=30522)
    whole = export_to_hub_folder(model, nano_tokenizer, tmp_path / "whole", pooling="mean")
    places = ("--model_name_or_path", whole, "--output_dir", tmp_path / "out")
    code, _, error = run_command(monkeypatch, capsys, export_command, *places, "--encoder_only")
    assert code == 0, error
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["ModernALBERTModel"]
    expected, actual = (
        SentenceTransformer(str(folder), device="cpu").encode(TEXTS) for folder in (whole, tmp_path / "out")
    )
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert "AutoModel.from_pretrained" in (tmp_path / "out/README.md").read_text()


def test_cross_encoder_and_sparse_encoder_start_from_an_export(tmp_path, nano_tokenizer):
    model = tiny_model(ModernALBERTForMaskedLM, vocab_size=30522)
    folder = str(export_to_hub_folder(model, nano_tokenizer, tmp_path / "out", pooling="mean"))
    scores = CrossEncoder(folder, num_labels=1, device="cpu").predict([("a film", "a movie"), ("a film", "rain")])
    assert scores.shape == (2,) and np.isfinite(scores).all()
    splade = SparseEncoder(
        modules=[Transformer(folder, transformer_task="fill-mask"), SpladePooling("max")], device="cpu"
    )
    sparse = splade.encode(TEXTS)
    assert sparse.shape == (3, 30522) and (sparse.to_dense() > 0).any()


def test_encode_multi_process_gives_the_same_embeddings(tmp_path, nano_tokenizer):
    model = tiny_model(ModernALBERTForMaskedLM, vocab_size=30522)
    folder = export_to_hub_folder(model, nano_tokenizer, tmp_path / "out", pooling="mean")
    embedder = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    pool = embedder.start_multi_process_pool(["cpu"])
    try:
        several = embedder.encode(TEXTS, pool=pool, chunk_size=2)
    finally:
        embedder.stop_multi_process_pool(pool)
    np.testing.assert_allclose(several, embedder.encode(TEXTS), atol=1e-5)


def test_a_folder_of_another_kind_has_nothing_to_copy(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "out").mkdir()
    assert copy_modules(tmp_path / "plain", tmp_path / "out") is False
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ValueError, match="pooling='sum' is not allowed: it must be one of 'mean', 'cls', 'max'"):
        write_pooling_modules(tmp_path / "out", 8, "sum")


def module(path: str, type_name: str = "sentence_transformers.models.Pooling") -> dict:
    return {"idx": 1, "name": "1", "path": path, "type": type_name}


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "is no list of sentence-transformers modules"),
        ("[1]", "is no list of sentence-transformers modules"),
        (json.dumps([{"path": "1_Pooling"}]), "is no list of sentence-transformers modules"),
        (json.dumps([module(1)]), "its types and paths must be text"),
        (json.dumps([module("../1_Pooling")]), "a module lies inside the folder"),
        (json.dumps([module("/etc")]), "a module lies inside the folder"),
        (json.dumps([module("onnx")]), "it must be like '1_Pooling'"),
        (json.dumps([module("1_Mine", "mine.Module")]), "'mine.Module' is not sentence-transformers' own"),
    ],
)
def test_broken_lists_of_modules_are_refused(tmp_path, content, said):
    for name in ("source", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "source/modules.json").write_text(content)
    with pytest.raises(UserError, match=said):
        copy_modules(tmp_path / "source", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_pickles_are_not_copied(tmp_path):
    for name in ("source/1_Dense", "out"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "source/modules.json").write_text(json.dumps([module("1_Dense")]))
    (tmp_path / "source/1_Dense/pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="its tensors are a pickle"):
        copy_modules(tmp_path / "source", tmp_path / "out")
    (tmp_path / "source/1_Dense/model.safetensors").write_bytes(b"")
    assert copy_modules(tmp_path / "source", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out/1_Dense").iterdir()] == ["model.safetensors"]
