# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The examples of the documentation run as written."""

import json
import re

import pytest
import torch
from datasets import Dataset
from small_models import REPOSITORY


def test_the_examples_of_the_tuner(tmp_path, monkeypatch, capsys):
    text = (REPOSITORY / "docs" / "tuner.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    printed = []
    for example in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(example, "docs/tuner.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert "trainable params" in printed[0] and printed[0].splitlines()[-1].startswith("64 ")
    assert printed[-1].count("torch.Size([4, 16, 8])") == 2
    with torch.no_grad():
        logits = names["folded"].eval()(names["batch"]["input_ids"]).logits
    assert logits.shape == (4, 2) and logits.isfinite().all()


@pytest.fixture
def data_examples() -> list[str]:
    """The Python blocks of the page on data."""
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "data.md").read_text(), flags=re.DOTALL)


def test_the_example_that_makes_the_glue_sets(data_examples, tmp_path, monkeypatch):
    # A folder of the data set's name stands for the Hub.
    hub = tmp_path / "nyu-mll" / "glue"
    configs = []
    for name in ("sst2", "cola", "mrpc", "stsb", "rte", "wnli"):
        for split in ("train", "validation", "test"):
            rows = Dataset.from_dict({"sentence": [f"{name} é {split}"], "label": [1], "idx": [0]})
            rows.to_parquet(hub / name / f"{split}-00000-of-00001.parquet")
        files = "".join(f"\n  - split: {s}\n    path: {name}/{s}-*" for s in ("train", "validation", "test"))
        configs.append(f"- config_name: {name}\n  data_files:{files}")
    (hub / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")
    monkeypatch.chdir(tmp_path)
    exec(compile(data_examples[0], "docs/data.md", "exec"), {})
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*.jsonl")}
    assert len(written) == 13 and {"sst2/train.jsonl", "wnli/validation.jsonl", "mrpc/test.jsonl"} <= written
    line = (tmp_path / "cola" / "validation.jsonl").read_text()
    assert json.loads(line) == {"sentence": "cola é validation", "label": 1} and "é" in line


def test_the_example_that_makes_sick_and_squad(data_examples, tmp_path, monkeypatch):
    for folder in ("sick_nli", "squad_v2"):
        (tmp_path / folder).mkdir()
    columns = ["pair_ID", "sentence_A", "sentence_B", "relatedness_score", "entailment_judgment"]
    for file in ("train", "trial", "test_annotated"):
        pairs = [columns, ["1", 'A "big dog', "A dog", "4.5", "ENTAILMENT"], ["2", "A", "B", "3.1", "CONTRADICTION"]]
        text = "".join("\t".join(pair) + "\n" for pair in pairs)
        (tmp_path / "sick_nli" / f"SICK_{file}.txt").write_text(text)
    code = data_examples[1]
    titles = re.findall(r"\w+", "".join(re.findall(r'^    ("train": .*?),\n}', code, flags=re.DOTALL | re.MULTILINE)))
    titles = [title for title in titles if title not in ("train", "validation")] + ["Normans"]
    articles = [{"title": title, "paragraphs": []} for title in titles]
    (tmp_path / "squad_v2/dev-v2.0.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/data.md", "exec"), {})
    rows = [json.loads(line) for line in (tmp_path / "sick_nli/validation.jsonl").read_text().splitlines()]
    assert rows[0] == {"premise": 'A "big dog', "hypothesis": "A dog", "label": 0} and rows[1]["label"] == 2
    for split, num_articles in (("train", 9), ("validation", 3)):
        assert len(json.loads((tmp_path / "squad_v2" / f"{split}.json").read_text())["data"]) == num_articles
