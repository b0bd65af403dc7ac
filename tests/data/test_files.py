"""Durable small files."""

from __future__ import annotations

import resource

import pytest

from neox.data.files import sync_folder, write_durably
from neox.errors import DiskError


def test_writes_and_replaces(tmp_path):
    for content in (b"one", b"two"):
        write_durably(tmp_path / "f", content)
        assert (tmp_path / "f").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    sync_folder(tmp_path)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    write_durably(tmp_path / "f", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"cannot write file; where=.*/f; got=File too large"):
            write_durably(tmp_path / "f", b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "f").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
