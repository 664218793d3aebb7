# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Fine-tune an encoder for retrieval with sentence-transformers, and evaluate it on sets in BEIR's form.

    python run_retrieval.py --model_name_or_path M --no_do_train --evaluation_folders F [F ...] --bm25 --output_dir O
    python run_retrieval.py --model_name_or_path M --train_folder F --evaluation_folders F [F ...] --output_dir O
    python run_retrieval.py --model_name_or_path M --train_file T --evaluation_folders F [F ...] --output_dir O
    python run_retrieval.py arguments.json

A set is a folder of corpus.jsonl, queries.jsonl and qrels/<split>.tsv. M is any encoder, or a sentence-transformers
folder. Takes all of sentence-transformers' training arguments. Writes to the output folder: the model, complete for
sentence-transformers; `all_results.json`; `results.md`; `mteb/`, the figures as MTEB writes them; and the rankings, as
trec_eval reads them. Run again after an interruption, it continues from the last checkpoint.
"""

import contextlib
import copy
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


try:
    import bm25s  # noqa: F401
    import pytrec_eval  # noqa: F401
    import sentence_transformers  # noqa: F401
    import Stemmer  # noqa: F401
except ImportError as error:
    needed = f"run_retrieval.py needs {error.name}: python -m pip install -c constraints.txt -e '.[retrieval]'"
    # Whoever imports this gets the exception, whoever runs it the sentence.
    if Path(sys.argv[0]).stem in ("run_retrieval", "modernalbert-retrieval"):
        sys.exit(needed)
    raise ImportError(needed) from None

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import is_sentence_transformer_model
from sentence_transformers.util.distributed import distributed_evaluation
from transformers import AutoModel, PreTrainedModel, set_seed

import modernalbert  # noqa: F401  registers the classes with transformers
from modernalbert.cli.arguments import option, run_script
from modernalbert.cli.errors import UserError, error_message, explain_loading
from modernalbert.cli.markdown import markdown_table
from modernalbert.cli.output_folders import set_default_mode
from modernalbert.data.beir import RetrievalSet, load_retrieval_set
from modernalbert.data.retrieval_pairs import add_negatives, add_teacher_scores, pairs_of, read_row_file, save_rows
from modernalbert.evaluation.retrieval import (
    METRICS,
    Ranking,
    encode_corpus,
    evaluate_ranking,
    mteb_result,
    search,
    search_bm25,
)
from modernalbert.export.sentence_transformers import copy_modules
from modernalbert.finetuning.arguments import BaseDataArguments, ModelArguments, TaskTrainingArguments
from modernalbert.finetuning.checkpoint import check_tokenizer, check_weights, load_task_model, read_checkpoint
from modernalbert.finetuning.merge_after import FITTED_ROWS, MEASURED_ROWS, check_merge, merge_and_report
from modernalbert.finetuning.task_run import RunResults, begin_run, check_run, choose_best_by
from modernalbert.training.contrastive import DISTILLATIONS, RetrievalTrainer, make_loss


logger = logging.getLogger("run_retrieval")

# The rows that were trained on, negatives and scores included: a resumed run reads them again, and so can --train_file.
TRAIN_ROWS = "train_rows.jsonl"
# What this script leaves in its output folder beside what every task script does.
OUTPUT_FILES = (TRAIN_ROWS, "mteb", "results.md")


# --- arguments -------------------------------------------------------------------------------------------------------


@dataclass
class RetrievalModelArguments(ModelArguments):
    """Arguments: the model to start from, its pooling and its prompts."""

    pooling: str | None = option(
        None, help=f"Pooling of an encoder: {', '.join(Pooling.POOLING_MODES)}. Default: mean, or the folder's own."
    )
    query_prompt: str | None = option(
        None, help="Text to put before every query, saved with the model. Default: the folder's own."
    )
    corpus_prompt: str | None = option(
        None, help="Text to put before every document, saved with the model. Default: the folder's own."
    )


@dataclass
class DataArguments(BaseDataArguments):
    """Arguments: the training rows, the sets to evaluate on, and the loss."""

    train_file: str | None = option(
        None, help="File of rows with anchor, positive, any negative... and, for distillation, scores."
    )
    train_folder: str | None = option(
        None, help="A set in BEIR's form to train on: each relevant document of each query is a row."
    )
    train_split: str = option("train", help="Split of --train_folder to train on.")
    evaluation_folders: list[str] = option([], help="Sets in BEIR's form to evaluate on.")
    evaluation_split: str = option("test", help="Split of --evaluation_folders to evaluate on.")
    mteb_tasks: list[str] = option([], help="Names of retrieval tasks of MTEB, which fetches their data.")
    bm25: bool = option(False, help="Evaluate BM25 too, on --evaluation_folders.")
    mine_hard_negatives: int = option(
        0, help="Number of negatives to find for each pair, by the teacher or else by the model."
    )
    teacher: str | None = option(
        None, help="A sentence-transformers model whose scores of positive and negatives are learnt."
    )
    distillation: str = option("kl", help=f"Loss of the teacher's scores: {' or '.join(DISTILLATIONS)}.")
    mini_batch_size: int | None = option(
        None, help="Rows that are in memory at once: large batches need less memory and more time."
    )
    matryoshka_dims: list[int] | None = option(
        None, help="Numbers of first dimensions that are trained and evaluated as embeddings too."
    )
    encode_processes: int = option(
        1, help="Number of processes that encode, each on a GPU of its own where there are GPUs."
    )


@dataclass
class RetrievalTrainingArguments(TaskTrainingArguments, SentenceTransformerTrainingArguments):
    """sentence-transformers' training arguments with defaults that suit retrieval."""

    DEFAULT_EVAL_STRATEGY: ClassVar[str] = "no"

    do_eval: bool = option(True, help="Evaluate on --evaluation_folders and --mteb_tasks.")
    do_predict: bool = option(True, help="Write the rankings of --evaluation_folders, too.")
    learning_rate: float = option(1e-4, help="Peak learning rate.")
    eval_strategy: str | None = option(
        None,
        help="When to evaluate on the first of --evaluation_folders: epoch, steps or no. Default: no, or whenever a "
        "checkpoint is saved with --load_best_model_at_end.",
    )
    batch_sampler: str = option(
        "no_duplicates", help="no_duplicates keeps a text from being its own negative; batch_sampler does not look."
    )


