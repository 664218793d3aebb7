# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The recursive encoder: K groups of weights used N = K G times, and its task heads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from .mol_backends import is_transformed
from .mol_grouped import set_rows  # importing the module registers its backend


try:
    from .mol_triton import triton_mol  # noqa: F401  registers the backend
except ImportError:  # no triton: select_mol_backend says so where it is asked for
    pass


# --- outputs ---------------------------------------------------------------------------------------------------------


@dataclass
class RoutingOutput:
    """
    Fields that routing adds to every output.

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
    Compute cosines and sines of the rotary embedding for one layer type.

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
        # Some types depend on the longest sequence, whose length is not that of rows which hold several.
        longest = position_ids.shape[1] if is_traced(position_ids) else int(position_ids.max()) + 1
        rope_init = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        inverse_frequencies, scale = rope_init(config, device, seq_len=longest, layer_type=layer_type)
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


def is_traced(x: torch.Tensor) -> bool:
    """
    Return whether values of x cannot be looked at: a graph is traced, or torch.func or forward-mode AD is at work.
    """
    return is_tracing(x) or is_transformed()


def sequence_indices(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """
    Which of the sequences packed into its row each token belongs to.

    A new sequence starts at a token whose position is not greater than that of the token before it, padding left aside.

    Args:
        position_ids: (batch, sequence), as given by the caller.
        attention_mask: (batch, sequence), 0 for padding, or None.

    Returns:
        (batch, sequence) integers, -1 for padding, or None if no row holds more than one sequence. While a graph is
        traced, always integers: correct either way.
    """
    if attention_mask is None:
        starts = nn.functional.pad(position_ids[:, 1:] <= position_ids[:, :-1], (1, 0))
    else:
        real = attention_mask.to(position_ids.device) != 0
        columns = torch.arange(real.shape[1], device=real.device)
        # The last token at or before each place, -1 where there is none.
        last = torch.where(real, columns, -1).cummax(dim=1).values
        before = nn.functional.pad(last[:, :-1], (1, 0), value=-1)
        starts = real & (before >= 0) & (position_ids <= position_ids.gather(1, before.clamp(min=0)))
    if not is_traced(position_ids) and not bool(starts.any()):
        return None
    sequences = starts.long().cumsum(dim=1)
    return sequences if attention_mask is None else sequences.masked_fill(~real, -1)


def is_flash_attention(config: ModernALBERTConfig) -> bool:
    return "flash" in (config._attn_implementation or "")


def flash_boundaries(boundaries: torch.Tensor) -> dict:
    """Return where sequences begin, and where the last one ends, in the form of transformers' flash attention."""
    boundaries = boundaries.to(torch.int32)
    longest = int(boundaries.diff().max())
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def flash_sequence_arguments(sequences: torch.Tensor) -> dict:
    """Variable-length arguments of transformers' flash attention for packed rows, all rows flattened into one."""
    row_starts = torch.ones_like(sequences[:, :1], dtype=torch.bool)
    starts = torch.cat([row_starts, sequences[:, 1:] != sequences[:, :-1]], dim=1).flatten().nonzero().flatten()
    return flash_boundaries(nn.functional.pad(starts, (0, 1), value=sequences.numel()))


def build_masks(
    config: ModernALBERTConfig,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    real: torch.Tensor | None,
    sequences: torch.Tensor | None,
) -> dict:
    """
    Build the mask of each layer type for a batch (batch, sequence), in the form the attention implementation takes.

    Args:
        real: (batch, sequence) booleans, false for padding; None = no padding.
        sequences: As `sequence_indices` returns them.
    """
    arguments = {
        "config": config,
        # transformers reads shape, dtype and device from it.
        "inputs_embeds": torch.empty((), dtype=dtype, device=device).expand(*shape, config.hidden_size),
        "attention_mask": real,
        # A mask of ones is left out, unless its values cannot be looked at.
        "allow_is_bidirectional_skip": not is_transformed(),
    }
    if sequences is not None:
        # Padding is a sequence of its own here, so that no row of the mask is empty.
        arguments |= {"attention_mask": None, "and_mask_function": packed_sequence_mask_function(sequences)}
    builders = {
        "full_attention": create_bidirectional_mask,
        "sliding_attention": create_bidirectional_sliding_window_mask,
    }
    return {layer_type: builders[layer_type](**arguments) for layer_type in set(config.layer_types)}


