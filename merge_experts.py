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
"""Merge the experts of a Mixture of LoRAs into one adapter, and say what that costs."""

import logging
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedModel

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.cli.output_folders import check_replaceable
from modernalbert.configuration_modernalbert import ModernALBERTConfig
from modernalbert.export.hub_folder import load_model, load_tokenizer, push_folder
from modernalbert.merging.calibrated import merge_calibrated
from modernalbert.merging.ffn_recorder import measure_usage, mixture_calls, with_progress
from modernalbert.merging.fold import fold, with_one_expert, without_experts
from modernalbert.merging.methods import DENSITY, MERGE_METHODS, MergedExpert, MergeSettings, merge_factors
from modernalbert.merging.report import SAVES, WRITTEN, GroupReport, MergeReport
from modernalbert.tuner.merge import as_markdown, load_adapter, save_merged_adapter


logger = logging.getLogger(__name__)

WEIGHTS = ("uniform", "ema", "calibration")
METHODS = (*MERGE_METHODS, "calibrated")
# Of so many calibration batches, `calibrated` leaves one out of the fit.
HOLD_OUT = 5


# --- merging ---------------------------------------------------------------------------------------------------------


def merge_experts(
    model: PreTrainedModel,
    weights: str | Sequence[float] | None = None,
    method: str = "linear",
    rank: int | None = None,
    calibration: Iterable[dict] | None = None,
    density: float | None = None,
) -> MergeReport:
    """
    Replace the E experts of every group by one, and fold it into the shared FFN.

    With `method="linear"` that is Delta = sum_e w_e Delta_e: exact for one expert, and for a model that ran with
    `expert_mixing="ema"` or "uniform" and is merged with the same weights. Otherwise the routing depended on the token,
    and the report measures what is lost.

    Args:
        model: A ModernALBERT with `ffn_modulation="mol"`, with any head. It is left as it is.
        weights: "uniform" (1/E), "ema" (the moving average of the routing in training), "calibration" (what the model
            mixes with on the calibration batches, on average), or E numbers; None = "ema". `calibrated` takes none.
        method: "linear" (exact sum, rank E r), "svd" (best rank r), "ties" and "dare" (what the deltas agree on, or a
            random part of them), or "calibrated" (least squares on the calibration batches, `merging/calibrated.py`).
        rank: Of the merged adapter; None = r for "svd", else E r.
        calibration: Batches of model inputs (on the model's device) to measure the loss on; where they have labels,
            the loss before and after is reported. None = random token ids, and the report says so. `calibrated` leaves
            every fifth batch (at least one, if there are two) out of the fit, and measures on those.
        density: Of "ties" and "dare": the share of each delta's numbers that stays; None = 0.5.

    Returns:
        A MergeReport; its `model` is the merged one, in evaluation mode.

    Raises:
        ValueError: the model has no MoL experts, or weights, method or rank are not allowed.
    """
    config: ModernALBERTConfig = model.config
    if getattr(config, "ffn_modulation", None) != "mol":
        raise ValueError(
            f"ffn_modulation={getattr(config, 'ffn_modulation', None)!r} is not allowed: only experts of a Mixture of "
            "LoRAs ('mol') can be merged."
        )
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not allowed: it must be one of {', '.join(map(repr, METHODS))}.")
    asked = [name for name, value in (("weights", weights), ("density", density)) if value is not None]
    if method == "calibrated" and asked:
        raise ValueError(f"{asked[0]} is not allowed with method='calibrated', which takes none.")
    if method == "calibrated" and calibration is None:
        raise ValueError("method='calibrated' is not allowed without calibration batches.")
    if weights is None:
        weights = "calibration" if method == "calibrated" else "ema"
    if isinstance(weights, str) and weights == "calibration" and calibration is None:
        raise ValueError("weights='calibration' is not allowed without calibration batches.")
    measured_on = "the calibration text"
    if calibration is None:
        calibration, measured_on = [random_batch(model)], "random token ids (no calibration text given)"
    fitted = calibration = list(calibration)
    if not calibration:
        raise ValueError("calibration=[] is not allowed: it must hold at least one batch.")
    if method == "calibrated":
        fitted, calibration, measured_on = hold_out(calibration)
    group_weights = resolve_weights(model, weights, fitted)

    if method == "calibrated":
        results = merge_calibrated(model, group_weights, fitted, rank)
    else:
        settings = MergeSettings(rank, density)
        results: dict[int, MergedExpert] = {
            k: merge_factors(method, model.base_model.groups[k].mlp.experts, group_weights[k], settings)
            for k in config.modulated_groups
        }
    merged = {k: result.expert for k, result in results.items()}
    groups = [
        GroupReport(k, group_weights[k].tolist(), result.expert.A_in.shape[1], result.energy_in, result.energy_out)
        for k, result in results.items()
    ]
    base = without_experts(model) if config.mol_positions == "all" else None
    new_model = fold(base, merged) if base is not None else with_one_expert(model, merged)
    report = MergeReport(
        model=new_model,
        base=base,
        experts=merged,
        method=method,
        weights=weights if isinstance(weights, str) else "explicit",
        rank=groups[0].rank,
        groups=groups,
        parameters_before=model.num_parameters(),
        parameters_after=new_model.num_parameters(),
        folded=base is not None,
        note=None
        if base is not None
        else "With mol_positions='last' folding would change the other layers of the group: the merged expert stays "
        "as one LoRA without a router, and there is no stock adapter.",
        measured_on=measured_on,
    )
    measure_errors(report, model, calibration)
    return report


