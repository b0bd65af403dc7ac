"""The rendezvous store's protocol in pure Python, for a process that fails before it imports torch.

It posts its error to the others.

The store is torch's TCPStore, of whose requests (torch/csrc/distributed/c10d/TCPStoreBackend.hpp) five are used:
VALIDATE, SET, GET, CHECK, PING. Rank 0 serves the store. If rank 0 fails before the store exists, a listener on its
port answers every connection with the error (`serve_refusal`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import TypedDict

from neox.errors import EnvironmentProblem
from neox.runtime.launch import LaunchInfo

VALIDATE, SET, GET, CHECK, PING = (bytes([number]) for number in (0, 1, 3, 5, 13))
MAGIC = 0x3C85F7CE  # the store closes a connection that starts with anything else
NONCE = 0x6E656F78
ANSWER = struct.pack("<I", NONCE)
PREFIX = "neox"  # of all our keys
REFUSED = "refused"  # key of the error of a process that has not joined
NOTICE = b"neox-refused "  # a listener on the store's port sends this before the error
CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 10.0
REPORT_DELAY = 3.0  # seconds for which other ranks let rank 0 report an error that all of them have
MAX_ANSWER = 1 << 20  # bytes


class Notice(TypedDict):
    """The error of a process that ends before it has joined."""

    rank: int
    code: int
    line: str
    time: float
    process: str


class NotAStore(Exception):
    """The program at the address is not a rendezvous store."""


class RefusalNotice(Exception):
    """The first process has failed; `notice` is its error."""

    def __init__(self, notice: Notice):
        super().__init__(notice.get("line"))
        self.notice = notice


class StoreConnection:
    """A connection to the rendezvous store. Use as a context manager.

    Raises:
        OSError: nothing listens, or the name cannot be resolved.
        NotAStore: another program listens.
        RefusalNotice: rank 0 serves its error instead of a store.
    """

    def __init__(self, launch: LaunchInfo):
        self.socket = socket.create_connection((launch.address, launch.port), CONNECT_SECONDS)
        try:
            self.socket.settimeout(ANSWER_SECONDS)
            self.socket.sendall(VALIDATE + struct.pack("<I", MAGIC) + PING + ANSWER)
            self._greet()
        except BaseException:
            self.socket.close()
            raise

    def _greet(self) -> None:
        try:
            answer = self._receive(len(ANSWER))
            if answer == ANSWER:
                return
            if answer == NOTICE[: len(ANSWER)]:
                while len(answer) < MAX_ANSWER and (more := self.socket.recv(1 << 16)):
                    answer += more
        except TimeoutError as error:
            raise NotAStore(f"no answer in {ANSWER_SECONDS:.0f} s") from error
        except OSError as error:
            raise NotAStore(str(error)) from error
        notice = read_notice(answer.removeprefix(NOTICE)) if answer.startswith(NOTICE) else None
        if notice is None:
            raise NotAStore("another program answers")
        raise RefusalNotice(notice)

    def __enter__(self) -> StoreConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def set(self, key: str, value: bytes) -> None:
        """Write a key."""
        self.socket.sendall(SET + counted(stored(key)) + counted(value))

    def get(self, key: str) -> bytes | None:
        """Read a key; None if it is not set."""
        self.socket.sendall(CHECK + struct.pack("<Q", 1) + counted(stored(key)))
        if self._receive(1) != b"\0":
            return None
        self.socket.sendall(GET + counted(stored(key)))
        (size,) = struct.unpack("<Q", self._receive(8))
        if size > MAX_ANSWER:
            raise NotAStore(f"an answer of {size} bytes")
        return self._receive(size)

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise NotAStore("it closes the connection")
            data += part
        return data


def stored(key: str) -> bytes:
    """A key as torch's client sends it for PrefixStore(PREFIX)."""
    return f"/{PREFIX}/{key}".encode()


def counted(data: bytes) -> bytes:
    """Bytes, preceded by their number."""
    return struct.pack("<Q", len(data)) + data


