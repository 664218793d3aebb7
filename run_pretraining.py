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
Pretrain a ModernALBERT with masked language modelling and with distillation from a teacher.

    python run_pretraining.py configs/pretraining/nano.json
    python run_pretraining.py --model_name_or_path M --train_sources a.jsonl b.parquet --output_dir O --max_steps 1000
    python run_pretraining.py --model_name_or_path M --teacher_name_or_path T --hidden_weight 1 --pooled_weight 1 \\
        --train_sources user/dataset:config:split --streaming --output_dir O --max_steps 1000
    accelerate launch --config_file configs/accelerate/ddp.yaml run_pretraining.py configs/pretraining/tiny.json

Text is tokenised once into a memory-mapped corpus (--prepare_only does that and stops), packed into rows without
cross-talk, and masked anew each time it is read. Run again after an interruption, it continues from the last checkpoint
with exactly the rows that would have come. Takes all of transformers' TrainingArguments.

A decay branch from any checkpoint of the stable phase is the same command with --resume_from_checkpoint CHECKPOINT, a
new --output_dir and --max_steps, of which the last --decay_steps decay.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import ClassVar

import torch
import transformers
from safetensors.torch import load_file
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from modernalbert.cli.allocator import keep_freed_memory
from modernalbert.cli.arguments import check_processes, check_reporters, parse_arguments
from modernalbert.cli.bfloat16 import warn_of_slow_bfloat16
from modernalbert.cli.errors import UserError, error_message, explain_loading
from modernalbert.cli.errors import run as run_main
from modernalbert.cli.output_folders import set_default_mode
from modernalbert.configuration_modernalbert import ModernALBERTConfig, refuse_original_release
from modernalbert.data.corpus import (
    MANIFEST,
    TokenizedCorpus,
    check_text_files,
    load_texts,
    prepare_corpus,
    tokenize_texts,
)
from modernalbert.data.packing import Masking, PackedRows, StreamedRows
from modernalbert.diagnostics import RouterCallback
from modernalbert.finetuning.arguments import BaseTrainingArguments
from modernalbert.finetuning.checkpoint import check_tokenizer, has_no_weights
from modernalbert.finetuning.run_folder import EARLIER_RUN, check_output_dir, checkpoint_to_resume, remove_earlier_run
from modernalbert.modeling_modernalbert import ModernALBERTForMaskedLM
from modernalbert.training.distillation import DistillationConfig, DistilledStudent, Teacher
from modernalbert.training.pretraining_trainer import PROJECTIONS_FILE, STUDENT, PretrainingTrainer
from modernalbert.training.teacher_cache import CachedTeacher


logger = logging.getLogger("run_pretraining")

OUTPUT_FILES = (*EARLIER_RUN, PROJECTIONS_FILE)
# Fields whose difference makes a checkpoint one of another model.
SHAPE_FIELDS = (
    "vocab_size embedding_size hidden_size intermediate_size mol_intermediate_size num_hidden_layers group_depth "
    "num_attention_heads ffn_modulation mol_groups mol_positions num_experts lora_rank moa_bottleneck router_per_depth "
    "skip_first_attn_norm norm_bias attention_bias mlp_bias decoder_bias classifier_bias"
).split()


# --- arguments -------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """Student and teacher."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The student: folder or Hub name. A folder with a configuration only starts from random weights; "
            "upcycle.py writes one that starts from the teacher's."
        },
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of the tokenizer, if it is not in the student's folder."}
    )
    teacher_name_or_path: str | None = field(default=None, metadata={"help": "The model to distil from."})
    teacher_dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the teacher: float32, bfloat16, float16, or auto (bfloat16 on a GPU, float32 on a CPU)."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention of the student: eager, sdpa, flex_attention or flash_attention_2."},
    )
    teacher_attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of the teacher, which reads padded sequences."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a teacher."})


