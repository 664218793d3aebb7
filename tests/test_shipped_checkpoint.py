# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The checkpoint in the repository: whole, small, up to date with the code, and trained."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from small_models import REPOSITORY
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, ModernBertForMaskedLM, pipeline

from modernalbert import ModernALBERTConfig
from modernalbert.export import to_modernbert
from modernalbert.export.cards import file_hash
from modernalbert.export.verify import CODE_FILES
from modernalbert.merge_experts import merge_experts


EXPORT = (
    "python hub.py --model_name_or_path checkpoints/modernalbert-nano --output_dir checkpoints/modernalbert-nano "
    "--dtype bfloat16 --pooling mean --card model_cards/modernalbert-nano.md"
)
CHECKPOINT = REPOSITORY / "checkpoints" / "modernalbert-nano"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForMaskedLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def test_it_is_a_complete_small_hub_folder():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 30e6
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert {"AutoConfig", "AutoModel", "AutoModelForMaskedLM"} <= set(config["auto_map"])
    shape = ModernALBERTConfig.from_pretrained(REPOSITORY / "configs" / "nano").to_dict()
    differing = {name for name in shape if config.get(name, shape[name]) != shape[name]}
    assert differing <= {"dtype", "architectures", "auto_map", "transformers_version"}
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        dtypes = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith("mol_usage")} == {"BF16"}


def test_its_code_is_the_code_of_this_repository():
    for file in CHECKPOINT.glob("*.py"):
        assert file.read_text() == (REPOSITORY / file.name).read_text(), f"{file.name} has changed: {EXPORT}"


@pytest.mark.parametrize("folder", [CHECKPOINT, REPOSITORY / "configs" / "nano"], ids=["checkpoint", "config"])
def test_its_tokenizer_cuts_nothing(folder):
    text = "film " * 400
    assert len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids) == 402
    assert len(AutoTokenizer.from_pretrained(folder)(text)["input_ids"]) == 402


def test_it_is_an_embedding_folder_that_loads_in_float32():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    embedder = sentence_transformers.SentenceTransformer(str(CHECKPOINT), device="cpu")
    assert [type(module).__name__ for module in embedder] == ["Transformer", "Pooling"]
    assert embedder.similarity_fn_name == "cosine" and embedder[1].pooling_mode == "mean"
    assert {parameter.dtype for parameter in embedder.parameters()} == {torch.float32}
    first, second, third = embedder.encode(["The ferry did not run.", "No boat crossed the river.", "He bakes bread."])
    assert embedder.similarity(first, second) > embedder.similarity(first, third) + 0.1


def test_every_expert_is_used(model):
    usage = [buffer for name, buffer in model.named_buffers() if name.endswith("mol_usage")]
    assert len(usage) == 2 and all(u.dtype == torch.float32 for u in usage)
    assert min(u.min() for u in usage) >= 1 / (4 * 8) and all(u.sum() == pytest.approx(1, abs=1e-3) for u in usage)


def test_embeddings_know_what_sentences_mean(tokenizer):
    encoder = AutoModel.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    sentences = [
        "A man is playing a guitar on the stage.",
        "A musician performs with his guitar.",
        "The central bank raised interest rates again.",
        "Borrowing became more expensive after the bank's decision.",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = encoder(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
    similarity = means @ means.T
    assert min(similarity[0, 1], similarity[2, 3]) > similarity[:2, 2:].max() + 0.1


@pytest.mark.parametrize(
    "sentence, words",
    [
        ("The actors are great, but the [MASK] is too long and boring.", {"movie", "film", "story", "plot", "ending"}),
        ("The president of the United [MASK] spoke to congress.", {"states", "kingdom", "nations"}),
        ("A [MASK] is a large animal.", {"dog", "horse", "bear", "bird", "cow", "elephant", "whale"}),
    ],
)
def test_masks_are_filled_sensibly(model, tokenizer, sentence, words):
    answers = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=5)(sentence)
    assert words & {answer["token_str"] for answer in answers}, answers


def test_merged_it_is_a_modernbert(model, tokenizer):
    merged = merge_experts(model, weights="ema").model
    plain = to_modernbert(merged)
    assert type(plain) is ModernBertForMaskedLM
    batch = tokenizer(["The ferry did not run.", "No boat [MASK] the river. " * 60], padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits[real], merged(**batch).logits[real], atol=1e-5, rtol=1e-5)


STRANGER = """
import sys
sys.modules["modernalbert"] = None  # an import of it fails
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="float32")
fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
print(fill("The president of the United [MASK] spoke to congress.")[0]["token_str"])
"""


def test_strangers_fill_masks_with_it(tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(CHECKPOINT)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["states"]


def test_its_card_has_the_hashes_of_its_code():
    card = (CHECKPOINT / "README.md").read_text()
    rows = [f"| `{name}` | `{file_hash(CHECKPOINT / name)}` |" for name in CODE_FILES]
    assert [row for row in rows if row not in card] == [], f"write it anew: {EXPORT}"


def test_its_card_says_what_was_measured():
    card = (CHECKPOINT / "README.md").read_text()
    log = json.loads((REPOSITORY / "experiments/results/nano_pretraining.json").read_text())
    results = log["all_results.json"]
    said = [f"{log['tokens']:,}\ntokens", f"{log['hours_at_the_median_speed']:.1f} hours"]
    said += [f"words {results['eval_mlm_loss']:.2f}", f"hidden states {results['eval_hidden_loss']:.3f}"]
    said += [f"sentences {results['eval_pooled_loss']:.3f}", f"entropy {results['eval_router_entropy']:.2f}"]
    rows = json.loads((REPOSITORY / "experiments/results/nano_experts.json").read_text())["rows"]
    for way in ("uniform", "calibrated", "off"):
        row = next(row for row in rows if row["way"] == way)
        said.append("{:.3f} ({:.3f} to {:.3f})".format(row["worse_by"], *row["interval"]))
    said.append(f"masked words is {rows[0]['masked_loss']:.3f}")
    text = " ".join(card.split())
    assert [words for words in said if " ".join(words.split()) not in text] == []
