# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Every form of a label, compressed rows, and files that were cut short."""

import gzip
import json
import lzma

import pandas as pd
import pytest

from modernalbert.cli.errors import UserError
from modernalbert.data.conll import read_sentences
from modernalbert.data.corpus import check_text_file, load_texts
from modernalbert.data.glue_tasks import GLUE_TASKS
from modernalbert.data.sentences import infer_task, load_task_file
from modernalbert.data.tables import read_rows
from modernalbert.data.text_files import check_whole


def write(file, labels):
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(
    "labels, names, ids",
    [
        ([1, 0, 1], ("0", "1"), [1, 0, 1]),
        (["1", "0", "1"], ("0", "1"), [1, 0, 1]),
        ([1.0, 0.0, "1.0"], ("0", "1"), [1, 0, 1]),
        ([True, False, 1], ("0", "1"), [1, 0, 1]),
        ([1, 2, "2"], ("1", "2"), [0, 1, 1]),
        ([-1, 1, 1], ("-1", "1"), [0, 1, 1]),
        (["yes", "no", "Yes", " yes "], ("no", "yes"), [1, 0, 1, 1]),
        ([10, 9, 100], ("9", "10", "100"), [1, 0, 2]),
        ([1, "one", 1], ("1", "one"), [0, 1, 0]),
        (["007", "7", 7], ("007", "7"), [0, 1, 1]),
        (["1_2", "12", "1_2"], ("12", "1_2"), [1, 0, 1]),
        (["1e1", "10", "+10", ".0", "0"], ("0", "10"), [1, 1, 1, 0, 0]),
    ],
)
def test_forms_of_labels(tmp_path, labels, names, ids):
    file = write(tmp_path / "a.jsonl", labels)
    task = infer_task(file)
    assert task.labels == names
    for with_labels in (True, False):
        assert load_task_file(file, task, with_labels)["label"] == ids
    if bool not in map(type, labels):  # as text a boolean is a name
        rows = pd.DataFrame({"text": ["t"] * len(ids), "label": [str(label) for label in labels]})
        rows.to_csv(tmp_path / "a.csv", index=False)
        for known in (task, infer_task(str(tmp_path / "a.csv"))):
            assert known.labels == names and load_task_file(str(tmp_path / "a.csv"), known)["label"] == ids


@pytest.mark.parametrize(
    "labels, message",
    [
        (["a", ["a", "b"]], r"line 2: the label \['a', 'b'\] is not allowed: a row must have one label"),
        ([[1, 0], [0, 1]], r"line 1: the label \[1, 0\] is not allowed"),
        ([{"a": 1}, 2], "line 1: the label {'a': 1} is not allowed"),
        ([1, None], "line 2: no value in column 'label'"),
        (["a", "  "], "line 2: no value in column 'label'"),
        ([0.5, "n/a", 1.5], "line 2: the label 'n/a' is not allowed: the column 'label' holds numbers with fractions"),
        ([0.5, float("inf")], "line 2: the label inf is not allowed"),
        (["yes", "YES"], "holds one label only, 'yes'"),
    ],
)
def test_what_is_no_label_is_named_with_its_line(tmp_path, labels, message):
    with pytest.raises(UserError, match=message):
        infer_task(write(tmp_path / "a.jsonl", labels))


def test_labels_of_other_files_must_be_the_tasks(tmp_path, caplog):
    task = infer_task(write(tmp_path / "train.jsonl", ["yes", "no"]))
    for with_labels in (True, False):
        with pytest.raises(UserError, match="line 2: the label 'maybe' is not allowed: it must be one of no, yes"):
            load_task_file(write(tmp_path / "a.jsonl", ["NO", "maybe"]), task, with_labels)
    numbers = infer_task(write(tmp_path / "train.jsonl", [0, 1]))
    with pytest.raises(UserError, match="line 2: the label 2 is not allowed: it must be one of 0, 1"):
        load_task_file(write(tmp_path / "a.jsonl", [1, 2]), numbers)
    named = GLUE_TASKS["sst2"]
    rows = [{"sentence": "a", "label": label} for label in ("Negative", "POSITIVE", 0, "1")]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_task_file(str(tmp_path / "b.jsonl"), named)["label"] == [0, 1, 0, 1]
    # A test file may have labels in every row, in none, or in some, which is said.
    assert load_task_file(write(tmp_path / "a.jsonl", [-1, None]), task, with_labels=False).column_names == ["text"]
    assert "label" not in load_task_file(write(tmp_path / "a.jsonl", ["no", None]), task, False).column_names
    assert "1 of 2 rows have a label: they are predicted without metrics" in caplog.text


