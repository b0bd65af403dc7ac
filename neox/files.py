"""Files: bounded reads of regular files, and durable writes.

Reading: a FIFO without a writer does not block, and a device does not fill the memory.

Writing: a file is either complete or absent. The protocol is: temporary name -> write -> fsync -> rename, then fsync of
the folder. `FileSystem` holds the system calls, one method each, so that a test can inject failures, torn writes or a
recorder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from neox.errors import DiskError

JsonValue = Any  # parsed JSON of any type; the code that reads it checks it
JsonObject = dict[str, JsonValue]

LARGEST_FILE = 1 << 28  # bytes of a tokenizer, shard index, or list of prompts; published tokenizers are below 40 MB
LARGEST_RECORD = 1 << 32  # bytes of metrics.jsonl or log.txt: tens of millions of steps
LARGEST_CONFIG = 1 << 24  # bytes of a config, template or manifest
TEMPORARY = ".tmp"
WRITE_BYTES = 4 << 20  # largest single write call

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

_ADVICE = {
    errno.ENOSPC: "free space or choose another folder; existing files are untouched",
    errno.EDQUOT: "raise the quota or choose another folder; existing files are untouched",
    errno.EROFS: "mount it writable or choose another folder",
    errno.EACCES: "fix the permissions or choose another folder",
    errno.EPERM: "fix the permissions or choose another folder",
    errno.ENOENT: "the folder is missing: restore it or choose another one",
    errno.EIO: "check the disk; existing files are untouched",
}


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: it cannot be opened or is something else; `strerror` names what it is.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO without a writer must not block
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = KINDS.get(stat.S_IFMT(mode), "a special file")
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(code, f"{kind}, not a regular file", os.fspath(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def open_to_append(path: str | os.PathLike[str]) -> int:
    """A descriptor that appends to a regular file, created if it is missing.

    Raises:
        OSError: it cannot be opened or is something else; `strerror` names what it is.
    """
    # O_NONBLOCK: a FIFO without a reader must not block
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.EINVAL, "a FIFO or socket, not a regular file", os.fspath(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        kind = KINDS.get(stat.S_IFMT(os.fstat(descriptor).st_mode), "a special file")
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", os.fspath(path))
    return descriptor


def require_regular(path: str | os.PathLike[str]) -> None:
    """Check a file that a library opens by its name. Raises OSError as `open_regular`."""
    open_regular(path).close()


def read_bytes(path: str | os.PathLike[str], limit: int = LARGEST_FILE) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger; `strerror` gives the reason.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", os.fspath(path))
    return content


def read_text(path: str | os.PathLike[str], limit: int = LARGEST_CONFIG) -> str:
    """The content of a UTF-8 file. Raises OSError as `read_bytes`, and ValueError for bytes that are not UTF-8."""
    return read_bytes(path, limit).decode("utf-8").replace("\r\n", "\n")


def read_json(path: str | os.PathLike[str], limit: int = LARGEST_FILE) -> JsonValue:
    """The value of a JSON file, NaN and Infinity included.

    Raises:
        OSError: as `read_bytes`.
        ValueError: not UTF-8, not JSON, or nested too deeply.
    """
    return parse_json(read_bytes(path, limit))


def parse_json(content: bytes) -> JsonValue:
    """The value of JSON text in UTF-8. Raises ValueError, also where it is nested too deeply."""
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


class FileSystem:
    """The system calls of durable writes, on the local file system. Every method may raise OSError."""

    def make_dir(self, path: Path) -> None:
        """Create one folder in an existing parent."""
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """Create a file that does not exist yet, never through a link; returns a descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Append; returns the number of bytes taken, which may be fewer than given."""
        return os.write(descriptor, data)

    def begin_sync(self, descriptor: int, offset: int, count: int) -> None:
        """Hint that these bytes may be written back now, while the next ones are copied.

        Promises nothing and never fails.
        """

    def sync(self, descriptor: int) -> None:
        """Make a file's bytes durable."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a file."""
        os.close(descriptor)

    def sync_dir(self, path: Path) -> None:
        """Make a folder's entries durable. A file system that has no fsync for folders is accepted."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename in one step, replacing an existing file."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def remove_dir(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)


LOCAL = FileSystem()


class FileWriter:
    """Writes one file under a temporary name and renames it on `commit`.

    Used as a context manager: leaving it without a commit removes the temporary file. The rename is durable only after
    `sync_dir` of the folder, which the caller does once for all its files.

    Args:
        path: final name.
        need: expected size in bytes, for the error message.
        temporary: temporary name, which must not exist; None: the final name with the suffix `.tmp`.
        storage: system calls.

    Raises:
        DiskError: a system call failed.
    """

    def __init__(
        self, path: Path, *, need: int | None = None, temporary: Path | None = None, storage: FileSystem = LOCAL
    ):
        self.path = path
        self.size = 0
        self._need = need
        self._storage = storage
        self._temporary = temporary or temporary_path(path)
        self._descriptor = -1
        self._committed = False

    def __enter__(self) -> FileWriter:
        self._descriptor = self._call(self._storage.create, self._temporary)
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`."""
        view = memoryview(data).cast("B")
        while view:
            taken = self._call(self._storage.write, self._descriptor, view[:WRITE_BYTES])
            view = view[taken:]
            self._storage.begin_sync(self._descriptor, self.size, taken)
            self.size += taken

    def commit(self) -> None:
        """Make the bytes durable and give the file its final name."""
        self._call(self._storage.sync, self._descriptor)
        descriptor, self._descriptor = self._descriptor, -1
        self._call(self._storage.close, descriptor)
        self._call(self._storage.rename, self._temporary, self.path)
        self._committed = True

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            attempt(self._storage.close, self._descriptor)
        if not self._committed:
            attempt(self._storage.unlink, self._temporary)

    def _call(self, function: Callable, *arguments: object):
        try:
            return function(*arguments)
        except OSError as error:
            raise disk_error(error, self.path, self._need) from error


