# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Weights for a ModernALBERT from a trained ModernBERT: its layers become groups, its embedding is factorised."""

from collections.abc import Sequence

import torch
from transformers import AutoModelForMaskedLM, ModernBertConfig, PreTrainedModel

from modernalbert.configuration_modernalbert import ModernALBERTConfig
from modernalbert.modeling_modernalbert import ModernALBERTForMaskedLM
from modernalbert.modeling_mol import DepthLoRAFeedForward, FeedForward, MoLFeedForward
from modernalbert.upcycling.embedding import check_equal, check_no_adapter, set_embedding, teacher_embedding


LAYER_MAPS = ("stepwise", "first", "last", "average")
EXPERT_STARTS = ("zero", "svd")
# What cannot be mapped where it differs.
EQUAL_FIELDS = "vocab_size hidden_size num_attention_heads norm_bias attention_bias mlp_bias classifier_bias".split()
# Fields that mean the same in ModernBertConfig.
COMMON_FIELDS = (
    "vocab_size max_position_embeddings hidden_size num_attention_heads intermediate_size num_hidden_layers "
    "layer_types local_attention rope_parameters initializer_range initializer_cutoff_factor norm_eps norm_bias "
    "attention_bias attention_dropout embedding_dropout mlp_bias mlp_dropout hidden_activation decoder_bias "
    "classifier_pooling classifier_dropout classifier_bias classifier_activation deterministic_flash_attn "
    "sparse_prediction sparse_pred_ignore_index tie_word_embeddings "
    "pad_token_id bos_token_id eos_token_id cls_token_id sep_token_id"
).split()


def config_from_modernbert(teacher: ModernBertConfig, **changes) -> ModernALBERTConfig:
    """
    Return the ModernALBERT configuration that *is* the given ModernBERT: depth 1, no factorisation, no modulation.

    Args:
        teacher: Of any ModernBERT-family checkpoint.
        changes: Fields to set otherwise, e.g. `group_depth=2, ffn_modulation="mol"`.
    """
    fields = {name: getattr(teacher, name) for name in COMMON_FIELDS}
    fields |= {
        "group_depth": 1,
        "embedding_size": None,
        "ffn_modulation": "none",
        "mol_intermediate_size": None,
        "skip_first_attn_norm": True,
    }
    return ModernALBERTConfig(**(fields | changes))


def teacher_layers_of_groups(
    layer_map: str | Sequence[int], num_groups: int, num_teacher_layers: int
) -> list[list[int]]:
    """
    Return the teacher layers that each group is made of (the mean of them).

    Args:
        layer_map: "stepwise" takes evenly spaced layers from the first to the last, "first" and "last" the first and
            last K layers, "average" the mean of each of K equal spans; or K layer numbers.
        num_groups: K.
        num_teacher_layers: L.

    Returns:
        K lists of layer numbers, 0-based.

    Raises:
        ValueError: the map is unknown, of another length, or names a layer the teacher does not have.
    """
    K, L = num_groups, num_teacher_layers
    if isinstance(layer_map, str):
        if layer_map not in LAYER_MAPS:
            raise ValueError(
                f"layer_map={layer_map!r} is not allowed: it must be one of {', '.join(map(repr, LAYER_MAPS))} "
                f"or a list of {K} layer numbers."
            )
        if K > L:
            raise ValueError(f"layer_map={layer_map!r} needs at least {K} teacher layers for {K} groups, got {L}.")
        if layer_map == "first":
            return [[k] for k in range(K)]
        if layer_map == "last":
            return [[L - K + k] for k in range(K)]
        if layer_map == "stepwise":
            return [[round(k * (L - 1) / max(1, K - 1))] for k in range(K)]
        return [span_of_group(k, K, L) for k in range(K)]
    if len(layer_map) != K or not all(isinstance(i, int) and 0 <= i < L for i in layer_map):
        raise ValueError(f"layer_map={layer_map!r} is not allowed: it must name {K} layers, each from 0 to {L - 1}.")
    return [[i] for i in layer_map]


def span_of_group(group: int, num_groups: int, num_teacher_layers: int) -> list[int]:
    """Return the teacher layers in whose place a group stands: the group-th of K equal spans, never empty."""
    bounds = [round(k * num_teacher_layers / num_groups) for k in (group, group + 1)]
    return list(range(*bounds)) or [min(bounds[0], num_teacher_layers - 1)]


