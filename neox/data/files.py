"""Small files that must be whole or absent: sidecars and index caches."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from neox.errors import DiskError


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable. File systems that cannot sync a folder are left as they are."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        return
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that it is complete or absent after a crash: temporary name, fsync, rename, fsync of the folder.

    Raises:
        DiskError: the folder cannot be written or is full; nothing is left behind.
    """
    partial = path.with_name(f"{path.name}.partial.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # a read-only disk refuses this too
            partial.unlink(missing_ok=True)
        raise DiskError("cannot write file", where=path, got=error.strerror, do="check free space and permissions of the folder") from error
