# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
A routing report on a text: `python -m modernalbert.diagnostics --model_name_or_path M --text_file F --output_dir O`.
"""

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from modernalbert.cli.arguments import option, parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.cli.output_folders import check_replaceable
from modernalbert.diagnostics.routing_report import OUTPUT_FILES, RoutingReport
from modernalbert.export.hub_folder import load_model, load_tokenizer
from modernalbert.merge_experts import text_batches


@dataclass
class DiagnosticsArguments:
    """Options of the routing report."""

    model_name_or_path: str = option(help="Folder or Hub name of a ModernALBERT with experts.")
    text_file: str = option(help="Text, one sentence a line.")
    output_dir: str = option(help="Folder to write routing_report.json, .md and .png.")


def main() -> None:
    (arguments,) = parse_arguments(DiagnosticsArguments, description=DiagnosticsArguments.__doc__)
    check_replaceable(arguments.output_dir, OUTPUT_FILES)
    model = load_model(arguments.model_name_or_path)
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    if tokenizer is None:
        raise UserError(f"--text_file needs a tokenizer, and {arguments.model_name_or_path} has none.")
    encoder = model.base_model.float()  # no words are masked for an encoder; half precision is slow on processors
    batches = text_batches(arguments.text_file, encoder, tokenizer, flag="--text_file")
    try:
        report = RoutingReport.measure(
            encoder, tqdm(batches, desc="Routing", unit="batch"), tokenizer, Path(arguments.text_file).name
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    report.save(arguments.output_dir)
    print(report.to_markdown())
    print(f"Written to {arguments.output_dir}")


if __name__ == "__main__":
    run(main)
