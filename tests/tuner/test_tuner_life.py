# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The life of an adapter in peft and transformers: made, trained, switched, saved, loaded, deleted."""

import copy
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import transformers as t
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from small_models import tiny_model
from tuner_models import adapt, family, inputs_for, main_output, speak_up

from modernalbert import ModernALBERTForMaskedLM, MoLConfig, export_to_hub_folder
from modernalbert.tuner.config import add_peft_type
from modernalbert.tuner.observer import mol_layers


def classifier() -> t.BertForSequenceClassification:
    torch.manual_seed(7)
    return t.BertForSequenceClassification(family("bert").config).eval()


IDS = torch.randint(3, 100, (4, 6), generator=torch.Generator().manual_seed(0))
CONFIG = {"num_experts": 4, "r": 4, "task_type": "SEQ_CLS"}


def adapted(**changes) -> PeftModel:
    model = adapt(classifier(), **(CONFIG | changes))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    return model


def test_the_type_is_a_member_like_any_other():
    assert PeftType("MOL") is PeftType.MOL is add_peft_type("MOL")
    assert PeftType.MOL in list(PeftType) and pickle.loads(pickle.dumps(PeftType.MOL)) is PeftType.MOL
    assert copy.deepcopy(PeftType.MOL) is PeftType.MOL and PeftType.MOL == "MOL"


def test_only_the_adapter_and_what_is_to_be_saved_is_trained():
    model = get_peft_model(classifier(), MoLConfig(**CONFIG))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = ("classifier.modules_to_save", "pooler.modules_to_save")  # nothing of either was loaded
    assert all(".mol_" in name or any(head in name for head in heads) for name in trained)
    assert len(trained) == 2 * 5 + 2 * 2