def write_durably(path: Path, content: bytes, *, sole_writer: bool = False, storage: FileSystem = LOCAL) -> None:
    """Write or replace a small file. After a crash it is complete, old or new, or absent. Durable on return.

    The temporary name is random: several processes may write the same file, and in a folder that others can write, a
    link planted under a predictable name would redirect the write.

    Args:
        path: file to write; a link is replaced, not followed.
        content: its bytes.
        sole_writer: the caller is the only process that writes this file (it holds the folder's lock). The temporary
            name is then fixed, and a leftover of an interrupted write is removed first.
        storage: system calls.

    Raises:
        DiskError: the folder cannot be written or is full; no temporary file remains.
    """
    refuse_special(path)
    temporary = temporary_path(path) if sole_writer else path.with_name(f"{path.name}.partial.{os.urandom(8).hex()}")
    if sole_writer and os.path.lexists(temporary):
        guarded(storage.unlink, temporary)
    with FileWriter(path, need=len(content), temporary=temporary, storage=storage) as writer:
        writer.write(content)
        writer.commit()
    sync_dir(path.parent, storage=storage)


def refuse_special(path: Path) -> None:
    """Check that a rename to a path would replace a regular file, a link, or nothing.

    A rename replaces anything but a folder: `--out /dev/null` as root would remove the device for all programs.

    Raises:
        DiskError: it is a folder, a FIFO, a device or a socket.
    """
    try:
        kind = stat.S_IFMT(os.lstat(path).st_mode)
    except OSError:
        return  # it does not exist, or the write reports why it cannot be reached
    if kind not in (stat.S_IFREG, stat.S_IFLNK):
        raise DiskError(
            "only a file can be replaced",
            where=path,
            got=KINDS.get(kind, "a special file"),
            want="a new name, or a regular file",
            do="choose another name",
        )


def temporary_path(path: Path) -> Path:
    """The fixed temporary name of a file that has one writer."""
    return path.with_name(path.name + TEMPORARY)


def disk_error(error: OSError, path: Path, need: int | None = None) -> DiskError:
    """The DiskError of a failed system call, with the errno, the bytes free and, if known, the bytes needed."""
    code = errno.errorcode.get(error.errno or 0, "OSError")
    free = free_bytes(path)
    got = f"{error.strerror or error} ({code})" + ("" if free is None else f", {free} bytes free")
    want = None if need is None else f"{need} bytes written"
    return DiskError(
        "cannot write", where=path, got=got, want=want, do=_ADVICE.get(error.errno or 0, "check the file system")
    )


def free_bytes(path: Path) -> int | None:
    """Bytes available to this user on the file system of `path` or of its nearest existing parent.

    None where statvfs fails.
    """
    for folder in (path, *path.parents):
        try:
            info = os.statvfs(folder)
        except OSError:
            continue
        return info.f_bavail * info.f_frsize
    return None


def attempt(function: Callable[..., object], *arguments: object) -> bool:
    """Call a clean-up step after an error that is already being reported; True when it succeeded."""
    try:
        function(*arguments)
    except OSError:
        return False
    return True


def guarded(function: Callable, path: Path, *arguments: object):
    """Call a storage method on a path; its OSError becomes a DiskError."""
    try:
        return function(path, *arguments)
    except OSError as error:
        raise disk_error(error, path) from error


def sync_dir(path: Path, *, storage: FileSystem = LOCAL) -> None:
    """Make the entries of a folder durable. Raises DiskError."""
    guarded(storage.sync_dir, path)


def make_dirs(path: Path, *, storage: FileSystem = LOCAL) -> None:
    """Create a folder and its missing parents, each durable in its parent. Raises DiskError."""
    missing = []
    folder = Path(os.path.abspath(path))
    while not os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        try:
            storage.make_dir(folder)
        except FileExistsError as error:
            if not folder.is_dir():
                raise disk_error(error, folder) from error
        except OSError as error:
            raise disk_error(error, folder) from error
        sync_dir(folder.parent, storage=storage)


def probe(root: str | Path, *, storage: FileSystem = LOCAL) -> None:
    """Write, sync, rename and remove a small file in `root`, to detect a read-only folder before the first step.

    Creates `root` if it is missing. Raises DiskError.
    """
    root = Path(root)
    make_dirs(root, storage=storage)
    path = root / f".probe-{os.getpid()}"
    write_durably(path, b"\0" * 4096, sole_writer=True, storage=storage)
    guarded(storage.unlink, path)


def open_no_link(name: str, flags: int) -> int:
    """An `opener` for `open` that refuses a symbolic link in the last part of the name, with ELOOP."""
    return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file.

    The kernel releases it when the process dies. Does nothing on a file system without locks.
    """
    with open(path, "ab", opener=open_no_link) as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
