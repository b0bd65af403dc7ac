"""The store's protocol as torch's own store speaks it, and the listener that replaces the store of a rank 0 that
fails.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
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


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({}, True),
        ({"extra": 1}, True),
        ({"code": "2"}, False),
        ({"code": 2.0}, False),
        ({"rank": True}, False),
        ({"rank": None}, False),
        ({"line": None}, False),
        ({"time": 1}, False),
    ],
)
def test_a_notice_has_a_line_two_numbers_and_a_time(change, valid):
    notice = {**make_notice(1, 2, "error[2] x"), **change}
    assert read_notice(json.dumps(notice)) == read_notice(json.dumps(notice).encode()) == (notice if valid else None)
    for key in ("line", "code", "rank", "time"):
        assert read_notice(json.dumps({name: value for name, value in notice.items() if name != key})) is None


def test_a_notice_names_whose_it_is_and_when_it_was_made():
    begin = time.time()
    notice = make_notice(3, 14, "error[14] y")
    assert begin <= notice.pop("time") <= time.time()
    assert notice == {"rank": 3, "code": 14, "line": "error[14] y", "process": f"{socket.gethostname()} {os.getpid()}"}


class Answering:
    """A program that answers the first connection with parts of bytes; notes whether the other side closes it."""

    def __init__(self, *parts: bytes):
        self.parts, self.closed = parts, None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve)

    def serve(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            connection.settimeout(10)
            connection.recv(64)
            for part in self.parts:
                connection.sendall(part)
                time.sleep(0.02)
            if self.parts[-1:] != (b"HTTP/1.1 400\r\n",):
                connection.shutdown(socket.SHUT_WR)
            try:
                self.closed = connection.recv(64) == b""
            except OSError as error:  # a reset, if the other side has not read everything
                self.closed = not isinstance(error, TimeoutError)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.thread.join()
        self.listener.close()


def test_a_notice_that_comes_in_parts_is_read_to_its_end():
    notice = make_notice(0, 2, "error[2] " + "long " * 20_000)
    text = wire.NOTICE + json.dumps(notice).encode()
    with Answering(text[:2], text[2:9], text[9:50_000], text[50_000:]) as rank_0, pytest.raises(RefusalNotice) as told:
        StoreConnection(at(rank_0.port))
    assert told.value.notice == notice and rank_0.closed


def test_a_connection_to_another_program_is_closed():
    with Answering(b"HTTP/1.1 400\r\n") as other:
        with pytest.raises(NotAStore, match="another program answers"):
            StoreConnection(at(other.port))
        other.thread.join()
        assert other.closed


def test_an_answer_of_any_size_up_to_the_limit_is_read(store, monkeypatch):
    monkeypatch.setattr(wire, "MAX_ANSWER", 1000)
    theirs = dist.PrefixStore(wire.PREFIX, store)
    theirs.set("empty", "")
    theirs.set("largest", b"x" * 1000)
    theirs.set("too large", b"x" * 1001)
    with StoreConnection(at(store.port)) as connection:
        assert connection.socket.gettimeout() == wire.ANSWER_SECONDS
        assert connection.get("empty") == b""
        assert connection.get("largest") == b"x" * 1000
        with pytest.raises(NotAStore, match="1001 bytes"):
            connection.get("too large")
    assert connection.socket.fileno() == -1


def test_a_process_under_an_agent_gives_rank_0_time_to_report_the_same_error(store):
    line = "error[2] unknown key"
    first = dist.PrefixStore(wire.PREFIX, store)
    timer = threading.Timer(0.15, first.set, (wire.REFUSED, json.dumps(make_notice(0, 2, line))))
    timer.start()
    assert post_refusal(at(store.port, agent_store=True), make_notice(1, 2, line), 10.0) is True
    timer.join()


def test_who_serves_the_store_itself_and_who_is_stopped_does_not_wait(store, monkeypatch):
    monkeypatch.setattr(wire.time, "sleep", lambda seconds: pytest.fail("waits"))
    notice = make_notice(1, 2, "error[2] unknown key")
    assert post_refusal(at(store.port), notice, 60.0) is False  # without an agent, the store is that of rank 0
    assert post_refusal(at(store.port, 0, agent_store=True), make_notice(0, 2, "x"), 60.0) is False
    assert post_refusal(at(free_port()), notice, 60.0, lambda: True) is None


def test_a_connection_that_sends_nothing_was_not_answered():
    """A port scan, or a health check."""
    port, told = free_port(), []
    notice = make_notice(0, 2, "error[2] x")
    thread = threading.Thread(target=lambda: told.append(serve_refusal(at(port, rank=0), notice, 60.0)))
    thread.start()
    for _ in range(1000):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    with pytest.raises(RefusalNotice):
        StoreConnection(at(port))
    thread.join(60)
    assert told == [1]


def test_a_port_that_becomes_free_in_time_is_used():
    other = socket.create_server(("127.0.0.1", 0))
    timer = threading.Timer(0.15, other.close)
    timer.start()
    with listen(at(other.getsockname()[1], rank=0), retry=30.0) as listener:
        assert listener.getsockname()[1] > 0
    timer.join()


@pytest.mark.parametrize(
    ("dual", "problem", "families"),
    [
        (True, None, ["AF_INET6"]),
        (False, None, ["AF_INET"]),
        (True, errno.EAFNOSUPPORT, ["AF_INET6", "AF_INET"]),
        (True, errno.EADDRINUSE, ["AF_INET6"]),
        (True, errno.EACCES, ["AF_INET6"]),
    ],
)
def test_a_host_without_ipv6_listens_on_ipv4(monkeypatch, dual, problem, families):
    """A port in use is not tried again there: another job may have it."""
    tried = []

    def create_server(address, *, family, **options):
        tried.append(family.name)
        assert address == ("", 7) and options.get("dualstack_ipv6", False) == (family == socket.AF_INET6)
        if problem is not None and family == socket.AF_INET6:
            raise OSError(problem, "refused")
        return "listener"

    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: dual)
    monkeypatch.setattr(socket, "create_server", create_server)
    if problem in (errno.EADDRINUSE, errno.EACCES):
        with pytest.raises(OSError, match="refused"):
            wire.bind(7)
    else:
        assert wire.bind(7) == "listener"
    assert tried == families