@dataclass
class DataArguments:
    """Text, and how it is packed into rows."""

    train_sources: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files (txt, json, jsonl, also with .gz or .xz, and parquet) or Hub data sets as "
            "name[:config[:split]]. Each is a source."
        },
    )
    source_weights: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Share of each source in the tokens, or in the texts with --streaming. Default: by size, or even "
            "with --streaming."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "A file of held-out text to evaluate on."})
    text_column: str = field(
        default="text", metadata={"help": "The column that holds the text in json, jsonl and parquet files."}
    )
    corpus_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the tokenised corpus, which is prepared if absent. Default: in --output_dir."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Tokenise the text while training, instead of preparing a corpus."}
    )
    prepare_only: bool = field(
        default=False, metadata={"help": "Prepare the corpus and stop; of the models only the tokenizer is loaded."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Number of processes that tokenise the corpus."}
    )
    max_seq_length: int = field(default=512, metadata={"help": "Longer texts are cut into sequences of this length."})
    row_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a packed row, which holds several sequences. Default: --max_seq_length."},
    )
    mlm_probability: float = field(default=0.3, metadata={"help": "Share of the tokens that are masked and predicted."})
    masked_sequence_share: float = field(
        default=1.0, metadata={"help": "Share of the sequences that are masked; the others serve distillation only."}
    )
    whole_word_masking: bool = field(default=False, metadata={"help": "Mask all pieces of a word or none."})
    max_eval_rows: int = field(default=256, metadata={"help": "Largest number of held-out rows to evaluate on."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Delete an earlier run's checkpoints and results in --output_dir, and start anew."},
    )


@dataclass
class DistillationArguments:
    """Weights of the terms of the loss. Without a teacher only the masked language model has one."""

    mlm_weight: float = field(default=1.0, metadata={"help": "Weight of the masked language modelling loss."})
    logits_weight: float = field(
        default=0.0, metadata={"help": "Weight of the KL divergence from the teacher's logits."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of both distributions in that divergence."})
    logits_positions: str = field(
        default="masked", metadata={"help": "The tokens at which logits are compared: masked or all."}
    )
    hidden_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distance to the teacher's hidden states."}
    )
    hidden_loss: str = field(default="cosine", metadata={"help": "Distance of hidden states: cosine or mse."})
    layer_map: str | None = field(
        default=None,
        metadata={
            "help": "Pairs of layers student:teacher, as 0:0,2:4,6:12 (0 is the embeddings). Default: evenly spaced "
            "from first to last."
        },
    )
    pooled_weight: float = field(default=0.0, metadata={"help": "Weight of 1 - cosine of the mean-pooled last states."})
    teacher_input: str | None = field(
        default=None,
        metadata={
            "help": "The text that the teacher reads: masked or clean. Default: masked if logits are compared, else "
            "clean."
        },
    )
    teacher_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that caches the teacher's outputs in half precision for later passes and other students. "
            "It needs a prepared corpus and clean input, and takes 2 bytes x width x (tokens x layers + sequences)."
        },
    )


