# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Losses of distillation: masked words, and a teacher's logits, hidden states and sentence embeddings.

`DistilledStudent` holds what is trained, the student and projections between widths; `Teacher` runs the frozen model.
Both work on packed rows and agree on one order: the real tokens of a batch, row after row, and its sequences likewise.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from modernalbert.modeling_modernalbert import (
    ModernALBERTForMaskedLM,
    batches_by_length,
    compiles_each_shape,
    round_up_rows,
    sequence_indices,
)

from .linear_cross_entropy import linear_cross_entropy


HIDDEN_LOSSES = ("cosine", "mse")
LOGITS_POSITIONS = ("masked", "all")
# Share of a teacher's batch that may be padding before it is split by length.
TEACHER_PADDING = 0.25
# Where kernels are compiled for every shape, a teacher's batches have multiples of these.
FEW_SHAPES_SEQUENCES, FEW_SHAPES_COLUMNS = 4, 16
# Logits (tokens times vocabulary) of the student at a time: 1 GiB in float32, of which the losses need several.
VOCABULARY_BLOCK = 2**28


@dataclass(frozen=True)
class DistillationConfig:
    """
    Terms of the loss and their weights; a term of weight 0 is not computed. All terms are our decision: the paper's are
    not public.

    Attributes:
        mlm_weight: Of the masked-LM cross-entropy, averaged over masked tokens.
        logits_weight: Of T^2 KL(teacher || student) of the vocabulary distributions at temperature T.
        temperature: T.
        logits_positions: "masked" tokens or "all".
        hidden_weight: Of the distance between hidden states, averaged over tokens and pairs of layers.
        hidden_loss: "cosine" is 1 - cosine; "mse" is the mean squared difference.
        layer_map: Pairs (student state, teacher state), 0 the embeddings, N the output; None pairs them evenly,
            embeddings with embeddings and output with output.
        pooled_weight: Of 1 - cosine between mean-pooled outputs of each sequence.
    """

    mlm_weight: float = 1.0
    logits_weight: float = 0.0
    temperature: float = 1.0
    logits_positions: str = "masked"
    hidden_weight: float = 0.0
    hidden_loss: str = "cosine"
    layer_map: tuple[tuple[int, int], ...] | None = None
    pooled_weight: float = 0.0

    def __post_init__(self):
        for name in ("mlm_weight", "logits_weight", "hidden_weight", "pooled_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: it must be at least 0.")
        if not self.mlm_weight and not self.needs_teacher:
            raise ValueError("mlm_weight=0 is not allowed without a distillation term: there is nothing to learn from.")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} is not allowed: it must be above 0.")
        for name, allowed in (("logits_positions", LOGITS_POSITIONS), ("hidden_loss", HIDDEN_LOSSES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not allowed: it must be {' or '.join(map(repr, allowed))}."
                )

    @property
    def needs_teacher(self) -> bool:
        return bool(self.logits_weight or self.hidden_weight or self.pooled_weight)

    def resolved_layer_map(self, student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
        """
        Return the pairs of states for a student of N and a teacher of L layers.

        Raises:
            ValueError: a pair names a state that one of the two does not have.
        """
        if self.layer_map is None:
            pairs = min(student_layers, teacher_layers)
            return tuple(
                (round(i * student_layers / pairs), round(i * teacher_layers / pairs)) for i in range(pairs + 1)
            )
        for student, teacher in self.layer_map:
            if not (0 <= student <= student_layers and 0 <= teacher <= teacher_layers):
                raise ValueError(
                    f"layer_map pair {student}:{teacher} is not allowed: the student's states are 0 to "
                    f"{student_layers}, the teacher's 0 to {teacher_layers}."
                )
        return self.layer_map


class TeacherOutputs(NamedTuple):
    """
    For a batch with T real tokens in S sequences.

    Attributes:
        hidden_states: Per pair of the layer map, (T, d_t).
        pooled: (S, d_t).
        logits: (T or number of masked tokens, V).
    """

    hidden_states: tuple[torch.Tensor, ...] = ()
    pooled: torch.Tensor | None = None
    logits: torch.Tensor | None = None


def sequence_numbers(position_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the sequence each real token of packed rows belongs to, counted through the batch: (T,), from 0."""
    within_row = sequence_indices(position_ids, attention_mask)
    if within_row is None:
        within_row = torch.zeros_like(position_ids)
    rows = torch.arange(position_ids.shape[0], device=position_ids.device)[:, None]
    keys = (rows * position_ids.shape[1] + within_row)[attention_mask.bool()]
    return torch.unique_consecutive(keys, return_inverse=True)[1]


def mean_pool(states: torch.Tensor, sequences: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Average the tokens of each sequence, special ones included, in at least float32: (T, d) and (T,) -> (S, d)."""
    states = states.float() if states.dtype in (torch.float16, torch.bfloat16) else states
    sums = states.new_zeros(num_sequences, states.shape[-1]).index_add_(0, sequences, states)
    counts = torch.bincount(sequences, minlength=num_sequences)
    return sums / counts[:, None]


class Teacher:
    """
    A frozen encoder that answers for packed rows.

    Any transformers encoder will do: the sequences are taken out of their rows, brought into a few batches of like
    length, and their outputs put back.

    Args:
        model: With a masked-LM head if logits are wanted.
        config: Which outputs are wanted.
        layer_map: As resolved.
    """

    def __init__(self, model: PreTrainedModel, config: DistillationConfig, layer_map: Sequence[tuple[int, int]]):
        self.model = model.eval().requires_grad_(False)
        self.config, self.layer_map = config, layer_map

    @torch.no_grad()
    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> TeacherOutputs:
        """Arguments (rows, length) of packed rows; `labels` says which logits are wanted."""
        real = attention_mask.bool()
        sequences = sequence_numbers(position_ids, attention_mask)
        num_sequences = int(sequences[-1]) + 1
        ids = input_ids[real]
        wanted = torch.ones_like(ids, dtype=torch.bool)
        if self.config.logits_weight and self.config.logits_positions == "masked":
            wanted = labels[real] != -100
        rank_of_wanted = wanted.cumsum(0) - 1
        lengths = torch.bincount(sequences, minlength=num_sequences)
        starts = lengths.cumsum(0) - lengths

        teacher_states = sorted({teacher for _, teacher in self.layer_map}) if self.config.hidden_weight else []
        hidden: dict[int, torch.Tensor] = {}
        pooled, logits = None, None
        few_shapes = compiles_each_shape(ids.device, self.model.dtype)
        for members in batches_by_length(lengths.tolist(), TEACHER_PADDING):
            longest = int(lengths[members].max())
            if few_shapes:
                # Sequences and columns are added up to a multiple; the same sequence gives the same outputs twice.
                members += members[-1:] * (-len(members) % FEW_SHAPES_SEQUENCES)
                rounded = longest + -longest % FEW_SHAPES_COLUMNS
                if rounded <= getattr(self.model.config, "max_position_embeddings", rounded):
                    longest = rounded
            members = torch.tensor(members, device=ids.device)
            columns = torch.arange(longest, device=ids.device)
            mask = columns < lengths[members, None]
            places = (starts[members, None] + columns)[mask]
            padded = ids.new_zeros(mask.shape).masked_scatter_(mask, ids[places])
            outputs, last = self._run(padded, mask, mask.clone().masked_scatter_(mask, wanted[places]))
            if self.config.hidden_weight:
                for state in teacher_states:
                    values = outputs.hidden_states[state][mask]
                    hidden.setdefault(state, values.new_empty(len(ids), values.shape[-1]))[places] = values
            if self.config.pooled_weight:
                means = (last * mask[..., None]).float().sum(1) / mask.sum(1, keepdim=True)
                pooled = means.new_empty(num_sequences, means.shape[-1]) if pooled is None else pooled
                pooled[members] = means
            if self.config.logits_weight:
                values = outputs.logits
                logits = values.new_empty(int(wanted.sum()), values.shape[-1]) if logits is None else logits
                logits[rank_of_wanted[places[wanted[places]]]] = values
        return TeacherOutputs(
            hidden_states=tuple(hidden[teacher] for _, teacher in self.layer_map) if hidden else (),
            pooled=pooled,
            logits=logits,
        )

    def _run(self, input_ids: torch.Tensor, mask: torch.Tensor, wanted: torch.Tensor):
        """
        Return outputs, and the last state, for a padded batch; logits (n, V) of the n tokens that are wanted alone.
        """
        with contextlib.ExitStack() as stack:
            if self.config.logits_weight:
                # The decoder is as wide as the vocabulary: it is not run on tokens whose logits nobody asks for.
                decoder = self.model.get_output_embeddings()
                hook = decoder.register_forward_pre_hook(lambda _, inputs: (inputs[0][wanted], *inputs[1:]))
                stack.callback(hook.remove)
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=mask.long(),
                # A model with a head gives its last state among these only.
                output_hidden_states=bool(self.config.hidden_weight or self.config.pooled_weight),
                return_dict=True,
            )
        return outputs, outputs.hidden_states[-1] if outputs.hidden_states else None


class DistilledStudent(nn.Module):
    """
    A student and the projections to its teacher's width, if that differs: all that training changes.

    Args:
        student: What is trained and saved.
        config: The terms of the loss.
        layer_map: As resolved.
        teacher_width: d_t; None without a teacher.
    """

    def __init__(
        self,
        student: ModernALBERTForMaskedLM,
        config: DistillationConfig,
        layer_map: Sequence[tuple[int, int]] = (),
        teacher_width: int | None = None,
    ):
        super().__init__()
        self.student, self.distillation, self.layer_map = student, config, tuple(layer_map)
        width = student.config.hidden_size
        names = [str(i) for i in range(len(self.layer_map))] if config.hidden_weight else []
        names += ["pooled"] if config.pooled_weight else []
        self.projections = nn.ModuleDict()
        if teacher_width not in (None, width):
            for name in names:
                self.projections[name] = nn.Linear(width, teacher_width, bias=False)

    @property
    def config(self):
        """The student's: Trainer asks its model for it."""
        return self.student.config

    # Trainer turns checkpointing on by one of these two names, by its version, each with arguments of its own.

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        self.student.gradient_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_enable(self, *args, **kwargs) -> None:
        self.student.activation_checkpointing_enable(*args, **kwargs)

    def project(self, name: str, states: torch.Tensor) -> torch.Tensor:
        return self.projections[name](states) if name in self.projections else states

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        teacher_outputs: TeacherOutputs | None = None,
        masked_share: float | torch.Tensor = 1.0,
        batch_share: float = 1.0,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            input_ids, position_ids, attention_mask, labels: (rows, length) of packed rows.
            teacher_outputs: Of the same rows.
            masked_share: These rows' share of the masked tokens of the optimizer step, which may have several batches
                and processes: it weighs the masked-LM term in "loss", so that the shares add up to the step's mean.
            batch_share: Their share of the step's batches, which weighs the other terms.

        Returns:
            Scalars: "loss", the weighted sum, and each term by itself without its weight ("mlm_loss", "logits_loss",
            "hidden_loss", "pooled_loss", "aux_loss"), detached; and "router_entropy", the mean over tokens and router
            calls of the entropy of the routing probabilities, as a share of log E.
        """
        config, student = self.distillation, self.student
        outputs = student.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            output_hidden_states=bool(config.hidden_weight),
            output_router_logits=True,
        )
        real = attention_mask.bool()
        # Places are found once: on a GPU, every selection by booleans waits for all that was asked before it.
        places = real.flatten().nonzero().squeeze(1)

        def tokens(values: torch.Tensor) -> torch.Tensor:
            """Select the real tokens: (rows, length, ...) -> (T, ...)."""
            return values.flatten(0, 1).index_select(0, places)

        last, targets = tokens(outputs.last_hidden_state), tokens(labels)
        masked = (targets != -100).nonzero().squeeze(1)
        num_masked = len(masked)

        terms: dict[str, torch.Tensor] = {}
        weights = {
            "mlm_loss": config.mlm_weight,
            "logits_loss": config.logits_weight,
            "hidden_loss": config.hidden_weight,
            "pooled_loss": config.pooled_weight,
            "aux_loss": 1.0,
        }
        distils_logits = teacher_outputs is not None and teacher_outputs.logits is not None
        everywhere = distils_logits and config.logits_positions == "all"
        if config.mlm_weight or distils_logits:
            states, words = last, targets
            if not everywhere:
                if not distils_logits and compiles_each_shape(last.device, last.dtype):
                    # The rows added have no label.
                    unmasked = (targets == -100).nonzero().squeeze(1)
                    masked = torch.cat([masked, unmasked[: round_up_rows(num_masked) - num_masked]])
                states, words = last.index_select(0, masked), targets[masked]
            sums = self.vocabulary_losses(states, words, teacher_outputs.logits if distils_logits else None)
            # A batch without a mask has no loss, but the decoder's weights are part of the graph.
            counts = {"mlm_loss": max(1, num_masked), "logits_loss": max(1, len(states))}
            terms |= {name: total / counts[name] for name, total in sums.items()}
        if teacher_outputs is not None and teacher_outputs.hidden_states:
            distance = cosine_distance if config.hidden_loss == "cosine" else nn.functional.mse_loss
            terms["hidden_loss"] = torch.stack(
                [
                    distance(self.project(str(i), tokens(outputs.hidden_states[layer])).float(), target.float())
                    for i, ((layer, _), target) in enumerate(zip(self.layer_map, teacher_outputs.hidden_states))
                ]
            ).mean()
        if teacher_outputs is not None and teacher_outputs.pooled is not None:
            sequences = sequence_numbers(position_ids, attention_mask)
            pooled = mean_pool(last, sequences, len(teacher_outputs.pooled))
            terms["pooled_loss"] = cosine_distance(self.project("pooled", pooled), teacher_outputs.pooled.float())
        if outputs.aux_loss is not None:
            terms["aux_loss"] = outputs.aux_loss

        shares = {"mlm_loss": masked_share}
        result = {"loss": sum(weights[name] * shares.get(name, batch_share) * term for name, term in terms.items())}
        result |= {name: term.detach() for name, term in terms.items()}
        if outputs.router_logits:
            result["router_entropy"] = router_entropy(outputs.router_logits, real)
        return result

    def vocabulary_losses(
        self, states: torch.Tensor, words: torch.Tensor, teacher_logits: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """
        Compute the terms over the vocabulary, summed over tokens, without holding all logits at once.

        The masked-LM term alone needs no logits (`linear_cross_entropy`). With a teacher's logits a few thousand tokens
        are compared at a time, and where that is several times, computed again in the backward pass.

        Args:
            states: (n, d), last hidden states.
            words: (n,), labels, -100 where there is none.
            teacher_logits: (n, V), or None.
        """
        config = self.distillation
        if teacher_logits is None:
            decoder = self.student.decoder
            return {
                "mlm_loss": linear_cross_entropy(self.student.transform(states), decoder.weight, decoder.bias, words)
            }

        def losses(states: torch.Tensor, words: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
            logits = self.student.decode(states).float()
            terms = [distillation_kl(logits, teacher_logits, config.temperature)]
            if config.mlm_weight:
                terms.append(nn.functional.cross_entropy(logits, words, reduction="sum"))
            return torch.stack(terms)

        size = max(1, VOCABULARY_BLOCK // self.config.vocab_size)
        blocks = range(0, max(1, len(states)), size)
        total = 0.0
        for start in blocks:
            rows = slice(start, start + size)
            block = (states[rows], words[rows], teacher_logits[rows])
            total = total + (losses(*block) if len(blocks) == 1 else checkpoint(losses, *block, use_reentrant=False))
        return dict(zip(("logits_loss", "mlm_loss"), total))


def distillation_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute T^2 KL(teacher || student), summed over the first dimension: (n, V), (n, V) -> scalar."""
    student = nn.functional.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = nn.functional.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return nn.functional.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def cosine_distance(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute 1 - cosine, averaged: (n, d), (n, d) -> scalar."""
    return 1 - nn.functional.cosine_similarity(states, targets, dim=-1).mean()


@torch.no_grad()
def router_entropy(router_logits: Sequence[torch.Tensor], real: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the routing probabilities over real tokens and router calls, as a share of log E."""
    logits = torch.stack(list(router_logits))[:, real].float()
    return torch.distributions.Categorical(logits=logits).entropy().mean() / math.log(logits.shape[-1])