def check_arguments(
    model_arguments: RetrievalModelArguments, data: DataArguments, training: RetrievalTrainingArguments
) -> None:
    """Refuse what cannot work, before anything is read."""
    check_run(data, training)
    for name, least in (("mini_batch_size", 1), ("encode_processes", 1), ("mine_hard_negatives", 0)):
        value = getattr(data, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} is not allowed: it must be an integer of at least {least}.")
    if data.distillation not in DISTILLATIONS:
        raise UserError(f"--distillation {data.distillation} is not allowed: it must be {' or '.join(DISTILLATIONS)}.")
    if model_arguments.pooling is not None and model_arguments.pooling not in Pooling.POOLING_MODES:
        allowed = ", ".join(Pooling.POOLING_MODES)
        raise UserError(f"--pooling {model_arguments.pooling} is not allowed: it must be one of {allowed}.")
    if training.do_train and (data.train_file is None) == (data.train_folder is None):
        raise UserError("training needs either --train_file or --train_folder (or add --no_do_train).")
    if training.do_eval and not (data.evaluation_folders or data.mteb_tasks):
        raise UserError("--evaluation_folders is missing (or add --no_do_eval).")
    if training.eval_strategy != "no" and not data.evaluation_folders:
        raise UserError(f"--eval_strategy {training.eval_strategy} needs --evaluation_folders.")
    names = [Path(folder).resolve().name for folder in data.evaluation_folders]
    if len(set(names)) < len(names):
        raise UserError(f"--evaluation_folders {' '.join(data.evaluation_folders)}: two folders have the same name.")
    if data.encode_processes > 1 and training.world_size > 1:
        raise UserError("--encode_processes is for a run of one process: several that train encode together already.")
    if data.teacher is not None and data.mini_batch_size is not None:
        raise UserError("--mini_batch_size does not go with --teacher.")
    if model_arguments.merge_after is not None and not (training.do_eval and data.evaluation_folders):
        raise UserError("--merge_after needs --evaluation_folders, to measure what the merge changes.")


# --- model -----------------------------------------------------------------------------------------------------------


