# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A folder on the Hub is whole: strangers load every class from it, and it stays whole through training."""

import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate import disk_offload
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import randomise, run_command, tiny_config, tiny_model
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

import modernalbert
from modernalbert import (
    ModernALBERTConfig,
    ModernALBERTForMaskedLM,
    ModernALBERTForSequenceClassification,
    ModernALBERTModel,
    export_to_hub_folder,
)
from modernalbert.cli.errors import UserError
from modernalbert.cli.output_folders import atomic_folder
from modernalbert.hub import command as export_command


IDS = torch.arange(3, 39).view(2, 18)
CODE = {"configuration_modernalbert.py", "modeling_modernalbert.py", "modeling_mol.py"}

STRANGER = """
import sys
sys.modules["modernalbert"] = None  # an import of it fails
import torch, transformers
from transformers import AutoConfig, AutoTokenizer, pipeline

folder, other = sys.argv[1:]
# The tokenizer of ONNX files: nothing of the folder's code runs, and nothing is asked.
fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)(["A film.", "A long film."], padding=True)
auto = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(["A film.", "A long film."], padding=True)
assert dict(fast) == dict(auto), (fast, auto)
ids = torch.arange(3, 39).view(2, 18)
results = {}
for name in ("", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
             "ForMultipleChoice"):
    auto = getattr(transformers, "AutoModel" + name)
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__name__ == ("ModernALBERT" + name if name else "ModernALBERTModel"), type(model)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    if name in ("", "ForMaskedLM"):
        results[name] = model(ids)[0]
model.save_pretrained(other)  # loaded as remote code, saved again, loaded again
results["again"] = transformers.AutoModel.from_pretrained(other, trust_remote_code=True).eval()(ids)[0]
for task in ("fill-mask", "text-classification", "token-classification", "feature-extraction"):
    pipe = pipeline(task, model=folder, trust_remote_code=True)
    text = "The film was [MASK]." if task == "fill-mask" else "The film was long."
    results[task] = pipe(text)
    assert results[task], task
assert len(results["fill-mask"]) == 5 and "score" in results["text-classification"][0]
torch.save({k: v for k, v in results.items() if isinstance(v, torch.Tensor)}, folder + "/results.pt")
"""


def test_strangers_load_every_class_and_pipeline(tmp_path, nano_tokenizer):
    model = tiny_model(ModernALBERTForMaskedLM, vocab_size=30522)
    folder = export_to_hub_folder(model, nano_tokenizer, tmp_path / "hub")
    names = {path.name for path in folder.iterdir()}
    assert CODE | {"config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE"} <= names
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only"} & tokenizer_config.keys()
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(folder), str(tmp_path / "other")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    results = torch.load(folder / "results.pt")
    torch.testing.assert_close(results["ForMaskedLM"], model(IDS).logits)
    torch.testing.assert_close(results[""], model.model(IDS)[0])
    torch.testing.assert_close(results["again"], model.model(IDS)[0])
    assert CODE <= {path.name for path in (tmp_path / "other").iterdir()}
    auto_map = json.loads((tmp_path / "other/config.json").read_text())["auto_map"]
    assert auto_map.keys() == modernalbert.configuration_modernalbert.AUTO_MAP.keys()


def test_a_tokenizer_is_written_without_the_truncation_of_its_last_call(tmp_path, nano_tokenizer):
    nano_tokenizer(["A film of many words.", "A film."], truncation=True, max_length=4, padding=True)
    folder = export_to_hub_folder(tiny_model(ModernALBERTModel, vocab_size=30522), nano_tokenizer, tmp_path / "hub")
    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(["film " * 400, "film"])
    assert [len(encoding.ids) for encoding in encoded] == [402, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_save_is_byte_identical(tmp_path, dtype):
    model = tiny_model(ModernALBERTForMaskedLM)
    for k in (1, 2):
        model.model.groups[k].mlp.mol_usage.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]) + k * 1e-5)
    model.to(dtype).save_pretrained(tmp_path / "first")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "first", dtype=dtype)
    assert type(again) is ModernALBERTForMaskedLM and again.dtype == dtype
    again.save_pretrained(tmp_path / "second")
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    state = load_file(first)
    assert "decoder.weight" not in state and "model.embeddings.tok_embeddings.weight" in state
    assert sum(value.numel() for value in state.values()) == sum(
        value.numel() for value in [*model.parameters(), *model.buffers()]
    )
    usage = state["model.groups.2.mlp.mol_usage"]
    assert usage.dtype == torch.float32
    assert torch.equal(usage, torch.tensor([0.1, 0.2, 0.3, 0.4]) + 2e-5)
    assert torch.equal(again.model.groups[2].mlp.mol_usage, usage)


