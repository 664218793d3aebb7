# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Routing report of the shipped checkpoint on the Wikipedia leads that its pretraining left out.

    python experiments/nano_routing.py --retrieval_folder outputs/retrieval-sets/wikipedia_leads \\
        --output_dir outputs/nano-routing

The leads are the test documents of the set that `experiments/retrieval_sets.py` writes. Report and plot are
`experiments/results/nano_routing.{json,png}`, for `experiments/document_tables.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.cli.output_folders import check_replaceable
from modernalbert.data.beir import load_retrieval_set
from modernalbert.diagnostics import RoutingReport
from modernalbert.diagnostics.routing_report import OUTPUT_FILES
from modernalbert.export.hub_folder import load_model, load_tokenizer


NANO = Path(__file__).parents[1] / "checkpoints" / "modernalbert-nano"


@dataclass
class NanoRoutingArguments:
    """Where the leads are, and where the report goes."""

    retrieval_folder: str = field(metadata={"help": "The set of Wikipedia leads, in BEIR's form."})
    output_dir: str = field(metadata={"help": "Gets routing_report.json, .md and .png."})
    model_name_or_path: str = field(default=str(NANO), metadata={"help": "A ModernALBERT with experts."})


def main() -> None:
    (arguments,) = parse_arguments(NanoRoutingArguments, description=__doc__)
    check_replaceable(arguments.output_dir, OUTPUT_FILES)
    data = load_retrieval_set(arguments.retrieval_folder, "test")
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    if tokenizer is None:
        raise UserError(f"{arguments.model_name_or_path} has no tokenizer.")
    encoder = load_model(arguments.model_name_or_path).base_model.float()
    wanted = {document for documents in data.qrels.values() for document in documents}
    texts = data.corpus.texts(row for row, name in enumerate(data.corpus.ids) if name in wanted)
    batches = [
        tokenizer(texts[start : start + 16], padding=True, truncation=True, max_length=256, return_tensors="pt")
        for start in range(0, len(texts), 16)
    ]
    report = RoutingReport.measure(
        encoder, tqdm(batches, unit="batch"), tokenizer, f"{len(texts):,} Wikipedia leads left out of pretraining"
    )
    report.save(arguments.output_dir)
    print(report.to_markdown())


if __name__ == "__main__":
    run(main)
