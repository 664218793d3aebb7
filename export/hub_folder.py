# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""A complete model folder: weights, configuration, code, tokenizer, card, and what sentence-transformers reads."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch
import transformers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from modernalbert import modeling_modernalbert
from modernalbert.cli.errors import UserError, error_message
from modernalbert.cli.output_folders import atomic_folder
from modernalbert.cli.tokenizer_files import save_tokenizer
from modernalbert.configuration_modernalbert import ModernALBERTConfig
from modernalbert.export import sentence_transformers
from modernalbert.export.cards import code_section, default_card, usage_section
from modernalbert.export.plain_model import check_unwrapped


# What an export writes, and may therefore replace.
OUTPUT_FILES = (
    *(
        "config.json *.safetensors *.safetensors.index.json *.py tokenizer* special_tokens_map.json added_tokens.json "
        "vocab.* merges.txt chat_template* README.md LICENSE onnx merge_report.json merge_report.md"
    ).split(),
    *sentence_transformers.OUTPUT_FILES,
)
LICENSE_FILE = Path(__file__).parents[1] / "LICENSE"


def export_to_hub_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    card: str | None = None,
    hub_model_id: str | None = None,
    source: str | Path | None = None,
    revision: str | None = None,
    pooling: str | None = None,
    sections: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
) -> Path:
    """
    Write everything a stranger needs to load the model, with this package not installed.

    The folder holds `config.json`, `model.safetensors`, the tokenizer and a card; for a ModernALBERT also the code
    files and the `auto_map` of every class, so that it loads with `trust_remote_code=True`. It is written under a
    temporary name and moved into place.

    Args:
        model: A ModernALBERT, or the ModernBERT that `to_modernbert` made of one, with or without a head.
        tokenizer: Its tokenizer, or None to leave it out.
        folder: Where to write. Must not exist, or hold nothing but an earlier export.
        card: Text of README.md; None writes one from the configuration.
        hub_model_id: The repository the card speaks of, if it is known.
        source: Folder or Hub name the model came from: if it is a sentence-transformers folder, so is the new one, with
            the same modules and prompts.
        revision: Of `source`, on the Hub; None = main.
        pooling: Makes the folder a sentence-transformers folder where `source` is none: "mean", "cls" or "max".
        sections: Markdown that is put at the end of the card.
        files: Further text files, by name.

    Returns:
        The folder.

    Raises:
        UserError: `folder` exists and is something else, or `source` has modules that cannot be copied.
        ValueError: the model is quantised or wears an adapter.
    """
    check_unwrapped(model)
    folder = Path(folder)
    with atomic_folder(folder, replaceable=OUTPUT_FILES) as temporary:
        write_model_folder(
            model, tokenizer, temporary, folder.name, card, hub_model_id, source, revision, pooling, sections, files
        )
    return folder


def write_model_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    name: str,
    card: str | None = None,
    hub_model_id: str | None = None,
    source: str | Path | None = None,
    revision: str | None = None,
    pooling: str | None = None,
    sections: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
) -> None:
    """Fill a folder that exists, of which the card says `name`. Arguments as of `export_to_hub_folder`."""
    has_modules = source is not None and sentence_transformers.copy_modules(source, folder, revision)
    if pooling is not None and not has_modules:
        sentence_transformers.write_pooling_modules(folder, model.config.hidden_size, pooling)
        has_modules = True
    model.save_pretrained(folder)  # the code travels along: every class is registered for it
    _load_in_float32(folder / "config.json")
    if tokenizer is not None:
        if _reads_first_position(model):
            tokenizer.padding_side = "right"
        save_tokenizer(tokenizer, folder)
        _complete_tokenizer_config(folder / "tokenizer_config.json")
    if LICENSE_FILE.is_file():
        shutil.copyfile(LICENSE_FILE, folder / "LICENSE")
    name = hub_model_id or name
    if card is None:
        card = default_card(model, name)
        if has_modules:
            card += "\n" + usage_section(model, name)
    card = "\n".join([card.rstrip("\n") + "\n", *sections, *filter(None, [code_section(folder)])])
    for file, text in ({"README.md": card} | dict(files or {})).items():
        (folder / file).write_text(text, encoding="utf-8")


def _load_in_float32(config_file: Path) -> None:
    """
    Let `from_pretrained` load at least float32, whatever the tensors are stored in.

    transformers loads the `dtype` of the configuration if nothing else is asked for, and training in half precision
    without a word costs several points.
    """
    config = json.loads(config_file.read_text("utf-8"))
    if config.get("dtype") != "float64":
        config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _complete_tokenizer_config(config_file: Path) -> None:
    """
    Say what transformers does not write: that neither model has token types, which versions before 5 would pass on to
    it; and the class by the name that those versions know, too. How this process loaded the tokenizer is left out.
    """
    config = json.loads(config_file.read_text("utf-8"))
    for name in ("is_local", "local_files_only"):
        config.pop(name, None)
    config["model_input_names"] = ["input_ids", "attention_mask"]
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _reads_first_position(model: PreTrainedModel) -> bool:
    """Return whether the classifier reads position 0, padding or not, as transformers' ModernBERT does."""
    is_modernbert = type(model).__name__ == "ModernBertForSequenceClassification"
    return is_modernbert and model.config.classifier_pooling == "cls"


