"""Memory of a training process: what it asks of the C library's allocator, and how much its training took at most."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import torch

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


class PeakMemory:
    """The most memory that this process took from its making on.

    On a GPU: torch's allocations. On a CPU: resident anonymous memory, that is without mapped files (libraries as their code is first run, datasets); the
    kernel's mark of the resident peak is set back at the start, where it lets us, and pages of files are taken off at the end.

    Args:
        device: where training computes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            with contextlib.suppress(OSError):  # no Linux, or a kernel without it: the mark is then that of the whole life
                Path("/proc/self/clear_refs").write_text("5\n")
            self.before = resident().get("RssAnon", 0)

    def taken(self) -> int | None:
        """Bytes at the peak so far beyond those at the start; None where this system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        now = resident()
        if "VmHWM" not in now or "RssFile" not in now:
            return None
        return now["VmHWM"] - now["RssFile"] - now["RssShmem"] - self.before


def resident() -> dict[str, int]:
    """Bytes of /proc/self/status, by name; empty on systems without it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines)
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}
