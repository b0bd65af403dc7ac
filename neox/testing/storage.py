"""Storage for fault injection: every call is a site of FAULT (neox.testing.faults)."""

from __future__ import annotations

from pathlib import Path

from neox.checkpoint.manifest import MANIFEST
from neox.checkpoint.storage import LOCAL, Storage
from neox.testing.faults import FaultInjector


class FaultyStorage(Storage):
    """Local storage that visits a site before each system call.

    Publishing a manifest and removing one are separate sites.
    """

    def __init__(self, injector: FaultInjector):
        self.injector = injector

    def make_dir(self, path: Path) -> None:
        """Site make_dir."""
        self.injector.enter("make_dir")
        super().make_dir(path)

    def create(self, path: Path) -> int:
        """Site create."""
        self.injector.enter("create")
        return super().create(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Site write, after half of the bytes, so that a fault can tear the file there."""
        half = len(data) // 2
        taken = super().write(descriptor, data[:half])
        self.injector.enter("write")
        return taken if taken < half else taken + super().write(descriptor, data[half:])

    def sync(self, descriptor: int) -> None:
        """Site sync."""
        self.injector.enter("sync")
        super().sync(descriptor)

    def close(self, descriptor: int) -> None:
        """Site close. The file is closed in either case."""
        super().close(descriptor)
        self.injector.enter("close")

    def sync_dir(self, path: Path) -> None:
        """Site sync_dir."""
        self.injector.enter("sync_dir")
        super().sync_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        """Site publish for a manifest, else rename."""
        self.injector.enter("publish" if target.name == MANIFEST else "rename")
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        """Site retain for a manifest, else unlink."""
        self.injector.enter("retain" if path.name == MANIFEST else "unlink")
        super().unlink(path)

    def remove_dir(self, path: Path) -> None:
        """Site remove_dir."""
        self.injector.enter("remove_dir")
        super().remove_dir(path)


def storage_with(injector: FaultInjector) -> Storage:
    """The storage of a run: local storage, wrapped only if there are faults to inject."""
    return FaultyStorage(injector) if injector else LOCAL