def test_casting_keeps_the_statistics():
    model = tiny_model(ModernALBERTModel)
    usage = torch.tensor([0.1, 0.2, 0.3, 0.4]) + 1e-5
    model.groups[2].mlp.mol_usage.copy_(usage)
    for cast in (model.bfloat16, model.half, model.double, model.float):
        cast()
        assert model.groups[2].mlp.mol_usage.dtype == torch.float32
        assert torch.equal(model.groups[2].mlp.mol_usage, usage)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_exported_folder_loads_to_be_trained_whatever_is_stored(tmp_path, stored):
    model = tiny_model(ModernALBERTForMaskedLM, stored)
    export_to_hub_folder(model, None, tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.get_tensor("model.groups.0.attn.Wqkv.weight").dtype == stored
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == (torch.float64 if stored == torch.float64 else torch.float32)
    assert torch.equal(loaded.model.groups[0].attn.Wqkv.weight, model.model.groups[0].attn.Wqkv.weight.to(loaded.dtype))
    half = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_state_dict_names_are_the_format():
    config = tiny_config(router_per_depth=True, mol_groups=[2])
    shapes = {name: tuple(value.shape) for name, value in ModernALBERTForMaskedLM(config).state_dict().items()}
    block = {"attn_norm": (32,), "attn.Wqkv": (96, 32), "attn.Wo": (32, 32), "mlp_norm": (32,)}
    expected = {
        "model.embeddings.tok_embeddings.weight": (120, 16),
        "model.embeddings.projection.weight": (32, 16),
        "model.embeddings.norm.weight": (32,),
        "model.final_norm.weight": (32,),
        "head.dense.weight": (32, 32),
        "head.norm.weight": (32,),
        "decoder.weight": (120, 16),
        "decoder.bias": (120,),
    }
    for k, f in enumerate((40, 40, 48)):
        expected |= {f"model.groups.{k}.{name}.weight": shape for name, shape in block.items()}
        expected |= {f"model.groups.{k}.mlp.Wi.weight": (2 * f, 32), f"model.groups.{k}.mlp.Wo.weight": (32, f)}
    expected |= {
        "model.groups.2.mlp.mol_router.weight": (2, 4, 32),
        "model.groups.2.mlp.mol_A_in": (4, 4, 32),
        "model.groups.2.mlp.mol_B_in": (4, 96, 4),
        "model.groups.2.mlp.mol_A_out": (4, 4, 48),
        "model.groups.2.mlp.mol_B_out": (4, 32, 4),
        "model.groups.2.mlp.mol_usage": (2, 4),
    }
    assert shapes == expected


def test_a_checkpoint_without_statistics_starts_them_evenly(tmp_path):
    model = tiny_model(ModernALBERTModel)
    state = {name: value for name, value in model.state_dict().items() if "usage" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = ModernALBERTModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.groups[2].mlp.mol_usage, torch.full((4,), 0.25))


def test_a_head_is_initialised_and_the_rest_loaded(tmp_path):
    model = tiny_model(ModernALBERTForMaskedLM)
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier) is ModernALBERTForSequenceClassification
    assert classifier.classifier.weight.shape == (3, 32) and classifier.classifier.weight.std() > 0.05
    for name, value in model.model.state_dict().items():
        assert torch.equal(classifier.model.state_dict()[name], value), name
    torch.testing.assert_close(classifier.head.dense.weight, model.head.dense.weight)
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(encoder(IDS)[0], model.model(IDS)[0])


def test_initial_values():
    model = ModernALBERTForMaskedLM(tiny_config(hidden_size=64, num_experts=1 + 3))
    mlp = model.model.groups[2].mlp
    assert mlp.mol_B_in.abs().max() == 0 and mlp.mol_B_out.abs().max() == 0
    assert 0.5 / 8 < mlp.mol_A_in.abs().max() <= 1 / 8
    std = model.config.initializer_range
    assert mlp.Wi.weight.std().item() == pytest.approx(std * 0.88, rel=0.1)  # a normal cut at two deviations
    assert mlp.Wo.weight.std().item() == pytest.approx(std * 0.88 / 12**0.5, rel=0.1)
    assert torch.equal(mlp.mol_usage, torch.full((4,), 0.25))
    assert model.model.embeddings.projection.weight.std().item() == pytest.approx(0.88 / 4, rel=0.1)
    assert mlp.mol_router.weight.std().item() == pytest.approx(std * 0.88, rel=0.2)


