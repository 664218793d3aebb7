# Copyright 2026 The ModernALBERT authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The recursive encoder: K groups of weights used N = K G times, and its task heads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    packed_sequence_mask_function,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_tracing

from .configuration_modernalbert import ModernALBERTConfig
from .modeling_mol import (
    FeedForward,
    MoLRouter,
    RoutedFeedForward,
    build_feed_forward,
    sum_over_processes,
    summarise_routing,
)
from .mol_grouped import grouped_mol  # noqa: F401  registers the backend


try:
    from .mol_triton import triton_mol  # noqa: F401  registers the backend
except ImportError:  # no triton: choose_mol_backend says so where it is asked for
    pass


# --- outputs ---------------------------------------------------------------------------------------------------------


@dataclass
class RoutingOutput:
    """
    What routing adds to every output.

    Attributes:
        aux_loss: Scalar, weighted sum of balance and z loss. Only in training.
        router_logits: One (batch, sequence, E) per routed layer, in layer order. Only with `output_router_logits`.
    """

    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class ModernALBERTModelOutput(RoutingOutput, BaseModelOutput):
    """transformers' `BaseModelOutput` with `aux_loss` and `router_logits`."""


@dataclass
class ModernALBERTMaskedLMOutput(RoutingOutput, MaskedLMOutput):
    """transformers' `MaskedLMOutput` with `aux_loss` and `router_logits`."""


@dataclass
class ModernALBERTSequenceClassifierOutput(RoutingOutput, SequenceClassifierOutput):
    """transformers' `SequenceClassifierOutput` with `aux_loss` and `router_logits`."""


@dataclass
class ModernALBERTTokenClassifierOutput(RoutingOutput, TokenClassifierOutput):
    """transformers' `TokenClassifierOutput` with `aux_loss` and `router_logits`."""


@dataclass
class ModernALBERTQuestionAnsweringOutput(RoutingOutput, QuestionAnsweringModelOutput):
    """transformers' `QuestionAnsweringModelOutput` with `aux_loss` and `router_logits`."""


@dataclass
class ModernALBERTMultipleChoiceOutput(RoutingOutput, MultipleChoiceModelOutput):
    """transformers' `MultipleChoiceModelOutput` with `aux_loss` and `router_logits`."""


# --- positions and masks ---------------------------------------------------------------------------------------------


