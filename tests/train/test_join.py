"""Joining a launch alone; tests/train/test_attempt.py has the others."""

from __future__ import annotations

from neox.config.schema import ParallelConfig
from neox.train.join import join
from neox.train.place import Place


def test_alone_there_is_nothing_to_join():
    mesh = join(ParallelConfig(), Place(), "cpu")
    assert (mesh.world_size, mesh.rank, mesh.device.type) == (1, 0, "cpu")
