"""Waiting for other processes: marks that the watchdog reads, and the timeouts of collectives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

MIN_GROUP_TIMEOUT = 24 * 3600.0  # seconds


class WaitTracker:
    """Marks the sections in which a thread waits for other processes. Another thread reads `waiting`.

    A collective on a GPU returns at once; the first read of its result waits. On the stack such a read cannot be
    distinguished from a computation, hence the marks.
    """

    def __init__(self):
        self.depth = 0

    @property
    def waiting(self) -> bool:
        """Whether the thread is in a marked section."""
        return self.depth > 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Mark the body of a `with` statement."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


def raise_group_timeouts(hang_timeout: float) -> None:
    """Raise the timeout of every existing process group above the watchdog's.

    torch's default (10 minutes for NCCL) would abort first, without naming the stuck process, and also while processes
    wait for a long index build.

    Args:
        hang_timeout: guard.hang_timeout, seconds.
    """
    if not dist.is_initialized():
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=max(2 * hang_timeout, MIN_GROUP_TIMEOUT)), group)
