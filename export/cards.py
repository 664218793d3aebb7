# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Model cards: one template, filled from the configuration, and the sections that exports add."""

import hashlib
from pathlib import Path

from transformers import PreTrainedModel


CODE_HEADING = "## Code files"
PIPELINES = {
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
}


def default_card(model: PreTrainedModel, name: str) -> str:
    """Write a model card with what the configuration says; it claims no results."""
    head = _head(model)
    is_modernbert = model.config.model_type == "modernbert"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = {"parameters": f"{parameters:,}"} | (_modernbert_rows if is_modernbert else _modernalbert_rows)(model.config)
    if is_modernbert:
        introduction = (
            "A ModernALBERT whose groups of layers are written out over depth: transformers' own ModernBERT, with the "
            "same outputs, loaded without remote code."
        )
        if head == "ForSequenceClassification" and model.config.classifier_pooling == "cls":
            introduction += " Its classifier reads the first position of a row: pad on the right."
    else:
        introduction = (
            f"A ModernALBERT: a recursive encoder whose {model.config.num_hidden_layers} layers share "
            f"{model.config.num_groups} sets of weights."
        )
    return f"""---
library_name: transformers
license: apache-2.0
pipeline_tag: {PIPELINES.get(head, "feature-extraction")}
tags: [{"modernbert, " if is_modernbert else ""}modernalbert{"" if is_modernbert else ", mixture-of-loras"}]
---
# {name}

{introduction}

| | |
|---|---|
{chr(10).join(f"| {key} | {value} |" for key, value in rows.items())}

{loading_section(model, name)}
The method is from "Improving Recursive Transformers with Mixture of LoRAs" (arXiv 2512.12880).
"""


def loading_section(model: PreTrainedModel, name: str) -> str:
    """Describe how a ModernALBERT, or the ModernBERT made of one, is loaded: code, dtype, and its merged forms."""
    head, trust = _head(model), "" if model.config.model_type == "modernbert" else ", trust_remote_code=True"
    return f"""```python
from transformers import AutoTokenizer, AutoModel{head}

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
model = AutoModel{head}.from_pretrained("{name}"{trust})
```

Weights load as float32, which training needs. `dtype="bfloat16"` halves the memory: for a GPU, or a processor that
computes in bfloat16.{_loading_notes(model)}
"""


def usage_section(model: PreTrainedModel, name: str) -> str:
    """Write how a sentence-transformers folder is used."""
    trust = "" if model.config.model_type == "modernbert" else ", trust_remote_code=True"
    return f"""## Sentence embeddings

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}"{trust})
embeddings = model.encode(["The ferry did not run.", "No boat crossed the river."])
print(model.similarity(embeddings, embeddings))
```

`CrossEncoder("{name}", num_labels=1{trust})` starts a reranker from the same folder.
"""


def code_section(folder: Path) -> str:
    """Return the SHA-256 of each code file of a folder; empty where there is none."""
    files = sorted(folder.glob("*.py"))
    if not files:
        return ""
    rows = "\n".join(f"| `{file.name}` | `{file_hash(file)}` |" for file in files)
    return (
        f"{CODE_HEADING}\n\n`python hub.py --verify FOLDER` compares them with the release that is installed.\n\n"
        f"| file | SHA-256 |\n|---|---|\n{rows}\n"
    )


def file_hash(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _head(model: PreTrainedModel) -> str:
    """Return what the name of a model's class says after the model: "ForMaskedLM", or "" for an encoder."""
    return next((head for head in PIPELINES if type(model).__name__.endswith(head)), "")


def _modernalbert_rows(config) -> dict[str, str]:
    experts = f"{config.num_experts} experts in groups {list(config.modulated_groups)} (0-based)"
    modulation = {
        "mol": f"Mixture of LoRAs: {experts}, of rank {config.lora_rank}, {config.num_experts_per_tok} per token",
        "moa": f"Mixture of Adapters: {experts}",
        "depth_lora": f"one LoRA of rank {config.lora_rank} per layer position",
        "none": "none (a plain shared feed-forward network)",
    }[config.ffn_modulation]
    return {
        "hidden size, heads": f"{config.hidden_size}, {config.num_attention_heads}",
        "layers = groups x depth": f"{config.num_hidden_layers} = {config.num_groups} x {config.group_depth}",
        "FFN modulation": modulation,
        "vocabulary, longest sequence": f"{config.vocab_size}, {config.max_position_embeddings}",
    }


def _modernbert_rows(config) -> dict[str, str]:
    return {
        "hidden size, heads": f"{config.hidden_size}, {config.num_attention_heads}",
        "layers, FFN": f"{config.num_hidden_layers}, {config.intermediate_size}",
        "vocabulary, longest sequence": f"{config.vocab_size}, {config.max_position_embeddings}",
    }


def _loading_notes(model: PreTrainedModel) -> str:
    """Write how merged forms are loaded, for a model whose experts are not merged yet."""
    config = model.config
    routed = getattr(config, "ffn_modulation", "none") == "mol" and config.num_experts > 1
    if not routed or config.expert_mixing != "token":
        return ""
    return """

`python merge_experts.py` writes merged forms: `folded/` loads as above, and `adapter/` is a stock LoRA for
`PeftModel.from_pretrained(base, "adapter")` on the model in `base/`. `python hub.py --format modernbert --merge ema`
writes a ModernBERT that needs no remote code."""