def load_encoder(arguments: RetrievalModelArguments, max_seq_length: int) -> SentenceTransformer:
    """Load a sentence-transformers model in float32: a folder of that kind as it is, any other encoder with pooling."""
    name = arguments.model_name_or_path
    if name is not None and is_sentence_transformer_model(name):
        model = load_sentence_transformer(name, "--model_name_or_path", arguments)
        if arguments.pooling is not None:
            raise UserError(f"--pooling is not allowed for {name}: it is a sentence-transformers model with its own.")
        if arguments.expert_mixing is not None:
            model[0].model, _ = load_task_model(arguments, AutoModel)
    else:
        read_checkpoint(arguments)
        encoder, _ = load_task_model(arguments, AutoModel)
        module = transformer_around(encoder, name, arguments.trust_remote_code)
        pooling = Pooling(module.get_embedding_dimension(), arguments.pooling or "mean")
        model = SentenceTransformer(modules=[module, pooling])
    check_tokenizer(model.tokenizer, model.transformers_model.config, name)
    if model.similarity_fn_name not in ("cosine", "dot"):
        raise UserError(
            f"{name}: its similarity {model.similarity_fn_name!r} is not allowed: it must be cosine or dot."
        )
    model.max_seq_length = min(max_seq_length, model.max_seq_length or max_seq_length)
    for kind, prompt in (("query", arguments.query_prompt), ("document", arguments.corpus_prompt)):
        if prompt is not None:
            model.prompts[kind] = prompt
    return model


def transformer_around(encoder: PreTrainedModel, name: str, trust_remote_code: bool) -> Transformer:
    """Wrap an encoder that is loaded already, or has random weights, in sentence-transformers' module."""

    class Around(Transformer):
        def _load_model(self, *args, **kwargs) -> PreTrainedModel:
            return encoder

    trust = {"trust_remote_code": trust_remote_code}
    module = Around(name, config_kwargs=dict(trust), processor_kwargs=dict(trust))
    module.__class__ = Transformer  # its name is saved with the model
    return module


def load_sentence_transformer(name: str, flag: str, arguments: ModelArguments) -> SentenceTransformer:
    """
    Load a sentence-transformers model by folder or Hub name, in float32.

    Raises:
        UserError: it cannot be loaded, or lacks weights of its encoder.
    """
    with explain_loading(f"{flag} {name}"):
        model = SentenceTransformer(
            name,
            trust_remote_code=arguments.trust_remote_code,
            model_kwargs={"dtype": torch.float32, "attn_implementation": arguments.attn_implementation},
        )
    encoder = model.transformers_model
    # transformers marks what it has loaded, but not the weights of an adapter.
    if encoder is not None and not getattr(encoder, "_hf_peft_config_loaded", False):
        parameters = encoder.named_parameters()
        absent = {key for key, value in parameters if not getattr(value, "_is_hf_initialized", False)}
        check_weights(encoder, absent, name, keeps_head=True)
    return model


# --- training rows ---------------------------------------------------------------------------------------------------


def read_training_source(data: DataArguments) -> tuple[Dataset, list[str] | None]:
    """Read the rows of --train_file or --train_folder, and the documents to look for negatives in."""
    if data.train_file is not None:
        return read_row_file(data.train_file), None
    train = load_retrieval_set(data.train_folder, data.train_split)
    documents = None
    if data.mine_hard_negatives:
        documents = [text for text in train.corpus.texts(range(len(train.corpus))) if text]
    return pairs_of(train), documents


def training_rows(
    data: DataArguments, model: SentenceTransformer, arguments: RetrievalModelArguments, batch_size: int
) -> Dataset:
    """Read the training rows, with negatives mined and a teacher's scores where they are asked for."""
    rows, documents = read_training_source(data)
    if data.max_train_samples is not None:
        rows = rows.select(range(min(data.max_train_samples, len(rows))))
    teacher = None
    if data.teacher is not None:
        teacher = load_sentence_transformer(data.teacher, "--teacher", arguments)
    if data.mine_hard_negatives:
        if len(rows.column_names) > 2:
            raise UserError(f"--mine_hard_negatives: {data.train_file} holds negatives already.")
        rows = add_negatives(rows, data.mine_hard_negatives, teacher or model, documents, batch_size)
    if teacher is not None:
        if len(rows.column_names) < 3:
            raise UserError("--teacher needs negatives to score: add --mine_hard_negatives, or a column of them.")
        if "scores" in rows.column_names:
            raise UserError(f"--teacher: {data.train_file} holds scores already.")
        rows = add_teacher_scores(rows, teacher, batch_size)
    return rows


# --- evaluation ------------------------------------------------------------------------------------------------------


