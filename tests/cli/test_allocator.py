# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from modernalbert.cli import allocator


# Page faults of writing ten new blocks of 80 MB one after the other. A process of its own: the settings are for good.
COUNT_FAULTS = """
import ctypes
import resource
import runpy

libc, size = ctypes.CDLL(None), 80_000_000
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def fill():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)

keep_freed_memory = runpy.run_path({file!r})["keep_freed_memory"]
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
        code = COUNT_FAULTS.format(file=str(Path(allocator.__file__)), first=first)
        return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)

    fresh, kept = (count_faults(first) for first in ("", "assert keep_freed_memory()"))
    assert fresh > 100  # with huge pages some 40 a block, else 20,000
    # Not zero: the heap may grow once more before a freed block fits.
    assert kept < fresh / 2
