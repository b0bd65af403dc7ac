"""Worker processes: one thread each, deaf to Ctrl-C, and a death that is reported."""

import os
import signal
import subprocess
import sys
import time

import pytest

from neox.data.text.worker_processes import worker_processes
from neox.errors import MemoryExhausted


def settings_of_worker() -> tuple[bool, str]:
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN, os.environ["TOKENIZERS_PARALLELISM"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_ignore_ctrl_c_and_use_one_thread():
    # a job that a shell started in the background ignores it already, and so would its workers
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with worker_processes(1) as executor:
            assert executor.submit(settings_of_worker).result() == (True, "false")
            waiting = [executor.submit(time.sleep, 0.02) for _ in range(5)]
        assert waiting[-1].cancelled()  # what has not begun is dropped at the end
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.submit(settings_of_worker)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_worker_that_dies_is_reported():
    with pytest.raises(MemoryExhausted, match="a worker process died"), worker_processes(1) as executor:
        executor.submit(die).result()


def test_multiprocessing_is_imported_only_when_it_is_needed(repository):
    probe = "import neox.cli.preprocess, sys; print('multiprocessing' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, cwd=repository)
    assert done.stdout == "False\n", done.stdout + done.stderr
