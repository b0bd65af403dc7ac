"""The first error that is posted is the one that all processes report."""

from __future__ import annotations

import errno
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from neox.errors import DataError, HangError, MemoryExhausted, PeerLost
from neox.runtime import failure_channel
from neox.runtime.failure_channel import ACKNOWLEDGED, FailureChannel, as_neox_error


def test_the_first_error_is_retained():
    store = dist.HashStore()
    one, other = FailureChannel(store, 0), FailureChannel(store, 1)
    assert one.posted() is None
    first = one.post(3)
    assert other.post(13, {"rank": 0}) == first == one.posted() == other.posted()
    assert (first["rank"], first["code"], first["lost"]) == (0, 3, None)
    assert one.from_this_thread(first) and not other.from_this_process(first)


def test_threads_of_a_process_are_distinguished():
    channel = FailureChannel(dist.HashStore(), 0)
    thread = threading.Thread(target=channel.post, args=(HangError.exit_code,))
    thread.start()
    thread.join()
    posted = channel.posted()
    assert channel.from_this_process(posted) and not channel.from_this_thread(posted)


def test_rank_0_waits_for_the_others_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(failure_channel, "FAREWELL", 0.1)
    store = dist.HashStore()
    FailureChannel(store, 0).acknowledge(2)
    FailureChannel(store, 1).acknowledge(2)
    assert store.add(ACKNOWLEDGED, 0) == 2


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), MemoryExhausted),
        (RuntimeError("CUDA out of memory. Tried to allocate"), MemoryExhausted),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
            MemoryExhausted,
        ),
        (RuntimeError("pair.cc:553] Connection closed by peer [127.0.0.1]:2"), PeerLost),
        (RuntimeError("Connection reset by peer"), PeerLost),
        (RuntimeError("Broken pipe"), PeerLost),
        (RuntimeError("connect: Connection refused"), PeerLost),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), PeerLost),
        (RuntimeError("Socket Timeout"), PeerLost),
        (OSError("Broken pipe"), None),  # of standard output, for one
        (DataError("x"), DataError),
        (ValueError("x"), None),
        (RuntimeError("shapes differ"), None),
    ],
)
def test_errors_whose_cause_is_known(error, kind):
    found = as_neox_error(error)
    assert found is None if kind is None else isinstance(found, kind)
    assert found is None or kind is DataError or found.where == "rank 0"


def test_the_rank_is_named():
    assert as_neox_error(MemoryError("x" * 300), 3).where == "rank 3"
    assert as_neox_error(RuntimeError("broken pipe"), 4).where == "rank 4"


def test_rank_0_waits_no_longer_than_the_last_reads_the_error(monkeypatch):
    monkeypatch.setattr(failure_channel, "FAREWELL", 60.0)
    store = dist.HashStore()
    begin = time.monotonic()
    FailureChannel(store, 1).acknowledge(2)
    FailureChannel(store, 0).acknowledge(2)
    assert time.monotonic() - begin < 30


def test_an_error_is_waited_for_until_it_is_posted_or_time_is_up():
    channel = FailureChannel(dist.HashStore(), 0)
    begin = time.monotonic()
    channel.wait_for_error(0.2)
    assert time.monotonic() - begin >= 0.2
    timer = threading.Timer(0.2, channel.post, (3,))
    timer.start()
    channel.wait_for_error(60.0)
    timer.join()
    assert channel.posted()["code"] == 3
    assert time.monotonic() - begin < 30


def test_what_is_posted_and_whose_it_is():
    channel = FailureChannel(dist.HashStore(), 3)
    posted = channel.post(12, {"rank": 1, "host": "far"})
    assert posted == {
        "rank": 3,
        "code": 12,
        "id": os.getpid(),
        "thread": threading.get_ident(),
        "lost": {"rank": 1, "host": "far"},
    }
    assert channel.from_this_process(posted) and channel.from_this_thread(posted)
    assert channel.from_this_process({**posted, "thread": 0}) and not channel.from_this_thread({**posted, "thread": 0})
    for other in ({"rank": 2}, {"id": os.getpid() + 1}):  # of another host, the pid may be the same; or of a restart
        assert not channel.from_this_process({**posted, **other})
        assert not channel.from_this_thread({**posted, **other})


def test_others_do_not_wait_and_a_store_that_has_exited_is_no_error(monkeypatch):
    naps = []
    monkeypatch.setattr(failure_channel, "time", SimpleNamespace(monotonic=time.monotonic, sleep=naps.append))
    store = dist.HashStore()
    FailureChannel(store, 1).acknowledge(5)
    assert sum(naps) == 0
    FailureChannel(store, 0).acknowledge(2)
    assert naps == [0.0, 0.2]  # a moment in which the others read the answer to their own acknowledgement

    class Exited:
        def __getattr__(self, name):
            raise RuntimeError("Connection reset by peer")

    FailureChannel(Exited(), 1).acknowledge(5)
    del naps[:]
    FailureChannel(Exited(), 1).wait_for_error(3.0)
    assert naps == [1.5]


def test_an_error_of_the_system_names_the_rank_too():
    for file, where in ((None, "rank 7"), ("/data/x", "/data/x")):
        found = as_neox_error(OSError(errno.ENOSPC, "No space left on device", file), 7)
        assert (found.exit_code, str(found.where)) == (5, where)
    assert as_neox_error(RuntimeError("broken pipe " + "x" * 300)).got == "broken pipe " + "x" * 188
