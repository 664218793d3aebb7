# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
The model cards of all sizes, from `template.md` and one file of facts each.

    python model_cards/write_cards.py [--check]

A file of facts is an object with `name`, `published` (whether this repository has the checkpoint), `reconstructed`
(rows of the table of sizes that the paper does not state), `teacher`, `stored_dtype`, and as lines of Markdown
`description`, `training` and `measured`. Where nothing was measured, `measured` is an object of rows and null. The
sizes come from `configs/NAME/config.json`. Tables between markers in a card stay as `experiments/document_tables.py`
filled them.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch

from modernalbert import ModernALBERTConfig, ModernALBERTModel


FOLDER = Path(__file__).parent
MARKED = re.compile(r"(<!-- (\w+) table -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def render_card(facts: dict, config: ModernALBERTConfig, earlier: str = "") -> str:
    """The card of one size; tables between markers are taken from the `earlier` card."""
    location = f"checkpoints/modernalbert-{facts['name']}" if facts["published"] else f"modernalbert-{facts['name']}"
    values = {
        "name": facts["name"],
        "location": location,
        "description": "\n".join(facts["description"]),
        "sizes": sizes_table(facts, config),
        "training": "\n".join(facts["training"]),
        "measured": measured_section(facts["measured"]),
        "authorship": "this checkpoint is not the authors'"
        if facts["published"]
        else "the weights are not the authors'",
    }
    card = (FOLDER / "template.md").read_text("utf-8")
    for name, value in values.items():
        card = card.replace("{" + name + "}", value)
    filled = {name: match for match, name in ((found[0], found[2]) for found in MARKED.finditer(earlier))}
    return MARKED.sub(lambda found: filled.get(found[2], found[0]), card)


def sizes_table(facts: dict, config: ModernALBERTConfig) -> str:
    """What a model of this size is; rows that the paper does not state are marked."""
    with torch.device("meta"):
        parameters = ModernALBERTModel(config).num_parameters()
    rows = {
        "parameters of the encoder": f"{parameters:,}",
        "hidden size, heads": f"{config.hidden_size}, {config.num_attention_heads}",
        "layers = groups x depth": f"{config.num_hidden_layers} = {config.num_groups} x {config.group_depth}",
        "FFN, MoL FFN": f"{config.intermediate_size}, {config.ffn_width(config.modulated_groups[0])}",
        "experts": f"{config.num_experts} of rank {config.lora_rank}, {config.num_experts_per_tok} per token, "
        f"in the last {len(config.modulated_groups)} of {config.num_groups} groups",
        "teacher": facts["teacher"],
        "weights": f"stored in {facts['stored_dtype']}" if facts["stored_dtype"] else "none yet",
    }
    unknown = set(facts["reconstructed"]) - set(rows)
    if unknown:
        raise ValueError(f"reconstructed={sorted(unknown)} is not allowed: rows are {', '.join(rows)}.")
    lines = [f"| {row}{'*' if row in facts['reconstructed'] else ''} | {value} |" for row, value in rows.items()]
    note = "\n\n\\* reconstructed: the paper states the number of parameters, with which it agrees."
    return "\n".join(["| | |", "|---|---|", *lines]) + (note if facts["reconstructed"] else "")


def measured_section(measured: list[str] | dict[str, str | None]) -> str:
    """Lines of Markdown as they are; an object of rows as a table that says what was not measured."""
    if isinstance(measured, list):
        return "\n".join(measured)
    rows = [f"| {name} | {'not measured' if value is None else value} |" for name, value in measured.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a card is not up to date")
    check = parser.parse_args().check
    for file in sorted(FOLDER.glob("*.json")):
        facts = json.loads(file.read_text("utf-8"))
        config = ModernALBERTConfig.from_pretrained(FOLDER.parent / "configs" / facts["name"])
        card_file = FOLDER / f"modernalbert-{facts['name']}.md"
        earlier = card_file.read_text("utf-8") if card_file.is_file() else ""
        card = render_card(facts, config, earlier)
        if check and card != earlier:
            sys.exit(f"{card_file}: not up to date: python model_cards/write_cards.py")
        if not check:
            card_file.write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
