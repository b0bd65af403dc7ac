"""Bytes that a process sends per step, collective by collective, and the lower bound of the layout.

A ring (Patarasuk and Yuan, 2009) of n members sends per member, for a full tensor of S bytes: all-reduce 2 (n - 1)/n S,
all-gather, reduce-scatter and all-to-all (n - 1)/n S. A point-to-point message sends S.
benchmarks/train/bench_scaling.py compares these sums with measured traffic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from neox.config.schema import Config
from neox.engine.footprint import LIVE, effective_stage
from neox.plan.sizes import ELEMENT, ResolvedLayout, Stage, micro_batch

WIRE = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}  # x (n - 1)/n


def wire_bytes(kind: str, size: float, members: int) -> float:
    """Return the bytes that a member of a ring sends for one collective over a full tensor of `size` bytes."""
    return size if kind == "send" else WIRE[kind] * (members - 1) / members * size


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in a step.

    Attributes:
        axis: "tensor", "context", "pipeline" or "data".
        what: description.
        kind: name of the collective, or "send".
        size: bytes of the full tensor.
        count: number per step.
        members: size of the group.
    """

    axis: str
    what: str
    kind: str
    size: float
    count: int
    members: int

    @property
    def sent(self) -> float:
        """Bytes that a process sends per step."""
        return self.count * wire_bytes(self.kind, self.size, self.members)


def tensor_traffic(config: Config, layout: ResolvedLayout, stage: Stage) -> list[Traffic]:
    """List the all-reduces of row-parallel outputs and of column-parallel input gradients.

    With sequence parallelism each all-reduce is a reduce-scatter and an all-gather.
    """
    model, micro, count = config.model, micro_batch(config, layout), layout.batch.gradient_accumulation
    first, last = stage.number == 0, stage.number == layout.pp - 1
    # All-reduces per block in the forward pass, and in the recomputation of a block.
    outputs = 1 if model.parallel_residual and not model.hidden_dropout else 2
    recomputed = outputs - (0 if model.hidden_dropout else 1) if config.train.activation_checkpointing == "full" else 0
    # Parameters of which each member sees a part of the sequence.
    partial = ("norm", "attention.out.bias", "mlp.down.bias", "embedding.position")
    vectors = [
        stage.blocks * math.prod(shape) for name, shape in stage.block.items() if any(part in name for part in partial)
    ]
    vectors += [math.prod(shape) for name, shape in stage.ends.items() if any(part in name for part in partial)]
    rows = []

    def add(what: str, kind: str, times: int, size: float = micro.full_stream) -> None:
        if times:
            rows.append(Traffic("tensor", what, kind, size, times * count, layout.tp))

    if layout.sequence:
        inputs = 2 * stage.blocks + last
        add("outputs of the blocks, embedding", "reduce_scatter", (outputs + recomputed) * stage.blocks + first)
        add(
            "inputs of the blocks, head",
            "all_gather",
            inputs + (2 * stage.blocks if config.train.activation_checkpointing == "full" else 0),
        )
        add("gradients of the inputs", "reduce_scatter", inputs)
        add("inputs for the weights' gradients", "all_gather", inputs)
        add("gradients of the outputs", "all_gather", outputs * stage.blocks + first)
        add("gradients of norms and output biases", "all_reduce", 1, sum(vectors) * micro.element)
    else:
        add("outputs of the blocks, embedding", "all_reduce", (outputs + recomputed) * stage.blocks + first)
        add("gradients of the inputs", "all_reduce", 2 * stage.blocks + last)
        if model.qk_norm:
            add("gradients of the heads' norms", "all_reduce", 2 * stage.blocks, model.head_dim * micro.element)
    if last:
        add("statistics of the loss", "all_reduce", 1, 16 * micro.tokens)
    return rows


def context_traffic(config: Config, layout: ResolvedLayout, stage: Stage) -> list[Traffic]:
    """List the all-to-alls of projections and head outputs: forward, backward, and in recomputed blocks."""
    micro = micro_batch(config, layout)
    passes = 3 if config.train.activation_checkpointing == "full" else 2
    count = passes * stage.blocks * layout.batch.gradient_accumulation
    return [
        Traffic("context", "queries, keys, values", "all_to_all", micro.qkv, count, layout.cp),
        Traffic("context", "outputs of the heads", "all_to_all", micro.heads, count, layout.cp),
    ]


def pipeline_traffic(config: Config, layout: ResolvedLayout, stage: Stage) -> list[Traffic]:
    """List the messages between stages: residual stream, its gradient, and a tied embedding with its gradient."""
    micro, count = micro_batch(config, layout), layout.batch.gradient_accumulation
    first, last = stage.number == 0, stage.number == layout.pp - 1
    rows = []
    if not last:
        rows.append(Traffic("pipeline", "residual stream", "send", micro.stream, count, layout.pp))
    if not first:
        rows.append(Traffic("pipeline", "its gradient", "send", micro.stream, count, layout.pp))
    if config.model.head_is_tied and layout.pp > 1:
        table = config.model.padded_vocab_size(layout.tp) // layout.tp * config.model.hidden_size
        if first:
            rows.append(Traffic("pipeline", "tied embedding", "send", table * micro.element, 1, layout.pp))
        if last:
            rows.append(Traffic("pipeline", "gradient of the tied embedding", "send", table * 4, 1, layout.pp))
    return rows


def data_traffic(config: Config, layout: ResolvedLayout, stage: Stage, lower_bound: bool) -> list[Traffic]:
    """List the collectives of gradients and weights over the replicas.

    Gradients have the dtype of the weights; deepspeed.communication_data_type is not considered.

    - Stage 0: one all-reduce of the gradients.
    - Stage 1: a reduce-scatter of the gradients and an all-gather of the weights.
    - Stage 2: a reduce-scatter per micro-batch.
    - Stage 3: also all-gathers of the weights per micro-batch, before the forward and the backward pass, or once if all
      weights may stay gathered in between; none after the update.

    DeepSpeed's stages 1 and 2 use an all-reduce where a reduce-scatter is sufficient; `lower_bound` assumes the latter.
    """
    zero, element = effective_stage(config), ELEMENT[config.precision.dtype]
    count, members, repeats = stage.parameters, layout.replicas, layout.batch.gradient_accumulation
    if zero == 0:
        return [Traffic("data", "gradients", "all_reduce", 4 * count, 1, members)]
    reduction = "reduce_scatter" if lower_bound or zero == 3 else "all_reduce"
    if zero == 1:
        return [
            Traffic("data", "gradients", reduction, element * count, 1, members),
            Traffic("data", "weights", "all_gather", element * count, 1, members),
        ]
    gathers = 1 if zero == 2 else repeats * (1 if count <= LIVE else 2)
    gradients = Traffic("data", "gradients", reduction, element * count, repeats, members)
    return [gradients, Traffic("data", "weights", "all_gather", element * count, gathers, members)]


def traffic(config: Config, layout: ResolvedLayout, stage: Stage, *, lower_bound: bool = False) -> list[Traffic]:
    """List the collectives of one process of a stage per step.

    Args:
        config: the run.
        layout: its resolved layout.
        stage: pipeline stage of the process.
        lower_bound: list what the layout must send instead of what DeepSpeed sends.
    """
    rows = tensor_traffic(config, layout, stage) if layout.tp > 1 else []
    rows += context_traffic(config, layout, stage) if layout.cp > 1 else []
    rows += pipeline_traffic(config, layout, stage) if layout.pp > 1 else []
    return rows + (data_traffic(config, layout, stage, lower_bound) if layout.replicas > 1 else [])