@torch.no_grad()
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_loaded_and_saved_again_it_is_the_same(tmp_path, low_cpu_mem_usage):
    model = adapted()
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(classifier(), tmp_path / "a", low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(loaded(IDS).logits, expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (
        tmp_path / "b/adapter_model.safetensors"
    ).read_bytes()
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["peft_type"] == "MOL" and config["mol_version"] == 2 and config["num_experts"] == 4
    names = load_file(tmp_path / "a/adapter_model.safetensors").keys()
    layer = "base_model.model.bert.encoder.layer.0."
    assert {name.removeprefix(layer) for name in names if name.startswith(layer)} == {
        "mol_router.weight",
        "mol_A_in.weight",
        "mol_B_in.weight",
        "mol_A_out.weight",
        "mol_B_out.weight",
        "mol_usage",
    }
    trainable = PeftModel.from_pretrained(classifier(), tmp_path / "a", is_trainable=True)
    assert any(parameter.requires_grad for parameter in trainable.parameters())


def test_the_card_says_first_what_to_install(tmp_path):
    adapted().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text().split("---\n", 2)[2].lstrip()
    assert text.startswith("> **`pip install modernalbert` and `import modernalbert`")
    adapted().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("pip install modernalbert") == 1


def test_the_card_of_an_adapter_with_a_name_says_so_too(tmp_path):
    adapt(classifier(), "law", **CONFIG).save_pretrained(tmp_path)
    for card in (tmp_path / "README.md", tmp_path / "law" / "README.md"):
        assert "pip install modernalbert" in card.read_text()


@torch.no_grad()
def test_auto_classes_find_base_and_adapter(tmp_path):
    classifier().save_pretrained(tmp_path / "base")
    base = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = speak_up(get_peft_model(base, MoLConfig(**CONFIG)).eval())
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    assert type(PeftConfig.from_pretrained(tmp_path / "adapter")) is MoLConfig
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(IDS).logits, expected)
    base = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")  # transformers' own way
    torch.testing.assert_close(base(IDS).logits, expected)


@torch.no_grad()
def test_transformers_loads_switches_disables_and_deletes(tmp_path):
    model = adapt(family("bert"))
    inputs = inputs_for(model.base_model.model)
    expected = main_output(model(**inputs))
    model.save_pretrained(tmp_path)
    plain = family("bert")
    plain.load_state_dict(model.unload().state_dict())
    silent = main_output(plain(**inputs))
    plain.load_adapter(str(tmp_path), adapter_name="one")
    torch.testing.assert_close(main_output(plain(**inputs)), expected)
    plain.disable_adapters()
    torch.testing.assert_close(main_output(plain(**inputs)), silent)
    plain.enable_adapters()
    plain.add_adapter(MoLConfig(num_experts=3, num_experts_per_tok=1), adapter_name="two")
    torch.testing.assert_close(main_output(plain(**inputs)), silent, atol=1e-5, rtol=1e-5)
    plain.set_adapter("one")
    torch.testing.assert_close(main_output(plain(**inputs)), expected)
    plain.delete_adapter("one")
    assert not [name for name in plain.state_dict() if name.endswith(".one") or ".one." in name]


@torch.no_grad()
def test_injected_without_a_wrapper_it_saves_and_loads_the_same():
    config = MoLConfig(num_experts=4, r=4)
    first, second = (inject_adapter_in_model(config, family("llama")).eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    speak_up(first)
    state = get_peft_model_state_dict(first)
    set_peft_model_state_dict(second, state)
    inputs = inputs_for(first)
    torch.testing.assert_close(second(**inputs).logits, first(**inputs).logits)


def snapshot(model: torch.nn.Module) -> dict:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "attributes": {
            name: {key: repr(value) for key, value in vars(layer).items() if not key.startswith("_")}
            for name, layer in mol_layers(model)
        },
    }


@pytest.mark.parametrize("use", ["forward", "mixed", "disabled", "generate", "failed"])
def test_a_forward_changes_nothing(use):
    model = adapt(family("llama"))
    model.add_adapter("other", MoLConfig(num_experts=2, num_experts_per_tok=1))
    before = snapshot(model)
    inputs = inputs_for(model.base_model.model)
    if use == "mixed":
        model(**inputs, adapter_names=["default", "other", "__base__"])
    elif use == "disabled":
        with model.disable_adapter():
            model(**inputs)
    elif use == "generate":
        model.generate(**inputs, max_new_tokens=2)
    elif use == "failed":
        with pytest.raises(ValueError, match="'nobody'"):
            model(**inputs, adapter_names=["default", "nobody", "__base__"])
    else:
        model(**inputs, output_router_logits=True)
    after = snapshot(model)
    for name, value in before["state"].items():
        assert torch.equal(after["state"].pop(name), value), name
    assert not after.pop("state") and not before.pop("state").clear()
    assert after == before


@torch.no_grad()
def test_adapters_are_added_switched_and_deleted():
    model = adapt(family("bert"), "one")
    inputs = inputs_for(model.base_model.model)
    first = main_output(model(**inputs))
    model.add_adapter("two", MoLConfig(num_experts=3, num_experts_per_tok=1, r=2))
    torch.testing.assert_close(main_output(model(**inputs)), first)
    speak_up(model, "two", seed=1)
    model.set_adapter("two")
    second = main_output(model(**inputs))
    assert not torch.allclose(first, second)
    assert all(parameter.requires_grad == ("two" in name.split(".")) for name, parameter in model.named_parameters())
    with pytest.raises(ValueError, match="cannot be active together"):
        model.base_model.set_adapter(["one", "two"])
    model.base_model.set_adapter("two")
    model.delete_adapter("two")
    torch.testing.assert_close(main_output(model(**inputs)), first)
    assert not [name for name in model.state_dict() if "two" in name.split(".")]


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "opt", "t5", "modernalbert"])
def test_every_row_of_a_batch_has_its_own_adapter(name):
    model = adapt(family(name), "one")
    model.add_adapter("two", MoLConfig(num_experts=3, num_experts_per_tok=1, r=2))
    speak_up(model, "two", seed=1)
    model.eval()
    inputs = inputs_for(model.base_model.model)
    mixed = main_output(model(**inputs, adapter_names=["two", "__base__", "one"]))
    for row, adapter_name in enumerate(["two", "__base__", "one"]):
        if adapter_name == "__base__":
            with model.disable_adapter():
                alone = main_output(model(**inputs))
        else:
            model.set_adapter(adapter_name)
            alone = main_output(model(**inputs))
        torch.testing.assert_close(mixed[row], alone[row], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="'nobody'"):
        model(**inputs, adapter_names=["nobody"] * 3)
    for names in (["one"], ["one"] * 9):
        with pytest.raises(ValueError, match=f"{len(names)} names for 3 rows"):
            model(**inputs, adapter_names=names)
    with pytest.raises(ValueError, match="not allowed in training"):
        model.train()(**inputs, adapter_names=["one"] * 3)
    model.eval().base_model.model.eval()
    with pytest.raises(ValueError, match="wrap the model in a PeftModel"):
        model.base_model.model(**inputs, adapter_names=["one"] * 3)
    model.set_adapter("one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base"):
        model(**inputs, adapter_names=["one"] * 3)


