"""Saving: every rank writes its shards, then rank 0 publishes by renaming the manifest to its final name.

Order, each step finished on every rank before the next begins: agree on the assignment -> shards, durable under final
names -> manifest, durable, renamed -> `latest` hint -> retention. A crash before the rename leaves the old state, a
crash after it the new one; other leftovers are removed at the next start. An error on any rank is raised on all.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from neox.checkpoint.assignment import assign, check_assignment, decode_offers, encode_offers, tensor_table
from neox.checkpoint.consensus import RankGroup
from neox.checkpoint.manifest import (
    ITEM_BYTES,
    MANIFEST,
    MANIFEST_LIMIT,
    RNG_KIND,
    SHARD_NAME,
    Lineage,
    Manifest,
    ShardFile,
    TensorInfo,
    decode,
    decode_file,
    encode,
    encode_file,
    read_manifest,
    shard_name,
    to_plain_json,
)
from neox.checkpoint.reshard import Fragment, check_address, full_slices
from neox.checkpoint.retention import folder_name, remove_superseded, retain, write_latest
from neox.checkpoint.shard import DTYPE_NAMES, dtype_name, num_bytes, write_shard
from neox.checkpoint.storage import LOCAL, Storage, read_file
from neox.errors import CheckpointError, DiskError
from neox.files import JsonObject, attempt, make_dirs, sync_dir, write_durably

SHARD_BYTES = 4 << 30  # data bytes of one shard at most
HASH_THREADS = 2

TensorTable = dict[tuple[str, str], TensorInfo]


@dataclass(frozen=True)
class Content:
    """All of a checkpoint but its tensors. It is taken from rank 0.

    Args:
        step: optimizer steps done.
        state: counters and the data cursor, plain JSON.
        lineage: from `neox.checkpoint.retention.start_lineage`.
        config_lock: text of config.lock.yml.
        model_config: the model section.
        layout: parallel layout, for information: tp, pp, dp, ZeRO stage.
    """

    step: int
    state: JsonObject
    lineage: Lineage
    config_lock: str = ""
    model_config: JsonObject = field(default_factory=dict)
    layout: JsonObject = field(default_factory=dict)


def save(
    root: str | Path,
    content: Content,
    fragments: Iterable[Fragment],
    *,
    rng: dict[str, torch.Tensor] | None = None,
    ranks: RankGroup | None = None,
    keep: int = 0,
    shard_bytes: int = SHARD_BYTES,
    storage: Storage = LOCAL,
) -> Path:
    """Write root/step_<step>. Every rank calls it, and either all return or all raise.

    Args:
        root: folder of the run's checkpoints, on a file system that all ranks see.
        content: step, state, config and lineage.
        fragments: what this rank holds. A range held by several ranks is stored once; together they must cover every
            tensor.
        rng: this rank's generator states by name.
        ranks: the ranks of the collective call; None: this process alone.
        keep: newest checkpoints of this lineage to retain; 0: all.
        shard_bytes: largest data size of a file.
        storage: system calls.

    Returns:
        The checkpoint's folder.

    Raises:
        DiskError: a write failed; temporary files are removed and older checkpoints untouched.
        CheckpointError: segments that overlap or leave holes, or state that is not plain JSON.
    """
    job = SaveJob(Path(root), ranks or RankGroup(), content, storage)
    return job.complete(*job.prepare(fragments, rng or {}), keep=keep, shard_bytes=shard_bytes)


class SaveJob:
    """One save on one rank.

    `prepare` agrees on what each rank stores, `complete` writes it. Both are collective; both clean up when they fail.
    """

    def __init__(self, root: Path, ranks: RankGroup, content: Content, storage: Storage):
        self.root = root
        self.folder = root / folder_name(content.step)
        self._ranks = ranks
        self._content = content
        self._storage = storage
        self._save_id = ""

    def prepare(
        self, fragments: Iterable[Fragment], rng: dict[str, torch.Tensor]
    ) -> tuple[list[Fragment], TensorTable]:
        """Create the folder and agree on the assignment.

        Returns what this rank stores, as views, and the table of all tensors.
        """
        try:
            return self.plan(
                lambda: [
                    *map(check_fragment, fragments),
                    *(rng_fragment(self._ranks.rank, *item) for item in sorted(rng.items())),
                ]
            )
        except BaseException:
            self.clean_up()
            raise

    def complete(
        self, held: Iterable[Fragment], tensors: TensorTable, *, keep: int, shard_bytes: int = SHARD_BYTES
    ) -> Path:
        """Write the assigned segments, publish, apply the retention; returns the checkpoint's folder."""
        try:
            self.publish(self.write(group_into_shards(held, shard_bytes), tensors), tensors)
        except BaseException:
            self.clean_up()
            raise
        self.finish(keep)
        return self.folder

    def plan(self, collect: Callable[[], list[Fragment]]) -> tuple[list[Fragment], TensorTable]:
        """Create the folder and agree on what each rank stores.

        Args:
            collect: function that returns this rank's fragments; its errors reach all ranks.

        Returns:
            This rank's part of its fragments, and the table of all tensors.
        """
        held: list[Fragment] = []

        def begin() -> tuple[str, list[list]]:
            held.extend(collect())
            return self._open_folder() if self._ranks.rank == 0 else "", encode_offers(held)

        answers = self._ranks.run_on_all(begin)
        self._save_id = answers[0][0]
        offers = [decode_offers(message) for _, message in answers]
        tensors = tensor_table(offers)
        assigned = assign(offers)
        self._ranks.run_on_all(lambda: check_assignment(tensors, offers, assigned) if self._ranks.rank == 0 else None)
        return [narrow(held[one.offer], one.start, one.stop) for one in assigned[self._ranks.rank]], tensors

    def _open_folder(self) -> str:
        for part in ("state", "model_config", "layout"):
            to_plain_json(getattr(self._content, part), part)
        make_dirs(self.folder, storage=self._storage)
        return secrets.token_hex(8)

    def write(self, shards: Sequence[Sequence[Fragment]], tensors: TensorTable) -> list[ShardFile]:
        """Write this rank's shards durably; returns the records of all ranks' files."""

        def work() -> list[JsonObject]:
            records = []
            with ThreadPoolExecutor(HASH_THREADS) as threads:
                for index, segments in enumerate(shards):
                    path = self.folder / shard_name(self._save_id, self._ranks.rank, index)
                    records.append(write_shard(path, segments, threads, storage=self._storage))
            if records:
                sync_dir(self.folder, storage=self._storage)
            return [encode_file(record) for record in records]

        return [decode_file(record, tensors) for records in self._ranks.run_on_all(work) for record in records]

    def publish(self, files: Sequence[ShardFile], tensors: TensorTable) -> None:
        """Give the manifest its final name: from here on the checkpoint exists."""
        content = self._content

        def work() -> None:
            if self._ranks.rank != 0:
                return
            manifest = Manifest(
                step=content.step,
                save_id=self._save_id,
                lineage=content.lineage,
                world_size=self._ranks.world_size,
                layout=content.layout,
                state=content.state,
                config_lock=content.config_lock,
                model_config=content.model_config,
                tensors=tensors,
                files=tuple(files),
            )
            content_bytes = encode(manifest)
            decode(content_bytes)  # a manifest that a reader would refuse is never published
            write_durably(self.folder / MANIFEST, content_bytes, sole_writer=True, storage=self._storage)
            self._read_back(content_bytes, manifest)

        self._ranks.run_on_all(work)

    def _read_back(self, content: bytes, manifest: Manifest) -> None:
        """Check that the disk returns what was written, before anything older is removed. Raises DiskError."""
        try:
            same = read_file(self.folder / MANIFEST, MANIFEST_LIMIT) == content
            wrong = [file.name for file in manifest.files if os.lstat(self.folder / file.name).st_size != file.size]
        except (OSError, CheckpointError) as error:
            same, wrong = False, [str(error)]
        if not same or wrong:
            got = ", ".join(wrong[:5]) or "another manifest"
            do = "check the disk; older checkpoints are untouched"
            raise DiskError(
                "the checkpoint reads back differently from what was written", where=self.folder, got=got, do=do
            )

    def finish(self, keep: int) -> None:
        """Write the `latest` hint, remove the files of an older save of this step, and apply the retention."""

        def work() -> None:
            if self._ranks.rank == 0:
                write_latest(self.root, self.folder.name, storage=self._storage)
                remove_superseded(self.folder, self._save_id, storage=self._storage)
                retain(self.root, keep, self._content.lineage, self._content.step, storage=self._storage)

        self._ranks.run_on_all(work)

    def clean_up(self) -> None:
        """Remove what an unpublished save wrote, on rank 0.

        Does nothing where an unreadable manifest may refer to these files.
        """
        if self._ranks.rank != 0:
            return
        manifest = self.folder / MANIFEST
        if os.path.lexists(manifest):
            try:
                if read_manifest(self.folder).save_id == self._save_id:
                    return
            except CheckpointError:
                return
        try:
            entries = list(os.scandir(self.folder))
        except OSError:
            return
        for entry in entries:
            match = SHARD_NAME.match(entry.name)
            if match and self._save_id and match[1] == self._save_id:
                attempt(self._storage.unlink, Path(entry.path))
        attempt(self._storage.remove_dir, self.folder)


