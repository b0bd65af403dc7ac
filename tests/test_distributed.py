"""Tests of the tests' own processes: what a hang reports, and that no test's process group reaches the next one."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch.distributed as dist

from tests.conftest import close_process_group, process_group_size
from tests.distributed import Processes, start_ranks
from tests.fork_server import ROOT, Patience, environment, innermost_call


def wait_for_a_peer() -> None:
    """Entry of a rank: rank 1 leaves out a barrier and sleeps."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        dist.barrier()
    never_ends()


def never_ends() -> None:
    while True:
        time.sleep(0.05)


@pytest.mark.distributed
@pytest.mark.parametrize("way", ["wait", "wait_for"])
def test_a_hang_names_where_each_rank_waits(tmp_path, monkeypatch, way):
    monkeypatch.setattr(Patience, "BREAK", 2.0)
    running = start_ranks("tests.test_distributed:wait_for_a_peer", 2, tmp_path)
    with pytest.raises(AssertionError, match="still running|never held") as caught:
        running.wait(3.0) if way == "wait" else running.wait_for(lambda: False, 3.0)
    report = str(caught.value)
    assert "rank 0 waits in tests/test_distributed.py:" in report and " wait_for_a_peer" in report.splitlines()[1]
    assert "rank 1 waits in tests/test_distributed.py:" in report and " never_ends" in report.splitlines()[2]
    assert "in barrier" in report
    assert None not in running.server.poll(running.pids)


@pytest.mark.distributed
def test_work_of_threads_is_progress_and_polling_is_none(tmp_path):
    """Backward passes run outside of the main thread; heartbeats too, for next to no CPU time."""
    busy, idle = (
        start_ranks(f"tests.test_distributed:{name}", 1, tmp_path) for name in ("work_in_a_thread", "never_ends")
    )
    busy.wait_for(lambda: busy.progress()[1] >= 2)
    assert idle.progress()[1] <= 1
    for one in (busy, idle):
        one.stop()


def work_in_a_thread() -> None:
    """Entry of a rank whose main thread only waits."""
    thread = threading.Thread(target=lambda: [None for _ in iter(int, 1)])
    thread.start()
    thread.join()


def test_a_launched_program_that_hangs_leaves_its_stacks(tmp_path, monkeypatch):
    monkeypatch.setattr(Patience, "BREAK", 2.0)
    script = tmp_path / "sleeps.py"
    script.write_text("import time\n\ndef asleep():\n    time.sleep(1000)\n\nasleep()\n")
    running = Processes([[sys.executable, str(script)]], [environment()], tmp_path)
    with pytest.raises(
        AssertionError,
        match=r"(?s)still running after 2 s.*Fatal Python error: Aborted.*sleeps\.py\", line 4 in asleep",
    ):
        running.wait(2.0)


def test_the_innermost_call_is_one_of_ours_where_there_is_one():
    other = 'Thread 0x1 (most recent call first):\n  File "/a/poll.py", line 1 in poll\n'
    dump = f"Fatal Python error: Aborted\n\n{other}\nCurrent thread 0x2 (most recent call first):\n"
    root = str(ROOT).encode("ascii", "backslashreplace").decode()  # as faulthandler writes a path
    inner, outer = '  File "/usr/lib/torch.py", line 7 in barrier\n', f'  File "{root}/neox/x.py", line 9 in step\n'
    assert innermost_call(dump + inner + outer) == "neox/x.py:9 step"
    assert innermost_call(dump + inner) == "/usr/lib/torch.py:7 barrier"
    assert innermost_call("no stacks") == "an unknown position: it wrote no stack"


def test_a_process_group_that_is_left_is_closed():
    if process_group_size():  # that of an engine which a fixture of another file still holds
        close_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert process_group_size() == 1
    close_process_group()
    assert process_group_size() == 0
