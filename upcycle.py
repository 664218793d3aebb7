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
"""
Weights for a ModernALBERT from a trained ModernBERT: its layers become groups, its embedding is factorised.

    python upcycle.py --teacher_name_or_path answerdotai/ModernBERT-base --config configs/tiny --output_dir O
    python upcycle.py --teacher_name_or_path T --config configs/tiny --text_file heldout.txt --compare --output_dir O

With --text_file it reports how far step 0 is from the teacher: masked-LM loss, and cosine of the hidden states layer by
layer; with --compare for every layer map and every start of the experts.

A BERT's layers have another form: a student takes its token embedding, and is fitted to its layers on the text of
--corpus_dir (upcycle_bert.py).
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modernalbert.command_line import (
    UserError,
    atomic_folder,
    check_replaceable,
    first_sentence,
    parse_arguments,
    run,
    save_tokenizer,
)
from modernalbert.configuration_modernalbert import ModernALBERTConfig
from modernalbert.hub import EXPORTED
from modernalbert.modeling_modernalbert import ModernALBERTForMaskedLM
from modernalbert.modeling_mol import DepthLoRAFeedForward, FeedForward, MoLFeedForward
from modernalbert.training.distillation import DistillationConfig, Teacher
from modernalbert.training.packed_rows import Masking, PackedRows, StreamedRows
from modernalbert.training.tokenized_corpus import TokenizedCorpus, load_texts
from modernalbert.upcycle_bert import bert_embedding, fit_to_bert


logger = logging.getLogger("upcycle")

LAYER_MAPS = ("stepwise", "first", "last", "average")
EXPERT_STARTS = ("zero", "svd")
# What a BERT's student starts from: all layers, fitted on text, or the token embedding alone.
FITTED, EMBEDDING = "fitted", "embedding"
REPORT_ROW = 256  # tokens
REPORT_FILES = ("upcycle_report.json", "upcycle_report.md")

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
    The ModernALBERT configuration that *is* the given ModernBERT: depth 1, no factorisation, no modulation.

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
    Which teacher layers each group is made of (the mean of them).

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
    """The teacher layers in whose place a group stands: the group-th of K equal spans, never empty."""
    bounds = [round(k * num_teacher_layers / num_groups) for k in (group, group + 1)]
    return list(range(*bounds)) or [min(bounds[0], num_teacher_layers - 1)]


def factorise_embedding(
    embedding: torch.Tensor, width: int, token_counts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The best rank-e approximation of a (V, d) embedding: (V, e) and (d, e) with embedding ~ first @ second.T.

    By the eigenvectors of the d x d Gram matrix in float64, the same as a truncated SVD and far cheaper for V >> d.
    Both factors get the same root mean square, so that steps of one optimizer suit both.

    Args:
        embedding: (V, d).
        width: e.
        token_counts: (V,) how often each token occurs in the text that matters: the error of a token then weighs as
            its count to the power 3/4 (our decision; no token weighs nothing). None weighs all alike.
    """
    matrix = embedding.double()
    weighted = matrix
    if token_counts is not None:
        weighted = matrix * token_weights(token_counts).to(matrix.device).sqrt()[:, None]
    _, vectors = torch.linalg.eigh(weighted.T @ weighted)  # ascending
    basis = vectors[:, -width:]
    factor = matrix @ basis
    tiny = torch.finfo(torch.float64).tiny
    scale = (factor.square().mean() / basis.square().mean()).clamp(min=tiny) ** 0.25
    return (factor / scale).to(embedding.dtype), (basis * scale).to(embedding.dtype)


def token_weights(token_counts: torch.Tensor) -> torch.Tensor:
    """(V,) counts -> (V,) float64 weights that add up to 1."""
    weights = (token_counts.double() + 1) ** 0.75
    return weights / weights.sum()


@torch.no_grad()
def upcycle_bert(
    teacher: PreTrainedModel,
    config: ModernALBERTConfig,
    rows: Sequence[dict[str, torch.Tensor]] | None = None,
    token_counts: torch.Tensor | None = None,
) -> ModernALBERTForMaskedLM:
    """
    A ModernALBERT from a BERT: its token embedding, and groups fitted to its layers on text (our decision).

    Args:
        teacher: A BERT encoder, with or without a head.
        config: Of the student.
        rows: Packed rows of clean text to fit on, see `fit_to_bert`; None leaves everything but the embedding fresh.
        token_counts: As `factorise_embedding`.

    Raises:
        ValueError: vocabulary or width differ, or the student's heads do not divide the teacher's.
    """
    check_equal(config, teacher.config, ("vocab_size", "hidden_size"))
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


