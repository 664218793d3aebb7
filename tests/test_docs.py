# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The examples of the documentation run as written."""

import re

import torch
from small_models import REPOSITORY


def test_the_examples_of_the_tuner(tmp_path, monkeypatch, capsys):
    text = (REPOSITORY / "docs" / "tuner.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    printed = []
    for example in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(example, "docs/tuner.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert "trainable params" in printed[0] and printed[0].splitlines()[-1].startswith("64 ")
    assert printed[-1].count("torch.Size([4, 16, 8])") == 2
    with torch.no_grad():
        logits = names["folded"].eval()(names["batch"]["input_ids"]).logits
    assert logits.shape == (4, 2) and logits.isfinite().all()
