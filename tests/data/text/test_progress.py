"""Progress of a long run: what is noted is read back, and belongs to one run only."""

from __future__ import annotations

import os

import orjson
import pytest

from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.data.text.progress import SOURCE_FIELDS, InputIdentity, ProgressFile, ResumePoint, finished_sidecar
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


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("format", "other", "belongs to another run"),
        ("version", 2, "belongs to another run"),
        ("identity", "0" * 64, "belongs to another run"),
        ("writer", [3, 40], "cannot be read"),
        ("writer", [3, 40, 12, 1], "cannot be read"),
        *((name, None, "cannot be read") for name in ("blocks", "writer", "quarantine_bytes", "summary", "identity")),
    ],
)
def test_every_field_of_the_progress_is_needed(tmp_path, field, value, reason):
    notes = ProgressFile(str(tmp_path / "out"), origin_of("one"), 0)
    notes.save(PROGRESS)
    content = orjson.loads(notes.path.read_bytes())
    if value is None:
        del content[field]
    else:
        content[field] = value
    notes.path.write_bytes(orjson.dumps(content))
    with pytest.raises(DataError, match=rf"{reason}; where=.*out\.progress\.json.*do=start again without --resume"):
        notes.read()


def test_saves_are_due_by_the_clock_since_the_last_one(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    notes = ProgressFile(str(tmp_path / "out"), origin_of("one"), 20.0)
    due = []
    for now[0] in (100.0, 119.9, 120.0, 150.0):
        due.append(notes.due)
    assert due == [False, False, True, True]
    notes.save(PROGRESS)
    for now[0] in (169.9, 170.0):
        due.append(notes.due)
    assert due[4:] == [False, True]


def finished(tmp_path, changes: dict[str, object] | None = None, lack: tuple[str, ...] = ()) -> str:
    """A dataset whose sidecar names the source "abc", with an index of the time 1000."""
    source = {"hash": "abc", **dict.fromkeys(SOURCE_FIELDS, 0), **(changes or {})}
    with IndexedWriter(tmp_path / "out", "uint16", overwrite=True) as writer:
        writer.add_document([1])
        writer.source = {key: value for key, value in source.items() if key not in lack}
    os.utime(tmp_path / "out.idx", (1000, 1000))
    return str(tmp_path / "out")


def test_a_finished_dataset_is_that_of_its_source_if_no_file_is_newer(tmp_path):
    files = [str(tmp_path / name) for name in ("a", "b")]
    for file in files:
        (tmp_path / file).write_text("x")
        os.utime(file, (1000, 1000))
    out = finished(tmp_path)
    found = finished_sidecar(out, "abc", files)
    assert found is not None and found == IndexedDataset(out).sidecar
    assert finished_sidecar(out, "abd", files) is None
    for file in files:
        os.utime(file, (1001, 1001))
        assert finished_sidecar(out, "abc", files) is None
        os.utime(file, (999, 999))
    assert finished_sidecar(out, "abc", files) is not None
    assert finished_sidecar(finished(tmp_path, {"more": 1}), "abc", files) is None
    assert finished_sidecar(finished(tmp_path, lack=("bad_reasons",)), "abc", files) is None
    out = finished(tmp_path)
    os.unlink(f"{out}.json")
    assert finished_sidecar(out, "abc", files) is None
    out = finished(tmp_path)
    os.truncate(f"{out}.bin", 1)
    assert finished_sidecar(out, "abc", files) is None
    os.unlink(f"{out}.idx")
    assert finished_sidecar(out, "abc", files) is None


def test_progress_is_written_durably(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("neox.data.text.progress.write_durably", lambda path, content: calls.append((path, content)))
    monkeypatch.setattr("neox.data.text.progress.sync_dir", lambda folder: calls.append(folder))
    notes = ProgressFile(str(tmp_path / "out"), origin_of("one"), 0)
    notes.save(PROGRESS)
    ((path, content),) = calls
    assert path == notes.path and orjson.loads(content) == {
        "format": "neox.progress",
        "version": 1,
        "identity": origin_of("one").identity,
        "blocks": 7,
        "writer": [3, 40, 12],
        "quarantine_bytes": 5,
        "summary": {"documents": 3},
    }
    notes.remove()
    assert len(calls) == 1  # nothing to remove
    notes.path.write_bytes(content)
    notes.remove()
    assert calls[1:] == [tmp_path] and not notes.path.exists()
