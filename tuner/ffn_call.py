# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
One use of an adapted feed-forward network (FFN), from its first projection to its last.

All that is known of one forward is in an `FFNCall`. It belongs to the thread that runs the forward, so that several
threads can run one model.
"""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from modernalbert.mol_backends import Experts, Slots, add_low_rank, expand_slots, fill_slots, mix_slots


BASE = "__base__"  # peft's name for "no adapter" in `adapter_names`


# --- one adapter per row of the batch --------------------------------------------------------------------------------


class RowAdapters(NamedTuple):
    """The adapter of each row of a batch, and the modules it holds for."""

    modules: frozenset[nn.Module]
    names: tuple[str, ...]


# Of the forward under way in this thread: `call`, the FFNCall; `logits`, what the routers of one layer say where
# somebody records it; `rows`, the RowAdapters where rows have adapters of their own.
THREAD = threading.local()


@contextmanager
def row_adapters(modules: Iterable[nn.Module], names: Sequence[str]) -> Iterator[None]:
    """Let each row of the batches that these modules get in this thread have an adapter of its own."""
    outer = getattr(THREAD, "rows", None)
    THREAD.rows = RowAdapters(frozenset(modules), tuple(names))
    try:
        yield
    finally:
        THREAD.rows = outer


def names_of_rows(module: nn.Module) -> tuple[str, ...] | None:
    """Return the adapter of each row, or None where the active adapters serve all of them."""
    rows = getattr(THREAD, "rows", None)
    return rows.names if rows is not None and module in rows.modules else None


def group_rows(names: Sequence[str], size: int, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Group the adapters of a batch, each with the indices of its rows among `size` rows or tokens.

    Raises:
        ValueError: the size is no multiple of the number of names.
    """
    # A row is several rows in a beam search, and several tokens where a model flattens its batch.
    each, rest = divmod(size, len(names))
    if rest:
        raise ValueError(f"adapter_names has {len(names)} names for {size} rows or tokens: one per row.")
    rows = torch.arange(size, device=device).view(-1, each)
    for name in dict.fromkeys(names):
        yield name, rows[[i for i, row in enumerate(names) if row == name]].flatten()


# --- one use of an FFN -----------------------------------------------------------------------------------------------


def flatten_tokens(states: torch.Tensor) -> torch.Tensor:
    """Flatten (..., width) to (tokens, width), also where there are no tokens."""
    return states.reshape(math.prod(states.shape[:-1]), states.shape[-1])


class AdapterCall:
    """
    One adapter's part in one use of the FFN: experts, routing and low-rank states of the tokens it serves.

    Args:
        rows: (T,) indices of its tokens among those of the call; None = all.
        experts: Its experts in the dtype of the projections.
        weights: (T, k) routing weights.
        index: (T, k) experts of each token.
        low_rank: (T, E r), A_in x of all experts.
        dropout: Probability on the input of A_out.
    """

    def __init__(
        self,
        rows: torch.Tensor | None,
        experts: Experts,
        weights: torch.Tensor,
        index: torch.Tensor,
        low_rank: torch.Tensor,
        dropout: float,
    ):
        self.rows, self.experts, self.weights, self.index = rows, experts, weights, index
        self.low_rank, self.dropout = low_rank, dropout
        self._slots: Slots | None = None

    @property
    def num_slots(self) -> int:
        return self.weights.shape[-1]

    def slots(self, dtype: torch.dtype) -> Slots:
        """
        Return the slots, filled once per call, or once per dtype where the FFN changes it between its projections.
        """
        if self._slots is None or self._slots.blocks.dtype != dtype:
            self._slots = fill_slots(self.weights, self.index, self.experts, dtype)
        return self._slots

    def expand(self, base: torch.Tensor, columns: slice) -> torch.Tensor:
        """
        Expand a first projection's output (T, n), which are these rows of B_in, to h_e of the chosen experts, (k, T,
        n).
        """
        return expand_slots(base, self.low_rank, self.experts.B_in[:, columns], self.slots(base.dtype))

    def mix(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mix the activated (k, T, f) to (T, f); what B_out gets, (T, E r), is kept for `finish`."""
        mask = nn.functional.dropout(torch.ones_like(hidden[0]), self.dropout) if self.dropout else None
        A_out = self.experts.A_out.to(hidden.dtype)
        mixture, self.low_rank = mix_slots(hidden, A_out, self.slots(hidden.dtype), mask)
        return mixture

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """Add the experts' low-rank parts to the last projection's output (T, d)."""
        B_out = self.experts.B_out.to(self.low_rank.dtype)
        return add_low_rank(output, self.low_rank, B_out).to(output.dtype)


class FFNCall:
    """
    One use of an adapted FFN, from its first projection to its last: all that is known of one forward.

    Args:
        layer: The `MoLLayer` whose FFN it is.
        x: (batch, ..., d), the FFN's input.
        dtype: Of what its first projections put out.
    """

    def __init__(self, layer: nn.Module, x: torch.Tensor, dtype: torch.dtype):
        self.layer = layer
        self.shape = x.shape[:-1]
        self.seen: set[int] = set()  # numbers of the first projections that have run
        tokens = flatten_tokens(x)
        self.adapters = [
            layer.call_adapter(name, rows, tokens if rows is None else tokens[rows], self.shape, dtype)
            for name, rows in layer.adapters_of_tokens(tokens)
        ]
        self.num_slots = max(adapter.num_slots for adapter in self.adapters)

    def expand(self, number: int, output: torch.Tensor) -> torch.Tensor:
        """Behind first projection `number`, (batch, ..., n) -> the h_e of the chosen experts, (k * batch, ..., n)."""
        self.seen.add(number)
        start = sum(self.layer.input_widths[:number])
        columns = slice(start, start + self.layer.input_widths[number])
        base = flatten_tokens(output)
        if self.adapters[0].rows is None:
            hidden = self.adapters[0].expand(base, columns)
        else:
            hidden = base.repeat(self.num_slots, 1, 1)
            for adapter in self.adapters:
                hidden[: adapter.num_slots, adapter.rows] = adapter.expand(base[adapter.rows], columns)
        return hidden.view(self.num_slots * self.shape[0], *self.shape[1:], output.shape[-1])

    def mix(self, hidden: torch.Tensor) -> torch.Tensor:
        """Before the last projection, (k * batch, ..., f) -> sum_e q_e u_e, (batch, ..., f)."""
        hidden = flatten_tokens(hidden).view(self.num_slots, math.prod(self.shape), hidden.shape[-1])
        if self.adapters[0].rows is None:
            mixture = self.adapters[0].mix(hidden)
        else:
            mixture = hidden[0].clone()
            for adapter in self.adapters:
                mixture[adapter.rows] = adapter.mix(hidden[: adapter.num_slots, adapter.rows])
        return mixture.view(*self.shape, mixture.shape[-1])

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """Behind the last projection, (batch, ..., d): the experts' low-rank parts are added."""
        result = flatten_tokens(output)
        if self.adapters[0].rows is None:
            result = self.adapters[0].finish(result)
        else:
            result = result.clone()
            for adapter in self.adapters:
                result[adapter.rows] = adapter.finish(result[adapter.rows])
        return result.view_as(output)
