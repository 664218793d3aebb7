# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Places of the linear layers of a feed-forward network (FFN) in known architectures.
"""

import inspect
from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from modernalbert.modeling_mol import RoutedFeedForward


class Projections(NamedTuple):
    """Names of an FFN's linear layers inside the module that holds it: the first ones (gate before up), the last."""

    inputs: tuple[str, ...]
    output: str


# In order of preference: the first whose names all exist in a module is its form.
KNOWN_PROJECTIONS = (
    Projections(("Wi",), "Wo"),  # ModernBERT, ModernALBERT
    Projections(("gate_up_proj",), "down_proj"),  # Phi-3, GLM
    Projections(("gate_proj", "up_proj"), "down_proj"),  # Llama, Qwen, Mistral, Gemma, OLMo
    Projections(("up_proj",), "down_proj"),
    Projections(("wi_0", "wi_1"), "wo"),  # T5 v1.1
    Projections(("wi",), "wo"),  # T5
    Projections(("c_fc",), "c_proj"),  # GPT-2, StarCoder2
    Projections(("fc_in",), "fc_out"),  # GPT-J
    Projections(("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    Projections(("fc1",), "fc2"),  # CLIP, ViT, DINOv2; Whisper, OPT, BART: on the layer itself
    Projections(("lin1",), "lin2"),  # DistilBERT
    Projections(("intermediate_dense",), "output_dense"),  # wav2vec 2.0
    Projections(("intermediate.dense",), "output.dense"),  # BERT, RoBERTa, ELECTRA, MPNet: on the layer
    Projections(("ffn",), "ffn_output"),  # ALBERT: on the layer
    Projections(("w1", "w3"), "w2"),  # LLaMA's own names
)
_BY_TARGET = (
    (
        ["mlp"],
        "modernalbert modernbert modernbert-decoder llama mistral qwen2 qwen3 gemma gemma2 gemma3 gemma3_text olmo "
        "olmo2 olmo3 phi phi3 smollm3 granite starcoder2 stablelm cohere glm glm4 gpt2 gpt_neo gpt_neox gptj bloom "
        "falcon vit deit dinov2 clip clip_text_model clip_vision_model siglip siglip_text_model siglip_vision_model",
    ),
    (
        r".*encoder\.layer\.\d+",
        "bert roberta xlm-roberta camembert electra mpnet ernie esm deberta deberta-v2 data2vec-text",
    ),
    (r"(.*\.)?layers\.\d+", "whisper bart mbart marian opt m2m_100 pegasus blenderbot speech_to_text"),
    (["DenseReluDense"], "t5 mt5 umt5"),
    (["feed_forward"], "wav2vec2 hubert wavlm"),
    (["ffn"], "distilbert"),
    (r".*albert_layers\.\d+", "albert"),
)
# Type of a model -> the modules that hold its FFNs, for a configuration without `target_modules`.
TARGET_MODULES = {model_type: target for target, model_types in _BY_TARGET for model_type in model_types.split()}


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a linear layer, quantised or not, or None if it is something else."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    return None


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def match_projections(module: nn.Module, names: Projections) -> bool:
    """Return whether the module has linear layers of these names whose widths fit together as an FFN."""
    shapes = [linear_shape(_submodule(module, name)) for name in (*names.inputs, names.output)]
    if None in shapes:
        return False
    *inputs, output = shapes
    widths = {width for _, width in inputs}
    # A fused GLU has both halves in one projection.
    fits = len(widths) == 1 and (output[0] in widths or (len(inputs) == 1 and 2 * output[0] in widths))
    return fits and len({size for size, _ in inputs}) == 1


def is_ffn_alone(module: nn.Module, names: Projections) -> bool:
    """
    Return whether nothing with weights but these linear layers works on the tokens: no attention, norm or convolution.
    """
    linear = [module.get_submodule(name) for name in (*names.inputs, names.output)]
    inside = {id(parameter) for layer in linear for parameter in layer.parameters()}
    takes_one = len(inspect.signature(module.forward).parameters) == 1
    return takes_one and all(id(parameter) in inside for parameter in module.parameters())


def find_projections(module: nn.Module, name: str, ffn_projections: dict[str, str] | None = None) -> Projections:
    """
    Find the linear layers of the FFN that a module holds.

    Args:
        name: Of the module, for the errors.
        ffn_projections: The names, where they are none of `KNOWN_PROJECTIONS`.

    Raises:
        ValueError: the module holds experts of its own, or is not understood; then the error lists what is in it.
    """
    experts = [type(child).__name__ for child in module.modules() if type(child).__name__ in ROUTED_CLASSES]
    experts += [child for child in ("experts", "router") if hasattr(module, child)]
    if experts:
        raise ValueError(
            f"{name} has experts of its own ({experts[0]}): a second mixture on the same feed-forward "
            "network is not supported; exclude it with exclude_modules, or merge its experts first."
        )
    if ffn_projections is not None:
        inputs = tuple(ffn_projections[part] for part in ("gate", "up") if part in ffn_projections)
        candidates = (Projections(inputs, ffn_projections["down"]),)
    else:
        candidates = KNOWN_PROJECTIONS
    for names in candidates:
        if match_projections(module, names):
            return names
    found = []
    for child_name, child in module.named_modules():
        shape = linear_shape(child)
        if child_name and (shape is not None or "." not in child_name):
            found.append(
                f"{child_name} ({type(child).__name__}{'' if shape is None else f' {shape[0]} -> {shape[1]}'})"
            )
    wanted = "is no feed-forward network of a known form" if ffn_projections is None else f"has no {ffn_projections}"
    raise ValueError(
        f"{name} ({type(module).__name__}) {wanted}: name its linear layers in ffn_projections, or target what holds "
        f"them. It has {', '.join(found) or 'no modules inside'}."
    )


ROUTED_CLASSES = {RoutedFeedForward.__name__, *(cls.__name__ for cls in RoutedFeedForward.__subclasses__())}


def ffn_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that hold an FFN of a known form."""
    return [
        name
        for name, module in model.named_modules()
        if name and any(match_projections(module, names) for names in KNOWN_PROJECTIONS)
    ]
