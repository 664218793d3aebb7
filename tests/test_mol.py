# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The mathematics of the mixture: every backend is the definition, and the re-association is exact."""

import copy
import logging

import pytest
import torch
from small_models import randomise, tiny_config, tiny_model

from modernalbert import ModernALBERTForMaskedLM, ModernALBERTModel, mol_backends
from modernalbert.modeling_mol import MoAFeedForward, MoLFeedForward, route, summarise_routing
from modernalbert.mol_backends import (
    CPU_TOKEN_BLOCK,
    FFN,
    MOL_BACKENDS,
    DropoutMasks,
    Experts,
    concatenate_experts,
    expert_mask,
    select_mol_backend,
)
from modernalbert.mol_grouped import ROWS


FAST_BACKENDS = sorted(set(MOL_BACKENDS) - {"reference", "triton"})  # whose kernels have a file of their own


def mol_ffn(backend: str = "reference", feed_forward=MoLFeedForward, **changes):
    """A float64 FFN of the last group with noise everywhere."""
    config = tiny_config(mol_backend=backend, **changes)
    return randomise(feed_forward(config, config.num_groups - 1)).double()


def with_gradients(module, x):
    x = x.clone().requires_grad_()
    output, _ = module(x)
    output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return output.detach(), x.grad, gradients


def definition(mol, x, k):
    """Sum over the chosen experts of q_e (W_o + s B_out A_out) u_e, one token and one expert at a time."""
    output = torch.zeros_like(x)
    for t, token in enumerate(x):
        p = (mol.mol_router.weight @ token).softmax(dim=0)
        best = p.argsort(descending=True)[:k]
        for e in best:
            q = p[e] / p[best].sum()
            h = (mol.Wi.weight + mol.scaling * mol.mol_B_in[e] @ mol.mol_A_in[e]) @ token
            f = mol.width
            u = torch.nn.functional.gelu(h[:f]) * h[f:]
            output[t] += q * (mol.Wo.weight + mol.scaling * mol.mol_B_out[e] @ mol.mol_A_out[e]) @ u
    return output


