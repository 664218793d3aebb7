# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
A model for others: a complete Hub folder, transformers' ModernBERT, or ONNX files.

    python hub.py --model_name_or_path M --output_dir O
    python hub.py --model_name_or_path M --output_dir O --format modernbert --merge ema
    python hub.py --model_name_or_path M --output_dir O --format onnx --quantize int8
    python hub.py --verify O
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modernalbert.cli.arguments import option, parse_arguments
from modernalbert.cli.errors import UserError, error_message, run
from modernalbert.cli.output_folders import check_replaceable
from modernalbert.export.hub_folder import (
    OUTPUT_FILES,
    check_hub_model_id,
    export_to_hub_folder,
    load_model,
    load_tokenizer,
    push_folders,
)
from modernalbert.export.modernbert import check_expressible, to_modernbert
from modernalbert.export.onnx import QUANTIZATIONS, export_onnx
from modernalbert.export.sentence_transformers import POOLINGS
from modernalbert.export.verify import verify_folder
from modernalbert.merge_experts import merge_experts, text_batches


logger = logging.getLogger(__name__)

FORMATS = ("hub", "modernbert", "onnx")
MERGES = ("ema", "uniform", "calibrated")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ExportArguments:
    """Write a ModernALBERT for others: as a complete Hub folder, as transformers' ModernBERT, or as ONNX files."""

    model_name_or_path: str | None = option(None, help="Folder or Hub name of a ModernALBERT.")
    output_dir: str | None = option(None, help="Folder to write; it appears when it is complete.")
    format: str = option(
        "hub",
        help="hub: with this project's code, for trust_remote_code. modernbert: transformers' own ModernBERT, without. "
        "onnx: hub, with onnx/model.onnx; takes a ModernBERT folder too.",
    )
    merge: str | None = option(
        None, help="Merge the experts first: ema, uniform or calibrated; adds merge_report.{json,md}."
    )
    calibration_file: str | None = option(
        None, help="Text, one sentence a line: what --merge fits to and measures on, and --format onnx compares."
    )
    quantize: str | None = option(None, help="int8: also write onnx/model_quantized.onnx.")
    pooling: str | None = option(
        None,
        help="mean, cls or max: makes the folder a sentence-transformers folder where the model's is none. Where it is "
        "one, its modules and prompts are kept.",
    )
    encoder_only: bool = option(
        False, help="Leave the head out. The ONNX backend of sentence-transformers asks for an encoder."
    )
    dtype: str = option("float32", help="Dtype of the stored weights: float32, bfloat16 or float16.")
    card: str | None = option(None, help="File to use as README.md. Default: a card written from the configuration.")
    revision: str | None = option(None, help="Branch, tag or commit of the model on the Hub.")
    push_to_hub: bool = option(False, help="Upload the folder to the Hub.")
    hub_model_id: str | None = option(None, help="Repository to upload to, e.g. me/my-model.")
    verify: str | None = option(
        None, help="A model folder: say whether its code is this release's, and do nothing else."
    )


def main() -> None:
    (arguments,) = parse_arguments(ExportArguments, description=ExportArguments.__doc__)
    if arguments.verify is not None:
        print_verification(arguments.verify)
        return
    check_arguments(arguments)
    is_onnx = arguments.format == "onnx"
    model = load_model(arguments.model_name_or_path, arguments.revision, modernbert=is_onnx)
    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.revision)
    if tokenizer is None:
        if arguments.calibration_file:
            raise UserError(f"--calibration_file needs a tokenizer, and {arguments.model_name_or_path} has none.")
        logger.warning("No tokenizer found beside the model: the folder will have none.")
    try:
        write(arguments, model, tokenizer)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{arguments.output_dir} cannot be written: {error_message(error)}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    print(f"Written to {arguments.output_dir}")
    if arguments.push_to_hub:
        push_folders({"": Path(arguments.output_dir)}, arguments.hub_model_id)
        print(f"Uploaded to {arguments.hub_model_id}")


