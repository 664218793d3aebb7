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
"""A MoL adapter's experts merged into one, and the adapter on any base loaded and written from folders."""

import importlib
import inspect
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from modernalbert import modeling_modernalbert
from modernalbert.cli.errors import UserError, error_message
from modernalbert.cli.output_folders import atomic_folder
from modernalbert.merging.methods import MERGE_METHODS, MergedExpert, MergeSettings, merge_factors
from modernalbert.modeling_mol import summarise_routing
from modernalbert.tuner.config import MoLConfig
from modernalbert.tuner.experts import copy_modules_to_save, find_adapter, layers_of, set_experts
from modernalbert.tuner.observer import RoutingObserver, mol_layers, token_mask


@dataclass
class MoLMergeReport:
    """
    What merging an adapter did.

    Attributes:
        adapter_name: Of the merged adapter.
        layer_weights: The experts' weights, by layer.
        energy_kept: Share of the merged deltas' squared norm that is kept, (first, last) projections, by layer.
        measured_on: What the errors were measured on.
        relative_error_of_output: |merged - routed| / |routed|, of the model's logits (or last states).
        loss_before, loss_after: Mean loss of the calibration batches that have labels.
    """

    adapter_name: str
    method: str
    weights: str
    rank: int
    layer_weights: dict[str, list[float]]
    energy_kept: dict[str, list[float]]
    measured_on: str
    relative_error_of_output: float
    loss_before: float | None = None
    loss_after: float | None = None


def merge_experts(
    tuner: nn.Module,
    weights: str | Sequence[float] = "ema",
    method: str = "linear",
    rank: int | None = None,
    adapter_name: str | None = None,
    new_adapter_name: str | None = None,
    calibration: Sequence[dict] | None = None,
    density: float | None = None,
) -> MoLMergeReport:
    """
    Replace an adapter's E experts by one LoRA on all projections of the FFN, by default Delta = sum_e w_e Delta_e.

    That is exact for one expert, and where the adapter ran with `expert_mixing="ema"` or "uniform" and is merged with
    the same weights; otherwise the routing depended on the token, and the report measures what is lost.

    Args:
        weights: "uniform" (1/E), "ema" (the moving average of the routing), "calibration" (mean routing weights on the
            calibration batches), or E numbers.
        method: "linear" (exact sum, rank E r), "svd" (best of `rank`, by default r), "ties" or "dare".
        adapter_name: Which adapter; None = the active one.
        new_adapter_name: Keep it, and add the merged one under this name; None = in its place.
        calibration: Batches of model inputs to measure on; None = random inputs, and the report says so.
        density: Of "ties" and "dare": the share of each delta's numbers that stays; None = 0.5.

    Raises:
        ValueError: there is no such adapter, or weights, method, rank or density are not allowed.
    """
    adapter_name = find_adapter(tuner, adapter_name)
    if new_adapter_name in tuner.peft_config:
        raise ValueError(f"new_adapter_name={new_adapter_name!r} is not allowed: there is an adapter of that name.")
    if method not in MERGE_METHODS:
        raise ValueError(f"method={method!r} is not allowed: it must be one of {', '.join(map(repr, MERGE_METHODS))}.")
    layers = layers_of(tuner, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"adapter_name={adapter_name!r} is not allowed: it is merged into the base; unmerge it first.")
    batches, measured_on = measuring_batches(tuner.model, calibration)
    layer_weights = resolve_weights(tuner, weights, adapter_name, layers, calibration)
    settings = MergeSettings(rank, density)
    merged: dict[str, MergedExpert] = {}
    with only(tuner.model, adapter_name):
        before = measure(tuner.model, batches)
        for name, layer in layers.items():
            merged[name] = merge_factors(method, layer.experts(adapter_name), layer_weights[name], settings)
    new_rank = next(iter(merged.values())).expert.A_in.shape[1]
    target = new_adapter_name or adapter_name
    config = replace(
        tuner.peft_config[adapter_name],
        num_experts=1,
        num_experts_per_tok=1,
        num_frozen_experts=0,
        router_bias=False,
        r=new_rank,
        lora_alpha=new_rank,
    )
    set_experts(tuner, target, config, {name: result.expert for name, result in merged.items()})
    copy_modules_to_save(tuner.model, adapter_name, target)
    with only(tuner.model, target):
        after = measure(tuner.model, batches)
    return MoLMergeReport(
        adapter_name=target,
        method=method,
        weights=weights if isinstance(weights, str) else "explicit",
        rank=new_rank,
        layer_weights={name: value.tolist() for name, value in layer_weights.items()},
        energy_kept={name: [result.energy_in, result.energy_out] for name, result in merged.items()},
        measured_on=measured_on,
        relative_error_of_output=relative_error(before.outputs, after.outputs),
        loss_before=before.loss,
        loss_after=after.loss,
    )


