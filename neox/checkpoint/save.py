"""Saving: every rank writes its pieces, rank 0 publishes by renaming the manifest into place.

Order, each step finished on every rank before the next begins: agree on who stores what -> shards, durable under final
names -> manifest, durable, renamed -> `latest` hint -> retention. A crash before the rename leaves the old state, a crash
after it the new one; what else lies around is collected at the next start. An error on any rank is raised on all.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from neox.checkpoint.assignment import check_assignment, decode_offers, divide, encode_offers, tensor_table
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
    plain,
    read_manifest,
    shard_name,
)
from neox.checkpoint.reshard import Fragment, check_address, full_slices
from neox.checkpoint.retention import folder_name, remove_superseded, retain, write_latest
from neox.checkpoint.shard import DTYPE_NAMES, dtype_name, num_bytes, write_shard
from neox.checkpoint.storage import LOCAL, Storage, attempt, make_dirs, read_file, sync_dir, write_file
from neox.errors import CheckpointError, DiskError

SHARD_BYTES = 4 << 30  # data bytes of one shard at most
HASH_THREADS = 2


def save(
    root: str | Path,
    *,
    step: int,
    fragments: Iterable[Fragment],
    state: dict[str, Any],
    rng: dict[str, torch.Tensor],
    config_lock: str,
    model_config: dict[str, Any],
    rank: int,
    world_size: int,
    keep: int,
    lineage: Lineage,
    layout: dict[str, Any] | None = None,
    group: Any = None,
    shard_bytes: int = SHARD_BYTES,
    storage: Storage = LOCAL,
) -> Path:
    """Writes root/step_<step> and returns its path; every rank calls it, and either all return or all raise.

    Args:
        root: folder of the run's checkpoints, on a file system that all ranks see.
        step: optimizer steps done.
        fragments: what this rank holds. A range held by several ranks is stored once; together they must cover every tensor.
        state: counters and the data cursor, plain JSON. Taken from rank 0, as config_lock, model_config, lineage and layout are.
        rng: this rank's generator states by name.
        config_lock: text of config.lock.yml.
        model_config: the model section.
        rank, world_size: of the collective call; torch.distributed must be initialised where world_size > 1.
        keep: newest checkpoints of this lineage to keep; 0: all.
        lineage: from `neox.checkpoint.retention.start_lineage`.
        layout: parallel layout, for people: tp, pp, dp, zero stage.
        group: process group for the messages; None: the default group.
        shard_bytes: largest data size of a file.
        storage: system calls.

    Raises DiskError (a write failed; temporary files are removed and older checkpoints untouched) and CheckpointError
    (pieces that overlap or leave holes, state that is not plain JSON).
    """
    content = Content(step, state, config_lock, model_config, lineage, layout or {})
    job = Job(Path(root), RankGroup(rank, world_size, group), content, storage)
    return job.complete(*job.prepare(fragments, rng), keep=keep, shard_bytes=shard_bytes)


@dataclass(frozen=True)
class Content:
    """All of a checkpoint but its tensors."""

    step: int
    state: dict[str, Any]
    config_lock: str
    model_config: dict[str, Any]
    lineage: Lineage
    layout: dict[str, Any]


class Job:
    """One save on one rank: `prepare` agrees on what each rank stores, `complete` writes it. Both are collective; either cleans up where it fails."""

    def __init__(self, root: Path, peers: RankGroup, content: Content, storage: Storage):
        self.root = root
        self.folder = root / folder_name(content.step)
        self._peers = peers
        self._content = content
        self._storage = storage
        self._save_id = ""

    def prepare(self, fragments: Iterable[Fragment], rng: dict[str, torch.Tensor]) -> tuple[list[Fragment], dict[tuple[str, str], TensorInfo]]:
        """Makes the folder and agrees on the shares. Returns what this rank stores, as views, and the table of all tensors."""
        try:
            return self.plan(lambda: [*map(checked, fragments), *(rng_fragment(self._peers.rank, *item) for item in sorted(rng.items()))])
        except BaseException:
            self.clean_up()
            raise

    def complete(self, held: Iterable[Fragment], tensors: dict[tuple[str, str], TensorInfo], *, keep: int, shard_bytes: int = SHARD_BYTES) -> Path:
        """Writes the shares, publishes, applies the retention; returns the checkpoint's folder."""
        try:
            self.publish(self.write(cut(held, shard_bytes), tensors), tensors)
        except BaseException:
            self.clean_up()
            raise
        self.finish(keep)
        return self.folder

    def plan(self, collect) -> tuple[list[Fragment], dict[tuple[str, str], TensorInfo]]:
        """Makes the folder and agrees on what each rank stores.

        Args:
            collect: function that returns this rank's fragments; its errors reach all ranks.

        Returns: this rank's part of its fragments, and the table of all tensors.
        """
        held: list[Fragment] = []

        def begin() -> list[Any]:
            held.extend(collect())
            return [self._open_folder() if self._peers.rank == 0 else "", encode_offers(held)]

        answers = self._peers.run_on_all(begin)
        self._save_id = answers[0][0]
        offers = [decode_offers(message) for _, message in answers]
        tensors = tensor_table(offers)
        shares = divide(offers)
        self._peers.run_on_all(lambda: check_assignment(tensors, offers, shares) if self._peers.rank == 0 else None)
        return [narrow(held[share.offer], share.start, share.stop) for share in shares[self._peers.rank]], tensors

    def _open_folder(self) -> str:
        for part in ("state", "model_config", "layout"):
            plain(getattr(self._content, part), part)
        make_dirs(self.folder, storage=self._storage)
        return secrets.token_hex(8)

    def write(self, shards: Sequence[Sequence[Fragment]], tensors: dict[tuple[str, str], TensorInfo]) -> list[ShardFile]:
        """Writes this rank's shards durably; returns the records of all ranks' files."""

        def work() -> list[Any]:
            records = []
            with ThreadPoolExecutor(HASH_THREADS) as threads:
                for index, pieces in enumerate(shards):
                    path = self.folder / shard_name(self._save_id, self._peers.rank, index)
                    records.append(write_shard(path, pieces, threads, storage=self._storage))
            if records:
                sync_dir(self.folder, storage=self._storage)
            return [encode_file(record) for record in records]

        return [decode_file(record, tensors) for records in self._peers.run_on_all(work) for record in records]

    def publish(self, files: Sequence[ShardFile], tensors: dict[tuple[str, str], TensorInfo]) -> None:
        """Renames the manifest into place: from here on the checkpoint exists."""
        content = self._content

        def work() -> None:
            if self._peers.rank != 0:
                return
            manifest = Manifest(
                step=content.step,
                save_id=self._save_id,
                lineage=content.lineage,
                world_size=self._peers.world_size,
                layout=content.layout,
                state=content.state,
                config_lock=content.config_lock,
                model_config=content.model_config,
                tensors=tensors,
                files=tuple(files),
            )
            content_bytes = encode(manifest)
            decode(content_bytes)  # what would be refused when it is read is never published
            write_file(self.folder / MANIFEST, content_bytes, storage=self._storage)
            self._read_back(content_bytes, manifest)

        self._peers.run_on_all(work)

    def _read_back(self, content: bytes, manifest: Manifest) -> None:
        """Check that the disk has what was written, before anything older is retired. Raises DiskError."""
        try:
            same = read_file(self.folder / MANIFEST, MANIFEST_LIMIT) == content
            wrong = [file.name for file in manifest.files if os.lstat(self.folder / file.name).st_size != file.size]
        except (OSError, CheckpointError) as error:
            same, wrong = False, [str(error)]
        if not same or wrong:
            got = ", ".join(wrong[:5]) or "another manifest"
            do = "check the disk; older checkpoints are untouched"
            raise DiskError("the checkpoint reads back differently from what was written", where=self.folder, got=got, do=do)

    def finish(self, keep: int) -> None:
        """Leaves the hint, removes the files of an older save of this step, and applies the retention."""

        def work() -> None:
            if self._peers.rank == 0:
                write_latest(self.root, self.folder.name, storage=self._storage)
                remove_superseded(self.folder, self._save_id, storage=self._storage)
                retain(self.root, keep, self._content.lineage, self._content.step, storage=self._storage)

        self._peers.run_on_all(work)

    def clean_up(self) -> None:
        """Removes what an unpublished save wrote; does nothing where a manifest that cannot be read might name it. Rank 0 only."""
        if self._peers.rank != 0:
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
    """A generator's state, filed under the rank that holds it."""
    shape = tuple(value.shape)
    return Fragment(f"{rank}/{name}", RNG_KIND, shape, full_slices(shape), 0, value.numel(), value.detach().reshape(-1))


