"""Saving beside training: the state is copied at the call, and written by a thread while the next steps run.

One writer at a time: a save that is due while the one before it is still being written waits for it. How a save ended, on every rank the
same, is asked for by `outcomes`. The copies lie in one block of memory, which the next save reuses; it is as large as what this process stores. For
tensors on a GPU it is page-locked, so that they are copied at the speed of the bus. `Saver.reserve` makes it before the first step.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from neox.checkpoint.consensus import RankGroup
from neox.checkpoint.manifest import Lineage, TensorInfo
from neox.checkpoint.reshard import Fragment
from neox.checkpoint.save import Content, Job
from neox.checkpoint.storage import LOCAL, Storage

logger = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes of a cache line; a multiple of every element's size


class HostBlock:
    """Memory of the host in bytes.

    Pages are locked by registering ordinary memory with CUDA: torch's own allocator of page-locked memory rounds every request up to a power of
    two. They stay locked until `release`, or until nobody holds the block.

    Args:
        size: bytes.
        locked: lock its pages. Where the system refuses (`ulimit -l`, a container's limit), the memory stays ordinary and a warning says so.
    """

    def __init__(self, size: int, locked: bool):
        self.memory = torch.empty(size, dtype=torch.uint8)
        self.locked = locked
        if not locked or size == 0:
            return
        error = int(torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), size, 0))
        if error:
            logger.warning("cannot lock %.1f GB of host memory (CUDA error %d): copies for checkpoints are slower", size / 1e9, error)
            return
        # the callback holds the memory, so that it is not freed before it is unlocked
        weakref.finalize(self, unlock, self.memory).atexit = False


def unlock(memory: torch.Tensor) -> None:
    """Undo the locking of HostBlock."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def room(count: int, dtype: torch.dtype) -> int:
    """Bytes that so many elements take in a block, padding included."""
    return -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT


class Snapshot:
    """Copies of fragments in memory of the host, in one block that the next snapshot reuses; only a larger one makes another.

    Args:
        allocate: (bytes, whether to lock the pages) -> HostBlock.
    """

    def __init__(self, allocate: Callable[[int, bool], HostBlock] = HostBlock):
        self._allocate = allocate
        self._block: HostBlock | None = None

    def reserve(self, size: int, locked: bool) -> HostBlock:
        """A block of at least so many bytes; the copies made before are lost."""
        if self._block is None or self._block.memory.numel() < size or (locked and not self._block.locked):
            self._block = None  # freed first: two would not fit
            self._block = self._allocate(size, locked)
        return self._block

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments with their data copied. The copies of the snapshot before are overwritten."""
        held = [(fragment, fragment.data.detach()) for fragment in fragments]
        size = sum(room(data.numel(), data.dtype) for _, data in held)
        memory = self.reserve(size, any(data.is_cuda for _, data in held)).memory
        out, devices, at = [], set(), 0
        for fragment, data in held:
            copy = memory[at : at + data.nbytes].view(data.dtype).view(data.shape)
            copy.copy_(data, non_blocking=data.is_cuda)
            if data.is_cuda:
                devices.add(data.device)
            at += room(data.numel(), data.dtype)
            out.append(replace(fragment, data=copy))
        for device in devices:
            torch.cuda.synchronize(device)
        return out


@dataclass(frozen=True)
class Outcome:
    """How the save of a step ended: its folder, or what went wrong."""

    step: int
    folder: Path | None
    error: BaseException | None


class Saver:
    """Writes the checkpoints of one run. Every rank makes the same calls in the same order.

    Args:
        root: folder of the run's checkpoints, on a file system that all ranks see.
        keep: newest checkpoints of this lineage to keep; 0: all.
        lineage: from `neox.checkpoint.retention.start_lineage`.
        rank, world_size: of this process.
        background: write in a thread; False: `save` returns when the checkpoint is durable.
        storage: system calls.
    """

    def __init__(self, root: Path, *, keep: int, lineage: Lineage, rank: int = 0, world_size: int = 1, background: bool = True, storage: Storage = LOCAL):
        self.root = root
        self.keep = keep
        self.lineage = lineage
        self.rank = rank
        self.world_size = world_size
        self.background = background
        self._storage = storage
        # Messages of its own: the thread's must not meet those of training. gloo, because the thread has no business on a GPU's stream.
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    def reserve(self, fragments: Iterable[Fragment]) -> None:
        """Make the memory for the copies of `fragments` now. Locking pages takes time: better before training than within it.

        It does nothing without `background`, and where no fragment is on a GPU: ordinary memory costs nothing until it is written.
        """
        size, locked = 0, False
        if self.background:
            for fragment in fragments:
                size, locked = size + room(fragment.data.numel(), fragment.data.dtype), locked or fragment.data.is_cuda
        if locked:
            self._snapshot.reserve(size, True)

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        *,
        state: dict[str, Any],
        rng: dict[str, torch.Tensor],
        config_lock: str,
        model_config: dict[str, Any],
        layout: dict[str, Any],
    ) -> float:
        """Begins a checkpoint of `step`; arguments as in `neox.checkpoint.save.save`. The bytes saved are those at the time of this call.

        Returns:
            Seconds for which training stood still.

        Raises:
            DiskError, CheckpointError: nothing was begun: the ranks could not agree on what to write, or a folder not be made. Without `background`
                that is all that can go wrong; with it, what the thread meets is in the `Outcome`.
        """
        begin = time.perf_counter()
        self.join()
        content = Content(step, state, config_lock, model_config, self.lineage, layout)
        job = Job(self.root, RankGroup(self.rank, self.world_size, self._group), content, self._storage)
        held, tensors = job.prepare(fragments, rng)
        if self.background:
            copies = self._snapshot.take(held)
            self._thread = threading.Thread(target=self._run, args=(job, step, copies, tensors), name="neox-checkpoint", daemon=True)
            self._thread.start()
        else:
            self._run(job, step, held, tensors)
        return time.perf_counter() - begin

    def _run(self, job: Job, step: int, held: list[Fragment], tensors: dict[tuple[str, str], TensorInfo]) -> None:
        try:
            self._outcomes.put(Outcome(step, job.complete(held, tensors, keep=self.keep), None))
        except BaseException as error:  # a thread has nobody to raise to: `outcomes` hands it on
            self._outcomes.put(Outcome(step, None, error))

    def outcomes(self) -> list[Outcome]:
        """How the saves ended that have ended since the last call, oldest first; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.join()
        return [self._outcomes.get() for _ in range(self._outcomes.qsize())]

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the writer, at most `timeout` seconds; whether it has ended. Raises nothing: for the way out after an error."""
        if self._thread is None:
            return True
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        self._thread = None
        return True
