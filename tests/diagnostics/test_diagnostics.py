# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The routing report says what the routers did, token by token, and how far experts are from each other."""

import json
import math

import numpy as np
import pytest
import torch
from small_models import run_command, tiny_model

from modernalbert import ModernALBERTForMaskedLM, ModernALBERTForSequenceClassification, ModernALBERTModel
from modernalbert.cli.errors import run
from modernalbert.diagnostics import RoutingReport
from modernalbert.diagnostics.__main__ import main
from modernalbert.diagnostics.routing_report import describe_experts
from modernalbert.modeling_mol import route, summarise_routing


IDS = torch.arange(3, 39).view(2, 18)
PADDED = {
    "input_ids": torch.nn.functional.pad(IDS, (0, 5)),
    "attention_mask": (torch.arange(23) < 18).long().expand(2, 23),
}


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0) / math.log(4)


def test_figures_are_those_of_the_tokens_one_by_one():
    model = tiny_model(ModernALBERTForMaskedLM, torch.float64)
    more = {"input_ids": IDS[:1, :7] + 40}
    report = RoutingReport.measure(model.train(), [PADDED, more])
    assert model.training and report.num_tokens == 36 + 7
    assert [(use.layer, use.group) for use in report.layers] == [(2, 1), (3, 1), (4, 2), (5, 2)]
    model.eval()
    with torch.no_grad():
        runs = [model(input_ids=ids, output_router_logits=True).router_logits for ids in (IDS, more["input_ids"])]
    for i, use in enumerate(report.layers):
        logits = torch.cat([logits[i].flatten(0, -2) for logits in runs])
        usage, slots, together, own = np.zeros(4), np.zeros(4), np.zeros((4, 4)), []
        probabilities, q, experts = route(logits, 2)
        for weights, chosen in zip(q.tolist(), experts.tolist()):
            for weight, e in zip(weights, chosen):
                usage[e] += weight / len(q)
                slots[e] += 1 / (2 * len(q))
                for other in chosen:
                    together[e, other] += 1 / len(q)
            own.append(entropy(weights))
        np.testing.assert_allclose(use.usage, usage, atol=1e-9)
        np.testing.assert_allclose(use.slots, slots, atol=1e-9)
        np.testing.assert_allclose(use.chosen_together, together, atol=1e-9)
        assert use.usage_entropy == pytest.approx(entropy(usage))
        assert use.token_dependence == pytest.approx(entropy(usage) - np.mean(own))
        assert use.probability_entropy == pytest.approx(np.mean([entropy(p) for p in probabilities.tolist()]))
        assert use.balance_loss == pytest.approx(summarise_routing((logits,), 2).balance_loss.item())
        assert 0 < use.token_dependence < use.usage_entropy < 1


def test_packed_and_padded_rows_are_the_same_text():
    model = tiny_model(ModernALBERTModel, torch.float64)
    packed = {"input_ids": IDS.view(1, -1), "position_ids": torch.arange(18).repeat(2).view(1, -1)}
    padded, packed = (RoutingReport.measure(model, [batch]) for batch in (PADDED, packed))
    for ours, expected in zip(packed.layers, padded.layers):
        np.testing.assert_allclose(ours.usage, expected.usage, atol=1e-9)
        assert ours.token_dependence == pytest.approx(expected.token_dependence)


def test_a_router_that_sees_no_difference_depends_on_no_token():
    model = tiny_model(ModernALBERTModel)
    with torch.no_grad():
        for k in model.config.modulated_groups:
            model.groups[k].mlp.mol_router.weight.zero_()
    report = RoutingReport.measure(model, [{"input_ids": IDS}])
    for use in report.layers:
        assert use.token_dependence == pytest.approx(0, abs=1e-6) and use.probability_entropy == pytest.approx(1)
    # Two experts have everything, the other two nothing, in each of four layers.
    assert len(report.idle_experts) == 8
    assert "in layer 5" in report.to_markdown()


def test_experts_are_compared_by_their_deltas():
    mlp = tiny_model(ModernALBERTModel, torch.float64).groups[2].mlp
    with torch.no_grad():
        for factor in (mlp.mol_B_in, mlp.mol_B_out):
            factor[3] = -2 * factor[1]
        for factor in (mlp.mol_A_in, mlp.mol_A_out):
            factor[3] = factor[1]
        mlp.mol_B_in[2] = mlp.mol_B_out[2] = 0
    _, cosines, norms = describe_experts(mlp)
    flat = [
        torch.cat(
            [
                (mlp.scaling * mlp.mol_B_in[e] @ mlp.mol_A_in[e]).flatten(),
                (mlp.scaling * mlp.mol_B_out[e] @ mlp.mol_A_out[e]).flatten(),
            ]
        )
        for e in range(4)
    ]
    shared = torch.cat([mlp.Wi.weight.flatten(), mlp.Wo.weight.flatten()]).norm()
    np.testing.assert_allclose(norms, [(delta.norm() / shared).item() for delta in flat], rtol=1e-9)
    expected = torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0).item()
    assert cosines[0][1] == pytest.approx(expected) and cosines[1][3] == pytest.approx(-1)
    assert cosines[2] == [0, 0, 0, 0] and cosines[0][0] == pytest.approx(1)


