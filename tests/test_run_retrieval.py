# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The retrieval script: it learns, resumes, mines, distils, runs on two processes, and leaves a model that loads."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from launches import run_accelerate
from safetensors.torch import load_file, save_file
from small_models import REPOSITORY, randomise, tiny_config, tiny_model
from transformers import BertConfig, BertModel


pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from modernalbert import ModernALBERTForMaskedLM, run_retrieval
from modernalbert.cli.errors import UserError
from modernalbert.data.beir import load_retrieval_set
from modernalbert.run_retrieval import RetrievalModelArguments, load_encoder, load_sentence_transformer, rank
from modernalbert.run_retrieval import command as retrieval_command
from modernalbert.training.contrastive import DistilledRankingLoss, RetrievalTrainer, make_loss


# A question and its answer share no word: BM25 finds nothing, and a model has to learn who goes with what.
SUBJECTS = "river engine violin bridge castle whale poem desert market glacier planet soldier".split()
ANSWERS = "water steam music steel stone ocean verse sand trade ice orbit army".split()


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, nano_tokenizer):
    """Small models with nano's vocabulary, and a set of two questions on each subject: to learn from, to ask."""
    place = tmp_path_factory.mktemp("retrieval")
    tiny_model(ModernALBERTForMaskedLM, vocab_size=30522, std=0.1).save_pretrained(place / "model")
    nano_tokenizer.save_pretrained(place / "model")
    folder = place / "set"
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", [{"_id": a, "title": "", "text": f"About {a}."} for a in ANSWERS])
    questions = [{"_id": f"{s}-{n}", "text": f"{words} {s}"} for s in SUBJECTS for n, words in enumerate(("a", "the"))]
    write_jsonl(folder / "queries.jsonl", questions)
    for split, number in (("train", 0), ("test", 1)):
        lines = [f"{s}-{number}\t{a}\t1\n" for s, a in zip(SUBJECTS, ANSWERS)]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    pairs = [{"anchor": f"a {s}", "positive": f"About {a}."} for s, a in zip(SUBJECTS, ANSWERS)]
    write_jsonl(place / "pairs.jsonl", pairs)
    triplets = [row | {"negative": pairs[i - 1]["positive"]} for i, row in enumerate(pairs)]
    write_jsonl(place / "negatives.jsonl", triplets)
    write_jsonl(place / "triplets.jsonl", [row | {"scores": [9, 1.5]} for row in triplets])
    bert = randomise(
        BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    )
    bert.float().save_pretrained(place / "bert")
    nano_tokenizer.save_pretrained(place / "bert")
    SentenceTransformer(modules=[Transformer(str(place / "bert")), Pooling(16, "cls")]).save(str(place / "teacher"))
    return place


QUICK = {
    "per_device_train_batch_size": 6,
    "learning_rate": 1e-2,
    "num_train_epochs": 8,
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
}


def options(workplace, out, **changes) -> list[str]:
    values = {"model_name_or_path": workplace / "model", "output_dir": out}
    values |= {"train_folder": workplace / "set", "evaluation_folders": workplace / "set", **QUICK, **changes}
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


@pytest.fixture
def retrieval(command, workplace, tmp_path):
    """Runs the script; returns `all_results.json`."""

    def run(out=None, flags=(), **changes) -> dict:
        out = out or tmp_path / "out"
        code, _, error = command(retrieval_command, *options(workplace, out, **changes), *flags)
        assert code == 0, error
        return json.loads((out / "all_results.json").read_text())

    return run