def check_equal(config: ModernALBERTConfig, teacher: PreTrainedConfig, names: Sequence[str]) -> None:
    """Raise a ValueError at the first field in which the two differ."""
    for name in names:
        ours, theirs = getattr(config, name), getattr(teacher, name)
        if ours != theirs:
            raise ValueError(f"{name}={ours!r} is not allowed: it must be the teacher's {theirs!r}.")


def teacher_embedding(teacher: PreTrainedModel) -> torch.Tensor:
    """(V, d): what the first norm sees of each token, but for a BERT's exact position."""
    if teacher.config.model_type == "bert":
        return bert_embedding(teacher)
    return teacher.base_model.embeddings.tok_embeddings.weight


def set_embedding(
    student: ModernALBERTForMaskedLM, embedding: torch.Tensor, token_counts: torch.Tensor | None = None
) -> None:
    """Give the student a (V, d) embedding, factorised if its own is."""
    if student.config.embedding_size is not None:
        embedding, projection = factorise_embedding(embedding, student.config.embedding_size, token_counts)
        student.model.embeddings.projection.weight.copy_(projection)
    student.model.embeddings.tok_embeddings.weight.copy_(embedding)


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
        ValueError: a width, a vocabulary or a bias of the two cannot be mapped, or `layer_map` or `experts` is not
            allowed.
    """
    if experts not in EXPERT_STARTS:
        raise ValueError(f"experts={experts!r} is not allowed: it must be {' or '.join(map(repr, EXPERT_STARTS))}.")
    if isinstance(teacher, str):
        teacher = AutoModelForMaskedLM.from_pretrained(teacher)
    teacher_config = teacher.config
    if teacher_config.model_type != "modernbert":
        raise ValueError(
            f"The teacher's model_type={teacher_config.model_type!r} is not allowed: it must be 'modernbert'."
        )
    check_equal(config, teacher_config, EQUAL_FIELDS)
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
    As `copy_mean` for Wi (2 f, d) and Wo (d, f); units the target has beyond the sources' keep their fresh input
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


# --- how far step 0 is from the teacher ------------------------------------------------------------------------------


@dataclass
class StepZero:
    """
    A student before any training, beside its teacher.

    Attributes:
        layer_map: How the groups took their layers; "fitted" or "embedding" if it was a BERT.
        experts: How the experts started.
        mlm_loss: Masked-LM loss of the student, in nats per masked token.
        teacher_mlm_loss: Of the teacher on the same masks; None if it has no head.
        hidden_cosine: [student state, teacher state, mean cosine over tokens], state 0 the embeddings.
        embedding_error: Frobenius norm of what the factorised embedding lost, as a share of the embedding's.
    """

    layer_map: str | list[int]
    experts: str
    mlm_loss: float
    teacher_mlm_loss: float | None
    hidden_cosine: list[tuple[int, int, float]]
    embedding_error: float


@torch.no_grad()
def step_zero(
    student: ModernALBERTForMaskedLM,
    teacher: PreTrainedModel,
    rows: Sequence[dict[str, torch.Tensor]],
    layer_map: str | Sequence[int],
    experts: str,
) -> StepZero:
    """
    Measure a student against its teacher.

    Args:
        student: As upcycled.
        teacher: The model it came from, on the student's device.
        rows: Packed and masked rows of text, see `training/packed_rows.py`.
        layer_map, experts: For the record.
    """
    has_head = teacher.get_output_embeddings() is not None
    config = DistillationConfig(hidden_weight=1.0, logits_weight=float(has_head))
    pairs = config.resolved_layer_map(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    answers = Teacher(teacher, config, pairs)
    cosines = torch.zeros(len(pairs), device=student.device)
    losses, teacher_losses, masked, tokens = 0.0, 0.0, 0, 0
    for row in rows:
        row = {name: values.unsqueeze(0).to(student.device) for name, values in row.items()}
        real, labels = row["attention_mask"].bool(), row["labels"]
        theirs = answers(row["input_ids"], row["position_ids"], row["attention_mask"], labels)
        ours = student(
            row["input_ids"],
            attention_mask=row["attention_mask"],
            position_ids=row["position_ids"],
            output_hidden_states=True,
        )
        targets = labels[labels != -100]
        losses += summed_loss(ours.logits[labels != -100], targets)
        if has_head:
            teacher_losses += summed_loss(theirs.logits, targets)
        for i, (state, _) in enumerate(pairs):
            cosines[i] += torch.nn.functional.cosine_similarity(
                ours.hidden_states[state][real].float(), theirs.hidden_states[i].float(), dim=-1
            ).sum()
        masked += len(targets)
        tokens += int(real.sum())
    return StepZero(
        layer_map=layer_map if isinstance(layer_map, str) else list(layer_map),
        experts=experts,
        mlm_loss=losses / masked,
        teacher_mlm_loss=teacher_losses / masked if has_head else None,
        hidden_cosine=[(ours, theirs, float(c) / tokens) for (ours, theirs), c in zip(pairs, cosines)],
        embedding_error=embedding_error(student, teacher),
    )


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Cross-entropy of (n, V) logits, added up, in nats."""
    return float(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))