def test_export_command_and_its_mistakes(tmp_path, monkeypatch, capsys, nano_tokenizer):
    def export(*arguments):
        return run_command(monkeypatch, capsys, export_command, *arguments)

    tiny_model(ModernALBERTForMaskedLM, vocab_size=30522).save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    places = ("--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "out")
    code, output, _ = export(*places)
    assert code == 0 and str(tmp_path / "out") in output
    for name, said in (("mine", "it must name an owner, like me/mine"), ("me/mi ne", "Repo id must"), ("", "needs")):
        code, _, error = export(*places, "--push_to_hub", "--hub_model_id", name)
        assert code == 2 and said in error, error
    code, _, error = export(*places, "--push_to_hub", "--hub_model_id", "me/mine")  # offline
    assert code == 2 and "is written, but not uploaded to me/mine" in error
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").config.vocab_size == 30522
    (tmp_path / "card.md").write_text("# Mine\n")
    code, _, _ = export(*places, "--dtype", "bfloat16", "--card", tmp_path / "card.md")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {values.dtype for name, values in state.items() if "mol_usage" not in name} == {torch.bfloat16}
    assert code == 0 and (tmp_path / "out" / "README.md").read_text().startswith("# Mine\n\n## Code files")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    for arguments, said in (
        ((*places, "--dtype", "int8"), "--dtype int8 is not allowed: it must be float32, bfloat16, float16"),
        ((*places, "--card", tmp_path / "no.md"), "no.md: no such file"),
        ((*places, "--format", "gguf"), "--format gguf is not allowed: it must be hub, modernbert, onnx"),
        (("--model_name_or_path", tmp_path / "bert", "--output_dir", tmp_path / "o"), "bert"),
        (("--model_name_or_path", tmp_path / "full", "--output_dir", tmp_path / "o"), "cannot be loaded"),
        (("--model_name_or_path", tmp_path / "none", "--output_dir", tmp_path / "o"), "cannot be loaded"),
        (("--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "full"), "is not empty"),
        (("--output_dir", tmp_path / "o"), "--model_name_or_path"),
    ):
        code, _, error = export(*arguments)
        assert code == 2 and said in error
    assert not (tmp_path / "o").exists()


def test_output_folders_are_whole_or_absent_and_foreign_content_is_never_touched(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic_folder(target, replaceable=["done"]) as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("old", "new"):
        with atomic_folder(target, replaceable=["don*"]) as folder:
            (folder / "done").write_text(text)
    assert (target / "done").read_text() == "new" and list(tmp_path.iterdir()) == [target]
    (target / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="thesis.tex"), atomic_folder(target, replaceable=["done"]):
        pass
    assert (target / "done").read_text() == "new"
    (target / "thesis.tex").unlink()
    (tmp_path / "link").symlink_to(target)
    with atomic_folder(tmp_path / "link", replaceable=["done"]) as folder:
        (folder / "done").write_text("through the link")
    assert (target / "done").read_text() == "through the link" and (tmp_path / "link").is_symlink()


def test_export_never_replaces_a_training_folder(tmp_path, nano_tokenizer):
    model = tiny_model(ModernALBERTForMaskedLM, vocab_size=30522)
    export_to_hub_folder(model, nano_tokenizer, tmp_path / "out")
    export_to_hub_folder(model, nano_tokenizer, tmp_path / "out", hub_model_id="me/mine")
    assert 'from_pretrained("me/mine"' in (tmp_path / "out/README.md").read_text()
    (tmp_path / "out/checkpoint-5").mkdir()
    with pytest.raises(UserError, match="checkpoint-5"):
        export_to_hub_folder(model, nano_tokenizer, tmp_path / "out")


@pytest.mark.parametrize("mixing", ["ema", "uniform", "token"])
def test_loading_keeps_an_idle_router_frozen(tmp_path, mixing):
    tiny_model(ModernALBERTForMaskedLM).save_pretrained(tmp_path)
    model = ModernALBERTForMaskedLM.from_pretrained(tmp_path, expert_mixing=mixing)
    routers = [p for name, p in model.named_parameters() if "router" in name]
    assert len(routers) == 2 and all(p.requires_grad == (mixing == "token") for p in routers)


@torch.no_grad()
@pytest.mark.parametrize("embedding_size", [16, None])
def test_offloaded_weights_are_brought_for_every_use(tmp_path, embedding_size):
    model = tiny_model(ModernALBERTForMaskedLM, embedding_size=embedding_size)
    expected = model(IDS).logits
    disk_offload(model, tmp_path, execution_device="cpu")
    assert model.head.dense.weight.device.type == "meta"
    torch.testing.assert_close(model(IDS).logits, expected)


def test_from_config_and_meta_loading():
    config = ModernALBERTConfig.from_dict(tiny_config().to_dict())
    assert type(AutoModelForMaskedLM.from_config(config)) is ModernALBERTForMaskedLM
    with torch.device("meta"):
        model = ModernALBERTModel(config)
    model = model.to_empty(device="cpu")
    model.load_state_dict(randomise(ModernALBERTModel(config)).state_dict())
    assert model.eval()(IDS)[0].isfinite().all()
