# Copyright 2026 The ModernALBERT authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A complete Hub folder: weights, configuration, code, tokenizer and card, loadable with `trust_remote_code` alone."""

import shutil
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modernalbert import modeling_modernalbert
from modernalbert.cli.errors import UserError, error_message
from modernalbert.cli.output_folders import atomic_folder
from modernalbert.configuration_modernalbert import ModernALBERTConfig


# What an export writes, and may therefore replace.
EXPORTED = (
    "config.json *.safetensors *.safetensors.index.json *.py tokenizer* special_tokens_map.json added_tokens.json "
    "vocab.* merges.txt chat_template* README.md LICENSE"
).split()
LICENSE_FILE = Path(__file__).parents[1] / "LICENSE"


def export_to_hub_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    card: str | None = None,
    hub_model_id: str | None = None,
) -> Path:
    """
    Write everything a stranger needs to load the model with `trust_remote_code=True`, with this package not installed.

    The folder holds `config.json` with the `auto_map` of every class, the code files, `model.safetensors`, the
    tokenizer and a card. It is written under a temporary name and moved into place.

    Args:
        model: Any ModernALBERT, with or without a head.
        tokenizer: Its tokenizer, or None to leave it out.
        folder: Where to write. Must not exist, or hold nothing but an earlier export.
        card: Text of README.md; None writes one from the configuration.
        hub_model_id: The repository the card speaks of, if it is known.

    Returns:
        The folder.

    Raises:
        UserError: `folder` exists and is something else.
    """
    folder = Path(folder)
    with atomic_folder(folder, replaceable=EXPORTED) as temporary:
        model.save_pretrained(temporary)  # the code travels along: every class is registered for it
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if LICENSE_FILE.is_file():
            shutil.copyfile(LICENSE_FILE, temporary / "LICENSE")
        (temporary / "README.md").write_text(card or default_card(model, hub_model_id or folder.name), encoding="utf-8")
    return folder


def default_card(model: PreTrainedModel, name: str) -> str:
    """A model card with what the configuration says; it claims no results."""
    config = model.config
    auto_class = model._auto_class or "AutoModel"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    modulation = {
        "mol": f"Mixture of LoRAs: {config.num_experts} experts of rank {config.lora_rank}, "
        f"{config.num_experts_per_tok} per token, in groups {list(config.modulated_groups)} (0-based)",
        "moa": f"Mixture of Adapters: {config.num_experts} experts in groups {list(config.modulated_groups)} (0-based)",
        "depth_lora": f"one LoRA of rank {config.lora_rank} per layer position",
        "none": "none (a plain shared feed-forward network)",
    }[config.ffn_modulation]
    pipeline = {
        "AutoModelForMaskedLM": "fill-mask",
        "AutoModelForSequenceClassification": "text-classification",
        "AutoModelForTokenClassification": "token-classification",
        "AutoModelForQuestionAnswering": "question-answering",
        "AutoModelForMultipleChoice": "multiple-choice",
    }.get(auto_class, "feature-extraction")
    return f"""---
library_name: transformers
license: apache-2.0
pipeline_tag: {pipeline}
tags: [modernalbert, mixture-of-loras]
---
# {name}

A ModernALBERT: a recursive encoder whose {config.num_hidden_layers} layers share {config.num_groups} sets of weights.

| | |
|---|---|
| parameters | {parameters:,} |
| hidden size, heads | {config.hidden_size}, {config.num_attention_heads} |
| layers = groups x depth | {config.num_hidden_layers} = {config.num_groups} x {config.group_depth} |
| FFN modulation | {modulation} |
| vocabulary, longest sequence | {config.vocab_size}, {config.max_position_embeddings} |

```python
from transformers import AutoTokenizer, {auto_class}

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
```

The method is from "Improving Recursive Transformers with Mixture of LoRAs" (arXiv 2512.12880).
"""


def load_model(name_or_path: str) -> PreTrainedModel:
    """
    Load a ModernALBERT as the class its configuration names in `architectures`, with this package's code.

    Raises:
        UserError: there is no ModernALBERT of that name.
    """
    try:
        config = ModernALBERTConfig.from_pretrained(name_or_path)
        model_class = getattr(modeling_modernalbert, (config.architectures or ["ModernALBERTModel"])[0], None)
        if model_class is not None:
            return model_class.from_pretrained(name_or_path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{name_or_path}: cannot be loaded: {error_message(error)}") from None
    raise UserError(
        f"{name_or_path}: architectures={config.architectures!r} is not allowed: it must be a ModernALBERT class."
    )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, or None if there is none."""
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError):
        return None


def push_folder(folder: Path, hub_model_id: str, path_in_repo: str = ".") -> None:
    """
    Upload a folder to a model repository on the Hub, which is created if needed.

    Raises:
        UserError: the Hub cannot be reached, or does not let this user write there.
    """
    api = HfApi()
    try:
        api.create_repo(hub_model_id, exist_ok=True)
        api.upload_folder(repo_id=hub_model_id, folder_path=folder, path_in_repo=path_in_repo)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{folder} is written, but not uploaded to {hub_model_id}: {error_message(error)}") from None
