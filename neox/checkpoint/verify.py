"""Verification of a complete checkpoint, and digests that compare checkpoints across layouts."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from neox.checkpoint.manifest import ITEM_BYTES, read_manifest
from neox.checkpoint.reader import READ_THREADS, Checkpoint, check_folder
from neox.checkpoint.shard_reader import ShardReader
from neox.checkpoint.storage import LOCAL, Storage
from neox.errors import CheckpointError
from neox.printing import counted

DIGEST_BYTES = 64 << 20  # bytes of a logical tensor that digest() holds at a time


@dataclass(frozen=True)
class Report:
    """What `verify` has checked."""

    path: Path
    step: int
    num_files: int
    num_bytes: int
    num_tensors: int


def verify(path: str | Path, *, storage: Storage = LOCAL) -> Report:
    """Check everything: manifest, coverage, files, headers, every checksum.

    Raises CheckpointError with the first problem and their number.
    """
    folder = Path(path)
    found = problems(folder, storage=storage)
    if found:
        first = found[0]
        what = first.what if len(found) == 1 else f"{first.what} (and {counted(len(found) - 1, 'more problem')})"
        raise CheckpointError(what, where=first.where, got=first.got, want=first.want, do=first.do)
    manifest = read_manifest(folder, storage=storage)
    return Report(
        folder, manifest.step, len(manifest.files), sum(file.size for file in manifest.files), len(manifest.tensors)
    )


def problems(path: Path, *, part: int = 0, parts: int = 1, storage: Storage = LOCAL) -> list[CheckpointError]:
    """Every problem of a checkpoint. Reads the bytes of every parts-th file only, so that ranks can divide the work."""
    try:
        manifest = read_manifest(path, storage=storage)
        check_folder(path, manifest)
    except CheckpointError as error:
        return [error]
    found: list[CheckpointError] = []
    with ThreadPoolExecutor(READ_THREADS) as threads:
        for file in manifest.files[part::parts]:
            try:
                reader = ShardReader(path, file, manifest, storage=storage)
            except CheckpointError as error:
                found.append(error)
                continue
            for segment in file.segments:
                found += reader.problems(segment, threads)
            reader.close()
    return found


def digest(path: str | Path) -> dict[str, str]:
    """SHA-256 of every logical tensor by "kind/name": of its dtype, shape and row-major bytes.

    It is independent of the layout that wrote the checkpoint.

    Raises CheckpointError where the checkpoint is damaged.
    """
    out = {}
    with Checkpoint(path) as checkpoint:
        for name in checkpoint.names():
            for kind in checkpoint.kinds(name):
                out[f"{kind}/{name}"] = _digest_tensor(checkpoint, name, kind)
    return dict(sorted(out.items()))


def _digest_tensor(checkpoint: Checkpoint, name: str, kind: str) -> str:
    info = checkpoint.info(name, kind)
    result = hashlib.sha256(f"{info.dtype} {list(info.shape)}\n".encode())
    size, step = math.prod(info.shape), DIGEST_BYTES // ITEM_BYTES[info.dtype]
    for start in range(0, size, step):
        part = checkpoint.read(name, kind, None, start, min(start + step, size))
        result.update(part.view(torch.uint8).numpy().data)
    return result.hexdigest()
