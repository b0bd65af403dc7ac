"""Storage with fault injection: every call is a site of FAULT (neox.faults)."""

from __future__ import annotations

from pathlib import Path

from neox.checkpoint.manifest import MANIFEST
from neox.checkpoint.storage import LOCAL, Storage
from neox.faults import Faults


class FaultyStorage(Storage):
    """The system calls, each preceded by its site. Publishing a manifest and removing one have separate sites."""

    def __init__(self, faults: Faults):
        self.faults = faults

    def make_dir(self, path: Path) -> None:
        """Site make_dir."""
        self.faults("make_dir")
        super().make_dir(path)

    def create(self, path: Path) -> int:
        """Site create."""
        self.faults("create")
        return super().create(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Site write, halfway through the bytes, so that a write can be torn there."""
        half = len(data) // 2
        taken = super().write(descriptor, data[:half])
        self.faults("write")
        return taken if taken < half else taken + super().write(descriptor, data[half:])

    def sync(self, descriptor: int) -> None:
        """Site sync."""
        self.faults("sync")
        super().sync(descriptor)

    def close(self, descriptor: int) -> None:
        """Site close; the file is closed in any case."""
        super().close(descriptor)
        self.faults("close")

    def sync_dir(self, path: Path) -> None:
        """Site sync_dir."""
        self.faults("sync_dir")
        super().sync_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        """Site publish where a manifest gets its final name, else rename."""
        self.faults("publish" if target.name == MANIFEST else "rename")
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        """Site retain where a manifest is removed, else unlink."""
        self.faults("retain" if path.name == MANIFEST else "unlink")
        super().unlink(path)

    def remove_dir(self, path: Path) -> None:
        """Site remove_dir."""
        self.faults("remove_dir")
        super().remove_dir(path)


def storage_with(faults: Faults) -> Storage:
    """The storage of a run, with fault injection only where faults are configured."""
    return FaultyStorage(faults) if faults else LOCAL
