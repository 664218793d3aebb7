# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Student of a BERT, fitted layer by layer on text.

The two cannot share weights as they are: BERT normalises after the residual, has no gate, has biases, learned
positions and more heads. So each matrix is a ridge regression, on real tokens, from what the student sees to what the
teacher has there (our decision): queries, keys, values and FFN units follow one teacher layer per group; output
projections bring the residual stream, after every use of the group, to the direction of the teacher's state. It takes
minutes and saves the first part of a distillation.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from modernalbert.configuration_modernalbert import ModernALBERTConfig
from modernalbert.modeling_modernalbert import (
    ModernALBERTForMaskedLM,
    ModernALBERTLayerGroup,
    TokenLayout,
)
from modernalbert.training.distillation import DistillationConfig, Teacher
from modernalbert.upcycling.embedding import check_equal, check_no_adapter, set_embedding, teacher_embedding


# The residual stream is to grow by this factor a layer, as it does in trained pre-norm models.
GROWTH = 1.1
# The last norm takes the teacher's weight, but none so small that its inverse would dominate the fit.
SMALLEST_NORM_WEIGHT = 0.3
# Passes over the uses of a group; each fits the output projections to the stream that the last one left.
PASSES = 3


class LayerwiseTeacher(Teacher):
    """A BERT that answers with its embeddings and, for each layer, the states after attention and after the FFN."""

    def __init__(self, model: PreTrainedModel):
        num_states = 2 * model.config.num_hidden_layers + 1
        super().__init__(model, DistillationConfig(hidden_weight=1.0), [(i, i) for i in range(num_states)])

    def _run(self, input_ids, mask, wanted):
        middles: list[torch.Tensor] = []
        hooks = [
            layer.attention.output.register_forward_hook(lambda module, inputs, output: middles.append(output))
            for layer in self.model.base_model.encoder.layer
        ]
        try:
            outputs, last = super()._run(input_ids, mask, wanted)
        finally:
            for hook in hooks:
                hook.remove()
        ends = outputs.hidden_states
        interleaved = [ends[0], *(state for pair in zip(middles, ends[1:]) for state in pair)]
        outputs.hidden_states = tuple(interleaved)
        return outputs, last


def ridge_regression(inputs: torch.Tensor, targets: torch.Tensor, ridge: float) -> torch.Tensor:
    """
    Fit (T, n), (T, m) -> W (m, n) that minimises |inputs W' - targets|^2 + penalty |W|^2, in float64.

    Args:
        ridge: The penalty as a share of the mean eigenvalue of inputs' inputs.
    """
    inputs, targets = inputs.double(), targets.double()
    gram = inputs.T @ inputs
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, inputs.T @ targets).T.float()


def slow_pairs_first(head_size: int) -> torch.Tensor:
    """
    Order the dimensions of a rotary head, those that turn slowest first.

    Dimensions i and i + half turn together, the faster the smaller i: what does not depend on positions goes last.
    """
    half = head_size // 2
    return torch.tensor([i + part for i in reversed(range(half)) for part in (0, half)])


