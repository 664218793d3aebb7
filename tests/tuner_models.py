# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Small models of many families, with random weights and inputs for them, for the tests of the tuner."""

import inspect
from collections.abc import Callable

import torch
import transformers as t
from peft import PeftModel, get_peft_model
from small_models import randomise, tiny_model, tiny_modernbert

from modernalbert import ModernALBERTForMaskedLM, MoLConfig
from modernalbert.tuner.observer import mol_layers


COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 8}
VISION = {key: COMMON[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
VISION |= {"image_size": 32, "patch_size": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
T5 |= {"decoder_start_token_id": 0}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 100, "decoder_start_token_id": 3}
SEQ2SEQ |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
SEQ2SEQ |= {f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")}
SEQ2SEQ |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None}
WHISPER = SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 16, "suppress_tokens": None}
WHISPER |= {"begin_suppress_tokens": None}
CLIP_TEXT = COMMON | {"max_position_embeddings": 20, "eos_token_id": 99}

# name -> (how to make it, number of FFNs)
FAMILIES: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {
    "modernalbert": (lambda: tiny_model(ModernALBERTForMaskedLM, ffn_modulation="none"), 3),
    "modernbert": (tiny_modernbert, 6),
    "bert": (lambda: t.BertModel(t.BertConfig(**COMMON)), 2),
    "roberta": (lambda: t.RobertaModel(t.RobertaConfig(**COMMON)), 2),
    "distilbert": (lambda: t.DistilBertModel(t.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48)), 2),
    "albert": (lambda: t.AlbertModel(t.AlbertConfig(**COMMON, embedding_size=16)), 1),
    "llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**COMMON)), 2),
    "qwen3": (lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED)), 2),
    "gemma": (lambda: t.GemmaForCausalLM(t.GemmaConfig(**GROUPED)), 2),
    "phi3": (lambda: t.Phi3ForCausalLM(t.Phi3Config(**COMMON)), 2),
    "gpt2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT)), 2),
    "gpt_neox": (lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**COMMON)), 2),
    "bloom": (lambda: t.BloomForCausalLM(t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=100)), 2),
    "opt": (lambda: t.OPTForCausalLM(t.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32)), 2),
    "t5": (lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)), 4),
    "t5_gated": (lambda: t.T5ForConditionalGeneration(t.T5Config(**T5, feed_forward_proj="gated-gelu")), 4),
    "whisper": (lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(**WHISPER)), 4),
    "bart": (lambda: t.BartForConditionalGeneration(t.BartConfig(**SEQ2SEQ)), 4),
    "vit": (lambda: t.ViTModel(t.ViTConfig(**VISION)), 2),
    "dinov2": (lambda: t.Dinov2Model(t.Dinov2Config(**VISION)), 2),
    "clip": (lambda: t.CLIPModel(t.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=16)), 4),
}


def family(name: str) -> torch.nn.Module:
    """A model of that family, in evaluation mode."""
    return FAMILIES[name][0]().eval()


def random_inputs(model: torch.nn.Module, batch_size: int = 4, length: int = 32) -> dict[str, torch.Tensor]:
    """
    Inputs of the right form with nothing in them, always the same.

    Raises:
        ValueError: the model takes something else than token ids, pixels or audio features.
    """
    generator = torch.Generator().manual_seed(0)
    config, device = getattr(model, "config", None), next(model.parameters()).device
    text = getattr(config, "text_config", None) or config
    vision = getattr(config, "vision_config", None) or config
    names = inspect.signature(model.forward).parameters
    length = min(length, getattr(text, "max_position_embeddings", length))
    inputs = {}
    if "input_features" in names and hasattr(config, "num_mel_bins"):
        shape = (batch_size, config.num_mel_bins, 2 * config.max_source_positions)
        inputs["input_features"] = torch.randn(shape, generator=generator)
    elif "input_ids" in names and hasattr(text, "vocab_size"):
        inputs["input_ids"] = torch.randint(text.vocab_size, (batch_size, length), generator=generator)
    if "pixel_values" in names and hasattr(vision, "image_size"):
        size = vision.image_size if isinstance(vision.image_size, list | tuple) else [vision.image_size] * 2
        shape = (batch_size, getattr(vision, "num_channels", 3), *size)
        inputs["pixel_values"] = torch.randn(shape, generator=generator)
    if "input_values" in names:  # a waveform
        inputs["input_values"] = torch.randn((batch_size, 4000), generator=generator)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.randint(text.vocab_size, (batch_size, length), generator=generator)
    if not inputs:
        raise ValueError(f"{type(model).__name__} takes inputs of its own kind: give calibration batches.")
    return {name: value.to(device) for name, value in inputs.items()}


def inputs_for(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    inputs = random_inputs(model, batch_size=3, length=9)
    if isinstance(model, t.CLIPModel):
        inputs["input_ids"][:, -1] = 99
    return inputs


def adapt(model: torch.nn.Module, adapter_name: str = "default", **changes) -> PeftModel:
    """A MoL adapter whose experts and router say something, in evaluation mode."""
    peft_model = get_peft_model(model, MoLConfig(**({"num_experts": 4, "r": 4} | changes)), adapter_name).eval()
    return speak_up(peft_model, adapter_name)


@torch.no_grad()
def speak_up(model: torch.nn.Module, adapter_name: str = "default", seed: int = 0) -> torch.nn.Module:
    """Random values of a size that matters for an adapter's B factors and router."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in mol_layers(model):
        for container, std in ((layer.mol_B_in, 0.3), (layer.mol_B_out, 0.3)):
            if adapter_name in container:
                weight = container[adapter_name].weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        if adapter_name in layer.mol_router:
            weight = layer.mol_router[adapter_name].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    return model


def main_output(output) -> torch.Tensor:
    """Logits, or the first tensor there is."""
    return output.logits if "logits" in output else output[0]


__all__ = ["FAMILIES", "adapt", "family", "inputs_for", "main_output", "randomise", "speak_up"]
