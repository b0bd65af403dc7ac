"""Waiting for other processes: the marks that tell a watcher of it, and how long torch lets a collective wait."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

MIN_GROUP_TIMEOUT = 24 * 3600.0  # seconds


class WaitTracker:
    """Marks the parts of a program in which its thread waits for other processes. Another thread reads `waiting`.

    A collective on a GPU returns at once; what waits is whatever reads its result. No call on the stack tells such a read from a computation.
    """

    def __init__(self):
        self.depth = 0

    @property
    def waiting(self) -> bool:
        """Whether the thread is in a marked part."""
        return self.depth > 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Mark the body of a `with`."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


def raise_group_timeouts(hang_timeout: float) -> None:
    """Set the timeout of every process group that exists beyond the time after which the run ends a stuck process itself.

    torch's own (10 minutes for NCCL) would abort first, without a name, and also while other processes wait for a long index build.

    Args:
        hang_timeout: guard.hang_timeout, seconds.
    """
    if not dist.is_initialized():
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=max(2 * hang_timeout, MIN_GROUP_TIMEOUT)), group)
