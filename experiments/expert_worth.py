# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Masked-word loss of a pretrained model on held-out texts: routed, merged in several ways, and with its experts off.

    python experiments/expert_worth.py --model_name_or_path checkpoints/modernalbert-nano \\
        --validation_file validation.jsonl \\
        --output_file experiments/results/nano_experts.json

All models read the same masks. Differences to the routed model are of the mean loss per masked word, with 95 %
bootstrap intervals over texts. The file also has the routing on these texts, and how alike the experts of a group are.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from checkpoint_tasks import portable
from transformers import AutoModelForMaskedLM

from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, explain_loading, run
from modernalbert.diagnostics import RoutingReport
from modernalbert.experiments.study.bootstrap import Resampler, interval
from modernalbert.experiments.study.pretraining import batches, held_out_texts, masked_losses
from modernalbert.finetuning.checkpoint import check_weights
from modernalbert.merge_experts import merge_experts


def ways_to_merge(num_experts: int) -> dict[str, dict]:
    """Name -> arguments of merge_experts. With all weights zero the experts add nothing."""
    return {
        "uniform": {"weights": "uniform"},
        "ema": {"weights": "ema"},
        "calibrated": {"method": "calibrated"},
        "off": {"weights": [0.0] * num_experts},
    }


@dataclass
class WorthArguments:
    """Arguments: a pretrained model and held-out texts."""

    model_name_or_path: str = field(metadata={"help": "A ModernALBERT with experts and a masked-LM head."})
    validation_file: str = field(metadata={"help": "jsonl with a column text: the texts that are measured on."})
    output_file: str = field(metadata={"help": "JSON file to write."})
    num_texts: int = field(default=2000, metadata={"help": "Texts of --validation_file, from the first."})
    num_calibration_texts: int = field(
        default=400, metadata={"help": "The texts after these, which the calibrated merge is fitted to."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut."})


@torch.no_grad()
def main() -> None:
    (arguments,) = parse_arguments(WorthArguments, description=__doc__)
    name = arguments.model_name_or_path
    with explain_loading(f"--model_name_or_path {name}"):
        model, loaded = AutoModelForMaskedLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    check_weights(model.eval(), set(loaded["missing_keys"]), name, keeps_head=True)
    if not getattr(model.base_model, "expert_mixing", None) == "token":
        raise UserError(f"--model_name_or_path {name} has no experts to route to.")
    settings = {
        "arguments": {"max_seq_length": arguments.max_seq_length},
        "num_texts": arguments.num_texts + arguments.num_calibration_texts,
    }
    texts = held_out_texts(Path(arguments.validation_file), settings)
    if len(texts) <= arguments.num_texts:
        raise UserError(f"--validation_file {arguments.validation_file} has {len(texts)} texts: too few to calibrate.")
    texts, others = texts[: arguments.num_texts], texts[arguments.num_texts :]
    calibration = [batch for _, batch in batches(others, model.config.pad_token_id)]
    resampler = Resampler(len(texts))
    routed, counts = masked_losses(model, texts)
    rows = [{"way": "routed", "masked_loss": routed.sum() / counts.sum()}]
    for way, options in ways_to_merge(model.config.num_experts).items():
        merged = merge_experts(model, calibration=calibration, **options).model
        losses, _ = masked_losses(merged, texts)
        differences = resampler.loss_means((losses - routed)[None], counts)[:, 0]
        value, low, high = interval((losses - routed).sum() / counts.sum(), differences)
        loss = losses.sum() / counts.sum()
        rows.append({"way": way, "masked_loss": loss, "worse_by": value, "interval": [low, high]})
        print(json.dumps(rows[-1]), flush=True)
    inputs = [
        {k: v for k, v in batch.items() if k != "labels"} for _, batch in batches(texts, model.config.pad_token_id)
    ]
    report = RoutingReport.measure(model.base_model, inputs)
    results = {
        "command": portable(["python", *sys.argv]),
        "num_texts": len(texts),
        "num_masked_words": int(counts.sum()),
        "rows": rows,
        "smallest_usage": min(min(use.usage) for use in report.layers),
        "token_dependence": {f"layer {use.layer}": use.token_dependence for use in report.layers},
        "largest_expert_similarity": {
            f"group {group.group}": max(
                cosine for i, row in enumerate(group.similarity) for j, cosine in enumerate(row) if i < j
            )
            for group in report.groups
        },
    }
    Path(arguments.output_file).write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(json.dumps(results, indent=1))


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
