# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The examples of the documentation run as written."""

import re

import torch
from small_models import REPOSITORY


def test_the_example_of_the_tuner(tmp_path, monkeypatch, capsys):
    text = (REPOSITORY / "docs" / "tuner.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "docs/tuner.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "trainable params" in printed and printed.splitlines()[-1].startswith("64 ")
    with torch.no_grad():
        logits = names["folded"].eval()(names["batch"]["input_ids"]).logits
    assert logits.shape == (4, 2) and logits.isfinite().all()
