# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The study's runner goes on after a kill and mixes nothing; its report says what files say, and nothing else."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from small_models import REPOSITORY, randomise, run_command, tiny_model

from modernalbert import ModernALBERTForSequenceClassification, ModernALBERTModel
from modernalbert.cli.errors import UserError, run
from modernalbert.evaluation.glue import METRICS
from modernalbert.experiments.study import merging, report
from modernalbert.experiments.study import run as study
from modernalbert.experiments.study.bootstrap import Resampler, interval, score
from modernalbert.experiments.study.plan import Experiment, all_experiments
from modernalbert.experiments.study.results import Results, code_version, exclusive
from modernalbert.experiments.study.specialisation import (
    binned,
    mutual_information,
    numbered,
    part_of_speech,
    routing_and_properties,
)


IMAGES = {
    "kind": "images",
    "question": "Which?",
    "seeds": [0, 1],
    "variants": {"classifier alone": {"adapter": "none"}, "lora": {"adapter": "lora"}, "mol": {"adapter": "mol"}},
    "config": {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 1}
    | {"num_attention_heads": 2, "intermediate_size": 32},
    "ffn_modules": ["fc1", "fc2"],
    "base_steps": 2,
    "base_learning_rate": 0.001,
    "steps": 2,
    "learning_rate": 0.001,
    "minutes": {"default": 3},
}


def command():
    run(study.main)


def write(folder, name="small", **changes):
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(IMAGES | changes, sort_keys=False))
    return file


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    def call_runner(file, *options):
        folders = ["--results_dir", tmp_path / "results", "--work_dir", tmp_path / "work"]
        return run_command(monkeypatch, capsys, command, file, *folders, *options)

    return call_runner


# --- the runner


def test_the_plan_comes_first_and_a_second_start_runs_nothing(tmp_path, call):
    file = write(tmp_path)
    code, output, error = call(file, "--list")
    assert code == 0 and "| small | 6 | 0 | 0.3 |" in output and "6 jobs to do, about 0.3 hours" in output, error
    assert not (tmp_path / "results").exists()
    code, output, error = call(file)
    assert code == 0, error
    results = Results("small", tmp_path / "results")
    lines = results.lines()
    assert [(line["variant"], line["method"], line["seed"]) for line in lines[:4]] == [
        ("classifier alone", "classifier alone", 0),
        ("lora", "lora", 0),
        ("mol", "mol", 0),
        ("mol", "mol, merged", 0),
    ]
    assert len(lines) == 8
    for line in lines:
        assert {"experiment", "variant", "seed", "command", "commit", "hardware", "rows", "accuracy"} <= set(line)
        assert line["loss"] == pytest.approx(results.arrays(line)["loss"].mean())
    sizes = {line["variant"]: line["adapter_parameters"] for line in lines}
    assert sizes["classifier alone"] == 0 and sizes["lora"] == pytest.approx(sizes["mol"], rel=0.1)
    before = results.file.read_text()
    code, output, error = call(file)
    assert code == 0 and "| small | 6 | 6 | 0.0 |" in output, error
    assert results.file.read_text() == before


def test_it_goes_on_after_a_kill(tmp_path, call):
    file, results = write(tmp_path, seeds=[0, 1, 2, 3]), Results("small", tmp_path / "results")
    words = [file, "--results_dir", results.folder, "--work_dir", tmp_path / "work"]
    runner = subprocess.Popen(
        [sys.executable, REPOSITORY / "experiments" / "study" / "run.py", *map(str, words)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    while runner.poll() is None and len(results.lines()) < 2:
        time.sleep(0.02)
    runner.send_signal(signal.SIGKILL)
    assert runner.wait() == -signal.SIGKILL, "it was not killed in time"
    with results.file.open("a") as handle:
        handle.write('{"experiment": "sma')  # a kill in the middle of a write
    done = results.lines()
    assert 2 <= len(done) < 16
    code, _, error = call(file)
    assert code == 0, error
    lines = results.lines()
    assert lines[: len(done)] == done and len(lines) == 16
    assert len({line["run"] for line in lines}) == 16


@pytest.mark.parametrize("name, other", [("commit", "0123abc"), ("rows", "other digits"), ("settings", "9876")])
def test_results_of_another_commit_or_other_rows_are_named_and_refused(name, other, tmp_path, call):
    file, results = write(tmp_path, seeds=[0]), Results("small", tmp_path / "results")
    line = {
        "job": "lora-0",
        "run": "lora-0",
        "variant": "lora",
        "changes": {"adapter": "lora"},
        "commit": code_version(),
        "rows": "scikit-learn digits",
        "settings": Experiment.load(file).settings_fingerprint,
    }
    results.append([line | {name: other, "seconds": 1}], [None])
    before = results.file.read_text()
    code, _, error = call(file)
    assert code == 2 and f"results of another {name} (1 of {other};" in error
    assert results.file.read_text() == before


def test_a_variant_that_has_changed_since_is_named(tmp_path, call):
    assert call(write(tmp_path, seeds=[0]))[0] == 0
    file = write(tmp_path, seeds=[0, 1], variants={"lora": {"adapter": "none"}}, limits="What the report says is free.")
    code, _, error = call(file)
    assert code == 2 and "results of 'lora' with {'adapter': 'lora'}, which is now {'adapter': 'none'}" in error


def test_two_runners_do_not_share_results(tmp_path, call):
    with exclusive(tmp_path / "results"):
        code, _, error = call(write(tmp_path))
    assert code == 2 and f"another run of the study writes here (process {os.getpid()})" in error


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"kind": "magic"}, "kind='magic' is not allowed"),
        ({"seeds": None}, "seeds=None is not allowed"),
        ({"variants": []}, "variants=[] is not allowed"),
    ],
)
def test_bad_experiments(changes, said, tmp_path, call):
    code, _, error = call(write(tmp_path, **changes))
    assert code == 2 and said in error


