# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A checkpoint's head is the task's only where its labels have the same names."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_models import tiny_model
from small_squad import write_squad
from transformers import BertConfig, BertForSequenceClassification

from modernalbert import (
    ModernALBERTForQuestionAnswering,
    ModernALBERTForSequenceClassification,
    ModernALBERTForTokenClassification,
)
from modernalbert.cli.errors import UserError
from modernalbert.data.glue_tasks import GLUE_TASKS
from modernalbert.data.sentences import infer_task, load_task_file, relabel
from modernalbert.finetuning.checkpoint import Checkpoint, match_labels, task_in_head_order
from modernalbert.run_glue import command as glue_command
from modernalbert.run_ner import command as ner_command
from modernalbert.run_squad import command as squad_command


KIND = "SequenceClassification"
GOOD, BAD = "A delight from start to end .", "Dull and far too long ."


def checkpoint(*labels, architecture="BertForSequenceClassification", is_multi_label=False, has_weights=True):
    return Checkpoint("m", labels, (architecture,), is_multi_label, has_weights)


@pytest.mark.parametrize(
    "known, labels, matched",
    [
        (("a", "b"), ("a", "b"), ("a", "b")),
        (("b", "a"), ("a", "b"), ("b", "a")),
        (("POSITIVE", "NEGATIVE"), ("negative", "positive"), ("positive", "negative")),
        ((" Yes", "No"), ("no", "yes"), ("yes", "no")),
        (("LABEL_0", "LABEL_1"), ("0", "1"), ("0", "1")),
        (("LABEL_1", "LABEL_0"), ("0", "1"), ("1", "0")),
        (("LABEL_0",), (), ()),
    ],
)
def test_labels_are_matched_by_name(known, labels, matched, caplog):
    for training in (False, True):
        assert match_labels(checkpoint(*known), labels, KIND, training) == (matched, True)
    assert not caplog.records
    # without a head, the order stands and the weights are new
    masked = checkpoint(*known, architecture="BertForMaskedLM")
    assert match_labels(masked, labels, KIND, training=True) == (matched, False)


@pytest.mark.parametrize(
    "head, labels, message",
    [
        (checkpoint("a", "b"), ("c", "d"), "m predicts the labels a, b, and the task has the labels c, d"),
        (checkpoint("LABEL_0", "LABEL_1"), ("negative", "positive"), "name its labels in its config.json .id2label."),
        (checkpoint("1", "2"), ("0", "1"), "the labels 1, 2, and the task has the labels 0, 1"),
        (checkpoint("a", "A"), ("a", "b"), "the labels a, A"),
        (checkpoint("a"), ("a", "b"), "m predicts one number, and the task has the labels a, b"),
        (checkpoint("a", "b"), (), "the labels a, b, and the task predicts one number"),
        (checkpoint("a", "b", is_multi_label=True), ("a", "b"), "several labels at once, out of a, b"),
    ],
)
def test_other_heads_are_refused_without_training_and_new_with_it(head, labels, message, caplog):
    with pytest.raises(UserError, match=message):
        match_labels(head, labels, KIND, training=False)
    assert match_labels(head, labels, KIND, training=True) == (labels, False)
    assert "training starts with a new head" in caplog.text


def test_more_labels_than_the_rows_have_serve_an_evaluation_but_not_a_training(caplog):
    head = checkpoint("c", "B", "a")
    assert match_labels(head, ("a", "b"), KIND, training=False) == (("c", "b", "a"), True)
    assert match_labels(head, ("a", "b"), KIND, training=True) == (("a", "b"), False)
    for other in (checkpoint("a", "b", architecture="BertForMaskedLM"), checkpoint("a", "b", has_weights=False)):
        with pytest.raises(UserError, match="--no_do_train needs a model with a head for the task"):
            match_labels(other, ("a", "b"), KIND, training=False)


# --- scripts ---------------------------------------------------------------------------------------------------------


