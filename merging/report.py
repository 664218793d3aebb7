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
"""What merging the experts of a model did: the report, and the folders it writes."""

import copy
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from modernalbert.cli.output_folders import atomic_folder
from modernalbert.export.hub_folder import export_to_hub_folder
from modernalbert.mol_backends import Experts


SAVES = ("adapter", "folded", "both")
# peft's types of task, by the ends of our classes' names; masked words have none.
TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}
# What a merge writes, and may therefore replace.
WRITTEN = ("adapter", "base", "folded", "merge_report.json", "merge_report.md")


@dataclass
class GroupReport:
    """What merging did to one group. Errors are relative norms over the tokens of all its layers."""

    group: int
    weights: list[float]
    rank: int
    energy_kept_in: float
    energy_kept_out: float
    relative_error: float | None = None  # |merged - routed| / |routed|, of the FFN's output
    relative_error_of_experts: float | None = None  # |merged - routed| / |routed - shared FFN alone|


@dataclass
class MergeReport:
    """
    The result of `merge_experts`.

    Attributes:
        model: The merged model: folded where that is possible, else with one expert and no router.
        base: The model without experts, base of the stock LoRA adapter; None where there is no such adapter.
        folded: Whether `model` has no experts left.
        note: Said where something could not be done.
        measured_on: What the errors were measured on.
        loss_before, loss_after: Mean loss over the calibration batches that have labels, in evaluation mode.
        latency_ms: Median forward times, from `measure_latency`.
    """

    model: PreTrainedModel
    base: PreTrainedModel | None
    experts: dict[int, Experts]
    method: str
    weights: str
    rank: int
    groups: list[GroupReport]
    parameters_before: int
    parameters_after: int
    folded: bool = True
    note: str | None = None
    measured_on: str | None = None
    relative_error_of_output: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    latency_ms: dict[str, float] | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The figures, ready for JSON."""
        skipped = ("model", "base", "experts")
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in skipped}
        return values | {"groups": [asdict(group) for group in self.groups]}

    def to_markdown(self) -> str:
        """A section for a model card."""
        lines = [
            "## Merged experts",
            "",
            f"Weights `{self.weights}`, method `{self.method}`, rank {self.rank}. Parameters: "
            f"{self.parameters_before:,} before, {self.parameters_after:,} after.",
            "",
        ]
        if self.note:
            lines += [self.note, ""]
        lines += [
            "| group | weights | energy kept (in, out) | error of FFN output | error of the experts' part |",
            "|---|---|---|---|---|",
        ]
        for g in self.groups:
            lines.append(
                f"| {g.group} | {' '.join(f'{w:.3f}' for w in g.weights)} | {g.energy_kept_in:.4f}, "
                f"{g.energy_kept_out:.4f} | {_percent(g.relative_error)} | {_percent(g.relative_error_of_experts)} |"
            )
        lines += [
            "",
            f"Relative errors against token routing, measured on {self.measured_on}. Token states after the last "
            f"layer: {_percent(self.relative_error_of_output)}.",
        ]
        if self.loss_before is not None:
            lines.append(f"Mean loss there: {self.loss_before:.4f} routed, {self.loss_after:.4f} merged.")
        for name, values in self.metrics.items():
            lines.append(f"{name}: " + ", ".join(f"{value:.4f} {key}" for key, value in values.items()) + ".")
        if self.latency_ms:
            times = ", ".join(f"{value:.1f} ms {key}" for key, value in self.latency_ms.items())
            lines.append(f"Median forward: {times}.")
        return "\n".join(lines) + "\n"

    def measure_latency(self, routed: PreTrainedModel, batch: dict, repeats: int = 15) -> None:
        """Time forwards of both models in turn on one batch, and keep the medians in `latency_ms`."""
        times = {"routed": [], "merged": []}
        was_training = routed.training
        with torch.inference_mode():
            for i in range(repeats + 2):
                for name, model in (("routed", routed.eval()), ("merged", self.model)):
                    _synchronise(model)
                    start = time.perf_counter()
                    model(**batch)
                    _synchronise(model)
                    if i >= 2:  # warm-up
                        times[name].append(1000 * (time.perf_counter() - start))
        routed.train(was_training)
        self.latency_ms = {name: statistics.median(values) for name, values in times.items()}

    def save(self, folder: str | Path, save: str = "both", tokenizer=None, hub_model_id: str | None = None) -> Path:
        """
        Write the result; the folder appears when it is complete.

        Args:
            folder: Gets `merge_report.json` and `merge_report.md`, and by `save`:
                "adapter": `adapter/`, a stock peft LoRA, and `base/`, the model it sits on, a complete Hub folder;
                "folded": `folded/`, the merged model, a complete Hub folder; "both".
            tokenizer: Written beside each model.
            hub_model_id: The repository that cards and adapter will name as theirs, if they are to be uploaded.

        Raises:
            ValueError: `save` is not allowed, or there is no adapter (`mol_positions="last"`).
        """
        if save not in SAVES:
            raise ValueError(f"save={save!r} is not allowed: it must be one of {', '.join(map(repr, SAVES))}.")
        if save == "adapter" and self.base is None:
            raise ValueError(f"save='adapter' is not allowed: {self.note}")
        folder = Path(folder)
        with atomic_folder(folder, replaceable=WRITTEN) as temporary:
            if save != "folded" and self.base is not None:
                export_to_hub_folder(self.base, tokenizer, temporary / "base", hub_model_id=hub_model_id)
                self.save_adapter(temporary / "adapter", base_name=hub_model_id or str(folder.resolve() / "base"))
            if save != "adapter":
                folded = export_to_hub_folder(self.model, tokenizer, temporary / "folded", hub_model_id=hub_model_id)
                with (folded / "README.md").open("a", encoding="utf-8") as card:
                    card.write("\n" + self.to_markdown())
            (temporary / "merge_report.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n")
            (temporary / "merge_report.md").write_text(self.to_markdown())
        return folder

    def save_adapter(self, folder: Path, base_name: str) -> None:
        """Write the merged experts as a `LoraConfig` checkpoint that plain peft loads on `base`."""
        prefix = "" if self.base.base_model is self.base else f"{self.base.base_model_prefix}."
        targets = [f"{prefix}groups.{k}.mlp.{name}" for k in self.experts for name in ("Wi", "Wo")]
        # alpha = rank: the scale is already in the factors. Full paths: a bare "Wo" would hit attention too. By the
        # task's type peft's Auto classes find the base's; with it, peft keeps the head in the adapter as well.
        task = next((task for name, task in TASK_TYPES.items() if type(self.base).__name__.endswith(name)), None)
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=targets, task_type=task)
        model = get_peft_model(copy.deepcopy(self.base), config)
        with torch.no_grad():
            for k, expert in self.experts.items():
                mlp = model.base_model.model.get_submodule(f"{prefix}groups.{k}.mlp")
                for layer, A, B in ((mlp.Wi, expert.A_in, expert.B_in), (mlp.Wo, expert.A_out, expert.B_out)):
                    layer.lora_A["default"].weight.copy_(A[0])
                    layer.lora_B["default"].weight.copy_(B[0])
        model.save_pretrained(folder, save_embedding_layers=False)
        # peft names the class and module of the base; loaded as remote code it lives in no importable module.
        written = json.loads((folder / "adapter_config.json").read_text())
        written |= {"auto_mapping": None, "base_model_name_or_path": base_name}
        (folder / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n")
        (folder / "README.md").write_text(
            f"---\nlibrary_name: peft\nbase_model: {base_name}\ntags: [lora, modernalbert]\n---\n"
            "# Merged experts of a ModernALBERT, as a stock LoRA adapter\n\n"
            "Load the base (beside this folder, in `base`) with `trust_remote_code=True`, then "
            "`PeftModel.from_pretrained(base, this_folder)`.\n\n" + self.to_markdown()
        )


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.2f} %"


def _synchronise(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