def read_notice(text: bytes | str) -> Notice | None:
    """Parse a posted error; None if the text is not one."""
    try:
        notice = json.loads(text)
        valid = (
            isinstance(notice["line"], str)
            and type(notice["code"]) is int
            and type(notice["rank"]) is int
            and isinstance(notice["time"], float)
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return notice if valid else None


def make_notice(rank: int, code: int, line: str) -> Notice:
    """The error of a process that ends before it has joined."""
    return {"rank": rank, "code": code, "line": line, "time": time.time(), "process": process_name()}


def process_name() -> str:
    """Identifies the notices of this process."""
    return f"{socket.gethostname()} {os.getpid()}"


def post_refusal(
    launch: LaunchInfo, notice: Notice, patience: float, stop: Callable[[], bool] = lambda: False
) -> bool | None:
    """Post an error to the other processes through the store, which may take `patience` seconds to start.

    Returns:
        Whether rank 0 has the same error, which it reports for all; None if no store was reached.
    """
    end, posted = time.monotonic() + patience, False
    while True:
        with contextlib.suppress(OSError, NotAStore):
            try:
                with StoreConnection(launch) as store:
                    if launch.rank > 0 and is_same(read_notice(store.get(REFUSED) or b""), notice):
                        return True
                    if not posted:
                        store.set(REFUSED, json.dumps(notice).encode())
                        posted, end = True, min(end, time.monotonic() + REPORT_DELAY)
                        # when it answers, or rank 0 has ended, the store has read what was sent before
                        store.get(REFUSED)
            except RefusalNotice as refusal:
                return is_same(refusal.notice, notice)
        waits = launch.rank > 0 and launch.agent_store  # else it is rank 0 that serves the store, so it has not failed
        if time.monotonic() > end or stop() or (posted and not waits):
            return False if posted else None
        time.sleep(0.1)


def is_same(first: Notice | None, notice: Notice) -> bool:
    """Whether rank 0 posted the same error."""
    return first is not None and first["rank"] == 0 and first["line"] == notice["line"]


def serve_refusal(launch: LaunchInfo, notice: Notice, patience: float, stop: Callable[[], bool] = lambda: False) -> int:
    """Rank 0, without a store: answer the other processes with an error as they connect, for at most `patience`
    seconds. Returns how many were answered.
    """
    try:
        listener = listen(launch, retry=0.0)
    except EnvironmentProblem:
        return 0
    answered, end = 0, time.monotonic() + patience
    with listener:
        while answered < launch.world_size - 1 and time.monotonic() < end and not stop():
            if select.select([listener], [], [], 0.1)[0]:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(CONNECT_SECONDS)
                    connection.sendall(NOTICE + json.dumps(notice).encode())
                    connection.shutdown(socket.SHUT_WR)
                    answered += len(connection.recv(64)) > 0
                    # until the other side closes: a reset would discard what it has not read
                    while connection.recv(1 << 16):
                        pass
    return answered


def listen(launch: LaunchInfo, retry: float = 2.0) -> socket.socket:
    """Listen on the port, on all addresses of this host.

    A port in use is retried for `retry` seconds: a run that has just ended may hold it.

    Raises:
        EnvironmentProblem: the port is in use.
    """
    end = time.monotonic() + retry
    while True:
        try:
            return bind(launch.port)
        except OSError as error:
            if time.monotonic() > end:
                raise EnvironmentProblem(
                    "rank 0 cannot listen on its port",
                    where=f"{launch.endpoint} (MASTER_ADDR, MASTER_PORT)",
                    got=error.strerror,
                    want="a port that no other program uses",
                    do="choose another port: --master-port of torchrun, --master_port of deepspeed, else MASTER_PORT; "
                    "or end the job that uses it",
                ) from error
        time.sleep(0.1)


def bind(port: int) -> socket.socket:
    """A listening socket for IPv6 and IPv4, or for IPv4 alone if the host has no IPv6."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise
    return socket.create_server(("", port), family=socket.AF_INET, backlog=1024)
