from __future__ import annotations

import dataclasses

import pytest
import torch

from neox.errors import ConfigError
from neox.parallel.linear import ColumnParallelLinear, RowParallelLinear, column_products, reduce_partial
from neox.parallel.mesh import Mesh


def member(tp_rank: int) -> Mesh:
    return dataclasses.replace(Mesh.single("meta"), tp=2, rank=tp_rank)


def filled(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return layer


def test_column_parallel_bias_can_be_left_to_the_activation():
    layer = filled(ColumnParallelLinear(7, 6, Mesh.single(), units=3, what="x", bias=True, dtype=torch.float32))
    x = torch.randn(2, 5, 7)
    assert torch.allclose(layer(x), x @ layer.weight.T + layer.bias, atol=1e-6)
    assert torch.allclose(layer(x, add_bias=False), x @ layer.weight.T, atol=1e-6)


def test_row_parallel_partial_has_no_bias():
    layer = filled(RowParallelLinear(7, 6, Mesh.single(), units=7, what="x", bias=True, dtype=torch.float32))
    x = torch.randn(2, 5, 7)
    assert torch.allclose(layer(x), x @ layer.weight.T + layer.bias, atol=1e-6)
    assert torch.allclose(layer(x, partial=True), x @ layer.weight.T, atol=1e-6)


def test_gradients_reach_weight_and_bias():
    layer = filled(RowParallelLinear(7, 6, Mesh.single(), units=7, what="x", bias=True, dtype=torch.float32))
    layer(torch.ones(3, 7)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((6,), 3.0))
    assert torch.equal(layer.weight.grad, torch.full((6, 7), 3.0))


def test_shards_are_rows_and_columns_of_complete_units():
    column = ColumnParallelLinear(7, 20, member(1), units=4, what="x", bias=True, dtype=torch.float32)
    assert column.sharding["weight"].slices == ((10, 20), (0, 7))
    assert column.sharding["bias"].slices == ((10, 20),)
    row = RowParallelLinear(20, 7, member(1), units=4, what="x", bias=True, dtype=torch.float32)
    assert row.sharding["weight"].slices == ((0, 7), (10, 20))
    assert row.sharding["bias"].slices == ((0, 7),)
    assert (column.weight.shape, row.weight.shape) == ((10, 7), (7, 10))


def test_units_are_not_divided():
    with pytest.raises(ConfigError, match=r"model\.num_kv_heads is not a multiple.*3 over 2"):
        ColumnParallelLinear(7, 30, member(0), units=3, what="model.num_kv_heads", bias=False, dtype=torch.float32)


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_an_adapter_is_cut_as_its_weight_is(kind):
    """The factor that is not cut gets a part of its gradient on each process."""
    layer = kind(12, 20, member(1), units=4, what="x", bias=False, dtype=torch.bfloat16)
    layer.add_adapter(3, 0.5)
    a, b = layer.sharding["lora_a"], layer.sharding["lora_b"]
    assert (a.shape, b.shape) == ((3, 12), (20, 3))
    if kind is ColumnParallelLinear:
        assert (a.slices, a.dim, a.partial) == (((0, 3), (0, 12)), None, True)
        assert (b.slices, b.dim, b.partial) == (((10, 20), (0, 3)), 0, False)
    else:
        assert (a.slices, a.dim, a.partial) == (((0, 3), (6, 12)), 1, False)
        assert (b.slices, b.dim, b.partial) == (((0, 20), (0, 3)), None, True)
    assert (layer.lora_a.shape, layer.lora_b.shape) == (a.local_shape, b.local_shape)
    assert layer.lora_a.dtype == layer.lora_b.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_an_adapter_is_added_to_the_weight_by_its_scale(kind):
    layer = kind(7, 6, Mesh.single(), units=1, what="x", bias=True, dtype=torch.float32)
    filled(layer)
    assert layer.matrix() is layer.weight and layer.scale == 0.0
    layer.add_adapter(2, 0.25)
    filled(layer)
    want = layer.weight + 0.25 * layer.lora_b @ layer.lora_a
    x = torch.randn(2, 5, 7)
    torch.testing.assert_close(layer.matrix(), want)
    torch.testing.assert_close(layer(x), x @ want.T + layer.bias)
    bare = layer(x, partial=True) if kind is RowParallelLinear else layer(x, add_bias=False)
    torch.testing.assert_close(bare, x @ want.T)


@pytest.mark.parametrize("sequence", [False, True])
def test_the_bias_after_the_sum_is_partial_under_sequence_parallelism(sequence):
    """Each process then adds it to its own tokens."""
    mesh = dataclasses.replace(member(0), sequence=sequence)
    row = RowParallelLinear(20, 7, mesh, units=4, what="x", bias=True, dtype=torch.float32)
    column = ColumnParallelLinear(20, 8, mesh, units=4, what="x", bias=True, dtype=torch.float32)
    assert (row.sharding["bias"].partial, row.sharding["weight"].partial) == (sequence, False)
    assert not column.sharding["bias"].partial and not column.sharding["weight"].partial
    assert ColumnParallelLinear(2, 8, mesh, units=4, what="x", bias=False, dtype=torch.float32).bias is None


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_units_that_the_group_does_not_divide_are_named(kind):
    with pytest.raises(ConfigError, match=r"model\.heads is not a multiple.*got=3 over 2"):
        kind(30, 30, member(0), units=3, what="model.heads", bias=False, dtype=torch.float32)


def test_products_without_a_group_are_those_of_each_weight():
    x, weights = torch.randn(2, 5, 7), (torch.randn(3, 7), torch.randn(4, 7))
    biases = (None, torch.randn(4))
    products = column_products(x, Mesh.single(), weights, biases)
    for product, weight, bias in zip(products, weights, biases, strict=True):
        torch.testing.assert_close(product, torch.nn.functional.linear(x, weight, bias))
    assert reduce_partial(x, Mesh.single()) is x