def checked(fragment: Fragment) -> Fragment:
    """The fragment, if name, address and data fit together. Raises CheckpointError."""
    where = f"{fragment.kind}/{fragment.name}"
    bad = any(part in where for part in ("..", "\\", "\0", "[")) or not fragment.name or not fragment.kind or fragment.kind == RNG_KIND
    if bad or "/" in fragment.kind or fragment.name.startswith("/"):
        raise CheckpointError("name cannot be stored", where=where, want="no .., backslash or bracket; kind without / and other than rng")
    check_address(fragment.name, fragment.kind, fragment.shape, fragment.slices, fragment.start, fragment.stop)
    if fragment.data.numel() != fragment.stop - fragment.start or fragment.data.dtype not in DTYPE_NAMES:
        got = f"{fragment.data.numel()} elements of {fragment.data.dtype}"
        raise CheckpointError("data does not fit its address", where=where, got=got, want=f"{fragment.stop - fragment.start} elements of {list(DTYPE_NAMES)}")
    return fragment


def narrow(fragment: Fragment, start: int, stop: int) -> Fragment:
    """The part [start, stop) of a fragment's flat range, a view."""
    data = fragment.data.detach().reshape(-1)[start - fragment.start : stop - fragment.start]
    return replace(fragment, start=start, stop=stop, data=data)


def cut(fragments: Iterable[Fragment], shard_bytes: int) -> list[list[Fragment]]:
    """Groups fragments into shards of at most shard_bytes of data, cutting the ones that are larger; widest dtype first, so that all are aligned."""
    shards: list[list[Fragment]] = []
    room = 0
    for fragment in sorted(fragments, key=lambda one: -ITEM_BYTES[dtype_name(one)]):
        step = max(shard_bytes // ITEM_BYTES[dtype_name(fragment)], 1)
        for start in range(fragment.start, fragment.stop, step):
            piece = narrow(fragment, start, min(start + step, fragment.stop))
            if num_bytes(piece) > room:
                shards.append([])
                room = max(shard_bytes, num_bytes(piece))
            shards[-1].append(piece)
            room -= num_bytes(piece)
    return shards
