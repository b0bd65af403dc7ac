from __future__ import annotations

import hashlib
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


def test_a_value_is_drawn_from_the_hash_of_seed_and_name():
    """Written out, so that no release changes what a seed starts from."""
    name, config = "layers.0.mlp.up.weight", ModelConfig(**SIZES)
    digest = hashlib.sha256(f"7/init/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    want = torch.randn(5, 7, generator=generator) * 0.02
    found = initial_value(config, name, (5, 7), seed=7)
    assert (found.dtype, found.device.type) == (torch.float32, "cpu")
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)
    assert torch.equal(found, initial_value(config, name, (5, 7), 7))
    assert not torch.equal(found, initial_value(config, name, (5, 7), 8))


def test_an_adapter_starts_from_the_width_of_its_input_and_from_zero():
    config = ModelConfig(**SIZES, init="small_init")
    factor = initial_value(config, "layers.0.attention.out.lora_a", (400, 625), seed=1)
    assert factor.std().item() == pytest.approx(1 / 25, rel=0.01)
    assert not initial_value(config, "layers.0.attention.out.lora_b", (625, 400), seed=1).any()


def test_names_that_write_to_the_residual_stream():
    config = ModelConfig(**SIZES, init="normal", output_init="scaled_normal")
    for name, scaled in (
        ("layers.3.attention.out.weight", True),
        ("layers.3.mlp.down.weight", True),
        ("layers.3.attention.qkv.weight", False),
        ("layers.3.mlp.up.weight", False),
        ("layers.3.mlp.gate.weight", False),
        ("embedding.word.weight", False),
        ("embedding.position.weight", False),
        ("head.weight", False),
        ("score.weight", False),
    ):
        assert standard_deviation(config, name) == pytest.approx(0.005 if scaled else 0.02), name


def test_fill_takes_the_slice_of_this_process_in_its_dtype():
    logical = torch.arange(14.0).view(2, 7) + 0.001
    parameter = torch.nn.Parameter(torch.full((2, 3), 9.0, dtype=torch.bfloat16))
    fill(parameter, ShardSpec.sharded((2, 7), 1, 4, 7), logical)
    assert torch.equal(parameter, logical[:, 4:].bfloat16()) and parameter.grad_fn is None
