# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
What a stranger does with our outputs, in an environment without this package: `python load.py FOLDER`.

Each folder of FOLDER that is there is loaded; outputs must be those in FOLDER/expected.safetensors.
"""

import importlib.util
import os
import sys

import torch
import transformers
from safetensors.torch import load_file


def check(name, outputs):
    difference = (outputs - expected[name]).abs().max().item()
    assert difference < 1e-4, f"{name}: {difference}"
    print(name, "ok")


root = sys.argv[1]
assert importlib.util.find_spec("modernalbert") is None
print("transformers", transformers.__version__)
expected = load_file(os.path.join(root, "expected.safetensors"))
ids = expected["ids"]


def place(name):
    return os.path.join(root, name)


with torch.no_grad():
    if os.path.isdir(place("modernbert")):
        model = transformers.AutoModelForMaskedLM.from_pretrained(place("modernbert")).eval()
        check("merged", model(ids).logits)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place("modernbert"))
        assert tokenizer("A film.", return_tensors="pt").keys() == {"input_ids", "attention_mask"}
        assert tokenizer("A film.")["input_ids"] == expected["tokens"].tolist()
    if os.path.isdir(place("hub")):
        model = transformers.AutoModelForMaskedLM.from_pretrained(place("hub"), trust_remote_code=True).eval()
        check("routed", model(ids).logits)
    if os.path.isdir(place("merge")):
        import peft

        print("peft", peft.__version__)
        folded = place("merge/folded")
        model = transformers.AutoModelForMaskedLM.from_pretrained(folded, trust_remote_code=True).eval()
        check("merged", model(ids).logits)
        base = transformers.AutoModelForMaskedLM.from_pretrained(place("merge/base"), trust_remote_code=True)
        check("merged", peft.PeftModel.from_pretrained(base, place("merge/adapter")).eval()(ids).logits)
