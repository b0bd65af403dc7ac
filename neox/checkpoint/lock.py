"""One job at a time in a folder of checkpoints.

The kernel holds the lock (flock) and releases it when the process dies, however it dies. While it is held, a second job
is refused; the file's text names the holder. There is one exception: a forked child may still hold the lock of a
process that is known to have exited.

A file system without flock (some Lustre and FUSE mounts) leaves only the text: the file is then created exclusively,
and is taken over only if its holder is known to have exited. Where that cannot be known (another host, another
container, a file of an earlier version), the user decides.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from neox.checkpoint.process_identity import describe_process, has_exited
from neox.errors import CheckpointError
from neox.files import JsonObject, disk_error, make_dirs

LOCK = "lock"
NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class FolderLock:
    """The lock of a folder, held from construction until `release` or the end of the process.

    Args:
        root: folder; created if it is missing.

    Raises:
        CheckpointError: another job holds it; the message has its host, pid and start time.
        DiskError: the file cannot be written.
    """

    def __init__(self, root: str | Path):
        make_dirs(Path(root))
        self.path = Path(root) / LOCK
        self._descriptor = -1
        for _ in range(10):  # the file may be replaced between opening and locking it
            if self._try():
                return
        raise CheckpointError("another job is acquiring this folder", where=self.path, do="start one job per run.dir")

    def release(self) -> None:
        """Release the lock and remove the file. Safe to call twice."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            if _same_file(descriptor, self.path):
                os.unlink(self.path)
        except OSError as error:
            raise disk_error(error, self.path) from error
        finally:
            os.close(descriptor)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _try(self) -> bool:
        descriptor, created = self._open()
        try:
            if not self._take(descriptor, created) or not _same_file(descriptor, self.path):
                os.close(descriptor)
                return False
            _write_holder(descriptor, self.path)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def _open(self) -> tuple[int, bool]:
        """A descriptor of the file, and whether this call created it."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            with contextlib.suppress(FileExistsError):
                return os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
            return os.open(self.path, flags | os.O_CREAT, 0o644), False
        except OSError as error:
            raise disk_error(error, self.path) from error

    def _take(self, descriptor: int, created: bool) -> bool:
        """Lock the open file. Returns False after it has removed a stale file: retry."""
        has_flock = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            has_flock = error.errno not in NO_FLOCK
        if created and not has_flock:
            return True
        holder = _read_holder(descriptor)
        if has_exited(holder):
            self._remove_stale(descriptor)
            return False
        unknown = "a holder that is starting" if has_flock else "a file without a holder"
        raise CheckpointError(
            "another job holds this folder"
            if has_flock
            else "another job may hold this folder: its file system has no locks (flock)",
            where=self.path,
            got=", ".join(f"{key} {_clean(holder.get(key))}" for key in ("host", "pid", "started"))
            if holder
            else unknown,
            want="one job per run.dir",
            do="stop that job, or choose another run.dir; remove the file if it has exited on every host and container",
        )

    def _remove_stale(self, descriptor: int) -> None:
        """Remove the file of an exited process.

        One job at a time: a second one could remove the file that the first has created since.
        """
        try:
            with _folder_locked(self.path.parent):
                if _same_file(descriptor, self.path):
                    os.unlink(self.path)
        except OSError as error:
            raise disk_error(error, self.path) from error


@contextlib.contextmanager
def _folder_locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder itself for a few system calls, if its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int, path: Path) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(describe_process()).encode() + b"\n", 0)
    except OSError as error:
        raise disk_error(error, path) from error


def _read_holder(descriptor: int) -> JsonObject:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _clean(value: object) -> str:
    """A value of the file, sanitised for a message: any process may have written it."""
    return str(value)[:64].encode("ascii", "replace").decode()
