# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""`accelerate launch` and `torchrun` in the test's process, whose workers are forked: nothing is imported again."""

import logging
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import elastic_launch


def run_accelerate(logs: Path, *words) -> str:
    """Run `accelerate launch WORDS`; return what its workers wrote to standard error, or fail with it."""
    return _run(logs, lambda: launch_command(launch_command_parser().parse_args(list(map(str, words)))))


def run_machines(logs: Path, *launches) -> str:
    """Run one `accelerate launch` for each list of words, all at once; as `run_accelerate`."""
    logs.mkdir()
    fork = multiprocessing.get_context("fork")
    machines = [fork.Process(target=run_accelerate, args=(logs / str(i), *words)) for i, words in enumerate(launches)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join()
    written = _written(logs)
    assert [machine.exitcode for machine in machines] == [0] * len(machines), written
    return written


def run_torchrun(logs: Path, *words) -> str:
    """Run `torchrun --standalone --nproc_per_node 2 WORDS`; as `run_accelerate`."""
    options = ["--standalone", "--nproc_per_node", "2", *map(str, words)]
    return _run(logs, lambda: torchrun.run(torchrun.parse_args(options)))


def _run(logs: Path, launch) -> str:
    def launcher(config, entrypoint):
        if torch.accelerator.is_available():  # whose libraries do not survive a fork
            config.logs_specs = DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL)
            return elastic_launch(config, entrypoint)
        config.start_method = "fork"
        return lambda *words: elastic_launch(config, _run_script)(logs, *words)

    logs.mkdir()
    taken = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT  # by torchrun, for good
    handlers = {number: signal.getsignal(number) for number in taken}
    failure = None
    try:
        with mock.patch.object(torchrun, "elastic_launch", launcher):
            launch()
    except Exception as error:
        failure = error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert failure is None, f"{failure}\n{_written(logs)}"
    return _written(logs)


def _written(logs: Path) -> str:
    return "".join(file.read_text() for file in sorted(logs.rglob("*stderr.log")))


def _run_script(logs: Path, _unbuffered: str, script: str, *words: str) -> None:
    """Be `python -u SCRIPT WORDS`, in a forked process."""
    sys.stdout = sys.stderr = file = open(logs / f"{os.environ['RANK']}-stderr.log", "w", buffering=1)
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    logging.getLogger().handlers.clear()  # pytest's
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
