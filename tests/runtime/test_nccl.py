"""What a run asks of NCCL: backends, devices, timeouts and the order of groups, on a group that sends nothing.

torch's fake backend stands for NCCL, so that one process has the view of one rank of several.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from neox.checkpoint.background import Saver
from neox.checkpoint.consensus import RankGroup
from neox.checkpoint.manifest import Lineage
from neox.config.schema import ParallelConfig
from neox.engine.deepspeed_setup import ensure_process_group
from neox.parallel import p2p
from neox.parallel.mesh import Mesh
from neox.parallel.wait_tracker import MIN_GROUP_TIMEOUT, raise_group_timeouts
from neox.runtime.distributed import form_process_group
from neox.runtime.launch import LaunchInfo
from neox.runtime.rendezvous import Attempt
from tests.conftest import close_process_group

WORLD = 8


@dataclass
class Requests:
    """What was asked of torch.distributed and of torch.cuda, in order."""

    calls: list[tuple] = field(default_factory=list)

    def of(self, kind: str) -> list[tuple]:
        """Requests of one kind, without it."""
        return [call[1:] for call in self.calls if call[0] == kind]


@pytest.fixture
def requests(monkeypatch) -> Requests:
    """A machine of 8 GPUs whose NCCL is torch's fake backend."""
    if dist.is_initialized():  # by an engine of an earlier test
        close_process_group()
    out = Requests()
    init, new_group = dist.init_process_group, dist.new_group

    def init_process_group(backend, *, store=None, rank, world_size, device_id=None):
        out.calls.append(("init", backend, device_id))
        init("fake", store=FakeStore(), rank=rank, world_size=world_size)

    def make_group(ranks=None, backend=None, **options):
        out.calls.append(("group", None if ranks is None else tuple(ranks), backend))
        return new_group(ranks, backend="fake", **options)

    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setattr(dist, "new_group", make_group)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: WORLD)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: out.calls.append(("device", device)))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    yield out
    if dist.is_initialized():
        dist.destroy_process_group()


def join(rank: int, local_rank: int | None = None, **layout: int) -> Mesh:
    """Form the groups as rank `rank` of 8."""
    launch = LaunchInfo(rank, rank if local_rank is None else local_rank, WORLD)
    return form_process_group(ParallelConfig(**layout), launch, "cuda", Attempt(FakeStore(), "token"))


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_binds_its_gpu_before_nccl_starts(requests, rank):
    """An unbound communicator guesses its device at the first collective, on the wrong GPU if ranks are permuted."""
    device = torch.device("cuda", rank)
    mesh = join(rank)
    assert requests.calls[:2] == [("device", device), ("init", "nccl", device)]
    assert mesh.device == device


def test_the_only_visible_gpu_is_that_of_every_local_rank(requests, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    mesh = join(5)
    assert requests.of("init") == [("nccl", torch.device("cuda", 0))]
    ensure_process_group(mesh.device)  # DeepSpeed takes cuda:LOCAL_RANK
    assert (os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]) == ("0", "0")


def test_deepspeed_finds_the_index_of_the_gpu_and_not_the_rank_on_the_host(requests, monkeypatch):
    """mpirun's ranks 3 of a host, with one GPU visible each: DeepSpeed refuses variables that differ."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    ensure_process_group(torch.device("cuda", 0))
    assert (os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]) == ("0", "0")
    assert requests.of("init") == [("nccl", None)]
    monkeypatch.setenv("LOCAL_RANK", "3")
    ensure_process_group(torch.device("cpu"))
    assert os.environ["LOCAL_RANK"] == "3"


def test_every_rank_creates_the_same_groups_in_the_same_order(requests):
    """A communicator of a subset is split off by all ranks together: another order hangs."""
    orders = []
    for rank in (0, 3, 7):
        requests.calls.clear()
        mesh = join(rank, tensor=2, pipeline=2)
        assert (mesh.tp, mesh.pp, mesh.dp) == (2, 2, 2)
        orders.append(requests.of("group"))
        dist.destroy_process_group()
    assert orders[0] == orders[1] == orders[2]
    assert {backend for _, backend in orders[0]} == {None}  # that of the default group
    assert len(orders[0]) == len(set(orders[0]))


def test_no_group_times_out_before_the_watchdog(requests, monkeypatch):
    """NCCL's default of 10 minutes would abort first. torch sets timeouts of real backends only."""
    timeouts = {}
    monkeypatch.setattr(
        dist.distributed_c10d, "_set_pg_timeout", lambda timeout, group: timeouts.update({group: timeout})
    )
    join(0, tensor=2)
    raise_group_timeouts(1200.0)
    assert len(timeouts) > 2
    assert set(timeouts) == set(dist.distributed_c10d._world.pg_map)
    assert set(timeouts.values()) == {timedelta(seconds=MIN_GROUP_TIMEOUT)}


def test_checkpoints_are_written_over_gloo(requests, tmp_path):
    """The writer's thread must not use a stream of the GPU."""
    join(0)
    Saver(tmp_path, keep=1, lineage=Lineage("a", 0), rank=0, world_size=WORLD)
    assert requests.of("group")[-1] == (None, "gloo")


class Asked(Exception):
    """A device that was asked for."""


@pytest.mark.parametrize(("backend", "device"), [("gloo", "cpu"), ("nccl", "cuda")])
def test_messages_between_ranks_lie_where_the_backend_reads(requests, monkeypatch, backend, device):
    """NCCL takes tensors of a GPU only, gloo those of the CPU."""
    join(0)

    def zeros(*shape, dtype, device):
        raise Asked(device)

    monkeypatch.setattr(dist, "get_backend", lambda group=None: backend)
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(Asked, match=device):
        RankGroup(0, WORLD)._gather(b"1")


def test_stages_send_and_receive_in_one_batch(requests, monkeypatch):
    """Two stages that both send first wait for each other over NCCL."""
    mesh = join(2, pipeline=4)
    batches = []
    batch = dist.batch_isend_irecv
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda ops: batches.append(ops) or batch(ops))
    x, received = torch.ones(2), torch.zeros(2)
    assert (mesh.pp_rank, mesh.dp) == (1, 2)
    p2p.send_recv(mesh, [(x, 2)], [(received, 0)])
    (ops,) = batches
    assert [(op.op, op.peer) for op in ops] == [(dist.isend, 4), (dist.irecv, 0)]
    assert all(op.group is mesh.pp_group for op in ops)
