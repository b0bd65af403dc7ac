from __future__ import annotations

import math

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.model.init import fill, initial_value, standard_deviation
from neox.parallel.shard_spec import ShardSpec

SIZES = {"num_layers": 8, "hidden_size": 50, "num_attention_heads": 5, "vocab_size": 10, "init_std": 0.02}


@pytest.mark.parametrize(
    ("method", "want"),
    [
        ("normal", 0.02),
        ("scaled_normal", 0.02 / 4),
        ("small_init", math.sqrt(2 / 250)),
        ("wang_init", 2 / (8 * math.sqrt(50))),
    ],
)
def test_methods(method, want):
    config = ModelConfig(**SIZES, init=method, output_init="normal")
    assert standard_deviation(config, "layers.0.mlp.up.weight") == pytest.approx(want)
    config = ModelConfig(**SIZES, init="normal", output_init=method)
    for name in ("layers.3.attention.out.weight", "layers.3.mlp.down.weight"):
        assert standard_deviation(config, name) == pytest.approx(want)
    assert standard_deviation(config, "head.weight") == 0.02


def test_values_have_their_deviation():
    config = ModelConfig(**SIZES)
    value = initial_value(config, "layers.0.mlp.up.weight", (400, 500), seed=1)
    assert value.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(value.mean().item()) < 2e-4
    assert torch.equal(initial_value(config, "layers.0.mlp.up.bias", (3,), 1), torch.zeros(3))
    assert torch.equal(initial_value(config, "layers.0.norm1.weight", (3,), 1), torch.ones(3))


def test_fill_zeroes_padding():
    parameter = torch.full((4, 2), 9.0)
    fill(parameter, ShardSpec.sharded((7, 2), 0, 4, 8), torch.arange(14.0).view(7, 2))
    assert parameter.tolist() == [[8, 9], [10, 11], [12, 13], [0, 0]]