def rng_fragment(rank: int, name: str, value: torch.Tensor) -> Fragment:
    """A generator's state, stored under the rank that holds it."""
    shape = tuple(value.shape)
    return Fragment(f"{rank}/{name}", RNG_KIND, shape, full_slices(shape), 0, value.numel(), value.detach().reshape(-1))


def check_fragment(fragment: Fragment) -> Fragment:
    """The fragment, if its name, address and data agree. Raises CheckpointError."""
    where = f"{fragment.kind}/{fragment.name}"
    invalid = (
        any(part in where for part in ("..", "\\", "\0", "["))
        or not fragment.name
        or not fragment.kind
        or fragment.kind == RNG_KIND
    )
    if invalid or "/" in fragment.kind or fragment.name.startswith("/"):
        raise CheckpointError(
            "name cannot be stored", where=where, want="no .., backslash or bracket; kind without / and other than rng"
        )
    check_address(fragment.name, fragment.kind, fragment.shape, fragment.slices, fragment.start, fragment.stop)
    if fragment.data.numel() != fragment.stop - fragment.start or fragment.data.dtype not in DTYPE_NAMES:
        got = f"{fragment.data.numel()} elements of {fragment.data.dtype}"
        raise CheckpointError(
            "data does not fill its range of the tensor",
            where=where,
            got=got,
            want=f"{fragment.stop - fragment.start} elements of {list(DTYPE_NAMES)}",
        )
    return fragment


def narrow(fragment: Fragment, start: int, stop: int) -> Fragment:
    """The part [start, stop) of a fragment's flat range, a view."""
    data = fragment.data.detach().reshape(-1)[start - fragment.start : stop - fragment.start]
    return replace(fragment, start=start, stop=stop, data=data)


def group_into_shards(fragments: Iterable[Fragment], shard_bytes: int) -> list[list[Fragment]]:
    """Group fragments into shards of at most `shard_bytes` of data and split larger ones.

    Widest dtype first, so that all are aligned.
    """
    shards: list[list[Fragment]] = []
    room = 0
    for fragment in sorted(fragments, key=lambda one: -ITEM_BYTES[dtype_name(one)]):
        step = max(shard_bytes // ITEM_BYTES[dtype_name(fragment)], 1)
        for start in range(fragment.start, fragment.stop, step):
            segment = narrow(fragment, start, min(start + step, fragment.stop))
            if num_bytes(segment) > room:
                shards.append([])
                room = max(shard_bytes, num_bytes(segment))
            shards[-1].append(segment)
            room -= num_bytes(segment)
    return shards
