"""The quarantine of bad lines: complete or absent, and resumed after the durable part."""

from __future__ import annotations

import base64
import os

import orjson
import pytest

from neox.data.text.quarantine import Quarantine, record
from neox.data.text.reading import BadLine
from neox.errors import DiskError

BAD = [BadLine("a.jsonl", n, f"reason {n}", b"\xff%d" % n) for n in range(4)]


def records(path) -> list[tuple[int, bytes]]:
    return [
        (record["line"], base64.b64decode(record["content_base64"]))
        for record in map(orjson.loads, path.read_bytes().splitlines())
    ]


def test_appears_at_the_end_if_there_was_anything(tmp_path):
    path = tmp_path / "q"
    with Quarantine(str(path), True) as kept:
        kept.add(BAD[0])
        assert not path.exists()
    assert records(path) == [(0, b"\xff0")]
    with Quarantine(str(tmp_path / "none"), True), Quarantine(str(tmp_path / "off"), False) as off:
        off.add(BAD[0])
        assert off.sync() == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["q"]


def test_a_run_without_bad_lines_removes_the_file_of_an_earlier_one(tmp_path):
    (tmp_path / "q").write_bytes(record(BAD[0]))
    with Quarantine(str(tmp_path / "q"), False):
        pass
    assert records(tmp_path / "q") == [(0, b"\xff0")]  # not this run's file
    with Quarantine(str(tmp_path / "q"), True):
        pass
    assert not list(tmp_path.iterdir())


def test_resumes_after_the_durable_part(tmp_path):
    path = tmp_path / "q"
    with pytest.raises(KeyboardInterrupt), Quarantine(str(path), True) as kept:
        kept.add(BAD[0])
        durable = kept.sync()
        kept.add(BAD[1])
        kept.keep_partial = True
        raise KeyboardInterrupt
    assert not path.exists() and (tmp_path / "q.partial").stat().st_size >= durable
    with Quarantine(str(path), True, durable) as kept:
        kept.add(BAD[2])
    assert records(path) == [(0, b"\xff0"), (2, b"\xff2")] and not (tmp_path / "q.partial").exists()


def test_nothing_is_left_after_an_exception(tmp_path):
    with pytest.raises(KeyboardInterrupt), Quarantine(str(tmp_path / "q"), True) as kept:
        kept.add(BAD[0])
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(DiskError, match=r"cannot write quarantine; where=.*no_folder"),
        Quarantine(str(tmp_path / "no_folder" / "q"), True),
    ):
        pass


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "bad.jsonl.partial").symlink_to(victim)
    with pytest.raises(DiskError), Quarantine(str(tmp_path / "bad.jsonl"), True):
        pass
    assert victim.read_bytes() == b"precious"


def test_a_line_without_content_and_the_size_after_a_resume(tmp_path):
    path = tmp_path / "q"
    with pytest.raises(KeyboardInterrupt), Quarantine(str(path), True) as kept:
        kept.add(BadLine("a\nb", 7, "why", None))
        kept.keep_partial = True
        durable = kept.sync()
        raise KeyboardInterrupt
    assert durable == (tmp_path / "q.partial").stat().st_size > 0
    with Quarantine(str(path), True, durable) as kept:
        assert kept.sync() == durable
        kept.add(BAD[1])
        assert kept.sync() == durable + len(record(BAD[1]))
        kept.publish()
        kept.add(BAD[2])  # dropped
    first, second = map(orjson.loads, path.read_bytes().splitlines())
    assert (first["line"], first["content_base64"], second["line"]) == (7, None, 1)


def test_lines_are_durable_before_their_size_is_noted_and_the_name_at_the_end(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("os.fsync", lambda descriptor: calls.append("fsync"))
    monkeypatch.setattr("neox.data.text.quarantine.sync_dir", lambda folder: calls.append(folder))
    with Quarantine(str(tmp_path / "q"), True) as kept:
        kept.add(BAD[0])
        assert kept.sync() == (tmp_path / "q.partial").stat().st_size > 0
        assert calls == ["fsync"]
    assert calls == ["fsync", "fsync", tmp_path]


def test_a_disk_that_refuses_is_an_error_with_the_final_name(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with Quarantine(str(tmp_path / "off"), False) as off:
        assert off.sync() == 0
    refused = r"cannot write quarantine; where=.*/q; got=No space left"
    with pytest.raises(DiskError, match=refused), Quarantine(str(tmp_path / "q"), True) as kept:
        kept.add(BAD[0])
        kept.sync()
    monkeypatch.undo()
    large = BadLine("a.jsonl", 1, "reason", b"x" * (1 << 20))
    with pytest.raises(DiskError, match=refused), Quarantine(str(tmp_path / "q"), True) as kept:
        with open("/dev/full", "wb") as full:
            os.dup2(full.fileno(), kept._file.fileno())
        kept.add(large)
    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(DiskError, match=refused), Quarantine(str(tmp_path / "q"), True) as kept:
        kept.add(BAD[0])
    assert list(tmp_path.iterdir()) == []
