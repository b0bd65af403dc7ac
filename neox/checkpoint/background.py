"""Saving beside training: the state is copied at the call, and written by a thread while the next steps run.

One writer at a time: a save that is due while the one before it is still being written waits for it. How a save ended, on every rank the
same, is asked for by `outcomes`. The copy is kept for the next save, so that memory is asked for once; it is as large as what
this process stores.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from neox.checkpoint.manifest import Lineage, TensorInfo
from neox.checkpoint.peers import Peers
from neox.checkpoint.reshard import Fragment
from neox.checkpoint.save import Content, Job
from neox.checkpoint.storage import LOCAL, Storage


class Snapshot:
    """Copies of fragments in memory of the host, which the next snapshot of the same fragments reuses."""

    def __init__(self):
        self._copies: dict[tuple[str, str, Any], torch.Tensor] = {}

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments with their data copied. The copies of the snapshot before are overwritten."""
        before, self._copies = self._copies, {}
        out, devices = [], set()
        for fragment in fragments:
            data = fragment.data.detach()
            key = (fragment.kind, fragment.name, (fragment.slices, fragment.start, fragment.stop))
            copy = before.pop(key, None)
            if copy is None or copy.dtype != data.dtype:
                copy = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
            copy.copy_(data, non_blocking=data.is_cuda)
            if data.is_cuda:
                devices.add(data.device)
            self._copies[key] = copy
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
        job = Job(self.root, Peers(self.rank, self.world_size, self._group), content, self._storage)
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
