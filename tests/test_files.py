"""Input files: what is not a regular file of bounded size is refused at once, by name."""

from __future__ import annotations

import os

import pytest

from neox import files


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


@pytest.mark.parametrize(("content", "reason"), [(b"[" * 100_000, "nested too deeply"), (b"{", "Expecting"), (b"\xff", "utf-8")])
def test_json_that_cannot_be_read_is_a_value_error(tmp_path, content, reason):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        files.read_json(tmp_path / "file.json")


def test_names_that_are_not_utf8_become_text():
    assert files.printable("plain é") == "plain é"
    assert files.printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    assert files.printable("\ud800") == "\\ud800"