@pytest.mark.parametrize("tokens", [11, 4 * ROWS + 7])  # more than any backend takes at once
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_backend_is_the_definition(backend, k, tokens):
    mol = mol_ffn(backend, num_experts_per_tok=k).eval()
    x = torch.randn(tokens, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mol(x)[0], definition(mol, x, k), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("tokens", [13, CPU_TOKEN_BLOCK + 7])
def test_backends_agree_forward_and_backward(backend, k, dropout, tokens):
    changes = {"num_experts_per_tok": k, "mlp_dropout": dropout, "lora_dropout": dropout, "mlp_bias": True}
    x = torch.randn(tokens, 32, dtype=torch.float64)
    results = []
    for name in ("reference", backend):
        torch.manual_seed(1)  # the same dropout masks and jitter
        results.append(with_gradients(mol_ffn(name, **changes).train(), x))
    (expected, expected_x, expected_grads), (actual, actual_x, actual_grads) = results
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(actual_x, expected_x, atol=1e-10, rtol=1e-9)
    for name, gradient in expected_grads.items():
        torch.testing.assert_close(actual_grads[name], gradient, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("backend", ["auto", *FAST_BACKENDS])
def test_an_activation_with_weights_gets_their_gradient(backend, caplog):
    x = torch.randn(300, 32, dtype=torch.float64)
    _, _, expected = with_gradients(mol_ffn("reference", hidden_activation="prelu").eval(), x)
    mol = mol_ffn(backend, hidden_activation="prelu").eval()
    (_, _, actual), said = warnings_of(caplog, lambda: with_gradients(mol, x))
    assert expected["act.weight"].abs() > 1e-3
    torch.testing.assert_close(actual["act.weight"], expected["act.weight"], atol=1e-9, rtol=1e-9)
    assert ("its activation has weights" in said) == (backend == "grouped")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_backends_agree_in_bfloat16(backend, autocast):
    x = torch.randn(64, 32)
    expected = with_gradients(mol_ffn("reference").float().train(), x)
    mol = mol_ffn(backend).float().train()
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = with_gradients(mol, x)
    else:
        actual = with_gradients(mol.bfloat16(), x.bfloat16())
    # A token near a tie of the router may go elsewhere in half precision: most agree.
    error = (actual[0].float() - expected[0]).norm(dim=-1) / expected[0].norm(dim=-1)
    assert error.quantile(0.9) < 0.03
    gradient, exact = actual[2]["mol_B_in"].float(), expected[2]["mol_B_in"]
    assert (gradient - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("in_half", [False, True])
def test_grouped_agrees_whether_the_processor_multiplies_in_bfloat16_or_not(in_half, monkeypatch):
    x = torch.randn(2 * ROWS, 32)
    _, expected_x, expected = with_gradients(mol_ffn("reference").float().eval(), x.bfloat16().float())
    monkeypatch.setattr("modernalbert.mol_grouped.multiplies_in", lambda dtype: in_half)
    _, actual_x, actual = with_gradients(mol_ffn("grouped").bfloat16().eval(), x.bfloat16())
    assert (actual_x.float() - expected_x).norm() / expected_x.norm() < 0.1
    for name in ("mol_A_in", "mol_B_in", "mol_A_out", "mol_B_out"):
        assert (actual[name].float() - expected[name]).norm() / expected[name].norm() < 0.1, name


def test_auto_can_be_transformed():
    mol = mol_ffn("auto").eval()
    x = torch.randn(256, 32, dtype=torch.float64)
    expected = x.clone().requires_grad_()
    mol(expected)[0].square().sum().backward()
    actual = torch.func.grad(lambda x: mol(x)[0].square().sum())(x)
    torch.testing.assert_close(actual, expected.grad, atol=1e-9, rtol=1e-9)


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    mol = mol_ffn("grouped", num_experts_per_tok=1).train()
    with torch.no_grad():
        mol.mol_router.weight[1:].mul_(0)
    x = mol.mol_router.weight[:1].detach().expand(6, -1) * torch.linspace(1, 2, 6, dtype=torch.float64)[:, None]
    _, _, gradients = with_gradients(mol, x)
    assert gradients["mol_A_in"][0].abs().sum() > 0
    for name in ("mol_A_in", "mol_B_in", "mol_A_out", "mol_B_out"):
        assert torch.equal(gradients[name][1:], torch.zeros_like(gradients[name][1:]))


def test_which_backend_auto_chooses():
    def chosen(name, x):
        experts = Experts(torch.empty(4, 1, 8), None, None, None, 1.0)
        function = select_mol_backend(name, x, FFN(None, None, None), experts, DropoutMasks())
        return next(name for name, backend in MOL_BACKENDS.items() if backend.function is function)

    few, many = torch.empty(255, 8), torch.empty(256, 8)
    assert chosen("auto", few) == "masked"
    assert chosen("auto", many) == "grouped"
    assert chosen("auto", many.to("meta")) == "masked"
    assert chosen("masked", many) == "masked"


@pytest.mark.parametrize("in_half", [False, True])
def test_auto_stacks_in_half_precision_training_of_narrow_experts(in_half, monkeypatch):
    monkeypatch.setattr("modernalbert.mol_backends.multiplies_in", lambda dtype: in_half or dtype == torch.float32)
    x, masks = torch.empty(64, 8), DropoutMasks()

    def chosen(activation="gelu", rank=2, masks=masks, autocast=True):
        experts = Experts(torch.empty(4, rank, 8), None, None, None, 1.0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            function = select_mol_backend("auto", x, FFN(None, None, None, activation), experts, masks)
        return function is MOL_BACKENDS["stacked"].function

    assert chosen() == in_half
    assert not chosen(autocast=False)
    assert not chosen(rank=3)  # all ranks together are wider than the model
    assert not chosen(activation="gelu_new")
    assert not chosen(masks=DropoutMasks(ffn=torch.ones(64, 8)))
    with torch.no_grad():
        assert not chosen()


@pytest.mark.parametrize("changes", [{"hidden_activation": "relu"}, {"mlp_dropout": 0.1}])
def test_stacked_gives_way_to_masked_and_says_so(changes, caplog):
    x = torch.randn(9, 32, dtype=torch.float64)
    mol = mol_ffn("stacked", **changes).train()
    _, said = warnings_of(caplog, lambda: mol(x))
    assert "mol_backend='stacked' is not used, because it" in said


def test_stacked_serves_silu():
    x = torch.randn(40, 32, dtype=torch.float64)
    changes = {"hidden_activation": "silu"}
    expected = with_gradients(mol_ffn("reference", **changes).eval(), x)
    actual = with_gradients(mol_ffn("stacked", **changes).eval(), x)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


def warnings_of(caplog, function) -> tuple[object, str]:
    """A function's result, and what the library's log said meanwhile."""
    mol_backends.logger.warning_once.cache_clear()  # said once in a process, and another test may have
    library = logging.getLogger("modernalbert")
    library.addHandler(caplog.handler)
    try:
        return function(), " ".join(record.message for record in caplog.records)
    finally:
        library.removeHandler(caplog.handler)


def test_grouped_gives_way_while_tracing_and_says_so(caplog):
    mol = mol_ffn("grouped").eval()
    x = torch.randn(40, 32, dtype=torch.float64)
    compiled, said = warnings_of(caplog, lambda: torch.compile(mol, fullgraph=True, backend="eager")(x)[0])
    torch.testing.assert_close(compiled, mol(x)[0], atol=1e-10, rtol=1e-10)
    assert "mol_backend='grouped' is not used, because it cannot be traced or transformed" in said


def test_triton_gives_way_on_the_cpu_and_says_so(caplog):
    mol = mol_ffn("triton").eval()
    x = torch.randn(40, 32, dtype=torch.float64)
    output, said = warnings_of(caplog, lambda: mol(x)[0])
    assert torch.equal(output, mol_ffn("masked").eval()(x)[0])
    assert "mol_backend='triton' is not used, because" in said


@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_permuting_experts_changes_nothing(backend):
    mol = mol_ffn(backend).eval()
    x = torch.randn(11, 32, dtype=torch.float64)
    permuted, order = copy.deepcopy(mol), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in (permuted.mol_A_in, permuted.mol_B_in, permuted.mol_A_out, permuted.mol_B_out):
            parameter.copy_(parameter[order])
        permuted.mol_router.weight.copy_(mol.mol_router.weight[order])
        torch.testing.assert_close(permuted(x)[0], mol(x)[0], atol=1e-10, rtol=1e-10)


def test_all_experts_chosen_is_the_dense_sum():
    mol = mol_ffn("masked", num_experts_per_tok=4).eval()
    x = torch.randn(11, 32, dtype=torch.float64)
    probabilities, weights, experts = route(mol.mol_router(x), 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(11, dtype=torch.float64))
    dense = torch.zeros_like(x)
    for e in range(4):
        one_hot = torch.nn.functional.one_hot(torch.full((11,), e), 4).double()
        single = mol.mix_experts(x, one_hot[0])
        dense += probabilities[:, e : e + 1] * single
    torch.testing.assert_close(mol(x)[0], dense, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("modulation, second", [("mol", "mol_B"), ("moa", "moa_up"), ("depth_lora", "depth_B")])
def test_the_start_is_the_shared_model(modulation, second):
    model = ModernALBERTForMaskedLM(tiny_config(ffn_modulation=modulation)).eval()
    plain = ModernALBERTForMaskedLM(tiny_config(ffn_modulation="none")).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    ids = torch.randint(3, 120, (2, 9))
    assert all(p.abs().sum() == 0 for name, p in model.named_parameters() if second in name)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-6, rtol=1e-6)
    randomise(model)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-2


def test_top_1_keeps_a_gradient_for_the_router():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    _, weights, _ = route(logits, 1)
    assert torch.equal(weights, torch.ones_like(weights))
    weights.sum().backward()
    assert logits.grad.abs().sum() > 0


def test_router_softmax_is_float32_in_a_bfloat16_model():
    model = tiny_model(ModernALBERTModel, torch.bfloat16)
    output = model(torch.randint(3, 120, (2, 9)), output_router_logits=True)
    assert output.last_hidden_state.dtype == torch.bfloat16
    assert {logits.dtype for logits in output.router_logits} == {torch.float32}


def test_routing_statistics_are_float32_under_autocast():
    logits = torch.randn(1000, 4)
    expected = summarise_routing((logits,), 2)
    with torch.autocast("cpu", torch.bfloat16):
        summary = summarise_routing((logits,), 2)
    for name, value in summary._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name), atol=1e-6, rtol=1e-6)


def test_jitter_touches_the_router_in_training_only():
    mol = mol_ffn("masked", router_jitter_noise=0.3)
    x = torch.randn(11, 32, dtype=torch.float64)
    assert torch.equal(mol.eval()(x)[1], mol(x)[1])
    mol.train()
    assert not torch.equal(mol(x)[1], mol(x)[1])
    # With every expert chosen and all alike, the router cannot matter: jitter must not reach the FFN's own input.
    alike = mol_ffn("masked", router_jitter_noise=0.3, num_experts_per_tok=4)
    with torch.no_grad():
        for parameter in (alike.mol_A_in, alike.mol_B_in, alike.mol_A_out, alike.mol_B_out):
            parameter.copy_(parameter[:1].expand_as(parameter))
        torch.testing.assert_close(alike.train()(x)[0], alike.eval()(x)[0], atol=1e-12, rtol=1e-12)


def test_balance_and_z_loss_by_hand():
    logits = torch.randn(3, 5, 4, dtype=torch.float64)  # one call, batch 3, sequence 5
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    real = logits[mask.bool()]
    p = real.softmax(-1)
    slots = torch.zeros(4, dtype=torch.float64)
    usage = torch.zeros(4, dtype=torch.float64)
    for row in p:
        top = row.argsort(descending=True)[:2]
        slots[top] += 1
        usage[top] += row[top] / row[top].sum()
    summary = summarise_routing((logits,), 2, mask)
    expected = 4 * (slots / (2 * len(real)) * p.mean(0)).sum()
    torch.testing.assert_close(summary.balance_loss, expected)
    torch.testing.assert_close(summary.z_loss, real.logsumexp(-1).square().mean())
    torch.testing.assert_close(summary.usage[0], usage / len(real))
    changed = logits.clone()
    changed[mask == 0] = 100.0
    again = summarise_routing((changed,), 2, mask)
    torch.testing.assert_close(again.balance_loss, summary.balance_loss)
    torch.testing.assert_close(again.z_loss, summary.z_loss)
    balanced = torch.eye(4, dtype=torch.float64).repeat(3, 1)[None] * 1e-9
    torch.testing.assert_close(summarise_routing((balanced,), 1).balance_loss.item(), 1.0, atol=1e-6, rtol=0)


def test_statistics_follow_the_routing_once_per_training_forward():
    model = tiny_model(ModernALBERTForMaskedLM, router_jitter_noise=0.0, router_ema_decay=0.9)
    ids, mask = torch.randint(3, 120, (3, 10)), torch.ones(3, 10, dtype=torch.long)
    mask[0, 6:] = 0
    mlp = model.model.groups[2].mlp
    output = model(ids, mask, output_router_logits=True)
    torch.testing.assert_close(mlp.mol_usage, torch.full((4,), 0.25))  # evaluation counts nothing

    calls = []
    for logits in output.router_logits[2:]:  # the two uses of the last group
        _, weights, experts = route(logits, 2)
        chosen = (expert_mask(experts, 4).float() * weights.unsqueeze(-1)).sum(-2)
        calls.append(chosen[mask.bool()].mean(0))
    expected = 0.9 * 0.25 + 0.1 * torch.stack(calls).mean(0)
    model.train()(ids, mask)
    torch.testing.assert_close(mlp.mol_usage, expected)
    torch.testing.assert_close(mlp.mol_usage.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("mixing", ["token", "ema"])
def test_gradient_checkpointing_counts_once_and_changes_nothing(use_reentrant, mixing):
    ids = torch.randint(3, 120, (3, 10))
    results = []
    for checkpointing in (False, True):
        model = tiny_model(ModernALBERTForMaskedLM, router_jitter_noise=0.1, expert_mixing=mixing).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            if use_reentrant:
                model.enable_input_require_grads()
        calls = []
        model.model.groups[2].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        for _ in range(2):
            torch.manual_seed(3)
            loss = model(ids, labels=ids).loss
            model.zero_grad()
            loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(calls) == (8 if checkpointing else 4)  # two uses, two steps, and the recompute
        results.append((loss.detach(), grads, model.model.groups[2].mlp.mol_usage.clone()))
    (loss, grads, usage), (loss_c, grads_c, usage_c) = results
    torch.testing.assert_close(loss_c, loss)
    torch.testing.assert_close(usage_c, usage)
    assert (usage - 0.25).abs().max() > 1e-4
    assert grads_c.keys() == grads.keys()
    for name in grads:
        torch.testing.assert_close(grads_c[name], grads[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("mixing", ["ema", "uniform"])
@pytest.mark.parametrize("feed_forward", [MoLFeedForward, MoAFeedForward])
def test_merged_mixing_is_one_expert_and_freezes_the_router(mixing, feed_forward):
    mol = mol_ffn("masked", feed_forward, expert_mixing=mixing).train()
    usage = torch.tensor([0.4, 0.3, 0.2, 0.1])
    mol.mol_usage.copy_(usage)
    weights = usage if mixing == "ema" else torch.full((4,), 0.25)
    torch.testing.assert_close(mol.get_expert_weights(), weights)
    x = torch.randn(11, 32, dtype=torch.float64)
    output, gradient, gradients = with_gradients(mol, x)
    assert gradients["mol_router.weight"] is None and not mol.mol_router.weight.requires_grad
    assert all(value is not None for name, value in gradients.items() if "router" not in name)
    if feed_forward is MoLFeedForward:
        with torch.no_grad():
            w_in = mol.Wi.weight + sum(
                w * mol.scaling * b @ a for w, b, a in zip(weights.double(), mol.mol_B_in, mol.mol_A_in)
            )
            w_out = mol.Wo.weight + sum(
                w * mol.scaling * b @ a for w, b, a in zip(weights.double(), mol.mol_B_out, mol.mol_A_out)
            )
            expected = mol.activate(x @ w_in.T) @ w_out.T
        torch.testing.assert_close(output, expected, atol=1e-10, rtol=1e-10)


def test_training_mode_without_gradients_counts_nothing():
    model = tiny_model(ModernALBERTForMaskedLM).train()
    with torch.no_grad():
        model(torch.randint(3, 120, (3, 10)))
    assert torch.equal(model.model.groups[2].mlp.mol_usage, torch.full((4,), 0.25))


def test_ema_mixing_updates_statistics_from_the_frozen_router_and_uniform_does_not():
    ids = torch.randint(3, 120, (3, 10))
    for mixing, moves in (("ema", True), ("uniform", False)):
        model = tiny_model(ModernALBERTForMaskedLM, expert_mixing=mixing).train()
        output = model(ids, labels=ids)
        assert output.aux_loss is None
        moved = (model.model.groups[2].mlp.mol_usage - 0.25).abs().max() > 1e-5
        assert bool(moved) == moves


def test_averaging_deltas_is_not_averaging_factors():
    mol = mol_ffn()
    weights = torch.full((4,), 0.25, dtype=torch.float64)
    merged = concatenate_experts(mol.experts, weights)
    deltas = sum(w * mol.scaling * b @ a for w, b, a in zip(weights, mol.mol_B_in, mol.mol_A_in))
    torch.testing.assert_close(merged.B_in[0] @ merged.A_in[0], deltas)
    factors = mol.scaling * mol.mol_B_in.mean(0) @ mol.mol_A_in.mean(0)
    assert (factors - deltas).norm() > 0.3 * deltas.norm()


def test_one_expert_has_no_router_and_no_statistics():
    model = tiny_model(ModernALBERTForMaskedLM, num_experts=1)
    names = set(model.state_dict())
    assert "model.groups.2.mlp.mol_A_in" in names
    assert not any("router" in name or "usage" in name for name in names)
    ids = torch.randint(3, 120, (2, 9))
    output = model.train()(ids, labels=ids, output_router_logits=True)
    assert output.router_logits is None and output.aux_loss is None


def test_router_per_depth_and_last_position():
    ids = torch.randint(3, 120, (2, 9))
    model = tiny_model(ModernALBERTModel, router_per_depth=True)
    mlp = model.groups[2].mlp
    assert mlp.mol_router.weight.shape == (2, 4, 32) and mlp.mol_usage.shape == (2, 4)
    model.train()(ids)
    assert not torch.equal(mlp.mol_usage[0], mlp.mol_usage[1])
    last = tiny_model(ModernALBERTModel, mol_positions="last")
    assert len(last(ids, output_router_logits=True).router_logits) == 2  # one per modulated group
    x = torch.randn(2, 9, 32)
    assert torch.equal(last.groups[2].mlp(x, 0)[0], last.groups[2].mlp.plain_forward(x))
    assert not torch.equal(last.groups[2].mlp(x, 1)[0], last.groups[2].mlp.plain_forward(x))


def test_moa_is_adapters_after_the_ffn_with_as_many_parameters():
    moa, mol = mol_ffn(feed_forward=MoAFeedForward).eval(), mol_ffn().eval()
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert abs(count(moa) - count(mol)) / count(mol) < 0.02
    x = torch.randn(5, 32, dtype=torch.float64)
    with torch.no_grad():
        h = moa.plain_forward(x)
        expected = h.clone()
        _, weights, experts = route(moa.mol_router(x), 2)
        for t in range(5):
            for q, e in zip(weights[t], experts[t]):
                expected[t] += q * moa.moa_up[e] @ torch.nn.functional.gelu(moa.moa_down[e] @ h[t])
        torch.testing.assert_close(moa(x)[0], expected, atol=1e-10, rtol=1e-10)


def test_depth_lora_has_one_lora_per_position():
    model = tiny_model(ModernALBERTModel, ffn_modulation="depth_lora")
    mlp = model.groups[2].mlp
    assert mlp.depth_A_in.shape == (2, 4, 32)
    x = torch.randn(2, 9, 32)
    assert not torch.allclose(mlp(x, 0)[0], mlp(x, 1)[0])


def test_autocast_trains_in_bfloat16():
    model = tiny_model(ModernALBERTForMaskedLM).train()
    ids = torch.randint(3, 120, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids)
    loss = output.loss
    loss.backward()
    assert (
        output.logits.dtype == torch.bfloat16
        and loss.isfinite()
        and all(p.grad is not None for p in model.parameters())
    )
