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
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from neox.errors import EnvironmentProblem, HangError, NeoxError, PeerLost
from neox.runtime import rendezvous as module
from neox.runtime.launch import LaunchInfo
from neox.runtime.rendezvous import Member, PeerRefused, Waiting, claim_rank, client, spans
from neox.runtime.store_protocol import REFUSED, make_notice, process_name, serve_refusal
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


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, and the sleeps."""
    now, naps = [100.0], []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=naps.append, time=time.time))
    return now, naps


def test_a_wait_is_reported_at_intervals_that_double_up_to_a_minute(clock, capfd):
    now, naps = clock
    waiting, printed = Waiting(LaunchInfo(0, 0, 5), 0.0), []
    for second in range(300):
        now[0] = 100.0 + second
        waiting.check([1, 3, 4], "still")
        printed += [second] if capfd.readouterr().err else []
    assert printed == [6, 17, 38, 79, 140, 201, 262]
    quiet = Waiting(LaunchInfo(0, 0, 5), 0.0)
    now[0] += 5.0
    quiet.check([1])
    now[0] += 1.0
    quiet.check([1], quiet=True)
    assert capfd.readouterr().err == ""
    quiet.check([1], "why")
    assert capfd.readouterr().err == "rank 0 waits: rank 1 of 5 has not joined after 6 s (why)\n"
    for seconds in (1.9, 2.1):
        quiet.begin = now[0] - seconds
        quiet.sleep()
    assert naps == [0.02, 0.2]


def test_the_limit_ends_the_wait_after_it_and_not_at_it(clock):
    now, _ = clock
    waiting = Waiting(LaunchInfo(2, 1, 5, "host", 7), 30.0)
    now[0] += 30.0
    waiting.check([1], quiet=True)
    now[0] += 1.0
    with pytest.raises(EnvironmentProblem) as problem:
        waiting.check([0, 1, 4], "still", kind=EnvironmentProblem)
    assert problem.value.what == "ranks 0-1, 4 of 5 have not joined"
    assert (problem.value.where, problem.value.got) == ("rank 2, store at host:7", "waited 31 s, still")


def make_member(rank: int = 1, *, agent_store: bool = False) -> Member:
    launch = LaunchInfo(rank, rank, 3, "host", 7, "by hand", agent_store)
    return Member(launch, dist.HashStore(), Waiting(launch, 60))


@pytest.mark.parametrize(
    ("change", "agent_store", "refused"),
    [
        ({"process": "another"}, False, True),
        ({"process": "another"}, True, True),
        ({"process": "id"}, False, False),
        ({"process": "name"}, False, False),
        ({"process": "another", "time": 1.0}, True, False),  # of an attempt before this process
        ({"process": "another", "time": 1.0}, False, True),  # no store outlives its processes without an agent
        ({"process": "another", "code": None}, False, False),
    ],
)
def test_whose_refusal_ends_a_process(change, agent_store, refused):
    member = make_member(agent_store=agent_store)
    member.check_refused()
    names = {"id": member.id, "name": process_name(), "another": "another"}
    notice = {**make_notice(2, 3, "error[3] x"), **change, "process": names[change["process"]]}
    member.store.set(REFUSED, json.dumps(notice))
    if refused:
        with pytest.raises(PeerRefused) as told:
            member.check_refused()
        assert (told.value.exit_code, told.value.notice) == (3, notice)
    else:
        member.check_refused()


@pytest.mark.parametrize(("rank", "agent_store", "nap"), [(0, False, 1.0), (0, True, 0.0), (1, False, 0.0)])
def test_the_process_of_the_store_gives_the_others_time_to_read_its_error(clock, rank, agent_store, nap):
    member = make_member(rank, agent_store=agent_store)
    member.post(HangError("rank 2 has not joined"))
    notice = json.loads(member.store.get(REFUSED))
    assert (notice["rank"], notice["code"], notice["line"]) == (rank, 12, "error[12] rank 2 has not joined")
    assert notice["process"] == member.id and clock[1] == [nap]
    member.check_refused()  # its own


@pytest.mark.parametrize(
    ("rank", "agent_store", "address"), [(0, False, "127.0.0.1"), (0, True, "far"), (1, False, "far"), (1, True, "far")]
)
def test_where_a_process_connects_to(monkeypatch, rank, agent_store, address):
    monkeypatch.setattr(dist, "TCPStore", lambda *arguments, **options: (arguments, options))
    arguments, options = client(LaunchInfo(rank, 0, 2, "far", 7, "", agent_store), module.STORE_TIMEOUT)
    assert arguments == (address, 7, None, False)
    assert options == {"wait_for_workers": False, "timeout": module.STORE_TIMEOUT}


def test_a_store_that_exits_during_the_wait_is_a_lost_peer(monkeypatch):
    class Exiting:
        def __init__(self, launch, store, waiting):
            pass

        def follow(self):
            raise RuntimeError("Connection reset by peer " + "x" * 200 + "\nand a trace")

    monkeypatch.setattr(module, "open_store", lambda launch, waiting: dist.HashStore())
    monkeypatch.setattr(module, "Member", Exiting)
    with pytest.raises(PeerLost, match="rendezvous store was lost; where=rank 1, store at host:7") as problem:
        claim_rank(LaunchInfo(1, 1, 2, "host", 7))
    assert problem.value.got == "Connection reset by peer " + "x" * 95
