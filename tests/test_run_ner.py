# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The entity script: spans are counted right, words keep their place, and files are read or refused with their line."""

import json
import random
import re

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from launches import run_torchrun
from small_models import REPOSITORY, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

from modernalbert import ModernALBERTForMaskedLM
from modernalbert.cli.errors import UserError
from modernalbert.data.conll import in_scheme, read_sentences
from modernalbert.data.entity_tags import is_iob1, labels_of, spans_of, tags_of
from modernalbert.data.word_windows import (
    NO_LABEL,
    by_sentence,
    encode_sentences,
    tokens_of_words,
    window_of_word,
    windows_of,
)
from modernalbert.evaluation.ner import span_metrics
from modernalbert.run_ner import command as ner_command


# --- spans -----------------------------------------------------------------------------------------------------------


def own_spans(tags):
    """CoNLL's reading, written once more: a span goes on if the tag says inside and nothing has ended."""
    spans, open_since = set(), None
    for i, (before, tag) in enumerate(zip(["O", *tags], [*tags, "O"])):
        goes_on = before != "O" and tag[:2] in ("I-", "E-") and before[2:] == tag[2:] and before[:2] not in ("E-", "S-")
        if open_since is not None and not goes_on:
            spans.add((before[2:], open_since, i - 1))
            open_since = None
        if tag != "O" and not goes_on:
            open_since = i
    return spans


def own_metrics(gold, predicted):
    found = {name: {} for name in ("gold", "predicted", "right")}
    for number, (a, b) in enumerate(zip(gold, predicted)):
        a, b = own_spans(a), own_spans(b)
        for name, spans in (("gold", a), ("predicted", b), ("right", a & b)):
            for kind, *place in spans:
                found[name].setdefault(kind, []).append((number, *place))
    metrics = {}
    for kind in {*found["gold"], *found["predicted"], None}:
        g, p, r = (
            sum(len(places) for k, places in found[name].items() if kind in (None, k))
            for name in ("gold", "predicted", "right")
        )
        precision, recall = r / p if p else 0.0, r / g if g else 0.0
        f1 = 2 * r / (g + p) if g + p else 0.0
        for name, value in (("precision", precision), ("recall", recall), ("f1", f1)):
            metrics[name if kind is None else f"{kind}_{name}"] = value
        if kind is not None:
            metrics[f"{kind}_entities"] = g
    return metrics


def test_span_metrics_against_an_extractor_of_our_own():
    draw = random.Random(0)
    for prefixes in ("BI", "BIES", "I", "IES"):
        tags = ["O", "O"] + [f"{prefix}-{kind}" for prefix in prefixes for kind in ("X", "YY", "X-Z")]
        for _ in range(60):
            lengths = [draw.randint(1, 9) for _ in range(draw.randint(1, 6))]
            gold, predicted = ([[draw.choice(tags) for _ in range(n)] for n in lengths] for _ in range(2))
            for sentence in gold:
                assert set(spans_of(sentence)) == own_spans(sentence)
            if draw.random() < 0.5:
                predicted = [[a if draw.random() < 0.7 else b for a, b in zip(*pair)] for pair in zip(gold, predicted)]
            found = span_metrics(gold, predicted)
            right = [a == b for pair in zip(gold, predicted) for a, b in zip(*pair)]
            assert found.pop("accuracy") == pytest.approx(sum(right) / len(right))
            assert found == pytest.approx(own_metrics(gold, predicted))


def test_span_metrics_of_nothing_and_of_one_type():
    nothing = {"f1": 0.0, "precision": 0.0, "recall": 0.0}
    assert span_metrics([["O", "O"]], [["O", "O"]]) == nothing | {"accuracy": 1.0}
    missed = span_metrics([["B-X", "I-X", "O"]], [["O", "O", "O"]])
    assert missed["f1"] == 0.0 and missed["X_entities"] == 1 and missed["accuracy"] == pytest.approx(1 / 3)
    invented = span_metrics([["O"]], [["B-Y"]])
    assert invented["precision"] == 0.0 and invented["Y_entities"] == 0
    # the end is part of it
    assert span_metrics([["B-X", "I-X"]], [["B-X", "O"]])["f1"] == 0.0


