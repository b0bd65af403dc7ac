"""Time of a step: computation and communication of the slowest stage, the pipeline bubble, and the optimizer update.

This is a first-order model. Matrix products reach `efficiency` of the peak, everything else is bound by memory
bandwidth, communication within a step is not overlapped, and the step never waits for data. docs/plan.md compares it
with measured times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neox.config.schema import Config
from neox.engine.footprint import effective_stage
from neox.model.shapes import block_parameters, flops_per_token, head_rows
from neox.plan.communication import traffic
from neox.plan.devices import Device
from neox.plan.memory import StageMemory
from neox.plan.sizes import ResolvedLayout, Stage

TOUCHED = 3.0  # reads and writes of each saved activation outside of matrix products, forward and backward
STREAMING = 0.8  # fraction of the memory bandwidth that element-wise kernels reach


@dataclass(frozen=True)
class StepTime:
    """Time of one step and its parts, in seconds unless stated otherwise.

    Attributes:
        total: the step.
        products: matrix products and attention of the slowest stage.
        elementwise: other kernels of the forward and backward pass.
        messages: tensor, context and pipeline communication.
        bubble: pipeline bubble.
        reduction: communication of gradients and weights over the replicas.
        update: optimizer update.
        flops: FLOPs of the model over all processes, without recomputation.
        executed: FLOPs of a process of the slowest stage, with recomputation, without masked attention.
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


def stage_flops(config: Config, layout: ResolvedLayout, stage: Stage) -> float:
    """Return the FLOPs of one process for one micro-batch, with recomputed blocks and without masked attention."""
    model, length = config.model, config.data.seq_length
    tokens = layout.batch.micro_batch_size * config.tokens_per_sample / layout.cp
    window = min(length, model.sliding_window or length)
    keys = window * (1 - window / (2 * length))  # mean over the queries of a causal window
    block = 2 * block_parameters(model) + 4 * model.num_attention_heads * model.head_dim * keys
    forwards = 4 if config.train.activation_checkpointing == "full" else 3
    head = 6 * head_rows(model) * model.hidden_size if stage.number == layout.pp - 1 else 0
    return tokens * (stage.blocks * block * forwards + head) / layout.tp


def bandwidth_of(axis: str, layout: ResolvedLayout, device: Device) -> float:
    """Return the bandwidth of a group in bytes/s: that of the link if its ranks are in one node, else of the network.

    Ranks are ((pp DP + dp) CP + cp) TP + tp.
    """
    reach = {"tensor": layout.tp, "context": layout.tp * layout.cp, "data": layout.tp * layout.cp * layout.dp}
    reach["pipeline"] = reach["data"] * layout.pp
    return device.link if reach[axis] <= device.per_node else device.network


def step_time(config: Config, layout: ResolvedLayout, memories: Sequence[StageMemory], device: Device) -> StepTime:
    """Estimate the time of a step: that of the slowest stage."""
    pairs = zip(layout.stages, memories, strict=True)
    return max((stage_time(config, layout, *pair, device) for pair in pairs), key=lambda time: time.total)


def stage_time(config: Config, layout: ResolvedLayout, stage: Stage, memory: StageMemory, device: Device) -> StepTime:
    """Estimate the time of a step if all stages were as slow as this one."""
    repeats, act = layout.batch.gradient_accumulation, memory.activations
    executed = stage_flops(config, layout, stage) * repeats
    products = executed / (device.peak(config.precision.dtype) * device.efficiency)
    touched = TOUCHED * (act.uncheckpointed + act.recomputed * stage.blocks) + 4 * act.logits
    elementwise = repeats * touched / (device.bandwidth * STREAMING)

    sent = {"tensor": 0.0, "context": 0.0, "pipeline": 0.0, "data": 0.0}
    for row in traffic(config, layout, stage):
        sent[row.axis] += row.sent / bandwidth_of(row.axis, layout, device)
    messages = sent["tensor"] + sent["context"] + sent["pipeline"]
    bubble = (products + elementwise + messages) * (layout.pp - 1) / repeats

    # Master weights and state are read and written, gradients are read, weights are written.
    gradients = memory.gradients / (layout.replicas if effective_stage(config) == 1 else 1)
    update = (2 * memory.optimizer + gradients + memory.parameters) / (device.bandwidth * STREAMING)

    tokens = layout.batch.global_batch_size * config.tokens_per_sample
    flops = flops_per_token(config.model, config.data.seq_length) * tokens
    total = products + elementwise + messages + bubble + sent["data"] + update
    return StepTime(total, products, elementwise, messages, bubble, sent["data"], update, flops, executed)
