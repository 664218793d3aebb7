# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""MoL on a quantised base: the layers run by themselves, and merging into them is refused."""

import pytest
import torch
from peft import get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from modernalbert import MoLConfig


IDS = torch.arange(14).view(2, 7)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, vocab_size=100))


def with_gradients(base) -> tuple[torch.nn.Module, torch.Tensor, dict[str, torch.Tensor]]:
    """The base with a MoL adapter, its logits, and the adapter's gradients."""
    torch.manual_seed(1)
    # As it is trained: in evaluation mode bitsandbytes' layers give their inputs no gradients on the CPU.
    model = get_peft_model(base, MoLConfig(r=4, num_experts=4, num_experts_per_tok=2, init_weights=False)).train()
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return model, output.logits.detach(), trained


@torch.no_grad()
def with_rounded_weights(quantised) -> LlamaForCausalLM:
    """A model in floating point with the weights that the quantised layers stand for."""
    rounded = llama()
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(quantised.get_submodule(name)(torch.eye(module.in_features)).t())
    return rounded


def assert_it_is_the_rounded_model(quantised, tolerance: float) -> None:
    _, expected, expected_gradients = with_gradients(with_rounded_weights(quantised))
    model, logits, gradients = with_gradients(quantised)
    assert (logits - expected).norm() / expected.norm() < tolerance
    assert gradients.keys() == expected_gradients.keys() and len(gradients) == 10
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() / gradient.norm() < 2 * tolerance, name
    before = {name: value.clone() for name, value in model.state_dict().items() if "mol_" in name}
    with pytest.raises(ValueError, match="is quantised: load the base model in floating point"):
        model.merge_and_unload()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


class DynamicInt8(torch.nn.Linear):
    """What torch's dynamic int8 computes, in floating point: rounded weights, and inputs rounded to 7 bits by batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        scale = (high - low).double() / 127
        zero = (-(low / scale)).round()
        rounded = ((x / scale).round() + zero).clamp(0, 127)
        return super().forward(((rounded - zero) * scale).to(x.dtype))


def test_dynamic_int8_of_torch_runs_and_is_not_merged_into():
    quantised = torch.ao.quantization.quantize_dynamic(llama(), {torch.nn.Linear}, dtype=torch.qint8)
    emulated = llama()
    for name, module in list(emulated.named_modules()):
        if isinstance(module, torch.nn.Linear):
            module.__class__ = DynamicInt8
            module.weight.data = quantised.get_submodule(name).weight().dequantize()
    outputs = []
    for model in (emulated, quantised):
        torch.manual_seed(1)
        adapted = get_peft_model(model, MoLConfig(r=4, num_experts=4, init_weights=False)).eval()
        with torch.no_grad():
            outputs.append(adapted(input_ids=IDS).logits)
            with adapted.disable_adapter():
                outputs.append(adapted(input_ids=IDS).logits)
    torch.testing.assert_close(outputs[3], outputs[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[2], outputs[0], atol=1e-4, rtol=1e-4)
    assert (outputs[2] - outputs[3]).norm() > 0.1 * outputs[3].norm()
    with pytest.raises(ValueError, match="is quantised: load the base model in floating point"):
        adapted.merge_and_unload()


def test_int8_weights_of_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    base = llama()
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    assert_it_is_the_rounded_model(base, 1e-5)


# bitsandbytes rounds the activations too where it has 8 bits.
@pytest.mark.parametrize("bits, tolerance", [(4, 1e-4), (8, 0.05)])
def test_weights_of_bitsandbytes(tmp_path, bits, tolerance):
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").train()
    assert_it_is_the_rounded_model(base, tolerance)
