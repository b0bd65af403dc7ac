from __future__ import annotations

import pytest

from neox.config.schema import ModelConfig
from neox.errors import ConfigError
from neox.model.partition import partition_layers, stage_costs

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