@torch.no_grad()
def embedding_error(student: ModernALBERTForMaskedLM, teacher: PreTrainedModel) -> float:
    """|| E - factors || / || E ||, both Frobenius, for the token embedding E that the student was given."""
    target = teacher_embedding(teacher).double()
    ours = student.get_input_embeddings().weight
    if student.model.embeddings.projection is not None:
        ours = student.model.embeddings.projection(ours)
    return float((ours.double() - target).norm() / target.norm())


def markdown_table(results: Sequence[StepZero]) -> str:
    """One row per option."""
    states = [f"{ours}:{theirs}" for ours, theirs, _ in results[0].hidden_cosine]
    teacher = results[0].teacher_mlm_loss
    lines = [
        f"| layer map | experts | masked-LM loss | embedding error | cosine at {' | '.join(states)} |",
        "|---|---|---:|---:|" + "---:|" * len(states),
    ]
    for result in results:
        cosines = " | ".join(f"{cosine:.3f}" for _, _, cosine in result.hidden_cosine)
        measures = f"{result.mlm_loss:.3f} | {result.embedding_error:.3f} | {cosines}"
        lines.append(f"| {result.layer_map} | {result.experts} | {measures} |")
    if teacher is not None:
        lines += ["", f"Masked-LM loss of the teacher on the same masks: {teacher:.3f}."]
    return "\n".join(lines) + "\n"


# --- command line ----------------------------------------------------------------------------------------------------


@dataclass
class UpcycleArguments:
    """What becomes what."""

    teacher_name_or_path: str = field(metadata={"help": "A ModernBERT or BERT: folder or Hub name."})
    config: str = field(metadata={"help": "Folder with the student's config.json, as configs/tiny."})
    output_dir: str = field(metadata={"help": "Where the student goes, with the teacher's tokenizer."})
    layer_map: str = field(
        default="stepwise", metadata={"help": f"{', '.join(LAYER_MAPS)}, or K layer numbers as 0,4,8."}
    )
    experts: str = field(
        default="zero", metadata={"help": "zero: step 0 is the shared model; svd: from each layer's difference to it."}
    )
    corpus_dir: str | None = field(
        default=None,
        metadata={
            "help": "A prepared corpus: its token counts weigh the embedding's factorisation, and its first rows fit "
            "a student to a BERT."
        },
    )
    fit_rows: int = field(default=100, metadata={"help": "Rows of 256 tokens to fit to a BERT on; 0: embedding only."})
    text_file: str | None = field(default=None, metadata={"help": "Text to report on: txt, json, jsonl, parquet."})
    compare: bool = field(
        default=False,
        metadata={
            "help": "Report on every layer map and start of the experts; of a BERT, on fitted and embedding only."
        },
    )
    max_rows: int = field(default=32, metadata={"help": "Rows of 256 tokens to report on."})
    seed: int = field(default=0, metadata={"help": "Of the weights that are fresh, and of the masks."})


