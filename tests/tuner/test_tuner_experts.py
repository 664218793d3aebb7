# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Experts into and out of adapters: merged, written as a stock LoRA, made from stock LoRAs, added to."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tuner_models import FAMILIES, adapt, family, inputs_for, main_output

from modernalbert import MoLConfig
from modernalbert.modeling_mol import route
from modernalbert.tuner.observer import mol_layers


ONE = {"num_experts": 1, "num_experts_per_tok": 1}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_one_expert_merges_unmerges_and_unloads_exactly(name):
    model = adapt(family(name), **ONE)
    inputs = inputs_for(model.base_model.model)
    base = {key: value.clone() for key, value in model.state_dict().items() if "mol_" not in key}
    expected = main_output(model(**inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(main_output(model(**inputs)), expected, atol=2e-5, rtol=2e-5)
        model.unmerge_adapter()
    for key, value in base.items():
        assert torch.equal(model.state_dict()[key], value), key
    torch.testing.assert_close(main_output(model(**inputs)), expected, atol=0, rtol=0)
    merged = model.merge_and_unload(safe_merge=True)
    assert not [key for key in merged.state_dict() if "mol_" in key]
    torch.testing.assert_close(main_output(merged(**inputs)), expected, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_a_safe_merge_changes_both_projections_or_none():
    model = adapt(family("llama"), **ONE)
    layer = next(layer for _, layer in mol_layers(model))
    layer.mol_B_out["default"].weight[0, 0, 0] = float("nan")  # the last projection, folded after the first ones
    before = {key: value.clone() for key, value in layer.base_layer.state_dict().items()}
    with pytest.raises(ValueError, match="weight of down_proj would not be finite"):
        model.merge_adapter(safe_merge=True)
    for key, value in before.items():
        assert torch.equal(layer.base_layer.state_dict()[key], value)
    assert not layer.merged


@torch.no_grad()
def test_disabling_a_merged_adapter_gives_the_base_back():
    model = adapt(family("bert"), **ONE)
    inputs = inputs_for(model.base_model.model)
    with model.disable_adapter():
        expected = main_output(model(**inputs))
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(main_output(model(**inputs)), expected, atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_merged_experts_are_the_weighted_sum_of_deltas(name):
    model = adapt(family(name))
    layers = dict(mol_layers(model))
    weights = [0.1, 0.2, 0.3, 0.4]
    expected = {
        layer_name: {
            path: sum(w * layer.deltas("default", torch.eye(4)[e])[path] for e, w in enumerate(weights))
            for path in (*layer.projection_names.inputs, layer.projection_names.output)
        }
        for layer_name, layer in layers.items()
    }
    inputs = inputs_for(model.base_model.model)
    routed = main_output(model(**inputs))
    report = model.merge_experts(weights=weights, new_adapter_name="merged")
    assert report.rank == 16 and report.measured_on.startswith("random token ids")
    torch.testing.assert_close(main_output(model(**inputs)), routed)
    for layer_name, layer in layers.items():
        for path, delta in layer.deltas("merged", torch.ones(1)).items():
            torch.testing.assert_close(delta, expected[layer_name][path], atol=1e-5, rtol=1e-5)
    model.set_adapter("merged")
    merged = main_output(model(**inputs))
    report = model.merge_experts(weights=weights, adapter_name="default", calibration=[inputs])
    error = ((merged - routed).norm() / routed.norm()).item()
    assert report.relative_error_of_output == pytest.approx(error, rel=1e-4)
    assert report.measured_on == "the calibration text" and model.peft_config["default"].num_experts == 1
    model.set_adapter("default")
    torch.testing.assert_close(main_output(model(**inputs)), merged, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_weights_come_from_statistics_or_calibration_and_ranks_from_the_method():
    model = adapt(family("bert"))
    inputs = inputs_for(model.base_model.model)
    usage = torch.tensor([0.7, 0.1, 0.1, 0.1])
    for _, layer in mol_layers(model):
        layer.mol_usage["default"].copy_(usage)
    report = model.merge_experts(new_adapter_name="ema")
    assert all(x.weights == pytest.approx(usage.tolist()) for x in report.layers.values())
    logits = model(**inputs, output_router_logits=True).router_logits
    report = model.merge_experts("calibration", new_adapter_name="calibrated", calibration=[inputs])
    for found, layer_logits in zip(report.layers.values(), logits):
        _, q, index = route(layer_logits.flatten(0, 1), 2)
        expected = torch.zeros(4).index_add(0, index.flatten(), q.flatten()) / len(q)
        assert found.weights == pytest.approx(expected.tolist(), abs=1e-5)
    report = model.merge_experts("uniform", "svd", 5, new_adapter_name="small")
    assert report.rank == 5 == model.peft_config["small"].r
    assert all(0 < layer.energy_kept_in < 1 and 0 < layer.energy_kept_out < 1 for layer in report.layers.values())
    for method in ("ties", "dare"):
        report = model.merge_experts("uniform", method, new_adapter_name=method, density=0.7)
        assert report.method == method and report.rank == 4 * model.peft_config["default"].r
        assert report.relative_error_of_output > 0
    for arguments, message in (
        ({"weights": "most"}, "weights='most' is not allowed"),
        ({"weights": [1, 2]}, "must be 4 finite numbers"),
        ({"weights": "calibration"}, "without calibration batches"),
        ({"method": "calibrated"}, "method='calibrated' is not allowed"),
        ({"density": 0.5}, "density=0.5 is not allowed with method='linear'"),
        ({"rank": 3}, "rank=3 is not allowed"),
        ({"adapter_name": "nobody"}, "the adapters are 'default'"),
        ({"new_adapter_name": "ema"}, "there is an adapter of that name"),
        ({"calibration": []}, "at least one batch"),
    ):
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            model.merge_experts(**arguments)


@torch.no_grad()
def test_a_merged_adapter_takes_the_trained_head_with_it(tmp_path):
    model = adapt(t.BertForSequenceClassification(family("bert").config), task_type="SEQ_CLS")
    model.base_model.model.classifier.modules_to_save["default"].weight.normal_(std=3)
    inputs = inputs_for(model.base_model.model)
    report = model.merge_experts(new_adapter_name="merged", calibration=[inputs])
    routed = model(**inputs).logits
    model.set_adapter("merged")
    merged = model(**inputs).logits
    error = ((merged - routed).norm() / routed.norm()).item()
    assert report.relative_error_of_output == pytest.approx(error, rel=1e-4)
    model.save_as_lora(tmp_path / "lora")
    state = load_file(tmp_path / "lora/adapter_model.safetensors")
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(state["base_model.model.classifier.weight"], head.weight)


@torch.no_grad()
@pytest.mark.parametrize("change", ["merge", "add"])
def test_on_a_half_precision_base_an_adapter_stays_float32(change):
    model = adapt(family("llama").bfloat16())
    if change == "merge":
        model.merge_experts(new_adapter_name="merged")
    else:
        model.add_experts(1)
    dtypes = {name: value.dtype for name, value in model.state_dict().items() if "mol_" in name}
    assert set(dtypes.values()) == {torch.float32}, dtypes


@torch.no_grad()
def test_a_model_that_takes_no_tokens_is_merged_all_the_same():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model.add_module("mlp", torch.nn.Sequential())
    model.mlp.fc1, model.mlp.fc2 = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
    adapted = get_peft_model(model, MoLConfig(target_modules=["mlp"]))
    report = adapted.merge_experts(new_adapter_name="merged")
    assert report.measured_on is None and report.relative_error_of_output is None
    assert "not measured: no calibration batches were given" in report.to_markdown()


@torch.no_grad()
def test_unmerging_follows_a_model_that_was_moved():
    model = adapt(family("llama"), **ONE)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert next(layer for _, layer in mol_layers(model)).base_layer.up_proj.weight.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_folding_several_routed_experts_says_that_it_is_not_exact_and_runs_nothing(merge):
    model = adapt(family("bert"))
    model.base_model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.warns(
        UserWarning, match=r"4 experts .* is not exact, .* merge_experts\(calibration=...\) measures"
    ) as said:
        merged = getattr(model, merge)()
    assert sum("is not exact" in str(warning.message) for warning in said) == 1
    if merge == "merge_adapter":
        assert all(layer.merged for _, layer in mol_layers(model))
    else:
        assert not list(mol_layers(merged))


PLAIN_PEFT = """
import sys
sys.modules["modernalbert"] = None
import torch
from transformers import AutoModelForSequenceClassification
from peft import PeftModel
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(model, sys.argv[2]).eval()
torch.save(model(input_ids=torch.arange(3, 12).view(1, -1)).logits, sys.argv[3])
"""


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "gpt2"])
def test_a_merged_adapter_is_a_stock_lora_for_people_with_plain_peft(tmp_path, name):
    from transformers import AutoModelForSequenceClassification

    config = family(name).config
    config.pad_token_id = 0
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = adapt(base, task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="call merge_experts first"):
        model.save_as_lora(tmp_path / "lora")
    model.merge_experts("uniform")
    model.save_as_lora(tmp_path / "lora")
    expected = model(input_ids=torch.arange(3, 12).view(1, -1)).logits
    arguments = [str(tmp_path / part) for part in ("base", "lora", "logits.pt")]
    done = subprocess.run([sys.executable, "-c", PLAIN_PEFT, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    with pytest.raises(ValueError, match="is not an empty folder"):
        model.save_as_lora(tmp_path / "lora")


def stock_lora(folder, name: str, targets: list[str], rank: int, seed: int, **changes):
    """A LoRA checkpoint with something in it."""
    torch.manual_seed(5)
    config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, init_lora_weights=False, **changes)
    model = family(name)
    torch.manual_seed(seed)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize(
    "name, targets",
    [
        ("llama", ["gate_proj", "up_proj", "down_proj"]),
        ("gpt2", ["mlp.c_fc", "mlp.c_proj"]),
        ("bert", [r"intermediate.dense", "layer.0.output.dense", "layer.1.output.dense"]),
    ],
)
def test_stock_loras_become_experts_exactly(tmp_path, name, targets):
    folders = [stock_lora(tmp_path / str(rank), name, targets, rank, seed=rank) for rank in (2, 5)]
    torch.manual_seed(5)
    base = family(name)
    inputs = inputs_for(base)
    config = MoLConfig(num_experts=2, num_experts_per_tok=1, router_score="absolute", num_frozen_experts=2)
    model = get_peft_model(base, config).eval()
    model.experts_from_loras(folders)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == len(list(mol_layers(model))) and all("mol_router" in n for n in trained)
    for expert, folder in enumerate(folders):
        torch.manual_seed(5)
        expected = main_output(PeftModel.from_pretrained(family(name), folder)(**inputs))
        for _, layer in mol_layers(model):
            layer.mol_router["default"].weight[expert] *= 1e6  # all tokens to this one
        torch.testing.assert_close(main_output(model(**inputs)), expected, atol=1e-4, rtol=1e-4)
        for _, layer in mol_layers(model):
            layer.mol_router["default"].weight[expert] /= 1e6


@torch.no_grad()
def test_an_untrained_router_sends_tokens_along_an_experts_direction(tmp_path):
    folders = [stock_lora(tmp_path / str(s), "llama", ["gate_proj", "up_proj", "down_proj"], 2, s) for s in (1, 2, 3)]
    config = MoLConfig(num_experts=3, num_experts_per_tok=1, router_score="absolute")
    model = get_peft_model(family("llama"), config)
    model.experts_from_loras(folders)
    layer = next(layer for _, layer in mol_layers(model))
    experts = layer.experts("default")
    for e in range(3):
        delta = experts.B_in[e] @ experts.A_in[e]
        _, _, vh = torch.linalg.svd(delta)
        for sign in (1, -1):
            logits = layer.mol_router["default"](sign * vh[:1])
            assert logits.argmax().item() == e and logits.max() == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_scales_that_differ_by_module_are_those_of_peft(tmp_path):
    pattern = {"layers.1.mlp.gate_proj": 20, r"layers\\.0\\.mlp\\.(up|down)_proj": 40}
    folder = stock_lora(
        tmp_path / "lora", "llama", ["gate_proj", "up_proj", "down_proj"], 2, 0, alpha_pattern=pattern, use_rslora=True
    )
    torch.manual_seed(5)
    base = family("llama")
    inputs = inputs_for(base)
    model = get_peft_model(base, MoLConfig(num_experts=2, num_experts_per_tok=1, router_score="absolute")).eval()
    model.experts_from_loras([folder, folder])
    mixed = model(**inputs).logits
    torch.manual_seed(5)
    expected = PeftModel.from_pretrained(family("llama"), folder)(**inputs).logits
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_an_expert_is_refused(tmp_path):
    lora = stock_lora(tmp_path / "ffn", "llama", ["gate_proj"], 2, 0)
    attention = stock_lora(tmp_path / "attention", "llama", ["q_proj"], 2, 0)
    both = stock_lora(tmp_path / "both", "llama", ["q_proj", "up_proj"], 2, 0)
    model = get_peft_model(family("llama"), MoLConfig(num_experts=2, router_score="absolute"))
    with pytest.raises(ValueError, match="1 LoRAs were given for num_experts=2"):
        model.experts_from_loras([lora])
    with pytest.raises(ValueError, match="not on this model's feed-forward networks, but on .*q_proj"):
        model.experts_from_loras([lora, attention])
    with pytest.warns(UserWarning, match="also adapts 2 modules outside"):
        model.experts_from_loras([lora, both])
    head = stock_lora(tmp_path / "head", "llama", ["gate_proj"], 2, 0, modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="lm_head: modules to save are left out"):
        model.experts_from_loras([lora, head])
    dora = stock_lora(tmp_path / "dora", "llama", ["gate_proj"], 2, 0, use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True"):
        model.experts_from_loras([lora, dora])
    file = lora / "adapter_config.json"
    plain = json.loads(file.read_text())
    for option, value in {
        "init_lora_weights": "pissa",  # peft changes the base where it loads such a LoRA
        "alora_invocation_tokens": [5],
        "trainable_token_indices": [5],
        "bias": "all",
    }.items():
        file.write_text(json.dumps(plain | {"task_type": "CAUSAL_LM", option: value}))
        with pytest.raises(ValueError, match=f"{option}=.*an expert is a plain LoRA"):
            model.experts_from_loras([lora, lora])
    for start in ("gaussian", "eva", True):
        file.write_text(json.dumps(plain | {"init_lora_weights": start, "lora_dropout": 0.1}))
        model.experts_from_loras([lora, lora])
    signed = get_peft_model(family("llama"), MoLConfig(num_experts=2))
    with pytest.raises(ValueError, match="router_score='linear' is not allowed here"):
        signed.experts_from_loras([lora, lora])


def test_added_experts_change_nothing_until_the_router_learns_and_old_ones_never_move(tmp_path):
    model = adapt(family("bert"), num_experts=3)
    inputs = inputs_for(model.base_model.model)
    with torch.no_grad():
        expected = main_output(model(**inputs))
    layer = next(layer for _, layer in mol_layers(model))
    old = [factor.detach().clone() for factor in layer.experts("default")[:4]]
    model.add_experts(2)
    assert model.peft_config["default"].num_experts == 5
    with torch.no_grad():
        torch.testing.assert_close(main_output(model(**inputs)), expected, atol=1e-5, rtol=1e-5)
    model.train()
    labels = torch.tensor([3, 4, 3])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03, weight_decay=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        # Half the signal is the routing, half a target that only experts can reach.
        output = model(**inputs, expert_labels=labels, output_router_logits=True)
        (output.aux_loss + main_output(output).square().mean()).backward()
        optimizer.step()
    for before, after in zip(old, layer.experts("default")[:4]):
        assert torch.equal(after[:3], before)
    usage = layer.mol_usage["default"]
    assert usage[3:].min() > 0.05 and usage.sum() == pytest.approx(1, abs=1e-3)
    assert layer.experts("default").B_in[3:].abs().max() > 0
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = main_output(model(**inputs))
        again = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
        torch.testing.assert_close(main_output(again(**inputs)), expected)
    for arguments, message in (((0,), "number=0 is not allowed"), ((1, "nobody"), "the adapters are 'default'")):
        with pytest.raises(ValueError, match=message):
            again.add_experts(*arguments)
    with pytest.raises(ValueError, match="gives added experts weight at once"):
        adapt(family("bert"), expert_mixing="uniform").add_experts(1)
    with pytest.raises(ValueError, match="has one expert and no router"):
        adapt(family("bert"), **ONE).add_experts(1)
