# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""What an adapter's state is called, what is saved with it, and adapters of earlier versions."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from small_models import tiny_model
from tuner_models import COMMON, adapt, family, inputs_for, main_output, speak_up

from modernalbert import ModernALBERTForSequenceClassification, ModernALBERTForTokenClassification, MoLConfig
from modernalbert.tuner.observer import mol_layers


VERSION_1 = Path(__file__).with_name("adapter_of_version_1")
IDS = torch.arange(2, 14).view(2, 6)


@torch.no_grad()
def base_of_version_1() -> t.BertForSequenceClassification:
    """The base that the adapter of version 1 was made on, with weights from a formula."""
    config = t.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        vocab_size=20,
        max_position_embeddings=12,
        num_labels=3,
    )
    model = t.BertForSequenceClassification(config).eval()
    for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
        values = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * (number + 1))
        parameter.copy_(values.mul(0.3).view(parameter.shape))
    return model


def test_an_adapter_of_version_1_loads_and_is_saved_as_version_2(tmp_path):
    expected = json.loads((VERSION_1 / "expected.json").read_text())
    model = PeftModel.from_pretrained(base_of_version_1(), VERSION_1).eval()
    torch.testing.assert_close(model(IDS).logits, torch.tensor(expected["logits"]), atol=1e-6, rtol=1e-5)
    for _, layer in mol_layers(model):
        layer.mol_config["default"].expert_mixing = "token"
    torch.testing.assert_close(model(IDS).logits, torch.tensor(expected["routed_logits"]), atol=1e-6, rtol=1e-5)
    for _, layer in mol_layers(model):
        layer.mol_config["default"].expert_mixing = "ema"
    model.save_pretrained(tmp_path)
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (VERSION_1, tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["mol_version"] == 2
    for key, value in old.items():
        assert torch.equal(new.pop(key) if key in new else new.pop(f"{key}.weight"), value), key
    assert not new


def test_a_state_dict_of_version_1_loads():
    model = PeftModel.from_pretrained(base_of_version_1(), VERSION_1).eval()
    state = model.state_dict()
    for name in json.loads((VERSION_1 / "expected.json").read_text())["state_dict"]:
        if name not in state:
            state[name] = state.pop(f"{name}.weight")
    config = model.peft_config["default"]
    other = get_peft_model(base_of_version_1(), copy.deepcopy(config)).eval()
    result = other.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(other(IDS).logits, model(IDS).logits)


def test_an_adapter_of_version_1_is_refused_where_its_names_are_not_found():
    model = base_of_version_1()
    model.load_adapter(str(VERSION_1))
    with pytest.raises(RuntimeError, match="saved by an earlier version, .* load it with PeftModel.from_pretrained"):
        model(IDS)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"expert_mixing": "ema"}, {"num_frozen_experts": 2}])
def test_a_reference_is_copied_by_name(changes):
    """As trainers of preferences make their reference: a second adapter, and parameters copied by name."""
    model = adapt(family("llama"), task_type="CAUSAL_LM", **changes)
    for _, layer in mol_layers(model):
        layer.mol_usage["default"].copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
        for factor in ("A_in", "B_in", "A_out", "B_out") if "num_frozen_experts" in changes else ():
            getattr(layer, f"mol_frozen_{factor}")["default"].normal_(std=0.3)
    model.add_adapter("ref", model.peft_config["default"])
    names = [name for name, _ in model.named_parameters() if ".default." in name]
    assert len(names) == 2 * 5
    for name in names:
        model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(model.get_parameter(name).data)
    inputs = inputs_for(model.base_model.model)
    expected = model(**inputs).logits
    model.set_adapter("ref")
    torch.testing.assert_close(model(**inputs).logits, expected, atol=0, rtol=0)
    for _, layer in mol_layers(model):  # of its own: nothing is shared
        layer.mol_usage["ref"].fill_(0.25)
        assert layer.mol_usage["default"][0] == pytest.approx(0.4)


# --- heads ---


