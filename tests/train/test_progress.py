"""The progress line and when it is printed."""

import io
import os

import pytest

from neox.errors import DiskError
from neox.train.progress import Progress, close_log, duration, progress_line, short

RECORD = {
    "step": 20,
    "loss": 3.14159,
    "lr": 6e-4,
    "grad_norm": 0.987,
    "tokens_per_s": 12345.0,
    "tflops": 1.2345,
    "mfu": 0.4321,
    "memory_gb": 3.21,
    "step_time": 2.0,
}


def test_line():
    line = progress_line(RECORD, 100, 2.0)
    assert line == (
        "step 20/100 | loss 3.1416 | lr 0.0006 | grad 0.987 | 12.3k tok/s | 1.23 TFLOP/s | MFU 43.2% | 3.21 GB | "
        "ETA 0:02:40"
    )
    assert "grad skipped |" in progress_line({**RECORD, "grad_norm": None}, 100, 2.0)
    assert "validation 2.5000" in progress_line({**RECORD, "validation_loss": 2.5}, 100, 2.0)


def test_short_and_duration():
    assert [short(x) for x in (0, 950, 12_345, 4_560_000, 7.8e9)] == ["0", "950", "12.3k", "4.56M", "7.8G"]
    assert duration(3661.4) == "1:01:01"


def lines(interval, steps, total, **extra):
    terminal, log = io.StringIO(), io.StringIO()
    progress = Progress(terminal, log, total, interval)
    for i, step in enumerate(steps):
        progress.step({**RECORD, **extra, "step": step}, first=i == 0)
    assert terminal.getvalue() == log.getvalue()
    return [int(line.split()[1].split("/")[0]) for line in log.getvalue().splitlines()]


def test_printed_at_the_interval_the_first_and_the_last():
    assert lines(10, range(1, 26), 25) == [1, 10, 20, 25]
    assert lines(10, range(7, 12), 25) == [7, 10]
    assert lines(10, [3, 4], 25, validation_loss=1.0) == [3, 4]


def test_a_log_that_cannot_be_written_is_a_disk_error():
    log = open("/dev/full", "w")  # noqa: SIM115, closing it fails too
    with pytest.raises(DiskError, match=r"log cannot be written; where=/dev/full; got=No space left"):
        Progress(None, log, 10, 1).report("line")
    close_log(log)
    assert log.closed


def test_a_terminal_whose_reader_has_exited_is_ignored():
    reader, writer = os.pipe()
    os.close(reader)
    log = io.StringIO()
    progress = Progress(os.fdopen(writer, "w"), log, 10, 1)
    progress.report("one")
    progress.report("two")
    assert progress.terminal is None and log.getvalue() == "one\ntwo\n"


def test_other_processes_are_silent():
    progress = Progress(None, None, 10, 1)
    progress.step(RECORD, first=True)
    progress.report("nothing")


def test_the_first_step_does_not_count_for_the_time_left():
    progress = Progress(None, None, 10, 1)
    for i, seconds in enumerate((100.0, 2.0, 2.0)):
        progress.step({**RECORD, "step_time": seconds}, first=i == 0)
    assert progress.seconds < 3


def test_a_loss_that_is_not_finite_has_a_line_too():
    line = progress_line({**RECORD, "loss": None, "grad_norm": None}, 100, 2.0)
    assert "loss not finite" in line and "grad skipped" in line
