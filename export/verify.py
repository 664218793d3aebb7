# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Comparison of a model folder's code with this release."""

import json
from pathlib import Path

from modernalbert.cli.errors import UserError, error_message
from modernalbert.export.cards import file_hash
from modernalbert.export.sentence_transformers import MODULES_FILE


RELEASE_FOLDER = Path(__file__).parents[1]
CODE_FILES = (
    "configuration_modernalbert.py",
    "modeling_modernalbert.py",
    "modeling_mol.py",
    "mol_backends.py",
    "mol_grouped.py",
    "mol_triton.py",
)
# Formats in which loading can run code.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack")


def verify_folder(folder: str | Path) -> list[str]:
    """
    Compare the code of a model folder with this release's, and look for other code that loading it could run.

    Args:
        folder: A folder on disk, such as one that was downloaded.

    Returns:
        What is not this release's, a sentence each; empty if there is nothing.

    Raises:
        UserError: `folder` is no model folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    config = _read_object(folder / "config.json")
    found = []
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*.py")}
    auto_map = config.get("auto_map")
    if auto_map is None:
        auto_map = {}
    elif not isinstance(auto_map, dict):
        found.append(f"config.json: auto_map={auto_map!r} is no object of classes and files.")
        auto_map = {}
    needed = CODE_FILES if config.get("model_type") == "modernalbert" else ()
    for name in sorted(names | set(needed)):
        if name not in names:
            found.append(f"{name} is missing.")
        elif name not in CODE_FILES:
            found.append(f"{name} is no file of this release.")
        elif file_hash(folder / name) != file_hash(RELEASE_FOLDER / name):
            found.append(f"{name} differs from this release's.")
    for key, value in auto_map.items():
        module = str(value).rsplit(".", 1)[0]
        if f"{module}.py" not in CODE_FILES:
            found.append(f"config.json: auto_map names {value!r} for {key}, which is no code of this release.")
    # Tokenizers and processors name code so, too; sentence-transformers imports what its modules' types name.
    for file in sorted(folder.rglob("*.json")):
        name, content = file.relative_to(folder).as_posix(), _read_json(file)
        if name != "config.json" and isinstance(content, dict) and content.get("auto_map"):
            found.append(f"{name}: auto_map={content['auto_map']!r} names code of its own.")
        if file.name == MODULES_FILE and isinstance(content, list):
            types = [module.get("type") for module in content if isinstance(module, dict)]
            found += [
                f"{name}: type {kind!r} is not sentence-transformers' own."
                for kind in types
                if not str(kind).startswith("sentence_transformers.")
            ]
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in PICKLE_SUFFIXES:
            found.append(f"{file.relative_to(folder).as_posix()} is no safetensors file: loading it could run code.")
    return found


def _read_object(file: Path) -> dict:
    content = _read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: it must hold an object.")
    return content


def _read_json(file: Path) -> object:
    try:
        return json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: it is not JSON: {error_message(error)}") from None
