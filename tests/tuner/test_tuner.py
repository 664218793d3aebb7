# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The tuner's mathematics, on every family of models it knows."""

import copy

import pytest
import torch
import transformers as t
from peft import get_peft_model
from small_models import tiny_model
from tuner_models import COMMON, FAMILIES, adapt, family, inputs_for, main_output, speak_up

from modernalbert import ModernALBERTConfig, ModernALBERTForMaskedLM, MoLConfig
from modernalbert.modeling_mol import route
from modernalbert.mol_backends import FFN, DropoutMasks, reference_mol
from modernalbert.tuner.observer import mol_layers


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_step_zero_is_the_base_and_every_ffn_is_found_without_being_told(name):
    model = family(name)
    inputs = inputs_for(model)
    expected = main_output(model(**inputs))
    adapted = get_peft_model(model, MoLConfig()).eval()
    layers = dict(mol_layers(adapted))
    assert len(layers) == FAMILIES[name][1]
    torch.testing.assert_close(main_output(adapted(**inputs)), expected, atol=1e-5, rtol=1e-5)
    speak_up(adapted)
    assert (main_output(adapted(**inputs)) - expected).abs().max() > 1e-2
    with adapted.disable_adapter():
        torch.testing.assert_close(main_output(adapted(**inputs)), expected, atol=0, rtol=0)


class Spy:
    """Keeps what a module is given and gives, of its first call."""

    def __init__(self, module: torch.nn.Module):
        self.args = self.kwargs = self.output = None
        self.handle = module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, output):
        if self.output is None:
            self.args, self.kwargs, self.output = args, kwargs, output


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_an_ffn_is_the_weighted_sum_of_ffns_with_one_expert_folded_in_each(name):
    """By brute force: E copies of the module with one expert's deltas in its weights, mixed by the routing weights."""
    model = adapt(family(name).double(), num_experts=3, num_experts_per_tok=2).double()
    layer = next(layer for _, layer in mol_layers(model))
    config = layer.mol_config["default"]
    whole, first, last = Spy(layer), Spy(layer.input_projections[0]), Spy(layer.output_projection)
    inputs = inputs_for(model.base_model.model)
    model(**{name: value.double() if value.is_floating_point() else value for name, value in inputs.items()})
    x, output = first.args[0], last.output
    _, weights, index = route(layer.mol_router["default"](x.reshape(-1, x.shape[-1])), config.num_experts_per_tok)
    expected = torch.zeros(output.shape).double().flatten(0, -2)
    for e in range(config.num_experts):
        alone = copy.deepcopy(layer)
        only_e = torch.nn.functional.one_hot(torch.tensor(e), config.num_experts).double()
        for path, delta in alone.deltas("default", only_e).items():
            weight = alone.get_base_layer().get_submodule(path).weight
            weight += delta.T if weight.shape != delta.shape else delta
        alone.enable_adapters(False)
        spy = Spy(alone.output_projection)
        alone(*whole.args, **whole.kwargs)
        gate = ((index == e) * weights).sum(-1, keepdim=True)
        expected += gate * spy.output.reshape(expected.shape)
    torch.testing.assert_close(output.reshape(expected.shape), expected, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_it_is_the_specification_of_the_model():
    model = adapt(family("llama"), num_experts=4)
    layer = next(layer for _, layer in mol_layers(model))
    mlp = layer.base_layer
    x = torch.randn(700, 32)  # more than one block of tokens
    _, weights, index = route(layer.mol_router["default"](x), 2)
    model.disable_adapter_layers()
    ffn = FFN(
        lambda x: torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], -1),
        lambda h: mlp.act_fn(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
        mlp.down_proj,
    )
    expected = reference_mol(x, weights, index, ffn, layer.experts("default"), DropoutMasks())
    model.enable_adapter_layers()
    torch.testing.assert_close(layer(x.view(7, 100, 32)).view(700, 32), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_same_state_is_the_same_function_as_in_a_modernalbert():
    """The tensors of a ModernALBERT's experts, under their names, in the adapter of the same model without experts."""
    native = tiny_model(ModernALBERTForMaskedLM, mol_groups="all", mol_intermediate_size=40)
    config = ModernALBERTConfig.from_dict(native.config.to_dict() | {"ffn_modulation": "none"})
    plain = ModernALBERTForMaskedLM(config)
    plain.load_state_dict({k: v for k, v in native.state_dict().items() if ".mol_" not in k})
    adapted = get_peft_model(plain, MoLConfig(num_experts=4, r=4, lora_alpha=8)).eval()
    state = {}
    for key, value in native.state_dict().items():
        if ".mol_router.weight" in key:
            state[key.replace("mol_router.weight", "mol_router.default.weight")] = value
        elif ".mol_" in key:
            state[f"{key}.default"] = value
    result = plain.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "mol_" in key]
    ids = torch.randint(3, 120, (2, 9))
    torch.testing.assert_close(adapted(ids).logits, native(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2", "opt", "t5", "whisper", "bart"])
def test_generation_with_a_cache_is_generation_without(name):
    model = adapt(family(name))
    inputs = inputs_for(model.base_model.model)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    with_cache = model.generate(**inputs, **options, use_cache=True)
    without = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(with_cache, without)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**inputs, **options), with_cache)


