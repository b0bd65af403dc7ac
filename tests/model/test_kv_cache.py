"""The key-value cache: what is put in comes out, in order, and no more than fits goes in."""

import pytest
import torch

from neox.errors import ConfigError
from neox.model.kv_cache import KVCache


def test_updates_are_appended_per_layer():
    cache = KVCache(capacity=7)
    pieces = [torch.randn(3, s, 2, 4, generator=torch.Generator().manual_seed(s)) for s in (4, 1, 2)]
    for number, piece in enumerate(pieces):
        for layer in range(2):
            keys, values = cache.update(layer, piece + layer, piece - layer)
            expected = torch.cat(pieces[: number + 1], dim=1)
            assert torch.equal(keys, expected + layer)
            assert torch.equal(values, expected - layer)
        assert cache.length == sum(p.shape[1] for p in pieces[:number])
        cache.advance(piece.shape[1])
    assert cache.length == 7


def test_more_tokens_than_the_capacity_are_refused_and_nothing_is_overwritten():
    cache = KVCache(capacity=4)
    first = torch.ones(1, 3, 1, 2)
    keys, _ = cache.update(0, first, first)
    cache.advance(3)
    with pytest.raises(ConfigError, match=r"cache is full.*got=5 tokens; want=<= 4"):
        cache.update(0, torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2))
    assert torch.equal(keys, first)
