"""Time of a step: arithmetic and traffic of the slowest stage at the device's speeds, bubbles of the pipeline, the update.

A model of first order. Matrix products reach `efficiency` of the peak, everything else is bound by memory, messages within a step are not hidden (the
sums over the tensor group partly are, which is not counted), and nothing waits for data. docs/plan.md says how far it was from what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from neox.config.schema import Config
from neox.engine.footprint import effective_stage
from neox.model.shapes import block_parameters, flops_per_token
from neox.plan.communication import traffic
from neox.plan.devices import Device
from neox.plan.memory import Memory
from neox.plan.sizes import Layout, Stage

TOUCHED = 3.0  # times that what a block keeps is read or written beside the products, forward and backward
STREAMING = 0.8  # share of the memory's bandwidth that element-wise work reaches


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and what they are made of.

    Attributes:
        total: of the step.
        products: matrix products and attention of the slowest stage.
        elementwise: the rest of the forward and backward.
        messages: tensor, context and pipeline traffic.
        bubble: waiting of the pipeline.
        reduction: gradients and weights over the replicas.
        update: the optimizer.
        flops: of the whole model, all processes, recomputation not counted.
        executed: FLOPs of a process of the slowest stage, recomputation counted, masked halves of the attention not.
    """

    total: float
    products: float
    elementwise: float
    messages: float
    bubble: float
    reduction: float
    update: float
    flops: float
    executed: float


def stage_flops(config: Config, layout: Layout, stage: Stage) -> float:
    """FLOPs that one process of a stage executes for one micro-batch: causal attention looks at half of the keys, recomputed blocks count again."""
    model, length = config.model, config.data.seq_length
    tokens = layout.batch.micro_batch_size * length / layout.cp
    window = min(length, model.sliding_window or length)
    keys = window * (1 - window / (2 * length))  # mean over the queries of a causal window
    block = 2 * block_parameters(model) + 4 * model.num_attention_heads * model.head_dim * keys
    forwards = 4 if config.train.activation_checkpointing == "full" else 3
    head = 6 * model.vocab_size * model.hidden_size if stage.number == layout.pp - 1 else 0
    return tokens * (stage.blocks * block * forwards + head) / layout.tp


def bandwidth_of(axis: str, layout: Layout, device: Device) -> float:
    """Bytes/s of a group: the link where its ranks are of one node (rank = ((pp DP + dp) CP + cp) TP + tp), else the network."""
    reach = {"tensor": layout.tp, "context": layout.tp * layout.cp, "data": layout.tp * layout.cp * layout.dp}
    reach["pipeline"] = reach["data"] * layout.pp
    return device.link if reach[axis] <= device.per_node else device.network


def step_time(config: Config, layout: Layout, memories: list[Memory], device: Device) -> StepTime:
    """The time of a step."""
    repeats = layout.batch.gradient_accumulation
    peak = device.peak(config.precision.dtype) * device.efficiency
    best: StepTime | None = None
    for stage, memory in zip(layout.stages, memories, strict=True):
        act = memory.activations
        executed = stage_flops(config, layout, stage) * repeats
        products = executed / peak
        touched = TOUCHED * (act.whole + act.recomputed * stage.blocks) + 4 * act.logits
        elementwise = repeats * touched / (device.bandwidth * STREAMING)
        sent = {"tensor": 0.0, "context": 0.0, "pipeline": 0.0, "data": 0.0}
        for row in traffic(config, layout, stage):
            sent[row.axis] += row.sent / bandwidth_of(row.axis, layout, device)
        messages = sent["tensor"] + sent["context"] + sent["pipeline"]
        bubble = (products + elementwise + messages) * (layout.pp - 1) / repeats
        # Masters and state are read and written, gradients read, weights written.
        update = (2 * memory.optimizer + memory.gradients / (layout.replicas if effective_stage(config) == 1 else 1) + memory.parameters) / (
            device.bandwidth * STREAMING
        )
        total = products + elementwise + messages + bubble + sent["data"] + update
        if best is None or total > best.total:
            flops = flops_per_token(config.model, config.data.seq_length) * layout.batch.global_batch_size * config.data.seq_length
            best = StepTime(total, products, elementwise, messages, bubble, sent["data"], update, flops, executed)
    return best