def test_injection_looks_at_each_module_equally_often_in_a_deep_model(monkeypatch):
    visits, visit = 0, torch.nn.Module.named_modules

    def counting(module, *args, **kwargs):
        nonlocal visits
        visits += 1
        return visit(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "named_modules", counting)
    each = []
    for depth in (2, 8):
        model = t.BertModel(t.BertConfig(**COMMON | {"num_hidden_layers": depth}))
        number, visits = len(list(model.modules())), 0
        get_peft_model(model, MoLConfig())
        each.append(visits / number)
    assert each[1] < 1.1 * each[0]


def test_an_ffn_nobody_knows_is_named_by_the_user():
    class Unknown(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.back = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

        def forward(self, x):
            return self.back(self.wide(x).tanh())

    model = torch.nn.Sequential(Unknown(), Unknown())
    with pytest.raises(ValueError, match=r"wide \(Linear 8 -> 16\), back \(Linear 16 -> 8\)"):
        get_peft_model(copy.deepcopy(model), MoLConfig(target_modules=["0", "1"]))
    config = MoLConfig(target_modules=["0", "1"], ffn_projections={"up": "wide", "down": "back"}, init_weights=False)
    x = torch.randn(5, 8)
    expected = model(x)
    adapted = get_peft_model(model, config)
    assert len(list(mol_layers(adapted))) == 2 and not torch.allclose(adapted(x), expected)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(x), expected)


def test_targets_are_chosen_by_name_layer_and_exclusion():
    def adapted_layers(name, **changes):
        return [layer_name for layer_name, _ in mol_layers(get_peft_model(family(name), MoLConfig(**changes)))]

    prefix = "base_model.model."
    assert adapted_layers("modernbert", layers_to_transform=[1, 4]) == [
        f"{prefix}model.layers.{number}.mlp" for number in (1, 4)
    ]
    assert adapted_layers("bert", layers_to_transform=1) == [f"{prefix}encoder.layer.1"]
    assert adapted_layers("bert", layers_to_transform=[0], layers_pattern="layer") == [f"{prefix}encoder.layer.0"]
    assert adapted_layers("modernbert", exclude_modules=r".*layers\.[0-4]\.mlp") == [f"{prefix}model.layers.5.mlp"]
    assert len(adapted_layers("whisper", target_modules=r".*decoder\.layers\.\d+")) == 2