def save(model, names, folder, tokenizer):
    """The model with the names of its labels."""
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file, labels):
    rows = [{"text": text, "label": label} for text, label in zip([GOOD, BAD] * 4, labels * 4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(command, entry_point, folder, tmp_path, *more):
    quick = ["--disable_tqdm", "true", "--save_strategy", "no", "--max_steps", 1, "--learning_rate", "1e-9"]
    words = ["--model_name_or_path", folder, "--output_dir", tmp_path / "out", "--overwrite_output_dir"]
    return command(entry_point, *words, *quick, *more)


@pytest.fixture
def judge(nano_tokenizer):
    """A classifier that calls one of two texts its first label, the other its second, by whatever names."""
    model = tiny_model(ModernALBERTForSequenceClassification, vocab_size=30522, std=0.1)
    with torch.no_grad():
        logits = torch.cat([model(**nano_tokenizer(text, return_tensors="pt")).logits for text in (GOOD, BAD)])
        scale = 8 / (logits[0] - logits[1])
        model.classifier.weight.mul_(scale[:, None])
        model.classifier.bias.copy_(-scale * (logits.mean(0) - model.classifier.bias))
        model.classifier.weight[1] = -model.classifier.weight[0]
        model.classifier.bias[1] = -model.classifier.bias[0]
        good, bad = (model(**nano_tokenizer(text, return_tensors="pt")).logits[0] for text in (GOOD, BAD))
    assert good[0] > good[1] and bad[0] < bad[1]
    return model


@pytest.mark.parametrize("names", [("POSITIVE", "NEGATIVE"), ("positive", "negative")])
def test_a_classifier_of_other_order_and_case_is_right(command, judge, names, tmp_path, nano_tokenizer):
    folder = save(judge, names, tmp_path / "m", nano_tokenizer)
    rows = write_rows(tmp_path / "rows.jsonl", ["positive", "negative"])
    for task in ([], ["--task_name", "sst2"]):
        if task:
            rows.write_text(rows.read_text().replace('"text"', '"sentence"'))
        files = ["--train_file", rows, "--validation_file", rows]
        for flags in (["--no_do_train"], []):
            code, _, error = run(command, glue_command, folder, tmp_path, *task, *files, *flags)
            assert code == 0, error
            assert json.loads((tmp_path / "out/all_results.json").read_text())["eval_accuracy"] == 1
        assert json.loads((tmp_path / "out/config.json").read_text())["id2label"] == {"0": "positive", "1": "negative"}


def test_rows_follow_the_order_of_a_head(judge, tmp_path, nano_tokenizer):
    folder = save(judge, ("POSITIVE", "negative"), tmp_path / "m", nano_tokenizer)
    known = infer_task(str(write_rows(tmp_path / "rows.jsonl", ["positive", "negative"])))
    turned = task_in_head_order(str(folder), known)
    assert (known.labels, turned.labels) == (("negative", "positive"), ("positive", "negative"))
    rows = load_task_file(str(tmp_path / "rows.jsonl"), known)
    assert relabel(rows, known, turned)["label"] == [0, 1] * 4 and rows["label"] == [1, 0] * 4
    with pytest.raises(UserError, match="predicts the labels POSITIVE, negative, and the task has the labels entail"):
        task_in_head_order(str(folder), GLUE_TASKS["rte"])


def test_a_head_of_other_names_is_not_taken_over(command, judge, tmp_path, nano_tokenizer, caplog):
    folder = save(judge, ("entailment", "not_entailment"), tmp_path / "m", nano_tokenizer)
    rows = write_rows(tmp_path / "rows.jsonl", ["positive", "negative"])
    files = ["--train_file", rows, "--validation_file", rows]
    code, _, error = run(command, glue_command, folder, tmp_path, *files, "--no_do_train")
    assert code == 2 and "predicts the labels entailment, not_entailment" in error
    code, _, error = run(command, glue_command, folder, tmp_path, *files)
    assert code == 0, error
    assert "training starts with a new head" in caplog.text
    old, new = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    torch.testing.assert_close(new["head.dense.weight"], old["head.dense.weight"], atol=1e-6, rtol=0)
    difference = (new["classifier.weight"] - old["classifier.weight"]).abs().max()
    assert difference > 1e-3 and new["classifier.weight"].std() < 0.2  # drawn anew


def test_heads_of_other_kinds_are_not_taken_over(command, judge, tmp_path, nano_tokenizer):
    """A classifier of two labels has a layer of the size that a start and an end need."""
    write_squad(tmp_path / "squad.json")
    folder = save(judge, ("a", "b"), tmp_path / "m", nano_tokenizer)
    options = ["--train_file", tmp_path / "squad.json", "--validation_file", tmp_path / "squad.json"]
    options += ["--max_seq_length", 48, "--doc_stride", 16, "--max_train_samples", 4, "--max_eval_samples", 2]
    code, _, error = run(command, squad_command, folder, tmp_path, *options)
    assert code == 0, error
    old, new = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert (new["classifier.weight"] - old["classifier.weight"]).abs().max() > 1e-3
    assert "id2label" not in json.loads((tmp_path / "out/config.json").read_text())
    code, _, error = run(command, squad_command, folder, tmp_path / "2", *options, "--no_do_train")
    assert code == 2 and "a head for question answering" in error and "ForSequenceClassification" in error
    # the same kind of head goes on where it was
    reader = tiny_model(ModernALBERTForQuestionAnswering, vocab_size=30522)
    reader.save_pretrained(tmp_path / "reader")
    nano_tokenizer.save_pretrained(tmp_path / "reader")
    code, _, error = run(command, squad_command, tmp_path / "reader", tmp_path, *options)
    assert code == 0, error
    old, new = (load_file(place / "model.safetensors") for place in (tmp_path / "reader", tmp_path / "out"))
    torch.testing.assert_close(new["classifier.weight"], old["classifier.weight"], atol=1e-5, rtol=0)


def test_tags_are_matched_by_name(command, tmp_path, nano_tokenizer, caplog):
    model = tiny_model(ModernALBERTForTokenClassification, vocab_size=30522, num_labels=3)
    (tmp_path / "a.conll").write_text("Anna B-per\nLee I-per\nmet O\n\n" * 4)
    files = ["--train_file", tmp_path / "a.conll", "--validation_file", tmp_path / "a.conll"]
    folder = save(model, ("I-PER", "O", "B-PER"), tmp_path / "m", nano_tokenizer)
    predicted = {}
    for flags in (["--no_do_train"], []):
        code, _, error = run(command, ner_command, folder, tmp_path, *files, *flags)
        assert code == 0, error
        predicted[bool(flags)] = (tmp_path / "out/predictions_validation.conll").read_text()
    assert predicted[True] == predicted[False] and "does not know" not in caplog.text
    names = json.loads((tmp_path / "out/config.json").read_text())["id2label"]
    assert names == {"0": "I-per", "1": "O", "2": "B-per"}
    words = [["Anna", "Lee", "met"]]
    logits = model(**nano_tokenizer(words, is_split_into_words=True, return_tensors="pt")).logits[0, 1:4]
    ours = [line.split()[2] for line in predicted[True].split("\n\n")[0].split("\n")]
    assert ours == [names[str(int(label))] for label in logits.argmax(-1)]
    folder = save(model, ("LABEL_0", "LABEL_1", "LABEL_2"), tmp_path / "unnamed", nano_tokenizer)
    code, _, error = run(command, ner_command, folder, tmp_path, *files, "--no_do_train")
    assert code == 2 and "--no_do_train needs a model with a head for tags" in error
    code, _, error = run(command, ner_command, folder, tmp_path, *files)
    assert code == 0 and "training starts with a new head" in caplog.text, error


def test_heads_of_other_encoders_are_drawn_anew(command, tmp_path, nano_tokenizer):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    folder = save(BertForSequenceClassification(config), ("a", "b"), tmp_path / "bert", nano_tokenizer)
    rows = write_rows(tmp_path / "rows.jsonl", ["positive", "negative"])
    code, _, error = run(command, glue_command, folder, tmp_path, "--train_file", rows, "--validation_file", rows)
    assert code == 0, error
    old, new = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert (new["classifier.weight"] - old["classifier.weight"]).abs().max() > 1e-3
    torch.testing.assert_close(new["bert.pooler.dense.weight"], old["bert.pooler.dense.weight"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("architecture, part", [("modernalbert", "head.dense.weight"), ("bert", "pooler.dense.weight")])
def test_a_head_without_its_weights_is_refused(command, judge, tmp_path, nano_tokenizer, architecture, part):
    if architecture == "bert":  # whose pooler is of the head here, though other models do without
        config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        judge = BertForSequenceClassification(config)
    folder = save(judge, ("negative", "positive"), tmp_path / "m", nano_tokenizer)
    weights = {name: value for name, value in judge.state_dict().items() if not name.endswith(part)}
    judge.save_pretrained(folder, state_dict=weights)
    rows = write_rows(tmp_path / "rows.jsonl", ["positive", "negative"])
    code, _, error = run(command, glue_command, folder, tmp_path, "--validation_file", rows, "--no_do_train")
    assert code == 2 and "lacks weights" in error and part in error


def test_labels_that_are_numbers_in_a_configuration_are_names(command, judge, tmp_path, nano_tokenizer):
    folder = save(judge, (1, 0), tmp_path / "m", nano_tokenizer)
    rows = write_rows(tmp_path / "rows.jsonl", ["1", 0])
    code, _, error = run(command, glue_command, folder, tmp_path, "--train_file", rows, "--validation_file", rows)
    assert code == 0, error
    assert json.loads((tmp_path / "out/all_results.json").read_text())["eval_accuracy"] == 1