def rotary_embedding(
    config: ModernALBERTConfig, position_ids: torch.Tensor, layer_type: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosines and sines of the rotary embedding for one layer type.

    Computed on the fly: a buffer outside the state dict would be left unset by meta-device loading.

    Args:
        position_ids: (batch or 1, sequence).
        dtype: Of the model; angles are float32, or float64 for a float64 model.

    Returns:
        Two tensors (batch or 1, sequence, 1, 1, head size / 2).
    """
    parameters = config.rope_parameters[layer_type]
    device = position_ids.device
    if parameters["rope_type"] == "default":
        head_size = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
        inverse_frequencies, scale = 1.0 / parameters["rope_theta"] ** exponents, 1.0
    else:
        rope_init = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        inverse_frequencies, scale = rope_init(config, device, seq_len=position_ids.shape[1], layer_type=layer_type)
    angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    angles = position_ids[..., None].to(angle_dtype) * inverse_frequencies.to(angle_dtype)
    angles = angles[:, :, None, None, :]
    return angles.cos() * scale, angles.sin() * scale


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate (batch, sequence, 2, heads, head size): queries and keys at once, in the dtype of `cos`."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    rotated = (
        torch.addcmul(first * cos, second, sin, value=-1),
        torch.addcmul(second * cos, first, sin),
    )
    return torch.cat(rotated, dim=-1).to(x.dtype)


def sequence_indices(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """
    Which of the sequences packed into its row each token belongs to.

    A new sequence starts where the position does not grow, or where padding begins or ends.

    Args:
        position_ids: (batch, sequence), as given by the caller.
        attention_mask: (batch, sequence) or None.

    Returns:
        (batch, sequence) integers, or None if no row holds more than one sequence. While tracing, where the values
        cannot be looked at, always integers: correct either way.
    """
    starts = position_ids[:, 1:] <= position_ids[:, :-1]
    if not torch.compiler.is_compiling() and not bool(starts.any()):
        return None
    if attention_mask is not None:
        starts = starts | (attention_mask[:, 1:] != attention_mask[:, :-1])
    return nn.functional.pad(starts.long().cumsum(dim=-1), (1, 0))


def is_flash_attention(config: ModernALBERTConfig) -> bool:
    return "flash" in (config._attn_implementation or "")


# Where a module keeps what is called with its inputs and outputs.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class PaddedBatch(NamedTuple):
    """Where the T real tokens of a padded batch lie. All work on single tokens is done on (1, T, ...) alone."""

    places: torch.Tensor  # (T,) indices into the flattened batch
    shape: torch.Size  # (batch, sequence)

    @classmethod
    def of(cls, attention_mask: torch.Tensor) -> "PaddedBatch | None":
        """None where no padding, or nothing but padding, is found in the mask (batch, sequence), on its device."""
        places = attention_mask.flatten().nonzero().flatten()
        return cls(places, attention_mask.shape) if 0 < len(places) < attention_mask.numel() else None

    def remove(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, sequence, ...) -> (1, T, ...)."""
        return x.flatten(0, 1).index_select(0, self.places.to(x.device)).unsqueeze(0)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """(1, T, ...) -> (batch, sequence, ...), zero in the padding."""
        padded = x.new_zeros(self.shape.numel(), *x.shape[2:])
        return padded.index_copy(0, self.places.to(x.device), x[0]).unflatten(0, self.shape)

    def flash_arguments(self) -> dict:
        """Variable-length arguments of transformers' flash attention for (1, T, ...)."""
        rows = torch.bincount(self.places // self.shape[1], minlength=self.shape[0])
        return flash_boundaries(nn.functional.pad(rows.cumsum(0), (1, 0)))


def prepare_attention(
    config: ModernALBERTConfig,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | dict | None,
    position_ids: torch.Tensor | None,
) -> tuple[dict, dict]:
    """
    The mask of each layer type in the form the attention implementation takes, and extra arguments for it.

    Args:
        hidden_states: (batch, sequence, d), for sizes, dtype and device.
        attention_mask: (batch, sequence) with 0 for padding; or (batch, 1, sequence, sequence), booleans or numbers to
            add, used as it is in every layer; or a dict from layer type to what the implementation takes; or None. Only
            the first form says which tokens are padding, for pooling and routing statistics.
        position_ids: (batch or 1, sequence) as given by the caller, or None. Where they reset, the rows are packed, and
            tokens attend within their own sequence only.
    """
    layer_types = set(config.layer_types)
    if isinstance(attention_mask, dict):
        return attention_mask, {}
    if attention_mask is not None and attention_mask.dim() == 4:
        if attention_mask.dtype == torch.bool and config._attn_implementation == "eager":
            # Eager adds its mask to the scores; the others take booleans as they are.
            zeros = hidden_states.new_zeros(attention_mask.shape)
            attention_mask = zeros.masked_fill(~attention_mask, torch.finfo(zeros.dtype).min)
        return dict.fromkeys(layer_types, attention_mask), {}

    mask_arguments = {"config": config, "inputs_embeds": hidden_states, "attention_mask": attention_mask}
    sequences = None
    if position_ids is not None:
        sequences = sequence_indices(position_ids.expand(hidden_states.shape[:2]), attention_mask)
    if sequences is not None:
        if is_flash_attention(config):
            return dict.fromkeys(layer_types), flash_sequence_arguments(sequences)
        # Padding is a sequence of its own here, so that no row of the mask is empty.
        mask_arguments |= {
            "attention_mask": None,
            "and_mask_function": packed_sequence_mask_function(sequences),
        }
    builders = {
        "full_attention": create_bidirectional_mask,
        "sliding_attention": create_bidirectional_sliding_window_mask,
    }
    return {layer_type: builders[layer_type](**mask_arguments) for layer_type in layer_types}, {}


def flash_sequence_arguments(sequences: torch.Tensor) -> dict:
    """Variable-length arguments of transformers' flash attention for packed rows, all rows flattened into one."""
    row_starts = torch.ones_like(sequences[:, :1], dtype=torch.bool)
    starts = torch.cat([row_starts, sequences[:, 1:] != sequences[:, :-1]], dim=1).flatten().nonzero().flatten()
    return flash_boundaries(nn.functional.pad(starts, (0, 1), value=sequences.numel()))


def flash_boundaries(boundaries: torch.Tensor) -> dict:
    """Where sequences begin, and the end of the last, as transformers' flash attention wants to be told."""
    boundaries = boundaries.to(torch.int32)
    longest = int(boundaries.diff().max())
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


# --- the encoder -----------------------------------------------------------------------------------------------------


class EmbeddingProjection(nn.Module):
    """
    The second factor of the embedding, (d, e), used in both directions.

    Both are calls of this module: what hooks into modules to bring their weights (offloading, sharding) sees each. It
    is no `nn.Linear`, because adapters put on every linear layer could not follow it backwards.
    """

    def __init__(self, embedding_size: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, embedding_size))
        # Keeps the scale an embedding of full width would have (our decision).
        self.init_std = embedding_size**-0.5

    def forward(self, x: torch.Tensor, back: bool = False) -> torch.Tensor:
        """(..., e) -> (..., d), or back for the tied decoder: (..., d) -> (..., e)."""
        return x @ self.weight if back else x @ self.weight.t()


class ModernALBERTEmbeddings(nn.Module):
    """Token embedding of width e, projected to d where it is factorised, and normalised."""

    def __init__(self, config: ModernALBERTConfig):
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.tok_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.projection = None
        if config.embedding_size is not None:
            self.projection = EmbeddingProjection(width, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        self.drop = nn.Dropout(config.embedding_dropout)

    def forward(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Ids (batch, sequence), or embeddings (batch, sequence, e) -> (batch, sequence, d)."""
        embeddings = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.projection is not None:
            embeddings = self.projection(embeddings)
        return self.drop(self.norm(embeddings))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; the only implementation that returns its weights (batch, heads, sequence, sequence)."""
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        # In the scores' dtype, whose lowest number may be above the mask's: a row of -inf would have no softmax.
        lowest = torch.finfo(scores.dtype).min
        scores = scores + attention_mask.clamp(min=lowest).to(scores.dtype)
    # Half precision is summed in float32 inside.
    weights = scores.softmax(dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ModernALBERTAttention(nn.Module):
    """Bidirectional multi-head attention. Which layer type it serves is told per call: a group may serve both."""

    is_causal = False

    def __init__(self, config: ModernALBERTConfig):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.Wo = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.Wo.init_std = config.residual_initializer_range
        self.out_drop = nn.Dropout(config.attention_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        layer_type: str,
        padding: PaddedBatch | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        (batch, sequence, d) -> (batch, sequence, d), attention weights or None.

        With `padding` the states are (1, T, d), and sequences meet in the form that `attention_mask` has.
        """
        batch_and_sequence = hidden_states.shape[:-1]
        qkv = self.Wqkv(hidden_states).view(*batch_and_sequence, 3, -1, self.head_size)
        query_and_key, value = apply_rotary(qkv[:, :, :2], *position_embeddings), qkv[:, :, 2]
        if padding is not None:
            query_and_key, value = padding.restore(query_and_key), padding.restore(value)
        query, key = query_and_key.transpose(1, 3).unbind(dim=2)
        value = value.transpose(1, 2)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            # Flash attention's window excludes its last token, ours includes it.
            sliding_window=self.config.sliding_window + 1 if layer_type == "sliding_attention" else None,
            deterministic=self.config.deterministic_flash_attn,
            **kwargs,
        )
        if padding is not None:
            output = padding.remove(output)
        return self.out_drop(self.Wo(output.reshape(*batch_and_sequence, -1))), weights


class ModernALBERTLayer(GradientCheckpointingLayer):
    """The weights of one group: pre-norm attention and FFN, run at each of the group's G positions."""

    def __init__(self, config: ModernALBERTConfig, group: int):
        super().__init__()
        norm = {"eps": config.norm_eps, "bias": config.norm_bias}
        self.skip_first_attn_norm = config.skip_first_attn_norm and group == 0
        # Used at layer 0 alone, the norm that layer 0 skips would be a weight nothing reads.
        has_attn_norm = not (self.skip_first_attn_norm and config.group_depth == 1)
        self.attn_norm = nn.LayerNorm(config.hidden_size, **norm) if has_attn_norm else nn.Identity()
        self.attn = ModernALBERTAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, **norm)
        self.mlp = build_feed_forward(config, group)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position: int,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        layer_type: str,
        mixing_weights: torch.Tensor | None = None,
        return_router_logits: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        (batch, sequence, d) -> (batch, sequence, d), attention weights or None, router logits or None.

        `position` is the layer's place in the group, 0-based.
        """
        skip_norm = self.skip_first_attn_norm and position == 0
        attention, attention_weights = self.attn(
            hidden_states if skip_norm else self.attn_norm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            layer_type=layer_type,
            **kwargs,
        )
        hidden_states = hidden_states + attention
        ffn_output, router_logits = self.mlp(
            self.mlp_norm(hidden_states), position, mixing_weights, return_router_logits
        )
        return hidden_states + ffn_output, attention_weights, router_logits


class ModernALBERTPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving, shared by the encoder and its heads."""

    config: ModernALBERTConfig
    config_class = ModernALBERTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Trainer passes the number of labels in the whole optimizer step only to the heads that average over tokens.
    accepts_loss_kwargs = False
    _no_split_modules = ["ModernALBERTEmbeddings", "ModernALBERTLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: ModernALBERTConfig, *args, **kwargs):
        # Fields may have been overridden after construction, by from_pretrained for one.
        config.validate()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """
        ModernBERT's scheme: truncated normals of the deviation `init_std` that a layer's owner put on it.

        It acts on leaves alone: for code outside transformers, modules that own no parameter are not visited.
        """
        if isinstance(module, (nn.Linear, nn.Embedding, EmbeddingProjection, MoLRouter)):
            std = getattr(module, "init_std", self.config.initializer_range)
            cutoff = std * (self.config.initializer_cutoff_factor or 3)
            init.trunc_normal_(module.weight, mean=0.0, std=std, a=-cutoff, b=cutoff)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, FeedForward):
            module.init_modulation()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers. Loading makes parameters anew, so routers that mix nothing are frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
            if isinstance(module, RoutedFeedForward):
                module.freeze_idle_router()
        return loaded

    def floating_point_ops(self, input_dict: dict, exclude_embeddings: bool = True) -> int:
        """
        Floating-point operations of a forward and backward pass, counting a shared group once for each use.

        Args:
            input_dict: The model's inputs; `input_ids` (..., sequence) or `inputs_embeds` (..., sequence, e).
            exclude_embeddings: Leave out the masked-LM decoder, whose weight is the embedding.
        """
        if "input_ids" in input_dict:
            num_tokens, length = input_dict["input_ids"].numel(), input_dict["input_ids"].shape[-1]
        else:
            num_tokens, length = input_dict["inputs_embeds"][..., 0].numel(), input_dict["inputs_embeds"].shape[-2]
        head_parameters = sum(
            parameter.numel()
            for name, parameter in self.named_parameters()
            if name.startswith(("head.", "classifier."))
        )
        if not exclude_embeddings and hasattr(self, "decoder"):
            head_parameters += self.decoder.weight.numel()
        return 6 * num_tokens * (self.base_model.multiply_adds_per_token(length) + head_parameters)


class ModernALBERTModel(ModernALBERTPreTrainedModel):
    """The encoder: token ids to token states."""

    def __init__(self, config: ModernALBERTConfig):
        super().__init__(config)
        self.embeddings = ModernALBERTEmbeddings(config)
        self.groups = nn.ModuleList([ModernALBERTLayer(config, group) for group in range(config.num_groups)])
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        # As the FFNs were built: changing the configuration afterwards changes neither.
        self.expert_mixing = config.expert_mixing
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.tok_embeddings = value

    def multiply_adds_per_token(self, sequence_length: int) -> int:
        """Multiply-adds of one token's forward pass: every use of every group, attention scores included."""
        config = self.config
        d = config.hidden_size
        total = 0 if self.embeddings.projection is None else self.embeddings.projection.weight.numel()
        for layer in range(config.num_hidden_layers):
            group, position = divmod(layer, config.group_depth)
            f = config.ffn_width(group)
            total += 4 * d * d + 3 * d * f + 2 * sequence_length * d
            if group not in config.modulated_groups or not config.is_modulated_position(position):
                continue
            active = min(config.num_experts_per_tok, config.num_experts)
            if config.ffn_modulation in ("mol", "depth_lora"):
                active = active if config.ffn_modulation == "mol" else 1
                total += active * config.lora_rank * (2 * d + 3 * f)
            elif config.ffn_modulation == "moa":
                total += active * 2 * config.resolved_moa_bottleneck(group) * d
            if config.ffn_modulation in ("mol", "moa") and config.num_experts > 1:
                total += config.num_experts * d
        return total

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> ModernALBERTModelOutput:
        """
        Args:
            input_ids: (batch, sequence). Exactly one of `input_ids` and `inputs_embeds` is given.
            attention_mask: (batch, sequence), 0 for padding, on either side; or a prepared mask, see
                `prepare_attention`. Padding never changes what the other tokens get, and never counts in routing.
            position_ids: (batch or 1, sequence). Where they reset, a row holds several sequences, each of which gets
                what it would get alone.
            inputs_embeds: (batch, sequence, e), of the width of the factorised embedding.
            output_attentions: Return N tensors (batch, heads, sequence, sequence); needs eager attention.
            output_hidden_states: Return N + 1 tensors (batch, sequence, d); the last is the normed output.
            output_router_logits: Return one (batch, sequence, E) per routed layer.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, or attentions from an implementation that
                does not have them.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_router_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True is not allowed with attn_implementation={config._attn_implementation!r}: only "
                "'eager' returns attention weights."
            )

        padding = None
        if position_ids is None:
            device = (inputs_embeds if input_ids is None else input_ids).device
            padding = self.find_padding(attention_mask, device)
        if padding is not None:
            input_ids, inputs_embeds = (None if x is None else padding.remove(x) for x in (input_ids, inputs_embeds))
        hidden_states = self.embeddings(input_ids, inputs_embeds)
        if padding is None:
            padded_states = hidden_states
        else:  # the batch's shape without its states
            padded_states = hidden_states.new_empty(()).expand(*padding.shape, config.hidden_size)
        if padding is not None and is_flash_attention(config):
            masks, attention_arguments = dict.fromkeys(set(config.layer_types)), padding.flash_arguments()
        else:
            masks, attention_arguments = prepare_attention(config, padded_states, attention_mask, position_ids)
        if position_ids is None:
            position_ids = torch.arange(padded_states.shape[1], device=hidden_states.device).unsqueeze(0)
        if padding is not None:
            position_ids = padding.remove(position_ids.expand(padding.shape))
        rotary = {
            layer_type: rotary_embedding(config, position_ids, layer_type, hidden_states.dtype)
            for layer_type in set(config.layer_types)
        }
        mixing_weights = [group.mlp.mixing_weights() for group in self.groups]
        # A training forward without gradients (dropout sampling, say) is not a training step.
        update_statistics = self.training and torch.is_grad_enabled() and self.expert_mixing != "uniform"

        # Flash attention takes the sequences one after another, as the states without padding are.
        padding_in_attention = None if is_flash_attention(config) else padding

        def restore(x: torch.Tensor) -> torch.Tensor:
            return x if padding is None else padding.restore(x)

        all_hidden_states, all_attentions = [], []
        routed_groups, all_router_logits = [], []
        for layer, layer_type in enumerate(config.layer_types):
            group, position = divmod(layer, config.group_depth)
            if output_hidden_states:
                all_hidden_states.append(restore(hidden_states))
            hidden_states, attention_weights, router_logits = self.groups[group](
                hidden_states,
                position=position,
                position_embeddings=rotary[layer_type],
                attention_mask=masks[layer_type],
                layer_type=layer_type,
                mixing_weights=mixing_weights[group],
                return_router_logits=output_router_logits or update_statistics,
                padding=padding_in_attention,
                **(attention_arguments | kwargs),
            )
            if output_attentions:
                all_attentions.append(attention_weights)
            if router_logits is not None:
                routed_groups.append(group)
                all_router_logits.append(router_logits)
        hidden_states = restore(self.final_norm(hidden_states))
        if output_hidden_states:
            all_hidden_states.append(hidden_states)

        aux_loss = None
        if self.training and all_router_logits:
            has_padding = padding is None and getattr(attention_mask, "ndim", 0) == 2
            padding_mask = attention_mask if has_padding else None
            summary = summarise_routing(all_router_logits, config.num_experts_per_tok, padding_mask)
            if self.expert_mixing == "token":
                aux_loss = (
                    config.router_aux_loss_coef * summary.balance_loss + config.router_z_loss_coef * summary.z_loss
                )
            if update_statistics:
                self._update_usage(routed_groups, summary.usage, summary.num_tokens)

        return ModernALBERTModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
            aux_loss=aux_loss,
            router_logits=tuple(map(restore, all_router_logits))
            if output_router_logits and all_router_logits
            else None,
        )

    def find_padding(self, attention_mask: torch.Tensor | dict | None, device: torch.device) -> PaddedBatch | None:
        """
        Where a padded batch's real tokens lie, or None where the batch is to be worked on as it is.

        Not while a graph is traced, for which the number of tokens would be a constant; nor where something hooks into
        the encoder's modules, which may count on rows being sequences (adapters chosen row by row, for one). The hook
        that gradient checkpointing puts on the embeddings counts on nothing.
        """
        if getattr(attention_mask, "ndim", 0) != 2 or is_tracing(attention_mask):
            return None
        inner = (module for child in self.children() for module in child.modules())
        hooks = (hook for module in inner for name in HOOKS for hook in getattr(module, name).values())
        if any(getattr(hook, "__name__", None) != "make_inputs_require_grads" for hook in hooks):
            return None
        return PaddedBatch.of(attention_mask.to(device))

    @torch.no_grad()
    def _update_usage(self, routed_groups: list[int], usage: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """
        Let every router's statistics follow this forward, over all processes.

        It happens here, after the layers, so that a checkpoint recompute of a layer does not count twice.

        Args:
            routed_groups: Group of each of the R router calls.
            usage: (R, E) mean routing weights on this process.
            num_tokens: Scalar, real tokens on this process.
        """
        usage, num_tokens = sum_over_processes(usage * num_tokens, num_tokens)
        usage = usage / num_tokens.clamp(min=1)
        for group in sorted(set(routed_groups)):
            # A group's layers follow one another. Indices in a list would have to reach the GPU first.
            start, calls = routed_groups.index(group), routed_groups.count(group)
            self.groups[group].mlp.update_usage(usage[start : start + calls], num_tokens)


# --- heads -----------------------------------------------------------------------------------------------------------


class ModernALBERTPredictionHead(nn.Module):
    """Dense, activation, norm: (..., d) -> (..., d)."""

    def __init__(self, config: ModernALBERTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.dense.init_std = config.residual_initializer_range
        self.act = ACT2FN[config.classifier_activation]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act(self.dense(hidden_states)))


def routing_fields(outputs: ModernALBERTModelOutput) -> dict:
    """The fields every head hands on from the encoder."""
    return {
        "hidden_states": outputs.hidden_states,
        "attentions": outputs.attentions,
        "aux_loss": outputs.aux_loss,
        "router_logits": outputs.router_logits,
    }


def add_auxiliary_loss(
    loss: torch.Tensor | None,
    aux_loss: torch.Tensor | None,
    labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor | None:
    """
    The training loss: task loss plus auxiliary loss (present in training only).

    Where the task loss is a sum divided by the labels of the whole optimizer step, over several micro-batches and
    processes, the auxiliary loss is weighted by this micro-batch's share of them, so that the shares add up to 1.
    """
    if loss is None or aux_loss is None:
        return loss
    if num_items_in_batch is not None:
        aux_loss = aux_loss * ((labels != -100).sum() / num_items_in_batch)
    return loss + aux_loss


class ModernALBERTForMaskedLM(ModernALBERTPreTrainedModel):
    """
    Masked language model. The decoder weight is the (V, e) embedding; a factorised embedding's projection brings the
    head's output from d to e, so that the tie holds through the factorisation.
    """

    _tied_weights_keys = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: ModernALBERTConfig):
        super().__init__(config)
        self.model = ModernALBERTModel(config)
        self.head = ModernALBERTPredictionHead(config)
        self.decoder = nn.Linear(config.embedding_size or config.hidden_size, config.vocab_size, config.decoder_bias)
        self.decoder.init_std = config.residual_initializer_range
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.decoder = new_embeddings

    def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Token states (..., d) -> what the decoder multiplies with the embedding, (..., e)."""
        hidden_states = self.head(hidden_states)
        if self.model.embeddings.projection is not None:
            hidden_states = self.model.embeddings.projection(hidden_states, back=True)
        return hidden_states

    def decode(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Token states (..., d) -> logits (..., V)."""
        return self.decoder(self.transform(hidden_states))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> ModernALBERTMaskedLMOutput:
        """
        Inputs as in `ModernALBERTModel.forward`.

        Args:
            labels: (batch, sequence), -100 where there is nothing to predict. With `config.sparse_prediction` logits
                are (number of labels, V), else (batch, sequence, V).
            num_items_in_batch: Labels in the whole optimizer step, given by Trainer.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs)
        hidden_states = outputs.last_hidden_state
        if self.config.sparse_prediction and labels is not None:
            labels = labels.reshape(-1)
            labelled = labels != self.config.sparse_pred_ignore_index
            hidden_states, labels = hidden_states.flatten(0, 1)[labelled], labels[labelled]
        logits = self.decode(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
            loss = add_auxiliary_loss(loss, outputs.aux_loss, labels, num_items_in_batch)
        return ModernALBERTMaskedLMOutput(loss=loss, logits=logits, **routing_fields(outputs))


class ModernALBERTClassifierModel(ModernALBERTPreTrainedModel):
    """Encoder, prediction head, dropout and a linear classifier: what the four task heads share."""

    def __init__(self, config: ModernALBERTConfig, num_outputs: int | None = None):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ModernALBERTModel(config)
        self.head = ModernALBERTPredictionHead(config)
        self.drop = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, num_outputs or config.num_labels)
        self.classifier.init_std = config.hidden_size**-0.5
        self.post_init()

    def classify(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., outputs)."""
        return self.classifier(self.drop(self.head(hidden_states)))

    def pool(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | dict | None) -> torch.Tensor:
        """
        One state per row by `config.classifier_pooling`: (batch, sequence, d) -> (batch, d).

        "cls" takes the first real token, wherever padding puts it; "mean" averages the real tokens.
        """
        if getattr(attention_mask, "ndim", 0) != 2:
            attention_mask = hidden_states.new_ones(hidden_states.shape[:2])
        if self.config.classifier_pooling == "cls":
            first = (attention_mask != 0).int().argmax(dim=-1)
            return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), first]
        weights = attention_mask.to(hidden_states.dtype).unsqueeze(-1)
        return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class ModernALBERTForSequenceClassification(ModernALBERTClassifierModel):
    """One label, several labels, or a number per sequence, by `config.problem_type` as in transformers."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> ModernALBERTSequenceClassifierOutput:
        """Inputs as in `ModernALBERTModel.forward`; labels (batch,), or (batch, num_labels) floats for multi-label."""
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs)
        logits = self.classify(self.pool(outputs.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            loss = add_auxiliary_loss(loss, outputs.aux_loss)
        return ModernALBERTSequenceClassifierOutput(loss=loss, logits=logits, **routing_fields(outputs))


class ModernALBERTForTokenClassification(ModernALBERTClassifierModel):
    """A label per token."""

    accepts_loss_kwargs = True

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> ModernALBERTTokenClassifierOutput:
        """Inputs as in `ModernALBERTModel.forward`; labels (batch, sequence), -100 where there is none."""
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs)
        logits = self.classify(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items_in_batch)
            loss = add_auxiliary_loss(loss, outputs.aux_loss, labels, num_items_in_batch)
        return ModernALBERTTokenClassifierOutput(loss=loss, logits=logits, **routing_fields(outputs))


class ModernALBERTForQuestionAnswering(ModernALBERTClassifierModel):
    """Start and end of an answer span."""

    def __init__(self, config: ModernALBERTConfig):
        super().__init__(config, num_outputs=2)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs,
    ) -> ModernALBERTQuestionAnsweringOutput:
        """Inputs as in `ModernALBERTModel.forward`; start and end positions (batch,), token indices."""
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs)
        start_logits, end_logits = self.classify(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
            loss = add_auxiliary_loss(loss, outputs.aux_loss)
        return ModernALBERTQuestionAnsweringOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            **routing_fields(outputs),
        )


class ModernALBERTForMultipleChoice(ModernALBERTClassifierModel):
    """A score per choice; inputs are (batch, choices, sequence)."""

    def __init__(self, config: ModernALBERTConfig):
        super().__init__(config, num_outputs=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> ModernALBERTMultipleChoiceOutput:
        """Inputs as in `ModernALBERTModel.forward` with a choices axis after the batch; labels (batch,)."""

        def flatten(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.flatten(0, 1)

        num_choices = (inputs_embeds if input_ids is None else input_ids).shape[1]
        attention_mask = flatten(attention_mask)
        outputs = self.model(
            flatten(input_ids),
            attention_mask,
            flatten(position_ids),
            flatten(inputs_embeds),
            return_dict=True,
            **kwargs,
        )
        logits = self.classify(self.pool(outputs.last_hidden_state, attention_mask)).view(-1, num_choices)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
            loss = add_auxiliary_loss(loss, outputs.aux_loss)
        return ModernALBERTMultipleChoiceOutput(loss=loss, logits=logits, **routing_fields(outputs))


# --- saving ----------------------------------------------------------------------------------------------------------

# Each class takes its code along when it is saved, in Trainer checkpoints too.
ModernALBERTModel.register_for_auto_class("AutoModel")
ModernALBERTForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
ModernALBERTForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
ModernALBERTForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
ModernALBERTForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
ModernALBERTForMultipleChoice.register_for_auto_class("AutoModelForMultipleChoice")

__all__ = [
    "ModernALBERTPreTrainedModel",
    "ModernALBERTModel",
    "ModernALBERTForMaskedLM",
    "ModernALBERTForSequenceClassification",
    "ModernALBERTForTokenClassification",
    "ModernALBERTForQuestionAnswering",
    "ModernALBERTForMultipleChoice",
]
