# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Merging: exact where it can be, measured where it cannot, and served by people who have none of this code."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import (
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from small_models import run_command, tiny_model

from modernalbert import (
    ModernALBERTForMaskedLM,
    ModernALBERTForSequenceClassification,
    ModernALBERTForTokenClassification,
    ModernALBERTModel,
)
from modernalbert.merge_experts import command as merge_command
from modernalbert.merge_experts import merge_experts
from modernalbert.merging.methods import truncate_product


IDS = torch.arange(3, 39).view(2, 18)


def set_usage(model, usage=(0.4, 0.3, 0.2, 0.1)):
    for k in model.config.modulated_groups:
        model.base_model.groups[k].mlp.mol_usage.copy_(torch.tensor(usage))
    return model


def delta(mlp, weights, first: bool):
    A, B = (mlp.mol_A_in, mlp.mol_B_in) if first else (mlp.mol_A_out, mlp.mol_B_out)
    return sum(w * mlp.scaling * b @ a for w, b, a in zip(weights, B.double(), A.double()))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_one_expert_merges_exactly(dtype, tolerance):
    model = tiny_model(ModernALBERTForMaskedLM, dtype, num_experts=1)
    report = merge_experts(model, "uniform")
    torch.testing.assert_close(report.model(IDS).logits, model(IDS).logits, atol=tolerance, rtol=tolerance)
    assert report.model.config.ffn_modulation == "none" and report.rank == 4
    assert report.relative_error_of_output < 1e-5


@pytest.mark.parametrize("weights", ["ema", "uniform", [0.7, 0.1, 0.1, 0.1]])
def test_linear_is_the_weighted_sum_of_deltas(weights):
    model = set_usage(tiny_model(ModernALBERTForMaskedLM))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = merge_experts(model, weights)
    w = (
        {"ema": [0.4, 0.3, 0.2, 0.1], "uniform": [0.25] * 4}.get(weights, weights)
        if isinstance(weights, str)
        else weights
    )
    for k in (1, 2):
        ours, folded = model.model.groups[k].mlp, report.model.model.groups[k].mlp
        for first, layer, merged in ((True, ours.Wi, folded.Wi), (False, ours.Wo, folded.Wo)):
            expected = layer.weight.double() + delta(ours, w, first)
            torch.testing.assert_close(merged.weight.double(), expected, atol=1e-6, rtol=1e-6)
    assert report.layers["model.groups.1.mlp"].relative_error > 0.01  # routing depended on the token
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert merge_experts(model.train(), weights).model is not model and model.training
    assert not report.model.training and report.parameters_after < report.parameters_before


@pytest.mark.parametrize("mixing", ["ema", "uniform"])
def test_linear_is_exact_for_a_model_that_ran_merged(mixing):
    model = set_usage(tiny_model(ModernALBERTForMaskedLM, torch.float64, expert_mixing=mixing))
    report = merge_experts(model, mixing)
    torch.testing.assert_close(report.model(IDS).logits, model(IDS).logits, atol=1e-10, rtol=1e-10)
    assert report.relative_error_of_output < 1e-10


def test_svd_keeps_the_energy_it_says():
    model = set_usage(tiny_model(ModernALBERTForMaskedLM, torch.float64))
    report = merge_experts(model, "ema", method="svd", rank=5)
    mlp, (A, B) = model.model.groups[2].mlp, report.factors["model.groups.2.mlp.Wi"]
    full = delta(mlp, [0.4, 0.3, 0.2, 0.1], first=True)
    u, s, vh = torch.linalg.svd(full)
    best = u[:, :5] * s[:5] @ vh[:5]
    torch.testing.assert_close(B @ A, best, atol=1e-6, rtol=1e-6)
    energy = (s[:5].square().sum() / s.square().sum()).item()
    assert report.layers["model.groups.2.mlp"].energy_kept_in == pytest.approx(energy, abs=1e-6)
    assert 0.2 < energy < 1
    exact = merge_experts(model, "ema", method="svd", rank=16)
    linear = merge_experts(model, "ema")
    torch.testing.assert_close(exact.model(IDS).logits, linear.model(IDS).logits, atol=1e-8, rtol=1e-8)


