"""Durable writes and lock files: a file is either complete or absent after a crash."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
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


def open_no_link(name: str, flags: int) -> int:
    """An `opener` for `open` that refuses a symbolic link in the last part of the name, with ELOOP."""
    return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that it is complete or absent after a crash: temporary name, fsync, rename, fsync of the folder.

    The temporary name is random and must be free: in a folder that others can write, a link under a name that can be predicted would have this
    process overwrite the file that the link names.

    Raises:
        DiskError: the folder cannot be written or is full; nothing is left behind.
    """
    partial = path.with_name(f"{path.name}.partial.{secrets.token_hex(8)}")
    try:
        with open(partial, "xb", opener=open_no_link) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # a read-only disk refuses this too
            partial.unlink(missing_ok=True)
        raise DiskError("cannot write file", where=path, got=error.strerror, do="check free space and permissions of the folder") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, which the system releases when the process dies. On a file system without locks this does nothing."""
    with open(path, "ab", opener=open_no_link) as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
