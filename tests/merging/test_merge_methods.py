# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Merging by what deltas agree on, by chance, and by least squares."""

import numpy as np
import pytest
import torch
from small_models import tiny_model

from modernalbert import (
    ModernALBERTForMaskedLM,
    ModernALBERTForMultipleChoice,
    ModernALBERTForSequenceClassification,
    ModernALBERTModel,
)
from modernalbert.merge_experts import merge_experts
from modernalbert.merging.calibrated import RidgeRegression, merge_calibrated
from modernalbert.merging.ffn_recorder import dense_routing_weights
from modernalbert.merging.methods import MERGE_METHODS, MergeSettings, merge_factors, register_merge_method
from modernalbert.merging.model_experts import ModelExperts
from modernalbert.mol_backends import Experts


def random_experts(num_experts=3, rank=2, hidden_size=7, width=5, scaling=1.5):
    generator = torch.Generator().manual_seed(1)
    shapes = ((rank, hidden_size), (2 * width, rank), (rank, width), (hidden_size, rank))
    factors = [torch.randn(num_experts, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return Experts(*factors, scaling=scaling)


def deltas(experts, first=True):
    A, B = (experts.A_in, experts.B_in) if first else (experts.A_out, experts.B_out)
    return (experts.scaling * B @ A).numpy()


def merged_deltas(result):
    return [(B[0] @ A[0]).numpy() for A, B in (result.expert[:2], result.expert[2:4])]


def ties_by_hand(given, weights, density):
    """Number by number, as the paper's three steps say."""
    kept = []
    for delta in given:
        number = round(density * delta.size)
        smallest = np.sort(np.abs(delta), axis=None)[delta.size - number]
        kept.append(np.where(np.abs(delta) >= smallest, delta, 0))
    result = np.zeros_like(given[0])
    for place in np.ndindex(result.shape):
        values = [delta[place] for delta in kept]
        sign = np.sign(sum(w * value for w, value in zip(weights, values)))
        agreeing = [(w, value) for w, value in zip(weights, values) if value != 0 and np.sign(value) == sign]
        if agreeing:
            result[place] = sum(w * value for w, value in agreeing) * sum(weights) / sum(w for w, _ in agreeing)
    return result


def test_a_method_that_is_registered_later_can_be_chosen(monkeypatch):
    monkeypatch.setitem(MERGE_METHODS, "heaviest", None)  # undone after the test

    @register_merge_method("heaviest")
    def merge_heaviest(experts, weights, settings):
        return MERGE_METHODS["linear"](experts, torch.eye(len(weights)).double()[weights.argmax()], settings)

    model = tiny_model(ModernALBERTModel, std=0.2)
    group, weights = model.config.modulated_groups[0], [0.0] * model.config.num_experts
    weights[:2] = 0.4, 0.6
    report = merge_experts(model, weights=weights, method="heaviest")
    expert = model.groups[group].mlp.experts
    A, B = report.factors[f"groups.{group}.mlp.Wi"]
    torch.testing.assert_close((B @ A).float(), expert.scaling * expert.B_in[1] @ expert.A_in[1])


@pytest.mark.parametrize("density", [1.0, 0.6, 0.2])
def test_ties_trims_elects_and_merges(density):
    experts, weights = random_experts(), [0.5, 0.3, 0.2]
    result = merge_factors("ties", experts, torch.tensor(weights), MergeSettings(rank=5, density=density))
    for merged, first in zip(merged_deltas(result), (True, False)):
        expected = ties_by_hand(deltas(experts, first), weights, density)
        u, s, vh = np.linalg.svd(expected)
        best = u[:, :5] * s[:5] @ vh[:5]  # all of it for the second projection
        np.testing.assert_allclose(merged, best, atol=1e-6)
    assert result.energy_out == pytest.approx(1.0) and 0.5 < result.energy_in < 1


def test_ties_of_experts_that_agree_is_their_average():
    one = random_experts(num_experts=1)
    experts = Experts(*(factor.expand(4, -1, -1) for factor in one[:4]), one.scaling)
    result = merge_factors("ties", experts, torch.tensor([0.4, 0.3, 0.2, 0.1]), MergeSettings(density=1.0))
    for merged, first in zip(merged_deltas(result), (True, False)):
        np.testing.assert_allclose(merged, deltas(one, first)[0], atol=1e-6)
    assert result.expert.A_in.shape == (1, 8, 7)  # E r, padded with zeros where there is no such rank


def test_dare_drops_and_rescales():
    experts = random_experts(num_experts=1, hidden_size=60, width=60)
    for density in (0.5, 0.2):
        result = merge_factors("dare", experts, torch.ones(1), MergeSettings(rank=60, density=density))
        merged, delta = merged_deltas(result)[1], deltas(experts, first=False)[0]
        kept = np.abs(merged) > 1e-9
        np.testing.assert_allclose(merged[kept], delta[kept] / density, atol=1e-9)
        assert kept.mean() == pytest.approx(density, abs=0.03)  # 3,600 numbers: four standard errors
    again = merge_factors("dare", experts, torch.ones(1), MergeSettings(rank=60, density=0.2))
    np.testing.assert_array_equal(merged_deltas(again)[1], merged)


def test_dare_that_drops_nothing_is_linear():
    experts, weights = random_experts(), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    dare = merge_factors("dare", experts, weights, MergeSettings(density=1.0))
    linear = merge_factors("linear", experts, weights, MergeSettings())
    for ours, expected in zip(merged_deltas(dare), merged_deltas(linear)):
        np.testing.assert_allclose(ours, expected, atol=1e-10)


# --- least squares ---------------------------------------------------------------------------------------------------


def batches(count=10, rows=4, length=18, start=0):
    generator = torch.Generator().manual_seed(start)
    return [{"input_ids": torch.randint(3, 96, (rows, length), generator=generator)} for _ in range(count)]


def test_ridge_regression_is_the_best_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, dtype=torch.float64, generator=generator) for n in ((50, 6), (50, 4)))
    A, B = (torch.randn(n, dtype=torch.float64, generator=generator) for n in ((2, 6), (4, 2)))
    regression = RidgeRegression()
    for rows in (slice(0, 20), slice(20, 50)):
        regression.add(x[rows], y[rows])
    strength = 0.3 * x.square().sum(0).mean()  # of sums, where the code has means

    def objective(total):
        return ((x @ (total - B @ A).T - y).square().sum() + strength * (total - B @ A).square().sum()).item()

    # The whole rank: ordinary least squares with a row sqrt(strength) for each input.
    rows = torch.cat([x, strength.sqrt() * torch.eye(6, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(6, 4, dtype=torch.float64)])).solution.T + B @ A
    fit_a, fit_b, energy = regression.solve((A, B), rank=4, ridge=0.3)
    torch.testing.assert_close(fit_b @ fit_a, expected, atol=1e-9, rtol=1e-9)
    assert energy == pytest.approx(1)
    # A smaller rank: no neighbour of that rank is better.
    fit_a, fit_b, energy = regression.solve((A, B), rank=2, ridge=0.3)
    best = objective(fit_b @ fit_a)
    assert fit_a.shape == (2, 6) and 0.3 < energy < 1 and best > objective(expected)
    for scale in (1e-3, 1e-2, 0.1):
        for _ in range(50):
            shift_a, shift_b = (
                scale * torch.randn(n, dtype=torch.float64, generator=generator) for n in ((2, 6), (4, 2))
            )
            assert objective((fit_b + shift_b) @ (fit_a + shift_a)) >= best


