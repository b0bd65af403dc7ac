"""The one-line form of an error and its exit codes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from neox import errors


def test_line_names_what_where_got_want_do_in_that_order():
    error = errors.DataError("bad token", where="a.bin:7", got=99, want="< 50", do="neox data verify a")
    assert error.line() == "error[3] bad token; where=a.bin:7; got=99; want=< 50; do=neox data verify a"


def test_parts_that_are_none_are_omitted_and_zero_is_not():
    assert errors.ConfigError("empty", got=0).line() == "error[2] empty; got=0"


def test_line_breaks_never_reach_the_line():
    assert errors.DiskError("a\nb", where="x\r\ny").line() == "error[5] a b; where=x y"


def test_control_characters_cannot_hide_a_part_of_the_line():
    assert (
        errors.ConfigError("bad\0 name", got="\x1b[2J\x7f\x9b é").line()
        == r"error[2] bad\x00 name; got=\x1b[2J\x7f\x9b é"
    )


def test_failed_allocations_are_recognised():
    for error in (
        MemoryError("x"),
        RuntimeError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        assert errors.out_of_memory(error)
        assert (
            errors.system_problem(error, "rank 3").line().startswith("error[6] not enough memory; where=rank 3; got=")
        )
    assert not errors.out_of_memory(RuntimeError("shape")) and not errors.out_of_memory(ValueError("out of memory"))


def test_bugs_and_lost_connections_are_no_problems_of_the_system():
    for error in (OSError("x"), OSError(22, "Invalid argument"), ConnectionResetError(104, "reset"), ValueError("x")):
        assert errors.system_problem(error, "rank 0") is None


def test_a_working_folder_that_was_removed_is_named(monkeypatch):
    unnamed = FileNotFoundError(2, "No such file or directory")
    assert errors.system_problem(unnamed, "neox plan").do == "set TMPDIR to a writable folder"
    monkeypatch.setattr(errors, "has_working_folder", lambda: False)
    found = errors.system_problem(unnamed, "neox plan")
    assert found.line().startswith("error[5] working folder does not exist; where=neox plan; got=No such file")
    assert errors.system_problem(RuntimeError("can't start new thread"), "x").exit_code == 14


def test_exit_codes_are_the_published_ones():
    codes = {
        kind.__name__: kind.exit_code
        for kind in errors.NeoxError.__subclasses__()
        if kind.__module__ == errors.__name__
    }
    assert codes == {
        "ConfigError": 2,
        "DataError": 3,
        "CheckpointError": 4,
        "DiskError": 5,
        "MemoryExhausted": 6,
        "StoppedBySignal": 10,
        "NonFinite": 11,
        "ReplicaDrift": 11,
        "HangError": 12,
        "PeerLost": 13,
        "EnvironmentProblem": 14,
    }


def test_parts_are_plain_json_and_none_where_they_lack():
    error = errors.ModelMismatch("other", where=Path("a/b"), got=0, do="x")
    assert json.loads(json.dumps(error.parts())) == {
        "what": "other",
        "where": "a/b",
        "got": "0",
        "want": None,
        "do": "x",
    }
    assert error.line() == str(error) == "error[4] other; where=a/b; got=0; do=x"
    assert errors.NeoxError("x", want="").line() == "error[1] x; want="


def test_spaces_become_one_and_only_control_characters_are_escaped():
    assert errors.one_line("\x1f \x20~\x7f\x80\x9f\xa0\u200b") == "\\x1f  ~\\x7f\\x80\\x9f\xa0\u200b"
    assert errors.one_line("\x07" + os.fsdecode(b"\xe9")) == "\\x07\\xe9"
    assert errors.DataError("a  b", got="c\t\td").line() == "error[3] a b; got=c d"


FREE = "free space, or write to another folder"
FORKS = "raise the limit on processes and threads: ulimit -u"
NAME = "check its name and permissions"


@pytest.mark.parametrize(
    ("error", "code", "what", "where", "do"),
    [
        *((OSError(number, "r"), 5, "cannot write", "rank 3", FREE) for number in (28, 122, 27, 30, 5)),
        (OSError(errno.EIO, "r", "a/b"), 5, "cannot write", "a/b", FREE),
        (OSError(errno.EMFILE, "r", "a"), 14, "the system refused a file or process", "a", "ulimit -n"),
        (OSError(errno.ENFILE, "r"), 14, "the system refused a file or process", "rank 3", "end other programs"),
        (OSError(errno.EAGAIN, "r"), 14, "the system refused a file or process", "rank 3", FORKS),
        (OSError(errno.EACCES, "r", b"caf\xe9"), 5, "cannot use file or folder", "caf\\xe9", NAME),
        (OSError(errno.ENOENT, "r", "a"), 5, "cannot use file or folder", "a", NAME),
        (OSError(errno.EISDIR, "r", "a"), 5, "cannot use file or folder", "a", NAME),
        (OSError(errno.ENOENT, "r"), 5, "cannot use file or folder", "rank 3", "set TMPDIR to a writable folder"),
    ],
)
def test_what_the_system_refused(error, code, what, where, do):
    found = errors.system_problem(error, "rank 3")
    assert found.line().startswith(f"error[{code}] {what}; where={where}; got=r; do=") and do in found.do


def test_a_refused_thread_and_memory_have_their_reason():
    found = errors.system_problem(RuntimeError("can't start new thread"), "rank 3")
    assert (found.what, found.where, found.do) == ("cannot start a thread", "rank 3", FORKS)
    assert str(found.got) == "can't start new thread"
    assert errors.system_problem(MemoryError(), "x").got is None
    assert errors.system_problem(MemoryError("m" * 201), "x").got == "m" * 200


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(errno.ETIMEDOUT, "r", "a"),
        ConnectionRefusedError(errno.ECONNREFUSED, "r"),
        BrokenPipeError(errno.EPIPE, "r"),
        OSError(errno.EACCES, "r"),
        RuntimeError("can't allocate"),
        ValueError("can't start new thread"),
        KeyError("a"),
    ],
)
def test_what_is_no_refusal_of_the_system(error):
    assert errors.system_problem(error, "rank 0") is None


def test_a_removed_working_folder_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    assert errors.has_working_folder()
    (tmp_path / "gone").rmdir()
    assert not errors.has_working_folder()
    assert errors.system_problem(FileNotFoundError(2, "r"), "x").do == "change to a folder that exists"
    named = errors.system_problem(FileNotFoundError(2, "r", "a"), "x")
    assert (named.where, named.do) == ("a", NAME)
