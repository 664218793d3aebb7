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
"""
Semantic textual similarity of raw embeddings: Spearman's correlation of cosine and human score, with no training.

    python experiments/embedding_similarity.py --model_name_or_path outputs/nano-decayed \\
        --files $DATA_DIR/sts/validation.jsonl $DATA_DIR/sts/test.jsonl --output_file outputs/sts.json

An embedding is the mean of the last states of all real tokens. Files have columns sentence1, sentence2 and label.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from scipy.stats import spearmanr
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modernalbert  # noqa: F401  registers the classes with transformers
from modernalbert.command_line import UserError, first_sentence, parse_arguments, run
from modernalbert.evaluation.glue import GLUE_TASKS
from modernalbert.training.task_files import load_task_file


BATCH = 64
MAX_LENGTH = 128


@dataclass
class SimilarityArguments:
    """Which model on which pairs."""

    model_name_or_path: str = field(metadata={"help": "Any encoder: folder or Hub name."})
    files: list[str] = field(metadata={"help": "csv, tsv, json, jsonl or parquet with sentence1, sentence2, label."})
    output_file: str | None = field(default=None, metadata={"help": "Where to write the figures as JSON."})


@torch.no_grad()
def embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> np.ndarray:
    """Unit mean-pooled embeddings (n, d), float32."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    embeddings: list[np.ndarray | None] = [None] * len(texts)
    for start in tqdm(range(0, len(order), BATCH), desc="Embeddings", leave=False):
        chosen = order[start : start + BATCH]
        batch = tokenizer(
            [texts[i] for i in chosen], padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).to(model.device)
        states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.float()
        weights = batch["attention_mask"][..., None].float()
        means = (states * weights).sum(1) / weights.sum(1)
        for i, embedding in zip(chosen, torch.nn.functional.normalize(means, dim=-1).cpu().numpy()):
            embeddings[i] = embedding
    return np.stack(embeddings)


def similarity_correlation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: str) -> tuple[float, int]:
    """Spearman's correlation on a file of scored pairs, and their number."""
    rows = load_task_file(file, GLUE_TASKS["stsb"])
    first, second = (embed(model, tokenizer, list(rows[column])) for column in ("text", "text_pair"))
    return float(spearmanr((first * second).sum(axis=1), rows["label"]).statistic), len(rows)


def main() -> None:
    (arguments,) = parse_arguments(SimilarityArguments, description=__doc__)
    transformers.utils.logging.set_verbosity_error()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        model = AutoModel.from_pretrained(arguments.model_name_or_path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path cannot be loaded: {first_sentence(error)}") from None
    results = {}
    for file in arguments.files:
        correlation, pairs = similarity_correlation(model, tokenizer, file)
        results["/".join(Path(file).parts[-2:])] = {"spearman": correlation, "pairs": pairs}
        print(f"{file}: Spearman {correlation:.4f} on {pairs:,} pairs")
    if arguments.output_file:
        Path(arguments.output_file).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output_file).write_text(json.dumps(results, indent=2) + "\n")


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
