"""The channel beside the collectives: one process's failure ends all of them, with its message and its exit code.

A process that fails posts its error in the rendezvous store and prints it; a thread of every other process looks there twice a
second, also while its main thread is stuck in a collective, and ends it with the same code. The first error posted is the origin;
what breaks in its wake (lost connections) is not reported.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from neox.errors import MemoryExhausted, NeoxError, PeerLost
from neox.train.place import Place

POLL = 0.5  # seconds between two looks at the store
FAREWELL = 8.0  # seconds that a failed process waits for the others to learn of it
ERROR, SEEN = "error", "seen"


class Control:
    """The channel of one process.

    Args:
        store: connection to the rendezvous store that nothing else uses; None where this process works alone.
        rank, world_size: of this process.
    """

    def __init__(self, store: dist.Store | None, rank: int, world_size: int):
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.closed = threading.Event()
        if store is not None:
            threading.Thread(target=self.watch, name="neox-control", daemon=True).start()

    def watch(self) -> None:
        """Thread: end the process as soon as another has posted an error, or the store is gone."""
        while not self.closed.wait(POLL):
            try:
                found = self.store.check([ERROR])
            except RuntimeError as error:
                if not self.closed.is_set():
                    print(PeerLost("the first process is gone", where=f"rank {self.rank}", got=str(error)[:120]).line(), file=sys.stderr, flush=True)
                    self.leave(PeerLost.exit_code)
            else:
                if found and not self.closed.is_set():
                    code = json.loads(self.store.get(ERROR))["code"]
                    self.part()
                    self.leave(code)

    def finish(self) -> None:
        """The good end of a run: stop watching, then leave together."""
        self.closed.set()
        if self.store is not None:
            dist.barrier()
            dist.destroy_process_group()

    def fail(self, error: BaseException, report: Callable[[], None]) -> int:
        """Report this process's failure to all; returns the exit code of all.

        Args:
            error: what ended this process.
            report: prints it. Called where this process is the origin, before the others end: a launcher that sees them go says so at once,
                and ends the rest.
        """
        self.closed.set()
        mine = as_neox_error(error, self.rank)
        code = mine.exit_code if mine is not None else 1
        if self.store is None:
            report()
            return code
        if isinstance(mine, PeerLost):
            self.wait_for_origin()
        try:
            posted = json.loads(self.store.compare_set(ERROR, "", json.dumps({"rank": self.rank, "code": code, "id": os.getpid()})))
        except RuntimeError:
            report()
            return code
        if (posted["rank"], posted["id"]) == (self.rank, os.getpid()):
            report()
        self.part()
        return posted["code"]

    def wait_for_origin(self) -> None:
        """A connection broke: whoever broke it may be about to say why."""
        end = time.monotonic() + 2.0
        try:
            while time.monotonic() < end and not self.store.check([ERROR]):
                time.sleep(0.05)
        except RuntimeError:
            return

    def part(self) -> None:
        """Tell that this process has seen the error; the store's own process waits until all have, or FAREWELL seconds."""
        try:
            self.store.add(SEEN, 1)
            end = time.monotonic() + FAREWELL
            while self.rank == 0 and time.monotonic() < end and self.store.add(SEEN, 0) < self.world_size:
                time.sleep(0.05)
            time.sleep(0.2 if self.rank == 0 else 0.0)
        except RuntimeError:
            return

    def leave(self, code: int) -> None:
        """End the process now; its main thread may be stuck in a collective."""
        with contextlib.suppress(OSError):  # the reader may be gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def connect(place: Place) -> Control:
    """Open the channel over the rendezvous store, which must be up (init_process_group has run)."""
    if place.world_size == 1:
        return Control(None, place.rank, place.world_size)
    client = dist.TCPStore(place.address, place.port, world_size=None, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    return Control(dist.PrefixStore("neox-control", client), place.rank, place.world_size)


def as_neox_error(error: BaseException, rank: int = 0) -> NeoxError | None:
    """The error as one of ours where it is one in substance: out of memory, or a connection that a lost process broke."""
    if isinstance(error, NeoxError):
        return error
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return MemoryExhausted(
            "not enough memory",
            where=f"rank {rank}",
            got=text[:200],
            do="smaller train.micro_batch_size, train.activation_checkpointing: full, or a higher zero.stage",
        )
    lost = ("connection closed by peer", "connection reset", "broken pipe", "connection refused", "remote process exited", "socket timeout")
    if isinstance(error, RuntimeError) and any(word in text.lower() for word in lost):
        return PeerLost("another process was lost", where=f"rank {rank}", got=text[:200], do="look at its log; start again to resume")
    return None