def test_minus_one_is_a_number_of_a_regression_but_no_score_where_all_are(tmp_path):
    task = infer_task(write(tmp_path / "train.jsonl", [0.5, -1, 2]))
    assert task.is_regression
    test = load_task_file(write(tmp_path / "a.jsonl", [-1, 0.25]), task, with_labels=False)
    assert test["label"] == [-1, 0.25]
    assert load_task_file(write(tmp_path / "a.jsonl", [-1, -1]), task, False).column_names == ["text"]


def test_lists_in_parquet_are_lists(tmp_path):
    pd.DataFrame({"text": ["a", "b"], "label": [[1, 0], [0, 1]]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 0: the label \[1, 0\] is not allowed"):
        infer_task(str(tmp_path / "a.parquet"))
    pd.DataFrame({"tokens": [["Ann", "met"]], "ner_tags": [["B-P", "O"]]}).to_parquet(tmp_path / "b.parquet")
    assert read_sentences(str(tmp_path / "b.parquet"), None, None)[0]["tags"] == ["B-P", "O"]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"tokens": ["a"], "ner_tags": [3]}, "the tag 3 is not allowed: it must be O, or B-"),
        ({"tokens": ["a"], "ner_tags": [None]}, "the tag None is not allowed"),
        ({"tokens": ["a"], "ner_tags": [True]}, "the tag True is not allowed"),
        ({"tokens": ["a"], "ner_tags": ["person"]}, "the tag 'person' is not allowed"),
        ({"tokens": ["a"], "ner_tags": None}, "column 'ner_tags' must hold a list, not None"),
        ({"tokens": ["a"], "ner_tags": "O"}, "column 'ner_tags' must hold a list, not 'O'"),
        ({"tokens": [None], "ner_tags": ["O"]}, "column 'tokens' must hold a list of words"),
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "2 words and 1 tags"),
    ],
)
def test_what_is_no_tag_is_named_with_its_line(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text('{"tokens": ["b"], "ner_tags": ["O"]}\n' + json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        read_sentences(str(tmp_path / "a.jsonl"), None, None)
    assert f"a.jsonl, line 2: {message}" in str(caught.value)


# --- compressed and cut short ----------------------------------------------------------------------------------------


ROWS = "".join(json.dumps({"text": f"{i} " + "some words of a text " * 20, "label": i % 2}) + "\n" for i in range(3000))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same rows in every form, and beside each a copy that was cut off."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.jsonl").write_text(ROWS)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(ROWS.encode(), 1))
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(ROWS.encode(), preset=0))
    pd.DataFrame(map(json.loads, ROWS.splitlines())).to_parquet(folder / "a.parquet")
    for file in list(folder.iterdir()):
        content = file.read_bytes()
        (folder / f"cut{file.name.removeprefix('a')}").write_bytes(content[: 2 * len(content) // 3 + 5])
    return folder


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet"])
def test_rows_are_read_from_every_form_and_cut_files_are_named(files, suffix):
    whole, cut = files / f"a{suffix}", files / f"cut{suffix}"
    assert len(read_rows(str(whole))) == 3000
    check_text_file(whole)
    for streaming in (False, True):
        texts = load_texts([str(whole)], "text", streaming=streaming)
        assert sum(1 for _ in texts) == 3000
    for read in (check_whole, check_text_file, lambda file: read_rows(str(file))):
        with pytest.raises(UserError, match=f"{cut}.*(cut short|line \\d+, column|cannot be read)"):
            read(cut)


def test_other_forms_of_json_are_whole(tmp_path):
    for name, content in {
        "array.json": '[{"text": "a"},\n {"text": "b"\n}]\n',
        "object.json": '{"text":\n "a"}\n',
        "one.jsonl": '\ufeff{"text": "a"}',
        "blank.jsonl": "\n \n",
    }.items():
        (tmp_path / name).write_text(content)
        check_whole(tmp_path / name)
    (tmp_path / "a.conll.gz").write_bytes(gzip.compress(b"Ann B-P\nmet O\n"))
    assert read_sentences(str(tmp_path / "a.conll.gz"), None, None)[0]["words"] == ["Ann", "met"]


def test_unknown_and_doubly_packed_kinds_are_refused(tmp_path):
    for name in ("a.zip", "a.parquet.gz", "a.jsonl.bz2"):
        (tmp_path / name).write_bytes(b"x")
        for read in (check_text_file, lambda file: read_rows(str(file))):
            with pytest.raises(UserError, match="must be one of|it must end in"):
                read(tmp_path / name)