def load_teacher(name: str, auto_class: type = AutoModelForMaskedLM, **loading) -> PreTrainedModel:
    """
    Load a teacher, by folder or Hub name, in evaluation mode. A head that it lacks is random.

    Args:
        auto_class: AutoModelForMaskedLM, or AutoModel for a teacher without a head.
        loading: Further arguments of `from_pretrained`.

    Raises:
        ValueError: its encoder lacks weights.
    """
    teacher, report = auto_class.from_pretrained(name, output_loading_info=True, **loading)
    prefix = "" if teacher.base_model is teacher else f"{teacher.base_model_prefix}."
    absent = {key for key, _ in teacher.named_parameters()} & set(report["missing_keys"])
    absent = sorted(key for key in absent if key.startswith(prefix) and "pooler" not in key)
    if absent:
        raise ValueError(f"The teacher {name} has no {', '.join(absent[:3])}, which would be random.")
    return teacher.eval()


@torch.no_grad()
def upcycle_modernbert(
    teacher: PreTrainedModel | str,
    config: ModernALBERTConfig,
    layer_map: str | Sequence[int] = "stepwise",
    experts: str = "zero",
    token_counts: torch.Tensor | None = None,
) -> ModernALBERTForMaskedLM:
    """
    Build a ModernALBERT from a ModernBERT-family model.

    With `group_depth=1`, no factorisation and no modulation (see `config_from_modernbert`) the result computes what
    the teacher computes. Otherwise: each group takes the teacher layers of `layer_map`; a factorised embedding is the
    truncated SVD of the teacher's; an FFN that is wider in the student gets new units whose output weights are zero,
    so that it computes the same. Experts start at zero, so that step 0 is the shared model, or from what the teacher's
    layers have beyond it.

    Args:
        teacher: A `ModernBertForMaskedLM` (of another class: the head starts fresh), or its name or folder.
        config: Of the student. `skip_first_attn_norm` is taken from the teacher's form, not from here.
        layer_map: See `teacher_layers_of_groups`.
        experts: "zero", or "svd": see `start_experts_from_layers`.
        token_counts: See `factorise_embedding`.

    Returns:
        The student, in the teacher's dtype and on its device, in evaluation mode.

    Raises:
        ValueError: a width, a vocabulary or a bias of the two cannot be mapped, `layer_map` or `experts` is not
            allowed, or the teacher wears an adapter or lacks weights.
    """
    if experts not in EXPERT_STARTS:
        raise ValueError(f"experts={experts!r} is not allowed: it must be {' or '.join(map(repr, EXPERT_STARTS))}.")
    if isinstance(teacher, str):
        teacher = load_teacher(teacher)
    teacher_config = teacher.config
    if teacher_config.model_type != "modernbert":
        raise ValueError(
            f"The teacher's model_type={teacher_config.model_type!r} is not allowed: it must be 'modernbert'."
        )
    check_equal(config, teacher_config, EQUAL_FIELDS)
    check_no_adapter(teacher)
    encoder = teacher.base_model
    layers = teacher_layers_of_groups(layer_map, config.num_groups, len(encoder.layers))

    config = ModernALBERTConfig.from_dict(config.to_dict())
    config.skip_first_attn_norm = not hasattr(encoder.layers[0].attn_norm, "weight")
    student = ModernALBERTForMaskedLM(config).to(encoder.device, encoder.dtype)

    set_embedding(student, teacher_embedding(teacher), token_counts)
    student.model.embeddings.norm.load_state_dict(encoder.embeddings.norm.state_dict())
    student.model.final_norm.load_state_dict(encoder.final_norm.state_dict())

    # The layer without an attention norm gives none: the uses of its group that have one take the next layer's.
    norm_of = [max(i, 1) if config.skip_first_attn_norm else i for i in range(len(encoder.layers))]
    for k, (group, sources) in enumerate(zip(student.model.groups, layers)):
        if list(group.attn_norm.parameters()):
            copy_mean(group.attn_norm, [encoder.layers[min(norm_of[i], len(norm_of) - 1)].attn_norm for i in sources])
        copy_mean(group.attn, [encoder.layers[i].attn for i in sources])
        copy_mean(group.mlp_norm, [encoder.layers[i].mlp_norm for i in sources])
        copy_ffn(group.mlp, [encoder.layers[i].mlp for i in sources], group=k)
        if experts == "svd":
            span = span_of_group(k, config.num_groups, len(encoder.layers))
            start_experts_from_layers(group.mlp, [encoder.layers[i].mlp for i in span])

    if hasattr(teacher, "decoder"):
        student.head.load_state_dict(teacher.head.state_dict())
        if config.decoder_bias and teacher.decoder.bias is not None:
            student.decoder.bias.copy_(teacher.decoder.bias)
        if not config.tie_word_embeddings and config.embedding_size is None:
            student.decoder.weight.copy_(teacher.decoder.weight)
    student.tie_weights()
    return student.eval()