def encoder_folder(tmp_path, name: str):
    """An encoder without a head, as sentence-transformers saves it, and the class of a model with one."""
    if name == "modernalbert":
        model = tiny_model(ModernALBERTForSequenceClassification, ffn_modulation="none").model
        classes = {"SEQ_CLS": ModernALBERTForSequenceClassification, "TOKEN_CLS": ModernALBERTForTokenClassification}
    elif name == "modernbert":
        model = family("modernbert").model
        classes = {"SEQ_CLS": t.ModernBertForSequenceClassification, "TOKEN_CLS": t.ModernBertForTokenClassification}
        classes["QUESTION_ANS"] = t.ModernBertForQuestionAnswering
    elif name == "bert":  # trained as a masked language model, it has no pooler
        model = t.BertForMaskedLM(family("bert").config)
        classes = {"SEQ_CLS": t.BertForSequenceClassification}
    else:
        model = t.DebertaV2Model(t.DebertaV2Config(**COMMON, pooler_hidden_size=32))
        classes = {"SEQ_CLS": t.DebertaV2ForSequenceClassification}
    model.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder", classes


@torch.no_grad()
@pytest.mark.parametrize(
    "name, task",
    [
        ("modernalbert", "SEQ_CLS"),
        ("modernalbert", "TOKEN_CLS"),
        ("modernbert", "SEQ_CLS"),
        ("modernbert", "QUESTION_ANS"),
        ("bert", "SEQ_CLS"),
        ("deberta", "SEQ_CLS"),
    ],
)
def test_a_head_that_no_checkpoint_has_is_trained_and_saved(tmp_path, name, task):
    folder, classes = encoder_folder(tmp_path, name)
    targets = {"target_modules": r".*encoder\.layer\.\d+"} if name == "deberta" else {}
    model = adapt(classes[task].from_pretrained(folder), task_type=task, **targets)
    ids = torch.randint(3, 90, (3, 7))
    loose = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
        and "original_module" not in name
        and not getattr(parameter, "_is_hf_initialized", False)
    ]
    assert not loose
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(1)  # another random head
    again = PeftModel.from_pretrained(classes[task].from_pretrained(folder), tmp_path / "adapter").eval()
    for before, after in zip(model(ids).to_tuple(), again(ids).to_tuple()):
        torch.testing.assert_close(after, before)
    assert again.peft_config["default"].modules_to_save is not None
    # rows without an adapter have the base's head, whatever its form
    if task == "SEQ_CLS":
        mixed = again(ids, adapter_names=["default", "__base__", "default"]).logits
        torch.testing.assert_close(mixed[::2], model(ids).logits[::2])
        with again.disable_adapter():
            torch.testing.assert_close(mixed[1], again(ids).logits[1])


def test_a_head_that_was_loaded_is_left_alone(tmp_path):
    tiny_model(ModernALBERTForSequenceClassification, ffn_modulation="none").save_pretrained(tmp_path)
    model = ModernALBERTForSequenceClassification.from_pretrained(tmp_path)
    model = get_peft_model(model, MoLConfig(task_type="SEQ_CLS"))
    assert set(model.peft_config["default"].modules_to_save) == {"classifier", "score"}
    encoder = ModernALBERTForSequenceClassification.from_pretrained(tmp_path)
    assert get_peft_model(encoder, MoLConfig()).peft_config["default"].modules_to_save is None


# --- one adapter beside others ---


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_adapter_keeps_its_own_dtype_beside_others(dtype):
    """A float32 adapter and a bfloat16 one on one model: neither takes the other's dtype."""
    model = adapt(family("llama"), "one")
    model.add_adapter("two", MoLConfig(num_experts=4, r=4))
    speak_up(model, "two", seed=1)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    for _, layer in mol_layers(model):
        for parameter in layer.adapter_parameters("one"):
            parameter.data = parameter.data.to(dtype)
        for parameter in layer.adapter_parameters("two"):
            parameter.data = parameter.data.to(other)

    def dtypes(adapter: str) -> set[torch.dtype]:
        return {p.dtype for _, layer in mol_layers(model) for p in layer.adapter_parameters(adapter)}

    model.merge_experts("uniform", adapter_name="one", new_adapter_name="merged")
    assert dtypes("merged") == dtypes("one") == {dtype} and dtypes("two") == {other}
    model.base_model.add_experts(1, "one")
    model.merge_experts("uniform", adapter_name="two")
    assert dtypes("one") == {dtype} and dtypes("two") == {other}


