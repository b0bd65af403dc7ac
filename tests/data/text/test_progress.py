"""Progress of a long run: what is noted is read back, and belongs to one run only."""

from __future__ import annotations

import os

import pytest

from neox.data.text.progress import InputIdentity, ProgressFile, ResumePoint
from neox.errors import DataError

PROGRESS = ResumePoint(7, (3, 40, 12), 5, {"documents": 3})


def origin_of(name: str) -> InputIdentity:
    return InputIdentity([], {"name": name}, 1)


def test_what_is_noted_is_read_back(tmp_path):
    notes = ProgressFile(str(tmp_path / "out"), origin_of("one"), 0)
    assert notes.read() is None and notes.due
    notes.save(PROGRESS)
    assert ProgressFile(str(tmp_path / "out"), origin_of("one"), 1000).read() == PROGRESS
    assert not ProgressFile(str(tmp_path / "out"), origin_of("one"), 1000).due
    notes.remove()
    notes.remove()
    assert notes.read() is None and not list(tmp_path.iterdir())


def test_progress_of_another_run_or_damaged_is_refused(tmp_path):
    notes = ProgressFile(str(tmp_path / "out"), origin_of("one"), 0)
    notes.save(PROGRESS)
    with pytest.raises(
        DataError,
        match=r"progress belongs to another run; where=.*out\.progress\.json.*do=start again without --resume",
    ):
        ProgressFile(str(tmp_path / "out"), origin_of("other"), 0).read()
    for content in (
        b"",
        b"{}",
        b"[1]",
        notes.path.read_bytes()[:-10],
        notes.path.read_bytes().replace(b"12", b'"x", 3'),
    ):
        notes.path.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be read; where=.*out\.progress\.json"):
            notes.read()


def test_identity_is_of_names_sizes_times_and_settings(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("x")
    b.write_text("x")

    def origin(files=(a,), setting: int = 1, block_bytes: int = 5) -> InputIdentity:
        return InputIdentity([str(file) for file in files], {"k": setting}, block_bytes)

    first = origin()
    some = [first, origin([b]), origin(setting=2), origin([a, b])]
    assert len({each.identity for each in some}) == len({each.source for each in some}) == 4
    assert origin(block_bytes=6).identity != first.identity and origin(block_bytes=6).source == first.source
    os.utime(a, (1, 1))
    assert origin().identity != first.identity and origin().source == first.source
    before = origin()
    a.write_text("xy")
    assert origin().source != first.source and before.source == first.source, (
        "the files are checked once, when the run begins"
    )
