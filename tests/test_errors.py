"""The one-line form of an error and its exit codes."""

from __future__ import annotations

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
