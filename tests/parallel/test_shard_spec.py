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


def test_slices_of_every_dimension():
    logical = torch.arange(60).view(3, 4, 5)
    for dim, low, high in ((0, 1, 3), (1, 0, 2), (2, 3, 5)):
        spec = ShardSpec.sharded((3, 4, 5), dim, low, high)
        assert (spec.shape, spec.dim, spec.partial) == ((3, 4, 5), dim, False)
        assert torch.equal(spec.take(logical), logical.narrow(dim, low, high - low))
        assert spec.local_shape == spec.take(logical).shape and spec.numel == spec.take(logical).numel()
        assert spec.take(logical).data_ptr() == logical.narrow(dim, low, high - low).data_ptr()
    whole = ShardSpec.replicated(3, 4, partial=True)
    assert whole == ShardSpec((3, 4), ((0, 3), (0, 4)), None, True) and whole.numel == 12
    assert not ShardSpec.replicated(3).partial
