# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""The C library's memory, on the CPU: a training step asks for the same large blocks again and again."""

import ctypes
import platform


# Names and numbers of mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
LARGEST_INT = 2**31 - 1
TOP_PAD_BYTES = 2**28


def keep_freed_memory() -> bool:
    """
    Let the process keep the memory it frees, instead of giving it back to the system and asking again.

    By default glibc maps every block above 32 MB afresh, and each page faults at its first write. In training on the
    CPU this costs as much as the arithmetic (benchmarks/training_speed.py). The process keeps its peak size.

    Returns:
        Whether glibc is there and accepted the settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: LARGEST_INT, M_TOP_PAD: TOP_PAD_BYTES}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