@pytest.mark.parametrize(
    "name, use_reentrant, changes",
    [
        ("llama", False, {}),
        ("llama", True, {}),
        ("bert", False, {}),
        ("llama", False, {"expert_mixing": "ema", "router_ema_decay": 0.5}),
    ],
)
def test_every_parameter_gets_a_gradient_and_checkpointing_changes_nothing(name, use_reentrant, changes):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        base = family(name)
        if name == "bert":
            base = t.BertForTokenClassification(base.config)
        model = adapt(base, router_aux_loss_coef=0.0, **changes).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        ids = torch.arange(3, 99).repeat(7)[: 7 * 80].view(7, 80)  # more than a block of tokens
        model(input_ids=ids, labels=ids if name == "llama" else ids % 2).loss.backward()
        copy.deepcopy(model)  # nothing of the recompute is left behind
        usage = model.base_model.expert_usage()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad} | usage

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient is not None and gradient.any(), name
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-4)


def test_logits_of_a_batch_cut_into_blocks_have_its_shape():
    model = adapt(family("llama"))
    ids = torch.randint(3, 99, (8, 96))
    with torch.no_grad():
        router_logits = model(input_ids=ids, output_router_logits=True).router_logits
        alone = model(input_ids=ids[2:3], output_router_logits=True).router_logits
    for logits, row in zip(router_logits, alone):
        assert logits.shape == (8, 96, 4)
        torch.testing.assert_close(logits[2:3], row, atol=1e-5, rtol=1e-5)


def test_layers_have_the_widths_of_their_ffn():
    layer = next(layer for _, layer in mol_layers(adapt(family("bert"))))
    assert (layer.in_features, layer.width, layer.out_features) == (32, 48, 32)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "modernbert"])