def test_calibrated_merge_loses_less_than_the_average_on_other_text():
    model = tiny_model(ModernALBERTForMaskedLM)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text, other = batches(40), batches(10, start=1)
    reports = {}
    for method, weights in (("linear", "calibration"), ("calibrated", None)):
        report = merge_experts(model.train(), weights, method, calibration=text)
        assert model.training and report.rank == 16 and report.folded
        with torch.no_grad():
            states = [(model.eval()(**b).logits, report.model(**b).logits) for b in other]
        reports[method] = report, sum((merged - routed).norm().item() for routed, merged in states)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    (linear, linear_error), (calibrated, error) = reports.values()
    for ours, average in zip(calibrated.layers.values(), linear.layers.values()):
        assert ours.relative_error < 0.95 * average.relative_error
    assert error < 0.95 * linear_error
    assert calibrated.measured_on == "the part of the calibration text that was not fitted to"
    assert linear.measured_on == "the calibration text"


@pytest.mark.parametrize("changes", [{"num_experts": 1}, {"expert_mixing": "ema"}, {"expert_mixing": "uniform"}])
def test_calibrated_merge_is_exact_for_a_model_that_runs_merged(changes):
    model = tiny_model(ModernALBERTForMaskedLM, torch.float64, **changes)
    if changes.get("expert_mixing") == "ema":
        for k in model.config.modulated_groups:
            model.base_model.groups[k].mlp.mol_usage.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    report = merge_experts(model, method="calibrated", calibration=batches(1))
    ids = batches(1, start=3)[0]["input_ids"]
    torch.testing.assert_close(report.model(ids).logits, model(ids).logits, atol=1e-10, rtol=1e-10)
    assert report.measured_on == "the calibration text, to which the experts were fitted"


