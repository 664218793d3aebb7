# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""run_pretraining.py, fully sharded over processes without GPUs, where Accelerate by itself would only copy."""

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from modernalbert.run_pretraining import command


start = PartialState.__init__


def start_as_on_gpus(self, *args, **kwargs) -> None:
    start(self, *args, **kwargs)
    if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = start_as_on_gpus
    command()