def losses(out) -> list[float]:
    state = json.loads((out / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_training_beats_the_start_and_the_model_loads_where_this_package_is_not(retrieval, workplace, tmp_path):
    before = retrieval(tmp_path / "before", ["--no_do_train", "--bm25"])
    assert before["bm25_set_ndcg_at_10"] == 0  # no shared word
    after = retrieval(tmp_path / "after", merge_after="calibrated", query_prompt="query: ", num_train_epochs=12)
    assert after["set_ndcg_at_10"] > 0.7 > 0.55 > before["set_ndcg_at_10"], (after, before)
    out = tmp_path / "after"
    for file in ("modules.json", "modeling_modernalbert.py", "tokenizer.json", "merged/merge_report.md", "results.md"):
        assert (out / file).is_file(), file
    assert json.loads((out / "merged/merge_report.json").read_text())["method"] == "calibrated"
    assert "merged_set_ndcg_at_10" in after and "| merged |" in (out / "results.md").read_text()
    ranking = [line.split() for line in (out / "predictions_model_set.trec").read_text().splitlines()]
    assert len(ranking) == 12 * 12 and ranking[0][0] == "river-1" and ranking[0][2] in ANSWERS
    stranger = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modernalbert":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.path = [path for path in sys.path if path]
import numpy
from sentence_transformers import SentenceTransformer
for name in ("", "/merged/folded"):
    model = SentenceTransformer({str(out)!r} + name, trust_remote_code=True, device="cpu")
    assert model.prompts["query"] == "query: ", model.prompts
    numpy.save({str(tmp_path)!r} + f"/e{{len(name)}}.npy", model.encode_query(["a river", "the sea and the whale"]))
"""
    done = subprocess.run([sys.executable, "-c", stranger], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = SentenceTransformer(str(out), device="cpu").encode_query(["a river", "the sea and the whale"])
    np.testing.assert_allclose(np.load(tmp_path / "e0.npy"), ours, atol=1e-5)
    assert np.abs(np.load(tmp_path / "e14.npy") - ours).max() > 1e-4  # merged is not routed


def test_an_interrupted_run_continues_as_if_it_had_not_been(retrieval, tmp_path, caplog):
    changes = {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 3, "mine_hard_negatives": 1}
    whole = retrieval(tmp_path / "out", save_total_limit=9, **changes)
    first = losses(tmp_path / "out")
    rows = (tmp_path / "out/train_rows.jsonl").read_text()
    (tmp_path / "out/all_results.json").unlink()
    (tmp_path / "out/checkpoint-6/trainer_state.json").unlink()
    (tmp_path / "out/checkpoint-8/trainer_state.json").unlink()
    again = retrieval(tmp_path / "out", save_total_limit=9, **changes)
    assert f"Continuing from {tmp_path / 'out/checkpoint-3'}" in caplog.text
    assert losses(tmp_path / "out") == pytest.approx(first, rel=1e-4) and len(first) == 8
    assert again["set_map_at_1000"] == pytest.approx(whole["set_map_at_1000"])
    assert (tmp_path / "out/train_rows.jsonl").read_text() == rows


def test_figures_of_a_run_that_was_cut_off_are_those_of_its_model(retrieval, workplace, tmp_path, command, caplog):
    first = retrieval(flags=["--no_do_train"])
    (tmp_path / "out/all_results.json").unlink()
    assert retrieval(flags=["--no_do_train"]) == first and "are there already" in caplog.text
    (tmp_path / "out/all_results.json").unlink()
    other = options(workplace, tmp_path / "out", model_name_or_path=workplace / "teacher")
    code, _, error = command(retrieval_command, *other, "--no_do_train")
    assert code == 2 and f"was run with model_name_or_path {workplace / 'model'} instead of" in error


def test_mined_negatives_are_documents_that_are_not_relevant(retrieval, workplace, tmp_path):
    results = retrieval(mine_hard_negatives=2, num_train_epochs=6)
    rows = [json.loads(line) for line in (tmp_path / "out/train_rows.jsonl").read_text().splitlines()]
    answer = {f"a {s}": f"About {a}." for s, a in zip(SUBJECTS, ANSWERS)}
    assert 0 < len(rows) <= 12 and results["train_samples"] == len(rows)
    for row in rows:
        assert row["positive"] == answer[row["anchor"]]
        negatives = {row["negative_1"], row["negative_2"]}
        assert len(negatives) == 2 and row["positive"] not in negatives and negatives <= set(answer.values())


@pytest.mark.parametrize("distillation", ["kl", "margin_mse"])
def test_a_teachers_scores_are_its_cosines_and_are_learnt(retrieval, workplace, tmp_path, distillation):
    out = tmp_path / "out"
    teacher = {"teacher": workplace / "teacher", "distillation": distillation, "num_train_epochs": 1}
    retrieval(train_folder=None, train_file=workplace / "negatives.jsonl", **teacher)
    rows = [json.loads(line) for line in (out / "train_rows.jsonl").read_text().splitlines()]
    model = SentenceTransformer(str(workplace / "teacher"), device="cpu")
    for row in rows[:3]:
        anchor, *documents = model.encode([row["anchor"], row["positive"], row["negative"]], normalize_embeddings=True)
        assert row["scores"] == pytest.approx([20 * float(anchor @ document) for document in documents], abs=1e-3)
    # and from a file that holds scores
    retrieval(tmp_path / "file", train_folder=None, train_file=workplace / "triplets.jsonl", num_train_epochs=2)
    loss = losses(tmp_path / "file")
    assert len(loss) == 4 and np.isfinite(loss).all()


def test_the_distilled_loss_is_the_sum_of_its_formulas(workplace):
    model = load_encoder(RetrievalModelArguments(str(workplace / "model")), 64)
    texts = [["a river", "a whale"], ["About water.", "About ocean."], ["About ice.", "About army."]]
    labels = torch.tensor([[5.0, 1.0], [2.0, 4.0]])
    features = [model.preprocess(column) for column in texts]
    with torch.no_grad():
        anchor, positive, negative = (
            torch.nn.functional.normalize(model(dict(column))["sentence_embedding"], dim=-1) for column in features
        )
        logits = 20 * anchor @ torch.cat([positive, negative]).T
        contrastive = torch.nn.functional.cross_entropy(logits, torch.arange(2))
        own = 20 * torch.stack([(anchor * positive).sum(1), (anchor * negative).sum(1)], dim=1)
        target = labels.softmax(1)
        kl = (target * (target.log() - own.log_softmax(1))).sum() / 2
        margins = ((own[:, 0] - own[:, 1] - labels[:, 0] + labels[:, 1]) ** 2).mean()
        for distillation, term in (("kl", kl), ("margin_mse", margins)):
            loss = DistilledRankingLoss(model, distillation)([dict(column) for column in features], labels)
            torch.testing.assert_close(loss, contrastive + term, rtol=1e-4, atol=1e-4)


def router_gradients(workplace, tmp_path, coefficient=None, accumulate=1, **loss):
    """Gradients of all parameters after one step on one batch, and the router's names."""
    from datasets import Dataset

    from modernalbert.run_retrieval import RetrievalTrainingArguments

    model = load_encoder(RetrievalModelArguments(str(workplace / "model")), 64)
    encoder = model.transformers_model
    encoder.config.router_jitter_noise = 0.0
    for module in encoder.modules():
        if hasattr(module, "jitter_noise"):
            module.jitter_noise = 0.0
    if coefficient is not None:
        encoder.config.router_aux_loss_coef = coefficient
    rows = [json.loads(line) for line in (workplace / "triplets.jsonl").read_text().splitlines()]
    rows = Dataset.from_list(rows).remove_columns("scores")
    arguments = RetrievalTrainingArguments(
        str(tmp_path / "t"), gradient_accumulation_steps=accumulate, per_device_train_batch_size=12, use_cpu=True
    )
    trainer = RetrievalTrainer(model, arguments, train_dataset=rows, loss=make_loss(model, **loss))
    trainer.current_gradient_accumulation_steps = accumulate
    model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    with trainer.balanced_routers():
        trainer.training_step(trainer.model, batch)
    return {name: value.grad.clone() for name, value in encoder.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("loss", [{}, {"mini_batch_size": 4}, {"matryoshka_dims": [32, 8]}])
def test_routers_are_balanced_whatever_the_loss(workplace, tmp_path, loss):
    with_it, without = (router_gradients(workplace, tmp_path, coefficient, **loss) for coefficient in (5.0, 0.0))
    twice = router_gradients(workplace, tmp_path, 10.0, **loss)
    halved = router_gradients(workplace, tmp_path, 5.0, accumulate=2, **loss)
    name = next(name for name in with_it if name.endswith("mol_router.weight"))
    assert (with_it[name] - without[name]).norm() > 1e-3
    # linear in the coefficient, and divided with the loss when gradients accumulate
    torch.testing.assert_close(twice[name] - without[name], 2 * (with_it[name] - without[name]), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(2 * halved[name], with_it[name], rtol=1e-3, atol=1e-5)


def test_first_dimensions_are_trained_and_measured(retrieval, workplace, tmp_path):
    results = retrieval(matryoshka_dims=[32, 4])
    assert results["dim4_set_ndcg_at_10"] > 0.5 and "dim32_set_ndcg_at_10" not in results
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu", truncate_dim=4)
    data = load_retrieval_set(str(workplace / "set"), "test")
    found = rank(model, data, tmp_path, 4)[None][1][:, 0]
    top = [line.split() for line in (tmp_path / "out/predictions_dim4_set.trec").read_text().splitlines()]
    assert [line[2] for line in top if line[3] == "1"] == [data.corpus.ids[row] for row in found]


def test_large_batches_in_small_pieces_give_the_same_losses(retrieval, tmp_path):
    changes = {"per_device_train_batch_size": 12, "num_train_epochs": 3, "learning_rate": 1e-3}
    retrieval(tmp_path / "whole", **changes)
    retrieval(tmp_path / "pieces", mini_batch_size=5, **changes)
    # The first loss is that of the same weights; later ones differ by the routers' noise.
    assert losses(tmp_path / "pieces") == pytest.approx(losses(tmp_path / "whole"), rel=0.02)


def test_other_encoders_and_folders_with_pooling_of_their_own(retrieval, workplace, tmp_path):
    retrieval(tmp_path / "bert", model_name_or_path=workplace / "bert", pooling="cls", num_train_epochs=1)
    assert json.loads((tmp_path / "bert/1_Pooling/config.json").read_text())["pooling_mode"] == "cls"
    flags = ["--no_do_train"]
    by_script = retrieval(tmp_path / "teacher", flags, model_name_or_path=workplace / "teacher", encode_processes=2)
    alone = retrieval(tmp_path / "alone", flags, model_name_or_path=workplace / "bert", pooling="cls")
    assert {k: v for k, v in by_script.items() if "set" in k} == {k: v for k, v in alone.items() if "set" in k}
    # A run that was cut off keeps the sets it has finished.
    (tmp_path / "alone/all_results.json").unlink()
    file = tmp_path / "alone/mteb/model/set.json"
    known = json.loads(file.read_text())
    known["scores"]["test"][0]["ndcg_at_10"] = 0.125
    file.write_text(json.dumps(known))
    again = retrieval(tmp_path / "alone", flags, model_name_or_path=workplace / "bert", pooling="cls")
    assert again["set_ndcg_at_10"] == 0.125
    flags += ["--overwrite_output_dir"]
    anew = retrieval(tmp_path / "alone", flags, model_name_or_path=workplace / "bert", pooling="cls")
    assert anew["set_ndcg_at_10"] == alone["set_ndcg_at_10"] != 0.125


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--teacher"])
def test_a_folder_that_lacks_weights_is_refused(workplace, tmp_path, flag):
    """sentence-transformers would fill them with random numbers."""
    arguments = RetrievalModelArguments(str(tmp_path / "st"))
    load = {
        "--model_name_or_path": lambda: load_encoder(arguments, 64),
        "--teacher": lambda: load_sentence_transformer(str(tmp_path / "st"), flag, arguments),
    }[flag]
    modules = [Transformer(str(workplace / "model")), Pooling(32, "mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "st"))
    assert load()[1].pooling_mode == "mean"
    file = tmp_path / "st/model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "groups.1.attn.Wqkv" not in k}, file, {"format": "pt"})
    with pytest.raises(UserError, match="st lacks weights .*groups.1.attn.Wqkv.weight"):
        load()


def test_a_configuration_alone_starts_from_random_weights(retrieval, workplace, tmp_path, nano_tokenizer, caplog):
    tiny_config(vocab_size=30522, pad_token_id=0).save_pretrained(tmp_path / "bare")
    nano_tokenizer.save_pretrained(tmp_path / "bare")
    bare = {"model_name_or_path": tmp_path / "bare", "expert_mixing": "ema", "num_train_epochs": 1}
    retrieval(evaluation_folders=None, flags=["--no_do_eval"], **bare)
    assert "random weights" in caplog.text
    assert json.loads((tmp_path / "out/config.json").read_text())["expert_mixing"] == "ema"
    # the saved folder is one of sentence-transformers; its experts can be mixed otherwise
    model = load_encoder(RetrievalModelArguments(str(tmp_path / "out"), expert_mixing="uniform"), 64)
    assert model.transformers_model.expert_mixing == "uniform" and model.max_seq_length == 64


def test_the_best_checkpoint_is_chosen_on_the_first_set(retrieval, tmp_path):
    changes = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    results = retrieval(num_train_epochs=3, **changes)
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    scores = [entry["eval_ndcg_at_10"] for entry in state["log_history"] if "eval_ndcg_at_10" in entry]
    assert len(scores) == 3 and state["best_metric"] == max(scores) == pytest.approx(results["set_ndcg_at_10"])


def test_two_processes_train_one_model_and_encode_together(retrieval, workplace, tmp_path):
    launch = ["--config_file", REPOSITORY / "configs/accelerate/cpu_2_processes.yaml", "--main_process_port", "0"]
    out = tmp_path / "two"
    words = options(workplace, out, use_cpu=True, per_device_train_batch_size=3)
    run_accelerate(tmp_path / "logs", *launch, REPOSITORY / "run_retrieval.py", *words)
    results = json.loads((out / "all_results.json").read_text())
    assert results["set_ndcg_at_10"] > 0.7 and len(losses(out)) == 16  # 2 steps of 2 x 3 rows an epoch
    alone = retrieval(tmp_path / "alone", ["--no_do_train"], model_name_or_path=out)
    assert alone["set_ndcg_at_10"] == pytest.approx(results["set_ndcg_at_10"])


def test_mteb_measures_what_we_measure(workplace, tmp_path):
    mteb = pytest.importorskip("mteb")
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    from modernalbert.evaluation.retrieval import evaluate_ranking
    from modernalbert.run_retrieval import RetrievalResults, evaluate_mteb

    data = load_retrieval_set(str(workplace / "set"), "test")
    model = SentenceTransformer(str(workplace / "teacher"), device="cpu")
    ours = evaluate_ranking(data, rank(model, data, tmp_path, 4)[None])

    class OurTask(AbsTaskRetrieval):
        metadata = mteb.get_task("SciFact").metadata.model_copy(update={"name": "OurTask"})

        def load_data(self, **kwargs):
            from datasets import Dataset

            texts = data.corpus.texts(range(len(data.corpus)))
            corpus = [{"id": i, "title": "", "text": text} for i, text in zip(data.corpus.ids, texts)]
            queries = [{"id": i, "text": text} for i, text in data.queries.items()]
            part = {"corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(queries), "top_ranked": None}
            self.dataset = {"default": {"test": part | {"relevant_docs": data.qrels}}}
            self.data_loaded = True

    figures = RetrievalResults(tmp_path)
    evaluate_mteb(model, [OurTask()], figures, 4, reuse=True)
    theirs = json.loads((tmp_path / "mteb/model/OurTask.json").read_text())["scores"]["test"][0]
    again = RetrievalResults(tmp_path)
    evaluate_mteb(None, [OurTask()], again, 4, reuse=True)  # finished, so no model is needed
    for each in (figures, again):
        assert each.flat("OurTask")["OurTask_ndcg_at_10"] == pytest.approx(ours["ndcg_at_10"], abs=1e-5)
    assert {name: theirs[name] for name in ours} == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize(
    "changes, flags, said",
    [
        ({"train_folder": None}, [], "training needs either --train_file or --train_folder"),
        ({"train_file": "{w}/pairs.jsonl"}, [], "training needs either --train_file or --train_folder"),
        ({"evaluation_folders": None}, [], "--evaluation_folders is missing"),
        ({"evaluation_folders": ["{w}/set", "{w}/set"]}, [], "two folders have the same name"),
        ({"evaluation_folders": "{w}/nothing"}, [], "nothing: no such folder"),
        ({"evaluation_split": "dev"}, [], "qrels/dev.tsv: no such file"),
        ({"model_name_or_path": None}, [], "--model_name_or_path is missing"),
        ({"model_name_or_path": "{w}/teacher", "pooling": "mean"}, [], "--pooling is not allowed for"),
        ({"pooling": "median"}, [], "--pooling median is not allowed: it must be one of cls"),
        ({"teacher": "{w}/teacher"}, [], "--teacher needs negatives"),
        ({"teacher": "{w}/nothing", "mine_hard_negatives": 1}, [], "--teacher {w}/nothing cannot be loaded"),
        ({"teacher": "{w}/teacher", "mini_batch_size": 2}, [], "--mini_batch_size does not go with --teacher"),
        ({"distillation": "mse"}, [], "--distillation mse is not allowed: it must be kl or margin_mse"),
        ({"matryoshka_dims": [64, 8]}, [], "--matryoshka_dims 64 8 is not allowed: they must be from 1 to 32"),
        ({"mine_hard_negatives": 50}, [], "--mine_hard_negatives 50: there are not that many negatives"),
        ({"mini_batch_size": 0}, [], "--mini_batch_size 0 is not allowed"),
        ({"merge_after": "ema", "model_name_or_path": "{w}/bert"}, [], "--merge_after needs a ModernALBERT"),
        ({"merge_after": "ema"}, ["--no_do_eval"], "--merge_after needs --evaluation_folders"),
        (
            {"metric_for_best_model": "f1"},
            [],
            "--metric_for_best_model f1 is not allowed: it must be one of task, loss, ndcg",
        ),
        ({"mteb_tasks": "NoSuchTask"}, [], "--mteb_tasks"),
        (
            {"train_folder": None, "train_file": "{w}/triplets.jsonl", "mine_hard_negatives": 1},
            [],
            "holds negatives already",
        ),
    ],
)
def test_mistakes_get_one_sentence(command, workplace, tmp_path, changes, flags, said):
    def fill(value):
        return [fill(v) for v in value] if isinstance(value, list) else str(value).replace("{w}", str(workplace))

    changes = {name: None if value is None else fill(value) for name, value in changes.items()}
    words = options(workplace, tmp_path / "out", **changes)
    code, _, error = command(retrieval_command, *words, *flags)
    assert code == 2 and fill(said) in error, error
    assert not (tmp_path / "out/all_results.json").exists()


def test_missing_packages_are_named_with_their_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytrec_eval", None)
    said = r"needs pytrec_eval: python -m pip install .*\[retrieval\]"
    with pytest.raises(ImportError, match=said):
        importlib.reload(run_retrieval)
    monkeypatch.setattr("sys.argv", ["/bin/modernalbert-retrieval"])
    with pytest.raises(SystemExit, match=said):
        importlib.reload(run_retrieval)
