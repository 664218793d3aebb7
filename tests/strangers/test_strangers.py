# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Our outputs in fresh environments without this package, with the oldest and newest libraries that we state.

    pytest -m slow tests/strangers

Each environment is made by `python -m venv` and pip; torch is taken from the environment that runs the tests.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import REPOSITORY, tiny_model

from modernalbert import ModernALBERTForMaskedLM
from modernalbert.configuration_modernalbert import MIN_TRANSFORMERS_VERSION
from modernalbert.export import export_to_hub_folder, to_modernbert
from modernalbert.merge_experts import merge_experts


pytestmark = pytest.mark.slow
LOAD = Path(__file__).parent / "load.py"
# Environment -> what pip installs, and the folders that must load there.
EVERYTHING = ("modernbert", "hub", "merge")
ENVIRONMENTS = {
    "oldest": (["transformers==5.17.0", "peft==0.21.0"], EVERYTHING),
    "newest": (["--upgrade", "transformers", "peft"], EVERYTHING),
    "modernbert-4.48": (["transformers==4.48.0"], ("modernbert",)),
}


def make_environment(folder: Path, packages: list[str]) -> Path:
    """A virtual environment with those packages and this one's torch; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "torch_of_the_tests.pth").write_text(str(Path(torch.__file__).parents[1]))
    python = folder / "bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python


def run_stranger(python: Path, outputs: Path, home: Path) -> subprocess.CompletedProcess:
    home.mkdir(exist_ok=True)
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run([python, LOAD, outputs], env=environment, cwd=home, capture_output=True, text=True)


def write_outputs(folder: Path, kinds: tuple[str, ...], tokenizer) -> None:
    layers = ["full_attention", "sliding_attention", "sliding_attention"] * 2
    model = tiny_model(ModernALBERTForMaskedLM, skip_first_attn_norm=True, layer_types=layers, vocab_size=30522)
    report = merge_experts(model, weights="ema")
    ids = torch.arange(3, 39).view(2, 18)
    with torch.no_grad():
        tokens = torch.tensor(tokenizer("A film.")["input_ids"])
        expected = {"tokens": tokens, "ids": ids, "routed": model(ids).logits, "merged": report.model(ids).logits}
    folder.mkdir()
    save_file(expected, folder / "expected.safetensors")
    writers = {
        "hub": lambda place: export_to_hub_folder(model, tokenizer, place),
        "modernbert": lambda place: export_to_hub_folder(to_modernbert(report.model), tokenizer, place),
        "merge": report.save,
    }
    for kind in kinds:
        writers[kind](folder / kind)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_outputs_load_without_this_package(tmp_path, name, nano_tokenizer):
    packages, kinds = ENVIRONMENTS[name]
    write_outputs(tmp_path / "outputs", kinds, nano_tokenizer)
    python = make_environment(tmp_path / "venv", packages)
    done = run_stranger(python, tmp_path / "outputs", tmp_path / "home")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" ok\n") == {1: 1, 3: 4}[len(kinds)]
    for package in packages:
        if "==" in package:
            assert package.replace("==", " ") in done.stdout


def test_too_old_a_transformers_gets_one_sentence(tmp_path, nano_tokenizer):
    write_outputs(tmp_path / "outputs", ("hub",), nano_tokenizer)
    python = make_environment(tmp_path / "venv", ["transformers==5.16.0"])
    done = run_stranger(python, tmp_path / "outputs", tmp_path / "home")
    assert done.returncode != 0
    assert f"ModernALBERT needs transformers >= {MIN_TRANSFORMERS_VERSION}, this is 5.16.0" in done.stderr


def test_the_oldest_versions_are_those_we_state():
    stated = re.findall(r'"(transformers|peft)>=([\d.]+)"', (REPOSITORY / "setup.py").read_text())
    oldest = dict(package.split("==") for package in ENVIRONMENTS["oldest"][0])
    assert {name: oldest[name].removesuffix(".0") for name in oldest} == dict(stated)
    assert oldest["transformers"] == MIN_TRANSFORMERS_VERSION