def copy_mean(target: torch.nn.Module, sources: list[torch.nn.Module]) -> None:
    """Set every parameter of `target` to the mean of the sources' parameters of that name."""
    for name, parameter in target.named_parameters():
        parameter.copy_(torch.stack([source.get_parameter(name).double() for source in sources]).mean(dim=0))


def copy_ffn(target: torch.nn.Module, sources: list[torch.nn.Module], group: int) -> None:
    """
    Copy Wi (2 f, d) and Wo (d, f) as `copy_mean` does; units the target has beyond the sources' keep their fresh input
    weights and get output weights of zero.
    """
    width, new_width = sources[0].Wo.in_features, target.width
    if new_width < width:
        raise ValueError(
            f"The FFN width {new_width} of group {group} is not allowed: it must be at least the teacher's {width}."
        )

    for name, parameter in target.named_parameters():
        if not name.startswith(("Wi.", "Wo.")):
            continue  # the modulation
        mean = torch.stack([source.get_parameter(name).double() for source in sources]).mean(dim=0)
        if name == "Wo.weight":
            parameter.zero_()
        place_in_wider(parameter, mean, name)


def place_in_wider(target: torch.Tensor, source: torch.Tensor, name: str) -> None:
    """
    Copy an FFN parameter of width f into the place it has in the parameter of that name of an FFN at least as wide.

    The f units come first; in "Wi.*", whose two halves are the activated units and their gates, first in each half.
    """
    if name == "Wo.weight":
        target[:, : source.shape[1]].copy_(source)
    elif name == "Wo.bias":
        target.copy_(source)
    else:
        for new, old in zip(target.chunk(2), source.chunk(2)):
            new[: len(old)].copy_(old)


def start_experts_from_layers(target: FeedForward, layers: Sequence[torch.nn.Module]) -> None:
    """
    Start LoRA experts from the truncated SVD of what each teacher layer has beyond the shared weight.

    Expert e of a mixture belongs to layer e modulo their number; experts of the same layer take successive blocks of r
    singular directions, so that no two are alike. Of "depth_lora", each position belongs to the layer in whose place it
    stands (as Relaxed Recursive Transformers, Bae et al. 2024). FFNs without LoRA stay as they are.

    Args:
        target: A group's FFN, with its shared weights in place.
        layers: The FFNs of the teacher layers in whose place the group stands.
    """
    if isinstance(target, MoLFeedForward):
        factors = (target.mol_A_in, target.mol_B_in), (target.mol_A_out, target.mol_B_out)
        num = len(factors[0][0])
        assigned = [(layers[e % len(layers)], e // len(layers)) for e in range(num)]
        scaling = target.scaling
    elif isinstance(target, DepthLoRAFeedForward):
        factors = (target.depth_A_in, target.depth_B_in), (target.depth_A_out, target.depth_B_out)
        positions = [position for position, row in enumerate(target.rows) if row is not None]
        assigned = [(layers[position * len(layers) // len(target.rows)], 0) for position in positions]
        scaling = target.scaling
    else:
        return
    for name, (A, B) in zip(("Wi.weight", "Wo.weight"), factors):
        shared = target.get_parameter(name).double()
        rank = A.shape[1]
        svd: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        for expert, (layer, block) in enumerate(assigned):
            if id(layer) not in svd:
                theirs = shared.clone()
                place_in_wider(theirs, layer.get_parameter(name).double(), name)
                svd[id(layer)] = torch.linalg.svd((theirs - shared) / scaling, full_matrices=False)
            left, values, right = svd[id(layer)]
            taken = slice(block * rank, (block + 1) * rank)
            root = values[taken].sqrt()
            # Fewer directions than the rank asks for: the rest stays a LoRA that has not begun.
            B[expert].zero_()
            B[expert, :, : len(root)].copy_(left[:, taken] * root)
            A[expert, : len(root)].copy_(root[:, None] * right[taken])
