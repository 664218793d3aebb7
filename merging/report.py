# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Report of a merge, for a model's experts and an adapter's alike, and the folders it writes."""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from modernalbert.cli.markdown import markdown_table
from modernalbert.cli.output_folders import atomic_folder
from modernalbert.cli.tokenizer_files import save_tokenizer
from modernalbert.export.hub_folder import export_to_hub_folder
from modernalbert.export.sentence_transformers import copy_modules
from modernalbert.merging.ffn_recorder import evaluation_mode
from modernalbert.merging.fold import Factors, write_stock_lora
from modernalbert.merging.recovery import RecoveryReport


SAVES = ("adapter", "folded", "both")
# peft's types of task, and how the names of their classes end.
CLASS_ENDINGS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "FEATURE_EXTRACTION": "Model",
}
# What a merge writes, and may therefore replace.
OUTPUT_FILES = ("adapter", "base", "folded", "merge_report.json", "merge_report.md")


@dataclass
class LayerReport:
    """
    Result of merging the experts of one layer (one FFN, over all its uses).

    Attributes:
        weights: (E,) of the experts.
        energy_kept_in, energy_kept_out: Share of the merged delta's squared norm that the rank keeps, by projection;
            for `calibrated`, of the delta's output on the calibration text.
        relative_error: |merged - routed| / |routed|, of the FFN's output over all tokens; None where not measured.
        relative_error_of_experts: |merged - routed| / |routed - shared FFN alone|.
    """

    weights: list[float]
    energy_kept_in: float
    energy_kept_out: float
    relative_error: float | None = None
    relative_error_of_experts: float | None = None