def report_rows(
    file: str, tokenizer: PreTrainedTokenizerBase, masking: Masking, max_rows: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """Packed, masked rows of a text file."""
    rows = StreamedRows(load_texts([file], "text"), "text", tokenizer, REPORT_ROW, REPORT_ROW, masking, seed=seed)
    rows = list(islice(rows, max_rows))
    if not rows:
        raise UserError(f"--text_file {file}: there is no text in it.")
    return rows


def parse_layer_map(value: str) -> str | list[int]:
    if value in LAYER_MAPS:
        return value
    try:
        return [int(number) for number in value.split(",")]
    except ValueError:
        raise UserError(
            f"--layer_map {value} is not allowed: it must be {', '.join(LAYER_MAPS)}, or layer numbers as 0,4,8."
        ) from None


def main() -> None:
    (arguments,) = parse_arguments(UpcycleArguments, description=__doc__)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers.utils.logging.set_verbosity_warning()
    output, name = Path(arguments.output_dir), arguments.teacher_name_or_path
    check_replaceable(output, (*EXPORTED, *REPORT_FILES))
    layer_map = parse_layer_map(arguments.layer_map)
    if arguments.compare and arguments.text_file is None:
        raise UserError("--compare needs --text_file, to measure on.")
    try:
        config = ModernALBERTConfig.from_pretrained(arguments.config)
        is_bert = AutoConfig.from_pretrained(name).model_type == "bert"
        teacher = (AutoModel if is_bert else AutoModelForMaskedLM).from_pretrained(name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(first_sentence(error)) from None
    for option in ("layer_map", "experts"):
        if is_bert and getattr(arguments, option) != getattr(UpcycleArguments, option):
            raise UserError(
                f"--{option} is for a ModernBERT: of a BERT all layers are fitted, and experts start at zero."
            )
    counts, fit_rows = None, None
    masking = Masking.for_tokenizer(tokenizer)
    if arguments.corpus_dir is not None:
        corpus = TokenizedCorpus(arguments.corpus_dir)
        corpus.check_tokenizer(tokenizer)
        counts = torch.from_numpy(corpus.token_counts(config.vocab_size))
        if is_bert:
            packed = PackedRows(corpus, arguments.fit_rows, REPORT_ROW, masking, tokenizer.pad_token_id, arguments.seed)
            fit_rows = [packed[i] for i in range(arguments.fit_rows)] or None
    elif is_bert and arguments.fit_rows:
        raise UserError("a BERT is fitted on text: give --corpus_dir, or --fit_rows 0 to take its embedding alone.")
    rows = None
    if arguments.text_file is not None:
        rows = report_rows(arguments.text_file, tokenizer, masking, arguments.max_rows, arguments.seed)

    def build(layer_map: str | list[int], experts: str) -> ModernALBERTForMaskedLM:
        torch.manual_seed(arguments.seed)
        try:
            if is_bert:
                return upcycle_bert(teacher, config, fit_rows if layer_map == FITTED else None, counts)
            return upcycle_modernbert(teacher, config, layer_map, experts, counts)
        except ValueError as error:
            raise UserError(first_sentence(error)) from None

    if is_bert:
        options = [(FITTED if fit_rows else EMBEDDING, "zero")]
        others = [(EMBEDDING, "zero")]
    else:
        options = [(layer_map, arguments.experts)]
        others = [(m, e) for m in LAYER_MAPS for e in EXPERT_STARTS]
    student = build(*options[0])
    if config.embedding_size is not None:
        print(f"Factorising the embedding loses {embedding_error(student, teacher):.1%} of its Frobenius norm.")
    if arguments.compare:
        options += [option for option in others if option != options[0]]
    with atomic_folder(output, replaceable=(*EXPORTED, *REPORT_FILES)) as folder:
        student.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        if rows is not None:
            results = [
                step_zero(student if i == 0 else build(*option), teacher, rows, *option)
                for i, option in enumerate(options)
            ]
            table = markdown_table(results)
            (folder / REPORT_FILES[0]).write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
            (folder / REPORT_FILES[1]).write_text(table)
            print(table)


def command() -> None:
    """Entry point of `modernalbert-upcycle`."""
    run(main)


if __name__ == "__main__":
    command()
