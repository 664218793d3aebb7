# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The files that make a model folder a sentence-transformers folder: modules, pooling, normalization, prompts."""

import json
import shutil
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download

from modernalbert.cli.errors import UserError, error_message


MODULES_FILE = "modules.json"
ROOT_FILES = (MODULES_FILE, "config_sentence_transformers.json", "sentence_bert_config.json")
# What `copy_modules` and `write_pooling_modules` write beside a model, and an export may therefore replace.
OUTPUT_FILES = (*ROOT_FILES, "[0-9]_*")
# No pickle: tensors of a module (a Dense layer, say) are copied from safetensors alone.
COPIED_SUFFIXES = (".json", ".safetensors", ".txt")
POOLINGS = ("mean", "cls", "max")


def copy_modules(source: str | Path, folder: str | Path, revision: str | None = None) -> bool:
    """
    Copy what makes `source` a sentence-transformers folder: the list of modules, their folders, and the prompts.

    The model itself is not copied: `folder` holds the model that `source`'s first module is to load from now on.

    Args:
        source: Folder or Hub name of a model.
        folder: Folder of the exported or merged model; must exist.
        revision: Branch, tag or commit of a Hub name; None = main.

    Returns:
        Whether `source` is a sentence-transformers folder. If not, nothing is written.

    Raises:
        UserError: `modules.json` is malformed, names a module outside its folder or one that is not
            sentence-transformers' own, or a module's tensors are there as a pickle only.
    """
    source, folder = Path(_local_folder(str(source), revision)), Path(folder)
    if not (source / MODULES_FILE).is_file():
        return False
    for path in _module_paths(source / MODULES_FILE):
        copied = [file for file in sorted((source / path).glob("*")) if file.suffix in COPIED_SUFFIXES]
        has_tensors = any(file.suffix == ".safetensors" for file in copied)
        if not has_tensors and any(file.suffix == ".bin" for file in (source / path).glob("*")):
            raise UserError(
                f"{source / path}: its tensors are a pickle (.bin), which is not copied: save it anew first."
            )
        (folder / path).mkdir(parents=True, exist_ok=True)
        for file in copied:
            shutil.copyfile(file, folder / path / file.name)
    for name in ROOT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return True


def write_pooling_modules(folder: str | Path, hidden_size: int, pooling: str = "mean") -> None:
    """
    Make an exported folder a sentence-transformers folder: the encoder, then one pooling, compared by the cosine.

    The names of classes and fields are those that sentence-transformers has read since version 2, and other servers
    read too.

    Args:
        folder: Folder of the exported model; must exist.
        hidden_size: Width of the token states.
        pooling: "mean" over the real tokens, "cls" for the first token, or "max".

    Raises:
        ValueError: `pooling` is not allowed.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r} is not allowed: it must be one of {', '.join(map(repr, POOLINGS))}.")
    folder = Path(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(modules)
    ]
    chosen = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
    modes = {f"pooling_mode_{field}": name == pooling for name, field in chosen.items()}
    contents = {
        MODULES_FILE: listed,
        "config_sentence_transformers.json": {
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "sentence_bert_config.json": {"max_seq_length": None, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": hidden_size, **modes},
    }
    (folder / "1_Pooling").mkdir()
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _module_paths(file: Path) -> list[PurePosixPath]:
    """Return the folders of all modules but the first, from modules.json."""
    try:
        modules = json.loads(file.read_text("utf-8"))
        paths = [(module["type"], module["path"]) for module in modules]
        if not all(isinstance(value, str) for pair in paths for value in pair):
            raise TypeError("its types and paths must be text")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{file}: it is no list of sentence-transformers modules: {error_message(error)}") from None
    kept = []
    for module_type, path in paths:
        if not module_type.startswith("sentence_transformers."):
            raise UserError(f"{file}: type {module_type!r} is not sentence-transformers' own, and cannot be copied.")
        path = PurePosixPath(path)
        if path == PurePosixPath():
            continue
        if path.is_absolute() or ".." in path.parts or "\\" in str(path) or "\0" in str(path):
            raise UserError(f"{file}: path {str(path)!r} is not allowed: a module lies inside the folder.")
        if len(path.parts) != 1 or not path.match("[0-9]_*"):
            raise UserError(f"{file}: path {str(path)!r} is not allowed: it must be like '1_Pooling'.")
        kept.append(path)
    return kept


def _local_folder(source: str, revision: str | None) -> str:
    """Return `source` itself if it is a folder, else where the small files of that repository were downloaded to."""
    if Path(source).is_dir():
        return source
    try:
        patterns = [*ROOT_FILES, *(f"[0-9]_*/*{suffix}" for suffix in COPIED_SUFFIXES)]
        return snapshot_download(source, revision=revision, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {MODULES_FILE} cannot be looked for: {error_message(error)}") from None