def check_arguments(arguments: ExportArguments) -> None:
    """Raise a UserError for what can be known before a model is loaded."""
    for name in ("model_name_or_path", "output_dir"):
        if getattr(arguments, name) is None:
            raise UserError(f"the following arguments are required: --{name}")
    choices = {"format": FORMATS, "merge": MERGES, "quantize": QUANTIZATIONS, "pooling": POOLINGS, "dtype": DTYPES}
    for name, allowed in choices.items():
        value = getattr(arguments, name)
        if value is not None and value not in allowed:
            raise UserError(f"--{name} {value} is not allowed: it must be {', '.join(allowed)}.")
    check_replaceable(arguments.output_dir, OUTPUT_FILES)
    if arguments.push_to_hub:
        check_hub_model_id(arguments.hub_model_id)
    if arguments.quantize and arguments.format != "onnx":
        raise UserError("--quantize is for --format onnx.")
    if arguments.merge == "calibrated" and not arguments.calibration_file:
        raise UserError("--merge calibrated needs --calibration_file.")
    if arguments.calibration_file and not arguments.merge and arguments.format != "onnx":
        raise UserError("--calibration_file is for --merge and --format onnx.")
    for name in ("card", "calibration_file"):
        value = getattr(arguments, name)
        if value is not None and not Path(value).is_file():
            raise UserError(f"--{name} {value}: no such file.")


def write(arguments: ExportArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """
    Merge, convert and write the folder.

    Raises:
        ValueError: the model cannot be merged or written in this form.
    """
    sections, files = [], {}
    if arguments.merge is not None:
        model, report = merge_model(arguments, model, tokenizer)
        sections.append(report.to_markdown())
        files = {
            "merge_report.json": json.dumps(report.to_dict(), indent=2) + "\n",
            "merge_report.md": report.to_markdown(),
        }
        print(report.to_markdown())
    if arguments.format == "modernbert":
        model = to_modernbert(model)
    if arguments.encoder_only:
        model = model.base_model
    options = {
        "card": None if arguments.card is None else Path(arguments.card).read_text("utf-8"),
        "hub_model_id": arguments.hub_model_id,
        "source": arguments.model_name_or_path,
        "revision": arguments.revision,
        "pooling": arguments.pooling,
        "sections": sections,
        "files": files,
    }
    model = model.to(getattr(torch, arguments.dtype))
    if arguments.format == "onnx":
        texts = None
        if arguments.calibration_file:
            lines = Path(arguments.calibration_file).read_text("utf-8").splitlines()
            texts = [line.strip() for line in lines if line.strip()]
        report = export_onnx(model, tokenizer, arguments.output_dir, arguments.quantize, texts, **options)
        print(report.to_markdown())
        if (Path(arguments.output_dir) / "modules.json").is_file() and model.base_model is not model:
            logger.warning(
                "The ONNX graph gives logits; sentence-transformers embeds with an encoder's: --encoder_only."
            )
    else:
        export_to_hub_folder(model, tokenizer, arguments.output_dir, **options)


def merge_model(arguments: ExportArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None):
    """Merge the experts of a model; return the merged model and the report."""
    if arguments.format == "modernbert":
        check_expressible(model.config, merged=True)
    model = model.float()
    calibration = None
    if arguments.calibration_file:
        calibration = text_batches(arguments.calibration_file, model, tokenizer)
    if arguments.merge == "calibrated":
        report = merge_experts(model, method="calibrated", calibration=calibration)
    else:
        report = merge_experts(model, weights=arguments.merge, calibration=calibration)
    return report.model, report


def print_verification(folder: str) -> None:
    """Say whether a folder's code is this release's; raises a UserError if it is not."""
    found = verify_folder(folder)
    if found:
        raise UserError(f"{folder}: its code is not this release's. " + " ".join(found))
    print(f"{folder}: its code is this release's.")


def command() -> None:
    """Entry point of `modernalbert-export`."""
    run(main)


if __name__ == "__main__":
    command()
