"""System calls and checked reads of checkpoint files. The durable writes are in neox.files."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from neox._native import core
from neox.errors import CheckpointError
from neox.files import FileSystem


class Storage(FileSystem):
    """The system calls of checkpoints: durable writes, early write-back of large files, and opening for reading."""

    def begin_sync(self, descriptor: int, offset: int, count: int) -> None:
        """Start the write-back of these bytes, so that the disk works while the next ones are copied.

        Promises nothing and never fails.
        """
        core.start_writeback(descriptor, offset, count)

    def open_read(self, path: Path) -> int:
        """Open for reading, never through a link, never blocking on a pipe."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


LOCAL = Storage()


def read_file(path: Path, limit: int, *, storage: Storage = LOCAL) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises CheckpointError (missing, a link, not a file, too large, unreadable).
    """
    descriptor, size = _open_regular(path, storage)
    try:
        if size > limit:
            raise CheckpointError("file is too large", where=path, got=f"{size} bytes", want=f"at most {limit} bytes")
        parts = []
        while part := os.read(descriptor, size + 1):  # not limit + 1: os.read allocates what it is asked for
            parts.append(part)
        return b"".join(parts)
    except OSError as error:
        raise unreadable(error, path) from error
    finally:
        os.close(descriptor)


def open_file(path: Path, size: int, *, storage: Storage = LOCAL) -> int:
    """Open a regular file of exactly `size` bytes for reading; returns a descriptor. Raises CheckpointError."""
    descriptor, found = _open_regular(path, storage)
    if found != size:
        os.close(descriptor)
        raise CheckpointError("file has the wrong size", where=path, got=f"{found} bytes", want=f"{size} bytes")
    return descriptor


def _open_regular(path: Path, storage: Storage) -> tuple[int, int]:
    try:
        descriptor = storage.open_read(path)
    except OSError as error:
        raise unreadable(error, path) from error
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        os.close(descriptor)
        raise CheckpointError("not a regular file", where=path)
    return descriptor, info.st_size


def unreadable(error: OSError, path: Path) -> CheckpointError:
    """The CheckpointError of a failed read."""
    got = "a symbolic link" if error.errno == errno.ELOOP else error.strerror or str(error)
    what = "file is missing" if error.errno == errno.ENOENT else "cannot read"
    return CheckpointError(what, where=path, got=got)
