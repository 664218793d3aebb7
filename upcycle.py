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
Weights for a ModernALBERT from a trained ModernBERT: its layers become groups, its embedding is factorised.

    python upcycle.py --teacher_name_or_path answerdotai/ModernBERT-base --config configs/tiny --output_dir O
    python upcycle.py --teacher_name_or_path T --config configs/tiny --text_file heldout.txt --compare --output_dir O

With --text_file it reports how far step 0 is from the teacher: masked-LM loss, and cosine of the hidden states layer by
layer; with --compare for every layer map and every start of the experts.

A BERT's layers have another form: a student takes its token embedding, and is fitted to its layers on the text of
--corpus_dir (upcycling/bert.py).
"""

import json
import logging
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, error_message, run
from modernalbert.cli.output_folders import atomic_folder, check_replaceable
from modernalbert.cli.tokenizer_files import save_tokenizer
from modernalbert.configuration_modernalbert import ModernALBERTConfig
from modernalbert.data.corpus import TokenizedCorpus, load_texts
from modernalbert.data.packing import Masking, PackedRows, StreamedRows
from modernalbert.export.hub_folder import OUTPUT_FILES
from modernalbert.modeling_modernalbert import ModernALBERTForMaskedLM
from modernalbert.upcycling.bert import upcycle_bert
from modernalbert.upcycling.initial_report import embedding_error, markdown_table, step_zero
from modernalbert.upcycling.modernbert import (
    EXPERT_STARTS,
    LAYER_MAPS,
    config_from_modernbert,  # noqa: F401  a documented import path
    load_teacher,
    upcycle_modernbert,
)


logger = logging.getLogger("upcycle")

# What a BERT's student starts from: all layers, fitted on text, or the token embedding alone.
FITTED, EMBEDDING = "fitted", "embedding"
REPORT_ROW = 256  # tokens
REPORT_FILES = ("upcycle_report.json", "upcycle_report.md")


@dataclass
class UpcycleArguments:
    """Teacher, student and how one becomes the other."""

    teacher_name_or_path: str = field(metadata={"help": "A ModernBERT or BERT: folder or Hub name."})
    config: str = field(metadata={"help": "Folder with the student's config.json, as configs/tiny."})
    output_dir: str = field(metadata={"help": "Folder to write the student to, with the teacher's tokenizer."})
    layer_map: str = field(
        default="stepwise", metadata={"help": f"{', '.join(LAYER_MAPS)}, or K layer numbers as 0,4,8."}
    )
    experts: str = field(
        default="zero", metadata={"help": "zero: step 0 is the shared model; svd: from each layer's difference to it."}
    )
    corpus_dir: str | None = field(
        default=None,
        metadata={
            "help": "A prepared corpus: its token counts weigh the embedding's factorisation, and its first rows fit "
            "a student to a BERT."
        },
    )
    fit_rows: int = field(default=100, metadata={"help": "Rows of 256 tokens to fit to a BERT on; 0: embedding only."})
    text_file: str | None = field(
        default=None, metadata={"help": "File of text for the report: txt, json, jsonl, parquet."}
    )
    compare: bool = field(
        default=False,
        metadata={
            "help": "Report on every layer map and start of the experts; of a BERT, on fitted and embedding only."
        },
    )
    max_rows: int = field(default=32, metadata={"help": "Rows of 256 tokens to report on."})
    seed: int = field(default=0, metadata={"help": "Seed of new weights and of the masks."})


def report_rows(
    file: str, tokenizer: PreTrainedTokenizerBase, masking: Masking, max_rows: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """Packed, masked rows of a text file."""
    rows = StreamedRows(load_texts([file], "text"), "text", tokenizer, REPORT_ROW, REPORT_ROW, masking, seed=seed)
    rows = list(islice(rows, max_rows))
    if not rows:
        raise UserError(f"--text_file {file}: there is no text in it.")
    return rows


def parse_layer_map(value: str) -> str | list[int]:
    if value in LAYER_MAPS:
        return value
    try:
        return [int(number) for number in value.split(",")]
    except ValueError:
        raise UserError(
            f"--layer_map {value} is not allowed: it must be {', '.join(LAYER_MAPS)}, or layer numbers as 0,4,8."
        ) from None


def main() -> None:
    (arguments,) = parse_arguments(UpcycleArguments, description=__doc__)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers.utils.logging.set_verbosity_warning()
    output, name = Path(arguments.output_dir), arguments.teacher_name_or_path
    check_replaceable(output, (*OUTPUT_FILES, *REPORT_FILES))
    layer_map = parse_layer_map(arguments.layer_map)
    if arguments.compare and arguments.text_file is None:
        raise UserError("--compare needs --text_file, to measure on.")
    try:
        config = ModernALBERTConfig.from_pretrained(arguments.config)
        is_bert = AutoConfig.from_pretrained(name).model_type == "bert"
        teacher = load_teacher(name, AutoModel if is_bert else AutoModelForMaskedLM, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(error_message(error)) from None
    for option in ("layer_map", "experts"):
        if is_bert and getattr(arguments, option) != getattr(UpcycleArguments, option):
            raise UserError(
                f"--{option} is for a ModernBERT: of a BERT all layers are fitted, and experts start at zero."
            )
    counts, fit_rows = None, None
    masking = Masking.for_tokenizer(tokenizer)
    if arguments.corpus_dir is not None:
        corpus = TokenizedCorpus(arguments.corpus_dir)
        corpus.check_tokenizer(tokenizer)
        counts = torch.from_numpy(corpus.token_counts(config.vocab_size))
        if is_bert:
            packed = PackedRows(corpus, arguments.fit_rows, REPORT_ROW, masking, tokenizer.pad_token_id, arguments.seed)
            fit_rows = [packed[i] for i in range(arguments.fit_rows)] or None
    elif is_bert and arguments.fit_rows:
        raise UserError("a BERT is fitted on text: give --corpus_dir, or --fit_rows 0 to take its embedding alone.")
    rows = None
    if arguments.text_file is not None:
        rows = report_rows(arguments.text_file, tokenizer, masking, arguments.max_rows, arguments.seed)

    def build(layer_map: str | list[int], experts: str) -> ModernALBERTForMaskedLM:
        torch.manual_seed(arguments.seed)
        try:
            if is_bert:
                return upcycle_bert(teacher, config, fit_rows if layer_map == FITTED else None, counts)
            return upcycle_modernbert(teacher, config, layer_map, experts, counts)
        except ValueError as error:
            raise UserError(error_message(error)) from None

    if is_bert:
        options = [(FITTED if fit_rows else EMBEDDING, "zero")]
        others = [(EMBEDDING, "zero")]
    else:
        options = [(layer_map, arguments.experts)]
        others = [(m, e) for m in LAYER_MAPS for e in EXPERT_STARTS]
    student = build(*options[0])
    if config.embedding_size is not None:
        print(f"Factorising the embedding loses {embedding_error(student, teacher):.1%} of its Frobenius norm.")
    if arguments.compare:
        options += [option for option in others if option != options[0]]
    with atomic_folder(output, replaceable=(*OUTPUT_FILES, *REPORT_FILES)) as folder:
        student.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        if rows is not None:
            results = [
                step_zero(student if i == 0 else build(*option), teacher, rows, *option)
                for i, option in enumerate(options)
            ]
            table = markdown_table(results)
            (folder / REPORT_FILES[0]).write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
            (folder / REPORT_FILES[1]).write_text(table)
            print(table)


def command() -> None:
    """Entry point of `modernalbert-upcycle`."""
    run(main)


if __name__ == "__main__":
    command()
