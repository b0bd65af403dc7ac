"""How the blocks are divided among pipeline stages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from neox.config.schema import ModelConfig
from neox.errors import ConfigError
from neox.model.shapes import block_parameters, head_rows

if TYPE_CHECKING:  # the plan divides layers without torch
    from neox.parallel.mesh import Mesh


def stage_layers(config: ModelConfig, mesh: Mesh, partition: str | Sequence[int] = "parameters") -> tuple[int, int]:
    """(first, end) of the blocks that this process's stage holds; arguments and errors as for `partition_layers`."""
    if mesh.pp == 1:
        return 0, config.num_layers
    return partition_layers(config, mesh.pp, partition)[mesh.pp_rank]


def partition_layers(
    config: ModelConfig, stages: int, partition: str | Sequence[int] = "parameters"
) -> list[tuple[int, int]]:
    """(first, end) of the blocks of every stage, end exclusive; each stage has at least one block.

    Args:
        config: the architecture.
        stages: parallel.pipeline.
        partition: "parameters" or "time", which make the most expensive stage as cheap as possible, or the number of
            blocks of every stage.

    Raises:
        ConfigError: more stages than blocks, or numbers that do not add up to num_layers.
    """
    layers = config.num_layers
    if not isinstance(partition, str):
        counts = list(partition)
        if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
            raise ConfigError(
                "parallel.partition does not sum to num_layers",
                where="parallel.partition",
                got=counts,
                want=f"{stages} numbers above 0 that add up to model.num_layers = {layers}",
            )
        ends = [sum(counts[: i + 1]) for i in range(stages)]
        return list(zip([0, *ends[:-1]], ends, strict=True))
    if stages > layers:
        raise ConfigError(
            "more stages than layers",
            where="parallel.pipeline",
            got=stages,
            want=f"at most model.num_layers = {layers}",
        )
    return _balance(layers, stages, stage_costs(config, partition))


def stage_costs(config: ModelConfig, method: str) -> tuple[float, float, float]:
    """Costs of (embedding, one block, head), in units of the cost of one block.

    Args:
        config: the architecture.
        method: "parameters" counts parameters; a tied head counts too, because the last stage has a copy of the table.
            "time" counts matrix products of forward and backward; an embedding lookup costs nothing in comparison.
    """
    block = float(block_parameters(config))
    head = head_rows(config) * config.hidden_size / block
    if method == "time":
        return 0.0, 1.0, head
    rows = config.vocab_size + (config.max_position_embeddings if config.position_embedding == "learned" else 0)
    return rows * config.hidden_size / block, 1.0, head


def _balance(layers: int, stages: int, costs: tuple[float, float, float]) -> list[tuple[int, int]]:
    """The division whose most expensive stage is cheapest; among equals the most even one (least sum of squares)."""
    first, block, last = costs

    def cost(stage: int, count: int) -> float:
        return count * block + (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)

    # per stage: blocks placed so far -> (largest cost, sum of squares, blocks of this stage)
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for stage in range(stages):
        row: dict[int, tuple[float, float, int]] = {}
        for placed, (largest, squares, _) in best[-1].items():
            for count in range(1, layers - placed - (stages - stage - 1) + 1):
                price = cost(stage, count)
                candidate = (max(largest, price), squares + price * price, count)
                if placed + count not in row or candidate < row[placed + count]:
                    row[placed + count] = candidate
        best.append(row)
    ends = [layers]
    for stage in range(stages, 0, -1):
        ends.append(ends[-1] - best[stage][ends[-1]][2])
    ends.reverse()
    return list(itertools.pairwise(ends))
