"""Files: only regular files of bounded size are read; durable writes leave a complete file or none."""

from __future__ import annotations

import errno
import os
import resource
import stat

import pytest

from neox import files
from neox.errors import DiskError
from neox.files import FileWriter, make_dirs, open_no_link, probe, write_durably
from tests.checkpoint.faults import FailingStorage, RecordingStorage


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # without a writer: opening it would block
    for path, kind in ((tmp_path / "fifo", "a FIFO"), ("/dev/zero", "a device"), (tmp_path, "a folder")):
        with pytest.raises(OSError, match=f"{kind}, not a regular file"):
            files.read_bytes(path)
        with pytest.raises(OSError, match=f"{kind}, not a regular file"):
            files.require_regular(path)
    with pytest.raises(FileNotFoundError):
        files.open_regular(tmp_path / "absent")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_bytes(b"content")
    assert files.read_bytes(tmp_path / "link") == b"content"


def test_no_more_than_the_limit_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert files.read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        files.read_bytes(tmp_path / "file", 4)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="larger than 16,777,216 bytes"):
        files.read_text(tmp_path / "sparse")


@pytest.mark.parametrize(
    ("content", "reason"), [(b"[" * 100_000, "nested too deeply"), (b"{", "Expecting"), (b"\xff", "utf-8")]
)
def test_json_that_cannot_be_read_is_a_value_error(tmp_path, content, reason):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        files.read_json(tmp_path / "file.json")


def test_writes_and_replaces(tmp_path):
    for content in (b"one", b"two"):
        write_durably(tmp_path / "f", content)
        assert (tmp_path / "f").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    write_durably(tmp_path / "f", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"cannot write; where=.*/f; got=File too large"):
            write_durably(tmp_path / "f", b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "f").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_no_link_is_followed(tmp_path, monkeypatch):
    """Neither one at the name itself, which is replaced, nor one at the temporary name, even if it were known."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    target = tmp_path / "f"
    target.symlink_to(victim)
    write_durably(target, b"new")
    assert victim.read_bytes() == b"precious" and target.read_bytes() == b"new" and not target.is_symlink()
    monkeypatch.setattr("os.urandom", lambda size: b"known")
    for name in (f"f.partial.{b'known'.hex()}", "f.tmp"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(DiskError, match="File exists"):
        write_durably(target, b"newer")
    assert victim.read_bytes() == b"precious" and target.read_bytes() == b"new"


def test_temporary_names_differ(tmp_path, monkeypatch):
    names = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, path: (names.append(str(source)), replace(source, path)))
    for _ in range(2):
        write_durably(tmp_path / "f", b"x")
    assert len(set(names)) == 2


def test_a_torn_writer_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), FileWriter(tmp_path / "a") as writer:
        writer.write(b"half")
        raise RuntimeError("stop")
    assert os.listdir(tmp_path) == []


def test_a_sole_writer_removes_what_a_crash_left(tmp_path):
    path = tmp_path / "a"
    write_durably(path, b"one", sole_writer=True)
    (tmp_path / "a.tmp").write_bytes(b"left by a crash")
    write_durably(path, b"two", sole_writer=True)
    assert path.read_bytes() == b"two"
    for call in ("create", "write", "sync", "close", "rename"):
        with pytest.raises(DiskError):
            write_durably(path, b"three", sole_writer=True, storage=FailingStorage(call, 0, errno.EIO))
        assert path.read_bytes() == b"two"
        assert os.listdir(tmp_path) == ["a"]


def test_files_are_never_written_through_links(tmp_path):
    (tmp_path / "a.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(DiskError), FileWriter(tmp_path / "a"):
        pass
    assert not (tmp_path / "victim").exists()


def test_make_dirs_makes_each_level_durable(tmp_path):
    storage = RecordingStorage()
    make_dirs(tmp_path / "a" / "b", storage=storage)
    assert storage.trace == [
        ("make_dir", tmp_path / "a"),
        ("sync_dir", tmp_path),
        ("make_dir", tmp_path / "a/b"),
        ("sync_dir", tmp_path / "a"),
    ]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError):
        make_dirs(tmp_path / "file")


def test_probe_leaves_nothing_and_finds_a_read_only_folder(tmp_path):
    probe(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path / "new" / "folder") == []
    for number in (errno.EROFS, errno.EACCES, errno.ENOSPC):
        for call in ("create", "write", "sync", "rename"):
            with pytest.raises(DiskError, match=errno.errorcode[number]):
                probe(tmp_path, storage=FailingStorage(call, 0, number))


def test_an_opener_that_refuses_links(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        open_no_link(str(tmp_path / "link"), os.O_WRONLY)
    assert victim.read_bytes() == b"precious"


def test_a_file_system_without_fsync_of_folders_is_accepted(tmp_path, monkeypatch):
    fsync = os.fsync

    def fails(number):
        def call(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            fsync(descriptor)

        return call

    monkeypatch.setattr(os, "fsync", fails(errno.EINVAL))
    write_durably(tmp_path / "f", b"one")
    monkeypatch.setattr(os, "fsync", fails(errno.EIO))
    with pytest.raises(DiskError, match="EIO"):
        write_durably(tmp_path / "f", b"two")
