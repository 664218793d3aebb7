# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Merge the experts of a Mixture of LoRAs into one adapter, and say what that costs."""

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import DataCollatorForLanguageModeling, PreTrainedModel

from modernalbert.cli.arguments import option, parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.cli.output_folders import check_replaceable
from modernalbert.export.hub_folder import (
    check_hub_model_id,
    load_model,
    load_tokenizer,
    push_folders,
    stored_dtype,
)
from modernalbert.merging.merge import WEIGHTS, merge_layers, merge_methods, random_batch
from modernalbert.merging.methods import DENSITY, MergeSettings
from modernalbert.merging.model_experts import ModelExperts
from modernalbert.merging.recovery import LEARNING_RATE, RecoverySettings
from modernalbert.merging.report import OUTPUT_FILES, SAVES, MergeReport
from modernalbert.tuner.merge import load_adapter, merge_adapter
from modernalbert.tuner.observer import mol_layers


logger = logging.getLogger(__name__)


# --- merging ---------------------------------------------------------------------------------------------------------


def merge_experts(
    model: PreTrainedModel | PeftModel,
    weights: str | Sequence[float] | None = None,
    method: str = "linear",
    rank: int | None = None,
    calibration: Iterable[dict] | None = None,
    density: float | None = None,
    measure_on: Iterable[dict] | None = None,
    recover_steps: int = 0,
    recover_learning_rate: float | None = None,
) -> MergeReport:
    """
    Replace the E experts of every layer by one, and fold it into the shared FFN.

    With `method="linear"` that is Delta = sum_e w_e Delta_e: exact for one expert, and for a model that ran with
    `expert_mixing="ema"` or "uniform" and is merged with the same weights. Otherwise the routing depended on the token,
    and the report measures what is lost.

    Args:
        model: A ModernALBERT with `ffn_modulation="mol"`, with any head, or a `PeftModel` whose active adapter is a
            MoL; compiled or not. It is left as it is.
        weights: "uniform" (1/E), "ema" (the moving average of the routing in training), "calibration" (what the model
            mixes with on the calibration batches, on average), or E numbers, of which the merged delta is the weighted
            sum (an average if they add up to 1); None = "ema". `calibrated` takes none.
        method: "linear" (exact sum, rank E r), "svd" (best rank r), "ties" and "dare" (what the deltas agree on, or a
            random part of them), or, for a ModernALBERT, "calibrated" (least squares on the calibration batches,
            `merging/calibrated.py`).
        rank: Of the merged adapter; None = r for "svd", else E r.
        calibration: Batches of model inputs to measure the loss on; where they have labels, the loss before and after
            is reported. None = random token ids, and the report says so. `calibrated` and a recovery leave every fifth
            batch (at least one, if there are two) out of what they are fitted to, and measure on those.
        density: Of "ties" and "dare": the share of each delta's numbers that stays; None = 0.5.
        measure_on: Batches to measure on instead.
        recover_steps: Steps to train the merged experts afterwards, to give the routed model's outputs on the
            calibration batches (`merging/recovery.py`). Nothing else is trained, so the result is still a LoRA on the
            model without experts.
        recover_learning_rate: None = 3e-4.

    Returns:
        A MergeReport; its `model` is the merged one, in evaluation mode.

    Raises:
        ValueError: the model has no MoL experts, or an argument is not allowed.
    """
    model = getattr(model, "_orig_mod", model)  # compiled
    settings, recovery = MergeSettings(rank, density), RecoverySettings(recover_steps, recover_learning_rate)
    how = (weights, method, settings, calibration, measure_on, recovery)
    if isinstance(model, PeftModel):
        return merge_adapter(model, *how)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model is a {type(model).__name__}: it must be a ModernALBERT with experts, or a PeftModel with a MoL "
            "adapter; unwrap it first (as model.module of DistributedDataParallel)."
        )
    if any(mol_layers(model)):
        raise ValueError(
            f"model is a {type(model).__name__} with MoL adapters of its own: load them with "
            "PeftModel.from_pretrained, and give merge_experts that."
        )
    return merge_layers(ModelExperts(model), *how)


