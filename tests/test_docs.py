# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Every Python block of the documentation runs, and prints what it says.

The blocks of a page run in order, in one namespace and an empty folder. A block after `<!-- not run: REASON -->` is
left out. `PREPARE` makes the folders that a page's commands would have made, from small models; `SUBSTITUTES` has what
stands for models of the Hub. Lines `# -> TEXT` in a block say what it prints last.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from small_models import REPOSITORY, tiny_config, tiny_model, tiny_modernbert
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from modernalbert import ModernALBERTForMaskedLM, ModernALBERTForQuestionAnswering, hub


NANO = REPOSITORY / "checkpoints" / "modernalbert-nano"
BLOCK = re.compile(r"(<!-- not run: \S.*? -->\n)?```python\n(.*?)```", flags=re.DOTALL)
PAGES = [
    page
    for pattern in ("*.md", "docs/*.md", "model_cards/modernalbert-nano.md")
    for page in sorted(REPOSITORY.glob(pattern))
    if "```python" in page.read_text("utf-8")
]


def smollm2():
    """SmolLM2-135M's shape without memory: enough to count parameters."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**shape, **heads))


SUBSTITUTES = {
    'AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")': smollm2,
    '"answerdotai/ModernBERT-base", ModernALBERTConfig()': lambda: (
        tiny_modernbert(),
        tiny_config(embedding_size=None, intermediate_size=40),
    ),
}


# --- what the pages' commands would have made ------------------------------------------------------------------------


def small_nano(folder: Path, model_class=ModernALBERTForMaskedLM) -> None:
    tiny_model(model_class, vocab_size=30522, pad_token_id=0, num_hidden_layers=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(REPOSITORY / "configs" / "nano").save_pretrained(folder)


def prepare_deployment(folder: Path, command) -> None:
    """Run the page's own exports of nano, on a small model."""
    small_nano(folder / "small")
    for line in re.findall(
        r"^python hub\.py .*$", (REPOSITORY / "docs/deployment.md").read_text("utf-8"), re.MULTILINE
    ):
        words = shlex.split(line.replace("checkpoints/modernalbert-nano", "small"))[2:]
        if "small" in words:
            ran = command(hub.command, *words)
            assert ran.code == 0, (line, ran.error)