@torch.no_grad()
def test_rows_keep_their_adapters_in_generation_with_beams_and_their_heads():
    model = adapt(family("t5"), "one")
    inputs = inputs_for(model.base_model.model)
    inputs = {"input_ids": inputs["input_ids"][:2]}
    options = {"num_beams": 2, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    mixed = model.generate(**inputs, **options, adapter_names=["__base__", "one"])
    assert torch.equal(mixed[1:], model.generate(input_ids=inputs["input_ids"][1:], **options))
    with model.disable_adapter():
        assert torch.equal(mixed[:1], model.generate(input_ids=inputs["input_ids"][:1], **options))
    heads = adapted()
    mixed = heads(IDS, adapter_names=["default", "__base__"] * 2).logits
    torch.testing.assert_close(mixed[::2], heads(IDS).logits[::2])
    with heads.disable_adapter():
        torch.testing.assert_close(mixed[1::2], heads(IDS).logits[1::2])


def test_copies_are_independent():
    model = adapt(family("bert"))
    inputs = inputs_for(model.base_model.model)
    expected = main_output(model(**inputs))
    twin = copy.deepcopy(model)
    torch.testing.assert_close(main_output(twin(**inputs)), expected)
    with torch.no_grad():
        for _, layer in mol_layers(model):
            layer.mol_B_in["default"].weight.zero_()
    torch.testing.assert_close(main_output(twin(**inputs)), expected)
    base = twin.unload()
    assert not [name for name in base.state_dict() if "mol_" in name]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert any(m._forward_hooks for m in model.modules())


def test_unloading_gives_back_the_modules_that_were_saved_too():
    model = adapted()
    base = model.merge_and_unload()
    assert type(base.classifier) is torch.nn.Linear and not any("mol_" in name for name in base.state_dict())


def test_a_trainer_trains_it_resumes_and_keeps_its_statistics(tmp_path):
    model = get_peft_model(classifier(), MoLConfig(**CONFIG, router_aux_loss_coef=0.1))
    rows = [{"input_ids": IDS[i % 4], "labels": i % 2} for i in range(16)]
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    arguments = t.TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to="none", learning_rate=1e-2
    )
    t.Trainer(model, arguments, train_dataset=rows).train()
    for name, value in before.items():
        assert not torch.equal(dict(model.named_parameters())[name], value), name
    usage = model.base_model.expert_usage()
    assert len(usage) == 2 and all(u.sum() == pytest.approx(1) and u.std() > 0 for u in usage.values())
    again = get_peft_model(classifier(), MoLConfig(**CONFIG, router_aux_loss_coef=0.1))
    t.Trainer(again, arguments, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)


def test_an_adapter_that_does_not_fit_names_the_culprit(tmp_path):
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = "the/base"
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"mol_router for .*layer.0 is \(4, 32\).*\(4, 16\).*made for the/base"):
        other = copy.deepcopy(family("bert").config)
        other.hidden_size = 16
        PeftModel.from_pretrained(t.BertForSequenceClassification(other), tmp_path / "a")
    state = load_file(tmp_path / "a/adapter_model.safetensors")
    save_file({k: v for k, v in state.items() if "router" not in k}, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"has no mol_router for .*layer\.0"):
        PeftModel.from_pretrained(classifier(), tmp_path / "a")


def test_an_adapter_of_more_layers_is_refused(tmp_path):
    config = copy.deepcopy(family("bert").config)
    config.num_hidden_layers = 3
    adapt(t.BertForSequenceClassification(config), **CONFIG).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layer\.2\.mol_.* no place in this model"):
        PeftModel.from_pretrained(classifier(), tmp_path)


def test_a_frozen_adapter_in_a_trained_model_does_not_count():
    model = adapted().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    before = model.base_model.expert_usage()
    output = model(IDS, labels=torch.tensor([0, 1, 0, 1]), output_router_logits=True)
    assert "aux_loss" not in output
    for name, usage in model.base_model.expert_usage().items():
        assert torch.equal(usage, before[name])


BASE_FROM_ITS_OWN_CODE = """
import sys
import torch
from transformers import AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True)
import modernalbert  # registers the tuner, and the package's own classes, which would have come first
from modernalbert import MoLConfig
from modernalbert.merge_experts import merge_experts
from modernalbert.tuner.merge import load_adapter
from peft import PeftConfig, PeftModel
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert isinstance(PeftConfig.from_pretrained(sys.argv[2]), MoLConfig)
adapted = PeftModel.from_pretrained(model, sys.argv[2]).eval()
ids = torch.arange(3, 12).view(1, -1)
expected = adapted(input_ids=ids).logits
torch.save(expected, sys.argv[3])
torch.testing.assert_close(load_adapter(sys.argv[1], sys.argv[2])(input_ids=ids).logits, expected)
folded = [merge_experts(m, "uniform").model(input_ids=ids).logits for m in (adapted, load_adapter(*sys.argv[1:3]))]
torch.testing.assert_close(*folded)
adapted.save_pretrained(sys.argv[4])
"""


def test_an_adapter_on_a_hub_folders_own_code_beside_this_package(tmp_path):
    plain = tiny_model(ModernALBERTForMaskedLM, ffn_modulation="none")
    export_to_hub_folder(plain, None, tmp_path / "base")
    model = adapt(plain)
    model.save_pretrained(tmp_path / "adapter")
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "logits.pt", "again")]
    done = subprocess.run(
        [sys.executable, "-c", BASE_FROM_ITS_OWN_CODE, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = model(input_ids=torch.arange(3, 12).view(1, -1)).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["auto_mapping"] is None
