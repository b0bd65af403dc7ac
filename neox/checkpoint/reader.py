"""Reading a checkpoint: any slice of any logical tensor, from whatever segments are stored.

Nothing is used before it is checked: the manifest's checksum and structure when it is opened, a shard's header when
it is first read, a block's checksum before its bytes are used. Only the blocks that hold the requested elements are
read.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from neox.checkpoint.manifest import (
    MANIFEST,
    RNG_KIND,
    SHARD_NAME,
    Manifest,
    Segment,
    ShardFile,
    TensorInfo,
    read_manifest,
)
from neox.checkpoint.reshard import Slices, check_address, full_slices, logical_boxes, overlaps
from neox.checkpoint.retention import folder_name, folder_step
from neox.checkpoint.shard import DTYPES
from neox.checkpoint.shard_reader import ShardReader
from neox.checkpoint.storage import LOCAL, Storage, unreadable
from neox.errors import CheckpointError, ModelMismatch
from neox.files import TEMPORARY, JsonObject
from neox.printing import counted

READ_THREADS = 2  # a block each
READS_AHEAD = 8  # blocks that wait for a thread while further tensors are requested
OPEN_FILES = 64  # at most: one process may read the shards of thousands
LISTED = 6  # differences that one message names

Shapes = dict[tuple[str, str], tuple[int, ...]]  # (kind, name) -> logical shape
Located = tuple[ShardFile, Segment]


class Checkpoint:
    """An open checkpoint. Tensors are addressed as logical tensors, independent of the layout that wrote them.

    Args:
        path: folder of the checkpoint.
        storage: system calls.

    Raises:
        CheckpointError: the manifest is damaged, or a file is missing, of another size, a link, or unknown.
    """

    def __init__(self, path: str | Path, *, storage: Storage = LOCAL):
        self.path = Path(path)
        self.manifest = read_manifest(self.path, storage=storage)
        check_folder(self.path, self.manifest)
        self._segments: dict[tuple[str, str], list[Located]] = {key: [] for key in self.manifest.tensors}
        for file, segment in self.manifest.segments():
            self._segments[segment.kind, segment.name].append((file, segment))
        self._reads = ShardReads(self.path, self.manifest, storage)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def state(self) -> JsonObject:
        """Counters and the data cursor, as they were given to save()."""
        return self.manifest.state

    @property
    def config_lock(self) -> str:
        """Text of the run's config.lock.yml."""
        return self.manifest.config_lock

    @property
    def model_config(self) -> JsonObject:
        """The model section."""
        return self.manifest.model_config

    @property
    def layout(self) -> JsonObject:
        """Sizes of the parallel layout that wrote it."""
        return self.manifest.layout

    @property
    def world_size(self) -> int:
        """Number of processes that wrote it, and so the number of ranks that `rng` has."""
        return self.manifest.world_size

    def names(self) -> list[str]:
        """Names of all logical tensors, sorted."""
        return sorted({name for kind, name in self.manifest.tensors if kind != RNG_KIND})

    def kinds(self, name: str) -> list[str]:
        """Kinds stored for a tensor, sorted; empty if the tensor is missing."""
        return sorted(kind for kind, other in self.manifest.tensors if other == name and kind != RNG_KIND)

    def info(self, name: str, kind: str = "weight") -> TensorInfo:
        """dtype and logical shape. Raises CheckpointError if there is no such tensor."""
        found = self.manifest.tensors.get((kind, name))
        if found is None:
            have = self.kinds(name) or f"{len(self.names())} tensors, {self.names()[:3]} ..."
            raise CheckpointError("tensor is not in the checkpoint", where=f"{self.path}: {kind}/{name}", got=have)
        return found

    def check(self, wanted: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        """Raises one ModelMismatch that counts the differences between stored and wanted tensors and lists the first.

        Args:
            wanted: (name, kind, logical shape). Tensors that are stored and not wanted count as differences where their
                kind is wanted for any tensor: a model with fewer layers does not load silently.
        """
        want = {(kind, name): tuple(shape) for name, kind, shape in wanted}
        have = self.stored_shapes({kind for kind, _ in want})
        wrong = differences(have, want)
        if wrong:
            more = [f"and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []
            do = "use the model section of the checkpoint, or train another model in another run.dir, not from this one"
            got = f"{counted(len(wrong), 'tensor')}: {', '.join(wrong[:LISTED] + more)}"
            raise ModelMismatch("tensors do not fit the model", where=self.path, got=got, do=do)

    def stored_shapes(self, kinds: set[str]) -> Shapes:
        """(kind, name) -> logical shape of every tensor of these kinds."""
        return {
            key: info.shape for key, info in self.manifest.tensors.items() if key[0] in kinds and key[0] != RNG_KIND
        }

    def read(
        self, name: str, kind: str = "weight", slices: Slices | None = None, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Read the flat range [start, stop) of a slice of a logical tensor.

        Args:
            name, kind: which tensor.
            slices: (low, high) per dimension; None: the complete tensor.
            start, stop: row-major range within the slice; stop None: to its end.

        Returns:
            A new flat tensor of stop - start elements, on the CPU, in the stored dtype.

        Raises:
            CheckpointError: no such tensor, an address outside it, or a damaged shard.
        """
        info = self.info(name, kind)
        slices = full_slices(info.shape) if slices is None else tuple((low, high) for low, high in slices)
        stop = math.prod(high - low for low, high in slices) if stop is None else stop
        check_address(name, kind, info.shape, slices, start, stop)
        out = torch.empty(stop - start, dtype=DTYPES[info.dtype])
        self._fill(out, name, kind, slices, start, stop, wait_for=True)
        return out

    def read_into(self, out: torch.Tensor, name: str, kind: str, slices: Slices, start: int, stop: int) -> None:
        """As `read`, into a flat tensor of any dtype on any device.

        Without a copy if it is of the stored dtype, on the CPU and contiguous.

        After an error the content of `out` is undefined.
        """
        info = self.info(name, kind)
        if (
            out.dtype != DTYPES[info.dtype]
            or out.device.type != "cpu"
            or not out.is_contiguous()
            or out.numel() != stop - start
        ):
            out.copy_(self.read(name, kind, slices, start, stop))
            return
        check_address(name, kind, info.shape, slices, start, stop)
        self._fill(out, name, kind, slices, start, stop, wait_for=False)

    @contextmanager
    def async_reads(self) -> Iterator[None]:
        """In this block `read_into` may return before the bytes have arrived: threads need not wait between tensors.

        All bytes have arrived at its end. Raises CheckpointError as `read_into` does, in the block or at its end.
        """
        with self._reads.deferred():
            yield

    def tensor(self, name: str, kind: str = "weight") -> torch.Tensor:
        """A complete logical tensor in its shape. Raises CheckpointError as `read` does."""
        return self.read(name, kind).view(self.info(name, kind).shape)

    def rng(self, rank: int) -> dict[str, torch.Tensor]:
        """Generator states of a rank of the run that saved. Raises CheckpointError for a rank that it did not have."""
        if not 0 <= rank < self.world_size:
            raise CheckpointError(
                "no generator states of this rank",
                where=self.path,
                got=f"rank {rank}",
                want=f"0 to {self.world_size - 1}",
            )
        prefix = f"{rank}/"
        names = [name for kind, name in self.manifest.tensors if kind == RNG_KIND and name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensor(name, RNG_KIND) for name in names}

    def close(self) -> None:
        """Close the files."""
        self._reads.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(
        self, out: torch.Tensor, name: str, kind: str, slices: Slices, start: int, stop: int, *, wait_for: bool
    ) -> None:
        """`read` into a flat CPU tensor of the stored dtype.

        Without `wait_for`, reads may be pending on return (see `async_reads`).
        """
        segments = self._segments[kind, name]
        if len(segments) == 1:
            file, segment = segments[0]
            if (segment.slices, segment.start, segment.stop) == (slices, start, stop):  # as it was saved
                self._reads.run(file, segment, 0, out, wait_for)
                return
        targets = logical_boxes(slices, start, stop)
        copied = 0
        for file, segment in segments:
            for shared in overlaps(logical_boxes(segment.slices, segment.start, segment.stop), targets):
                source, target = shared.span(shared.source), shared.span(shared.target)
                if source[1] - source[0] == target[1] - target[0] == shared.size:
                    self._reads.run(file, segment, source[0], out[target[0] : target[1]], wait_for)
                else:
                    rows = shared.rows()
                    buffer = torch.empty(math.prod(rows.source.shape), dtype=out.dtype)
                    self._reads.run(file, segment, rows.source.offset, buffer, True)
                    replace(rows, source=replace(rows.source, offset=0)).copy(buffer, out)
                copied += shared.size
        if copied != stop - start:
            raise CheckpointError(
                "tensor is not covered",
                where=f"{self.path}: {kind}/{name}",
                got=f"{copied} elements",
                want=f"{stop - start} elements",
            )


class ShardReads:
    """The reads of a checkpoint's shards: open files (at most OPEN_FILES), threads, and pending reads of `deferred`.

    Args:
        path: folder of the checkpoint.
        manifest: its manifest.
        storage: system calls.
    """

    def __init__(self, path: Path, manifest: Manifest, storage: Storage):
        self._path = path
        self._manifest = manifest
        self._storage = storage
        self._readers: dict[str, ShardReader] = {}
        self._threads = ThreadPoolExecutor(READ_THREADS)
        self._pending: deque[Future[CheckpointError | None]] | None = None  # None outside of `deferred`

    def run(self, file: ShardFile, segment: Segment, start: int, out: torch.Tensor, wait_for: bool) -> None:
        """Read a segment's elements from `start` on into `out`; in `deferred` and without `wait_for`, only begin to.

        Raises the first error.
        """
        reads = self._reader(file).reads(segment, start, out)
        if self._pending is not None and not wait_for:
            self._pending.extend(self._threads.submit(read) for read in reads)
            self._settle(READS_AHEAD)
            return
        for problem in (read() for read in reads) if len(reads) == 1 else self._threads.map(lambda read: read(), reads):
            if problem is not None:
                raise problem

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block in which reads may be pending. They are done at its end. Raises CheckpointError."""
        self._pending = deque()
        try:
            yield
            self._settle(0)
        finally:
            pending, self._pending = self._pending, None
            wait(pending)

    def close(self) -> None:
        """End the threads and close the files."""
        self._threads.shutdown()  # first: after an error, reads may still be in progress
        while self._readers:
            self._readers.popitem()[1].close()

    def _settle(self, most: int) -> None:
        """Wait until at most `most` reads are pending. Raises the first error."""
        while self._pending and len(self._pending) > most:
            problem = self._pending.popleft().result()
            if problem is not None:
                raise problem

    def _reader(self, file: ShardFile) -> ShardReader:
        if file.name not in self._readers:
            if len(self._readers) == OPEN_FILES:
                self._settle(0)  # pending reads may use the file that is closed
                self._readers.pop(next(iter(self._readers))).close()
            self._readers[file.name] = ShardReader(self._path, file, self._manifest, storage=self._storage)
        return self._readers[file.name]


def differences(have: Shapes, want: Shapes) -> list[str]:
    """A line for each tensor whose shapes differ, weights first."""
    wrong = (key for key in have.keys() | want.keys() if have.get(key) != want.get(key))
    ordered = sorted(wrong, key=lambda key: (key[0] != "weight", key))
    return [f"{'/'.join(key)}: have {_shape(have.get(key))} want {_shape(want.get(key))}" for key in ordered]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))


def check_folder(path: Path, manifest: Manifest) -> None:
    """Raises CheckpointError unless the folder holds exactly what the manifest lists; names every file at fault.

    Shards of another save of the same step and temporary files are accepted: an interrupted save leaves them.
    """
    step = folder_step(path.name)
    if step is not None and step != manifest.step:
        raise CheckpointError(
            "folder holds another step", where=path, got=f"step {manifest.step}", want=folder_name(manifest.step)
        )
    want = {file.name: file.size for file in manifest.files}
    faults = []
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        have = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}
        regular_files = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
    except OSError as error:
        raise unreadable(error, path) from error
    for name, size in want.items():
        if name not in have:
            faults.append(f"{name}: missing")
        elif name not in regular_files:
            faults.append(f"{name}: not a regular file")
        elif have[name] != size:
            faults.append(f"{name}: {have[name]} bytes, want {size}")
    for name in have:
        shard = SHARD_NAME.fullmatch(name.removesuffix(TEMPORARY))
        leftover = name == MANIFEST + TEMPORARY or (
            shard and (shard[1] != manifest.save_id or name.endswith(TEMPORARY))
        )
        if name not in want and name != MANIFEST and not leftover:
            faults.append(f"{name}: not part of the checkpoint")
    if faults:
        raise CheckpointError(
            "checkpoint is damaged", where=path, got=", ".join(faults[:20]), want=f"{len(want)} shards and {MANIFEST}"
        )
