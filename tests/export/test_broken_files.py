# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Broken folders: every mistake in a file is a sentence, and nothing is written."""

import json
import struct

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from small_models import tiny_model

from modernalbert import ModernALBERTForMaskedLM, MoLConfig
from modernalbert.cli.errors import UserError
from modernalbert.export.hub_folder import load_model
from modernalbert.export.sentence_transformers import copy_modules
from modernalbert.export.verify import verify_folder
from modernalbert.tuner.merge import load_adapter


pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


# Files are written anew for each example, so that the one folder of a test serves all.
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["..", "../x", "/"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
# Fields that say how large a model is.
SIZES = (
    "vocab_size",
    "hidden_size",
    "embedding_size",
    "intermediate_size",
    "mol_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_experts",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "cls_token_id",
    "sep_token_id",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    tiny_model(ModernALBERTForMaskedLM, num_hidden_layers=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def weights(folder):
    return load_file(folder / "model.safetensors")


def loads_or_says(call, *arguments) -> bool:
    """Whether the call succeeds; a failure must be one readable sentence."""
    try:
        call(*arguments)
    except UserError as error:
        message = str(error)
        assert message.strip() and len(message) < 2000 and "Traceback" not in message
        return False
    return True


def damage(whole: bytes, data) -> tuple[str, bytes]:
    """A safetensors file, cut or with bytes or header entries changed, and how."""
    kind = data.draw(st.sampled_from(["cut", "header", "length", "noise"]))
    header_size = struct.unpack("<Q", whole[:8])[0]
    if kind == "cut":
        return kind, whole[: data.draw(st.integers(0, len(whole) - 1))]
    if kind == "length":
        return kind, struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + whole[8:]
    if kind == "noise":
        return kind, data.draw(st.binary(max_size=64)) + whole[64:]
    header = json.loads(whole[8 : 8 + header_size])
    header[data.draw(st.sampled_from(sorted(header)))] = data.draw(JSON)
    text = json.dumps(header).encode()
    return kind, struct.pack("<Q", len(text)) + text + whole[8 + header_size :]


@settings(max_examples=1200, **SETTINGS)
@given(data=st.data())
def test_any_value_of_any_field_of_the_configuration(folder, config, weights, data):
    names = data.draw(st.lists(st.sampled_from(sorted(config)) | st.text(max_size=8), min_size=1, max_size=3))
    broken = config | {name: data.draw(JSON) for name in names}
    # A model of any size is allowed, but not made here.
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_experts", "lora_rank", "moa_bottleneck"):
        if isinstance(broken.get(name), int) and abs(broken[name]) > 1000:
            broken[name] = config.get(name)
    for name in ("embedding_size", "intermediate_size", "mol_intermediate_size", "num_labels"):
        if isinstance(broken.get(name), int) and abs(broken[name]) > 1000:
            broken[name] = config.get(name)
    (folder / "config.json").write_text(json.dumps(broken))
    try:
        is_loaded = loads_or_says(load_model, str(folder))
        loads_or_says(verify_folder, folder)
    finally:
        (folder / "config.json").write_text(json.dumps(config))
    # What it was is loaded; what the tensors are not is never loaded.
    assert is_loaded or json.dumps(broken) != json.dumps(config)  # False equals 0 in Python alone
    assert not is_loaded or all(broken[name] == config[name] for name in ("vocab_size", "hidden_size"))


@settings(max_examples=300, **SETTINGS)
@given(content=st.binary(max_size=60) | JSON)
def test_any_content_of_the_configuration(folder, config, content):
    if isinstance(content, dict):  # without sizes it would be a model of the default ones, which take seconds to make
        content = {name: config[name] for name in SIZES} | content
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    try:
        assert not loads_or_says(load_model, str(folder)) or isinstance(content, dict)
        loads_or_says(verify_folder, folder)
    finally:
        (folder / "config.json").write_text(json.dumps(config))


@settings(max_examples=200, **SETTINGS)
@given(data=st.data())
def test_any_damage_of_the_weights_file(tmp_path, folder, config, data):
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text(json.dumps(config))
    kind, damaged = damage(whole, data)
    (tmp_path / "model.safetensors").write_bytes(damaged)
    assert not loads_or_says(load_model, str(tmp_path)) or damaged == whole or kind in ("noise", "header")


@settings(max_examples=120, **SETTINGS)
@given(data=st.data())
def test_a_tensor_of_a_wrong_shape_is_named(tmp_path, folder, config, weights, data):
    name = data.draw(st.sampled_from(sorted(weights)))
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights | {name: torch.zeros(shape)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_model(str(tmp_path))


@settings(max_examples=400, **SETTINGS)
@given(content=JSON | st.lists(st.fixed_dictionaries({"path": JSON, "type": JSON}), max_size=3))
def test_any_list_of_modules(tmp_path, content):
    (tmp_path / "source").mkdir(exist_ok=True)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "source/modules.json").write_text(json.dumps(content))
    if not loads_or_says(copy_modules, tmp_path / "source", tmp_path / "out"):
        assert not (tmp_path / "out/modules.json").exists() or content == []
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    for file in (tmp_path / "out").glob("*.json"):
        file.unlink()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model without experts; its adapter lies in `adapter/`."""
    folder = tmp_path_factory.mktemp("base")
    model = tiny_model(ModernALBERTForMaskedLM, num_hidden_layers=2, ffn_modulation="none")
    model.save_pretrained(folder)
    get_peft_model(model, MoLConfig(r=2, num_experts=2)).save_pretrained(folder / "adapter")
    return folder


@settings(max_examples=200, **SETTINGS)
@given(data=st.data())
def test_any_damage_of_an_adapter(base, data):
    adapter = base / "adapter"
    config, weights = (adapter / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    whole = {file: file.read_bytes() for file in (config, weights)}
    kind = "config"
    if data.draw(st.booleans()):
        fields = json.loads(whole[config])
        names = data.draw(st.lists(st.sampled_from(sorted(fields)) | st.text(max_size=8), min_size=1, max_size=3))
        broken = fields | {name: data.draw(JSON) for name in names}
        for name in ("r", "num_experts"):  # an adapter of any size is allowed, but not made here
            if isinstance(broken.get(name), int) and abs(broken[name]) > 1000:
                broken[name] = fields.get(name)
        config.write_text(json.dumps(broken))
    else:
        kind, damaged = damage(whole[weights], data)
        weights.write_bytes(damaged)
    try:
        is_refused = not loads_or_says(load_adapter, str(base), str(adapter))
        assert is_refused or kind not in ("cut", "length") or damaged == whole[weights]
    finally:
        for file, content in whole.items():
            file.write_bytes(content)
