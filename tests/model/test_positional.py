from __future__ import annotations

import math

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.errors import ConfigError
from neox.model.positional import PositionEmbedding, RotaryTable, alibi_slopes
from neox.parallel.mesh import Mesh

SIZES = {"num_layers": 1, "hidden_size": 48, "num_attention_heads": 4, "vocab_size": 10, "max_position_embeddings": 100}
CPU = torch.device("cpu")


def angle(position: int, channel: int, channels: int, theta: float = 10000.0) -> float:
    return position * theta ** (-2 * (channel % (channels // 2)) / channels)


def test_table_is_cos_and_sin_of_position_times_frequency():
    cos, sin = RotaryTable(ModelConfig(**SIZES, rotary_pct=0.5)).rows(3, 5, None, 8, CPU)
    want = torch.tensor(
        [[angle(position, channel, 6) for channel in range(6)] for position in range(3, 8)], dtype=torch.float64
    )
    assert cos.dtype == torch.float32
    assert torch.allclose(cos.double(), want.cos(), atol=1e-6)
    assert torch.allclose(sin.double(), want.sin(), atol=1e-6)


def test_rows_by_position_ids_and_growth():
    table = RotaryTable(ModelConfig(**SIZES))
    short, _ = table.rows(0, 4, None, 4, CPU)
    long, _ = table.rows(0, 100, None, 100, CPU)
    assert torch.equal(short, long[:4])
    ids = torch.tensor([[5, 0, 99], [1, 1, 2]])
    cos, _ = table.rows(0, 3, ids, 100, CPU)
    assert torch.equal(cos, long[ids])


def test_table_is_reused():
    table = RotaryTable(ModelConfig(**SIZES))
    first, _ = table.rows(0, 70, None, 70, CPU)
    assert table.rows(0, 60, None, 60, CPU)[0].data_ptr() == first.data_ptr()


def test_dynamic_ntk_depends_on_the_length():
    config = ModelConfig(**SIZES, rope_scaling={"type": "ntk", "factor": 2.0, "original_max_position_embeddings": 50})
    table, plain = RotaryTable(config), RotaryTable(ModelConfig(**SIZES))
    assert torch.allclose(table.rows(0, 40, None, 40, CPU)[0], plain.rows(0, 40, None, 40, CPU)[0], atol=1e-6)
    assert (table.rows(0, 80, None, 80, CPU)[0][:40] - plain.rows(0, 40, None, 40, CPU)[0]).abs().max() > 0.1
    assert torch.allclose(table.rows(0, 40, None, 40, CPU)[0], plain.rows(0, 40, None, 40, CPU)[0], atol=1e-6)


def test_too_few_channels():
    with pytest.raises(ConfigError, match=r"model\.rotary_pct"):
        RotaryTable(ModelConfig(**SIZES, rotary_pct=0.1))


def test_learned_positions():
    table = PositionEmbedding(9, 4)
    torch.nn.init.normal_(table.weight)
    assert torch.equal(table(2, 3, None), table.weight[2:5])
    assert torch.equal(table(0, 2, torch.tensor([[8, 1]])), table.weight[[8, 1]][None])


def test_alibi_slopes():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1) == [2.0**-8]
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]


def published_slopes(n: int) -> list[float]:
    """The code of the authors (arXiv:2108.12409, appendix)."""

    def of_a_power(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(n).is_integer():
        return of_a_power(n)
    closest = 2 ** math.floor(math.log2(n))
    return of_a_power(closest) + published_slopes(2 * closest)[0::2][: n - closest]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 7, 8, 12, 16, 20, 40, 71, 112])
def test_slopes_are_those_of_the_authors(heads):
    assert alibi_slopes(heads) == pytest.approx(published_slopes(heads), rel=1e-12)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 99, 100])
def test_a_table_has_all_positions_up_to_the_longest(length):
    table, whole = RotaryTable(ModelConfig(**SIZES)), RotaryTable(ModelConfig(**SIZES)).rows(0, 100, None, 100, CPU)
    table.rows(0, 1, None, max(1, length - 1), CPU)  # one row fewer
    for start in (0, length - 1):
        cos, sin = table.rows(start, length - start, None, length, CPU)
        assert torch.equal(cos, whole[0][start:length]) and torch.equal(sin, whole[1][start:length])
    ids = torch.tensor([[length - 1, 0]])
    cos, sin = table.rows(0, 2, ids, length, CPU)
    assert torch.equal(cos, whole[0][ids]) and torch.equal(sin, whole[1][ids])


def test_scaling_base_and_share_of_the_config_reach_the_table():
    scaling = {"type": "linear", "factor": 4.0}
    config = ModelConfig(**SIZES, rotary_pct=0.5, rope_theta=500.0, rope_scaling=scaling)
    cos, _ = RotaryTable(config).rows(0, 9, None, 9, CPU)
    want = torch.tensor([[angle(position / 4, channel, 6, 500.0) for channel in range(6)] for position in range(9)])
    assert torch.allclose(cos, want.cos(), atol=1e-6)
    static = RotaryTable(ModelConfig(**SIZES, rope_scaling={"type": "ntk", "factor": 2.0}))
    assert not static.dynamic and static.original_length is None
    assert torch.equal(static.rows(0, 9, None, 9, CPU)[0], static.rows(0, 9, None, 90, CPU)[0])


@pytest.mark.parametrize("sequence", [False, True])
def test_the_gradient_of_positions_is_summed_under_sequence_parallelism(sequence):
    table = PositionEmbedding(9, 4, Mesh(tp=2, sequence=sequence), dtype=torch.bfloat16)
    spec = table.sharding["weight"]
    assert (spec.partial, spec.dim, spec.slices, table.weight.dtype) == (
        sequence,
        None,
        ((0, 9), (0, 4)),
        torch.bfloat16,
    )


def test_rows_of_each_length_are_those_of_a_table_of_it():
    config = ModelConfig(**SIZES, rope_scaling={"type": "ntk", "factor": 2.0, "original_max_position_embeddings": 8})
    ids = torch.tensor([[0, 0, 1], [3, 9, 2], [19, 18, 4], [9, 8, 7]])
    cos, sin = RotaryTable(config).rows_by_length(ids)
    for row, length in enumerate((2, 10, 20, 10)):
        want = RotaryTable(config).rows(0, length, None, length, CPU)
        assert torch.equal(cos[row], want[0][ids[row]]) and torch.equal(sin[row], want[1][ids[row]])
