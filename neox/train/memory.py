"""What a training process asks of the C library's allocator."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters (malloc.h of glibc)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that tensors on the CPU free, for the next step to use again.

    By default it gives large blocks back to the kernel, which hands the same memory out again page by page, cleared: a step of Pythia-160M then
    takes 200,000 page faults and spends a tenth of its time in the kernel (docs/log.md). A step frees what the step before it freed, so that the peak
    stays where it is.

    Returns:
        Whether it was done: there is a glibc, and it agreed.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    wanted = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20))  # no blocks of their own, never trimmed
    return all(mallopt(parameter, value) == 1 for parameter, value in wanted)