# --- command line ----------------------------------------------------------------------------------------------------


@dataclass
class MergeArguments:
    """Merge the experts of a ModernALBERT, or of a MoL adapter on any model, into one adapter."""

    model_name_or_path: str = option(
        help="Folder or Hub name of a ModernALBERT with experts, or of the base of --adapter_name_or_path."
    )
    output_dir: str = option(help="Folder to write adapter/, base/, folded/ and merge_report.{json,md}.")
    adapter_name_or_path: str | None = option(
        None, help="A MoL adapter (peft) on that base, which may be any model: merge its experts."
    )
    weights: str | None = option(
        None,
        help="How much each expert counts: ema (default; the moving average of its routing weight in training), "
        "uniform, calibration (its mean routing weight on the calibration file), or one number per expert, as 0.5,0.5. "
        "The merged delta is the weighted sum of the experts' deltas: an average if the numbers add up to 1. Not with "
        "calibrated.",
    )
    method: str = option(
        "linear",
        help="linear (exact sum), svd (its best approximation of a rank), ties, dare, or calibrated (least squares on "
        "the calibration file; not for adapters).",
    )
    rank: int | None = option(None, help="Rank of the merged adapter; by default lora_rank for svd, else E times that.")
    density: float | None = option(None, help=f"Share of each delta that ties and dare keep (default {DENSITY}).")
    calibration_file: str | None = option(
        None, help="Text, one sentence a line: measures usage, errors and masked-LM loss."
    )
    recover_steps: int = option(
        0,
        help="After merging, train the merged experts for this many batches of the calibration file to give the routed "
        "model's outputs.",
    )
    recover_learning_rate: float | None = option(
        None, help=f"Learning rate of --recover_steps (default {LEARNING_RATE})."
    )
    save: str = option("both", help="adapter, folded or both.")
    base_model_name: str | None = option(
        None,
        help="Name or path of the base that the adapter is to be loaded on; by default HUB_MODEL_ID-base with "
        "--hub_model_id, else the absolute path of base/, which does not follow a folder that is moved.",
    )
    push_to_hub: bool = option(False, help="Upload the result to the Hub.")
    hub_model_id: str | None = option(
        None, help="Repository to upload to: the merged model, and in it adapter/. base/ gets its own."
    )


def parse_weights(text: str, flag: str = "--weights", names: Sequence[str] = WEIGHTS) -> str | list[float]:
    """Parse --weights: "ema" -> "ema"; "0.5,0.5" -> [0.5, 0.5]."""
    if text in names:
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"{flag} {text} is not allowed: it must be one of {', '.join(names)}, or numbers like 0.5,0.5."
        ) from None


