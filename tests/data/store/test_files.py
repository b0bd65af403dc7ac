"""Durable small files."""

from __future__ import annotations

import os
import resource

import pytest

from neox.data.store.files import open_no_link, sync_folder, write_durably
from neox.data.text.quarantine import Quarantine
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


def test_no_link_is_followed(tmp_path, monkeypatch):
    """Neither one at the name itself, which is replaced, nor one at the temporary name, even if it were known."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    target = tmp_path / "f"
    target.symlink_to(victim)
    write_durably(target, b"new")
    assert victim.read_bytes() == b"precious" and target.read_bytes() == b"new" and not target.is_symlink()
    monkeypatch.setattr("secrets.token_hex", lambda size: "known")
    for name in ("f.partial.known", f"f.partial.{os.getpid()}"):
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


def test_an_opener_that_refuses_links(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for name in ("link", "bad.jsonl.partial"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        open_no_link(str(tmp_path / "link"), os.O_WRONLY)
    with pytest.raises(DiskError), Quarantine(str(tmp_path / "bad.jsonl"), True):
        pass
    assert victim.read_bytes() == b"precious"
