"""The failure of a run in the rendezvous store: the first error that is posted, and who has read it."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from typing import TypedDict

import torch.distributed as dist

from neox.errors import MemoryExhausted, NeoxError, PeerLost, out_of_memory, system_problem
from neox.runtime.processes import ProcessInfo

ERROR, ACKNOWLEDGED = "error", "acknowledged"
FAREWELL = 5.0  # seconds that the process of the store waits for the others to read the error
CONNECTION_ERRORS = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "connection refused",
    "remote process exited",
    "socket timeout",
)


class PostedError(TypedDict):
    """An error in the store: who posted it, the run's exit code, and the process that was lost or stuck, if any."""

    rank: int
    code: int
    id: int
    thread: int
    lost: ProcessInfo | None


class FailureChannel:
    """Posts and reads the failure of a run.

    Args:
        store: connection to the rendezvous store that nothing else uses.
        rank: rank of this process; rank 0 serves the store, or exits last.
    """

    def __init__(self, store: dist.Store, rank: int):
        self.store = store
        self.rank = rank

    def posted(self) -> PostedError | None:
        """The error that was posted first; None if there is none."""
        return json.loads(self.store.get(ERROR)) if self.store.check([ERROR]) else None

    def post(self, code: int, lost: ProcessInfo | None = None) -> PostedError:
        """Post an error of this thread, unless there is one. Returns the one that was posted first.

        Args:
            code: exit code of the run.
            lost: description of a process that is stuck or has exited; None for an ordinary error.
        """
        error: PostedError = {
            "rank": self.rank,
            "code": code,
            "id": os.getpid(),
            "thread": threading.get_ident(),
            "lost": lost,
        }
        return json.loads(self.store.compare_set(ERROR, "", json.dumps(error)))

    def wait_for_error(self, seconds: float) -> None:
        """Wait until an error is posted, at most `seconds`; half of it if the store has exited."""
        stop = time.monotonic() + seconds
        try:
            while time.monotonic() < stop and self.posted() is None:
                time.sleep(0.05)
        except RuntimeError:
            time.sleep(seconds / 2)

    def from_this_process(self, posted: PostedError) -> bool:
        """Whether this process posted the error."""
        return (posted["rank"], posted["id"]) == (self.rank, os.getpid())

    def from_this_thread(self, posted: PostedError) -> bool:
        """Whether this thread posted the error."""
        return self.from_this_process(posted) and posted["thread"] == threading.get_ident()

    def acknowledge(self, count: int) -> None:
        """Note that this process has read the error. Rank 0 waits until `count` processes have, or FAREWELL seconds."""
        with contextlib.suppress(RuntimeError):  # the store has exited
            self.store.add(ACKNOWLEDGED, 1)
            stop = time.monotonic() + FAREWELL
            while self.rank == 0 and time.monotonic() < stop and self.store.add(ACKNOWLEDGED, 0) < count:
                time.sleep(0.05)
            time.sleep(0.2 if self.rank == 0 else 0.0)


def as_neox_error(error: BaseException, rank: int = 0) -> NeoxError | None:
    """The error as one of ours, if its cause is known: a lost process, or what the system refused (memory, a file)."""
    if isinstance(error, NeoxError):
        return error
    text = str(error)
    if out_of_memory(error):
        return MemoryExhausted(
            "not enough memory",
            where=f"rank {rank}",
            got=text[:200],
            do="smaller train.micro_batch_size, train.activation_checkpointing: full, or a higher zero.stage",
        )
    if isinstance(error, RuntimeError) and any(word in text.lower() for word in CONNECTION_ERRORS):
        return PeerLost(
            "another process was lost", where=f"rank {rank}", got=text[:200], do="read its log; start again to resume"
        )
    return system_problem(error, f"rank {rank}")
