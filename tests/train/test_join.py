"""Joining a launch: alone, with others, and where a rank is taken twice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from neox.config.schema import ParallelConfig
from neox.errors import EnvironmentProblem
from neox.train.join import join, register
from neox.train.place import Place
from tests.distributed import free_port


def test_alone_there_is_nothing_to_join():
    mesh = join(ParallelConfig(), Place(), "cpu")
    assert (mesh.world_size, mesh.rank, mesh.device.type) == (1, 0, "cpu")


def test_a_rank_is_taken_once():
    port = free_port()
    places = [Place(rank, rank, 2, "127.0.0.1", port, "by hand") for rank in (0, 1, 1)]
    with ThreadPoolExecutor(2) as threads:
        first, second = (threads.submit(register, place) for place in places[:2])
        stores = [first.result(30), second.result(30)]
    with pytest.raises(EnvironmentProblem, match=r"two processes have the same rank; where=by hand; got=rank 1 twice"):
        register(places[2])
    assert len(stores) == 2
