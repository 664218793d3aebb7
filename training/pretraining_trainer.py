# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A Trainer for packed rows and a teacher: computes the terms, logs them with speed and routing, saves the student."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler
from transformers import Trainer

from modernalbert.cli.tokenizer_files import save_tokenizer
from modernalbert.modeling_modernalbert import ModernALBERTForMaskedLM

from .distillation import DistilledStudent, Teacher, TeacherOutputs
from .router_learning_rate import RouterLearningRateMixin
from .teacher_cache import CachedTeacher


PROJECTIONS_FILE = "distillation.safetensors"
STUDENT = "student."


class PretrainingTrainer(RouterLearningRateMixin, Trainer):
    """
    Trains a `DistilledStudent` on rows of `data/packing.py`, in the order in which they come.

    Every log line of training has the mean of each term since the last one, the routers' entropy among them, tokens per
    second, and, if the peak is known, the model FLOPs utilisation.

    Args:
        teacher: Answers for the rows; None without distillation.
        teacher_sees_masks: Whether it reads the student's masked input or the clean text.
        peak_tflops: What one device can do at best in the dtype of training, in 10^12 operations per second.
        kwargs: As Trainer.
    """

    def __init__(
        self,
        *args,
        teacher: Teacher | CachedTeacher | None = None,
        teacher_sees_masks: bool = False,
        peak_tflops: float | None = None,
        **kwargs,
    ):
        super().__init__(*args, compute_metrics=mean_of_terms(self), **kwargs)
        self.teacher, self.teacher_sees_masks, self.peak_tflops = teacher, teacher_sees_masks, peak_tflops
        # Trainer is to count the masked tokens of a step, and to leave the averaging to `compute_loss`.
        self.model_accepts_loss_kwargs = True
        self._term_sums: dict[str, torch.Tensor] = {}
        self._evaluated_terms: list[str] = []
        self._clock = time.perf_counter()
        self._num_batches = 0

    def _get_train_sampler(self, train_dataset=None):
        """Return no sampler of Trainer's: rows know their order themselves."""
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        inputs = dict(inputs)
        clean, sequences = inputs.pop("clean_input_ids"), inputs.pop("sequence_indices", None)
        teacher_outputs = None
        if self.teacher is not None:
            teacher_outputs = self._ask_teacher(clean, sequences, inputs)
        shares = {}
        if model.training:
            # Gradients are averaged over processes: a process's loss is its share times their number.
            world = self.args.world_size
            masked = (inputs["labels"] != -100).sum()
            shares["masked_share"] = world * masked / torch.as_tensor(num_items_in_batch).clamp(min=1)
            shares["batch_share"] = 1 / self.current_gradient_accumulation_steps
        outputs = model(**inputs, teacher_outputs=teacher_outputs, **shares)
        if model.training:
            self._count(outputs, inputs)
        if not return_outputs:
            return outputs["loss"]
        # Trainer gathers outputs over rows.
        rows = len(inputs["input_ids"])
        terms = {name: term.expand(rows) for name, term in outputs.items() if name != "loss"}
        self._evaluated_terms = list(terms)
        return outputs["loss"], {"loss": outputs["loss"], **terms}

    def _ask_teacher(
        self, clean: torch.Tensor, sequences: torch.Tensor | None, inputs: dict[str, torch.Tensor]
    ) -> TeacherOutputs:
        places = inputs["position_ids"], inputs["attention_mask"]
        if isinstance(self.teacher, CachedTeacher):
            # Rows of held-out text are in no corpus.
            if sequences is not None:
                return self.teacher(clean, *places, sequences)
            return self.teacher.teacher(clean, *places)
        return self.teacher(inputs["input_ids"] if self.teacher_sees_masks else clean, *places, inputs["labels"])

    # --- logging

    def _count(self, outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> None:
        real = inputs["attention_mask"].bool()
        counts = {
            "tokens": real.sum(),
            "sequences": (real & (inputs["position_ids"] == 0)).sum(),
            "masked": (inputs["labels"] != -100).sum(),
        }
        for name, value in (outputs | counts).items():
            if name != "loss":
                self._term_sums[name] = self._term_sums.get(name, 0) + value.detach().float()
        self._num_batches += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._num_batches:
            logs = logs | self._training_measures()
        super().log(logs, start_time)

    def _training_measures(self) -> dict[str, float]:
        """Since the last call, over all processes."""
        names = list(self._term_sums)
        sums = torch.stack([self._term_sums[name] for name in names])
        sums = dict(zip(names, self.accelerator.reduce(sums, "sum").tolist()))
        seconds = time.perf_counter() - self._clock
        batches = self._num_batches * self.args.world_size
        tokens, sequences, masked = (sums.pop(name) for name in ("tokens", "sequences", "masked"))
        measures = {name: total / batches for name, total in sums.items()}
        measures["tokens_per_second"] = tokens / seconds
        if self.peak_tflops is not None:
            student = self.accelerator.unwrap_model(self.model).student
            flops = training_flops(student, tokens, sequences, masked)
            measures["mfu"] = flops / seconds / (self.peak_tflops * 1e12 * self.args.world_size)
        self._term_sums, self._num_batches, self._clock = {}, 0, time.perf_counter()
        return measures

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._clock += time.perf_counter() - start
        return metrics

    def _save_checkpoint(self, *args, **kwargs) -> None:
        start = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        self._clock += time.perf_counter() - start

    def _inner_training_loop(self, *args, **kwargs):
        self._clock = time.perf_counter()
        return super()._inner_training_loop(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        student = self.accelerator.unwrap_model(self.model).student
        return student.floating_point_ops({"input_ids": inputs["input_ids"]})

    # --- saving

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save the student as any ModernALBERT, so that a checkpoint is a model; projections in a file of their own."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model: DistilledStudent = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        state_dict = model.state_dict() if state_dict is None else state_dict
        student = {name.removeprefix(STUDENT): v for name, v in state_dict.items() if name.startswith(STUDENT)}
        for name in model.student.all_tied_weights_keys:
            # Gathered from its shards, a tied weight has memory of its own and would be saved twice.
            student.pop(name, None)
        projections = {name: v.contiguous() for name, v in state_dict.items() if not name.startswith(STUDENT)}
        model.student.save_pretrained(folder, state_dict=student)
        if projections:
            save_file(projections, folder / PROJECTIONS_FILE)
        if self.processing_class is not None:
            save_tokenizer(self.processing_class, folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        model = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        folder = Path(resume_from_checkpoint)
        student = ModernALBERTForMaskedLM.from_pretrained(folder, dtype=model.student.dtype)
        model.student.load_state_dict(student.state_dict())
        state = {name: value for name, value in model.state_dict().items() if name.startswith(STUDENT)}
        if (folder / PROJECTIONS_FILE).is_file():
            state |= load_file(folder / PROJECTIONS_FILE)
        model.load_state_dict(state)


def training_flops(student: ModernALBERTForMaskedLM, tokens: float, sequences: float, masked: float) -> float:
    """
    Count the floating-point operations of the student's forward and backward passes, without the teacher's and without
    recomputation: 6 for every multiply-add.
    """
    per_token = student.model.multiply_adds_per_token(round(tokens / max(1, sequences)))
    config = student.config
    decoder = config.hidden_size**2 + student.decoder.weight.numel()
    decoder += config.hidden_size * (config.embedding_size or 0)
    return 6 * (tokens * per_token + masked * decoder)


def mean_of_terms(trainer: PretrainingTrainer) -> Callable:
    """Return a `compute_metrics` that averages the terms of the loss over the evaluation rows."""

    def compute(output) -> dict[str, float]:
        predictions = output.predictions if isinstance(output.predictions, tuple) else (output.predictions,)
        return {name: float(values.mean()) for name, values in zip(trainer._evaluated_terms, predictions)}

    return compute
