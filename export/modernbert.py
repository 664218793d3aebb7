# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A ModernALBERT written out as transformers' own ModernBERT, exactly: no remote code is needed to load it."""

from collections.abc import Iterator

import torch
import transformers
from torch import nn
from torch.nn.functional import pad
from transformers import ModernBertConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from modernalbert.configuration_modernalbert import ModernALBERTConfig
from modernalbert.export.plain_model import check_unwrapped
from modernalbert.mol_backends import Experts, concatenate_experts


# Settings of the rotary embedding that follow the length of a batch are kept in state by one of the two models.
ROPE_TYPES = ("default", "linear", "yarn", "llama3")


@torch.no_grad()
def to_modernbert(model: PreTrainedModel) -> PreTrainedModel:
    """
    Convert to one of transformers' `ModernBert...` classes that computes the same function.

    Groups are unrolled over depth, so that each of the N layers has weights of its own; FFNs narrower than the widest
    are padded with zeros; the factorised embedding is multiplied out, and with it the decoder that is tied to it; one
    LoRA that serves all tokens alike (one expert, `expert_mixing` "ema" or "uniform", "depth_lora") is added to the
    weights. Products are taken in float64 and rounded once to the dtype of the model. Outputs at real tokens are the
    same; at padding ModernBERT does not return zeros, and `inputs_embeds` has width d, not e. Dropout on LoRA paths has
    no place in the new model.

    `ModernBertForSequenceClassification` with `classifier_pooling="cls"` reads the first position of a row: its batches
    must be padded on the right.

    Args:
        model: A ModernALBERT encoder, or one with any of its heads, whose tokens are not routed.

    Returns:
        A new model in evaluation mode, on the device and in the dtype of `model`; no tensor is shared with it.

    Raises:
        ValueError: the model is not a ModernALBERT, not expressible as a ModernBERT (the field is named), quantised, or
            wears an adapter.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled model's own
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != ModernALBERTConfig.model_type or hasattr(model, "peft_config"):
        raise ValueError(
            f"a {type(model).__name__} is not allowed: it must be a ModernALBERT without an adapter (of a PeftModel, "
            "what merge_and_unload() returns)."
        )
    check_expressible(config)
    check_unwrapped(model)
    model_class = getattr(transformers, type(model).__name__.replace("ModernALBERT", "ModernBert"))
    new_config = modernbert_config(model)
    with no_init_weights():
        new = model_class._from_config(new_config, dtype=model.dtype).to(model.device)
    state = {
        name: value.to(model.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in _modernbert_weights(model, new_config.intermediate_size)
    }
    missing, unexpected = new.load_state_dict(state, strict=False)
    tied = set(new.all_tied_weights_keys)
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        names = ", ".join((unexpected or missing)[:3])
        raise ValueError(
            f"the weights of the model are not those of a ModernALBERT ({'unknown' if unexpected else 'missing'}: "
            f"{names}): merge or remove adapters, and undo quantization, first."
        )
    new.tie_weights()
    return new.eval()


def check_expressible(config: ModernALBERTConfig, merged: bool = False) -> None:
    """
    Raise a ValueError that names the field which a ModernBERT cannot express, if there is one.

    With `merged`, of the model that `merge_experts` will make of it.
    """

    def refuse(field: str, reason: str) -> None:
        raise ValueError(f"{field}={getattr(config, field)!r} is not allowed: a ModernBERT cannot express it. {reason}")

    if not config.skip_first_attn_norm:
        refuse("skip_first_attn_norm", "ModernBERT has no norm before the attention of its first layer.")
    if config.ffn_modulation == "moa":
        refuse("ffn_modulation", "The adapters come after the FFN and have an activation of their own.")
    is_routed = config.ffn_modulation == "mol" and config.num_experts > 1 and config.expert_mixing == "token"
    if is_routed and not merged:
        refuse("num_experts", "Each token is routed to experts of its own: merge them first (merge_experts).")
    for field in ("hidden_activation", "classifier_activation"):
        if any(True for _ in ACT2FN[getattr(config, field)].parameters()):
            refuse(field, "transformers loads the parameters of this activation in bfloat16.")
    for layer_type in sorted(set(config.layer_types)):
        rope_type = config.rope_parameters[layer_type]["rope_type"]
        if rope_type not in ROPE_TYPES:
            refuse("rope_parameters", f"rope_type {rope_type!r} of {layer_type} is not one of {', '.join(ROPE_TYPES)}.")


def modernbert_config(model: PreTrainedModel) -> ModernBertConfig:
    """Return the configuration of the ModernBERT that `to_modernbert` returns."""
    config = model.config
    ours = set(ModernALBERTConfig.__dataclass_fields__) - set(ModernBertConfig.__dataclass_fields__)
    dropped = ours | {"auto_map", "architectures", "model_type", "transformers_version", "num_labels"}
    values = {name: value for name, value in config.to_dict().items() if name not in dropped}
    values["intermediate_size"] = max(group.mlp.width for group in model.base_model.groups)
    if config.initializer_cutoff_factor is None:
        values["initializer_cutoff_factor"] = 3.0  # what both models take None for
    new = ModernBertConfig(**values)
    if hasattr(model, "classifier") and not type(model).__name__.endswith("MultipleChoice"):
        outputs = model.classifier.out_features
        if new.num_labels != outputs:  # a question-answering head has two outputs, whatever the labels are
            new.num_labels = outputs
    # For readers that know the earlier names only: transformers before version 5, and servers in other languages.
    new.global_attn_every_n_layers = _full_attention_period(config)
    new.global_rope_theta = config.rope_parameters["full_attention"]["rope_theta"]
    new.local_rope_theta = config.rope_parameters["sliding_attention"]["rope_theta"]
    new._attn_implementation = config._attn_implementation
    return new


def _full_attention_period(config: ModernALBERTConfig) -> int:
    """
    Return n, if exactly the layers 0, n, 2 n, ... have full attention. 0 otherwise, and where a rope_type is not the
    default: readers that know this name alone cannot run such a model, and stop at 0 instead of computing something
    else.
    """
    if any(config.rope_parameters[layer_type]["rope_type"] != "default" for layer_type in set(config.layer_types)):
        return 0
    is_full = [layer_type == "full_attention" for layer_type in config.layer_types]
    periods = range(1, len(is_full) + 1)
    return next((n for n in periods if is_full == [i % n == 0 for i in range(len(is_full))]), 0)


def _modernbert_weights(model: PreTrainedModel, width: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Return names and tensors of the new model, for `width` = its FFN width; what is not known passes unchanged."""
    config, encoder = model.config, model.base_model
    prefix = "" if encoder is model else f"{model.base_model_prefix}."
    group_weights = [{} for _ in range(config.num_groups)]
    for name, value in model.state_dict().items():
        inner = name.removeprefix(prefix) if name.startswith(prefix) else ""
        if inner.startswith("groups."):
            _, group, rest = inner.split(".", 2)
            group_weights[int(group)][rest] = value
        elif inner == "embeddings.tok_embeddings.weight":
            yield name, _multiply_out(value, encoder.embeddings.projection)
        elif name == "decoder.weight":
            if not config.tie_word_embeddings:
                yield name, _multiply_out(value, encoder.embeddings.projection)
        elif inner != "embeddings.projection.weight":
            yield name, value
    for layer in range(config.num_hidden_layers):
        group, depth = divmod(layer, config.group_depth)
        mlp, weights = encoder.groups[group].mlp, dict(group_weights[group])
        if layer == 0:
            weights.pop("attn_norm.weight", None)
            weights.pop("attn_norm.bias", None)
        for name in [name for name in weights if name.startswith(("mlp.mol_", "mlp.depth_"))]:
            del weights[name]
        if "mlp.Wi.weight" in weights:
            weights["mlp.Wi.weight"], weights["mlp.Wo.weight"] = _merged_ffn(config, mlp, group, depth)
        for name in ("mlp.Wi.weight", "mlp.Wi.bias"):
            if name in weights:  # the activated half, then the other
                halves = weights[name].chunk(2)
                weights[name] = torch.cat([pad(x, (0, 0) * (x.dim() - 1) + (0, width - len(x))) for x in halves])
        if "mlp.Wo.weight" in weights:
            weights["mlp.Wo.weight"] = pad(weights["mlp.Wo.weight"], (0, width - weights["mlp.Wo.weight"].shape[1]))
        for name, value in weights.items():
            yield f"{prefix}layers.{layer}.{name}", value


