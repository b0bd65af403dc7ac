from __future__ import annotations

import itertools
import re

import pytest

from neox.config.schema import ModelConfig
from neox.errors import ConfigError
from neox.model.partition import partition_layers, stage_costs, stage_layers
from neox.parallel.mesh import Mesh

SIZES = {
    "num_layers": 6,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "vocab_multiple": 8,
    "max_position_embeddings": 16,
}


def test_a_large_embedding_leaves_fewer_blocks_to_the_end_stages():
    # each table weighs as much as 4 blocks
    config = ModelConfig(**{**SIZES, "num_layers": 12, "vocab_size": 4 * 12 * 32})
    assert stage_costs(config, "parameters") == pytest.approx((4.0, 1.0, 4.0))
    assert [b - a for a, b in partition_layers(config, 4)] == [1, 5, 5, 1]
    assert [b - a for a, b in partition_layers(config, 4, "time")] == [4, 4, 3, 1]


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_a_reward_model_leaves_room_for_blocks(tied):
    config = ModelConfig(
        **{**SIZES, "num_layers": 12, "vocab_size": 4 * 12 * 32, "output": "score", "tie_embeddings": tied}
    )
    row = 1 / (12 * 32)  # of a block's 12 h^2 parameters, the h of one row
    assert stage_costs(config, "parameters") == pytest.approx((4.0, 1.0, row))
    assert stage_costs(config, "time") == pytest.approx((0.0, 1.0, row))
    assert [b - a for a, b in partition_layers(config, 4)] == [1, 4, 4, 3]
    assert [b - a for a, b in partition_layers(config, 4, "time")] == [3, 3, 3, 3]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 6])
def test_every_stage_has_a_block_and_every_block_a_stage(stages):
    cuts = partition_layers(ModelConfig(**SIZES), stages)
    assert [i for low, high in cuts for i in range(low, high)] == list(range(6))
    assert all(low < high for low, high in cuts)


def test_a_list_of_counts():
    assert partition_layers(ModelConfig(**SIZES), 3, [1, 2, 3]) == [(0, 1), (1, 3), (3, 6)]
    for wrong in ([1, 2], [1, 2, 4], [6, 0, 0]):
        with pytest.raises(ConfigError, match=r"parallel\.partition"):
            partition_layers(ModelConfig(**SIZES), 3, wrong)
    with pytest.raises(ConfigError, match="more stages than layers"):
        partition_layers(ModelConfig(**SIZES), 7)


def divisions(layers: int, stages: int):
    """Every division into stages of at least one block."""
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        yield list(itertools.pairwise([0, *cuts, layers]))


@pytest.mark.parametrize("method", ["parameters", "time"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("vocab_size", [50, 400, 1500, 7000])
@pytest.mark.parametrize(("layers", "stages"), [(1, 1), (4, 4), (5, 3), (7, 2), (9, 4), (8, 3)])
def test_no_other_division_is_cheaper_or_as_cheap_and_more_even(layers, stages, vocab_size, learned, method):
    options = {"position_embedding": "learned", "max_position_embeddings": 900} if learned else {}
    config = ModelConfig(**SIZES | {"num_layers": layers, "vocab_size": vocab_size} | options)
    h = 32
    table = vocab_size * h / (12 * h * h)
    first = 0.0 if method == "time" else table + (900 * h / (12 * h * h) if learned else 0.0)
    assert stage_costs(config, method) == pytest.approx((first, 1.0, table))

    def price(division) -> tuple[float, float]:
        costs = [float(high - low) for low, high in division]
        costs[0] += first
        costs[-1] += table
        return round(max(costs), 9), round(sum(cost * cost for cost in costs), 9)

    assert price(partition_layers(config, stages, method)) == min(map(price, divisions(layers, stages)))


def test_a_stage_holds_its_own_part_of_the_division():
    config = ModelConfig(**SIZES)
    meshes = [Mesh(pp=3, tp=2, rank=rank) for rank in (0, 1, 2, 5)]
    assert [stage_layers(config, mesh, [1, 2, 3]) for mesh in meshes] == [(0, 1), (0, 1), (1, 3), (3, 6)]
    assert stage_layers(config, Mesh(), [6]) == stage_layers(config, Mesh()) == (0, 6)
    meshes = [Mesh(pp=2, rank=rank) for rank in range(2)]
    large = config.model_copy(update={"vocab_size": 4 * 12 * 32})
    assert (
        [stage_layers(large, mesh, "time") for mesh in meshes] == partition_layers(large, 2, "time") == [(0, 5), (5, 6)]
    )


@pytest.mark.parametrize("counts", [[3, 3, 0], [7, -1, 0], [2, 2, 2, 0], [6], []])
def test_counts_that_are_no_division_are_shown(counts):
    match = rf"parallel\.partition; got={re.escape(str(counts))}; want=3 numbers .* model\.num_layers = 6"
    with pytest.raises(ConfigError, match=match):
        partition_layers(ModelConfig(**SIZES), 3, counts)
