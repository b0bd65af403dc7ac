"""One job at a time in a folder of checkpoints.

The kernel holds the lock (flock) and lets go when the process dies, however it dies. The file's text names the holder for
people, and serves alone where a file system has no flock, or where a forked child keeps a dead holder's lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from neox.checkpoint.storage import disk_error, make_dirs
from neox.errors import CheckpointError

LOCK = "lock"
_START_TOLERANCE = 2.0  # seconds between two readings of a process's start time


class FolderLock:
    """The lock of a folder, held from construction until `release` or the end of the process.

    Args:
        root: folder; created if it is missing.

    Raises CheckpointError naming host, pid and start time where another job holds it, DiskError where it cannot be written.
    """

    def __init__(self, root: str | Path):
        make_dirs(Path(root))
        self.path = Path(root) / LOCK
        self._descriptor = -1
        for _ in range(10):  # the file may be replaced between opening and locking it
            if self._try():
                return
        raise CheckpointError("another job is taking this folder", where=self.path, do="start one job per run.dir")

    def release(self) -> None:
        """Lets go; the file goes too. Safe to call twice."""
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
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise disk_error(error, self.path) from error
        try:
            self._take(descriptor)
            if not _same_file(descriptor, self.path):
                os.close(descriptor)
                return False
            _write_holder(descriptor, self.path)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            unsupported = error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
        holder = _read_holder(descriptor)
        if unsupported and (not holder or _is_dead(holder)):
            return
        if holder and _is_dead(holder):  # a child that it left behind keeps the lock: go on with a new file
            os.unlink(self.path)
            return
        raise CheckpointError(
            "another job holds this folder",
            where=self.path,
            got=f"host {holder.get('host')}, pid {holder.get('pid')}, started {holder.get('started')}" if holder else "a holder that is starting",
            want="one job per run.dir",
            do="stop that job, or choose another run.dir; if it is gone, remove the file",
        )


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int, path: Path) -> None:
    born = psutil.Process().create_time()
    text = {"host": socket.gethostname(), "pid": os.getpid(), "born": born, "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(born))}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(text).encode() + b"\n", 0)
    except OSError as error:
        raise disk_error(error, path) from error


def _read_holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the recorded process is known to be gone: on this host, and no process has its pid and start time."""
    pid, born = holder.get("pid"), holder.get("born")
    if holder.get("host") != socket.gethostname() or type(pid) is not int or not isinstance(born, (int, float)):
        return False
    try:
        return abs(psutil.Process(pid).create_time() - born) > _START_TOLERANCE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
