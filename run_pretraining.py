# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Pretrain a ModernALBERT with masked language modelling and with distillation from a teacher.

    python run_pretraining.py configs/pretraining/nano.json
    python run_pretraining.py --model_name_or_path M --train_sources a.jsonl b.parquet --output_dir O --max_steps 1000
    python run_pretraining.py --model_name_or_path M --teacher_name_or_path T --hidden_weight 1 --pooled_weight 1 \\
        --train_sources user/dataset:config:split --streaming --output_dir O --max_steps 1000
    accelerate launch --config_file configs/accelerate/ddp.yaml run_pretraining.py configs/pretraining/tiny.json

Text is tokenized once into a memory-mapped corpus (--prepare_only stops after that) and packed into rows without
cross-attention. Masks are drawn each time a row is read. After an interruption the same command continues from the last
checkpoint with exactly the remaining rows. Takes all of transformers' TrainingArguments.

A decay branch from any checkpoint of the stable phase is the same command with --resume_from_checkpoint CHECKPOINT, a
new --output_dir and --max_steps, of which the last --decay_steps decay.
"""

import json
import logging
from pathlib import Path

import torch
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
from modernalbert.cli.arguments import check_processes, check_reporters, run_script
from modernalbert.cli.bfloat16 import warn_of_slow_bfloat16
from modernalbert.cli.errors import UserError, error_message, explain_loading
from modernalbert.cli.output_folders import set_default_mode
from modernalbert.configuration_modernalbert import ModernALBERTConfig, refuse_original_release
from modernalbert.diagnostics import RouterCallback
from modernalbert.finetuning.checkpoint import check_tokenizer, check_weights, has_no_weights
from modernalbert.finetuning.run_folder import EARLIER_RUN, check_output_dir, checkpoint_to_resume, remove_earlier_run
from modernalbert.modeling_modernalbert import ModernALBERTForMaskedLM
from modernalbert.training.distillation import DistillationConfig, DistilledStudent, Teacher
from modernalbert.training.pretraining_arguments import (
    DataArguments,
    DistillationArguments,
    ModelArguments,
    PretrainingArguments,
    check_numbers,
    distillation_config,
    set_schedule,
)
from modernalbert.training.pretraining_rows import (
    check_sources,
    make_masking,
    open_corpus,
    training_rows,
    validation_rows,
)
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
    """
    Load the student in float32; a folder with a configuration only gives random weights.

    Raises:
        UserError: it cannot be loaded, or lacks weights of its encoder.
    """
    name = arguments.model_name_or_path
    with explain_loading(f"--model_name_or_path {name}"):
        if has_no_weights(Path(name)):
            logger.warning(f"{name} holds a configuration without weights: starting from random weights.")
            config._attn_implementation = arguments.attn_implementation
            return ModernALBERTForMaskedLM(config)
        loading = {"attn_implementation": arguments.attn_implementation, "dtype": torch.float32}
        student, report = ModernALBERTForMaskedLM.from_pretrained(
            name, config=config, output_loading_info=True, **loading
        )
        check_weights(student, set(report["missing_keys"]), name, keeps_head=False)
        return student


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


def command() -> None:
    """Entry point of `modernalbert-pretrain`."""
    run_script(run, ModelArguments, DataArguments, DistillationArguments, PretrainingArguments, description=__doc__)


if __name__ == "__main__":
    command()