def load_model(
    name_or_path: str, revision: str | None = None, modernbert: bool = False, dtype: str | torch.dtype = "float32"
) -> PreTrainedModel:
    """
    Load a ModernALBERT as the class its configuration names in `architectures`, with this package's code.

    Args:
        name_or_path: Folder or Hub name.
        revision: Branch, tag or commit on the Hub; None = main.
        modernbert: Also load a ModernBERT, with transformers' code.
        dtype: Of the weights; "auto" = as the configuration says, which may be wider than they are stored.

    Raises:
        UserError: there is no ModernALBERT of that name.
    """
    try:
        model_class = None
        if modernbert:
            given, _ = PreTrainedConfig.get_config_dict(name_or_path, revision=revision)
            if given.get("model_type") == "modernbert":
                model_class = getattr(transformers, (given.get("architectures") or [""])[0], None)
        if model_class is None:
            config = ModernALBERTConfig.from_pretrained(name_or_path, revision=revision)
            model_class = getattr(modeling_modernalbert, (config.architectures or ["ModernALBERTModel"])[0], None)
        if model_class is not None:
            # What does not fit is refused here, by name: the library's message names no tensor.
            model, found = model_class.from_pretrained(
                name_or_path, revision=revision, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
            for name, shape, expected in sorted(found["mismatched_keys"]):
                raise ValueError(f"{name} has shape {tuple(shape)}, its configuration asks for {tuple(expected)}.")
            absent = sorted(found["missing_keys"] & {name for name, _ in model.named_parameters()})
            if absent:
                raise ValueError(f"it has no {', '.join(absent[:3])}, which would be random.")
            return model
    except Exception as error:  # a broken file makes the libraries raise anything, KeyError and AttributeError too
        kind = "" if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: "
        raise UserError(f"{name_or_path}: cannot be loaded: {kind}{error_message(error)}") from None
    raise UserError(
        f"{name_or_path}: architectures={config.architectures!r} is not allowed: it must be a ModernALBERT class."
    )


def stored_dtype(name_or_path: str) -> torch.dtype | None:
    """Return the dtype of most tensors in a model's file of weights; None if there is no single safetensors file."""
    file = cached_file(name_or_path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    with safe_open(file, "pt") as tensors:
        names = Counter(tensors.get_slice(name).get_dtype() for name in tensors.keys())
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return dtypes.get(names.most_common(1)[0][0])


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer beside a model, or None if there is none."""
    try:
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError):
        return None


def check_hub_model_id(hub_model_id: str | None) -> None:
    """Raise a UserError unless it is a repository's owner and name: cards say it, so that the owner is not left out."""
    if not hub_model_id:
        raise UserError("--push_to_hub needs --hub_model_id.")
    try:
        validate_repo_id(hub_model_id)
    except HFValidationError as error:
        raise UserError(f"--hub_model_id {hub_model_id} is not allowed: {error_message(error)}") from None
    if "/" not in hub_model_id:
        raise UserError(f"--hub_model_id {hub_model_id} is not allowed: it must name an owner, like me/{hub_model_id}.")


def push_folders(folders: Mapping[str, Path], hub_model_id: str) -> None:
    """
    Upload folders to a model repository on the Hub, which is created if needed, in one commit.

    As on disk, the new output replaces an earlier one: files of an export that are not in the new one are deleted.

    Args:
        folders: Place in the repository ("" is its root) -> folder.
        hub_model_id: The repository, owner/name.

    Raises:
        UserError: the Hub cannot be reached, or does not let this user write there.
    """
    files = {
        (PurePosixPath(place) / file.relative_to(folder).as_posix()).as_posix(): file
        for place, folder in folders.items()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    api = HfApi()
    try:
        api.create_repo(hub_model_id, exist_ok=True)
        old = set(api.list_repo_files(hub_model_id)) - files.keys()
        stale = sorted(name for name in old if any(_is_export(name, place) for place in folders))
        operations = [
            *(CommitOperationDelete(name, is_folder=False) for name in stale),
            *(CommitOperationAdd(name, file) for name, file in files.items()),
        ]
        api.create_commit(hub_model_id, operations, commit_message="Upload model")
    except (HfHubHTTPError, OSError, ValueError) as error:
        written = " and ".join(str(folder) for folder in folders.values())
        raise UserError(f"{written} is written, but not uploaded to {hub_model_id}: {error_message(error)}") from None


def _is_export(name: str, place: str) -> bool:
    """Return whether a path in a repository is what an export to `place` writes."""
    path = PurePosixPath(name)
    if not path.is_relative_to(place):
        return False
    top = PurePosixPath(path.relative_to(place).parts[0])
    return any(top.match(pattern) for pattern in OUTPUT_FILES)
