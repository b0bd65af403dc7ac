"""Parameters and micro-batch tensors of one process under a parallel layout, in elements and bytes."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, cached_property

from neox.config.schema import Config, ModelConfig
from neox.config.validate import BatchSizes, batch_sizes
from neox.engine.footprint import optimizer_state_keys
from neox.model.adapters import is_trained
from neox.model.partition import partition_layers
from neox.model.shapes import logical_shapes

# Dimension along which tensor parallelism shards a parameter of a block; the others are replicated.
SHARDED_DIM = {
    "attention.qkv.weight": 0,
    "attention.qkv.bias": 0,
    "attention.out.weight": 1,
    "mlp.up.weight": 0,
    "mlp.up.bias": 0,
    "mlp.gate.weight": 0,
    "mlp.gate.bias": 0,
    "mlp.down.weight": 1,
}
# Of the factors of an adapter (B A), the one with the sharded dimension of its matrix is sharded.
SHARDED_DIM |= {
    name.replace("weight", "lora_b" if dim == 0 else "lora_a"): dim
    for name, dim in SHARDED_DIM.items()
    if name.endswith(".weight")
}
TABLES = ("embedding.word.weight", "head.weight")
ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes


@dataclass(frozen=True)
class Stage:
    """Parameters of one pipeline stage on one process, including padding of the vocabulary.

    Attributes:
        number: index of the stage.
        first: its first block.
        end: end of its blocks (exclusive).
        block: local shape of every parameter of a block, by name within the block.
        ends: local shape of the other parameters (embeddings, final norm, head), by name.
        tied: elements of the copy of a tied embedding on the last stage, which is not a parameter.
        frozen: names of parameters that are not trained, in the form of `block` and `ends`.
    """

    number: int
    first: int
    end: int
    block: dict[str, tuple[int, ...]]
    ends: dict[str, tuple[int, ...]]
    tied: int = 0
    frozen: frozenset[str] = frozenset()

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.end - self.first

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Local shape of every parameter, by name."""
        blocks = {
            f"layers.{i}.{name}": shape for i in range(self.first, self.end) for name, shape in self.block.items()
        }
        return self.ends | blocks

    @cached_property
    def parameters(self) -> int:
        """Number of elements of all parameters."""
        return elements(self.ends) + self.blocks * elements(self.block)

    @cached_property
    def trained(self) -> int:
        """Number of elements of the parameters that are trained."""
        return elements(self.ends, self.frozen) + self.blocks * elements(self.block, self.frozen)

    @cached_property
    def largest(self) -> int:
        """Number of elements of the largest trained parameter; 0 if none is trained."""
        shapes = (self.block | self.ends).items()
        return max((math.prod(shape) for name, shape in shapes if name not in self.frozen), default=0)

    @cached_property
    def adapted(self) -> int:
        """Number of elements of the matrices of a block that have an adapter."""
        matrices = [name.replace("lora_a", "weight") for name in self.block if name.endswith(".lora_a")]
        return sum(math.prod(self.block[name]) for name in matrices)


def elements(shapes: dict[str, tuple[int, ...]], excluded: Collection[str] = ()) -> int:
    """Total number of elements of some parameters."""
    return sum(math.prod(shape) for name, shape in shapes.items() if name not in excluded)


@dataclass(frozen=True)
class ResolvedLayout:
    """The layout of a config on a number of processes.

    Attributes:
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        cp: context-parallel size.
        dp: data-parallel size.
        sequence: whether the residual stream is sharded over the tensor group.
        batch: batch sizes of a step.
        stages: pipeline stages.
    """

    tp: int
    pp: int
    cp: int
    dp: int
    sequence: bool
    batch: BatchSizes
    stages: tuple[Stage, ...]

    @property
    def replicas(self) -> int:
        """Number of processes with the same parameters."""
        return self.dp * self.cp