@dataclass
class MergeReport:
    """
    The result of merging experts.

    Attributes:
        method, weights, rank: Of the merge.
        layers: By the name of the layer that had experts.
        model: The merged model, in evaluation mode: folded where that is possible, else with one expert and no router.
            None for an adapter that was merged in place.
        base: The model without experts, base of the stock LoRA adapter; None where there is no such adapter.
        factors: The merged experts, A (r, inputs) and B (outputs, r) by the path of the module that they change.
        heads: Modules by path that the adapter brings along.
        task_type: peft's, of the adapter.
        notes: Sentences about what could not be done, or was done unlike usual.
        measured_on: What the errors were measured on; None = nothing.
        relative_error_of_output: |merged - routed| / |routed|: of a ModernALBERT's token states after the last layer;
            of another model's logits, or else its first output.
        loss_before, loss_after: Mean loss over those batches that have labels, in evaluation mode.
        recovery: What training after the merge did.
        metrics: Of the task, for "routed" and "merged".
        latency_ms: Median forward times, from `measure_latency`.
    """

    method: str
    weights: str
    rank: int
    layers: dict[str, LayerReport]
    model: PreTrainedModel | None = None
    base: PreTrainedModel | None = None
    factors: Factors = field(default_factory=dict)
    heads: dict[str, nn.Module] = field(default_factory=dict)
    task_type: str | None = None
    parameters_before: int | None = None
    parameters_after: int | None = None
    notes: list[str] = field(default_factory=list)
    measured_on: str | None = None
    relative_error_of_output: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    recovery: RecoveryReport | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    latency_ms: dict[str, float] | None = None

    @property
    def folded(self) -> bool:
        """Whether `model` has no experts left."""
        return self.base is not None

    def to_dict(self) -> dict:
        """Return the figures, ready for JSON."""
        tensors = ("model", "base", "factors", "heads")
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in tensors}
        values["layers"] = {name: asdict(layer) for name, layer in self.layers.items()}
        values["recovery"] = None if self.recovery is None else asdict(self.recovery)
        return values | {"folded": self.folded}

    def to_markdown(self) -> str:
        """Format a section for a model card."""
        lines = ["## Merged experts", "", f"Weights `{self.weights}`, method `{self.method}`, rank {self.rank}."]
        if self.parameters_before is not None:
            lines[-1] += f" Parameters: {self.parameters_before:,} before, {self.parameters_after:,} after."
        for note in self.notes:
            lines += ["", note]
        titles = ["layer", "weights", "energy kept (in, out)"]
        has_errors = any(layer.relative_error is not None for layer in self.layers.values())
        titles += ["error of FFN output", "error of the experts' part"] if has_errors else []
        rows = []
        for name, layer in self.layers.items():
            cells = [name, " ".join(f"{w:.3f}" for w in layer.weights)]
            cells.append(f"{layer.energy_kept_in:.4f}, {layer.energy_kept_out:.4f}")
            if has_errors:
                cells += [_percent(layer.relative_error), _percent(layer.relative_error_of_experts)]
            rows.append(cells)
        lines += ["", markdown_table(titles, rows, num_words=2), ""]
        if self.measured_on is None:
            lines.append("Errors against token routing are not measured: no calibration batches were given.")
        else:
            lines.append(
                f"Relative errors against token routing, measured on {self.measured_on}. Output of the last layer: "
                f"{_percent(self.relative_error_of_output)}."
            )
        if self.loss_before is not None:
            lines.append(f"Mean loss there: {self.loss_before:.4f} routed, {self.loss_after:.4f} merged.")
        if self.recovery is not None:
            lines.append(
                f"Then {self.recovery.steps} steps of distillation (AdamW, {self.recovery.learning_rate:g}) moved the "
                f"{self.recovery.loss} there from {self.recovery.loss_before:.4g} to {self.recovery.loss_after:.4g}."
            )
        for name, values in self.metrics.items():
            lines.append(f"{name}: " + ", ".join(f"{value:.4f} {key}" for key, value in values.items()) + ".")
        if self.latency_ms:
            times = ", ".join(f"{value:.1f} ms {key}" for key, value in self.latency_ms.items())
            lines.append(f"Median forward: {times}.")
        return "\n".join(lines) + "\n"

    def measure_latency(self, routed: nn.Module, batch: dict, repeats: int = 15) -> None:
        """Time forwards of both models in turn on one batch, and keep the medians in `latency_ms`."""
        times = {"routed": [], "merged": []}
        with torch.inference_mode(), evaluation_mode(routed):
            for i in range(repeats + 2):
                for name, model in (("routed", routed), ("merged", self.model)):
                    _synchronize(model)
                    start = time.perf_counter()
                    model(**batch)
                    _synchronize(model)
                    if i >= 2:  # warm-up
                        times[name].append(1000 * (time.perf_counter() - start))
        self.latency_ms = {name: statistics.median(values) for name, values in times.items()}

    def save(
        self,
        folder: str | Path,
        save: str = "both",
        tokenizer: PreTrainedTokenizerBase | None = None,
        hub_model_id: str | None = None,
        base_model_name: str | None = None,
        modules_from: str | Path | None = None,
    ) -> Path:
        """
        Write the result; the folder appears when it is complete.

        Args:
            folder: Gets `merge_report.json` and `merge_report.md`, and by `save`:
                "adapter": `adapter/`, a stock peft LoRA, and `base/`, the model it sits on;
                "folded": `folded/`, the merged model; "both". Of a ModernALBERT these are complete Hub folders.
            tokenizer: Written beside each model.
            hub_model_id: The repository that the cards name, if the result is to be uploaded.
            base_model_name: What the adapter calls its base (`base_model_name_or_path`); None = `hub_model_id` +
                "-base", or else the absolute path of `base/`, which no longer holds where the folder is moved.
            modules_from: Folder or Hub name of the model that was merged: if it is a sentence-transformers folder, its
                modules (pooling, normalization, prompts) are copied to `base/` and `folded/`.

        Raises:
            ValueError: `save` is not allowed, or there is no adapter or no model to write.
        """
        if save not in SAVES:
            raise ValueError(f"save={save!r} is not allowed: it must be one of {', '.join(map(repr, SAVES))}.")
        if self.model is None:
            raise ValueError("An adapter that was merged in place has no models to write: call its save_as_lora.")
        if save == "adapter" and self.base is None:
            raise ValueError(f"save='adapter' is not allowed: {' '.join(self.notes)}")
        folder = Path(folder)
        base_id = f"{hub_model_id}-base" if hub_model_id else None
        base_name = base_model_name or base_id or str(folder.resolve() / "base")
        with atomic_folder(folder, replaceable=OUTPUT_FILES) as temporary:
            if save != "folded" and self.base is not None:
                _write_model(self.base, temporary / "base", tokenizer, base_model_name or base_id, modules_from, ())
                self._write_adapter(temporary / "adapter", base_name)
            if save != "adapter":
                sections = [self.to_markdown()]
                _write_model(self.model, temporary / "folded", tokenizer, hub_model_id, modules_from, sections)
            (temporary / "merge_report.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", "utf-8")
            (temporary / "merge_report.md").write_text(self.to_markdown(), "utf-8")
        return folder

    def _write_adapter(self, folder: Path, base_name: str) -> None:
        modules = {path: self.base.get_submodule(path) for path in self.factors}
        # As peft keeps a LoRA, whatever the base's half precision.
        dtypes = {p: torch.promote_types(module.weight.dtype, torch.float32) for p, module in modules.items()}
        write_stock_lora(
            folder,
            {path: (A.to(dtypes[path]), B.to(dtypes[path])) for path, (A, B) in self.factors.items()},
            base_name,
            self.task_type,
            {f"{path}.{name}": x for path, head in self.heads.items() for name, x in head.state_dict().items()},
            list(self.heads),
            any(isinstance(module, Conv1D) for module in modules.values()),
        )
        auto_class = (
            getattr(self.base, "_auto_class", None) or auto_class_of(self.task_type) or type(self.base).__name__
        )
        trust = ", trust_remote_code=True" if is_modernalbert(self.base) else ""
        (folder / "README.md").write_text(
            f"""---
library_name: peft
base_model: {base_name}
tags: [lora]
---
# Merged experts as a stock LoRA adapter

Where `adapter/` and `base/` lie side by side, wherever that is:

```python
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("base"{trust})
model = PeftModel.from_pretrained(base, "adapter")
```

{self.to_markdown()}""",
            "utf-8",
        )


def task_type_of(model: PreTrainedModel) -> str | None:
    """
    Return peft's task type for a model, by its class; None for masked words and multiple choice, for which it has none.
    """
    endings = CLASS_ENDINGS.items()
    return next((task for task, ending in endings if type(model).__name__.endswith(ending)), None)


def auto_class_of(task_type: str | None) -> str | None:
    """Return transformers' Auto class for a task type of peft."""
    return (
        f"Auto{'' if task_type == 'FEATURE_EXTRACTION' else 'Model'}{CLASS_ENDINGS[task_type]}" if task_type else None
    )


def is_modernalbert(model: PreTrainedModel) -> bool:
    """Return whether a model is a ModernALBERT, with this package's code or that of a Hub folder."""
    return getattr(model.config, "model_type", None) == "modernalbert"


def _write_model(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str | None,
    modules_from: str | Path | None,
    sections: Sequence[str],
) -> None:
    if is_modernalbert(model):
        export_to_hub_folder(model, tokenizer, folder, hub_model_id=name, source=modules_from, sections=sections)
        return
    model.save_pretrained(folder)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    if sections:
        (folder / "README.md").write_text("\n".join(sections), "utf-8")
    if modules_from is not None:
        copy_modules(modules_from, folder)


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.2f} %"


def _synchronize(model: nn.Module) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
