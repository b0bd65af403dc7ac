from __future__ import annotations

import dataclasses

import pytest
import torch

from neox.errors import ConfigError
from neox.parallel.linear import ColumnParallelLinear, RowParallelLinear
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