def text_batches(
    file: str, model: PreTrainedModel, tokenizer, batch_size: int = 16, flag: str = "--calibration_file"
) -> list[dict]:
    """
    Batch the file's lines, at most 512 tokens each; for a masked LM with 30 % of the tokens masked.

    Raises:
        UserError: names the flag; the file is not there, is no UTF-8 text, or is empty.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{flag} {file}: no such file.")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {file}: not UTF-8 text (byte {error.start}).") from None
    if not lines:
        raise UserError(f"{flag} {file}: holds no text.")
    if "MultipleChoice" in type(model).__name__:
        raise UserError(f"{flag} is not for a model of multiple choice, whose input is several texts at once.")
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)  # the one that is saved stays as it is
        tokenizer.pad_token = tokenizer.eos_token
    masked_lm = "MaskedLM" in type(model).__name__
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=0) if masked_lm else None
    batches = []
    for start in range(0, len(lines), batch_size):
        encoded = [tokenizer(line, truncation=True, max_length=512) for line in lines[start : start + batch_size]]
        batch = collator(encoded) if masked_lm else tokenizer.pad(encoded, return_tensors="pt")
        batches.append({name: value.to(model.device) for name, value in batch.items()})
    return batches


def check_arguments(arguments: MergeArguments) -> None:
    """Refuse what cannot work, before anything is loaded."""
    check_replaceable(arguments.output_dir, OUTPUT_FILES)
    if arguments.push_to_hub:
        check_hub_model_id(arguments.hub_model_id)
    if arguments.method not in merge_methods():
        raise UserError(f"--method {arguments.method} is not allowed: it must be one of {', '.join(merge_methods())}.")
    needs_text = (("--method calibrated", arguments.method == "calibrated"),)
    needs_text += (
        ("--recover_steps", arguments.recover_steps),
        ("--weights calibration", arguments.weights == "calibration"),
    )
    for flag, is_given in needs_text:
        if is_given and not arguments.calibration_file:
            raise UserError(f"{flag} needs --calibration_file.")
    if arguments.save not in SAVES:
        raise UserError(f"--save {arguments.save} is not allowed: it must be one of {', '.join(SAVES)}.")
    if arguments.adapter_name_or_path is not None and arguments.method == "calibrated":
        raise UserError("--method calibrated is not for adapters: it fits a ModernALBERT's own experts.")


def main() -> None:
    (arguments,) = parse_arguments(MergeArguments, description=MergeArguments.__doc__)
    check_arguments(arguments)
    weights = None if arguments.weights is None else parse_weights(arguments.weights)
    if arguments.adapter_name_or_path is None:
        model = load_model(arguments.model_name_or_path, dtype="auto")
    else:
        model = load_adapter(arguments.model_name_or_path, arguments.adapter_name_or_path)
    # Half precision would add its rounding to the errors, and processors without it take many times longer.
    dtype = stored_dtype(arguments.model_name_or_path) or model.dtype
    model = model if dtype == torch.float64 else model.float()
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    if tokenizer is None:
        if arguments.calibration_file:
            raise UserError(f"--calibration_file needs a tokenizer, and {arguments.model_name_or_path} has none.")
        logger.warning("No tokenizer found beside the model: the output will have none either.")
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    calibration = None
    if arguments.calibration_file:
        calibration = text_batches(arguments.calibration_file, plain, tokenizer)
    try:
        report = merge_experts(
            model,
            weights,
            arguments.method,
            arguments.rank,
            calibration,
            arguments.density,
            recover_steps=arguments.recover_steps,
            recover_learning_rate=arguments.recover_learning_rate,
        )
        batch = calibration[0] if calibration else random_batch(plain)
        if batch is not None:
            report.measure_latency(model, batch)
        for written in filter(None, (report.model, report.base)):
            written.to(dtype)
        names = {"hub_model_id": arguments.hub_model_id, "base_model_name": arguments.base_model_name}
        report.save(arguments.output_dir, arguments.save, tokenizer, **names, modules_from=arguments.model_name_or_path)
    except ValueError as error:
        raise UserError(str(error)) from None
    print(report.to_markdown())
    print(f"Written to {arguments.output_dir}")
    if arguments.push_to_hub:
        push(arguments)


def push(arguments: MergeArguments) -> None:
    """
    Upload the merged model to the root of the repository and the adapter beside it. The base goes to a repository of
    its own, because peft looks for an adapter's base at the root of one.
    """
    base_model_name = arguments.base_model_name or f"{arguments.hub_model_id}-base"
    for repository, places in {
        base_model_name: {"": "base"},
        arguments.hub_model_id: {"": "folded", "adapter": "adapter"},
    }.items():
        folders = {place: Path(arguments.output_dir) / name for place, name in places.items()}
        folders = {place: folder for place, folder in folders.items() if folder.is_dir()}
        if folders:
            push_folders(folders, repository)
            print(f"Uploaded {' and '.join(folder.name for folder in folders.values())} to {repository}")


def command() -> None:
    """Entry point of `modernalbert-merge`."""
    run(main)


if __name__ == "__main__":
    command()