def resolve_weights(
    tuner: nn.Module,
    weights: str | Sequence[float],
    adapter_name: str,
    layers: dict[str, nn.Module],
    calibration: Sequence[dict] | None,
) -> dict[str, torch.Tensor]:
    """The (E,) mixing weights of each layer."""
    num_experts = tuner.peft_config[adapter_name].num_experts
    if not isinstance(weights, str):
        weights = torch.tensor(list(weights), dtype=torch.float32)
        if len(weights) != num_experts or not weights.isfinite().all():
            raise ValueError(f"weights={weights.tolist()} is not allowed: it must be {num_experts} finite numbers.")
        return {name: weights.to(layer.output_projection.weight.device) for name, layer in layers.items()}
    if weights not in ("uniform", "ema", "calibration"):
        raise ValueError(
            f"weights={weights!r} is not allowed: it must be 'uniform', 'ema', 'calibration' or {num_experts} numbers."
        )
    if weights == "calibration" and not calibration:
        raise ValueError("weights='calibration' is not allowed without calibration batches.")
    if weights != "calibration" or num_experts == 1:
        return {name: layer.expert_weights(adapter_name, weights) for name, layer in layers.items()}
    totals = dict.fromkeys(layers, 0)
    observer = RoutingObserver.detach(tuner.model)  # it would take the records away
    try:
        with only(tuner.model, adapter_name), torch.no_grad():
            for batch in calibration:
                for layer in layers.values():
                    layer.recorded = []
                tuner.model(**batch)
                for name, layer in layers.items():
                    k = layer.mol_config[adapter_name].num_experts_per_tok
                    for logits in layer.recorded:
                        mask = token_mask(tuner.model, name, logits, batch)
                        summary = summarise_routing((logits,), k, mask)
                        totals[name] = totals[name] + summary.usage[0] * summary.num_tokens
    finally:
        for layer in layers.values():
            layer.recorded = None
        if observer is not None:
            observer.attach(tuner.model)
    unused = [name for name, total in totals.items() if not isinstance(total, torch.Tensor)]
    if unused:
        raise ValueError(f"The calibration batches do not reach {unused[0]}: weights='calibration' cannot be measured.")
    return {name: total / total.sum() for name, total in totals.items()}


@contextmanager
def only(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Evaluation mode with one adapter active; everything is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    layers = [layer for _, layer in mol_layers(model)]
    heads = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper) and adapter_name in m.modules_to_save]
    active = {module: (module._active_adapter, module._disable_adapters) for module in (*layers, *heads)}
    model.eval()
    for module in active:
        module._active_adapter, module._disable_adapters = [adapter_name], False
    try:
        yield
    finally:
        for layer, (name, disabled) in active.items():
            layer._active_adapter, layer._disable_adapters = name, disabled
        for module, mode in modes.items():
            module.training = mode


def measuring_batches(model: nn.Module, calibration: Sequence[dict] | None) -> tuple[list[dict], str]:
    """What errors are measured on, and its name."""
    if calibration is None:
        return [random_inputs(model)], "random inputs (no calibration batches given)"
    if not list(calibration):
        raise ValueError("calibration=[] is not allowed: it must hold at least one batch.")
    return list(calibration), "the calibration batches"


class Measurement(NamedTuple):
    """What a model said to some batches."""

    outputs: list[torch.Tensor]
    loss: float | None


