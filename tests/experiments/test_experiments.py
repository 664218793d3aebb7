# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The scripts that made and measure the shipped checkpoint: how text is cleaned, and how embeddings are compared."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from small_models import REPOSITORY, run_command, tiny_model

from modernalbert import ModernALBERTForMaskedLM, ModernALBERTModel


def load(name: str):
    """A script of experiments/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nano_corpus():
    return load("nano_corpus")


def test_sentences_and_treebank_spaces(nano_corpus):
    assert nano_corpus.sentences_of('He left. "Why?" she asked.  Nobody knew.') == [
        "He left.",
        '"Why?" she asked.',
        "Nobody knew.",
    ]
    assert nano_corpus.untokenize("`` Yes , '' he said .") == '"Yes," he said.'


def test_a_corpus_has_no_copies_of_itself_or_of_what_is_excluded(nano_corpus):
    secret = "the quick brown fox jumps over the lazy dog tonight"
    excluded = set(nano_corpus.shingles(secret.split())) | set(nano_corpus.shingles("a very short film".split()))
    corpus = nano_corpus.Corpus(excluded)
    document = (
        "We saw that the quick brown fox jumps over the lazy dog tonight, they said. A very short film! "
        "Nothing else happened here. Nothing else happened here. So the story ends with another sentence. No."
    )
    texts = " ".join(corpus.texts(document))
    assert "fox" not in texts and "short film" not in texts
    assert texts.count("Nothing else happened here.") == 1 and "So the story ends" in texts
    assert corpus.counts["in an evaluation set"] == 2 and corpus.counts["duplicate"] == 1


def test_strings_of_any_evaluation_file(nano_corpus, tmp_path):
    value = {"data": [{"title": "A", "paragraphs": [{"context": "B", "qas": [{"question": "C", "id": 3}]}]}]}
    assert list(nano_corpus.strings_in(value)) == ["A", "B", "C"]


def test_rows_without_the_texts_of_others(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(REPOSITORY / "experiments")
    module = load("rows_without")
    long = "the quick brown fox jumps over the lazy dog"
    rows = [
        {"sentence1": "Tonight " + long, "sentence2": "another", "label": 1.0},
        {"sentence1": "nobody knew", "sentence2": "A very short film!", "label": 2.0},
        {"sentence1": "a very short film indeed", "sentence2": "Déjà vu, they said", "label": 3.0},
    ]
    without = [{"text": long.upper()}, {"text": "A VERY SHORT FILM"}, {"text": "nobody knew"}]
    for name, lines in (("rows", rows), ("without", without)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--rows", tmp_path / "rows.jsonl", "--without", tmp_path / "without.jsonl", "--output_file"]
    code, out, _ = run_command(monkeypatch, capsys, module.command, *arguments, tmp_path / "new" / "kept.jsonl")
    assert code == 0 and "2 of 3 rows share a text" in out and "1 of its 3 rows" in out
    assert [json.loads(line) for line in (tmp_path / "new" / "kept.jsonl").open()] == rows[2:]
    code, _, error = run_command(monkeypatch, capsys, module.command, *arguments, tmp_path / "kept.csv")
    assert code == 2 and "must end in .jsonl" in error


def test_similarity_is_spearmans_correlation_of_cosines(tmp_path, monkeypatch, capsys, nano_tokenizer):
    module = load("embedding_similarity")
    model = tiny_model(ModernALBERTModel, vocab_size=30522)
    texts = [
        f"{a} {b}" for a in ("A red house", "Two dogs", "The old man and the sea") for b in ("sleeps.", "is here", "!")
    ]
    rows = [{"sentence1": a, "sentence2": b, "label": float(i % 6)} for i, (a, b) in enumerate(zip(texts, texts[::-1]))]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cosines = []
    for row in rows:
        one, two = (
            model(**nano_tokenizer(row[c], return_tensors="pt")).last_hidden_state[0].mean(0).detach().numpy()
            for c in ("sentence1", "sentence2")
        )
        cosines.append(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
    expected = spearmanr(np.round(cosines, 6), [row["label"] for row in rows]).statistic
    model.save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    code, _, _ = run_command(
        monkeypatch, capsys, module.command, "--model_name_or_path", tmp_path / "model", "--files", file,
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "out/all_results.json").read_text())
    assert found == {"pairs_spearman": pytest.approx(expected, abs=0.02), "pairs_pairs": 9}
    weights = {name: value for name, value in model.state_dict().items() if "attn.Wo" not in name}
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    code, _, error = run_command(
        monkeypatch, capsys, module.command, "--model_name_or_path", tmp_path / "model", "--files", file,
        "--output_dir", tmp_path / "other",
    )  # fmt: skip
    assert code == 2 and "lacks weights" in error and not (tmp_path / "other").exists()


def test_a_probe_learns_from_frozen_embeddings(tmp_path, monkeypatch, capsys, nano_tokenizer):
    module = load("embedding_probe")
    model = tiny_model(ModernALBERTModel, vocab_size=30522)
    model.save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"sentence": f"{'what a fine' if i % 2 else 'such a dull'} film, number {i}", "label": i % 2} for i in range(40)
    ]
    for name, part in (("train", rows[:30]), ("validation", rows[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = ["--train_file", tmp_path / "train.jsonl", "--validation_file", tmp_path / "validation.jsonl"]
    arguments = ["--model_name_or_path", tmp_path / "model", *files, "--output_dir", tmp_path / "out"]
    code, output, error = run_command(monkeypatch, capsys, module.command, *arguments, "--task_name", "sst2")
    assert code == 0, error
    found = json.loads((tmp_path / "out/all_results.json").read_text())
    assert found == {"eval_accuracy": pytest.approx(1, abs=0.11), "train_samples": 30, "eval_samples": 10}
    assert f"accuracy {found['eval_accuracy']:.4f}" in output
    code, _, error = run_command(monkeypatch, capsys, module.command, *arguments, "--task_name", "stsb")
    assert code == 2 and "--task_name stsb is not allowed: it must be one of" in error

    pairs = Dataset.from_dict({"text": ["a house", "two dogs"], "text_pair": ["two dogs", "two dogs"]})
    features = module.features(model, nano_tokenizer, pairs)
    one, two = module.features(model, nano_tokenizer, pairs.remove_columns("text_pair"))
    assert features == pytest.approx(np.stack([np.r_[abs(one - two), one * two], np.r_[0 * two, two * two]]), abs=1e-6)


def test_experts_worth_is_measured_against_the_same_masks(tmp_path, command, monkeypatch, nano_tokenizer):
    monkeypatch.syspath_prepend(REPOSITORY / "experiments")
    words = "ferry river bread band guitar bank rain stone paper light".split()
    lines = [{"text": " ".join(words[(i + j) % 10] for j in range(12))} for i in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def worth(name: str, **changes) -> dict[str, dict]:
        model = tiny_model(ModernALBERTForMaskedLM, vocab_size=len(nano_tokenizer), **changes)
        if name == "silent":
            for module in model.modules():
                if hasattr(module, "mol_B_in"):
                    torch.nn.init.zeros_(module.mol_B_in)
                    torch.nn.init.zeros_(module.mol_B_out)
        model.save_pretrained(tmp_path / name)
        nano_tokenizer.save_pretrained(tmp_path / name)
        options = ["--model_name_or_path", tmp_path / name, "--validation_file", tmp_path / "texts.jsonl"]
        options += ["--num_texts", 40, "--num_calibration_texts", 20, "--output_file", tmp_path / "worth.json"]
        done = command(load("expert_worth").command, *options)
        assert done.code == 0, done.error
        results = json.loads((tmp_path / "worth.json").read_text())
        assert results["num_texts"] == 40 and 0 <= results["smallest_usage"] <= 1 / 4
        return {row["way"]: row for row in results["rows"]}

    rows = worth("random")
    assert list(rows) == ["routed", "uniform", "ema", "calibrated", "off"]
    for way in ("uniform", "off"):
        low, high = rows[way]["interval"]
        assert low < rows[way]["worse_by"] < high
        assert rows[way]["worse_by"] == pytest.approx(rows[way]["masked_loss"] - rows["routed"]["masked_loss"])
        assert abs(rows[way]["worse_by"]) > 0.01
    # Experts that add nothing are worth nothing, whatever is done with them.
    for row in list(worth("silent").values())[1:]:
        assert row["worse_by"] == pytest.approx(0, abs=1e-5)