def _multiply_out(embedding: torch.Tensor, projection: nn.Module | None) -> torch.Tensor:
    """Multiply out a factorised embedding: (V, e) -> (V, d), float64."""
    return embedding if projection is None else embedding.double() @ projection.weight.double().t()


def _merged_ffn(
    config: ModernALBERTConfig, mlp: nn.Module, group: int, depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Wi (2 f, d) and Wo (d, f) of the layer at `depth` of its group, with the LoRA that acts there, float64."""
    Wi, Wo = mlp.Wi.weight.double(), mlp.Wo.weight.double()
    if (
        config.ffn_modulation == "none"
        or group not in config.modulated_groups
        or not config.is_modulated_position(depth)
    ):
        return Wi, Wo
    if config.ffn_modulation == "depth_lora":
        factors, row = (mlp.depth_A_in, mlp.depth_B_in, mlp.depth_A_out, mlp.depth_B_out), mlp.rows[depth]
        experts = Experts(*(factor[row : row + 1].double() for factor in factors), scaling=mlp.scaling)
        weights = Wi.new_ones(1)
    else:
        experts, weights = mlp.experts, mlp.get_expert_weights().double()
        experts = Experts(*(factor.double() for factor in experts[:4]), scaling=experts.scaling)
    lora = concatenate_experts(experts, weights)
    return Wi + lora.B_in[0] @ lora.A_in[0], Wo + lora.B_out[0] @ lora.A_out[0]
