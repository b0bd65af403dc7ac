"""Joining a launch alone; tests/runtime/test_rendezvous.py has the others."""

from __future__ import annotations

import atexit

import pytest
import torch
import torch.distributed as dist

from neox.config.schema import ParallelConfig
from neox.errors import EnvironmentProblem
from neox.runtime import distributed as module
from neox.runtime.distributed import init_distributed, local_device
from neox.runtime.launch import LaunchInfo
from neox.runtime.rendezvous import Attempt


def test_alone_there_is_nothing_to_join():
    mesh = init_distributed(ParallelConfig(), LaunchInfo(), "cpu")
    assert (mesh.world_size, mesh.rank, mesh.device.type) == (1, 0, "cpu")


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(0, 1, 0), (3, 1, 0), (3, 8, 3), (0, 8, 0)])
def test_a_process_takes_its_gpu_or_the_only_one_that_it_sees(local_rank, visible, index, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    assert local_device(LaunchInfo(local_rank, local_rank, 8), "cuda").index == index
    assert local_device(LaunchInfo(local_rank, local_rank, 8), "cpu").type == "cpu"


def test_fewer_gpus_than_processes_are_an_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert local_device(LaunchInfo(3, 3, 8), "cuda").index == 3
    for rank in (4, 5):
        with pytest.raises(
            EnvironmentProblem,
            match=rf"more processes than GPUs on this machine; where=by hand; got=local rank {rank}, 4 GPUs visible",
        ):
            local_device(LaunchInfo(rank, rank, 8, source="by hand"), "cuda")


@pytest.fixture
def joined(monkeypatch):
    """What the process group and the mesh are made with; neither is made."""
    made = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: made.append((backend, options)))
    monkeypatch.setattr(module, "create_mesh", lambda *sizes, **options: made.append((sizes, options)))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(atexit, "register", made.append)
    return made


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_the_process_group_and_the_mesh_are_made_with(joined, device):
    layout = ParallelConfig(tensor=2, pipeline=3, context=4, sequence=True)
    launch = LaunchInfo(rank=5, local_rank=1, world_size=24)
    attempt = Attempt(store := dist.HashStore(), "token")
    module.form_process_group(layout, launch, device, attempt)
    here = torch.device("cuda", 1) if device == "cuda" else torch.device("cpu")
    assert joined[:-3] == ([here] if device == "cuda" else [])
    (backend, options), closes, mesh = joined[-3:]
    options.pop("store").set("key", "value")
    assert store.get("token/group/key") == b"value"
    bound = here if device == "cuda" else None
    assert (backend, options) == (
        "nccl" if device == "cuda" else "gloo",
        {"rank": 5, "world_size": 24, "device_id": bound},
    )
    assert closes is module.destroy
    assert mesh == ((2, 3, here), {"context": 4, "sequence": True})


@pytest.mark.parametrize(("world_size", "limits"), [(1, []), (2, [7.0])])
def test_several_processes_claim_their_rank_within_the_limit(joined, monkeypatch, world_size, limits):
    claimed = []

    def claim(launch, limit):
        claimed.append(limit)
        return Attempt(dist.HashStore(), "token")

    monkeypatch.setattr(module, "claim_rank", claim)
    init_distributed(ParallelConfig(), LaunchInfo(world_size=world_size), "cpu", limit=7.0)
    assert claimed == limits
    assert [made[0] for made in joined[:1]] == (["gloo"] if limits else [(1, 1, torch.device("cpu"))])


def test_a_group_is_destroyed_if_there_is_one(tmp_path):
    module.destroy()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    module.destroy()
    assert not dist.is_initialized()
