from __future__ import annotations

import torch

from neox.parallel.shard_spec import ShardSpec


def test_clips_padding():
    spec = ShardSpec.sharded((10, 3), 0, 8, 12)
    assert spec.slices == ((8, 10), (0, 3))
    assert (spec.local_shape, spec.numel) == ((2, 3), 6)
    beyond = ShardSpec.sharded((10, 3), 0, 12, 16)
    assert (beyond.slices[0], beyond.numel) == ((10, 10), 0)


def test_takes_and_unpads():
    logical = torch.arange(30).view(10, 3)
    spec = ShardSpec.sharded((10, 3), 0, 8, 12)
    assert torch.equal(spec.take(logical), logical[8:])
    assert torch.equal(spec.unpad(torch.arange(12).view(4, 3)), torch.arange(6).view(2, 3))
    assert torch.equal(ShardSpec.replicated(10, 3).take(logical), logical)
