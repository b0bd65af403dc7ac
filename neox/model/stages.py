"""Which blocks each pipeline stage holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from neox.config.schema import ModelConfig
from neox.errors import ConfigError
from neox.model.adapters import adapter_shapes


def block_parameters(config: ModelConfig) -> int:
    """Elements of the matrices of one block (vectors are left out: they don't weigh)."""
    qkv = (config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim
    attention = config.hidden_size * (qkv + config.num_attention_heads * config.head_dim)
    return attention + (3 if config.gated else 2) * config.hidden_size * config.intermediate_size


def stage_costs(config: ModelConfig, method: str) -> tuple[float, float, float]:
    """Cost of (embedding, one block, head) in units of one block's.

    "parameters": what each holds; a tied head counts too, for the last stage keeps a copy of the table. "time": matrix products of the
    forward and backward; looking up an embedding costs nothing beside them.
    """
    block = float(block_parameters(config))
    table = float(config.vocab_size * config.hidden_size)
    if method == "time":
        return 0.0, 1.0, table / block
    positions = config.max_position_embeddings * config.hidden_size if config.position_embedding == "learned" else 0
    return (table + positions) / block, 1.0, table / block


def partition_layers(config: ModelConfig, stages: int, partition: str | Sequence[int] = "parameters") -> list[tuple[int, int]]:
    """(first, behind the last) block of every stage; each stage has at least one.

    Args:
        config: the architecture.
        stages: parallel.pipeline.
        partition: "parameters" or "time", which make the largest stage as small as they can, or the number of blocks of every stage.

    Raises:
        ConfigError: more stages than blocks, or numbers that do not add up to num_layers.
    """
    layers = config.num_layers
    if not isinstance(partition, str):
        counts = list(partition)
        if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
            raise ConfigError(
                "the list does not share out the layers",
                where="parallel.partition",
                got=counts,
                want=f"{stages} numbers above 0 that add up to model.num_layers = {layers}",
            )
        ends = [sum(counts[: i + 1]) for i in range(stages)]
        return list(zip([0, *ends[:-1]], ends, strict=True))
    if stages > layers:
        raise ConfigError("more stages than layers", where="parallel.pipeline", got=stages, want=f"at most model.num_layers = {layers}")
    return _balance(layers, stages, stage_costs(config, partition))


def _balance(layers: int, stages: int, costs: tuple[float, float, float]) -> list[tuple[int, int]]:
    """The cut whose most expensive stage is cheapest; among equals the one whose stages differ least (sum of squares)."""
    first, block, last = costs

    def cost(stage: int, count: int) -> float:
        return count * block + (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)

    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]  # per stage: blocks placed so far -> (largest, squares, blocks of this stage)
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


def logical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and logical shape of every parameter of the whole model, in the order of the layers; tied weights once."""
    h, f = config.hidden_size, config.intermediate_size
    norm = {"weight": (h,), **({"bias": (h,)} if config.norm == "layernorm" else {})}
    rows = (config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim
    inner = config.num_attention_heads * config.head_dim

    def linear(prefix: str, out: int, into: int, bias: bool) -> dict[str, tuple[int, ...]]:
        return {f"{prefix}.weight": (out, into), **({f"{prefix}.bias": (out,)} if bias else {})}

    block = {f"norm1.{key}": shape for key, shape in norm.items()}
    block |= linear("attention.qkv", rows, h, config.qkv_bias) | linear("attention.out", h, inner, config.attention_out_bias)
    if config.qk_norm:
        block |= {"attention.query_norm.weight": (config.head_dim,), "attention.key_norm.weight": (config.head_dim,)}
    if not (config.parallel_residual and config.shared_residual_norm):
        block |= {f"norm2.{key}": shape for key, shape in norm.items()}
    block |= linear("mlp.up", f, h, config.mlp_bias)
    if config.gated:
        block |= linear("mlp.gate", f, h, config.mlp_bias)
    block |= linear("mlp.down", h, f, config.mlp_bias)
    if config.lora is not None:
        block |= adapter_shapes(config.lora, block)
    shapes = {"embedding.word.weight": (config.vocab_size, h)}
    if config.position_embedding == "learned":
        shapes["embedding.position.weight"] = (config.max_position_embeddings, h)
    shapes |= {f"layers.{i}.{name}": shape for i in range(config.num_layers) for name, shape in block.items()}
    shapes |= {f"norm.{key}": shape for key, shape in norm.items()}
    if config.output == "score":
        shapes["score.weight"] = (1, h)
    elif not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, h)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the logical model: without vocabulary padding, tied weights once."""
    return sum(math.prod(shape) for shape in logical_shapes(config).values())


def flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """FLOPs of forward and backward per token: 2 per multiply-add, backward twice the forward, recomputation not counted.

    Matrix products and attention only. Attention is counted in full, as in Megatron-LM's and llm-foundry's tables: every
    query against all seq_length keys (sliding_window keys where that is fewer), though the causal mask hides half.
    """
    matrices = config.num_layers * block_parameters(config) + config.vocab_size * config.hidden_size
    keys = min(seq_length, config.sliding_window or seq_length)
    attention = 2 * config.num_layers * config.num_attention_heads * config.head_dim * keys
    return 6 * (matrices + attention)
