"""Which stacks wait for other processes."""

from __future__ import annotations

import sys

from neox.runtime.stacks import dump_stacks, in_collective, is_waiting, stack_of


def test_what_counts_as_waiting():
    assert is_waiting([("torch.distributed.distributed_c10d", "all_reduce"), ("neox.engine.engine", "train_step")])
    assert is_waiting([("neox.parallel.p2p", "send_recv"), ("neox.engine.pipeline", "exchange")])
    assert is_waiting([("deepspeed.runtime.zero.partition_parameters", "wait")])
    assert not is_waiting([("neox.engine.engine", "sum_over")])  # a name is no mark
    assert not is_waiting([("neox.data.samples.loader", "_take"), ("neox.train.loop", "advance")])
    assert not is_waiting([("threading", "wait"), ("queue", "get")])
    assert not is_waiting([])


def test_this_process_does_not_wait():
    assert not in_collective()
    assert stack_of(sys._getframe())[0] == (__name__, "test_this_process_does_not_wait")


def test_a_dump_names_the_rank_and_the_threads(capfd):
    dump_stacks(3)
    text = capfd.readouterr().err
    assert text.startswith("stacks of rank 3") and "test_a_dump_names_the_rank_and_the_threads" in text
