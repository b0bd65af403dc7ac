"""Asynchronous saving: the state is copied at the call, and a thread writes it while the next steps run.

There is one writer: a save that is due while the previous one is still being written waits for it. `outcomes` reports
how saves ended, identically on every rank.

The copies lie in one block of memory, which the next save reuses; it is as large as what this process stores. For
tensors on a GPU it is page-locked, so that they are copied at bus speed. `Saver.reserve` allocates it before the first
step.
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
from types import ModuleType

import torch
import torch.distributed as dist

from neox.checkpoint.consensus import RankGroup
from neox.checkpoint.manifest import Lineage
from neox.checkpoint.reshard import Fragment
from neox.checkpoint.save import Content, SaveJob, TensorTable
from neox.checkpoint.storage import LOCAL, Storage
from neox.files import JsonObject

logger = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes of a cache line; a multiple of every element's size


class HostBlock:
    """A block of host memory.

    Pages are locked by registering ordinary memory with CUDA: torch's allocator of page-locked memory rounds every
    request up to a power of two. They stay locked until the block is freed.

    Args:
        size: bytes.
        locked: lock its pages. Where the system refuses (`ulimit -l`, a container's limit), the memory stays pageable
            and a warning is logged.
    """

    def __init__(self, size: int, locked: bool):
        self.memory = torch.empty(size, dtype=torch.uint8)
        self.locked = locked
        if not locked or size == 0:
            return
        error = int(cuda_runtime().cudaHostRegister(self.memory.data_ptr(), size, 0))
        if error:
            logger.warning(
                "cannot lock %.1f GB of host memory (CUDA error %d): copies for checkpoints are slower",
                size / 1e9,
                error,
            )
            return
        # the callback holds the memory, so that it is not freed before it is unlocked
        weakref.finalize(self, unlock, self.memory).atexit = False


def unlock(memory: torch.Tensor) -> None:
    """Unlock the pages of a HostBlock."""
    cuda_runtime().cudaHostUnregister(memory.data_ptr())


def cuda_runtime() -> ModuleType:
    """The functions of CUDA's runtime. Raises RuntimeError where torch was built without CUDA."""
    runtime = torch.cuda.cudart()
    if runtime is None:
        raise RuntimeError("torch was built without CUDA")
    return runtime


def padded_bytes(count: int, dtype: torch.dtype) -> int:
    """Bytes that `count` elements take in a block, padding included."""
    return -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT


class Snapshot:
    """Copies of fragments in host memory, in one block that the next snapshot reuses.

    Only a larger snapshot reallocates.

    Args:
        allocate: (bytes, whether to lock the pages) -> HostBlock.
    """

    def __init__(self, allocate: Callable[[int, bool], HostBlock] = HostBlock):
        self._allocate = allocate
        self._block: HostBlock | None = None

    def reserve(self, size: int, locked: bool) -> HostBlock:
        """A block of at least `size` bytes; earlier copies are lost."""
        if self._block is None or self._block.memory.numel() < size or (locked and not self._block.locked):
            self._block = None  # freed first: two would not fit
            self._block = self._allocate(size, locked)
        return self._block

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments with their data copied. The copies of the previous snapshot are overwritten."""
        held = [(fragment, fragment.data.detach()) for fragment in fragments]
        size = sum(padded_bytes(data.numel(), data.dtype) for _, data in held)
        memory = self.reserve(size, any(data.is_cuda for _, data in held)).memory
        out, devices, at = [], set(), 0
        for fragment, data in held:
            copy = memory[at : at + data.nbytes].view(data.dtype).view(data.shape)
            copy.copy_(data, non_blocking=data.is_cuda)
            if data.is_cuda:
                devices.add(data.device)
            at += padded_bytes(data.numel(), data.dtype)
            out.append(replace(fragment, data=copy))
        for device in devices:
            torch.cuda.synchronize(device)
        return out


@dataclass(frozen=True)
class Outcome:
    """Result of the save of a step: its folder, or the error."""

    step: int
    folder: Path | None
    error: BaseException | None


class Saver:
    """Writes the checkpoints of one run. Every rank makes the same calls in the same order.

    Args:
        root: folder of the run's checkpoints, on a file system that all ranks see.
        keep: newest checkpoints of this lineage to retain; 0: all.
        lineage: from `neox.checkpoint.retention.start_lineage`.
        rank, world_size: of this process.
        background: write in a thread; False: `save` returns when the checkpoint is durable.
        storage: system calls.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        lineage: Lineage,
        rank: int = 0,
        world_size: int = 1,
        background: bool = True,
        storage: Storage = LOCAL,
    ):
        self.root = root
        self.keep = keep
        self.lineage = lineage
        self.rank = rank
        self.world_size = world_size
        self.background = background
        self._storage = storage
        # A separate group: the thread's messages must not mix with those of training. gloo, because the thread must not
        # use a GPU stream.
        group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._group = group if isinstance(group, dist.ProcessGroup) else None
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    def reserve(self, fragments: Iterable[Fragment]) -> None:
        """Allocate the memory for the copies of `fragments`.

        Locking pages takes time: better before training than during it.

        Does nothing without `background`, or where no fragment is on a GPU: pageable memory costs nothing until it is
            written.
        """
        size, locked = 0, False
        if self.background:
            for fragment in fragments:
                size, locked = (
                    size + padded_bytes(fragment.data.numel(), fragment.data.dtype),
                    locked or fragment.data.is_cuda,
                )
        if locked:
            self._snapshot.reserve(size, True)

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        *,
        state: JsonObject,
        rng: dict[str, torch.Tensor],
        config_lock: str,
        model_config: JsonObject,
        layout: JsonObject,
    ) -> float:
        """Begin a checkpoint of `step`; arguments as in `neox.checkpoint.save`.

        The saved bytes are those at the time of this call.

        Returns:
            Seconds for which training was blocked.

        Raises:
            DiskError, CheckpointError: the save did not begin: the ranks could not agree on what to write, or a folder
                could not be created. Errors of the write itself are in the `Outcome`.
        """
        begin = time.perf_counter()
        self.join()
        content = Content(step, state, self.lineage, config_lock, model_config, layout)
        job = SaveJob(self.root, RankGroup(self.rank, self.world_size, self._group), content, self._storage)
        held, tensors = job.prepare(fragments, rng)
        if self.background:
            copies = self._snapshot.take(held)
            self._thread = threading.Thread(
                target=self._run, args=(job, step, copies, tensors), name="neox-checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._run(job, step, held, tensors)
        return time.perf_counter() - begin

    def _run(self, job: SaveJob, step: int, held: list[Fragment], tensors: TensorTable) -> None:
        try:
            self._outcomes.put(Outcome(step, job.complete(held, tensors, keep=self.keep), None))
        except BaseException as error:  # a thread has no caller to raise to: `outcomes` passes it on
            self._outcomes.put(Outcome(step, None, error))

    def outcomes(self) -> list[Outcome]:
        """Results of the saves that have ended since the last call, oldest first; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.join()
        return [self._outcomes.get() for _ in range(self._outcomes.qsize())]

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the writer, at most `timeout` seconds; returns whether it has ended.

        Raises nothing, so that it can be called after an error.
        """
        if self._thread is None:
            return True
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        self._thread = None
        return True
