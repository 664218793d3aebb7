# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modernalbert.cli.arguments import option, run_script
from modernalbert.cli.errors import UserError, error_message
from modernalbert.cli.output_folders import atomic_folder, check_replaceable
from modernalbert.cli.tokenizer_files import save_tokenizer
from modernalbert.configuration_modernalbert import ModernALBERTConfig
from modernalbert.data.corpus import TokenizedCorpus, load_texts
from modernalbert.data.packing import Masking, PackedRows, StreamedRows
from modernalbert.export.hub_folder import OUTPUT_FILES
from modernalbert.modeling_modernalbert import ModernALBERTForMaskedLM
from modernalbert.upcycling.bert import upcycle_bert
from modernalbert.upcycling.initial_report import embedding_error, measure_student, to_markdown
from modernalbert.upcycling.modernbert import (
    EXPERT_STARTS,
    LAYER_MAPS,
    config_from_modernbert,  # noqa: F401  a documented import path
    load_teacher,
    upcycle_modernbert,
)


REPORT_ROW = 256  # tokens
REPORT_FILES = ("upcycle_report.json", "upcycle_report.md")
# The layer map and the experts of a student, and what builds it.
Start = tuple[str | list[int], str, Callable[[], ModernALBERTForMaskedLM]]


@dataclass
class UpcycleArguments:
    """Teacher, student and how one becomes the other."""

    teacher_name_or_path: str = option(help="A ModernBERT or BERT: folder or Hub name.")
    config: str = option(help="Folder with the student's config.json, as configs/tiny.")
    output_dir: str = option(help="Folder to write the student to, with the teacher's tokenizer.")
    layer_map: str = option("stepwise", help=f"{', '.join(LAYER_MAPS)}, or K layer numbers as 0,4,8.")
    experts: str = option("zero", help="zero: step 0 is the shared model; svd: from each layer's difference to it.")
    corpus_dir: str | None = option(
        None,
        help="A prepared corpus: its token counts weigh the embedding's factorisation, and its first rows fit a "
        "student to a BERT.",
    )
    fit_rows: int = option(100, help="Rows of 256 tokens to fit to a BERT on; 0: embedding only.")
    text_file: str | None = option(None, help="File of text for the report: txt, json, jsonl, parquet.")
    compare: bool = option(
        False, help="Report on every layer map and start of the experts; of a BERT, on fitted and embedding only."
    )
    max_rows: int = option(32, help="Rows of 256 tokens to report on.")
    seed: int = option(0, help="Seed of new weights and of the masks.")


def report_rows(arguments: UpcycleArguments, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, torch.Tensor]]:
    """Pack and mask the first rows of --text_file."""
    texts, masking = load_texts([arguments.text_file], "text"), Masking.for_tokenizer(tokenizer)
    rows = StreamedRows(texts, "text", tokenizer, REPORT_ROW, REPORT_ROW, masking, seed=arguments.seed)
    rows = list(islice(rows, arguments.max_rows))
    if not rows:
        raise UserError(f"--text_file {arguments.text_file}: there is no text in it.")
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


def starts_from_modernbert(
    arguments: UpcycleArguments, teacher: PreTrainedModel, config: ModernALBERTConfig, counts: torch.Tensor | None
) -> list[Start]:
    """Return the start that --layer_map and --experts ask for; with --compare all others follow."""
    options = [(parse_layer_map(arguments.layer_map), arguments.experts)]
    if arguments.compare:
        options += [other for other in product(LAYER_MAPS, EXPERT_STARTS) if other != options[0]]
    return [(*names, partial(upcycle_modernbert, teacher, config, *names, counts)) for names in options]


def starts_from_bert(
    arguments: UpcycleArguments,
    teacher: PreTrainedModel,
    config: ModernALBERTConfig,
    counts: torch.Tensor | None,
    corpus: TokenizedCorpus | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Start]:
    """Return the start fitted to --fit_rows of the corpus, and that of the embedding alone with --compare or 0 rows."""
    for name in ("layer_map", "experts"):
        if getattr(arguments, name) != getattr(UpcycleArguments, name):
            raise UserError(
                f"--{name} is for a ModernBERT: of a BERT all layers are fitted, and experts start at zero."
            )
    starts = []
    if arguments.fit_rows:
        if corpus is None:
            raise UserError("a BERT is fitted on text: give --corpus_dir, or --fit_rows 0 to take its embedding alone.")
        masking = Masking.for_tokenizer(tokenizer)
        packed = PackedRows(corpus, arguments.fit_rows, REPORT_ROW, masking, tokenizer.pad_token_id, arguments.seed)
        rows = [packed[i] for i in range(arguments.fit_rows)]
        starts.append(("fitted", "zero", partial(upcycle_bert, teacher, config, rows, counts)))
    if arguments.compare or not starts:
        starts.append(("embedding", "zero", partial(upcycle_bert, teacher, config, None, counts)))
    return starts


def main(arguments: UpcycleArguments) -> None:
    """Build the student, report on it, and write both."""
    output, name = Path(arguments.output_dir), arguments.teacher_name_or_path
    check_replaceable(output, (*OUTPUT_FILES, *REPORT_FILES))
    parse_layer_map(arguments.layer_map)
    if arguments.compare and arguments.text_file is None:
        raise UserError("--compare needs --text_file, to measure on.")
    try:
        config = ModernALBERTConfig.from_pretrained(arguments.config)
        is_bert = AutoConfig.from_pretrained(name).model_type == "bert"
        teacher = load_teacher(name, AutoModel if is_bert else AutoModelForMaskedLM, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(error_message(error)) from None
    corpus, counts = None, None
    if arguments.corpus_dir is not None:
        corpus = TokenizedCorpus(arguments.corpus_dir)
        corpus.check_tokenizer(tokenizer)
        counts = torch.from_numpy(corpus.token_counts(config.vocab_size))
    if is_bert:
        starts = starts_from_bert(arguments, teacher, config, counts, corpus, tokenizer)
    else:
        starts = starts_from_modernbert(arguments, teacher, config, counts)

    def build(start: Callable[[], ModernALBERTForMaskedLM]) -> ModernALBERTForMaskedLM:
        torch.manual_seed(arguments.seed)
        try:
            return start()
        except ValueError as error:
            raise UserError(error_message(error)) from None

    rows = None if arguments.text_file is None else report_rows(arguments, tokenizer)
    student = build(starts[0][-1])
    if config.embedding_size is not None:
        print(f"Factorising the embedding loses {embedding_error(student, teacher):.1%} of its Frobenius norm.")
    with atomic_folder(output, replaceable=(*OUTPUT_FILES, *REPORT_FILES)) as folder:
        student.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        if rows is not None:
            results = [
                measure_student(student if i == 0 else build(start), teacher, rows, layer_map, experts)
                for i, (layer_map, experts, start) in enumerate(starts)
            ]
            table = to_markdown(results)
            (folder / REPORT_FILES[0]).write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
            (folder / REPORT_FILES[1]).write_text(table)
            print(table)


def command() -> None:
    """Entry point of `modernalbert-upcycle`."""
    run_script(main, UpcycleArguments, description=__doc__)


if __name__ == "__main__":
    command()
