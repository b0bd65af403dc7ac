"""Caches the arrays of `order: neox` and `packing: best_fit` on disk, keyed by content and memory-mapped."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import orjson

from neox._native import core
from neox.errors import DataError, DiskError
from neox.files import locked, read_bytes, sync_dir, write_durably

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]

NAMES = ("doc_idx", "sample_idx", "shuffle_idx")
PACKING_NAMES = ("firsts", "sizes", "starts")
MANIFEST = "manifest.json"

log = logging.getLogger("neox.data")


def cache_key(**settings: int) -> str:
    """Name of the arrays for some settings: a hash of them."""
    return hashlib.sha256(orjson.dumps(["neox-order-1", settings], option=orjson.OPT_SORT_KEYS)).hexdigest()[:24]


def cached_order(
    folders: Sequence[Path], key: str, build: Callable[[], Arrays], names: Sequence[str] = NAMES
) -> Arrays:
    """The arrays for `key`, from the first folder that has them; else built and stored in the first writable folder.

    If several processes call this at once, one builds the arrays and the others wait for it. A damaged cache is
    rebuilt. If no folder is writable, the arrays stay in memory, and a warning is logged.

    Args:
        folders: folders of caches, in order of preference.
        key: name of the arrays, see `cache_key`.
        build: computes the arrays.
        names: names of the arrays.
    """
    for folder in folders:
        arrays = load(folder / key, names)
        if arrays is not None:
            return arrays
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / f"{key}.lock"):
                arrays = load(folder / key, names)
                return store(folder / key, build(), names) if arrays is None else arrays
        except (OSError, DiskError) as error:
            log.warning("cannot store the sample order in %s (%s)", folder, error)
    log.warning("every process holds the sample order in memory; set data.index_cache to a writable folder")
    return build()


def store(folder: Path, arrays: Arrays, names: Sequence[str] = NAMES) -> Arrays:
    """Write the arrays to a temporary folder, rename it to `folder`, and map them.

    Raises:
        OSError: they cannot be written.
    """
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial.", dir=folder.parent))
    try:
        sums = {}
        for name, array in zip(names, arrays, strict=True):
            with open(partial / f"{name}.npy", "wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            sums[name] = f"{core.file_checksum(os.fsencode(partial / f'{name}.npy')):016x}"
        write_durably(partial / MANIFEST, orjson.dumps(sums))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged cache of the same key
        with contextlib.suppress(FileExistsError):
            os.rename(partial, folder)
        sync_dir(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    stored = load(folder, names)
    if stored is None:
        raise OSError(None, "the cache reads back differently")
    return stored


def load(folder: Path, names: Sequence[str] = NAMES) -> Arrays | None:
    """The memory-mapped arrays; None if they are missing or damaged."""
    try:
        sums = orjson.loads(read_bytes(folder / MANIFEST))
        for name in names:
            if int(sums[name], 16) != core.file_checksum(os.fsencode(folder / f"{name}.npy")):
                raise ValueError(f"checksum of {name} differs")
        first, second, third = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, DataError) as error:
        log.warning("sample order in %s is damaged and is rebuilt (%s)", folder, error)
        return None
    return first, second, third