def hold_out(batches: list[dict]) -> tuple[list[dict], list[dict], str]:
    """Batches to fit to, batches to measure on, and what the latter are: every fifth, or the last of fewer."""
    if len(batches) == 1:
        return batches, batches, "the calibration text, to which the experts were fitted"
    held = range(HOLD_OUT - 1, len(batches), HOLD_OUT) or [len(batches) - 1]
    parts = [[batch for i, batch in enumerate(batches) if (i in held) == is_held] for is_held in (False, True)]
    return *parts, "the part of the calibration text that was not fitted to"


def resolve_weights(
    model: PreTrainedModel, weights: str | Sequence[float], calibration: list[dict]
) -> dict[int, torch.Tensor]:
    """The (E,) float32 mixing weights of each modulated group."""
    config = model.config
    groups, E = config.modulated_groups, config.num_experts
    if not isinstance(weights, str):
        if len(weights) != E or not all(torch.isfinite(torch.tensor(w)) for w in weights):
            raise ValueError(f"weights={list(weights)} is not allowed: it must be {E} finite numbers, one per expert.")
        return {k: torch.tensor(weights, dtype=torch.float32) for k in groups}
    if weights not in WEIGHTS:
        raise ValueError(
            f"weights={weights!r} is not allowed: it must be one of {', '.join(map(repr, WEIGHTS))} or {E} numbers."
        )
    if E == 1 or weights == "uniform":
        return {k: torch.full((E,), 1 / E) for k in groups}
    if weights == "ema":
        usage = {k: model.base_model.groups[k].mlp.mol_usage.float().cpu() for k in groups}
        return {k: value if value.dim() == 1 else value.mean(dim=0) for k, value in usage.items()}
    return measure_usage(model, calibration)


def random_batch(model: PreTrainedModel, batch_size: int = 8, length: int = 64) -> dict:
    """Token ids drawn evenly from the vocabulary, always the same."""
    generator = torch.Generator().manual_seed(0)
    length = min(length, model.config.max_position_embeddings)
    shape = (batch_size, 2, length) if type(model).__name__.endswith("MultipleChoice") else (batch_size, length)
    return {"input_ids": torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)}


@torch.no_grad()
def measure_errors(report: MergeReport, model: PreTrainedModel, batches: list[dict]) -> None:
    """
    Fill in the report's errors, over real tokens: each merged FFN on what its routed original is given, and the whole
    models.
    """
    sums = {k: torch.zeros(3, dtype=torch.float64) for k in report.experts}  # |merged - routed|^2, ...

    def compare(group, mlp, position, x, output):
        routed = output.double()
        merged = report.model.base_model.groups[group].mlp(x, position)[0].double()
        shared = mlp.plain_forward(x).double()
        for i, difference in enumerate((merged - routed, routed, routed - shared)):
            sums[group][i] += difference.square().sum().cpu()

    output_sums, losses = torch.zeros(2, dtype=torch.float64), []
    with mixture_calls(model, compare) as tokens:
        for batch in with_progress(batches, "Measuring the errors"):
            before = model(**batch, output_hidden_states=True)
            after = report.model(**batch, output_hidden_states=True)
            routed, merged = (tokens(outputs.hidden_states[-1]).double() for outputs in (before, after))
            output_sums += torch.stack([(merged - routed).square().sum(), routed.square().sum()]).cpu()
            if getattr(before, "loss", None) is not None:
                losses.append((before.loss.item(), after.loss.item()))
    for group in report.groups:
        difference, routed, experts_part = sums[group.group].sqrt().tolist()
        group.relative_error = difference / routed if routed else 0.0
        group.relative_error_of_experts = difference / experts_part if experts_part else 0.0
    report.relative_error_of_output = (output_sums[0] / output_sums[1]).sqrt().item()
    if losses:
        report.loss_before, report.loss_after = (statistics.fmean(column) for column in zip(*losses))


# --- command line ----------------------------------------------------------------------------------------------------


