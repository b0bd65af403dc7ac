"""The store's protocol as torch's own store speaks it, and the listener that replaces the store of a rank 0 that
fails.
"""

from __future__ import annotations

import json
import socket
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from neox.errors import EnvironmentProblem
from neox.runtime import store_protocol as wire
from neox.runtime.launch import LaunchInfo
from neox.runtime.store_protocol import (
    NotAStore,
    RefusalNotice,
    StoreConnection,
    listen,
    make_notice,
    post_refusal,
    read_notice,
    serve_refusal,
)
from tests.distributed import free_port


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


def at(port: int, rank: int = 1, world_size: int = 2, *, agent_store: bool = False) -> LaunchInfo:
    return LaunchInfo(rank, rank, world_size, "127.0.0.1", port, "by hand", agent_store)


def test_keys_are_those_of_torch(store):
    ours = dist.PrefixStore(wire.PREFIX, store)
    ours.set("theirs", b"\x00\xff")
    with StoreConnection(at(store.port)) as connection:
        assert connection.get("theirs") == b"\x00\xff"
        assert connection.get("absent") is None
        connection.set("mine", b"x" * 5000)
        assert connection.get("mine") == b"x" * 5000
    assert ours.get("mine") == b"x" * 5000


def test_a_socket_of_ours_serves_torch():
    listener = listen(at(0))
    server = dist.TCPStore(
        "127.0.0.1", listener.getsockname()[1], None, True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    client = dist.TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False, timeout=timedelta(seconds=10))
    client.set("a", "b")
    assert server.get("a") == b"b"


def test_a_refusal_is_posted(store):
    notice = make_notice(1, 2, "error[2] unknown key")
    assert post_refusal(at(store.port), notice, 10.0) is False
    assert read_notice(dist.PrefixStore(wire.PREFIX, store).get(wire.REFUSED)) == notice


def test_what_rank_0_has_reported_is_not_reported_again(store):
    line = "error[2] unknown key"
    assert not post_refusal(at(store.port, rank=0, agent_store=True), make_notice(0, 2, line), 10.0)
    assert post_refusal(at(store.port), make_notice(1, 2, line), 10.0)
    assert post_refusal(at(store.port), make_notice(1, 2, "error[2] another"), 0.0) is False
    assert post_refusal(at(free_port()), make_notice(1, 2, line), 0.0) is None


@pytest.mark.parametrize("agent_store", [False, True])
def test_the_same_error_of_a_rank_that_is_not_0_is_reported_by_both(store, monkeypatch, agent_store):
    """Only rank 0 reports for all: two others that relied on each other would leave no report at all."""
    monkeypatch.setattr(wire, "REPORT_DELAY", 0.3)
    line = "error[2] unknown key"
    assert post_refusal(at(store.port, 2, 3, agent_store=agent_store), make_notice(2, 2, line), 10.0) is False
    assert post_refusal(at(store.port, 1, 3, agent_store=agent_store), make_notice(1, 2, line), 10.0) is False


def test_a_first_process_that_fails_notifies_all():
    port, told = free_port(), []
    thread = threading.Thread(
        target=lambda: told.append(serve_refusal(at(port, rank=0, world_size=3), make_notice(0, 2, "error[2] x"), 60.0))
    )
    thread.start()
    assert post_refusal(at(port, 1), make_notice(1, 2, "error[2] x"), 60.0), "the same error"
    assert not post_refusal(at(port, 2), make_notice(2, 2, "error[2] y"), 60.0), "another one"
    thread.join(60)
    assert told == [2]


def test_nobody_connects():
    assert serve_refusal(at(free_port(), rank=0), make_notice(0, 2, "x"), 0.0) == 0
    assert serve_refusal(at(free_port(), rank=0), make_notice(0, 2, "x"), 60.0, lambda: True) == 0
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert serve_refusal(at(other.getsockname()[1], rank=0), make_notice(0, 2, "x"), 60.0) == 0, (
            "another program has the port"
        )


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-OpenSSH_9\r\n", b"neox", wire.NOTICE + b"{}", wire.NOTICE + b"[" * 9999]
)
def test_another_program_is_no_store(answer):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def serve() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(64)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(NotAStore):
            StoreConnection(at(other.getsockname()[1]))
        thread.join()


def test_a_notice_is_raised():
    with pytest.raises(RefusalNotice) as caught:
        raise RefusalNotice(make_notice(0, 3, "error[3] x"))
    assert caught.value.notice["code"] == 3


def test_a_silent_program_is_no_store(monkeypatch):
    monkeypatch.setattr(wire, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(NotAStore, match="no answer"):
        StoreConnection(at(other.getsockname()[1]))


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            EnvironmentProblem, match=rf"error\[14\] rank 0 cannot listen on its port; where=127.0.0.1:{port}"
        ):
            listen(at(port, rank=0), retry=0.0)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", json.dumps({"line": "x", "code": True, "rank": 0, "time": 1.0}), json.dumps({"line": 3})],
)
def test_what_is_no_notice(text):
    assert read_notice(text) is None