@dataclass
class PretrainingArguments(BaseTrainingArguments):
    """The defaults that suit pretraining."""

    DEFAULT_EVAL_STRATEGY: ClassVar[str] = "steps"
    DEFAULT_SAVE_STRATEGY: ClassVar[str] = "steps"
    DEFAULT_EVAL_STEPS: ClassVar[float | None] = 1000
    DEFAULT_SAVE_STEPS: ClassVar[float] = 1000
    LOADS_BEST: ClassVar[bool] = False

    do_eval: bool = field(default=True, metadata={"help": "Evaluate on --validation_file, if there is one."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of the stable phase."})
    warmup_steps: float = field(default=0.02, metadata={"help": "Warm-up: a share of all steps below 1, or steps."})
    decay_steps: float = field(default=0.1, metadata={"help": "Final decay: a share of all steps below 1, or steps."})
    decay_type: str = field(default="1-sqrt", metadata={"help": "Form of the decay: 1-sqrt, linear or cosine."})
    lr_scheduler_type: str = field(
        default="warmup_stable_decay", metadata={"help": "warmup_stable_decay, or any schedule of transformers."}
    )
    weight_decay: float = field(
        default=0.01, metadata={"help": "Weight decay of matrices; norms and biases have none."}
    )
    adam_beta2: float = field(default=0.98, metadata={"help": "Second beta of AdamW."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows of a device in a step."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Rows of a device in evaluation."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between log lines."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    peak_tflops: float | None = field(
        default=None,
        metadata={
            "help": "Peak TFLOPS of one device in the dtype of training (989 for an H100 in bfloat16), to log the "
            "share that is used (MFU)."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the trainer reads every column."}
    )
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(),
        metadata={"help": "Pin batches in memory, which speeds up their copy to a GPU."},
    )
    report_to: str | None = field(
        default="none", metadata={"help": "Where to log: tensorboard, trackio, wandb and others, or none."}
    )


# --- data ------------------------------------------------------------------------------------------------------------


def check_numbers(data: DataArguments, training: PretrainingArguments) -> None:
    """Raise a UserError for a number that is not allowed."""
    for name in ("max_seq_length", "max_eval_rows"):
        if getattr(data, name) < 1:
            raise UserError(f"--{name} {getattr(data, name)} is not allowed: it must be at least 1.")
    for name in ("mlm_probability", "masked_sequence_share"):
        if not 0 <= getattr(data, name) <= 1:
            raise UserError(f"--{name} {getattr(data, name)} is not allowed: it must be from 0 to 1.")
    if data.row_length is not None and data.row_length < data.max_seq_length:
        raise UserError(
            f"--row_length {data.row_length} is not allowed: it must be at least --max_seq_length "
            f"{data.max_seq_length}."
        )
    if data.source_weights and len(data.source_weights) != len(data.train_sources):
        raise UserError(
            f"--source_weights has {len(data.source_weights)} numbers for {len(data.train_sources)} --train_sources."
        )
    if any(weight <= 0 for weight in data.source_weights):
        raise UserError("--source_weights must be above 0.")
    if data.streaming and training.max_steps <= 0:
        raise UserError("--streaming needs --max_steps: a stream has no length.")
    if data.streaming and data.prepare_only:
        raise UserError("--streaming and --prepare_only exclude each other.")
    if not training.average_tokens_across_devices:
        raise UserError(
            "--average_tokens_across_devices False is not allowed: masked words are averaged over processes."
        )
    if training.decay_type not in ("1-sqrt", "linear", "cosine"):
        raise UserError(f"--decay_type {training.decay_type} is not allowed: it must be 1-sqrt, linear or cosine.")


def source_name(source: str, number: int) -> str:
    """Return a folder name for a source."""
    return f"{number:02d}-{Path(source.split(':')[0]).stem}"


def corpus_folder(data: DataArguments, training: PretrainingArguments) -> Path:
    """Return the folder of the tokens."""
    return Path(data.corpus_dir or Path(training.output_dir) / "corpus")


def check_sources(data: DataArguments, training: PretrainingArguments) -> None:
    """Refuse files that cannot be read as text, before a model is loaded; a prepared corpus needs its files no more."""
    is_prepared = not data.streaming and (corpus_folder(data, training) / MANIFEST).is_file()
    check_text_files([*([] if is_prepared else data.train_sources), *filter(None, [data.validation_file])])


def open_corpus(data: DataArguments, training: PretrainingArguments, tokenizer) -> TokenizedCorpus:
    """Open the prepared corpus; prepared now, by the first process, if it is not there."""
    folder = corpus_folder(data, training)
    with training.main_process_first(local=False):
        if (folder / MANIFEST).is_file():
            corpus = TokenizedCorpus(folder)
        elif training.world_size > 1:
            raise UserError(f"{folder} holds no prepared corpus: prepare it first, by one process with --prepare_only.")
        elif not data.train_sources:
            raise UserError("--train_sources is missing, and --corpus_dir holds no prepared corpus.")
        else:
            sources = {source_name(source, i): [source] for i, source in enumerate(data.train_sources)}
            corpus = prepare_corpus(
                sources, tokenizer, folder, data.max_seq_length, data.text_column, data.preprocessing_num_workers
            )
    corpus.check_tokenizer(tokenizer)
    corpus.check_inputs(data.train_sources, data.max_seq_length)
    return corpus


def rows_of_step(training: PretrainingArguments) -> int:
    """Return the number of rows of one optimizer step over all processes."""
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def training_rows(
    data: DataArguments,
    training: PretrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    masking: Masking,
    with_sequence_indices: bool = False,
) -> Dataset | IterableDataset:
    """Return the rows to train on; set `training.max_steps` from the epochs where it is not given."""
    row_length = data.row_length or data.max_seq_length
    if data.streaming:
        from datasets import interleave_datasets

        streams = [
            load_texts([source], data.text_column, streaming=True).select_columns([data.text_column])
            for source in data.train_sources
        ]
        if not streams:
            raise UserError("--train_sources is missing.")
        check_streams(streams, data, rows_of_step(training), row_length, tokenizer)
        streams = [stream.repeat(None) for stream in streams]
        weights = [weight / sum(data.source_weights) for weight in data.source_weights] or None
        texts = streams[0] if len(streams) == 1 else interleave_datasets(streams, weights, seed=training.seed)
        return StreamedRows(
            texts, data.text_column, tokenizer, data.max_seq_length, row_length, masking, seed=training.seed
        )
    corpus = open_corpus(data, training, tokenizer)
    step = rows_of_step(training)
    rows_in_corpus = corpus.num_tokens / row_length
    if rows_in_corpus < step:
        raise UserError(too_short(corpus.num_tokens, step, row_length))
    if training.max_steps <= 0:
        training.max_steps = math.ceil(training.num_train_epochs * rows_in_corpus / step)
    logger.warning(
        f"Corpus: {len(corpus):,} sequences, {corpus.num_tokens:,} tokens. {training.max_steps:,} steps of "
        f"{step} x {row_length} tokens: {training.max_steps * step / rows_in_corpus:.2f} passes."
    )
    return PackedRows(
        corpus,
        num_rows=training.max_steps * step,
        row_length=row_length,
        masking=masking,
        pad_token_id=tokenizer.pad_token_id,
        seed=training.seed,
        source_weights=data.source_weights or None,
        with_sequence_indices=with_sequence_indices,
    )


def check_streams(
    streams: Sequence, data: DataArguments, step: int, row_length: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise a UserError if all of the streams' text is less than one step."""
    tokens = 0
    for stream in streams:
        for texts in stream.iter(batch_size=256):
            encoded = tokenize_texts(texts[data.text_column], tokenizer, data.max_seq_length)
            tokens += sum(len(sequence) for sequence in encoded["input_ids"])
            if tokens >= step * row_length:
                return
    raise UserError(too_short(tokens, step, row_length))


def too_short(tokens: int, step: int, row_length: int) -> str:
    return (
        f"the text has {tokens:,} tokens, less than one step of {step} rows of {row_length}: take more text or smaller "
        "batches."
    )


def validation_rows(
    data: DataArguments, training: PretrainingArguments, tokenizer: PreTrainedTokenizerBase, masking: Masking
) -> list[dict[str, torch.Tensor]] | None:
    """Return rows of held-out text, every sequence masked, the same at every evaluation."""
    if data.validation_file is None:
        return None
    texts = load_texts([data.validation_file], data.text_column)
    rows = StreamedRows(
        texts,
        data.text_column,
        tokenizer,
        data.max_seq_length,
        data.row_length or data.max_seq_length,
        replace(masking, sequence_share=1.0),
    )
    rows = list(islice(rows, data.max_eval_rows))
    if not rows:
        raise UserError(f"--validation_file {data.validation_file}: there is no text in it.")
    return rows


# --- models ----------------------------------------------------------------------------------------------------------


def load_tokenizer(arguments: ModelArguments) -> tuple[PreTrainedTokenizerBase, ModernALBERTConfig]:
    """Load the student's tokenizer and configuration."""
    name = arguments.model_name_or_path
    if name is None:
        raise UserError("--model_name_or_path is missing.")
    with explain_loading(f"--model_name_or_path {name}"):
        refuse_original_release(PreTrainedConfig.get_config_dict(name)[0])
        config = ModernALBERTConfig.from_pretrained(name)
    source = arguments.tokenizer_name_or_path or name
    flag = "model_name_or_path" if arguments.tokenizer_name_or_path is None else "tokenizer_name_or_path"
    with explain_loading(f"--{flag} {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    check_tokenizer(tokenizer, config, source)
    return tokenizer, config


def load_student(arguments: ModelArguments, config: ModernALBERTConfig) -> ModernALBERTForMaskedLM:
    """Load the student in float32; a folder with a configuration only gives random weights."""
    name = arguments.model_name_or_path
    with explain_loading(f"--model_name_or_path {name}"):
        if has_no_weights(Path(name)):
            logger.warning(f"{name} holds a configuration without weights: starting from random weights.")
            config._attn_implementation = arguments.attn_implementation
            return ModernALBERTForMaskedLM(config)
        return ModernALBERTForMaskedLM.from_pretrained(
            name, config=config, attn_implementation=arguments.attn_implementation, dtype=torch.float32
        )


def load_teacher(
    arguments: ModelArguments,
    distillation: DistillationConfig,
    student: ModernALBERTConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    device: torch.device,
) -> PreTrainedModel:
    """Load the teacher to its device, checked against the student's vocabulary and the length of the sequences."""
    name = arguments.teacher_name_or_path
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtypes["auto"] = torch.float32 if device.type == "cpu" else torch.bfloat16
    if arguments.teacher_dtype not in dtypes:
        raise UserError(f"--teacher_dtype {arguments.teacher_dtype} is not allowed: it must be {', '.join(dtypes)}.")
    loader = AutoModelForMaskedLM if distillation.logits_weight else AutoModel
    with explain_loading(f"--teacher_name_or_path {name}"):
        teacher_tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
        teacher, loading = loader.from_pretrained(
            name,
            trust_remote_code=arguments.trust_remote_code,
            dtype=dtypes[arguments.teacher_dtype],
            attn_implementation=arguments.teacher_attn_implementation,
            output_loading_info=True,
        )
    if teacher_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the vocabularies of the teacher {name} ({len(teacher_tokenizer)} tokens) and of the student "
            f"({len(tokenizer)} tokens) differ: nothing can be distilled token by token."
        )
    config = teacher.config
    if distillation.logits_weight and config.vocab_size != student.vocab_size:
        raise UserError(
            f"the teacher {name} has vocab_size={config.vocab_size}, the student {student.vocab_size}: their logits "
            "cannot be compared."
        )
    longest = getattr(config, "max_position_embeddings", max_seq_length)
    if longest < max_seq_length:
        raise UserError(f"--max_seq_length {max_seq_length} is not allowed: the teacher {name} reads {longest} tokens.")
    missing = [key for key in loading["missing_keys"] if "position_ids" not in key and "pooler" not in key]
    if missing:
        raise UserError(
            f"the teacher {name} lacks weights ({', '.join(sorted(missing)[:3])}"
            f"{', ...' if len(missing) > 3 else ''}): it has no trained masked-LM head to distil logits from."
        )
    return teacher.to(device)


def distillation_config(arguments: DistillationArguments, has_teacher: bool) -> DistillationConfig:
    """Return the configuration of the loss, checked."""
    layer_map = None
    if arguments.layer_map is not None:
        try:
            pairs = [pair.split(":") for pair in arguments.layer_map.split(",")]
            layer_map = tuple((int(student), int(teacher)) for student, teacher in pairs)
        except ValueError:
            raise UserError(
                f"--layer_map {arguments.layer_map} is not allowed: it must be pairs student:teacher, as 0:0,2:4,6:12."
            ) from None
    try:
        config = DistillationConfig(
            mlm_weight=arguments.mlm_weight,
            logits_weight=arguments.logits_weight,
            temperature=arguments.temperature,
            logits_positions=arguments.logits_positions,
            hidden_weight=arguments.hidden_weight,
            hidden_loss=arguments.hidden_loss,
            layer_map=layer_map,
            pooled_weight=arguments.pooled_weight,
        )
    except ValueError as error:
        raise UserError(f"--{error_message(error)}") from None
    if config.needs_teacher and not has_teacher:
        raise UserError("--teacher_name_or_path is missing: a distillation term has a weight.")
    if has_teacher and not config.needs_teacher:
        raise UserError("the teacher has nothing to do: give --logits_weight, --hidden_weight or --pooled_weight.")
    if arguments.teacher_input not in (None, "masked", "clean"):
        raise UserError(f"--teacher_input {arguments.teacher_input} is not allowed: it must be masked or clean.")
    if arguments.teacher_input == "clean" and config.logits_weight:
        raise UserError("--teacher_input clean is not allowed with --logits_weight: the teacher would see the answers.")
    if arguments.teacher_cache_dir is not None and (config.logits_weight or arguments.teacher_input == "masked"):
        raise UserError("--teacher_cache_dir needs clean input: what a teacher says of masks changes with them.")
    return config


def check_checkpoint(checkpoint: str | None, config: ModernALBERTConfig) -> None:
    """Raise a UserError if a checkpoint to continue from is of a model of another shape."""
    if checkpoint is None:
        return
    try:
        theirs = ModernALBERTConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint} cannot be resumed: {error_message(error)}") from None
    for name in SHAPE_FIELDS:
        if getattr(theirs, name) != getattr(config, name):
            raise UserError(
                f"{checkpoint} is of another size: {name}={getattr(theirs, name)!r} there, {getattr(config, name)!r} "
                "here."
            )


def check_projections(checkpoint: str | None, model: DistilledStudent) -> None:
    """Raise a UserError if a checkpoint to continue from has other projections to a teacher's width."""
    if checkpoint is None:
        return
    file = Path(checkpoint) / PROJECTIONS_FILE
    theirs = {name: values.shape for name, values in load_file(file).items()} if file.is_file() else {}
    ours = {name: values.shape for name, values in model.state_dict().items() if not name.startswith(STUDENT)}
    if theirs != ours:
        raise UserError(
            f"{checkpoint} was distilled from a teacher of another width, from other layers, or from none: it can only "
            "be resumed with the same."
        )


# --- the run ---------------------------------------------------------------------------------------------------------


def set_schedule(training: PretrainingArguments) -> None:
    """Put the decay into the scheduler's arguments, once the number of steps is known."""
    if training.lr_scheduler_type == "warmup_stable_decay":
        share = training.decay_steps
        steps = math.ceil(share * training.max_steps) if share < 1 else int(share)
        warmup = training.get_warmup_steps(training.max_steps)
        if steps + warmup > training.max_steps:
            raise UserError(
                f"--decay_steps {share:g} is not allowed: with {warmup} steps of warm-up it is more than --max_steps "
                f"{training.max_steps}."
            )
        training.lr_scheduler_kwargs = {"num_decay_steps": steps, "decay_type": training.decay_type}


def run(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    distillation_arguments: DistillationArguments,
    training_arguments: PretrainingArguments,
) -> dict[str, float]:
    """
    Prepare, train, evaluate and save.

    Returns:
        What `all_results.json` holds; empty if only the corpus was to be prepared.

    Raises:
        UserError: the arguments, the text or a checkpoint cannot be used.
    """
    distillation = check_arguments(model_arguments, data_arguments, distillation_arguments, training_arguments)
    tokenizer, config = load_tokenizer(model_arguments)
    masking = make_masking(data_arguments, tokenizer)
    validation = validation_rows(data_arguments, training_arguments, tokenizer, masking)
    if data_arguments.prepare_only:
        corpus = open_corpus(data_arguments, training_arguments, tokenizer)
        logger.warning(f"{corpus.folder}: {len(corpus):,} sequences, {corpus.num_tokens:,} tokens.")
        return {}

    output_dir, resume = Path(training_arguments.output_dir), training_arguments.resume_from_checkpoint
    starts_anew = data_arguments.overwrite_output_dir and resume is None
    checkpoint = None if starts_anew else checkpoint_to_resume(output_dir, resume)
    check_checkpoint(checkpoint, config)
    set_seed(training_arguments.seed)
    model, teacher = load_models(
        model_arguments, distillation, config, tokenizer, data_arguments.max_seq_length, training_arguments.device
    )
    check_projections(checkpoint, model)

    cache_dir = distillation_arguments.teacher_cache_dir
    rows = training_rows(
        data_arguments, training_arguments, tokenizer, masking, with_sequence_indices=cache_dir is not None
    )
    if cache_dir is not None:
        with training_arguments.main_process_first(local=False):
            teacher = CachedTeacher(teacher, rows.corpus, cache_dir)
    set_schedule(training_arguments)
    if data_arguments.overwrite_output_dir and training_arguments.process_index == 0:
        # Only now that nothing can be refused any more.
        remove_earlier_run(output_dir, OUTPUT_FILES)
    trainer = make_trainer(model, teacher, tokenizer, rows, validation, distillation_arguments, training_arguments)
    return train_and_evaluate(trainer, checkpoint)


def check_arguments(
    model: ModelArguments, data: DataArguments, distillation: DistillationArguments, training: PretrainingArguments
) -> DistillationConfig:
    """Refuse what cannot work before anything is loaded; the loss that is asked for."""
    check_processes(training.world_size, training.n_gpu)
    check_numbers(data, training)
    check_reporters(training.report_to)
    config = distillation_config(distillation, model.teacher_name_or_path is not None)
    if distillation.teacher_cache_dir is not None and data.streaming:
        raise UserError("--teacher_cache_dir needs a prepared corpus, not --streaming.")
    if data.validation_file is None:
        if training.evaluation_is_asked_for:
            raise UserError(
                "--validation_file is missing: --eval_strategy, --load_best_model_at_end or --save_strategy best ask "
                "for evaluation."
            )
        training.eval_strategy = "no"
    check_output_dir(Path(training.output_dir), data.overwrite_output_dir, training.resume_from_checkpoint)
    check_sources(data, training)
    warn_of_slow_bfloat16(training)
    if training.device.type == "cpu":
        keep_freed_memory()
    return config


def make_masking(data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Masking:
    """Make the masking that the arguments ask for."""
    try:
        return Masking.for_tokenizer(
            tokenizer, data.mlm_probability, data.masked_sequence_share, data.whole_word_masking
        )
    except ValueError as error:
        raise UserError(error_message(error)) from None


def load_models(
    arguments: ModelArguments,
    distillation: DistillationConfig,
    config: ModernALBERTConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    device: torch.device,
) -> tuple[DistilledStudent, Teacher | None]:
    """Load the student with what distillation adds to it, and the teacher where there is one."""
    student = load_student(arguments, config)
    if not distillation.needs_teacher:
        return DistilledStudent(student, distillation, (), None), None
    teacher = load_teacher(arguments, distillation, student.config, tokenizer, max_seq_length, device)
    try:
        layers = student.config.num_hidden_layers, teacher.config.num_hidden_layers
        layer_map = distillation.resolved_layer_map(*layers) if distillation.hidden_weight else ()
    except ValueError as error:
        raise UserError(f"--{error_message(error)}") from None
    model = DistilledStudent(student, distillation, layer_map, teacher.config.hidden_size)
    return model, Teacher(teacher, distillation, layer_map)


def make_trainer(
    model: DistilledStudent,
    teacher: Teacher | CachedTeacher | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | IterableDataset,
    validation: list[dict[str, torch.Tensor]] | None,
    distillation_arguments: DistillationArguments,
    training_arguments: PretrainingArguments,
) -> PretrainingTrainer:
    """Make a Trainer that distils the model on packed rows."""
    distillation = model.distillation
    if training_arguments.ddp_find_unused_parameters is None:
        # Without logits the head gets no gradient, without routing the routers; looking for them costs every step.
        has_unused = not (distillation.mlm_weight or distillation.logits_weight)
        is_routed = model.student.config.expert_mixing == "token"
        training_arguments.ddp_find_unused_parameters = has_unused or not is_routed
    teacher_input = distillation_arguments.teacher_input or ("masked" if distillation.logits_weight else "clean")
    return PretrainingTrainer(
        model=model,
        args=training_arguments,
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=tokenizer,
        teacher=teacher,
        teacher_sees_masks=teacher_input == "masked",
        peak_tflops=training_arguments.peak_tflops,
    )


def train_and_evaluate(trainer: PretrainingTrainer, checkpoint: str | None) -> dict[str, float]:
    """Train, save, evaluate if there are rows for it, and write `all_results.json`, which is returned."""
    RouterCallback.add_to(trainer)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    results = dict(outcome.metrics)
    trainer.log_metrics("train", outcome.metrics)
    if trainer.eval_dataset is not None and trainer.args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        results |= metrics
    if trainer.is_world_process_zero():
        output_dir = Path(trainer.args.output_dir)
        for file in output_dir.glob("*.safetensors"):
            set_default_mode(file)
        # Written last: its presence says that the run is complete.
        (output_dir / "all_results.json").write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    return results


def main() -> None:
    arguments = parse_arguments(
        ModelArguments, DataArguments, DistillationArguments, PretrainingArguments, description=__doc__
    )
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers.utils.logging.set_verbosity_warning()
    run(*arguments)


def command() -> None:
    """Entry point of `modernalbert-pretrain`."""
    run_main(main)


if __name__ == "__main__":
    command()
