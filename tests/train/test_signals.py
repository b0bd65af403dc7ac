"""Signals: the first is a wish, a repeated one the end."""

import os
import signal
import time

import pytest

from neox.train.signals import SIGNALS, StopSignals
from tests.distributed import start_ranks


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


def wait_for_signals(path):
    """Entry of a process that never comes to a step boundary."""
    with StopSignals() as signals:
        while True:
            with open(path, "w") as file:
                file.write(str(signals.received))
            time.sleep(0.05)


@pytest.mark.distributed
def test_a_repeated_signal_ends_the_process(tmp_path):
    path = tmp_path / "seen"
    running = start_ranks("tests.train.test_signals:wait_for_signals", 1, tmp_path, [path])
    running.wait_for(lambda: path.exists() and path.read_text() == "None", 30)
    running.signal(signal.SIGTERM)
    running.wait_for(lambda: "SIGTERM" in path.read_text() or "15" in path.read_text(), 30)
    time.sleep(0.7)
    running.signal(signal.SIGTERM)
    assert running.wait(10)[0] == 128 + signal.SIGTERM