def test_every_scheme_says_the_same_spans(caplog):
    draw = random.Random(1)
    for _ in range(60):
        length, spans, at = draw.randint(1, 10), [], 0
        while at < length:
            size = draw.randint(1, 3)
            if draw.random() < 0.6 and at + size <= length:
                spans.append((draw.choice("XY"), at, at + size - 1))
            at += size
        for scheme in ("IOB2", "IOBES"):
            assert spans_of(tags_of(spans, length, scheme)) == spans
            assert set(tags_of(spans, length, scheme)) <= set(labels_of("XY", scheme))
            assert not is_iob1([tags_of(spans, length, scheme)])
        iob1 = tags_of(spans, length, "IOB2")
        for kind, first, _ in spans:
            if (kind, first - 1) not in [(other, last) for other, _, last in spans]:
                iob1[first] = f"I-{kind}"
        assert spans_of(iob1) == spans and is_iob1([iob1]) == bool(spans)
        data = Dataset.from_list([{"words": ["w"] * length, "tags": iob1, "place": "f, line 1"}])
        assert in_scheme(data, "IOBES", "f")["tags"][0] == tags_of(spans, length, "IOBES")
    assert "f: the tags are IOB1, where B- only parts neighbours: read as IOBES." in caplog.text


# --- files -----------------------------------------------------------------------------------------------------------


