# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""
What `RouterCallback` adds to a training step.

    OMP_NUM_THREADS=1 python benchmarks/callback_speed.py

A Trainer fine-tunes a classifier of nano's shape. `RouterCallback` measures every second step, so that measured and
other steps take their turns. On one thread of a processor the processor's time is taken. `overhead` is that of a run
which logs every `--logging_steps` steps, of which `RouterCallback` measures one.
"""

import tempfile
import time

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from modernalbert import ModernALBERTConfig, ModernALBERTForSequenceClassification
from modernalbert.benchmarks.timing import benchmark_parser, positive, summarise, synchronise, write_results
from modernalbert.cli.allocator import keep_freed_memory
from modernalbert.diagnostics import RouterCallback


class EverySecondStep(RouterCallback):
    """Measures steps of odd numbers only."""

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        self._is_measuring = state.global_step % 2 == 1


class StepTimer(TrainerCallback):
    """Seconds of each step, other callbacks' part included."""

    def __init__(self, clock):
        self.clock = clock
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronise()
        self.start = self.clock()

    def on_step_end(self, args, state, control, **kwargs):
        synchronise()
        self.seconds.append(self.clock() - self.start)


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=15)
    parser.add_argument("--config", default="configs/nano", help="folder with a config.json")
    parser.add_argument("--rows", type=positive, default=32, help="rows of a step")
    parser.add_argument("--length", type=positive, default=64, help="tokens of a row")
    parser.add_argument("--logging_steps", type=positive, default=10, help="steps between log lines")
    arguments = parser.parse_args()
    config = ModernALBERTConfig.from_pretrained(arguments.config)
    torch.manual_seed(0)
    model = ModernALBERTForSequenceClassification(config)
    num_steps = 2 * (arguments.rounds + 1)  # the first of each kind warms up
    ids = torch.randint(5, config.vocab_size, (num_steps * arguments.rows, arguments.length)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": [i % config.num_labels for i in range(len(ids))]})
    is_one_thread = arguments.device == "cpu" and torch.get_num_threads() == 1
    timer = StepTimer(time.process_time if is_one_thread else time.perf_counter)
    if arguments.device == "cpu":
        keep_freed_memory()  # as the training scripts do
    with tempfile.TemporaryDirectory() as folder:
        training_arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=arguments.rows,
            num_train_epochs=1,
            logging_steps=num_steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=arguments.device == "cpu",
            bf16=arguments.dtype == "bfloat16",
        )
        trainer = Trainer(model, training_arguments, train_dataset=data)
        EverySecondStep.add_to(trainer)
        trainer.add_callback(timer)
        trainer.train()
    seconds = {"step": timer.seconds[2::2], "measured_step": timer.seconds[3::2]}
    results = summarise(seconds, "step")
    results["logging_steps"] = arguments.logging_steps
    results["overhead"] = (results["measured_step"]["ratio"] - 1) / arguments.logging_steps
    print(
        f"a step {results['step']['median_ms']:.0f} ms, a measured one {results['measured_step']['ratio']:.3f}x; "
        f"{results['overhead']:.2%} with a log line every {arguments.logging_steps} steps"
    )
    write_results(arguments, f"router_callback_{arguments.rows}x{arguments.length}_{arguments.dtype}", results)


if __name__ == "__main__":
    main()
