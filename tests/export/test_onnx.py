# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""ONNX folders: checked when they are written, of any batch size and length, int8 with its agreement."""

import json

import numpy as np
import pytest
import torch
from small_models import run_command, tiny_model
from transformers import AutoConfig

from modernalbert import (
    ModernALBERTForMaskedLM,
    ModernALBERTForMultipleChoice,
    ModernALBERTForSequenceClassification,
    ModernALBERTModel,
)
from modernalbert.export import export_onnx, to_modernbert
from modernalbert.export import onnx as onnx_module
from modernalbert.hub import command as export_command


onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# One group used twice, once per layer type: export time grows with depth.
SHALLOW = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"], "vocab_size": 30522}


def assert_same_outputs(folder, model, shapes, file="onnx/model.onnx"):
    session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
    for shape in shapes:
        ids = torch.randint(3, 1000, shape)
        mask = torch.ones_like(ids)
        mask[..., 0, shape[-1] - shape[-1] // 3 :] = 0
        outputs = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(ids, mask)
        for output, name in zip(outputs, onnx_module.output_names(model)):
            value = expected[name].numpy()
            if value.shape[: mask.dim()] == tuple(mask.shape):
                output, value = output[mask.bool().numpy()], value[mask.bool().numpy()]
            np.testing.assert_allclose(output, value, atol=1e-4, rtol=1e-4)


def test_a_routed_classifier_in_float32_and_int8(tmp_path, nano_tokenizer):
    model = tiny_model(ModernALBERTForSequenceClassification, num_labels=3, **SHALLOW)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = export_onnx(model, nano_tokenizer, tmp_path / "out", quantize="int8")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_same_outputs(tmp_path / "out", model, [(1, 1), (3, 17)])
    files = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    onnx_files = {"onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/report.json"}
    assert onnx_files | {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    assert report.texts == 8 and report.largest_difference < 1e-4
    assert report.quantized_measure == "share of equal predictions" and report.quantized_agreement > 0.7
    assert report.quantized_megabytes < 0.4 * report.megabytes  # the embedding is int8, too
    assert json.loads((tmp_path / "out/onnx/report.json").read_text())["texts"] == 8
    assert "int8 weights" in (tmp_path / "out/README.md").read_text()


def test_a_modernbert_folder_by_the_command(tmp_path, nano_tokenizer, monkeypatch, capsys):
    changes = {"skip_first_attn_norm": True, "ffn_modulation": "none", "group_depth": 1}
    model = tiny_model(ModernALBERTForMaskedLM, **SHALLOW, **changes)
    to_modernbert(model).save_pretrained(tmp_path / "mb")
    nano_tokenizer.save_pretrained(tmp_path / "mb")
    (tmp_path / "texts.txt").write_text("A film.\n\nA good and very long film.\nRain.\n")
    places = ("--model_name_or_path", tmp_path / "mb", "--output_dir", tmp_path / "out")
    options = ("--format", "onnx", "--calibration_file", tmp_path / "texts.txt", "--pooling", "mean")
    code, output, error = run_command(monkeypatch, capsys, export_command, *places, *options)
    assert code == 0, error
    assert "on 3 texts" in output
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "modernbert"
    assert_same_outputs(tmp_path / "out", model, [(2, 9)])
    assert (tmp_path / "out/modules.json").is_file()


def test_multiple_choice_has_a_choices_axis(tmp_path):
    model = tiny_model(ModernALBERTForMultipleChoice, ffn_modulation="none", group_depth=1, **SHALLOW)
    export_onnx(model, None, tmp_path / "out")
    assert_same_outputs(tmp_path / "out", model, [(2, 3, 9)])


def test_what_differs_is_not_written(tmp_path, nano_tokenizer, monkeypatch):
    model = tiny_model(ModernALBERTModel, ffn_modulation="none", group_depth=1, **SHALLOW)
    monkeypatch.setattr(onnx_module, "TOLERANCE", 1e-12)
    with pytest.raises(ValueError, match="last_hidden_state differs from PyTorch's by .* nothing is written"):
        export_onnx(model, nano_tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_quantization_is_refused(tmp_path):
    with pytest.raises(ValueError, match="quantize='int4' is not allowed: it must be None or int8"):
        export_onnx(tiny_model(ModernALBERTModel), None, tmp_path / "out", quantize="int4")
