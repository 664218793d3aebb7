# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Compiled, exported and ONNX graphs compute what eager computes, for batches of other sizes too."""

import pytest
import torch
from small_models import tiny_model

from modernalbert import ModernALBERTForMaskedLM, ModernALBERTForSequenceClassification, ModernALBERTModel
from modernalbert.mol_backends import CPU_TOKEN_BLOCK


# One group used twice, once per layer type: compilation time grows with depth.
SHALLOW = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}


class Logits(torch.nn.Module):
    """Tensors in, tensor out, as tracing wants it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask).logits


def batch(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 120, (rows, length))
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length - 3 :] = 0
    return ids, mask


@pytest.mark.parametrize(
    "backend, dynamic, sizes",
    [
        # This one generates machine code.
        pytest.param("inductor", False, [(2, CPU_TOKEN_BLOCK // 2 + 5)], marks=pytest.mark.slow),
        ("aot_eager", True, [(2, 12), (3, 17)]),
    ],
)
def test_compile_fullgraph(backend, dynamic, sizes):
    torch._dynamo.reset()
    model = tiny_model(ModernALBERTForMaskedLM, **SHALLOW)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    with torch.no_grad():
        for rows, length in sizes:
            ids, mask = batch(rows, length)
            # At padding too: eager does no work there, and a graph returns the same.
            torch.testing.assert_close(compiled(ids, mask).logits, model(ids, mask).logits, atol=1e-4, rtol=1e-4)


def test_compile_fullgraph_of_a_training_step_with_packed_rows():
    torch._dynamo.reset()
    model, eager = (tiny_model(ModernALBERTForMaskedLM, router_jitter_noise=0.0, **SHALLOW).train() for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(3, 120, (2, 12))
    positions = torch.cat([torch.arange(5), torch.arange(7)]).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    losses = []
    for net in (compiled, eager):
        loss = net(ids, mask, position_ids=positions, labels=ids).loss  # labels at padding count, as they are given
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for (name, actual), expected in zip(model.named_parameters(), eager.parameters()):
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-4, rtol=1e-3, msg=name)
    torch.testing.assert_close(model.model.groups[0].mlp.mol_usage, eager.model.groups[0].mlp.mol_usage)


@pytest.mark.parametrize("modulation", ["mol", "moa", "depth_lora", "none"])
def test_torch_export_with_dynamic_batch_and_length(modulation):
    model = tiny_model(ModernALBERTForSequenceClassification, ffn_modulation=modulation, classifier_pooling="mean")
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=4, max=4096)}
    program = torch.export.export(
        model, args=batch(3, 10), kwargs={}, dynamic_shapes={"input_ids": sizes, "attention_mask": sizes}, strict=False
    ).module()
    with torch.no_grad():
        for rows, length in ((1, 12), (5, 31)):
            inputs = batch(rows, length)
            torch.testing.assert_close(program(*inputs).logits, model(*inputs).logits, atol=1e-5, rtol=1e-5)


def test_an_exported_graph_returns_zero_states_at_padding():
    model = tiny_model(ModernALBERTModel, norm_bias=True, output_router_logits=True, output_hidden_states=True)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=4, max=4096)}
    program = torch.export.export(
        model, args=batch(3, 10), kwargs={}, dynamic_shapes={"input_ids": sizes, "attention_mask": sizes}, strict=False
    ).module()
    ids, mask = batch(4, 14)
    with torch.no_grad():
        actual, expected = program(ids, mask), model(ids, mask)
    for field in ("hidden_states", "router_logits"):
        for one, other in zip(actual[field], expected[field], strict=True):
            assert not one[mask == 0].any()
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_onnx_with_dynamic_batch_and_length(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = tiny_model(ModernALBERTForSequenceClassification, **SHALLOW)

    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=4, max=4096)}
    torch.onnx.export(
        Logits(model).eval(),
        batch(3, 10),
        tmp_path / "model.onnx",
        dynamo=True,
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for rows, length in ((1, 12), (5, 31)):
        ids, mask = batch(rows, length)
        (logits,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        torch.testing.assert_close(torch.tensor(logits), model(ids, mask).logits, atol=1e-4, rtol=1e-4)


EVERY_FORM = [
    {"ffn_modulation": "mol"},
    {"ffn_modulation": "mol", "mol_positions": "last"},
    {"ffn_modulation": "mol", "expert_mixing": "ema"},
    {"ffn_modulation": "mol", "expert_mixing": "uniform"},
    {"ffn_modulation": "mol", "num_experts": 1, "num_experts_per_tok": 1},
    {"ffn_modulation": "moa"},
    {"ffn_modulation": "moa", "expert_mixing": "ema"},
    {"ffn_modulation": "depth_lora"},
    {"ffn_modulation": "none"},
]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("changes", EVERY_FORM, ids=lambda changes: "-".join(map(str, changes.values())))
def test_torch_jit_trace_serves_other_sizes(changes, attention):
    model = tiny_model(ModernALBERTForMaskedLM, attn_implementation=attention, **SHALLOW, **changes)
    with torch.no_grad():
        traced = torch.jit.trace(Logits(model).eval(), batch(3, CPU_TOKEN_BLOCK // 2), check_trace=False)
        for rows, length in ((3, CPU_TOKEN_BLOCK // 2), (1, 12), (5, 31)):
            inputs = batch(rows, length)
            torch.testing.assert_close(traced(*inputs), model(*inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", EVERY_FORM, ids=lambda changes: "-".join(map(str, changes.values())))
def test_the_earlier_onnx_exporter_serves_other_sizes(changes, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny_model(ModernALBERTForMaskedLM, **SHALLOW, **changes)
    file, axes = tmp_path / "model.onnx", {0: "batch", 1: "length"}
    names = ["input_ids", "attention_mask"]
    torch.onnx.export(
        Logits(model).eval(),
        batch(3, 10),
        file,
        dynamo=False,
        opset_version=17,
        dynamic_axes=dict.fromkeys(names, axes) | {"logits": axes},
        input_names=names,
        output_names=["logits"],
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for rows, length in ((1, 12), (5, 31)):
        ids, mask = batch(rows, length)
        (logits,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        torch.testing.assert_close(torch.tensor(logits), model(ids, mask).logits, atol=1e-4, rtol=1e-4)
