"""Rendezvous through a real store: first attempts, restarts over the keys of dead processes, ranks that are missing,
used twice, or that refuse.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch.distributed as dist

from neox.errors import EnvironmentProblem, HangError, NeoxError
from neox.runtime import rendezvous as module
from neox.runtime.launch import LaunchInfo
from neox.runtime.rendezvous import Member, PeerRefused, Waiting, claim_rank, client, spans
from neox.runtime.store_protocol import REFUSED, make_notice, serve_refusal
from tests.distributed import free_port


@pytest.fixture
def agent():
    """The store of a launcher that outlives the processes, as torchrun's agent has it."""
    return dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


def launches(count: int, port: int, *, agent_store: bool = False) -> list[LaunchInfo]:
    return [LaunchInfo(rank, rank, count, "127.0.0.1", port, "by hand", agent_store) for rank in range(count)]


def start(pool: ThreadPoolExecutor, members: Sequence[LaunchInfo], limit: float = 60.0) -> list[Future]:
    return [pool.submit(claim_rank, member, limit) for member in members]


def test_all_get_the_same_token_in_whatever_order_they_come():
    with ThreadPoolExecutor(3) as pool:
        met = [future.result() for future in start(pool, launches(3, free_port())[::-1])]
    assert len({one.token for one in met}) == 1
    met[0].keys("a").set("key", "value")
    assert met[1].keys("a").get("key") == b"value" and not met[2].keys("b").check(["key"])


def test_a_restart_over_the_keys_of_the_attempts_before(agent):
    tokens = []
    with ThreadPoolExecutor(3) as pool:
        for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
            members = launches(3, agent.port, agent_store=True)
            met = [future.result() for future in start(pool, [members[rank] for rank in order])]
            assert len({one.token for one in met}) == 1
            tokens.append(met[0].token)
            assert not met[0].keys("group").check(["key"])
            met[0].keys("group").set("key", "of this attempt")
    assert len(set(tokens)) == 3


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_died_while_it_waited_is_replaced(agent, dead):
    """Its greeting stays in the store; nobody confirms the answer to it. A dead rank 0 leaves answers of which
    nothing comes.
    """
    members = launches(2, agent.port, agent_store=True)
    store = dist.PrefixStore(module.PREFIX, client(members[dead], module.STORE_TIMEOUT))
    if dead == 1:
        Member(members[1], store, Waiting(members[1], 60))
    else:
        store.set("hello/0", "dead")
        store.set("hello/1", "dead too")
        store.set("seat/1", json.dumps(["dead too", "old token"]))
        store.set("old token/all", "")
        store.set("old token/open", "")
    with ThreadPoolExecutor(2) as pool:
        first, second = (future.result() for future in start(pool, members))
    assert first.token == second.token != "old token"


def test_a_process_that_dies_after_it_was_answered_is_replaced(agent):
    """Rank 2 joins late; rank 1 has confirmed, and has exited when the attempt would open."""
    members = launches(3, agent.port, agent_store=True)
    store = dist.PrefixStore(module.PREFIX, client(members[1], module.STORE_TIMEOUT))
    with ThreadPoolExecutor(3) as pool:
        store.set("hello/1", "dying")
        first = start(pool, members[:1])
        store.wait(["seat/1"])
        identity, token = json.loads(store.get("seat/1"))
        store.set(f"{token}/here/1/{identity}", "")
        rest = start(pool, members[2:])
        store.wait([f"{token}/all"])
        assert not store.check([f"{token}/open"])
        rest += start(pool, members[1:2])
        assert len({future.result().token for future in first + rest}) == 1


def test_a_first_process_that_dies_after_all_were_ready_is_replaced(agent):
    """Rank 1 has confirmed the answer of a rank 0 that has exited; it confirms the answer of the next one in both
    stages again.
    """
    members = launches(2, agent.port, agent_store=True)
    store = dist.PrefixStore(module.PREFIX, client(members[0], module.STORE_TIMEOUT))
    with ThreadPoolExecutor(2) as pool:
        second = start(pool, members[1:], 30)[0]
        store.wait(["hello/1"])
        identity = store.get("hello/1").decode()
        store.set("seat/1", json.dumps([identity, "old token"]))
        store.wait([f"old token/here/1/{identity}"])
        store.set("old token/all", "")
        store.wait([f"old token/ready/1/{identity}"])
        first = start(pool, members[:1], 30)[0]
        assert first.result().token == second.result().token != "old token"


def test_a_rank_is_taken_once():
    members = launches(2, free_port())
    with ThreadPoolExecutor(2) as pool:
        met = [future.result() for future in start(pool, members)]
        with pytest.raises(
            EnvironmentProblem, match=r"two processes have the same rank; where=by hand; got=rank 1 twice"
        ):
            claim_rank(members[1], 60)
    assert len(met) == 2


def test_a_rank_that_two_waiting_processes_have():
    """The one that came first sees it, and all learn of it."""
    members = launches(3, free_port())
    with ThreadPoolExecutor(3) as pool:
        futures = start(pool, [members[0], members[1], members[1]])
        errors = [future.exception() for future in futures]
    assert sum(isinstance(error, EnvironmentProblem) and "rank 1 twice" in error.line() for error in errors) >= 1, (
        errors
    )
    assert all(error.exit_code == 14 for error in errors), errors