class RetrievalResults:
    """
    The metrics of every system on every set: kept as files, summed up in a table.

    A system is "model", "bm25", "merged", or "dim64" for the first 64 dimensions.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.metrics: dict[str, dict[str, dict[str, float]]] = {}
        self.titles: dict[str, str] = {}

    def file(self, system: str, name: str) -> Path:
        return self.folder / "mteb" / system / f"{name}.json"

    def add(self, system: str, name: str, metrics: dict[str, float], title: str) -> None:
        self.metrics.setdefault(name, {})[system] = metrics
        self.titles[name] = title

    def measure(self, system: str, data: RetrievalSet, ranking: Ranking, seconds: float, rankings: bool) -> None:
        """Evaluate a ranking and write its figures, and on request the ranking itself."""
        file = self.file(system, data.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        trec_file = self.folder / f"predictions_{system}_{data.name}.trec" if rankings else None
        metrics = evaluate_ranking(data, ranking, trec_file)
        file.write_text(json.dumps(mteb_result(data, metrics, seconds), indent=2) + "\n")
        self.add(system, data.name, metrics, title_of(data))

    def recall(self, system: str, data: RetrievalSet) -> bool:
        """Take the figures from the file of a run that was cut off, if it got that far."""
        file = self.file(system, data.name)
        if not file.is_file():
            return False
        scores = json.loads(file.read_text())["scores"].get(data.split)
        if scores is not None:
            logger.warning(f"{data.name}: the figures of {system} are there already.")
            self.add(system, data.name, {name: scores[0][name] for name in METRICS}, title_of(data))
        return scores is not None

    def flatten(self, name: str) -> dict[str, float]:
        """Name a set's figures as they are called in `all_results.json`."""
        return {
            f"{name}_{metric}" if system == "model" else f"{system}_{name}_{metric}": value
            for system, metrics in self.metrics[name].items()
            for metric, value in metrics.items()
        }

    def markdown(self) -> str:
        """Format one table for each set."""
        tables = []
        for name, systems in self.metrics.items():
            rows = [
                [system, *(f"{metrics[metric]:.4f}" if metric in metrics else "" for metric in METRICS)]
                for system, metrics in systems.items()
            ]
            tables.append(markdown_table([self.titles[name], *METRICS.values()], rows) + "\n")
        return "\n".join(tables)


def title_of(data: RetrievalSet) -> str:
    return f"{data.name}, {data.split}: {len(data.queries):,} queries, {len(data.corpus):,} documents"


@contextlib.contextmanager
def encoding_processes(model: SentenceTransformer, number: int) -> Iterator[dict | None]:
    """Start processes that encode, on the GPUs in turn or on the CPU; None for one."""
    if number == 1:
        yield None
        return
    gpus = torch.cuda.device_count()
    device = model.device
    pool = model.start_multi_process_pool([f"cuda:{i % gpus}" if gpus else "cpu" for i in range(number)])
    try:
        yield pool
    finally:
        model.stop_multi_process_pool(pool)
        model.to(device)


def rank(
    model: SentenceTransformer,
    data: RetrievalSet,
    folder: Path,
    batch_size: int,
    pool: dict | None = None,
    dimensions: tuple[int | None, ...] = (None,),
) -> dict[int | None, Ranking]:
    """
    Search a set with the model, once for each number of dimensions (None is all of them).

    Args:
        folder: Where the embeddings of the corpus lie while they are needed.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".embeddings-") as place:
        documents = encode_corpus(model, data.corpus, Path(place) / "documents.npy", batch_size, pool)
        queries = model.encode_query(
            list(data.queries.values()), batch_size=batch_size, pool=pool, show_progress_bar=False
        )
        comparing = {"normalize": model.similarity_fn_name == "cosine", "device": model.device}
        return {number: search(queries, documents, dimensions=number, **comparing) for number in dimensions}


class SetEvaluator(BaseEvaluator):
    """Measures the model on a set while it is being trained."""

    def __init__(self, data: RetrievalSet, folder: Path, batch_size: int):
        super().__init__()
        self.data, self.folder, self.batch_size = data, folder, batch_size

    def __call__(self, model, output_path=None, epoch: int = -1, steps: int = -1) -> dict[str, float]:
        return evaluate_ranking(self.data, rank(model, self.data, self.folder, self.batch_size)[None])


def evaluate_encoder(
    system: str,
    model: SentenceTransformer,
    sets: list[RetrievalSet],
    figures: RetrievalResults,
    data_arguments: DataArguments,
    training_arguments: RetrievalTrainingArguments,
) -> None:
    """Measure a model, and the first dimensions of it that were trained to stand alone, on every set."""
    dimensions = {None: system}
    if system == "model":
        full = model.get_embedding_dimension()
        dimensions |= {number: f"dim{number}" for number in data_arguments.matryoshka_dims or () if number != full}
    with encoding_processes(model, data_arguments.encode_processes) as pool:
        for data in sets:
            if not training_arguments.do_train and all(figures.recall(name, data) for name in dimensions.values()):
                continue
            start = time.perf_counter()
            batch_size = training_arguments.per_device_eval_batch_size
            rankings = rank(model, data, figures.folder, batch_size, pool, tuple(dimensions))
            seconds = time.perf_counter() - start
            for number, name in dimensions.items():
                figures.measure(name, data, rankings[number], seconds, training_arguments.do_predict)


def evaluate_bm25(sets: list[RetrievalSet], figures: RetrievalResults, rankings: bool) -> None:
    for data in sets:
        start = time.perf_counter()
        ranking = search_bm25(list(data.queries.values()), data.corpus)
        figures.measure("bm25", data, ranking, time.perf_counter() - start, rankings)


def mteb_tasks(names: list[str]) -> list:
    """Return MTEB's tasks of these names."""
    if not names:
        return []
    try:
        import mteb
    except ImportError:
        raise UserError("--mteb_tasks needs mteb: python -m pip install -c constraints.txt -e '.[mteb]'") from None
    tasks = []
    for name in names:
        try:
            tasks.append(mteb.get_task(name))
        except KeyError as error:
            raise UserError(f"--mteb_tasks {name} is not allowed: {error.args[0]}") from None
    return tasks