def test_two_active_adapters_are_refused_before_anything_changes():
    model = adapt(t.BertForSequenceClassification(family("bert").config), "one", task_type="SEQ_CLS")
    model.add_adapter("two", MoLConfig(num_experts=2))
    active = {name: module.active_adapters for name, module in model.named_modules() if hasattr(module, "merged")}
    head = model.base_model.model.classifier.active_adapters
    with pytest.raises(ValueError, match="cannot be active together"):
        model.base_model.set_adapter(["two", "one"])
    assert model.active_adapters == ["one"] and model.base_model.model.classifier.active_adapters == head
    for name, module in model.named_modules():
        assert name not in active or module.active_adapters == active[name]


@torch.no_grad()
def test_adapters_of_several_types_are_refused_together_and_right_on_top_of_each_other():
    with pytest.raises(ValueError, match="MOL"):
        get_peft_model(family("llama"), MoLConfig(), mixed=True)
    model = adapt(family("llama"))
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    # a LoRA that a base wears is part of the base: on its projections, too
    inputs = inputs_for(family("llama"))
    torch.manual_seed(0)
    base = family("llama")
    base.add_adapter(LoraConfig(target_modules=["up_proj", "down_proj"], init_lora_weights=False), "lora")
    torch.manual_seed(0)
    folded = family("llama")
    folded.load_state_dict({k.replace(".base_layer", ""): v for k, v in base.state_dict().items() if "lora_" not in k})
    for name, module in base.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "lora_A"):
            folded.get_submodule(name).weight.data += module.get_delta_weight("lora").detach()
    outputs = []
    for model in (folded, base):
        torch.manual_seed(1)
        outputs.append(main_output(adapt(model)(**inputs)))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name, lora_targets", [("llama", ["q_proj", "down_proj"]), ("bert", ["query", "dense"])])
def test_an_adapter_that_comes_later_and_would_lose_targets_is_refused(name, lora_targets):
    """peft passes over what is inside of a MoL layer, without a word."""

    def with_adapters(order: str) -> torch.nn.Module:
        model = family(name)
        configs = {"lora": LoraConfig(target_modules=lora_targets), "mol": MoLConfig(num_experts=4, r=4)}
        for adapter_name in order.split():
            model.add_adapter(configs[adapter_name], adapter_name)
        return speak_up(model, "mol").eval()

    model = with_adapters("mol lora")
    inputs = inputs_for(model)
    with pytest.raises(ValueError, match=r"'lora' \(LORA\) was added after .*(down_proj|query).*MoL adapter last"):
        model(**inputs)
    model.delete_adapter("lora")
    model.set_adapter("mol")
    expected = main_output(model(**inputs))
    last = with_adapters("lora mol")
    last.set_adapter(["lora", "mol"])
    state = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
    last.load_state_dict({k: state.get(k.replace(".base_layer", ""), v) for k, v in last.state_dict().items()})
    torch.testing.assert_close(main_output(last(**inputs)), expected)  # an untrained LoRA adds nothing
    outside = with_adapters("mol")
    if name == "llama":  # in a BERT the MoL layer is all of the layer
        outside.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    outside(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
def test_adapters_do_not_depend_on_the_order_of_adding_and_deleting(order):
    torch.manual_seed(5)
    base = family("bert")
    inputs = inputs_for(base)
    states, alone = {}, {}
    for number, name in enumerate("abc"):
        model = speak_up(adapt(copy.deepcopy(base), name), name, seed=number)
        states[name] = get_peft_model_state_dict(model, adapter_name=name)
        alone[name] = main_output(model(**inputs))
    model = get_peft_model(base, MoLConfig(num_experts=4, r=4), order[0]).eval()
    for name in order[1:]:
        model.add_adapter(name, MoLConfig(num_experts=4, r=4))
    for name in order:
        set_peft_model_state_dict(model, states[name], adapter_name=name)
    alive = list(order)
    while alive:
        for name in alive:
            model.set_adapter(name)
            trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
            assert len(trained) == 2 * 5 and all(name in key.split(".") for key in trained)
            torch.testing.assert_close(main_output(model(**inputs)), alone[name], atol=1e-6, rtol=1e-6)
        deleted = alive.pop(0)
        model.delete_adapter(deleted)
        assert not any(deleted in key.split(".") for key in model.state_dict())
    inner = model.base_model.model  # peft's wrapper itself needs an adapter
    torch.testing.assert_close(main_output(inner(**inputs)), main_output(model.unload()(**inputs)), atol=0, rtol=0)
