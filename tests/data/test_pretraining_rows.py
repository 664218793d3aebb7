# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pretraining data: the prepared corpus, packing, masking, and the order of the rows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from modernalbert.cli.errors import UserError
from modernalbert.data.corpus import TokenizedCorpus, load_texts, prepare_corpus
from modernalbert.data.packing import Masking, PackedRows, StreamedRows, pack, word_continuations


NANO = Path(__file__).parents[2] / "configs" / "nano"
WORDS = "the old house stood quietly beside a winding river where children played unbelievably late".split()


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(3, 30))) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("\n".join(sentences(300)) + "\n\n")
    with open(folder / "b.jsonl", "w") as file:
        for text in [*sentences(100, seed=1), "", " ".join(WORDS * 20)]:
            file.write(json.dumps({"text": text}) + "\n")
    return {"a": [str(folder / "a.txt")], "b": [str(folder / "b.jsonl")]}


@pytest.fixture(scope="module")
def corpus(files, tokenizer, tmp_path_factory):
    return prepare_corpus(files, tokenizer, tmp_path_factory.mktemp("corpus") / "c", max_seq_length=32)


def rows_of(corpus, tokenizer, num_rows=40, probability=0.3, **changes):
    masking = Masking.for_tokenizer(tokenizer, probability)
    return PackedRows(corpus, num_rows, 64, masking, tokenizer.pad_token_id, **changes)


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# --- the corpus


def test_the_corpus_holds_every_token_of_the_text_in_order(corpus, files, tokenizer):
    lines = [line for line in Path(files["a"][0]).read_text().splitlines() if line]
    lines += [json.loads(line)["text"] for line in Path(files["b"][0]).read_text().splitlines()]
    wanted = [i for line in lines for i in tokenizer(line, add_special_tokens=False)["input_ids"]]
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    stored = [int(i) for n in range(len(corpus)) for i in corpus[n] if int(i) not in special]
    assert stored == wanted
    assert corpus.lengths.max() == 32  # the long text was cut, not lost
    assert all(corpus[n][0] == tokenizer.cls_token_id for n in range(len(corpus)))
    assert corpus.num_tokens == sum(len(corpus[n]) for n in range(len(corpus)))
    assert corpus.token_counts(30522).sum() == corpus.num_tokens
    assert np.diff(corpus.bounds).tolist() == [entry["sequences"] for entry in corpus.manifest["sources"].values()]


def test_the_corpus_is_a_datasets_folder_and_opens_again(corpus):
    from datasets import load_from_disk

    assert load_from_disk(str(corpus.folder / "a"))[3]["input_ids"] == corpus[3].tolist()
    assert np.array_equal(TokenizedCorpus(corpus.folder)[350], corpus[350])


def test_a_corpus_with_a_file_cut_short_or_missing_is_refused(corpus, tmp_path):
    folder = shutil.copytree(corpus.folder, tmp_path / "corpus")
    *_, source = corpus.sources
    (file,) = (folder / source).glob("*.arrow")
    whole = file.read_bytes()
    for size in (0, 100, len(whole) * 2 // 3, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"{source}.*arrow: the file is cut short or damaged"):
            TokenizedCorpus(folder)
    file.unlink()
    with pytest.raises(UserError, match=f"{source}: 0 sequences where corpus.json counts"):
        TokenizedCorpus(folder)


def test_another_vocabulary_other_files_or_longer_sequences_are_refused(corpus, files, tokenizer, tmp_path):
    other = AutoTokenizer.from_pretrained(NANO)
    other.add_tokens(["unheardofword"])
    with pytest.raises(UserError, match="another tokenizer's vocabulary"):
        corpus.check_tokenizer(other)
    corpus.check_inputs(files["a"] + files["b"], 32)
    corpus.check_inputs([], 32)
    for length in (16, 64):
        with pytest.raises(UserError, match=f"sequences of up to 32 tokens, max_seq_length is {length}"):
            corpus.check_inputs([], length)
    for sources in (files["a"], files["b"] + files["a"]):  # weights would go to the wrong source
        with pytest.raises(UserError, match="prepared from other files"):
            corpus.check_inputs(sources, 32)
    with pytest.raises(UserError, match="has sequences of 32 tokens, a row has 31"):
        PackedRows(corpus, 1, 31, Masking.for_tokenizer(tokenizer), 0)
    (tmp_path / "new.txt").write_text("Another text.\n")
    with pytest.raises(UserError, match="prepared from other files"):
        corpus.check_inputs([str(tmp_path / "new.txt")], 32)
    path = Path(files["a"][0])
    changed = tmp_path / path.name
    changed.write_bytes(path.read_bytes().swapcase())  # another text of the same name and size
    with pytest.raises(UserError, match="prepared from other files"):
        corpus.check_inputs([str(changed), *files["a"][1:], *files["b"]], 32)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b"ab\0cd", "a.txt: the file is binary"),
        ("a.txt", b"abc \xff\xfe abcdefgh", "a.txt: the file is not UTF-8 text \\(byte 4\\)"),
        ("a.txt", b"\n \n\n", "there is no text in it"),
        ("a.bin", b"abc", "a.bin: it must end in .txt, .json, .jsonl, .parquet"),
        ("a.jsonl", b'{"body": "x"}\n', "there is no column 'text'; columns: body"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl: "),
        ("a.jsonl", b'{"text": 5}\n{"text": 7}\n', "a.jsonl: (the column 'text' holds|there is) no text"),
        ("missing.txt", None, "missing.txt: no such file"),
    ],
)
def test_unusable_text_files(tmp_path, tokenizer, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare_corpus({"a": [str(file)]}, tokenizer, tmp_path / "corpus", max_seq_length=16)
    assert not (tmp_path / "corpus").exists()
    with pytest.raises(UserError, match=message.replace("in it", "in its first 1,000 rows")):
        list(load_texts([str(file)], "text", streaming=True))


# --- packing


def test_packing_loses_nothing_and_wastes_little():
    lengths = np.random.default_rng(0).integers(2, 65, 2000)
    rows = pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(2000))
    filled = [int(lengths[row].sum()) for row in rows]
    assert max(filled) <= 64
    assert lengths.sum() / (64 * len(rows)) > 0.98