def evaluate_mteb(
    model: SentenceTransformer, tasks: list, figures: RetrievalResults, batch_size: int, reuse: bool
) -> None:
    """Run MTEB's own evaluation of a model; `reuse` takes what a run that was cut off has finished."""
    if not tasks:
        return
    import mteb

    for task in tasks:
        name = task.metadata.name
        file = figures.file("model", name)
        if reuse and file.is_file():
            result = mteb.results.TaskResult.from_disk(file)
        else:
            try:
                outcome = mteb.evaluate(model, task, cache=None, encode_kwargs={"batch_size": batch_size})
            except Exception as error:  # whatever keeps the task's data out of reach
                raise UserError(f"--mteb_tasks {name} cannot be evaluated: {error_message(error)}") from None
            (result,) = outcome.task_results
            file.parent.mkdir(parents=True, exist_ok=True)
            result.to_disk(file)
        # A task of several splits or languages has one figure: MTEB's mean of its main score.
        figures.add("model", name, {"ndcg_at_10": result.get_score()}, f"MTEB: {name}")


# --- the run ---------------------------------------------------------------------------------------------------------


def merge_and_evaluate(
    model: SentenceTransformer,
    weights: str | list[float],
    sets: list[RetrievalSet],
    figures: RetrievalResults,
    data_arguments: DataArguments,
    training_arguments: RetrievalTrainingArguments,
) -> None:
    """Merge the model's experts, measure the merged model on every set, and write model and report into `merged/`."""
    batch_size = training_arguments.per_device_eval_batch_size
    corpus = sets[0].corpus

    def batches_of(texts: list[str]) -> list[dict]:
        batches = []
        for start in range(0, len(texts), batch_size):
            batch = model.tokenizer(
                texts[start : start + batch_size],
                padding=True,
                truncation=True,
                max_length=model.max_seq_length,
                return_tensors="pt",
            ).to(model.device)
            batches.append({name: batch[name] for name in ("input_ids", "attention_mask")})
        return batches

    texts = corpus.texts(range(min(MEASURED_ROWS, len(corpus))))
    batches = batches_of(texts)
    measured_on, text = f"the first {len(texts)} documents of {sets[0].name}", []
    if weights == "calibrated":
        text = batches_of(corpus.texts(range(len(texts), min(len(texts) + FITTED_ROWS, len(corpus)))))
        if not text:  # a small corpus has no documents after those
            measured_on, text = f"{measured_on}, to which the experts were fitted", batches
    merged = copy.deepcopy(model)

    def metrics_of(system: str) -> dict[str, float]:
        return {f"nDCG@10 on {data.name}": figures.metrics[data.name][system]["ndcg_at_10"] for data in sets}

    def measure(encoder: PreTrainedModel) -> dict[str, float]:
        merged[0].model = encoder
        evaluate_encoder("merged", merged, sets, figures, data_arguments, training_arguments)
        return metrics_of("merged")

    routed = model.transformers_model
    report = merge_and_report(routed, weights, batches, measure, measured_on, metrics_of("model"), text)
    folder = report.save(Path(training_arguments.output_dir) / "merged", tokenizer=model.tokenizer)
    # Both models are sentence-transformers folders too; the card is the report.
    merged.save_pretrained(str(folder / "folded"), create_model_card=False)
    for file in (folder / "folded").glob("**/*.safetensors"):
        set_default_mode(file)
    copy_modules(folder / "folded", folder / "base")