def test_little_text_does_no_harm():
    model = tiny_model(ModernALBERTForMaskedLM)
    other = batches(10, start=1)
    for text in (batches(1, rows=1, length=8), batches(2, rows=2)):
        linear = merge_experts(model, "calibration", calibration=text, measure_on=other)
        calibrated = merge_experts(model, method="calibrated", calibration=text, measure_on=other)
        assert calibrated.measured_on == "batches of their own"
        for ours, average in zip(calibrated.layers.values(), linear.layers.values()):
            assert ours.relative_error < 1.05 * average.relative_error


def test_errors_are_measured_on_batches_that_were_not_fitted_to():
    model = tiny_model(ModernALBERTForMaskedLM)
    for count, held in ((2, [1]), (4, [3]), (5, [4]), (11, [4, 9])):
        text = batches(count)
        report = merge_experts(model, method="calibrated", calibration=text)
        fitted = [batch for i, batch in enumerate(text) if i not in held]
        same = merge_experts(model, method="calibrated", calibration=fitted, measure_on=[text[i] for i in held])
        for name, layer in report.layers.items():
            assert layer.relative_error == pytest.approx(same.layers[name].relative_error)
        groups = model.config.modulated_groups
        weights = {k: torch.tensor(report.layers[f"model.groups.{k}.mlp"].weights) for k in groups}
        for k, result in merge_calibrated(model, weights, fitted).items():
            torch.testing.assert_close(result.expert.A_in[0], report.factors[f"model.groups.{k}.mlp.Wi"][0])


def test_every_kind_of_batch_and_head():
    ids = batches(1)[0]["input_ids"]
    model = tiny_model(ModernALBERTForMultipleChoice, torch.float64)
    choices = {"input_ids": ids.view(2, 2, 18), "attention_mask": torch.ones(2, 2, 18), "labels": torch.tensor([0, 1])}
    report = merge_experts(model, method="calibrated", calibration=[choices, choices])
    assert report.loss_before is not None and report.layers["model.groups.1.mlp"].relative_error > 0
    model = tiny_model(ModernALBERTModel, torch.float64)
    whole = torch.ones(4, 1, 18, 18, dtype=torch.bool)
    embedded = model.embeddings.tok_embeddings(ids).detach()
    rows = torch.arange(18).repeat(4).view(1, -1)
    expected = ModelExperts(model).measure_usage([{"input_ids": ids}])
    for batch in (
        {"input_ids": ids, "attention_mask": whole},
        {"inputs_embeds": embedded},
        {"input_ids": ids.view(1, -1), "position_ids": rows},  # packed
    ):
        found = ModelExperts(model).measure_usage([batch])
        for k in expected:
            torch.testing.assert_close(found[k], expected[k])
        assert merge_experts(model, method="calibrated", calibration=[batch]).layers["groups.1.mlp"].relative_error > 0


