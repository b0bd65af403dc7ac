"""Files: only regular files of bounded size are read; durable writes leave a complete file or none."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
from pathlib import Path
from types import SimpleNamespace

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

    for number in (errno.EINVAL, errno.EOPNOTSUPP):
        monkeypatch.setattr(os, "fsync", fails(number))
        write_durably(tmp_path / "f", b"one")
    monkeypatch.setattr(os, "fsync", fails(errno.EIO))
    with pytest.raises(DiskError, match="EIO"):
        write_durably(tmp_path / "f", b"two")


def test_text_has_unix_lines_and_json_its_limit(tmp_path):
    (tmp_path / "text").write_bytes("é\r\nb\rc\n".encode())
    assert files.read_text(tmp_path / "text") == "é\nb\rc\n"
    (tmp_path / "a.json").write_text("[NaN, 1]")
    assert files.read_json(tmp_path / "a.json", 8)[1] == 1
    with pytest.raises(OSError, match="larger than 7 bytes"):
        files.read_json(tmp_path / "a.json", 7)
    (tmp_path / "bad").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="utf-8"):
        files.read_text(tmp_path / "bad")


def test_a_durable_write_is_synced_renamed_and_its_folder_synced(tmp_path):
    storage = RecordingStorage()
    write_durably(tmp_path / "f", b"one", sole_writer=True, storage=storage)
    temporary = tmp_path / "f.tmp"
    assert storage.trace == [
        ("create", temporary),
        ("write", temporary, b"one"),
        ("sync", temporary),
        ("rename", temporary, tmp_path / "f"),
        ("sync_dir", tmp_path),
    ]


class Hesitant(files.FileSystem):
    """Takes at most 1000 bytes at a time, and notes what it is given and hinted."""

    def __init__(self):
        self.given, self.hints = [], []

    def write(self, descriptor, data):
        self.given.append(len(data))
        return super().write(descriptor, data[:1000])

    def begin_sync(self, descriptor, offset, count):
        self.hints.append((offset, count))


def test_a_writer_repeats_until_all_bytes_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WRITE_BYTES", 1500)
    storage, content = Hesitant(), os.urandom(2700)
    with FileWriter(tmp_path / "f", storage=storage) as writer:
        writer.write(content[:200])
        writer.write(memoryview(content[200:]))
        assert writer.size == 2700
        writer.commit()
    assert (tmp_path / "f").read_bytes() == content
    assert storage.given == [200, 1500, 1500, 500]
    assert storage.hints == [(0, 200), (200, 1000), (1200, 1000), (2200, 500)]


@pytest.mark.parametrize(
    ("number", "do"),
    [
        (errno.ENOSPC, "free space or choose another folder; existing files are untouched"),
        (errno.EDQUOT, "raise the quota"),
        (errno.EROFS, "mount it writable"),
        (errno.EACCES, "fix the permissions"),
        (errno.EPERM, "fix the permissions"),
        (errno.ENOENT, "the folder is missing"),
        (errno.EIO, "check the disk"),
        (errno.EBADF, "check the file system"),
        (None, "check the file system"),
    ],
)
def test_errors_name_code_space_and_action(tmp_path, number, do):
    problem = files.disk_error(OSError(number, "why") if number else OSError("why"), tmp_path / "a" / "b", 77)
    code = errno.errorcode[number] if number else "OSError"
    free = files.free_bytes(tmp_path)
    assert problem.got.startswith(f"why ({code}), ") and problem.got.endswith(" bytes free") and free > 0
    assert (problem.want, str(problem.where)) == ("77 bytes written", str(tmp_path / "a" / "b"))
    assert problem.do.startswith(do)
    assert files.disk_error(OSError("why"), tmp_path).want is None


@pytest.mark.parametrize("sole_writer", [False, True])
def test_a_write_replaces_files_and_links_but_no_folder_and_no_special_file(tmp_path, sole_writer):
    """A rename would: `--out /dev/null` as root removed the device."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, kind in (("fifo", "a FIFO"), ("folder", "a folder")):
        with pytest.raises(DiskError, match="only a file can be replaced") as caught:
            write_durably(tmp_path / name, b"x", sole_writer=sole_writer)
        assert caught.value.got == kind
    assert stat.S_ISFIFO(os.stat(tmp_path / "fifo").st_mode) and sorted(os.listdir(tmp_path)) == ["fifo", "folder"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("link", "new", "new"):
        write_durably(tmp_path / name, b"x", sole_writer=sole_writer)
        assert (tmp_path / name).read_bytes() == b"x"


def test_a_name_without_a_last_part_is_refused():
    with pytest.raises(DiskError, match="got=a folder"):
        write_durably(Path(), b"x")


def test_only_regular_files_are_appended_to(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, kind in ((tmp_path / "fifo", "a FIFO"), ("/dev/null", "a device"), (tmp_path, "Is a directory")):
        with pytest.raises(OSError, match=kind):
            files.open_to_append(path)
    for _ in range(2):
        descriptor = files.open_to_append(tmp_path / "file")
        os.write(descriptor, b"x")
        os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"xx"


def test_a_lock_excludes_others_until_it_is_left(tmp_path):
    with files.locked(tmp_path / "lock"), open(tmp_path / "lock", "ab") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(tmp_path / "lock", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_new_files_have_the_mode_of_the_user(tmp_path):
    before = os.umask(0o027)
    try:
        write_durably(tmp_path / "f", b"")
        os.close(open_no_link(str(tmp_path / "g"), os.O_WRONLY | os.O_CREAT))
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "fg"] == [0o640, 0o640]


def test_a_descriptor_is_closed_after_a_refusal(tmp_path):
    count = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(OSError, match="a folder"):
            files.open_regular(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == count


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_descriptor_stays_open(tmp_path, monkeypatch):
    """Of refused, read, locked, synced and written files, also where a call fails."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"x")
    count = open_descriptors()
    with pytest.raises(OSError, match="a device, not a regular file"):
        files.open_to_append("/dev/null")
    files.read_bytes(tmp_path / "file")
    files.require_regular(tmp_path / "file")
    with files.locked(tmp_path / "lock"):
        pass
    files.sync_dir(tmp_path)
    for call in ("write", "sync", "close", "rename", "sync_dir"):
        with pytest.raises(DiskError):
            write_durably(tmp_path / "f", b"x", storage=FailingStorage(call, 0, errno.EIO))
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.close(-1))
    for path in (tmp_path, tmp_path / "f"):
        with pytest.raises(DiskError, match="EBADF"):
            files.sync_dir(tmp_path) if path == tmp_path else write_durably(path, b"x")
    assert open_descriptors() == count


def test_a_fifo_with_a_reader_is_not_appended_to(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(OSError, match="a FIFO, not a regular file") as caught:
            files.open_to_append(tmp_path / "fifo")
    finally:
        os.close(reader)
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, str(tmp_path / "fifo"))
    with pytest.raises(OSError, match="a FIFO or socket") as caught:
        files.open_to_append(tmp_path / "fifo")
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, str(tmp_path / "fifo"))
    with pytest.raises(FileNotFoundError):
        files.open_to_append(tmp_path / "nowhere" / "f")


def test_the_reasons_of_a_refusal_have_their_numbers(tmp_path):
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)
    os.mkfifo(tmp_path / "fifo")
    for name, number in ((".", errno.EISDIR), ("fifo", errno.EINVAL)):
        with pytest.raises(OSError, match="not a regular file") as caught:
            files.open_regular(tmp_path / name)
        assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / name))
    with pytest.raises(DiskError, match="where=.*socket; got=a socket; want=a new name, or a regular file"):
        files.refuse_special(tmp_path / "socket")
    (tmp_path / "file").write_bytes(b"12")
    with pytest.raises(OSError, match="larger than 1 bytes") as caught:
        files.read_bytes(tmp_path / "file", 1)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "file"))


def test_a_config_has_a_lower_limit_than_other_files(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 24)
    assert len(files.read_text(tmp_path / "sparse")) == 1 << 24
    os.truncate(tmp_path / "sparse", (1 << 24) + 1)
    assert len(files.read_bytes(tmp_path / "sparse")) == (1 << 24) + 1
    with pytest.raises(OSError, match="larger than 16,777,216 bytes"):
        files.read_text(tmp_path / "sparse")
    assert (files.LARGEST_FILE, files.LARGEST_RECORD, files.WRITE_BYTES) == (1 << 28, 1 << 32, 4 << 20)


def test_a_write_under_a_random_name_is_as_durable(tmp_path):
    storage = RecordingStorage()
    write_durably(tmp_path / "f", b"one", storage=storage)
    temporary = storage.trace[0][1]
    assert temporary.parent == tmp_path and temporary.name.startswith("f.partial.") and len(temporary.name) == 26
    assert storage.trace == [
        ("create", temporary),
        ("write", temporary, b"one"),
        ("sync", temporary),
        ("rename", temporary, tmp_path / "f"),
        ("sync_dir", tmp_path),
    ]


def test_a_sole_writer_removes_a_link_to_nowhere(tmp_path):
    (tmp_path / "f.tmp").symlink_to(tmp_path / "victim")
    write_durably(tmp_path / "f", b"one", sole_writer=True)
    assert (tmp_path / "f").read_bytes() == b"one" and sorted(os.listdir(tmp_path)) == ["f"]
    (tmp_path / "f.tmp").write_bytes(b"")
    with pytest.raises(DiskError, match=r"where=.*/f\.tmp; got=.*EACCES"):
        write_durably(tmp_path / "f", b"", sole_writer=True, storage=FailingStorage("unlink", 0, errno.EACCES))


def test_a_failed_write_names_the_bytes_that_it_needs(tmp_path):
    for sole_writer in (False, True):
        with pytest.raises(DiskError) as caught:
            write_durably(
                tmp_path / "f", b"12345", sole_writer=sole_writer, storage=FailingStorage("write", 0, errno.ENOSPC)
            )
        assert caught.value.want == "5 bytes written" and caught.value.where == tmp_path / "f"


def test_free_bytes_are_those_of_this_user_in_the_nearest_folder(tmp_path, monkeypatch):
    asked = []

    def statvfs(path):
        asked.append(path)
        if path != tmp_path:
            raise FileNotFoundError(2, "r")
        return SimpleNamespace(f_bavail=3, f_bfree=5, f_frsize=7, f_bsize=11, f_blocks=13)

    monkeypatch.setattr(os, "statvfs", statvfs)
    assert files.free_bytes(tmp_path / "a" / "b") == 21
    assert asked == [tmp_path / "a" / "b", tmp_path / "a", tmp_path]
    assert files.disk_error(OSError(errno.EIO, "why"), tmp_path / "a").got == "why (EIO), 21 bytes free"
    assert files.free_bytes(Path("/")) is None
    assert files.disk_error(OSError(errno.EIO, "why"), Path("/x")).got == "why (EIO)"


def test_folders_that_another_process_makes_meanwhile_are_accepted(tmp_path, monkeypatch):
    class Late(RecordingStorage):
        def make_dir(self, path):
            os.mkdir(path)
            super().make_dir(path)

    storage = Late()
    make_dirs(tmp_path / "a", storage=storage)
    assert storage.trace == [("sync_dir", tmp_path)]
    storage = RecordingStorage()
    make_dirs(tmp_path / "a", storage=storage)
    assert storage.trace == []
    monkeypatch.chdir(tmp_path)
    make_dirs(Path("a/b"), storage=storage)
    assert storage.trace == [("make_dir", tmp_path / "a/b"), ("sync_dir", tmp_path / "a")]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError, match="where=.*/file; got=File exists"):
        make_dirs(tmp_path / "file")
    with pytest.raises(DiskError, match="where=.*/file; got=File exists"):
        make_dirs(tmp_path / "file" / "x")


def test_a_probe_writes_syncs_and_removes_a_block(tmp_path):
    storage = RecordingStorage()
    probe(str(tmp_path / "new"), storage=storage)
    path = tmp_path / "new" / f".probe-{os.getpid()}"
    assert storage.trace[:2] == [("make_dir", tmp_path / "new"), ("sync_dir", tmp_path)]
    assert storage.trace[3] == ("write", path.with_name(path.name + ".tmp"), b"\0" * 4096)
    assert storage.trace[-2:] == [("sync_dir", tmp_path / "new"), ("unlink", path)]
    with pytest.raises(DiskError, match="EACCES"):
        probe(tmp_path, storage=FailingStorage("unlink", 0, errno.EACCES))


def test_clean_up_after_an_error_hides_failures_of_the_system_alone():
    assert files.attempt(os.close, os.open("/dev/null", os.O_RDONLY)) and not files.attempt(os.close, -1)
    with pytest.raises(ZeroDivisionError):
        files.attempt(divmod, 1, 0)


def test_a_lock_keeps_the_file_and_is_not_needed_where_there_are_none(tmp_path, monkeypatch):
    (tmp_path / "lock").write_bytes(b"kept")
    with files.locked(tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").read_bytes() == b"kept"
    (tmp_path / "link").symlink_to(tmp_path / "lock")
    with pytest.raises(OSError, match="symbolic links"), files.locked(tmp_path / "link"):
        pass
    entered = []

    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.locked(tmp_path / "lock"):
        entered.append(True)
    assert entered


def test_only_the_entries_of_a_folder_are_synced(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError, match=r"where=.*/file; got=Not a directory \(ENOTDIR\)"):
        files.sync_dir(tmp_path / "file")
