"""Signals: the first one asks to stop, a repeated one ends the process."""

import os
import signal
import time
from types import SimpleNamespace

import pytest

from neox.runtime import signals as module
from neox.runtime.signals import REPEAT_AFTER, SIGNALS, StopSignals
from tests.distributed import start_ranks

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_handler_before_comes_back(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert not signals.requested
        os.kill(os.getpid(), number)
        assert signals.requested
        assert signals.received == number
        assert signal.getsignal(number) == signals.handle
    assert signal.getsignal(number) == before


def test_the_same_wish_may_arrive_as_two_signals():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # at once: a terminal and a launcher that both pass it on
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGINT


def test_a_signal_that_came_before_there_was_an_action_gets_it_at_once():
    with StopSignals() as signals:
        acted: list[signal.Signals] = []
        signals.end_at_once(acted.append)
        assert acted == []
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 30
        while not acted and time.monotonic() < deadline:  # the thread acts
            time.sleep(0.01)
        assert acted == [signal.SIGTERM]
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested
        time.sleep(0.3)  # the thread has seen it before there is an action
        acted = []
        signals.end_at_once(acted.append)
        assert set(acted) == {signal.SIGINT}
        acted = []
        signals.end_at_once(None)
        assert acted == []


def wait_for_signals(path):
    """Entry of a process that never comes to a step boundary."""
    with StopSignals() as signals:
        while True:
            with open(path, "w") as file:
                file.write(str(signals.received))
            time.sleep(0.05)


def test_the_descriptor_that_signals_are_written_to_comes_back():
    """An event loop that existed before still receives signals."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = signal.set_wakeup_fd(writer)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.requested
        assert signal.set_wakeup_fd(writer) == writer
        open_files = len(os.listdir("/proc/self/fd"))
        with StopSignals():
            pass
        deadline = time.monotonic() + 30
        while len(os.listdir("/proc/self/fd")) > open_files and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(os.listdir("/proc/self/fd")) <= open_files
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def repeat(running, number, rank=None):
    """Send a signal again until it has ended the process. One that comes soon after the first does not count, and on
    a busy machine the first comes late.
    """
    due = [time.monotonic() + 2 * REPEAT_AFTER]

    def ended():
        if time.monotonic() > due[0]:
            running.signal(number, rank)
            due[0] += 1.0
        return running.server.poll(running.pids)[rank or 0] is not None

    running.wait_for(ended, 60)


def test_after_the_end_of_a_command_signals_are_ignored_and_else_handled_as_before():
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with StopSignals(until_exit=True) as signals:
            assert all(signal.getsignal(number) == signals.handle for number in SIGNALS)
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * 3
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


@pytest.mark.distributed
def test_another_signal_later_is_no_repetition(tmp_path):
    """A Ctrl-C that a launcher passes on late, as SIGTERM, does not cost the checkpoint."""
    path = tmp_path / "seen"
    running = start_ranks("tests.runtime.test_signals:wait_for_signals", 1, tmp_path, [path])
    running.wait_for(lambda: path.exists() and path.read_text() == "None", 30)
    running.signal(signal.SIGINT)
    running.wait_for(lambda: str(signal.SIGINT) in path.read_text(), 30)
    time.sleep(2 * REPEAT_AFTER)
    running.signal(signal.SIGTERM)
    time.sleep(0.3)
    written = path.stat().st_mtime_ns
    running.wait_for(lambda: path.stat().st_mtime_ns > written, 30)
    repeat(running, signal.SIGINT)
    assert running.wait(30)[0] == 128 + signal.SIGINT


@pytest.mark.distributed
def test_a_repeated_signal_ends_the_process(tmp_path):
    path = tmp_path / "seen"
    running = start_ranks("tests.runtime.test_signals:wait_for_signals", 1, tmp_path, [path])
    running.wait_for(lambda: path.exists() and path.read_text() == "None", 30)
    running.signal(signal.SIGTERM)
    running.wait_for(lambda: "SIGTERM" in path.read_text() or "15" in path.read_text(), 30)
    repeat(running, signal.SIGTERM)
    assert running.wait(30)[0] == 128 + signal.SIGTERM


def finish_and_get_a_signal(number):
    """Entry of a process whose command has returned."""
    with StopSignals(until_exit=True):
        pass
    os.kill(os.getpid(), int(number))


@pytest.mark.distributed
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_after_the_end_changes_nothing(tmp_path, number):
    assert start_ranks("tests.runtime.test_signals:finish_and_get_a_signal", 1, tmp_path, [int(number)]).wait() == [0]


class Clock:
    """Signals that arrive at given times, for the thread that reads their numbers, which runs in the test's own."""

    def __init__(self, monkeypatch, arrivals):
        self.arrivals, self.now, self.exits = iter(arrivals), 0.0, []
        stands_for = SimpleNamespace(read=self.read, close=lambda reader: None, _exit=self.exits.append)
        monkeypatch.setattr(module, "os", stands_for)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def read(self, reader, count):
        self.now, numbers = next(self.arrivals, (self.now, ()))
        return bytes(numbers)


@pytest.mark.parametrize(
    ("arrivals", "exits"),
    [
        ([(1.0, [INT]), (1.0 + REPEAT_AFTER, [INT])], []),
        ([(1.0, [INT]), (1.1 + REPEAT_AFTER, [INT])], [130]),
        ([(1.0, [TERM]), (1.1 + REPEAT_AFTER, [TERM])], [143]),
        ([(1.0, [INT, INT, TERM]), (9.0, [TERM])], []),
        ([(1.0, [INT, TERM]), (9.0, [TERM, INT])], [130]),
        ([(1.0, [INT]), (1.4, [INT]), (1.8, [INT])], [130]),  # since the first one, not since the last
        ([(1.0, [signal.SIGCHLD]), (8.0, [INT]), (9.0, [signal.SIGCHLD])], []),
        ([(1.0, [signal.SIGCHLD, USR1]), (9.0, [signal.SIGCHLD, USR1])], [138]),
    ],
)
def test_which_signal_is_a_repetition(monkeypatch, arrivals, exits):
    clock, acted = Clock(monkeypatch, arrivals), []
    signals = StopSignals()
    signals.end_at_once(acted.append)
    signals.watch(3)
    assert clock.exits == exits
    known = [number for _, numbers in arrivals for number in numbers if number != signal.SIGCHLD]
    assert acted == known[:1]  # for the first one alone
