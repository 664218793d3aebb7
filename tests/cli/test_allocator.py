# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
import platform
import subprocess
import sys

import pytest


# Page faults of writing ten new blocks of 80 MB one after the other.
COUNT_FAULTS = """
import resource
import torch
from modernalbert.cli.allocator import keep_freed_memory

def fill():
    torch.empty(20_000_000).fill_(1.0)

{first}
for _ in range(3):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_kept_memory_does_not_fault_again():
    def count_faults(first: str) -> int:
        code = COUNT_FAULTS.format(first=first)
        return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)

    fresh, kept = (count_faults(first) for first in ("", "assert keep_freed_memory()"))
    assert fresh > 1000
    # Not zero: the heap may grow once more before a freed block fits.
    assert kept < fresh / 2
