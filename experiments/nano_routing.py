# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Routing report of the shipped checkpoint on texts that its pretraining left out.

    python experiments/nano_routing.py --validation_file outputs/nano-corpus/validation.jsonl \\
        --output_dir outputs/nano-routing

`experiments/nano_corpus.py` writes the file. Report and plot are `experiments/results/nano_routing.{json,png}`, for
`experiments/document_tables.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.cli.output_folders import check_replaceable
from modernalbert.data.corpus import load_texts
from modernalbert.diagnostics import RoutingReport
from modernalbert.diagnostics.routing_report import OUTPUT_FILES
from modernalbert.export.hub_folder import load_model, load_tokenizer


NANO = Path(__file__).parents[1] / "checkpoints" / "modernalbert-nano"


@dataclass
class NanoRoutingArguments:
    """The texts, and where the report goes."""

    validation_file: str = field(metadata={"help": "jsonl with a column text."})
    output_dir: str = field(metadata={"help": "Gets routing_report.json, .md and .png."})
    model_name_or_path: str = field(default=str(NANO), metadata={"help": "A ModernALBERT with experts."})
    num_texts: int = field(default=1000, metadata={"help": "Texts of the file, from the first."})


def main() -> None:
    (arguments,) = parse_arguments(NanoRoutingArguments, description=__doc__)
    check_replaceable(arguments.output_dir, OUTPUT_FILES)
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    if tokenizer is None:
        raise UserError(f"{arguments.model_name_or_path} has no tokenizer.")
    texts = load_texts([arguments.validation_file], "text")["text"][: arguments.num_texts]
    encoder = load_model(arguments.model_name_or_path).base_model.float()
    batches = [
        tokenizer(texts[start : start + 16], padding=True, truncation=True, max_length=256, return_tensors="pt")
        for start in range(0, len(texts), 16)
    ]
    report = RoutingReport.measure(
        encoder, tqdm(batches, unit="batch"), tokenizer, f"{len(texts):,} texts left out of pretraining"
    )
    report.save(arguments.output_dir)
    print(report.to_markdown())


if __name__ == "__main__":
    run(main)
