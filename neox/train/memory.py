"""Memory of a training process: tuning of the C library's allocator, and measurement of peaks."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

# mallopt's parameters (malloc.h of glibc)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that tensors on the CPU free, for the next step to use again.

    By default glibc returns large blocks to the kernel, which hands out the same memory again page by page, cleared. A
    step of Pythia-160M then takes 200,000 page faults and spends a tenth of its time in the kernel (docs/log.md).

    Returns:
        Whether it was done: the C library is glibc, and accepted the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    wanted = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20))  # no separate mappings, never trimmed
    return all(mallopt(parameter, value) == 1 for parameter, value in wanted)


class FreedMemory:
    """Keeps freed memory with the process from step to step, and returns it to the kernel when the heap has fragmented.

    Every step allocates the same blocks, but glibc (2.36) does not put them at the same addresses. torch aligns each
    tensor. The remainder of the alignment is used for small blocks, some of which outlive the step; the freed block is
    then too small for a request of its original size. Steps therefore touch more and more pages while the memory in use
    stays the same. A trim returns every free page of the heap, and the next step faults in only those that it needs.
    That costs up to half a step (docs/log.md), so it happens at most once every INTERVAL steps, and only if resident
    memory has grown by GROWTH.

    Call `after_step` after every step. Tensors on a GPU are not affected.
    """

    SETTLE = 10  # steps after a trim in which the pages that steps reuse are faulted in
    INTERVAL = 100  # steps
    GROWTH = 1.05  # of resident memory, relative to that SETTLE steps after the last trim

    def __init__(self):
        self.trim: Callable[[int], int] | None = None
        self.started = False
        self.steps = 0  # since the last trim
        self.settled = 0  # bytes resident SETTLE steps after the last trim

    def after_step(self) -> None:
        """Set up the allocator after the first step, when everything that stays, such as optimizer state, is allocated.

        Trim when due.
        """
        if not self.started:
            self.started = True
            if keep_freed_memory():
                self.trim = ctypes.CDLL(None).malloc_trim
                self.trim(0)
            return
        if self.trim is None:
            return
        self.steps += 1
        if self.steps == self.SETTLE:
            self.settled = resident_bytes()
        elif self.steps % self.INTERVAL == 0 and resident_bytes() > self.GROWTH * self.settled:
            self.trim(0)
            self.steps = 0


class MallInfo(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33 and later."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def in_use() -> int | None:
    """Bytes allocated from the C library, tensors included; None if the library does not report it."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):  # another C library, or an old one
        return None
    mallinfo.restype = MallInfo
    found = mallinfo()
    return found.uordblks + found.hblkhd


class PeakMemory:
    """Peak of the memory in use, relative to the memory in use when this was created.

    On a GPU: torch's allocations. On a CPU: allocations from the C library, polled a hundred times a second until
    `stop_polling`, and whenever `poll` is called. Resident memory is larger in both cases: free blocks between those in
    use stay with the process.

    Args:
        device: the device of the training.
    """

    INTERVAL = 0.01  # seconds

    def __init__(self, device: torch.device):
        self.device = device
        self.stopped = threading.Event()
        self.resident_before = resident_bytes()
        self.before: int | None
        self.peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        self.before = in_use()
        if self.before is not None:
            self.peak = self.before
            threading.Thread(target=self._watch, name="neox-memory", daemon=True).start()

    def _watch(self) -> None:
        while not self.stopped.wait(self.INTERVAL):
            self.poll()

    def poll(self) -> None:
        """Note the memory in use now."""
        now = None if self.device.type == "cuda" else in_use()
        if now is not None:
            self.peak = max(self.peak, now)

    def stop_polling(self) -> None:
        """Stop polling in the background: later steps are the same."""
        self.stopped.set()

    def peak_bytes(self) -> int | None:
        """Bytes of the peak so far, relative to the start; None if the system does not report it."""
        if self.before is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self.peak
        return peak - self.before

    def resident(self) -> int:
        """Peak of resident bytes relative to the start; on a GPU, the bytes that torch's allocator has reserved."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.resident_before, 0)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that the processes of this host can still allocate, swap included.

    This is what the kernel reports, or what the limits of our control groups (v1 or v2, including a container's) leave,
    whichever is less. None if the system does not report it.

    Args:
        root: folder that replaces / in tests.
    """
    try:
        lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines() if ":" in line)
        rooms = [sum(int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))]
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, KeyError, ValueError):
        return None
    for group in groups:
        number, controllers, path = group.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            top, names = (root / "sys/fs/cgroup", V2) if number == "0" else (root / "sys/fs/cgroup/memory", V1)
            folder = top / path.lstrip("/")
            rooms += [
                room
                for each in (folder, *folder.parents)
                if each.is_relative_to(top) and (room := group_room(each, *names)) is not None
            ]
    return max(min(rooms), 0)


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def group_room(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Bytes that the limit of one control group leaves, reclaimable file pages included; None if there is no limit."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int((folder / limit).read_text()) - int((folder / usage).read_text()) + int(stat.get(reclaimable, 0))
    except (OSError, ValueError):  # not there, or "max"
        return None


def resident_bytes() -> int:
    """Resident memory of this process now; 0 if /proc does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