def prepare_given_mask(config: ModernALBERTConfig, mask: torch.Tensor | dict, dtype: torch.dtype) -> dict:
    """Give a mask that the caller prepared, (batch, heads or 1, sequence, sequence) or a dict, to each layer type."""
    layer_types = set(config.layer_types)
    if isinstance(mask, dict):
        return mask
    if not isinstance(mask, torch.Tensor):
        return dict.fromkeys(layer_types, mask)
    if mask.dtype != torch.bool:
        mask = mask.to(dtype)
    elif config._attn_implementation != "sdpa":
        # The others add their mask to the scores.
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return dict.fromkeys(layer_types, mask)


def check_attention_mask(config: ModernALBERTConfig, shape: tuple[int, int], mask: torch.Tensor | dict | None) -> None:
    """
    Raises:
        ValueError: a mask is of no form that `ModernALBERTModel.forward` knows, or of the wrong shape.
    """
    batch, length = shape
    if mask is None:
        return
    if isinstance(mask, dict):
        missing = sorted(set(config.layer_types) - set(mask))
        if missing:
            raise ValueError(f"attention_mask with the keys {sorted(mask)} lacks the layer types {missing}.")
        return
    if not isinstance(mask, torch.Tensor):  # flex attention's own, for one
        return
    if is_traced(mask):  # neither sizes nor values can be looked at
        return
    if mask.dim() not in (2, 4):
        raise ValueError(
            f"attention_mask has {mask.dim()} dimensions; it must be (batch, sequence), or (batch, 1 or heads, "
            "sequence, sequence)."
        )
    if mask.dim() == 2:
        if tuple(mask.shape) != (batch, length):
            raise ValueError(
                f"attention_mask has the shape {tuple(mask.shape)}; it must be that of the inputs, {(batch, length)}."
            )
        if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError(
                "attention_mask (batch, sequence) has values other than 0 and 1; it must be 1 for tokens and 0 for "
                "padding."
            )
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"attention_mask of 4 dimensions has the dtype {mask.dtype}; it must be boolean, true where a token is "
            "seen, or floating, to be added to the scores."
        )
    allowed = ((1, batch), (1, config.num_attention_heads), (1, length), (length,))
    if any(size not in sizes for size, sizes in zip(mask.shape, allowed)):
        raise ValueError(
            f"attention_mask has the shape {tuple(mask.shape)}; it must be (batch, 1 or heads, sequence, sequence) "
            f"for inputs {(batch, length)}."
        )
    if is_flash_attention(config):
        raise ValueError(
            f"attention_mask of 4 dimensions is not allowed with attn_implementation={config._attn_implementation!r}, "
            "which knows padding and packed rows only; use 'sdpa'."
        )


# Where a module keeps what is called with its inputs and outputs.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


# --- the layout of a batch's tokens ----------------------------------------------------------------------------------