def test_what_is_missing_is_named(tmp_path, call):
    for kind, said in (("pretraining", "--corpus_dir is missing"), ("merging", "--data_dir")):
        code, _, error = call(write(tmp_path, kind=kind, tasks=["rte"]), "--data_dir", tmp_path / "none")
        assert code == 2 and said in error
    code, _, error = call(tmp_path / "none.yaml")
    assert code == 2 and "no such file" in error


def test_every_experiment_of_the_study_can_be_read():
    experiments = {file.stem: Experiment.load(file) for file in all_experiments()}
    assert [name[0] for name in experiments] == sorted("aabcdefghhi")
    for experiment in experiments.values():
        assert list(experiment.jobs()) and all(job.minutes([])[0] > 0 for job in experiment.jobs())
        for changes in experiment.variants.values():
            for origin in filter(None, (changes.get("same_as"), changes.get("from"))):
                other, variant = origin.split("/")
                assert variant.split("-")[0] in experiments[other].variants


# --- pretraining, in small


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, nano_tokenizer):
    from modernalbert.data.corpus import prepare_corpus

    folder = tmp_path_factory.mktemp("text")
    texts = [
        f"The {word} was seen by all {i} of them, and nobody said a word." for i, word in enumerate(["cat", "dog"] * 40)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_corpus({"text": [str(folder / "text.jsonl")]}, nano_tokenizer, folder / "corpus", 32)
    return folder


def test_a_variant_is_pretrained_and_measured_text_by_text(tmp_path, call, corpus):
    arguments = {"max_seq_length": 32, "row_length": 32, "per_device_train_batch_size": 4, "use_cpu": True}
    file = write(
        tmp_path,
        kind="pretraining",
        config="configs/pico",
        tokens=256,
        num_texts=20,
        seeds=[0],
        variants={"mol": {"hidden_size": 48, "intermediate_size": 32}},
        arguments=arguments | {"save_strategy": "no", "logging_steps": 1},
    )
    code, output, error = call(file, "--corpus_dir", corpus / "corpus", "--validation_file", corpus / "text.jsonl")
    assert code == 0, error + output
    results = Results("small", tmp_path / "results")
    (line,) = results.lines()
    arrays = results.arrays(line)
    assert line["tokens"] == 256 and arrays["loss"].shape == arrays["count"].shape == (20,)
    assert line["masked_loss"] == pytest.approx(arrays["loss"].sum() / arrays["count"].sum(), rel=1e-6)
    assert 8 < line["masked_loss"] < 12  # two steps from log of the vocabulary, 10.3
    assert "--corpus_dir $CORPUS_DIR" in line["command"] and str(tmp_path) not in line["command"]
    assert 0 < line["usage_entropy"] <= 1 and line["parameters"] > line["parameters_without_embedding"] > 0


# --- merging and adapters, in small


def test_a_fine_tuned_model_is_merged_in_every_way(tmp_path, call, nano_tokenizer, monkeypatch):
    monkeypatch.setattr(merging, "MERGES", {n: v for n, v in merging.MERGES.items() if "recover_steps" not in v})
    generator = np.random.default_rng(0)
    words = ["film", "good", "bad", "story", "nobody", "laughed", "again"]
    rows = [
        {
            "sentence1": " ".join(generator.choice(words, 6)),
            "sentence2": " ".join(generator.choice(words, 4)),
            "label": i % 2,
        }
        for i in range(40)
    ]
    for split in ("train", "validation"):
        file = tmp_path / "data" / "rte" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Models as fine-tuning leaves them: what is finished is not run again.
    models = {}
    for name, mixing in (("routed", "token"), ("trained-ema", "ema"), ("trained-uniform", "uniform")):
        folder = tmp_path / "work" / "small" / "nano-rte-0" / name
        models[name] = tiny_model(
            ModernALBERTForSequenceClassification,
            vocab_size=30522,
            expert_mixing=mixing,
            num_labels=2,
            seed=len(models),
        )
        models[name].save_pretrained(folder)
        nano_tokenizer.save_pretrained(folder)
        (folder / "all_results.json").write_text("{}")
    file = write(
        tmp_path, kind="merging", seeds=[0], tasks=["rte"], variants={"nano": {"model": "configs/nano"}}, arguments={}
    )
    code, _, error = call(file, "--data_dir", tmp_path / "data")
    assert code == 0, error
    results = Results("small", tmp_path / "results")
    found = {line["method"]: results.arrays(line)["prediction"] for line in results.lines()}
    assert list(found) == ["routed", "uniform", "ema", "svd", "calibrated", "trained ema", "trained uniform"]
    for method, name in (("routed", "routed"), ("trained ema", "trained-ema")):
        batch = nano_tokenizer(
            [row["sentence1"] for row in rows], [row["sentence2"] for row in rows], padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            expected = models[name](**batch).logits.argmax(-1)
        assert found[method].tolist() == expected.tolist()
    line = results.lines()[0]
    assert line["metric"] == "accuracy" and line["score"] == np.mean(found["routed"] == [row["label"] for row in rows])
    assert [each["seconds"] is None for each in results.lines()] == [False] + [True] * 6


def test_a_decoder_is_adapted(tmp_path, call, corpus):
    config = {"vocab_size": 30522, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    file = write(
        tmp_path,
        kind="decoder",
        seeds=[0],
        variants={"base": {"adapter": "none"}, "lora": {"adapter": "lora"}, "mol": {"adapter": "mol"}},
        config=config | {"num_attention_heads": 2},
        base_source="text",
        base_tokens=4096,
        base_learning_rate=0.001,
        adapt_source="text",
        adapt_tokens=4096,
        adapt_learning_rate=0.001,
        held_out_blocks=2,
    )
    code, _, error = call(file, "--corpus_dir", corpus / "corpus")
    assert code == 0, error
    lines = Results("small", tmp_path / "results").lines()
    assert [line["method"] for line in lines] == ["base", "lora", "mol", "mol, merged"]
    assert lines[0]["perplexity"] > 1000 and lines[1]["adapter_parameters"] == pytest.approx(
        lines[2]["adapter_parameters"], rel=0.1
    )
    code, _, error = call(write(tmp_path, "other", **yaml.safe_load(file.read_text()) | {"base_source": "none"}))
    assert code == 2 and "--corpus_dir is missing" in error


# --- intervals


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        base = generator.normal(3, 1, size=150)
        losses = base + generator.normal(0.1, 0.5, size=(1, 150))
        resampler = Resampler(150, seed=trial, num_replicates=300)
        counts = np.ones(150)
        difference = resampler.loss_means(losses, counts) - resampler.loss_means(base[None], counts)
        found = interval((losses - base).mean(), difference[:, 0])
        hits += found.low <= 0.1 <= found.high
    assert 180 <= hits <= 198
    # In pairs: the spread between texts, twice as large as that of the differences, is not in the interval.
    assert found.high - found.low < 4 * 0.7 / 150**0.5


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews_correlation", "spearmanr"])
def test_weighted_metrics_are_the_metrics_of_repeated_rows(metric):
    generator = np.random.default_rng(0)
    label = generator.normal(size=60).round(1) if metric == "spearmanr" else generator.integers(0, 2, 60)
    prediction = label + generator.normal(size=60) if metric == "spearmanr" else label ^ (generator.random(60) < 0.3)
    weights = Resampler(60, num_replicates=5).weights
    found = score(metric, prediction, label, weights)
    for value, row in zip(found, weights):
        numbers = np.repeat(np.arange(60), row.astype(int))
        expected = METRICS[metric](prediction[numbers], label[numbers])
        assert value == pytest.approx(expected, abs=1e-9)
    whole = score(metric, prediction, label, np.ones((1, 60)))[0]
    assert whole == pytest.approx(METRICS[metric](prediction, label))


# --- mutual information


def test_mutual_information():
    labels = np.array([0, 0, 1, 1])
    assert mutual_information(np.eye(2)[labels], labels) == pytest.approx(1)
    assert mutual_information(np.full((4, 2), 0.5), labels) == pytest.approx(0)
    assert mutual_information(np.eye(2)[[0, 1, 0, 1]], labels) == pytest.approx(0)
    assert sorted(np.bincount(binned(np.arange(80)))) == [10] * 8
    assert [part_of_speech(tag) for tag in ("nn-tl", "np$", "vbd", "bez", "jj", "cd", "cc", "dt", ".")] == [
        "noun",
        "proper noun",
        "verb",
        "verb",
        "adjective",
        "number",
        "conjunction",
        "determiner",
        "other",
    ]


def test_a_router_built_to_split_nouns_from_verbs_shows_it(nano_tokenizer):
    nouns, verbs = ["cat", "dog", "house", "tree"], ["ran", "saw", "went", "came"]
    generator = np.random.default_rng(0)
    sentences = []
    for i in range(60):
        pairs = [(str(w), "nn" if w in nouns else "vbd") for w in generator.choice(nouns + verbs, size=6 + i % 5)]
        sentences.append(("fiction" if i % 2 else "reportage", pairs))
    model = tiny_model(ModernALBERTModel, vocab_size=30522, num_experts=2, num_experts_per_tok=1, std=0.02)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
        table = model.embeddings.tok_embeddings.weight
        # Nouns point one way and verbs the other; the router reads that direction.
        direction = torch.randn(table.shape[1])
        for words, sign in ((nouns, 1.0), (verbs, -1.0)):
            table[nano_tokenizer.convert_tokens_to_ids(words)] = sign * direction
        seen = torch.nn.functional.layer_norm(model.embeddings.projection(direction), (32,))
        for k in model.config.modulated_groups:
            model.groups[k].mlp.mol_router.weight.copy_(torch.stack([seen, -seen]))
    weights, properties = routing_and_properties(model, nano_tokenizer, sentences)
    shuffled = np.random.default_rng(1)
    for layer, q in weights.items():
        found = {name: mutual_information(q, labels) for name, labels in properties.items()}
        assert found["part of speech"] > 0.9, layer
        assert max(found[name] for name in ("position", "length", "source")) < 0.1
        assert mutual_information(q, shuffled.permutation(properties["part of speech"])) < 0.05
    randomise(model)
    weights, properties = routing_and_properties(model, nano_tokenizer, sentences)
    assert max(mutual_information(q, properties["part of speech"]) for q in weights.values()) < 0.9
    assert numbered(["b", "a", "b"]).tolist() == [1, 0, 1]


# --- the report


def make_page(tmp_path, files):
    report.write_page(files, tmp_path / "results", tmp_path / "docs" / "findings.md", tmp_path / "docs" / "findings")
    return (tmp_path / "docs" / "findings.md").read_text()


def pretraining_file(folder, name, variants, **changes):
    fields = {"kind": "pretraining", "question": f"Question of {name}?", "seeds": [0, 1], "minutes": {"default": 1}}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(fields | {"variants": variants} | changes, sort_keys=False))
    return file


def planted_results(tmp_path, name, levels, **changes):
    """Losses of 300 texts that all go up and down together, at a level of each variant."""
    generator = np.random.default_rng(0)
    texts = generator.normal(0, 2, size=300)
    texts -= texts.mean()
    results = Results(name, tmp_path / "results")
    for variant, level in levels.items():
        for seed in (0, 1):
            losses = (level + texts + generator.normal(0, 0.05, size=300)).astype(np.float32)
            line = {"experiment": name, "job": f"{variant}-{seed}", "run": f"{variant}-{seed}", "variant": variant}
            line |= {"seed": seed, "masked_loss": float(losses.mean()), "parameters": 10, "commit": "abc", "rows": "r"}
            line |= {"parameters_without_embedding": 5, "settings": "s", "hardware": "h", "seconds": 60.0}
            results.append([line | changes], [{"loss": losses, "count": np.ones(300, dtype=np.int16)}])


def test_the_page_says_what_the_files_say(tmp_path):
    variants = {name: {} for name in ("none", "mol", "unshared")}
    main = pretraining_file(tmp_path, "a_main", variants, floor="none", ceiling="unshared", consequence="Use it.")
    other = pretraining_file(tmp_path, "b_more", {"1": {}, "8": {"same_as": "a_main/mol"}}, reference="8")
    idle = pretraining_file(tmp_path, "c_idle", {"x": {}}, consequence="Nothing.")
    planted_results(tmp_path, "a_main", {"none": 5.0, "mol": 4.7, "unshared": 4.0})
    planted_results(tmp_path, "b_more", {"1": 4.9})
    page = make_page(tmp_path, [main, other, idle])
    first, second, third = page.split("\n## ")[1:]
    assert "`mol` closes 30% [2" in first and "**What follows.** Use it." in first
    assert "| mol | 2 | 10 | 5 | 4.7" in first and "-0.30" in first and "`python experiments/study/run.py" in first
    assert (tmp_path / "docs" / "findings" / "a_main.png").stat().st_size > 5000 and "(findings/a_main.png)" in first
    assert "`1` (+0." in second and "| 8 | 2 |" in second
    assert third.strip().endswith("Not run yet.") and "Nothing." not in third
    assert "Unfinished" not in page


def test_an_unfinished_experiment_says_so_and_draws_no_conclusion(tmp_path):
    file = pretraining_file(tmp_path, "a_main", {"none": {}, "mol": {}, "moa": {}}, consequence="Use it.")
    planted_results(tmp_path, "a_main", {"none": 5.0, "mol": 4.7})
    page = make_page(tmp_path, [file])
    assert "Unfinished: 2 of 6 jobs have not run yet." in page and "Use it." not in page


@pytest.mark.parametrize("name", ["commit", "rows"])
def test_a_page_mixes_nothing(name, tmp_path):
    file = pretraining_file(tmp_path, "a_main", {"none": {}, "mol": {}})
    planted_results(tmp_path, "a_main", {"none": 5.0})
    planted_results(tmp_path, "a_main", {"mol": 4.0}, **{name: "other"})
    with pytest.raises(UserError, match=f"mixes results of several {name}s"):
        make_page(tmp_path, [file])


def test_a_comparison_with_other_rows_is_refused(tmp_path):
    main = pretraining_file(tmp_path, "a_main", {"mol": {}})
    other = pretraining_file(tmp_path, "b_more", {"1": {}, "8": {"same_as": "a_main/mol"}})
    planted_results(tmp_path, "a_main", {"mol": 4.7}, rows="other")
    planted_results(tmp_path, "b_more", {"1": 4.9})
    with pytest.raises(UserError, match="b_more compares with a_main/mol, which ran on other rows"):
        make_page(tmp_path, [main, other])


def test_merges_are_compared_on_the_same_rows_and_seeds(tmp_path):
    file = tmp_path / "g_merging.yaml"
    fields = {"kind": "merging", "question": "?", "seeds": [0, 1], "tasks": ["sst2"], "minutes": {"default": 1}}
    file.write_text(yaml.safe_dump(fields | {"variants": {"nano": {"model": "m"}}}))
    results, generator = Results("g_merging", tmp_path / "results"), np.random.default_rng(0)
    for seed in (0, 1):
        label = np.arange(400) % 2
        routed = label ^ (generator.random(400) < 0.2)
        worse = np.where(np.arange(400) < 40, 1 - label, routed)  # of the first 40 rows all are wrong
        lines, arrays = [], []
        for method, prediction in (("routed", routed), ("same", routed), ("ema", worse)):
            line = {
                "experiment": "g_merging",
                "job": f"nano-sst2-{seed}",
                "run": f"nano-sst2-{seed}-{method}",
                "seed": seed,
            }
            line |= {
                "variant": "nano",
                "task": "sst2",
                "method": method,
                "metric": "accuracy",
                "commit": "c",
                "rows": "r",
                "settings": "s",
            }
            lines.append(line | {"hardware": "h", "seconds": None})
            arrays.append({"prediction": prediction.astype(np.int8), "label": label.astype(np.int8)})
        results.append(lines, arrays)
    page = make_page(tmp_path, [file])
    row = next(line for line in page.splitlines() if line.startswith("| nano | sst2"))
    assert "+0.0 [+0.0, +0.0]" in row
    expected = 100 * np.mean([(results.arrays(line)["prediction"] == label).mean() for line in results.lines()[2::3]])
    routed = 100 * np.mean([(results.arrays(line)["prediction"] == label).mean() for line in results.lines()[::3]])
    assert f"{expected - routed:+.1f} [-1" in row
    assert (tmp_path / "docs" / "findings" / "g_merging.png").is_file()


def test_adapters_and_images_have_a_section(tmp_path, call):
    file = write(tmp_path)
    assert call(file)[0] == 0
    page = make_page(tmp_path, [file])
    assert "| mol, merged | 2 |" in page and "Loss less that of `lora`" in page


def test_nothing_measured_is_no_number(tmp_path):
    page = make_page(tmp_path, all_experiments())
    assert page.count("Not run yet.") == len(all_experiments())
    assert not (tmp_path / "docs" / "findings").exists()
