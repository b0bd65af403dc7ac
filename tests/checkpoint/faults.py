"""Storage with injected failures, and a model of what a crash leaves on a disk.

The model is pessimistic: bytes are durable after fsync of the file, names after fsync of the folder, and what is not
durable may be present, absent, torn, or present without the changes before it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from neox.checkpoint.storage import Storage

CALLS = ("make_dir", "create", "write", "sync", "close", "sync_dir", "rename", "unlink", "remove_dir")


class CountingStorage(Storage):
    """Calls `before(name)` ahead of every call that changes the disk."""

    def before(self, name: str) -> None:
        """Hook."""

    def make_dir(self, path):
        self.before("make_dir")
        super().make_dir(path)

    def create(self, path):
        self.before("create")
        return super().create(path)

    def write(self, descriptor, data):
        self.before("write")
        return super().write(descriptor, data)

    def sync(self, descriptor):
        self.before("sync")
        super().sync(descriptor)

    def close(self, descriptor):
        super().close(descriptor)
        self.before("close")

    def sync_dir(self, path):
        self.before("sync_dir")
        super().sync_dir(path)

    def rename(self, source, target):
        self.before("rename")
        super().rename(source, target)

    def unlink(self, path):
        self.before("unlink")
        super().unlink(path)

    def remove_dir(self, path):
        self.before("remove_dir")
        super().remove_dir(path)


class FailingStorage(CountingStorage):
    """Raises OSError(number) at the count-th call of `name` ("any": of any kind), from 0.

    `forever`: at all later ones too.
    """

    def __init__(self, name: str, count: int, number: int, forever: bool = False):
        self.name, self.left, self.number, self.forever = name, count, number, forever
        self.failed = False

    def before(self, name: str) -> None:
        if self.name not in ("any", name):
            return
        if (self.failed and self.forever) or (not self.failed and self.left == 0):
            self.failed = True
            raise OSError(self.number, os.strerror(self.number))
        self.left -= 1


class ShortStorage(Storage):
    """Takes at most 100 bytes of each write, as a system call may."""

    def write(self, descriptor, data):
        return super().write(descriptor, data[:100])


class RecordingStorage(Storage):
    """Records every call that changes the disk, with its data."""

    def __init__(self):
        self.trace: list[tuple] = []
        self._names: dict[int, Path] = {}

    def make_dir(self, path):
        super().make_dir(path)
        self.trace.append(("make_dir", Path(path)))

    def create(self, path):
        descriptor = super().create(path)
        self._names[descriptor] = Path(path)
        self.trace.append(("create", Path(path)))
        return descriptor

    def write(self, descriptor, data):
        taken = super().write(descriptor, data)
        self.trace.append(("write", self._names[descriptor], bytes(data[:taken])))
        return taken

    def sync(self, descriptor):
        super().sync(descriptor)
        self.trace.append(("sync", self._names[descriptor]))

    def sync_dir(self, path):
        super().sync_dir(path)
        self.trace.append(("sync_dir", Path(path)))

    def rename(self, source, target):
        super().rename(source, target)
        self.trace.append(("rename", Path(source), Path(target)))

    def unlink(self, path):
        super().unlink(path)
        self.trace.append(("unlink", Path(path)))

    def remove_dir(self, path):
        super().remove_dir(path)
        self.trace.append(("remove_dir", Path(path)))


@dataclass
class File:
    """A file's bytes: as written, and as durable."""

    data: bytes = b""
    durable: bytes = b""

    def after_crash(self, mode: str) -> bytes:
        """Bytes found after a crash, by mode.

        "retained": all; "lost": the synced ones; "torn": also half of the others, to a multiple of 512; "zeroed": zeros
        instead of the others.
        """
        if mode == "retained" or self.data == self.durable:
            return self.data
        extra = len(self.data) - len(self.durable)
        if mode == "torn":
            return self.data[: len(self.durable) + extra // 2 // 512 * 512]
        return self.durable + b"\0" * extra if mode == "zeroed" else self.durable


@dataclass
class Folder:
    """Names that are durable, and the changes since the last fsync of the folder, in order."""

    durable: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[tuple] = field(default_factory=list)

    def names(self, retained: list[bool] | None = None) -> dict[str, File | Folder]:
        """The entries with those pending changes applied that `retained` marks; None: all."""
        out = dict(self.durable)
        for index, change in enumerate(self.pending):
            if retained is None or retained[index]:
                _apply(out, change)
        return out


def _apply(names: dict, change: tuple) -> None:
    kind, name, other = change
    if kind == "link":
        names[name] = other
    elif kind == "rename" and name in names:
        names[other] = names.pop(name)
    elif kind == "unlink":
        names.pop(name, None)


class Disk:
    """A folder on a disk, changed by a recorded trace."""

    def __init__(self, top: Path):
        self.top = top
        self.root = self._read(top)

    def _read(self, path: Path) -> Folder:
        folder = Folder()
        for entry in os.scandir(path):
            if entry.is_dir():
                folder.durable[entry.name] = self._read(Path(entry.path))
            else:
                raw = Path(entry.path).read_bytes()
                folder.durable[entry.name] = File(raw, raw)
        return folder

    def _folder(self, path: Path) -> Folder:
        node = self.root
        for part in path.relative_to(self.top).parts:
            node = node.names()[part]
        return node

    def apply(self, call: tuple) -> None:
        """Does one recorded call."""
        kind, path, *rest = call
        if kind == "sync_dir":
            if path == self.top.parent:
                return
            folder = self._folder(path)
            folder.durable, folder.pending = folder.names(), []
            return
        folder = self._folder(path.parent)
        if kind in ("make_dir", "create"):
            folder.pending.append(("link", path.name, Folder() if kind == "make_dir" else File()))
        elif kind == "write":
            folder.names()[path.name].data += rest[0]
        elif kind == "write_at":
            file, (offset, data) = folder.names()[path.name], rest
            file.data = file.data[:offset].ljust(offset, b"\0") + data + file.data[offset + len(data) :]
        elif kind == "sync":
            file = folder.names()[path.name]
            file.durable = file.data
        elif kind == "rename":
            folder.pending.append(("rename", path.name, rest[0].name))
        else:
            folder.pending.append(("unlink", path.name, None))

    def crashes(self) -> Iterator[tuple[str, dict]]:
        """Every state that a crash now may leave: (description, tree of names with bytes)."""
        folders = list(self._walk(self.root))
        choices = {"all names": {}, "synced names": {id(one): [False] * len(one.pending) for one in folders}}
        for number, one in enumerate(folders):
            if one.pending:
                choices[f"folder {number} lost"] = {id(one): [False] * len(one.pending)}
            for index in range(len(one.pending)):
                choices[f"folder {number} without change {index}"] = {
                    id(one): [other != index for other in range(len(one.pending))]
                }
        for names, retained in choices.items():
            for mode in ("retained", "lost", "torn", "zeroed"):
                yield f"{names}, bytes {mode}", self._tree(self.root, retained, mode)

    def _walk(self, folder: Folder) -> Iterator[Folder]:
        yield folder
        for node in folder.names().values():
            if isinstance(node, Folder):
                yield from self._walk(node)

    def _tree(self, folder: Folder, retained: dict, mode: str) -> dict:
        return {
            name: self._tree(node, retained, mode) if isinstance(node, Folder) else node.after_crash(mode)
            for name, node in folder.names(retained.get(id(folder))).items()
        }


def materialise(tree: dict, target: Path) -> None:
    """Writes a tree of names with bytes to a real folder."""
    target.mkdir()
    for name, node in tree.items():
        if isinstance(node, dict):
            materialise(node, target / name)
        else:
            (target / name).write_bytes(node)


def fingerprint(tree: dict) -> str:
    """SHA-256 of a tree of names with bytes."""
    result = hashlib.sha256()
    for name, node in sorted(tree.items()):
        part = fingerprint(node).encode() if isinstance(node, dict) else hashlib.sha256(node).digest()
        result.update(repr((name, isinstance(node, dict))).encode() + part)
    return result.hexdigest()
