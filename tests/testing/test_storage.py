"""Storage with sites: each call has its own, and without faults it is the plain storage."""

import errno
import os

import pytest

from neox.checkpoint.find import find
from neox.checkpoint.storage import LOCAL
from neox.checkpoint.verify import verify
from neox.errors import DiskError
from neox.testing.faults import FaultInjector, parse
from neox.testing.storage import FaultyStorage, storage_with
from tests.checkpoint.builders import save_one

CALLS = (
    "make_dir",
    "create",
    "write",
    "sync",
    "close",
    "sync_dir",
    "rename",
    "publish",
    "unlink",
    "retain",
    "remove_dir",
)


def test_without_faults_the_local_storage_is_used():
    assert storage_with(FaultInjector()) is LOCAL
    assert isinstance(storage_with(FaultInjector(parse("eio@0:write:1"))), FaultyStorage)
    assert storage_with(FaultInjector(parse("eio@1:write:1"), rank=0)) is LOCAL


@pytest.mark.parametrize("call", CALLS)
def test_each_call_fails_at_its_site_and_nothing_is_lost(tmp_path, call):
    old = save_one(tmp_path, 1)
    keep = 1 if call in ("unlink", "retain", "remove_dir") else 0
    with pytest.raises(DiskError, match=errno.errorcode[errno.EDQUOT]):
        save_one(tmp_path, 2, keep=keep, storage=storage_with(FaultInjector(parse(f"edquot@0:{call}:1"))))
    verify(find(tmp_path, "must"))
    if not keep:
        verify(old)
    verify(save_one(tmp_path, 3, storage=storage_with(FaultInjector(parse("delay0.001@0:write:1")))))


class Sites(FaultInjector):
    """Notes the sites that are visited, and what a folder holds then."""

    def __init__(self, folder):
        super().__init__(parse("note@9:step:1"), rank=0)
        self.folder, self.seen = folder, []

    def enter(self, phase, step=None):
        self.seen.append((phase, sorted(path.name for path in self.folder.iterdir())))


def test_a_site_is_visited_before_its_call(tmp_path):
    """A fault there leaves the folder as it was; publishing and removing a manifest have their own sites."""
    storage = FaultyStorage(sites := Sites(tmp_path))
    storage.make_dir(tmp_path / "folder")
    descriptor = storage.create(tmp_path / "a")
    storage.sync(descriptor)
    storage.close(descriptor)
    storage.sync_dir(tmp_path)
    storage.rename(tmp_path / "a", tmp_path / "manifest.json")
    storage.rename(tmp_path / "manifest.json", tmp_path / "b")
    storage.rename(tmp_path / "b", tmp_path / "manifest.json")
    storage.unlink(tmp_path / "manifest.json")
    os.close(storage.create(tmp_path / "c"))
    storage.unlink(tmp_path / "c")
    storage.remove_dir(tmp_path / "folder")
    assert sites.seen == [
        ("make_dir", []),
        ("create", ["folder"]),
        ("sync", ["a", "folder"]),
        ("close", ["a", "folder"]),
        ("sync_dir", ["a", "folder"]),
        ("publish", ["a", "folder"]),
        ("rename", ["folder", "manifest.json"]),
        ("publish", ["b", "folder"]),
        ("retain", ["folder", "manifest.json"]),
        ("create", ["folder"]),
        ("unlink", ["c", "folder"]),
        ("remove_dir", ["folder"]),
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("data", "torn"), [(b"0123456", b"012"), (b"ab", b"a"), (b"x", b"")])
def test_a_fault_in_a_write_tears_the_file_in_half(tmp_path, data, torn):
    storage = FaultyStorage(FaultInjector(parse("eio@0:write:1")))
    descriptor = storage.create(tmp_path / "a")
    with pytest.raises(OSError, match="Input/output error"):
        storage.write(descriptor, memoryview(data))
    assert (tmp_path / "a").read_bytes() == torn
    assert storage.write(descriptor, memoryview(data)) == len(data)
    assert (tmp_path / "a").read_bytes() == torn + data
    storage.close(descriptor)


def test_a_fault_in_a_close_leaks_no_descriptor(tmp_path):
    storage = FaultyStorage(FaultInjector(parse("eio@0:close:1")))
    descriptor = storage.create(tmp_path / "a")
    with pytest.raises(OSError, match="Input/output error"):
        storage.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