def test_half_precision_is_fitted_in_float32():
    model = tiny_model(ModernALBERTModel)
    text = batches(4)
    expected = merge_experts(model, method="calibrated", calibration=text)
    found = merge_experts(model.to(torch.bfloat16), method="calibrated", calibration=text)
    for ours, group in zip(found.layers.values(), expected.layers.values()):
        assert ours.relative_error == pytest.approx(group.relative_error, rel=0.05)


def test_a_mistake_in_a_batch_leaves_the_mode_and_no_hooks():
    model = tiny_model(ModernALBERTModel).train()
    for action in (
        lambda batch: merge_experts(model, method="calibrated", calibration=[batch]),
        lambda batch: merge_experts(model, "uniform", calibration=[batch]),
    ):
        with pytest.raises(IndexError):
            action({"input_ids": torch.full((1, 4), 10**6)})
        assert model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("changes", [{"mol_positions": "last"}, {"router_per_depth": True}])
def test_calibrated_merge_of_other_forms(changes):
    model = tiny_model(ModernALBERTModel, torch.float64, **changes)
    text = batches(10)
    linear = merge_experts(model, "calibration", calibration=text)
    calibrated = merge_experts(model, method="calibrated", calibration=text)
    for ours, average in zip(calibrated.layers.values(), linear.layers.values()):
        assert ours.relative_error < average.relative_error


def test_padding_changes_no_fit():
    model = tiny_model(ModernALBERTForSequenceClassification, torch.float64)
    (batch,) = batches(1)
    ids = batch["input_ids"]
    mask = (torch.arange(25) < 18).long().expand(4, 25)
    padded = {"input_ids": torch.nn.functional.pad(ids, (0, 7)), "attention_mask": mask}
    alone, with_padding = (merge_experts(model, method="calibrated", calibration=[b]) for b in (batch, padded))
    for path, (A, B) in alone.factors.items():
        padded_A, padded_B = with_padding.factors[path]
        torch.testing.assert_close(padded_B @ padded_A, B @ A, atol=1e-8, rtol=1e-8)


def test_gates_are_what_the_mixture_mixes_with():
    model = tiny_model(ModernALBERTModel, torch.float64)
    mlp = model.groups[1].mlp
    x = torch.randn(9, model.config.hidden_size, dtype=torch.float64)
    gates = dense_routing_weights(mlp, 0, x)
    assert gates.shape == (9, 4) and torch.equal((gates > 0).sum(-1), torch.full((9,), 2))
    outputs = torch.stack([one_expert(mlp, x, e) for e in range(4)], dim=1)
    torch.testing.assert_close((gates.unsqueeze(-1) * outputs).sum(1), mlp(x)[0], atol=1e-10, rtol=1e-10)


def one_expert(mlp, x, e):
    u = mlp.activate(mlp.Wi(x) + mlp.scaling * x @ mlp.mol_A_in[e].T @ mlp.mol_B_in[e].T)
    return mlp.Wo(u) + mlp.scaling * u @ mlp.mol_A_out[e].T @ mlp.mol_B_out[e].T


EMPTY = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": torch.zeros(2, 5, dtype=torch.long)}


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"method": "calibrated"}, "method='calibrated' is not allowed without calibration batches"),
        ({"method": "calibrated", "weights": "ema", "calibration": batches(1)}, "weights is not allowed with"),
        ({"method": "calibrated", "density": 0.5, "calibration": batches(1)}, "density is not allowed with"),
        ({"method": "calibrated", "rank": 999, "calibration": batches(1)}, "rank=999.*from 1 to 32"),
        ({"method": "calibrated", "calibration": [EMPTY]}, "without tokens"),
        ({"weights": "calibrated", "calibration": batches(1)}, "weights='calibrated'.*'uniform', 'ema', 'calibration'"),
        ({"method": "ties", "rank": 0}, "rank=0.*from 1 to"),
        ({"method": "ties", "density": 0}, "density=0.*above 0 and at most 1"),
        ({"method": "dare", "density": 1.5}, "density=1.5"),
        ({"density": 0.5}, "density=0.5 is not allowed with method='linear': it is for 'ties' or 'dare'"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        merge_experts(tiny_model(ModernALBERTModel), **arguments)