def run(
    model_arguments: RetrievalModelArguments,
    data_arguments: DataArguments,
    training_arguments: RetrievalTrainingArguments,
) -> dict[str, float]:
    """
    Fine-tune and evaluate, and on request merge and evaluate again.

    Returns:
        What `all_results.json` holds.
    """
    check_arguments(model_arguments, data_arguments, training_arguments)
    tasks = mteb_tasks(data_arguments.mteb_tasks)
    choose_best_by(training_arguments, list(METRICS))
    folder = Path(training_arguments.output_dir)
    sets = [
        load_retrieval_set(name, data_arguments.evaluation_split, data_arguments.max_eval_samples)
        for name in data_arguments.evaluation_folders
    ]
    if training_arguments.do_train and not (folder / TRAIN_ROWS).is_file():
        read_training_source(data_arguments)  # to report unreadable rows before anything is written
    set_seed(training_arguments.seed)
    model = load_encoder(model_arguments, data_arguments.max_seq_length)
    width = model.get_embedding_dimension()
    if any(not 0 < number <= width for number in data_arguments.matryoshka_dims or ()):
        dims = " ".join(map(str, data_arguments.matryoshka_dims))
        raise UserError(f"--matryoshka_dims {dims} is not allowed: they must be from 1 to {width}.")
    merge_weights = None
    if model_arguments.merge_after is not None:
        merge_weights = check_merge(model_arguments.merge_after, model.transformers_model, True)
    batch_size = training_arguments.per_device_eval_batch_size
    checkpoint = begin_run(model_arguments, data_arguments, training_arguments, reused=OUTPUT_FILES)

    rows, loss = None, None
    if training_arguments.do_train:
        # The first process finds the negatives, the others read them.
        with training_arguments.main_process_first(local=False):
            is_missing = checkpoint is None or not (folder / TRAIN_ROWS).is_file()
            if training_arguments.process_index == 0 and is_missing:
                made = training_rows(data_arguments, model, model_arguments, batch_size)
                folder.mkdir(parents=True, exist_ok=True)
                save_rows(made, folder / TRAIN_ROWS)
            rows = read_row_file(str(folder / TRAIN_ROWS))
        loss = make_loss(
            model,
            data_arguments.mini_batch_size,
            data_arguments.distillation if "scores" in rows.column_names else None,
            data_arguments.matryoshka_dims,
        )
        queries, documents = (model.prompts.get(kind) or "" for kind in ("query", "document"))
        if queries or documents:
            texts = [name for name in rows.column_names if name != "scores"]
            training_arguments.prompts = dict.fromkeys(texts, documents) | {"anchor": queries}

    trainer = RetrievalTrainer(
        model=model,
        args=training_arguments,
        train_dataset=rows,
        loss=loss,
        evaluator=None if training_arguments.eval_strategy == "no" else SetEvaluator(sets[0], folder, batch_size),
    )
    results = RunResults(trainer)
    if training_arguments.do_train:
        results.train(checkpoint)
    if training_arguments.do_eval:
        folder.mkdir(parents=True, exist_ok=True)
        figures = RetrievalResults(folder)
        # All processes encode, the first does the rest.
        with distributed_evaluation(model) as is_first:
            if is_first:
                if data_arguments.bm25:
                    evaluate_bm25(sets, figures, training_arguments.do_predict)
                evaluate_encoder("model", model, sets, figures, data_arguments, training_arguments)
                evaluate_mteb(model, tasks, figures, batch_size, reuse=not training_arguments.do_train)
                if merge_weights is not None:
                    merge_and_evaluate(model, merge_weights, sets, figures, data_arguments, training_arguments)
                for name in figures.metrics:
                    results.keep(name, figures.flatten(name))
                (folder / "results.md").write_text(figures.markdown())
                print(figures.markdown())
    return results.write()


# --- command line ----------------------------------------------------------------------------------------------------


def command() -> None:
    """Entry point of `modernalbert-retrieval`."""
    run_script(run, RetrievalModelArguments, DataArguments, RetrievalTrainingArguments, description=__doc__)


if __name__ == "__main__":
    command()