def test_long_batches_give_each_row_what_it_gets_alone(name):
    model = adapt(family(name))
    ids = torch.randint(3, 99, (8, 96))
    torch.testing.assert_close(
        main_output(model(input_ids=ids))[3:4], main_output(model(input_ids=ids[3:4])), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_a_layer_with_attention_is_never_cut_into_blocks():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
            self.fc1, self.fc2 = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

        def forward(self, x):
            x = x + self.attention(x, x, x)[0]
            return x + self.fc2(self.fc1(x).relu())

    model = torch.nn.Sequential(Block())
    x = torch.randn(8, 100, 16)
    expected = model(x)
    torch.testing.assert_close(get_peft_model(model, MoLConfig(target_modules=["0"]))(x), expected)


@torch.no_grad()
def test_batches_of_nothing_pass_as_through_the_base():
    layer = next(layer for _, layer in mol_layers(adapt(family("llama"))))
    for shape in ((0, 5, 32), (2, 0, 32), (0, 32)):
        assert layer(torch.zeros(shape)).shape == shape


def test_a_shared_ffn_is_adapted_once_and_counted_at_each_use():
    model = adapt(tiny_model(ModernALBERTForMaskedLM, ffn_modulation="none")).train()
    assert len(list(mol_layers(model))) == 3
    ids = torch.randint(3, 120, (2, 9))
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert [logits.shape for logits in output.router_logits] == [(2, 9, 4)] * 6
    layer = next(layer for _, layer in mol_layers(model))
    uses = torch.cat([logits.flatten(0, 1) for logits in output.router_logits[:2]])
    _, weights, index = route(uses, 2)
    usage = torch.zeros(4).index_add(0, index.flatten(), weights.flatten()) / len(uses)
    torch.testing.assert_close(layer.mol_usage["default"], 0.99 * torch.full((4,), 0.25) + 0.01 * usage)


def test_auxiliary_losses_join_the_loss_in_training_alone_and_padding_does_not_count():
    model = adapt(t.BertForSequenceClassification(family("bert").config), router_aux_loss_coef=0.5)
    batch = {"input_ids": torch.randint(3, 100, (2, 6)), "labels": torch.tensor([0, 1])}
    batch["attention_mask"] = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    model.base_model.model.config.hidden_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    silent = model.eval()(**batch).loss
    trained = model.train()(**batch, output_router_logits=True)
    assert trained.aux_loss > 0.4
    torch.testing.assert_close(trained.loss, silent + trained.aux_loss)
    expected = []
    for logits in trained.router_logits:
        assert not logits[batch["attention_mask"] == 0].any() and logits[batch["attention_mask"] == 1].all()
        real = logits[batch["attention_mask"].bool()]
        p = real.softmax(-1)
        slots = torch.nn.functional.one_hot(p.topk(2).indices, 4).sum(-2).float().mean(0) / 2
        expected.append(0.5 * 4 * (slots * p.mean(0)).sum())
    torch.testing.assert_close(trained.aux_loss, torch.stack(expected).mean())
    assert "aux_loss" not in model.eval()(**batch, output_router_logits=True)
    trained.loss.backward()
    assert all(layer.mol_router["default"].weight.grad.any() for _, layer in mol_layers(model))


def test_auxiliary_losses_join_whatever_loss_a_model_has():
    model = adapt(t.BertForQuestionAnswering(family("bert").config), router_aux_loss_coef=5.0).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids, positions = torch.randint(3, 100, (2, 6)), torch.tensor([1, 2])
    trained = model(ids, start_positions=positions, end_positions=positions).loss
    assert trained > 5 + model.eval()(ids, start_positions=positions, end_positions=positions).loss * 0.9


def test_each_side_of_a_translator_counts_its_own_padding():
    model = adapt(family("t5")).train()
    ids = torch.randint(3, 100, (2, 6))
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    labels = torch.randint(3, 100, (2, 6))
    for masked in (labels, labels.masked_fill(torch.arange(6) > 2, -100)):
        output = model(ids, mask, labels=masked, output_router_logits=True)
        expected = []
        for number, logits in enumerate(output.router_logits):
            p = logits[mask.bool() if number < 2 else masked != -100].softmax(-1)
            slots = torch.nn.functional.one_hot(p.topk(2).indices, 4).sum(-2).float().mean(0) / 2
            expected.append(0.01 * 4 * (slots * p.mean(0)).sum())
        torch.testing.assert_close(output.aux_loss, torch.stack(expected).mean())


def test_expert_labels_teach_the_router_where_to_send_rows():
    model = adapt(t.BertForSequenceClassification(family("bert").config), router_aux_loss_coef=0.0).train()
    batch = {"input_ids": torch.randint(3, 100, (4, 6)), "labels": torch.tensor([0, 1, 0, 1])}
    labels = torch.tensor([0, 1, 2, 3])
    routers = [p for n, p in model.named_parameters() if "mol_router" in n]
    optimizer = torch.optim.Adam(routers, lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch, expert_labels=labels).loss.backward()
        optimizer.step()
    logits = model.eval()(input_ids=batch["input_ids"], output_router_logits=True).router_logits
    assert all((layer.argmax(-1) == labels[:, None]).float().mean() > 0.9 for layer in logits)
    with pytest.raises(ValueError, match="must be below 4"):
        model.train()(**batch, expert_labels=torch.tensor([0, 1, 2, 4]))
    with pytest.raises(ValueError, match="2 numbers for 4 rows"):
        model(**batch, expert_labels=torch.tensor([0, 1]))


@torch.no_grad()
@pytest.mark.parametrize("mixing", ["ema", "uniform"])
def test_a_static_mixture_is_one_merged_expert_and_merges_exactly(mixing):
    model = adapt(family("bert"), expert_mixing=mixing)
    inputs = inputs_for(model.base_model.model)
    for _, layer in mol_layers(model):
        layer.mol_usage["default"].copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
        assert not layer.mol_router["default"].weight.requires_grad
    expected = main_output(model(**inputs))
    merged = model.merge_and_unload()
    torch.testing.assert_close(main_output(merged(**inputs)), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_keeps_float32_adapters_and_statistics(dtype):
    model = adapt(family("llama").to(dtype))
    layer = next(layer for _, layer in mol_layers(model))
    assert layer.base_layer.gate_proj.weight.dtype == dtype
    assert layer.mol_A_in["default"].weight.dtype == layer.mol_usage["default"].dtype == torch.float32
    assert model(**inputs_for(model.base_model.model)).logits.dtype == dtype
    assert model.to(dtype) and layer.mol_usage["default"].dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_it_compiles_whole(name):
    model = adapt(family(name))
    inputs = inputs_for(model.base_model.model)
    expected = main_output(model(**inputs))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(main_output(compiled(**inputs)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixing", ["token", "ema", "uniform"])
@pytest.mark.parametrize("name", ["bert", "modernalbert"])
def test_traced_and_exported_it_is_the_same_for_other_sizes(name, mixing):
    base = family(name)
    base.config.return_dict = False
    model = adapt(base, expert_mixing=mixing).base_model.model
    ids = torch.randint(3, 90, (2, 7))
    batch = ids, torch.ones_like(ids)
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=128)}
    with torch.no_grad():
        traced = torch.jit.trace(model, batch, check_trace=False)
        exported = torch.export.export(model, batch, dynamic_shapes=(sizes, sizes), strict=False).module()
        for shape in ((2, 7), (5, 33), (9, 80)):  # the last would be cut into blocks
            ids = torch.randint(3, 90, shape)
            expected = model(ids, torch.ones_like(ids))[0]
            for graph in (traced, exported):
                torch.testing.assert_close(graph(ids, torch.ones_like(ids))[0], expected, atol=1e-5, rtol=1e-5)


def test_compiled_training_has_the_losses_and_statistics_of_eager_training():
    model = adapt(t.BertForSequenceClassification(family("bert").config), router_aux_loss_coef=0.5).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    twin = copy.deepcopy(model)
    batch = {"input_ids": torch.randint(3, 90, (4, 9)), "labels": torch.tensor([0, 1, 0, 1])}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(**batch).loss, twin(**batch).loss)
    for usage, expected in zip(model.base_model.expert_usage().values(), twin.base_model.expert_usage().values()):
        torch.testing.assert_close(usage, expected)
        assert usage.std() > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"r": 0}, "r=0 is not allowed: it must be a whole number of at least 1"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is not allowed: it must be at most num_experts=8"),
        ({"expert_mixing": "mean"}, "expert_mixing='mean' is not allowed"),
        ({"lora_alpha": "16"}, "lora_alpha='16' is not allowed: it must be a number greater than 0"),
        ({"lora_dropout": "x"}, "lora_dropout='x' is not allowed: it must be a number from 0 to below 1"),
        ({"target_modules": "all-linear"}, "target_modules='all-linear' is not allowed"),
        ({"ffn_projections": {"up": "a"}}, "ffn_projections={'up': 'a'} is not allowed"),
        ({"num_frozen_experts": 9}, "num_frozen_experts=9 is not allowed"),
        ({"mol_version": 3}, "mol_version=3 is not allowed: it must be at most 2: a newer modernalbert"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(changes, message):
    with pytest.raises(ValueError) as error:
        MoLConfig(**changes)
    assert message in str(error.value)


def test_targets_that_match_nothing_are_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"layers\.\*\.mlp"):
        get_peft_model(family("llama"), MoLConfig(target_modules=["ffn"]))
    with pytest.raises(ValueError, match="intermediate.*dense"):
        get_peft_model(family("bert"), MoLConfig(target_modules=["intermediate"]))
    with pytest.raises(ValueError, match="has experts of its own"):
        get_peft_model(tiny_model(ModernALBERTForMaskedLM), MoLConfig())
    mixtral = t.Qwen3MoeConfig(**COMMON, num_experts=2, moe_intermediate_size=16, num_key_value_heads=2, head_dim=8)
    with pytest.raises(ValueError, match="has experts of its own"):
        get_peft_model(t.Qwen3MoeForCausalLM(mixtral), MoLConfig(target_modules=["mlp"]))


def test_a_refusal_leaves_the_model_as_it_was():
    model = family("llama")
    model.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp"):
        get_peft_model(model, MoLConfig())
    assert not list(mol_layers(model)) and not any("mol_" in name for name in model.state_dict())