def prepare_data(folder: Path, command) -> None:
    """A folder of the data set's name stands for the Hub; small files for what curl downloads."""
    glue = folder / "nyu-mll" / "glue"
    configs = []
    for name in ("sst2", "cola", "mrpc", "stsb", "rte", "wnli"):
        for split in ("train", "validation", "test"):
            rows = Dataset.from_dict({"sentence": [f"{name} é {split}"], "label": [1], "idx": [0]})
            rows.to_parquet(glue / name / f"{split}-00000-of-00001.parquet")
        files = "".join(f"\n  - split: {s}\n    path: {name}/{s}-*" for s in ("train", "validation", "test"))
        configs.append(f"- config_name: {name}\n  data_files:{files}")
    (glue / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")

    for name in ("sick_nli", "squad_v2", "conll2003", "wnut17", "mnli_9k", "qnli_9k", "qqp_9k"):
        (folder / name).mkdir()
    for name in ("eng.train", "eng.testa", "eng.testb"):
        lines = "-DOCSTART- -X- -X- O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\n\nPeter NNP I-NP I-PER\n"
        (folder / "conll2003" / name).write_text(lines)
    for name in ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"):
        (folder / "wnut17" / name).write_text("Hotel\tB-location\né\tI-location\n\t\n.\tO\n\n")
    for name, label in (("mnli", "contradiction"), ("qnli", "not_entailment"), ("qqp", "1")):
        for file in ("train", "dev"):
            pair = {"text_a": "é", "text_b": "b", "label": label}
            (folder / f"{name}_9k" / f"{file}.json").write_text(json.dumps({"0": pair}))
    columns = ["pair_ID", "sentence_A", "sentence_B", "relatedness_score", "entailment_judgment"]
    for file in ("train", "trial", "test_annotated"):
        pairs = [columns, ["1", 'A "big dog', "A dog", "4.5", "ENTAILMENT"], ["2", "A", "B", "3.1", "CONTRADICTION"]]
        text = "".join("\t".join(pair) + "\n" for pair in pairs)
        (folder / "sick_nli" / f"SICK_{file}.txt").write_text(text)
    page = (REPOSITORY / "docs" / "data.md").read_text("utf-8")
    titles = re.findall(r"\w+", "".join(re.findall(r'^    ("train": .*?),\n}', page, flags=re.DOTALL | re.MULTILINE)))
    titles = [title for title in titles if title not in ("train", "validation")] + ["Normans"]
    articles = [{"title": title, "paragraphs": []} for title in titles]
    (folder / "squad_v2/dev-v2.0.json").write_text(json.dumps({"version": "v2.0", "data": articles}))


def prepare_tasks(folder: Path, command) -> None:
    small_nano(folder / "outputs/squad", ModernALBERTForQuestionAnswering)
    (folder / "outputs/retrieval-nano-squad").symlink_to(NANO)


PREPARE = {"data.md": prepare_data, "deployment.md": prepare_deployment, "tasks.md": prepare_tasks}


# --- what is looked at beside ----------------------------------------------------------------------------------------


def check_data(names: dict, printed: list[str], folder: Path) -> None:
    written = {str(path.relative_to(folder)) for path in folder.glob("*/*.jsonl") if path.parent.name != "sick_nli"}
    assert len(written) == 25 and {"sst2/train.jsonl", "wnli/validation.jsonl", "mrpc/test.jsonl"} <= written
    for set_name, words, tags in (
        ("conll2003", ["EU", "rejects"], ["B-ORG", "O"]),
        ("wnut17", ["Hotel", "é"], ["B-location", "I-location"]),
    ):
        for split in ("train", "validation", "test"):
            first = json.loads((folder / set_name / f"{split}.jsonl").read_text().splitlines()[0])
            assert first == {"tokens": words, "ner_tags": tags}
    for set_name, columns, label in (
        ("mnli", ("premise", "hypothesis"), 2),
        ("qnli", ("question", "sentence"), 1),
        ("qqp", ("question1", "question2"), 1),
    ):
        row = json.loads((folder / f"{set_name}_9k/validation.jsonl").read_text())
        assert row == dict(zip(columns, ("é", "b"))) | {"label": label}
    line = (folder / "cola" / "validation.jsonl").read_text()
    assert json.loads(line) == {"sentence": "cola é validation", "label": 1} and "é" in line
    rows = [json.loads(line) for line in (folder / "sick_nli/validation.jsonl").read_text().splitlines()]
    assert rows[0] == {"premise": 'A "big dog', "hypothesis": "A dog", "label": 0} and rows[1]["label"] == 2
    for split, num_articles in (("train", 9), ("validation", 3)):
        assert len(json.loads((folder / "squad_v2" / f"{split}.json").read_text())["data"]) == num_articles


def check_merging(names: dict, printed: list[str], folder: Path) -> None:
    assert "| model.groups.0.mlp |" in printed[0]
    batch = names["batches"][0]
    merged, loaded = (model.eval()(**batch).logits for model in (names["merged"], names["model"]))
    torch.testing.assert_close(loaded, merged, atol=1e-4, rtol=1e-4)


def check_tuner(names: dict, printed: list[str], folder: Path) -> None:
    assert "trainable params" in printed[0] and printed[0].splitlines()[-1].startswith("64 ")
    assert printed[-1].count("torch.Size([4, 16, 8])") == 2
    with torch.no_grad():
        logits = names["folded"].eval()(names["batch"]["input_ids"]).logits
    assert logits.shape == (4, 2) and logits.isfinite().all()


def check_readme(names: dict, printed: list[str], folder: Path) -> None:
    assert {path.name for path in (folder / "outputs/merged").iterdir()} >= {"adapter", "base", "folded"}


CHECK = {"README.md": check_readme, "data.md": check_data, "merging.md": check_merging, "tuner.md": check_tuner}


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "checkpoints").symlink_to(NANO.parent)
    if page.name in PREPARE:
        PREPARE[page.name](tmp_path, command)
    names: dict = {}
    printed = []
    for not_run, code in BLOCK.findall(page.read_text("utf-8")):
        if not_run:
            continue
        for number, (text, substitute) in enumerate(SUBSTITUTES.items()):
            if text in code:
                value = names[f"substitute_{number}"] = substitute()
                code = code.replace(text, f"{'*' * isinstance(value, tuple)}substitute_{number}")
        capsys.readouterr()
        exec(compile(code, str(page), "exec"), names)
        printed.append(capsys.readouterr().out)
        promised = [line.removeprefix("# -> ") for line in code.splitlines() if line.startswith("# -> ")]
        if promised:
            assert printed[-1].splitlines()[-len(promised) :] == promised
    if page.name in CHECK:
        CHECK[page.name](names, printed, tmp_path)


def test_few_blocks_are_not_run():
    left_out = [page.name for page in PAGES for not_run, _ in BLOCK.findall(page.read_text("utf-8")) if not_run]
    assert left_out == ["deployment.md"]


def test_the_documentation_names_folders_that_exist():
    """Sets in commands are those of the table in docs/data.md."""
    data = (REPOSITORY / "docs/data.md").read_text("utf-8")
    sets = set(
        re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", data.split("## Pretraining")[0], re.MULTILINE)))
    )
    pages = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("model_cards/*.md")]
    pages += [*REPOSITORY.glob("experiments/*.py"), *REPOSITORY.glob("benchmarks/*.py"), NANO / "README.md"]
    named = {(page.name, name) for page in pages for name in re.findall(r"\$DATA_DIR/(\w+)", page.read_text("utf-8"))}
    assert {entry for entry in named if entry[1] not in sets | {"beir"}} == set()
    assert named


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", *(f"docs/{p.name}" for p in REPOSITORY.glob("docs/*.md"))],
)
def test_links_lead_to_files_and_headings(page):
    file = REPOSITORY / page
    text = re.sub(r"```.*?```", "", file.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        linked = (file.parent / path) if path else file
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target