def test_truncating_zero_and_narrow_products():
    A, B = torch.zeros(8, 5), torch.zeros(6, 8)
    small_a, small_b, energy = truncate_product(A, B, 3)
    assert energy == 1.0 and (small_b @ small_a).abs().max() == 0
    A, B = torch.randn(8, 5, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    small_a, small_b, energy = truncate_product(A, B, 7)  # the product has rank 5 at most
    torch.testing.assert_close(small_b @ small_a, B @ A)
    assert energy == pytest.approx(1.0)


def test_calibration_weights_are_the_mean_routing_on_the_text():
    model = tiny_model(ModernALBERTForSequenceClassification)
    batches = [
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.tensor([0, 1])},
        {
            "input_ids": IDS[:1, :7] + 40,
            "attention_mask": torch.tensor([[1] * 5 + [0] * 2]),
            "labels": torch.tensor([1]),
        },
    ]
    report = merge_experts(model, "calibration", calibration=batches)
    total, tokens = torch.zeros(4), 0
    from modernalbert.modeling_mol import route
    from modernalbert.mol_backends import expert_mask

    for batch in batches:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        for logits in model(**inputs, output_router_logits=True).router_logits[:2]:  # the uses of group 1
            _, q, experts = route(logits[batch["attention_mask"].bool()], 2)
            total += (expert_mask(experts, 4) * q.unsqueeze(-1)).sum((0, 1))
            tokens += len(q)
    torch.testing.assert_close(
        torch.tensor(report.layers["model.groups.1.mlp"].weights), total / tokens, atol=1e-5, rtol=1e-5
    )
    with torch.no_grad():
        before = sum(model(**batch).loss.item() for batch in batches) / 2
        after = sum(report.model(**batch).loss.item() for batch in batches) / 2
    assert report.loss_before == pytest.approx(before) and report.loss_after == pytest.approx(after)


def test_padding_does_not_count_in_the_measured_errors():
    model = set_usage(tiny_model(ModernALBERTForMaskedLM, torch.float64))
    padded = torch.nn.functional.pad(IDS, (0, 9))
    mask = (torch.arange(27) < 18).long().expand(2, 27)
    reports = [
        merge_experts(model, "ema", calibration=[batch])
        for batch in ({"input_ids": IDS}, {"input_ids": padded, "attention_mask": mask})
    ]
    alone, with_padding = reports
    assert with_padding.relative_error_of_output == pytest.approx(alone.relative_error_of_output, abs=1e-9)
    for a, b in zip(alone.layers.values(), with_padding.layers.values()):
        assert b.relative_error == pytest.approx(a.relative_error, abs=1e-9)
        assert b.relative_error_of_experts == pytest.approx(a.relative_error_of_experts, abs=1e-9)


def test_a_float64_model_merges_in_float64():
    model = tiny_model(ModernALBERTForMaskedLM, torch.float64, expert_mixing="uniform")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-9)  # nothing float32 could hold
    report = merge_experts(model, "uniform")
    torch.testing.assert_close(report.model(IDS).logits, model(IDS).logits, atol=1e-11, rtol=1e-11)