def local_shape(name: str, shape: tuple[int, ...], model: ModelConfig, tp: int) -> tuple[int, ...]:
    """Return the shape of a parameter on one process, from its logical shape."""
    if name in TABLES:
        return model.padded_vocab_size(tp) // tp, shape[1]
    dim = SHARDED_DIM.get(name.split(".", 2)[2]) if name.startswith("layers.") else None
    return shape if dim is None else tuple(size // tp if i == dim else size for i, size in enumerate(shape))


def make_stages(model: ModelConfig, tp: int, ranges: list[tuple[int, int]]) -> tuple[Stage, ...]:
    """Return the stages of a model, whose blocks are `ranges`: (first, end) of each stage."""
    logical = logical_shapes(model.model_copy(update={"num_layers": 1}))  # all blocks have the same shapes
    local = {name: local_shape(name, shape, model, tp) for name, shape in logical.items()}
    block = {name.split(".", 2)[2]: shape for name, shape in local.items() if name.startswith("layers.")}
    frozen = {name for name in block if not is_trained(model, f"layers.0.{name}")}
    frozen |= {name for name in local if not name.startswith("layers.") and not is_trained(model, name)}
    stages = []
    for number, (first, end) in enumerate(ranges):
        last = number == len(ranges) - 1
        ends = {name: shape for name, shape in local.items() if name.startswith("embedding.") and number == 0}
        ends |= {name: shape for name, shape in local.items() if name.startswith(("norm.", "head.", "score.")) and last}
        tied = math.prod(local["embedding.word.weight"]) if last and number > 0 and model.head_is_tied else 0
        stages.append(Stage(number, first, end, block, ends, tied, frozenset(frozen)))
    return tuple(stages)


@cache
def partition(model: ModelConfig, stages: int, how: str | tuple[int, ...]) -> list[tuple[int, int]]:
    """Cached `partition_layers`: a search calls it many times for the same model."""
    return partition_layers(model, stages, how)


def resolve(config: Config, world_size: int) -> ResolvedLayout:
    """Return the layout of a config that satisfies LAYOUT_RULES for the world size."""
    parallel = config.parallel
    ranges = (
        partition(config.model, parallel.pipeline, parallel.partition)
        if parallel.pipeline > 1
        else [(0, config.model.num_layers)]
    )
    batch = batch_sizes(config, world_size)
    stages = make_stages(config.model, parallel.tensor, ranges)
    return ResolvedLayout(
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        batch.dp,
        parallel.sequence and parallel.tensor > 1,
        batch,
        stages,
    )


def optimizer_elements(config: Config, stage: Stage) -> int:
    """Return the elements of optimizer state of a stage, excluding the fp32 weights."""

    def state(prefix: str, shapes: dict[str, tuple[int, ...]]) -> int:
        return sum(
            len(optimizer_state_keys(config.optimizer, prefix + name, len(shape))) * math.prod(shape)
            for name, shape in shapes.items()
            if name not in stage.frozen
        )

    return state("", stage.ends) + stage.blocks * state(f"layers.{stage.first}.", stage.block)


@dataclass(frozen=True)
class MicroBatch:
    """Sizes of the tensors of one micro-batch on one process, in bytes unless stated otherwise.

    Attributes:
        tokens: number of tokens of the process; with context parallelism of its part of the sequence.
        element: bytes per element of activations.
        stream: residual stream [b, s, h]; with sequence parallelism the local shard.
        full_stream: residual stream without sequence parallelism.
        qkv: output of the fused QKV projection.
        heads: outputs of the attention heads.
        queries_keys: queries and keys.
        lse: log-sum-exp of the attention, fp32, per head and query.
        inner: one tensor of the MLP's width.
        logits: logits of the last stage.
        statistics: mean and inverse deviation of one norm of the residual stream, fp32.
    """

    tokens: int
    element: int
    stream: int
    full_stream: int
    qkv: int
    heads: int
    queries_keys: int
    lse: int
    inner: int
    logits: int
    statistics: int


def micro_batch(config: Config, layout: ResolvedLayout) -> MicroBatch:
    """Return the tensor sizes of one micro-batch."""
    model, element = config.model, ELEMENT[config.precision.dtype]
    tokens = layout.batch.micro_batch_size * config.tokens_per_sample // layout.cp
    share = tokens // layout.tp if layout.sequence else tokens
    heads, groups, channels = (
        model.num_attention_heads // layout.tp,
        max(model.num_kv_heads // layout.tp, 1),
        model.head_dim,
    )
    return MicroBatch(
        tokens=tokens,
        element=element,
        stream=share * model.hidden_size * element,
        full_stream=tokens * model.hidden_size * element,
        qkv=tokens * (heads + 2 * groups) * channels * element,
        heads=tokens * heads * channels * element,
        queries_keys=tokens * (heads + groups) * channels * element,
        lse=tokens * heads * 4,
        inner=tokens * model.intermediate_size // layout.tp * element,
        logits=tokens * 4  # fp32 scores
        if model.output == "score"
        else tokens * model.padded_vocab_size(layout.tp) // layout.tp * element,
        statistics=share * (8 if model.norm == "layernorm" else 4),
    )