@dataclass
class MergeArguments:
    """Merge the experts of a ModernALBERT, or of a MoL adapter on any model, into one adapter."""

    model_name_or_path: str = field(
        metadata={
            "help": "Folder or Hub name of a ModernALBERT with experts, or of the base of --adapter_name_or_path."
        }
    )
    output_dir: str = field(metadata={"help": "Gets adapter/, base/, folded/ and merge_report.{json,md}."})
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "A MoL adapter, of peft, on that base (any model): merge its experts instead."}
    )
    weights: str | None = field(
        default=None,
        metadata={
            "help": "uniform, ema (default), calibration, or one number per expert: 0.5,0.5,... None with calibrated."
        },
    )
    method: str = field(
        default="linear",
        metadata={
            "help": "linear (exact sum), svd (its best approximation of a rank), ties, dare, or calibrated (least "
            "squares on the calibration file)."
        },
    )
    rank: int | None = field(
        default=None, metadata={"help": "Rank of the merged adapter; by default lora_rank for svd, else E times that."}
    )
    density: float | None = field(
        default=None, metadata={"help": f"Share of each delta that ties and dare keep (default {DENSITY})."}
    )
    calibration_file: str | None = field(
        default=None, metadata={"help": "Text, one sentence a line: measures usage, errors and masked-LM loss."}
    )
    save: str = field(default="both", metadata={"help": "adapter, folded or both."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the result to the Hub."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository to upload to."})


def parse_weights(text: str, flag: str = "--weights", names: Sequence[str] = WEIGHTS) -> str | list[float]:
    """Text of --weights to its value: "ema" -> "ema"; "0.5,0.5" -> [0.5, 0.5]."""
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
    Batches of the file's lines, at most 512 tokens each; for a masked LM with 30 % of the tokens masked.

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
    masked_lm = "MaskedLM" in type(model).__name__
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=0) if masked_lm else None
    batches = []
    for start in range(0, len(lines), batch_size):
        encoded = [tokenizer(line, truncation=True, max_length=512) for line in lines[start : start + batch_size]]
        batch = collator(encoded) if masked_lm else tokenizer.pad(encoded, return_tensors="pt")
        batches.append({name: value.to(model.device) for name, value in batch.items()})
    return batches


def main() -> None:
    (arguments,) = parse_arguments(MergeArguments, description=MergeArguments.__doc__)
    check_replaceable(arguments.output_dir, WRITTEN)
    if arguments.push_to_hub and not arguments.hub_model_id:
        raise UserError("--push_to_hub needs --hub_model_id.")
    if arguments.method not in METHODS:
        raise UserError(f"--method {arguments.method} is not allowed: it must be one of {', '.join(METHODS)}.")
    if arguments.method == "calibrated" and not arguments.calibration_file:
        raise UserError("--method calibrated needs --calibration_file.")
    if arguments.save not in SAVES:
        raise UserError(f"--save {arguments.save} is not allowed: it must be one of {', '.join(SAVES)}.")
    weights = None if arguments.weights is None else parse_weights(arguments.weights)
    adapter = arguments.adapter_name_or_path
    if adapter is not None and arguments.method == "calibrated":
        raise UserError("--method calibrated is not for adapters: it fits a ModernALBERT's own experts.")
    if adapter is None:
        model = load_model(arguments.model_name_or_path)
    else:
        model = load_adapter(arguments.model_name_or_path, adapter)
    # Half precision would add its rounding to the errors, and processors without it take many times longer.
    dtype = model.dtype
    model = model.float()
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    if tokenizer is None:
        if arguments.calibration_file:
            raise UserError(f"--calibration_file needs a tokenizer, and {arguments.model_name_or_path} has none.")
        logger.warning("No tokenizer found beside the model: the output will have none either.")
    calibration = None
    if arguments.calibration_file:
        read_by = model if adapter is None else model.get_base_model()
        calibration = text_batches(arguments.calibration_file, read_by, tokenizer)
    try:
        options = {"method": arguments.method, "rank": arguments.rank, "density": arguments.density}
        if adapter is None:
            report = merge_experts(model, weights, calibration=calibration, **options)
            report.measure_latency(model, calibration[0] if calibration else random_batch(model))
            for merged in filter(None, (report.model, report.base)):
                merged.to(dtype)
            report.save(arguments.output_dir, arguments.save, tokenizer, arguments.hub_model_id)
            said = report.to_markdown()
        else:
            report = model.base_model.merge_experts(weights or "ema", calibration=calibration, **options)
            base, output_dir = arguments.model_name_or_path, arguments.output_dir
            save_merged_adapter(model, report, base, output_dir, WRITTEN, arguments.save, tokenizer, dtype)
            said = as_markdown(report)
    except ValueError as error:
        raise UserError(str(error)) from None
    print(said)
    print(f"Written to {arguments.output_dir}")
    if arguments.push_to_hub:
        # The merged model at the root of the repository, adapter and base in folders of their names.
        for name, path_in_repo in (("folded", "."), ("adapter", "adapter"), ("base", "base")):
            if (Path(arguments.output_dir) / name).is_dir():
                push_folder(Path(arguments.output_dir) / name, arguments.hub_model_id, path_in_repo)
        print(f"Uploaded to {arguments.hub_model_id}")


def command() -> None:
    """Entry point of `modernalbert-merge`."""
    run(main)


if __name__ == "__main__":
    command()
