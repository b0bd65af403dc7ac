"""Marks of waiting, and timeouts of process groups beyond our own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from neox.parallel.wait_tracker import MIN_GROUP_TIMEOUT, WaitTracker, raise_group_timeouts
from tests.distributed import run_ranks


def test_marks_nest_and_end_on_errors():
    waits = WaitTracker()
    with waits():
        with pytest.raises(KeyError), waits():
            raise KeyError
        assert waits.waiting
    assert not waits.waiting


def check_timeouts():
    """Entry of a process: the world group and a second one."""
    dist.init_process_group("gloo")
    beside = dist.new_group([0, 1])
    for hang_timeout, seconds in (
        (0.0, MIN_GROUP_TIMEOUT),
        (1200.0, MIN_GROUP_TIMEOUT),
        (MIN_GROUP_TIMEOUT, 2 * MIN_GROUP_TIMEOUT),
    ):
        raise_group_timeouts(hang_timeout)
        for group in (dist.group.WORLD, beside):
            assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == seconds
    dist.barrier()  # the first process serves the store of the others


def test_every_group_outlasts_the_watchdog(tmp_path):
    run_ranks("tests.parallel.test_wait_tracker:check_timeouts", 2, tmp_path)


def test_one_process_has_no_timeouts_to_raise():
    raise_group_timeouts(1200.0)


def test_a_section_within_a_section_does_not_end_the_outer_one():
    waits, seen = WaitTracker(), []
    for _ in range(2):  # and it can be entered again
        seen.append(waits.waiting)
        with waits():
            seen.append(waits.waiting)
            with waits():
                seen.append(waits.waiting)
            seen.append(waits.waiting)
    assert seen == [False, True, True, True] * 2 and not waits.waiting