def test_an_experts_tokens_are_those_that_weigh_most_for_it(nano_tokenizer):
    model = tiny_model(ModernALBERTForSequenceClassification, vocab_size=30522, pad_token_id=0)
    ids = torch.tensor([[2100, 3200, 2100, 4300] * 5, [3200] * 4 + [4300] * 4 + [2100] * 2 + [5400] * 4 + [2100] * 6])
    report = RoutingReport.measure(model, [{"input_ids": ids}], nano_tokenizer)
    with torch.no_grad():
        logits = model(input_ids=ids, output_router_logits=True).router_logits[2:]  # of group 2
    weights = {token: np.zeros(4) for token in (2100, 3200, 4300)}  # 5400 stands there four times only
    for layer in logits:
        _, q, experts = route(layer, 2)
        for token in weights:
            at = ids == token
            for gate, chosen in zip(q[at].flatten().tolist(), experts[at].flatten().tolist()):
                weights[token][chosen] += gate / (2 * at.sum().item())
    for e, tokens in enumerate(report.groups[1].tokens):
        expected = sorted(weights, key=lambda token: -weights[token][e])
        assert sorted(name for name, _ in tokens) == sorted(nano_tokenizer.convert_ids_to_tokens(expected))
        np.testing.assert_allclose([share for _, share in tokens], [weights[token][e] for token in expected], atol=1e-6)


def test_it_is_written_whole(tmp_path):
    report = RoutingReport.measure(tiny_model(ModernALBERTModel, router_per_depth=True), [PADDED], measured_on="a | b")
    report.save(tmp_path / "report")
    written = json.loads((tmp_path / "report/routing_report.json").read_text())
    assert written["layers"][0]["usage"] == report.layers[0].usage and written["idle_experts"] == []
    assert RoutingReport.from_dict(written) == report
    assert (tmp_path / "report/routing_report.png").stat().st_size > 10_000
    text = (tmp_path / "report/routing_report.md").read_text()
    assert text.startswith("## Routing\n") and "36 tokens of a | b; 4 experts, 2 per token" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == (1 + 4) + (1 + 8)


@pytest.mark.parametrize(
    "changes, batches, said",
    [
        ({"ffn_modulation": "moa"}, [PADDED], "ffn_modulation='moa', .* is not allowed"),
        ({"num_experts": 1, "num_experts_per_tok": 1}, [PADDED], "num_experts=1 is not allowed"),
        ({"expert_mixing": "ema"}, [PADDED], "expert_mixing='ema', .* is not allowed"),
        ({}, [], "without tokens"),
        ({}, [PADDED | {"attention_mask": torch.zeros(2, 23)}], "without tokens"),
    ],
)
def test_what_has_no_report(changes, batches, said):
    with pytest.raises(ValueError, match=said):
        RoutingReport.measure(tiny_model(ModernALBERTModel, **changes), batches)


def command():
    run(main)


def test_command_line(tmp_path, nano_tokenizer, monkeypatch, capsys):
    tiny_model(ModernALBERTForMaskedLM, vocab_size=30522, pad_token_id=0).to(torch.bfloat16).save_pretrained(
        tmp_path / "model"
    )
    nano_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The film was a delight from start to end.\nNobody laughed once.\n" * 3)
    tiny_model(ModernALBERTModel, ffn_modulation="none").save_pretrained(tmp_path / "plain")
    nano_tokenizer.save_pretrained(tmp_path / "plain")
    given = {"model_name_or_path": "model", "text_file": "text.txt", "output_dir": "out"}

    def call(**changes):
        words = [word for name, value in (given | changes).items() for word in (f"--{name}", tmp_path / value)]
        return run_command(monkeypatch, capsys, command, *words)

    code, output, error = call()
    assert code == 0 and "tokens of text.txt" in output, error
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "routing_report.json",
        "routing_report.md",
        "routing_report.png",
    ]
    for changes, said in (
        ({"text_file": "none.txt"}, "none.txt: no such file"),
        ({"model_name_or_path": "plain"}, "ffn_modulation='none'"),
        ({"output_dir": "model"}, "is not empty"),
    ):
        code, _, error = call(**changes)
        assert code == 2 and said in error, error
