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
"""A MoL adapter on any base, from its folder: loaded, merged, and written as a stock LoRA and as a folded model."""

import importlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from modernalbert import modeling_modernalbert
from modernalbert.command_line import UserError, atomic_folder, first_sentence, save_tokenizer
from modernalbert.tuner_experts import MoLMergeReport
from modernalbert.tuner_mol import MoLConfig


# The Auto class of each of peft's task types.
CLASS_OF_TASK = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_adapter(base: str, adapter: str) -> PeftModel:
    """
    A base with a MoL adapter, both from folders or the Hub, in evaluation mode.

    Raises:
        UserError: one of them cannot be loaded, they do not belong together, or the adapter is of another kind.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
        if not isinstance(config, MoLConfig):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise UserError(f"--adapter_name_or_path {adapter} is not a MoL adapter: its peft_type is {kind}.")
        model = load_base(base, config, load_peft_weights(adapter, device="cpu"))
        return PeftModel.from_pretrained(model, adapter).eval()
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"--adapter_name_or_path {adapter} on {base} cannot be loaded: {first_sentence(error)}"
        ) from None


def load_base(name: str, config: MoLConfig, adapter_state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The base as the class that the adapter was trained on, or else the one that its own configuration names."""
    made_on = config.auto_mapping or {}
    if config.task_type in CLASS_OF_TASK:
        model_class = getattr(transformers, CLASS_OF_TASK[config.task_type])
    elif made_on:
        model_class = getattr(importlib.import_module(made_on["parent_library"]), made_on["base_model_class"])
    else:
        architecture = (AutoConfig.from_pretrained(name).architectures or ["AutoModel"])[0]
        model_class = getattr(modeling_modernalbert, architecture, None) or getattr(transformers, architecture)
    # A head that came with the adapter says how many labels there are.
    heads = [values for key, values in adapter_state.items() if key.endswith(("classifier.weight", "score.weight"))]
    return model_class.from_pretrained(name, dtype="auto", **({"num_labels": heads[0].shape[0]} if heads else {}))


def save_merged_adapter(
    model: PeftModel,
    report: MoLMergeReport,
    base: str,
    folder: str | Path,
    replaceable: tuple[str, ...],
    save: str = "both",
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """
    Write a merged adapter as `MergeReport.save` does a ModernALBERT's experts; the model is folded by it.

    Args:
        model: Whose adapter has been merged to one expert.
        base: Where its base came from, for `base/`.
        replaceable: What may be in the folder already.
        save: "adapter" (`adapter/`, a stock LoRA, and `base/`), "folded" or "both".
        dtype: Of what is written.
    """
    folder, tuner = Path(folder), model.base_model
    with atomic_folder(folder, replaceable=replaceable) as temporary:
        if save != "folded":
            config = tuner.peft_config[report.adapter_name]
            config.base_model_name_or_path = str(folder.resolve() / "base")
            load_base(base, config, get_peft_model_state_dict(model)).to(dtype).save_pretrained(temporary / "base")
            tuner.save_as_lora(temporary / "adapter")
        if save != "adapter":
            model.merge_and_unload().to(dtype).save_pretrained(temporary / "folded")
        for written in filter(Path.is_dir, (temporary / "base", temporary / "folded")):
            if tokenizer is not None:
                save_tokenizer(tokenizer, written)
        (temporary / "merge_report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
        (temporary / "merge_report.md").write_text(as_markdown(report))
    return folder


def as_markdown(report: MoLMergeReport) -> str:
    """A section for a model card."""
    lines = [
        "## Merged experts",
        "",
        f"Weights `{report.weights}`, method `{report.method}`, rank {report.rank}.",
        "",
        "| layer | weights | energy kept (in, out) |",
        "|---|---|---|",
    ]
    for name, weights in report.layer_weights.items():
        kept = ", ".join(f"{energy:.4f}" for energy in report.energy_kept[name])
        lines.append(f"| {name} | {' '.join(f'{weight:.3f}' for weight in weights)} | {kept} |")
    lines += [
        "",
        f"Relative error of the output against token routing, measured on {report.measured_on}: "
        f"{100 * report.relative_error_of_output:.2f} %.",
    ]
    if report.loss_before is not None:
        lines.append(f"Mean loss there: {report.loss_before:.4f} routed, {report.loss_after:.4f} merged.")
    return "\n".join(lines) + "\n"
