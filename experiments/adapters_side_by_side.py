# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
Adapters side by side on a pretrained encoder: MoL, a LoRA of as many parameters, Lily, and the classifier alone.

    python experiments/adapters_side_by_side.py --model_name_or_path $TEACHER \\
        --tasks sst2=$DATA_DIR/sst2 rte=$DATA_DIR/rte --output_dir outputs/adapters

All sit on the feed-forward networks, with the same learning rate, epochs and seed; the base is frozen, the classifier
trained. The figure is that of the last epoch: the validation rows choose nothing. `results.json` holds figures and
settings. Stop it when you like; run it again and it goes on with what is missing.
"""

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft import LilyConfig, LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from modernalbert import MoLConfig
from modernalbert.cli.arguments import parse_arguments
from modernalbert.cli.errors import UserError, error_message, run
from modernalbert.data.glue_tasks import GLUE_TASKS
from modernalbert.data.sentences import load_task_file
from modernalbert.finetuning.arguments import TaskTrainingArguments
from modernalbert.run_glue import make_trainer, tokenize


# The linear layers of a BERT's feed-forward networks.
LINEARS = r".*encoder\.layer\.\d+\.(intermediate|output)\.dense"
# Ranks give all three the same number of parameters, to 2 %, on all-MiniLM-L6-v2.
ADAPTERS: dict[str, PeftConfig] = {
    "classifier alone": LoraConfig(r=1, target_modules=LINEARS, task_type="SEQ_CLS"),
    "MoL, 8 experts of rank 8, 2 per token": MoLConfig(r=8, lora_alpha=16, task_type="SEQ_CLS"),
    "LoRA, rank 65": LoraConfig(r=65, lora_alpha=130, target_modules=LINEARS, task_type="SEQ_CLS"),
    "Lily, rank 111": LilyConfig(r=111, stride_A=2, num_B=4, target_modules=LINEARS, task_type="SEQ_CLS"),
}


@dataclass
class AdapterArguments:
    """Which base on which tasks."""

    model_name_or_path: str = field(metadata={"help": "A BERT: folder or Hub name."})
    tasks: list[str] = field(metadata={"help": "TASK=FOLDER, a GLUE task's name and train.jsonl, validation.jsonl."})
    output_dir: str = field(metadata={"help": "Where results.json goes."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of all."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Of all."})
    seed: int = field(default=0, metadata={"help": "Of all."})


def adapted(name: str, base: torch.nn.Module) -> torch.nn.Module:
    """The base with one of `ADAPTERS` on it."""
    model = get_peft_model(base, ADAPTERS[name])
    if name == "classifier alone":
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("modules_to_save" in parameter_name)
    return model


def main() -> None:
    (arguments,) = parse_arguments(AdapterArguments, description=__doc__)
    transformers.utils.logging.set_verbosity_error()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    file = Path(arguments.output_dir, "results.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(file.read_text()) if file.is_file() else []
    finished = {(result["task"], result["adapter"]) for result in results}
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path cannot be loaded: {error_message(error)}") from None
    for pair in arguments.tasks:
        name, _, folder = pair.partition("=")
        if name not in GLUE_TASKS or not folder:
            raise UserError(f"--tasks {pair} is not allowed: it must be TASK=FOLDER, of {', '.join(GLUE_TASKS)}.")
        task = GLUE_TASKS[name]
        splits = (load_task_file(str(Path(folder, f"{split}.jsonl")), task) for split in ("train", "validation"))
        train, validation = (tokenize(split, tokenizer, 256) for split in splits)
        for adapter in ADAPTERS:
            if (name, adapter) in finished:
                continue
            transformers.set_seed(arguments.seed)
            base = AutoModelForSequenceClassification.from_pretrained(
                arguments.model_name_or_path, num_labels=len(task.labels), dtype=torch.float32
            )
            model = adapted(adapter, base)
            training = TaskTrainingArguments(
                output_dir=str(file.parent / "trainer"),
                learning_rate=arguments.learning_rate,
                num_train_epochs=arguments.num_train_epochs,
                seed=arguments.seed,
                eval_strategy="no",
                save_strategy="no",
            )
            trainer = make_trainer(model, tokenizer, task, training, train, validation)
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
            score = trainer.evaluate()[f"eval_{task.metrics[0]}"]
            trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            results.append(
                {
                    "task": name,
                    "adapter": adapter,
                    "metric": task.metrics[0],
                    "score": score,
                    "trained_parameters": trainable,
                    "training_seconds": seconds,
                    "train_rows": len(train),
                    "validation_rows": len(validation),
                    "learning_rate": arguments.learning_rate,
                    "num_train_epochs": arguments.num_train_epochs,
                    "seed": arguments.seed,
                }
            )
            file.write_text(json.dumps(results, indent=2) + "\n")
            print(f"{name:6s} {adapter:40s} {100 * score:5.1f} {trainable:10,} parameters {seconds:6.0f} s")


def command() -> None:
    run(main)


if __name__ == "__main__":
    command()