def test_every_form_of_file_gives_the_same_sentences(tmp_path):
    words, tags = [["Ann", "left"], ["Rome"]], [["B-PER", "O"], ["B-LOC"]]
    (tmp_path / "a.conll").write_text(
        "-DOCSTART- -X- O\n\nAnn NN B-PER\nleft VB O\n\n\n-DOCSTART- -X- O\nRome  NN  B-LOC"
    )
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbfAnn\tB-PER\r\nleft\tO\r\n\r\nRome\tB-LOC\r\n\r\n")
    (tmp_path / "turned.txt").write_text("B-PER Ann\nO left\n\nB-LOC Rome\n")
    rows = [{"tokens": w, "ner_tags": t} for w, t in zip(words, tags)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for name, columns in {
        "a.conll": (None, None),
        "a.tsv": (None, None),
        "turned.txt": ("1", "0"),
        "a.jsonl": (None, None),
        "a.json": (None, None),
        "a.parquet": (None, None),
    }.items():
        found = read_sentences(str(tmp_path / name), *columns)
        assert found["words"][:] == words and found["tags"][:] == tags, name
    assert read_sentences(str(tmp_path / "a.conll"), None, None)["place"][1].endswith("a.conll, line 8")
    # words that are no words to Python
    (tmp_path / "odd.conll").write_text("\u00a0 O\n# O\nNew York\tB-LOC\n".replace(" O", "\tO"))
    assert read_sentences(str(tmp_path / "odd.conll"), None, None)["words"][0] == ["\u00a0", "#", "New York"]


def test_a_test_file_may_lack_tags(tmp_path):
    (tmp_path / "a.conll").write_text("Ann\nleft\n")
    (tmp_path / "a.jsonl").write_text('{"tokens": ["Ann"]}\n{"tokens": []}\n')
    for name in ("a.conll", "a.jsonl"):
        assert read_sentences(str(tmp_path / name), None, None, with_tags=False).column_names == ["words", "place"]
        with pytest.raises(UserError, match="no column"):
            read_sentences(str(tmp_path / name), None, None)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("none.conll", None, "none.conll: no such file"),
        ("a.csv", "Ann,B-PER\n", "a.csv: the file type '.csv' is not allowed: write words and tags in lines"),
        ("a.conll", "\n\n-DOCSTART- O\n", "a.conll: holds no sentences"),
        ("a.conll", "Ann NN O\nleft O\n", "a.conll, line 2: 2 columns instead of the 3 of line 1"),
        ("a.conll", "\nAnn O\n\nleft VB O\n", "a.conll, line 4: 3 columns instead of the 2 of line 2"),
        ("a.conll", "Ann O\nleft VB\n", "a.conll, line 2: the tag 'VB' is not allowed: it must be O, or B-"),
        ("a.conll", "Ann B-\n", "line 1: the tag 'B-' is not allowed"),
        ("a.conll", b"Ann \xff\n", "not UTF-8 text (byte 4)"),
        ("a.jsonl", '{"tokens": ["a"], "ner_tags": [3]}', "line 1: the tag 3 is not allowed"),
        ("a.jsonl", '{"tokens": ["a", "b"], "ner_tags": ["O"]}', "line 1: 2 words and 1 tags"),
        ("a.jsonl", '{"tokens": "a b", "ner_tags": ["O"]}', "column 'tokens' must hold a list, not 'a b'"),
        ("a.jsonl", '{"tokens": [1], "ner_tags": ["O"]}', "column 'tokens' must hold a list of words"),
        ("a.jsonl", '{"words": ["a"], "ner_tags": ["O"]}', "no column 'tokens'; there are words, ner_tags (see --text"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_sentences(str(tmp_path / name), None, None)
    assert said in str(caught.value), str(caught.value)


def test_wrong_columns_of_lines(tmp_path):
    (tmp_path / "a.conll").write_text("Ann O\n")
    for columns, said in (
        (("2", None), "line 1: no column 2, there are 2 .see --text_column"),
        ((None, "5"), "line 1: no column of tags among 2 .see --label_column"),
        (("tokens", None), "--text_column tokens is not allowed"),
    ):
        with pytest.raises(UserError, match=said):
            read_sentences(str(tmp_path / "a.conll"), *columns)


# --- words and windows -----------------------------------------------------------------------------------------------


def byte_level_tokenizer():
    """In the manner of ModernBERT's: a space is part of the token behind it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=backend.pre_tokenizer.alphabet()
    )
    backend.train_from_iterator(["the river runs", "a river and the sea"] * 20, trainer)
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $0 [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = dict(zip(("unk_token", "cls_token", "sep_token", "pad_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_tokens_are_given_to_their_words(nano_tokenizer):
    words = ["Unbelievable", ",", "don't", "\u200b", "Zürich-bound", "!?", "東京", "New York"]
    tokens = tokens_of_words(nano_tokenizer, words)
    for word, ids in zip(words, tokens):
        alone = nano_tokenizer(word, add_special_tokens=False)["input_ids"]
        assert ids == (alone or [nano_tokenizer.unk_token_id]), word
    tokenizer = byte_level_tokenizer()
    words = ["the", "river", "é", "", "sea"]
    tokens = tokens_of_words(tokenizer, words)
    whole = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    assert all(tokens) and [token for ids in tokens for token in ids] == whole
    assert [tokenizer.decode(ids) for ids in tokens] == ["the", " river", " é", " ", " sea"]


def test_windows_hold_every_word_and_overlap():
    draw = random.Random(0)
    for _ in range(500):
        capacity = draw.randint(1, 12)
        overlap = draw.randint(0, capacity - 1)
        lengths = [draw.randint(1, min(5, capacity)) for _ in range(draw.randint(1, 30))]
        windows = windows_of(lengths, capacity, overlap)
        assert sorted({word for window in windows for word in window}) == list(range(len(lengths)))
        for window, following in zip(windows, windows[1:]):
            assert following.stop > window.stop and following.start > window.start
            repeated = sum(lengths[following.start : window.stop])
            assert repeated <= overlap
            # no more could have been repeated, or the next word had no room
            assert repeated + lengths[following.start - 1] > min(overlap, capacity - lengths[window.stop])
        assert all(sum(lengths[word] for word in window) <= capacity for window in windows)
    windows = windows_of([1] * 10, 6, 3)
    assert windows == [range(0, 6), range(3, 9), range(6, 10)]
    assert [window_of_word(windows, word, 10) for word in range(10)] == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]


def test_each_word_is_labelled_once_at_its_first_token(nano_tokenizer, caplog):
    words = [
        ["Unbelievable", "things", "happened", "in", "Zürich", "yesterday"] * 4,
        ["Fine"],
        ["antidisestablishmentarianism" * 3, "ok"],
    ]
    tags = [["B-A", "I-A", "O", "O", "B-B", "O"] * 4, ["B-C"], ["O", "B-A"]]
    sentences = Dataset.from_list([{"words": w, "tags": t, "place": ""} for w, t in zip(words, tags)])
    labels = ("O", "B-A", "I-A", "B-B", "I-B")
    rows = encode_sentences(sentences, nano_tokenizer, labels, max_length=16, overlap=4)
    assert len(rows) >= 5 and max(map(len, rows["input_ids"])) <= 16
    assert "1 words are longer than a window of 16 tokens, and cut: antidis" in caplog.text
    assert sum(word >= 0 for row in rows["words"] for word in row) == sum(map(len, words))
    shuffled = rows.shuffle(seed=0)
    assert by_sentence(shuffled, shuffled["tags"]) == tags
    # the values of padding are not looked at
    padded = [[*ids, -1, -1] for ids in shuffled["labels"]]
    ids = [[labels.index(tag) if tag in labels else NO_LABEL for tag in sentence] for sentence in tags]
    assert by_sentence(shuffled, padded) == ids
    for row in rows:
        assert (
            row["input_ids"][0] == nano_tokenizer.cls_token_id and row["input_ids"][-1] == nano_tokenizer.sep_token_id
        )
        for place, word in enumerate(row["words"]):
            if word >= 0:
                text = words[row["sentence"]][word]
                assert row["input_ids"][place] == nano_tokenizer(text, add_special_tokens=False)["input_ids"][0]
            else:
                assert row["labels"][place] == NO_LABEL and row["tags"][place] == ""


# --- runs ------------------------------------------------------------------------------------------------------------


def make_sentences(count, seed):
    """Sentences in which a name is a person, a city a place; every fourth is longer than the tests' window."""
    draw, sentences = random.Random(seed), []
    for i in range(count):
        words, tags = [], []
        for _ in range(8 if i % 4 == 0 else 1):
            person = draw.choice(("Anna Smith", "Peter Novak", "Maria"))
            city = draw.choice(("Paris", "New York", "Rome"))
            for text, kind in ((person, "PER"), ("went to", None), (city, "LOC"), (".", None)):
                parts = text.split()
                words += parts
                tags += ["O"] * len(parts) if kind is None else [f"B-{kind}"] + [f"I-{kind}"] * (len(parts) - 1)
        sentences.append((words, tags))
    return sentences


def write_conll(file, sentences, tagged=True):
    lines = ["\n".join(f"{w} NN {t}" if tagged else w for w, t in zip(words, tags)) + "\n" for words, tags in sentences]
    file.write_text("-DOCSTART- -X- O\n\n".replace("-X- O", "-X- O" if tagged else "") + "\n".join(lines))


@pytest.fixture
def place(tmp_path, nano_tokenizer):
    """A small model with nano's vocabulary, and files of tagged words."""
    tiny_model(ModernALBERTForMaskedLM, vocab_size=30522, std=0.1).save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    write_conll(tmp_path / "train.conll", make_sentences(32, 0))
    write_conll(tmp_path / "validation.conll", make_sentences(12, 1))
    write_conll(tmp_path / "test.conll", make_sentences(6, 2), tagged=False)
    return tmp_path


def options(place, *more):
    given = {str(argument) for argument in more}
    defaults = {
        "--model_name_or_path": place / "model",
        "--train_file": place / "train.conll",
        "--validation_file": place / "validation.conll",
        "--output_dir": place / "out",
        "--max_seq_length": 24,
        "--num_train_epochs": 1,
        "--per_device_train_batch_size": 8,
        "--disable_tqdm": "true",
    }
    if "--dataset_name" in given:
        del defaults["--train_file"], defaults["--validation_file"]
    return [str(word) for flag, value in defaults.items() if flag not in given for word in (flag, value)] + [
        str(word) for word in more
    ]


def ner(command, place, *more):
    return command(ner_command, *options(place, *more))


def written(file):
    """Columns of a predictions file by sentence."""
    return [[line.split(" ") for line in block.split("\n")] for block in file.read_text().strip().split("\n\n")]


def test_fine_tune_predict_and_merge(command, place, caplog):
    arguments = ["--test_file", place / "test.conll", "--num_train_epochs", 6, "--learning_rate", "1e-2"]
    arguments += ["--merge_after", "calibrated"]
    code, _, error = ner(command, place, *arguments)
    assert code == 0, error
    out = place / "out"
    assert re.search(r"validation.conll: 12 sentences in (1[3-9]|2.) windows of 24 tokens", caplog.text)
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_f1"] > 0.9 and results["merged_f1"] > 0.5
    rows = written(out / "predictions_validation.conll")
    sentences = make_sentences(12, 1)
    assert [[row[0] for row in sentence] for sentence in rows] == [words for words, _ in sentences]
    assert [[row[1] for row in sentence] for sentence in rows] == [tags for _, tags in sentences]
    own = own_metrics(*([[row[i] for row in sentence] for sentence in rows] for i in (1, 2)))
    assert {name: results[f"eval_{name}"] for name in own} == pytest.approx(own)
    untagged = written(out / "predictions_test.conll")
    assert [[row[0] for row in sentence] for sentence in untagged] == [words for words, _ in make_sentences(6, 2)]
    assert {len(row) for sentence in untagged for row in sentence} == {2} and "test_f1" not in results
    config = json.loads((out / "config.json").read_text())
    assert list(config["id2label"].values()) == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    report = json.loads((out / "merged/merge_report.json").read_text())
    assert set(report["metrics"]) == {"routed", "merged"} and report["method"] == "calibrated"
    assert report["measured_on"].endswith("validation rows")

    # the trained model alone, on a table, with its own labels
    rows = [{"words": words, "labels": tags} for words, tags in sentences]
    (place / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model_name_or_path", out, "--no_do_train", "--validation_file", place / "validation.jsonl"]
    arguments += ["--text_column", "words", "--label_column", "labels", "--output_dir", place / "out2"]
    arguments = options(place, *arguments)
    del arguments[arguments.index("--train_file") : arguments.index("--train_file") + 2]
    code, _, error = command(ner_command, *arguments)
    assert code == 0, error
    assert json.loads((place / "out2/all_results.json").read_text())["eval_f1"] == results["eval_f1"]


def test_a_data_set_of_the_hub(command, place):
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
    for split, count in (("train", 12), ("validation", 5)):
        sentences = [*make_sentences(count, count), ([], [])]
        columns = {
            "tokens": [w for w, _ in sentences],
            "ner_tags": [[names.index(t) for t in ts] for _, ts in sentences],
        }
        (place / "set").mkdir(exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(place / "set" / f"{split}-00000-of-00001.parquet")
    code, _, error = ner(command, place, "--dataset_name", place / "set", "--expert_mixing", "ema")
    assert code == 0, error
    rows = written(place / "out/predictions_validation.conll")
    assert [[tuple(row[:2]) for row in sentence] for sentence in rows] == [
        list(zip(words, tags)) for words, tags in make_sentences(5, 5)
    ]
    assert json.loads((place / "out/config.json").read_text())["expert_mixing"] == "ema"
    elsewhere = ["--output_dir", place / "out2"]
    code, _, error = ner(command, place, "--dataset_name", place / "set", "--label_column", "pos", *elsewhere)
    assert code == 2 and "no column 'pos'; there are tokens, ner_tags (see --label_column)" in error


def test_odd_tags_are_counted_and_other_encoders_work(command, place, nano_tokenizer, caplog):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForTokenClassification(config).save_pretrained(place / "bert")
    nano_tokenizer.save_pretrained(place / "bert")
    (place / "validation.conll").write_text("Anna B-PER\nleft O\n\nRome I-LOC\nEurovision B-EVENT\n")
    code, _, error = ner(command, place, "--model_name_or_path", place / "bert")
    assert code == 0, error
    first = f"{place / 'validation.conll'}, line 4"
    assert (
        f"1 of 3 entities begin with I- or E- (the first in the sentence at {first}): read as if with B-" in caplog.text
    )
    assert (
        f"1 entities of types that the model does not know, EVENT (the first in the sentence at {first})" in caplog.text
    )
    results = json.loads((place / "out/all_results.json").read_text())
    assert results["eval_EVENT_entities"] == 1 and results["eval_EVENT_recall"] == 0.0
    assert [row[1] for row in written(place / "out/predictions_validation.conll")[1]] == ["B-LOC", "B-EVENT"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--label_column", "1"], "train.conll, line 3: the tag 'NN' is not allowed"),
        (["--max_seq_length", "2"], "--max_seq_length 2 is not allowed: 0 tokens are left"),
        (["--doc_stride", "22"], "--doc_stride 22 is not allowed: it must be 0 to 21"),
        (["--doc_stride", "-1"], "--doc_stride -1 is not allowed"),
        (["--metric_for_best_model", "bleu"], "it must be one of task, loss, f1, precision, recall, accuracy"),
        (["--no_do_train"], "--no_do_train needs a model with a head for tags"),
        (["--train_file", "{tmp}/plain.conll"], "the training rows hold no entity: all tags are O"),
        (["--dataset_name", "x", "--train_file", "y"], "--dataset_name goes without --train_file"),
        (["--dataset_name", "{tmp}/none"], "none cannot be fetched"),
    ],
)
def test_mistakes_get_one_sentence_and_write_nothing(command, place, arguments, said):
    (place / "plain.conll").write_text("a O\n")
    code, _, error = ner(command, place, *[a.replace("{tmp}", str(place)) for a in arguments])
    assert code == 2 and said in error, error
    assert not (place / "out").exists()


def test_no_data(command, place):
    words = ["--model_name_or_path", place / "model", "--output_dir", place / "out"]
    code, _, error = command(ner_command, *words)
    assert code == 2 and "there is no data" in error


def test_two_processes_predict_what_one_does(command, place):
    # Nothing is learned at this rate, so predictions tell whether words keep their places.
    arguments = ["--learning_rate", 0, "--per_device_eval_batch_size", 3, "--use_cpu", "true"]
    code, _, error = ner(command, place, *arguments, "--output_dir", place / "one")
    assert code == 0, error
    words = options(place, *arguments, "--output_dir", place / "two")
    run_torchrun(place / "logs", REPOSITORY / "run_ner.py", *words)
    one, two = (written(place / run / "predictions_validation.conll") for run in ("one", "two"))
    assert one == two and len({row[2] for sentence in one for row in sentence}) > 1
    one, two = (json.loads((place / run / "all_results.json").read_text()) for run in ("one", "two"))
    assert one["eval_f1"] == two["eval_f1"] and one["eval_loss"] == pytest.approx(two["eval_loss"], rel=0.05)
