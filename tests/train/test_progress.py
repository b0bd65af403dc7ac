"""The progress line and when it is printed."""

import contextlib
import io
import os

import pytest

from neox.errors import DiskError
from neox.train.progress import Progress, close_log, duration, print_line, progress_line, short

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
    assert "lr 0.0006 | 12.3k tok/s" in progress_line({**RECORD, "grad_norm": None}, 100, 2.0, grad_norm=False)
    assert "validation 2.5000" in progress_line({**RECORD, "validation_loss": 2.5}, 100, 2.0)


def test_short_and_duration():
    assert [short(x) for x in (0, 950, 12_345, 4_560_000, 7.8e9)] == ["0", "950", "12.3k", "4.56M", "7.8G"]
    assert [short(x) for x in (999, 1000, 999_000, 1_000_000, 1_000_000_000)] == ["999", "1k", "999k", "1M", "1G"]
    assert [duration(x) for x in (0, 59.6, 3661.4, 90_000)] == ["0:00:00", "0:01:00", "1:01:01", "1 day, 1:00:00"]


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
    log = io.StringIO()
    progress.write_to(log)
    assert log.getvalue() == ""


def test_the_first_step_does_not_count_for_the_time_left():
    progress = Progress(None, None, 10, 1)
    for i, seconds in enumerate((100.0, 2.0, 2.0)):
        progress.step({**RECORD, "step_time": seconds}, first=i == 0)
    assert progress.seconds < 3
    progress.step({**RECORD, "step_time": 12.0}, first=False)
    assert progress.seconds == pytest.approx(0.9 * 2 + 0.1 * 12)


def test_a_loss_that_is_not_finite_has_a_line_too():
    line = progress_line({**RECORD, "loss": None, "grad_norm": None}, 100, 2.0)
    assert "loss not finite" in line and "grad skipped" in line
    assert "loss not finite" in progress_line({**RECORD, "loss": None, "targets": 3}, 100, 2.0)
    line = progress_line({**RECORD, "loss": None, "targets": 0, "validation_loss": None}, 100, 2.0)
    assert "| no target | validation without a target |" in line


def test_lines_from_before_the_log_was_open_are_its_first():
    terminal, log = io.StringIO(), io.StringIO()
    progress = Progress(terminal, None, 10, 1)
    progress.report("one")
    progress.report("two")
    progress.write_to(log)
    assert log.getvalue() == "one\ntwo\n"
    progress.report("three")
    assert log.getvalue() == terminal.getvalue() == "one\ntwo\nthree\n"


def test_a_line_is_in_the_file_at_once(tmp_path):
    with (tmp_path / "log.txt").open("w") as log, (tmp_path / "terminal").open("w") as terminal:
        Progress(terminal, log, 10, 1).step(RECORD, first=True)
        assert (tmp_path / "log.txt").read_text() == (tmp_path / "terminal").read_text() != ""


def test_a_full_disk_under_the_terminal_does_not_silence_it():
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        assert print_line(full, "line") is full


def test_a_lossy_run_reports_a_refused_log_once():
    terminal = io.StringIO()
    log = open("/dev/full", "w")  # noqa: SIM115, closing it fails too
    progress = Progress(terminal, log, 10, 1, lossy=True)
    for text in ("one", "two"):
        progress.report(text)
    close_log(log)
    one, problem, two = terminal.getvalue().splitlines()
    assert (one, two) == ("one", "two")
    assert problem.startswith("training continues without these lines: error[5] the log cannot be written")
    assert progress.on_refusal == progress.report and Progress(terminal, None, 10, 1).on_refusal is None


def test_a_log_without_a_terminal_has_the_lines_of_steps():
    log = io.StringIO()
    Progress(None, log, 100, 10).step(RECORD, first=False)
    assert log.getvalue().startswith("step 20/100 | ") and "ETA 0:02:40" in log.getvalue()


def test_the_time_left_is_by_the_smoothed_time_from_the_third_step_on():
    terminal = io.StringIO()
    progress = Progress(terminal, None, 10, 1)
    for step, seconds in ((1, 100.0), (2, 2.0), (3, 12.0)):
        progress.step({**RECORD, "step": step, "step_time": seconds}, first=False)
    left = [line.rpartition(" | ")[2] for line in terminal.getvalue().splitlines()]
    assert left == ["ETA 0:15:00", "ETA 0:00:16", "ETA 0:00:21"]  # 9 x 100, 8 x 2, 7 x (0.9 x 2 + 0.1 x 12)


def test_a_run_that_computes_no_norm_has_no_column_for_it():
    terminal = io.StringIO()
    Progress(terminal, None, 100, 1, grad_norm=False).step({**RECORD, "grad_norm": None}, first=False)
    assert "| lr 0.0006 | 12.3k tok/s |" in terminal.getvalue()


def test_a_log_that_refuses_a_line_does_not_silence_the_terminal():
    terminal = io.StringIO()
    log = open("/dev/full", "w")  # noqa: SIM115, closing it fails too
    with pytest.raises(DiskError, match="do=free space and resume"):
        Progress(terminal, log, 10, 1).report("the last line")
    close_log(log)
    assert terminal.getvalue() == "the last line\n"
    held = Progress(terminal, None, 10, 1)
    held.report("before")
    held.write_to(first := io.StringIO())
    held.write_to(second := io.StringIO())
    assert (first.getvalue(), second.getvalue()) == ("before\n", "")  # once