def fit_query_and_key(
    inputs: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, num_heads: int, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Query and key weights (d, d) whose scores approximate the teacher's.

    Several teacher heads become one: their scores add up. Within a head, queries and keys are rotated (which leaves
    scores as they are) so that the strongest directions lie where rotary positions disturb them least.

    Args:
        inputs: (T, d), normed states of the student.
        queries, keys: (T, d) of the teacher.
    """
    query, key = (ridge_regression(inputs, target, ridge).double() for target in (queries, keys))
    covariance = inputs.double().T @ inputs.double() / len(inputs)
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=1e-6 * values.max())
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    inverse_root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    new_query, new_key = torch.zeros_like(query), torch.zeros_like(key)
    size = len(query) // num_heads
    order = slow_pairs_first(size)
    for head in range(num_heads):
        rows = slice(head * size, (head + 1) * size)
        left, strength, right = torch.linalg.svd(root @ query[rows].T @ key[rows] @ root)
        scale = strength[:size].sqrt()[:, None]
        new_query[head * size + order] = scale * (left[:, :size].T @ inverse_root)
        new_key[head * size + order] = scale * (right[:size] @ inverse_root)
    return new_query.float(), new_key.float()


@torch.no_grad()
def fit_to_bert(
    student: ModernALBERTForMaskedLM,
    teacher: PreTrainedModel,
    rows: Sequence[dict[str, torch.Tensor]],
    ridge: float = 0.1,
) -> None:
    """
    Fit a student whose embedding is already in place; changes its groups and its last norm.

    Args:
        student: With as many heads as divide the teacher's, and of its width.
        teacher: A BERT encoder, with or without a head.
        rows: Packed rows of clean text, see `data/packing.py`; 60 rows of 256 tokens are enough.
        ridge: Of every regression; a smaller one follows the text more closely and generalises less.
    """
    config: ModernALBERTConfig = student.config
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    real = batch["attention_mask"].bool()
    states = LayerwiseTeacher(teacher)(
        batch["clean_input_ids"], batch["position_ids"], batch["attention_mask"]
    ).hidden_states
    layers = teacher.base_model.encoder.layer
    depth, teacher_depth = config.num_hidden_layers, len(layers)

    def target(state: int, growth: float) -> torch.Tensor:
        """Return a teacher's state at the length the student's stream is to have there."""
        direction = states[state]
        if state == len(states) - 1:
            direction = direction / student.model.final_norm.weight
        return direction * (states[0].norm(dim=-1).mean() * GROWTH**growth / direction.norm(dim=-1).mean())

    last_norm = layers[-1].output.LayerNorm.weight
    student.model.final_norm.weight.copy_(last_norm.clamp(min=SMALLEST_NORM_WEIGHT))
    stream = student.model.embeddings(batch["clean_input_ids"], None)
    layout = TokenLayout.build(
        config, stream, batch["attention_mask"], batch["position_ids"], stream.dtype, keep_batch=True
    )
    for k, group in enumerate(student.model.groups):
        first = k * config.group_depth
        uses = []
        for layer in range(first, first + config.group_depth):
            layer_type = config.layer_types[layer]
            end = round((layer + 1) * teacher_depth / depth)
            uses.append(
                {
                    "attention": {
                        "position_embeddings": layout.position_embeddings[layer_type],
                        "attention_mask": layout.masks[layer_type],
                        "layer_type": layer_type,
                    },
                    "middle": target(2 * end - 1, layer + 0.5),
                    "end": target(2 * end, layer + 1),
                }
            )
        source = min(round(first * teacher_depth / depth), teacher_depth - 1)
        fit_inner_weights(group, stream[real], states[2 * source], layers[source], config, ridge)
        fit_units(group, layers[source], states[2 * source + 1], stream, real, uses[0], ridge)
        for _ in range(PASSES):
            run_group(group, stream, real, uses, ridge)
        stream = run_group(group, stream, real, uses, ridge=None)


def fit_inner_weights(
    group: ModernALBERTLayerGroup,
    stream: torch.Tensor,
    state: torch.Tensor,
    layer: nn.Module,
    config: ModernALBERTConfig,
    ridge: float,
) -> None:
    """Fit queries, keys and values of a group to those of a teacher layer; stream and teacher's state are (T, d)."""
    inputs, attention = group.attn_norm(stream), layer.attention.self
    query, key = fit_query_and_key(
        inputs, attention.query(state), attention.key(state), config.num_attention_heads, ridge
    )
    value = ridge_regression(inputs, attention.value(state), ridge)
    group.attn.Wqkv.weight.copy_(torch.cat([query, key, value]))


def fit_units(
    group: ModernALBERTLayerGroup,
    layer: nn.Module,
    middle: torch.Tensor,
    stream: torch.Tensor,
    real: torch.Tensor,
    use: dict,
    ridge: float,
) -> None:
    """
    Fit the FFN units of a group to those of a teacher layer, the most influential first; their gates are to be 1.

    The group's attention output is fitted on the way, because the FFN reads behind it.
    """
    context = attention_context(group, stream, use)[real]
    group.attn.Wo.weight.copy_(ridge_regression(context, use["middle"] - stream[real], ridge))
    inputs = group.mlp_norm(stream[real] + group.attn.Wo(context))
    before = layer.intermediate.dense(middle)
    influence = nn.functional.gelu(before).square().mean(0).sqrt() * layer.output.dense.weight.norm(dim=0)
    units = influence.topk(min(group.mlp.width, len(influence))).indices
    activated, gate = group.mlp.Wi.weight.chunk(2)  # views; units beyond the teacher's stay fresh
    activated[: len(units)] = ridge_regression(inputs, before[:, units], ridge)
    gate[: len(units)] = ridge_regression(inputs, inputs.new_ones(len(inputs), 1), ridge)


def attention_context(group: ModernALBERTLayerGroup, stream: torch.Tensor, use: dict) -> torch.Tensor:
    """Compute what the attention's output projection gets: (rows, length, d)."""
    seen: list[torch.Tensor] = []
    hook = group.attn.Wo.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        group.attn(group.attn_norm(stream), **use["attention"])
    finally:
        hook.remove()
    return seen[0]


def run_group(
    group: ModernALBERTLayerGroup, stream: torch.Tensor, real: torch.Tensor, uses: list[dict], ridge: float | None
) -> torch.Tensor:
    """
    Run a group's uses one after the other and return the stream behind the last. With a ridge, then fit both output
    projections to all uses at once.
    """
    contexts, attention_targets, units, ffn_targets = [], [], [], []
    for use in uses:
        context = attention_context(group, stream, use)
        contexts.append(context[real])
        attention_targets.append(use["middle"] - stream[real])
        stream = stream + group.attn.Wo(context)
        hidden = group.mlp.activate(group.mlp.Wi(group.mlp_norm(stream)))
        units.append(hidden[real])
        ffn_targets.append(use["end"] - stream[real])
        stream = stream + group.mlp.Wo(hidden)
    if ridge is not None:
        group.attn.Wo.weight.copy_(ridge_regression(torch.cat(contexts), torch.cat(attention_targets), ridge))
        group.mlp.Wo.weight.copy_(ridge_regression(torch.cat(units), torch.cat(ffn_targets), ridge))
    return stream


@torch.no_grad()
def upcycle_bert(
    teacher: PreTrainedModel,
    config: ModernALBERTConfig,
    rows: Sequence[dict[str, torch.Tensor]] | None = None,
    token_counts: torch.Tensor | None = None,
) -> ModernALBERTForMaskedLM:
    """
    Build a ModernALBERT from a BERT: its token embedding, and groups fitted to its layers on text (our decision).

    Args:
        teacher: A BERT encoder, with or without a head.
        config: Of the student.
        rows: Packed rows of clean text to fit on, see `fit_to_bert`; None leaves everything but the embedding fresh.
        token_counts: As `factorise_embedding`.

    Raises:
        ValueError: vocabulary or width differ, the student's heads do not divide the teacher's, or the teacher wears an
            adapter.
    """
    check_equal(config, teacher.config, ("vocab_size", "hidden_size"))
    check_no_adapter(teacher)
    if teacher.config.num_attention_heads % config.num_attention_heads:
        raise ValueError(
            f"num_attention_heads={config.num_attention_heads} is not allowed: it must divide the teacher's "
            f"{teacher.config.num_attention_heads}."
        )
    embedding = teacher_embedding(teacher)
    student = ModernALBERTForMaskedLM(config).to(embedding.device, embedding.dtype).eval()
    set_embedding(student, embedding, token_counts)
    student.model.embeddings.norm.weight.copy_(teacher.base_model.embeddings.LayerNorm.weight)
    student.tie_weights()
    if rows is not None:
        fit_to_bert(student, teacher, rows)
    return student