class TakeRows(torch.autograd.Function):
    """
    x (n, ...) -> x[rows]. The gradient is put in place, not added: several times as fast.

    The first `num_distinct` rows differ; None = all of them. Rows after these get no gradient.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, rows: torch.Tensor, num_distinct: int | None = None) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows, ctx.num_distinct = x.shape[0], num_distinct
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        rows = slice(ctx.num_distinct)
        return PutRows.apply(gradient[rows], ctx.saved_tensors[0][rows], ctx.num_rows), None, None


class PutRows(torch.autograd.Function):
    """x (t, ...) -> zeros (num_rows, ...) with x at `rows` (t,), which differ: the inverse of `TakeRows`."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
        ctx.save_for_backward(rows)
        target = x.new_zeros(num_rows, x[0].numel())
        if x.device.type == "cpu":
            set_rows(target, rows, x.flatten(1))
        else:
            target.index_copy_(0, rows, x.flatten(1))
        return target.unflatten(1, x.shape[1:])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return TakeRows.apply(gradient, ctx.saved_tensors[0]), None, None


class Bucket(NamedTuple):
    """Sequences of like length, side by side among the T tokens: in attention, n padded rows of length L."""

    num_tokens: int
    shape: tuple[int, int]  # (n, L)
    cells: torch.Tensor | None  # (num_tokens,) place of each token in the n L; None where the tokens fill it in order
    masks: dict  # by layer type

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Map (1, num_tokens, ...) -> (n, L, ...)."""
        x = x.squeeze(0)
        if self.cells is not None:
            x = PutRows.apply(x, self.cells, self.shape[0] * self.shape[1])
        return x.unflatten(0, self.shape)

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """Map (n, L, ...) -> (1, num_tokens, ...)."""
        x = x.flatten(0, 1)
        if self.cells is not None:
            x = TakeRows.apply(x, self.cells)
        return x.unsqueeze(0)


def compiles_each_shape(device: torch.device, dtype: torch.dtype) -> bool:
    """
    Return whether products of this dtype, or of autocast's, are by kernels that are compiled for every new shape.

    So it is in half precision on a CPU, where oneDNN takes as long for that as for the product itself, and where an odd
    number of rows halves the speed of a weight's gradient (measured: docs/performance.md).
    """
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return device.type == "cpu" and dtype in (torch.float16, torch.bfloat16)


def round_up_rows(num_rows: int) -> int:
    """Return the next of few numbers of rows, at most a sixteenth more (or 7): for `compiles_each_shape`."""
    step = max(8, 1 << max(0, num_rows.bit_length() - 5))
    return -(-num_rows // step) * step


# Share of a bucket that may be padding.
BUCKET_PADDING = 0.25
# Share of a batch that may be padding where it stays as it is because attention would gain nothing.
MAX_KEPT_PADDING = 1 / 16


def batches_by_length(lengths: Sequence[int], max_padding: float = BUCKET_PADDING) -> list[list[int]]:
    """Group indices into batches of similar length, the longest first, each with at most `max_padding` of padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    tokens = 0
    for i in order:
        longest = lengths[batches[-1][0]] if batches else 0
        if not batches or tokens + lengths[i] < (1 - max_padding) * longest * (len(batches[-1]) + 1):
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += lengths[i]
    return batches


