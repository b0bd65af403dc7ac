"""The one place where durable bytes are written.

Protocol of a file: temporary name -> write -> fsync -> rename; then fsync of its folder. A reader therefore sees a file
whole or not at all. `Storage` is the set of system calls, one method each, so that a test can put another object in its
place that fails, tears or records any of them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from neox._native import core
from neox.errors import CheckpointError, DiskError

TEMPORARY = ".tmp"
WRITE_BYTES = 4 << 20  # largest single write call


class Storage:
    """System calls on the local file system. Every method may raise OSError."""

    def make_dir(self, path: Path) -> None:
        """Creates one folder; its parent is there."""
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """Creates a file that is not there yet, never through a link; returns a descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Appends; returns the bytes taken, which may be fewer than given."""
        return os.write(descriptor, data)

    def begin_sync(self, descriptor: int, offset: int, count: int) -> None:
        """Has the disk begin with these bytes, so that it works while the next ones are copied; promises nothing, and never fails."""
        core.start_writeback(descriptor, offset, count)

    def sync(self, descriptor: int) -> None:
        """Makes a file's bytes durable."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Closes a file."""
        os.close(descriptor)

    def sync_dir(self, path: Path) -> None:
        """Makes a folder's entries durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Renames, replacing what is there, in one step."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Removes a file."""
        os.unlink(path)

    def remove_dir(self, path: Path) -> None:
        """Removes an empty folder."""
        os.rmdir(path)

    def open_read(self, path: Path) -> int:
        """Opens for reading, never through a link, never blocking on a pipe."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


LOCAL = Storage()

_ADVICE = {
    errno.ENOSPC: "free space or choose another run.dir; older checkpoints are untouched",
    errno.EDQUOT: "raise the quota or choose another run.dir; older checkpoints are untouched",
    errno.EROFS: "mount it writable or choose another run.dir",
    errno.EACCES: "fix the permissions or choose another run.dir",
    errno.EPERM: "fix the permissions or choose another run.dir",
    errno.ENOENT: "the folder is gone: put it back or choose another run.dir",
    errno.EIO: "check the disk; older checkpoints are untouched",
}


def disk_error(error: OSError, path: Path, need: int | None = None) -> DiskError:
    """The DiskError of a failed system call: names the errno, the bytes free and, if known, the bytes needed."""
    code = errno.errorcode.get(error.errno or 0, "OSError")
    free = free_bytes(path)
    got = f"{error.strerror or error} ({code})" + ("" if free is None else f", {free} bytes free")
    want = None if need is None else f"{need} bytes written"
    return DiskError("cannot write", where=path, got=got, want=want, do=_ADVICE.get(error.errno or 0, "check the file system"))


def free_bytes(path: Path) -> int | None:
    """Bytes free to this user on the file system of `path` or of its nearest parent; None where it cannot be asked."""
    for place in (path, *path.parents):
        try:
            info = os.statvfs(place)
        except OSError:
            continue
        return info.f_bavail * info.f_frsize
    return None


class FileWriter:
    """Writes one file under a temporary name and renames it on `commit`.

    Used as a context manager: leaving it without a commit removes the temporary file. The rename is durable only after
    `sync_dir` of the folder, which the caller does once for all its files. Raises DiskError.
    """

    def __init__(self, path: Path, *, need: int | None = None, storage: Storage = LOCAL):
        self.path = path
        self.size = 0
        self._need = need
        self._storage = storage
        self._temporary = path.with_name(path.name + TEMPORARY)
        self._descriptor: int | None = None

    def __enter__(self) -> FileWriter:
        self._descriptor = self._call(self._storage.create, self._temporary)
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Appends all of `data`."""
        view = memoryview(data).cast("B")
        while view:
            taken = self._call(self._storage.write, self._descriptor, view[:WRITE_BYTES])
            view = view[taken:]
            self._storage.begin_sync(self._descriptor, self.size, taken)
            self.size += taken

    def commit(self) -> None:
        """Makes the bytes durable and gives the file its name."""
        self._call(self._storage.sync, self._descriptor)
        descriptor, self._descriptor = self._descriptor, None
        self._call(self._storage.close, descriptor)
        self._call(self._storage.rename, self._temporary, self.path)
        self._temporary = None

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            attempt(self._storage.close, self._descriptor)
        if self._temporary is not None:
            attempt(self._storage.unlink, self._temporary)

    def _call(self, function: Callable, *arguments: object):
        try:
            return function(*arguments)
        except OSError as error:
            raise disk_error(error, self.path, self._need) from error


def attempt(function: Callable[..., object], *arguments: object) -> bool:
    """Clean-up after an error that is reported already: True when the call went through."""
    try:
        function(*arguments)
    except OSError:
        return False
    return True


def write_file(path: Path, data: bytes, *, storage: Storage = LOCAL) -> None:
    """Writes or replaces a small file so that it is there whole, or as it was. Durable on return. Raises DiskError."""
    clear_temporary(path, storage=storage)
    with FileWriter(path, need=len(data), storage=storage) as writer:
        writer.write(data)
        writer.commit()
    sync_dir(path.parent, storage=storage)


def clear_temporary(path: Path, *, storage: Storage = LOCAL) -> None:
    """Removes what an earlier, interrupted write of `path` left."""
    temporary = path.with_name(path.name + TEMPORARY)
    if os.path.lexists(temporary):
        guarded(storage.unlink, temporary)


def guarded(function: Callable, path: Path, *arguments: object):
    """Calls a storage method on a path; its OSError becomes a DiskError."""
    try:
        return function(path, *arguments)
    except OSError as error:
        raise disk_error(error, path) from error


def sync_dir(path: Path, *, storage: Storage = LOCAL) -> None:
    """Makes the entries of a folder durable. Raises DiskError."""
    guarded(storage.sync_dir, path)


def make_dirs(path: Path, *, storage: Storage = LOCAL) -> None:
    """Creates a folder and its missing parents, each durable in its own parent. Raises DiskError."""
    missing = []
    place = Path(os.path.abspath(path))
    while not place.is_dir():
        missing.append(place)
        place = place.parent
    for folder in reversed(missing):
        try:
            storage.make_dir(folder)
        except FileExistsError as error:
            if not folder.is_dir():
                raise disk_error(error, folder) from error
        except OSError as error:
            raise disk_error(error, folder) from error
        sync_dir(folder.parent, storage=storage)


def probe(root: str | Path, *, storage: Storage = LOCAL) -> None:
    """Writes, syncs, renames and removes a small file in `root`, so that a folder that cannot be written is found before the first step.

    Creates `root` if it is missing. Raises DiskError.
    """
    root = Path(root)
    make_dirs(root, storage=storage)
    path = root / f".probe-{os.getpid()}"
    write_file(path, b"\0" * 4096, storage=storage)
    guarded(storage.unlink, path)


def read_file(path: Path, limit: int, *, storage: Storage = LOCAL) -> bytes:
    """Reads a regular file of at most `limit` bytes. Raises CheckpointError (missing, a link, not a file, too large, unreadable)."""
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
    """Opens a regular file of exactly `size` bytes for reading; returns a descriptor. Raises CheckpointError."""
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