def test_a_rank_of_a_running_attempt_is_taken(agent, monkeypatch):
    monkeypatch.setattr(module, "OLD_ATTEMPT_SECONDS", 0.2)
    members = launches(2, agent.port, agent_store=True)
    with ThreadPoolExecutor(2) as pool:
        met, _ = [future.result() for future in start(pool, members)]
    stopped = threading.Event()

    def beat() -> None:
        number = 0
        while not stopped.wait(0.05):
            met.keys("watchdog").set("beat/0", json.dumps({"n": (number := number + 1)}))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(EnvironmentProblem, match="rank 1 twice"):
            claim_rank(members[1], 60)
    finally:
        stopped.set()
        thread.join()


@pytest.mark.parametrize(("rank", "names"), [(0, "ranks 1, 3 of 4 have not joined"), (1, "rank 0 of 4 has not joined")])
def test_missing_ranks_are_reported_and_the_wait_ends(monkeypatch, capfd, rank, names):
    monkeypatch.setattr(module, "FIRST_LINE", 0.3)
    members = launches(4, free_port())
    with ThreadPoolExecutor(2) as pool:
        other = start(pool, [members[2]], 20) if rank == 0 else []
        with pytest.raises(HangError, match=rf"error\[12\] {names}; where=rank {rank}.*want=guard.hang_timeout"):
            claim_rank(members[rank], 2.0)
        for future in other:
            told = future.exception()
            assert isinstance(told, PeerRefused) and told.exit_code == 12 and names in told.line()
    assert f"rank {rank} waits: {names}" in capfd.readouterr().err


def test_a_name_that_cannot_be_resolved(capfd, monkeypatch):
    monkeypatch.setattr(module, "FIRST_LINE", 0.1)
    launch = LaunchInfo(1, 1, 2, "no-such-host.invalid", 29500)
    with pytest.raises(
        EnvironmentProblem,
        match=r"error\[14\] rank 0 of 2 has not joined; where=rank 1, store at no-such-host.invalid:29500",
    ):
        claim_rank(launch, 0.5)
    assert "no-such-host.invalid:29500: " in capfd.readouterr().err


def test_a_port_in_use():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        begin = time.monotonic()
        with pytest.raises(
            EnvironmentProblem,
            match=rf"error\[14\] rank 0 cannot listen on its port; where=127.0.0.1:{port}.*in use.*do=choose another "
            rf"port",
        ):
            claim_rank(launches(2, port)[0], 60)
        assert time.monotonic() - begin < 20


def test_another_program_on_the_port(monkeypatch):
    monkeypatch.setattr(module, "FOREIGN_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as other, ThreadPoolExecutor(1) as pool:
        future = start(pool, [launches(2, other.getsockname()[1])[1]])[0]
        other.settimeout(0.1)
        while not future.done():
            try:
                connection, _ = other.accept()
            except TimeoutError:
                continue
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        assert "is not a rendezvous store" in str(future.exception())


def test_the_refusal_of_a_process_ends_the_others():
    members = launches(3, free_port())
    with ThreadPoolExecutor(2) as pool:
        futures = start(pool, members[:2])
        store = dist.PrefixStore(module.PREFIX, reach_client(members[2]))
        store.set(REFUSED, json.dumps({**make_notice(2, 2, "error[2] unknown key"), "process": "another"}))
        for future in futures:
            told = future.exception()
            assert isinstance(told, PeerRefused) and told.exit_code == 2
            assert told.line() == "rank 2 did not start, so this process ends: error[2] unknown key"


def reach_client(launch: LaunchInfo) -> dist.TCPStore:
    module.reach(launch, Waiting(launch, 60))
    return client(launch, module.STORE_TIMEOUT)


def test_the_refusal_of_an_earlier_attempt_is_stale(agent):
    dist.PrefixStore(module.PREFIX, agent).set(
        REFUSED, json.dumps({**make_notice(1, 2, "error[2] unknown key"), "time": 1.0, "process": "x"})
    )
    with ThreadPoolExecutor(2) as pool:
        assert [future.exception() for future in start(pool, launches(2, agent.port, agent_store=True))] == [None, None]


def test_a_first_process_that_refuses_ends_the_others():
    members = launches(3, free_port())
    with ThreadPoolExecutor(2) as pool:
        futures = start(pool, members[1:])
        assert serve_refusal(members[0], make_notice(0, 14, "error[14] no torch"), 60) == 2
        assert [(type(future.exception()), future.exception().exit_code) for future in futures] == [
            (PeerRefused, 14)
        ] * 2


def test_an_address_of_ipv6():
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    members = [replace(launch, address="::1") for launch in launches(2, free_port())]
    with ThreadPoolExecutor(2) as pool:
        assert len({future.result().token for future in start(pool, members)}) == 1


@pytest.mark.parametrize(("ranks", "text"), [([1], "1"), ([1, 3, 4, 5, 9], "1, 3-5, 9"), ([0, 1], "0-1")])
def test_ranks_as_text(ranks, text):
    assert spans(ranks) == text


def test_no_limit_is_no_end():
    waiting = Waiting(LaunchInfo(0, 0, 2), 0.0)
    waiting.begin -= 1e6
    waiting.check([1], quiet=True)
    with pytest.raises(NeoxError):
        Waiting(LaunchInfo(0, 0, 2), -1.0).check([1])