@torch.no_grad()
def measure(model: nn.Module, batches: list[dict]) -> Measurement:
    """The model's logits, or else its first tensor, for each batch, and its mean loss where there are labels."""
    outputs, losses = [], []
    for batch in batches:
        output = model(**batch)
        output = dict(output.items()) if hasattr(output, "items") else dict(enumerate(output))
        loss = output.pop("loss", None)
        losses += [] if loss is None else [loss.item()]
        states = output.get("logits", next(value for value in output.values() if isinstance(value, torch.Tensor)))
        outputs.append(states.float())
    return Measurement(outputs, sum(losses) / len(losses) if losses else None)


def warn_of_loss(tuner: nn.Module, adapter_name: str) -> None:
    """Say what folding an adapter's experts into the base changes, measured, where it is not exact."""
    config = tuner.peft_config.get(adapter_name)
    if config is None or not config.is_routed or config.expert_mixing != "token":
        return
    layers = [layer for layer in layers_of(tuner, adapter_name).values() if not layer.merged]
    if not layers:
        return
    try:
        batches, measured_on = measuring_batches(tuner.model, None)
        with only(tuner.model, adapter_name):
            before = measure(tuner.model, batches).outputs
            for layer in layers:
                layer.mol_config[adapter_name] = replace(config, expert_mixing="ema")
            after = measure(tuner.model, batches).outputs
        change = f"the model's output changes by {100 * relative_error(before, after):.2f} % on {measured_on}"
    except Exception as error:  # a model may take inputs that nobody here can make up; it can be merged all the same
        change = f"by how much could not be measured ({type(error).__name__})"
    finally:
        for layer in layers:
            layer.mol_config[adapter_name] = config
    warnings.warn(
        f"Merging the {config.num_experts} experts of adapter {adapter_name!r} is not exact, because their weights "
        f"depend on the token: {change}. merge_experts(calibration=...) measures it on batches of yours.",
        stacklevel=4,
    )


def relative_error(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """|after - before| / |before| over all batches."""
    difference = sum((b - a).square().sum().item() for a, b in zip(before, after))
    return (difference / max(sum(a.square().sum().item() for a in before), 1e-30)) ** 0.5


def random_inputs(model: nn.Module, batch_size: int = 4, length: int = 32) -> dict[str, torch.Tensor]:
    """
    Inputs of the right form with nothing in them, always the same.

    Raises:
        ValueError: the model takes something else than token ids, pixels or audio features.
    """
    generator = torch.Generator().manual_seed(0)
    config, device = getattr(model, "config", None), next(model.parameters()).device
    text = getattr(config, "text_config", None) or config
    vision = getattr(config, "vision_config", None) or config
    names = inspect.signature(model.forward).parameters
    length = min(length, getattr(text, "max_position_embeddings", length))
    inputs = {}
    if "input_features" in names and hasattr(config, "num_mel_bins"):
        shape = (batch_size, config.num_mel_bins, 2 * config.max_source_positions)
        inputs["input_features"] = torch.randn(shape, generator=generator)
    elif "input_ids" in names and hasattr(text, "vocab_size"):
        inputs["input_ids"] = torch.randint(text.vocab_size, (batch_size, length), generator=generator)
    if "pixel_values" in names and hasattr(vision, "image_size"):
        size = vision.image_size if isinstance(vision.image_size, list | tuple) else [vision.image_size] * 2
        shape = (batch_size, getattr(vision, "num_channels", 3), *size)
        inputs["pixel_values"] = torch.randn(shape, generator=generator)
    if "input_values" in names:  # a waveform
        inputs["input_values"] = torch.randn((batch_size, 4000), generator=generator)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.randint(text.vocab_size, (batch_size, length), generator=generator)
    if not inputs:
        raise ValueError(f"{type(model).__name__} takes inputs of its own kind: give calibration batches.")
    return {name: value.to(device) for name, value in inputs.items()}


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
            f"--adapter_name_or_path {adapter} on {base} cannot be loaded: {error_message(error)}"
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
                tokenizer.save_pretrained(written)
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