def test_a_row_restarts_positions_and_ends_in_padding(corpus, tokenizer):
    rows = rows_of(corpus, tokenizer, num_rows=40)
    for number in range(40):
        row, sequences = rows[number], rows.sequences_of(number)
        start = 0
        for index in sequences:
            length = int(corpus.lengths[index])
            assert row["clean_input_ids"][start : start + length].tolist() == corpus[index].tolist()
            assert row["position_ids"][start : start + length].tolist() == list(range(length))
            start += length
        assert row["attention_mask"].tolist() == [1] * start + [0] * (64 - start)
        assert (row["input_ids"][start:] == tokenizer.pad_token_id).all()


def test_every_sequence_comes_once_a_pass(corpus, tokenizer):
    rows = rows_of(corpus, tokenizer, num_rows=10**6)
    seen: list[int] = []
    number = 0
    while len(seen) < 2 * len(corpus):
        seen += rows.sequences_of(number).tolist()
        number += 1
    counts = np.bincount(seen[: 2 * len(corpus)], minlength=len(corpus))
    assert counts.min() == counts.max() == 2
    assert seen[: len(corpus)] != seen[len(corpus) : 2 * len(corpus)]


def test_a_row_depends_on_its_number_and_the_seed_alone(corpus, tokenizer):
    rows = rows_of(corpus, tokenizer, num_rows=200)
    forward = [rows[i] for i in range(200)]
    longer = rows_of(corpus, tokenizer, num_rows=1000)
    for i in (199, 0, 63, 150):
        assert same(longer[i], forward[i])
        assert same(rows_of(corpus, tokenizer, num_rows=200)[i], forward[i])
    assert not same(rows_of(corpus, tokenizer, num_rows=200, seed=1)[5], forward[5])
    with pytest.raises(IndexError):
        rows[200]


def test_source_weights_are_shares_of_tokens(corpus, tokenizer):
    rows = rows_of(corpus, tokenizer, num_rows=600, source_weights=[1.0, 3.0])
    tokens = np.zeros(2)
    for number in range(600):
        for index in rows.sequences_of(number):
            tokens[int(index >= corpus.bounds[1])] += corpus.lengths[index]
    assert tokens[1] / tokens.sum() == pytest.approx(0.75, abs=0.03)


def test_a_stream_gives_rows_of_the_same_kind(files, corpus, tokenizer):
    masking = Masking.for_tokenizer(tokenizer)
    texts = load_texts(files["b"], "text", streaming=True)
    stream = StreamedRows(texts, "text", tokenizer, 32, 64, masking, seed=3)
    first, second = list(stream), list(stream)
    assert len(first) > 5 and all(same(a, b) for a, b in zip(first, second, strict=True))
    streamed = sum(int(row["attention_mask"].sum()) for row in first)
    assert streamed == corpus.lengths[corpus.bounds[1] :].sum()


# --- masking


def test_masked_share_and_what_replaces(tokenizer):
    masking = Masking.for_tokenizer(tokenizer, 0.3)
    ids = np.array([101] + [2000 + i for i in range(1000)] + [102], dtype=np.int32)
    inputs, labels = masking.apply(ids, np.random.default_rng(0))
    chosen = labels != -100
    assert chosen.sum() in (300, 301)
    assert not chosen[0] and not chosen[-1]
    assert np.array_equal(labels[chosen], ids[chosen]) and np.array_equal(inputs[~chosen], ids[~chosen])
    kinds = np.array([(inputs == 103)[chosen].mean(), (inputs == ids)[chosen].mean()])
    assert kinds == pytest.approx([0.8, 0.1], abs=0.06)


def test_some_sequences_stay_clean(tokenizer):
    masking = Masking.for_tokenizer(tokenizer, 0.3, sequence_share=0.5)
    ids = np.arange(2000, 2040, dtype=np.int32)
    generator = np.random.default_rng(0)
    masked = [(masking.apply(ids, generator)[1] != -100).any() for _ in range(400)]
    assert np.mean(masked) == pytest.approx(0.5, abs=0.08)
    none = Masking.for_tokenizer(tokenizer, 0.0)
    assert (none.apply(ids, generator)[1] == -100).all()


def test_whole_words_are_masked_whole(tokenizer):
    text = "unbelievably tokenizers disambiguate antidisestablishmentarianism in a straightforwardly hyphenated manner"
    ids = np.array(tokenizer(text)["input_ids"], dtype=np.int32)
    masking = Masking.for_tokenizer(tokenizer, 0.3, whole_words=True)
    words = np.cumsum(~masking.continues_word[ids])
    assert len(np.unique(words)) < len(ids) - 3  # there are words of several pieces
    share = []
    for seed in range(200):
        _, labels = masking.apply(ids, np.random.default_rng(seed))
        chosen = labels != -100
        for word in np.unique(words):
            assert chosen[words == word].all() or not chosen[words == word].any()
        share.append(chosen[1:-1].mean())
    assert np.mean(share) == pytest.approx(0.3, abs=0.07)


def test_word_pieces_of_both_kinds_of_vocabulary():
    assert word_continuations(["[CLS]", "play", "##ing", "."]).tolist() == [False, False, True, False]
    assert word_continuations(["Ġplay", "ing", ".", "Ġthe", None]).tolist() == [False, True, False, False, False]
