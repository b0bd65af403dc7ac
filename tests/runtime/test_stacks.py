"""Which stacks wait for other processes."""

from __future__ import annotations

import sys
import threading
import types

import pytest

from neox.runtime.stacks import dump_stacks, in_collective, is_waiting, stack_of


def test_what_counts_as_waiting():
    assert is_waiting([("torch.distributed.distributed_c10d", "all_reduce"), ("neox.engine.engine", "train_step")])
    assert is_waiting([("neox.parallel.p2p", "send_recv"), ("neox.engine.pipeline", "exchange")])
    assert is_waiting([("neox.model.attention", "forward"), ("neox.parallel.collectives", "all_to_all")])
    assert is_waiting([("deepspeed.runtime.zero.partition_parameters", "wait")])
    assert is_waiting([("torch.cuda.streams", "synchronize")])
    assert not is_waiting([("torch.nn.modules.module", "forward"), ("torch.cuda.streams", "synchronize")])
    assert not is_waiting([("torch.autograd.graph", "backward")])
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


def in_module(name, function):
    """The function as if it were defined in a module of this name."""
    namespace = {**function.__globals__, "__name__": name}
    return types.FunctionType(function.__code__, namespace, None, None, function.__closure__)


@pytest.mark.parametrize(
    ("thread", "main", "waits"),
    [
        ("autograd", "neox.train.loop", True),
        ("neox-watchdog", "neox.train.loop", False),
        ("neox-watchdog-store", "neox.train.loop", False),
        ("neox-signals", "neox.train.loop", False),
        ("neox-checkpoint", "neox.train.loop", False),
        ("neox-checkpoint", "neox.checkpoint.background", True),  # the main thread waits for the save
    ],
)
def test_whose_collective_counts(thread, main, waits):
    inside, leave = threading.Event(), threading.Event()

    def collective():
        inside.set()
        leave.wait()

    other = threading.Thread(target=in_module("neox.parallel.collectives", collective), name=thread)
    other.start()
    inside.wait()
    try:
        assert in_module(main, lambda: in_collective())() == waits
    finally:
        leave.set()
        other.join()
    assert not in_collective()


@pytest.mark.parametrize(
    ("module", "waits"),
    [("neox.parallel.collectives", True), ("neox.parallel.p2p", True), ("neox.parallel.mesh", False)],
)
def test_a_collective_of_the_main_thread_counts(module, waits):
    """At any depth of its stack."""
    assert in_module(module, lambda: in_module("neox.engine", lambda: in_collective())())() == waits


def test_a_dump_has_every_thread_and_needs_no_reader(capfd, monkeypatch, tmp_path):
    inside, leave = threading.Event(), threading.Event()

    def sleeps_elsewhere():
        inside.set()
        leave.wait()

    other = threading.Thread(target=sleeps_elsewhere)
    other.start()
    inside.wait()
    try:
        dump_stacks(12)
    finally:
        leave.set()
        other.join()
    text = capfd.readouterr().err
    assert text.startswith("stacks of rank 12, innermost call first:\n") and "sleeps_elsewhere" in text
    with (tmp_path / "closed").open("w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
    dump_stacks(3)
    with (tmp_path / "closed").open() as unwritable:
        monkeypatch.setattr(sys, "stderr", unwritable)
        dump_stacks(3)
