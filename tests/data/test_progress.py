"""Progress of a long run: what is noted is read back, and belongs to one run only."""

from __future__ import annotations

import pytest

from neox.data.progress import Progress, ProgressFile, identity_of
from neox.errors import DataError

PROGRESS = Progress(7, (3, 40, 12), 5, {"documents": 3})


def test_what_is_noted_is_read_back(tmp_path):
    notes = ProgressFile(str(tmp_path / "out"), "id", 0)
    assert notes.read() is None and notes.due
    notes.note(PROGRESS)
    assert ProgressFile(str(tmp_path / "out"), "id", 1000).read() == PROGRESS
    assert not ProgressFile(str(tmp_path / "out"), "id", 1000).due
    notes.remove()
    notes.remove()
    assert notes.read() is None and not list(tmp_path.iterdir())


def test_progress_of_another_run_or_damaged_is_refused(tmp_path):
    notes = ProgressFile(str(tmp_path / "out"), "id", 0)
    notes.note(PROGRESS)
    with pytest.raises(DataError, match=r"that of another run; where=.*out\.progress\.json.*do=start again without --resume"):
        ProgressFile(str(tmp_path / "out"), "other", 0).read()
    for content in (b"", b"{}", b"[1]", notes.path.read_bytes()[:-10], notes.path.read_bytes().replace(b"12", b'"x", 3')):
        notes.path.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be read; where=.*out\.progress\.json"):
            notes.read()


def test_identity_is_of_names_sizes_times_and_settings(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("x")
    b.write_text("x")
    seen = {identity_of([str(a)], {"k": 1}), identity_of([str(b)], {"k": 1}), identity_of([str(a)], {"k": 2}), identity_of([str(a), str(b)], {"k": 1})}
    a.write_text("xy")
    assert len(seen | {identity_of([str(a)], {"k": 1})}) == 5
