# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Import paths of version 0.1.0 that moved: importing one raises an error that names the new path."""

import sys
from importlib.machinery import ModuleSpec


MOVED_MODULES = {
    "calibrated_merge": "merging.calibrated",
    "command_line": "cli.errors, cli.arguments and cli.output_folders",
    "demo": "finetuning.demo",
    "evaluation.beir_folder": "data.beir",
    "evaluation.glue_submission": "finetuning.glue_submission",
    "ffn_projections": "tuner.projections",
    "grouped_mol": "mol_grouped",
    "kernels_mol": "mol_triton",
    "merge_adapter": "tuner.merge",
    "merge_methods": "merging.methods",
    "mixture_calls": "merging.ffn_recorder",
    "routing_observer": "tuner.observer",
    "training.conll_files": "data.conll",
    "training.glue_recipes": "finetuning.glue_recipes",
    "training.glue_suite": "finetuning.glue_suite",
    "training.packed_rows": "data.packing",
    "training.retrieval_rows": "data.retrieval_pairs",
    "training.row_files": "data.tables",
    "training.run_folder": "finetuning.run_folder",
    "training.run_settings": "finetuning.run_folder",
    "training.task_files": "data.sentences",
    "training.task_script": "finetuning.arguments, finetuning.checkpoint and finetuning.task_run",
    "training.tokenized_corpus": "data.corpus",
    "training.word_windows": "data.word_windows",
    "tuner_experts": "tuner.experts, tuner.lora and tuner.merge",
    "tuner_mol": "tuner.config, tuner.layer and tuner.model",
    "upcycle_bert": "upcycling.bert",
}


class MovedModuleFinder:
    """
    The last of Python's import finders: it is asked for modules that exist nowhere.

    Args:
        package: Name of this package.
    """

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """
        Raises:
            ModuleNotFoundError: the module moved.
        """
        package, _, module = fullname.partition(".")
        if package == self.package and module in MOVED_MODULES:
            raise ModuleNotFoundError(f"{fullname} moved to {package}.{MOVED_MODULES[module]}.", name=fullname)
        return None


def install(package: str) -> None:
    """Add a finder for the package to `sys.meta_path`, once."""
    if not any(isinstance(finder, MovedModuleFinder) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.append(MovedModuleFinder(package))