def test_last_position_keeps_one_expert_without_a_router(tmp_path):
    model = set_usage(tiny_model(ModernALBERTForMaskedLM, torch.float64, mol_positions="last", expert_mixing="ema"))
    report = merge_experts(model, "ema")
    assert report.model.config.num_experts == 1 and report.base is None and "mol_positions='last'" in report.notes[0]
    torch.testing.assert_close(report.model(IDS).logits, model(IDS).logits, atol=1e-10, rtol=1e-10)
    report.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["folded", "merge_report.json", "merge_report.md"]
    with pytest.raises(ValueError, match="save='adapter' is not allowed"):
        report.save(tmp_path / "out2", save="adapter")


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"weights": "mean"}, "weights='mean'.*'uniform', 'ema', 'calibration'"),
        ({"weights": [0.5, 0.5]}, "4 finite numbers"),
        ({"weights": [0.5, 0.5, 0.0, float("nan")]}, "4 finite numbers"),
        ({"method": "average"}, "method='average'.*'linear', 'svd'"),
        ({"rank": 3}, "rank=3.*16"),
        ({"method": "svd", "rank": 17}, "rank=17.*1 to 16"),
        ({"weights": "calibration"}, "without calibration batches"),
        ({"calibration": []}, "at least one batch"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        merge_experts(tiny_model(ModernALBERTModel), **arguments)


def test_stock_lora_on_every_linear_layer_trains():
    model = get_peft_model(tiny_model(ModernALBERTForMaskedLM), LoraConfig(r=2, target_modules="all-linear"))
    model.train()(IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert any("attn.Wqkv.lora_B" in name for name in trained) and not any("embeddings" in name for name in trained)


def test_only_a_mixture_of_loras_can_be_merged():
    with pytest.raises(ValueError, match="ffn_modulation='moa' of ModernALBERTModel is not allowed"):
        merge_experts(tiny_model(ModernALBERTModel, ffn_modulation="moa"))


STRANGER = """
import json, sys
sys.modules["modernalbert"] = None  # an import of it fails
import torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM

torch.manual_seed(0)
ids = torch.arange(3, 39).view(2, 18)
folder = sys.argv[1]
base = AutoModelForMaskedLM.from_pretrained(folder + "/base", trust_remote_code=True).eval()
plain = base(ids).logits
adapted = PeftModel.from_pretrained(base, folder + "/adapter").eval()(ids).logits
folded = AutoModelForMaskedLM.from_pretrained(folder + "/folded", trust_remote_code=True).eval()(ids).logits
torch.save({"plain": plain, "adapted": adapted, "folded": folded}, folder + "/logits.pt")
"""


def test_stock_peft_serves_the_adapter_where_the_package_cannot_be_imported(tmp_path):
    model = set_usage(tiny_model(ModernALBERTForMaskedLM))
    report = merge_experts(model, "ema")
    report.save(tmp_path / "merged")
    written = json.loads((tmp_path / "merged/adapter/adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and written["auto_mapping"] is None
    assert set(written["target_modules"]) == {f"model.groups.{k}.mlp.{n}" for k in (1, 2) for n in ("Wi", "Wo")}
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "merged")], check=True, env=environment, cwd=tmp_path
    )
    logits = torch.load(tmp_path / "merged/logits.pt")
    expected = report.model(IDS).logits
    torch.testing.assert_close(logits["folded"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits["adapted"], logits["folded"], atol=1e-5, rtol=1e-5)
    assert (logits["plain"] - logits["folded"]).abs().max() > 0.01
    report_file = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert report_file["layers"]["model.groups.1.mlp"]["relative_error"] > 0 and report_file["rank"] == 16


@pytest.mark.parametrize(
    "model_class, auto_class",
    [
        (ModernALBERTForSequenceClassification, AutoPeftModelForSequenceClassification),
        (ModernALBERTForTokenClassification, AutoPeftModelForTokenClassification),
        (ModernALBERTModel, AutoPeftModelForFeatureExtraction),
    ],
)
def test_pefts_auto_classes_find_the_base_from_anywhere(model_class, auto_class, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = merge_experts(tiny_model(model_class), "uniform")
    report.save("merged")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    adapted = auto_class.from_pretrained(tmp_path / "merged" / "adapter").eval()
    torch.testing.assert_close(adapted(input_ids=IDS)[0], report.model(IDS)[0], atol=1e-5, rtol=1e-5)


def test_command_line(tmp_path, nano_tokenizer, monkeypatch, capsys):
    model = set_usage(tiny_model(ModernALBERTForMaskedLM, vocab_size=30522, pad_token_id=0))
    model.save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The film was a delight from start to end.\nNobody laughed once.\n" * 3)
    places = ("--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "out")
    how = ("--weights", "0.4,0.3,0.2,0.1", "--calibration_file", tmp_path / "text.txt")
    code, output, error = run_command(monkeypatch, capsys, merge_command, *places, *how)
    assert code == 0 and "Relative errors" in output, error
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert report["layers"]["model.groups.1.mlp"]["weights"] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert report["loss_before"] != report["loss_after"] and report["latency_ms"]["merged"] > 0
    assert report["measured_on"] == "the calibration text"
    assert (tmp_path / "out/folded/tokenizer.json").is_file()
    state = load_file(tmp_path / "out/folded/model.safetensors")
    assert not any("mol_" in name for name in state)
    code, _, _ = run_command(monkeypatch, capsys, merge_command, *places, "--save", "folded")
    assert code == 0 and not (tmp_path / "out/adapter").exists()
    how = ("--method", "calibrated", "--calibration_file", tmp_path / "text.txt", "--rank", "6")
    code, _, error = run_command(monkeypatch, capsys, merge_command, *places, *how)
    assert code == 0, error
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert (report["method"], report["weights"], report["rank"]) == ("calibrated", "calibration", 6)


def test_a_half_precision_model_is_merged_in_float32_and_saved_as_it_was(tmp_path, nano_tokenizer, monkeypatch, capsys):
    model = set_usage(tiny_model(ModernALBERTForMaskedLM, vocab_size=30522, pad_token_id=0)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    places = ("--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "out")
    code, _, error = run_command(monkeypatch, capsys, merge_command, *places, "--weights", "0.4,0.3,0.2,0.1")
    assert code == 0, error
    state = load_file(tmp_path / "out/folded/model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    expected = merge_experts(model.float(), [0.4, 0.3, 0.2, 0.1])
    weight = expected.model.model.groups[1].mlp.Wi.weight
    assert torch.equal(state["model.groups.1.mlp.Wi.weight"], weight.bfloat16())
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert report["relative_error_of_output"] == pytest.approx(expected.relative_error_of_output, rel=1e-4)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--model_name_or_path", "{tmp}/nothing"], "nothing: cannot be loaded"),
        (["--weights", "mean"], "--weights mean is not allowed"),
        (["--weights", "0.5,0.5"], "4 finite numbers"),
        (["--method", "x"], "--method x is not allowed: it must be one of linear, svd, ties, dare, calibrated"),
        (["--method", "calibrated"], "--method calibrated needs --calibration_file"),
        (["--method", "ties", "--density", "2"], "density=2.0 is not allowed"),
        (["--save", "x"], "--save x is not allowed"),
        (["--output_dir", "{tmp}/full"], "is not empty"),
        (["--output_dir", "{tmp}/file"], "is a file"),
        (["--push_to_hub"], "needs --hub_model_id"),
        (["--calibration_file", "{tmp}/none.txt"], "has none"),
        (["--model_name_or_path", "{tmp}/moa"], "ffn_modulation='moa'"),
    ],
)
def test_command_line_mistakes(tmp_path, arguments, said, monkeypatch, capsys):
    tiny_model(ModernALBERTModel).save_pretrained(tmp_path / "model")
    tiny_model(ModernALBERTModel, ffn_modulation="moa").save_pretrained(tmp_path / "moa")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    (tmp_path / "file").write_text("")
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    for flag, default in (("--model_name_or_path", tmp_path / "model"), ("--output_dir", tmp_path / "out")):
        if flag not in arguments:
            arguments += [flag, str(default)]
    code, _, error = run_command(monkeypatch, capsys, merge_command, *arguments)
    assert code == 2 and said in error, error
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["file", "full", "moa", "model"]
