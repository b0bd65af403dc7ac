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
