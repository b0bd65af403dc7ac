"""Durable bytes: every crash point of a save, every failing system call, real full and read-only disks."""

import errno
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import torch

from neox.checkpoint.find import find
from neox.checkpoint.retention import collect_leftovers
from neox.checkpoint.storage import open_file, read_file
from neox.checkpoint.verify import digest, verify
from neox.errors import CheckpointError, DiskError
from neox.files import probe
from tests.checkpoint.builders import make_state, save_one
from tests.checkpoint.faults import Disk, FailingStorage, RecordingStorage, ShortStorage, fingerprint, materialise

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)


@pytest.fixture
def fast_disk(tmp_path):
    """An empty folder, in memory where the system has such a file system: these tests synchronise a thousand times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


def _tiny_state(seed: int):
    value = torch.arange(400.0) + seed
    return {("w", "weight"): value, ("w", "exp_avg"): -value}


def _scenario(root, name, storage=None):
    """Old state, then the save under test: returns the digest of the old checkpoint, None if there was none."""
    old = None
    if name != "first":
        old = digest(save_one(root, 1, _tiny_state(1)))
    step = {"first": 1, "next": 2, "keep 1": 2, "again": 1}[name]
    changes = {"keep": 1 if name == "keep 1" else 0, "shard_bytes": 1024}
    if storage is not None:
        changes["storage"] = storage
    return old, lambda: save_one(root, step, _tiny_state(2), **changes)


@pytest.mark.parametrize("name", ["first", "next", "keep 1", "again"])
def test_after_a_crash_at_any_point_the_loader_sees_the_old_or_the_new_checkpoint(fast_disk, name):
    """Every prefix of the recorded calls, with unsynced names and bytes retained, lost, torn, zeroed or reordered."""
    root = fast_disk / "checkpoints"
    root.mkdir()
    storage = RecordingStorage()
    old, run = _scenario(root, name, storage)
    disk = Disk(root)
    new = digest(run())
    assert new != old
    published = next(
        index for index, call in enumerate(storage.trace) if call[0] == "rename" and call[2].name == "manifest.json"
    )
    crash, done = fast_disk / "crash", set()
    for count in range(len(storage.trace) + 1):
        if count:
            disk.apply(storage.trace[count - 1])
        for text, tree in disk.crashes():
            state = (count > published, count > published + 1, fingerprint(tree))
            if state in done:
                continue
            done.add(state)
            materialise(tree, crash)
            found = find(crash, "auto")
            seen = None if found is None else digest(found)
            where = f"after {count} calls ({storage.trace[count - 1][:2] if count else 'none'}), {text}"
            assert seen in (old, new), where
            assert count > published or seen == old, where
            assert count < published + 2 or seen == new, where
            _next_start(crash, seen, new)
            shutil.rmtree(crash)
    assert len(done) > 50


def _next_start(root, seen, new):
    """What the next start does: clean up, find the same state, save, and leave no leftovers."""
    collect_leftovers(root)
    found = find(root, "auto")
    assert (None if found is None else digest(found)) == seen
    path = save_one(root, 3, _tiny_state(2))
    assert digest(path) == new
    assert find(root, "must") == path
    for folder in root.glob("step_*"):
        verify(folder)
        assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("name", ["first", "next", "keep 1", "again"])
@pytest.mark.parametrize("forever", [False, True])
def test_every_failing_call_is_a_disk_error_and_loses_nothing(fast_disk, name, forever):
    new = digest(_scenario(fast_disk / "whole", name)[1]())
    count = 0
    while True:
        root = fast_disk / f"{count}"
        storage = FailingStorage("any", count, NUMBERS[count % len(NUMBERS)], forever)
        old, run = _scenario(root, name, storage)
        before = _listing(root)
        if not _fails(run, storage):
            break
        found = find(root, "auto")
        seen = None if found is None else digest(found)
        assert seen in (old, new)
        if seen == old and not forever:
            assert _listing(root) == before
        collect_leftovers(root)
        _scenario(root, name)[1]()
        verify(find(root, "must"))
        count += 1
    assert count > 20


def _fails(run, storage) -> bool:
    """Runs a save; True if the planted fault was hit, which must have raised a DiskError that names the errno."""
    try:
        run()
    except DiskError as error:
        assert errno.errorcode[storage.number] in error.line()
        assert error.exit_code == 5
        assert "bytes free" in error.line()
        return True
    assert not storage.failed, "a failed call was swallowed"
    return False


def _listing(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_a_full_disk_reports_needed_and_free_bytes(tmp_path):
    with pytest.raises(
        DiskError, match=r"No space left on device \(ENOSPC\), \d+ bytes free; want=\d+ bytes written; do=free space"
    ):
        save_one(tmp_path, storage=FailingStorage("write", 1, errno.ENOSPC))


def test_short_writes_are_completed(tmp_path):
    verify(save_one(tmp_path, storage=ShortStorage()))


def test_reading_allocates_the_size_of_the_file_not_its_limit(tmp_path):
    """What is measured of a run's memory counts what the C library hands out, touched or not."""
    (tmp_path / "a").write_bytes(b"12345")
    tracemalloc.start()
    try:
        assert read_file(tmp_path / "a", 1 << 30) == b"12345"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_reading_refuses_anything_but_regular_files(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    assert read_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(CheckpointError, match="too large"):
        read_file(tmp_path / "a", 4)
    with pytest.raises(CheckpointError, match="symbolic link"):
        read_file(tmp_path / "link", 10)
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_file(tmp_path / "pipe", 5)
    with pytest.raises(CheckpointError, match="wrong size"):
        open_file(tmp_path / "a", 6)
    with pytest.raises(CheckpointError, match="file is missing; where=.*/none; got=No such file"):
        read_file(tmp_path / "none", 6)
    assert read_file(tmp_path / "empty", 0) == b""
    with pytest.raises(CheckpointError, match="cannot read; where=.*/link; got=a symbolic link"):
        open_file(tmp_path / "link", 5)


def test_a_file_that_is_refused_is_closed(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    for call in (
        lambda: read_file(tmp_path / "a", 4),
        lambda: open_file(tmp_path / "a", 4),
        lambda: read_file(tmp_path, 9),
    ):
        with pytest.raises(CheckpointError):
            call()
    read_file(tmp_path / "a", 5)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_really_full_disk(small_disk):
    root = small_disk / "checkpoints"
    good = save_one(root, 1, {("w", "weight"): torch.ones(100_000)})
    with pytest.raises(DiskError, match=r"ENOSPC.*bytes free; want=8\d+ bytes written"):
        save_one(root, 2, {("w", "weight"): torch.ones(200_000)})
    assert find(root, "auto") == good
    verify(good)
    assert sorted(os.listdir(root)) == ["latest", good.name]
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(DiskError, match="EROFS"):
        probe(root)
    with pytest.raises(DiskError, match="EROFS"):
        save_one(root, 3, {("w", "weight"): torch.ones(10)})
    assert find(root, "auto") == good


def test_a_folder_without_write_permission():
    """In a process that is not root: root may write anywhere."""
    user = 65534 if os.geteuid() == 0 else os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        command = [sys.executable, "-c", _PROBE_AS_USER, name, str(user)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)
    assert "EACCES" in done.stdout, done.stderr


_PROBE_AS_USER = """
import os, sys
sys.path.insert(0, os.getcwd())
from neox.files import probe
from neox.errors import DiskError
if os.geteuid() == 0:
    os.setuid(int(sys.argv[2]))
try:
    probe(sys.argv[1])
except DiskError as error:
    print(error.line())
"""


def test_a_folder_deleted_during_a_run_is_recreated(tmp_path):
    """The run continues to save; no older checkpoint was left to lose."""
    root = tmp_path / "run" / "checkpoints"
    save_one(root, 1)
    shutil.rmtree(tmp_path / "run")
    verify(save_one(root, 2, make_state()))
