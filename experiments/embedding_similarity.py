# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Semantic textual similarity of raw embeddings: Spearman's correlation of cosine and human score, with no training.

    python experiments/embedding_similarity.py --model_name_or_path outputs/nano-decayed \\
        --files $DATA_DIR/stsb/validation.jsonl $DATA_DIR/stsb/test.jsonl --output_dir outputs/stsb

An embedding is the mean of the last states of all real tokens. Files have columns sentence1, sentence2 and label.
`all_results.json` in the output folder has `<file>_spearman` and `<file>_pairs` of each, by its name without ending.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from scipy.stats import spearmanr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, run
from modernalbert.data.glue_tasks import GLUE_TASKS
from modernalbert.data.sentences import load_task_file
from modernalbert.experiments.embeddings import embed, load_encoder


@dataclass
class SimilarityArguments:
    """Which model on which pairs."""

    model_name_or_path: str = field(metadata={"help": "Any encoder; a configuration alone = random weights."})
    files: list[str] = field(metadata={"help": "csv, tsv, json, jsonl or parquet with sentence1, sentence2, label."})
    output_dir: str | None = field(default=None, metadata={"help": "Where all_results.json goes."})


def similarity_correlation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: str) -> tuple[float, int]:
    """Spearman's correlation on a file of scored pairs, and their number."""
    rows = load_task_file(file, GLUE_TASKS["stsb"])
    first, second = (embed(model, tokenizer, list(rows[column])) for column in ("text", "text_pair"))
    return float(spearmanr((first * second).sum(axis=1), rows["label"]).statistic), len(rows)


def main() -> None:
    (arguments,) = parse_arguments(SimilarityArguments, description=__doc__)
    model, tokenizer = load_encoder(arguments.model_name_or_path)
    results = {}
    for file in arguments.files:
        name = Path(file).stem
        if f"{name}_spearman" in results:
            raise UserError(f"--files {' '.join(arguments.files)}: two files have the same name.")
        correlation, pairs = similarity_correlation(model, tokenizer, file)
        results |= {f"{name}_spearman": correlation, f"{name}_pairs": pairs}
        print(f"{file}: Spearman {correlation:.4f} on {pairs:,} pairs")
    if arguments.output_dir:
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
        Path(arguments.output_dir, "all_results.json").write_text(json.dumps(results, indent=2) + "\n")


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
