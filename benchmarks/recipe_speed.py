# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Speed of a recipe of configs/pretraining: the teacher's forward, the student's forward and backward, AdamW.

    python benchmarks/recipe_speed.py --recipe configs/pretraining/tiny.json [--device cuda] [--dtype bfloat16]
    python benchmarks/recipe_speed.py --recipe configs/pretraining/tiny.json --rows 1

Student and teacher have random weights, the teacher the shape of the recipe's; masks, terms of the loss and the rows of
a step are the recipe's (`--rows` is for what has less memory). Sequences are of random tokens, most as long as a row,
as the documents of a web corpus are once they are cut. "tokens_per_second" is of one device; what the whole recipe
takes at that speed is in docs/pretraining.md; on a GPU "peak_megabytes" is all that was allocated at once.
"""

import json
import tempfile
from dataclasses import fields
from pathlib import Path

import torch
from transformers import ModernBertConfig, ModernBertForMaskedLM

from modernalbert import ModernALBERTConfig, ModernALBERTForMaskedLM
from modernalbert.benchmarks.timing import benchmark_parser, positive, summarise, time_in_turn, write_results
from modernalbert.benchmarks.training_speed import known_peak, make_step, packed_rows, step_flops, synthetic_corpus
from modernalbert.cli.errors import UserError, run
from modernalbert.training.distillation import DistillationConfig, DistilledStudent, Teacher


CONFIGS = Path(__file__).parents[1] / "configs"
# Shapes of the recipes' teachers, where they differ from the defaults.
TEACHERS = {
    "ModernBERT-base": {},
    "ModernBERT-large": {
        "hidden_size": 1024,
        "intermediate_size": 2624,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
}
# Of the sequences' lengths in tokens, before they are cut to a row.
MEDIAN_LENGTH = 800


def read_recipe(file: str) -> dict:
    """
    A recipe, with the terms of its loss under "distillation".

    Raises:
        UserError: it cannot be read, or its teacher's shape is not known here.
    """
    try:
        recipe = json.loads(Path(file).read_text("utf-8"))
        teacher = recipe["teacher_name_or_path"].rpartition("/")[2]
        terms = {term.name: recipe[term.name] for term in fields(DistillationConfig) if term.name in recipe}
        recipe["distillation"] = DistillationConfig(**terms)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"--recipe {file} is not a recipe of configs/pretraining: {error!r}") from None
    if teacher not in TEACHERS:
        raise UserError(f"--recipe {file}: the teacher must be one of {', '.join(TEACHERS)}; it is {teacher}.")
    return recipe | {"teacher": teacher}


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=7)
    parser.add_argument("--recipe", default=str(CONFIGS / "pretraining" / "tiny.json"))
    parser.add_argument("--rows", type=positive, help="of a device's step; default: the recipe's")
    parser.add_argument("--attn_implementation", default="sdpa")
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.recipe)
    size, length = Path(arguments.recipe).stem, recipe["row_length"]
    rows = arguments.rows or recipe["per_device_train_batch_size"]
    config = ModernALBERTConfig.from_pretrained(CONFIGS / size)
    config._attn_implementation = arguments.attn_implementation
    teacher_config = ModernBertConfig(vocab_size=config.vocab_size, **TEACHERS[recipe["teacher"]])
    teacher_config._attn_implementation = arguments.attn_implementation

    with tempfile.TemporaryDirectory() as folder:
        corpus = synthetic_corpus(Path(folder), config.vocab_size, length, MEDIAN_LENGTH)
        batch, _ = packed_rows(corpus, config, rows, length, recipe["mlm_probability"])
    batch = {name: values.to(arguments.device) for name, values in batch.items()}

    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    distillation: DistillationConfig = recipe["distillation"]
    layer_map = distillation.resolved_layer_map(config.num_hidden_layers, teacher_config.num_hidden_layers)
    teacher = Teacher(ModernBertForMaskedLM(teacher_config).to(arguments.device, dtype), distillation, layer_map)
    student = DistilledStudent(ModernALBERTForMaskedLM(config), distillation, layer_map, teacher_config.hidden_size)
    student.to(arguments.device).train()

    def ask():
        return teacher(batch["input_ids"], batch["position_ids"], batch["attention_mask"], batch["labels"])

    functions = {"step": make_step(student, batch, dtype, ask), "teacher": ask}
    results: dict = summarise(time_in_turn(functions, arguments.rounds), "step")
    seconds = results["step"]["median_ms"] / 1000
    results["tokens_per_second"] = int(batch["attention_mask"].sum()) / seconds
    results["attn_implementation"] = arguments.attn_implementation
    if torch.device(arguments.device).type == "cuda":
        results["peak_megabytes"] = torch.cuda.max_memory_allocated() / 1e6
    print(
        f"{size}, {arguments.dtype}, {rows} x {length}: {results['tokens_per_second']:,.0f} tokens/s,"
        f" {seconds:.2f} s a step, {results['teacher']['ratio']:.0%} of it the teacher's"
    )
    if arguments.dtype == "bfloat16" and (peak := known_peak(arguments.device)):
        results["mfu"] = step_flops(student, batch) / seconds / (peak * 1e12)
        print(f"MFU of the student's arithmetic {results['mfu']:.1%}")
    write_results(arguments, f"recipe_{size}_{arguments.dtype}_{rows}x{length}", results)


if __name__ == "__main__":
    run(main)
