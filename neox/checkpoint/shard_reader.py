"""Reading shards block by block: each block is read into its destination and compared with its checksum.

A block is read in parts that are still in the processor's cache when they are digested (csrc/data/xxh3.h), so that the
comparison costs little compared to reading. Only a block that is needed in part is read into a buffer and copied.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import torch

from neox._native import core
from neox.checkpoint.manifest import ITEM_BYTES, Manifest, Segment, ShardFile, TensorInfo, stored_shape
from neox.checkpoint.shard import check_header
from neox.checkpoint.storage import LOCAL, Storage, open_file, unreadable
from neox.errors import CheckpointError


def read_block(descriptor: int, offset: int, out: memoryview, algorithm: str) -> str:
    """Fill `out` with a file's bytes from `offset` on; returns their checksum.

    Raises:
        OSError: the read failed.
        EOFError: the file ends earlier.
    """
    if algorithm == "xxh3":
        return f"{core.read_xxh3(descriptor, offset, out):016x}"
    done = 0
    while done < len(out):
        count = os.preadv(descriptor, [out[done:]], offset + done)
        if count == 0:
            raise EOFError
        done += count
    return hashlib.sha256(out).hexdigest()


class ShardReader:
    """One open shard of a checkpoint, its header checked. Several threads may read it.

    Args:
        folder: of the checkpoint.
        file: its record in the manifest.
        manifest: the manifest.
        storage: system calls.

    Raises:
        CheckpointError: the file is missing, not a regular file, of another size, or its header is damaged.
    """

    def __init__(self, folder: Path, file: ShardFile, manifest: Manifest, *, storage: Storage = LOCAL):
        self.path = folder / file.name
        self.file = file
        self.manifest = manifest
        self.descriptor = open_file(self.path, file.size, storage=storage)
        self.close = weakref.finalize(self, os.close, self.descriptor)
        self._check_header()

    def reads(self, segment: Segment, start: int, out: torch.Tensor) -> list[Callable[[], CheckpointError | None]]:
        """Calls that fill a flat tensor of the stored dtype with a segment's elements from `start` on.

        Any threads may run them.

        Each call returns an error if a block's checksum is wrong or the file cannot be read.
        """
        width = out.element_size()
        target = out.view(torch.uint8).numpy().data
        block, begin = self.manifest.block, start * width
        jobs = range(begin // block, (begin + len(target) - 1) // block + 1)
        return [partial(self._read_part, segment, index, begin, target) for index in jobs]

    def problems(self, segment: Segment, threads: Executor) -> Iterator[CheckpointError]:
        """An error for each block of a segment whose checksum is wrong."""

        def work(index: int) -> CheckpointError | None:
            low, high = self._range(segment, index)
            return self._fill(segment, index, memoryview(bytearray(high - low)))

        return (problem for problem in threads.map(work, range(len(segment.blocks))) if problem is not None)

    def _range(self, segment: Segment, index: int) -> tuple[int, int]:
        """Byte range of a block within its segment."""
        size = (segment.stop - segment.start) * ITEM_BYTES[self.manifest.tensors[segment.kind, segment.name].dtype]
        return index * self.manifest.block, min((index + 1) * self.manifest.block, size)

    def _read_part(self, segment: Segment, index: int, begin: int, target: memoryview) -> CheckpointError | None:
        """Read the part of a block that lies in the target, which begins at byte `begin` of the segment."""
        low, high = self._range(segment, index)
        first, last = max(low, begin), min(high, begin + len(target))
        if (first, last) == (low, high):
            return self._fill(segment, index, target[low - begin : high - begin])
        block = memoryview(bytearray(high - low))
        problem = self._fill(segment, index, block)
        target[first - begin : last - begin] = block[first - low : last - low]
        return problem

    def _fill(self, segment: Segment, index: int, out: memoryview) -> CheckpointError | None:
        low = index * self.manifest.block
        algorithm = self.manifest.digest
        actual = None
        try:
            actual = read_block(self.descriptor, self.file.header + segment.offset + low, out, algorithm)
        except EOFError:
            pass
        except OSError as error:
            return unreadable(error, self.path)
        want = segment.blocks[index]
        if actual == want:
            return None
        location, do = f"{self.path}: {segment.key}, bytes {low} on", "use an older checkpoint"
        if actual is None:
            return CheckpointError("file has become shorter", where=location, want=f"{self.file.size} bytes", do=do)
        return CheckpointError(
            "shard is damaged", where=location, got=f"{algorithm} {actual}", want=f"{algorithm} {want}", do=do
        )

    def _check_header(self) -> None:
        """Raises CheckpointError unless the header matches its checksum and the manifest."""
        file = self.file
        if file.header > file.size:
            raise CheckpointError(
                "header is longer than the file", where=self.path, got=file.header, want=f"at most {file.size}"
            )
        raw = memoryview(bytearray(file.header))
        try:
            actual = read_block(self.descriptor, 0, raw, "sha256")
        except EOFError:
            raise CheckpointError("file has become shorter", where=self.path, want=f"{file.size} bytes") from None
        except OSError as error:
            raise unreadable(error, self.path) from error
        if actual != file.header_sha256:
            raise CheckpointError(
                "shard is damaged",
                where=f"{self.path}: header",
                got=f"sha256 {actual}",
                want=f"sha256 {file.header_sha256}",
            )
        found = check_header(raw, file.size, self.path)
        want = {}
        for segment in file.segments:
            dtype = self.manifest.tensors[segment.kind, segment.name].dtype
            want[segment.key] = (
                TensorInfo(dtype, stored_shape(segment.slices, segment.start, segment.stop)),
                segment.offset,
            )
        if found != want:
            key = next(key for key in found.keys() | want.keys() if found.get(key) != want.get(key))
            raise CheckpointError(
                "shard contradicts the manifest", where=f"{self.path}: {key}", got=found.get(key), want=want.get(key)
            )