class TokenSpans(NamedTuple):
    """
    The T tokens of a batch that are no padding, sequence by sequence.

    A sequence spans the places from its first to its last token; padding in between stays a hole, so that positions,
    and the windows of sliding layers, are by place.
    """

    places: torch.Tensor  # (T,) in the flattened batch
    firsts: torch.Tensor  # (S,) which of the T tokens begins each sequence
    lengths: torch.Tensor  # (S,) places that each sequence spans

    @classmethod
    def find(
        cls, shape: torch.Size, device: torch.device, real: torch.Tensor | None, sequences: torch.Tensor | None
    ) -> "TokenSpans":
        """
        Args:
            shape: (batch, sequence).
            real: (batch, sequence) booleans, false for padding, of which some are true; None = no padding.
            sequences: As `sequence_indices` returns them.
        """
        if real is None:
            places = torch.arange(shape.numel(), device=device)
        else:
            places = real.flatten().nonzero().flatten()
        owners = places.div(shape[1], rounding_mode="floor")
        if sequences is not None:
            owners = owners * shape[1] + sequences.flatten()[places]
        starts = nn.functional.pad(owners[1:] != owners[:-1], (1, 0), value=True)
        firsts = starts.nonzero().flatten()
        lasts = nn.functional.pad(firsts[1:] - 1, (0, 1), value=len(places) - 1)
        return cls(places, firsts, places[lasts] - places[firsts] + 1)

    @property
    def counts(self) -> torch.Tensor:
        """(S,) tokens of each sequence."""
        return nn.functional.pad(self.firsts, (0, 1), value=len(self.places)).diff()

    def flash_arguments(self) -> dict:
        """Variable-length arguments of transformers' flash attention for (1, T, ...)."""
        return flash_boundaries(nn.functional.pad(self.firsts, (0, 1), value=len(self.places)))

    def pays(self, shape: torch.Size) -> bool:
        """
        Return whether the tokens by themselves, in buckets, are less work than the batch (batch, sequence) as it is.
        """
        if len(self.places) < (1 - MAX_KEPT_PADDING) * shape.numel():
            return True
        groups = batches_by_length(self.lengths.tolist())
        scores = sum(len(group) * int(self.lengths[group].max()) ** 2 for group in groups)
        return scores < shape.numel() * shape[1]

    def refuse_holes(self, config: ModernALBERTConfig, is_packed: bool) -> None:
        """Raise a ValueError for padding inside a sequence, which flash attention closes up, where that is wrong."""
        if (is_packed or "sliding_attention" in config.layer_types) and bool((self.lengths != self.counts).any()):
            raise ValueError(
                "attention_mask has padding between the tokens of a sequence, which is not allowed with "
                f"attn_implementation={config._attn_implementation!r} in sliding layers and packed rows; use 'sdpa'."
            )

    def in_buckets(self, config: ModernALBERTConfig, dtype: torch.dtype) -> tuple[torch.Tensor, list[Bucket]]:
        """Return the tokens' places in the order of buckets, (T,), and the buckets."""
        groups = [sorted(group) for group in batches_by_length(self.lengths.tolist())]
        order = torch.tensor(sum(groups, []), device=self.places.device)
        counts = self.counts
        # Each token's sequence, by its rank in the order of buckets.
        owners = torch.repeat_interleave(order.argsort(), counts)
        layer_types = set(config.layer_types)
        places, columns = self.places, self.places - torch.repeat_interleave(self.places[self.firsts], counts)
        if len(groups) > 1:
            owners, tokens = owners.sort(stable=True)
            places, columns = places[tokens], columns[tokens]
        buckets, first_owner, first_token = [], 0, 0
        for group in groups:
            shape = (len(group), int(self.lengths[group].max()))
            num_tokens = int(counts[group].sum())
            own = slice(first_token, first_token + num_tokens)
            cells = real = None
            if num_tokens < shape[0] * shape[1]:
                cells = (owners[own] - first_owner) * shape[1] + columns[own]
                real = torch.zeros(shape, dtype=torch.bool, device=cells.device)
                real.view(-1)[cells] = True
            masks = {name: bucket_mask(config, name, shape, dtype, real, places.device) for name in layer_types}
            buckets.append(Bucket(num_tokens, shape, cells, masks))
            first_owner, first_token = first_owner + len(group), first_token + num_tokens
        return places, buckets


