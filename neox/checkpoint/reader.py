"""Reading a checkpoint: any slice of any logical tensor, from whatever segments are stored.

Nothing is believed before it is checked: the manifest's checksum and structure when it is opened, a shard's header when
it is first touched, a block's checksum before its bytes are used. Only the blocks that hold what is asked for are read.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from neox.checkpoint.manifest import MANIFEST, RNG_KIND, SHARD_NAME, Entry, Manifest, ShardFile, TensorInfo, read_manifest
from neox.checkpoint.reshard import Slices, check_address, full_slices, overlaps, placed_boxes
from neox.checkpoint.retention import folder_name, folder_step
from neox.checkpoint.shard import DTYPES
from neox.checkpoint.shard_reader import ShardReader
from neox.checkpoint.storage import LOCAL, TEMPORARY, Storage, unreadable
from neox.errors import CheckpointError

READ_THREADS = 2  # a block each
READS_AHEAD = 8  # blocks that wait for a thread while further tensors are asked for
OPEN_FILES = 64  # at most: one process may read the shards of thousands
LISTED = 6  # differences that one message names


class Checkpoint:
    """An opened checkpoint. Tensors are addressed as logical tensors, whatever layout wrote them.

    Args:
        path: folder of the checkpoint.
        storage: system calls.

    Raises CheckpointError where the manifest is damaged, or files are missing, of another size, links, or not of this checkpoint.
    """

    def __init__(self, path: str | Path, *, storage: Storage = LOCAL):
        self.path = Path(path)
        self.manifest = read_manifest(self.path, storage=storage)
        check_folder(self.path, self.manifest)
        self._storage = storage
        self._pieces: dict[tuple[str, str], list[tuple[ShardFile, Entry]]] = {key: [] for key in self.manifest.tensors}
        for file, entry in self.manifest.entries():
            self._pieces[entry.kind, entry.name].append((file, entry))
        self._readers: dict[str, ShardReader] = {}
        self._threads = ThreadPoolExecutor(READ_THREADS)
        self._pending: deque[Future] | None = None  # reads that nobody has waited for; None outside of `async_reads`

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def state(self) -> dict[str, Any]:
        """Counters and the data cursor, as they were given to save()."""
        return self.manifest.state

    @property
    def config_lock(self) -> str:
        """Text of the run's config.lock.yml."""
        return self.manifest.config_lock

    @property
    def model_config(self) -> dict[str, Any]:
        """The model section."""
        return self.manifest.model_config

    @property
    def layout(self) -> dict[str, Any]:
        """Sizes of the layout over processes that wrote it."""
        return self.manifest.layout

    @property
    def world_size(self) -> int:
        """Number of processes that wrote it, so the ranks that `rng` knows."""
        return self.manifest.world_size

    def names(self) -> list[str]:
        """Names of all logical tensors, sorted."""
        return sorted({name for kind, name in self.manifest.tensors if kind != RNG_KIND})

    def kinds(self, name: str) -> list[str]:
        """Kinds stored for a tensor, sorted; empty if it is not there."""
        return sorted(kind for kind, other in self.manifest.tensors if other == name and kind != RNG_KIND)

    def info(self, name: str, kind: str = "weight") -> TensorInfo:
        """dtype and logical shape. Raises CheckpointError if there is no such tensor."""
        found = self.manifest.tensors.get((kind, name))
        if found is None:
            have = self.kinds(name) or f"{len(self.names())} tensors, {self.names()[:3]} ..."
            raise CheckpointError("tensor is not in the checkpoint", where=f"{self.path}: {kind}/{name}", got=have)
        return found

    def check(self, wanted: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        """Raises one CheckpointError that counts the differences between the tensors stored and the ones wanted, and lists the first.

        Args:
            wanted: (name, kind, logical shape). Tensors that are stored and not wanted count as differences where their
                kind is wanted for any tensor: a model with fewer layers does not load silently.
        """
        want = {(kind, name): tuple(shape) for name, kind, shape in wanted}
        kinds = {kind for kind, _ in want}
        have = self.stored_shapes(kinds)
        wrong = sorted((key for key in want.keys() | have.keys() if want.get(key) != have.get(key)), key=lambda key: (key[0] != "weight", key))
        if wrong:
            lines = [f"{kind}/{name}: have {_shape(have.get((kind, name)))} want {_shape(want.get((kind, name)))}" for kind, name in wrong[:LISTED]]
            more = [f"and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []
            do = "use the model section of the checkpoint, or another run.dir for a new run"
            raise CheckpointError(f"{len(wrong)} tensors do not fit the model", where=self.path, got=", ".join(lines + more), do=do)

    def stored_shapes(self, kinds: set[str]) -> dict[tuple[str, str], tuple[int, ...]]:
        """(kind, name) -> logical shape of every tensor of these kinds."""
        return {key: info.shape for key, info in self.manifest.tensors.items() if key[0] in kinds and key[0] != RNG_KIND}

    def read(self, name: str, kind: str = "weight", slices: Slices | None = None, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Reads the flat range [start, stop) of a slice of a logical tensor.

        Args:
            name, kind: which tensor.
            slices: (low, high) per dimension; None: the whole tensor.
            start, stop: row-major range within the slice; stop None: to its end.

        Returns: a new flat tensor of stop - start elements, on the CPU, in the stored dtype.

        Raises CheckpointError: no such tensor, an address outside it, a damaged shard (file, tensor and checksums named).
        """
        info = self.info(name, kind)
        slices = full_slices(info.shape) if slices is None else tuple((low, high) for low, high in slices)
        stop = math.prod(high - low for low, high in slices) if stop is None else stop
        check_address(name, kind, info.shape, slices, start, stop)
        out = torch.empty(stop - start, dtype=DTYPES[info.dtype])
        self._fill(out, name, kind, slices, start, stop)
        return out

    def read_into(self, out: torch.Tensor, name: str, kind: str, slices: Slices, start: int, stop: int) -> None:
        """As `read`, into a flat tensor of any dtype on any device; without a copy where it is of the stored dtype, on the CPU and contiguous.

        After an error `out` holds anything.
        """
        info = self.info(name, kind)
        if out.dtype != DTYPES[info.dtype] or out.device.type != "cpu" or not out.is_contiguous() or out.numel() != stop - start:
            out.copy_(self.read(name, kind, slices, start, stop))
            return
        check_address(name, kind, info.shape, slices, start, stop)
        self._fill(out, name, kind, slices, start, stop, self._pending)

    @contextmanager
    def async_reads(self) -> Iterator[None]:
        """In this block `read_into` may return before the bytes are there, so that no thread waits between two tensors; they are there at its end.

        Raises CheckpointError, in the block or at its end, as `read_into` does.
        """
        self._pending = deque()
        try:
            yield
            self._settle(0)
        finally:
            pending, self._pending = self._pending, None
            wait(pending)

    def tensor(self, name: str, kind: str = "weight") -> torch.Tensor:
        """A whole logical tensor in its shape. Raises CheckpointError as `read` does."""
        return self.read(name, kind).view(self.info(name, kind).shape)

    def rng(self, rank: int) -> dict[str, torch.Tensor]:
        """Generator states of a rank of the saving run. Raises CheckpointError for a rank that it did not have."""
        if not 0 <= rank < self.world_size:
            raise CheckpointError("no generator states of this rank", where=self.path, got=f"rank {rank}", want=f"0 to {self.world_size - 1}")
        prefix = f"{rank}/"
        names = [name for kind, name in self.manifest.tensors if kind == RNG_KIND and name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensor(name, RNG_KIND) for name in names}

    def close(self) -> None:
        """Closes the files."""
        while self._readers:
            self._readers.popitem()[1].close()
        self._threads.shutdown()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self, out: torch.Tensor, name: str, kind: str, slices: Slices, start: int, stop: int, pending: deque[Future] | None = None) -> None:
        """`read` into a flat tensor of the stored dtype on the CPU. What need not be waited for here is added to `pending`, if that is given."""
        pieces = self._pieces[kind, name]
        if len(pieces) == 1 and (pieces[0][1].slices, pieces[0][1].start, pieces[0][1].stop) == (slices, start, stop):  # as it was saved
            file, entry = pieces[0]
            self._run(self._reader(file).reads(entry, 0, out), pending)
            return
        targets = placed_boxes(slices, start, stop)
        copied = 0
        for file, entry in pieces:
            for shared in overlaps(placed_boxes(entry.slices, entry.start, entry.stop), targets):
                source, target = shared.span(shared.source), shared.span(shared.target)
                if source[1] - source[0] == target[1] - target[0] == shared.size:
                    self._run(self._reader(file).reads(entry, source[0], out[target[0] : target[1]]), pending)
                else:
                    rows = shared.rows()
                    beside = torch.empty(math.prod(rows.source.shape), dtype=out.dtype)
                    self._run(self._reader(file).reads(entry, rows.source.offset, beside))
                    replace(rows, source=replace(rows.source, offset=0)).copy(beside, out)
                copied += shared.size
        if copied != stop - start:
            raise CheckpointError("tensor is not covered", where=f"{self.path}: {kind}/{name}", got=f"{copied} elements", want=f"{stop - start} elements")

    def _run(self, reads: list[Callable[[], CheckpointError | None]], pending: deque[Future] | None = None) -> None:
        """Do these reads, or begin them where `pending` is given. Raises the first error."""
        if pending is not None:
            pending.extend(self._threads.submit(read) for read in reads)
            self._settle(READS_AHEAD)
            return
        for problem in (read() for read in reads) if len(reads) == 1 else self._threads.map(lambda read: read(), reads):
            if problem is not None:
                raise problem

    def _settle(self, most: int) -> None:
        """Wait until at most so many reads are under way. Raises the first error."""
        while self._pending and len(self._pending) > most:
            problem = self._pending.popleft().result()
            if problem is not None:
                raise problem

    def _reader(self, file: ShardFile) -> ShardReader:
        if file.name not in self._readers:
            if len(self._readers) == OPEN_FILES:
                self._settle(0)  # none is read from any more
                self._readers.pop(next(iter(self._readers))).close()
            self._readers[file.name] = ShardReader(self.path, file, self.manifest, storage=self._storage)
        return self._readers[file.name]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))


def check_folder(path: Path, manifest: Manifest) -> None:
    """Raises CheckpointError where the folder does not hold exactly what the manifest lists; names every file at fault.

    Shards of another save of the same step and temporary files are no fault: a save that was cut short leaves them.
    """
    step = folder_step(path.name)
    if step is not None and step != manifest.step:
        raise CheckpointError("folder holds another step", where=path, got=f"step {manifest.step}", want=folder_name(manifest.step))
    want = {file.name: file.size for file in manifest.files}
    faults = []
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        have = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}
        plain_files = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
    except OSError as error:
        raise unreadable(error, path) from error
    for name, size in want.items():
        if name not in have:
            faults.append(f"{name}: missing")
        elif name not in plain_files:
            faults.append(f"{name}: not a regular file")
        elif have[name] != size:
            faults.append(f"{name}: {have[name]} bytes, want {size}")
    for name in have:
        shard = SHARD_NAME.fullmatch(name.removesuffix(TEMPORARY))
        leftover = name == MANIFEST + TEMPORARY or (shard and (shard[1] != manifest.save_id or name.endswith(TEMPORARY)))
        if name not in want and name != MANIFEST and not leftover:
            faults.append(f"{name}: not part of the checkpoint")
    if faults:
        raise CheckpointError("checkpoint is damaged", where=path, got=", ".join(faults[:20]), want=f"{len(want)} shards and {MANIFEST}")
