"""Sizes of what one process of a layout holds: its parameters, and the tensors of its micro-batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

from neox.config.schema import Config, ModelConfig
from neox.config.validate import BatchSizes, batch_sizes
from neox.engine.footprint import optimizer_state_keys
from neox.model.partition import partition_layers
from neox.model.shapes import logical_shapes

# Dimension along which a parameter of a block is cut over the tensor group; the others are whole on every member.
CUT = {
    "attention.qkv.weight": 0,
    "attention.qkv.bias": 0,
    "attention.out.weight": 1,
    "mlp.up.weight": 0,
    "mlp.up.bias": 0,
    "mlp.gate.weight": 0,
    "mlp.gate.bias": 0,
    "mlp.down.weight": 1,
}
TABLES = ("embedding.word.weight", "head.weight")
ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes


@dataclass(frozen=True)
class Stage:
    """The parameters of one pipeline stage on one process, padding of the vocabulary included.

    Attributes:
        number: of the stage.
        first, behind: its blocks.
        block: local shape of every parameter of a block, by name within it.
        ends: of the others (embeddings, final norm, head), by name.
        tied: elements of the last stage's copy of a tied embedding, which is no parameter.
    """

    number: int
    first: int
    behind: int
    block: dict[str, tuple[int, ...]]
    ends: dict[str, tuple[int, ...]]
    tied: int = 0

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.behind - self.first

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Local shape of every parameter, by name."""
        blocks = {f"layers.{i}.{name}": shape for i in range(self.first, self.behind) for name, shape in self.block.items()}
        return self.ends | blocks

    @cached_property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return elements(self.ends) + self.blocks * elements(self.block)

    @cached_property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(math.prod(shape) for shape in [*self.block.values(), *self.ends.values()])


def elements(shapes: dict[str, tuple[int, ...]]) -> int:
    """Elements of some parameters together."""
    return sum(math.prod(shape) for shape in shapes.values())


@dataclass(frozen=True)
class Layout:
    """A config over a number of processes, resolved.

    Attributes:
        tp, pp, cp, dp: sizes of the axes.
        sequence: whether the residual stream is cut over the tensor group.
        batch: the batch triangle.
        stages: of the pipeline.
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
        """Processes that hold the same parameters."""
        return self.dp * self.cp


def local_shape(name: str, shape: tuple[int, ...], model: ModelConfig, tp: int) -> tuple[int, ...]:
    """Shape on one member of the tensor group of a parameter with a logical shape."""
    if name in TABLES:
        return model.padded_vocab_size(tp) // tp, shape[1]
    dim = CUT.get(name.split(".", 2)[2]) if name.startswith("layers.") else None
    return shape if dim is None else tuple(size // tp if i == dim else size for i, size in enumerate(shape))


def make_stages(model: ModelConfig, tp: int, cuts: list[tuple[int, int]]) -> tuple[Stage, ...]:
    """The stages of a model whose blocks are shared out as `cuts` says ((first, behind) of each)."""
    logical = logical_shapes(model.model_copy(update={"num_layers": 1}))  # one block stands for all
    local = {name: local_shape(name, shape, model, tp) for name, shape in logical.items()}
    block = {name.split(".", 2)[2]: shape for name, shape in local.items() if name.startswith("layers.")}
    stages = []
    for number, (first, behind) in enumerate(cuts):
        last = number == len(cuts) - 1
        ends = {name: shape for name, shape in local.items() if name.startswith("embedding.") and number == 0}
        ends |= {name: shape for name, shape in local.items() if name.startswith(("norm.", "head.")) and last}
        tied = math.prod(local["embedding.word.weight"]) if last and number > 0 and model.tie_embeddings else 0
        stages.append(Stage(number, first, behind, block, ends, tied))
    return tuple(stages)


@cache
def partition(model: ModelConfig, stages: int, how: str | tuple[int, ...]) -> list[tuple[int, int]]:
    """`partition_layers`, once for each model and number of stages: a search asks again and again."""
    return partition_layers(model, stages, how)


def resolve(config: Config, world_size: int) -> Layout:
    """The layout of a config that has been checked against the world size."""
    parallel = config.parallel
    cuts = partition(config.model, parallel.pipeline, parallel.partition) if parallel.pipeline > 1 else [(0, config.model.num_layers)]
    batch = batch_sizes(config, world_size)
    stages = make_stages(config.model, parallel.tensor, cuts)
    return Layout(parallel.tensor, parallel.pipeline, parallel.context, batch.dp, parallel.sequence and parallel.tensor > 1, batch, stages)


def optimizer_elements(config: Config, stage: Stage) -> int:
    """Elements of optimizer state beside the fp32 weights, for all parameters of a stage."""

    def state(prefix: str, shapes: dict[str, tuple[int, ...]]) -> int:
        return sum(len(optimizer_state_keys(config.optimizer, prefix + name, len(shape))) * math.prod(shape) for name, shape in shapes.items())

    return state("", stage.ends) + stage.blocks * state(f"layers.{stage.first}.", stage.block)


@dataclass(frozen=True)
class MicroBatch:
    """Bytes of the tensors that one micro-batch has on one process.

    Attributes:
        tokens: of the process; with context parallelism its part.
        element: bytes of an element of activations.
        stream: the residual stream [b, s, h], its own part with sequence parallelism.
        whole: the same without sequence parallelism's cut.
        qkv: output of the fused projection.
        heads: outputs of the attention heads.
        queries_keys: queries and keys alone.
        lse: log of the softmax's sum, fp32, of every head and query.
        inner: one tensor of the MLP's width.
        logits: of the last stage.
        statistics: mean and 1/deviation of one norm of the stream.
    """

    tokens: int
    element: int
    stream: int
    whole: int
    qkv: int
    heads: int
    queries_keys: int
    lse: int
    inner: int
    logits: int
    statistics: int


def micro_batch(config: Config, layout: Layout) -> MicroBatch:
    """The tensors of one micro-batch under a layout."""
    model, element = config.model, ELEMENT[config.precision.dtype]
    tokens = layout.batch.micro_batch_size * config.data.seq_length // layout.cp
    share = tokens // layout.tp if layout.sequence else tokens
    heads, groups, channels = model.num_attention_heads // layout.tp, max(model.num_kv_heads // layout.tp, 1), model.head_dim
    return MicroBatch(
        tokens=tokens,
        element=element,
        stream=share * model.hidden_size * element,
        whole=tokens * model.hidden_size * element,
        qkv=tokens * (heads + 2 * groups) * channels * element,
        heads=tokens * heads * channels * element,
        queries_keys=tokens * (heads + groups) * channels * element,
        lse=tokens * heads * 4,
        inner=tokens * model.intermediate_size // layout.tp * element,
        logits=tokens * model.padded_vocab_size(layout.tp) // layout.tp * element,
        statistics=share * (8 if model.norm == "layernorm" else 4),
    )