def bucket_mask(
    config: ModernALBERTConfig,
    layer_type: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    real: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor | None:
    """
    Build what a bucket (n, L) adds to its attention scores in one layer type: (n or 1, 1, L or 1, L) of 0 and -inf, or
    None.

    Args:
        real: (n, L) booleans, false for padding; None = no padding.
    """
    seen = None if real is None else real[:, None, None, :]
    if layer_type == "sliding_attention" and shape[1] > config.sliding_window + 1:
        columns = torch.arange(shape[1], device=device)
        near = ((columns[:, None] - columns).abs() <= config.sliding_window)[None, None]
        # What padding sees does not matter, but softmax needs it to see something.
        seen = near if seen is None else (near & seen) | ~real[:, None, :, None]
    if seen is None:
        return None
    # Numbers once, where booleans would be made numbers in every layer.
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


@dataclass
class TokenLayout:
    """
    Layout of a batch's tokens while the layers run, and the arguments of attention that follow. Built once a forward.

    Either the batch stays as it is, (batch, sequence, ...), or its T tokens that are no padding lie one after the
    other, (1, T, ...), and all work on single tokens is done on them alone. Attention then meets them in buckets of
    sequences of like length; FlashAttention takes them as they lie.

    Attributes:
        shape: (batch, sequence).
        real: (batch, sequence) booleans, false for padding; None = no padding is known of.
        places: (T,) where in the flattened batch the tokens come from; None = the batch stays as it is. Where
            `compiles_each_shape`, the first place is repeated at the end, up to `round_up_rows`.
        num_tokens: The T places that differ; None = the batch stays as it is.
        position_embeddings: Cosines and sines by layer type, for the tokens as they lie.
        masks: By layer type, for the batch as it is.
        buckets: Of the T tokens, in their order; None = attention takes the tokens as they lie.
        attention_arguments: Further arguments of the attention implementation.
    """

    shape: tuple[int, int]
    real: torch.Tensor | None
    places: torch.Tensor | None
    num_tokens: int | None
    position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]]
    masks: dict
    buckets: list[Bucket] | None
    attention_arguments: dict

    @classmethod
    def build(
        cls,
        config: ModernALBERTConfig,
        inputs: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        position_ids: torch.Tensor | None,
        dtype: torch.dtype,
        keep_batch: bool = False,
    ) -> "TokenLayout":
        """
        Args:
            inputs: Ids (batch, sequence) or embeddings (batch, sequence, e).
            attention_mask, position_ids: As in `ModernALBERTModel.forward`.
            dtype: Of the token states.
            keep_batch: The batch is to stay as it is. So it does, too, while a graph is traced, for which the number of
                tokens would be a constant; with a prepared mask; and, on a CPU, where it is nearly full and buckets
                would have no fewer attention scores.
        """
        shape, device = inputs.shape[:2], inputs.device
        check_attention_mask(config, shape, attention_mask)
        traced, is_flash = is_traced(inputs), is_flash_attention(config)
        real = sequences = None
        if getattr(attention_mask, "ndim", 0) == 2:
            real = attention_mask.to(device) != 0
            if not traced and bool(real.all()):
                real = None
        is_prepared = attention_mask is not None and getattr(attention_mask, "ndim", 0) != 2
        if position_ids is None:
            position_ids = torch.arange(shape[1], device=device).unsqueeze(0)
        elif not is_prepared:
            sequences = sequence_indices(position_ids.to(device).expand(shape), real)

        spans = None
        if not traced and (sequences is not None or (real is not None and bool(real.any()))):
            spans = TokenSpans.find(shape, device, real, sequences)
            if is_flash:
                spans.refuse_holes(config, is_packed=sequences is not None)
        splits = device.type == "cpu" and config._attn_implementation in ("eager", "sdpa")
        keep_batch = keep_batch or (splits and spans is not None and not spans.pays(shape))
        masks, buckets, arguments = dict.fromkeys(set(config.layer_types)), None, {}
        if keep_batch or spans is None or (real is None and not is_flash and not splits):
            places = None
            if is_prepared:
                masks = prepare_given_mask(config, attention_mask, dtype)
            elif is_flash and sequences is not None:
                arguments = flash_sequence_arguments(sequences)
            else:
                masks = build_masks(config, shape, dtype, device, real, sequences)
        elif is_flash:
            places, arguments = spans.places, spans.flash_arguments()
        elif splits:
            places, buckets = spans.in_buckets(config, dtype)
        else:
            places = spans.places
            buckets = [Bucket(len(places), shape, places, build_masks(config, shape, dtype, device, real, sequences))]
        num_tokens = None
        if places is not None:
            num_tokens = len(places)
            if compiles_each_shape(device, dtype):
                places = torch.cat([places, places[:1].expand(round_up_rows(num_tokens) - num_tokens)])
            position_ids = position_ids.expand(shape).flatten()[places].unsqueeze(0)
        rotary = {name: rotary_embedding(config, position_ids, name, dtype) for name in set(config.layer_types)}
        return cls(shape, real, places, num_tokens, rotary, masks, buckets, arguments)

    def pack(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """Map (batch, sequence, ...) -> as the tokens lie while the layers run."""
        if x is None or self.places is None:
            return x
        return TakeRows.apply(x.flatten(0, 1), self.places, self.num_tokens).unsqueeze(0)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens as they lie to (batch, sequence, ...), zero at padding: the same is returned from every layout."""
        if self.places is not None:
            tokens = slice(self.num_tokens)
            return PutRows.apply(x[0, tokens], self.places[tokens], self.shape.numel()).unflatten(0, self.shape)
        return x if self.real is None else x.masked_fill(~self.real.to(x.device).unsqueeze(-1), 0)

    @property
    def routed_tokens(self) -> torch.Tensor | None:
        """Booleans over the tokens as they lie, true for those that count in routing; None = all."""
        if self.places is None:
            return self.real
        if self.num_tokens == len(self.places):
            return None
        return (torch.arange(len(self.places), device=self.places.device) < self.num_tokens).unsqueeze(0)


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
        """Map (..., e) -> (..., d), or back for the tied decoder: (..., d) -> (..., e)."""
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
        """Embed ids (batch, sequence), or embeddings (batch, sequence, e), as (batch, sequence, d)."""
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
        buckets: list[Bucket] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Map (batch, sequence, d) -> (batch, sequence, d), attention weights or None.

        With `buckets` the states are (1, T, d), and the buckets have the masks; tokens after theirs attend to nothing.
        """
        batch_and_sequence = hidden_states.shape[:-1]
        qkv = self.Wqkv(hidden_states).view(*batch_and_sequence, 3, -1, self.head_size)
        query_and_key, value = qkv.split((2, 1), dim=2)
        query_and_key = apply_rotary(query_and_key, *position_embeddings)
        if buckets is None:
            context, weights = self.attend(query_and_key, value, attention_mask, layer_type, **kwargs)
        else:
            sizes, contexts, weights = [bucket.num_tokens for bucket in buckets], [], None
            num_repeated = query_and_key.shape[1] - sum(sizes)
            sizes.append(num_repeated)
            for bucket, *tokens in zip(buckets, query_and_key.split(sizes, dim=1), value.split(sizes, dim=1)):
                padded, _ = self.attend(*map(bucket.pad, tokens), bucket.masks[layer_type], layer_type, **kwargs)
                contexts.append(bucket.unpad(padded))
            if num_repeated:
                contexts.append(contexts[0].new_zeros(1, num_repeated, *contexts[0].shape[2:]))
            context = torch.cat(contexts, dim=1) if len(contexts) > 1 else contexts[0]
        return self.out_drop(self.Wo(context.reshape(*batch_and_sequence, -1))), weights

    def attend(
        self,
        query_and_key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layer_type: str,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map (batch, sequence, 2 and 1, heads, head size) -> (batch, sequence, heads, head size), weights or None."""
        query, key = query_and_key.transpose(1, 3).unbind(dim=2)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attention(
            self,
            query,
            key,
            value.squeeze(2).transpose(1, 2),
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            # Flash attention's window excludes its last token, ours includes it.
            sliding_window=self.config.sliding_window + 1 if layer_type == "sliding_attention" else None,
            deterministic=self.config.deterministic_flash_attn,
            **kwargs,
        )


class ModernALBERTLayerGroup(GradientCheckpointingLayer):
    """The weights of one group: pre-norm attention and FFN, run at each of the group's G depths."""

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
        depth: int,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        layer_type: str,
        expert_weights: torch.Tensor | None = None,
        return_router_logits: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Map (batch, sequence, d) -> (batch, sequence, d), attention weights or None, router logits or None.

        `depth` is the layer's place in the group, 0-based.
        """
        skip_norm = self.skip_first_attn_norm and depth == 0
        attention, attention_weights = self.attn(
            hidden_states if skip_norm else self.attn_norm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            layer_type=layer_type,
            **kwargs,
        )
        hidden_states = hidden_states + attention
        ffn_output, router_logits = self.mlp(self.mlp_norm(hidden_states), depth, expert_weights, return_router_logits)
        return hidden_states + ffn_output, attention_weights, router_logits


# What transformers' card of an uploaded model leaves out.
LOADING_NOTE = """## Loading

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)
```

The code of this model is in this repository: `trust_remote_code=True` runs it. Weights load as the `dtype` of
`config.json`; give `dtype="float32"` to train, `dtype="bfloat16"` to halve the memory. Experts are merged by
`merge_experts.py` of the package `modernalbert`: `folded/` loads in the same way, `adapter/` is a stock LoRA for
`PeftModel.from_pretrained` on the model in `base/`.
"""


class ModernALBERTPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving, shared by the encoder and its heads."""

    config: ModernALBERTConfig
    config_class = ModernALBERTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Trainer passes the number of labels in the whole optimizer step only to the heads that average over tokens.
    accepts_loss_kwargs = False
    _no_split_modules = ["ModernALBERTEmbeddings", "ModernALBERTLayerGroup"]
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
        Initialise as ModernBERT does: truncated normals of the deviation `init_std` that a layer's owner put on it.

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
        """Load as in transformers. Loading makes parameters anew, so routers that mix nothing are frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
            if isinstance(module, RoutedFeedForward):
                module.freeze_idle_router()
        return loaded

    def _upload_modified_files(self, working_dir, repo_id: str, *args, **kwargs):
        """Upload as transformers does; its model card is completed first, which does not say how to load this model."""
        card = Path(working_dir, "README.md")
        if card.is_file() and "trust_remote_code" not in (text := card.read_text("utf-8")):
            classes = {value.rsplit(".", 1)[-1]: name for name, value in self.config.auto_map.items()}
            auto_class = classes.get(type(self).__name__, "AutoModel")
            note = LOADING_NOTE.format(auto_class=auto_class, repo_id=repo_id)
            card.write_text(f"{text.rstrip()}\n\n{note}", "utf-8")
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

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
        self.groups = nn.ModuleList([ModernALBERTLayerGroup(config, group) for group in range(config.num_groups)])
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
        """Count the multiply-adds of one token's forward pass: every use of every group, attention scores included."""
        d, depth = self.config.hidden_size, self.config.group_depth
        attention = 4 * d * d + 2 * sequence_length * d
        embedding = 0 if self.embeddings.projection is None else self.embeddings.projection.weight.numel()
        ffns = sum(group.mlp.multiply_adds(i) for group in self.groups for i in range(depth))
        return embedding + self.config.num_hidden_layers * attention + ffns

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
            attention_mask: (batch, sequence), 1 for tokens and 0 for padding, wherever it lies; positions, and the
                windows of sliding layers, are by place. Padding never changes what the other tokens get, never counts
                in routing, and is zero in every state that is returned. Or a prepared mask, of which no token is known
                to be padding: (batch, 1 or heads, sequence, sequence), booleans (true = seen) or numbers to add, used
                as it is in every layer; or a dict from layer type to what the attention implementation takes.
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
        self._check_call(input_ids, inputs_embeds, output_attentions)

        layout = TokenLayout.build(
            config,
            inputs_embeds if input_ids is None else input_ids,
            attention_mask,
            position_ids,
            dtype=self.embeddings.norm.weight.dtype,
            # Attention weights are by row, and what is hooked may count on rows being sequences.
            keep_batch=output_attentions or self.is_hooked(),
        )
        hidden_states = self.embeddings(layout.pack(input_ids), layout.pack(inputs_embeds))
        expert_weights = [group.mlp.get_expert_weights() for group in self.groups]
        # A training forward without gradients (dropout sampling, say) is not a training step.
        update_statistics = self.training and torch.is_grad_enabled() and self.expert_mixing != "uniform"

        all_hidden_states, all_attentions = [], []
        routed_groups, all_router_logits = [], []
        for layer, layer_type in enumerate(config.layer_types):
            group, depth = divmod(layer, config.group_depth)
            if output_hidden_states or output_attentions:
                # The layers go on from what is returned, so that it gets a gradient.
                all_hidden_states.append(layout.unpack(hidden_states))
                hidden_states = layout.pack(all_hidden_states[-1])
            hidden_states, attention_weights, router_logits = self.groups[group](
                hidden_states,
                depth=depth,
                position_embeddings=layout.position_embeddings[layer_type],
                attention_mask=layout.masks[layer_type],
                layer_type=layer_type,
                buckets=layout.buckets,
                expert_weights=expert_weights[group],
                return_router_logits=output_router_logits or update_statistics,
                **(layout.attention_arguments | kwargs),
            )
            if output_attentions:
                all_attentions.append(attention_weights)
            if router_logits is not None:
                routed_groups.append(group)
                all_router_logits.append(router_logits)
        hidden_states = layout.unpack(self.final_norm(hidden_states))
        all_hidden_states.append(hidden_states)

        aux_loss = self._end_routing(all_router_logits, routed_groups, layout, update_statistics)
        returns_logits = output_router_logits and all_router_logits

        return ModernALBERTModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
            aux_loss=aux_loss,
            router_logits=tuple(map(layout.unpack, all_router_logits)) if returns_logits else None,
        )

    def _check_call(self, input_ids, inputs_embeds, output_attentions: bool) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True is not allowed with attn_implementation={self.config._attn_implementation!r}: "
                "only 'eager' returns attention weights."
            )

    def is_hooked(self) -> bool:
        """
        Return whether a module of the encoder has hooks, for example of adapters that are chosen row by row.

        The hook that gradient checkpointing puts on the embeddings does not count.
        """
        inner = (module for child in self.children() for module in child.modules())
        hooks = (hook for module in inner for name in HOOKS for hook in getattr(module, name).values())
        return any(getattr(hook, "__name__", None) != "make_inputs_require_grads" for hook in hooks)

    def _end_routing(
        self,
        router_logits: list[torch.Tensor],
        routed_groups: list[int],
        layout: TokenLayout,
        update_statistics: bool,
    ) -> torch.Tensor | None:
        """Return the auxiliary loss of a training forward, if it has one, and let the routers' statistics follow it."""
        if not (self.training and router_logits):
            return None
        config = self.config
        summary = summarise_routing(router_logits, config.num_experts_per_tok, layout.routed_tokens)
        if update_statistics:
            self._update_usage(routed_groups, summary.usage, summary.num_tokens)
        if self.expert_mixing != "token":
            return None
        return config.router_aux_loss_coef * summary.balance_loss + config.router_z_loss_coef * summary.z_loss

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
    """Return the fields every head hands on from the encoder."""
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
    Add up the training loss: task loss plus auxiliary loss (present in training only).

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
        """Map (..., d) -> (..., outputs)."""
        return self.classifier(self.drop(self.head(hidden_states)))

    def pool(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | dict | None) -> torch.Tensor:
        """
        Pool one state per row by `config.classifier_pooling`: (batch, sequence, d) -> (batch, d).

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
